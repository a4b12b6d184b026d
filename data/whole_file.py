"""Atomic files and folders, and files that one process at a time may have open."""

import fcntl
import os
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

POLL_S = 0.05
_opened: weakref.WeakSet[TextIO] = weakref.WeakSet()


@contextmanager
def open_whole(path: str | os.PathLike, sync: bool = True) -> Iterator[BinaryIO]:
    """A file to write, which appears under its name when the block ends, with `sync` also after a power failure."""
    partial = Path(f"{os.fspath(path)}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if sync:
        sync_path(Path(path).parent)


def publish_folder(partial: Path, final: Path) -> None:
    """Put a folder and all that it holds on disk, then rename it. Raises OSError if `final` is a folder with files."""
    for path in (*partial.rglob("*"), partial):
        sync_path(path)
    os.rename(partial, final)
    sync_path(final.parent)


def sync_path(path: Path) -> None:
    """Put what a file holds, or the names in a folder, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_locked(path: str | os.PathLike, patience_s: float = 0.0) -> TextIO:
    """Open a file to append to it, locked by flock until it is closed; a missing file is created.

    The lock ends with its process; forked children do not share it. (`filelock` locks a second file beside it.)
    Raises BlockingIOError if another process has the file for longer than `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while True:
        file = open(path, "a", encoding="utf-8")
        _opened.add(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A file that was replaced or deleted meanwhile is open here only; its lock would keep nobody out.
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
    """Replace a file that is locked here by one with these lines, atomically. Returns the new file, open and locked."""
    partial = Path(f"{os.fspath(path)}.partial")
    partial.unlink(missing_ok=True)
    file = open_locked(partial)
    try:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
        os.replace(partial, path)
        sync_path(partial.parent)
    except BaseException:
        file.close()
        partial.unlink(missing_ok=True)
        raise
    return file


def is_locked(path: str | os.PathLike) -> bool:
    """Whether any process has the file by `open_locked`. False without the file, or without flock."""
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def _release_in_child() -> None:
    """A forked loader worker must not keep the lock of a dead run, nor write what its parent has buffered."""
    devnull = os.open(os.devnull, os.O_RDWR)
    for file in _opened:
        if not file.closed:
            os.dup2(devnull, file.fileno(), inheritable=False)
    os.close(devnull)


os.register_at_fork(after_in_child=_release_in_child)
