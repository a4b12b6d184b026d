"""The token file, `out_dir/files/{id}.pkl`: a pickle of `{"token": list[int], "label": list[int], "id": int}`.

A shard is a file of many such pickles, one after the other; a record has the place of each. Every error of a file is an
ItemReadError, so that one bad file costs one item.
"""

import io
import os
import pickle
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from data.formats.plain_pickle import load_plain
from data.items.vocab import IGNORE_INDEX
from data.whole_file import open_whole

MAX_ID = np.iinfo(np.int32).max
# Of token and label together; 10 in our files, 16 in a text pickle (protocol 0).
MAX_BYTES_PER_TOKEN = 40
# All of an item but its tokens and labels.
MAX_OTHER_BYTES = 4096
# Where the length of an item is unknown: 1.6 million tokens.
MAX_ITEM_BYTES = 64 << 20


class ItemReadError(ValueError):
    """An item that cannot be read; the message names its file and the reason."""


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
    payload = token_bytes(token, label, id)
    # A power failure may cost items; to wait for the disk at each item would cost more.
    with open_whole(path, sync=False) as file:
        file.write(payload)


def write_shard(path: str | os.PathLike, payloads: Iterable[bytes]) -> list[tuple[int, int]]:
    """Write the pickles of many items into one file, atomically. Returns (offset, nbytes) of each."""
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

    `expected_len` is the length in the record, `num_ids` the size of the vocabulary. Raises ItemReadError.
    """
    item = parse_token_bytes(read_token_bytes(path, offset, nbytes, expected_len), path)
    name = f"token file {path}"
    if expected_len is not None and len(item.token) != expected_len:
        raise ItemReadError(
            f"{name} has {len(item.token)} tokens, but its record says {expected_len}: one of them is of another run; "
            "pre-tokenize again or merge the records again"
        )
    if num_ids is not None:
        _check_tokens(item, num_ids, name)
    return item


def read_token_bytes(
    path: str | os.PathLike, offset: int | None = None, nbytes: int | None = None, expected_len: int | None = None
) -> bytes:
    """The pickle of one item, of at most as many bytes as `expected_len` tokens can take. Raises ItemReadError."""
    allowed = MAX_ITEM_BYTES if expected_len is None else MAX_OTHER_BYTES + MAX_BYTES_PER_TOKEN * expected_len
    try:
        status = os.stat(path)
        # Opening a pipe would wait for its writer.
        if not stat.S_ISREG(status.st_mode):
            raise ItemReadError(f"token file {path} cannot be read: it is no regular file")
        with open(path, "rb") as file:
            start, size = (0, status.st_size) if offset is None else (offset, nbytes)
            if size > allowed:
                raise ItemReadError(
                    f"token file {path} cannot be read: {size} bytes are more than its item can take ({allowed}); it "
                    "is no token file, or not the one of its record"
                )
            file.seek(start)
            payload = file.read(size)
    except FileNotFoundError:
        raise ItemReadError(f"token file {path} does not exist; was the output folder moved without it?") from None
    except OSError as error:
        raise ItemReadError(f"token file {path} cannot be read: {error.strerror or error}") from error
    if len(payload) < size:
        raise ItemReadError(f"token file {path} ends before byte {start + size}, the end of an item of its record")
    return payload


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


def _check_tokens(item: TokenItem, num_ids: int, name: str) -> None:
    """Check that the ids of an item are below `num_ids`, and its labels too or IGNORE_INDEX."""
    token, label = item.token, item.label
    if token.min() < 0 or token.max() >= num_ids:
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


def _as_ids(values: object, name: str, key: str) -> np.ndarray:
    ids = np.empty(0, np.int64)
    if isinstance(values, list) and set(map(type, values)) == {int}:
        with suppress(OverflowError):
            ids = np.fromiter(values, np.int64, len(values))
    if not len(ids) or ids.min() < -MAX_ID or ids.max() > MAX_ID:
        raise ItemReadError(f"{name}: '{key}' must be a list of integers of 32 bits that is not empty")
    return ids.astype(np.int32)
