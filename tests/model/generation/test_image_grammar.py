"""The grammar of images against a plain one, token by token."""

import pytest
import torch

from data.items.vocab import ChameleonVocab
from model.generation.image_grammar import ImageGrammar, Kind, open_image_start
from tests.helpers.decoder_helpers import small_vocabulary

VOCAB = ChameleonVocab.from_mapping(small_vocabulary())
# Models may have more logits than the tokenizer has ids.
SIZE = VOCAB.vocab_size + 3


def plain_allowed(tokens: list[int]) -> set[int]:
    """Which ids may follow, by replaying the sequence in plain Python."""
    codes, sizes = set(VOCAB.image_token_ids.tolist()), {token: n for n, token in VOCAB.grid_size_ids.items()}
    special = codes | set(sizes) | {VOCAB.new_line_id, VOCAB.end_image_id, VOCAB.bos_id, VOCAB.eos_id, VOCAB.pad_id}
    expected = set(range(VOCAB.vocab_size)) - special
    position = 0
    while position < len(tokens):
        if tokens[position] != VOCAB.begin_image_id:
            position += 1
            continue
        rest = tokens[position + 1 :]
        if len(rest) < 2:
            return set(sizes)
        height, width = 2 * sizes[rest[0]], 2 * sizes[rest[1]]
        layout = [*[*[codes] * width, {VOCAB.new_line_id}] * height, {VOCAB.end_image_id}]
        if len(rest) - 2 < len(layout):
            return layout[len(rest) - 2]
        position += 3 + len(layout)
    return expected


def random_sequences(num: int, length: int) -> list[list[int]]:
    """Sequences that follow the plain grammar, each from its own random choices."""
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for _ in range(num):
        tokens = []
        for _ in range(length):
            allowed = sorted(plain_allowed(tokens) - {VOCAB.end_of_turn_id})
            may_begin = VOCAB.begin_image_id in allowed and torch.rand((), generator=generator) < 0.3
            pick = torch.randint(len(allowed), (), generator=generator).item()
            tokens.append(VOCAB.begin_image_id if may_begin else allowed[pick])
        sequences.append(tokens)
    return sequences


def allowed_ids(grammar, state) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in grammar.allowed[grammar.kind(state)]]


def test_equals_the_plain_grammar_along_sequences():
    grammar, sequences = ImageGrammar(VOCAB, SIZE), random_sequences(8, 150)
    state = grammar.start([[] for _ in sequences])
    for step in range(150):
        for found, tokens in zip(allowed_ids(grammar, state), sequences, strict=True):
            assert found == plain_allowed(tokens[:step])
        state = grammar.advance(state, torch.tensor([tokens[step] for tokens in sequences]))


def test_start_after_any_prefix():
    grammar, sequences = ImageGrammar(VOCAB, SIZE), random_sequences(4, 60)
    prefixes = [tokens[:n] for tokens in sequences for n in range(60)]
    for found, prefix in zip(allowed_ids(grammar, grammar.start(prefixes)), prefixes, strict=True):
        assert found == plain_allowed(prefix)


def test_the_turn_ends_outside_of_images_only():
    grammar = ImageGrammar(VOCAB, SIZE)
    state = grammar.start([[], [VOCAB.begin_image_id]])
    state = grammar.advance(state, torch.tensor([VOCAB.end_of_turn_id, VOCAB.grid_size_ids[1]]))
    assert state.done.tolist() == [True, False]
    assert grammar.kind(state).tolist() == [Kind.PADDING, Kind.GRID_SIZE]


@pytest.mark.parametrize(
    "tokens, start", [([], 0), ([5, 6], 2), ([VOCAB.begin_image_id], 0), ([5, VOCAB.begin_image_id, 9, 9], 1)]
)
def test_open_image_start(tokens, start):
    assert open_image_start(tokens, VOCAB) == start
    assert open_image_start([*tokens, VOCAB.end_image_id, 7], VOCAB) == len(tokens) + 2
