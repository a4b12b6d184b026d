"""One item from raw JSON to tokens and labels: conversation -> text ids and image crops -> codes -> one sequence.

The work comes in parts, so that the caller can prepare items in other processes and encode images in batches:
`process_item`, `prepare`, (encode `.images`), `finish`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from data.hub import TOKENIZER_FILES, fetch_folder
from data.items.conversation import SIZE, Conversation, Turn
from data.items.image_source import ImageReader
from data.items.image_transform import crop_to_rgb
from data.items.rows import Pairs, parse_row
from data.items.vocab import IGNORE_INDEX, IMAGE_SYMBOL, ChameleonVocab, is_control_token
from data.messages import one_line

TextEncode = Callable[[str], list[int]]
# RGB images of any sizes -> codes [h, w] of each.
ImageEncode = Callable[[list[Image.Image]], list[np.ndarray]]

# Stands among the segments of an item where the next image goes.
IMAGE_SLOT = None


class Segment(NamedTuple):
    """A part of a sequence: `ids`, or IMAGE_SLOT for the next image. Only parts of gpt turns are predicted."""

    ids: list[int] | None
    is_predicted: bool


@dataclass(frozen=True)
class PreparedItem:
    """An item that lacks only the codes of its images, RGB crops in the order of their slots."""

    id: int
    segments: tuple[Segment, ...]
    images: tuple[Image.Image, ...]


class ItemProcessor:
    """Turns items into `{"token", "label", "id"}`. Tokenizers are handed in; nothing here knows a device or a model."""

    def __init__(
        self,
        text_encode: TextEncode,
        vocab: ChameleonVocab,
        image_encode: ImageEncode | None = None,
        target_size: int = 512,
        crop: str = "center",
        seed: int = 0,
        image_dirs: Sequence[str | os.PathLike] = ("",),
        confine_images: bool = False,
        allow_urls: bool = False,
        pairs: Pairs | None = None,
    ):
        """`crop`: "center" or "random". `pairs`: rows are pairs of an image and its text, in these columns.

        `image_dirs`, `confine_images`, `allow_urls`: as in `ImageReader`.
        """
        self.text_encode = text_encode
        self.vocab = vocab
        self.image_encode = image_encode
        self.target_size = target_size
        self.crop = crop
        self.seed = seed
        self.image_reader = ImageReader(tuple(image_dirs), confine_images, allow_urls)
        self.pairs = pairs

    def process_item(self, raw_item: Mapping, item_id: int) -> Conversation:
        """The conversation of a raw item. Override it to adapt another format. Raises ItemError with the reason."""
        return parse_row(raw_item, self.pairs)

    def prepare(self, conversation: Conversation, item_id: int) -> PreparedItem:
        """Encode the text and load the images. Raises ItemError for an image that is missing or cannot be read."""
        images = tuple(
            crop_to_rgb(self.image_reader.open(source), self.target_size, self._crop_generator(item_id, index))
            for index, source in enumerate(conversation.images)
        )
        turns = conversation.turns
        if conversation.is_sized:
            size = "{}x{}".format(*images[0].size)
            turns = (replace(turns[0], text=turns[0].text.replace(SIZE, size, 1)), *turns[1:])
        return PreparedItem(item_id, self._segments(turns), images)

    def finish(self, prepared: PreparedItem, codes: Sequence[np.ndarray]) -> dict:
        """`{"token": list[int], "label": list[int], "id": int}` of an item and the codes [h, w] of its images."""
        remaining = iter(codes)
        token, label = [], []
        for ids, is_predicted in prepared.segments:
            ids = self.vocab.image_to_tokens(next(remaining)) if ids is IMAGE_SLOT else ids
            token += ids
            label += ids if is_predicted else [IGNORE_INDEX] * len(ids)
        return {"token": token, "label": label, "id": prepared.id}

    def tokenize_item(self, raw_item: Mapping, item_id: int) -> dict:
        """All of it for one item. Raises ItemError with the reason if the item cannot be used."""
        prepared = self.prepare(self.process_item(raw_item, item_id), item_id)
        return self.finish(prepared, self._encode_images(prepared.images))

    def encode_prompt(self, turns: Sequence[Turn], images: Sequence[Image.Image] = ()) -> list[int]:
        """Token ids to generate from: `<s>`, the turns, and an open gpt turn, which the last turn may begin.

        `images` (any mode and size) stand for the symbols in the turns, in order. They are cropped as in training, but
        always from the centre.
        """
        num_symbols = sum(turn.text.count(IMAGE_SYMBOL) for turn in turns)
        if num_symbols != len(images):
            raise ValueError(f"the turns have {num_symbols} {IMAGE_SYMBOL} but {len(images)} images are given")
        crops = tuple(crop_to_rgb(image, self.target_size) for image in images)
        prepared = PreparedItem(0, self._segments(turns), crops)
        token = self.finish(prepared, self._encode_images(crops))["token"]
        return token[:-1] if turns and turns[-1].role == "gpt" else token

    def trailing_image_len(self, token: Sequence[int], label: Sequence[int]) -> int | None:
        """Tokens of the image span that the item ends in, if it ends in one that is predicted."""
        if len(token) < 2 or token[-2] != self.vocab.end_image_id or label[-2] == IGNORE_INDEX:
            return None
        # Faster than `find_images`, which reads the whole sequence. The last token ends the turn.
        return token[::-1].index(self.vocab.begin_image_id)

    def _encode_images(self, images: Sequence[Image.Image]) -> list[np.ndarray]:
        return self.image_encode(list(images)) if images else []

    def _segments(self, turns: Sequence[Turn]) -> tuple[Segment, ...]:
        segments = [Segment([self.vocab.bos_id], False)]
        for turn in turns:
            is_predicted = turn.role == "gpt"
            for index, text in enumerate(turn.text.split(IMAGE_SYMBOL)):
                if index:
                    segments.append(Segment(IMAGE_SLOT, is_predicted))
                if text:
                    segments.append(Segment(self.text_encode(text), is_predicted))
            segments.append(Segment([self.vocab.end_of_turn_id], is_predicted))
        return tuple(segments)

    def _crop_generator(self, item_id: int, image_index: int) -> np.random.Generator | None:
        return np.random.default_rng([self.seed, item_id, image_index]) if self.crop == "random" else None


def load_text_tokenizer(tokenizer: str | os.PathLike):
    """The Hugging Face tokenizer of a folder, or of the hub (name/name or name/name/subfolder).

    A `tokenizer.json`, or Meta's `text_tokenizer.json`, suffices. Raises FileNotFoundError or ValueError.
    """
    from transformers import PreTrainedTokenizerFast

    path = fetch_folder(tokenizer, TOKENIZER_FILES, "--tokenizer", with_subfolder=True)
    has_own = (path / "tokenizer.json").is_file()
    if not has_own and not (path / "text_tokenizer.json").is_file():
        raise FileNotFoundError(f"the tokenizer folder {path} has no tokenizer.json")
    try:
        if has_own:
            return PreTrainedTokenizerFast.from_pretrained(os.fspath(path))
        return PreTrainedTokenizerFast(tokenizer_file=os.fspath(path / "text_tokenizer.json"))
    # The errors of a missing or damaged file have no common class.
    except Exception as error:
        raise ValueError(
            f"the tokenizer {tokenizer} cannot be read: {type(error).__name__}: {one_line(error)}. "
            "Copy its tokenizer.json and tokenizer_config.json again"
        ) from error


def hash_tokenizer(tokenizer) -> str:
    """SHA-256, hexadecimal, of a tokenizer's vocabulary and merges."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    content = [sorted(tokenizer.get_vocab().items()), model.get("merges")]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def build_text_encode(tokenizer) -> TextEncode:
    """A function from text to its ids. No text becomes a control token.

    It encodes with a copy of the tokenizer that lacks the control tokens, so their names stay text.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["content"] for token in description["added_tokens"]}
    model = description["model"]

    def is_control(name: str) -> bool:
        return name != model.get("unk_token") and (name in added or is_control_token(name))

    model["vocab"] = {name: token_id for name, token_id in model["vocab"].items() if not is_control(name)}
    if "merges" in model:
        pairs = (tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"])
        model["merges"] = [list(pair) for pair in pairs if not any(map(is_control, (*pair, "".join(pair))))]
    description |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return partial(_encode, Tokenizer.from_str(json.dumps(description)))


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids
