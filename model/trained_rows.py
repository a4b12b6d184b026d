"""An embedding and a head of which some rows alone are trained: those of image tokens.

Where it stands: `choose_trainable` (model/trainable.py) puts them in the place of the decoder's own. The whole weight
stays where it was, under its name and frozen; the trained rows are a parameter of their own beside it, so that weight
decay, moments and checkpoints know nothing of the others.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model.loss import LossHead

ROWS_NAME = "image_rows"


class _RowIds:
    """Sorted ids int64 [M] of the trained rows, and the number among them of each id, kept per device."""

    def __init__(self, ids: torch.Tensor, num_rows: int) -> None:
        numbers = torch.full((num_rows,), -1, dtype=torch.int64)
        numbers[ids] = torch.arange(len(ids))
        self._on: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {torch.device("cpu"): (ids, numbers)}

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids [M], number by id [V], -1 where the row is not trained)"""
        if device not in self._on:
            ids, numbers = self._on[torch.device("cpu")]
            self._on[device] = ids.to(device), numbers.to(device)
        return self._on[device]


class TrainedRowsEmbedding(nn.Embedding):
    """The embedding `weight` [V, D], frozen, but for the rows `image_rows` [M, D]."""

    def __init__(self, weight: torch.Tensor, row_ids: torch.Tensor, rows_dtype: torch.dtype) -> None:
        super().__init__(*weight.shape, _weight=weight, _freeze=True)
        self.image_rows = _empty_rows(weight, row_ids, rows_dtype)
        self.row_ids = _RowIds(row_ids, weight.shape[0])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] -> [..., D]."""
        number = self.row_ids.on(input_ids.device)[1][input_ids]
        frozen = F.embedding(input_ids, self.weight)
        trained = F.embedding(number.clamp(min=0), self.image_rows).to(frozen.dtype)
        return torch.where((number >= 0)[..., None], trained, frozen)


class TrainedRowsHead(LossHead):
    """The head `weight` [V, D], frozen, but for the rows `image_rows` [M, D]."""

    def __init__(self, weight: torch.Tensor, row_ids: torch.Tensor, rows_dtype: torch.dtype) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.image_rows = _empty_rows(weight, row_ids, rows_dtype)
        self.row_ids = _RowIds(row_ids, weight.shape[0])

    def trained_rows(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return self.image_rows, self.row_ids.on(device)[0]


def _empty_rows(weight: torch.Tensor, row_ids: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(len(row_ids), weight.shape[1], dtype=dtype, device=weight.device))
