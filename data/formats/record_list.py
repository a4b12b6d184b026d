"""The lists of items that the recipe writes beside JSON: `.pkl` (pickle) and `.pth` (`torch.save`).

A list of dicts, each with the place of an item as in a record (`file`, `len`, ...) or with the item itself (`token`,
`label`). `data/formats/record_index.py` reads them as plain data, without torch; a list of tensors is rejected.
"""

import os
import zipfile
from collections.abc import Iterator

from data.formats.plain_pickle import load_plain

LIST_SUFFIXES = (".pkl", ".pth")


def iter_list_file(path: str | os.PathLike) -> Iterator[dict]:
    """The entries of a `.pkl` or `.pth` list, in order and not yet checked. All of them are in memory at once.

    Raises ValueError with the file and what is wrong in it. No bound on the size: a user has chosen the list.
    """
    name = f"record {path}"
    if zipfile.is_zipfile(path):
        values = _load_zip(path, name)
    else:
        with open(path, "rb") as file:
            values = load_plain(file, name)
    if not isinstance(values, list):
        raise ValueError(f"{name} must hold a list of dicts, got {type(values).__name__}")
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise ValueError(f"{name}: entry {number} must be a dict, got {type(value).__name__}")
        yield value


def _load_zip(path: str | os.PathLike, name: str) -> object:
    """The value of the pickle in the zip file of `torch.save`."""
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.namelist() if member.rpartition("/")[2] == "data.pkl"]
        if len(members) != 1:
            raise ValueError(f"{name} is a zip file with {len(members)} data.pkl; torch.save writes one")
        with archive.open(members[0]) as data:
            return load_plain(data, name)
