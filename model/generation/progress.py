"""How far a generation has come: a bar on stderr, a line on the page in the browser."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

# Between two updates of the bar in a log.
LOG_INTERVAL_S = 5.0


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
def show_progress(name: str, meter: GenerationMeter, stream: TextIO | None = None) -> Iterator[None]:
    """Shows a meter on a bar, which a log gets every few seconds."""
    stream = stream or sys.stderr
    interval_s = 0.1 if stream.isatty() else LOG_INTERVAL_S
    options = {"unit": " tokens", "file": stream, "mininterval": interval_s, "dynamic_ncols": True}
    with tqdm(desc=name, total=meter.max_tokens, **options) as bar:

        def show(meter: GenerationMeter) -> None:
            bar.set_postfix_str(meter.answers(), refresh=False)
            bar.update(meter.num_tokens - bar.n)

        meter.show = show
        yield
