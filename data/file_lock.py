"""Files that one process at a time may have open, held by flock also where the file is replaced by a new one."""

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO


def open_locked(path: str | os.PathLike, wait: bool = False) -> TextIO:
    """Open a file to append to it, locked until it is closed; it is created where there is none.

    Raises BlockingIOError if another process has it, unless it is to `wait` for that one.
    """
    while True:
        file = open(path, "a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BaseException:
            file.close()
            raise
        if _is_at(file, path):
            return file
        file.close()  # whoever had it has replaced or deleted it, so that this lock would keep nobody out


def replace_locked(path: str | os.PathLike, lines: Iterable[str]) -> TextIO:
    """Replace a file that is locked here by one with these lines, which appears whole and locked. Returns it open."""
    partial = Path(f"{os.fspath(path)}.partial")
    partial.unlink(missing_ok=True)
    file = open_locked(partial)
    try:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        file.close()
        partial.unlink(missing_ok=True)
        raise
    return file


def _is_at(file: TextIO, path: str | os.PathLike) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
