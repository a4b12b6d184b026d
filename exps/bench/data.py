"""From records to rows of tokens: index, plan and loader against the recipe's lists and padded batches.

    python exps/bench/data.py --num_items 1000000 10000000

The recipe's way, on each rank: the whole record by `json.load` as a list of dicts; items sorted by length, shuffled
among 500 global batches of neighbours and cut into batches; one `pickle.load` per item in a torch DataLoader; lists
padded to the longest of the batch. Ours: `open_index`, which the first process of a node builds, `plan_epoch` and
`build_loader`, by default and, for time and fill alone, with packing (rows of `--max_seq_len` tokens). Both read the
same items, one token file each, as rank 0 of `--num_ranks`, out of the page cache. Each measurement runs in its own
process. Memory is the peak on top of what was there, pages that ranks share included; that of a rank at the end is
without them. Above 20 million items, arrays go straight into an index (in shards) and the recipe's way is not run; nor
is it where it would not fit into memory.

The last line printed is one JSON object. Its ratios are ours / baseline of the largest number of items that both did:
`open_time` and `open_memory` (below 1: ours is better); `tokens_per_s`, of real tokens with the last of
`--num_workers`, and `fill`, the share of row positions that hold tokens (above 1: ours is better).
"""

import argparse
import contextlib
import gc
import json
import os
import pickle
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from data.data_config import DataSource  # noqa: E402
from data.dataset import TokenDataset  # noqa: E402
from data.packing import PlanOptions, plan_epoch  # noqa: E402
from data.plan_cache import load_plan, save_plan  # noqa: E402
from data.record_index import open_index  # noqa: E402
from data.rows import EpochRows, build_loader  # noqa: E402
from data.vocab import IGNORE_INDEX  # noqa: E402
from exps.bench.common import device_name, exit_on_sigterm, run_alone, versions  # noqa: E402
from exps.bench.synthetic import VOCAB_SIZE, Pool, write_index, write_placeholder, write_pool, write_record  # noqa: E402

MAX_RECORD_ITEMS = 20_000_000
RECIPE_BYTES_PER_ITEM = 500  # at its peak, while it orders its lists: measured at 1 and 10 million items
NEIGHBOUR_BATCHES = 500  # global batches among which the recipe shuffles items of similar length
WARMUP_ROWS = 20
PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One number of items: where they are and how they are read."""

    record: str
    cache_dir: str
    num_items: int
    batch_size: int
    max_seq_len: int
    num_ranks: int
    num_rows: int
    num_workers: list[int]
    repeats: int


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--num_items", type=int, nargs="+", default=[1_000_000, 10_000_000], help="default 1000000 10000000")
    add("--num_rows", type=int, default=200, help=f"read after {WARMUP_ROWS} to warm up, at each --num_workers")
    add("--num_workers", type=int, nargs="+", default=[0, 1, 2], help="of the loader (default 0 1 2)")
    add("--repeats", type=int, default=3, help="of the reading, of which the median is taken (default 3)")
    add("--batch_size", type=int, default=8, help="items per row (default 8, as in exps/7B.sh)")
    add("--num_ranks", type=int, default=8, help="that share a step, without accumulation (default 8)")
    add("--max_seq_len", type=int, default=8192, help="tokens of a packed row (default 8192)")
    add("--lengths", type=int, nargs=2, default=[300, 8000], metavar=("MIN", "MAX"), help="of items (default 300 8000)")
    add("--task", help=argparse.SUPPRESS)  # one measurement as JSON: how this script calls itself
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.task:
        task = json.loads(args.task)
        print(json.dumps(MEASURES[task["measure"]](Case(**task["case"]), **task["options"])))
        return 0
    if problems := find_problems(args):
        print("; ".join(problems), file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as work_dir:
        pool = write_pool(Path(work_dir) / "pool", *args.lengths)
        rows = [compare(num_items, pool, Path(work_dir), args) for num_items in args.num_items]
    print(format_table(rows, args))
    print(json.dumps(summarize(rows)))
    return 0


def find_problems(args: argparse.Namespace) -> list[str]:
    least = {"num_rows": 1, "repeats": 1, "batch_size": 1, "num_ranks": 1}
    problems = [
        f"--{name} must be at least {low}, got {getattr(args, name)}"
        for name, low in least.items()
        if getattr(args, name) < low
    ]
    if not 1 <= args.lengths[0] <= args.lengths[1] <= args.max_seq_len:
        problems.append(f"--lengths must be 1 <= MIN <= MAX <= --max_seq_len {args.max_seq_len}, got {args.lengths}")
    if min(args.num_workers) < 0:
        problems.append(f"--num_workers must be 0 or more, got {args.num_workers}")
    step_size = args.batch_size * args.num_ranks
    if min(args.num_items) < step_size * (WARMUP_ROWS + 1):
        problems.append(
            f"--num_items must be at least {step_size * (WARMUP_ROWS + 1)}, {WARMUP_ROWS + 1} steps of {step_size} "
            f"items, got {args.num_items}"
        )
    return problems


def compare(num_items: int, pool: Pool, work_dir: Path, args: argparse.Namespace) -> dict:
    """Both ways at one number of items, and their ratios; the baseline is None where it is not run."""
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        write = write_record if num_items <= MAX_RECORD_ITEMS else write_placeholder
        say(num_items, "writing the items")
        record = write(Path(folder), pool, num_items)
        case = Case(
            os.fspath(record), os.path.join(folder, "cache"), num_items, args.batch_size, args.max_seq_len,
            args.num_ranks, args.num_rows, args.num_workers, args.repeats,
        )  # fmt: skip
        ours = {
            "build": run(case, "build", pool=asdict(pool) if num_items > MAX_RECORD_ITEMS else None),
            "plan": run(case, "plan", packing=False),
            "packing": run(case, "plan", packing=True),
            **run(case, "read"),
        }
        not_run = why_not_recipe(num_items)
        baseline = None if not_run else run(case, "recipe")
    row = {"num_items": num_items, "ours": ours, "baseline": baseline, "ratio": None, "not_run": not_run}
    return {**row, "ratio": ratios(ours, baseline) if baseline else None}


def ratios(ours: dict, baseline: dict) -> dict[str, float]:
    return {
        "open_time": ours["open"]["seconds"] / baseline["open"]["seconds"],
        "open_memory": ours["open"]["extra_mib"] / baseline["open"]["extra_mib"],
        "tokens_per_s": ours["read"][-1]["tokens_per_s"] / baseline["read"][-1]["tokens_per_s"],
        "fill": ours["plan"]["fill"] / baseline["plan"]["fill"],
    }


def why_not_recipe(num_items: int) -> str | None:
    """Why the recipe's way is not run, None if it is."""
    needed_gib, free_gib = num_items * RECIPE_BYTES_PER_ITEM / 2**30, available_gib()
    if num_items > MAX_RECORD_ITEMS or needed_gib > free_gib:
        return f"about {needed_gib:.0f} GiB on each rank"
    return None


def run(case: Case, measure: str, **options: object) -> dict:
    say(case.num_items, f"measuring {measure} {'with packing' if options.get('packing') else ''}".rstrip())
    return run_alone("exps.bench.data", {"measure": measure, "case": asdict(case), "options": options})


def say(num_items: int, what: str) -> None:
    print(f"{num_items:,} items: {what}", file=sys.stderr, flush=True)


def measure_build(case: Case, pool: dict | None) -> dict[str, float]:
    """Seconds and peak memory to build the index: of the record, or from arrays if there is a `pool`."""
    if pool is None:
        return cost_of(lambda: open_index(case.record, case.cache_dir, say=quiet))[1]
    paths = Path(case.record), Path(case.cache_dir)
    return cost_of(lambda: write_index(*paths, Pool(**pool), case.num_items))[1]


def measure_plan(case: Case, packing: bool) -> dict[str, float]:
    """Seconds, peak memory and fill of an epoch's plan; that of the batches is kept for `measure_read`."""
    table = open_dataset(case).table
    batch_size = 1 if packing else case.batch_size
    options = PlanOptions(batch_size, case.max_seq_len, units_per_step=case.num_ranks, packing=packing)
    plan, cost = cost_of(lambda: plan_epoch(table, options, epoch=0))
    if not packing:
        save_plan(plan, plan_folder(case))
    return {**cost, "fill": plan.fill}


def measure_read(case: Case) -> dict:
    """Seconds and memory to open an index that is there, rates by number of workers, private memory of the rank."""
    private_mib = resident_mib("RssAnon")
    dataset, open_cost = cost_of(lambda: open_dataset(case))
    dataset.use_vocabulary(VOCAB_SIZE, begin_image_id=0)
    rows = EpochRows(dataset, load_plan(plan_folder(case)), rank=0, world_size=case.num_ranks, pad_id=1)
    read = read_rates(case, lambda num_workers: (row["num_tokens"] for row in build_loader(rows, num_workers)))
    return {"open": open_cost, "read": read, "private_mib": resident_mib("RssAnon") - private_mib}


def measure_recipe(case: Case) -> dict:
    """The same of the recipe's way, and its order of an epoch."""
    private_mib = resident_mib("RssAnon")
    items, open_cost = cost_of(lambda: RecipeItems(Path(case.record)))
    (order, fill), plan_cost = cost_of(lambda: recipe_order(items.lens, case.batch_size, case.num_ranks))

    def tokens_of_rows(num_workers: int) -> Iterable[int]:
        loader = DataLoader(
            items, case.batch_size, sampler=order, num_workers=num_workers, collate_fn=collate_lists,
            multiprocessing_context="fork" if num_workers else None,
        )  # fmt: skip
        return map(pad_lists, loader)

    read = read_rates(case, tokens_of_rows)
    private_mib = resident_mib("RssAnon") - private_mib
    return {"open": open_cost, "plan": {**plan_cost, "fill": fill}, "read": read, "private_mib": private_mib}


MEASURES = {"build": measure_build, "plan": measure_plan, "read": measure_read, "recipe": measure_recipe}


def open_dataset(case: Case) -> TokenDataset:
    return TokenDataset([DataSource(Path(case.record))], case.max_seq_len, cache_dir=Path(case.cache_dir), say=quiet)


def plan_folder(case: Case) -> Path:
    return Path(case.cache_dir) / "plan"


def quiet(line: str) -> None:
    """Says nothing: the last line of a measurement is its result."""


class RecipeItems(Dataset):
    """The recipe's dataset: the record as a list of dicts, and a list of the lengths."""

    def __init__(self, record: Path) -> None:
        with open(record) as file:
            self.entries = json.load(file)
        self.lens = [entry["len"] for entry in self.entries]
        self.folder = os.fspath(record.parent)

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        with open(os.path.join(self.folder, self.entries[index]["file"]), "rb") as file:
            item = pickle.load(file)
        return item["token"], item["label"]


def recipe_order(lens: list[int], batch_size: int, num_ranks: int) -> tuple[list[int], float]:
    """The items of rank 0 in the recipe's order, and the fill of all ranks' batches; what fills no step is lost."""
    rng = np.random.default_rng(0)
    step_size = batch_size * num_ranks
    pairs = [[index, length] for index, length in enumerate(lens)]
    pairs = pairs[: len(pairs) // step_size * step_size]
    pairs.sort(key=lambda pair: pair[1])
    steps = []
    for start in range(0, len(pairs), step_size * NEIGHBOUR_BATCHES):
        block = [index for index, _ in pairs[start : start + step_size * NEIGHBOUR_BATCHES]]
        rng.shuffle(block)
        steps += [block[i : i + step_size] for i in range(0, len(block), step_size)]
    rng.shuffle(steps)
    padded = sum(
        max(lens[i] for i in step[j : j + batch_size]) for step in steps for j in range(0, step_size, batch_size)
    )
    num_tokens = sum(lens[i] for step in steps for i in step)
    return [i for step in steps for i in step[:batch_size]], num_tokens / (padded * batch_size)


def collate_lists(batch: list[tuple[list[int], list[int]]]) -> tuple:
    return tuple(zip(*batch, strict=True))


def pad_lists(batch: tuple[list[list[int]], list[list[int]]]) -> int:
    """Turns a batch into the tensors [B, longest] that the recipe's model takes; returns its real tokens."""
    longest = max(map(len, batch[0]))
    for lists, filler in zip(batch, (0, IGNORE_INDEX), strict=True):
        torch.tensor([values + [filler] * (longest - len(values)) for values in lists])
    return sum(map(len, batch[0]))


def read_rates(case: Case, tokens_of_rows: Callable[[int], Iterable[int]]) -> list[dict[str, float]]:
    """What `read_rows` gives of the loader with each number of workers, the median of its rates."""
    passes = [[read_rows(tokens_of_rows(n), case.num_rows) for n in case.num_workers] for _ in range(case.repeats)]
    rates = [statistics.median(one["tokens_per_s"] for one in same) for same in zip(*passes, strict=True)]
    return [
        {"num_workers": num_workers, "tokens_per_s": rate, "num_tokens": one["num_tokens"]}
        for num_workers, rate, one in zip(case.num_workers, rates, passes[0], strict=True)
    ]


def read_rows(tokens_of_rows: Iterable[int], num_rows: int) -> dict[str, float]:
    """Takes up to `num_rows` rows after those that warm up; `num_tokens` are of all of them, the rate of the others."""
    num_tokens = warmup_tokens = 0
    start = time.perf_counter()
    for number, in_row in enumerate(tokens_of_rows, start=1):
        num_tokens += in_row
        if number == WARMUP_ROWS:
            start, warmup_tokens = time.perf_counter(), num_tokens
        if number == WARMUP_ROWS + num_rows:
            break
    seconds = time.perf_counter() - start
    return {"tokens_per_s": (num_tokens - warmup_tokens) / seconds, "num_tokens": num_tokens}


def cost_of(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """What `work` returns, its seconds, and MiB of peak memory on top of what was there (a page at least)."""
    base_mib = reset_peak()
    start = time.perf_counter()
    returned = work()
    seconds = time.perf_counter() - start
    return returned, {"seconds": seconds, "extra_mib": max(peak_mib() - base_mib, PAGE_MIB)}


def reset_peak() -> float:
    """Forgets the peak so far; returns the resident memory now, in MiB."""
    gc.collect()
    with contextlib.suppress(OSError):  # not allowed: then the peak of the imports counts, which is hardly more
        Path("/proc/self/clear_refs").write_text("5")
    return resident_mib("VmRSS")


def peak_mib() -> float:
    return resident_mib("VmHWM")


def resident_mib(field: str) -> float:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10


def available_gib() -> float:
    return int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) / 2**20


def format_table(rows: list[dict], args: argparse.Namespace) -> str:
    workers = ", ".join(map(str, args.num_workers))
    lines = [
        f"Lengths {args.lengths[0]}-{args.lengths[1]}, {args.batch_size} items per row, {args.num_ranks} ranks, packed "
        f"rows of {args.max_seq_len:,}, on {device_name('cpu')}",
        "",
        f"| items | way | build | open | plan | fill | plan with packing | fill | million tokens/s with {workers} "
        "workers | private memory of a rank, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(format_row(row["num_items"], "ours", row["ours"]))
        if row["baseline"]:
            lines.append(format_row(row["num_items"], "recipe", row["baseline"]))
        else:
            lines.append(f"| {row['num_items']:,} | recipe | not run: {row['not_run']} |" + " - |" * 7)
    return "\n".join(lines)


def format_row(num_items: int, way: str, result: dict) -> str:
    cells = [f"{num_items:,}", way]
    for name, has_fill in (("build", False), ("open", False), ("plan", True), ("packing", True)):
        cost = result.get(name)
        cells.append(f"{cost['seconds']:.3g} s, {cost['extra_mib']:,.0f} MiB" if cost else "-")
        if has_fill:
            cells.append(f"{cost['fill']:.2%}" if cost else "-")
    cells.append(", ".join(f"{read['tokens_per_s'] / 1e6:.2f}" for read in result["read"]))
    return f"| {' | '.join(cells)} | {result['private_mib']:,.0f} |"


def summarize(rows: list[dict]) -> dict:
    """The JSON object of the last line; its figures are of the largest number of items that both ways did."""
    both = [row for row in rows if row["baseline"]]
    row = max(both or rows, key=lambda row: row["num_items"])
    head = {"bench": "data", "device": device_name("cpu"), "versions": {**versions(), "numpy": np.__version__}}
    return {**head, **row, "rows": rows}


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
