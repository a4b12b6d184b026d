"""The log of a run: one line of figures per `--log_interval`, to the screen, `metrics.jsonl` and the trackers.

finetune_solver.py adds to it in every step. A line costs one collective and one wait for the device.
"""

import contextlib
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from model.run.checks import Setup
from model.run.metrics import MetricsFile, MetricSums, flatten, summarize
from model.run.trackers import Trackers
from model.training.distributed import gather_over_ranks


class RunLog:
    """The figures of a run: every rank sums, rank 0 writes."""

    def __init__(self, setup: Setup, resume_step: int, peak_tokens_per_s: float | None = None) -> None:
        """Continues after `resume_step`. `peak_tokens_per_s`: speed at the peak of all GPUs, for `mfu`."""
        self._setup, self._device, self._types = setup, setup.device, setup.dataset.types
        self._peak_tokens_per_s = peak_tokens_per_s
        self.sums = MetricSums(self._device, len(self._types))
        self._file: MetricsFile | None = None
        self.trackers: Trackers | None = None
        options, is_main = setup.options, setup.launch.is_main
        if is_main:
            output_dir = options.checkpoint.output_dir
            self._file = MetricsFile(output_dir, resume_step, setup.say)
            self.trackers = Trackers(
                options.trackers, output_dir, resume_step, self._file.last_step, options.resolved, setup.say
            )
        is_terminal = is_main and sys.stderr.isatty()
        self._bar = tqdm(desc="train", unit="step", initial=resume_step, dynamic_ncols=True, disable=not is_terminal)
        self._num_done, self._created = 0, time.perf_counter()
        self._restart()

    def _restart(self) -> None:
        self._started, self._waited, self._num_steps = time.perf_counter(), 0.0, 0

    def expect(self, num_steps: int) -> None:
        """Sets the number of steps of the whole run; a later epoch may correct it."""
        self._total = self._bar.total = num_steps

    def advance(self) -> None:
        """Counts an optimizer step."""
        self._num_done += 1
        self._num_steps += 1
        self._bar.update()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Times the wait for the rows of a step."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time inside as training time; to be used right after `collect`."""
        started = time.perf_counter()
        yield
        self._started += time.perf_counter() - started

    def collect(self, *vectors: torch.Tensor) -> tuple[dict[str, Any], list[list[float]]]:
        """(figures over all ranks and the steps since the last line, the numbers of `vectors`); restarts the sums."""
        sums = self.sums.take()
        largest = torch.tensor([self._waited, *memory_bytes(self._device)], dtype=sums.dtype, device=self._device)
        ranks = gather_over_ranks(torch.cat([sums.flatten(), largest]))
        parts = [ranks[:, : sums.numel()].sum(0), ranks[:, sums.numel() :].amax(0), *vectors]
        # The only place where the host waits for the device.
        on_host = torch.cat([part.double().to(self._device) for part in parts]).cpu()
        totals, largest, *numbers = on_host.split([len(part) for part in parts])
        waited, allocated, reserved = largest.tolist()
        seconds, num_steps = max(time.perf_counter() - self._started, 1e-9), max(self._num_steps, 1)
        self._restart()
        rows = totals.view(sums.shape).tolist()
        figures = summarize(rows, self._setup.options.model.z_loss_weight, self._types)
        tokens_per_s = sum(row[-1] for row in rows) / seconds
        figures |= {
            "tokens_per_s": round(tokens_per_s, 1),
            "mfu": round(tokens_per_s / self._peak_tokens_per_s, 4) if self._peak_tokens_per_s else None,
            "step_ms": round(1e3 * seconds / num_steps, 3),
            "data_wait_ms": round(1e3 * waited / num_steps, 3),
            "data_wait": round(waited / seconds, 4),
            "memory_gib": round(allocated / 2**30, 3),
            "memory_reserved_gib": round(reserved / 2**30, 3),
        }
        return figures, [part.tolist() for part in numbers]

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes a line of training: the figures of `collect` with `step`, `epoch` and `lr`."""
        seconds_per_step = (time.perf_counter() - self._created) / max(self._num_done, 1)
        eta = tqdm.format_interval(max(self._total - line["step"], 0) * seconds_per_step)
        loss = math.nan if line["loss"] is None else line["loss"]
        figures = f"loss {loss:.4f} lr {line['lr']:.2e} {line['tokens_per_s']:,.0f} tokens/s"
        self._setup.say(f"step {line['step']}/{self._total} epoch {line['epoch']:.3f} {figures} ETA {eta}")
        self._append(line)

    def write_validation(self, line: Mapping[str, Any]) -> None:
        """Writes a line of validation: the figures of `validate` with `step` and `epoch`."""
        losses = describe_losses(line)
        self._setup.say(f"validation after step {line['step']}: {losses} in {line['val_s']:.1f} s")
        self._append(line)

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.append(line)
            self.trackers.log(line["step"], {key: v for key, v in flatten(line).items() if key != "step"})

    def sync(self) -> None:
        """Puts the lines written so far on disk: `metrics.jsonl` is never behind a checkpoint."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self.trackers.close()
        self._bar.close()


def describe_losses(line: Mapping[str, Any]) -> str:
    """The losses of a line of validation: `loss 4.1000, text 4.2000`."""
    names = {"loss": "val_loss", "text": "val_text_loss", "image": "val_image_loss"}
    return ", ".join(f"{name} {line[key]:.4f}" for name, key in names.items() if line[key] is not None)


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """(allocated, reserved): the highest so far on a GPU; on a CPU twice what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    try:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        # Only Linux has /proc; elsewhere it is the highest so far.
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident, resident
