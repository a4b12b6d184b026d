"""What one pre-tokenizing worker has done, kept on disk in three places and derived from them when it starts again.

`files/{id}.pkl` holds the tokens of an item, `{rank}-of-{splits}-record.jsonl` a line for each item with tokens,
`{rank}-of-{splits}-failed.jsonl` a line `{"id", "reason"}` for each refused one, both in input order. An item is done
once its line is there; the token file is written before it. A line torn by a crash, and all that follows a gap, is
cut off. While refused items are tried again, their new lines are gathered in `{rank}-of-{splits}-retried.jsonl`, which
is then merged into the other two.
"""

import heapq
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TextIO

from data.messages import MAX_REASON, one_line
from data.record import RecordEntry, append_record_line, sub_record_name
from data.token_file import save_token_file
from data.whole_file import open_locked, replace_locked

FILES_DIR = "files"


class WorkerLog:
    """Appends to the files of one worker. A context manager: it holds a lock on the sub-record while it is open.

    `num_good` and `num_refused` count the items of this worker that are done, `next_id` is the first that is not; all
    three are known after `recover`.
    """

    def __init__(self, out_dir: str | os.PathLike, rank: int, splits: int, first_id: int, stop_id: int):
        """The worker owns the items first_id..stop_id-1. Raises ValueError if another process works as this rank."""
        self.folder = Path(out_dir)
        self.files_dir = self.folder / FILES_DIR
        self.files_dir.mkdir(parents=True, exist_ok=True)
        self.record_path = self.folder / sub_record_name(rank, splits)
        self.failed_path = self.folder / failed_name(rank, splits)
        self.retried_path = self.folder / retried_name(rank, splits)
        self.first_id, self.stop_id = first_id, stop_id
        self.num_good, self.num_refused, self.next_id = 0, 0, first_id
        try:
            self._record = open_locked(self.record_path)
        except BlockingIOError:
            raise ValueError(
                f"another worker is running as --rank {rank} of --splits {splits} on {out_dir}; give each "
                "its own rank, or wait for that one, or end it"
            ) from None
        self._failed = open(self.failed_path, "a", encoding="utf-8")

    def __enter__(self) -> "WorkerLog":
        return self

    def __exit__(self, *_: object) -> None:
        try:  # closing flushes, for which a full disk has no room
            self._failed.close()
        finally:
            self._record.close()

    def recover(self) -> None:
        """Find out what is done, after cutting off what an interruption left half done. To be called first."""
        if self.retried_path.exists():
            self.merge_retried()
        else:
            self._cut_to_prefix()

    def add_item(self, token: Sequence[int], label: Sequence[int], item_id: int, image_len: int | None) -> None:
        """Write the token file of the next item and its line."""
        self._expect(item_id)
        append_record_line(self._record, self._save_tokens(token, label, item_id, image_len))
        self.num_good += 1

    def add_refusal(self, item_id: int, reason: str) -> None:
        """Write the line of the next item, which is refused."""
        self._expect(item_id)
        self._failed.write(_refusal_line(item_id, reason))
        self.num_refused += 1

    def flush(self) -> None:
        """Hand the lines to the operating system, so that a killed process loses none of them."""
        self._record.flush()
        self._failed.flush()

    def open_retried(self) -> "RetriedLog":
        """To add items once more that are done already; `merge_retried` then puts them into their places."""
        return RetriedLog(self)

    def merge_retried(self) -> None:
        """Let each item added to the RetriedLog take the place of its old line, in input order.

        Interrupted anywhere in between, `recover` does it again: merged twice is the same as merged once.
        """
        self.flush()
        record = replace_locked(self.record_path, _merged(self.record_path, self.retried_path, "file"))
        self._record.close()
        self._record = record
        failed = replace_locked(self.failed_path, _merged(self.failed_path, self.retried_path, "reason"))
        self._failed.close()
        self._failed = failed
        self.retried_path.unlink()
        self._cut_to_prefix()

    def _save_tokens(
        self, token: Sequence[int], label: Sequence[int], item_id: int, image_len: int | None
    ) -> RecordEntry:
        save_token_file(self.files_dir / f"{item_id}.pkl", token, label, item_id)
        return RecordEntry(f"{FILES_DIR}/{item_id}.pkl", len(token), item_id, image_len)

    def _expect(self, item_id: int) -> None:
        assert item_id == self.next_id, f"item {self.next_id} is next, got {item_id}"
        self.next_id += 1

    def _cut_to_prefix(self) -> None:
        """Keep the lines up to the first item that has none, and count them."""
        good, refused = _Cursor(self.record_path), _Cursor(self.failed_path)
        for item_id in range(self.first_id, self.stop_id):
            if good.line.id == item_id and (self.folder / good.line.file).is_file():
                good.advance()
            elif refused.line.id == item_id:
                refused.advance()
            else:
                break
        for lines, file in ((good, self._record), (refused, self._failed)):
            if lines.kept_bytes < os.fstat(file.fileno()).st_size:
                file.truncate(lines.kept_bytes)
        self.num_good, self.num_refused = good.num_kept, refused.num_kept
        self.next_id = self.first_id + self.num_good + self.num_refused


class RetriedLog:
    """Gathers items that are tokenized or refused once more, in input order. A context manager."""

    def __init__(self, log: WorkerLog):
        self._log = log
        self._lines = open(log.retried_path, "w", encoding="utf-8")

    def __enter__(self) -> "RetriedLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def add_item(self, token: Sequence[int], label: Sequence[int], item_id: int, image_len: int | None) -> None:
        append_record_line(self._lines, self._log._save_tokens(token, label, item_id, image_len))

    def add_refusal(self, item_id: int, reason: str) -> None:
        self._lines.write(_refusal_line(item_id, reason))

    def flush(self) -> None:
        self._lines.flush()


def failed_name(rank: int, splits: int) -> str:
    return f"{rank}-of-{splits}-failed.jsonl"


def retried_name(rank: int, splits: int) -> str:
    return f"{rank}-of-{splits}-retried.jsonl"


def read_failed(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """(id, reason) of each refused item. Raises ValueError for a line that is none, for example a torn one."""
    with open(path, encoding="utf-8") as file:
        yield from _read_failed_lines(file, path)


def _read_failed_lines(file: TextIO, path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, start=1):
        try:
            fields = json.loads(line)
            yield fields["id"], one_line(fields["reason"], MAX_REASON)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: line {number} is damaged; run that worker again, it repairs the line") from None


def _refusal_line(item_id: int, reason: str) -> str:
    return json.dumps({"id": item_id, "reason": one_line(reason, MAX_REASON)}) + "\n"


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of a log. `id` is None where there is no further line."""

    id: int | None = None
    fields: dict | None = None
    raw: bytes = b""

    @property
    def file(self) -> str:
        return str(self.fields.get("file", ""))


class _Cursor:
    """Reads a log line by line and keeps count of the bytes of the lines that are kept."""

    def __init__(self, path: Path):
        self._lines = _whole_lines(path)
        self.kept_bytes = 0
        self.num_kept = 0
        self.line = next(self._lines, _Line())

    def advance(self) -> None:
        self.kept_bytes += len(self.line.raw)
        self.num_kept += 1
        self.line = next(self._lines, _Line())


def _whole_lines(path: Path) -> Iterator[_Line]:
    """The lines up to the first that is torn or damaged."""
    with open(path, "rb") as file:
        for raw in file:
            try:
                fields = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                return
            if not isinstance(fields, dict) or not isinstance(fields.get("id"), int):
                return
            yield _Line(fields["id"], fields, raw)


def _merged(path: Path, retried_path: Path, key: str) -> Iterator[str]:
    """Lines of both files in the order of their ids, of two with one id the retried one, if they have the key."""
    both = heapq.merge(_whole_lines(path), _whole_lines(retried_path), key=attrgetter("id"))
    for _, lines in groupby(both, key=attrgetter("id")):
        *_, last = lines
        if key in last.fields:
            yield last.raw.decode("utf-8")
