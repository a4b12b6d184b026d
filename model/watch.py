"""Looking into a run: a profile of some of its steps, and where every rank stands when a step does not end.

`StepProfiler` writes what torch's profiler sees in the steps asked for. `HangWatch` is a thread of every rank that
waits for its steps: when one takes too long, it writes the stacks of all threads of its rank. All ranks wait for each
other in every step, so one that is stuck makes all of them tell; the one that is in no collective is the culprit.
"""

import contextlib
import faulthandler
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from data.flags import flag

PROFILE_DIR = "profile"
PROJECT = Path(__file__).resolve().parents[1]
GRACE_S = 10.0  # after which the stacks are written from outside of Python, which may itself be stuck


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
    """Profiles some optimizer steps of this rank; costs nothing in the others.

    Writes `output_dir/profile/rank{R}-steps{START}-{END}.json.gz`, to be opened in https://ui.perfetto.dev or
    chrome://tracing. The step before the first is recorded too, and thrown away: starting the profiler makes it slow.
    """

    def __init__(self, steps: range, output_dir: Path, rank: int, say: Callable[[str], None]) -> None:
        """`say` tells a line on rank 0: what was written, or that the run had none of these steps."""
        self._steps, self._folder, self._rank, self._say = steps, output_dir / PROFILE_DIR, rank, say
        self._profiler: torch.profiler.profile | None = None
        self._first = self._last = 0

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around optimizer step `number`, from 1."""
        if self._steps and self._profiler is None and self._steps[0] - 1 <= number <= self._steps[-1]:
            self._start(number)
        yield
        if self._profiler is not None:
            self._last = number
            self._profiler.step()
            if number == self._steps[-1]:
                self.close()

    def close(self) -> None:
        """Writes what there is of a profile that is not complete; says so if there is nothing of it."""
        if self._profiler is not None:
            self._profiler.stop()
        elif self._steps:
            self._say_nothing_came()
        self._profiler, self._steps = None, range(0)

    def _start(self, number: int) -> None:
        num_warmup = int(number < self._steps[0])
        num_active = self._steps[-1] + 1 - number - num_warmup
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._first = number + num_warmup
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=0, warmup=num_warmup, active=num_active, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._profiler.start()

    def _write(self, profiler: torch.profiler.profile) -> None:
        if self._last < self._first:  # the run ended with the step before the first
            self._say_nothing_came()
            return
        path = self._folder / f"rank{self._rank}-steps{self._first}-{self._last}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            self._say(f"{path} is the profile of rank {self._rank}; open it in https://ui.perfetto.dev")
        except OSError as error:  # no reason to end a training
            self._say(f"no profile, training goes on: {error}")

    def _say_nothing_came(self) -> None:
        self._say(f"no profile: this run took no step from {self._steps[0]} to {self._steps[-1]}")


class HangWatch:
    """A thread that looks whether the steps of this rank end in time.

    Where one does not, `output_dir/hang-rank{R}.txt` and stderr get the stacks of all threads, once per step, and the
    run goes on waiting (as long as `--dist_timeout_s` lets it).
    """

    def __init__(self, timeout_s: float, output_dir: Path, rank: int) -> None:
        """A `timeout_s` of 0 watches nothing."""
        self._timeout_s, self._rank = timeout_s, rank
        self._path = output_dir / f"hang-rank{rank}.txt"
        self._main_thread = threading.main_thread().ident
        self._armed: tuple[float, str] | None = None  # deadline, what is said after it
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None

    def expect(self, what: str, patience: float = 1.0) -> None:
        """`what`, a step or the like, begins now, and should end within `patience` times the timeout."""
        if not self._timeout_s:
            return
        limit_s = patience * self._timeout_s
        self._armed = (time.monotonic() + limit_s, f"{what} has not ended within {limit_s:g} s")
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, name="hang watch", daemon=True)
            self._thread.start()

    def rest(self) -> None:
        """What comes now may take its time."""
        self._armed = None

    def close(self) -> None:
        """Ends the thread."""
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join()

    def _look(self) -> None:
        interval = min(self._timeout_s / 4, 5.0)
        while not self._is_closed.wait(interval):
            # Set again and again by this thread: it goes off only if Python itself stands still.
            faulthandler.dump_traceback_later(self._timeout_s + GRACE_S, file=sys.__stderr__)
            armed = self._armed
            if armed is not None and time.monotonic() > armed[0]:
                self._tell(armed[1])
                if self._armed is armed:
                    self._armed = None
        faulthandler.cancel_dump_traceback_later()

    def _tell(self, what: str) -> None:
        frame = sys._current_frames().get(self._main_thread)
        head = f"rank {self._rank}: {what}; it is {describe_place(frame)}"
        with contextlib.suppress(OSError):  # a full disk: stderr has it all
            with self._path.open("a") as file:
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {head}", file=file, flush=True)
                faulthandler.dump_traceback(file)
                print(file=file)
        print(f"{head}. All stacks (also in {self._path}):", file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(sys.__stderr__)


def describe_place(frame: FrameType | None) -> str:
    """Where a thread stands, for people: the innermost line of this project, and what is called there."""
    called = ""
    while frame is not None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if path.is_relative_to(PROJECT) and "site-packages" not in path.parts:
            return f"at {path.relative_to(PROJECT)}:{frame.f_lineno} {name}(){called}"
        called = called or f", in {name}()"
        frame = frame.f_back
    return "outside of this project's code"
