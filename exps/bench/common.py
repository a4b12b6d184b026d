"""What the benches share: common options, each way in its own process, and what their last line says of the machine."""

import argparse
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]


class OutOfMemory(RuntimeError):
    """A measurement was killed, as Linux does with the process that wants more memory than there is."""


class TookTooLong(RuntimeError):
    """A measurement did not end in its time, and was killed."""


def build_bench_parser(description: str | None, repeats: str | None = None) -> argparse.ArgumentParser:
    """A parser with what `add_common_flags` adds."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_common_flags(parser, repeats)
    return parser


def add_common_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup, repeats: str | None = None) -> None:
    """`--device`, `--task` and, where `repeats` says of what they are, `--repeats`."""
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="default auto: cuda if there is one"
    )
    parser.add_argument("--task", help=argparse.SUPPRESS)  # one measurement as JSON: how a bench calls itself
    if repeats:
        parser.add_argument("--repeats", type=int, default=3, help=f"{repeats} (default 3)")


def find_too_small(args: argparse.Namespace, *names: str) -> str | None:
    """What is wrong with the first of the named options that is below 1, or None."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            return f"--{name} must be at least 1, got {value}"
    return None


def exit_on_sigterm() -> None:
    """Lets SIGTERM end this process as an exception does: a `with` removes its temporary folder, and the measurement
    that runs is killed."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


def run_alone(module: str, task: dict, env: dict[str, str] | None = None, limit_s: float | None = None) -> dict:
    """What `main(["--task", ...])` of a module prints last, as JSON, in a process of its own.

    The module is not the main one there, so that loader processes started by it need not import it again. `env` is
    added to the environment.

    Raises OutOfMemory if the process was killed, TookTooLong if it had not ended after `limit_s` seconds, RuntimeError
    if it failed otherwise.
    """
    code = f"import sys; from {module} import main; sys.exit(main(sys.argv[1:]))"
    command, env = [sys.executable, "-c", code, "--task", json.dumps(task)], {**os.environ, **(env or {})}
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise TookTooLong(f"the measurement {task} took longer than the {limit_s:.0f} s that it had") from None
    if done.returncode == -signal.SIGKILL:
        raise OutOfMemory(f"the measurement {task} was killed, perhaps for want of memory")
    if done.returncode:
        raise RuntimeError(f"the measurement {task} ended with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def choose_device(wanted: str) -> str:
    """`auto`: cuda if there is one."""
    return wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores"


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def peak_host_gib() -> float:
    """Largest resident memory of this process so far."""
    try:  # not ru_maxrss: a process begins with that of the one that started it
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1]) / 2**20
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_device_gib(device: str) -> float:
    """Largest memory allocated on the GPU so far, 0 without one."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
