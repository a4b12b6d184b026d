"""
Requests and answers: conversations to token ids, and generated token ids to text and pictures.

Where it stands: on both sides of `model/generation.py`, for `inference_solver.py` and for the samples of a training
(`model/samples.py`). Conversations become token ids as in pre-tokenizing (`data/item_processor.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.conversation import Turn
from data.image_transform import open_image
from data.item_processor import ItemProcessor, build_text_encode
from data.vocab import GRID_PIXELS, IMAGE_SYMBOL, ChameleonVocab
from model.generation import Generation
from model.vqgan import VQGAN, load_vqgan, pixels_to_image
from pre_tokenize.image_encoder import ImageEncoder

DEFAULT_VQGAN_DIR = "ckpts/chameleon/tokenizer"


@dataclass(frozen=True)
class Answer:
    """
    What one generation gave.

    Attributes:
        text: its text, with an image symbol where each image stands.
        images: the complete images, in order.
        is_cut_off: the turn was longer than allowed; text is as far as it came.
        is_image_cut_off: the cut was within an image, which is left out.
    """

    text: str
    images: list[Image.Image]
    is_cut_off: bool = False
    is_image_cut_off: bool = False


class RequestCodec:
    """A tokenizer and its VQGAN."""

    def __init__(
        self, tokenizer: Any, vqgan_dir: str | Path | None, device: torch.device, target_size: int = 512
    ) -> None:
        """
        Args:
            tokenizer: of Hugging Face, with Chameleon's vocabulary.
            vqgan_dir: read once an image is put in or comes out; None: `DEFAULT_VQGAN_DIR`.
            device: of the VQGAN, which is always in fp32.
            target_size: of images put in, in pixels: they are cropped to about its square, as in pre-tokenizing.
        """
        self.tokenizer, self.device = tokenizer, device
        self.vqgan_dir = Path(vqgan_dir or DEFAULT_VQGAN_DIR)
        self.vocab = ChameleonVocab.from_tokenizer(tokenizer)
        self.item_processor = ItemProcessor(
            build_text_encode(tokenizer), self.vocab, self._encode_images, target_size=target_size
        )

    @cached_property
    def vqgan(self) -> VQGAN:
        vqgan = load_vqgan(self.vqgan_dir, device=self.device)
        if vqgan.num_codes > self.vocab.num_codes:
            raise ValueError(
                f"the VQGAN in {self.vqgan_dir} has {vqgan.num_codes} codes, but the tokenizer has tokens for "
                f"{self.vocab.num_codes}: they do not belong together; give the VQGAN that the data was tokenized with."
            )
        return vqgan

    def check_vqgan(self, with_decoder: bool = True) -> None:
        """Load the VQGAN now, so that what is wrong with it (ValueError) is told before anything is generated."""
        vqgan = self.vqgan
        if with_decoder and not vqgan.has_decoder:
            raise ValueError(
                f"the VQGAN in {self.vqgan_dir} has no decoder to draw with (Hugging Face folders hold none): "
                "give the folder of Meta's vqgan.ckpt."
            )

    def encode_request(
        self,
        qas: Sequence[Sequence[str | None]],
        images: Sequence[Image.Image | str | Path] | Image.Image | str | Path = (),
    ) -> list[int]:
        """Token ids of a conversation whose last answer is open. Raises ValueError if `qas` is not of that form."""
        if not qas or any(len(qa) != 2 or qa[0] is None for qa in qas) or any(qa[1] is None for qa in qas[:-1]):
            raise ValueError(f"qas must be [question, answer] pairs; only the last answer may be None, got {qas!r}.")
        if isinstance(images, Image.Image | str | Path):
            images = [images]
        pictures = [image if isinstance(image, Image.Image) else open_image(image) for image in images]
        texts = [text for qa in qas for text in qa if text is not None]
        if pictures and not any(IMAGE_SYMBOL in text for text in texts):
            texts[0] = f"{IMAGE_SYMBOL} " * len(pictures) + texts[0]
        turns = [Turn("gpt" if index % 2 else "human", text) for index, text in enumerate(texts)]
        return self.item_processor.encode_prompt(turns, pictures)

    def image_start(self, size: tuple[int, int] | None) -> list[int]:
        """The tokens that begin an image of (width, height) pixels. Raises ValueError for an impossible size."""
        if size is None:
            return []
        width, height = size
        self.vocab.check_image_size(width, height)
        ids = self.vocab.grid_size_ids
        return [self.vocab.begin_image_id, ids[height // GRID_PIXELS], ids[width // GRID_PIXELS]]

    def _encode_images(self, images: list[Image.Image]) -> list[np.ndarray]:
        return ImageEncoder(self.vqgan, "fp32")(images)

    def decode(self, generations: Sequence[Generation], with_images: bool = True) -> list[Answer]:
        """What the generations say and show; without images none is drawn."""
        answers = []
        for generation in generations:
            text, codes, is_image_cut_off = self._layout(generation.tokens)
            images = [self._decode_image(one) for one in codes] if with_images else []
            answers.append(Answer(text, images, not generation.finished, is_image_cut_off))
        return answers

    def _layout(self, tokens: list[int]) -> tuple[str, list[np.ndarray], bool]:
        """Text (with image symbols), codes [h, w] of the complete images, and whether an image was cut off."""
        begin, end = self.vocab.begin_image_id, self.vocab.end_image_id
        is_image_cut_off = tokens.count(begin) > tokens.count(end)
        if is_image_cut_off:
            tokens = tokens[: len(tokens) - 1 - tokens[::-1].index(begin)]
        text, images, done = "", [], 0
        for start, stop in self.vocab.find_images(tokens):
            text += self._decode_text(tokens[done:start]) + IMAGE_SYMBOL
            images.append(self.vocab.tokens_to_codes(tokens[start:stop]))
            done = stop
        return text + self._decode_text(tokens[done:]), images, is_image_cut_off

    def _decode_text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False) if tokens else ""

    def _decode_image(self, codes: np.ndarray) -> Image.Image:
        # One at a time: in a batch the convolutions may round differently, and the same seed gives the same picture.
        return pixels_to_image(self.vqgan.decode(torch.from_numpy(codes)[None])[0])


def describe_cuts(answers: Sequence[Answer], max_gen_len: int) -> str:
    """How many of the answers were cut off, in one sentence."""
    num_images = sum(answer.is_image_cut_off for answer in answers)
    within = f", {num_images} of them within an image, which is left out" if num_images else ""
    num_cut = sum(answer.is_cut_off for answer in answers)
    return f"{num_cut} of {len(answers)} answers were cut off at max_gen_len={max_gen_len} tokens{within}"


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "768x512". Raises ValueError."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) for side in sides):
        raise ValueError(f"{text!r} is no size; write width x height in pixels, e.g. 768x512")
    return int(sides[0]), int(sides[1])
