"""The table of TRAIN.md that says which GPUs a training fits: every cell is a plan of the training itself.

    python exps/plan_table.py

Plans 7B and 34B with all weights, LoRA adapters or the image rows trained, on different numbers of ranks, each plan in
a process of its own, and prints Markdown: the peak of a rank in GiB, and the smallest card that it fits, in GB as sold.
No GPU and no weights are needed; a plan takes some seconds to a minute on one core.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
METHODS = {
    "all weights": [],
    "LoRA, rank 16": ["--lora_rank", "16"],
    "image head": ["--train_only", "image_head"],
}


def build_parser() -> argparse.ArgumentParser:
    """The command line; the defaults give the table of TRAIN.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_sizes", nargs="+", default=["7B", "34B"], help="rows of the table (7B 34B)")
    parser.add_argument("--world_sizes", nargs="+", type=int, default=[1, 2, 8, 32, 128], help="its columns")
    parser.add_argument("--batch_size", type=int, default=8, help="items per row (8)")
    parser.add_argument("--max_seq_len", type=int, default=4096, help="tokens of an item (4096)")
    parser.add_argument("--jobs", type=int, default=2, help="plans at a time (2)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; the exit code is 1 if a plan could not be made."""
    args = build_parser().parse_args(argv)
    cells = [
        (size, method, world_size) for size in args.model_sizes for method in METHODS for world_size in args.world_sizes
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        plans = pool.map(lambda cell: make_plan(*cell, args.batch_size, args.max_seq_len), cells)
        try:
            planned = dict(zip(cells, tqdm(plans, total=len(cells), unit="plan"), strict=True))
        except RuntimeError as error:
            pool.shutdown(cancel_futures=True)
            print(f"exps/plan_table.py: {error}", file=sys.stderr)
            return 1
    print("\n".join(format_table(planned, args.world_sizes)))
    return 0


def make_plan(size: str, method: str, world_size: int, batch_size: int, max_seq_len: int) -> dict[str, Any]:
    """The figures of one plan, as its last line gives them. Raises RuntimeError, with what it said, if it failed."""
    flags = {"plan_world_size": world_size, "model_size": size, "batch_size": batch_size, "max_seq_len": max_seq_len}
    flags |= {"accum_iter": 1, "dropout": 0.05, "z_loss_weight": 1e-5}
    command = [sys.executable, str(ROOT / "finetune_solver.py"), "--plan", "--checkpointing", *METHODS[method]]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def format_table(plans: dict[tuple[str, str, int], dict[str, Any]], world_sizes: Sequence[int]) -> list[str]:
    """Lines of Markdown, of plans by (size, method, ranks)."""
    heads = ["trained", *(f"{number} rank{'s' if number > 1 else ''}" for number in world_sizes)]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * len(world_sizes) + "|"]
    for size, method in dict.fromkeys((size, method) for size, method, _ in plans):
        row = [format_cell(plans[size, method, world_size]) for world_size in world_sizes]
        lines.append(f"| {size}, {method} | {' | '.join(row)} |")
    return lines


def format_cell(plan: dict[str, Any]) -> str:
    """Peak in GiB and the smallest card, such as `28.2: 48 GB`."""
    cards = plan["fits_cards_gb"]
    return f"{plan['peak_gib']:.1f}: {f'{min(cards)} GB' if cards else 'none'}"


if __name__ == "__main__":
    sys.exit(main())
