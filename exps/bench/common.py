"""The frame of the benches: each way runs in its own process; the results are a table and one JSON object.

A bench measures its ways with `run_alone`, puts two ways into a row with `compare`, and ends with `report`.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers

# Keeps torchao quiet, if it comes before the models.
import data  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
Row = Mapping[str, Any]


def build_bench_parser(description: str | None, repeats: str | None = None) -> argparse.ArgumentParser:
    """A parser with `--device` and, if `repeats` says what is repeated, `--repeats`."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=style, allow_abbrev=False)
    device_help = "device to measure (default auto: CUDA if there is a GPU)"
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help=device_help)
    if repeats:
        parser.add_argument("--repeats", type=positive, default=3, help=f"{repeats} (default 3)")
    return parser


def positive(text: str) -> int:
    """The type of an option that must be at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def start(main: Callable[[], int]) -> NoReturn:
    """Runs a script. SIGTERM becomes an exception: temporary folders are removed, a running measurement is killed."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    sys.exit(main())


def run_alone(function: str, **arguments: Any) -> dict[str, Any]:
    """What a function `module:name` of exps.bench returns in its own process; `{"failed": why}` if it fails.

    Arguments and result are JSON. The module is not `__main__` there: its loader processes need not import it again.
    """
    module, name = function.split(":")
    code = (
        f"import json, sys; from exps.bench.{module} import {name}; result = {name}(**json.loads(sys.argv[1])); "
        "from model.training.distributed import end_process; print(json.dumps(result)); end_process(0)"
    )
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode == -signal.SIGKILL:
        return {"failed": "killed, perhaps for want of memory"}
    if done.returncode:
        return {"failed": f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def compare(case: Row, ours: Row, baseline: Row | None, **more: Any) -> dict[str, Any]:
    """A row: the figures of both ways in one case, and ours / baseline of each figure that both have."""
    others = dict(flatten(baseline or {}))
    ratio = {name: value / others[name] for name, value in flatten(ours) if others.get(name)}
    return {**case, "case": list(case.values()), "ours": ours, "baseline": baseline, "ratio": ratio or None, **more}


def report(
    bench: str, title: str, device: str, rows: Sequence[Row], columns: Sequence[str], main_row: Row | None = None
) -> int:
    """Prints the table and the JSON object with the figures of `main_row` (default: the first row).

    Returns the exit code, 1 if a way failed. `columns` are paths of figures ("ms.median"); columns without any figure
    are left out.
    """
    name = device_name(device)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    summary = {"bench": bench, "device": name, "versions": versions, **(main_row or rows[0])}
    print(f"{title}, on {name}; {', '.join(map(' '.join, versions.items()))}\n")
    print(format_table(rows, columns))
    print(json.dumps({**summary, "rows": rows}))
    return int(any("failed" in (row[way] or {}) for row in rows for way in ("ours", "baseline")))


def format_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Three lines for each row: ours, the baseline (named by the row's `way`) and ours / baseline."""
    measured = [dict(flatten(row[way] or {})) for row in rows for way in ("ours", "baseline")]
    shown = [column for column in columns if any(column in figures for figures in measured)]
    lines = [f"| case | way | {' | '.join(shown)} |", "|---" * (2 + len(shown)) + "|"]
    for row in rows:
        name = row.get("way", "baseline")
        for way, figures in (("ours", row["ours"]), (name, row["baseline"]), (f"ours / {name}", row["ratio"])):
            if figures is None:
                continue
            numbers = dict(flatten(figures))
            cells = [number(numbers[column]) if column in numbers else "-" for column in shown]
            if "failed" in figures:
                cells = [f"failed: {figures['failed']}"]
            lines.append(f"| {', '.join(map(str, row['case']))} | {way} | {' | '.join(cells)} |")
    # Ours stands beside several baselines, with the same line.
    return "\n".join(dict.fromkeys(lines))


def flatten(values: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(path, number) of every number in nested mappings; lists are skipped."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from flatten(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, int | float) and not isinstance(values, bool):
        yield name, values


def number(value: float) -> str:
    """Three digits, thousands with commas."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def choose_device(wanted: str) -> str:
    """The device; `auto` is CUDA if there is a GPU."""
    return wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores"


def resident_gib(field: str = "VmHWM") -> float:
    """Resident memory of this process: its peak, or another field of Linux's /proc/self/status."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def peak_device_gib(device: str) -> float:
    """Largest memory allocated on the GPU so far, 0 without one."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
