"""The progress of a pre-tokenizing worker: items and time left by tqdm, images per second, rejected items."""

import sys

from tqdm import tqdm

PLAIN = {
    "bar_format": "{desc}: {n_fmt}/{total_fmt} items{postfix}, {remaining} left",
    "mininterval": 10,
    # No line before the first window and none at the end, where `run` prints one.
    "delay": 0.1,
    "leave": False,
}


class Progress(tqdm):
    """A bar on a terminal, elsewhere a plain line every 10 seconds."""

    def __init__(self, name: str, total: int, done: int, position: int):
        self.is_terminal, self.num_images = sys.stderr.isatty(), 0
        how = {"position": position, "dynamic_ncols": True} if self.is_terminal else PLAIN
        super().__init__(desc=name, total=total, initial=done, unit="item", miniters=1, **how)

    def show(self, done: int, new_images: int, rejected: int) -> None:
        """`done`, `rejected`: items by now. `new_images`: images encoded since the last call."""
        self.num_images += new_images
        rate = self.num_images / max(self.format_dict["elapsed"], 1e-9)
        self.set_postfix_str(f"{rate:.1f} images/s, {rejected} rejected", refresh=False)
        self.update(done - self.n)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Called by tqdm to draw the bar, and with an empty message to clear it."""
        if self.is_terminal:
            super().display(msg, pos)
        elif msg is None:
            print(self, file=sys.stderr)
