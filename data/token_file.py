"""The token file, `out_dir/files/{id}.pkl`: a pickle of `{"token": list[int], "label": list[int], "id": int}`.

A shard is a file of many such pickles, one after the other; a record says which bytes of it are an item's.
Both are read by an unpickler that refuses every global, so that a pickle from elsewhere is data and never code.
"""

import io
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data.whole_file import open_whole

MAX_ID = np.iinfo(np.int32).max


@dataclass(frozen=True, eq=False)
class TokenItem:
    """One tokenized item: `token` and `label`, int32 [length]; the label is IGNORE_INDEX where nothing is predicted."""

    token: np.ndarray
    label: np.ndarray
    id: int | str


def save_token_file(path: str | os.PathLike, token: Sequence[int], label: Sequence[int], id: int) -> None:
    """Write one item; the file appears whole or not at all. Raises ValueError if the lengths differ."""
    if len(token) != len(label):
        raise ValueError(f"item {id}: {len(token)} tokens but {len(label)} labels")
    payload = pickle.dumps({"token": list(token), "label": list(label), "id": id}, protocol=4)
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


def load_token_file(path: str | os.PathLike, offset: int | None = None, nbytes: int | None = None) -> TokenItem:
    """Read one item: the whole file, or of a shard the `nbytes` bytes from `offset`.

    Raises FileNotFoundError, or ValueError with the file and what is wrong in it.
    """
    return parse_token_bytes(read_token_bytes(path, offset, nbytes), path)


def read_token_bytes(path: str | os.PathLike, offset: int | None = None, nbytes: int | None = None) -> bytes:
    """The pickle of one item as it lies on disk. Raises FileNotFoundError, or ValueError if the file is too short."""
    try:
        with open(path, "rb") as file:
            if offset is None:
                return file.read()
            file.seek(offset)
            payload = file.read(nbytes)
    except FileNotFoundError:
        raise FileNotFoundError(f"token file {path} does not exist; was the output folder moved without it?") from None
    if len(payload) != nbytes:
        raise ValueError(f"token file {path} ends before byte {offset + nbytes}, the end of an item of its record")
    return payload


def parse_token_bytes(payload: bytes, path: str | os.PathLike) -> TokenItem:
    """The item of a pickle. Raises ValueError with `path` and what is wrong."""
    try:
        item = _PlainUnpickler(io.BytesIO(payload)).load()
    except Exception as error:  # a damaged pickle can raise nearly anything; all of it means the same
        raise ValueError(f"token file {path} cannot be read: {error}") from error
    if not isinstance(item, dict) or not {"token", "label"} <= item.keys():
        raise ValueError(f"token file {path} must hold a dict with 'token' and 'label'")
    token, label = (_as_ids(item[key], path, key) for key in ("token", "label"))
    if len(token) != len(label):
        raise ValueError(f"token file {path} holds {len(token)} tokens but {len(label)} labels")
    return TokenItem(token, label, item.get("id", -1))


class _PlainUnpickler(pickle.Unpickler):
    """Builds numbers, strings, lists, dicts and tuples; refuses every class and function."""

    def find_class(self, module_name: str, global_name: str):
        raise pickle.UnpicklingError(f"it refers to {module_name}.{global_name}, but only plain data is allowed")

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it holds a persistent reference, but only plain data is allowed")


def _as_ids(values: object, path: str | os.PathLike, key: str) -> np.ndarray:
    are_integers = isinstance(values, list) and set(map(type, values)) == {int}
    if not are_integers or min(values) < -MAX_ID or max(values) > MAX_ID:
        raise ValueError(f"token file {path}: '{key}' must be a list of integers of 32 bits that is not empty")
    return np.array(values, dtype=np.int32)
