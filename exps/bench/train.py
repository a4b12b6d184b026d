"""Tokens per second, FLOPs and peak memory of a training step: ours and, with `--baseline`, the recipe's.

    python exps/bench/train.py --model_size bench --baseline --num_items 4 --item_len 300 1100 --precision fp32 bf16
    python exps/bench/train.py --model_size 7B --rows 2 --checkpointing --baseline

Items and weights are random. Every option of finetune_solver.py that changes the step is accepted.

Tokens of items count, filler and padding do not. MFU counts useful work (model/run/flops.py), without recomputation:
over the GPU's datasheet (bf16), and over the rate of the model's own matrix products in the same run.
Memory is the peak of tensors on CUDA (`reserved_gib`: of the allocator's pool), on a CPU the growth of the process.
`host_ms`: how long the host takes to queue a step. `allocator`: events per step. Later steps give phases and kinds of
work; the forward of our loss contains its backward. The last line printed is one JSON object.
"""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from exps.bench import common  # noqa: E402
from exps.bench.train_measure import parse_training  # noqa: E402
from exps.bench.train_ways import Work, fill_rows, spread_lengths  # noqa: E402
from model.decoder.chameleon import MODEL_SIZES  # noqa: E402
from model.run.flops import peak_flops  # noqa: E402
from model.training.float8 import MULTIPLE_OF  # noqa: E402

# 16 bytes for each of its parameters are 104 GiB.
MIN_GIB_FOR_7B = 110
COLUMNS = (
    *("tokens_per_s", "ms_per_step.median", "ms_per_step.min", "ms_per_step.max", "tflops"),
    *("mfu.datasheet", "mfu.matrix_rate", "peak_gib", "reserved_gib", "host_ms"),
    *("allocator.num_alloc_retries", "allocator.num_device_alloc", "allocator.num_device_free"),
    *("phases_ms.forward", "phases_ms.loss", "phases_ms.backward", "phases_ms.optimizer"),
    *("kinds_ms.attention", "kinds_ms.copies", "kinds_ms.idle"),
)


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_bench_parser(__doc__, repeats="steps measured")
    add = parser.add_argument
    add("--model_size", choices=tuple(MODEL_SIZES), help="default: 7B or 1B on a GPU, by its memory, tiny on a CPU")
    add("--precision", nargs="+", choices=("fp32", "tf32", "bf16"), help="default: bf16 on CUDA, fp32 on a CPU")
    add("--rows", type=common.positive, default=1, help="full rows of a micro-step, joined to one row (default 1)")
    add("--row_len", type=common.positive, default=4096, help="tokens of a row, and of the longest item (default 4096)")
    add("--item_len", type=int, nargs="+", help="tokens of the shortest and the longest item (default: --row_len)")
    add("--num_items", type=common.positive, help="items of a micro-step (default: as many as fill --rows)")
    add("--accum_iter", type=common.positive, default=1, help="micro-steps of a step (default 1)")
    add("--baseline", action="store_true", help="measure the recipe's way too (default: off)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args, training = parser.parse_known_args(argv)
    device = common.choose_device(args.device)
    size = args.model_size or default_model_size(device)
    lengths = args.item_len or [args.row_len]
    if len(lengths) > 2 or not 2 <= lengths[0] <= lengths[-1] <= args.row_len:
        bounds = f"one or two lengths of 2 to --row_len {args.row_len}, the shortest first"
        parser.error(f"--item_len must be {bounds}, got {lengths}")
    if args.num_items:
        item_lens = spread_lengths(args.num_items, lengths[0], lengths[-1])
    else:
        item_lens = fill_rows(args.rows * args.row_len, lengths[0], lengths[-1])
    work = Work(item_lens, sum(item_lens) if args.num_items else args.rows * args.row_len, args.accum_iter)
    if device == "cuda":
        # Near the limit of a GPU, blocks of fixed size leave gaps between them that no tensor fits.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    sizes = ["--model_size", size, "--max_seq_len", args.row_len, "--batch_size", args.rows, "--device", device]
    lines = [
        ["--precision", precision, "--z_loss_weight", "1e-5", *training, *map(str, sizes)]
        for precision in args.precision or ["bf16" if device == "cuda" else "fp32"]
    ]
    options = parse_training(lines[0])
    problems = options.problems(1, 1)
    if options.float8.float8 and work.row_len % MULTIPLE_OF:
        problems.append(f"--float8 needs rows of a multiple of {MULTIPLE_OF} tokens, got {work.row_len} (--num_items)")
    if problems:
        parser.error("; ".join(problems))
    rows = [measure_row(line, device, work, args.repeats, args.baseline) for line in lines]
    items = f"{len(item_lens)} items of {min(item_lens):,} to {max(item_lens):,} tokens"
    title = f"{size}, {items} in a row of {work.row_len:,}, {work.micro_steps} micro-steps"
    return common.report("train", title, device, rows, COLUMNS)


def default_model_size(device: str) -> str:
    """The largest size that a training of all its weights in fp32 leaves room for."""
    if device != "cuda":
        return "tiny"
    # Needs no context, which would take some of the memory.
    total = torch.cuda.get_device_properties(0).total_memory
    return "7B" if total >= MIN_GIB_FOR_7B * 2**30 else "1B"


def measure_row(training: list[str], device: str, work: Work, repeats: int, with_baseline: bool) -> dict[str, Any]:
    """Both ways in one precision, and the matrix rate beside them."""
    precision = parse_training(training).parallel.precision
    task = {"training": training, "device": device, "work": asdict(work)}
    matrix = common.run_alone("train_measure:measure_matrix_rate", **task)
    peaks = {"matrix_rate": matrix.get("flops_per_s")}
    if device == "cuda" and precision == "bf16":
        peaks["datasheet"] = peak_flops(common.device_name(device))
    ways = []
    for way in ("ours", "baseline")[: 1 + with_baseline]:
        result = common.run_alone("train_measure:measure", way=way, repeats=repeats, **task)
        if "failed" not in result:
            result["mfu"] = {name: result["tflops"] * 1e12 / peak for name, peak in peaks.items() if peak}
        ways.append(result)
    ours, baseline = (*ways, None)[:2]
    return common.compare({"precision": precision}, ours, baseline, matrix_rate=matrix)


if __name__ == "__main__":
    common.start(main)
