"""Runs that get SIGTERM or SIGUSR1: they save, and the same command resumes them."""

import errno
import multiprocessing
import os
import signal
import time

from data.epoch.dataset import TokenDataset
from model.run import stop_signal
from model.run.stop_signal import StopSignal, requeue_on_slurm
from tests.helpers.small_run import call_main, losses, solver_args


def test_signals_that_come_together_are_one_request_and_a_later_one_ends_the_process(monkeypatch):
    before, sent = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(stop_signal.os, "kill", lambda pid, number: sent.append((pid, number)))
    with StopSignal() as stop:
        assert stop.counts() == (0, 0)
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGUSR1 and stop.counts() == (0, 1) and not sent
        monkeypatch.setattr(stop_signal, "SAME_REQUEST_S", 0.0)
        signal.raise_signal(signal.SIGTERM)
        assert sent == [(os.getpid(), signal.SIGTERM)] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_saves_after_a_signal_and_resumes_with_the_same_losses(small_task, trained, tmp_path, monkeypatch):
    read, read_items, args = TokenDataset.read, [], solver_args(small_task, tmp_path / "out", max_steps=8)

    def read_and_signal(dataset: TokenDataset, index: int, *rest: object):
        read_items.append(index)
        if len(read_items) == 10:
            signal.raise_signal(signal.SIGUSR1)
        return read(dataset, index, *rest)

    monkeypatch.setattr(TokenDataset, "read", read_and_signal)
    code, message = call_main(args)
    steps = max(losses(tmp_path / "out"))
    assert code == 138 and 3 < steps < 8
    assert f"ended by SIGUSR1 after step {steps}, saved; the same command" in message
    assert (tmp_path / "out" / f"epoch0-iter{steps}").is_dir()
    assert call_main(args) == (0, "")
    assert losses(tmp_path / "out") == {step: loss for step, loss in losses(trained).items() if step <= 8}


def test_a_run_that_waits_for_rows_ends_by_sigterm(small_task, tmp_path, monkeypatch):
    """A disk that hangs: the loader worker waits forever, and so would the rank."""
    monkeypatch.setattr(stop_signal, "ROWS_GRACE_S", 0.2)
    read, rank = TokenDataset.read, os.getpid()

    def hang_in_worker(dataset: TokenDataset, index: int, *rest: object):
        if os.getpid() != rank:
            os.kill(rank, signal.SIGTERM)
            time.sleep(1000)
        return read(dataset, index, *rest)

    monkeypatch.setattr(TokenDataset, "read", hang_in_worker)
    code, message = call_main(solver_args(small_task, tmp_path / "out", num_workers=1))
    assert code == 143 and message.count("ended by SIGTERM without saving: no row came") == 1, message


def test_a_loader_that_cannot_start_or_dies_ends_the_run_with_one_line(small_task, tmp_path, monkeypatch):
    """/dev/shm without room for semaphores, and a worker that the kernel kills for memory."""
    read, rank, semaphore = TokenDataset.read, os.getpid(), multiprocessing.Semaphore

    def die_in_worker(dataset: TokenDataset, index: int, *rest: object):
        if os.getpid() != rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(dataset, index, *rest)

    def no_room():
        raise OSError(errno.ENOSPC, "No space left on device")

    args = solver_args(small_task, tmp_path / "out", num_workers=1)
    monkeypatch.setattr(multiprocessing, "Semaphore", no_room)
    code, message = call_main(args)
    monkeypatch.setattr(multiprocessing, "Semaphore", semaphore)
    monkeypatch.setattr(TokenDataset, "read", die_in_worker)
    assert code == 1 and "rank 0: no DataLoader worker can start: No space left on device (/dev/shm); give" in message
    code, message = call_main(args)
    assert code == 1 and "rank 0: DataLoader worker (pid" in message and message.count("\n") == 1


def test_a_run_on_slurm_requeues_itself(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert requeue_on_slurm() is None
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\nexit $(cat {tmp_path}/code)\n')
    scontrol.chmod(0o755)
    (tmp_path / "code").write_text("0")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert requeue_on_slurm() == "job 17 is requeued"
    assert (tmp_path / "called").read_text() == "requeue 17\n"
    (tmp_path / "code").write_text("1")
    assert requeue_on_slurm() == "job 17 could not be requeued: exit code 1"
