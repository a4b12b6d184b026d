"""What a log line at every optimizer step costs: against a run that sums and logs nothing.

    python exps/bench/metrics.py --num_steps 30 --repeats 3

The `bench` size is trained by the real solver, without checkpoints. Ours is `--log_interval 1`: figures summed on the
device, reduced, written to `metrics.jsonl` (and to the trackers of `--log_with`) and printed; the baseline does none of
it. The two take turns, each in its own process. `step` is the median over the pairs of the ratio of their median step
times: on a busy machine that ratio strays by more than logging costs, so `share` gives what the lines themselves took
of a step, in the runs that log; on a GPU, waiting for the device is in it. The last line printed is one JSON object.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from exps.bench.common import choose_device, device_name, exit_on_sigterm, run_alone, versions  # noqa: E402
from exps.bench.synthetic import VOCAB_SIZE, write_pool, write_record  # noqa: E402
from finetune_solver import Solver  # noqa: E402
from model.checks import prepare  # noqa: E402
from model.cpu_memory import keep_freed_memory  # noqa: E402
from model.distributed import Launch, process_group  # noqa: E402
from model.options import Options  # noqa: E402
from model.options import build_parser as build_solver_parser  # noqa: E402
from model.trackers import TRACKERS  # noqa: E402

EVERY_STEP, NOTHING = "a line at every step", "no logging"
NUM_WARMUP = 3  # steps before the first that counts
STEPS_AT_ONCE = 10  # on a GPU, which works behind the host's back: steps between two looks at the clock
MIN_LEN, MAX_LEN = 100, 156


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--num_steps", type=int, default=30, help="measured in each run (default 30; on CUDA a multiple of 10)")
    add("--batch_size", type=int, default=4, help="items of about 128 tokens per step (default 4)")
    add("--repeats", type=int, default=3, help="pairs of runs (default 3)")
    add("--log_with", default="", help=f"trackers beside metrics.jsonl: {', '.join(TRACKERS)} (default: none)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default auto: cuda if there is one")
    add("--task", help=argparse.SUPPRESS)  # one measurement as JSON: how this script calls itself
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.task:
        print(json.dumps(measure(**json.loads(args.task))))
        return 0
    for name in ("num_steps", "batch_size", "repeats"):
        if getattr(args, name) < 1:
            print(f"--{name} must be at least 1, got {getattr(args, name)}", file=sys.stderr)
            return 2
    device, load_before = choose_device(args.device), os.getloadavg()[0]
    task = {"num_steps": args.num_steps, "batch_size": args.batch_size, "log_with": args.log_with, "device": device}
    results: dict[str, list[dict]] = {EVERY_STEP: [], NOTHING: []}
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder), (NUM_WARMUP + args.num_steps + STEPS_AT_ONCE) * args.batch_size)
        for repeat in range(args.repeats):
            for way in (EVERY_STEP, NOTHING) if repeat % 2 else (NOTHING, EVERY_STEP):
                results[way].append(run_alone("exps.bench.metrics", {"way": way, "folder": folder, **task}))
    pairs = zip(results[EVERY_STEP], results[NOTHING], strict=True)
    ours, baseline = (
        {name: statistics.median(run[name] for run in results[way]) for name in ("step_ms", "log_ms")}
        for way in (EVERY_STEP, NOTHING)
    )
    summary = {
        "bench": "metrics",
        "device": device_name(device),
        "versions": versions(),
        "ours": ours,
        "baseline": baseline,
        "ratio": {
            "step": statistics.median(mine["step_ms"] / other["step_ms"] for mine, other in pairs),
            "share": statistics.median(run["log_ms"] / run["step_ms"] for run in results[EVERY_STEP]),
        },
        "runs": results,
        "load": {"before": load_before, "after": os.getloadavg()[0]},
    }
    print(format_table(summary))
    print(json.dumps(summary))
    return 0


def write_task(folder: Path, num_items: int) -> None:
    """A tokenizer of 65,536 names, Chameleon's special ones first, and `data.yaml` with random items."""
    names = ["<s>", "<pad>", "</s>", "<unk>", "<eoss>", "<racm3:break>"]
    names += ["<reserved08706>", "<reserved08799>", "<reserved08801>", "IMGIMGAZ"]
    names += [f"word{number}" for number in range(VOCAB_SIZE - len(names))]
    tokenizer = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder / "tokenizer")
    write_record(folder, write_pool(folder / "pool", MIN_LEN, MAX_LEN), num_items)
    (folder / "data.yaml").write_text("META:\n  - path: record.json\n")


def measure(way: str, folder: str, num_steps: int, batch_size: int, log_with: str, device: str) -> dict[str, float]:
    """Medians over the steps of one run, in milliseconds: a step, and what of it summing and logging took."""
    if device == "cpu":
        keep_freed_memory()
    output_dir = tempfile.mkdtemp(dir=folder)
    args = [
        *("--model_size", "bench", "--tokenizer", f"{folder}/tokenizer", "--data_config", f"{folder}/data.yaml"),
        *("--output_dir", output_dir, "--batch_size", str(batch_size), "--accum_iter", "1", "--max_seq_len", "160"),
        *("--max_steps", str(NUM_WARMUP + num_steps), "--epochs", "1", "--num_workers", "0", "--log_interval", "1"),
        *("--precision", "bf16" if device == "cuda" else "fp32", "--device", device, "--log_with", log_with),
        "--no_compile",  # rows have several lengths: compiling for them would fall into the steps that are measured
    ]
    options = Options.from_namespace(build_solver_parser().parse_args(args))
    with contextlib.redirect_stdout(sys.stderr):
        dataset, _ = prepare(options, Launch())
        with process_group(Launch(), device, timeout_s=600) as torch_device:
            solver = TimedSolver(options, Launch(), dataset, torch_device)
            solver.logs = way == EVERY_STEP
            solver.run()
    return solver.figures()


class TimedSolver(Solver):
    """Looks at the clock at every step, saves nothing, and logs only if `logs`."""

    logs = True

    def build(self) -> None:
        super().build()
        self.clock: list[float] = []
        self.log_s: list[float] = []
        add = self.run_log.sums.add
        self.run_log.sums.add = (lambda *args: self.timed(add, *args)) if self.logs else (lambda *args: None)

    def train_step(self, *args: Any) -> None:
        self.look()
        self.log_s.append(0.0)
        super().train_step(*args)

    def log(self, *args: Any) -> None:
        if self.logs:
            self.timed(super().log, *args)

    def save(self, name: str) -> None:
        self.look()

    def timed(self, work: Any, *args: Any) -> None:
        start = time.perf_counter()
        work(*args)
        self.log_s[-1] += time.perf_counter() - start

    def look(self) -> None:
        if self.device.type == "cuda" and (len(self.clock) - NUM_WARMUP) % STEPS_AT_ONCE == 0:
            torch.cuda.synchronize()
        self.clock.append(time.perf_counter())

    def figures(self) -> dict[str, float]:
        # The first look of `save`, after the first step, is taken away; its last one ends the last step.
        clock = [self.clock[0], *self.clock[2:]][NUM_WARMUP:]
        width = STEPS_AT_ONCE if self.device.type == "cuda" else 1
        marks = clock[::width]
        steps = [(stop - start) / width for start, stop in zip(marks, marks[1:], strict=False)]
        return {"step_ms": 1e3 * statistics.median(steps), "log_ms": 1e3 * statistics.median(self.log_s[NUM_WARMUP:])}


def format_table(summary: dict) -> str:
    ours, baseline, ratio = summary["ours"], summary["baseline"], summary["ratio"]
    return "\n".join(
        [
            f"Training of the bench size, one process on {summary['device']}; load of the machine "
            f"{summary['load']['before']:.1f} before, {summary['load']['after']:.1f} after",
            "",
            "| way | step, ms | of it summing and logging, ms |",
            "|---|---|---|",
            f"| {EVERY_STEP} | {ours['step_ms']:.2f} | {ours['log_ms']:.3f} |",
            f"| {NOTHING} | {baseline['step_ms']:.2f} | {baseline['log_ms']:.3f} |",
            f"| ratio | {ratio['step']:.3f} | {ratio['share']:.2%} of a step |",
        ]
    )


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
