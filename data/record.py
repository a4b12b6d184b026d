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
from functools import cache
from pathlib import Path
from typing import TextIO

from data.json_stream import iter_json_values
from data.messages import brief
from data.whole_file import open_whole

MAX_LEN = 2**31 - 1  # of an item, in tokens: lengths are kept in 32 bits
MAX_PLACE = 2**63 - 1  # a byte of a file, or an id
MAX_PATH = 4096  # characters of a path; Linux opens none that is longer

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

    Relative files are looked for beside the record, then beside the file that it is a link to, then from the working
    directory; the first entry decides for all.
    Raises FileNotFoundError, or ValueError naming the line that is no record entry.
    """
    base: str | None = None
    for entry in read_raw_record(path):
        if not os.path.isabs(entry.file):
            if base is None:
                base = resolve_base(path, entry.file)
            entry = replace(entry, file=os.path.join(base, entry.file))
        yield entry


def resolve_base(path: str | os.PathLike, first_file: str) -> str:
    """The folder of the relative files of a record, of which `first_file` is the first, or "", from here."""
    folder = os.path.dirname(path)
    folders = (folder, os.path.dirname(os.path.realpath(path)), "")
    return next((base for base in folders if os.path.exists(os.path.join(base, first_file))), folder)


def relative_file(file: str, folder: str | os.PathLike) -> str:
    """A file, as it opens from here, relative to the folder of a record that is read by its own path or through links.

    The way out of a folder starts at its real place: there `..` leads, even where the folder is opened through a link.
    """
    relative = os.path.relpath(file, folder)
    if relative.split(os.sep, 1)[0] != os.pardir:
        return relative
    here = os.getcwd()
    start, stop = (_real_path(os.path.join(here, path)) for path in (folder, os.path.dirname(file)))
    return os.path.join(os.path.relpath(stop, start), os.path.basename(file))


@cache  # of few folders, each that of many files
def _real_path(path: str) -> str:
    return os.path.realpath(path)


def read_raw_record(path: str | os.PathLike) -> Iterator[RecordEntry]:
    """The same with `file` as it is written in the record."""
    for number, value in enumerate(iter_json_values(path, what="record"), start=1):
        yield check_entry(value, path, number)


def check_entry(value: object, path: str | os.PathLike, number: int) -> RecordEntry:
    """The entry of a record's JSON value, its `number`-th from 1. Raises ValueError with what is wrong with it."""
    if not isinstance(value, dict) or not isinstance(value.get("file"), str) or not _is_within(value.get("len"), 1):
        raise ValueError(
            f'record {path}: entry {number} must be {{"file": path, "len": number of tokens, "id": ...}}, '
            f"got {brief(value)}"
        )
    file, num_tokens, item_id = value["file"], value["len"], value.get("id", number - 1)
    image_len, offset, nbytes = (value.get(name) for name in ("image_len", "offset", "nbytes"))
    problem = None
    if not _is_path(file):
        problem = f"has file {brief(file)}, which cannot be the path of a file"
    elif num_tokens > MAX_LEN:
        problem = f"has len {brief(num_tokens)}, but no item has more than {MAX_LEN} tokens"
    elif not isinstance(item_id, str) and not _is_within(item_id, -MAX_PLACE, MAX_PLACE):
        problem = f"has id {brief(item_id)}, which must be an integer of 64 bits or a string"
    elif image_len is not None and not _is_within(image_len, 1, num_tokens - 1):
        problem = (
            f"has image_len {brief(image_len)}, which must be an integer from 1, below len ({num_tokens}), or absent"
        )
    elif (offset, nbytes) != (None, None) and not (_is_within(nbytes, 1) and _is_within(offset, 0, MAX_PLACE - nbytes)):
        problem = (
            f"has offset {brief(offset)} and nbytes {brief(nbytes)}, which must be two integers, from 0 and from 1, "
            "that together stay below 2^63, or both be absent"
        )
    if problem:
        raise ValueError(f"record {path}: entry {number} {problem}")
    return RecordEntry(file, num_tokens, item_id, image_len, offset, nbytes)


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


def _is_path(file: str) -> bool:
    try:
        return 0 < len(file) <= MAX_PATH and b"\0" not in os.fsencode(file)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _is_within(value: object, low: int, high: int | None = None) -> bool:
    return type(value) is int and value >= low and (high is None or value <= high)
