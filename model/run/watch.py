"""Inspection of a run: a profile of some of its steps, and the stacks of a rank whose step does not end.

All ranks wait for each other in every step, so a stuck rank makes all of them write their stacks. The rank that is in
no collective is the stuck one.
"""

import contextlib
import faulthandler
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from data.flags import flag

PROFILE_DIR = "profile"


@dataclass(frozen=True)
class WatchOptions:
    """`profile`: START:END, the first and the last optimizer step to profile, from 1; `hang_timeout_s`: seconds after
    which a step counts as stuck, 0: never."""

    profile: str | None = flag(None, "first and last step of a torch profile, from 1", metavar="START:END")
    hang_timeout_s: float = flag(600.0, "write all stacks if a step takes longer, in seconds; 0: never")

    @property
    def profiled_steps(self) -> range:
        """The optimizer steps to profile. Raises ValueError if they are not given as START:END."""
        if self.profile is None:
            return range(0)
        match = re.fullmatch(r"(\d+):(\d+)", self.profile)
        start, end = map(int, match.groups()) if match else (0, 0)
        if not 1 <= start <= end:
            raise ValueError(
                f"--profile must be START:END, the first and the last optimizer step to profile, counted from 1, got "
                f"{self.profile!r}; for example 10:12"
            )
        return range(start, end + 1)

    def problems(self) -> list[str]:
        """What is wrong with these options, one sentence each."""
        found = []
        try:
            _ = self.profiled_steps
        except ValueError as error:
            found.append(str(error))
        if not self.hang_timeout_s >= 0:
            found.append(f"--hang_timeout_s must not be negative, got {self.hang_timeout_s:g}")
        return found


class StepProfiler:
    """Profiles some optimizer steps of this rank; the others are as fast as without.

    Writes `output_dir/profile/rank{R}-steps{START}-{END}.json.gz`, for https://ui.perfetto.dev.
    """

    def __init__(self, steps: range, output_dir: Path, rank: int, say: Callable[[str], None]) -> None:
        """`say` prints a line on rank 0: which file was written, or that the run had none of the steps."""
        self._steps, self._say = steps, say
        self._path = output_dir / PROFILE_DIR / f"rank{rank}-steps{steps[0]}-{steps[-1]}.json.gz" if steps else None
        self._profiler: torch.profiler.profile | None = None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around optimizer step `number`, from 1."""
        if self._profiler is None and self._steps and number <= self._steps[-1]:
            first = max(self._steps[0], number)
            # Starting the profiler makes a step slow, so the step before the first is recorded too and thrown away.
            num_warmup = int(first > number)
            self._profiler = torch.profiler.profile(
                schedule=torch.profiler.schedule(
                    wait=first - number - num_warmup, warmup=num_warmup, active=self._steps[-1] + 1 - first, repeat=1
                ),
                on_trace_ready=self._write,
                record_shapes=True,
            )
            self._profiler.start()
        yield
        if self._profiler is not None:
            self._profiler.step()

    def close(self) -> None:
        """Writes an incomplete profile, if the run ends within the steps."""
        if self._profiler is not None:
            self._profiler.stop()
        if self._steps and not self._path.exists():
            self._say(f"no profile: this run took no step from {self._steps[0]} to {self._steps[-1]}")

    def _write(self, profiler: torch.profiler.profile) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._path))
        except OSError as error:
            self._say(f"no profile, training continues: {error}")
            return
        self._say(f"the profile is in {self._path}; open it in https://ui.perfetto.dev")


class HangWatch:
    """Appends the stacks of all threads to `output_dir/hang-rank{R}.txt` when a step of this rank takes too long.

    A thread of `faulthandler` writes them, without the interpreter, which may be stuck too. The run continues to wait.
    """

    def __init__(self, timeout_s: float, output_dir: Path, rank: int) -> None:
        """A `timeout_s` of 0 watches nothing."""
        self._timeout_s, self._path, self._rank = timeout_s, output_dir / f"hang-rank{rank}.txt", rank
        self._file: TextIO | None = None
        self._what, self._deadline = "", math.inf

    def expect(self, what: str, patience: float = 1.0) -> None:
        """`what`, such as a step, begins now and should end within `patience` times the timeout."""
        if not self._timeout_s:
            return
        self.rest()
        if self._file is None:
            # Rank 0 has made the folder, but a network disk may not show it to other machines yet.
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a")
            except OSError:
                # A full disk must not end a training.
                return
        limit_s = patience * self._timeout_s
        self._what, self._deadline = f"{what} took more than {limit_s:g} s", time.monotonic() + limit_s
        faulthandler.dump_traceback_later(limit_s, file=self._file)

    def rest(self) -> None:
        """What comes now may take any time."""
        faulthandler.cancel_dump_traceback_later()
        if time.monotonic() > self._deadline:
            line = f"rank {self._rank}: {self._what}; its stacks are in {self._path}"
            print(line, file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n", file=self._file, flush=True)
        self._deadline = math.inf

    def close(self) -> None:
        """Ends the watch, and removes a file without stacks."""
        self.rest()
        if self._file is not None:
            if not os.fstat(self._file.fileno()).st_size:
                self._path.unlink(missing_ok=True)
            self._file.close()
