"""How far a generation has come: the bar of a terminal, and the lines of a log."""

import io
import re
from functools import partial
from itertools import count

import pytest
from tqdm import tqdm

from model.generation.progress import GenerationMeter, show_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(stream, interval_s: float = 1e9) -> str:
    """What a stream receives of 30 updates."""
    meter = GenerationMeter(64, 2)
    with show_progress("generating", meter, stream, interval_s):
        for number in range(30):
            meter.update(2, number == 20)
    assert meter.fraction == 60 / 64
    return stream.getvalue()


def test_a_log_gets_a_line_at_intervals_and_at_the_end(monkeypatch):
    seconds = count()
    monkeypatch.setattr("model.generation.progress.time.monotonic", lambda: next(seconds))
    lines = show(io.StringIO(), interval_s=25).splitlines()
    assert 2 <= len(lines) <= 6 and lines[-1].startswith("generating: 1/2 answers, 60 tokens in")
    pattern = r"generating: [01]/2 answers, \d+ tokens in \d+\.0 s, \d tokens/s"
    assert all(re.fullmatch(pattern, line) for line in lines)


def test_a_log_of_a_generation_that_failed_has_no_total():
    stream, meter = io.StringIO(), GenerationMeter(64, 2)
    with pytest.raises(KeyboardInterrupt), show_progress("generating", meter, stream):
        meter.update(1, 0)
        raise KeyboardInterrupt
    assert stream.getvalue() == ""


def test_a_terminal_gets_one_bar_of_tokens(monkeypatch):
    monkeypatch.setattr("model.generation.progress.tqdm", partial(tqdm, mininterval=0))
    shown = show(Terminal())
    assert re.search(r"60/64 \[.* tokens/s, 1/2 answers\]", shown) and shown.count("\n") == 1
