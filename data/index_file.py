"""The files of an index: what a record says of its items, as arrays that are mapped into memory and not read.

Written and opened by `data/record_index.py`, in one folder, little-endian:

    lens.i32 image_lens.i32 ids.i64 [N]   as the record says; image_len 0: none; a string id becomes its position
    file_of.i32 [N]                       which name; equal names that follow each other are kept once
    offsets.i64 nbytes.i64 [N]            bytes of the item in its file; nbytes 0: all of them
    names.u8 name_ends.i64                names one after the other, and where each ends
    inline.pkls                           items that a .pkl or .pth list held itself, as a shard; their name is empty
    index.json                            written last: version, key, number of items, size of each array, digest

Names are kept as the record has them; where they begin with the folder of the first one, a NUL stands for that.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, compress
from pathlib import Path

import numpy as np

from data.record import resolve_base
from data.whole_file import open_whole

FORMAT_VERSION = 1
HEADER_NAME = "index.json"
INLINE_NAME = "inline.pkls"
MAX_NAMES = 2**31 - 1
_COLUMNS = {"lens": "<i4", "image_lens": "<i4", "ids": "<i8", "file_of": "<i4", "offsets": "<i8", "nbytes": "<i8"}
_ARRAYS = {**_COLUMNS, "names": "<u1", "name_ends": "<i8"}


@dataclass(frozen=True)
class IndexKey:
    """Which state of which record an index is of; `path` is absolute."""

    path: str
    size: int
    mtime_ns: int
    head_tail: str

    @property
    def folder_name(self) -> str:
        return hashlib.sha256(json.dumps([FORMAT_VERSION, asdict(self)]).encode()).hexdigest()[:16]


class RecordIndex:
    """The items of a record: `num_items`, `num_tokens`, `max_len`, and read-only `lens` int32, `image_lens` int32 (0:
    none) and `ids` int64, all [num_items]. `digest` is the same for records of equal lens, image_lens and ids, wherever
    they and their files lie. Sent to another process, it is opened anew there."""

    def __init__(self, folder: Path, header: dict, record_path: str) -> None:
        """Of a whole folder and its `index.json`; relative files are looked for beside `record_path`."""
        self.folder, self.header, self.record_path = folder, header, record_path
        self.num_items, self.num_tokens, self.max_len = (header[k] for k in ("num_items", "num_tokens", "max_len"))
        self.digest: str = header["digest"]
        arrays = {name: _map_array(folder, name, header["sizes"][name]) for name in _ARRAYS}
        self.lens, self.image_lens, self.ids = (arrays[name] for name in ("lens", "image_lens", "ids"))
        self._arrays = arrays
        first = header["first_relative"]
        # As `read_record` does, each time anew: beside the record or from the working directory of this process.
        self._base = os.path.abspath(resolve_base(record_path, first)) if first else ""

    def __len__(self) -> int:
        return self.num_items

    def __reduce__(self):
        return RecordIndex, (self.folder, self.header, self.record_path)

    def place(self, position: int) -> tuple[str, int | None, int | None]:
        """Where item `position` lies: absolute file, offset and nbytes there; None if it has the file for itself."""
        arrays = self._arrays
        number, nbytes = int(arrays["file_of"][position]), int(arrays["nbytes"][position])
        start = int(arrays["name_ends"][number - 1]) if number else 0
        name = os.fsdecode(arrays["names"][start : int(arrays["name_ends"][number])].tobytes())
        if not name:
            file = os.path.join(self.folder, INLINE_NAME)
        else:
            name = self.header["prefix"] + name[1:] if name[0] == "\0" else name
            file = os.path.join(self._base, name)
        return (file, int(arrays["offsets"][position]), nbytes) if nbytes else (file, None, None)


def load_header(folder: Path) -> dict | None:
    """What the `index.json` of a folder says, if the folder is whole and of this version."""
    try:
        header = json.loads((folder / HEADER_NAME).read_bytes())
        sizes = {name: os.stat(_array_path(folder, name)).st_size for name in _ARRAYS}
        expected = {name: header["num_items"] * np.dtype(dtype).itemsize for name, dtype in _COLUMNS.items()}
        is_whole = (
            header["version"] == FORMAT_VERSION and sizes == header["sizes"] and sizes.items() >= expected.items()
        )
        return header if is_whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class IndexWriter:
    """Writes the arrays of an index to a new folder, a batch of items at a time; its memory does not grow with them."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.folder.mkdir()
        self.num_items = self._num_tokens = self._max_len = self._num_names = self._names_end = 0
        self._last_name: str | None = None
        self._prefix = self._first_relative = ""
        self._files = {name: open(_array_path(self.folder, name), "wb") for name in _ARRAYS}
        self._hashes = {name: hashlib.blake2b(digest_size=16) for name in ("lens", "image_lens", "ids")}

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()

    def append(
        self,
        lens: np.ndarray,
        image_lens: np.ndarray,
        ids: np.ndarray,
        files: Sequence[str] | str,
        offsets: np.ndarray,
        nbytes: np.ndarray,
    ) -> None:
        """Add n items: integers [n], and the names of their files, or one name that is that of all of them.

        `image_lens` is 0 for none; `nbytes` and `offsets` are 0 where an item has its file for itself; the empty name
        is that of the index's own shard. Raises ValueError for arrays of another length.
        """
        num = len(lens)
        names = [files] if isinstance(files, str) else files
        is_new = [name != last for name, last in zip(names, chain([self._last_name], names), strict=False)]
        file_of = np.broadcast_to(self._num_names - 1 + np.cumsum(is_new, dtype=np.int64), (num,))
        if not num:
            return
        self._append_names(list(compress(names, is_new)))
        self._last_name = names[-1]
        for name, values in zip(_COLUMNS, (lens, image_lens, ids, file_of, offsets, nbytes), strict=True):
            values = np.ascontiguousarray(values, _ARRAYS[name])
            if values.shape != (num,):
                raise ValueError(f"{name} must have shape ({num},), got {values.shape}")
            self._write(name, values)
            if name in self._hashes:
                self._hashes[name].update(values)
        self.num_items += num
        self._num_tokens += int(np.sum(lens, dtype=np.int64))
        self._max_len = max(self._max_len, int(np.max(lens)))

    def finish(self, key: IndexKey | None = None) -> dict:
        """Put all of it on disk, `index.json` last. Returns what that holds."""
        sizes = {}
        for name, file in self._files.items():
            sizes[name] = file.truncate()  # a hole at the end counts, too
            file.flush()
            os.fsync(file.fileno())
        digests = b"".join(part.digest() for part in self._hashes.values())
        header = {
            "version": FORMAT_VERSION,
            "key": asdict(key) if key else None,
            "num_items": self.num_items,
            "num_tokens": self._num_tokens,
            "max_len": self._max_len,
            "digest": hashlib.blake2b(digests, digest_size=16).hexdigest(),
            "prefix": self._prefix,
            "first_relative": self._first_relative,
            "sizes": sizes,
        }
        with open_whole(self.folder / HEADER_NAME) as file:
            file.write(json.dumps(header, indent=1).encode())
        return header

    def _append_names(self, names: list[str]) -> None:
        if not names:
            return
        if not self._num_names:
            self._prefix = names[0][: names[0].rfind("/") + 1]
        if not self._first_relative:
            self._first_relative = next((name for name in names if name and name[0] != "/"), "")
        if prefix := self._prefix:
            names = ["\0" + name[len(prefix) :] if name.startswith(prefix) else name for name in names]
        encoded = os.fsencode("".join(names))
        is_ascii = len(encoded) == sum(map(len, names))
        ends = np.cumsum(list(map(len, names if is_ascii else map(os.fsencode, names))), dtype=np.int64)
        self._write("names", np.frombuffer(encoded, np.uint8))
        self._write("name_ends", self._names_end + ends)
        self._num_names += len(names)
        self._names_end += len(encoded)
        if self._num_names > MAX_NAMES:
            raise ValueError(f"an index has room for {MAX_NAMES} files; put more items into one (--shard_size)")

    def _write(self, name: str, values: np.ndarray) -> None:
        if values.any():
            self._files[name].write(values)
        else:
            self._files[name].seek(values.nbytes, os.SEEK_CUR)  # zeros: a hole, which takes no space


def _array_path(folder: Path, name: str) -> Path:
    dtype = np.dtype(_ARRAYS[name])
    return folder / f"{name}.{dtype.kind}{8 * dtype.itemsize}"


def _map_array(folder: Path, name: str, size: int) -> np.ndarray:
    """The array, read-only; an empty file cannot be mapped."""
    dtype = np.dtype(_ARRAYS[name])
    if not size:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(_array_path(folder, name), dtype, mode="r", shape=(size // dtype.itemsize,)))
