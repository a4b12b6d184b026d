"""What a run tells: sums on the device, one JSON object per log line in `metrics.jsonl`, and the bar or plain lines.

The training step only adds device tensors into a `MetricSums`; once per log line the solver sums them over the ranks,
and `summarize` turns them into the figures that people read. `MetricsFile` owns the format of `metrics.jsonl`: it is
opened at a step, cut back to it, and appended to.
"""

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

METRICS_NAME = "metrics.jsonl"
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
    """Sums since the last log line, on the device: adding costs no wait, reading costs one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        self._sums = torch.zeros(len(SUMMED_FIELDS) + 1, dtype=torch.float64, device=self._device)
        self._started = time.perf_counter()

    def add(self, output: Any, num_tokens: int) -> None:
        """Adds one micro-step: the model's output (scalars, see SUMMED_FIELDS) and the tokens it processed."""
        values = [torch.as_tensor(getattr(output, field), device=self._device).double() for field in SUMMED_FIELDS]
        self._sums[:-1] += torch.stack([value.detach() for value in values])
        self._sums[-1] += num_tokens

    def restart_clock(self) -> None:
        """Leaves what was done since the last line, such as saving a checkpoint, out of the speed."""
        self._started = time.perf_counter()

    def take(self) -> tuple[torch.Tensor, float]:
        """The sums `[len(SUMMED_FIELDS) + 1]` (the last: tokens processed) and the seconds since the last take."""
        sums, seconds = self._sums, time.perf_counter() - self._started
        self.reset()
        return sums, seconds


def read_numbers(*tensors: torch.Tensor) -> list[list[float]]:
    """The numbers of vectors, with one wait for the device of the first (others may be on the host)."""
    numbers = torch.cat([tensor.double().to(tensors[0].device) for tensor in tensors]).tolist()
    starts = [0, *itertools.accumulate(len(tensor) for tensor in tensors)]
    return [numbers[start:stop] for start, stop in itertools.pairwise(starts)]


def summarize(sums: Sequence[float], seconds: float, z_loss_weight: float) -> dict[str, float | int | None]:
    """Figures of one log line, from the sums over all ranks (as `MetricSums.take`) and the seconds that the steps took.

    Means are over targets, None where there was none.
    """
    values = dict(zip((*SUMMED_FIELDS, "num_tokens"), sums, strict=True))
    ce = _ratio(values["ce_loss"], values["num_valid_tokens"])
    z_loss = _ratio(values["z_loss"], values["num_valid_tokens"])
    return {
        "loss": None if ce is None else ce + z_loss_weight * z_loss,
        "ce": ce,
        "z_loss": z_loss,
        "text_loss": _ratio(values["text_ce_sum"], values["num_text_tokens"]),
        "image_loss": _ratio(values["image_ce_sum"], values["num_image_tokens"]),
        "num_valid_tokens": int(values["num_valid_tokens"]),
        "tokens_per_s": round(values["num_tokens"] / max(seconds, 1e-9), 1),
    }


class MetricsFile:
    """`output_dir/metrics.jsonl`, one JSON object per log line, each with at least step, epoch, lr and loss."""

    def __init__(self, output_dir: Path, resume_step: int) -> None:
        """Opens it for appending after `resume_step`: a torn last line and the lines of later steps are dropped."""
        self.path = output_dir / METRICS_NAME
        kept = [line for line in read_metrics(self.path) if line["step"] <= resume_step]
        beside = self.path.with_name(METRICS_NAME + ".tmp")
        with beside.open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)
        self._file = self.path.open("a")

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line; figures that are not finite become null, so that every reader of JSON can read it."""
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Puts the lines written so far on disk, before a checkpoint says that they are there."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, nothing if there is no file; stops at a torn line."""
    if not path.is_file():
        return
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


class Progress:
    """A bar on a terminal, plain lines elsewhere, nothing on the ranks that do not speak."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._total = 0
        self._bar: tqdm | None = None

    def expect(self, total: int, done: int) -> None:
        """Says how many steps the run has, and how many are done; may be corrected later."""
        self._total = total
        if self._bar is not None:
            self._bar.total = total
        elif self._enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit="step", desc="train", dynamic_ncols=True)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def show(self, line: dict[str, Any]) -> None:
        """Shows a log line."""
        loss = math.nan if line["loss"] is None else line["loss"]
        figures = f"loss {loss:.4f} lr {line['lr']:.2e} {line['tokens_per_s']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(figures)
        elif self._enabled:
            print(f"step {line['step']}/{self._total} epoch {line['epoch']:.3f} {figures}", flush=True)

    def say(self, message: str) -> None:
        """A line beside the bar."""
        if self._bar is not None:
            self._bar.write(message)
        elif self._enabled:
            print(message, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None
