"""Tokenized items as a training run sees them: the items of all record files, the rows of one rank, their loader.

Stands between `data/record.py` / `data/token_file.py` (what lies on disk) and the solver (one row per micro-step):

    TokenDataset -> plan_epoch (data/packing.py) -> EpochRows(rank, world_size) -> build_loader(start_step) -> rows
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.data_config import DataSource
from data.packing import EpochPlan, PlanOptions, Unit, num_micro_steps, plan_epoch, rank_units
from data.record import read_record
from data.token_file import TokenItem, load_token_file
from data.vocab import IGNORE_INDEX

OVERLONG_CHOICES = ("error", "drop", "truncate")
PARENT_CHECK_S = 1.0  # how often a loader worker looks whether its rank still lives


class TokenDataset(Dataset):
    """All items of the data config, read lazily by index.

    Per item: `lengths` int32 [N] (tokens, never above `max_seq_len`), `image_lens` int32 [N] (tokens of the generated
    image that ends it, 0: none), `type_ids` and `source_ids` int16 [N]; per source: `ratios` float64 [num_sources].
    `type_names` [num_types] are the types of the data config, `num_overlong` the items dropped or cut.

    `overlong` says what happens to items above `max_seq_len`: "error", "drop" or "truncate" (cuts the end off, which
    may leave half an image).

    Raises ValueError (overlong items, nothing left, a broken record) and FileNotFoundError.
    """

    def __init__(self, sources: Sequence[DataSource], max_seq_len: int, overlong: str = "error") -> None:
        if overlong not in OVERLONG_CHOICES:
            raise ValueError(f"overlong must be one of {', '.join(OVERLONG_CHOICES)}, got {overlong!r}")
        self.max_seq_len = max_seq_len
        self.type_names = sorted({source.type for source in sources})
        self.ratios = np.array([source.ratio for source in sources])
        self._read_records(sources)
        self._fit_lengths(overlong)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenItem:
        """Item `index`: token and label int32 [lengths[index]], and id. Raises ValueError for a file that is not what
        its record says."""
        position = self._positions[index]
        path, expected = self._files[position], int(self._record_lens[position])
        offset, nbytes = int(self._offsets[position]), int(self._nbytes[position])
        item = load_token_file(path, offset, nbytes) if nbytes else load_token_file(path)
        if len(item.token) != expected:
            raise ValueError(
                f"token file {path} has {len(item.token)} tokens, but its record says {expected}: one of them is of "
                f"another run; pre-tokenize again or merge the records again"
            )
        length = int(self.lengths[index])
        return TokenItem(token=item.token[:length], label=item.label[:length], id=item.id)

    def check_first_items(self, num_ids: int) -> None:
        """Read the first item of each record, so that a folder that was moved or is of another tokenizer is told early.

        Raises what `__getitem__` raises, and ValueError for a token outside of a vocabulary of `num_ids`.
        """
        for index in np.unique(self.source_ids, return_index=True)[1].tolist():
            token = self[index].token
            if len(token) and (token.min() < 0 or token.max() >= num_ids):
                raise ValueError(
                    f"token file {self._files[self._positions[index]]} holds ids from {token.min()} to {token.max()}, "
                    f"but the model has {num_ids}: train with the tokenizer that made it, or pre-tokenize again"
                )

    def plan_epoch(self, options: PlanOptions, epoch: int) -> EpochPlan:
        """The plan of `epoch` (from 0) over this dataset."""
        return plan_epoch(self.lengths, self.type_ids, self.source_ids, self.ratios, options, epoch)

    def _read_records(self, sources: Sequence[DataSource]) -> None:
        self._files: list[str] = []
        lens, image_lens, counts = [], [], []
        offsets, nbytes = array("q"), array("q")
        shard_paths: dict[str, str] = {}  # one string for all items of a shard
        for source in sources:
            for entry in read_record(source.path):
                is_sharded = entry.is_sharded
                self._files.append(shard_paths.setdefault(entry.file, entry.file) if is_sharded else entry.file)
                offsets.append(entry.offset if is_sharded else 0)
                nbytes.append(entry.nbytes if is_sharded else 0)
                lens.append(entry.len)
                image_lens.append(entry.image_len or 0)
            counts.append(len(lens) - sum(counts))
            if not counts[-1]:
                raise ValueError(f"record {source.path} has no items; tokenize its input, or list it no more")
        self._offsets = np.array(offsets, np.int64)
        self._nbytes = np.array(nbytes, np.int64)  # 0: the item has its file for itself
        self._record_lens = np.array(lens, np.int32)
        self._image_lens = np.array(image_lens, np.int32)
        self._source_ids = np.repeat(np.arange(len(sources), dtype=np.int16), counts)
        self._type_of_source = np.array([self.type_names.index(source.type) for source in sources], np.int16)

    def _fit_lengths(self, overlong: str) -> None:
        too_long = self._record_lens > self.max_seq_len
        self.num_overlong = int(too_long.sum())
        if self.num_overlong and overlong == "error":
            longest = int(self._record_lens.max())
            raise ValueError(
                f"{self.num_overlong} of {len(too_long)} items are longer than --max_seq_len {self.max_seq_len}; the "
                f"longest has {longest} tokens ({self._files[int(self._record_lens.argmax())]}). Train with "
                f"--max_seq_len {longest}, or leave them out (--overlong drop) or cut them (--overlong truncate)"
            )
        self._positions = np.flatnonzero(~too_long) if overlong == "drop" else np.arange(len(too_long))
        if not len(self._positions):
            raise ValueError(
                f"every item is longer than --max_seq_len {self.max_seq_len}; the shortest: {self._record_lens.min()}"
            )
        self.lengths = np.minimum(self._record_lens[self._positions], self.max_seq_len).astype(np.int32)
        self.image_lens = np.where(too_long, 0, self._image_lens)[self._positions].astype(np.int32)
        self.source_ids = self._source_ids[self._positions]
        self.type_ids = self._type_of_source[self.source_ids]


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
        """What `collate_row` returns and, of that row, `step`, `micro_step` and `item_indices` (into the dataset)."""
        unit = self.unit(index)
        items = [self.dataset[i] for i in unit.items.tolist()]
        row = collate_row(items, unit.row_len, self.pad_id, self.dataset.max_seq_len)
        step, micro_step = divmod(index, self.micro_steps)
        return {**row, "step": step, "micro_step": micro_step, "item_indices": unit.items.tolist()}


def build_loader(
    rows: EpochRows, num_workers: int = 0, pin_memory: bool = False, start_step: int = 0
) -> DataLoader[Mapping[str, Any]]:
    """A loader of the rows from `start_step` on, in order; it reads nothing of the steps before.

    Without CUDA, `pin_memory` is ignored. Workers ignore the signals that are meant for the rank, and end with it.

    Raises ValueError if `start_step` lies outside the epoch (its end is allowed: a loader without rows).
    """
    if not 0 <= start_step <= rows.plan.num_steps:
        raise ValueError(f"start_step {start_step} is outside this epoch's 0 to {rows.plan.num_steps}")
    return DataLoader(
        rows,
        batch_size=None,
        sampler=_RowOrder(start_step * rows.micro_steps, len(rows)),
        num_workers=num_workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        worker_init_fn=_init_worker if num_workers else None,
        multiprocessing_context="fork" if num_workers else None,  # shares the dataset's arrays with the rank
    )


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
