"""What may come next in a sequence: text, or exactly what keeps the grid of an image valid.

`loop.py` uses it, so that every complete image can be decoded.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch

from data.items.vocab import CODES_PER_GRID, ChameleonVocab


class Kind(IntEnum):
    """What the next token must be. TEXT includes the begin of an image and the end of the turn."""

    TEXT = 0
    GRID_SIZE = 1
    CODE = 2
    NEW_LINE = 3
    END_IMAGE = 4
    # The turn is over.
    PADDING = 5


class GrammarState(NamedTuple):
    """
    The state of each row of a batch, tensors [B].

    Attributes:
        since_begin: int64, tokens since the image began, its first one included; 0 outside of images.
        height, width: int64, the latent grid of the image in codes.
        done: bool, the turn is over, or padding came.
    """

    since_begin: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor
    done: torch.Tensor


class ImageGrammar:
    """
    The layout of sequences as a state machine over a batch: image = begin, height, width, rows of codes, end.

    Attributes:
        allowed: bool [kinds, vocab_size], the tokens of each kind.
        only_token: int64 [kinds], the token of a kind that has but one, else -1.
        codes: int64 [num_codes + 1], sorted ids of the image codes, then padding: where logits are NaN the turn ends.
    """

    def __init__(self, vocab: ChameleonVocab, vocab_size: int, device: str | torch.device = "cpu"):
        """`vocab_size`: the number of logits, at least that of the vocabulary."""
        self.vocab = vocab
        ids = {
            Kind.GRID_SIZE: list(vocab.grid_size_ids.values()),
            Kind.CODE: vocab.image_token_ids.tolist(),
            Kind.NEW_LINE: [vocab.new_line_id],
            Kind.END_IMAGE: [vocab.end_image_id],
            Kind.PADDING: [vocab.pad_id],
        }
        allowed = torch.zeros(len(Kind), vocab_size, dtype=torch.bool)
        only_token = torch.full((len(Kind),), -1)
        for kind, kind_ids in ids.items():
            allowed[kind, kind_ids] = True
            if len(kind_ids) == 1:
                only_token[kind] = kind_ids[0]
        allowed[Kind.TEXT, : vocab.vocab_size] = ~allowed[:, : vocab.vocab_size].any(0)
        allowed[Kind.TEXT, [i for i in (vocab.bos_id, vocab.eos_id) if i is not None]] = False
        side_of_token = torch.zeros(vocab_size, dtype=torch.int64)
        for grids, token_id in vocab.grid_size_ids.items():
            side_of_token[token_id] = grids * CODES_PER_GRID
        self.allowed = allowed.to(device)
        self.only_token = only_token.to(device)
        self.codes = torch.tensor([*sorted(vocab.image_token_ids.tolist()), vocab.pad_id], device=device)
        self._side_of_token = side_of_token.to(device)

    def start(self, prompts: Sequence[Sequence[int]]) -> GrammarState:
        """The state after each prompt (an image may be open at its end)."""
        device = self.allowed.device
        since_begin, height, width, done = torch.zeros(4, len(prompts), dtype=torch.int64, device=device)
        state = GrammarState(since_begin, height, width, done.bool())
        tails = [prompt[open_image_start(prompt, self.vocab) :] for prompt in prompts]
        for step in range(max(map(len, tails), default=0)):
            column = [tail[step] if step < len(tail) else -1 for tail in tails]
            state = self.advance(state, torch.tensor(column, device=device))
        return state

    def kind(self, state: GrammarState) -> torch.Tensor:
        """The `Kind` of the next token of each row, int64 [B] (or what the tensors of the state broadcast to)."""
        body = state.since_begin - 3  # tokens of the rows so far
        row_len = state.width + 1
        kind = torch.where(body % row_len == state.width, Kind.NEW_LINE, Kind.CODE)
        kind = torch.where(body == state.height * row_len, Kind.END_IMAGE, kind)
        kind = torch.where(body < 0, Kind.GRID_SIZE, kind)
        kind = torch.where(state.since_begin == 0, Kind.TEXT, kind)
        return torch.where(state.done, Kind.PADDING, kind)

    def kinds_ahead(self, state: GrammarState, num: int) -> torch.Tensor:
        """The `Kind` of the next `num` tokens, [B, num]; all must belong to an image or follow the turn."""
        columns = GrammarState(*(tensor[:, None] for tensor in state))
        ahead = torch.arange(num, device=state.since_begin.device)
        return self.kind(columns._replace(since_begin=columns.since_begin + ahead))

    def skip(self, state: GrammarState, num: int) -> GrammarState:
        """The state after the next `num` tokens, under the same condition as in `kinds_ahead`."""
        is_over = num >= self.num_left(state)
        return state._replace(since_begin=torch.where(is_over, 0, state.since_begin + num))

    def num_left(self, state: GrammarState) -> torch.Tensor:
        """How many tokens of the grid of its image and the end each row has yet to draw, int64 [B]; 0 elsewhere."""
        num_left = state.height * (state.width + 1) + 4 - state.since_begin
        return torch.where(state.since_begin >= 3, num_left, 0)

    def advance(self, state: GrammarState, tokens: torch.Tensor) -> GrammarState:
        """The state after one more token per row, int64 [B]; -1 leaves a row as it is."""
        outside = state.since_begin == 0
        begins = outside & (tokens == self.vocab.begin_image_id)
        ends = ~outside & (state.since_begin == 3 + state.height * (state.width + 1))
        grows = (begins | ~outside) & ~ends & (tokens >= 0)
        side = self._side_of_token[tokens.clamp(min=0)]
        return GrammarState(
            since_begin=torch.where(ends & (tokens >= 0), 0, state.since_begin + grows.long()),
            height=torch.where(grows & (state.since_begin == 1), side, state.height),
            width=torch.where(grows & (state.since_begin == 2), side, state.width),
            done=state.done | (outside & (tokens == self.vocab.end_of_turn_id)) | (tokens == self.vocab.pad_id),
        )


def open_image_start(tokens: Sequence[int], vocab: ChameleonVocab) -> int:
    """Index of the begin of the image that is open at the end of `tokens`; their length if no image is open."""
    for index in range(len(tokens) - 1, -1, -1):
        if tokens[index] == vocab.end_image_id:
            break
        if tokens[index] == vocab.begin_image_id:
            return index
    return len(tokens)
