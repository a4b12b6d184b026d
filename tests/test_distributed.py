"""Who a process is, in the environments of the launchers, and how it stops before the ranks have met."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model import distributed
from model.distributed import (
    Launch,
    choose_device,
    detect_launch,
    find_shared_gpu,
    first_host,
    process_group,
    stop_at_start,
)

ROOT = Path(__file__).parents[1]


def test_plain_python_is_alone():
    assert detect_launch({}) == Launch() and Launch().is_main


def test_torchrun():
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    launch = detect_launch(env | {"MASTER_ADDR": "host", "MASTER_PORT": "123"})
    assert launch == Launch("torchrun", 5, 8, 1, 4, "host", 123)


SLURM = {
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}


def test_srun():
    launch = detect_launch(SLURM)
    assert (launch.launcher, launch.rank, launch.world_size, launch.local_rank) == ("srun", 9, 16, 1)
    assert (launch.local_world_size, launch.master_addr) == (8, "gpu07")
    assert 1024 < launch.master_port < 32768
    other = detect_launch(SLURM | {"SLURM_STEP_ID": "1"})
    assert other.master_port != launch.master_port, "two steps of a job may share a node"


def test_python_inside_a_batch_script_is_alone():
    assert detect_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "1"}).world_size == 1


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [("gpu[003-005,9],cpu1", "gpu003"), ("a-1", "a-1"), ("node7,node9", "node7"), ("rack[2,4]", "rack2")],
)
def test_first_host(nodes, expected):
    assert first_host(nodes) == expected


def test_only_rank_0_speaks_at_once(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(distributed.time, "sleep", waited.append)
    assert stop_at_start(Launch(), "no such file") == 2
    assert capsys.readouterr().err == "no such file\n" and not waited
    assert stop_at_start(Launch("torchrun", rank=1, world_size=2), "no such file") == 2
    assert capsys.readouterr().err == "rank 1 alone: no such file\n" and waited == [distributed.GRACE_S]


TWO_RANKS = {"world_size": 2, "local_world_size": 2}


@pytest.fixture
def gpus(monkeypatch):
    """Sets how many GPUs torch sees."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def see(number: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)

    return see


def test_each_rank_of_a_node_has_a_gpu(gpus):
    gpus(2)
    devices = [choose_device("auto", Launch("torchrun", rank, local_rank=rank, **TWO_RANKS)) for rank in range(2)]
    assert devices == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert choose_device("cuda", Launch()) == torch.device("cuda", 0)
    assert choose_device("cpu", Launch()) == torch.device("cpu")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_more_ranks_than_gpus_are_told_before_any_rank_waits(gpus, name):
    gpus(1)
    with pytest.raises(ValueError, match="^2 ranks share 1 GPU: start one rank per GPU, or give --device cpu$"):
        choose_device(name, Launch("torchrun", **TWO_RANKS))
    gpus(3)
    with pytest.raises(ValueError, match="4 ranks share 3 GPUs"):
        choose_device(name, Launch("srun", world_size=4, local_world_size=4))


def test_a_task_that_sees_one_gpu_uses_that_one(gpus, monkeypatch):
    gpus(1)
    second = {"rank": 1, "local_rank": 1, **TWO_RANKS}
    assert choose_device("auto", Launch("srun", **second)) == torch.device("cuda", 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert choose_device("auto", Launch("torchrun", **second)) == torch.device("cuda", 0)


def test_ranks_that_were_given_the_same_gpu_are_told(monkeypatch):
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    for others, problem in ((["GPU-2"], None), (["GPU-1"], "2 ranks share 1 GPU: ")):
        monkeypatch.setattr(distributed, "gather_lists", lambda values, others=others: values + others)
        found = find_shared_gpu(torch.device("cuda", 0))
        assert found is problem or found.startswith(problem)
    assert find_shared_gpu(torch.device("cpu")) is None


def test_no_gpu_means_the_cpu(gpus):
    gpus(0)
    assert choose_device("auto", Launch("torchrun", **TWO_RANKS)) == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda: torch sees no CUDA device here"):
        choose_device("cuda", Launch())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_srun_says_whom_it_waits_for_and_ends_with_one_line(monkeypatch, capsys, rank):
    monkeypatch.setattr(distributed, "SLOW_MEETING_S", 0.2)
    port = 20000 + os.getpid() % 10000 + rank
    launch = Launch("srun", rank, master_port=port, **TWO_RANKS)
    advice = "SLURM_NTASKS says that there are 2; to run alone, as in `srun --pty bash`, begin the command with SLURM_"
    with pytest.raises(SystemExit) as end, process_group(launch, "cpu", timeout_s=1):
        pass
    said = capsys.readouterr().err
    missing = "for 1 of 2 ranks, first rank 1"
    if rank == 0:
        assert said.startswith(f"rank 0 waits at 127.0.0.1:{port} {missing}; {advice}") and said.count("\n") == 1
        assert end.value.code.startswith(f"rank 0 waited 1 s at 127.0.0.1:{port} {missing}; {advice}")
    else:
        assert said.startswith(f"rank 1 waits for rank 0 at 127.0.0.1:{port}; {advice}")
        assert end.value.code.startswith(f"rank 1 cannot join the other ranks at 127.0.0.1:{port}: ")
    assert "\n" not in end.value.code


def test_rank_dies_with_its_launcher(tmp_path):
    """A launcher killed by SIGKILL cannot end its ranks: Linux does."""
    rank = textwrap.dedent(
        f"""
        import os, time, pathlib
        from model.distributed import Launch, die_with_launcher
        die_with_launcher(Launch("torchrun", 0, 2))
        for tick in range(3000):
            pathlib.Path({str(tmp_path / "alive")!r}).write_text(str(tick))
            time.sleep(0.01)
        """
    )
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    alive = tmp_path / "alive"
    deadline = time.monotonic() + 60
    while not alive.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    time.sleep(0.2)
    before = alive.read_text()
    time.sleep(0.3)
    assert alive.read_text() == before
