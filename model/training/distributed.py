"""Ranks: which one this process is, joining and leaving the process group, and the collectives that training needs.

A single process is a group of one, so that sharding and checkpoints have one code path.
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

# At an error before the start, other ranks wait so long for rank 0 to print it and for the launcher to end them. A rank
# that is still alive has an error of its own, such as a file that only its node lacks.
GRACE_S = 20.0
# Rank 0 of `srun` then prints that it waits for other ranks.
SLOW_MEETING_S = 10.0
# From linux/prctl.h.
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Launch:
    """This process is `rank` of `world_size`, and `local_rank` of `local_world_size` on its node."""

    # "python", "torchrun" or "srun".
    launcher: str = "python"
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
    """The rank of this process by `torchrun`'s or SLURM's variables; a group of one if there are none."""
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
    # A shell inside `salloc` is a step of one task, in a job of SLURM_NTASKS.
    tasks = [int(env[name]) for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS") if env.get(name)]
    num_tasks = min(tasks, default=1)
    # srun sets `SLURM_STEP_ID` for the processes that it starts; a plain python inside an sbatch script runs alone.
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and num_tasks > 1:
        return Launch(
            launcher="srun",
            rank=int(env["SLURM_PROCID"]),
            world_size=num_tasks,
            local_rank=int(env["SLURM_LOCALID"]),
            local_world_size=int(re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", "1")).group()),
            master_addr=env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1")),
            # A port that differs between jobs and steps on one node, below Linux's ephemeral range.
            master_port=int(
                env.get("MASTER_PORT")
                or 15000 + (int(env.get("SLURM_JOB_ID", 0)) * 31 + int(env["SLURM_STEP_ID"])) % 15000
            ),
        )
    return Launch()


def first_host(node_list: str) -> str:
    """The first host of a SLURM node list: `gpu[003-005,9],cpu1` -> `gpu003`."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", node_list)
    return match.group(1) + (match.group(2) or "") if match else node_list


def stop_at_start(launch: Launch, message: str) -> int:
    """Prints an error that all ranks have met before joining, once, and returns the exit code 2."""
    if not launch.is_main:
        # A launcher ends all ranks as soon as one has failed: rank 0 prints first.
        time.sleep(GRACE_S)
        message = f"rank {launch.rank} alone: {message}"
    print(message, file=sys.stderr, flush=True)
    return 2


def choose_device(name: str, launch: Launch) -> torch.device:
    """The device of this rank for "auto", "cuda" or "cpu", without communication.

    Raises ValueError if there is no CUDA for "cuda", or more ranks than GPUs.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    num_gpus = torch.cuda.device_count()
    if launch.local_world_size <= num_gpus:
        return torch.device("cuda", launch.local_rank)
    # A GPU per rank (`srun --gpus-per-task=1`, CUDA_VISIBLE_DEVICES): `find_shared_gpu` checks that later.
    if num_gpus == 1 and (launch.launcher == "srun" or "CUDA_VISIBLE_DEVICES" in os.environ):
        return torch.device("cuda", 0)
    raise ValueError(_more_ranks_than_gpus(launch.local_world_size, num_gpus))


def find_shared_gpu(device: torch.device) -> str | None:
    """The error if several ranks have the same GPU, else None. All ranks call it."""
    if device.type == "cpu" or dist.get_world_size() == 1:
        return None
    gpus = gather_lists([str(torch.cuda.get_device_properties(device).uuid)])
    return None if len(set(gpus)) == len(gpus) else _more_ranks_than_gpus(len(gpus), len(set(gpus)))


def _more_ranks_than_gpus(num_ranks: int, num_gpus: int) -> str:
    return f"{num_ranks} ranks share {num_gpus} GPU{'s' * (num_gpus > 1)}: start one rank per GPU, or give --device cpu"


@contextlib.contextmanager
def process_group(launch: Launch, device_name: str, timeout_s: float) -> Iterator[torch.device]:
    """Joins the process group, yields the device of this rank (see `choose_device`), and leaves the group at the end.

    CPU tensors travel by gloo, also beside NCCL, so that a small count never waits for the GPU.
    """
    die_with_launcher(launch)
    device, is_slurm = choose_device(device_name, launch), launch.launcher == "srun"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    place, advice = f"{launch.master_addr}:{launch.master_port}", ""
    if is_slurm:
        advice = (
            f"; SLURM_NTASKS says that there are {launch.world_size} ranks: to run alone, as in `srun --pty bash`, "
            "start the command with SLURM_NTASKS=1"
        )
    message = f"rank 0 waits for other ranks at {place}{advice}"
    slow = threading.Timer(SLOW_MEETING_S, print, [message], {"file": sys.stderr, "flush": True})
    slow.daemon = True
    if is_slurm and launch.is_main:
        slow.start()
    # Joining waits outside of Python, where Ctrl-C would count only after `timeout_s`.
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://{place}" if is_slurm else None,
            store=dist.HashStore() if launch.launcher == "python" else None,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    except dist.DistError as error:
        reason = " ".join(str(error).split())[:200]
        raise SystemExit(f"rank {launch.rank} cannot join the other ranks at {place}: {reason}{advice}") from None
    finally:
        slow.cancel()
        signal.signal(signal.SIGINT, on_ctrl_c)
    yield device
    # Not reached after an error: other ranks may be inside a collective, and would never come to this barrier.
    barrier()
    dist.destroy_process_group()


def end_alone(launch: Launch, message: str, code: int) -> int:
    """Prints why this rank ends. Ends its process, or without other ranks returns the exit code."""
    print(message, file=sys.stderr, flush=True)
    if launch.world_size > 1:
        # Other ranks may be in a collective, and `process_group` would wait for them.
        end_process(code)
    return code


def end_process(code: int) -> NoReturn:
    """Ends this process without finalizing the interpreter; files are closed by now, and the process group is left."""
    # A gloo thread may still free the tensors of the last collective: during finalization that would be a SIGABRT.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def die_with_launcher(launch: Launch) -> None:
    """Linux kills this rank when its launcher dies: an orphan must not continue to write."""
    if launch.launcher == "python" or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    # The signal comes only if the parent dies after this call.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over all ranks in place, and returns it."""
    dist.all_reduce(values)
    return values


def gather_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The vectors [n] of all ranks as [ranks, n], on every rank; does not wait for the device."""
    gathered = values.new_empty(dist.get_world_size(), len(values))
    dist.all_gather(list(gathered), values.contiguous())
    return gathered


def sum_counts(*counts: int) -> list[int]:
    """The sums over ranks of numbers on the host; does not wait for the GPU."""
    return sum_over_ranks(torch.tensor(counts, dtype=torch.int64)).tolist()


def from_main(value: Any) -> Any:
    """The (picklable) value of rank 0, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def broadcast_from_main(values: torch.Tensor) -> torch.Tensor:
    """Replaces a tensor by the one of rank 0, and returns it; does not wait for the device."""
    dist.broadcast(values, src=0)
    return values


def gather_lists(values: list[Any]) -> list[Any]:
    """The lists (of picklable values) of all ranks, concatenated, on every rank."""
    lists: list[list[Any] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def barrier() -> None:
    """Waits for all ranks by gloo, which does not depend on the GPU's queue."""
    sum_counts(0)
