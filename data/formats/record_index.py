"""The index of a record: lengths, ids and places of its items, as arrays that are mapped into memory and not read.

The first process of a node builds the index, all others open it; `data/epoch/dataset.py` does. It is one folder:

    {cache_dir}/{hash of the path}-{hash of the record's state}/
        lens image_lens ids              int32, int32, int64 [N], as the record says (image_len 0: none)
        name_starts name_lens names      where in `names` the name of the item's file is, in bytes
        offsets nbytes                   int64 [N], bytes of the item in its file; nbytes 0: all of them
        inline.pkls                      a shard of the items that a .pkl or .pth list holds itself
        index.json                       number of items, longest item, digest

The state is the record's size, modification time and a hash of its first and last MiB: a changed record is another one.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np

from data.formats.plain_pickle import LIST_SUFFIXES, iter_list_file
from data.formats.record import RecordEntry, check_entry, read_raw_record, resolve_base
from data.formats.token_file import build_item, token_bytes
from data.whole_file import open_locked, publish_folder

FORMAT_VERSION = 2
HEAD_TAIL_BYTES = 1 << 20
BATCH_ITEMS = 16_384
HEADER_NAME, NAMES, INLINE_SHARD = "index.json", "names", "inline.pkls"
# The name of the inline shard in `names`. No file of a record can have it.
_INLINE = "\0"
_COLUMNS = {
    "lens": "<i4", "image_lens": "<i4", "ids": "<i8",
    "name_starts": "<i8", "name_lens": "<i4", "offsets": "<i8", "nbytes": "<i8",
}  # fmt: skip
_DIGESTED = ("lens", "image_lens", "ids")


class RecordIndex:
    """The items of a record: `lens`, `image_lens` int32 [N] tokens and `ids` int64 [N], read-only.

    An item without an integer id has its position. `max_len` is the longest item. `digest` is equal for records of
    equal lens, image_lens and ids, wherever their files lie.
    """

    def __init__(self, folder: Path, record_path: str | os.PathLike) -> None:
        """Raises OSError, ValueError or KeyError for a folder that is not there or not complete."""
        header = json.loads((folder / HEADER_NAME).read_bytes())
        self.num_items, self.max_len, self.digest = header["num_items"], header["max_len"], header["digest"]
        self._folder = folder
        self._columns = {name: _map_array(folder / name, dtype, self.num_items) for name, dtype in _COLUMNS.items()}
        self._names = _map_array(folder / NAMES, np.uint8, header["names_size"])
        self.lens, self.image_lens, self.ids = (self._columns[name] for name in _DIGESTED)
        # Looked for at each opening: the working directory of this process may be another one.
        first = header["first_relative"]
        self._base = os.path.abspath(resolve_base(record_path, first)) if first else ""

    def place(self, position: int) -> tuple[str, int | None, int | None]:
        """Absolute file, offset and nbytes of item `position`; None, None if it has the file for itself."""
        start, name_len, offset, nbytes = (
            int(self._columns[name][position]) for name in ("name_starts", "name_lens", "offsets", "nbytes")
        )
        name = os.fsdecode(self._names[start : start + name_len].tobytes())
        file = os.path.join(self._folder, INLINE_SHARD) if name == _INLINE else os.path.join(self._base, name)
        return (file, offset, nbytes) if nbytes else (file, None, None)


def open_index(
    path: str | os.PathLike, cache_dir: str | os.PathLike, say: Callable[[str], object] = print
) -> RecordIndex:
    """The index of a record (.json, .jsonl, .pkl or .pth), which the first process of a node to ask for it builds.

    `say` gets one line if this process builds it. Raises FileNotFoundError, or ValueError for a record that is wrong,
    that has no items, that changes while it is read, or whose index cannot be written.
    """
    cache_dir = Path(os.path.abspath(cache_dir))
    folder = cache_dir / index_name(path)
    try:
        if index := _open_complete(folder, path):
            return index
        cache_dir.mkdir(parents=True, exist_ok=True)
        lock = Path(f"{folder}.lock")
        with open_locked(lock, patience_s=math.inf):
            if not _open_complete(folder, path):
                say(f"building the index of record {path} ({os.path.getsize(path) / 1e6:,.1f} MB) in {cache_dir}")
                _build(os.path.abspath(path), folder)
            lock.unlink(missing_ok=True)
        return RecordIndex(folder, path)
    except OSError as error:
        raise ValueError(
            f"the index of record {path} cannot be kept in {cache_dir}: {error}. It takes some 50 bytes per item "
            "and the names of its files: free space there, or choose another folder (TMPDIR, or --output_dir)"
        ) from error


def node_cache_dir() -> Path:
    """The folder for indices of this user in the node's temporary folder. Raises ValueError if another user owns it."""
    path = Path(tempfile.gettempdir()) / f"token-index-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.lstat().st_uid != os.getuid():
        raise ValueError(
            f"{path} is not a folder of this user (uid {os.getuid()}), so its content cannot be trusted: remove it, or "
            "set TMPDIR to a folder of yours"
        )
    return path


def index_name(path: str | os.PathLike) -> str:
    """The folder name of the index of a record as it is now. Raises FileNotFoundError, or ValueError."""
    path = os.path.abspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"record {path} does not exist, or is no regular file")
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            state = hashlib.sha256(f"{FORMAT_VERSION} {status.st_size} {status.st_mtime_ns} ".encode())
            state.update(file.read(HEAD_TAIL_BYTES))
            file.seek(max(0, status.st_size - HEAD_TAIL_BYTES))
            state.update(file.read(HEAD_TAIL_BYTES))
    except OSError as error:
        raise ValueError(f"record {path} cannot be read: {error.strerror}") from error
    return f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}-{state.hexdigest()[:16]}"


def _open_complete(folder: Path, record_path: str | os.PathLike) -> RecordIndex | None:
    try:
        return RecordIndex(folder, record_path)
    except (OSError, ValueError, KeyError):
        return None


def _map_array(path: Path, dtype: str | type, size: int) -> np.ndarray:
    """Raises ValueError if the file has fewer than `size` values."""
    return np.asarray(np.memmap(path, dtype, mode="r", shape=(size,)))


def _build(path: str, folder: Path) -> None:
    """Build the index beside `folder` and rename it, unless another process was faster."""
    # Other nodes may share the cache folder but not its locks. "@": the folders of node-1 are not those of node-1b.
    prefix = f"{folder.name}.building-{socket.gethostname()}@"
    # Left by killed processes of this node.
    for left in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    building = folder.with_name(f"{prefix}{os.getpid()}")
    building.mkdir()
    try:
        try:
            header = _write_columns(_entries(path, building), building)
        finally:
            # A half-written line is wrong JSON; the reason is that somebody writes.
            if index_name(path) != folder.name:
                raise ValueError(
                    f"record {path} changed while it was read; is a worker still writing? Train on what "
                    "concat_record.py merges once all workers are done"
                )
        if not header["num_items"]:
            raise ValueError(f"record {path} has no items; tokenize its input, or remove it from the data config")
        columns = (_map_array(building / name, _COLUMNS[name], header["num_items"]) for name in _DIGESTED)
        digests = b"".join(hashlib.blake2b(column, digest_size=16).digest() for column in columns)
        header["digest"] = hashlib.blake2b(digests, digest_size=16).hexdigest()
        (building / HEADER_NAME).write_text(json.dumps(header))
        # Older states of the record, and a damaged index. A process that has one open keeps it.
        for older in folder.parent.glob(f"{folder.name[:16]}-????????????????"):
            if not (older == folder and _open_complete(folder, path)):
                shutil.rmtree(older, ignore_errors=True)
        try:
            publish_folder(building, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _entries(path: str, folder: Path) -> Iterator[RecordEntry]:
    """The entries of a record; tokens that a list holds itself go to a shard in `folder`."""
    if os.path.splitext(path)[1] not in LIST_SUFFIXES:
        yield from read_raw_record(path)
        return
    with open(folder / INLINE_SHARD, "wb") as shard:
        for number, value in enumerate(iter_list_file(path), start=1):
            # The recipe then looks at nothing else.
            if "token" in value and "label" in value:
                build_item(value, f"record {path}: entry {number}")
                kept = {name: value[name] for name in ("id", "image_len") if name in value}
                entry = check_entry({"file": INLINE_SHARD, "len": len(value["token"]), **kept}, path, number)
                payload = token_bytes(value["token"], value["label"], entry.id)
                entry.file, entry.offset, entry.nbytes = _INLINE, shard.tell(), shard.write(payload)
                yield entry
            else:
                yield check_entry(value, path, number)


def _write_columns(entries: Iterator[RecordEntry], folder: Path) -> dict:
    """Write the arrays in batches, so that memory does not grow with the record. Returns the header without digest."""
    num_items = max_len = name_start = names_size = 0
    last_name, first_relative = None, ""
    with ExitStack() as stack:
        names = stack.enter_context(open(folder / NAMES, "wb"))
        files = [stack.enter_context(open(folder / name, "wb")) for name in _COLUMNS]
        while batch := list(islice(entries, BATCH_ITEMS)):
            rows = []
            for position, entry in enumerate(batch, start=num_items):
                # Neighbours of one shard share its name.
                if entry.file != last_name:
                    last_name, name_start = entry.file, names_size
                    names_size += names.write(last_name.encode("utf-8", "surrogateescape"))
                    if not first_relative and last_name != _INLINE and not os.path.isabs(last_name):
                        first_relative = last_name
                item_id = entry.id if isinstance(entry.id, int) else position
                place = (name_start, names_size - name_start, entry.offset or 0, entry.nbytes or 0)
                rows.append((entry.len, entry.image_len or 0, item_id, *place))
            columns = np.array(rows, np.int64).T
            for file, column, dtype in zip(files, columns, _COLUMNS.values(), strict=True):
                file.write(column.astype(dtype).tobytes())
            num_items += len(batch)
            max_len = max(max_len, int(columns[0].max()))
    return {"num_items": num_items, "max_len": max_len, "names_size": names_size, "first_relative": first_relative}
