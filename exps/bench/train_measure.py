"""What exps/bench/train.py measures in one process: speed, memory and where the time goes.

Phases are timed by marks in the step, kinds of work by the profiler, both in one step after those that are timed. The
matrix rate is what the machine reaches on products of the model's own shapes and precision, one after the other.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402

from exps.bench.common import peak_device_gib, peak_host_gib  # noqa: E402
from exps.bench.train_ways import WAYS, Work, bench_config  # noqa: E402
from model.cpu_memory import keep_freed_memory  # noqa: E402
from model.distributed import Launch, end_process, process_group  # noqa: E402
from model.flops import trained_flops_per_token  # noqa: E402
from model.options import Options  # noqa: E402
from model.options import build_parser as build_training_parser  # noqa: E402
from model.parallelize import DTYPES, set_matmul_precision  # noqa: E402

MATRIX_RATE = "matrix_rate"  # a way of `Task`: products of matrices instead of a step
GIB = 2**30
# Kinds of work by the names of operators (CPU) and kernels (CUDA); the first that fits counts. Copies come before the
# optimizer, since copies of lists run in its `multi_tensor` kernels too; what is compiled is named after all that it
# does, casts (`_to_copy`) among it, and is no copy.
KINDS = {
    "attention": r"_scaled_dot_product|attend_documents|flash|fmha|sdpa|flex_attention",
    "matrix products": r"^aten::(mm|addmm|bmm|baddbmm|addmm_|_scaled_mm)$|gemm|cutlass|nvjet|xmma|cublas",
    "copies": r"^(?!triton_).*(c10d|fsdp|nccl|memcpy|memset|copy|split_with|chunk_cat|all_gather|reduce_scatter)",
    "optimizer": r"adam|_foreach|multi_tensor|lpnorm",
}
# How it is said by what allocates beside torch's allocator: NCCL, cuBLAS, cuDNN, Triton.
OUT_OF_MEMORY = r"out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"


@dataclass(frozen=True)
class Task:
    """One measurement. `training` is a command line of finetune_solver.py without `--data_config`."""

    way: str  # a key of WAYS, or MATRIX_RATE
    training: Sequence[str]
    device: str
    work: Mapping[str, Any] = field(default_factory=dict)  # arguments of Work
    warmup: int = 2
    repeats: int = 3
    profile: bool = True


def main(argv: list[str] | None = None) -> int:
    """`--task JSON`: measures and prints one JSON object. How the bench calls itself; see exps/bench/train.py."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True)
    task = Task(**json.loads(parser.parse_args(argv).task))
    try:
        result = {"fits": True, **(measure_matrix_rate if task.way == MATRIX_RATE else measure)(task)}
    except RuntimeError as error:
        result = {"fits": False, "reason": out_of_memory(error)}
        if result["reason"] is None:
            raise
    print(json.dumps(result))
    end_process(0)  # after an error the group of processes has not been left


def out_of_memory(error: RuntimeError) -> str | None:
    """What to say of an error if it is one of too little memory; None if it is another."""
    if "DefaultCPUAllocator: can't allocate memory" in str(error):  # an ordinary RuntimeError
        return "CPU out of memory"
    if isinstance(error, torch.OutOfMemoryError):
        return str(error).split(".")[0]
    return "CUDA out of memory" if re.search(OUT_OF_MEMORY, str(error), re.I) else None


def parse_training(arguments: Sequence[str]) -> Options:
    """The options of a training whose items are made up."""
    parser = build_training_parser()
    parser.prog = "exps/bench/train.py"
    return Options.from_namespace(parser.parse_args(["--data_config", "made_up.yaml", *arguments]))


def measure(task: Task) -> dict[str, Any]:
    """Speed, memory and, with `profile`, the split of one way."""
    options, work = parse_training(task.training), Work(**{**task.work, "item_lens": tuple(task.work["item_lens"])})
    set_matmul_precision(options.parallel.precision)
    if task.device == "cpu" and task.way == "ours":
        keep_freed_memory()
    with process_group(Launch(), task.device, timeout_s=600) as device:
        base_gib = peak_host_gib()
        way = WAYS[task.way](work, options, bench_config(options), device)
        flops = trained_flops_per_token(way.model, work.mean_context)
        start = time.perf_counter()
        losses = [way.step() for _ in range(task.warmup)]
        wait(device)
        warmup_s = time.perf_counter() - start
        seconds = time_steps(lambda: losses.append(way.step()), task.repeats, device)
        memory = read_memory(device, base_gib)
        split = profile_step(way.step, device) if task.profile else {}
    median = statistics.median(seconds)
    return {
        "tokens_per_s": work.num_tokens / median,
        "ms_per_step": {"median": median * 1e3, "min": min(seconds) * 1e3, "max": max(seconds) * 1e3},
        "flops_per_token": flops,
        "tflops": work.num_tokens * flops / median / 1e12,
        **memory,
        **split,
        "num_items": len(work.item_lens) * work.micro_steps,
        "num_tokens": work.num_tokens,
        "warmup_s": warmup_s,
        "losses": torch.stack(losses).tolist(),
    }


def time_steps(step: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each of some steps. On CUDA by events, so that the host does not wait between them."""
    if device.type != "cuda":
        return [_seconds(step) for _ in range(repeats)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    wait(device)
    return [before.elapsed_time(after) / 1e3 for before, after in zip(events, events[1:], strict=False)]


def read_memory(device: torch.device, base_gib: float) -> dict[str, float]:
    """Peak GiB: of tensors and of what the allocator holds on CUDA, else of the process over `base_gib`."""
    if device.type == "cuda":
        return {"peak_gib": peak_device_gib("cuda"), "reserved_gib": torch.cuda.max_memory_reserved() / GIB}
    return {"peak_gib": peak_host_gib() - base_gib}


class Marks:
    """Time between marks, added up by name; on CUDA by events, read when all is done."""

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
    """Milliseconds of one step by phase and by kind of work, and the ten operators or kernels that take longest.

    `idle` is the time in which no kernel ran. Kinds can add up to more than the step, since copies run beside products.
    On CUDA the phases are those of another step, without the profiler: it makes the host slower, but no kernel. Where
    the profiler fails there, or may not see kernels, there are no kinds: what was measured before is not lost.
    """
    phases = mark_step(step, device) if device.type == "cuda" else {}
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA] if device.type == "cuda" else [activity.CPU]
    try:
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            profiled = mark_step(step, device)
    except RuntimeError as error:
        if not phases:
            raise
        print(f"the profiled step failed: {error}", file=sys.stderr)
        return {"phases_ms": phases, "kinds_ms": None, "longest_ms": {}}
    if device.type == "cuda":
        by_name, busy = read_kernels(profiler.events())
    else:
        by_name = {event.key: event.self_cpu_time_total / 1e3 for event in profiler.key_averages()}
        phases, busy = profiled, sum(profiled.values())
    kinds = sum_by_kind(by_name) | {"idle": max(0.0, sum(phases.values()) - busy)} if by_name else None
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:10]
    return {"phases_ms": phases, "kinds_ms": kinds, "longest_ms": {name[:80]: ms for name, ms in longest}}


def read_kernels(events: Iterable[Any]) -> tuple[dict[str, float], float]:
    """Of a profile: milliseconds by kernel, and those in which at least one of them ran."""
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
    """Sums of the values by the kind of their names, `KINDS` and `other`."""
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


def measure_matrix_rate(task: Task, seconds: float = 0.5) -> dict[str, Any]:
    """`flops_per_s` of the fastest of the model's own matrix products, `by_shape` of each (rows x inner x columns).

    Each is run again and again for `seconds` on new results but the same inputs, in the precision of the training.
    """
    options = parse_training(task.training)
    set_matmul_precision(options.parallel.precision)
    config, dtype = bench_config(options), DTYPES[options.parallel.precision]
    num_tokens, hidden, inner = task.work["row_len"], config.hidden_size, config.intermediate_size
    shapes = [(num_tokens, hidden, hidden), (num_tokens, hidden, inner), (num_tokens, inner, hidden)]
    shapes.append((min(num_tokens, 512), hidden, config.vocab_size))
    rates = {f"{m}x{k}x{n}": matrix_rate(m, k, n, dtype, task.device, seconds) for m, k, n in shapes}
    return {"flops_per_s": max(rates.values()), "by_shape": rates}


def matrix_rate(m: int, k: int, n: int, dtype: torch.dtype, device: str, seconds: float) -> float:
    """FLOPs per second of `[m, k] @ [k, n]`."""
    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(m, k, device=device, generator=generator).to(dtype)
    right = torch.randn(n, k, device=device, generator=generator).to(dtype).t()
    out = torch.empty(m, n, dtype=dtype, device=device)

    def run(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            torch.mm(left, right, out=out)
        wait(torch.device(device))
        return time.perf_counter() - start

    run(3)
    once = max(run(3) / 3, 1e-6)
    times = max(3, round(seconds / once))
    return 2.0 * m * k * n * times / run(times)


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
