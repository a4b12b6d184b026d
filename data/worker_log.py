"""What one pre-tokenizing worker has done, kept on disk in three places and derived from them when it starts again.

`files/{id}.pkl` holds the tokens of an item, `{rank}-of-{splits}-record.jsonl` a line for each item with tokens,
`{rank}-of-{splits}-failed.jsonl` a line `{"id", "reason"}` for each refused one, both in input order. An item is done
once its line is there; the token file is written before it. A line torn by a crash, and all that follows a gap, is
cut off.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from data.record import RecordEntry, append_record_line, sub_record_name
from data.token_file import save_token_file

FILES_DIR = "files"


class WorkerLog:
    """Appends to the files of one worker. A context manager: it holds a lock on the sub-record while it is open.

    `num_good` and `num_refused` count the items of this worker that are done, `next_id` is the first that is not.
    """

    def __init__(self, out_dir: str | os.PathLike, rank: int, splits: int, first_id: int, stop_id: int):
        """The worker owns the items first_id..stop_id-1. Raises ValueError if another process works as this rank."""
        folder = Path(out_dir)
        self.files_dir = folder / FILES_DIR
        self.files_dir.mkdir(parents=True, exist_ok=True)
        self.record_path = folder / sub_record_name(rank, splits)
        self.failed_path = folder / failed_name(rank, splits)
        self._record = open(self.record_path, "a", encoding="utf-8")
        try:
            fcntl.flock(self._record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._record.close()
            raise ValueError(
                f"another worker is running as --rank {rank} of --splits {splits} on {folder}; give each its own rank"
            ) from None
        self._failed = open(self.failed_path, "a", encoding="utf-8")
        self.num_good, self.num_refused = self._cut_to_prefix(first_id, stop_id)
        self.next_id = first_id + self.num_good + self.num_refused

    def __enter__(self) -> "WorkerLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        self._failed.close()
        self._record.close()

    def add_item(self, token: Sequence[int], label: Sequence[int], item_id: int, image_len: int | None) -> None:
        """Write the token file of the next item and its line."""
        self._expect(item_id)
        save_token_file(self.files_dir / f"{item_id}.pkl", token, label, item_id)
        append_record_line(self._record, RecordEntry(f"{FILES_DIR}/{item_id}.pkl", len(token), item_id, image_len))
        self.num_good += 1

    def add_refusal(self, item_id: int, reason: str) -> None:
        """Write the line of the next item, which is refused."""
        self._expect(item_id)
        self._failed.write(json.dumps({"id": item_id, "reason": reason}) + "\n")
        self.num_refused += 1

    def flush(self) -> None:
        """Hand the lines to the operating system, so that a killed process loses none of them."""
        self._record.flush()
        self._failed.flush()

    def _expect(self, item_id: int) -> None:
        assert item_id == self.next_id, f"item {self.next_id} is next, got {item_id}"
        self.next_id += 1

    def _cut_to_prefix(self, first_id: int, stop_id: int) -> tuple[int, int]:
        """Keep the lines up to the first item that has none. Returns how many are kept of each kind."""
        good, refused = _Lines(self.record_path), _Lines(self.failed_path)
        for item_id in range(first_id, stop_id):
            if good.next_id == item_id and (self.files_dir / f"{item_id}.pkl").is_file():
                good.advance()
            elif refused.next_id == item_id:
                refused.advance()
            else:
                break
        for lines, file in ((good, self._record), (refused, self._failed)):
            if lines.kept_bytes < os.fstat(file.fileno()).st_size:
                file.truncate(lines.kept_bytes)
        return good.num_kept, refused.num_kept


def failed_name(rank: int, splits: int) -> str:
    return f"{rank}-of-{splits}-failed.jsonl"


def read_failed(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """(id, reason) of each refused item. Raises ValueError for a line that is none, for example a torn one."""
    with open(path, encoding="utf-8") as file:
        yield from _read_failed_lines(file, path)


def _read_failed_lines(file: TextIO, path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, start=1):
        try:
            fields = json.loads(line)
            yield fields["id"], fields["reason"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: line {number} is damaged; run that worker again, it repairs the line") from None


class _Lines:
    """Reads the ids of a log line by line and keeps count of the bytes of those that are kept."""

    def __init__(self, path: Path):
        self._lines = _whole_lines(path)
        self.kept_bytes = 0
        self.num_kept = 0
        self.next_id, self._next_bytes = next(self._lines, (None, 0))

    def advance(self) -> None:
        self.kept_bytes += self._next_bytes
        self.num_kept += 1
        self.next_id, self._next_bytes = next(self._lines, (None, 0))


def _whole_lines(path: Path) -> Iterator[tuple[int, int]]:
    """(id, bytes) of each line up to the first that is torn or damaged."""
    with open(path, "rb") as file:
        for line in file:
            try:
                item_id = json.loads(line)["id"] if line.endswith(b"\n") else None
            except (ValueError, KeyError, TypeError):
                return
            if not isinstance(item_id, int):
                return
            yield item_id, len(line)
