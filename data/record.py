"""The record: which token files there are, and how long each is.

A worker appends one JSON line per item to its sub-record `{rank}-of-{splits}-record.jsonl`: `{"file", "len", "id"}`
and, where the item ends in a generated image, `"image_len"`. `record.json` is the JSON list of all of them, one item
per line. `file` is relative to the folder of the record; absolute and cwd-relative ones of older datasets load too.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from data.json_stream import iter_json_values

_SUB_RECORD = re.compile(r"(\d+)-of-(\d+)-record\.jsonl")


@dataclass(frozen=True, slots=True)
class RecordEntry:
    """One item of a record. `file` as written in the record, or resolved, as the function that returns it says."""

    file: str
    len: int  # tokens
    id: int | str
    image_len: int | None = None  # tokens of the image that the item ends in

    def to_json(self) -> str:
        fields = {"file": self.file, "len": self.len, "id": self.id}
        if self.image_len is not None:
            fields["image_len"] = self.image_len
        return json.dumps(fields)


def append_record_line(file: TextIO, entry: RecordEntry) -> None:
    """Append one item to an open sub-record; the caller flushes."""
    file.write(entry.to_json() + "\n")


def read_record(path: str | os.PathLike) -> Iterator[RecordEntry]:
    """Stream a `record.json` or a sub-record, `file` resolved to a path that opens from here. May be empty.

    Relative files are looked for beside the record, then from the working directory; the first entry decides for all.
    Raises FileNotFoundError, or ValueError naming the line that is no record entry.
    """
    path = Path(path)
    base: str | None = None
    for entry in read_raw_record(path):
        if not os.path.isabs(entry.file):
            if base is None:
                beside = not os.path.exists(entry.file) or (path.parent / entry.file).exists()
                base = os.fspath(path.parent) if beside else ""
            entry = RecordEntry(os.path.join(base, entry.file), entry.len, entry.id, entry.image_len)
        yield entry


def read_raw_record(path: str | os.PathLike) -> Iterator[RecordEntry]:
    """The same with `file` as it is written in the record."""
    for number, value in enumerate(iter_json_values(path, what="record"), start=1):
        yield _entry(value, path, number)


def write_merged(entries: Iterable[RecordEntry], path: str | os.PathLike) -> int:
    """Write a `record.json`, one item per line, `file` as given; it appears whole. Returns the number of entries."""
    partial = f"{os.fspath(path)}.partial"
    count = 0
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write("[")
            for entry in entries:
                file.write(("," if count else "") + "\n" + entry.to_json())
                count += 1
            file.write("\n]\n")
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
    return count


def sub_record_name(rank: int, splits: int) -> str:
    return f"{rank}-of-{splits}-record.jsonl"


def find_sub_records(folder: str | os.PathLike) -> dict[tuple[int, int], Path]:
    """(rank, splits) -> path of every sub-record in a folder, sorted by splits and rank."""
    found = {}
    for path in Path(folder).iterdir():
        if match := _SUB_RECORD.fullmatch(path.name):
            found[int(match[1]), int(match[2])] = path
    return dict(sorted(found.items(), key=lambda pair: (pair[0][1], pair[0][0])))


def _entry(value: object, path: str | os.PathLike, number: int) -> RecordEntry:
    if not isinstance(value, dict) or not isinstance(value.get("file"), str) or not _is_length(value.get("len")):
        raise ValueError(
            f'record {path}: entry {number} must be {{"file": path, "len": number of tokens, "id": ...}}, '
            f"got {str(value)[:80]}"
        )
    image_len = value.get("image_len")
    if image_len is not None and not _is_length(image_len):
        raise ValueError(f"record {path}: entry {number} has image_len {image_len!r}, which must be a positive integer")
    return RecordEntry(value["file"], value["len"], value.get("id", number - 1), image_len)


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
