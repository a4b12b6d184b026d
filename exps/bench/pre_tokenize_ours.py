"""Our way of exps/bench/pre_tokenize.py: `pre_tokenize.py` as a user runs it, with the clock beside it.

Imports no torch: with the encoder "none", which gives codes of zeros, the host alone is measured.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np

from data.items.conversation import ItemError
from data.items.item_processor import ItemProcessor
from data.items.vocab import CODE_PIXELS
from pre_tokenize import options, pre_tokenize
from pre_tokenize.loading import Loaders


class ZeroEncoder:
    """Stands for the encoder on a GPU: its windows and batches, no work."""

    device = SimpleNamespace(type="cuda")
    num_encoded_again = 0

    def begin(self, images: Sequence) -> Callable[[], list[np.ndarray]]:
        sides = ((width // CODE_PIXELS, height // CODE_PIXELS) for width, height in (image.size for image in images))
        codes = [np.zeros((height, width), np.int64) for width, height in sides]
        return lambda: codes


def measure_ours(
    work_dir: str,
    vqgan_dir: str,
    device: str,
    out_dir: str,
    target_size: int,
    seconds: float,
    precision: str | None,
    num_workers: int | None,
) -> dict[str, object]:
    """Figures of one worker, which is stopped once its steady state has lasted `seconds`.

    Without a `precision` there is no encoder.
    """
    flags = {"in_filename": f"{work_dir}/in.json", "out_dir": out_dir, "target_size": target_size, "device": device}
    flags |= {"tokenizer": f"{work_dir}/tokenizer", "vqgan_dir": vqgan_dir, "precision": precision or "fp32"}
    flags |= {"num_workers": num_workers} if num_workers is not None else {}
    # (time, CPU seconds of the main process, images) at the start, and by the end of each window
    marks = [(time.perf_counter(), time.process_time(), 0)]
    run, write_window = pre_tokenize.run, pre_tokenize.write_window

    def timed_run(worker: pre_tokenize.Worker, sigterm: object) -> None:
        def timed_write(worker: pre_tokenize.Worker, window: list, codes: list[np.ndarray]) -> None:
            write_window(worker, window, codes)
            marks.append((time.perf_counter(), time.process_time(), marks[-1][2] + len(codes)))
            if marks[-1][0] - marks[1][0] >= seconds:
                sigterm.set()

        pre_tokenize.write_window = timed_write
        run(worker, sigterm)

    pre_tokenize.run = timed_run
    if not precision:
        options._has_cuda = lambda: True
        pre_tokenize.load_encoder = lambda *_: (ZeroEncoder(), {"vqgan_sha256": ""})
    if (exit_code := pre_tokenize.main([f"--{name}={value}" for name, value in flags.items()])) not in (0, 143):
        raise RuntimeError(f"pre_tokenize.py ended with exit code {exit_code}")
    # Without a second window there is no steady state.
    begin = marks[1] if len(marks) > 2 else marks[0]
    steady_s, cpu_s, num_images = (last - first for last, first in zip(marks[-1], begin, strict=True))
    rate = num_images / steady_s
    figures = {"images_per_s": rate, "steady_s": steady_s, "start_s": marks[1][0] - marks[0][0]}
    if not precision:
        figures["host"] = {"main_cpu_ms_per_image": 1000 * cpu_s / num_images, "images_per_s": rate}
        figures["loaders_at_work_s"] = loaders_start_s(num_workers or options.default_num_workers("cuda", splits=1))
        assert "torch" not in sys.modules, "the host has imported torch"
    # It imports torch.
    from exps.bench import common

    return figures | {"host_gib": common.resident_gib(), "device_gib": common.peak_device_gib(device)}


class SlowProcessor(ItemProcessor):
    """Rejects every item, with the time at which it came to the loader. No loader has time for a second item."""

    def process_item(self, raw_item: object, item_id: int) -> None:
        began = time.perf_counter()
        time.sleep(1)
        raise ItemError(f"{os.getpid()} {began}")


def loaders_start_s(num_workers: int) -> float:
    """Seconds until all loaders of a worker that starts are at work."""
    began = time.perf_counter()
    with Loaders(SlowProcessor(None, None), num_workers, num_workers) as loaders:
        ((window),) = loaders.windows((number, {}) for number in range(num_workers))
    starts = dict(item.reason.split() for item in window)
    assert len(starts) == num_workers, f"only {len(starts)} loaders were at work"
    return max(map(float, starts.values())) - began
