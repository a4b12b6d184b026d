"""Moves the tokens of finished sub-records from one file per item into shards, files of many items.

A shard `shards/{rank}-of-{splits}-{number}.pkls` beside the sub-records holds the pickles of its items one after the
other. Each of these steps is on disk before the next begins, so the same command resumes wherever it is killed: the
shards of a rank, its sub-record, which points into them, (by the caller) the merged record, removal of the token files.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from data.formats.record import RecordEntry, read_raw_record, read_record, relative_file
from data.formats.token_file import parse_token_bytes, read_token_bytes, write_shard
from data.whole_file import replace_locked
from pre_tokenize.worker_log import FILES_DIR

SHARDS_DIR = "shards"


def move_to_shards(sub_record: Path, shard_size: int, locks: ExitStack) -> int:
    """Write the shards of one sub-record and point it into them. Returns how many items were not yet in a shard.

    `locks` keeps the new sub-record locked, as the caller did the old one.
    Raises ValueError or FileNotFoundError for a token file that is not what the record says.
    """
    entries = list(read_record(sub_record))
    waiting = [entry for entry in entries if not entry.is_sharded]
    if not waiting:
        return 0
    folder, prefix = sub_record.parent, _shard_prefix(sub_record)
    (folder / SHARDS_DIR).mkdir(exist_ok=True)
    # The merged record may point into shards that the sub-record no longer has, after --retry_failed cut it.
    used = [int(path.stem.rpartition("-")[2]) for path in (folder / SHARDS_DIR).glob(f"{prefix}*.pkls")]
    number = max(used, default=-1)
    places = []
    for start in range(0, len(waiting), shard_size):
        number += 1
        name = f"{SHARDS_DIR}/{prefix}{number:05d}.pkls"
        payloads = map(_checked_bytes, waiting[start : start + shard_size])
        places += [(name, *place) for place in write_shard(folder / name, payloads)]
    remaining = iter(places)
    lines = (_placed(entry, folder, remaining).to_json() + "\n" for entry in entries)
    locks.enter_context(replace_locked(sub_record, lines))
    return len(waiting)


def remove_moved(sub_record: Path) -> None:
    """Remove the token files whose tokens are in a shard now, and the shards of an interrupted run."""
    entries = [entry for entry in read_raw_record(sub_record) if entry.is_sharded]
    token_files = {f"{FILES_DIR}/{entry.id}.pkl" for entry in entries}
    shards = {entry.file for entry in entries}
    folder = sub_record.parent
    for path in (folder / FILES_DIR).glob("*.pkl"):
        if f"{FILES_DIR}/{path.name}" in token_files:
            path.unlink()
    for path in (folder / SHARDS_DIR).glob(f"{_shard_prefix(sub_record)}*"):
        if f"{SHARDS_DIR}/{path.name}" not in shards:
            path.unlink()


def _placed(entry: RecordEntry, folder: Path, places: Iterator[tuple[str, int, int]]) -> RecordEntry:
    """An entry as the sub-record has it from now on: in the shard where it was, or in the next of `places`."""
    if entry.is_sharded:
        return replace(entry, file=relative_file(entry.file, folder))
    file, offset, nbytes = next(places)
    return replace(entry, file=file, offset=offset, nbytes=nbytes)


def _checked_bytes(entry: RecordEntry) -> bytes:
    """The pickle of an item. Its file will be removed, so it is checked as the trainer will check it."""
    payload = read_token_bytes(entry.file)
    num_tokens = len(parse_token_bytes(payload, entry.file).token)
    if num_tokens != entry.len:
        raise ValueError(f"token file {entry.file} has {num_tokens} tokens, but its record says {entry.len}")
    return payload


def _shard_prefix(sub_record: Path) -> str:
    return sub_record.name.removesuffix("record.jsonl")
