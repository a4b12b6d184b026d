"""Runs whose whole process tree is killed at random moments, and started again by the same command."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests import forked
from tests.small_run import command, environment, losses, solver_args, train
from tests.test_launch import descendants

NUM_KILLS = int(os.environ.get("TRAINING_KILLS", "1"))


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all below it, while it can start no more."""
    os.kill(pid, signal.SIGSTOP)
    for each in [pid, *descendants(pid)]:
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue


def last_step(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


@pytest.mark.slow
def test_a_run_killed_at_random_moments_has_the_losses_of_an_undisturbed_one(small_task, tmp_path):
    changes = {
        "epochs": 2 + NUM_KILLS, "batch_size": 1, "dropout": 0.1, "num_workers": 1, "save_iteration_interval": 3,
        "precision": "bf16",
    }  # fmt: skip
    train(2, solver_args(small_task, tmp_path / "calm", **changes))
    calm, out = losses(tmp_path / "calm"), tmp_path / "out"
    args, rng = solver_args(small_task, out, **changes), random.Random(time.time_ns())
    killed, is_over = 0, False
    while killed < NUM_KILLS and not is_over:
        run = forked.Popen(command(2, args), environment())
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0, 2))  # while it starts, goes on, or trains
        else:
            wanted = last_step(out) + rng.randint(1, 12)
            while run.poll() is None and last_step(out) < wanted:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.1))  # in a step, or while a checkpoint is written
        is_over = run.poll() is not None
        if not is_over:
            kill_tree(run.pid)
            killed += 1
        run.wait()
    assert killed >= NUM_KILLS / 2, "the run was over too soon"
    train(2, args)
    assert losses(out) == calm
    assert not list(out.glob(".saving-*")) and not list(out.glob(".replaced-*"))
