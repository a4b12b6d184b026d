"""One item from raw JSON to tokens and labels: conversation -> text ids and image crops -> codes -> one sequence.

A sequence is `<s>`, then for each turn its text with the images in place, and the end-of-turn token. Labels are the
tokens of gpt turns, IGNORE_INDEX elsewhere. The work comes in three parts, so that the caller may prepare in other
threads and encode images in batches: `process_item`, `prepare`, (encode `.images`), `finish`. `tokenize_item` is all
of them for one item.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.conversation import Conversation, ItemError, Turn, parse_conversation
from data.hub import TOKENIZER_FILES, fetch_folder
from data.image_transform import crop_sizes, crop_to_rgb, open_image
from data.messages import MAX_VALUE, one_line
from data.vocab import IGNORE_INDEX, IMAGE_SYMBOL, ChameleonVocab, is_control_token

TextEncode = Callable[[str], list[int]]
ImageEncode = Callable[[list[Image.Image]], list[np.ndarray]]  # RGB pictures of any sizes -> codes [h, w] of each

IMAGE_SLOT = None  # stands among the segments of a turn where the next image goes


@dataclass(frozen=True)
class PreparedTurn:
    """Segments of a turn: ids of a stretch of text, or IMAGE_SLOT for the next image."""

    is_predicted: bool
    segments: tuple[list[int] | None, ...]


@dataclass(frozen=True)
class PreparedItem:
    """An item that lacks only the codes of its images, RGB crops in the order of their slots."""

    id: int
    turns: tuple[PreparedTurn, ...]
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
    ):
        """`image_dirs`: where relative image paths are looked for, in this order. `crop`: "center" or "random"."""
        if crop not in ("center", "random"):
            raise ValueError(f"crop must be center or random, got {crop!r}")
        crop_sizes(target_size)  # raises for a size that is no multiple of 32
        self.text_encode = text_encode
        self.vocab = vocab
        self.image_encode = image_encode
        self.target_size = target_size
        self.crop = crop
        self.seed = seed
        self.image_dirs = tuple(image_dirs)

    def process_item(self, raw_item: Mapping, item_id: int) -> Conversation:
        """The conversation of a raw item. Override it to adapt another format. Raises ItemError with the reason."""
        return parse_conversation(raw_item)

    def prepare(self, conversation: Conversation, item_id: int) -> PreparedItem:
        """Encode the text and load the images. Raises ItemError for an image that is missing or cannot be read."""
        images = tuple(
            crop_to_rgb(open_image(self.find_image(path)), self.target_size, self._crop_generator(item_id, index))
            for index, path in enumerate(conversation.image_paths)
        )
        return PreparedItem(item_id, tuple(self._prepare_turn(turn) for turn in conversation.turns), images)

    def finish(self, prepared: PreparedItem, codes: Sequence[np.ndarray]) -> dict:
        """`{"token": list[int], "label": list[int], "id": int}` of an item and the codes [h, w] of its images."""
        if len(codes) != len(prepared.images):
            raise ValueError(f"item {prepared.id}: {len(prepared.images)} images but the codes of {len(codes)}")
        remaining = iter(codes)
        token, label = [self.vocab.bos_id], [IGNORE_INDEX]
        for turn in prepared.turns:
            ids = [*self._turn_ids(turn, remaining), self.vocab.end_of_turn_id]
            token += ids
            label += ids if turn.is_predicted else [IGNORE_INDEX] * len(ids)
        return {"token": token, "label": label, "id": prepared.id}

    def tokenize_item(self, raw_item: Mapping, item_id: int) -> dict:
        """All of it for one item. Raises ItemError with the reason if the item cannot be used."""
        prepared = self.prepare(self.process_item(raw_item, item_id), item_id)
        return self.finish(prepared, self._encode_images(prepared.images))

    def encode_prompt(self, turns: Sequence[Turn], images: Sequence[Image.Image] = ()) -> list[int]:
        """Token ids to generate from: `<s>`, the turns, and an open gpt turn at the end.

        If the last turn is gpt's, its text begins the answer and is left open. `images` (any mode and size) are those
        of the symbols in the turns, in order; they are scaled and cropped as in training, always from the centre.
        """
        num_symbols = sum(turn.text.count(IMAGE_SYMBOL) for turn in turns)
        if num_symbols != len(images):
            raise ValueError(f"the turns have {num_symbols} {IMAGE_SYMBOL} but {len(images)} images are given")
        codes = iter(self._encode_images([crop_to_rgb(image, self.target_size) for image in images]))
        token = [self.vocab.bos_id]
        for turn in turns:
            token += [*self._turn_ids(self._prepare_turn(turn), codes), self.vocab.end_of_turn_id]
        return token[:-1] if turns and turns[-1].role == "gpt" else token

    def trailing_image_len(self, token: Sequence[int], label: Sequence[int]) -> int | None:
        """Tokens of the image span that the item ends in, if it ends in one that is predicted."""
        if len(token) < 2 or token[-2] != self.vocab.end_image_id or label[-2] == IGNORE_INDEX:
            return None
        start, stop = self.vocab.find_images(token)[-1]
        return stop - start

    def find_image(self, path: str) -> Path:
        """Where an image lies: as given if absolute, else in the first of `image_dirs` that has it."""
        candidates = [Path(folder) / path for folder in self.image_dirs]
        for candidate in candidates:
            if os.path.isfile(candidate):  # False, too, for what cannot be a path
                return candidate
        tried = ", ".join(dict.fromkeys(one_line(candidate) for candidate in candidates))
        raise ItemError(f"image {one_line(path, MAX_VALUE)} does not exist (looked for {tried}); see --image_root")

    def _encode_images(self, images: Sequence[Image.Image]) -> list[np.ndarray]:
        if not images:
            return []
        if self.image_encode is None:
            raise ValueError("this item processor was built without image_encode, so it cannot take images")
        return self.image_encode(list(images))

    def _prepare_turn(self, turn: Turn) -> PreparedTurn:
        segments: list[list[int] | None] = []
        for index, text in enumerate(turn.text.split(IMAGE_SYMBOL)):
            if index:
                segments.append(IMAGE_SLOT)
            if text:
                segments.append(self.text_encode(text))
        return PreparedTurn(turn.role == "gpt", tuple(segments))

    def _turn_ids(self, turn: PreparedTurn, codes) -> list[int]:
        ids: list[int] = []
        for segment in turn.segments:
            ids += self.vocab.image_to_tokens(next(codes)) if segment is IMAGE_SLOT else segment
        return ids

    def _crop_generator(self, item_id: int, image_index: int) -> np.random.Generator | None:
        return np.random.default_rng([self.seed, item_id, image_index]) if self.crop == "random" else None


def load_text_tokenizer(tokenizer: str | os.PathLike):
    """The Hugging Face tokenizer of a folder (a `tokenizer.json`, or Meta's `text_tokenizer.json`, suffices) or of the
    hub (name/name or name/name/subfolder).

    Raises FileNotFoundError if there is none, and ValueError if its files are damaged.
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
    except Exception as error:  # what a missing or damaged file raises has no common class
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the tokenizer {tokenizer} cannot be read: {type(error).__name__}: {reason}. "
            "Copy its tokenizer.json and tokenizer_config.json again"
        ) from error


def hash_tokenizer(tokenizer) -> str:
    """SHA-256, hexadecimal, of a tokenizer's vocabulary and merges."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    content = [sorted(tokenizer.get_vocab().items()), model.get("merges")]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def build_text_encode(tokenizer) -> "PlainTextEncoder":
    """A function from text to its ids, without special tokens, in which no text whatever becomes a control token.

    It encodes with a copy of the tokenizer that does not know the control tokens, so that their names typed by a user
    stay text.
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
    return PlainTextEncoder(json.dumps(description))


class PlainTextEncoder:
    """Text to ids by a tokenizer in JSON. Unlike a closure it can be sent to another process."""

    def __init__(self, description: str):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(description)

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids
