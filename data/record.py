"""The record: which token files there are, and how long each is.

A worker appends one JSON line per item to its sub-record `{rank}-of-{splits}-record.jsonl`: `{"file", "len", "id"}`
and, where the item ends in a generated image, `"image_len"`. `record.json` is the JSON list of all of them, one item
per line. `file` is relative to the folder of the record; absolute and cwd-relative ones of older datasets load too.
Where the tokens of many items share a file, `"offset"` and `"nbytes"` say which bytes of it are this item's.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from data.json_stream import iter_json_values
from data.whole_file import open_whole

_SUB_RECORD = re.compile(r"(\d+)-of-(\d+)-record\.jsonl")


@dataclass(frozen=True, slots=True)
class RecordEntry:
    """One item of a record. `file` as written in the record, or resolved, as the function that returns it says."""

    file: str
    len: int  # tokens
    id: int | str
    image_len: int | None = None  # tokens of the image that the item ends in
    offset: int | None = None  # first byte of the item in `file`, if it shares it with others
    nbytes: int | None = None  # its bytes there

    @property
    def is_sharded(self) -> bool:
        return self.offset is not None

    def to_json(self) -> str:
        fields = {"file": self.file, "len": self.len, "id": self.id}
        for name in ("image_len", "offset", "nbytes"):
            if getattr(self, name) is not None:
                fields[name] = getattr(self, name)
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
            entry = replace(entry, file=os.path.join(base, entry.file))
        yield entry


def read_raw_record(path: str | os.PathLike) -> Iterator[RecordEntry]:
    """The same with `file` as it is written in the record."""
    for number, value in enumerate(iter_json_values(path, what="record"), start=1):
        yield _entry(value, path, number)


def write_merged(entries: Iterable[RecordEntry], path: str | os.PathLike) -> int:
    """Write a `record.json`, one item per line, `file` as given; it appears whole. Returns the number of entries."""
    count = 0
    with open_whole(path) as file:
        file.write(b"[")
        for entry in entries:
            file.write(("," if count else "").encode() + b"\n" + entry.to_json().encode())
            count += 1
        file.write(b"\n]\n")
    return count


def write_sub_record(entries: Iterable[RecordEntry], path: str | os.PathLike) -> int:
    """Write a whole sub-record anew, `file` as given; it appears whole. Returns the number of entries."""
    count = 0
    with open_whole(path) as file:
        for entry in entries:
            file.write(entry.to_json().encode() + b"\n")
            count += 1
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
    offset, nbytes = value.get("offset"), value.get("nbytes")
    if (offset, nbytes) != (None, None) and not (_is_length(nbytes) and (offset == 0 or _is_length(offset))):
        raise ValueError(
            f"record {path}: entry {number} has offset {offset!r} and nbytes {nbytes!r}, which must be two integers, "
            "from 0 and from 1, or both be absent"
        )
    return RecordEntry(value["file"], value["len"], value.get("id", number - 1), image_len, offset, nbytes)


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
