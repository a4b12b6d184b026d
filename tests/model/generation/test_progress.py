"""How far a generation has come: the bar in a terminal and in a log."""

import io
import re
from functools import partial

from tqdm import tqdm

from model.generation.progress import GenerationMeter, show_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(stream) -> str:
    """What a stream receives of 30 updates."""
    meter = GenerationMeter(64, 2)
    with show_progress("generating", meter, stream):
        for number in range(30):
            meter.update(2, number == 20)
    assert meter.fraction == 60 / 64
    return stream.getvalue()


def test_a_log_gets_the_bar_at_the_beginning_and_at_the_end():
    shown = show(io.StringIO())
    assert re.search(r"generating: +94%.* 60/64 \[.* tokens/s, 1/2 answers\]", shown) and shown.count("generating") == 2


def test_a_terminal_gets_one_bar_of_tokens(monkeypatch):
    monkeypatch.setattr("model.generation.progress.tqdm", partial(tqdm, mininterval=0))
    shown = show(Terminal())
    assert re.search(r"60/64 \[.* tokens/s, 1/2 answers\]", shown) and shown.count("\n") == 1
