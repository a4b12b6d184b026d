"""The token file, `out_dir/files/{id}.pkl`: a pickle of `{"token": list[int], "label": list[int], "id": int}`.

A shard is a file of many such pickles, one after the other; a record says which bytes of it are an item's.
Both are read as plain data (data/plain_pickle.py): a pickle from elsewhere is never code. A bound on the bytes per
token keeps its memory small. Whatever is wrong with a file is an ItemReadError, so that one bad file costs one item.
"""

import io
import os
import pickle
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from data.plain_pickle import load_plain
from data.vocab import IGNORE_INDEX
from data.whole_file import open_whole

MAX_ID = np.iinfo(np.int32).max
MAX_BYTES_PER_TOKEN = 40  # of token and label together; 10 in our files, 16 in text (protocol 0)
MAX_OTHER_BYTES = 4096  # of the rest of an item
MAX_ITEM_BYTES = 64 << 20  # where no record says how long an item is: 1.6 million tokens


class ItemReadError(ValueError):
    """An item that cannot be read, whatever the reason; the message names its file and the reason."""


class MissingTokenFileError(ItemReadError, FileNotFoundError):
    """The file is not there."""


@dataclass(frozen=True, eq=False)
class TokenItem:
    """One tokenized item: `token` and `label`, int32 [length]; the label is IGNORE_INDEX where nothing is predicted."""

    token: np.ndarray
    label: np.ndarray
    id: int | str


def token_bytes(token: Sequence[int], label: Sequence[int], id: int | str) -> bytes:
    """The pickle of an item, as a token file or a shard holds it. Raises ValueError if the lengths differ."""
    if len(token) != len(label):
        raise ValueError(f"item {id}: {len(token)} tokens but {len(label)} labels")
    return pickle.dumps({"token": list(token), "label": list(label), "id": id}, protocol=4)


def save_token_file(path: str | os.PathLike, token: Sequence[int], label: Sequence[int], id: int) -> None:
    """Write one item; the file appears whole or not at all. Raises ValueError if the lengths differ."""
    payload = token_bytes(token, label, id)
    partial = f"{os.fspath(path)}.partial"
    with open(partial, "wb") as file:
        file.write(payload)
    os.replace(partial, path)


def write_shard(path: str | os.PathLike, payloads: Iterable[bytes]) -> list[tuple[int, int]]:
    """Write the pickles of many items into one file, which appears whole. Returns (offset, nbytes) of each."""
    places, offset = [], 0
    with open_whole(path) as file:
        for payload in payloads:
            file.write(payload)
            places.append((offset, len(payload)))
            offset += len(payload)
    return places


def load_token_file(
    path: str | os.PathLike,
    offset: int | None = None,
    nbytes: int | None = None,
    expected_len: int | None = None,
    num_ids: int | None = None,
) -> TokenItem:
    """Read one item: the whole file, or of a shard the `nbytes` bytes from `offset`.

    With `expected_len`, what its record says, and `num_ids`, the size of the vocabulary, these are checked too.
    Raises ItemReadError with the file and what is wrong with it; it is a FileNotFoundError as well if there is none.
    """
    item = parse_token_bytes(read_token_bytes(path, offset, nbytes, expected_len), path)
    if expected_len is not None and len(item.token) != expected_len:
        raise ItemReadError(
            f"token file {path} has {len(item.token)} tokens, but its record says {expected_len}: one of them is of "
            f"another run; pre-tokenize again or merge the records again"
        )
    if num_ids is not None:
        check_tokens(item.token, item.label, num_ids, f"token file {path}")
    return item


def read_token_bytes(
    path: str | os.PathLike, offset: int | None = None, nbytes: int | None = None, expected_len: int | None = None
) -> bytes:
    """The pickle of one item as it lies on disk, of at most as many bytes as `expected_len` tokens can take.

    Raises ItemReadError for a file that is missing, too short, too large, no regular file or not readable.
    """
    try:
        # Opening a pipe would wait for its writer; for a file, O_NONBLOCK means nothing.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            return _read_checked(file, path, offset, nbytes, expected_len)
    except FileNotFoundError:
        raise MissingTokenFileError(
            f"token file {path} does not exist; was the output folder moved without it?"
        ) from None
    except OSError as error:
        raise ItemReadError(f"token file {path} cannot be read: {error.strerror or error}") from error


def parse_token_bytes(payload: bytes, path: str | os.PathLike) -> TokenItem:
    """The item of a pickle. Raises ItemReadError with `path` and what is wrong."""
    try:
        value = load_plain(io.BytesIO(payload), f"token file {path}")
    except ValueError as error:
        raise ItemReadError(str(error)) from error
    return build_item(value, f"token file {path}")


def build_item(value: object, name: str) -> TokenItem:
    """The item of a dict with `token`, `label` and, if it has one, `id` (else -1). Raises ItemReadError."""
    if not isinstance(value, dict) or not {"token", "label"} <= value.keys():
        raise ItemReadError(f"{name} must hold a dict with 'token' and 'label'")
    token, label = (_as_ids(value[key], name, key) for key in ("token", "label"))
    if len(token) != len(label):
        raise ItemReadError(f"{name} holds {len(token)} tokens but {len(label)} labels")
    item_id = value.get("id")
    return TokenItem(token, label, item_id if isinstance(item_id, int | str) else -1)


def check_tokens(token: np.ndarray, label: np.ndarray, num_ids: int, name: str = "the item") -> None:
    """Check an item against a vocabulary of `num_ids`: ids are below it, labels too or IGNORE_INDEX.

    Raises ItemReadError, which begins with `name`.
    """
    if not ((token >= 0) & (token < num_ids)).all():
        raise ItemReadError(
            f"{name} holds ids from {token.min()} to {token.max()}, but the model has {num_ids}: train with the "
            "tokenizer that made it, or pre-tokenize again"
        )
    is_wrong = ((label < 0) & (label != IGNORE_INDEX)) | (label >= num_ids)
    if is_wrong.any():
        position = int(is_wrong.argmax())
        raise ItemReadError(
            f"{name} has label {label[position]} at position {position}; a label is an id from 0 to {num_ids - 1}, or "
            f"{IGNORE_INDEX} where nothing is predicted: pre-tokenize again"
        )


def _read_checked(
    file: BinaryIO, path: str | os.PathLike, offset: int | None, nbytes: int | None, expected_len: int | None
) -> bytes:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise ItemReadError(f"token file {path} is no regular file")
    start, size = (0, status.st_size) if offset is None else (offset, nbytes)
    allowed = MAX_ITEM_BYTES if expected_len is None else MAX_OTHER_BYTES + MAX_BYTES_PER_TOKEN * expected_len
    if size > allowed:
        of_length = "" if expected_len is None else f" of {expected_len} tokens"
        raise ItemReadError(
            f"token file {path} cannot be read: {size} bytes are more than an item{of_length} can take ({allowed}); "
            "it is no token file, or not the one of its record"
        )
    if start + size <= status.st_size:
        file.seek(start)
        payload = file.read(size)
        if len(payload) == size:
            return payload
    raise ItemReadError(f"token file {path} ends before byte {start + size}, the end of an item of its record")


def _as_ids(values: object, name: str, key: str) -> np.ndarray:
    ids = None
    if isinstance(values, list) and set(map(type, values)) == {int}:
        with suppress(OverflowError):
            ids = np.fromiter(values, np.int64, len(values))
    if ids is None or ids.min() < -MAX_ID or ids.max() > MAX_ID:
        raise ItemReadError(f"{name}: '{key}' must be a list of integers of 32 bits that is not empty")
    return ids.astype(np.int32)
