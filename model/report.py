"""The page about a run, `report.html` in its output folder: at the end of a training, and on demand while it runs.

python model/report.py output/7B
"""

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.whole_file import is_locked  # noqa: E402
from model.pages.assets import write_page  # noqa: E402
from model.pages.report_page import Curve, build_page  # noqa: E402
from model.run.bad_data import BAD_ITEMS_NAME, BAD_STEPS_NAME  # noqa: E402
from model.run.metrics import METRICS_NAME, describe_damage, read_metrics  # noqa: E402
from model.run.options import build_parser, option_classes  # noqa: E402
from model.run.samples_format import SAMPLES_DIR_NAME, SampleStep, read_samples  # noqa: E402
from model.training.checkpoint import LOCK_NAME, STATE_NAME, TrainerState, find_newest, read_state  # noqa: E402

REPORT_NAME = "report.html"
# In a warning.
MAX_NAMED_STEPS = 8


@dataclass(frozen=True)
class Run:
    """What an output folder holds. `curves`: by key of `metrics.jsonl`; `checkpoint`: the newest, if any.

    `written_at`: when metrics.jsonl was last written, in seconds since 1970; `left_out` and `skipped`: the lines of
    bad_items.jsonl and bad_steps.jsonl; `notes`: what could not be read.
    """

    output_dir: Path
    curves: Mapping[str, Curve]
    written_at: float | None
    checkpoint: Path | None
    state: TrainerState | None
    left_out: Sequence[Mapping[str, Any]]
    skipped: Sequence[Mapping[str, Any]]
    samples: Sequence[SampleStep]
    notes: Sequence[str]

    @property
    def last_step(self) -> int:
        """Optimizer steps done, as far as they were logged or saved."""
        logged = max((int(steps[-1]) for steps, _ in self.curves.values()), default=0)
        return max(logged, self.state.position.global_step if self.state else 0)

    @property
    def num_steps(self) -> int | None:
        """Optimizer steps of the whole run, estimated from the steps per epoch so far; None if unknown."""
        if self.state is None:
            return None
        known = [self.state.options.get("max_steps")]
        num_epochs = self.state.options.get("epochs")
        if num_epochs and "epoch" in self.curves and self.curves["epoch"][1][-1] > 0:
            steps, epochs = self.curves["epoch"]
            known.append(round(num_epochs * steps[-1] / epochs[-1]))
        least = min((number for number in known if number is not None), default=0)
        # Fewer steps than are done mean that the run was resumed with other options.
        return least if least >= max(self.last_step, 1) else None

    @property
    def is_finished(self) -> bool:
        if self.state is None:
            return False
        position, options = self.state.position, self.state.options
        done = {"epochs": position.epoch, "max_steps": position.global_step}
        is_at_end = any(options.get(name) is not None and done[name] >= options[name] for name in done)
        return is_at_end and position.global_step >= self.last_step


def write_report(output_dir: Path, out: Path | None = None, is_running: bool = False) -> Path:
    """Writes the page about the run in `output_dir` to `out` (default: report.html there) and returns its path.

    `is_running`: what the page says about it. Raises ValueError if the folder holds no run or a file cannot be read.
    """
    run = read_run(output_dir)
    out = out or output_dir / REPORT_NAME
    write_page(build_page(run.curves, run.last_step, run.samples, **describe(run, is_running)), out)
    return out


def report_at_end(output_dir: Path) -> str:
    """Writes the page at the end of a run and returns what to print; a page that fails must not fail the run."""
    try:
        return f"{write_report(output_dir)} shows this run"
    except Exception as error:
        return f"no {REPORT_NAME}: {error!r}; python model/report.py {output_dir} writes it later"


def read_run(output_dir: Path) -> Run:
    """Reads an output folder. Raises ValueError if there is none, if no run wrote to it, or if a file is damaged."""
    if not output_dir.is_dir():
        raise ValueError(f"there is no folder {output_dir}: give the --output_dir of a training run")
    metrics_path = output_dir / METRICS_NAME
    if not any((*output_dir.glob(METRICS_NAME), *output_dir.glob(LOCK_NAME), *output_dir.glob(f"epoch*/{STATE_NAME}"))):
        raise ValueError(
            f"{output_dir} is no output folder of a run: it has no {METRICS_NAME}, no epoch*/{STATE_NAME} and no "
            f"{LOCK_NAME}; give the --output_dir of a training run"
        )
    checkpoint, notes = find_newest(output_dir)

    def read(name: str) -> list[dict[str, Any]]:
        damaged: list[int] = []
        lines = list(read_metrics(output_dir / name, damaged))
        if damaged:
            notes.append(f"{describe_damage(Path(name), damaged)}.")
        return lines

    curves, left_out, skipped = collect_curves(read(METRICS_NAME)), read(BAD_ITEMS_NAME), read(BAD_STEPS_NAME)
    samples: list[SampleStep] = []
    try:
        samples = read_samples(output_dir)
    except ValueError as error:
        # The curves are worth a page without samples.
        notes.append(f"{SAMPLES_DIR_NAME} are not shown: {error}")
    written_at = metrics_path.stat().st_mtime if curves else None
    state = read_state(checkpoint) if checkpoint else None
    return Run(output_dir, curves, written_at, checkpoint, state, left_out, skipped, samples, notes)


def collect_curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """Every number of lines of metrics, by key, over ascending steps; `{"a": {"b": 1}}` becomes `a/b`, null NaN."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in sorted(lines, key=lambda line: line["step"]):
        for key, value in line.items():
            parts = {f"{key}/{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
            for name, part in parts.items():
                if part is None or (isinstance(part, int | float) and not isinstance(part, bool)):
                    points.setdefault(name, []).append((line["step"], np.nan if part is None else float(part)))
    curves = {}
    for key, pairs in points.items():
        steps, values = map(np.array, zip(*pairs, strict=True))
        curves[key] = steps, np.where(np.isfinite(values), values, np.nan)
    return curves


def describe(run: Run, is_running: bool = False) -> dict[str, Any]:
    """What the page says about a run, as arguments of `build_page`."""
    unfinished = "running" if is_running else "stopped" if run.last_step else "empty"
    state, num_steps = run.state, run.num_steps or (run.last_step if run.is_finished else None)
    epoch = run.curves["epoch"][1][-1] if "epoch" in run.curves else np.nan
    return {
        "run": run,
        "title": "/".join(run.output_dir.resolve().parts[-2:]),
        "status": "finished" if run.is_finished else unfinished,
        "num_steps": num_steps,
        "share_done": min(run.last_step / num_steps, 1) if num_steps else 0,
        "epoch": None if np.isnan(epoch) else float(epoch),
        "num_epochs": state.options.get("epochs") if state else None,
        "written_at": run.written_at and _moment(run.written_at),
        "now": _moment(time.time()),
        "warnings": [*find_warnings(run), *run.notes],
        "options": group_options(state.options) if state else {},
        "command": command_to_resume(state) if state else None,
    }


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(seconds))


def find_warnings(run: Run) -> list[str]:
    """What a reader should know who looks at nothing else, one sentence each."""
    found = []
    for prefix, name in (("", "loss"), ("val_", "validation loss")):
        steps, values = run.curves.get(f"{prefix}loss", ((), ()))
        num_targets = dict(zip(*run.curves.get(f"{prefix}num_valid_tokens", ((), ())), strict=True))
        # A step without any target has no loss.
        lost = [step for step, value in zip(steps, values, strict=True) if np.isnan(value) and num_targets.get(step, 1)]
        if lost:
            lines = "1 log line" if len(lost) == 1 else f"{len(lost):,} log lines, first"
            found.append(f"The {name} was not finite in {lines} at step {lost[0]:,}.")
    if num_skipped := int(np.nansum(run.curves.get("skipped_steps", ((), ()))[1])):
        steps = sorted({line["step"] for line in run.skipped if line["step"] <= run.last_step})
        named = ", ".join(f"{step:,}" for step in steps[:MAX_NAMED_STEPS])
        named += ", …" if len(steps) > MAX_NAMED_STEPS else ""
        found.append(
            f"{num_skipped:,} step{'s were' if num_skipped > 1 else ' was'} skipped: the gradient was not finite or "
            f"above --skip_grad_norm{f' (step {named})' if named else ''}. {BAD_STEPS_NAME} lists the items."
        )
    counted = run.curves.get("bad_items", ((), ()))[1]
    num_left_out = max(int(np.nanmax([0, *counted])), len({str(line.get("place")) for line in run.left_out}))
    if num_left_out:
        plural, were = ("s", "were") if num_left_out > 1 else ("", "was")
        found.append(f"{num_left_out:,} item{plural} could not be read and {were} left out. {BAD_ITEMS_NAME} says why.")
    return found


def option_text(value: object) -> str:
    """An option's value as the page shows it; equal texts are equal values."""
    return {"None": "none", "True": "yes", "False": "no"}.get(str(value), str(value))


def group_options(options: Mapping[str, Any]) -> dict[str, list[tuple[str, str, str | None]]]:
    """(name, value, default if it is another) of the options, in the groups of `build_parser`; unknown ones last."""
    parser = build_parser()
    group_of = {field.name: group for group, part in option_classes().items() for field in dataclasses.fields(part)}
    groups: dict[str, list[tuple[str, str, str | None]]] = {}
    # Options of another version of this code have no group.
    for name in [*(name for name in group_of if name in options), *(name for name in options if name not in group_of)]:
        value, default = option_text(options[name]), option_text(parser.get_default(name))
        groups.setdefault(group_of.get(name, "other"), []).append((name, value, None if value == default else default))
    return groups


def command_to_resume(state: TrainerState) -> str:
    """The command line of the run: options that differ from the defaults; on one node, as the state knows no other."""
    parser = build_parser()
    python = ["python", "-u"] if state.world_size == 1 else ["torchrun", f"--nproc_per_node={state.world_size}"]
    lines = [shlex.join([*python, "finetune_solver.py"])]
    for name, value in state.options.items():
        if option_text(value) == option_text(parser.get_default(name)) or value is None:
            continue
        if isinstance(value, bool):
            lines.append(f"--{name}" if value else f"--no-{name}")
        else:
            lines.append(shlex.join([f"--{name}", str(value)]))
    return " \\\n  ".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the page about a training run.")
    parser.add_argument("output_dir", type=Path, help="the --output_dir of the run, which may still be running")
    parser.add_argument("--out", type=Path, help=f"file to write (default: {REPORT_NAME} in OUTPUT_DIR)")
    args = parser.parse_args(argv)
    try:
        if args.out is not None and args.out.is_dir():
            raise ValueError(f"--out {args.out} is a folder; give the name of a file in it")
        out = write_report(args.output_dir, args.out, is_running=is_locked(args.output_dir / LOCK_NAME))
    except (ValueError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out} ({out.stat().st_size / 2**20:.1f} MiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
