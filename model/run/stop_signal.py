"""SIGTERM and SIGUSR1, which a batch system sends before it ends a job: finetune_solver.py saves, then stops."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# A launcher passes on a signal that the batch system has sent to its ranks too: the second one is the same request.
SAME_REQUEST_S = 3.0
# After a signal a run still waits so long for rows. With them it takes the step and saves.
ROWS_GRACE_S = 10.0
T = TypeVar("T")


class NoRowsError(Exception):
    """No row came within ROWS_GRACE_S of the signal `number`."""

    def __init__(self, number: int) -> None:
        self.number = number
        cause = f"no row came within {ROWS_GRACE_S:g} s (a disk may hang)"
        end = f"ended by {signal.Signals(number).name} without saving"
        super().__init__(f"{end}: {cause}; the same command resumes from the last checkpoint")


class StopSignal:
    """Inside of `with`, the first signal sets `number`; another one, 3 s later or more, ends the process."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._is_waiting = False

    def __enter__(self) -> "StopSignal":
        handlers = dict.fromkeys(SIGNALS, self._note) | {signal.SIGALRM: self._end_waiting}
        self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def counts(self) -> tuple[int, ...]:
        """1 for the one of SIGNALS that came, else 0. Ranks sum these to stop at the same step."""
        return tuple(int(self.number == number) for number in SIGNALS)

    def waiting(self, rows: Iterable[T]) -> Iterator[T]:
        """The rows. Raises NoRowsError if none comes within ROWS_GRACE_S after a signal."""
        rows = iter(rows)
        while True:
            self._is_waiting = True
            if self.number is not None:
                signal.setitimer(signal.ITIMER_REAL, ROWS_GRACE_S)
            try:
                row = next(rows)
            except StopIteration:
                return
            finally:
                self._is_waiting = False
            yield row

    def _end_waiting(self, _number: int, _frame: object) -> None:
        if self._is_waiting:
            # Closing a loader would wait 5 s for each stuck worker.
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise NoRowsError(self.number)

    def _note(self, number: int, _frame: object) -> None:
        if self.number is None:
            self.number, self._noted_at = number, time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, ROWS_GRACE_S)
        elif time.monotonic() - self._noted_at >= SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def requeue_on_slurm() -> str | None:
    """Requeues the SLURM job of this process. Returns a line about the result, None outside of SLURM."""
    job, scontrol = os.environ.get("SLURM_JOB_ID"), shutil.which("scontrol")
    if job is None or scontrol is None:
        return None
    done = subprocess.run([scontrol, "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"job {job} could not be requeued: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}"
    return f"job {job} is requeued"
