"""
How far a generation has come: counted by the callback of `generate_batch`, and shown.

`inference_solver.py` shows a bar in a terminal and a line every few seconds elsewhere; `model/generation/serve.py`
shows the same line on the page.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

from data.items.vocab import CODE_PIXELS

# Between two lines of a log.
LINE_INTERVAL_S = 5.0


class GenerationMeter:
    """
    Counts of a running generation.

    Attributes:
        num_answers: how many are wanted.
        num_tokens, num_finished: new tokens and finished answers so far.
        rows: rows of codes of the image that every answer begins with; 0 if that is not known.
        max_tokens: most new tokens of all answers together.
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
            sizes: for each answer (width, height) in pixels of the image that it must begin with, or None.
            batch_size: answers that are drawn in step; with more of them than that, rows are not known.
            max_gen_len: most new tokens per answer.
            show: called after every update.
        """
        self.num_answers, self.num_tokens, self.num_finished = len(sizes), 0, 0
        self.rows, self._row_len, per_answer = 0, 0, max_gen_len
        if sizes and sizes[0] and len(set(sizes)) == 1 and len(sizes) <= batch_size:
            # Images of one size in step: their row follows from the number of tokens, without asking the device.
            width, height = sizes[0]
            self.rows, self._row_len = height // CODE_PIXELS, width // CODE_PIXELS + 1
            # The ends of the image and of the turn come after its rows.
            per_answer = min(max_gen_len, self.rows * self._row_len + 2)
        self.max_tokens = per_answer * self.num_answers
        self._show, self._start, self._seconds = show, time.monotonic(), 0.0

    def update(self, num_tokens: int, num_finished: int) -> None:
        """The callback of `generate_batch`."""
        self.num_tokens += num_tokens
        self.num_finished += num_finished
        self._seconds = time.monotonic() - self._start
        if self._show is not None:
            self._show(self)

    @property
    def fraction(self) -> float:
        """How much is done at least, from 0 to 1."""
        return min(self.num_tokens / max(self.max_tokens, 1), 1.0)

    def place(self) -> str:
        """`image row 12/48`, else `3/16 answers`, else nothing."""
        row = self.num_tokens // self.num_answers // self._row_len + 1 if self.rows else 0
        if 0 < row <= self.rows:
            return f"{'image' if self.num_answers == 1 else 'images'} row {row}/{self.rows}"
        return f"{self.num_finished}/{self.num_answers} answers" if self.num_answers > 1 else ""

    def line(self) -> str:
        """`image row 12/48, 580 tokens in 18.7 s, 31 tokens/s`."""
        rate = self.num_tokens / max(self._seconds, 1e-9)
        counts = f"{self.num_tokens:,} tokens in {self._seconds:.1f} s, {rate:.0f} tokens/s"
        return ", ".join(filter(None, (self.place(), counts)))


@contextmanager
def show_progress(
    name: str, stream: TextIO | None = None, interval_s: float = LINE_INTERVAL_S
) -> Iterator[Callable[[GenerationMeter], None]]:
    """A function that shows a meter: on a bar in a terminal, else on a line every `interval_s` and at the end."""
    stream = stream or sys.stderr
    bar: tqdm | None = None
    last: GenerationMeter | None = None
    next_line_at = time.monotonic() + interval_s

    def show(meter: GenerationMeter) -> None:
        nonlocal bar, last, next_line_at
        last = meter
        if stream.isatty():
            if bar is None:
                bar = tqdm(desc=name, total=meter.max_tokens, unit=" tokens", file=stream, dynamic_ncols=True)
            bar.set_postfix_str(meter.place(), refresh=False)
            bar.update(meter.num_tokens - bar.n)
        elif time.monotonic() >= next_line_at:
            next_line_at = time.monotonic() + interval_s
            print(f"{name}: {meter.line()}", file=stream, flush=True)

    try:
        yield show
        if bar is None and last is not None:
            print(f"{name}: {last.line()}", file=stream, flush=True)
    finally:
        if bar is not None:
            bar.close()
