"""Files that one process at a time may have open, held by flock also where the file is replaced by a new one.

The lock of an output folder of training, of a sub-record, of a manifest and of what a node caches. It ends with the
process that took it: forked children do not share it. `filelock` does not replace it: it locks a second file beside
the one that is written, and where flock is missing it falls back to a marker that outlives its process.
"""

import fcntl
import os
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

POLL_S = 0.05
_opened: weakref.WeakSet[TextIO] = weakref.WeakSet()


def open_locked(path: str | os.PathLike, patience_s: float = 0.0) -> TextIO:
    """Open a file to append to it, locked until it is closed; it is created where there is none.

    Raises BlockingIOError if another process has it for longer than `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while True:
        file = open(path, "a", encoding="utf-8")
        _opened.add(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Where whoever had it has replaced or deleted it, this lock would keep nobody out.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.close()
                raise
            time.sleep(POLL_S)
        file.close()


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


def is_locked(path: str | os.PathLike) -> bool:
    """Whether a process, this one included, has the file by `open_locked`. False without file, or without flock."""
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def _let_go() -> None:
    """In a forked child: a loader worker must not keep the lock of a dead run, nor write what its parent buffered."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for file in _opened:
        if not file.closed:
            os.dup2(nowhere, file.fileno(), inheritable=False)
    os.close(nowhere)


os.register_at_fork(after_in_child=_let_go)
