"""The rows of one rank in one epoch, and their loader: items of a unit one after the other, then filler.

Stands between the order of the epoch (data/epoch/packing.py) and the training step, which takes one row per micro-step.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.epoch.dataset import TokenDataset
from data.epoch.packing import EpochOrder, Unit, num_micro_steps, rank_units
from data.formats.token_file import ItemReadError, TokenItem
from data.items.vocab import IGNORE_INDEX

# How often a loader worker checks that its rank is alive.
PARENT_CHECK_S = 1.0


@dataclass(frozen=True)
class BadItem:
    """An item that could not be read: its place on disk, and why."""

    place: str
    reason: str


class EpochRows(Dataset):
    """The rows of one rank in one epoch; row i is micro-step `i % micro_steps` of step `i // micro_steps`.

    Every rank has the same number of rows. Row i depends on nothing but i, so any loader gives the same ones.
    """

    def __init__(self, dataset: TokenDataset, order: EpochOrder, rank: int, world_size: int, pad_id: int) -> None:
        self.dataset, self.order, self.rank, self.world_size, self.pad_id = dataset, order, rank, world_size, pad_id
        self.micro_steps = num_micro_steps(order, world_size)

    def __len__(self) -> int:
        return self.order.num_steps * self.micro_steps

    def unit(self, index: int) -> Unit:
        """The items of row `index`, and the length of the row."""
        step, micro_step = divmod(index, self.micro_steps)
        return rank_units(self.order, step, self.rank, self.world_size)[micro_step]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """What `collate_row` returns, and:

        step, micro_step: place of the row in the epoch.
        type_id: index into `dataset.types`.
        item_indices: list of int, indices into the dataset.
        bad_items: list of BadItem, which could not be read; the row has filler instead.
        """
        unit = self.unit(index)
        image_only = self.dataset.table.image_only(unit.items, self.order.options, self.order.epoch)
        items, bad_items = [], []
        for item_index, is_image_only in zip(unit.items.tolist(), image_only.tolist(), strict=True):
            try:
                items.append(self.dataset.read(item_index, is_image_only))
            except ItemReadError as error:
                bad_items.append(BadItem(self.dataset.place(item_index), str(error)))
        step, micro_step = divmod(index, self.micro_steps)
        return {
            **collate_row(items, unit.row_len, self.pad_id, self.dataset.max_seq_len),
            "step": step,
            "micro_step": micro_step,
            "type_id": self.dataset.type_id(unit.items),
            "item_indices": unit.items.tolist(),
            "bad_items": bad_items,
        }


def collate_row(
    items: Sequence[TokenItem], row_len: int, pad_id: int, max_document_len: int | None = None
) -> dict[str, Any]:
    """One row: the items as documents one after the other, then filler.

    Filler is documents of its own, of at most `max_document_len` tokens (default: a single one).

    Returns:
        input_ids: int64 [1, row_len].
        labels: int64 [1, row_len], not shifted: the token at t or IGNORE_INDEX, as for the first token of a document.
        position_ids: int64 [1, row_len]; positions restart with each document.
        cu_seqlens: int32 [num_documents + 1], where each document starts; the last is `row_len`.
        num_valid_tokens: targets.
        num_tokens: of items.

    Raises ValueError if the items do not fit.
    """
    lengths = [len(item.token) for item in items]
    num_tokens = sum(lengths)
    if num_tokens > row_len:
        raise ValueError(f"{len(items)} items of {num_tokens} tokens do not fit a row of {row_len}")
    filler = row_len - num_tokens
    while filler:
        lengths.append(min(filler, max_document_len or filler))
        filler -= lengths[-1]
    input_ids = np.full(row_len, pad_id, np.int64)
    labels = np.full(row_len, IGNORE_INDEX, np.int64)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    for item, start in zip(items, cu_seqlens.tolist(), strict=False):
        input_ids[start : start + len(item.token)] = item.token
        labels[start + 1 : start + len(item.label)] = item.label[1:]
    position_ids = np.arange(row_len) - np.repeat(cu_seqlens[:-1], lengths)
    return {
        "input_ids": torch.from_numpy(input_ids)[None],
        "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.from_numpy(position_ids)[None],
        "cu_seqlens": torch.from_numpy(cu_seqlens),
        "num_valid_tokens": int((labels != IGNORE_INDEX).sum()),
        "num_tokens": num_tokens,
    }


def build_loader(
    rows: EpochRows, num_workers: int = 0, pin_memory: bool = False, start_step: int = 0
) -> DataLoader[Mapping[str, Any]]:
    """A loader of the rows from `start_step` on, in order; it reads nothing of the steps before.

    Workers send arrays through a pipe, so that no row needs /dev/shm, which is small in containers. They ignore the
    signals that are meant for the rank, and end with it. Without CUDA, `pin_memory` is ignored.
    """
    return _RowLoader(
        rows,
        pins=pin_memory and torch.cuda.is_available(),
        batch_size=None,
        sampler=range(start_step * rows.micro_steps, len(rows)),
        num_workers=num_workers,
        collate_fn=_to_arrays,
        worker_init_fn=_init_worker if num_workers else None,
        # A forked worker shares the dataset's arrays with the rank.
        multiprocessing_context="fork" if num_workers else None,
    )


class _RowLoader(DataLoader):
    """A loader whose workers send rows as numpy arrays; `pins`: whether the tensors are page-locked."""

    def __init__(self, rows: EpochRows, *, pins: bool, **options: Any) -> None:
        self._pins = pins
        super().__init__(rows, **options)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.num_workers:
            _check_semaphores(3 * self.num_workers + 8)
        return ({name: self._to_tensor(value) for name, value in row.items()} for row in super().__iter__())

    def _to_tensor(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        return torch.from_numpy(value).pin_memory() if self._pins else torch.from_numpy(value)


def _check_semaphores(number: int) -> None:
    """Raises RuntimeError if there is no room for as many as the queues and events of a loader need.

    torch itself would fail with a traceback for each object that it has begun.
    """
    try:
        _ = [multiprocessing.Semaphore() for _ in range(number)]
    except OSError as error:
        raise RuntimeError(f"no DataLoader worker can start: {error.strerror} (/dev/shm)") from None


def _to_arrays(row: Mapping[str, Any]) -> dict[str, Any]:
    # torch sends a tensor through shared memory, but an array as bytes.
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in row.items()}


def _init_worker(worker_id: int) -> None:
    torch.set_num_threads(1)
    # Launchers signal the whole process group. A rank answers by finishing its step and saving, and needs its rows.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # SIGTERM counts only from the rank itself, which ends its workers with it. A handler would not know the sender.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    rank_process = multiprocessing.parent_process()
    threading.Thread(target=_end_with_rank, args=(rank_process.pid,), daemon=True).start()


def _end_with_rank(rank_pid: int) -> None:
    # The watchdog of torch does not end a worker that waits to send a row.
    while os.getppid() == rank_pid:
        received = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK_S)
        if received is not None and received.si_pid == rank_pid:
            break
    os._exit(0)
