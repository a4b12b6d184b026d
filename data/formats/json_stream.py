"""Streaming JSON: the values of a list, or of JSONL (one value per line), without holding the file in memory.

Inputs and records are read so. `ijson` is no replacement: it rejects NaN and integers of more than 64 bits, turns half
of a surrogate pair into "?", names no line, and is slower.
"""

import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

CHUNK_CHARS = 1 << 20
COMPRESSED_SUFFIXES = (".gz", ".zst")
_WHITESPACE = " \t\n\r"
_FOLLOWS = frozenset(_WHITESPACE + ",]")
_skip, _BEGIN, _EMPTY, _NEXT, _END = (
    re.compile(pattern.replace("W", f"[{_WHITESPACE}]*+")).match
    for pattern in ("W", r"W\[W(?!\])", r"W\[W\]W", "W,W", r"W\]W")
)


def iter_json_values(path: str | os.PathLike, what: str = "file") -> Iterator[object]:
    """The values of a JSON list (the first character is a bracket) or of JSONL, in order, also of `.gz` and `.zst`.

    Raises FileNotFoundError, or ValueError with the line at which the JSON breaks; `what` names the file in both.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what} {path} does not exist")
    try:
        with _open_text(path) as file:
            head = ""
            while not head and (line := file.readline(CHUNK_CHARS)):
                head = line.lstrip(_WHITESPACE)
        with _open_text(path) as file:
            yield from _list_values(file) if head.startswith("[") else _line_values(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path} is not UTF-8 text: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{what} {path} is not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}; it must be a "
            "JSON list, or one JSON object per line (JSONL)"
        ) from None
    except ImportError as error:
        raise ValueError(f"{what} {path}: the package zstandard is needed: pip install zstandard ({error})") from error
    except _compression_errors() as error:
        raise ValueError(f"{what} {path} is damaged or cut off: {error}") from None
    # Nested thousands deep, or a number of thousands of digits.
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{what} {path} holds JSON that cannot be read: {error}") from None


def _open_text(path: str | os.PathLike) -> TextIO:
    suffix = os.path.splitext(path)[1]
    if suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    if suffix == ".zst":
        import zstandard

        return io.TextIOWrapper(io.BufferedReader(_ZstdFile(path, zstandard)), encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


class _ZstdFile(io.RawIOBase):
    """Unlike the reader of zstandard it raises EOFError for a file that is cut off."""

    def __init__(self, path: str | os.PathLike, zstandard: ModuleType):
        self._file = open(path, "rb")
        self._chunks = self._decompress(zstandard.ZstdDecompressor())
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._rest:
            if (chunk := next(self._chunks, None)) is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()

    def _decompress(self, decompressor: Any) -> Iterator[bytes]:
        frame, data = None, b""
        while data := data or self._file.read(1 << 16):
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(data)
            data = b""
            if frame.eof:
                frame, data = None, frame.unused_data
        if frame:
            raise EOFError("it ends within a frame")


def _compression_errors() -> tuple[type[Exception], ...]:
    zstandard = sys.modules.get("zstandard")
    return EOFError, zlib.error, gzip.BadGzipFile, *([zstandard.ZstdError] if zstandard else [])


def _line_values(file: TextIO) -> Iterator[object]:
    for number, line in enumerate(file):
        if line.strip(_WHITESPACE):
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise _located(error, number, line) from None
            yield value


def _list_values(file: TextIO) -> Iterator[object]:
    """A window of text moves over the file. A value is decoded once the window holds all of it."""
    decode = json.JSONDecoder().raw_decode
    text, position, num_lines, opening, closing = "", 0, 0, _BEGIN, _EMPTY
    while True:
        try:
            gap = opening(text, position)
            if gap is None:
                if end := closing(text, position):
                    break
                raise json.JSONDecodeError("Expecting ',' or ']'", text, _skip(text, position).end())
            value, stop = decode(text, gap.end())
            # A number may have more digits, a point or an exponent beyond the window.
            if text[stop : stop + 1] not in _FOLLOWS:
                raise json.JSONDecodeError("Expecting ',' or ']'", text, stop)
        except json.JSONDecodeError as error:
            # At least as much again, so that a large value is not decoded at every chunk.
            more = file.read(max(CHUNK_CHARS, len(text) - position))
            if not more:
                raise _located(error, num_lines, text) from None
            num_lines += text.count("\n", 0, position)
            text, position = text[position:] + more, 0
            continue
        yield value
        position, opening, closing = stop, _NEXT, _END
    if text[end.end() :] or any(line.strip(_WHITESPACE) for line in file):
        raise _located(json.JSONDecodeError("something follows the end of the list", text, end.end()), num_lines, text)


def _located(error: json.JSONDecodeError, num_lines: int, text: str) -> json.JSONDecodeError:
    """The error of `text`, which follows `num_lines` lines of the file, with the line of the file."""
    return json.JSONDecodeError(error.msg, "\n" * num_lines + text, num_lines + error.pos)
