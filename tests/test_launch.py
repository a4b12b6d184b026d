"""Real launches: SLURM's variables, two nodes in two network namespaces, a rank that fails."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.small_run import SOLVER, command, environment, losses, solver_args, train

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


@pytest.fixture(scope="module")
def by_torchrun(small_task, tmp_path_factory):
    """Losses of two ranks, three steps."""
    out = tmp_path_factory.mktemp("torchrun") / "out"
    train(2, solver_args(small_task, out, max_steps=3))
    return losses(out)


@pytest.mark.slow
def test_ranks_find_each_other_by_slurms_variables(small_task, tmp_path, by_torchrun):
    shared = {
        "SLURM_STEP_ID": "0", "SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            command(0, solver_args(small_task, tmp_path / "out", max_steps=3)), **PIPES,
            env=environment() | shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert losses(tmp_path / "out") == by_torchrun


@contextlib.contextmanager
def two_namespaces():
    """Two network namespaces joined by a cable, as (name, interface, address); skips where they cannot be had."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the ip command")
    nodes = [(f"node{x}{os.getpid()}", f"eth{x}{os.getpid() % 10000}", f"10.77.0.{x}") for x in (1, 2)]
    (first, cable, _), (second, other_end, _) = nodes
    setup = [
        f"ip netns add {first}",
        f"ip netns add {second}",
        f"ip link add {cable} type veth peer name {other_end}",
        *(f"ip link set {interface} netns {name}" for name, interface, _ in nodes),
        *(f"ip -n {name} addr add {address}/24 dev {interface}" for name, interface, address in nodes),
        *(f"ip -n {name} link set {device} up" for name, interface, _ in nodes for device in ("lo", interface)),
    ]
    try:
        for line in setup:
            done = subprocess.run(line.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {line}: {done.stderr.strip()}")
        yield nodes
    finally:
        for name, *_ in nodes:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_nodes(small_task, tmp_path, by_torchrun):
    args = solver_args(small_task, tmp_path / "out", max_steps=3)
    with two_namespaces() as nodes:
        agents = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-u", "-m", "torch.distributed.run", "--nnodes=2",
                 "--nproc_per_node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29511", "--rdzv-id=two",
                 f"--rdzv-conf=is_host={str(address.endswith('1')).lower()}", f"--local-addr={address}", str(SOLVER),
                 *args],
                env=environment() | {"GLOO_SOCKET_IFNAME": interface}, **PIPES,
            )
            for name, interface, address in nodes
        ]  # fmt: skip
        said = [agent.communicate(timeout=180)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert losses(tmp_path / "out") == by_torchrun


def descendants(pid: int) -> list[int]:
    children = [
        int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
    ]
    return children + [below for child in children for below in descendants(child)]


@pytest.mark.slow
def test_a_rank_that_fails_takes_the_others_down_and_its_error_is_shown_last(small_task, tmp_path):
    out = tmp_path / "out"
    many = tmp_path / "many.yaml"  # one long epoch: each epoch has a loader of its own
    many.write_text(f"META:\n  - path: {small_task / 'record.json'}\n    ratio: 200\n")
    args = solver_args(small_task, out, data_config=many, num_workers=1, save_iteration_interval=0, save_interval=0)
    run = subprocess.Popen(command(2, args), **PIPES, env=environment())
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 3:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    ranks = [pid for pid in descendants(run.pid) if SOLVER.name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]
    loaders = [pid for pid in ranks if any(pid in descendants(rank) for rank in ranks)]
    os.kill(loaders[0], signal.SIGKILL)
    killed = time.monotonic()
    said, _ = run.communicate(timeout=60)
    assert time.monotonic() - killed < 60 and run.returncode != 0
    assert "DataLoader worker" in said[said.index("Root Cause") :], said
    while (alive := [pid for pid in ranks if Path(f"/proc/{pid}").exists()]) and time.monotonic() < killed + 60:
        time.sleep(0.1)  # loader workers look for their rank once a second
    assert not alive
