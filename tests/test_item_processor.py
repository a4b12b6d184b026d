"""The item processor: the reference's tokens id by id, text that stays text, and prompts."""

import numpy as np
import pytest
from PIL import Image

from data.conversation import Conversation, ItemError, Turn
from data.item_processor import ItemProcessor, build_text_encode, hash_tokenizer, load_text_tokenizer
from data.vocab import IGNORE_INDEX, ChameleonVocab
from model.vqgan import load_vqgan
from pre_tokenize.image_encoder import ImageEncoder, group_by_size
from tests.test_vqgan import meta_vqgan_dir  # noqa: F401  (a fixture)
from tests.tokenize_helpers import (
    REFERENCE_DIR,
    reference_items,
    reference_results,
    write_reference_tokenizer,
    write_tiny_tokenizer,
)

SAFE_MARGIN = 1e-4  # below it, the reference says, another kernel may choose the second-best code


@pytest.fixture(scope="module")
def reference_tokenizer(tmp_path_factory):
    return load_text_tokenizer(write_reference_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def reference_processor(reference_tokenizer, meta_vqgan_dir):  # noqa: F811
    return ItemProcessor(
        build_text_encode(reference_tokenizer),
        ChameleonVocab.from_tokenizer(reference_tokenizer),
        ImageEncoder(load_vqgan(meta_vqgan_dir), "fp32"),
        target_size=256,
        image_dirs=[REFERENCE_DIR],
    )


@pytest.fixture(scope="module")
def tiny_processor(tmp_path_factory):
    tokenizer = write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))

    def image_encode(images):
        return [np.full((image.height // 16, image.width // 16), 7) for image in images]

    vocab = ChameleonVocab.from_tokenizer(tokenizer)
    return ItemProcessor(build_text_encode(tokenizer), vocab, image_encode, target_size=64)


def assert_meets_reference(done: dict, result: dict) -> None:
    allowed = 2 if any(margin < SAFE_MARGIN for margin in result["min_code_margin"]) else 0
    assert len(done["token"]) == len(result["tokens"])
    different = [i for i, pair in enumerate(zip(done["token"], result["tokens"], strict=True)) if len(set(pair)) > 1]
    assert len(different) <= allowed, f"{result['id']}: tokens {different} differ"
    labels = [
        token if label != IGNORE_INDEX else label for token, label in zip(done["token"], done["label"], strict=True)
    ]
    assert labels == done["label"]
    assert [label == IGNORE_INDEX for label in done["label"]] == [label == -100 for label in result["labels"]]


@pytest.mark.slow
def test_every_reference_item_gives_its_tokens_and_labels(reference_processor):
    num_good = 0
    for item_id, item in enumerate(reference_items()):
        result = reference_results()[item["id"]]
        if result["status"] == "ok":
            assert_meets_reference(reference_processor.tokenize_item(item, item_id), result)
            num_good += 1
        else:
            with pytest.raises(ItemError):
                reference_processor.tokenize_item(item, item_id)
    assert num_good >= 16


@pytest.mark.parametrize("batch_size", [4])
def test_reference_holds_in_batches(reference_processor, batch_size):
    items = [item for item in reference_items() if reference_results()[item["id"]]["status"] == "ok"]
    prepared = [
        reference_processor.prepare(reference_processor.process_item(item, i), i) for i, item in enumerate(items)
    ]
    encoder = ImageEncoder(reference_processor.image_encode.vqgan, "fp32", batch_size)
    codes = iter(encoder([image for item in prepared for image in item.images]))
    for item, raw in zip(prepared, items, strict=True):
        done = reference_processor.finish(item, [next(codes) for _ in item.images])
        assert_meets_reference(done, reference_results()[raw["id"]])


def test_batches_are_of_one_size_and_full_but_the_last():
    sizes = [(64, 64), (32, 64), (64, 64), (64, 64), (32, 64)]
    assert group_by_size(sizes, 2) == [[0, 2], [3], [1, 4]]
    assert group_by_size([], 2) == []


def test_a_tokenizer_that_is_not_there_names_the_flag(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--tokenizer .*nowhere is not a folder"):
        load_text_tokenizer(tmp_path / "nowhere")


def test_control_tokens_in_text_stay_text(reference_tokenizer):
    encode = build_text_encode(reference_tokenizer)
    names = list(reference_tokenizer.get_added_vocab())
    control = set(reference_tokenizer.get_added_vocab().values())
    for text in (
        "<racm3:break>",
        "a <reserved08706> b",
        "IMGIMGAZIMGIMGBACDZ",
        "<s></s><pad><unk><eoss>",
        *names[::997],
    ):
        ids = encode(text)
        assert not control & set(ids)
        assert reference_tokenizer.decode(ids) == text
    assert encode("") == []


def test_plain_text_is_encoded_as_the_tokenizer_does(reference_tokenizer):
    text = "Two  cats,\n\tна 12 ковриках 🚀"
    assert build_text_encode(reference_tokenizer)(text) == reference_tokenizer.encode(text, add_special_tokens=False)


def test_labels_are_those_of_gpt_turns(tiny_processor):
    turns = [("system", "s"), ("human", "h"), ("gpt", "g"), ("human", "h"), ("gpt", "gg")]
    raw = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    done = tiny_processor.tokenize_item(raw, 3)
    assert done["id"] == 3 and done["token"][0] == tiny_processor.vocab.bos_id
    assert [label != IGNORE_INDEX for label in done["label"]] == [0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1]
    assert done["token"].count(tiny_processor.vocab.end_of_turn_id) == 5


def test_prompt_is_the_sequence_up_to_the_answer(tiny_processor, tmp_path):
    image = Image.new("RGB", (64, 64))
    image.save(tmp_path / "a.png")
    turns = [Turn("human", "look <|image|>"), Turn("gpt", "yes"), Turn("human", "draw"), Turn("gpt", "ok <|image|>")]
    conversation = Conversation(tuple(turns), (str(tmp_path / "a.png"),) * 2)
    prepared = tiny_processor.prepare(conversation, 0)
    token = tiny_processor.finish(prepared, tiny_processor.image_encode(list(prepared.images)))["token"]
    closed = tiny_processor.encode_prompt(turns[:3], [image])
    opened = tiny_processor.encode_prompt([*turns[:3], Turn("gpt", "ok ")], [image])
    assert token[: len(closed)] == closed and closed[-1] == tiny_processor.vocab.end_of_turn_id
    assert token[: len(opened)] == opened and len(opened) > len(closed)
    with pytest.raises(ValueError, match=r"1 <\|image\|> but 0 images"):
        tiny_processor.encode_prompt(turns[:3])


def test_length_of_the_image_that_an_item_ends_in(tiny_processor, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")

    def image_len(human: str, gpt: str) -> int | None:
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
        done = tiny_processor.tokenize_item({"conversations": turns, "image": str(tmp_path / "a.png")}, 0)
        return tiny_processor.trailing_image_len(done["token"], done["label"])

    assert image_len("draw", "sure <|image|>") == 24
    assert image_len("draw", "<|image|> there") is None
    assert image_len("<|image|>", "a cat") is None


def test_random_crops_depend_on_seed_item_and_image(tiny_processor, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    conversation = Conversation(
        (Turn("human", "x <|image|><|image|>"), Turn("gpt", "y")), (str(tmp_path / "a.png"),) * 2
    )

    def crops(seed: int, item_id: int) -> list[bytes]:
        processor = ItemProcessor(tiny_processor.text_encode, tiny_processor.vocab, None, 64, "random", seed)
        return [image.tobytes() for image in processor.prepare(conversation, item_id).images]

    assert crops(0, 5) == crops(0, 5)
    assert len({*crops(0, 5), *crops(0, 6), *crops(1, 5)}) > 2
    with pytest.raises(ValueError, match="center or random"):
        ItemProcessor(tiny_processor.text_encode, tiny_processor.vocab, crop="left")


def test_images_are_looked_for_in_order(tiny_processor, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    (tmp_path / "two" / "a.png").touch()
    processor = ItemProcessor(
        tiny_processor.text_encode, tiny_processor.vocab, image_dirs=[tmp_path / "one", tmp_path / "two"]
    )
    assert processor.find_image("a.png") == tmp_path / "two" / "a.png"
    assert processor.find_image(str(tmp_path / "two" / "a.png")) == tmp_path / "two" / "a.png"
    with pytest.raises(ItemError, match=r"b\.png does not exist .*one.*two.*--image_root"):
        processor.find_image("b.png")


def test_tokenizers_are_hashed_by_content_and_missing_ones_named(tmp_path):
    first, second = write_tiny_tokenizer(tmp_path / "a"), write_tiny_tokenizer(tmp_path / "b")
    assert hash_tokenizer(first) == hash_tokenizer(second)
    second.add_tokens(["one_more"])
    assert hash_tokenizer(first) != hash_tokenizer(second)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json"):
        load_text_tokenizer(tmp_path / "empty")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 1}', '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=f"tokenizer {tmp_path}"):
        ChameleonVocab.from_tokenizer(load_text_tokenizer(tmp_path))
