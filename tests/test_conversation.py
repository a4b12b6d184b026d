"""The input rules of items, each refusal by its reason."""

import pytest

from data.conversation import FormatError, ItemError, Turn, parse_conversation

HELLO = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


@pytest.mark.parametrize("image", [{}, {"image": None}, {"image": []}, {"image": ""}])
def test_text_only_items(image):
    conversation = parse_conversation({"conversations": HELLO, **image})
    assert conversation.turns == (Turn("human", "Hi"), Turn("gpt", "Hello"))
    assert conversation.image_paths == ()


def test_roles_have_two_names_and_a_system_turn_may_lead():
    turns = [{"from": "system", "value": "S"}, {"from": "user", "value": "U"}, {"from": "assistant", "value": "A"}]
    assert [turn.role for turn in parse_conversation({"conversations": turns}).turns] == ["system", "human", "gpt"]


def test_images_without_symbols_are_put_first_each_with_a_space():
    conversation = parse_conversation({"conversations": HELLO, "image": ["a.png", "b.png"]})
    assert conversation.turns[0].text == "<|image|> <|image|> Hi"
    assert parse_conversation({"conversations": HELLO, "image": "a.png"}).image_paths == ("a.png",)


@pytest.mark.parametrize("raw", [[], "text", {}, {"image_path": "a", "prompt": "b"}])
def test_items_of_another_format_are_told_apart(raw):
    with pytest.raises(FormatError, match="conversations"):
        parse_conversation(raw)


@pytest.mark.parametrize(
    "turns, reason",
    [
        ([], "not empty"),
        ({}, "list of turns"),
        (HELLO[:1], "nothing to predict"),
        ([{"from": "system", "value": "S"}, HELLO[0]], "nothing to predict"),
        (HELLO[1:], "turn 0 is from gpt, human expected"),
        ([*HELLO, HELLO[1]], "turn 2 is from gpt, human expected"),
        ([*HELLO, {"from": "system", "value": "S"}], "turn 2 is from system"),
        ([{"from": "bot", "value": "x"}, HELLO[1]], "must be one of human"),
        ([{"value": "x"}, HELLO[1]], "`from` and `value`"),
        ([{"from": "human", "value": None}, HELLO[1]], "`value` of turn 0 must be text"),
        ([{"from": ["human"], "value": "x"}, HELLO[1]], "must be one of human"),
        (["Hi", HELLO[1]], "turn 0 must be an object"),
        ([{"from": "human", "value": "\ud800"}, HELLO[1]], "surrogate"),
        ([{"from": "human", "value": "<|image|>"}, HELLO[1]], r"has 1 <\|image\|> but `image` lists 0"),
    ],
)
def test_wrong_turns_are_refused_with_the_reason(turns, reason):
    with pytest.raises(ItemError, match=reason) as caught:
        parse_conversation({"conversations": turns})
    assert not isinstance(caught.value, FormatError)


@pytest.mark.parametrize("image", [5, ["a", None], [""], {"path": "a"}])
def test_wrong_image_lists_are_refused(image):
    with pytest.raises(ItemError, match="path or a list of paths"):
        parse_conversation({"conversations": HELLO, "image": image})


def test_symbols_and_images_are_counted():
    turns = [{"from": "human", "value": "<|image|> and <|image|>"}, HELLO[1]]
    with pytest.raises(ItemError, match=r"has 2 <\|image\|> but `image` lists 1"):
        parse_conversation({"conversations": turns, "image": "a.png"})
