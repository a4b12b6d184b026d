"""The bench of logging runs, small, and says what it promises."""

import json

import pytest

from tests.tokenize_helpers import run_script


@pytest.mark.slow
def test_a_line_at_every_step_costs_little():
    done = run_script("exps/bench/metrics.py", "--device=cpu", "--num_steps=6", "--batch_size=1", "--repeats=1")
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert sum(line.startswith(("| a line at every step |", "| no logging |")) for line in table) == 2
    summary = json.loads(last)
    assert {"bench", "device", "versions", "ours", "baseline", "ratio", "load"} <= summary.keys()
    ours, baseline, ratio = summary["ours"], summary["baseline"], summary["ratio"]
    assert ours["log_ms"] > 0 == baseline["log_ms"], "the baseline sums and logs nothing"
    assert ratio["step"] == pytest.approx(ours["step_ms"] / baseline["step_ms"])
    assert ratio["share"] == pytest.approx(ours["log_ms"] / ours["step_ms"])
    assert ratio["share"] < 0.05, "the goal is 0.02; these steps are short, and the machine may be busy"
