"""Inspection of a run: a profile of some of its steps, and the stacks of a rank whose step does not end.

All ranks wait for each other in every step, so a stuck rank makes all of them write their stacks. The rank that is in
no collective is the stuck one.
"""

import contextlib
import faulthandler
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data.flags import flag

PROFILE_DIR = "profile"


@dataclass(frozen=True)
class WatchOptions:
    """Which steps to profile, and when a step counts as stuck."""

    profile: str | None = flag(None, "first and last step of a torch profile, from 1", metavar="START:END")
    hang_timeout_s: float = flag(600.0, "write all stacks if a step takes longer, in seconds; 0: never", least=0)

    @property
    def profiled_steps(self) -> range:
        """The optimizer steps to profile; empty if `profile` is not START:END."""
        match = re.fullmatch(r"([1-9]\d*):(\d+)", self.profile or "")
        return range(int(match[1]), int(match[2]) + 1) if match else range(0)

    def problems(self) -> list[str]:
        """What is wrong with these options, one sentence each."""
        if self.profile is None or self.profiled_steps:
            return []
        rule = "START:END, the first and the last optimizer step to profile, counted from 1"
        return [f"--profile must be {rule}, got {self.profile!r}; for example 10:12"]


@contextlib.contextmanager
def profiling(
    steps: range, resume_step: int, output_dir: Path, rank: int, say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Profiles some optimizer steps of this rank: call what it yields after every step since `resume_step`.

    Writes `output_dir/profile/rank{R}-steps{START}-{END}.json.gz`, for https://ui.perfetto.dev.
    """
    path = output_dir / PROFILE_DIR / f"rank{rank}-steps{steps.start}-{steps.stop - 1}.json.gz"
    first = max(steps.start, resume_step + 1)
    num_before, num_profiled = first - 1 - resume_step, steps.stop - first

    def write(profiler: torch.profiler.profile) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            say(f"the profile is in {path}; open it in https://ui.perfetto.dev")
        except (OSError, RuntimeError) as error:
            say(f"warning: the profile cannot be written to {path}: {error}")

    if num_profiled < 1:
        yield lambda: None
    else:
        # Starting the profiler makes a step slow, so the step before the first is recorded too and thrown away.
        warmup = min(num_before, 1)
        plan = torch.profiler.schedule(wait=num_before - warmup, warmup=warmup, active=num_profiled, repeat=1)
        with torch.profiler.profile(schedule=plan, on_trace_ready=write, record_shapes=True) as profiler:
            yield profiler.step
    if steps and not path.exists():
        say(f"no profile: this run took no step from {steps.start} to {steps.stop - 1}")


class HangWatch:
    """Appends the stacks of all threads to `output_dir/hang-rank{R}.txt` when a step of this rank takes too long.

    A thread of `faulthandler` writes them, without the interpreter, which may be stuck too. The run continues to wait.
    """

    def __init__(self, timeout_s: float, output_dir: Path, rank: int) -> None:
        """A `timeout_s` of 0 watches nothing."""
        self._timeout_s, self._path, self._rank = timeout_s, output_dir / f"hang-rank{rank}.txt", rank
        self._started, self._limit_s = 0.0, math.inf
        if timeout_s:
            # Rank 0 has made the folder, but a network disk may not show it to other machines yet.
            try:
                output_dir.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a")
            except OSError as error:
                print(f"warning: no step of rank {rank} is watched: {error}", file=sys.stderr)
                self._timeout_s = 0

    def restart(self, patience: float = 1.0) -> None:
        """What begins now, such as a step, should end within `patience` times the timeout."""
        self.stop()
        if self._timeout_s:
            self._started, self._limit_s = time.monotonic(), patience * self._timeout_s
            faulthandler.dump_traceback_later(self._limit_s, file=self._file)

    def stop(self) -> None:
        """What comes now may take any time."""
        faulthandler.cancel_dump_traceback_later()
        seconds = time.monotonic() - self._started
        if seconds > self._limit_s:
            took = f"took {seconds:.1f} s, more than {self._limit_s:g} s (--hang_timeout_s)"
            print(f"rank {self._rank}: a step {took}; its stacks are in {self._path}", file=sys.stderr, flush=True)
        self._limit_s = math.inf

    def close(self) -> None:
        """Ends the watch, and removes a file without stacks."""
        self.stop()
        if self._timeout_s:
            self._file.close()
            if not self._path.stat().st_size:
                self._path.unlink()
