"""Rows of other forms: what each becomes, and what is rejected with which reason."""

import pytest

from data.items.conversation import FormatError, ItemError, Turn
from data.items.rows import Pairs, describe_row, parse_pairs, parse_row

ANSWER = {"role": "assistant", "content": "A cat."}


def messages(content: object, **others: object) -> dict:
    return {"messages": [{"role": "user", "content": content}, ANSWER], **others}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


EXPECTED = (Turn("human", "What <|image|>?"), Turn("gpt", "A cat."))


@pytest.mark.parametrize(
    "row, image",
    [
        (messages([text("What "), {"type": "image", "image": "a.png"}, text("?")]), "a.png"),
        (messages([text("What "), {"type": "image", "url": "a.png", "image": None}, text("?")]), "a.png"),
        (messages([text("What "), {"type": "image"}, text("?")], images=[b"png"]), b"png"),
        (messages([text("What "), {"type": "image_url", "image_url": {"url": "http://x/a"}}, text("?")]), "http://x/a"),
        (messages("What <image>?", images=["a.png"]), "a.png"),
        (messages("What <|image|>?", image={"bytes": b"png", "path": None}), {"bytes": b"png", "path": None}),
        (
            {"conversations": [{"from": "human", "value": "What <image>?"}, {"from": "gpt", "value": "A cat."}]}
            | {"images": ["a.png"], "id": 3},
            "a.png",
        ),
    ],
)
def test_forms_of_one_conversation(row, image):
    parsed = parse_row(row)
    assert (parsed.turns, parsed.images, parsed.is_sized) == (EXPECTED, (image,), False)


def test_messages_keep_their_system_turn_and_several_images():
    row = messages(
        [{"type": "image"}, {"type": "image", "path": "b.png"}, {"type": "image"}], images=["a.png", "c.png"]
    )
    row["messages"].insert(0, {"role": "system", "content": "Be short."})
    parsed = parse_row(row)
    assert parsed.turns[:2] == (Turn("system", "Be short."), Turn("human", "<|image|><|image|><|image|>"))
    assert parsed.images == ("a.png", "b.png", "c.png")


@pytest.mark.parametrize(
    "row, reason",
    [
        (messages([{"type": "video", "video": "a.mp4"}]), "a part of message 0 must be text, image or image_url"),
        (messages([{"type": "image"}]), "an image part of message 0 has no `image`, and none is left in `images`"),
        (messages([{"type": "image"}], images=["a", "b"]), "`images` lists 2, but image parts take 1 of them"),
        (messages([text("<|image|>"), {"type": "image", "image": "a"}]), r"has 2 <\|image\|> but `image` lists 1"),
        (messages(None), "`value` of turn 0 must be text"),
        (messages("x", conversations=[1]), "`messages` and `conversations` are both there"),
        (messages("x", image="a", images=["b"]), "`image` and `images` are both there"),
        (messages("x", videos=["a.mp4"]), "`videos` is not read"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"message 0 must be .*role.* \(system, user, assistant\)"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "`tool_calls` of message 0 is not read"),
        ({"messages": "x"}, "`messages` must be a list"),
        ({"messages": None, "conversations": None}, "`messages` must be a list that is not empty, got None"),
        ({"messages": []}, "`messages` must be a list that is not empty"),
        ({"messages": [ANSWER]}, "turn 0 is from gpt, human expected"),
    ],
)
def test_wrong_messages_are_rejected_with_the_reason(row, reason):
    with pytest.raises(ItemError, match=reason) as caught:
        parse_row(row)
    assert not isinstance(caught.value, FormatError)


def test_pairs_have_the_words_of_the_recipe():
    row = {"caption": "a {W}x{H} cat", "jpg": b"jpg", "key": 1}
    drawn = parse_row(row, parse_pairs("t2i", "prompt=caption,image=jpg"))
    assert drawn.turns[0].text == "Generate an image of {W}x{H} according to the following prompt:\na {W}x{H} cat"
    assert (drawn.turns[1].text, drawn.images, drawn.is_sized) == ("<|image|>", (b"jpg",), True)
    described = parse_row({"caption": "a cat", "image": ["a.png"]}, parse_pairs("i2t", None))
    assert [turn.text for turn in described.turns] == ["<|image|> Describe the image in detail.", "a cat"]
    assert (described.images, described.is_sized) == (("a.png",), False)


@pytest.mark.parametrize(
    "row, error, reason",
    [
        ({"Caption": "a", "image": "b"}, FormatError, "no column `caption` .*has `Caption`, `image`; .*mean `Caption`"),
        ({}, FormatError, "no column `caption` .*has none"),
        ([], FormatError, "must be an object"),
        ({"caption": None, "image": "b"}, ItemError, "column `caption` must be text that is not empty, got None"),
        ({"caption": "a", "image": None}, ItemError, "column `image` must hold one image, got None"),
        ({"caption": "a", "image": ["b", "c"]}, ItemError, "column `image` must hold one image"),
        ({"caption": "a", "image": 5}, ItemError, "`image` must be a path, bytes or a list"),
        ({"caption": "a <|image|>", "image": "b"}, ItemError, "which stands for an image"),
    ],
)
def test_wrong_pairs_are_rejected_with_the_reason(row, error, reason):
    with pytest.raises(ItemError, match=reason) as caught:
        parse_row(row, Pairs("i2t"))
    assert type(caught.value) is error


def test_wrong_columns_are_named():
    assert parse_pairs(None, None) is None
    with pytest.raises(ValueError, match="--columns needs --task"):
        parse_pairs(None, "prompt=a")
    for columns in ("a", "prompt=", "text=a", ""):
        if columns:
            with pytest.raises(ValueError, match="--columns must be prompt=NAME,image=NAME"):
                parse_pairs("t2i", columns)


def test_the_form_of_a_row_is_named_unless_it_is_the_recipes():
    turns = [{"from": "human", "value": "What <image>?"}]
    assert describe_row({"conversations": turns}) == describe_row(5) == ""
    assert "`<image>`" not in describe_row({"conversations": turns, "image": "a"})
    for row in ({"conversations": turns, "image": "a"}, {"conversations": turns, "images": ["a"]}):
        assert describe_row(row) == "ShareGPT or LLaVA, <image> in the text stands for an image"
    assert describe_row(messages("x")) == "chat `messages`"
    assert describe_row({}, Pairs("t2i")) == "pairs of `caption` and `image` (t2i)"
