"""Merge the sub-records of all workers into one record, after checking that they are complete.

    python -u pre_tokenize/concat_record.py --sub_record_dir out --save_path out/record.json

With `--shard_size N` it also moves the tokens of N items each into one file (see shards.py); after any interruption
the same command resumes. Exit codes: 0 merged, 2 not merged, with a list of what is missing.
"""

import argparse
import os
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

from data.formats.manifest import MANIFEST_NAME, load_manifest  # noqa: E402
from data.formats.record import (  # noqa: E402
    RecordEntry,
    find_sub_records,
    read_raw_record,
    read_record,
    relative_file,
    write_merged,
)
from data.messages import MAX_REASON, one_line  # noqa: E402
from pre_tokenize.shards import move_to_shards, remove_moved  # noqa: E402
from pre_tokenize.worker_log import failed_name, lock_sub_record, read_failed  # noqa: E402

WORKER_FILE = re.compile(rf"\d+-of-\d+-(record|failed)\.jsonl|{re.escape(MANIFEST_NAME)}")
# Problems and reasons that are listed by name.
MAX_SHOWN = 10
PERCENTILES = (0, 5, 50, 95, 100)


@dataclass
class Survey:
    """What the sub-records hold: tokens of each item, rejected items per reason, and everything that is wrong."""

    lengths: array = field(default_factory=lambda: array("q"))
    reasons: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sub_record_dir", type=Path, required=True, help="the --out_dir of the workers")
    add("--save_path", type=Path, required=True, help="the record to write, usually out/record.json")
    add("--allow_partial", action="store_true", help="merge what is there and list what is missing (default: off)")
    add("--shard_size", type=int, help="move the tokens of this many items into one file (default: one file per item)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        if args.shard_size is not None and args.shard_size < 1:
            raise ValueError(f"--shard_size must be at least 1, got {args.shard_size}")
        if args.shard_size is not None and args.allow_partial:
            raise ValueError("--shard_size moves only what is complete; finish the workers, or omit --allow_partial")
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
    # A link is written through: its target counts too.
    for name in (path.name, os.path.basename(os.path.realpath(path))):
        if not name.endswith((".json", ".jsonl")):
            raise ValueError(f"--save_path {path} must end in .json, got {name}")
        if WORKER_FILE.fullmatch(name):
            raise ValueError(f"--save_path {path}: {name} is a file of the workers; use another name, as record.json")


def merge(folder: Path, save_path: Path, allow_partial: bool = False, shard_size: int | None = None) -> None:
    """Check the sub-records of a folder, move their tokens into shards if asked, and write the merged record.

    Raises ValueError or FileNotFoundError with everything that is missing, unless `allow_partial`.
    """
    sub_records, splits = find_sub_record_set(folder)
    with ExitStack() as locks:
        for path in sub_records.values() if shard_size else ():
            locks.enter_context(lock_sub_record(path))
        survey = check_sub_records(folder, sub_records, splits)
        if survey.problems and not allow_partial:
            raise ValueError(f"{folder} cannot be merged: {_some(survey.problems, separator='; ')}")
        if not survey.lengths:
            problems = survey.problems or [f"all {survey.reasons.total()} were rejected; see *-failed.jsonl"]
            raise ValueError(f"{folder} cannot be merged: no item was tokenized, {_some(problems, separator='; ')}")
        if shard_size:
            num_moved = sum(move_to_shards(path, shard_size, locks) for path in sub_records.values())
            print(f"{num_moved:,} items moved into shards")
        target = Path(os.path.realpath(save_path))
        target.parent.mkdir(parents=True, exist_ok=True)
        write_merged(merged_entries(sub_records, target.parent), target)
        first_file = next(read_record(save_path)).file
        if not os.path.exists(first_file):
            raise ValueError(f"{save_path} is written, but its first token file {one_line(first_file)} does not open")
        if shard_size:
            for path in sub_records.values():
                remove_moved(path)
    print_summary(save_path, survey)


def find_sub_record_set(folder: Path) -> tuple[dict[int, Path], int]:
    """The sub-records in a folder by rank, and their `splits`. Raises an error for none, or several `splits`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--sub_record_dir {folder} is not a folder")
    found = find_sub_records(folder)
    if not found:
        raise FileNotFoundError(f"{folder} has no sub-record (0-of-1-record.jsonl, ...); run pre_tokenize.py first")
    all_splits = sorted({splits for _, splits in found})
    if len(all_splits) > 1:
        raise ValueError(f"{folder} mixes sub-records of --splits {', '.join(map(str, all_splits))}; keep one set")
    return {rank: path for (rank, _), path in found.items()}, all_splits[0]


def check_sub_records(folder: Path, sub_records: dict[int, Path], splits: int) -> Survey:
    """Check that all ranks are there, lines undamaged, ids unique, tokens on disk, and every item done."""
    # Datasets of the old recipe have no manifest.
    num_items = load_manifest(folder).get("num_items") if (folder / MANIFEST_NAME).exists() else None
    survey, seen = Survey(), set()
    problems = survey.problems
    if missing := [rank for rank in range(splits) if rank not in sub_records]:
        problems.append(f"it lacks the sub-records of --rank {_some(missing)} of --splits {splits}; run them")
    num_good = {}
    for rank, path in sub_records.items():
        lengths = [entry.len for _, entry in good_entries(path, seen, problems)]
        survey.lengths.extend(lengths)
        num_good[rank] = len(lengths)
        # The worker treats such a line as not done, even if its JSON is complete.
        if _is_torn(path):
            problems.append(
                f"{path.name}: the last line is torn; run --rank {rank} of --splits {splits} again to repair it"
            )
    # After all that is good: an item that is both is merged.
    for rank in sub_records:
        num_done = num_good[rank] + _count_rejected(folder / failed_name(rank, splits), seen, survey)
        if num_items is not None:
            first, stop = (num_items * part // splits for part in (rank, rank + 1))
            if num_done != stop - first:
                problems.append(
                    f"--rank {rank} of --splits {splits} has done {num_done} of its {stop - first} items: "
                    "run it again, it resumes"
                )
    return survey


def good_entries(path: Path, seen: set, problems: list[str]) -> Iterator[tuple[RecordEntry, RecordEntry]]:
    """The entries of a sub-record that can be merged, each as it is written and with a file that opens from here.

    Their ids are added to `seen`, and what is wrong with the others to `problems`.
    """
    # Neighbours share a shard.
    file_size = lru_cache(maxsize=16)(_file_size)
    try:
        for raw, entry in zip(read_raw_record(path), read_record(path), strict=True):
            size = file_size(entry.file)
            if entry.id in seen:
                problem = f"id {entry.id} occurs twice"
            elif size < 0:
                problem = f"the token file {entry.file} of id {entry.id} does not exist"
            elif entry.is_sharded and entry.offset + entry.nbytes > size:
                problem = f"the shard {entry.file} ends before the tokens of id {entry.id}"
            else:
                seen.add(entry.id)
                yield raw, entry
                continue
            problems.append(f"{path.name}: {one_line(problem, MAX_REASON)}")
    # A damaged line: what follows it is not read.
    except ValueError as error:
        problems.append(str(error))


def _file_size(path: str) -> int:
    """Bytes of a file; -1 if it does not open."""
    return os.path.getsize(path) if os.path.exists(path) else -1


def _is_torn(path: Path) -> bool:
    """Whether the last line of a file lacks its newline."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        return file.read() not in (b"", b"\n")


def _count_rejected(path: Path, seen: set, survey: Survey) -> int:
    before = survey.reasons.total()
    try:
        # Datasets of the old recipe have no such list.
        for item_id, reason in read_failed(path) if path.exists() else ():
            if item_id in seen:
                survey.problems.append(f"{path.name}: id {item_id} occurs twice")
            else:
                seen.add(item_id)
                survey.reasons[reason] += 1
    except ValueError as error:
        survey.problems.append(str(error))
    return survey.reasons.total() - before


def merged_entries(sub_records: dict[int, Path], record_folder: Path) -> Iterator[RecordEntry]:
    """The good entries of all sub-records, relative files made relative to the folder of the merged record."""
    seen = set()
    for path in sub_records.values():
        for raw, entry in good_entries(path, seen, problems=[]):
            is_absolute = os.path.isabs(raw.file)
            yield raw if is_absolute else replace(raw, file=relative_file(entry.file, record_folder))


def print_summary(save_path: Path, survey: Survey) -> None:
    """Totals, lengths, reasons of rejections, and what is missing if there is something."""
    lengths, reasons = np.frombuffer(survey.lengths, dtype=np.int64), survey.reasons
    print(f"{save_path}: {len(lengths):,} items, {int(lengths.sum()):,} tokens, {reasons.total():,} items rejected")
    values = np.percentile(lengths, PERCENTILES).astype(int)
    print("length in tokens: " + ", ".join(f"p{p} {v:,}" for p, v in zip(PERCENTILES, values, strict=True)))
    for reason, count in reasons.most_common(MAX_SHOWN):
        print(f"  rejected {count:,}: {reason}")
    if len(reasons) > MAX_SHOWN:
        print(f"  and {len(reasons) - MAX_SHOWN:,} more reasons, see *-failed.jsonl")
    if survey.problems:
        print("PARTIAL, missing or left out:", _some(survey.problems, separator="\n  "), sep="\n  ")


def _some(values: list, separator: str = ", ") -> str:
    shown = separator.join(map(str, values[:MAX_SHOWN]))
    return shown if len(values) <= MAX_SHOWN else f"{shown}{separator}and {len(values) - MAX_SHOWN} more"


if __name__ == "__main__":
    sys.exit(main())
