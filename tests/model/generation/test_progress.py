"""How far a generation has come: rows counted from tokens, the bar of a terminal, and the lines of a log."""

import io
import re
from functools import partial
from itertools import count

import pytest
from tqdm import tqdm

from model.generation.progress import GenerationMeter, show_progress

# 4 codes and a new line in each of 6 rows.
SIZE, ROW_LEN, ROWS = (64, 96), 5, 6


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(stream, sizes, interval_s: float = 1e9) -> str:
    """What a stream receives of 30 updates."""
    with show_progress("generating", stream, interval_s) as show_meter:
        meter = GenerationMeter(sizes, 8, 100, show_meter)
        for _ in range(ROWS * ROW_LEN):
            meter.update(len(sizes), 0)
    return stream.getvalue()


def test_rows_are_counted_from_tokens_alone():
    seen = []
    meter = GenerationMeter([SIZE], 8, 100, lambda meter: seen.append(meter.place()))
    assert meter.max_tokens == ROWS * ROW_LEN + 2 and meter.place() == "image row 1/6"
    for _ in range(ROWS * ROW_LEN):
        meter.update(1, 0)
    # What follows the image has no rows.
    assert seen == [f"image row {n // ROW_LEN + 1}/6" for n in range(1, ROWS * ROW_LEN)] + [""]
    assert meter.fraction == 30 / 32
    several = GenerationMeter([SIZE] * 3, 8, 100)
    for rows, num_finished, place in ((2, 0, "images row 3/6"), (4, 2, "2/3 answers")):
        several.update(3 * ROW_LEN * rows, num_finished)
        assert several.place() == place


@pytest.mark.parametrize("sizes, batch_size", [([SIZE] * 3, 2), ([SIZE, None], 8), ([SIZE, (96, 64)], 8), ([None], 8)])
def test_rows_of_other_answers_are_not_known(sizes, batch_size):
    meter = GenerationMeter(sizes, batch_size, 100)
    meter.update(7, 0)
    assert meter.rows == 0 and meter.max_tokens == 100 * len(sizes)
    assert "row" not in meter.line() and "7 tokens" in meter.line()


def test_a_log_gets_a_line_at_intervals_and_at_the_end(monkeypatch):
    seconds = count()
    monkeypatch.setattr("model.generation.progress.time.monotonic", lambda: next(seconds))
    *lines, last = show(io.StringIO(), [SIZE], interval_s=25).splitlines()
    assert 1 <= len(lines) <= 6
    assert all(re.fullmatch(r"generating: image row \d/6, \d+ tokens in \d+\.0 s, \d tokens/s", line) for line in lines)
    assert re.fullmatch(r"generating: 30 tokens in \d+\.0 s, \d tokens/s", last)


def test_a_log_of_a_generation_that_failed_has_no_total():
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), show_progress("generating", stream) as show_meter:
        GenerationMeter([SIZE], 8, 100, show_meter).update(1, 0)
        raise KeyboardInterrupt
    assert stream.getvalue() == ""


def test_a_terminal_gets_one_bar_of_tokens_with_its_place(monkeypatch):
    monkeypatch.setattr("model.generation.progress.tqdm", partial(tqdm, mininterval=0))
    shown = show(Terminal(), [SIZE])
    assert re.search(r"7/32 \[.* tokens/s, image row 2/6\]", shown) and shown.count("\n") == 1
    assert re.search(r"/200 \[.* tokens/s, 0/2 answers\]", show(Terminal(), [SIZE, None]))
