"""The rows of one rank in one epoch, and their loader: items of a unit one after the other, then filler.

Stands between the plan (data/packing.py) and the training step, which takes one row per micro-step.
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

from data.dataset import TokenDataset
from data.packing import EpochPlan, Unit, num_micro_steps, rank_units
from data.token_file import ItemReadError, TokenItem
from data.vocab import IGNORE_INDEX

PARENT_CHECK_S = 1.0  # how often a loader worker looks whether its rank still lives


@dataclass(frozen=True)
class BadItem:
    """An item that could not be read: its place on disk, and why."""

    place: str
    reason: str


class EpochRows(Dataset):
    """The rows of one rank in one epoch; row i is micro-step `i % micro_steps` of step `i // micro_steps`.

    Every rank has the same number of rows. Row i depends on nothing but i, so any loader gives the same ones.
    """

    def __init__(self, dataset: TokenDataset, plan: EpochPlan, rank: int, world_size: int, pad_id: int) -> None:
        self.dataset, self.plan, self.rank, self.world_size, self.pad_id = dataset, plan, rank, world_size, pad_id
        self.micro_steps = num_micro_steps(plan, world_size)

    def __len__(self) -> int:
        return self.plan.num_steps * self.micro_steps

    def unit(self, index: int) -> Unit:
        """The unit of row `index`: which items, and how long the row is."""
        step, micro_step = divmod(index, self.micro_steps)
        return rank_units(self.plan, step, self.rank, self.world_size)[micro_step]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """What `collate_row` returns and, of that row, `step`, `micro_step`, `type_id` (into `dataset.types`),
        `item_indices` (into the dataset) and `bad_items`, those that could not be read; filler is in their place."""
        unit = self.unit(index)
        image_only = self.dataset.table.image_only(unit.items, self.plan.options, self.plan.epoch)
        items, bad_items = [], []
        for item_index, is_image_only in zip(unit.items.tolist(), image_only.tolist(), strict=True):
            try:
                items.append(self.dataset.read(item_index, is_image_only))
            except ItemReadError as error:
                bad_items.append(BadItem(self.dataset.place(item_index), str(error)))
        row = collate_row(items, unit.row_len, self.pad_id, self.dataset.max_seq_len)
        step, micro_step = divmod(index, self.micro_steps)
        place = {"step": step, "micro_step": micro_step, "item_indices": unit.items.tolist()}
        place["type_id"] = self.dataset.type_id(unit.items)
        return {**row, **place, "bad_items": bad_items}


def collate_row(
    items: Sequence[TokenItem], row_len: int, pad_id: int, max_document_len: int | None = None
) -> dict[str, Any]:
    """One row: the items as documents one after the other, then filler.

    Returns `input_ids`, `labels`, `position_ids` int64 [1, row_len]; `cu_seqlens` int32 [num_documents + 1], where each
    document starts and where the last ends; `num_valid_tokens` (targets) and `num_tokens` (of items).
    Labels are not shifted: `labels[t]` is the token at t or IGNORE_INDEX. A document's first token is never a target.
    Positions restart with each document. Filler is documents of its own at the end, of at most `max_document_len`
    tokens (default: a single one), so that `cu_seqlens[-1] == row_len`.

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

    Its workers send arrays through a pipe, so that no row needs /dev/shm, of which a container may have little. Without
    CUDA, `pin_memory` is ignored. Workers ignore the signals that are meant for the rank, and end with it.

    Raises ValueError if `start_step` lies outside the epoch (its end is allowed: a loader without rows).
    """
    if not 0 <= start_step <= rows.plan.num_steps:
        raise ValueError(f"start_step {start_step} is outside this epoch's 0 to {rows.plan.num_steps}")
    return _RowLoader(
        rows,
        pins=pin_memory and torch.cuda.is_available(),
        batch_size=None,
        sampler=_RowOrder(start_step * rows.micro_steps, len(rows)),
        num_workers=num_workers,
        collate_fn=_to_arrays,
        worker_init_fn=_init_worker if num_workers else None,
        multiprocessing_context="fork" if num_workers else None,  # shares the dataset's arrays with the rank
    )


class _RowLoader(DataLoader):
    """A loader whose workers send rows as numpy arrays; `pins`: whether the tensors are page-locked."""

    def __init__(self, rows: EpochRows, *, pins: bool, **options: Any) -> None:
        self._pins = pins
        super().__init__(rows, **options)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({name: self._to_tensor(value) for name, value in row.items()} for row in super().__iter__())

    def _to_tensor(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        return torch.from_numpy(value).pin_memory() if self._pins else torch.from_numpy(value)


def _to_arrays(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in row.items()}


class _RowOrder(torch.utils.data.Sampler[int]):
    """Row indices from `start` to `stop`, in order."""

    def __init__(self, start: int, stop: int) -> None:
        self.indices = range(start, stop)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def _init_worker(worker_id: int) -> None:
    """Makes a loader worker deaf to the signals that a launcher sends to the whole process group.

    A rank answers them by finishing its step and saving, for which it still needs its rows. Only the rank itself can
    terminate its workers: a thread takes SIGTERM, looks who sent it, and also ends a worker whose rank is gone.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    rank_process = multiprocessing.parent_process()
    threading.Thread(target=_end_with_rank, args=(rank_process.pid,), daemon=True).start()


def _end_with_rank(rank_pid: int) -> None:
    while os.getppid() == rank_pid:
        received = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK_S)
        if received is not None and received.si_pid == rank_pid:
            break
    os._exit(0)
