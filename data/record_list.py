"""The lists of items that the recipe writes beside JSON: `.pkl` (pickle) and `.pth` (`torch.save`).

A list of dicts, each with the place of an item as in a record (`file`, `len`, ...) or with the item itself (`token`,
`label`). `data/record_index.py` reads them as plain data, without torch; a list of tensors is rejected.
"""

import os
import pickle
import zipfile
from collections.abc import Iterator
from typing import BinaryIO

from data.plain_pickle import load_plain

LIST_SUFFIXES = (".pkl", ".pth")
# The old format of `torch.save`: these two pickles, a dict about the machine, the value, a list of tensors.
_OLD_TORCH_HEAD = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(1001, protocol=2)


def iter_list_file(path: str | os.PathLike) -> Iterator[dict]:
    """The entries of a `.pkl` or `.pth` list, in order and not yet checked. All of them are in memory at once.

    Raises ValueError with the file and what is wrong in it. No bound on the size: a user has chosen the list.
    """
    name = f"record {path}"
    with open(path, "rb") as file:
        values = _load_list(file, name)
    if not isinstance(values, list):
        raise ValueError(f"{name} must hold a list of dicts, got {type(values).__name__}")
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise ValueError(f"{name}: entry {number} must be a dict, got {type(value).__name__}")
        yield value


def is_inline(entry: dict) -> bool:
    """Whether the entry of a list holds its tokens; the recipe then looks at nothing else."""
    return "token" in entry and "label" in entry


def _load_list(file: BinaryIO, name: str) -> object:
    if zipfile.is_zipfile(file):
        try:
            with zipfile.ZipFile(file) as archive:
                (member,) = (found for found in archive.namelist() if found.rpartition("/")[2] == "data.pkl")
                with archive.open(member) as data:
                    return load_plain(data, name)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{name} cannot be read: {error}") from error
    file.seek(0)
    if file.read(len(_OLD_TORCH_HEAD)) == _OLD_TORCH_HEAD:
        load_plain(file, name)
    else:
        file.seek(0)
    return load_plain(file, name)
