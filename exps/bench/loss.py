"""Loss of the language-model head with its gradients, time and peak memory: fused by chunks against all logits at once.

    python exps/bench/loss.py --num_tokens 4096 --hidden_size 512

The plain way is the recipe's: logits of all positions, turned to fp32, cross-entropy and squared log-normalizer over
them. Ours is `model.loss.LossHead`. Each runs in its own process on the same seeded numbers, forward and backward; the
memory is what comes on top of weight, hidden states and labels. The last line printed is one JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from exps.bench.common import (  # noqa: E402
    build_bench_parser,
    choose_device,
    device_name,
    exit_on_sigterm,
    find_too_small,
    peak_device_gib,
    peak_host_gib,
    run_alone,
    versions,
)
from model.cpu_memory import keep_freed_memory  # noqa: E402
from model.loss import IGNORE_INDEX, LossHead  # noqa: E402

VOCAB_SIZE = 65536  # Chameleon's
IGNORED_SHARE = 0.3
Z_LOSS_WEIGHT = 1e-5
PLAIN, OURS = "plain", "ours"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_parser() -> argparse.ArgumentParser:
    parser = build_bench_parser(__doc__, repeats="measured, if several after one to warm up")
    add = parser.add_argument
    add("--num_tokens", type=int, default=4096, help="positions, 30%% of them without a target (default 4096)")
    add("--hidden_size", type=int, default=512, help="width of the hidden states (default 512)")
    add("--precision", nargs="+", choices=tuple(DTYPES), help="default: fp32 on a CPU, bf16 on CUDA")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.task:
        print(json.dumps(measure(**json.loads(args.task))))
        return 0
    problem = find_too_small(args, "num_tokens", "hidden_size", "repeats")
    if problem:
        print(problem, file=sys.stderr)
        return 2
    device = choose_device(args.device)
    precisions = args.precision or (["bf16"] if device == "cuda" else ["fp32"])
    rows = [compare(precision, device, args) for precision in precisions]
    print(format_table(rows, device, args))
    head = {"bench": "loss", "device": device_name(device), "versions": versions()}
    print(json.dumps({**head, **rows[0], "rows": rows}))
    return 0


def compare(precision: str, device: str, args: argparse.Namespace) -> dict:
    """Both ways, their ratios, and how far their gradients lie apart."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {way: str(Path(folder) / f"{way}.pt") for way in (PLAIN, OURS)}
        sizes = {"num_tokens": args.num_tokens, "hidden_size": args.hidden_size, "repeats": args.repeats}
        results = {
            way: run_alone(
                "exps.bench.loss", {"way": way, "precision": precision, "device": device, "out": path, **sizes}
            )
            for way, path in paths.items()
        }
        ours, plain = (torch.load(paths[way], weights_only=True) for way in (OURS, PLAIN))
    errors = {name: float((ours[name] - plain[name]).norm() / plain[name].norm()) for name in plain}
    return {
        "precision": precision,
        "ours": results[OURS],
        "baseline": results[PLAIN],
        "ratio": {
            "time": results[OURS]["seconds"] / results[PLAIN]["seconds"],
            "peak_memory": results[OURS]["extra_gib"] / results[PLAIN]["extra_gib"],
        },
        "relative_error": errors,
    }


def measure(
    way: str, precision: str, device: str, out: str, num_tokens: int, hidden_size: int, repeats: int
) -> dict[str, float]:
    """Median seconds of forward and backward, and peak GiB above what was there before; gradients to the file `out`."""
    if device == "cpu" and way == OURS:
        keep_freed_memory()
    head, hidden, labels = build_case(num_tokens, hidden_size, DTYPES[precision], device)
    compute = plain_loss if way == PLAIN else fused_loss
    base = peak_device_gib(device) if device == "cuda" else peak_host_gib()
    num_warmup = int(repeats > 1)
    seconds = [timed(lambda: compute(head, hidden, labels), head, hidden, device) for _ in range(num_warmup + repeats)]
    peak = peak_device_gib(device) if device == "cuda" else peak_host_gib()
    torch.save({"hidden": hidden.grad.float().cpu(), "weight": head.weight.grad.float().cpu()}, out)
    return {"seconds": statistics.median(seconds[num_warmup:]), "extra_gib": peak - base}


def build_case(
    num_tokens: int, hidden_size: int, dtype: torch.dtype, device: str
) -> tuple[LossHead, torch.Tensor, torch.Tensor]:
    """A head, hidden states [T, D] and labels [T], from a seed."""
    generator = torch.Generator().manual_seed(0)
    head = LossHead(hidden_size, VOCAB_SIZE, bias=False, device="meta", dtype=dtype).to_empty(device=device)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCAB_SIZE, hidden_size, generator=generator) * 0.02)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).to(device, dtype).requires_grad_()
    labels = torch.randint(0, VOCAB_SIZE, (num_tokens,), generator=generator)
    labels[torch.rand(num_tokens, generator=generator) < IGNORED_SHARE] = IGNORE_INDEX
    return head, hidden, labels.to(device)


def plain_loss(head: LossHead, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, head.weight).float()
    is_target = labels != IGNORE_INDEX
    z_loss = torch.logsumexp(logits[is_target], dim=-1).square().mean()
    return F.cross_entropy(logits, labels) + Z_LOSS_WEIGHT * z_loss


def fused_loss(head: LossHead, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return head(hidden, labels, z_loss_weight=Z_LOSS_WEIGHT).loss


def timed(compute: Callable[[], torch.Tensor], head: LossHead, hidden: torch.Tensor, device: str) -> float:
    """Seconds of one forward and backward, without the gradients of the one before."""
    head.weight.grad = hidden.grad = None
    start = time.perf_counter()
    compute().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def format_table(rows: list[dict], device: str, args: argparse.Namespace) -> str:
    lines = [
        f"{args.num_tokens} tokens, {IGNORED_SHARE:.0%} without a target, width {args.hidden_size}, vocabulary "
        f"{VOCAB_SIZE:,}, on {device_name(device)}",
        "",
        "| precision | plain, s | ours, s | ratio | plain, GiB | ours, GiB | ratio | difference of gradients |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, plain, ratio, errors = row["ours"], row["baseline"], row["ratio"], row["relative_error"]
        lines.append(
            f"| {row['precision']} | {plain['seconds']:.3g} | {ours['seconds']:.3g} | {ratio['time']:.2f} | "
            f"{plain['extra_gib']:.2f} | {ours['extra_gib']:.2f} | {ratio['peak_memory']:.2f} | "
            f"{max(errors.values()):.1e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
