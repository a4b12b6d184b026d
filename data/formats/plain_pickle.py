"""Pickles as data and never as code: a pickle that names a class, a function or a persistent object is rejected.

Called by `data/formats/token_file.py` (items) and `data/formats/record_list.py` (lists of items of the recipe), which
bound the size.
"""

import pickle
from typing import BinaryIO

from data.messages import one_line


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
