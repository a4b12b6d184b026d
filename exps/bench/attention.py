"""Time of packed attention, forward and backward: the way of training against one call with a mask, and other kernels.

    python exps/bench/attention.py --row_len 4096 --item_len 300 1100

One row holds several items, none of which sees another. Ours is `model.attention.packed_attention` (varlen on CUDA, one
call per item on a CPU), the baseline torch's sdpa with a mask of blocks. On CUDA there are also sdpa by cuDNN and flex
attention, compiled (`others`), and every kernel on a row of one single item, as `causal`. The last line printed is one
JSON object; times are of one layer, in milliseconds.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from exps.bench.common import (  # noqa: E402
    build_bench_parser,
    choose_device,
    device_name,
    exit_on_sigterm,
    find_too_small,
    run_alone,
    versions,
)
from exps.bench.train_ways import fill_rows  # noqa: E402
from model.attention import build_packed_row, packed_attention  # noqa: E402

OURS, MASK, CUDNN, FLEX = "ours", "sdpa with a mask", "sdpa by cuDNN", "flex"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def build_parser() -> argparse.ArgumentParser:
    parser = build_bench_parser(__doc__)
    add = parser.add_argument
    add("--row_len", type=int, default=4096, help="tokens of the row (default 4096)")
    add("--item_len", type=int, nargs=2, default=[300, 1100], metavar="N", help="of items (default 300 1100)")
    add("--num_heads", type=int, help="default: 32 on CUDA, as 7B; 4 on a CPU, as tiny")
    add("--head_dim", type=int, help="default: 128 on CUDA, 64 on a CPU")
    add("--repeats", type=int, default=20, help="measured, after some to warm up (default 20)")
    add("--precision", choices=tuple(DTYPES), help="default: bf16 on CUDA, fp32 on a CPU")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.task:
        print(json.dumps(measure(**json.loads(args.task))))
        return 0
    problem = find_too_small(args, "row_len", "num_heads", "head_dim", "repeats")
    if not problem and not 2 <= args.item_len[0] <= args.item_len[1] <= args.row_len:
        problem = f"--item_len must be 2 to --row_len {args.row_len}, the shortest first, got {args.item_len}"
    if problem:
        print(problem, file=sys.stderr)
        return 2
    device = choose_device(args.device)
    is_cuda = device == "cuda"
    task = {
        "num_heads": args.num_heads or (32 if is_cuda else 4),
        "head_dim": args.head_dim or (128 if is_cuda else 64),
        "precision": args.precision or ("bf16" if is_cuda else "fp32"),
        "device": device,
        "repeats": args.repeats,
    }
    layouts = {"items": fill_rows(args.row_len, *args.item_len), "causal": [args.row_len]}
    ways = [OURS, MASK, *([CUDNN, FLEX] if is_cuda else [])]
    results = {way: measure_alone(way, {**task, "layouts": layouts}) for way in ways}
    ms = {way: {name: found and found["ms"] for name, found in of.items()} for way, of in results.items()}
    differences = [found["difference"] for of in results.values() for found in of.values() if found]
    summary = {
        "bench": "attention",
        "device": device_name(device),
        "versions": versions(),
        "settings": {**task, "items": layouts["items"]},
        "ours": {"ms": ms[OURS]},
        "baseline": {"ms": ms[MASK]},
        "others": {way: {"ms": ms[way]} for way in ways[2:]},
        "ratio": {name: ms[OURS][name] / ms[MASK][name] for name in layouts},
        "largest_difference": max(differences),
    }
    print(format_table(summary, ms))
    print(json.dumps(summary))
    return 0


def measure_alone(way: str, task: dict) -> dict[str, dict[str, float] | None]:
    """What `measure` gives in a process of its own; None where one of the other kernels does not run."""
    try:
        return run_alone("exps.bench.attention", {"way": way, **task})
    except RuntimeError:
        if way in (OURS, MASK):
            raise
        return dict.fromkeys(task["layouts"])


def measure(
    way: str,
    layouts: dict[str, Sequence[int]],
    num_heads: int,
    head_dim: int,
    precision: str,
    device: str,
    repeats: int,
) -> dict[str, dict[str, float] | None]:
    """For each layout (lengths of items): median milliseconds of forward and backward, and how far the output lies from
    that of items one by one. None where one of the other kernels does not take the layout."""
    results: dict[str, dict[str, float] | None] = {}
    for name, lens in layouts.items():
        try:
            results[name] = measure_layout(way, lens, num_heads, head_dim, DTYPES[precision], device, repeats)
        except RuntimeError as error:
            if way in (OURS, MASK):
                raise
            print(f"{way}, {name}: {error}", file=sys.stderr)
            results[name] = None
    return results


def measure_layout(
    way: str, lens: Sequence[int], num_heads: int, head_dim: int, dtype: torch.dtype, device: str, repeats: int
) -> dict[str, float]:
    """Of items of these lengths: `ms` and `difference`, as `measure` gives them."""
    generator = torch.Generator(device).manual_seed(0)
    shape = 1, num_heads, sum(lens), head_dim
    qkv = [torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_() for _ in range(3)]
    attend = build_attention(way, lens, torch.device(device), dtype)
    for _ in range(3 if device == "cuda" else 1):
        timed_ms(attend, qkv)
    ms = statistics.median(timed_ms(attend, qkv) for _ in range(repeats))
    with torch.no_grad():
        splits = (x.split(list(lens), dim=2) for x in qkv)
        alone = [F.scaled_dot_product_attention(*part, is_causal=True) for part in zip(*splits, strict=True)]
        difference = (attend(*qkv) - torch.cat(alone, dim=2)).abs().max()
    return {"ms": ms, "difference": float(difference)}


def timed_ms(attend: Attention, qkv: Sequence[torch.Tensor]) -> float:
    """Milliseconds of one forward and backward."""
    start = time.perf_counter()
    out = attend(*qkv)
    torch.autograd.grad(out, qkv, torch.ones_like(out))
    if out.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def build_attention(way: str, lens: Sequence[int], device: torch.device, dtype: torch.dtype) -> Attention:
    """[1, H, T, head_dim] three times -> the same shape, by one of the ways. A row of one item needs no mask."""
    bounds = F.pad(torch.tensor(lens).cumsum(0), (1, 0)).int()
    ids = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens)).to(device)
    if way == OURS:
        row = build_packed_row(bounds, sum(lens), device, max(lens), dtype)
        return lambda q, k, v: packed_attention(None, q, k, v, None, packed_row=row)[0].transpose(1, 2)
    if way == FLEX:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def sees(_batch, _head, query, key):
            return (query >= key) & (ids[query] == ids[key])

        block_mask = create_block_mask(sees, None, None, sum(lens), sum(lens), device=device)
        compiled = torch.compile(flex_attention)
        return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)
    mask = None
    if len(lens) > 1:
        positions = torch.arange(sum(lens), device=device)
        mask = (positions[:, None] >= positions) & (ids[:, None] == ids)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

    if way == MASK:
        return attend

    def attend_by_cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return attend(q, k, v)

    return attend_by_cudnn


def format_table(summary: dict, ms: dict[str, dict[str, float]]) -> str:
    settings = summary["settings"]
    lines = [
        f"{settings['num_heads']} heads of {settings['head_dim']}, {settings['precision']}, {len(settings['items'])} "
        f"items in a row of {sum(settings['items']):,} tokens, on {summary['device']}",
        "",
        "| attention | row of items, ms | one item, ms |",
        "|---|---|---|",
    ]
    for way, by_layout in ms.items():
        cells = ["does not run" if value is None else f"{value:.4g}" for value in by_layout.values()]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    ratio = summary["ratio"]
    lines.append(f"| ratio of ours to the mask | {ratio['items']:.2f} | {ratio['causal']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
