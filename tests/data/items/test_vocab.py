"""The vocabulary by name, and the layout of images."""

import numpy as np
import pytest

from data.items.vocab import ChameleonVocab, is_control_token
from tests.helpers.tokenize_helpers import reference_results, write_reference_tokenizer, write_tiny_tokenizer


@pytest.fixture(scope="module")
def vocab(tmp_path_factory) -> ChameleonVocab:
    return ChameleonVocab.from_tokenizer(write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_ids_come_from_names_and_not_from_numbers():
    names = ["<reserved08799>", "IMGIMGBZ", "<s>", "<reserved08802>", "<pad>", "<racm3:break>", "IMGIMGAZ", "<eoss>"]
    mapping = {name: 3 * i for i, name in enumerate([*names, "<reserved08706>", "<reserved08800>"])}
    vocab = ChameleonVocab.from_mapping(mapping)
    assert (vocab.new_line_id, vocab.bos_id, vocab.pad_id, vocab.eos_id) == (0, 6, 12, None)
    assert vocab.image_token_ids.tolist() == [18, 3]
    assert vocab.grid_size_ids == {2: 9}  # <reserved08800> would be a side of nothing
    assert vocab.vocab_size == 28


def test_missing_names_are_listed():
    with pytest.raises(ValueError, match=r"lacks <racm3:break>, .*IMGIMG.*grid sizes"):
        ChameleonVocab.from_mapping({"<s>": 0, "<pad>": 1, "<eoss>": 2, "<reserved08799>": 3, "<reserved08706>": 4})


def test_image_layout_and_its_inverse(vocab):
    codes = np.arange(16).reshape(2, 8)
    tokens = vocab.image_to_tokens(codes)
    new_line, ids = vocab.new_line_id, vocab.image_token_ids
    assert tokens[:3] == [vocab.begin_image_id, vocab.grid_size_ids[1], vocab.grid_size_ids[4]]  # height, then width
    assert tokens[3:-1] == [*ids[:8].tolist(), new_line, *ids[8:16].tolist(), new_line]
    assert tokens[-1] == vocab.end_image_id
    assert len(tokens) == vocab.num_image_tokens(width=128, height=32)
    assert (vocab.tokens_to_codes(tokens) == codes).all()


def test_images_are_found_and_broken_ones_rejected(vocab):
    span = vocab.image_to_tokens(np.zeros((4, 2), dtype=int))
    assert vocab.find_images([0, *span, 5, *span]) == [(1, 1 + len(span)), (2 + len(span), 2 + 2 * len(span))]
    assert vocab.find_images([0, 5, 6]) == []
    for broken in (span[:-1], span[:2], [*span[:3], *span[4:]], [span[0], 5, *span[2:]]):
        with pytest.raises(ValueError):
            vocab.find_images(broken)
    for position in (0, 1, 3, 5, -1):
        with pytest.raises(ValueError):
            vocab.tokens_to_codes([*span[:position], vocab.bos_id, *span[position:][1:]])


def test_codes_and_sizes_without_a_token_are_rejected(vocab):
    with pytest.raises(ValueError, match=r"0\.\.63, got 0\.\.64"):
        vocab.image_to_tokens(np.array([[0, 64], [0, 0]]))
    for shape, size in (((2, 3), "48x32"), ((18, 2), "32x288")):
        with pytest.raises(ValueError, match=f"{size} is not possible: .* multiples of 32 pixels, from 32 to 256"):
            vocab.image_to_tokens(np.zeros(shape, dtype=int))


def test_reference_spans_survive_the_inverse(tmp_path):
    from data.items.item_processor import load_text_tokenizer

    vocab = ChameleonVocab.from_tokenizer(load_text_tokenizer(write_reference_tokenizer(tmp_path)))
    for result in reference_results().values():
        tokens = result.get("tokens", [])
        for start, stop in vocab.find_images(tokens):
            assert vocab.image_to_tokens(vocab.tokens_to_codes(tokens[start:stop])) == tokens[start:stop]


def test_control_tokens_are_known_by_name():
    assert all(map(is_control_token, ("<s>", "<eoss>", "<reserved08706>", "IMGIMGBAZ")))
    assert not any(map(is_control_token, ("IMGIMG", "IMGIMGKZ", "<reserved1>", "s")))
