"""The index of a record: lengths, ids and places of its items, built once per node and shared by all its processes.

Stands between the lists of items on disk (`data/record.py`, `data/record_list.py`) and the dataset. The files of an
index (`data/index_file.py`) lie in `{cache_dir}/{16 hex digits of its key}/`. The key is the record's path, size,
modification time and a hash of its first and last MiB, so that a changed record has another folder. A folder takes its
name once all of it is on disk; it is opened if key and sizes agree, else built anew.
"""

import errno
import hashlib
import math
import os
import shutil
import socket
import stat
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.file_lock import open_locked
from data.index_file import INLINE_NAME, IndexKey, IndexWriter, RecordIndex, load_header
from data.json_stream import iter_json_values
from data.record import MAX_LEN, MAX_PATH, MAX_PLACE, check_entry
from data.record_list import LIST_SUFFIXES, is_inline, iter_list_file
from data.token_file import build_item, token_bytes, write_shard
from data.whole_file import sync_path

HEAD_TAIL_BYTES = 1 << 20
BATCH_ITEMS = 16_384  # entries that are checked at a time
DEBRIS_AGE_S = 24 * 3600.0  # no build takes as long
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def open_index(
    path: str | os.PathLike, cache_dir: str | os.PathLike, say: Callable[[str], object] = print
) -> RecordIndex:
    """The index of a record (.json, .jsonl, .pkl or .pth), which the first of the processes of a node builds.

    `say` gets one line if this process builds it. Raises FileNotFoundError, or ValueError for a record that is wrong,
    that changes while it is read, or whose index cannot be written.
    """
    key = index_key(path)
    cache_dir = Path(os.path.abspath(cache_dir))
    folder = cache_dir / key.folder_name
    header = _load_header_of(folder, key)
    try:
        if header is None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with _locked(folder) as is_alone:
                if (header := _load_header_of(folder, key)) is None:
                    say(f"building the index of record {path} ({key.size / 1e6:,.1f} MB) in {cache_dir}")
                    _clear_debris(folder, is_alone)
                    header = _build_in_place(folder, key)
        return RecordIndex(folder, header, key.path)
    except OSError as error:
        raise ValueError(
            f"the index of record {path} cannot be kept in {cache_dir}: {error}. It takes some 50 bytes per item "
            "and the names of its files: free space there, or choose another folder (TMPDIR, or --output_dir)"
        ) from error


def node_cache_dir() -> Path:
    """The folder of this user for indices in the temporary folder of this node; nobody else can write to it.

    Raises ValueError if somebody else has made a folder of this name.
    """
    path = Path(tempfile.gettempdir()) / f"token-index-{os.getuid()}"
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise ValueError(
                f"{path} is not a folder of this user (uid {os.getuid()}), so what it holds cannot be trusted: remove "
                "it, or set TMPDIR to a folder of yours"
            ) from None
        if stat.S_IMODE(status.st_mode) != 0o700:
            path.chmod(0o700)
    return path


def index_key(path: str | os.PathLike) -> IndexKey:
    """The key of a record as it is now. Raises FileNotFoundError, or ValueError if it is no regular file."""
    path = os.path.abspath(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"record {path} is no regular file")
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            head_tail = hashlib.blake2b(file.read(HEAD_TAIL_BYTES), digest_size=16)
            file.seek(max(0, status.st_size - HEAD_TAIL_BYTES))
            head_tail.update(file.read(HEAD_TAIL_BYTES))
    except FileNotFoundError:
        raise FileNotFoundError(f"record {path} does not exist") from None
    except OSError as error:
        raise ValueError(f"record {path} cannot be read: {error.strerror}") from error
    return IndexKey(path, status.st_size, status.st_mtime_ns, head_tail.hexdigest())


def build_index(key: IndexKey, folder: Path) -> None:
    """Write the index of a record to a new folder. Raises ValueError as `open_index` does, or OSError."""
    is_list = os.path.splitext(key.path)[1] in LIST_SUFFIXES
    with IndexWriter(folder) as writer:
        try:
            for values, inline in _list_batches(key.path, folder) if is_list else _json_batches(key.path):
                columns = _checked_columns(values, key.path, writer.num_items)
                for position in inline:
                    columns.files[position] = ""  # the index's own shard
                writer.append(*columns)
        except (ValueError, FileNotFoundError):
            _check_unchanged(key)  # a line that is half written is wrong, but this is why
            raise
        _check_unchanged(key)
        writer.finish(key)


class Columns(NamedTuple):
    """A batch of items, as `IndexWriter.append` takes them."""

    lens: np.ndarray
    image_lens: np.ndarray
    ids: np.ndarray
    files: list[str]
    offsets: np.ndarray
    nbytes: np.ndarray


def _json_batches(path: str) -> Iterator[tuple[list, Sequence[int]]]:
    values = iter_json_values(path, what="record")
    while batch := list(islice(values, BATCH_ITEMS)):
        yield batch, ()


def _list_batches(path: str, folder: Path) -> Iterator[tuple[list, Sequence[int]]]:
    """Entries of a .pkl or .pth list, those with tokens replaced by their place in a shard, and which these are."""
    entries = list(iter_list_file(path))
    positions = [position for position, entry in enumerate(entries) if is_inline(entry)]
    if positions:
        items = (build_item(entries[i], f"record {path}: entry {i + 1}") for i in positions)
        payloads = (token_bytes(item.token.tolist(), item.label.tolist(), item.id) for item in items)
        places = write_shard(folder / INLINE_NAME, payloads)
        for position, (offset, nbytes) in zip(positions, places, strict=True):
            entry = entries[position]
            kept = {key: entry[key] for key in ("id", "image_len") if key in entry}
            entries[position] = {
                "file": INLINE_NAME,
                "len": len(entry["token"]),
                "offset": offset,
                "nbytes": nbytes,
                **kept,
            }
    for start in range(0, len(entries), BATCH_ITEMS):
        stop = start + BATCH_ITEMS
        inline = positions[bisect_left(positions, start) : bisect_left(positions, stop)]
        yield entries[start:stop], [position - start for position in inline]


def _checked_columns(values: list, path: str, num_before: int) -> Columns:
    """The columns of entries of a record. Raises ValueError with the first wrong entry and what is wrong with it."""
    try:
        columns = _columns(values, num_before)
    except (AttributeError, KeyError, OverflowError, TypeError, UnicodeEncodeError):
        columns = None
    if columns is None:
        for number, value in enumerate(values, start=num_before + 1):
            check_entry(value, path, number)
        raise AssertionError(f"record {path}: the index refuses what check_entry takes, near entry {num_before + 1}")
    return columns


def _columns(values: list, num_before: int) -> Columns | None:
    """The columns of a batch, or None or nearly any error if `check_entry` would refuse one of it; a tenth of its time.

    Whole columns are looked at: which types they have, and their least and largest.
    """
    files, lens = [value["file"] for value in values], [value["len"] for value in values]
    ids = [value.get("id", position) for position, value in enumerate(values, start=num_before)]
    if str in set(map(type, ids)):
        ids = [position if type(item_id) is str else item_id for position, item_id in enumerate(ids, start=num_before)]
    image_lens, no_image = _optional([value.get("image_len") for value in values])
    offsets, no_offset = _optional([value.get("offset") for value in values])
    nbytes, no_nbytes = _optional([value.get("nbytes") for value in values])
    lens, ids = _integers(lens), _integers(ids)
    is_right = (
        set(map(type, files)) <= {str}
        and all(files)
        and max(map(len, files), default=0) <= MAX_PATH
        and b"\0" not in os.fsencode("".join(files))
        and ((0 < lens) & (lens <= MAX_LEN)).all()
        and (ids >= -MAX_PLACE).all()
        and (no_image | ((0 < image_lens) & (image_lens < lens))).all()
        and (no_offset == no_nbytes).all()
        and (no_nbytes | ((0 < nbytes) & (0 <= offsets) & (offsets <= MAX_PLACE - nbytes))).all()
    )
    return Columns(lens, image_lens, ids, files, offsets, nbytes) if is_right else None


def _optional(values: list) -> tuple[np.ndarray, np.ndarray]:
    """Integers, 0 for None, and where None is: both [n]."""
    types = set(map(type, values))
    if len(types) == 1:
        is_none = np.full(len(values), type(None) in types)
        return np.zeros(len(values), np.int64) if is_none[0] else _integers(values), is_none
    is_none = np.fromiter((value is None for value in values), bool, len(values))
    return _integers([0 if value is None else value for value in values]), is_none


def _integers(values: list) -> np.ndarray:
    if not set(map(type, values)) <= {int}:
        raise TypeError("a value is no integer")
    return np.fromiter(values, np.int64, len(values))


def _load_header_of(folder: Path, key: IndexKey) -> dict | None:
    header = load_header(folder)
    return header if header and header["key"] == asdict(key) else None


def _check_unchanged(key: IndexKey) -> None:
    try:
        is_unchanged = index_key(key.path) == key
    except FileNotFoundError:
        is_unchanged = False
    if not is_unchanged:
        raise ValueError(
            f"record {key.path} changed while it was read; is a worker still writing? Train on what concat_record.py "
            "merges once all workers are done"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lets one process of this node at a time build an index; False where the file system knows no such lock."""
    path = folder.with_name(f"{folder.name}.lock")
    try:
        file = open_locked(path, patience_s=math.inf)
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        yield False
        return
    with file:
        yield True
        path.unlink(missing_ok=True)  # whoever waits for it sees that it is gone, and goes on


def _build_in_place(folder: Path, key: IndexKey) -> dict:
    """Build beside `folder` and rename. Returns the header of the index that has the name then.

    Also right where no lock holds: another process may have been first, and what it built is the same.
    """
    building = folder.with_name(f"{folder.name}{_building_suffix()}-{os.getpid()}")
    try:
        build_index(key, building)
        while (header := _load_header_of(folder, key)) is None:
            with suppress(FileNotFoundError):
                shutil.rmtree(folder)  # damaged
            try:
                os.rename(building, folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        sync_path(folder.parent)
        _remove_older(folder, key)
        return header
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _building_suffix() -> str:
    return f".building-{socket.gethostname()}"


def _clear_debris(folder: Path, is_alone: bool) -> None:
    """Remove what builds of this index that were killed have left: those of this node if nobody else builds here, and
    old ones of any node."""
    for path in folder.parent.glob(f"{folder.name}.building-*"):
        is_ours = path.name.rpartition("-")[0] == f"{folder.name}{_building_suffix()}"
        try:
            is_old = time.time() - path.stat().st_mtime > DEBRIS_AGE_S
        except FileNotFoundError:
            continue
        if is_old or (is_alone and is_ours):
            shutil.rmtree(path, ignore_errors=True)


def _remove_older(folder: Path, key: IndexKey) -> None:
    """Remove the indices of what the record was before; a process that has one open keeps it."""
    for path in folder.parent.iterdir():
        header = load_header(path) if path != folder and "." not in path.name else None
        if header and header["key"] and header["key"]["path"] == key.path:
            shutil.rmtree(path, ignore_errors=True)
