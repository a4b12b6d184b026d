"""How far a pre-tokenizing worker is, for people."""

import sys
import time

from tqdm import tqdm

PLAIN_LINE_SECONDS = 10


class Progress:
    """A bar on a terminal, else a plain line now and then: items, images per second, refused items."""

    def __init__(self, name: str, total: int, done: int, position: int):
        self.name, self.total, self.first_done = name, total, done
        self.images = 0
        self.start = self.last_line = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(desc=name, total=total, initial=done, unit="item", position=position, dynamic_ncols=True)

    def update(self, done: int, new_images: int, refused: int) -> None:
        """`done`: items done by now; `new_images`: encoded since the last call; `refused`: items refused by now."""
        self.images += new_images
        now = time.monotonic()
        images_per_s = self.images / max(now - self.start, 1e-9)
        if self.bar is not None:
            self.bar.set_postfix_str(f"{images_per_s:.1f} images/s, {refused} refused", refresh=False)
            self.bar.update(done - self.bar.n)
        elif now - self.last_line >= PLAIN_LINE_SECONDS or done == self.total:
            self.last_line = now
            left_s = (now - self.start) / max(done - self.first_done, 1) * (self.total - done)
            print(
                f"{self.name}: {done:,}/{self.total:,} items, {images_per_s:.1f} images/s, {refused} refused, "
                f"{left_s:.0f} s left",
                file=sys.stderr,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
