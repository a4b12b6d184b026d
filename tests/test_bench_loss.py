"""The bench of the loss: less memory and the same gradients at Chameleon's vocabulary."""

import json

import pytest

from tests.tokenize_helpers import run_script


@pytest.mark.slow
def test_fused_loss_at_full_vocabulary_takes_a_quarter_of_the_memory_and_gives_the_same_gradients():
    done = run_script("exps/bench/loss.py", "--device=cpu", "--repeats=1")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert {"bench", "device", "versions", "ours", "baseline", "ratio"} <= summary.keys()
    assert summary["ratio"]["peak_memory"] < 1 / 4
    assert max(summary["relative_error"].values()) < 1e-6
    assert summary["ratio"]["time"] == pytest.approx(summary["ours"]["seconds"] / summary["baseline"]["seconds"])
