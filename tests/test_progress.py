"""How far a generation has come: rows counted from tokens, the bar of a terminal, and the lines of a log."""

import io
import os
import pty
import re
import termios
import time

from model.progress import GenerationMeter, ProgressDisplay

SIZE = (64, 96)  # 4 codes and a new line in each of 6 rows
ROW_LEN, ROWS = 5, 6


def test_rows_are_counted_from_tokens_alone():
    meter, seen = GenerationMeter([SIZE], 8, 100), []
    assert meter.max_tokens == ROWS * ROW_LEN + 2
    for _ in range(ROWS * ROW_LEN):
        seen.append(meter.row)
        meter.update(1, 0)
    assert seen == [row for row in range(1, ROWS + 1) for _ in range(ROW_LEN)]
    assert meter.row == 0 and meter.place() == ""  # the picture is done, what follows has no rows
    assert meter.fraction == 30 / 32


def test_rows_of_several_pictures_drawn_in_step():
    meter = GenerationMeter([SIZE] * 3, 8, 100)
    meter.update(3 * ROW_LEN * 2, 0)
    assert meter.place() == "pictures row 3/6"
    meter.update(3 * ROW_LEN * 4, 2)
    assert meter.place() == "2/3 answers"


def test_rows_are_not_made_up():
    for sizes, batch_size in (([SIZE] * 3, 2), ([SIZE, None], 8), ([SIZE, (96, 64)], 8), ([None], 8)):
        meter = GenerationMeter(sizes, batch_size, 100)
        meter.update(7, 0)
        assert meter.rows == meter.row == 0 and meter.max_tokens == 100 * len(sizes)
        assert "row" not in meter.line() and "7 tokens" in meter.line()
    assert GenerationMeter([SIZE], 8, 10).max_tokens == 10


def test_what_shows_it_is_called_after_every_update():
    seen = []
    meter = GenerationMeter([None], 8, 100, lambda meter: seen.append(meter.num_tokens))
    for _ in range(3):
        meter.update(2, 0)
    assert seen == [2, 4, 6]


def test_a_log_gets_a_line_now_and_then():
    stream = io.StringIO()
    with ProgressDisplay("generating", stream, interval_s=0.2) as display:
        meter = GenerationMeter([SIZE], 8, 100, display.show)
        for _ in range(ROWS * ROW_LEN):
            meter.update(1, 0)
            time.sleep(0.02)
    *lines, last = stream.getvalue().splitlines()
    assert 1 <= len(lines) <= 5  # 0.6 s or somewhat more
    assert all(re.fullmatch(r"generating: (picture row \d/6, )?\d+ tokens, \d+ tokens/s", line) for line in lines)
    assert "picture row" in lines[0]
    assert re.fullmatch(r"generating: 30 tokens in \d+\.\d s, \d+ tokens/s", last)


def test_a_log_of_a_generation_that_failed_says_no_total():
    stream = io.StringIO()
    try:
        with ProgressDisplay("generating", stream) as display:
            GenerationMeter([SIZE], 8, 100, display.show).update(1, 0)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert stream.getvalue() == ""


def show_in_terminal(sizes, tokens_per_update: int) -> str:
    """What a terminal receives while 30 updates are shown."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    with os.fdopen(follower, "w") as stream:
        with ProgressDisplay("generating", stream) as display:
            meter = GenerationMeter(sizes, 8, 100, display.show)
            for _ in range(ROWS * ROW_LEN):
                meter.update(tokens_per_update, 0)
                time.sleep(0.015)
        shown = b""
        while not shown.endswith(b"\n"):
            shown += os.read(leader, 65536)
    os.close(leader)
    return shown.decode()


def test_a_terminal_gets_a_bar_of_tokens_with_the_row():
    shown = show_in_terminal([SIZE], 1)
    assert "/32 [" in shown and re.search(r"\d tokens/s, picture row [2-5]/6\]", shown)
    assert shown.count("\r") < 30 and shown.count("\n") == 1  # drawn on one line, not at every token


def test_a_terminal_gets_a_bar_of_answers_where_rows_are_not_known():
    assert re.search(r"0/2 \[.* answers/s, \d+ tokens/s\]", show_in_terminal([SIZE, None], 2))
