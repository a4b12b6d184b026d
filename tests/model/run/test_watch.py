"""Profiles of optimizer steps, and the stacks of a step that does not end."""

import gzip
import json
import time

import pytest

from data.epoch.dataset import TokenDataset
from model.run.watch import HangWatch, WatchOptions, profiling
from tests.helpers.small_run import call_main, losses, solver_args


def test_profile_has_the_chosen_steps_also_of_a_resumed_run_and_changes_no_loss(small_task, trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert call_main(solver_args(small_task, out, max_steps=1, profile="3:5")) == (0, "")
    assert "no profile: this run took no step from 3 to 5\n" in capsys.readouterr().out
    assert call_main(solver_args(small_task, out, max_steps=6, profile="3:5")) == (0, "")
    trace = out / "profile" / "rank0-steps3-5.json.gz"
    assert f"the profile is in {trace}" in capsys.readouterr().out
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {event["ts"] for event in events if event.get("name", "").startswith("Optimizer.step#AdamW.step")}
    assert len(steps) == 3
    assert losses(out).items() <= losses(trained).items()


@pytest.mark.parametrize("value", ["3", "0:2", "5:3", "a:b", "1:2:3", ""])
def test_bad_values_are_problems(value):
    (problem,) = WatchOptions(profile=value).problems()
    assert problem.startswith("--profile must be START:END") and f"got {value!r}; for example 10:12" in problem
    assert list(WatchOptions("3:5").profiled_steps) == [3, 4, 5]


def test_only_a_late_step_writes_stacks(tmp_path, capsys):
    for timeout_s, is_stopped in ((0, False), (60, False), (0.3, True), (0.3, False)):
        assert not any(tmp_path.iterdir())
        watch = HangWatch(timeout_s, tmp_path, rank=3)
        watch.restart()
        if is_stopped:
            watch.stop()
        time.sleep(0.6)
        watch.close()
    written = (tmp_path / "hang-rank3.txt").read_text()
    said = capsys.readouterr().err
    assert said.startswith("rank 3: a step took 0.") and said.endswith(f"in {tmp_path}/hang-rank3.txt\n")
    assert "most recent call first" in written and "test_only_a_late_step_writes_stacks" in written


def test_a_folder_that_cannot_be_written_ends_no_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    HangWatch(0.1, tmp_path / "file", rank=3).close()
    assert "warning: no step of rank 3 is watched: " in capsys.readouterr().err
    said = []
    with profiling(range(2, 3), 0, tmp_path / "file", 0, said.append) as step:
        step()
        step()
    assert said[0].startswith("warning: the profile cannot be written to ")


def test_stacks_show_where_a_run_hangs(small_task, tmp_path, monkeypatch):
    read = TokenDataset.read
    read_items = []

    def read_slowly(dataset: TokenDataset, index: int, *rest: object):
        read_items.append(index)
        if len(read_items) == 5:
            time.sleep(1.5)
        return read(dataset, index, *rest)

    monkeypatch.setattr(TokenDataset, "read", read_slowly)
    assert call_main(solver_args(small_task, tmp_path / "out", max_steps=4, hang_timeout_s=0.7))[0] == 0
    assert "in read_slowly\n" in (tmp_path / "out" / "hang-rank0.txt").read_text()
