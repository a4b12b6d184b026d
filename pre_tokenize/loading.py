"""Items with their text encoded and their images decoded and cropped, by processes beside the encoder.

Used by `pre_tokenize.py`, which encodes a window of items while these processes prepare the next.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import connection

from data.items.conversation import ItemError
from data.items.item_processor import IMAGE_SLOT, ItemProcessor, PreparedItem
from data.items.vocab import ChameleonVocab


@dataclass(frozen=True)
class Rejected:
    """An item that cannot be used, and why. Like a PreparedItem it has `images`: none."""

    id: int
    reason: str
    images: tuple[()] = ()


def prepare_windows(
    items: Iterable[tuple[int, dict]],
    processor: ItemProcessor,
    window_items: int,
    num_workers: int,
    max_seq_len: int | None = None,
) -> Iterator[list[PreparedItem | Rejected]]:
    """Prepared items in windows of `window_items`. The next window is prepared while the caller has the current one.

    Raises BrokenExecutor if one of the `num_workers` processes is killed.
    """
    items = iter(items)
    if not num_workers:
        while window := list(islice(items, window_items)):
            yield [prepare_item(processor, *item, max_seq_len) for item in window]
        return
    # A fork would inherit this worker's lock, threads and GPU.
    context = multiprocessing.get_context("spawn")
    pending: deque[list[Future]] = deque()
    with ProcessPoolExecutor(num_workers, context, _start_loader, (processor, max_seq_len)) as executor:
        try:
            while window := list(islice(items, window_items)):
                pending.append([executor.submit(_prepare_in_loader, item) for item in window])
                if len(pending) > 1:
                    yield [future.result() for future in pending.popleft()]
            while pending:
                yield [future.result() for future in pending.popleft()]
        except BrokenExecutor:
            # The executor waits for the others, which ignore its SIGTERM.
            for process in multiprocessing.active_children():
                process.kill()
            raise
        finally:
            executor.shutdown(cancel_futures=True)


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


# In the processes

_loader: tuple[ItemProcessor, int | None]


def _start_loader(processor: ItemProcessor, max_seq_len: int | None) -> None:
    global _loader
    _loader = processor, max_seq_len
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # A signal to the whole process group is for the worker: it still needs its loaders to finish the window.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _die_with_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _prepare_in_loader(item: tuple[int, dict]) -> PreparedItem | Rejected:
    processor, max_seq_len = _loader
    return prepare_item(processor, *item, max_seq_len)
