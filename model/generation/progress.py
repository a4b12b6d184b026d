"""How far a generation has come: a bar in a terminal, else a line every few seconds; the page shows the same line."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

# Between two lines of a log.
LINE_INTERVAL_S = 5.0


class GenerationMeter:
    """Counts new tokens, at most `max_tokens`, and finished answers of `num_answers`."""

    def __init__(self, max_tokens: int, num_answers: int, show: Callable[["GenerationMeter"], None] | None = None):
        """`show` is called after every update."""
        self.max_tokens, self.num_answers, self.show = max_tokens, num_answers, show
        self.num_tokens, self.num_finished, self._start = 0, 0, time.monotonic()

    def update(self, num_tokens: int, num_finished: int) -> None:
        """The callback of `generate_batch`."""
        self.num_tokens += num_tokens
        self.num_finished += num_finished
        if self.show is not None:
            self.show(self)

    @property
    def fraction(self) -> float:
        return min(self.num_tokens / max(self.max_tokens, 1), 1.0)

    def answers(self) -> str:
        return f"{self.num_finished}/{self.num_answers} answers"

    def line(self) -> str:
        """`3/16 answers, 580 tokens in 18.7 s, 31 tokens/s`."""
        seconds = time.monotonic() - self._start
        rate = self.num_tokens / max(seconds, 1e-9)
        return f"{self.answers()}, {self.num_tokens:,} tokens in {seconds:.1f} s, {rate:.0f} tokens/s"


@contextmanager
def show_progress(
    name: str, meter: GenerationMeter, stream: TextIO | None = None, interval_s: float = LINE_INTERVAL_S
) -> Iterator[None]:
    """Shows a meter: on a bar in a terminal, else on a line every `interval_s` and at the end."""
    stream = stream or sys.stderr
    is_terminal, next_line_at = stream.isatty(), time.monotonic() + interval_s
    options = {"desc": name, "total": meter.max_tokens, "unit": " tokens", "dynamic_ncols": True}
    with tqdm(file=stream, disable=not is_terminal, **options) as bar:

        def show(meter: GenerationMeter) -> None:
            nonlocal next_line_at
            bar.set_postfix_str(meter.answers(), refresh=False)
            bar.update(meter.num_tokens - bar.n)
            if not is_terminal and time.monotonic() >= next_line_at:
                next_line_at = time.monotonic() + interval_s
                print(f"{name}: {meter.line()}", file=stream, flush=True)

        meter.show = show
        yield
    if not is_terminal:
        print(f"{name}: {meter.line()}", file=stream, flush=True)
