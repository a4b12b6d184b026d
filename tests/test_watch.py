"""Looking into a run: real traces of the steps asked for, and the stacks of real ranks of which one is stuck."""

import gzip
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from small_run import call_main, command, environment, losses, solver_args, train

import finetune_solver
from model import run_start
from model.async_checkpoint import CheckpointSaver
from model.watch import HangWatch, WatchOptions, describe_place
from tests import forked


def steps_in(trace: Path) -> int:
    """Optimizer steps that a trace holds."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return len({event["ts"] for event in events if event.get("name", "").startswith("Optimizer.step#AdamW.step")})


def test_profile_writes_a_trace_of_these_steps(small_task, trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert call_main(solver_args(small_task, out, max_steps=6, profile="3:5")) == (0, "")
    (trace,) = (out / "profile").iterdir()
    assert f"{trace} is the profile of rank 0" in capsys.readouterr().out
    assert trace.name == "rank0-steps3-5.json.gz" and steps_in(trace) == 3
    assert losses(out).items() <= losses(trained).items() and not (trained / "profile").exists()


@pytest.mark.slow
def test_profile_from_the_first_step_on_and_of_a_run_that_ends_before(small_task, tmp_path):
    assert call_main(solver_args(small_task, tmp_path / "out", max_steps=2, profile="1:9")) == (0, "")
    (trace,) = (tmp_path / "out" / "profile").iterdir()
    assert trace.name == "rank0-steps1-2.json.gz" and steps_in(trace) == 2


@pytest.mark.parametrize("steps", ["4:9", "3:3"])
def test_a_profile_of_steps_that_never_come_is_told(small_task, tmp_path, capsys, steps):
    """The run ends two steps before the first, or with the one before it, which is recorded and thrown away."""
    assert call_main(solver_args(small_task, tmp_path / "out", max_steps=2, profile=steps)) == (0, "")
    start, end = steps.split(":")
    assert f"no profile: this run took no step from {start} to {end}\n" in capsys.readouterr().out
    assert not (tmp_path / "out" / "profile").exists()


def test_a_profile_that_cannot_be_written_does_not_end_the_training(small_task, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "profile").write_text("no folder")
    assert call_main(solver_args(small_task, tmp_path / "out", max_steps=4, profile="2:2")) == (0, "")
    assert "no profile, training goes on: " in capsys.readouterr().out and len(losses(tmp_path / "out")) == 4


@pytest.mark.slow
def test_every_rank_writes_its_profile(small_task, tmp_path):
    train(2, solver_args(small_task, tmp_path / "out", max_steps=3, profile="2:2"))
    traces = sorted((tmp_path / "out" / "profile").iterdir())
    assert [trace.name for trace in traces] == ["rank0-steps2-2.json.gz", "rank1-steps2-2.json.gz"]
    assert [steps_in(trace) for trace in traces] == [1, 1]


@pytest.mark.parametrize("value", ["3", "0:2", "5:3", "a:b", "1:2:3", ""])
def test_bad_values_are_told_before_anything_starts(small_task, tmp_path, value):
    code, message = call_main(solver_args(small_task, tmp_path / "out", profile=value, hang_timeout_s=-1))
    assert code == 2 and "--profile must be START:END" in message and f"got {value!r}; for example 10:12" in message
    assert "--hang_timeout_s must not be negative, got -1" in message
    assert not (tmp_path / "out").exists()
    assert list(WatchOptions("3:5").profiled_steps) == [3, 4, 5]


# A step that does not end


def test_a_step_in_time_leaves_nothing_and_a_late_one_is_told_once(tmp_path, capfd):
    watch = HangWatch(0.4, tmp_path, rank=3)
    for number in range(1, 6):
        watch.expect(f"step {number}")
        time.sleep(0.1)
    watch.rest()
    time.sleep(0.8)
    assert not any(tmp_path.iterdir()), "five steps in time, then a rest as long as it likes"
    watch.expect("step 6")
    time.sleep(1.2)
    watch.close()
    told = (tmp_path / "hang-rank3.txt").read_text()
    assert told.count("rank 3: step 6 has not ended within 0.4 s; it is at tests/test_watch.py:") == 1
    assert "test_a_step_in_time_leaves_nothing_and_a_late_one_is_told_once" in told and "hang watch" not in told
    assert told.count("most recent call first") >= 2, "the stacks of all threads"
    said = capfd.readouterr().err
    assert said.count("step 6 has not ended") == 1 and "most recent call first" in said
    assert "hang watch" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.slow
def test_a_start_that_does_not_end_is_told(small_task, tmp_path, monkeypatch):
    load = run_start.load_checkpoint_weights

    def load_slowly(*arguments):
        time.sleep(1)
        load(*arguments)

    monkeypatch.setattr(run_start, "load_checkpoint_weights", load_slowly)
    monkeypatch.setattr(finetune_solver, "PATIENCE", 1)
    args = solver_args(small_task, tmp_path / "out", max_steps=1, hang_timeout_s=0.4)
    assert call_main(args) == (0, "")
    told = (tmp_path / "out" / "hang-rank0.txt").read_text()
    assert "rank 0: building the model and loading its weights has not ended within 0.4 s" in told
    assert "load_slowly" in told and "hang watch" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.slow
def test_python_that_stands_still_is_told_too(tmp_path):
    """The whole process is kept from running Python by a call that does not let go of the interpreter."""
    code = f"""
import ctypes, model.watch
model.watch.GRACE_S = 0.5
from pathlib import Path
watch = model.watch.HangWatch(0.5, Path({str(tmp_path)!r}), 0)
watch.expect("step 1")
import time; time.sleep(0.2)
ctypes.PyDLL(None).sleep(2)
import os; os._exit(0)
"""
    done = forked.run([sys.executable, "-c", code], environment())
    assert done.returncode == 0 and "Timeout (0:00:01)!" in done.stderr and 'File "<string>"' in done.stderr


def test_a_timeout_of_0_starts_no_thread(tmp_path):
    watch = HangWatch(0, tmp_path, rank=0)
    watch.expect("step 1")
    assert "hang watch" not in {thread.name for thread in threading.enumerate()}
    watch.close()


def test_the_place_is_that_in_the_project():
    frame = sys._getframe()
    assert describe_place(frame) == f"at tests/test_watch.py:{frame.f_lineno} {frame.f_code.co_name}()"
    assert describe_place(None) == "outside of this project's code"


def children(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):  # ended meanwhile
                continue
            found += [int(folder.name)] if parent == pid else []
    return found


def wait_until(is_true, process, what: str, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert process.poll() is None and time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_all_ranks_tell_where_they_are_when_one_is_stuck(small_task, tmp_path):
    """The loader worker of rank 1 is stopped: both ranks write their stacks, and go on once it runs again."""
    out = tmp_path / "out"
    (tmp_path / "data.yaml").write_text(f"META:\n  - path: {small_task}/record.json\n    ratio: 400\n")
    changes = {"data_config": tmp_path / "data.yaml", "batch_size": 1, "num_workers": 1, "hang_timeout_s": 5}
    process = forked.Popen(command(2, solver_args(small_task, out, **changes)), environment())
    stopped = []
    try:
        metrics, told = out / "metrics.jsonl", [out / f"hang-rank{rank}.txt" for rank in (0, 1)]
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 5, process, "a step")
        stopped = children(sorted(children(process.pid))[1])  # ranks are started one after the other
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: all(path.exists() and "Thread 0x" in path.read_text() for path in told), process, "a dump")
        num_lines = metrics.read_text().count("\n")
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: metrics.read_text().count("\n") > num_lines + 5, process, "the step after the stop")
    finally:
        process.kill()
        process.wait()
        for pid in stopped:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    waiting, stuck = (path.read_text() for path in told)
    assert "rank 0: step " in waiting and "at model/distributed.py:" in waiting and "all_reduce" in waiting
    assert "rank 1: step " in stuck and "at data/rows.py:" in stuck
    assert process.stderr.read_text().count("has not ended within 5 s") == 2


@pytest.mark.slow
def test_a_checkpoint_that_does_not_end_is_told_too(small_task, tmp_path, monkeypatch):
    plain_wait = CheckpointSaver.wait

    def slow_wait(self):
        time.sleep(4)
        plain_wait(self)

    monkeypatch.setattr(CheckpointSaver, "wait", slow_wait)
    out = tmp_path / "out"
    args = solver_args(small_task, out, max_steps=1, save_iteration_interval=0, hang_timeout_s=0.6)
    assert call_main(args)[0] == 0
    assert "has not ended within 2.4 s" in (told := (out / "hang-rank0.txt").read_text()) and "checkpoint" in told
    assert "slow_wait" in told
