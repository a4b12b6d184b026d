"""Validation: the loss on items that are not trained on, over the same rows each time, without dropout.

The rows depend on the data alone and are dealt out to the ranks: the figures are the same on any number of ranks, up to
rounding. Training does not change: each of its steps seeds its own dropout.
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

from data.epoch.dataset import TokenDataset
from data.epoch.packing import OrderOptions, plan_epoch
from data.epoch.rows import BadItem, EpochRows, build_loader
from data.flags import flag
from model.run.metrics import MetricSums, summarize
from model.training.distributed import gather_lists, sum_counts, sum_over_ranks
from model.training.parallelize import reshard
from model.training.step import forward_row

KEPT_FIGURES = ("loss", "text_loss", "image_loss", "loss_by_type", "num_valid_tokens")


@dataclass(frozen=True)
class ValidationOptions:
    """The items for validation, and when to validate."""

    val_data_config: Path | None = flag(None, "YAML of items that are not trained on; by default no validation")
    val_interval: int = flag(500, "optimizer steps between validations; 0: only at the end", least=0)
    eval_only: bool = flag(False, "validate a checkpoint or --init_from, print the losses, and end")

    def is_due(self, step: int, is_finished: bool) -> bool:
        """Whether to validate after optimizer step `step`."""
        is_at_interval = self.val_interval > 0 and step % self.val_interval == 0
        return self.val_data_config is not None and (is_at_interval or is_finished)


@torch.no_grad()
def validate(
    model: nn.Module,
    rows: EpochRows,
    device: torch.device,
    z_loss_weight: float,
    num_workers: int = 0,
    waiting: Callable[[Iterable[dict]], Iterable[dict]] = iter,
) -> tuple[dict[str, Any], list[BadItem]]:
    """(`val_loss`, `val_text_loss`, ... and `val_s`, as metrics.jsonl has them; items that cannot be read), over ranks.

    Args:
        model: sharded; it returns to its mode (training or not), its parameters sharded.
        rows: those of this rank, by `validation_rows`.
        waiting: wraps the loader and may end the wait for a row by an exception.
    """
    started, was_training, dataset, bad_items = time.perf_counter(), model.training, rows.dataset, []
    sums = MetricSums(device, len(dataset.types))
    model.eval()
    for row in waiting(build_loader(rows, num_workers)):
        output = forward_row(model, row, device, dataset.max_seq_len)
        sums.add(output, row["num_tokens"], row["type_id"])
        bad_items += row["bad_items"]
    model.train(was_training)
    reshard(model)
    figures = summarize(sum_over_ranks(sums.take()).tolist(), z_loss_weight, dataset.types)
    figures = {f"val_{name}": figures[name] for name in KEPT_FIGURES if name in figures}
    if sum_counts(len(bad_items))[0]:
        bad_items = gather_lists(bad_items)
    return figures | {"val_s": round(time.perf_counter() - started, 3)}, bad_items


def validation_rows(
    dataset: TokenDataset, order_options: OrderOptions, rank: int, world_size: int, pad_id: int
) -> EpochRows:
    """The rows of one rank: every `world_size`-th of all rows, and an empty row where none is left.

    Of `order_options`, `batch_size`, `max_seq_len` and `packing` count. Items are those of epoch 0 under seed 0: with a
    ratio below 1 the sample is the same each time.
    """
    alone = dataclasses.replace(order_options, units_per_step=1, seed=0, context_dropout=0.0)
    order = plan_epoch(dataset.table, alone, epoch=0)
    offsets = np.append(np.arange(0, order.num_units, world_size), order.num_units)
    options = dataclasses.replace(alone, units_per_step=world_size)
    return EpochRows(
        dataset, dataclasses.replace(order, step_offsets=offsets, options=options), rank, world_size, pad_id
    )
