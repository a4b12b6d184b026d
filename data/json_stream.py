"""Streaming JSON: the values of a list, or of JSONL (one value per line), without holding the file in memory."""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TextIO

CHUNK_CHARS = 1 << 20
BATCH_CHARS = 2_000_000  # smaller ones are slower; the values of one take some 15 MB
_WHITESPACE = " \t\n\r"


def iter_json_values(path: str | os.PathLike, what: str = "file") -> Iterator[object]:
    """The values of a JSON list or of JSONL, told apart by the first character, in order.

    Raises FileNotFoundError, or ValueError with the line at which the JSON breaks; `what` names the file in both.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what} {path} does not exist")
    try:
        with open(path, encoding="utf-8-sig") as file:
            head = ""
            while not head and (line := file.readline(CHUNK_CHARS)):
                head = line.lstrip(_WHITESPACE)
            file.seek(0)
            yield from _list_values(file) if head.startswith("[") else _line_values(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path} is not UTF-8 text: {error}") from None
    except _JsonError as error:
        raise ValueError(
            f"{what} {path} is not valid JSON at {error}; it must be a JSON list, or one JSON object per line (JSONL)"
        ) from None
    except (RecursionError, ValueError) as error:  # nested thousands deep, a number of thousands of digits
        raise ValueError(f"{what} {path} holds JSON that cannot be read: {error}") from None


def iter_json_batches(path: str | os.PathLike, what: str = "file") -> Iterator[list]:
    """The values of `iter_json_values`, many at a time and, where they are objects, several times faster.

    A part of the text that ends where an object seems to end is decoded at once. If it then proves not to be a list
    of whole values, the rest is read one by one, which also finds the place of what is wrong. Raises the same errors.
    """
    num_done = 0
    try:
        for batch in _batches(path):
            num_done += len(batch)
            yield batch
        return
    except (OSError, ValueError, RecursionError):
        pass
    for value in islice(iter_json_values(path, what), num_done, None):
        yield [value]


class _JsonError(ValueError):
    """Where and how the JSON is wrong."""


def _batches(path: str | os.PathLike) -> Iterator[list]:
    """Lists of values; ValueError where the text is not what it seems, with nothing of that part yielded."""
    with open(path, encoding="utf-8-sig") as file:
        text = ""
        while not text and (more := file.read(BATCH_CHARS)):
            text = more.lstrip(_WHITESPACE)
        is_list = text.startswith("[")
        separator, decode = ("},", _decode_part) if is_list else ("\n", _decode_lines)
        text = text[is_list:]
        num_done = 0
        while True:
            if stop := text.rfind(separator) + 1:
                batch = decode(text[:stop])
                num_done += len(batch)
                yield batch
                text = text[stop + is_list :]  # behind the comma
            more = file.read(max(BATCH_CHARS, len(text)))
            if not more:
                break
            text += more
        if is_list:
            text = text.rstrip(_WHITESPACE)
            if not text.endswith("]") or (num_done and text == "]"):
                raise ValueError("it does not end as a list does")
            text = text[:-1]
        yield decode(text)


def _decode_part(text: str) -> list:
    return json.loads(f"[{text}]")


def _decode_lines(text: str) -> list:
    lines = [line for line in text.split("\n") if line.strip(_WHITESPACE)]
    values = json.loads(f"[{','.join(lines)}]")
    if len(values) != len(lines):
        raise ValueError("a line is not one value")
    return values


def _line_values(file: TextIO) -> Iterator[object]:
    for number, line in enumerate(file, start=1):
        if line.strip(_WHITESPACE):
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise _JsonError(f"line {number}, column {error.colno}: {error.msg}") from None
            yield value


def _list_values(file: TextIO) -> Iterator[object]:
    reader = _Reader(file)
    reader.take("[")
    if reader.peek() == "]":
        reader.take("]")
    else:
        yield reader.value()
        while reader.peek() == ",":
            reader.take(",")
            yield reader.value()
        reader.take("]")
    if reader.peek():
        raise reader.error("something follows the end of the list")


class _Reader:
    """A window of text that moves over the file; values are decoded once they lie in it whole."""

    def __init__(self, file: TextIO):
        self.file = file
        self.text = file.read(CHUNK_CHARS)
        self.position = 0
        self.lines_before = 0  # line ends in front of the window
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space, or nothing at the end of the file."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in _WHITESPACE:
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if not self._more():
                return ""

    def take(self, expected: str) -> None:
        if self.peek() != expected:
            got = repr(self.peek()) if self.peek() else "the end of the file"
            raise self.error(f"{expected!r} expected, got {got}")
        self.position += 1

    def value(self) -> object:
        self.peek()
        while True:
            try:
                value, stop = self.decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                if not self._more():
                    self.position = error.pos
                    raise self.error(error.msg) from None
                continue
            if stop == len(self.text) and self._more():  # a number may go on beyond the window
                continue
            self.position = stop
            return value

    def error(self, message: str) -> _JsonError:
        line = self.lines_before + self.text.count("\n", 0, self.position) + 1
        column = self.position - self.text.rfind("\n", 0, self.position)
        return _JsonError(f"line {line}, column {column}: {message}")

    def _more(self) -> bool:
        """Drop what was read, and at least double what was not. False at the end of the file."""
        more = self.file.read(max(CHUNK_CHARS, len(self.text) - self.position))
        if not more:
            return False
        self.lines_before += self.text.count("\n", 0, self.position)
        self.text = self.text[self.position :] + more
        self.position = 0
        return True
