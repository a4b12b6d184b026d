"""Values of a user in messages: short, printable, and both ends of a long one there."""

import io

import pytest

from data.messages import MAX_VALUE, brief, one_line
from data.plain_pickle import load_plain


@pytest.mark.parametrize(
    "value", ["a" * 10**7, {"image": "x" * 10**6, "b": [["y" * 999] * 99] * 99}, 10**4000, ["a"] * 10**6, b"z" * 10**6]
)
def test_a_value_of_any_size_is_short_in_a_message(value):
    assert len(brief(value)) <= MAX_VALUE


def test_a_pickle_cannot_fill_a_message():
    with pytest.raises(ValueError, match="a.pkl cannot be read: it refers to") as caught:
        load_plain(io.BytesIO(b"c" + b"m" * 10**6 + b"\nname\n."), "a.pkl")
    assert len(str(caught.value)) < 300


def test_what_is_short_is_shown_whole():
    assert brief({"role": "user", "n": 3}) == "{'n': 3, 'role': 'user'}"
    assert one_line("a cat.png") == "a cat.png"


def test_long_text_keeps_both_ends_and_what_no_terminal_shows_is_escaped():
    assert one_line("/data/" + "x" * 999 + "/cat.png", 60).startswith("/data/xx")
    assert one_line("/data/" + "x" * 999 + "/cat.png", 60).endswith("xx/cat.png")
    assert len(one_line("x" * 999, 60)) == 60
    assert one_line("\ud800\n\x1b[2J") == r"\ud800\n\x1b[2J"
