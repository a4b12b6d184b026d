"""What a run tells: sums on the device, one JSON object per log line in `metrics.jsonl`, and the bar or plain lines.

The training step only adds device tensors into a `MetricSums`; once per log line `model/run_log.py` sums them over the
ranks, and `summarize` turns them into the figures that people read. `MetricsFile` owns the format of `metrics.jsonl`:
it is opened at a step, cut back to it, and appended to.
"""

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

METRICS_NAME = "metrics.jsonl"
MAX_STEP = 2**53  # a larger number in a file is damage
MAX_NAMED_LINES = 8
# The fields of the model's output that are summed, in this order; all are sums over targets or numbers of targets.
SUMMED_FIELDS = (
    "ce_loss",
    "z_loss",
    "num_valid_tokens",
    "text_ce_sum",
    "num_text_tokens",
    "image_ce_sum",
    "num_image_tokens",
)


class MetricSums:
    """Sums since the last log line, on the device: adding costs no wait, reading costs one.

    One row per `type` of the data config, since the rows of a step are of one type.
    """

    def __init__(self, device: torch.device, num_types: int = 1) -> None:
        self._device, self._num_types = device, num_types
        self._reset()

    def _reset(self) -> None:
        shape = self._num_types, len(SUMMED_FIELDS) + 1
        self._sums = torch.zeros(shape, dtype=torch.float64, device=self._device)

    def add(self, output: Any, num_tokens: int, type_id: int = 0) -> None:
        """Adds one micro-step: the model's output (scalars, see SUMMED_FIELDS), the tokens it processed, their type."""
        values = [torch.as_tensor(getattr(output, field), device=self._device).double() for field in SUMMED_FIELDS]
        self._sums[type_id, :-1] += torch.stack([value.detach() for value in values])
        self._sums[type_id, -1] += num_tokens

    def take(self) -> torch.Tensor:
        """The sums since the last take, float64 [num_types, len(SUMMED_FIELDS) + 1] (the last: tokens processed)."""
        sums = self._sums
        self._reset()
        return sums


def read_numbers(*tensors: torch.Tensor) -> list[list[float]]:
    """The numbers of vectors, with one wait for the device of the first (others may be on the host)."""
    numbers = torch.cat([tensor.double().to(tensors[0].device) for tensor in tensors]).tolist()
    starts = [0, *itertools.accumulate(len(tensor) for tensor in tensors)]
    return [numbers[start:stop] for start, stop in itertools.pairwise(starts)]


def summarize(
    sums: Sequence[Sequence[float]], z_loss_weight: float, types: Sequence[str] = ()
) -> dict[str, float | int | None | dict[str, float]]:
    """Figures from the sums over all ranks (as `MetricSums.take`): means over targets, None where there was none.

    With several `types`, `loss_by_type` holds the loss of each that had a target.
    """
    values = dict(zip((*SUMMED_FIELDS, "num_tokens"), map(math.fsum, zip(*sums, strict=True)), strict=True))
    figures = {
        "loss": _mean_loss(values, z_loss_weight),
        "ce": _ratio(values["ce_loss"], values["num_valid_tokens"]),
        "z_loss": _ratio(values["z_loss"], values["num_valid_tokens"]),
        "text_loss": _ratio(values["text_ce_sum"], values["num_text_tokens"]),
        "image_loss": _ratio(values["image_ce_sum"], values["num_image_tokens"]),
    }
    if len(types) > 1:
        by_type = {
            name: _mean_loss(dict(zip(SUMMED_FIELDS, row, strict=False)), z_loss_weight)
            for name, row in zip(types, sums, strict=True)
        }
        figures["loss_by_type"] = {name: loss for name, loss in by_type.items() if loss is not None}
    return figures | {"num_valid_tokens": int(values["num_valid_tokens"])}


def flatten(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a log line, one level deep, as trackers want them: `loss_by_type/captions`. None is left out."""
    flat: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{name}": number for name, number in flatten(value).items()}
        elif isinstance(value, int | float):
            flat[key] = value
    return flat


class MetricsFile:
    """`output_dir/metrics.jsonl`, one JSON object per line: `step` and `epoch` in all, `loss` in those of training,
    `val_loss` in those of validation. `last_step` is the highest of a line before it was cut, 0 without one."""

    def __init__(self, output_dir: Path, resume_step: int, say: Callable[[str], None] = print) -> None:
        """Opens it for appending after `resume_step`: a torn last line and the lines of later steps are dropped, and
        damaged lines, of which it tells by `say`."""
        self.path = output_dir / METRICS_NAME
        damaged: list[int] = []
        lines = list(read_metrics(self.path, damaged))
        if damaged:
            say(f"{describe_damage(self.path, damaged)}; the curves go on without them")
        self.last_step = max((line["step"] for line in lines), default=0)
        kept = [line for line in lines if line["step"] <= resume_step]
        beside = self.path.with_name(METRICS_NAME + ".tmp")
        with beside.open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)
        self._file = self.path.open("a")

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line; figures that are not finite become null, so that every reader of JSON can read it."""
        self._file.write(json.dumps(_finite(line)) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Puts the lines written so far on disk, before a checkpoint says that they are there."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path, damaged: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """The lines of a `metrics.jsonl` (or another file of objects with a `step`), nothing if there is no file.

    What is no such object is left out: a torn last line silently, as a process that was killed leaves one; the numbers
    of other lines, from 1, are added to `damaged`.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = json.loads(raw.decode())
            except ValueError:  # of the decoding too
                line = None
            if has_step(line):
                yield line
            elif damaged is not None and raw.endswith(b"\n"):
                damaged.append(number)


def has_step(line: Any) -> bool:
    """Whether a line is an object whose `step` is a number of optimizer steps."""
    step = line.get("step") if isinstance(line, dict) else None
    return isinstance(step, int) and not isinstance(step, bool) and 0 <= step < MAX_STEP


def describe_damage(path: Path, damaged: Sequence[int]) -> str:
    """`3 lines of output/7B/metrics.jsonl cannot be read: 6, 7, 9`."""
    named = ", ".join(map(str, damaged[:MAX_NAMED_LINES])) + (", …" if len(damaged) > MAX_NAMED_LINES else "")
    return f"{len(damaged)} line{'s' if len(damaged) > 1 else ''} of {path} cannot be read: {named}"


class Progress:
    """A bar on a terminal, plain lines elsewhere, nothing on the ranks that do not speak."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._total = 0
        self._bar: tqdm | None = None
        self._num_done, self._started = 0, time.perf_counter()

    def expect(self, total: int, done: int) -> None:
        """Says how many steps the run has, and how many are done; may be corrected later."""
        self._total = total
        if self._bar is not None:
            self._bar.total = total
        elif self._enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit="step", desc="train", dynamic_ncols=True)

    def advance(self) -> None:
        self._num_done += 1
        if self._bar is not None:
            self._bar.update()

    def show(self, line: Mapping[str, Any]) -> None:
        """Shows a log line."""
        loss = math.nan if line["loss"] is None else line["loss"]
        figures = f"loss {loss:.4f} lr {line['lr']:.2e} {line['tokens_per_s']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(figures)
        elif self._enabled:
            step = f"step {line['step']}/{self._total} epoch {line['epoch']:.3f}"
            print(f"{step} {figures} ETA {self._eta(line['step'])}", flush=True)

    def _eta(self, step: int) -> str:
        """Time to the end at the pace of this process so far, saving and validation in, as [h:]mm:ss."""
        pace = (time.perf_counter() - self._started) / max(self._num_done, 1)
        return tqdm.format_interval(max(self._total - step, 0) * pace)

    def say(self, message: str) -> None:
        """A line beside the bar."""
        if self._bar is not None:
            self._bar.write(message)
        elif self._enabled:
            print(message, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean_loss(values: Mapping[str, float], z_loss_weight: float) -> float | None:
    return _ratio(values["ce_loss"] + z_loss_weight * values["z_loss"], values["num_valid_tokens"])


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None
