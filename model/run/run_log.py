"""The log of a run: one line of figures per `--log_interval`, to the screen, `metrics.jsonl` and the trackers.

finetune_solver.py adds to it in every step. A line costs one collective and one wait for the device.
"""

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from data.whole_file import open_whole
from model.run.checks import Setup
from model.run.metrics import METRICS_NAME, MetricSums, describe_damage, read_metrics, summarize
from model.run.trackers import Trackers
from model.training.distributed import gather_over_ranks


class RunLog:
    """The figures of a run: every rank sums, rank 0 writes."""

    def __init__(self, setup: Setup, resume_step: int, peak_tokens_per_s: float | None = None) -> None:
        """Continues after `resume_step`: later lines of `metrics.jsonl` are dropped, and lines that cannot be read.

        `peak_tokens_per_s`: speed at the peak of all GPUs, for `mfu`.
        """
        self._setup, self._device, self._types = setup, setup.device, setup.dataset.types
        self._peak_tokens_per_s = peak_tokens_per_s
        self.sums = MetricSums(self._device, len(self._types))
        options, self._is_main = setup.options, setup.launch.is_main
        if self._is_main:
            path = options.checkpoint.output_dir / METRICS_NAME
            damaged: list[int] = []
            lines = list(read_metrics(path, damaged))
            last_step = max((line["step"] for line in lines), default=0)
            if damaged:
                setup.say(f"{describe_damage(path, damaged)}; these lines are dropped")
            with open_whole(path) as file:
                file.writelines(f"{json.dumps(line)}\n".encode() for line in lines if line["step"] <= resume_step)
            self._file = path.open("a")
            place = path.parent, resume_step
            self._trackers = Trackers(options.trackers, *place, options.resolved, setup.say, last_step)
        is_terminal = self._is_main and sys.stderr.isatty()
        self._bar = tqdm(desc="train", unit="step", initial=resume_step, dynamic_ncols=True, disable=not is_terminal)
        self._num_done, self._num_steps, self._waited = 0, 0, 0.0
        self._created = self._started = time.perf_counter()

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
        seconds, num_steps = time.perf_counter() - self._started, self._num_steps
        self._started, self._waited, self._num_steps = time.perf_counter(), 0.0, 0
        rows = totals.view(sums.shape).tolist()
        tokens_per_s = sum(row[-1] for row in rows) / seconds
        figures = summarize(rows, self._setup.options.model.z_loss_weight, self._types) | {
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
        seconds_per_step = (time.perf_counter() - self._created) / self._num_done
        eta = tqdm.format_interval(max(self._total - line["step"], 0) * seconds_per_step)
        loss = math.nan if line["loss"] is None else line["loss"]
        figures = f"loss {loss:.4f} lr {line['lr']:.2e} {line['tokens_per_s']:,.0f} tokens/s"
        self._append(line, f"step {line['step']}/{self._total} epoch {line['epoch']:.3f} {figures} ETA {eta}")

    def write_validation(self, line: Mapping[str, Any]) -> None:
        """Writes a line of validation: the figures of `validate` with `step` and `epoch`."""
        losses = describe_losses(line)
        self._append(line, f"validation after step {line['step']}: {losses} in {line['val_s']:.1f} s")

    def _append(self, line: Mapping[str, Any], message: str) -> None:
        self._setup.say(message)
        if self._is_main:
            # Figures that are not finite become null, which every reader of JSON can read.
            finite = json.loads(json.dumps(line), parse_constant=lambda _: None)
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
            self._trackers.log(line["step"], line)

    def log_images(self, step: int, images: Mapping[str, Image.Image]) -> None:
        """Sends images to the trackers by name."""
        if self._is_main:
            self._trackers.log_images(step, images)

    def sync(self) -> None:
        """Puts the lines written so far on disk: `metrics.jsonl` is never behind a checkpoint."""
        if self._is_main:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._is_main:
            self._file.close()
            self._trackers.close()
        self._bar.close()


def describe_losses(line: Mapping[str, Any]) -> str:
    """The losses of a line of validation: `loss 4.1000, text 4.2000`."""
    names = {"loss": "val_loss", "text": "val_text_loss", "image": "val_image_loss"}
    return ", ".join(f"{name} {line[key]:.4f}" for name, key in names.items() if line[key] is not None)


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """The highest so far, (allocated, reserved); on a CPU twice what the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident, resident
