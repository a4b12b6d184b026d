"""Tokens per second, FLOPs and peak memory of a training step: ours, and with `--baseline` the recipe's, same items.

    python exps/bench/train.py --model_size bench --baseline --num_items 4 --item_len 300 1100 --precision fp32 bf16
    python exps/bench/train.py --model_size 7B --rows 2 --row_len 4096 --checkpointing --baseline

Ours is built and stepped as `finetune_solver.py` does it (packed rows, fused loss, layers compiled on CUDA); the
recipe's is stock `transformers` on one padded batch (exps/bench/train_ways.py). Items are random tokens, weights are
random. Each way runs in its own process. Every option of finetune_solver.py that changes the step can be given as well:
`--checkpointing`, `--compile`, `--z_loss_weight`, `--data_parallel`, ...

Tokens are those of items: neither filler nor padding counts. MFU is the share of useful work, without what is computed
again by `--checkpointing`: FLOPs per token (model/flops.py) are 6 x (weights of all matrices, the head included, the
embedding not) + 6 x layers x (mean length of an item, seen from its tokens) x width, the last for causal attention:
43.7 GFLOP for 7B and items of 4,096 tokens. It is given over the GPU's datasheet (bf16), and over the rate of the
model's own matrix products measured in the same run. Memory is the peak of tensors on CUDA (in brackets: of what the
allocator held), on a CPU that of the process over what it held before. The split comes from one more step under the
profiler; our loss has its backward within its forward.
The last line printed is one JSON object.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from exps.bench.common import (  # noqa: E402
    OutOfMemory,
    TookTooLong,
    add_common_flags,
    choose_device,
    device_name,
    exit_on_sigterm,
    find_too_small,
    run_alone,
    versions,
)
from exps.bench.train_measure import GIB, MATRIX_RATE, Task, parse_training  # noqa: E402
from exps.bench.train_ways import WAYS, Work, fill_rows, spread_lengths  # noqa: E402
from model.chameleon import MODEL_SIZES  # noqa: E402
from model.gpu_peaks import peak_flops  # noqa: E402
from model.options import Options  # noqa: E402
from model.options import build_parser as build_training_parser  # noqa: E402

OURS, BASELINE = WAYS
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
MIN_GIB_FOR_7B = 110  # 16 bytes for each of its parameters are 104 GiB
PHASES = ("forward", "loss", "backward", "optimizer")


def build_parser() -> argparse.ArgumentParser:
    """Everything that the bench takes: the options of finetune_solver.py, and its own, which win."""
    parser = build_training_parser()
    parser.prog, parser.description, parser.conflict_handler = "train.py", __doc__, "resolve"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for action in parser._actions:
        action.required = False
    add_bench_flags(parser.add_argument_group("of this bench"))
    return parser


def add_bench_flags(group: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    add_common_flags(group, repeats="steps measured")
    add = group.add_argument
    size_help = f"default: 7B on a GPU of {MIN_GIB_FOR_7B} GiB or more, 1B on a smaller one, tiny on a CPU"
    add("--model_size", choices=tuple(MODEL_SIZES), help=size_help)
    add("--precision", nargs="+", choices=("fp32", "tf32", "bf16"), help="default: bf16 on CUDA, fp32 on a CPU")
    add("--rows", type=int, default=1, help="full rows that one micro-step takes, as one (default 1)")
    add("--row_len", type=int, default=4096, help="tokens of a row, and the longest item (default 4096)")
    add("--item_len", type=int, nargs="+", metavar="N", help="of items: shortest and longest (default: --row_len)")
    add("--num_items", type=int, help="of a micro-step, which is as long as they are (default: as many as fill --rows)")
    add("--accum_iter", type=int, default=1, help="micro-steps of a step (default 1)")
    add("--warmup", type=int, help="steps before those measured (default: 3 on CUDA, 1 on a CPU)")
    add("--baseline", action="store_true", help="measure the recipe's way too")
    add("--minutes", type=float, help="for all measurements; one that lasts longer is ended, and has failed")


def main(argv: list[str] | None = None) -> int:
    build_parser().parse_args(argv)  # ends here at an unknown option, or with --help
    own = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    add_bench_flags(own)
    args, training = own.parse_known_args(argv)
    device = choose_device(args.device)
    args.model_size = args.model_size or default_model_size(device)
    args.item_len = args.item_len or [args.row_len]
    problems = find_problems(args)
    if not problems:
        work = build_work(args)
        tasks = [build_task(args, training, device, work, precision) for precision in args.precision or [None]]
        for options in (parse_training(task.training) for task in tasks):
            problems += (
                options.model.problems()
                + options.optim.problems()
                + options.parallel.problems(1, 1)
                + options.trainable.problems()
            )
            problems += options.float8.problems(
                device, options.parallel.precision, options.trainable.is_partial, work.row_len
            )
    if problems:
        print("; ".join(problems), file=sys.stderr)
        return 2
    load_before = os.getloadavg()[0]
    until = time.monotonic() + 60 * args.minutes if args.minutes else None
    rows = [compare(task, work, args.baseline, until) for task in tasks]
    summary = {
        "bench": "train",
        "device": device_name(device),
        "versions": versions(),
        "model_size": args.model_size,
        **rows[0],
        "rows": rows,
        "load": {"before": load_before, "after": os.getloadavg()[0]},
    }
    print(format_table(summary, work))
    print(json.dumps(summary))
    has_failed = any(row[way].get("failed") for row in rows for way in WAYS if row[way])
    return 0 if all(row["ours"]["fits"] for row in rows) and not has_failed else 1


def default_model_size(device: str) -> str:
    """The largest size that a training of all its weights in fp32 leaves room for."""
    if device != "cuda":
        return "tiny"
    total = torch.cuda.get_device_properties(0).total_memory  # needs no context, which would take some of it
    return "7B" if total >= MIN_GIB_FOR_7B * GIB else "1B"


def find_problems(args: argparse.Namespace) -> list[str]:
    names = ("repeats", "rows", "row_len", "num_items", "accum_iter", "warmup")
    found = [problem] if (problem := find_too_small(args, *names)) else []
    if args.minutes is not None and not args.minutes > 0:
        found.append(f"--minutes must be above 0, got {args.minutes:g}")
    lengths = args.item_len
    if len(lengths) > 2 or not 2 <= lengths[0] <= lengths[-1] <= args.row_len:
        bounds = f"one or two lengths of 2 to --row_len {args.row_len}, the shortest first"
        found.append(f"--item_len must be {bounds}, got {lengths}")
    return found


def build_work(args: argparse.Namespace) -> Work:
    """The items of a step, and the row that holds them."""
    shortest, longest = args.item_len[0], args.item_len[-1]
    if args.num_items:
        lengths = spread_lengths(args.num_items, shortest, longest)
        return Work(lengths, sum(lengths), args.accum_iter)
    row_len = args.rows * args.row_len
    return Work(fill_rows(row_len, shortest, longest), row_len, args.accum_iter)


def build_task(
    args: argparse.Namespace, training: Sequence[str], device: str, work: Work, precision: str | None
) -> Task:
    """The measurement of ours; options of training that are given come last and win."""
    defaults = ["--precision", precision or ("bf16" if device == "cuda" else "fp32"), "--z_loss_weight", "1e-5"]
    sizes = ["--model_size", args.model_size, "--max_seq_len", str(args.row_len)]
    return Task(
        OURS,
        [*defaults, *training, *sizes],
        device,
        asdict(work),
        args.warmup or (3 if device == "cuda" else 1),
        args.repeats,
    )


def compare(task: Task, work: Work, with_baseline: bool, until: float | None = None) -> dict[str, Any]:
    """One row of the summary: both ways in one precision, and the matrix rate beside them; no later than `until`."""
    options = parse_training(task.training)
    matrix = measure_alone(replace(task, way=MATRIX_RATE), until)
    ours = with_shares(measure_alone(task, until), matrix, options, task.device)
    row: dict[str, Any] = {"precision": options.parallel.precision, "ours": ours, "baseline": None, "ratio": None}
    row["matrix_rate"] = matrix
    if with_baseline:
        row["baseline"] = baseline = with_shares(measure_baseline(task, work, until), matrix, options, task.device)
        if ours["fits"] and baseline["fits"]:
            row["ratio"] = {
                "tokens_per_s": ours["tokens_per_s"] / baseline["tokens_per_s"],
                "peak_memory": ours["peak_gib"] / baseline["peak_gib"],
            }
    return row


def measure_alone(task: Task, until: float | None = None) -> dict[str, Any]:
    """What a process of its own measures, ended at `until` (of `time.monotonic`) if it has not ended by then.

    `fits` is False if it has too little memory, and where it took too long or ended with another error, which it has
    told itself; then `failed` is True.
    """
    left_s = None if until is None else until - time.monotonic()
    if left_s is not None and left_s <= 0:
        return {"fits": False, "failed": True, "reason": "no time left"}
    # Near the limit of a GPU, blocks of fixed size leave gaps between them that no tensor fits.
    env = {ALLOCATOR: os.environ.get(ALLOCATOR, "expandable_segments:True")} if task.device == "cuda" else {}
    try:
        return run_alone("exps.bench.train_measure", asdict(task), env, left_s)
    except OutOfMemory as error:
        return {"fits": False, "reason": str(error).split(",")[-1].strip()}
    except TookTooLong:
        return {"fits": False, "failed": True, "reason": f"ended after {left_s:.0f} s, when its time was over"}
    except RuntimeError as error:
        return {"fits": False, "failed": True, "reason": str(error).rpartition("}")[2].strip()}


def measure_baseline(task: Task, work: Work, until: float | None = None) -> dict[str, Any]:
    """The recipe's way; if it does not fit, with recomputation, then with half the items, down to one."""
    recompute, num_items = [], len(work.item_lens)
    while True:
        smaller = asdict(work.first_items(num_items))
        result = measure_alone(replace(task, way=BASELINE, training=[*task.training, *recompute], work=smaller), until)
        result["reduced"] = ", ".join(
            [f"{num_items} of {len(work.item_lens)} items"] * (num_items < len(work.item_lens))
            + ["recomputed"] * bool(recompute)
        )
        if result["fits"] or result.get("failed") or num_items == 1 and recompute:
            return result
        num_items = num_items // 2 if recompute else num_items
        recompute = ["--checkpointing"]


def with_shares(result: dict[str, Any], matrix: dict[str, Any], options: Options, device: str) -> dict[str, Any]:
    """The result and its MFU, over the datasheet (None without one) and over the measured matrix rate."""
    if not result["fits"]:
        return result
    peak = peak_flops(device_name(device)) if device == "cuda" and options.parallel.precision == "bf16" else None
    mfu = {
        "datasheet": result["tflops"] * 1e12 / peak if peak else None,
        "matrix_rate": result["tflops"] * 1e12 / matrix["flops_per_s"] if matrix["fits"] else None,
    }
    return {**result, "mfu": mfu}


def format_table(summary: dict[str, Any], work: Work) -> str:
    lines = [
        f"{summary['model_size']}, {len(work.item_lens)} items of {min(work.item_lens):,} to {max(work.item_lens):,} "
        f"tokens in a row of {work.row_len:,}, {work.micro_steps} micro-steps, on {summary['device']}; load of the "
        f"machine {summary['load']['before']:.1f} before, {summary['load']['after']:.1f} after",
        "",
        "| precision | way | tokens/s | ms per step (min to max) | TFLOP/s | of datasheet | of matrix rate | peak GiB "
        "| " + " | ".join(f"{phase}, ms" for phase in PHASES) + " | attention, ms |",
        "|---" * 13 + "|",
    ]
    for row in summary["rows"]:
        lines += [format_way(row["precision"], way, row[way]) for way in WAYS if row[way]]
        if row["ratio"]:
            ratio = row["ratio"]
            lines.append(
                f"| {row['precision']} | ratio | {ratio['tokens_per_s']:.2f} | | | | | {ratio['peak_memory']:.2f} "
                "| | | | | |"
            )
        if row["matrix_rate"]["fits"]:
            rates = [f"{shape} {rate / 1e12:.3g}" for shape, rate in row["matrix_rate"]["by_shape"].items()]
            lines += ["", f"matrix products in {row['precision']}, TFLOP/s: {', '.join(rates)}", ""]
    return "\n".join(lines).rstrip()


def why_not(result: dict[str, Any]) -> str:
    """What a table says of a measurement without figures."""
    return f"{'failed' if result.get('failed') else 'does not fit'}: {result['reason']}"


def format_way(precision: str, way: str, result: dict[str, Any]) -> str:
    """One line of the table."""
    name = f"{way} ({result['reduced']})" if result.get("reduced") else way
    if not result["fits"]:
        return f"| {precision} | {name} | {why_not(result)} " + "| " * 10 + "|"
    ms, mfu, kinds = result["ms_per_step"], result["mfu"], result["kinds_ms"]
    shares = " | ".join("-" if share is None else f"{share:.1%}" for share in mfu.values())
    peak = f"{result['peak_gib']:.2f}" + (f" ({result['reserved_gib']:.2f})" if "reserved_gib" in result else "")
    phases = " | ".join(f"{result['phases_ms'].get(phase, 0):.4g}" for phase in PHASES)
    return (
        f"| {precision} | {name} | {result['tokens_per_s']:,.0f} | {ms['median']:.4g} ({ms['min']:.4g} to "
        f"{ms['max']:.4g}) | {result['tflops']:.3g} | {shares} | {peak} | {phases} | "
        f"{format(kinds['attention'], '.4g') if kinds else '-'} |"
    )


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
