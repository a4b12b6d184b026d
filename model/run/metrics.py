"""The figures of a run: sums on the device, and `metrics.jsonl`.

A training step adds device tensors to a `MetricSums` and waits for nothing. Once per log line model/run/run_log.py
takes the sums over the ranks, and `summarize` turns them into means. `MetricsFile` owns the format of `metrics.jsonl`:

    {"step": 10, "epoch": 0.25, "lr": 2e-05, "loss": 5.1, "ce": 5.1, ...}
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data.whole_file import open_whole

METRICS_NAME = "metrics.jsonl"
# A larger number in a file is damage.
MAX_STEP = 2**53
MAX_NAMED_LINES = 8
# Fields of the model's output that are summed, in this order: sums over targets, and numbers of targets.
SUMMED_FIELDS = (
    *("ce_loss", "z_loss", "num_valid_tokens"),
    *("text_ce_sum", "num_text_tokens", "image_ce_sum", "num_image_tokens"),
)


class MetricSums:
    """Sums on the device since the last log line, one row per `type` of the data config."""

    def __init__(self, device: torch.device, num_types: int = 1) -> None:
        self._sums = torch.zeros((num_types, len(SUMMED_FIELDS) + 1), dtype=torch.float64, device=device)

    def add(self, output: Any, num_tokens: int, type_id: int = 0) -> None:
        """Adds a micro-step: the model's output (scalars, see SUMMED_FIELDS), its number of tokens, its type."""
        device = self._sums.device
        values = [torch.as_tensor(getattr(output, field), device=device).double() for field in SUMMED_FIELDS]
        self._sums[type_id, :-1] += torch.stack([value.detach() for value in values])
        self._sums[type_id, -1] += num_tokens

    def take(self) -> torch.Tensor:
        """The sums since the last take, float64 [num_types, len(SUMMED_FIELDS) + 1]; the last one counts tokens."""
        sums = self._sums
        self._sums = torch.zeros_like(sums)
        return sums


def summarize(
    sums: Sequence[Sequence[float]], z_loss_weight: float, types: Sequence[str] = ()
) -> dict[str, float | int | None | dict[str, float]]:
    """Means over targets from sums over all ranks (shaped as `MetricSums.take`); None where there is no target.

    With several `types`, `loss_by_type` holds the loss of each type that had a target.
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
    """The numbers of a log line, nested ones as `loss_by_type/captions`, as trackers take them; None is left out."""
    flat: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{name}": number for name, number in flatten(value).items()}
        elif isinstance(value, int | float):
            flat[key] = value
    return flat


class MetricsFile:
    """`output_dir/metrics.jsonl`: every line has `step` and `epoch`, and `loss` (training) or `val_loss` (validation).

    `last_step` is the highest step that the file held when it was opened.
    """

    def __init__(self, output_dir: Path, resume_step: int, say: Callable[[str], None] = print) -> None:
        """Opens the file for appending after `resume_step`: later lines, damaged lines and a torn last line go."""
        self.path = output_dir / METRICS_NAME
        damaged: list[int] = []
        lines = list(read_metrics(self.path, damaged))
        if damaged:
            say(f"{describe_damage(self.path, damaged)}; these lines are dropped")
        self.last_step = max((line["step"] for line in lines), default=0)
        with open_whole(self.path) as file:
            file.writelines(f"{json.dumps(line)}\n".encode() for line in lines if line["step"] <= resume_step)
        self._file = self.path.open("a")

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds a line. Figures that are not finite become null, which every reader of JSON can read."""
        self._file.write(json.dumps(_finite(line)) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Puts the lines written so far on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path, damaged: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """The lines of a `metrics.jsonl` or of another file of objects with a `step`; none if there is no file.

    Other lines are skipped and their numbers, from 1, added to `damaged`. A torn last line, which a killed process
    leaves, is skipped silently.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = json.loads(raw.decode())
            except ValueError:
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


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean_loss(values: Mapping[str, float], z_loss_weight: float) -> float | None:
    return _ratio(values["ce_loss"] + z_loss_weight * values["z_loss"], values["num_valid_tokens"])


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None
