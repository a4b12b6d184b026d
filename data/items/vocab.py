"""Chameleon's vocabulary, every id looked up by the NAME of its token, and the layout of an image as tokens.

An image is `<racm3:break>`, its height and its width in 32-pixel grids (`<reserved{08800+n}>`), the rows of its codes,
each closed by `<reserved08799>`, and `<eoss>`. Everything here is pure: integers in, integers out.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# The label of a token that is not predicted.
IGNORE_INDEX = -100
# One image in the text of a turn.
IMAGE_SYMBOL = "<|image|>"
# Pixels along each side: of a grid, in which sides of images are counted, and of one VQGAN code.
GRID_PIXELS = 32
CODE_PIXELS = 16
CODES_PER_GRID = GRID_PIXELS // CODE_PIXELS

BOS, PAD, EOS = "<s>", "<pad>", "</s>"
BEGIN_IMAGE, END_IMAGE = "<racm3:break>", "<eoss>"
NEW_LINE, END_OF_TURN = "<reserved08799>", "<reserved08706>"
# A side of n grids is `<reserved{8800 + n}>`.
FIRST_GRID_SIZE = 8800

_IMAGE_CODE = re.compile(r"IMGIMG([A-J]+)Z")
_RESERVED = re.compile(r"<reserved(\d{5})>")
_LETTERS_TO_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")


@dataclass(frozen=True, eq=False)
class ChameleonVocab:
    """The ids that sequences are built from. Build it with `from_tokenizer` or `from_mapping`.

    `image_token_ids`: int64 [num_codes], VQGAN code -> token id. `grid_size_ids`: side in 32-pixel grids -> token id.
    `vocab_size`: the largest id plus one.
    """

    bos_id: int
    pad_id: int
    eos_id: int | None
    begin_image_id: int
    end_image_id: int
    new_line_id: int
    end_of_turn_id: int
    image_token_ids: np.ndarray
    grid_size_ids: Mapping[int, int]
    vocab_size: int

    @classmethod
    def from_mapping(cls, name_to_id: Mapping[str, int]) -> "ChameleonVocab":
        """Look up every id in a vocabulary {token: id}. Raises ValueError with the tokens that it lacks."""
        needed = (BOS, PAD, BEGIN_IMAGE, END_IMAGE, NEW_LINE, END_OF_TURN)
        codes, grid_sizes = {}, {}
        for name, token_id in name_to_id.items():
            if match := _IMAGE_CODE.fullmatch(name):
                codes[int(match[1].translate(_LETTERS_TO_DIGITS))] = token_id
            elif (match := _RESERVED.fullmatch(name)) and int(match[1]) > FIRST_GRID_SIZE:
                grid_sizes[int(match[1]) - FIRST_GRID_SIZE] = token_id
        missing = [name for name in needed if name not in name_to_id]
        if sorted(codes) != list(range(len(codes))) or not codes:
            missing.append("IMGIMG...Z (image codes, without a gap)")
        if not grid_sizes:
            missing.append(f"<reserved{FIRST_GRID_SIZE + 1:05d}> (grid sizes)")
        if missing:
            raise ValueError(
                f"the tokenizer has not Chameleon's vocabulary: it lacks {', '.join(missing)}; "
                "give the tokenizer of a Chameleon or Lumina-mGPT model"
            )
        return cls(
            bos_id=name_to_id[BOS],
            pad_id=name_to_id[PAD],
            eos_id=name_to_id.get(EOS),
            begin_image_id=name_to_id[BEGIN_IMAGE],
            end_image_id=name_to_id[END_IMAGE],
            new_line_id=name_to_id[NEW_LINE],
            end_of_turn_id=name_to_id[END_OF_TURN],
            image_token_ids=np.array([codes[code] for code in range(len(codes))], dtype=np.int64),
            grid_size_ids=dict(sorted(grid_sizes.items())),
            vocab_size=max(name_to_id.values()) + 1,
        )

    @classmethod
    def from_tokenizer(cls, tokenizer) -> "ChameleonVocab":
        """Look up every id in a Hugging Face tokenizer (anything with `get_vocab()`)."""
        return cls.from_mapping(tokenizer.get_vocab())

    @property
    def num_codes(self) -> int:
        return len(self.image_token_ids)

    def image_to_tokens(self, codes: np.ndarray) -> list[int]:
        """The whole span of an image with codes [h, w]: 4 + h * (w + 1) ids. Raises ValueError without a token."""
        height, width = codes.shape
        self.check_image_size(width * CODE_PIXELS, height * CODE_PIXELS)
        if codes.min() < 0 or codes.max() >= self.num_codes:
            raise ValueError(f"codes must lie in 0..{self.num_codes - 1}, got {codes.min()}..{codes.max()}")
        sides = [self.grid_size_ids[side // CODES_PER_GRID] for side in (height, width)]
        rows = np.full((height, width + 1), self.new_line_id, dtype=np.int64)
        rows[:, :-1] = self.image_token_ids[codes]
        return [self.begin_image_id, *sides, *rows.ravel().tolist(), self.end_image_id]

    def tokens_to_codes(self, tokens: Sequence[int]) -> np.ndarray:
        """Codes, int64 [h, w], of one whole span: the inverse of `image_to_tokens`. Raises ValueError for another."""
        height, width, stop = self._find_span(tokens, 0)
        rows = np.asarray(tokens[3 : stop - 1], dtype=np.int64).reshape(height, width + 1)
        codes = self._code_of_token[rows[:, :-1].clip(0, self.vocab_size - 1)]
        if codes.min() < 0 or self.image_to_tokens(codes) != list(tokens):
            raise ValueError(
                "the rows of the image are not image codes, each row closed by the new-line token, and nothing else"
            )
        return codes

    def find_images(self, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """(start, stop) of every image span in a sequence. Raises ValueError for one that is cut off or malformed."""
        array = np.asarray(tokens, dtype=np.int64)
        spans: list[tuple[int, int]] = []
        for start in np.flatnonzero(array == self.begin_image_id).tolist():
            if not spans or start >= spans[-1][1]:
                spans.append((start, self._find_span(array, start)[2]))
        return spans

    def num_image_tokens(self, width: int, height: int) -> int:
        """Length of the span of an image of width x height pixels."""
        return 4 + (height // CODE_PIXELS) * (width // CODE_PIXELS + 1)

    def check_image_size(self, width: int, height: int) -> None:
        """Raises ValueError if there are no grid size tokens for an image of width x height pixels."""
        for side in (width, height):
            if side % GRID_PIXELS or side // GRID_PIXELS not in self.grid_size_ids:
                raise ValueError(
                    f"the size {width}x{height} is not possible: sides must be multiples of {GRID_PIXELS} pixels, from "
                    f"{min(self.grid_size_ids) * GRID_PIXELS} to {max(self.grid_size_ids) * GRID_PIXELS}."
                )

    @cached_property
    def _code_of_token(self) -> np.ndarray:
        """int64 [vocab_size]: token id -> VQGAN code, -1 for other tokens."""
        inverse = np.full(self.vocab_size, -1)
        inverse[self.image_token_ids] = np.arange(self.num_codes)
        return inverse

    @cached_property
    def _side_of_token(self) -> dict[int, int]:
        return {token_id: grids * CODES_PER_GRID for grids, token_id in self.grid_size_ids.items()}

    def _find_span(self, tokens: Sequence[int], start: int) -> tuple[int, int, int]:
        """(h, w) in codes of the image that begins at `start`, and its stop. Raises ValueError."""
        sides = [self._side_of_token.get(int(token)) for token in tokens[start + 1 : start + 3]]
        if len(sides) < 2 or None in sides or tokens[start] != self.begin_image_id:
            raise ValueError(f"the image at token {start} does not begin with {BEGIN_IMAGE}, its height and its width")
        stop = start + 4 + sides[0] * (sides[1] + 1)
        if stop > len(tokens) or tokens[stop - 1] != self.end_image_id:
            width, height = sides[1] * CODE_PIXELS, sides[0] * CODE_PIXELS
            raise ValueError(
                f"the image at token {start} of {width}x{height} pixels does not end with {END_IMAGE} after "
                f"{stop - start} tokens"
            )
        return *sides, stop


def is_control_token(name: str) -> bool:
    """Whether sequences are built from a token of this name, so that no user's text may produce it."""
    fixed = (BOS, PAD, EOS, BEGIN_IMAGE, END_IMAGE)
    return name in fixed or bool(_IMAGE_CODE.fullmatch(name) or _RESERVED.fullmatch(name))
