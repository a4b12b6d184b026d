"""
Keys and values of a batch, allocated once.

Where it stands: filled by the decoder's forward over the prompts (`model/chameleon.py`), then by one token per row and
step (`model/decode_step.py`); `model/generation.py` says which slots a row sees.
"""

import torch
from torch import nn


class KVCache:
    """
    `keys` and `values` of every layer, [N, H_kv, num_slots, head_dim].

    The prompts lie in slots 0, 1, ... with padding on the right. What comes after them goes into one slot for all rows,
    behind the longest prompt, so that a step writes a column, and shapes never change.
    """

    def __init__(self, model: nn.Module, num_rows: int, num_slots: int):
        config, weight = model.config, model.lm_head.weight
        shape = (num_rows, config.num_key_value_heads, num_slots, config.hidden_size // config.num_attention_heads)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in layers]
        self._rows = slice(0, num_rows)

    def begin_prefill(self, rows: slice) -> None:
        """The next forward over prompts fills these rows."""
        self._rows = rows

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # a forward over prompts begins at their beginning

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_unused: object):
        """Called by a forward over prompts: store keys and values [B, H_kv, T, head_dim], and return them."""
        self.keys[layer_idx][self._rows, :, : key.shape[2]] = key
        self.values[layer_idx][self._rows, :, : value.shape[2]] = value
        return key, value

    def append(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, slot: torch.Tensor) -> None:
        """Store keys and values [N, H_kv, head_dim] of one token per row in a slot, int64 [1]."""
        self.keys[layer_idx].index_copy_(2, slot, key[:, :, None])
        self.values[layer_idx].index_copy_(2, slot, value[:, :, None])

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows only, int64 [N']."""
        for layer_idx in range(len(self.keys)):  # layer by layer: never two copies of the whole
            self.keys[layer_idx] = self.keys[layer_idx].index_select(0, rows)
            self.values[layer_idx] = self.values[layer_idx].index_select(0, rows)
