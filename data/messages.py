"""Values of a user in messages: short and printable, also if they are megabytes or control characters."""

import reprlib

# Characters of a value in a message, of a path or another library's message, and of the reason of a rejected item.
MAX_VALUE = 60
MAX_TEXT = 200
MAX_REASON = 500


def brief(value: object) -> str:
    """The repr of a value, in at most MAX_VALUE characters; a large value costs no time."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = MAX_VALUE
    return one_line(short.repr(value), MAX_VALUE)


def one_line(text: object, most: int = MAX_TEXT) -> str:
    """Text in at most `most` characters, the middle left out, with escapes for what a terminal cannot show."""
    text = str(text)
    if len(text) > most:
        text = f"{text[: most - most // 3 - 3]}...{text[len(text) - most // 3 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
