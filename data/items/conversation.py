"""The standard form of an item: turns of a conversation, and the paths of its images. TRAIN.md describes it.

    {"conversations": [{"from": "human", "value": "draw"}, {"from": "gpt", "value": "<|image|>"}], "image": "a.png"}

Keys and symbols that carry meaning in other formats are rejected, never ignored.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from data.items.vocab import IMAGE_SYMBOL
from data.messages import brief

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
HOW_TO_ADAPT = "TRAIN.md, Another format, shows how to adapt such items (process_item)"
_FRAMES = "single frames in `image`? Videos are not tokenized."
# Key -> what is meant, in the words of this format.
_FOREIGN_KEYS = {
    "images": "`image`?",
    "video": _FRAMES,
    "videos": _FRAMES,
    "audio": "its text in `conversations`? Audio is not tokenized.",
    "audios": "its text in `conversations`? Audio is not tokenized.",
    "system": "a leading turn from `system`?",
    "messages": "`conversations`?",
    "history": "earlier turns of `conversations`?",
    "tools": "a leading turn from `system` that describes them?",
    "chosen": "a last turn from `gpt`?",
}
# Harmless beside `image`.
_IMAGE_KEYS = ("image_path", "image_paths", "image_file", "image_url", "image_urls", "img")
# Of LLaVA, Qwen-VL, InternVL, XComposer, Phi, Gemma and others. A tag with attributes is HTML and does not match.
_FOREIGN_SYMBOL = re.compile(
    r"<\|?(?:image|img|video|audio|vision)s?"
    r"(?:[ _-]?(?:\d+|start|end|bos|eos|pad|here|soft|token|context|placeholder))*\|?>"
    r"|<\|?(?:start|begin)_of_image\|?>|<im_start>",
    re.IGNORECASE,
)
_NO_PATH = re.compile(r"[a-z][a-z\d+.-]+://|data:", re.IGNORECASE)


class ItemError(ValueError):
    """This item cannot be used; the message is the reason."""


class FormatError(ItemError):
    """The item is not of this format at all. The whole input is probably wrong, so nothing should be started."""


@dataclass(frozen=True)
class Turn:
    """`role` is "human", "gpt" or "system". Only gpt turns are predicted."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """Turns whose image symbols match `image_paths` in number and order."""

    turns: tuple[Turn, ...]
    image_paths: tuple[str, ...] = ()


def parse_conversation(raw: Mapping) -> Conversation:
    """The conversation of one raw item. Raises FormatError without `conversations`, ItemError for any other reason."""
    if not isinstance(raw, Mapping):
        raise FormatError(f"an item must be an object with `conversations`, got {brief(raw)}")
    if "conversations" not in raw:
        keys = ", ".join(f"`{brief(key)[1:-1]}`" for key in list(raw)[:8]) or "no keys at all"
        raise FormatError(f"an item must have `conversations`, this one has {keys}")
    _check_keys(raw, "`{}`", () if raw.get("image") else _IMAGE_KEYS)
    turns = _parse_turns(raw["conversations"])
    image_paths = _parse_image_paths(raw.get("image"))
    num_symbols = sum(turn.text.count(IMAGE_SYMBOL) for turn in turns)
    if image_paths and not num_symbols:
        if problem := foreign_symbol_problem(turn.text for turn in turns):
            raise ItemError(f"{problem} {HOW_TO_ADAPT}")
        first = replace(turns[0], text=f"{IMAGE_SYMBOL} " * len(image_paths) + turns[0].text)
        return Conversation((first, *turns[1:]), image_paths)
    if num_symbols != len(image_paths):
        raise ItemError(
            f"the text has {num_symbols} {IMAGE_SYMBOL} but `image` lists {len(image_paths)}; "
            "each symbol stands for one image"
        )
    return Conversation(turns, image_paths)


def foreign_symbol_problem(texts: Iterable[str]) -> str:
    """The message for an item with images that has an image symbol of another format; "" if it has none."""
    found = next(filter(None, map(_FOREIGN_SYMBOL.search, texts)), None)
    return f"the text has {brief(found[0])[1:-1]} but no {IMAGE_SYMBOL}: did you mean {IMAGE_SYMBOL}?" if found else ""


def _check_keys(raw: Mapping, name: str, image_keys: Iterable[str]) -> None:
    for key, meant in [*_FOREIGN_KEYS.items(), *((key, "`image`?") for key in image_keys)]:
        if raw.get(key):
            raise ItemError(f"{name.format(key)} is not read: did you mean {meant} {HOW_TO_ADAPT}")


def _parse_turns(raw_turns: object) -> tuple[Turn, ...]:
    if not isinstance(raw_turns, list) or not raw_turns:
        raise ItemError(f"`conversations` must be a list of turns that is not empty, got {brief(raw_turns)}")
    turns = tuple(_parse_turn(raw, index) for index, raw in enumerate(raw_turns))
    num_leading = int(turns[0].role == "system")
    for index, turn in enumerate(turns[num_leading:]):
        expected = ("human", "gpt")[index % 2]
        if turn.role != expected:
            raise ItemError(
                f"turn {index + num_leading} is from {turn.role}, {expected} expected: turns alternate, human first, "
                "after an optional leading system turn"
            )
    if len(turns) < num_leading + 2:
        raise ItemError("there is nothing to predict: no turn is from gpt")
    return turns


def _parse_turn(raw: object, index: int) -> Turn:
    if not isinstance(raw, Mapping) or "from" not in raw or "value" not in raw:
        is_openai = isinstance(raw, Mapping) and ("role" in raw or "content" in raw)
        hint = f"; did you mean `from` for `role`, `value` for `content`? {HOW_TO_ADAPT}" if is_openai else ""
        raise ItemError(f"turn {index} must be an object with `from` and `value`, got {brief(raw)}{hint}")
    _check_keys(raw, f"`{{}}` of turn {index}", ("image", *_IMAGE_KEYS))
    role, text = raw["from"], raw["value"]
    if not isinstance(role, str) or role not in ROLES:
        raise ItemError(f"turn {index} is from {brief(role)}; `from` must be one of {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise ItemError(f"`value` of turn {index} must be text, got {brief(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ItemError(f"`value` of turn {index} has half of a surrogate pair, which is not text") from None
    if not text and ROLES[role] == "gpt":
        raise ItemError(f"turn {index} is from {role} and empty, so the model would learn to end at once")
    return Turn(ROLES[role], text)


def _parse_image_paths(raw: object) -> tuple[str, ...]:
    if raw is None or raw == "":
        return ()
    paths = [raw] if isinstance(raw, str) else raw
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ItemError(f"`image` must be a path or a list of paths, got {brief(raw)}")
    if no_path := next((path for path in paths if _NO_PATH.match(path)), None):
        raise ItemError(f"`image` must be the path of a file (no URL, no base64): write one, got {brief(no_path)}")
    return tuple(paths)
