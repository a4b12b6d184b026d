"""Moves the tokens of finished sub-records from one file per item into shards, files of many items.

A shard `shards/{rank}-of-{splits}-{number}.pkls` beside the sub-records holds the pickles of its items one after the
other. In this order, each on disk before the next begins, so that nothing is lost wherever it stops and the same
command goes on:

1. `{rank}-of-{splits}-record.jsonl.moved`, the list of the token files that will be replaced;
2. the shards of this rank; 3. its sub-record, which points into them; 4. (by the caller) the merged record;
5. the token files of the list are removed, and then the list.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from data.record import RecordEntry, read_raw_record, read_record, relative_file, write_sub_record
from data.token_file import parse_token_bytes, read_token_bytes, write_shard
from data.whole_file import open_locked

SHARDS_DIR = "shards"
MOVED_SUFFIX = ".moved"


@contextmanager
def locked(sub_records: Sequence[Path]) -> Iterator[None]:
    """Keeps workers from these sub-records. Raises ValueError if one is at work."""
    with ExitStack() as stack:
        for path in sub_records:
            try:
                stack.enter_context(open_locked(path))
            except BlockingIOError:
                raise ValueError(f"a worker is still writing {path}; let it finish first") from None
        yield


def move_to_shards(sub_record: Path, shard_size: int) -> int:
    """Steps 1 to 3 for one sub-record. Returns how many items were moved; 0 if all are in shards already.

    Raises ValueError or FileNotFoundError for a token file that is not what the record says; nothing is removed.
    """
    waiting = [_relative(entry, sub_record) for entry in read_record(sub_record) if not entry.is_sharded]
    if waiting:
        known = set(waiting)
        earlier = [entry for entry in _read_moved(sub_record) if entry not in known]
        write_sub_record([*earlier, *waiting], _moved_path(sub_record))
        (sub_record.parent / SHARDS_DIR).mkdir(exist_ok=True)
        write_sub_record(_sharded_entries(sub_record, shard_size), sub_record)
    return len(waiting)


def remove_moved(sub_record: Path) -> int:
    """Step 5: remove the token files that the sub-record no longer needs, and shards of an interrupted run.

    Returns how many token files were removed.
    """
    if not _moved_path(sub_record).exists():
        return 0
    entries = list(read_record(sub_record))
    needed = {os.path.abspath(entry.file) for entry in entries}
    num_removed = 0
    for entry in _read_moved(sub_record):
        path = os.path.abspath(sub_record.parent / entry.file)
        if path not in needed and os.path.exists(path):
            os.unlink(path)
            num_removed += 1
    for path in (sub_record.parent / SHARDS_DIR).glob(f"{_shard_prefix(sub_record)}*"):
        if os.path.abspath(path) not in needed:
            os.unlink(path)
    _moved_path(sub_record).unlink()
    return num_removed


def _sharded_entries(sub_record: Path, shard_size: int) -> Iterator[RecordEntry]:
    """The entries of a sub-record in their order; each shard is written before the first entry that points into it."""
    number = _first_free_number(sub_record)
    batch: list[RecordEntry] = []
    num_waiting = 0
    for entry in read_record(sub_record):
        batch.append(entry)
        num_waiting += not entry.is_sharded
        if num_waiting == shard_size:
            yield from _write_batch(sub_record, number, batch)
            batch, num_waiting, number = [], 0, number + 1
    yield from _write_batch(sub_record, number, batch)


def _write_batch(sub_record: Path, number: int, batch: list[RecordEntry]) -> Iterator[RecordEntry]:
    name = f"{SHARDS_DIR}/{_shard_prefix(sub_record)}{number:05d}.pkls"
    waiting = [entry for entry in batch if not entry.is_sharded]
    places = iter(write_shard(sub_record.parent / name, map(_checked_bytes, waiting)) if waiting else ())
    for entry in batch:
        if entry.is_sharded:
            yield _relative(entry, sub_record)
        else:
            offset, nbytes = next(places)
            yield replace(entry, file=name, offset=offset, nbytes=nbytes)


def _checked_bytes(entry: RecordEntry) -> bytes:
    """The pickle of an item; its file will be removed, so it is read as the trainer will read it."""
    payload = read_token_bytes(entry.file)
    num_tokens = len(parse_token_bytes(payload, entry.file).token)
    if num_tokens != entry.len:
        raise ValueError(f"token file {entry.file} has {num_tokens} tokens, but its record says {entry.len}")
    return payload


def _first_free_number(sub_record: Path) -> int:
    """One more than the largest number of the shards that the sub-record points into."""
    names = {entry.file for entry in read_raw_record(sub_record) if entry.is_sharded}
    return 1 + max((int(Path(name).stem.rpartition("-")[2]) for name in names), default=-1)


def _read_moved(sub_record: Path) -> list[RecordEntry]:
    """The list of step 1, files relative to the folder of the sub-record."""
    path = _moved_path(sub_record)
    return list(read_raw_record(path)) if path.exists() else []


def _relative(entry: RecordEntry, sub_record: Path) -> RecordEntry:
    """An entry that was read by `read_record`, its file relative to the folder of the sub-record."""
    return replace(entry, file=relative_file(entry.file, sub_record.parent))


def _moved_path(sub_record: Path) -> Path:
    return sub_record.with_name(sub_record.name + MOVED_SUFFIX)


def _shard_prefix(sub_record: Path) -> str:
    return sub_record.name.removesuffix("record.jsonl")
