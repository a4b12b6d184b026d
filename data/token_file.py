"""The token file, `out_dir/files/{id}.pkl`: a pickle of `{"token": list[int], "label": list[int], "id": int}`.

It is read by an unpickler that refuses every global, so that a pickle from elsewhere is data and never code.
"""

import io
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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


def load_token_file(path: str | os.PathLike) -> TokenItem:
    """Read one item. Raises FileNotFoundError, or ValueError with the file and what is wrong in it."""
    try:
        item = _PlainUnpickler(io.BytesIO(Path(path).read_bytes())).load()
    except FileNotFoundError:
        raise FileNotFoundError(f"token file {path} does not exist; was the output folder moved without it?") from None
    except OSError:
        raise
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
