"""The input rules of items, each rejection by its reason."""

import pytest

from data.items.conversation import FormatError, ItemError, Turn, parse_conversation

HELLO = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


def turn(role: str, value: object = "x") -> dict:
    return {"from": role, "value": value}


@pytest.mark.parametrize("image", [{}, {"image": None}, {"image": []}, {"image": ""}])
def test_text_only_items(image):
    conversation = parse_conversation({"conversations": HELLO, **image})
    assert conversation.turns == (Turn("human", "Hi"), Turn("gpt", "Hello"))
    assert conversation.images == ()


def test_roles_have_two_names_and_a_system_turn_may_lead():
    turns = [turn("system"), turn("user", ""), turn("assistant", " \n")]
    parsed = parse_conversation({"conversations": turns}).turns
    assert parsed == (Turn("system", "x"), Turn("human", ""), Turn("gpt", " \n"))


def test_images_without_symbols_are_put_first_each_with_a_space():
    conversation = parse_conversation({"conversations": HELLO, "image": ["a.png", "b.png"]})
    assert conversation.turns[0].text == "<|image|> <|image|> Hi"
    assert parse_conversation({"conversations": HELLO, "image": "a.png"}).images == ("a.png",)


@pytest.mark.parametrize("key", ["image", "images"])
def test_symbols_and_keys_of_sharegpt_and_llava_are_read(key):
    turns = [turn("human", "<image>\nWhat?"), turn("gpt", "It, not <image>.")]
    conversation = parse_conversation({"conversations": turns, key: ["a.png", b"png"]})
    assert [one.text for one in conversation.turns] == ["<|image|>\nWhat?", "It, not <|image|>."]
    assert conversation.images == ("a.png", b"png")
    with pytest.raises(ItemError, match=r"has 2 <\|image\|> but `image` lists 1"):
        parse_conversation({"conversations": turns, key: ["a.png"]})
    # Beside the right symbol, and without an image, it is text.
    for value, images in (("<|image|> <image>", ["a.png"]), ("<image>", [])):
        parsed = parse_conversation({"conversations": [turn("human", value), HELLO[1]], key: images})
        assert parsed.turns[0].text == value


@pytest.mark.parametrize("raw", [[], {}, {"image_path": "a", "prompt": "b"}])
def test_items_of_another_format_are_told_apart(raw):
    with pytest.raises(FormatError, match="conversations"):
        parse_conversation(raw)


@pytest.mark.parametrize(
    "turns, reason",
    [
        ([], "not empty"),
        ({}, "list of turns"),
        (HELLO[:1], "nothing to predict"),
        ([turn("system"), HELLO[0]], "nothing to predict"),
        (HELLO[1:], "turn 0 is from gpt, human expected"),
        ([turn("system"), *HELLO, HELLO[1]], "turn 3 is from gpt, human expected"),
        ([*HELLO, turn("system")], "turn 2 is from system"),
        ([turn("bot"), HELLO[1]], "must be one of human"),
        ([turn(["human"]), HELLO[1]], "must be one of human"),
        ([turn("human", None), HELLO[1]], "`value` of turn 0 must be text"),
        ([turn("human", "a\ud83d"), HELLO[1]], "`value` of turn 0 has half of a surrogate pair"),
        ([{"value": "x"}, HELLO[1]], "`from` and `value`"),
        (["Hi", HELLO[1]], "turn 0 must be an object"),
        ([{"role": "user", "content": "Hi"}, HELLO[1]], "did you mean `messages` for `conversations`"),
        ([{**HELLO[0], "image": "a.png"}, HELLO[1]], "`image` of turn 0 is not read: did you mean `image`"),
        ([HELLO[0], turn("gpt", "")], "turn 1 is from gpt and empty"),
    ],
)
def test_wrong_turns_are_rejected_with_the_reason(turns, reason):
    with pytest.raises(ItemError, match=reason) as caught:
        parse_conversation({"conversations": turns})
    assert not isinstance(caught.value, FormatError)


@pytest.mark.parametrize(
    "image, reason",
    [
        *((image, "a path, bytes or a list of them") for image in (5, ["a", None], [""], {"path": None})),
        ("a.png", r"has 2 <\|image\|> but `image` lists 1"),
        (None, r"has 2 <\|image\|> but `image` lists 0"),
        ([["A" * 10**6]], "a path, bytes or a list of them"),
    ],
)
def test_wrong_images_are_rejected_in_few_words(image, reason):
    with pytest.raises(ItemError, match=reason) as caught:
        parse_conversation({"conversations": [turn("human", "<|image|> and <|image|>"), HELLO[1]], "image": image})
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(
    "key, value, meant",
    [
        ("videos", ["a.mp4"], "single frames"),
        ("mp4", b"...", "single frames"),
        ("audio", "a.wav", "its text in `conversations`. Audio is not tokenized"),
        ("image_path", "a.png", "`image`"),
    ],
)
def test_keys_that_carry_meaning_elsewhere_are_rejected_by_name(key, value, meant):
    with pytest.raises(ItemError, match=f"`{key}` is not read: did you mean {meant}.* TRAIN.md, Another format"):
        parse_conversation({"conversations": HELLO, key: value})
    for empty in (None, "", [], {}):
        parse_conversation({"conversations": HELLO, key: empty})


def test_harmless_keys_are_ignored():
    extra = {"id": 7, "source": "web", "image_path": "a.png", "score": 0.5}
    assert parse_conversation({"conversations": HELLO, "image": "a.png", **extra}).images == ("a.png",)


@pytest.mark.parametrize(
    "symbol",
    "<img> <video> <|vision_start|><|image_pad|><|vision_end|> <image_1> <ImageHere> <|image_1|> <IMG_CONTEXT> "
    "<start_of_image> <|begin_of_image|> <im_start>".split(),
)
def test_symbols_of_other_formats_are_rejected_where_an_item_has_images(symbol):
    turns = [turn("human"), turn("gpt", f"See {symbol}\n")]
    with pytest.raises(ItemError, match=r"the text has <.*> but no <\|image\|>: did you mean <\|image\|>\? TRAIN.md"):
        parse_conversation({"conversations": turns, "image": "a.png"})
    # Without an image, and beside the right symbol, it is text.
    parse_conversation({"conversations": turns})
    parse_conversation({"conversations": [turn("human", "<|image|>"), turns[1]], "image": "a.png"})


@pytest.mark.parametrize("text", ['<img src="a.png">', "<video controls>", "</image>", "a <imagination>", "<b>"])
def test_html_is_text(text):
    conversation = parse_conversation({"conversations": [turn("human", text), HELLO[1]], "image": "a.png"})
    assert conversation.turns[0].text == f"<|image|> {text}"
