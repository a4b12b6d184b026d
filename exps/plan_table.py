"""Prints the table that says which GPUs a training fits: every cell is a plan of the training itself.

    python exps/plan_table.py

A cell has the peak of a rank in GiB, and the smallest card that it fits, in GB as sold. No GPU and no weights are
needed.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import finetune_solver  # noqa: E402

METHODS = {
    "all weights": [],
    "LoRA, rank 16": ["--lora_rank", "16"],
    "image head": ["--train_only", "image_head"],
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, ranks = parser.add_argument, [1, 2, 8, 32, 128]
    add("--model_sizes", nargs="+", default=["7B", "34B"], help="model sizes, rows of the table (7B 34B)")
    add("--world_sizes", nargs="+", type=int, default=ranks, help="numbers of ranks, the columns (1 2 8 32 128)")
    add("--batch_size", type=int, default=8, help="items of a row (8)")
    add("--max_seq_len", type=int, default=4096, help="tokens of an item (4096)")
    add("--jobs", type=int, default=2, help="plans made at the same time (2)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; the exit code is 1 if a plan fails."""
    args = build_parser().parse_args(argv)
    cells = list(itertools.product(args.model_sizes, METHODS, args.world_sizes))
    make = functools.partial(make_plan, batch_size=args.batch_size, max_seq_len=args.max_seq_len)
    # A process for each plan, forked from this one, which has imported everything and started no threads.
    with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
        try:
            plans = list(tqdm(pool.imap(make, cells), total=len(cells), unit="plan"))
        except RuntimeError as error:
            print(f"exps/plan_table.py: {error}", file=sys.stderr)
            return 1
    heads = ["trained", *(f"{number} rank{'s' if number > 1 else ''}" for number in args.world_sizes)]
    print(f"| {' | '.join(heads)} |\n|---{'|---:' * len(args.world_sizes)}|")
    for first in range(0, len(cells), len(args.world_sizes)):
        size, method, _ = cells[first]
        row = map(format_cell, plans[first : first + len(args.world_sizes)])
        print(f"| {size}, {method} | {' | '.join(row)} |")
    return 0


def make_plan(cell: tuple[str, str, int], batch_size: int, max_seq_len: int) -> dict[str, Any]:
    """The last line of the plan of (size, method, ranks). Raises RuntimeError if there is none."""
    size, method, world_size = cell
    flags = {"plan_world_size": world_size, "model_size": size, "batch_size": batch_size, "max_seq_len": max_seq_len}
    flags |= {"accum_iter": 1, "dropout": 0.05, "z_loss_weight": 1e-5}
    args = ["--plan", "--checkpointing", *METHODS[method]]
    args += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = finetune_solver.main(args)
    if code:
        raise RuntimeError(f"finetune_solver.py {' '.join(args)} ended with {code}")
    return json.loads(out.getvalue().splitlines()[-1])


def format_cell(plan: dict[str, Any]) -> str:
    """Peak in GiB and the smallest card, such as `28.2: 48 GB`."""
    cards = plan["fits_cards_gb"]
    return f"{plan['peak_gib']:.1f}: {f'{min(cards)} GB' if cards else 'none'}"


if __name__ == "__main__":
    sys.exit(main())
