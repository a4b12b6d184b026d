"""Values of a user in messages: short, printable, both ends of a long one kept."""

import pytest

from data.messages import MAX_VALUE, brief, one_line


@pytest.mark.parametrize("value", ["a" * 10**7, {"image": "x" * 10**6, "b": [["y" * 999] * 99] * 99}, 10**4000])
def test_a_value_of_any_size_is_short_in_a_message(value):
    assert len(brief(value)) <= MAX_VALUE


def test_short_values_are_kept_and_long_texts_keep_both_ends():
    assert brief({"role": "user", "n": 3}) == "{'n': 3, 'role': 'user'}"
    assert one_line("a cat.png") == "a cat.png"
    shown = one_line("/data/" + "x" * 999 + "/cat.png", 60)
    assert shown.startswith("/data/xx") and shown.endswith("xx/cat.png") and len(shown) == 60
    assert one_line("\ud800\n\x1b[2J") == r"\ud800\n\x1b[2J"
