"""The progress of a pre-tokenizing worker: items, who is busy, images per second, rejected items, time left."""

import sys
import time
from collections import deque

from tqdm import tqdm

# Of the rates. tqdm itself knows the time left.
LAST_S = 10
PLAIN = {
    "bar_format": "{desc}: {n_fmt}/{total_fmt} items{postfix}, {remaining} left",
    "mininterval": LAST_S,
    # No line before the first window and none at the end, where `run` prints one.
    "delay": 0.1,
    "leave": False,
}


class Progress(tqdm):
    """A bar on a terminal, elsewhere a plain line every 10 seconds."""

    def __init__(self, name: str, total: int, done: int, position: int):
        self.is_terminal = sys.stderr.isatty()
        # (time, images, seconds of loading, seconds of encoding) by the end of each window
        self.history = deque([(time.perf_counter(), 0, 0.0, 0.0)])
        how = {"position": position, "dynamic_ncols": True} if self.is_terminal else PLAIN
        super().__init__(desc=name, total=total, initial=done, unit="item", miniters=1, **how)

    def show(self, done: int, rejected: int, images: int, loading_s: float, encoding_s: float) -> None:
        """All numbers are by now: items, images encoded here, seconds in which loaders and encoder were busy.

        Shares and images/s are those of the last 10 seconds, or of the last window if it took longer.
        """
        now = (time.perf_counter(), images, loading_s, encoding_s)
        while len(self.history) > 1 and now[0] - self.history[1][0] >= LAST_S:
            self.history.popleft()
        seconds, new_images, loading, encoding = (end - begin for end, begin in zip(now, self.history[0], strict=True))
        self.history.append(now)
        self.set_postfix_str(
            # Loaders work ahead: their share of a window may exceed its time.
            f"loading {min(1, loading / seconds):.0%} | encoding {encoding / seconds:.0%}, "
            f"{new_images / seconds:.1f} images/s, "
            f"{rejected} rejected",
            refresh=False,
        )
        self.update(done - self.n)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Called by tqdm to draw the bar, and with an empty message to clear it."""
        if self.is_terminal:
            super().display(msg, pos)
        elif msg is None:
            print(self, file=sys.stderr)
