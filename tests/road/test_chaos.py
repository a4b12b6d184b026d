"""Two ranks get SIGTERM, SIGKILL in a step, and SIGKILL in a save; each time the same command resumes the run."""

import os
import signal
import time

import pytest

from tests.helpers import forked
from tests.helpers.small_run import command, environment, losses, solver_args, train


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_has_the_losses_of_an_undisturbed_one(small_task, tmp_path):
    changes = {"epochs": 4, "batch_size": 1, "dropout": 0.1, "num_workers": 1, "precision": "bf16"}
    out, args = tmp_path / "out", solver_args(small_task, tmp_path / "out", save_iteration_interval=3, **changes)

    def num_lines() -> int:
        metrics = out / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def run_until(is_time) -> forked.Popen:
        run = forked.Popen(command(2, args), environment(), start_new_session=True)
        while not is_time():
            assert run.poll() is None, run.stderr.read_text()
            time.sleep(0.001)
        return run

    def kill_all(run: forked.Popen) -> None:
        """SIGKILL to the launcher, its ranks and their loader workers at once."""
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()

    run = run_until(lambda: num_lines() >= 3)
    run.terminate()
    assert run.wait(timeout=60) != 0
    assert run.stderr.read_text().count("ended by SIGTERM after step") == 1, run.stderr.read_text()
    steps = num_lines()
    assert 3 <= steps < 12 and (out / f"epoch0-iter{steps}").is_dir()

    kill_all(run_until(lambda: num_lines() >= steps + 5 and not list(out.glob(".saving-*"))))
    kill_all(run_until(lambda: list(out.glob(".saving-epoch2*/*"))))
    assert list(out.glob(".saving-epoch2*"))
    train(2, args)
    assert not list(out.glob(".saving-*")) and not list(out.glob(".replaced-*"))
    train(2, solver_args(small_task, tmp_path / "undisturbed", **changes))
    assert losses(out) == losses(tmp_path / "undisturbed")
