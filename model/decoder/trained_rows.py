"""An embedding and a head with some trained rows, those of image tokens, in a frozen weight.

The rows are a parameter beside the whole weight: weight decay, moments and checkpoints cover these rows alone.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model.decoder.loss import LossHead

ROWS_NAME = "image_rows"


class TrainedRowsEmbedding(nn.Embedding):
    """The frozen embedding `weight` [V, D], with the rows `image_rows` [M, D] for the ids `row_ids`."""

    def __init__(self, weight: torch.Tensor, row_ids: torch.Tensor, rows_dtype: torch.dtype) -> None:
        super().__init__(*weight.shape, _weight=weight, _freeze=True)
        self.image_rows = _empty_rows(weight, row_ids, rows_dtype)
        # int64 [V]: the number of each id among the rows, -1 for other ids.
        numbers = torch.full((weight.shape[0],), -1, dtype=torch.int64)
        numbers[row_ids] = torch.arange(len(row_ids))
        self._numbers = _OnDevices(numbers)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] -> [..., D]."""
        number = self._numbers.on(input_ids.device)[input_ids]
        frozen = F.embedding(input_ids, self.weight)
        trained = F.embedding(number.clamp(min=0), self.image_rows).to(frozen.dtype)
        return torch.where((number >= 0)[..., None], trained, frozen)


class TrainedRowsHead(LossHead):
    """The frozen head `weight` [V, D], with the rows `image_rows` [M, D] for the ids `row_ids`."""

    def __init__(self, weight: torch.Tensor, row_ids: torch.Tensor, rows_dtype: torch.dtype) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.image_rows = _empty_rows(weight, row_ids, rows_dtype)
        self._row_ids = _OnDevices(row_ids)

    def trained_rows(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return self.image_rows, self._row_ids.on(device)


class _OnDevices:
    """A constant tensor, copied to each device once. As a buffer it would be garbage after `to_empty`."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copies = {tensor.device: tensor}

    def on(self, device: torch.device) -> torch.Tensor:
        if device not in self._copies:
            self._copies[device] = next(iter(self._copies.values())).to(device)
        return self._copies[device]


def _empty_rows(weight: torch.Tensor, row_ids: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(len(row_ids), weight.shape[1], dtype=dtype, device=weight.device))
