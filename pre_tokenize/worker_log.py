"""The log of one pre-tokenizing worker: which of its items are done, and what became of them.

`files/{id}.pkl` holds the tokens of an item. `{rank}-of-{splits}-record.jsonl` has a line for each tokenized item,
`{rank}-of-{splits}-failed.jsonl` a line `{"id": 4, "reason": "image a.png does not exist"}` for each rejected one.
Both are in input order. An item is done once its line is on disk; its token file is written before its line.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from heapq import merge
from pathlib import Path
from typing import TextIO

from data.formats.record import RecordEntry, append_record_line, sub_record_name
from data.formats.token_file import save_token_file
from data.messages import MAX_REASON, one_line
from data.whole_file import open_locked

FILES_DIR = "files"


class WorkerLog:
    """Appends to the files of one worker. A context manager: it holds a lock on the sub-record while it is open.

    `num_good` and `num_rejected` count the items of this worker that are done. `next_id` is the first that is not.
    All three are known after `recover`.
    """

    def __init__(self, out_dir: str | os.PathLike, rank: int, splits: int, first_id: int, stop_id: int):
        """The worker owns the items first_id..stop_id-1. Raises ValueError if another process works as this rank."""
        self.folder = Path(out_dir)
        (self.folder / FILES_DIR).mkdir(parents=True, exist_ok=True)
        self.record_path = self.folder / sub_record_name(rank, splits)
        self.failed_path = self.folder / failed_name(rank, splits)
        self.first_id, self.stop_id = first_id, stop_id
        self.num_good, self.num_rejected, self.next_id = 0, 0, first_id
        self._record = lock_sub_record(self.record_path)
        self._failed = open(self.failed_path, "a", encoding="utf-8")

    def __enter__(self) -> "WorkerLog":
        return self

    def __exit__(self, *_: object) -> None:
        # Closing flushes, which fails on a full disk; the lock is released nevertheless.
        try:
            self._failed.close()
        finally:
            self._record.close()

    def recover(self, stop_id: int | None = None) -> None:
        """Count the items that are done, up to the first gap or to `stop_id`, and cut off the lines that follow."""
        files = {self.record_path: self._record, self.failed_path: self._failed}
        num_items, num_bytes = Counter(), Counter()
        lines = merge(*map(_complete_lines, files))
        for wanted_id in range(self.first_id, self.stop_id if stop_id is None else stop_id):
            item_id, log, file, line_bytes = next(lines, (None, None, "", 0))
            if item_id != wanted_id or (log == self.record_path and not (self.folder / file).is_file()):
                break
            num_items[log] += 1
            num_bytes[log] += line_bytes
        # The record first: if the process ends in between, the next `recover` makes up for the other.
        for path, file in files.items():
            if num_bytes[path] < path.stat().st_size:
                file.truncate(num_bytes[path])
        self.num_good, self.num_rejected = num_items[self.record_path], num_items[self.failed_path]
        self.next_id = self.first_id + self.num_good + self.num_rejected

    def add_item(self, token: Sequence[int], label: Sequence[int], item_id: int, image_len: int | None) -> None:
        """Write the token file of the next item and its line."""
        self._expect(item_id)
        file = f"{FILES_DIR}/{item_id}.pkl"
        save_token_file(self.folder / file, token, label, item_id)
        append_record_line(self._record, RecordEntry(file, len(token), item_id, image_len))
        self.num_good += 1

    def add_rejected(self, item_id: int, reason: str) -> None:
        """Write the line of the next item, which is rejected."""
        self._expect(item_id)
        self._failed.write(json.dumps({"id": item_id, "reason": one_line(reason, MAX_REASON)}) + "\n")
        self.num_rejected += 1

    def flush(self) -> None:
        """Hand the lines to the operating system, so that a killed process loses none of them."""
        self._record.flush()
        self._failed.flush()

    def _expect(self, item_id: int) -> None:
        assert item_id == self.next_id, f"item {self.next_id} is next, got {item_id}"
        self.next_id += 1


def lock_sub_record(path: Path) -> TextIO:
    """Open a sub-record to append to it, locked until it is closed. Raises ValueError if another process has it."""
    try:
        return open_locked(path)
    except BlockingIOError:
        raise ValueError(f"a worker is running on {path}; wait for it to end, or give each its own --rank") from None


def failed_name(rank: int, splits: int) -> str:
    return f"{rank}-of-{splits}-failed.jsonl"


def read_failed(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """(id, reason) of each rejected item. Raises ValueError for a damaged line, for example a torn one."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                fields = json.loads(line)
                yield fields["id"], one_line(fields["reason"], MAX_REASON)
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}: line {number} is damaged; run that worker again to repair it") from None


def _complete_lines(path: Path) -> Iterator[tuple[int, Path, str, int]]:
    """(id, path, token file, bytes) of each line up to the first that is torn or damaged."""
    with open(path, "rb") as file:
        for raw in file:
            try:
                fields = json.loads(raw) if raw.endswith(b"\n") else None
                yield int(fields["id"]), path, str(fields.get("file", "")), len(raw)
            except (ValueError, KeyError, TypeError):
                return
