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
        ([{"role": "user", "content": "Hi"}, HELLO[1]], "did you mean `from` for `role`, .*TRAIN.md, Another format"),
        ([{**HELLO[0], "image": "a.png"}, HELLO[1]], "`image` of turn 0 is not read: did you mean `image`"),
        ([HELLO[0], {"from": "gpt", "value": ""}], "turn 1 is from gpt and empty"),
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


@pytest.mark.parametrize(
    "key, value, meant",
    [
        ("images", ["a.png"], "`image`"),
        ("videos", ["a.mp4"], "single frames"),
        ("audio", "a.wav", "its text in `conversations`. Audio is not tokenized"),
        ("system", "You are helpful", "a leading turn from `system`"),
        ("messages", HELLO, "`conversations`"),
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
    assert parse_conversation({"conversations": HELLO, "image": "a.png", **extra}).image_paths == ("a.png",)


@pytest.mark.parametrize(
    "symbol",
    ["<image>", "<img>", "<video>", "<audio>", "<|vision_start|><|image_pad|><|vision_end|>", "<image_1>", "<image 1>"]
    + [
        "<ImageHere>",
        "<|image_1|>",
        "<IMG_CONTEXT>",
        "<start_of_image>",
        "<|begin_of_image|>",
        "<im_start>",
        "<Image>",
    ],
)
def test_symbols_of_other_formats_are_rejected_where_an_item_has_images(symbol):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": f"See {symbol}\n"}]
    with pytest.raises(ItemError, match=r"the text has <.*> but no <\|image\|>: did you mean <\|image\|>\? TRAIN.md"):
        parse_conversation({"conversations": turns, "image": "a.png"})
    parse_conversation({"conversations": turns})  # of no image: this is text
    turns[0]["value"] = "<|image|>"
    parse_conversation({"conversations": turns, "image": "a.png"})


@pytest.mark.parametrize(
    "text", ['<img src="a.png">', "<video controls>", "</image>", "a <imagination>", "[image]", "<b>"]
)
def test_html_is_no_fault(text):
    turns = [{"from": "human", "value": text}, HELLO[1]]
    assert parse_conversation({"conversations": turns, "image": "a.png"}).turns[0].text == f"<|image|> {text}"


def test_an_answer_of_white_space_stays_as_it_is():
    turns = [{"from": "human", "value": ""}, {"from": "gpt", "value": " \n"}]
    assert [turn.text for turn in parse_conversation({"conversations": turns}).turns] == ["", " \n"]


@pytest.mark.parametrize("path", ["data:image/png;base64," + "A" * 10**6, "https://a.b/" + "c" * 999 + ".png"])
def test_an_image_that_is_no_path_is_rejected_in_few_words(path):
    with pytest.raises(ItemError, match="`image` must be the path of a file .no URL, no base64.") as caught:
        parse_conversation({"conversations": HELLO, "image": ["a.png", path]})
    assert len(str(caught.value)) < 150
