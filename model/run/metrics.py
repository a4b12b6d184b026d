"""The figures of a run: sums on the device, their means, and the format of `metrics.jsonl`.

A training step adds device tensors to a `MetricSums` and waits for nothing. Once per log line model/run/run_log.py
takes the sums over the ranks, and `summarize` turns them into means. A line of the file, with `val_loss` in the place
of `loss` after a validation:

    {"step": 10, "epoch": 0.25, "lr": 2e-05, "loss": 5.1, "ce": 5.1, ...}
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

METRICS_NAME = "metrics.jsonl"
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
        self._sums[type_id, :-1] += torch.stack([getattr(output, field).detach().double() for field in SUMMED_FIELDS])
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
    ce, z_loss, num_valid, text_ce, num_text, image_ce, num_image, _ = map(math.fsum, zip(*sums, strict=True))
    figures = {
        "loss": _ratio(ce + z_loss_weight * z_loss, num_valid),
        "ce": _ratio(ce, num_valid),
        "z_loss": _ratio(z_loss, num_valid),
        "text_loss": _ratio(text_ce, num_text),
        "image_loss": _ratio(image_ce, num_image),
    }
    if len(types) > 1:
        by_type = zip(types, (summarize([row], z_loss_weight)["loss"] for row in sums), strict=True)
        figures["loss_by_type"] = {name: loss for name, loss in by_type if loss is not None}
    return figures | {"num_valid_tokens": int(num_valid)}


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None


def read_metrics(path: Path, damaged: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """The lines of a `metrics.jsonl` or of another file of objects with a `step`; none if there is no file.

    Other lines are skipped and their numbers, from 1, added to `damaged`. A torn last line, which a killed process
    leaves, is skipped silently.
    """
    for number, raw in enumerate(path.read_bytes().splitlines(keepends=True) if path.is_file() else (), start=1):
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
    return isinstance(line, dict) and type(line.get("step")) is int and line["step"] >= 0


def describe_damage(path: Path, damaged: Sequence[int]) -> str:
    """`3 lines of output/7B/metrics.jsonl cannot be read: 6, 7, 9`."""
    named = ", ".join(map(str, damaged[:MAX_NAMED_LINES])) + (", …" if len(damaged) > MAX_NAMED_LINES else "")
    return f"{len(damaged)} line{'s' if len(damaged) > 1 else ''} of {path} cannot be read: {named}"
