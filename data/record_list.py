"""The lists of items that the recipe writes beside JSON: `.pkl` (pickle) and `.pth` (`torch.save`).

Each is a list of dicts, which say where an item lies as a record does (`file`, `len`, ...) or hold it (`token`,
`label`). They are read as plain data (data/plain_pickle.py), without torch; a list of tensors is refused.
Stands between these files and `data/record_index.py`.
"""

import os
import pickle
import stat
import zipfile
from collections.abc import Iterator
from typing import BinaryIO

from data.plain_pickle import load_plain

LIST_SUFFIXES = (".pkl", ".pth")
# What `torch.save` wrote before it wrote zip files: these two, a dict about the machine, the value, a list of tensors.
_OLD_TORCH_HEAD = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(1001, protocol=2)


def iter_list_file(path: str | os.PathLike) -> Iterator[dict]:
    """The entries of a `.pkl` or `.pth` list, in order and not yet checked. All of them are in memory at once.

    Raises FileNotFoundError, or ValueError with the file and what is wrong in it.
    """
    name = f"record {path}"
    values = _load_list(path, name)
    if not isinstance(values, list):
        raise ValueError(f"{name} must hold a list of dicts, got {type(values).__name__}")
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise ValueError(f"{name}: entry {number} must be a dict, got {type(value).__name__}")
        yield value


def is_inline(entry: dict) -> bool:
    """Whether the entry of a list holds its tokens; the recipe then looks at nothing else."""
    return "token" in entry and "label" in entry


def _load_list(path: str | os.PathLike, name: str) -> object:
    """No bound on the size: a list is chosen by its user, and as large as its file."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{name} is no regular file")
        with open(path, "rb") as file:
            if file.peek(4).startswith(b"PK\x03\x04"):
                return _load_zip(file, name)
            if file.read(len(_OLD_TORCH_HEAD)) == _OLD_TORCH_HEAD:
                load_plain(file, name)
            else:
                file.seek(0)
            return load_plain(file, name)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name} does not exist") from None
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}") from error


def _load_zip(file: BinaryIO, name: str) -> object:
    """The value of the pickle inside of the zip file that `torch.save` writes."""
    try:
        with zipfile.ZipFile(file) as archive:
            found = [info for info in archive.infolist() if info.filename.rpartition("/")[2] == "data.pkl"]
            if len(found) != 1:
                raise ValueError(f"{name} is a zip file with {len(found)} data.pkl; torch.save writes one")
            with archive.open(found[0]) as data:
                return load_plain(data, name)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
