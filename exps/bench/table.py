"""One markdown table of what `exps/bench/all.sh` has left in a folder: a JSON object per bench, and `runs.tsv`.

python exps/bench/table.py --results output/bench
"""

import argparse
import csv
import datetime
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LEFT_OUT = ("longest_ms", "warmup_s")  # details that the JSON objects keep
FIELDS = ("name", "seconds", "exit_code", "command")  # of runs.tsv


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("output/bench"), help="folder (default output/bench)")
    return parser


def main(argv: list[str] | None = None) -> int:
    folder = build_parser().parse_args(argv).results
    try:
        with (folder / "runs.tsv").open(newline="") as file:
            runs = list(csv.DictReader(file, FIELDS, delimiter="\t"))
    except OSError as error:
        print(f"table.py: no results of exps/bench/all.sh in {folder}: {error}", file=sys.stderr)
        return 2
    results = {run["name"]: read_result(folder, run) for run in runs}
    print(format_table(runs, results, datetime.date.today()))
    return 0


def read_result(folder: Path, run: Mapping[str, str]) -> dict[str, Any] | None:
    """The JSON object of a bench; None if it ended before it had one."""
    path = folder / f"{run['name']}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def format_table(runs: list[dict[str, str]], results: Mapping[str, dict[str, Any] | None], date: datetime.date) -> str:
    """The machine, a line per figure of each bench, and the commands."""
    whole = [result for result in results.values() if result]
    devices = dict.fromkeys(result["device"] for result in whole)
    versions = {name: version for result in whole for name, version in result["versions"].items()}
    lines = [
        f"{', '.join(devices) or 'no device'}; {', '.join(f'{name} {v}' for name, v in versions.items())}; {date}",
        "",
        "| bench | figure | ours | baseline | ours / baseline |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        name, result = run["name"], results[run["name"]]
        if run["exit_code"] != "0" or result is None:
            lines.append(f"| {name} | failed: exit code {run['exit_code']}, see {name}.err | | | |")
        if result is None:
            continue
        lines += [f"| {name} | {' | '.join(cells)} |" for cells in figures(result)]
    commands = [f"    {run['command']}  # {run['seconds']} s" for run in runs]
    return "\n".join([*lines, "", *commands])


def figures(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """(figure, ours, baseline, ratio): first the ratios that the bench gives, then each number that both ways have, or
    those of ours where the baseline has none."""
    ratio = result["ratio"]
    for name, value in flatten({"ratio": ratio} if not isinstance(ratio, Mapping) else ratio):
        yield f"**{name}**", "", "", f"**{number(value)}**"
    ours, baseline = result["ours"], result["baseline"] or {}
    if not dict(flatten(baseline)):
        alone = ((name, value) for name, value in flatten(ours) if name.split(".")[0] not in LEFT_OUT)
        yield from ((name, number(value), "", "") for name, value in alone)
    ways = {way: value for way, value in baseline.items() if isinstance(value, Mapping) and value.keys() & ours.keys()}
    for way, values in (ways or {"": baseline}).items():
        others = dict(flatten(values))
        for name, value in flatten(ours):
            if name in others and value != others[name] and name.split(".")[0] not in LEFT_OUT:
                shown = f"{name} ({way})" if way else name
                share = number(value / others[name]) if others[name] else "-"
                yield shown, number(value), number(others[name]), share


def flatten(values: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(path, number) of every number in nested mappings, not of lists."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from flatten(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, int | float) and not isinstance(values, bool):
        yield name, values


def number(value: float) -> str:
    """Three digits, thousands with commas."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
