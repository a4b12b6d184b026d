"""From records to rows of tokens: our index, epoch order and loader against the recipe's lists and padded batches.

    python exps/bench/data.py --num_items 1000000 10000000

The recipe's way, on each rank: the record as a list of dicts; items sorted by length, shuffled among 500 global batches
of neighbours and cut into batches; one `pickle.load` per item; lists padded to the longest of the batch. Our way:
`open_index`, which the first process of a node builds, `plan_epoch` and `build_loader`; packing (rows of
`--max_seq_len` tokens) is only planned. Both read the same items as rank 0, out of the page cache. Memory is the growth
to the peak, with pages that ranks share; `private_mib` is the growth at the end without these pages. The last line
printed is one JSON object with the figures of the last `--num_items`.
"""

import argparse
import gc
import json
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from data.epoch.dataset import TokenDataset  # noqa: E402
from data.epoch.packing import OrderOptions, plan_epoch  # noqa: E402
from data.epoch.rows import EpochRows, build_loader  # noqa: E402
from data.formats.data_config import DataSource  # noqa: E402
from data.formats.record import RecordEntry, write_merged  # noqa: E402
from data.formats.record_index import open_index  # noqa: E402
from data.formats.token_file import save_token_file  # noqa: E402
from data.items.vocab import IGNORE_INDEX  # noqa: E402
from exps.bench import common  # noqa: E402
from exps.bench.synthetic import VOCAB_SIZE  # noqa: E402

# The recipe shuffles items of similar length among so many global batches.
NEIGHBOUR_BATCHES = 500
WARMUP_ROWS = 20
ITEMS_PER_FOLDER = 1000
PARTS, COSTS = ("build", "open", "plan", "packing"), ("seconds", "extra_mib", "fill")
COLUMNS = (*(f"{part}.{cost}" for part in PARTS for cost in COSTS), "private_mib")


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_bench_parser(__doc__, repeats="passes of reading; the median counts")
    add = parser.add_argument
    sizes = [1_000_000, 10_000_000]
    add("--num_items", type=int, nargs="+", default=sizes, help="sizes of the dataset (default 1000000 10000000)")
    add("--num_rows", type=common.positive, default=200, help="rows to read after the warm-up (default 200)")
    add("--num_workers", type=int, nargs="+", default=[0, 1, 2], help="processes of the loader (default 0 1 2)")
    add("--batch_size", type=common.positive, default=8, help="items per row (default 8, as in exps/7B.sh)")
    add("--num_ranks", type=common.positive, default=8, help="ranks that share a step (default 8)")
    add("--max_seq_len", type=int, default=8192, help="tokens of a packed row (default 8192)")
    length_help = "tokens of the shortest and the longest item (default 300 8000)"
    add("--lengths", type=int, nargs=2, default=[300, 8000], metavar=("MIN", "MAX"), help=length_help)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if not 1 <= args.lengths[0] <= args.lengths[1] <= args.max_seq_len:
        parser.error(f"--lengths must be 1 <= MIN <= MAX <= --max_seq_len {args.max_seq_len}, got {args.lengths}")
    least = args.batch_size * args.num_ranks * (WARMUP_ROWS + 1)
    if min(args.num_items) < least:
        parser.error(f"--num_items must be at least {least}, {WARMUP_ROWS + 1} steps, got {args.num_items}")
    with tempfile.TemporaryDirectory() as work_dir:
        write_pool(Path(work_dir) / "pool", *args.lengths)
        rows = [measure_row(num_items, Path(work_dir), args) for num_items in args.num_items]
    sizes = f"{args.batch_size} items per row, {args.num_ranks} ranks, packed rows of {args.max_seq_len:,}"
    title = f"Lengths {args.lengths[0]}-{args.lengths[1]}, {sizes}"
    rates = (f"tokens_per_s.{num_workers}" for num_workers in args.num_workers)
    return common.report("data", title, "cpu", rows, (*COLUMNS, *rates), main_row=rows[-1])


def write_pool(folder: Path, min_len: int, max_len: int) -> None:
    """A token file `{n}.pkl` of random tokens for each length n; the first half of an item has no targets."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for length in range(min_len, max_len + 1):
        token = rng.integers(0, VOCAB_SIZE, length).tolist()
        save_token_file(folder / f"{length}.pkl", token, [IGNORE_INDEX] * (length // 2) + token[length // 2 :], length)


def write_record(folder: Path, pool: Path, min_len: int, max_len: int, num_items: int) -> Path:
    """A `record.json` of items of random lengths; links to `pool` give nearly every item a path of its own."""
    (folder / "files").mkdir()
    for number in range(-(-num_items // ITEMS_PER_FOLDER)):
        (folder / "files" / str(number)).symlink_to(pool.absolute(), target_is_directory=True)
    lens = np.random.default_rng(1).integers(min_len, max_len + 1, num_items).tolist()
    files = (f"files/{number // ITEMS_PER_FOLDER}/{length}.pkl" for number, length in enumerate(lens))
    write_merged(map(RecordEntry, files, lens, range(num_items)), folder / "record.json")
    return folder / "record.json"


def measure_row(num_items: int, work_dir: Path, args: argparse.Namespace) -> dict:
    """Both ways at one number of items."""
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        print(f"{num_items:,} items", file=sys.stderr, flush=True)
        record = write_record(Path(folder), work_dir / "pool", *args.lengths, num_items)
        names = ("batch_size", "max_seq_len", "num_ranks", "num_rows", "num_workers", "repeats")
        case = {name: getattr(args, name) for name in names} | {"record": str(record), "cache_dir": f"{folder}/cache"}
        ours = common.run_alone("data:measure_plan", case=case) | common.run_alone("data:measure_read", case=case)
        baseline = common.run_alone("data:measure_recipe", case=case)
    return common.compare({"num_items": num_items}, ours, baseline, way="recipe")


def measure_plan(case: dict) -> dict[str, dict]:
    """Seconds and peak memory to build the index and the orders of an epoch, and the fill of each order."""
    found = {"build": cost_of(lambda: open_index(case["record"], case["cache_dir"], say=lambda line: None))[1]}
    table = open_dataset(case).table
    for name, batch_size in (("packing", 1), ("plan", case["batch_size"])):
        options = OrderOptions(batch_size, case["max_seq_len"], case["num_ranks"], packing=name == "packing")
        plan, cost = cost_of(lambda options=options: plan_epoch(table, options, epoch=0))
        found[name] = {**cost, "fill": plan.fill}
    return found


def measure_read(case: dict) -> dict:
    """Seconds and memory to open an existing index, rates by number of workers, private memory of the rank."""
    private_mib = resident_mib("RssAnon")
    dataset, open_cost = cost_of(lambda: open_dataset(case))
    dataset.use_vocabulary(VOCAB_SIZE, begin_image_id=0)
    options = OrderOptions(case["batch_size"], case["max_seq_len"], case["num_ranks"])
    order = plan_epoch(dataset.table, options, epoch=0)
    rows = EpochRows(dataset, order, rank=0, world_size=case["num_ranks"], pad_id=1)
    read = read_rates(case, lambda num_workers: (row["num_tokens"] for row in build_loader(rows, num_workers)))
    return {"open": open_cost, **read, "private_mib": resident_mib("RssAnon") - private_mib}


def measure_recipe(case: dict) -> dict:
    """The same figures of the recipe's way, and its order of an epoch."""
    private_mib, batch_size = resident_mib("RssAnon"), case["batch_size"]
    items, open_cost = cost_of(lambda: RecipeItems(Path(case["record"])))
    (order, fill), plan_cost = cost_of(lambda: recipe_order(items.lens, batch_size, case["num_ranks"]))

    def tokens_of_rows(num_workers: int) -> Iterable[int]:
        context = "fork" if num_workers else None
        options = {"num_workers": num_workers, "multiprocessing_context": context, "collate_fn": list}
        return map(pad_lists, DataLoader(items, batch_size, sampler=order, **options))

    read = read_rates(case, tokens_of_rows)
    private_mib = resident_mib("RssAnon") - private_mib
    return {"open": open_cost, "plan": {**plan_cost, "fill": fill}, **read, "private_mib": private_mib}


def open_dataset(case: dict) -> TokenDataset:
    source = DataSource(Path(case["record"]))
    return TokenDataset([source], case["max_seq_len"], cache_dir=Path(case["cache_dir"]), say=lambda line: None)


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
    """The items of rank 0 in the recipe's order, and the fill of all ranks' batches; a short last step is dropped."""
    rng = np.random.default_rng(0)
    step_size = batch_size * num_ranks
    pairs = [[index, length] for index, length in enumerate(lens)]
    pairs = pairs[: len(pairs) // step_size * step_size]
    pairs.sort(key=lambda pair: pair[1])
    steps = []
    for first in range(0, len(pairs), step_size * NEIGHBOUR_BATCHES):
        block = [index for index, _ in pairs[first : first + step_size * NEIGHBOUR_BATCHES]]
        rng.shuffle(block)
        steps += [block[i : i + step_size] for i in range(0, len(block), step_size)]
    rng.shuffle(steps)
    padded = sum(
        max(lens[i] for i in step[j : j + batch_size]) for step in steps for j in range(0, step_size, batch_size)
    )
    num_tokens = sum(lens[i] for step in steps for i in step)
    return [i for step in steps for i in step[:batch_size]], num_tokens / (padded * batch_size)


def pad_lists(batch: list[tuple[list[int], list[int]]]) -> int:
    """Turns a batch into the tensors [B, longest] that the recipe's model takes; returns its real tokens."""
    longest = max(len(token) for token, _ in batch)
    for lists, filler in zip(zip(*batch, strict=True), (0, IGNORE_INDEX), strict=True):
        torch.tensor([values + [filler] * (longest - len(values)) for values in lists])
    return sum(len(token) for token, _ in batch)


def read_rates(case: dict, tokens_of_rows: Callable[[int], Iterable[int]]) -> dict[str, dict]:
    """The median `tokens_per_s` of the loader by number of workers, and the `num_tokens` read."""
    found: dict[str, dict] = {"tokens_per_s": {}, "num_tokens": {}}
    for num_workers in case["num_workers"]:
        passes = [read_rows(tokens_of_rows(num_workers), case["num_rows"]) for _ in range(case["repeats"])]
        found["tokens_per_s"][num_workers] = statistics.median(rate for rate, _ in passes)
        found["num_tokens"][num_workers] = passes[0][1]
    return found


def read_rows(tokens_of_rows: Iterable[int], num_rows: int) -> tuple[float, int]:
    """Reads WARMUP_ROWS and then up to `num_rows` rows: tokens/s of the latter, and the tokens of all."""
    num_tokens = warmup_tokens = 0
    began = time.perf_counter()
    for number, in_row in enumerate(tokens_of_rows, start=1):
        num_tokens += in_row
        if number == WARMUP_ROWS:
            began, warmup_tokens = time.perf_counter(), num_tokens
        if number == WARMUP_ROWS + num_rows:
            break
    return (num_tokens - warmup_tokens) / (time.perf_counter() - began), num_tokens


def cost_of(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` returns, its seconds, and the growth to the peak of memory in MiB."""
    gc.collect()
    # Resets the peak.
    Path("/proc/self/clear_refs").write_text("5")
    base_mib = resident_mib("VmRSS")
    began = time.perf_counter()
    returned = work()
    seconds = time.perf_counter() - began
    return returned, {"seconds": seconds, "extra_mib": resident_mib("VmHWM") - base_mib}


def resident_mib(field: str) -> float:
    return common.resident_gib(field) * 2**10


if __name__ == "__main__":
    common.start(main)
