"""Conversations to token ids as in pre-tokenizing, and generated token ids to text and images.

For `inference_solver.py` and `model/run/samples.py`, on both sides of `loop.py`.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data.hub import DEFAULT_VQGAN_DIR, find_vqgan
from data.items.conversation import Turn, foreign_symbol_problem
from data.items.image_transform import open_image
from data.items.item_processor import ItemProcessor, build_text_encode
from data.items.vocab import GRID_PIXELS, IMAGE_SYMBOL, ChameleonVocab
from data.messages import brief
from model.generation.loop import CUT_BY_LENGTH, CUT_BY_NAN, CUT_BY_POSITIONS, Generation
from model.vqgan.image_encoder import ImageEncoder
from model.vqgan.vqgan import VQGAN, check_codebook, load_vqgan, pixels_to_image, tf32_allowed

REQUEST_KEYS = {"qas", "images", "size"}


@dataclass(frozen=True)
class Answer:
    """One generation, decoded. `text` has an image symbol where each of the complete `images` stands."""

    text: str
    images: list[Image.Image]
    # As in Generation; None if the turn ended.
    cut_by: str | None = None
    # The cut was within an image, which is left out.
    is_image_cut_off: bool = False


class RequestCodec:
    """A tokenizer and its VQGAN."""

    def __init__(
        self,
        tokenizer: Any,
        vqgan_dir: str | Path | None,
        device: torch.device,
        target_size: int = 512,
        codebook_sha256: str | None = None,
    ) -> None:
        """
        Args:
            tokenizer: of Hugging Face, with Chameleon's vocabulary.
            vqgan_dir: folder or hub id, loaded for the first image in or out; None: `DEFAULT_VQGAN_DIR`.
            device: of the VQGAN, which is always in fp32.
            target_size: of images put in, in pixels: they are cropped to about its square, as in pre-tokenizing.
            codebook_sha256: of the VQGAN that the model was trained with; another one is rejected. None: any.
        """
        self.codebook_sha256 = codebook_sha256
        self.tokenizer, self.device = tokenizer, device
        self.vqgan_dir = Path(vqgan_dir or DEFAULT_VQGAN_DIR)
        self.vocab = ChameleonVocab.from_tokenizer(tokenizer)
        # A bound method would keep this object, and the model of a solver, alive until the garbage collector runs.
        codec = weakref.proxy(self)
        self.item_processor = ItemProcessor(
            build_text_encode(tokenizer),
            self.vocab,
            lambda images: ImageEncoder(codec.vqgan, "fp32")(images),
            target_size=target_size,
        )

    @cached_property
    def vqgan(self) -> VQGAN:
        vqgan = load_vqgan(find_vqgan(self.vqgan_dir), device=self.device)
        codebook = vqgan.quantize.embedding.weight
        check_codebook(codebook, self.vqgan_dir, self.codebook_sha256, "the model's training data")
        if vqgan.num_codes > self.vocab.num_codes:
            raise ValueError(
                f"the VQGAN in {self.vqgan_dir} has {vqgan.num_codes} codes, but the tokenizer has tokens for "
                f"{self.vocab.num_codes}: they do not belong together; give the VQGAN that the data was tokenized with."
            )
        return vqgan

    def check_vqgan(self, with_decoder: bool = True) -> None:
        """Load the VQGAN before anything is generated. Raises ValueError for a wrong one, or one without a decoder."""
        if not self.vqgan.has_decoder and with_decoder:
            raise ValueError(
                f"the VQGAN in {self.vqgan_dir} has no decoder to draw with (Hugging Face folders hold none): "
                "give the folder of Meta's vqgan.ckpt."
            )

    def encode_request(
        self,
        qas: Sequence[Sequence[str | None]],
        images: Sequence[Image.Image | str | Path] | Image.Image | str | Path | None = (),
    ) -> list[int]:
        """Token ids of a conversation whose last answer is open. Raises ValueError for anything else."""
        check_turns(qas)
        images = [] if images is None else [images] if isinstance(images, Image.Image | str | Path) else images
        opened = [image if isinstance(image, Image.Image) else open_image(image) for image in images]
        texts = [text for qa in qas for text in qa if text is not None]
        check_image_symbols(texts, len(opened))
        if opened and not any(IMAGE_SYMBOL in text for text in texts):
            texts[0] = f"{IMAGE_SYMBOL} " * len(opened) + texts[0]
        turns = [Turn("gpt" if index % 2 else "human", text) for index, text in enumerate(texts)]
        return self.item_processor.encode_prompt(turns, opened)

    def encode_requests(
        self, requests: Sequence[Mapping[str, Any]]
    ) -> tuple[list[list[int]], list[tuple[int, int] | None]]:
        """Token ids and image sizes of requests {"qas", "images" (optional), "size" (optional)}. Raises ValueError.

        The same object several times is encoded once.
        """
        encoded: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            try:
                if "qas" not in request or not REQUEST_KEYS.issuperset(request):
                    keys = ", ".join(map(brief, request))
                    raise ValueError(f"it has {keys}; it must have qas, and may have images and size")
                _check_size(request.get("size"))
                if id(request) not in encoded:
                    encoded[id(request)] = self.encode_request(request["qas"], request.get("images"))
            except ValueError as error:
                raise ValueError(f"request {index}: {error}" if index else str(error)) from None
        sizes = [request.get("size") and tuple(request["size"]) for request in requests]
        return [encoded[id(request)] for request in requests], sizes

    def image_start(self, size: tuple[int, int] | None) -> list[int]:
        """The tokens that begin an image of (width, height) pixels. Raises ValueError for an impossible size."""
        if size is None:
            return []
        width, height = size
        self.vocab.check_image_size(width, height)
        ids = self.vocab.grid_size_ids
        return [self.vocab.begin_image_id, ids[height // GRID_PIXELS], ids[width // GRID_PIXELS]]

    def decode(self, generations: Sequence[Generation], with_images: bool = True) -> list[Answer]:
        """Texts and images of generations; the VQGAN is not needed without images."""
        return [self._decode_one(generation, with_images) for generation in generations]

    def _decode_one(self, generation: Generation, with_images: bool) -> Answer:
        tokens, begin, end = generation.tokens, self.vocab.begin_image_id, self.vocab.end_image_id
        is_image_cut_off = tokens.count(begin) > tokens.count(end)
        if is_image_cut_off:
            tokens = tokens[: len(tokens) - 1 - tokens[::-1].index(begin)]
        text, images, done = "", [], 0
        for start, stop in self.vocab.find_images(tokens):
            text += self._decode_text(tokens[done:start]) + IMAGE_SYMBOL
            done = stop
            if with_images:
                codes = torch.from_numpy(self.vocab.tokens_to_codes(tokens[start:stop]))
                # One at a time: a batch may round differently, and the same seed must give the same image.
                with tf32_allowed(False):
                    images.append(pixels_to_image(self.vqgan.decode(codes[None])[0]))
        return Answer(text + self._decode_text(tokens[done:]), images, generation.cut_by, is_image_cut_off)

    def _decode_text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False) if tokens else ""


def describe_cuts(answers: Sequence[Answer], max_gen_len: int) -> str:
    """How many of the answers were cut off, and by what, in one sentence; empty if none was."""
    places = {
        CUT_BY_LENGTH: f"max_gen_len={max_gen_len} tokens",
        CUT_BY_POSITIONS: "the end of the model's positions (shorten the prompt or raise --max_positions, in training "
        "--max_seq_len)",
        CUT_BY_NAN: "NaN logits: the weights are damaged, or too large for the precision",
    }
    num_cut = {place: sum(answer.cut_by == cause for answer in answers) for cause, place in places.items()}
    found = [f"{num} of {len(answers)} answers were cut off at {place}" for place, num in num_cut.items() if num]
    if num_images := sum(answer.is_image_cut_off for answer in answers):
        found.append(f"{num_images} of them within an image, which is left out")
    return ", ".join(found)


def check_image_symbols(texts: Iterable[str | None], num_images: int) -> None:
    """Raises ValueError unless the texts are Unicode and have one image symbol per image, or none."""
    texts = [text for text in texts if text is not None]
    for text in texts:
        # Bytes of the shell that are not UTF-8.
        if has_surrogates(text):
            raise ValueError(f"the text {ascii(text[:60])} is not valid UTF-8; convert it to UTF-8 first")
    num_symbols = sum(text.count(IMAGE_SYMBOL) for text in texts)
    if num_images and not num_symbols and (problem := foreign_symbol_problem(texts)):
        raise ValueError(f"{problem} write one for each image")
    if num_symbols and num_symbols != num_images:
        raise ValueError(
            f"the text has {num_symbols} {IMAGE_SYMBOL}, but there are {num_images} images; give one for each, or "
            "leave the symbols out"
        )


def has_surrogates(text: str) -> bool:
    """Whether a text has halves of surrogate pairs, which cannot be encoded."""
    return any("\ud800" <= char <= "\udfff" for char in text)


def check_turns(qas: Any) -> None:
    """Raises ValueError unless `qas` is [question, answer] pairs of texts; the last answer may be None."""
    is_good = isinstance(qas, list | tuple) and qas and all(isinstance(qa, list | tuple) and len(qa) == 2 for qa in qas)
    if is_good:
        *texts, last_answer = [text for qa in qas for text in qa]
        is_good = all(isinstance(text, str) for text in texts) and isinstance(last_answer, str | None)
    if not is_good:
        raise ValueError(
            f"qas must be [question, answer] pairs of texts; only the last answer may be None, got {str(qas)[:80]!r}"
        )


def _check_size(size: Any) -> None:
    is_pair = isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(side, Integral) for side in size)
    if size is not None and not is_pair:
        raise ValueError(f"size must be (width, height) in whole pixels, got {brief(str(size)[:200])}")


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "768x512". Raises ValueError."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(f"{brief(text)} is no size; write width x height in pixels, e.g. 768x512")
    return int(sides[0]), int(sides[1])
