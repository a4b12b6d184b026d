"""Rows of other forms than `conversations`: chat `messages`, and pairs of an image and its text in two columns.

{"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image", "image": "a.png"}]},
              {"role": "assistant", "content": "A cat."}]}
{"caption": "a cat", "jpg": ...} with --columns prompt=caption,image=jpg --task t2i
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from data.items.conversation import (
    OTHER_IMAGE_SYMBOL,
    SIZE,
    Conversation,
    FormatError,
    ImageSource,
    ItemError,
    parse_conversation,
    parse_images,
)
from data.items.vocab import IMAGE_SYMBOL
from data.messages import brief

TASKS = ("t2i", "i2t")
# The words of the recipe.
DRAW = f"Generate an image of {SIZE} according to the following prompt:\n"
DESCRIBE = "Describe the image in detail."
MESSAGE_ROLES = ("system", "user", "assistant")
# Keys of a message that carry meaning beside `content`.
_FOREIGN_KEYS = ("tool_calls", "function_call", "audio", "image", "images")


@dataclass(frozen=True)
class Pairs:
    """Rows of a text and an image: the columns in which they are, and which of them is learned (one of TASKS)."""

    task: str
    prompt: str = "caption"
    image: str = "image"

    def __str__(self) -> str:
        return f"{self.task} prompt={self.prompt},image={self.image}"


def parse_pairs(task: str | None, columns: str | None) -> Pairs | None:
    """Of --task and --columns `prompt=NAME,image=NAME`; None without both. Raises ValueError."""
    if task is None:
        if columns is not None:
            raise ValueError("--columns needs --task t2i or --task i2t")
        return None
    names = dict(pair.partition("=")[::2] for pair in columns.split(",")) if columns else {}
    if not names.keys() <= {"prompt", "image"} or not all(names.values()):
        raise ValueError(f"--columns must be prompt=NAME,image=NAME, got {brief(columns)}")
    return Pairs(task, **names)


def parse_row(raw: object, pairs: Pairs | None = None) -> Conversation:
    """The conversation of a row. Raises FormatError for a row of no known form, ItemError for any other reason."""
    if pairs is not None:
        return _parse_pair(raw, pairs)
    # `datasets` gives every row all keys, some without a value.
    if isinstance(raw, Mapping) and "messages" in raw and (raw["messages"] or not raw.get("conversations")):
        raw = _from_messages(raw)
    return parse_conversation(raw)


def describe_row(raw: object, pairs: Pairs | None = None) -> str:
    """The form of a row for people; "" for `conversations` as the recipe has them."""
    if pairs is not None:
        return f"pairs of `{pairs.prompt}` and `{pairs.image}` ({pairs.task})"
    if not isinstance(raw, Mapping):
        return ""
    if raw.get("messages"):
        return "chat `messages`"
    text = str(raw.get("conversations"))
    has_other_symbol = OTHER_IMAGE_SYMBOL in text and IMAGE_SYMBOL not in text
    if raw.get("images") or (raw.get("image") and has_other_symbol):
        return f"ShareGPT or LLaVA, {OTHER_IMAGE_SYMBOL} in the text stands for an image"
    return ""


def _parse_pair(raw: object, pairs: Pairs) -> Conversation:
    if not isinstance(raw, Mapping):
        raise FormatError(f"a row must be an object with columns, got {brief(raw)}")
    for name in (pairs.prompt, pairs.image):
        if name not in raw:
            columns = ", ".join(f"`{brief(key)[1:-1]}`" for key in list(raw)[:20]) or "none"
            near = difflib.get_close_matches(name, map(str, raw), n=1, cutoff=0)
            hint = f"; did you mean `{brief(near[0])[1:-1]}`?" if near else ""
            raise FormatError(f"the row has no column `{name}` (see --columns), it has {columns}{hint}")
    text, images = raw[pairs.prompt], parse_images(raw, (pairs.image,))
    if not isinstance(text, str) or not text:
        raise ItemError(f"column `{pairs.prompt}` must be text that is not empty, got {brief(text)}")
    if len(images) != 1:
        raise ItemError(f"column `{pairs.image}` must hold one image, got {brief(raw[pairs.image])}")
    if IMAGE_SYMBOL in text:
        raise ItemError(f"column `{pairs.prompt}` has {IMAGE_SYMBOL}, which stands for an image")
    human, gpt = (DRAW + text, IMAGE_SYMBOL) if pairs.task == "t2i" else (f"{IMAGE_SYMBOL} {DESCRIBE}", text)
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    parsed = parse_conversation({"conversations": turns, "image": list(images)})
    return Conversation(parsed.turns, parsed.images, is_sized=pairs.task == "t2i")


def _from_messages(raw: Mapping) -> dict:
    """The row with `conversations` and `image` for its `messages`."""
    if raw.get("conversations"):
        raise ItemError("`messages` and `conversations` are both there: keep one of them")
    messages, given = raw["messages"], list(parse_images(raw))
    if not isinstance(messages, list) or not messages:
        raise ItemError(f"`messages` must be a list that is not empty, got {brief(messages)}")
    turns, images, waiting = [], [], list(given)
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in MESSAGE_ROLES or "content" not in message:
            raise ItemError(
                f"message {index} must be an object with `role` ({', '.join(MESSAGE_ROLES)}) and `content`, "
                f"got {brief(message)}"
            )
        if key := next((key for key in _FOREIGN_KEYS if message.get(key)), None):
            raise ItemError(f"`{key}` of message {index} is not read: put it into `content`")
        content = message["content"]
        if isinstance(content, list):
            content = "".join(_read_part(part, index, images, waiting) for part in content)
        turns.append({"from": message["role"], "value": content})
    # Without image parts, the symbols in the texts stand for `images`.
    if images and waiting:
        raise ItemError(f"`images` lists {len(given)}, but image parts take {len(given) - len(waiting)} of them")
    others = {key: value for key, value in raw.items() if key not in ("messages", "image", "images")}
    return {**others, "conversations": turns, "image": images or given}


def _read_part(part: object, index: int, images: list[ImageSource], waiting: list[ImageSource]) -> str:
    """The text of a part; the image of an image part is added to `images`, of one without its own from `waiting`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "image_url":
        url = part.get("image_url")
        images.append(url.get("url") if isinstance(url, Mapping) else url)
    elif kind == "image":
        own = next((part[key] for key in ("image", "url", "path", "bytes") if part.get(key)), None)
        if own is None and not waiting:
            raise ItemError(f"an image part of message {index} has no `image`, and none is left in `images`")
        images.append(waiting.pop(0) if own is None else own)
    else:
        raise ItemError(f"a part of message {index} must be text, image or image_url, got {brief(part)}")
    return IMAGE_SYMBOL
