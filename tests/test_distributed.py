"""Who a process is, in the environments of the launchers, and how it stops before the ranks have met."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from model import distributed
from model.distributed import Launch, detect_launch, first_host, stop_at_start

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
