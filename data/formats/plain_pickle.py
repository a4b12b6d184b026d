"""Pickles as data and never as code: a pickle that names a class, a function or a persistent object is rejected.

Items (`data/formats/token_file.py`) are such pickles, and so are the lists of items that the recipe writes beside JSON:
`.pkl` (pickle) and `.pth` (`torch.save`, read without torch), of dicts as in a record or with `token` and `label`.
"""

import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import BinaryIO

from data.messages import one_line

LIST_SUFFIXES = (".pkl", ".pth")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str):
        raise pickle.UnpicklingError(f"it refers to {module_name}.{global_name}, but only plain data is allowed")


def load_plain(file: BinaryIO, name: str) -> object:
    """The value of the next pickle in a file, of any protocol. Raises ValueError, which begins with `name`."""
    try:
        return _PlainUnpickler(file).load()
    # A damaged pickle can raise nearly any error.
    except Exception as error:
        reason = "it ends too early" if isinstance(error, EOFError) else one_line(error) or type(error).__name__
        raise ValueError(f"{name} cannot be read: {reason}") from error


def iter_list_file(path: str | os.PathLike) -> Iterator[dict]:
    """The entries of a `.pkl` or `.pth` list, in order and not yet checked. All of them are in memory at once.

    Raises ValueError with the file and what is wrong in it. No bound on the size: a user has chosen the list.
    """
    name = f"record {path}"
    with ExitStack() as opened:
        file = opened.enter_context(open(path, "rb"))
        if zipfile.is_zipfile(file):
            try:
                archive = opened.enter_context(zipfile.ZipFile(file))
                members = [member for member in archive.namelist() if member.rpartition("/")[2] == "data.pkl"]
                if len(members) != 1:
                    raise ValueError(f"it is a zip file with {len(members)} data.pkl; torch.save writes one")
                file = opened.enter_context(archive.open(members[0]))
            # Damaged, encrypted, compressed in an unknown way.
            except (zipfile.BadZipFile, RuntimeError, ValueError) as error:
                raise ValueError(f"{name} cannot be read: {one_line(error)}") from None
        else:
            file.seek(0)
        values = load_plain(file, name)
    if not isinstance(values, list):
        raise ValueError(f"{name} must hold a list of dicts, got {type(values).__name__}")
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise ValueError(f"{name}: entry {number} must be a dict, got {type(value).__name__}")
        yield value
