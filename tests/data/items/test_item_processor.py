"""The item processor: the reference's tokens id by id, text that stays text, and prompts."""

import pickle

import numpy as np
import pytest
from PIL import Image

from data.items.conversation import Conversation, ItemError, Turn
from data.items.item_processor import ItemProcessor, build_text_encode, hash_tokenizer, load_text_tokenizer
from data.items.rows import Pairs
from data.items.vocab import IGNORE_INDEX, ChameleonVocab
from model.vqgan.image_encoder import ImageEncoder, group_by_size
from model.vqgan.vqgan import load_vqgan
from pre_tokenize.loading import count_tokens, prepare_item
from tests.helpers.tokenize_helpers import (
    REFERENCE_DIR,
    reference_items,
    reference_results,
    write_reference_tokenizer,
    write_tiny_tokenizer,
)
from tests.model.vqgan.test_vqgan import meta_vqgan_dir  # noqa: F401  (a fixture)

# Below it, the reference says, another kernel may choose the second-best code.
SAFE_MARGIN = 1e-4


@pytest.fixture(scope="module")
def reference_tokenizer(tmp_path_factory):
    return load_text_tokenizer(write_reference_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def tiny_processor(tmp_path_factory):
    tokenizer = write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))

    def image_encode(images):
        return [np.full((image.height // 16, image.width // 16), 7) for image in images]

    vocab = ChameleonVocab.from_tokenizer(tokenizer)
    return ItemProcessor(build_text_encode(tokenizer), vocab, image_encode, target_size=64)


@pytest.fixture
def image_path(tmp_path):
    """A file of 90 x 64 random pixels."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def item(human: str, gpt: str, image: object = None) -> dict:
    return {"conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}], "image": image}


def assert_meets_reference(done: dict, result: dict) -> None:
    allowed = 2 if any(margin < SAFE_MARGIN for margin in result["min_code_margin"]) else 0
    assert len(done["token"]) == len(result["tokens"])
    different = [i for i, pair in enumerate(zip(done["token"], result["tokens"], strict=True)) if len(set(pair)) > 1]
    assert len(different) <= allowed, f"{result['id']}: tokens {different} differ"
    for token, label, expected in zip(done["token"], done["label"], result["labels"], strict=True):
        assert label == (IGNORE_INDEX if expected == -100 else token)


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_every_reference_item_gives_its_tokens_and_labels(reference_tokenizer, meta_vqgan_dir, batch_size):  # noqa: F811
    encoder = ImageEncoder(load_vqgan(meta_vqgan_dir), "fp32", batch_size)
    processor = ItemProcessor(
        build_text_encode(reference_tokenizer),
        ChameleonVocab.from_tokenizer(reference_tokenizer),
        encoder,
        target_size=256,
        image_dirs=[REFERENCE_DIR],
    )
    good, prepared = [], []
    for item_id, raw in enumerate(reference_items()):
        if reference_results()[raw["id"]]["status"] == "ok":
            good.append(raw)
            prepared.append(processor.prepare(processor.process_item(raw, item_id), item_id))
        else:
            with pytest.raises(ItemError):
                processor.tokenize_item(raw, item_id)
    codes = iter(encoder([image for one in prepared for image in one.images]))
    for raw, one in zip(good, prepared, strict=True):
        done = processor.finish(one, [next(codes) for _ in one.images])
        assert_meets_reference(done, reference_results()[raw["id"]])
    assert len(good) >= 16


def test_batches_are_of_one_size_and_full_but_the_last():
    sizes = [(64, 64), (32, 64), (64, 64), (64, 64), (32, 64)]
    assert group_by_size(sizes, 2) == [[0, 2], [3], [1, 4]]
    assert group_by_size([], 2) == []


def test_control_tokens_in_text_stay_text(reference_tokenizer):
    encode = pickle.loads(pickle.dumps(build_text_encode(reference_tokenizer)))
    added = reference_tokenizer.get_added_vocab()
    names = ["<racm3:break>", "a <reserved08706> b", "IMGIMGAZIMGIMGBACDZ", "<s></s><pad><unk><eoss>"]
    for text in [*names, *list(added)[::997]]:
        ids = encode(text)
        assert not set(added.values()) & set(ids)
        assert reference_tokenizer.decode(ids) == text
    assert encode("") == []
    text = "Two  cats,\n\tна 12 ковриках 🚀"
    assert encode(text) == reference_tokenizer.encode(text, add_special_tokens=False)


def test_labels_are_those_of_gpt_turns(tiny_processor):
    turns = [("system", "s"), ("human", "h"), ("gpt", "g"), ("human", "h"), ("gpt", "gg")]
    raw = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    done = tiny_processor.tokenize_item(raw, 3)
    assert done["id"] == 3 and done["token"][0] == tiny_processor.vocab.bos_id
    assert [label != IGNORE_INDEX for label in done["label"]] == [0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1]
    assert done["token"].count(tiny_processor.vocab.end_of_turn_id) == 5


def test_prompt_is_the_sequence_up_to_the_answer(tiny_processor, image_path):
    turns = [Turn("human", "look <|image|>"), Turn("gpt", "yes"), Turn("human", "draw"), Turn("gpt", "ok <|image|>")]
    prepared = tiny_processor.prepare(Conversation(tuple(turns), (image_path,) * 2), 0)
    token = tiny_processor.finish(prepared, tiny_processor.image_encode(list(prepared.images)))["token"]
    image = Image.open(image_path)
    closed = tiny_processor.encode_prompt(turns[:3], [image])
    opened = tiny_processor.encode_prompt([*turns[:3], Turn("gpt", "ok ")], [image])
    assert token[: len(closed)] == closed and closed[-1] == tiny_processor.vocab.end_of_turn_id
    assert token[: len(opened)] == opened and len(opened) > len(closed)
    with pytest.raises(ValueError, match=r"1 <\|image\|> but 0 images"):
        tiny_processor.encode_prompt(turns[:3])


@pytest.mark.parametrize(
    "human, gpt, num_images, image_len",
    [
        ("draw", "sure <|image|>", 1, 24),
        ("draw", "<|image|> there", 1, None),
        ("<|image|>", "a cat", 1, None),
        ("a <|image|> b", "<|image|> c <|image|>", 3, 24),
        ("a", " ", 0, None),
    ],
)
def test_lengths_are_known_before_and_after_encoding(tiny_processor, image_path, human, gpt, num_images, image_len):
    raw = item(human, gpt, [image_path] * num_images)
    prepared, done = prepare_item(tiny_processor, 0, raw), tiny_processor.tokenize_item(raw, 0)
    num_tokens = len(done["token"])
    assert count_tokens(prepared, tiny_processor.vocab) == num_tokens
    assert tiny_processor.trailing_image_len(done["token"], done["label"]) == image_len
    assert prepare_item(tiny_processor, 0, raw, num_tokens) == prepared
    rejected = prepare_item(tiny_processor, 0, raw, num_tokens - 1)
    assert rejected.reason == f"it needs {num_tokens} tokens, --max_seq_len is {num_tokens - 1}"


def test_random_crops_depend_on_seed_item_and_image(tiny_processor, image_path):
    conversation = Conversation((Turn("human", "x <|image|><|image|>"), Turn("gpt", "y")), (image_path,) * 2)

    def crops(seed: int, item_id: int) -> list[bytes]:
        processor = ItemProcessor(tiny_processor.text_encode, tiny_processor.vocab, None, 64, "random", seed)
        return [image.tobytes() for image in processor.prepare(conversation, item_id).images]

    assert crops(0, 5) == crops(0, 5)
    assert len({*crops(0, 5), *crops(0, 6), *crops(1, 5)}) > 2


def test_the_size_of_the_crop_is_in_the_prompt_of_a_pair(tiny_processor, tmp_path):
    image_path = str(tmp_path / "wide.png")
    Image.new("RGB", (300, 100)).save(image_path)
    processor = ItemProcessor(
        tiny_processor.text_encode, tiny_processor.vocab, tiny_processor.image_encode, 64, pairs=Pairs("t2i")
    )
    done = processor.tokenize_item({"caption": "a {W}x{H} cat", "image": image_path}, 0)
    prompt = "Generate an image of 96x32 according to the following prompt:\na {W}x{H} cat"
    assert done == tiny_processor.tokenize_item(item(prompt, "<|image|>", image_path), 0)


def test_tokenizers_are_hashed_by_content(tmp_path):
    first, second = write_tiny_tokenizer(tmp_path / "a"), write_tiny_tokenizer(tmp_path / "b")
    assert hash_tokenizer(first) == hash_tokenizer(second)
    second.add_tokens(["one_more"])
    assert hash_tokenizer(first) != hash_tokenizer(second)


@pytest.mark.parametrize("text", [None, "", "[]", '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_missing_or_damaged_tokenizer_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=f"tokenizer .*{tmp_path}"):
        ChameleonVocab.from_tokenizer(load_text_tokenizer(tmp_path))
