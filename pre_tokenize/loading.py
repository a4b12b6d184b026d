"""Processes that encode the text of items, and decode and crop their images, beside the encoder of `pre_tokenize.py`.

Pixels reach the worker through shared memory; only text ids and sizes are pickled.
"""

import mmap
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import connection
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.items.conversation import ItemError
from data.items.item_processor import IMAGE_SLOT, ItemProcessor, PreparedItem
from data.items.vocab import ChameleonVocab

# Images of an item that have shared memory. Further ones are pickled, which takes ten times as long.
IMAGES_IN_MEMORY = 2
# Of a loader and a window. Few tasks cost less; many keep all loaders busy to the end of a window.
TASKS_PER_LOADER = 4


@dataclass(frozen=True)
class Rejected:
    """An item that cannot be used, and why. Like a PreparedItem it has `images`: none."""

    id: int
    reason: str
    images: tuple[()] = ()


class Place(NamedTuple):
    """Where a loader left the pixels of an image: `memory[number, slot]`. `size` is (width, height)."""

    number: int
    slot: int
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Crop:
    """An RGB image in shared memory, for an encoder like one of PIL. `np.asarray` gives uint8 [height, width, 3]."""

    pixels: np.ndarray
    size: tuple[int, int]
    mode: str = "RGB"

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return self.pixels


Window = list[PreparedItem | Rejected]


class Loaders:
    """Prepares items in windows ahead of the caller. A context manager: its end is that of the processes.

    Build it before a file is locked and a GPU is used: the processes are forked at once, in milliseconds. With
    `num_workers` 0 each window is prepared by the caller, when it is asked for.

    Attributes:
        busy_s: seconds that a loader has worked so far, on average.
        memory: uint8 [IMAGES_IN_MEMORY, slots, bytes], shared with the loaders; an item in preparation has a slot.
    """

    def __init__(
        self,
        processor: ItemProcessor,
        num_workers: int,
        window_items: int,
        windows_ahead: int = 1,
        max_seq_len: int | None = None,
    ):
        self.processor, self.max_seq_len = processor, max_seq_len
        self.num_workers, self.window_items = num_workers, window_items
        self.windows_ahead = windows_ahead if num_workers else 0
        # One window may be on its way to the GPU while the next is taken and another one begins.
        self.num_regions = self.windows_ahead + 2
        self.busy_s = 0.0
        self._executor = None
        if num_workers:
            # No crop is larger. Anonymous memory is gone with its processes, and takes space once it is used.
            shape = (IMAGES_IN_MEMORY, self.num_regions * window_items, 3 * processor.target_size**2)
            self.memory = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape)
            others = multiprocessing.active_children()
            context = multiprocessing.get_context("fork")
            self._executor = ProcessPoolExecutor(num_workers, context, _start_loader, (self,))
            # The first task starts all processes.
            self._executor.submit(os.getpid)
            self.processes = [child for child in multiprocessing.active_children() if child not in others]

    def __enter__(self) -> "Loaders":
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor:
            # The executor would wait for tasks, and for ever if a loader was killed: the others ignore its SIGTERM.
            for process in self.processes:
                process.kill()
            self._executor.shutdown(cancel_futures=True)

    def pin_memory(self) -> None:
        """Page-lock the memory of first images: the GPU then fetches them without this process. Raises ValueError."""
        import torch

        address, nbytes = self.memory[0].ctypes.data, self.memory[0].nbytes
        if error := int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)):
            raise ValueError(
                f"{nbytes >> 20:,} MiB of memory for images cannot be page-locked (CUDA error {error}); "
                "give --num_workers 0"
            )

    def windows(self, items: Iterable[tuple[int, dict]]) -> Iterator[Window]:
        """Windows of `window_items` items. The pixels of a window stay until the caller asks for the next but one.

        Raises BrokenExecutor if a loader is killed.
        """
        items, pending = iter(items), deque()
        for number, window in enumerate(iter(lambda: list(islice(items, self.window_items)), [])):
            pending.append(self._begin(window, number % self.num_regions))
            if len(pending) > self.windows_ahead:
                yield pending.popleft()()
        while pending:
            yield pending.popleft()()

    def _begin(self, items: list[tuple[int, dict]], region: int) -> Callable[[], Window]:
        """Give a window to the loaders. Returns a function that waits for it."""
        if not self._executor:
            return lambda: self._collect([self.prepare(items)])
        step = -(-self.window_items // (TASKS_PER_LOADER * self.num_workers))
        futures = [
            self._executor.submit(_prepare_in_loader, items[start : start + step], region * self.window_items + start)
            for start in range(0, len(items), step)
        ]
        return lambda: self._collect(future.result() for future in futures)

    def _collect(self, tasks: Iterable[tuple[Window, float]]) -> Window:
        window = []
        for prepared, seconds in tasks:
            window += prepared
            self.busy_s += seconds / max(1, self.num_workers)
        for index, item in enumerate(window):
            if item.images:
                window[index] = replace(item, images=tuple(map(self._take_pixels, item.images)))
        return window

    def _take_pixels(self, image: Image.Image | Place) -> Image.Image | Crop:
        return Crop(self._pixels(image), image.size) if isinstance(image, Place) else image

    def _pixels(self, place: Place) -> np.ndarray:
        width, height = place.size
        return self.memory[place.number, place.slot, : 3 * width * height].reshape(height, width, 3)

    def prepare(self, items: list[tuple[int, dict]], first_slot: int | None = None) -> tuple[Window, float]:
        """The prepared items, and the seconds that they took. Pixels go into slots from `first_slot` on, if given."""
        began = time.perf_counter()
        prepared = [prepare_item(self.processor, *item, self.max_seq_len) for item in items]
        if first_slot is not None:
            prepared = [self._leave_pixels(item, first_slot + index) for index, item in enumerate(prepared)]
        return prepared, time.perf_counter() - began

    def _leave_pixels(self, item: PreparedItem | Rejected, slot: int) -> PreparedItem | Rejected:
        places = [Place(number, slot, image.size) for number, image in enumerate(item.images[:IMAGES_IN_MEMORY])]
        for place, image in zip(places, item.images, strict=False):
            self._pixels(place)[:] = image
        return replace(item, images=(*places, *item.images[IMAGES_IN_MEMORY:])) if places else item


def prepare_item(
    processor: ItemProcessor, item_id: int, raw: dict | ItemError, max_seq_len: int | None = None
) -> PreparedItem | Rejected:
    """One item, or the reason why it cannot be used."""
    # The row itself is damaged.
    if isinstance(raw, ItemError):
        return Rejected(item_id, str(raw))
    try:
        item = processor.prepare(processor.process_item(raw, item_id), item_id)
    except ItemError as error:
        return Rejected(item_id, str(error))
    # An edited `process_item` may raise anything; the item is counted and its reason is written down.
    except Exception as error:
        return Rejected(item_id, f"{type(error).__name__}: {error}")
    num_tokens = count_tokens(item, processor.vocab)
    if max_seq_len is not None and num_tokens > max_seq_len:
        return Rejected(item_id, f"it needs {num_tokens} tokens, --max_seq_len is {max_seq_len}")
    return item


def count_tokens(item: PreparedItem, vocab: ChameleonVocab) -> int:
    """Length of the sequence that an item will have."""
    texts = sum(len(ids) for ids, _ in item.segments if ids is not IMAGE_SLOT)
    return texts + sum(vocab.num_image_tokens(*image.size) for image in item.images)


# In the loaders

_loaders: Loaders


def _start_loader(loaders: Loaders) -> None:
    global _loaders
    _loaders = loaders
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # A signal to the whole process group is for the worker: it still needs its loaders to finish the window.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _die_with_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _prepare_in_loader(items: list[tuple[int, dict]], first_slot: int) -> tuple[Window, float]:
    return _loaders.prepare(items, first_slot)
