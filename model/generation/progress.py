"""How far a generation has come: a bar in a terminal, else a line every few seconds; the page shows the same line."""

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
        """`sizes`: for each answer (width, height) in pixels of the image that it must begin with, or None."""
        self.num_tokens, self.num_finished, self._num_answers = 0, 0, len(sizes)
        self.rows, self._row_len, per_answer = 0, 0, max_gen_len
        if sizes and sizes[0] and len(set(sizes)) == 1 and len(sizes) <= batch_size:
            # Images of one size in step: their row follows from the number of tokens, without asking the device.
            width, height = sizes[0]
            self.rows, self._row_len = height // CODE_PIXELS, width // CODE_PIXELS + 1
            # The ends of the image and of the turn come after its rows.
            per_answer = min(max_gen_len, self.rows * self._row_len + 2)
        self.max_tokens = per_answer * len(sizes)
        self._show, self._start = show, time.monotonic()

    def update(self, num_tokens: int, num_finished: int) -> None:
        """The callback of `generate_batch`."""
        self.num_tokens += num_tokens
        self.num_finished += num_finished
        if self._show is not None:
            self._show(self)

    @property
    def fraction(self) -> float:
        return min(self.num_tokens / max(self.max_tokens, 1), 1.0)

    def place(self) -> str:
        """`image row 12/48`, else `3/16 answers`, else nothing."""
        row = self.num_tokens // self._num_answers // self._row_len + 1 if self.rows else 0
        if 0 < row <= self.rows:
            return f"{'image' if self._num_answers == 1 else 'images'} row {row}/{self.rows}"
        return f"{self.num_finished}/{self._num_answers} answers" if self._num_answers > 1 else ""

    def line(self) -> str:
        """`image row 12/48, 580 tokens in 18.7 s, 31 tokens/s`."""
        seconds = time.monotonic() - self._start
        counts = f"{self.num_tokens:,} tokens in {seconds:.1f} s, {self.num_tokens / max(seconds, 1e-9):.0f} tokens/s"
        return ", ".join(filter(None, (self.place(), counts)))


@contextmanager
def show_progress(
    name: str, stream: TextIO | None = None, interval_s: float = LINE_INTERVAL_S
) -> Iterator[Callable[[GenerationMeter], None]]:
    """A function that shows a meter: on a bar in a terminal, else on a line every `interval_s` and at the end."""
    stream = stream or sys.stderr
    is_terminal, next_line_at, last = stream.isatty(), time.monotonic() + interval_s, None
    with tqdm(desc=name, unit=" tokens", file=stream, dynamic_ncols=True, delay=1e-9, disable=not is_terminal) as bar:

        def show(meter: GenerationMeter) -> None:
            nonlocal last, next_line_at
            last = meter
            if is_terminal:
                bar.total = meter.max_tokens
                bar.set_postfix_str(meter.place(), refresh=False)
                bar.update(meter.num_tokens - bar.n)
            elif time.monotonic() >= next_line_at:
                next_line_at = time.monotonic() + interval_s
                print(f"{name}: {meter.line()}", file=stream, flush=True)

        yield show
    if last is not None and not is_terminal:
        print(f"{name}: {last.line()}", file=stream, flush=True)
