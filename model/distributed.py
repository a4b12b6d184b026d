"""Ranks: who this process is, joining and leaving the others, and the few collectives that training needs.

First in line after the options are checked: `detect_launch` reads the environment of `torchrun`, of `srun` or of
nothing at all (one plain process), touching neither network nor GPU, so that a mistake can be reported before any rank
waits for another. `process_group` then joins, always: a single process forms a group of one, so that sharding, mixed
precision and checkpoints have one path.
"""

import contextlib
import ctypes
import datetime
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist

# How long a rank other than the first waits, at a mistake before the start, for rank 0 to speak and the launcher to end
# all; whoever outlives it met a mistake of its own (say, a file that only its node lacks) and speaks for itself.
GRACE_S = 20.0
SLOW_MEETING_S = 10.0  # after which ranks of `srun` that wait for others say so
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


@dataclass(frozen=True)
class Launch:
    """Where this process stands: `rank` of `world_size`, `local_rank` of `local_world_size` on its node."""

    launcher: str = "python"  # "python" | "torchrun" | "srun"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def detect_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """The place of this process according to `torchrun`'s or SLURM's variables; alone if there are none."""
    env = os.environ if environment is None else environment
    if "RANK" in env and "WORLD_SIZE" in env:
        return Launch(
            launcher="torchrun",
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env.get("LOCAL_RANK", 0)),
            local_world_size=int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])),
            master_addr=env.get("MASTER_ADDR", "127.0.0.1"),
            master_port=int(env.get("MASTER_PORT", 0)),
        )
    # `SLURM_STEP_ID` is set by srun for the processes it starts; a plain python inside an sbatch script is alone.
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        return Launch(
            launcher="srun",
            rank=int(env["SLURM_PROCID"]),
            world_size=int(env["SLURM_NTASKS"]),
            local_rank=int(env["SLURM_LOCALID"]),
            local_world_size=int(re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", "1")).group()),
            master_addr=env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1")),
            master_port=int(env.get("MASTER_PORT") or _slurm_port(env)),
        )
    return Launch()


def first_host(node_list: str) -> str:
    """The first host of a SLURM node list: `gpu[003-005,9],cpu1` -> `gpu003`."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", node_list)
    return match.group(1) + (match.group(2) or "") if match else node_list


def stop_at_start(launch: Launch, message: str) -> int:
    """Says once what is wrong before the ranks have met, and returns the exit code 2.

    Every rank finds the same mistake by itself. A launcher ends all ranks as soon as one has failed, so the others wait
    for rank 0 to speak.
    """
    if not launch.is_main:
        time.sleep(GRACE_S)
        message = f"rank {launch.rank} alone: {message}"
    print(message, file=sys.stderr, flush=True)
    return 2


def choose_device(name: str, launch: Launch) -> torch.device:
    """The device of this rank for "auto", "cuda" or "cpu". Waits for no rank.

    Raises ValueError if there is no CUDA for "cuda", or if the node has more ranks than GPUs. A rank that sees exactly
    one GPU may have it to itself (`srun --gpus-per-task=1`, CUDA_VISIBLE_DEVICES per rank): then it is that one, and
    `find_shared_gpu` looks again once the ranks have met.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    num_gpus = torch.cuda.device_count()
    if launch.local_world_size <= num_gpus:
        return torch.device("cuda", launch.local_rank)
    if num_gpus == 1 and (launch.launcher == "srun" or "CUDA_VISIBLE_DEVICES" in os.environ):
        return torch.device("cuda", 0)
    raise ValueError(_more_ranks_than_gpus(launch.local_world_size, num_gpus))


def find_shared_gpu(device: torch.device) -> str | None:
    """Why the ranks cannot train: some of them have the same GPU. None if each has one to itself; called by all."""
    if device.type == "cpu" or dist.get_world_size() == 1:
        return None
    gpus = gather_lists([str(torch.cuda.get_device_properties(device).uuid)])
    return None if len(set(gpus)) == len(gpus) else _more_ranks_than_gpus(len(gpus), len(set(gpus)))


def _more_ranks_than_gpus(num_ranks: int, num_gpus: int) -> str:
    return f"{num_ranks} ranks share {num_gpus} GPU{'s' * (num_gpus > 1)}: start one rank per GPU, or give --device cpu"


@contextlib.contextmanager
def process_group(launch: Launch, device_name: str, timeout_s: float) -> Iterator[torch.device]:
    """Joins the other ranks, yields this rank's device (as `choose_device` finds it), and leaves them at the end.

    CPU tensors travel by gloo, also beside NCCL, so that a small count never waits for the GPU.
    """
    die_with_launcher(launch)
    device, backend = choose_device(device_name, launch), "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    timeout = datetime.timedelta(seconds=timeout_s)
    store = None  # torchrun has one
    try:
        if launch.launcher == "python":
            store = dist.HashStore()
        elif launch.launcher == "srun":
            store = _meet_on_slurm(launch, timeout_s)
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
    except dist.DistError as error:
        place = f"{launch.master_addr}:{launch.master_port}"
        reason = " ".join(str(error).split())[:200]
        raise SystemExit(f"rank {launch.rank} cannot join the other ranks at {place}: {reason}") from None
    yield device
    # Not reached after an error: the others may be inside a collective, and leaving in order would wait for them.
    barrier()
    dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Ends this process at once, what it printed written out.

    A gloo thread lets go of the tensors of the last collective after the main thread goes on, and needs the interpreter
    for it; one that is just being torn down ends that thread, and with it the process, by SIGABRT. So it is not torn
    down: the process group has been left, and all files are closed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def die_with_launcher(launch: Launch) -> None:
    """Asks Linux to kill this rank when its launcher dies, so that no orphan goes on writing."""
    if launch.launcher == "python" or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over all ranks in place, and returns it."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The vectors [n] of all ranks as [ranks, n], on every rank; does not wait for the device."""
    if dist.get_world_size() == 1:
        return values[None]
    gathered = values.new_empty(dist.get_world_size(), len(values))
    dist.all_gather(list(gathered), values.contiguous())
    return gathered


def sum_counts(*counts: int) -> list[int]:
    """The sums over ranks of numbers that live on the host; does not wait for the GPU."""
    return sum_over_ranks(torch.tensor(counts, dtype=torch.int64)).tolist()


def from_main(value: Any) -> Any:
    """What rank 0 holds (any picklable value), on every rank; the others' argument is ignored."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def broadcast_from_main(values: torch.Tensor) -> torch.Tensor:
    """The tensor of rank 0, on every rank in the place of its own; does not wait for the device."""
    if dist.get_world_size() > 1:
        dist.broadcast(values, src=0)
    return values


def gather_lists(values: list[Any]) -> list[Any]:
    """The lists (of picklable values) of all ranks one after the other, on every rank."""
    lists: list[list[Any] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def barrier() -> None:
    """Waits for all ranks, over CPU (gloo), so that it never depends on the GPU's queue."""
    sum_counts(0)


def _meet_on_slurm(launch: Launch, timeout_s: float) -> dist.Store:
    """Where the ranks of `srun` meet. Says after SLOW_MEETING_S who is waited for; raises after `timeout_s`."""
    place = f"{launch.master_addr}:{launch.master_port}"
    advice = (
        f"SLURM_NTASKS says that there are {launch.world_size}; to run alone, as in `srun --pty bash`, begin the "
        "command with SLURM_NTASKS=1"
    )
    slow = threading.Timer(SLOW_MEETING_S, _say, [f"rank 1 waits for rank 0 at {place}; {advice}"])
    slow.daemon = True
    if launch.rank == 1:  # one line, not one of each rank
        slow.start()
    deadline = time.monotonic() + timeout_s
    try:
        store = dist.TCPStore(
            launch.master_addr, launch.master_port, launch.world_size, launch.is_main,
            datetime.timedelta(seconds=timeout_s), wait_for_workers=False,
        )  # fmt: skip
    finally:
        slow.cancel()
    store.set(str(launch.rank), "")
    say_at = deadline - timeout_s + SLOW_MEETING_S
    while launch.is_main and (missing := [rank for rank in range(launch.world_size) if not store.check([str(rank)])]):
        who = f"at {place} for {len(missing)} of {launch.world_size} ranks, first rank {missing[0]}; {advice}"
        if time.monotonic() > deadline:
            raise SystemExit(f"rank 0 waited {timeout_s:g} s {who}")
        if time.monotonic() > say_at:
            _say(f"rank 0 waits {who}")
            say_at = deadline
        time.sleep(0.1)
    return store


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _slurm_port(env: Mapping[str, str]) -> int:
    """A port that differs between the jobs and steps that may share a node, below Linux's ephemeral range."""
    return 15000 + (int(env.get("SLURM_JOB_ID", 0)) * 31 + int(env["SLURM_STEP_ID"])) % 15000
