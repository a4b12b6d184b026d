"""What exps/bench/train.py measures in one process: speed, memory and where the time goes."""

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType

from exps.bench.common import peak_device_gib, resident_gib
from exps.bench.train_ways import WAYS, Work, bench_config
from model.run.flops import trained_flops_per_token
from model.run.options import Options
from model.run.options import build_parser as build_training_parser
from model.training.cpu_memory import keep_freed_memory
from model.training.distributed import Launch, process_group
from model.training.parallelize import DTYPES, set_matmul_precision

# Kinds of work by the names of operators (CPU) and kernels (CUDA); the first pattern that fits counts. Copies come
# before the optimizer because lists are copied by its `multi_tensor` kernels too. The name of a compiled kernel lists
# all that the kernel does, casts (`_to_copy`) too: it is no copy.
KINDS = {
    "attention": r"_scaled_dot_product|attend_documents|flash|fmha|sdpa|flex_attention",
    "matrix products": r"^aten::(mm|addmm|bmm|baddbmm|addmm_|_scaled_mm)$|gemm|cutlass|nvjet|xmma|cublas",
    "copies": r"^(?!triton_).*(c10d|fsdp|nccl|memcpy|memset|copy|split_with|chunk_cat|all_gather|reduce_scatter)",
    "optimizer": r"adam|_foreach|multi_tensor|lpnorm",
}


# Counted per step. Retries and mapped memory in a steady step mean that the card is too full.
ALLOCATOR_COUNTERS = ("num_alloc_retries", "num_device_alloc", "num_device_free", "num_sync_all_streams")


def parse_training(arguments: Sequence[str]) -> Options:
    """The options of a training on random items."""
    return Options.from_namespace(build_training_parser().parse_args(["--data_config", "made_up.yaml", *arguments]))


def measure(way: str, training: list[str], device: str, work: Mapping[str, Any], repeats: int) -> dict[str, Any]:
    """Speed, memory and the split of one way; `training` is a command line of finetune_solver.py without its data."""
    options, shape = parse_training(training), Work(**{**work, "item_lens": tuple(work["item_lens"])})
    set_matmul_precision(options.parallel.precision)
    if device == "cpu" and way == "ours":
        keep_freed_memory()
    with process_group(Launch(), device, timeout_s=600) as torch_device:
        base_gib = resident_gib()
        built = WAYS[way](shape, options, bench_config(options), torch_device)
        flops = trained_flops_per_token(built.model, shape.mean_context)
        losses = [built.step() for _ in range(3 if device == "cuda" else 1)]
        before = count_allocations(device)
        seconds, queued_s = time_steps(lambda: losses.append(built.step()), repeats, torch_device)
        memory = {"peak_gib": resident_gib() - base_gib}
        if device == "cuda":
            memory = {"peak_gib": peak_device_gib(device), "reserved_gib": torch.cuda.max_memory_reserved() / 2**30}
            after = count_allocations(device)
            memory["allocator"] = {name: (after[name] - before[name]) / repeats for name in after}
        split = profile_step(built.step, torch_device)
    median = statistics.median(seconds)
    return {
        "tokens_per_s": shape.num_tokens / median,
        "ms_per_step": {"median": median * 1e3, "min": min(seconds) * 1e3, "max": max(seconds) * 1e3},
        "host_ms": queued_s / repeats * 1e3,
        "flops_per_token": flops,
        "tflops": shape.num_tokens * flops / median / 1e12,
        **memory,
        **split,
        "num_items": len(shape.item_lens) * shape.micro_steps,
        "num_tokens": shape.num_tokens,
        "losses": torch.stack(losses).tolist(),
    }


def count_allocations(device: str) -> dict[str, int]:
    """The allocator's counters so far; empty without CUDA."""
    stats = torch.cuda.memory_stats() if device == "cuda" else {}
    return {name: stats[name] for name in ALLOCATOR_COUNTERS if name in stats}


def time_steps(step: Callable[[], object], repeats: int, device: torch.device) -> tuple[list[float], float]:
    """(seconds of each of some steps, seconds that the host took to queue them all)."""
    wait(device)
    began, marks = time.perf_counter(), Marks(device)
    for number in range(repeats):
        step()
        marks(str(number))
    queued_s = time.perf_counter() - began
    wait(device)
    return [ms / 1e3 for ms in marks.read_ms().values()], queued_s


class Marks:
    """Time between marks, added up by name; on CUDA from events, which are read when all work is done."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.stamps = [("", self._now())]

    def __call__(self, name: str) -> None:
        self.stamps.append((name, self._now()))

    def read_ms(self) -> dict[str, float]:
        total: dict[str, float] = defaultdict(float)
        for (_, before), (name, after) in zip(self.stamps, self.stamps[1:], strict=False):
            total[name] += before.elapsed_time(after) if self.is_cuda else (after - before) * 1e3
        return dict(total)

    def _now(self) -> Any:
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def profile_step(step: Callable[[Marks], object], device: torch.device) -> dict[str, Any]:
    """Milliseconds of one step by phase and by kind of work; `idle` is the time in which no kernel ran.

    Kinds can add up to more than the step: copies run beside products.
    """
    # Without the profiler, which slows the host.
    phases = mark_step(step, device)
    with torch.profiler.profile(acc_events=True) as profiler:
        mark_step(step, device)
    if device.type == "cuda":
        by_name, busy = read_kernels(profiler.events())
    else:
        by_name = {event.key: event.self_cpu_time_total / 1e3 for event in profiler.key_averages()}
        busy = sum(phases.values())
    return {"phases_ms": phases, "kinds_ms": sum_by_kind(by_name) | {"idle": max(0.0, sum(phases.values()) - busy)}}


def read_kernels(events: Iterable[Any]) -> tuple[dict[str, float], float]:
    """Milliseconds of a profile by kernel, and milliseconds in which at least one kernel ran."""
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    by_name: dict[str, float] = defaultdict(float)
    for event in kernels:
        by_name[event.name] += event.time_range.elapsed_us() / 1e3
    return dict(by_name), covered([(event.time_range.start, event.time_range.end) for event in kernels]) / 1e3


def mark_step(step: Callable[[Marks], object], device: torch.device) -> dict[str, float]:
    """Milliseconds of one step by phase."""
    marks = Marks(device)
    step(marks)
    wait(device)
    return marks.read_ms()


def sum_by_kind(by_name: Mapping[str, float]) -> dict[str, float]:
    """Sums of the values by the kind of work, `KINDS` and `other`."""
    totals = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, value in by_name.items():
        totals[next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.I)), "other")] += value
    return totals


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """How long at least one of the intervals (start, end) lasts."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def measure_matrix_rate(training: list[str], device: str, work: Mapping[str, Any]) -> dict[str, Any]:
    """FLOP/s of the model's own matrix products: the fastest, and each `by_shape` (rows x inner x columns)."""
    options = parse_training(training)
    set_matmul_precision(options.parallel.precision)
    config, dtype = bench_config(options), DTYPES[options.parallel.precision]
    num_tokens, hidden, inner = work["row_len"], config.hidden_size, config.intermediate_size
    shapes = [(num_tokens, hidden, hidden), (num_tokens, hidden, inner), (num_tokens, inner, hidden)]
    shapes.append((min(num_tokens, 512), hidden, config.vocab_size))
    rates = {f"{m}x{k}x{n}": matrix_rate(m, k, n, dtype, torch.device(device)) for m, k, n in shapes}
    return {"flops_per_s": max(rates.values()), "by_shape": rates}


def matrix_rate(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device, seconds: float = 0.5) -> float:
    """FLOP/s of `[m, k] @ [k, n]`, repeated for `seconds` on the same inputs."""
    left, right = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype).t()
    out = torch.empty(m, n, dtype=dtype, device=device)

    def product() -> None:
        torch.mm(left, right, out=out)

    repeats = max(3, round(seconds / min(time_steps(product, 6, device)[0])))
    return 2.0 * m * k * n * repeats / sum(time_steps(product, repeats, device)[0])


def wait(device: torch.device) -> None:
    """Waits until the device has done all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
