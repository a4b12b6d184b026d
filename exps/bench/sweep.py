"""One option of training after another on the same model, for `exps/bench/train.py --sweep`.

    python exps/bench/train.py --model_size 7B --sweep --minutes 8

Each variant runs in its own process with the items of the command, or as many rows as it says; the compiler's cache is
shared, so that the same graph is compiled once. What does not fit is a line that says so, and what there is no time for
another; `--skip` goes on from there. Variants come in the order of what is expected of them (exps/bench/NOTES.md).
`baseline` of the JSON object is the first variant measured (without `--skip` what exps/7B.sh does), `ours` the fastest.
"""

import dataclasses
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from exps.bench.common import device_name, versions
from exps.bench.train import measure_alone, why_not, with_shares
from exps.bench.train_measure import MATRIX_RATE, Task, parse_training
from exps.bench.train_ways import Work, fill_rows

RESERVE_S = 5.0  # a variant begins only if the longest so far and this much still fit
FIRST_S = 240.0  # what the first variant, and the matrix rate before it, may take however little time there is


@dataclass(frozen=True)
class Variant:
    """What differs from the command line: options of training, rows of a micro-step, micro-steps, logits at once."""

    flags: tuple[str, ...] = ()
    rows: int = 1
    micro_steps: int = 1
    loss_chunk: int | None = None

    def __str__(self) -> str:
        parts = [f"{self.rows} {'row' if self.rows == 1 else 'rows'}"]
        parts += [f"x {self.micro_steps} micro-steps"] * (self.micro_steps > 1)
        parts += [f"loss_chunk {self.loss_chunk}"] * (self.loss_chunk is not None)
        return " ".join([*parts, *self.flags])


SELECTIVE, EVERY = "--checkpointing_selective", "--checkpointing_every"
GPU_VARIANTS = (
    Variant(("--checkpointing",), rows=8),
    Variant(rows=2),
    Variant((SELECTIVE,), rows=4),
    Variant(rows=3),
    Variant((EVERY, "2"), rows=4),
    Variant((SELECTIVE,), rows=2),
    Variant(rows=1),
    Variant((SELECTIVE, "--float8"), rows=4),
    Variant(rows=2, loss_chunk=2**27),
    Variant(("--data_parallel", "sdp"), rows=2),
    Variant((SELECTIVE,), rows=1, micro_steps=4),
    Variant(("--no-compile", SELECTIVE), rows=2),
    Variant((SELECTIVE, EVERY, "2"), rows=3),
    Variant(("--checkpointing",), rows=4),
    Variant(("--checkpointing", "--float8"), rows=8),
    Variant(rows=2, loss_chunk=2**23),
)
CPU_VARIANTS = (
    Variant(("--checkpointing",)),
    Variant((SELECTIVE,)),
    Variant(),
    Variant(loss_chunk=2**27),
    Variant(micro_steps=2),
)


def run_sweep(task: Task, work: Work, minutes: float, skip: int = 0) -> int:
    """Measures the variants of the task's device, after the first `skip`, within so many minutes, and prints table and
    JSON object. Returns the exit code."""
    variants = (GPU_VARIANTS if task.device == "cuda" else CPU_VARIANTS)[max(skip, 0) :]
    if not variants:
        print(f"--skip {skip} leaves nothing to measure", file=sys.stderr)
        return 2
    started, longest = time.monotonic(), 0.0
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache_dir:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache_dir)
        until = started + max(minutes * 60, FIRST_S)
        matrix = measure_alone(dataclasses.replace(task, way=MATRIX_RATE), until)
        for variant in variants:
            began = time.monotonic()
            if rows and began - started + longest + RESERVE_S > minutes * 60:
                rows.append({"variant": str(variant), "fits": None, "reason": "not run: no time left"})
                continue
            changed = apply(variant, task, work)
            result = with_shares(measure_alone(changed, until), matrix, parse_training(changed.training), task.device)
            longest = max(longest, time.monotonic() - began)
            rows.append({"variant": str(variant), **result, "seconds": time.monotonic() - began})
            print(format_variant(rows[-1]), flush=True)
    fitting = [row for row in rows if row["fits"]]
    ours = max(fitting, key=lambda row: row["tokens_per_s"], default=None)
    is_comparable = ours is not None and rows[0]["fits"]
    summary = {
        "bench": "train_sweep",
        "device": device_name(task.device),
        "versions": versions(),
        "ours": ours,
        "baseline": rows[0],
        "ratio": {
            "tokens_per_s": ours["tokens_per_s"] / rows[0]["tokens_per_s"],
            "peak_memory": ours["peak_gib"] / rows[0]["peak_gib"],
        }
        if is_comparable
        else None,
        "matrix_rate": matrix,
        "rows": rows,
    }
    print(format_table(rows, work, summary["device"]))
    print(json.dumps(summary))
    return 0 if fitting else 1


def apply(variant: Variant, task: Task, work: Work) -> Task:
    """The measurement of a variant: items of the same lengths, as many as fill its rows."""
    row_len = work.row_len * variant.rows
    shortest, longest = min(work.item_lens), max(work.item_lens)
    lens = work.item_lens if variant.rows == 1 else fill_rows(row_len, shortest, longest)
    changed = Work(lens, row_len, work.micro_steps * variant.micro_steps)
    return dataclasses.replace(
        task,
        training=[*task.training, *variant.flags],
        work=dataclasses.asdict(changed),
        loss_chunk=variant.loss_chunk or task.loss_chunk,
    )


def format_variant(row: dict[str, Any]) -> str:
    """One line of the table."""
    if not row["fits"]:
        what = row["reason"] if row["fits"] is None else why_not(row)
        return f"| {row['variant']} | {what} |" + " |" * 8
    phases, mfu, kinds = row["phases_ms"], row["mfu"], row["kinds_ms"]
    total = sum(phases.values())
    shares = ["-" if share is None else f"{share:.1%}" for share in mfu.values()]
    peak = f"{row['peak_gib']:.1f}" + (f" ({row['reserved_gib']:.1f})" if "reserved_gib" in row else "")
    cells = [
        row["variant"],
        f"{row['tokens_per_s']:,.0f}",
        f"{row['ms_per_step']['median']:.4g}",
        *shares,
        peak,
        f"{(phases['loss'] + phases['optimizer']) / total:.1%}",
        *(f"{kinds[kind] / total:.1%}" if kinds else "-" for kind in ("attention", "copies", "idle")),
    ]
    return f"| {' | '.join(cells)} |"


def format_table(rows: list[dict[str, Any]], work: Work, device: str) -> str:
    lines = [
        "",
        f"rows of {work.row_len:,} tokens, items of {min(work.item_lens):,} to {max(work.item_lens):,}, on {device}",
        "",
        "| variant | tokens/s | ms per step | of datasheet | of matrix rate | peak GiB | loss and optimizer "
        "| attention | copies | idle |",
        "|---" * 10 + "|",
    ]
    return "\n".join([*lines, *map(format_variant, rows)])
