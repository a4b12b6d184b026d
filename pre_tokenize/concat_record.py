"""Merge the sub-records of all workers into one record, after checking that they are whole.

    python -u pre_tokenize/concat_record.py --sub_record_dir out --save_path out/record.json

Exit codes: 0 merged, 2 not merged, with a list of what is missing.
"""

import argparse
import os
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

from data.manifest import MANIFEST_NAME, load_manifest  # noqa: E402
from data.record import RecordEntry, find_sub_records, read_raw_record, read_record, write_merged  # noqa: E402
from data.worker_log import failed_name, read_failed  # noqa: E402

MAX_SHOWN = 10  # problems and reasons listed by name
PERCENTILES = (0, 5, 50, 95, 100)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sub_record_dir", type=Path, required=True, help="the --out_dir of the workers")
    parser.add_argument("--save_path", type=Path, required=True, help="the record to write, usually out/record.json")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        sub_records = find_whole_set(args.sub_record_dir)
        reasons = read_reasons(args.sub_record_dir, len(sub_records))
        lengths = check_sub_records(args.sub_record_dir, sub_records, reasons.total())
        args.save_path.parent.mkdir(parents=True, exist_ok=True)
        write_merged(merged_entries(sub_records, args.save_path.parent), args.save_path)
    except (ValueError, OSError) as error:
        print(f"concat_record.py: {error}", file=sys.stderr)
        return 2
    print_summary(args.save_path, lengths, reasons)
    return 0


def find_whole_set(folder: Path) -> list[Path]:
    """The sub-records of ranks 0..N-1 of one N, in order. Raises an error that says what is missing."""
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
    splits = all_splits.pop()
    missing = [rank for rank in range(splits) if (rank, splits) not in found]
    if missing:
        raise ValueError(f"{folder} lacks the sub-records of --rank {_some(missing)} of --splits {splits}; run them")
    return list(found.values())


def read_reasons(folder: Path, splits: int) -> Counter[str]:
    """How many items were refused for which reason. Datasets of the old recipe have no such list."""
    paths = [folder / failed_name(rank, splits) for rank in range(splits)]
    return Counter(reason for path in paths if path.exists() for _, reason in read_failed(path))


def check_sub_records(folder: Path, sub_records: list[Path], num_refused: int) -> np.ndarray:
    """Check that ids are unique, token files exist and no item is missing. Returns the lengths in tokens, int64 [N]."""
    lengths, ids, problems = array("q"), set(), []
    for path in sub_records:
        for entry in read_record(path):
            if entry.id in ids:
                problems.append(f"{path.name}: id {entry.id} occurs twice")
            if not os.path.exists(entry.file):
                problems.append(f"{path.name}: the token file {entry.file} of id {entry.id} does not exist")
            ids.add(entry.id)
            lengths.append(entry.len)
    if (folder / MANIFEST_NAME).exists():
        num_items = load_manifest(folder).get("num_items")
        if num_items != len(lengths) + num_refused:
            problems.append(
                f"the input has {num_items} items, but {len(lengths)} are tokenized and {num_refused} refused: "
                "a worker has not finished; run it again, it goes on where it was"
            )
    if not lengths and not problems:
        problems.append(f"no item was tokenized, all {num_refused} were refused; see *-failed.jsonl")
    if problems:
        raise ValueError(f"{folder} cannot be merged: {_some(problems, separator='; ')}")
    return np.frombuffer(lengths, dtype=np.int64)


def merged_entries(sub_records: list[Path], record_folder: Path) -> Iterator[RecordEntry]:
    """The entries of all sub-records, relative files made relative to the folder of the merged record."""
    for path in sub_records:
        for raw, resolved in zip(read_raw_record(path), read_record(path), strict=True):
            is_absolute = os.path.isabs(raw.file)
            yield raw if is_absolute else replace(raw, file=os.path.relpath(resolved.file, record_folder))


def print_summary(save_path: Path, lengths: np.ndarray, reasons: Counter[str]) -> None:
    print(f"{save_path}: {len(lengths):,} items, {int(lengths.sum()):,} tokens, {reasons.total():,} items refused")
    values = np.percentile(lengths, PERCENTILES).astype(int)
    print("length in tokens: " + ", ".join(f"p{p} {v:,}" for p, v in zip(PERCENTILES, values, strict=True)))
    for reason, count in reasons.most_common(MAX_SHOWN):
        print(f"  refused {count:,}: {reason}")
    if len(reasons) > MAX_SHOWN:
        print(f"  and {len(reasons) - MAX_SHOWN:,} more reasons, see *-failed.jsonl")


def _some(values: list, separator: str = ", ") -> str:
    shown = separator.join(map(str, values[:MAX_SHOWN]))
    return shown if len(values) <= MAX_SHOWN else f"{shown}{separator}and {len(values) - MAX_SHOWN} more"


if __name__ == "__main__":
    sys.exit(main())
