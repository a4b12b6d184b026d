"""The record: which token files there are, and how long each item is.

A worker appends one JSON line per item to its sub-record `{rank}-of-{splits}-record.jsonl`; `record.json` is the JSON
list of all items, one per line. An item in a file of its own, and one that ends in a generated image, in a shard:

    {"file": "files/7.pkl", "len": 812, "id": 7}
    {"file": "shards/0.pkls", "len": 2361, "id": 8, "image_len": 2356, "offset": 9120, "nbytes": 14180}

`file` is relative to the folder of the record; absolute and cwd-relative ones of older datasets load too.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TextIO

from data.formats.json_stream import iter_json_values
from data.messages import brief
from data.whole_file import open_whole

# Lengths are kept in 32 bits, ids and places in files in 64.
MAX_LEN = 2**31 - 1
MAX_PLACE = 2**63 - 1
# Bytes of a path; Linux opens no longer one.
MAX_PATH = 4096

_SUB_RECORD = re.compile(r"(\d+)-of-(\d+)-record\.jsonl")


# Not frozen: a frozen instance takes three times as long to make, and records have tens of millions.
@dataclass(slots=True, unsafe_hash=True)
class RecordEntry:
    """One item of a record. `file` as written in the record, or resolved, as the function that returns it says.

    `len`: tokens. `image_len`: tokens of the generated image that ends the item; None without one. `offset`, `nbytes`:
    bytes of the item in `file`; None if it has the file for itself.
    """

    file: str
    len: int
    id: int | str
    image_len: int | None = None
    offset: int | None = None
    nbytes: int | None = None

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

    Raises FileNotFoundError, or ValueError with the number of the wrong entry.
    """
    base: str | None = None
    for entry in read_raw_record(path):
        if not os.path.isabs(entry.file):
            if base is None:
                base = resolve_base(path, entry.file)
            entry = replace(entry, file=os.path.join(base, entry.file))
        yield entry


def resolve_base(path: str | os.PathLike, first_file: str) -> str:
    """The folder, from here, of the relative files of a record: the first file decides; may be "".

    The folder of the record, else of the target of a linked record, else the working directory.
    """
    folder = os.path.dirname(path)
    folders = (folder, os.path.dirname(os.path.realpath(path)), "")
    return next((base for base in folders if os.path.exists(os.path.join(base, first_file))), folder)


def relative_file(file: str, folder: str | os.PathLike) -> str:
    """A file that opens from here, relative to the folder of a record."""
    relative = os.path.relpath(file, folder)
    if relative.split(os.sep, 1)[0] != os.pardir:
        return relative
    # `..` leads out of the real place of a folder, also where the folder is opened through a link.
    return os.path.join(_relative_folder(os.path.dirname(file), folder, os.getcwd()), os.path.basename(file))


# Few folders hold many files.
@cache
def _relative_folder(folder: str, start: str | os.PathLike, here: str) -> str:
    return os.path.relpath(*(os.path.realpath(os.path.join(here, path)) for path in (folder, start)))


def read_raw_record(path: str | os.PathLike) -> Iterator[RecordEntry]:
    """Like `read_record`, with `file` as written in the record."""
    for number, value in enumerate(iter_json_values(path, what="record"), start=1):
        yield check_entry(value, path, number)


def check_entry(value: object, path: str | os.PathLike, number: int) -> RecordEntry:
    """The entry of a record's JSON value, its `number`-th from 1. Raises ValueError with what is wrong with it."""
    try:
        file, num_tokens, item_id = value["file"], value["len"], value.get("id", number - 1)
        image_len, offset, nbytes = value.get("image_len"), value.get("offset"), value.get("nbytes")
    except (AttributeError, KeyError, TypeError):
        file = num_tokens = None
    if type(file) is not str or type(num_tokens) is not int or num_tokens < 1:
        problem = f'must be {{"file": path, "len": number of tokens, "id": ...}}, got {brief(value)}'
    elif not _is_path(file):
        problem = f"has file {brief(file)}, which cannot be the path of a file"
    elif num_tokens > MAX_LEN:
        problem = f"has len {brief(num_tokens)}, but no item has more than {MAX_LEN} tokens"
    elif type(item_id) is not str and not (type(item_id) is int and -MAX_PLACE <= item_id <= MAX_PLACE):
        problem = f"has id {brief(item_id)}, which must be an integer of 64 bits or a string"
    elif image_len is not None and not (type(image_len) is int and 1 <= image_len < num_tokens):
        problem = f"has image_len {brief(image_len)}, which must be an integer from 1, below len ({num_tokens})"
    elif not (offset is nbytes is None) and not (
        type(offset) is type(nbytes) is int and offset >= 0 and 1 <= nbytes <= MAX_PLACE - offset
    ):
        problem = (
            f"has offset {brief(offset)} and nbytes {brief(nbytes)}, which must be two integers, from 0 and from 1, "
            "that together stay below 2^63, or both be absent"
        )
    else:
        return RecordEntry(file, num_tokens, item_id, image_len, offset, nbytes)
    raise ValueError(f"record {path}: entry {number} {problem}")


def write_merged(entries: Iterable[RecordEntry], path: str | os.PathLike) -> None:
    """Write a `record.json` atomically, one item per line, `file` as given."""
    with open_whole(path) as file:
        file.write(b"[")
        for number, entry in enumerate(entries):
            file.write((b",\n" if number else b"\n") + entry.to_json().encode())
        file.write(b"\n]\n")


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
        return 0 < len(file.encode("utf-8", "surrogateescape")) <= MAX_PATH and "\0" not in file
    except UnicodeEncodeError:
        return False
