"""SIGTERM, as a batch system sends it before it kills: noted, so that the work in hand can be finished."""

import signal
import threading

EXIT_CODE = 128 + signal.SIGTERM


class Termination:
    """While it is entered, SIGTERM sets `is_asked` and does nothing else."""

    def __init__(self) -> None:
        self.is_asked = False
        self._previous = None

    def __enter__(self) -> "Termination":
        if threading.current_thread() is threading.main_thread():  # nobody else may set a handler
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, *_: object) -> None:
        self.is_asked = True
