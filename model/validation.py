"""Validation: the loss on items that are not trained on, always the same rows, without dropout.

Rows are made from the data alone (no seed, no number of ranks in them) and dealt out to the ranks, and sums are taken
in fp64, so that the figures are the same on any number of ranks, to the rounding of the last digits. The training
notices nothing: each of its steps seeds its own dropout.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data.dataset import TokenDataset
from data.packing import OrderOptions, plan_epoch
from data.rows import BadItem, EpochRows, build_loader
from model.distributed import gather_lists, sum_counts, sum_over_ranks
from model.metrics import MetricSums, summarize
from model.parallelize import reshard
from model.training import forward_row

KEPT_FIGURES = ("loss", "text_loss", "image_loss", "loss_by_type", "num_valid_tokens")


@dataclass(frozen=True)
class ValidationOptions:
    """`val_interval`: optimizer steps from one validation to the next, 0: only at the end of the run."""

    val_data_config: Path | None = None
    val_interval: int = 500
    eval_only: bool = False

    def is_due(self, step: int, is_finished: bool) -> bool:
        """Whether to validate after optimizer step `step`."""
        is_at_interval = self.val_interval > 0 and step % self.val_interval == 0
        return self.val_data_config is not None and (is_at_interval or is_finished)


class Validator:
    """Takes the loss of a validation set; built and run by all ranks."""

    def __init__(
        self,
        dataset: TokenDataset,
        plan_options: OrderOptions,
        rank: int,
        world_size: int,
        pad_id: int,
        device: torch.device,
        z_loss_weight: float,
        num_workers: int = 0,
    ) -> None:
        """Of `plan_options`, `batch_size`, `max_seq_len` and `packing` count: they decide the shapes of the rows."""
        self.rows = build_rows(dataset, plan_options, rank, world_size, pad_id)
        self._device, self._z_loss_weight, self._num_workers = device, z_loss_weight, num_workers

    @torch.no_grad()
    def run(
        self, model: nn.Module, waiting: Callable[[Iterable[dict]], Iterable[dict]] = iter
    ) -> tuple[dict[str, Any], list[BadItem]]:
        """(`val_loss`, `val_text_loss`, `val_image_loss`, with several types `val_loss_by_type`, `val_num_valid_tokens`
        and `val_s`; items that could not be read and are left out), both over all ranks.

        `waiting` may break off the wait for rows. The model is sharded and in the state in which it was afterwards.
        """
        started, was_training = time.perf_counter(), model.training
        dataset, bad_items = self.rows.dataset, []
        sums = MetricSums(self._device, len(dataset.types))
        model.eval()
        for row in waiting(build_loader(self.rows, self._num_workers)):
            output = forward_row(model, row, self._device, dataset.max_seq_len)
            sums.add(output, row["num_tokens"], row["type_id"])
            bad_items += row["bad_items"]
        model.train(was_training)
        reshard(model)
        figures = summarize(sum_over_ranks(sums.take()).tolist(), self._z_loss_weight, dataset.types)
        figures = {f"val_{name}": figures[name] for name in KEPT_FIGURES if name in figures}
        if sum_counts(len(bad_items))[0]:
            bad_items = gather_lists(bad_items)
        return figures | {"val_s": round(time.perf_counter() - started, 3)}, bad_items


def build_rows(dataset: TokenDataset, plan_options: OrderOptions, rank: int, world_size: int, pad_id: int) -> EpochRows:
    """The rows of one rank: of all rows in their order, every `world_size`-th; where there is none left, an empty one.

    Items are those of a first epoch under seed 0: a ratio below 1 takes the same sample each time.
    """
    alone = dataclasses.replace(plan_options, units_per_step=1, seed=0, context_dropout=0.0)
    plan = plan_epoch(dataset.table, alone, epoch=0)
    dealt = dataclasses.replace(
        plan,
        step_offsets=np.append(np.arange(0, plan.num_units, world_size), plan.num_units),
        options=dataclasses.replace(alone, units_per_step=world_size),
    )
    return EpochRows(dataset, dealt, rank, world_size, pad_id)
