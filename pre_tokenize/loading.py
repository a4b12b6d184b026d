"""Items with their text encoded and their images decoded and cropped, by processes beside the encoder."""

import copy
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import connection

from data.conversation import ItemError
from data.item_processor import IMAGE_SLOT, ItemProcessor, PreparedItem
from data.messages import one_line
from data.vocab import ChameleonVocab


@dataclass(frozen=True)
class Refused:
    """An item that cannot be used, and why."""

    id: int
    reason: str


def check_can_be_sent(processor: ItemProcessor) -> None:
    """Raises ValueError if a processor cannot be sent to another process."""
    try:
        pickle.dumps(_without_encoder(processor))
    except Exception as error:  # what cannot be pickled says so in many ways
        raise ValueError(
            f"the item processor cannot be sent to the processes that load images ({one_line(error)}); let it hold "
            "only what can be pickled, or give --num_workers 0"
        ) from error


def prepare_windows(
    items: Iterable[tuple[int, dict]],
    processor: ItemProcessor,
    window_items: int,
    num_workers: int,
    max_seq_len: int | None = None,
) -> Iterator[list[PreparedItem | Refused]]:
    """Prepared items in windows of `window_items`; the next is prepared while the caller has the current.

    Raises BrokenExecutor if one of the `num_workers` processes is killed.
    """
    items = iter(items)
    if not num_workers:
        while window := list(islice(items, window_items)):
            yield [prepare_item(processor, *item, max_seq_len) for item in window]
        return
    context = multiprocessing.get_context("spawn")  # a fork would have this worker's lock, threads and GPU
    state = pickle.dumps((_without_encoder(processor), max_seq_len))
    pending: deque[list[Future]] = deque()
    with ProcessPoolExecutor(num_workers, context, _start_loader, (state,)) as executor:
        try:
            while window := list(islice(items, window_items)):
                with _signals_blocked():
                    pending.append([executor.submit(_prepare_in_loader, item) for item in window])
                if len(pending) > 1:
                    yield [future.result() for future in pending.popleft()]
            while pending:
                yield [future.result() for future in pending.popleft()]
        except BrokenExecutor:
            for process in multiprocessing.active_children():
                process.kill()  # the executor would wait for them, as they do not hear its SIGTERM
            raise
        finally:
            executor.shutdown(cancel_futures=True)


def prepare_item(
    processor: ItemProcessor, item_id: int, raw: dict, max_seq_len: int | None = None
) -> PreparedItem | Refused:
    """One item, or the reason why it cannot be used."""
    try:
        item = processor.prepare(processor.process_item(raw, item_id), item_id)
    except ItemError as error:
        return Refused(item_id, str(error))
    except Exception as error:  # whatever one item does, the others go on; it is counted, and its reason is kept
        return Refused(item_id, f"{type(error).__name__}: {error}")
    num_tokens = count_tokens(item, processor.vocab)
    if max_seq_len is not None and num_tokens > max_seq_len:
        return Refused(item_id, f"it needs {num_tokens} tokens, --max_seq_len is {max_seq_len}")
    return item


def count_tokens(item: PreparedItem, vocab: ChameleonVocab) -> int:
    """Length of the sequence that an item will have."""
    texts = sum(1 + sum(len(ids) for ids in turn.segments if ids is not IMAGE_SLOT) for turn in item.turns)
    return 1 + texts + sum(vocab.num_image_tokens(*image.size) for image in item.images)


_loader: tuple[ItemProcessor, int | None] | None = None  # what a loader process prepares items with


def _start_loader(state: bytes) -> None:
    """Runs first in a loader process."""
    global _loader
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _loader = pickle.loads(state)


def _die_with_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _prepare_in_loader(item: tuple[int, dict]) -> PreparedItem | Refused:
    processor, max_seq_len = _loader
    return prepare_item(processor, *item, max_seq_len)


def _without_encoder(processor: ItemProcessor) -> ItemProcessor:
    """It stays in this process, with the device."""
    processor = copy.copy(processor)
    processor.image_encode = None
    return processor


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """A process started meanwhile never hears Ctrl-C or SIGTERM: this one decides when its loaders end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
