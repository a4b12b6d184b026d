"""Merge the sub-records of all workers into one record, after checking that they are whole.

    python -u pre_tokenize/concat_record.py --sub_record_dir out --save_path out/record.json

With `--shard_size N` it also moves the tokens of N items each into one file (see shards.py); interrupted in any way,
the same command goes on. Exit codes: 0 merged, 2 not merged, with a list of what is missing.
"""

import argparse
import os
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

from data.manifest import MANIFEST_NAME, load_manifest  # noqa: E402
from data.messages import MAX_REASON, one_line  # noqa: E402
from data.record import (  # noqa: E402
    RecordEntry,
    find_sub_records,
    read_raw_record,
    read_record,
    relative_file,
    write_merged,
)
from data.worker_log import failed_name, read_failed  # noqa: E402
from pre_tokenize.shards import locked, move_to_shards, remove_moved  # noqa: E402

WORKER_FILE = re.compile(r"\d+-of-\d+-(record|failed|retried)\.jsonl")
MAX_SHOWN = 10  # problems and reasons listed by name
PERCENTILES = (0, 5, 50, 95, 100)
IDS_PER_BLOCK = 1 << 16


class IdSet:
    """A set of ids in a byte each, where a set of 10 million integers takes 800 MB. Ids may be strings, too."""

    def __init__(self) -> None:
        self._blocks: dict[int, bytearray] = {}
        self._names: set[str] = set()
        self._num_ids = 0

    def __contains__(self, item_id: int | str) -> bool:
        if isinstance(item_id, str):
            return item_id in self._names
        block, place = divmod(item_id, IDS_PER_BLOCK)
        return block in self._blocks and bool(self._blocks[block][place])

    def __len__(self) -> int:
        return self._num_ids

    def add(self, item_id: int | str) -> None:
        self._num_ids += item_id not in self
        if isinstance(item_id, str):
            self._names.add(item_id)
        else:
            block, place = divmod(item_id, IDS_PER_BLOCK)
            self._blocks.setdefault(block, bytearray(IDS_PER_BLOCK))[place] = 1


@dataclass
class Survey:
    """What the sub-records hold, and everything that is wrong with them."""

    num_readable: dict[Path, int] = field(default_factory=dict)  # entries before the first damaged line
    left_out: dict[Path, set[int]] = field(default_factory=dict)  # positions of entries that cannot be merged
    lengths: array = field(default_factory=lambda: array("q"))  # tokens of each item that can be merged
    reasons: Counter[str] = field(default_factory=Counter)  # why items were refused, and how many for each
    problems: list[str] = field(default_factory=list)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sub_record_dir", type=Path, required=True, help="the --out_dir of the workers")
    add("--save_path", type=Path, required=True, help="the record to write, usually out/record.json")
    add("--allow_partial", action="store_true", help="merge what is there and say what is missing (default: refuse)")
    add("--shard_size", type=int, help="move the tokens of this many items into one file (default: one file per item)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        if args.shard_size is not None and args.shard_size < 1:
            raise ValueError(f"--shard_size must be at least 1, got {args.shard_size}")
        if args.shard_size is not None and args.allow_partial:
            raise ValueError("--shard_size moves what is whole only; finish the workers, or leave --allow_partial out")
        check_save_path(args.save_path)
        merge(args.sub_record_dir, args.save_path, args.allow_partial, args.shard_size)
    except (ValueError, OSError) as error:
        print(f"concat_record.py: {error}", file=sys.stderr)
        return 2
    return 0


def check_save_path(path: Path) -> None:
    """Raises ValueError if the trainer takes no record of this name, or a worker's file has it."""
    if path.is_dir():
        raise ValueError(f"--save_path {path} is a folder; name a file in it, such as record.json")
    for name in (path.name, os.path.basename(os.path.realpath(path))):
        if not name.endswith((".json", ".jsonl")):
            raise ValueError(f"--save_path {path} must end in .json, got {name}")
        if name == MANIFEST_NAME or WORKER_FILE.fullmatch(name):
            raise ValueError(f"--save_path {path}: {name} is a file of the workers; use another name, as record.json")


def merge(folder: Path, save_path: Path, allow_partial: bool = False, shard_size: int | None = None) -> None:
    """Check the sub-records of a folder, move their tokens into shards if asked, and write the merged record.

    Raises ValueError or FileNotFoundError with everything that is missing, unless `allow_partial`.
    """
    sub_records, splits = find_sub_record_set(folder)
    with locked(list(sub_records.values())) if shard_size else nullcontext():
        survey = check_sub_records(folder, sub_records, splits)
        if survey.problems and not allow_partial:
            raise ValueError(f"{folder} cannot be merged: {_some(survey.problems, separator='; ')}")
        if not survey.lengths:
            problems = survey.problems or [f"all {survey.reasons.total()} were refused; see *-failed.jsonl"]
            raise ValueError(f"{folder} cannot be merged: no item was tokenized, {_some(problems, separator='; ')}")
        num_moved = sum(move_to_shards(path, shard_size) for path in sub_records.values()) if shard_size else 0
        target = Path(os.path.realpath(save_path)) if save_path.is_symlink() else save_path
        target.parent.mkdir(parents=True, exist_ok=True)
        write_merged(merged_entries(survey, target.parent), target)
        first = next(read_record(save_path))
        if not os.path.exists(first.file):
            raise ValueError(f"{save_path} is written, but {one_line(first.file)}, its first token file, does not open")
        if shard_size:
            num_removed = sum(map(remove_moved, sub_records.values()))
            print(f"{num_moved:,} items moved into shards, {num_removed:,} token files removed")
    print_summary(save_path, survey)


def find_sub_record_set(folder: Path) -> tuple[dict[int, Path], int]:
    """The sub-records that are there of one N, by rank, and N. Raises an error if there is none, or several N."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--sub_record_dir {folder} is not a folder")
    found = find_sub_records(folder)
    if not found:
        raise FileNotFoundError(f"{folder} has no sub-record (0-of-1-record.jsonl, ...); run pre_tokenize.py first")
    all_splits = {splits for _, splits in found}
    if len(all_splits) > 1:
        raise ValueError(
            f"{folder} mixes sub-records of --splits {', '.join(map(str, sorted(all_splits)))}; keep one set"
        )
    return {rank: path for (rank, _), path in found.items()}, all_splits.pop()


def check_sub_records(folder: Path, sub_records: dict[int, Path], splits: int) -> Survey:
    """Check that all ranks are there, lines whole, ids unique, tokens on disk and every item tokenized or refused."""
    survey = Survey()
    missing = [rank for rank in range(splits) if rank not in sub_records]
    if missing:
        survey.problems.append(f"it lacks the sub-records of --rank {_some(missing)} of --splits {splits}; run them")
    if strays := [rank for rank in sub_records if rank >= splits]:
        survey.problems.append(f"--rank {_some(strays)} cannot be of --splits {splits}")
    num_items = load_manifest(folder).get("num_items") if (folder / MANIFEST_NAME).exists() else None
    seen = IdSet()
    for rank in range(splits):
        before = len(seen)
        if rank in sub_records:
            _check_tokenized(sub_records[rank], seen, survey)
        _check_refused(folder / failed_name(rank, splits), seen, survey)
        if num_items is not None:
            first, stop = (num_items * part // splits for part in (rank, rank + 1))
            if rank in sub_records and len(seen) - before != stop - first:
                survey.problems.append(
                    f"--rank {rank} of --splits {splits} has done {len(seen) - before} of its {stop - first} items"
                )
    num_done = len(survey.lengths) + survey.reasons.total()
    if num_items is not None and num_items != num_done:
        survey.problems.append(
            f"the input has {num_items} items, but {len(survey.lengths)} are tokenized and {survey.reasons.total()} "
            "refused: a worker has not finished; run it again, it goes on where it was"
        )
    return survey


def _check_refused(path: Path, seen: IdSet, survey: Survey) -> None:
    """Datasets of the old recipe have no such list."""
    if not path.exists():
        return
    _check_last_line(path, survey)
    try:
        for item_id, reason in read_failed(path):
            if item_id in seen:
                survey.problems.append(f"{path.name}: id {item_id} occurs twice")
            else:
                survey.reasons[reason] += 1
                seen.add(item_id)
    except ValueError as error:
        survey.problems.append(str(error))


def _check_tokenized(path: Path, seen: IdSet, survey: Survey) -> None:
    survey.num_readable[path], survey.left_out[path] = 0, set()
    sizes: dict[str, int] = {}  # of shards, which are many items' file
    _check_last_line(path, survey)
    try:
        for position, entry in enumerate(read_record(path)):
            survey.num_readable[path] += 1
            if problem := _entry_problem(entry, seen, sizes):
                survey.problems.append(f"{path.name}: {one_line(problem, MAX_REASON)}")
                survey.left_out[path].add(position)
            else:
                survey.lengths.append(entry.len)
                seen.add(entry.id)
    except ValueError as error:
        survey.problems.append(str(error))


def _entry_problem(entry: RecordEntry, seen: IdSet, shard_sizes: dict[str, int]) -> str | None:
    if entry.id in seen:
        return f"id {entry.id} occurs twice"
    if not entry.is_sharded:
        return None if os.path.exists(entry.file) else f"the token file {entry.file} of id {entry.id} does not exist"
    if entry.file not in shard_sizes:
        shard_sizes[entry.file] = os.path.getsize(entry.file) if os.path.exists(entry.file) else -1
    if shard_sizes[entry.file] < 0:
        return f"the shard {entry.file} of id {entry.id} does not exist"
    ends_within = entry.offset + entry.nbytes <= shard_sizes[entry.file]
    return None if ends_within else f"the shard {entry.file} ends before the tokens of id {entry.id}"


def _check_last_line(path: Path, survey: Survey) -> None:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if size and file.read(1) != b"\n":
            survey.problems.append(f"{path.name}: the last line is torn; run that worker again, it repairs the line")


def merged_entries(survey: Survey, record_folder: Path) -> Iterator[RecordEntry]:
    """The good entries of all sub-records, relative files made relative to the folder of the merged record."""
    for path, count in survey.num_readable.items():
        pairs = islice(zip(read_raw_record(path), read_record(path), strict=True), count)
        for position, (raw, resolved) in enumerate(pairs):
            if position not in survey.left_out[path]:
                is_absolute = os.path.isabs(raw.file)
                yield raw if is_absolute else replace(raw, file=relative_file(resolved.file, record_folder))


def print_summary(save_path: Path, survey: Survey) -> None:
    """Totals, lengths, reasons of refusals, and what is missing if there is something."""
    lengths, reasons = np.frombuffer(survey.lengths, dtype=np.int64), survey.reasons
    print(f"{save_path}: {len(lengths):,} items, {int(lengths.sum()):,} tokens, {reasons.total():,} items refused")
    values = np.percentile(lengths, PERCENTILES).astype(int)
    print("length in tokens: " + ", ".join(f"p{p} {v:,}" for p, v in zip(PERCENTILES, values, strict=True)))
    for reason, count in reasons.most_common(MAX_SHOWN):
        print(f"  refused {count:,}: {reason}")
    if len(reasons) > MAX_SHOWN:
        print(f"  and {len(reasons) - MAX_SHOWN:,} more reasons, see *-failed.jsonl")
    if survey.problems:
        print("PARTIAL, missing or left out:", *survey.problems[:MAX_SHOWN], sep="\n  ")
        if len(survey.problems) > MAX_SHOWN:
            print(f"  and {len(survey.problems) - MAX_SHOWN:,} more")


def _some(values: list, separator: str = ", ") -> str:
    shown = separator.join(map(str, values[:MAX_SHOWN]))
    return shown if len(values) <= MAX_SHOWN else f"{shown}{separator}and {len(values) - MAX_SHOWN} more"


if __name__ == "__main__":
    sys.exit(main())
