"""What the benches share: each way in its own process, and what their last line says of the machine."""

import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]


def run_alone(module: str, task: dict) -> dict:
    """What `main(["--task", ...])` of a module prints last, as JSON, in a process of its own.

    The module is not the main one there, so that loader processes started by it need not import it again.
    """
    code = f"import sys; from {module} import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "--task", json.dumps(task)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_device_gib(device: str) -> float:
    """Largest memory allocated on the GPU so far, 0 without one."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
