"""Runs that are told to end: they save, say how to go on, and go on as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from data.dataset import TokenDataset
from data.record import read_record, write_merged
from model import stop_signal
from model.stop_signal import SIGNALS, StopSignal, requeue_on_slurm
from tests.small_run import ROOT, call_main, command, environment, losses, solver_args, train
from tests.test_launch import descendants


@pytest.fixture(scope="module")
def undisturbed(small_task, tmp_path_factory):
    """Losses of four epochs by step, with dropout."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    train(0, solver_args(small_task, out, **CHANGES))
    return losses(out)


CHANGES = {"epochs": 4, "dropout": 0.1, "num_workers": 1}


def test_the_first_signal_is_noted_and_what_comes_with_it_is_the_same_request():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.counts() == (0, 0)
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGUSR1 and stop.counts() == (0, 1)
    assert signal.getsignal(signal.SIGTERM) == before


SLOW_TO_END = """
import time
from data.dataset import TokenDataset
from data.record import read_record, write_merged
from model import stop_signal
from model.stop_signal import StopSignal
import model.stop_signal
model.stop_signal.SAME_REQUEST_S = 0.5
with StopSignal() as stop:
    print("ready", flush=True)
    while stop.number is None:
        time.sleep(0.01)
    print("noted", flush=True)
    time.sleep(60)
"""


def test_a_second_signal_ends_at_once():
    process = subprocess.Popen([sys.executable, "-c", SLOW_TO_END], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.stdout.readline() == "noted\n"
    time.sleep(0.6)
    process.terminate()
    assert process.wait(timeout=10) == -signal.SIGTERM


def stop_when(num_ranks: int, args: list[str], out, number: int, step: int, to_group=False, stalls_loader=False):
    """Starts a run and sends a signal to what was started, or to all of its processes, once a step is logged; the
    loader of one rank stands still by then where it shall."""
    process = subprocess.Popen(
        command(num_ranks, args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        start_new_session=True,
    )  # fmt: skip
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    if stalls_loader:
        loader = next(pid for pid in descendants(process.pid) if not descendants(pid))
        os.kill(loader, signal.SIGSTOP)
        time.sleep(3)  # until the rows that it has sent are used up
    (os.killpg if to_group else os.kill)(process.pid, number)
    process.wait(timeout=60)
    if stalls_loader:
        os.kill(loader, signal.SIGKILL)
    printed, said = process.communicate()
    return process.returncode, printed + said


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_that_is_told_to_end_saves_and_goes_on_the_same(small_task, tmp_path, undisturbed, number):
    out = tmp_path / "out"
    code, said = stop_when(0, solver_args(small_task, out, **CHANGES), out, number, step=5, to_group=True)
    assert code == 128 + number, said
    assert f"ended by {signal.Signals(number).name} after step" in said and "the same command resumes from here" in said
    assert "Traceback" not in said
    assert 5 <= max(losses(out)) < max(undisturbed)
    assert f"-iter{max(losses(out)) % 12 or 12}" in " ".join(path.name for path in out.glob("epoch*")) or (
        max(losses(out)) % 12 == 0
    )
    train(0, solver_args(small_task, out, **CHANGES))
    assert losses(out) == undisturbed


@pytest.mark.slow
def test_all_ranks_end_after_the_same_step(small_task, tmp_path):
    out = tmp_path / "out"
    args = solver_args(small_task, out, **CHANGES, batch_size=1)
    code, said = stop_when(2, args, out, signal.SIGTERM, step=3)
    assert code != 0 and said.count("ended by SIGTERM after step") == 1, said
    assert "resuming from" in train(2, args)


@pytest.mark.parametrize("validates", [False, True])
def test_a_run_that_waits_for_rows_ends_by_sigterm(small_task, tmp_path, monkeypatch, validates):
    """A disk that hangs: the worker waits for ever, and so would the rank."""
    monkeypatch.setattr(stop_signal, "ROWS_GRACE_S", 0.2)
    original, rank = TokenDataset.read, os.getpid()

    def read(dataset: TokenDataset, index: int, *rest: object):
        if os.getpid() != rank and len(dataset) == (12 if validates else 24):
            os.kill(rank, signal.SIGTERM)
            time.sleep(1000)
        return original(dataset, index, *rest)

    monkeypatch.setattr(TokenDataset, "read", read)
    entries = [replace(entry, file=str(small_task / entry.file)) for entry in read_record(small_task / "record.json")]
    write_merged(entries[:12], tmp_path / "val.json")
    (tmp_path / "val.yaml").write_text("META:\n  - path: val.json\n")
    changes = {"num_workers": 2, "val_data_config": tmp_path / "val.yaml", "val_interval": 1}
    code, said = call_main(solver_args(small_task, tmp_path / "out", **changes))
    assert code == 143 and said.count("ended by SIGTERM without saving, for no row came") == 1, said


@pytest.mark.slow
def test_all_ranks_end_where_one_waits_for_rows(small_task, tmp_path):
    out = tmp_path / "out"
    # One long epoch: each epoch has a loader of its own.
    (tmp_path / "many.yaml").write_text(f"META:\n  - path: {small_task / 'record.json'}\n    ratio: 400\n")
    args = solver_args(small_task, out, **CHANGES, data_config=tmp_path / "many.yaml", save_iteration_interval=0)
    code, said = stop_when(2, args, out, signal.SIGTERM, step=3, stalls_loader=True)
    assert code != 0 and said.count("without saving, for no row came") == 1, said


def test_a_run_on_slurm_requeues_itself(tmp_path, monkeypatch):
    assert requeue_on_slurm({}) is None
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\nexit $(cat {tmp_path}/code)\n')
    scontrol.chmod(0o755)
    (tmp_path / "code").write_text("0")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert requeue_on_slurm({"SLURM_JOB_ID": "17"}) == "job 17 is requeued"
    assert (tmp_path / "called").read_text() == "requeue 17\n"
    (tmp_path / "code").write_text("1")
    assert requeue_on_slurm({"SLURM_JOB_ID": "17"}) == "job 17 could not be requeued: exit code 1"


def test_the_first_step_is_saved(small_task, tmp_path):
    assert call_main(solver_args(small_task, tmp_path / "out", max_steps=2, ckpt_max_keep=0)) == (0, "")
    assert {path.name for path in (tmp_path / "out").glob("epoch*")} == {"epoch0-iter1", "epoch0-iter2"}
    state = json.loads((tmp_path / "out" / "epoch0-iter1" / "trainer_state.json").read_text())
    assert state["position"]["global_step"] == 1
