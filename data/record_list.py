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

from data.plain_pickle import load_plain, load_plain_sequence

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
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{name} is no regular file")
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            payload = _read_data_pickle(file, name) if is_zip else file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{name} does not exist") from None
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}") from error
    if payload.startswith(_OLD_TORCH_HEAD):
        return load_plain_sequence(payload[len(_OLD_TORCH_HEAD) :], 2, name)[1]
    return load_plain(payload, name)


def _read_data_pickle(file, name: str) -> bytes:
    """The pickle inside of the zip file that `torch.save` writes."""
    try:
        with zipfile.ZipFile(file) as archive:
            found = [info for info in archive.infolist() if info.filename.rpartition("/")[2] == "data.pkl"]
            if len(found) != 1:
                raise ValueError(f"{name} is a zip file with {len(found)} data.pkl; torch.save writes one")
            if found[0].compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is a compressed zip file; torch.save writes none, save it again with it")
            return archive.read(found[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
