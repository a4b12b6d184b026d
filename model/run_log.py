"""The log of a run: figures are summed in the steps, and once per log line brought together and told.

`RunLog` holds what a line needs: the sums on the device, the clock, the time that the loop waited for rows; and where
lines go: the bar or plain lines, `metrics.jsonl`, trackers. One collective and one wait for the device per line.
"""

import contextlib
import os
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from model.distributed import gather_over_ranks
from model.metrics import MetricsFile, MetricSums, Progress, flatten, read_numbers, summarize
from model.options import Options
from model.trackers import Trackers


class RunLog:
    """Lines of figures of one run; every rank sums, rank 0 tells."""

    def __init__(
        self,
        options: Options,
        resume_step: int,
        device: torch.device,
        is_main: bool,
        types: Sequence[str],
        peak_tokens_per_s: float | None = None,
    ) -> None:
        """Goes on after `resume_step`; `peak_tokens_per_s`: at the peak of all GPUs (`model/flops.py`)."""
        self.progress = Progress(enabled=is_main)
        self.sums = MetricSums(device, len(types))
        self._device, self._types, self._z_loss_weight = device, types, options.model.z_loss_weight
        self._peak_tokens_per_s = peak_tokens_per_s
        self._file: MetricsFile | None = None
        self.trackers: Trackers | None = None
        if is_main:
            output_dir = options.checkpoint.output_dir
            self._file = MetricsFile(output_dir, resume_step)
            self.trackers = Trackers(
                options.trackers, output_dir, resume_step, self._file.last_step, options.resolved, self.progress.say
            )
        self._restart()

    def _restart(self) -> None:
        self._started, self._waited, self._num_steps = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what makes the rows of a step available."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started
        self._num_steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training, right after `collect`: left out of the speed."""
        started = time.perf_counter()
        yield
        self._started += time.perf_counter() - started

    def collect(self, *vectors: torch.Tensor) -> tuple[dict[str, Any], list[list[float]]]:
        """(figures over the steps since the last line and over all ranks, the numbers of `vectors`); the only place
        where the host waits for the device. Begins anew."""
        sums = self.sums.take()
        maxima = [self._waited, *memory_bytes(self._device)]
        own = torch.cat([sums.flatten(), torch.tensor(maxima, dtype=sums.dtype, device=self._device)])
        ranks = gather_over_ranks(own)
        totals, maxima, *numbers = read_numbers(
            ranks[:, : sums.numel()].sum(0), ranks[:, sums.numel() :].amax(0), *vectors
        )
        seconds, num_steps = max(time.perf_counter() - self._started, 1e-9), max(self._num_steps, 1)
        self._restart()
        width = sums.shape[1]
        rows = [totals[start : start + width] for start in range(0, len(totals), width)]
        figures = summarize(rows, self._z_loss_weight, self._types)
        tokens_per_s = sum(row[-1] for row in rows) / seconds
        waited, allocated, reserved = maxima
        figures |= {
            "tokens_per_s": round(tokens_per_s, 1),
            "mfu": round(tokens_per_s / self._peak_tokens_per_s, 4) if self._peak_tokens_per_s else None,
            "step_ms": round(1e3 * seconds / num_steps, 3),
            "data_wait_ms": round(1e3 * waited / num_steps, 3),
            "data_wait": round(waited / seconds, 4),
            "memory_gib": round(allocated / 2**30, 3),
            "memory_reserved_gib": round(reserved / 2**30, 3),
        }
        return figures, numbers

    def write(self, line: Mapping[str, Any]) -> None:
        """Tells a line of training, as `collect` gives it with `step`, `epoch` and `lr`."""
        self.progress.show(line)
        self._append(line)

    def write_validation(self, line: Mapping[str, Any]) -> None:
        """Tells a line of validation, as `Validator.run` gives it with `step` and `epoch`."""
        losses = describe_losses(line)
        self.progress.say(f"validation after step {line['step']}: {losses} in {line['val_s']:.1f} s")
        self._append(line)

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.append(line)
            self.trackers.log(line["step"], {key: v for key, v in flatten(line).items() if key != "step"})

    def sync(self) -> None:
        """Puts the lines written so far on disk, before a checkpoint says that they are there."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self.trackers.close()
        self.progress.close()


def describe_losses(line: Mapping[str, Any]) -> str:
    """The losses of a line of validation, for people."""
    names = {"loss": "val_loss", "text": "val_text_loss", "image": "val_image_loss"}
    return ", ".join(f"{name} {line[key]:.4f}" for name, key in names.items() if line[key] is not None)


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """(allocated, reserved) at their highest on a GPU; on a CPU twice what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    try:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux: the highest so far
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident, resident
