"""
How far a generation has come: counted from the callback of `generate_batch`, and shown.

In a terminal it is a bar, outside of one a plain line every few seconds. Where every answer begins with a picture of
the same size, the row that is being drawn is known from the number of tokens alone, without asking the device.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from tqdm import tqdm

from data.vocab import CODE_PIXELS

LINE_INTERVAL_S = 5.0  # between two plain lines: a log stays readable


class GenerationMeter:
    """
    Counts of a running generation.

    Attributes:
        num_answers: how many are wanted.
        num_tokens, num_finished: new tokens and finished answers so far.
        rows: rows of codes of the picture that every answer begins with; 0 if that is not known.
        max_tokens: most new tokens that are expected of all answers together.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int] | None],
        batch_size: int,
        max_gen_len: int,
        show: Callable[["GenerationMeter"], None] | None = None,
    ):
        """
        Args:
            sizes: for each answer (width, height) in pixels of the picture that it must begin with, or None.
            batch_size: answers that are drawn in step; with more of them than that, rows are not known.
            max_gen_len: most new tokens per answer.
            show: called after every update.
        """
        self.num_answers, self.num_tokens, self.num_finished = len(sizes), 0, 0
        self.rows, self._row_len, per_answer = 0, 0, max_gen_len
        if sizes and sizes[0] and len(set(sizes)) == 1 and len(sizes) <= batch_size:
            width, height = sizes[0]
            self.rows, self._row_len = height // CODE_PIXELS, width // CODE_PIXELS + 1  # codes and a new line
            per_answer = min(max_gen_len, self.rows * self._row_len + 2)  # the ends of the picture and of the turn
        self.max_tokens = per_answer * self.num_answers
        self._show, self._start = show, time.monotonic()

    def update(self, num_tokens: int, num_finished: int) -> None:
        """The callback of `generate_batch`."""
        self.num_tokens += num_tokens
        self.num_finished += num_finished
        if self._show is not None:
            self._show(self)

    @property
    def row(self) -> int:
        """The row that is being drawn, from 1; 0 if it is not known or the picture is done."""
        row = self.num_tokens // max(self.num_answers, 1) // self._row_len + 1 if self.rows else 0
        return row if row <= self.rows else 0

    @property
    def fraction(self) -> float:
        """How much is done at least, from 0 to 1."""
        return min(self.num_tokens / max(self.max_tokens, 1), 1.0)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / max(self.seconds, 1e-9)

    def place(self) -> str:
        """Where it stands, without speeds: `picture row 12/48`, `3/16 answers`, or nothing."""
        if self.row:
            return f"{'picture' if self.num_answers == 1 else 'pictures'} row {self.row}/{self.rows}"
        return f"{self.num_finished}/{self.num_answers} answers" if self.num_answers > 1 else ""

    def line(self) -> str:
        """All of it: `picture row 12/48, 580 tokens, 31 tokens/s`."""
        counts = f"{self.num_tokens:,} tokens, {self.tokens_per_s:.0f} tokens/s"
        return ", ".join(filter(None, (self.place(), counts)))

    def total(self) -> str:
        """What it came to: `2,339 tokens in 74.1 s, 31 tokens/s`."""
        return f"{self.num_tokens:,} tokens in {self.seconds:.1f} s, {self.tokens_per_s:.0f} tokens/s"


class ProgressDisplay:
    """Shows a GenerationMeter while it is entered: a bar in a terminal, else a plain line every few seconds."""

    def __init__(self, name: str, stream: TextIO | None = None, interval_s: float = LINE_INTERVAL_S):
        self.name, self.stream, self.interval_s = name, stream or sys.stderr, interval_s
        self._meter: GenerationMeter | None = None
        self._bar: tqdm | None = None
        self._next_line_at = time.monotonic() + interval_s

    def show(self, meter: GenerationMeter) -> None:
        """After an update of the meter. The bar redraws itself ten times a second at most."""
        self._meter = meter
        if not self.stream.isatty():
            if time.monotonic() >= self._next_line_at:
                self._next_line_at = time.monotonic() + self.interval_s
                print(f"{self.name}: {meter.line()}", file=self.stream, flush=True)
            return
        counts_tokens = bool(meter.rows) or meter.num_answers == 1
        if self._bar is None:
            total, unit = (meter.max_tokens, " tokens") if counts_tokens else (meter.num_answers, " answers")
            self._bar = tqdm(desc=self.name, total=total, unit=unit, file=self.stream, dynamic_ncols=True)
        place = meter.place() if counts_tokens else f"{meter.tokens_per_s:.0f} tokens/s"
        self._bar.set_postfix_str(place, refresh=False)
        self._bar.update((meter.num_tokens if counts_tokens else meter.num_finished) - self._bar.n)

    def __enter__(self) -> "ProgressDisplay":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and self._meter is not None:
            print(f"{self.name}: {self._meter.total()}", file=self.stream, flush=True)
