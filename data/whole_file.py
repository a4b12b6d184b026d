"""Files that appear whole or not at all, whatever ends the process that writes them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def open_whole(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write that takes its name, and is on disk, once the block ends; an error leaves what was there."""
    partial = Path(f"{os.fspath(path)}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_path(Path(path).parent)
    finally:
        partial.unlink(missing_ok=True)


def sync_path(path: Path) -> None:
    """Put what a file holds, or the names in a folder, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
