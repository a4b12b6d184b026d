"""The standard form of an item: turns of a conversation, and its images. TRAIN.md describes it.

    {"conversations": [{"from": "human", "value": "draw"}, {"from": "gpt", "value": "<|image|>"}], "image": "a.png"}

`<image>` and `images`, as in ShareGPT and LLaVA, are read too; `data/items/rows.py` turns other forms into this one.
Keys and symbols that carry meaning in further formats are rejected, never ignored.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from data.items.vocab import IMAGE_SYMBOL
from data.messages import brief

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
SIZE = "{W}x{H}"
HOW_TO_ADAPT = "TRAIN.md, Another format, shows how to adapt such items (process_item)"
# Key -> what is meant, in the words of this format. Suffixes are keys of members of a tar.
_FOREIGN_KEYS = {
    **dict.fromkeys(
        ("video", "videos", "mp4", "webm", "mkv", "mov", "avi"),
        "single frames in `image`? Videos are not tokenized.",
    ),
    **dict.fromkeys(
        ("audio", "audios", "wav", "mp3", "flac", "ogg", "m4a"),
        "its text in `conversations`? Audio is not tokenized.",
    ),
    "system": "a leading turn from `system`?",
    "history": "earlier turns of `conversations`?",
    "tools": "a leading turn from `system` that describes them?",
    "chosen": "a last turn from `gpt`?",
}
# Harmless beside `image`.
_IMAGE_KEYS = ("image_path", "image_paths", "image_file", "image_url", "image_urls", "img")
# Of LLaVA, Qwen-VL, InternVL, XComposer, Phi, Gemma and others. A tag with attributes is HTML and does not match.
_FOREIGN_SYMBOL = re.compile(
    r"<\|?(?:image|img|video|audio|vision)s?"
    r"(?:[ _-]?(?:\d+|start|end|bos|eos|pad|here|soft|token|context|placeholder))*\|?>"
    r"|<\|?(?:start|begin)_of_image\|?>|<im_start>",
    re.IGNORECASE,
)
# Of ShareGPT and LLaVA.
OTHER_IMAGE_SYMBOL = "<image>"
# A path or URL, or the content of a file; {"bytes": ..., "path": ...} is the form of `datasets`.
ImageSource = str | bytes | Mapping[str, Any]


class ItemError(ValueError):
    """This item cannot be used; the message is the reason."""


class FormatError(ItemError):
    """The item is not of this format at all. The whole input is probably wrong, so nothing should be started."""


@dataclass(frozen=True)
class Turn:
    """`role` is "human", "gpt" or "system". Only gpt turns are predicted."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """Turns whose image symbols match `images` in number and order.

    With `is_sized`, SIZE in the first turn stands for the width and height of the crop of the first image.
    """

    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...] = ()
    is_sized: bool = False


def parse_conversation(raw: Mapping) -> Conversation:
    """The conversation of one raw item. Raises FormatError without `conversations`, ItemError for any other reason."""
    if not isinstance(raw, Mapping):
        raise FormatError(f"an item must be an object with `conversations`, got {brief(raw)}")
    if "conversations" not in raw:
        keys = ", ".join(f"`{brief(key)[1:-1]}`" for key in list(raw)[:8]) or "no keys at all"
        raise FormatError(
            f"an item must have `conversations` or `messages`, this one has {keys}; "
            "pairs of an image and its text need --task and --columns"
        )
    images = parse_images(raw)
    _check_keys(raw, "`{}`", () if images else _IMAGE_KEYS)
    turns = _parse_turns(raw["conversations"])
    if images and not _count_images(turns):
        turns = tuple(replace(turn, text=turn.text.replace(OTHER_IMAGE_SYMBOL, IMAGE_SYMBOL)) for turn in turns)
    num_symbols = _count_images(turns)
    if images and not num_symbols:
        if problem := foreign_symbol_problem(turn.text for turn in turns):
            raise ItemError(f"{problem} {HOW_TO_ADAPT}")
        first = replace(turns[0], text=f"{IMAGE_SYMBOL} " * len(images) + turns[0].text)
        return Conversation((first, *turns[1:]), images)
    if num_symbols != len(images):
        raise ItemError(
            f"the text has {num_symbols} {IMAGE_SYMBOL} but `image` lists {len(images)}; "
            "each symbol stands for one image"
        )
    return Conversation(turns, images)


def foreign_symbol_problem(texts: Iterable[str]) -> str:
    """The message for an item with images that has an image symbol of another format; "" if it has none."""
    found = next(filter(None, map(_FOREIGN_SYMBOL.search, texts)), None)
    return f"the text has {brief(found[0])[1:-1]} but no {IMAGE_SYMBOL}: did you mean {IMAGE_SYMBOL}?" if found else ""


def parse_images(raw: Mapping, keys: tuple[str, ...] = ("image", "images")) -> tuple[ImageSource, ...]:
    """The images under one of the keys: a single one or a list. Raises ItemError if they cannot be images."""
    given = [key for key in keys if raw.get(key)]
    if len(given) > 1:
        raise ItemError(f"`{given[0]}` and `{given[1]}` are both there: keep one of them")
    value = raw[given[0]] if given else []
    images = value if isinstance(value, list) else [value]
    if not all(_is_image(image) for image in images):
        raise ItemError(f"`{given[0]}` must be a path, bytes or a list of them, got {brief(value)}")
    return tuple(images)


def _is_image(value: object) -> bool:
    if isinstance(value, Mapping):
        return bool(value.get("bytes") or value.get("path"))
    return isinstance(value, str | bytes) and bool(value)


def _count_images(turns: Iterable[Turn]) -> int:
    return sum(turn.text.count(IMAGE_SYMBOL) for turn in turns)


def _check_keys(raw: Mapping, name: str, image_keys: Iterable[str]) -> None:
    for key, meant in [*_FOREIGN_KEYS.items(), *((key, "`image`?") for key in image_keys)]:
        if raw.get(key):
            raise ItemError(f"{name.format(key)} is not read: did you mean {meant} {HOW_TO_ADAPT}")


def _parse_turns(raw_turns: object) -> tuple[Turn, ...]:
    if not isinstance(raw_turns, list) or not raw_turns:
        raise ItemError(f"`conversations` must be a list of turns that is not empty, got {brief(raw_turns)}")
    turns = tuple(_parse_turn(raw, index) for index, raw in enumerate(raw_turns))
    num_leading = int(turns[0].role == "system")
    for index, turn in enumerate(turns[num_leading:]):
        expected = ("human", "gpt")[index % 2]
        if turn.role != expected:
            raise ItemError(
                f"turn {index + num_leading} is from {turn.role}, {expected} expected: turns alternate, human first, "
                "after an optional leading system turn"
            )
    if len(turns) < num_leading + 2:
        raise ItemError("there is nothing to predict: no turn is from gpt")
    return turns


def _parse_turn(raw: object, index: int) -> Turn:
    if not isinstance(raw, Mapping) or "from" not in raw or "value" not in raw:
        is_message = isinstance(raw, Mapping) and ("role" in raw or "content" in raw)
        hint = "; did you mean `messages` for `conversations`?" if is_message else ""
        raise ItemError(f"turn {index} must be an object with `from` and `value`, got {brief(raw)}{hint}")
    _check_keys(raw, f"`{{}}` of turn {index}", ("image", *_IMAGE_KEYS))
    role, text = raw["from"], raw["value"]
    if not isinstance(role, str) or role not in ROLES:
        raise ItemError(f"turn {index} is from {brief(role)}; `from` must be one of {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise ItemError(f"`value` of turn {index} must be text, got {brief(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ItemError(f"`value` of turn {index} has half of a surrogate pair, which is not text") from None
    if not text and ROLES[role] == "gpt":
        raise ItemError(f"turn {index} is from {role} and empty, so the model would learn to end at once")
    return Turn(ROLES[role], text)
