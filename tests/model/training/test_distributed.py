"""Launchers and their variables, errors before the ranks have joined, and two real ranks as SLURM starts them."""

import os
import select
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from model.training import distributed
from model.training.distributed import (
    Launch,
    choose_device,
    detect_launch,
    die_with_launcher,
    find_shared_gpu,
    first_host,
    process_group,
    stop_at_start,
)
from tests.helpers import forked
from tests.helpers.small_run import call_main, command, environment, losses, solver_args

SLURM = {
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}
TWO_RANKS = {"world_size": 2, "local_world_size": 2}


def test_launchers():
    assert detect_launch({}) == Launch() and Launch().is_main
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    launch = detect_launch(env | {"MASTER_ADDR": "host", "MASTER_PORT": "123"})
    assert launch == Launch("torchrun", 5, 8, 1, 4, "host", 123)
    launch = detect_launch(SLURM)
    assert launch == Launch("srun", 9, 16, 1, 8, "gpu07", launch.master_port)
    assert 1024 < launch.master_port < 32768
    other = detect_launch(SLURM | {"SLURM_STEP_ID": "1"})
    assert other.master_port != launch.master_port, "two steps of a job may share a node"
    in_batch_script = {name: SLURM[name] for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_ID")}
    assert detect_launch(in_batch_script) == Launch()
    in_salloc_shell = SLURM | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert detect_launch(in_salloc_shell) == detect_launch(SLURM | {"SLURM_NTASKS": "1"}) == Launch()
    assert detect_launch(SLURM | {"SLURM_STEP_NUM_TASKS": "16"}) == launch


def test_first_host():
    nodes = {"gpu[003-005,9],cpu1": "gpu003", "a-1": "a-1", "node7,node9": "node7", "rack[2,4]": "rack2"}
    assert {name: first_host(name) for name in nodes} == nodes


def test_rank_0_prints_an_error_at_once(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(distributed.time, "sleep", waited.append)
    assert stop_at_start(Launch(), "no such file") == 2
    assert capsys.readouterr().err == "no such file\n" and not waited
    assert stop_at_start(Launch("torchrun", rank=1, world_size=2), "no such file") == 2
    assert capsys.readouterr().err == "rank 1 alone: no such file\n" and waited == [distributed.GRACE_S]


@pytest.fixture
def gpus(monkeypatch):
    """Sets how many GPUs torch sees."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def see(number: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)

    return see


def test_devices(gpus, monkeypatch):
    second = {"rank": 1, "local_rank": 1, **TWO_RANKS}
    gpus(2)
    assert choose_device("auto", Launch("torchrun", **second)) == torch.device("cuda", 1)
    assert choose_device("cuda", Launch()) == torch.device("cuda", 0)
    assert choose_device("cpu", Launch()) == torch.device("cpu")
    gpus(1)
    with pytest.raises(ValueError, match="^2 ranks share 1 GPU: start one rank per GPU, or give --device cpu$"):
        choose_device("auto", Launch("torchrun", **TWO_RANKS))
    # Each rank may see a GPU of its own.
    assert choose_device("auto", Launch("srun", **second)) == torch.device("cuda", 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert choose_device("auto", Launch("torchrun", **second)) == torch.device("cuda", 0)
    gpus(0)
    assert choose_device("auto", Launch("torchrun", **TWO_RANKS)) == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda: torch sees no CUDA device here"):
        choose_device("cuda", Launch())


def test_ranks_that_share_a_gpu_are_found(monkeypatch):
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    for others, problem in ((["GPU-2"], None), (["GPU-1"], "2 ranks share 1 GPU: ")):
        monkeypatch.setattr(distributed, "gather_lists", lambda values, others=others: values + others)
        found = find_shared_gpu(torch.device("cuda", 0))
        assert found is problem or found.startswith(problem)
    assert find_shared_gpu(torch.device("cpu")) is None


def test_a_lone_rank_of_srun_prints_what_it_waits_for_and_ends_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "SLOW_MEETING_S", 0.2)
    port = 20000 + os.getpid() % 10000
    with pytest.raises(SystemExit) as end, process_group(Launch("srun", master_port=port, **TWO_RANKS), "cpu", 1):
        pass
    printed, message = capsys.readouterr().err, end.value.code
    assert printed.startswith(f"rank 0 waits for other ranks at 127.0.0.1:{port}; SLURM_NTASKS says that there are 2")
    assert message.startswith(f"rank 0 cannot join the other ranks at 127.0.0.1:{port}: ")
    assert message.endswith("start the command with SLURM_NTASKS=1") and "\n" not in message


def test_ctrl_c_ends_a_rank_that_waits_for_others(monkeypatch):
    monkeypatch.setattr(distributed, "SLOW_MEETING_S", 0.2)
    launch = Launch("srun", master_port=20000 + os.getpid() % 10000, **TWO_RANKS)
    monkeypatch.setattr(distributed, "die_with_launcher", lambda launch: None)
    reader, writer = os.pipe()
    rank = os.fork()
    if rank == 0:
        sys.stderr = os.fdopen(writer, "w")
        with process_group(launch, "cpu", 30):
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as printed:
        assert printed.readline().startswith("rank 0 waits for other ranks")
        os.kill(rank, signal.SIGINT)
        assert os.WTERMSIG(os.waitpid(rank, 0)[1]) == signal.SIGINT


def test_a_rank_dies_with_its_launcher():
    """Forked: a launcher, which forks a rank. SIGKILL gives the launcher no chance to end its rank."""
    reader, writer = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        if os.fork() == 0:
            die_with_launcher(Launch("torchrun", 0, 2))
            os.write(writer, b"x")
        signal.pause()
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    # The pipe ends once no process has its other end.
    assert select.select([reader], [], [], 10)[0] and os.read(reader, 1) == b""
    os.close(reader)


@pytest.mark.slow
def test_ranks_join_by_slurms_variables(small_task, tmp_path):
    step = SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"}
    step["SLURM_JOB_ID"] = str(os.getpid())
    arguments = command(0, solver_args(small_task, tmp_path / "out", max_steps=3))
    ranks = []
    for rank in ("0", "1"):
        env = environment() | step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        ranks.append(forked.Popen(arguments, env))
    printed = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    # One process with the same rows in a step.
    assert call_main(solver_args(small_task, tmp_path / "alone", max_steps=3, accum_iter=2)) == (0, "")
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
