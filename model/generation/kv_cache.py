"""Keys and values of a batch, allocated once.

`loop.py` decides which slots a row sees. The decoder's forward over the prompts fills the cache, then `decode_step.py`
adds one token per row and step.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from model.decoder.chameleon import ChameleonXLLMXConfig


def row_bytes(config: ChameleonXLLMXConfig, num_slots: int, dtype: torch.dtype) -> int:
    """Bytes of one row of a cache of `num_slots`, keys and values of all layers."""
    head_dim = config.hidden_size // config.num_attention_heads
    return 2 * dtype.itemsize * config.num_hidden_layers * config.num_key_value_heads * head_dim * num_slots


@contextmanager
def naming_shortage(advice: str) -> Iterator[None]:
    """Too little memory, on a GPU or the host, becomes a torch.OutOfMemoryError whose message is `advice`."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        wanted = re.search(r"allocate ([\d.]+ \w+)", str(error))
        wanted = f" (for {wanted[1]} more)" if wanted else ""
        raise torch.OutOfMemoryError(f"too little memory{wanted}: {advice}") from None


def free_bytes(device: torch.device) -> int:
    """Memory for new tensors on a device. Without CUDA it is that of the machine; the limit of a job is not known."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    # PyTorch keeps memory that no tensor uses; new tensors get it.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


class KVCache:
    """
    Keys and values of every layer, each [N, H_kv, num_slots, head_dim].

    The prompts lie in slots 0, 1, ... with padding on the right. A token after the prompts goes to one slot for all
    rows, behind the longest prompt: a step writes a column, and shapes never change.
    """

    def __init__(self, layers: list[torch.Tensor]):
        """`layers`: keys and values of each layer, [2, N, H_kv, num_slots, head_dim], on the device of the layer."""
        self.layers = layers
        self.keys, self.values = [layer[0] for layer in layers], [layer[1] for layer in layers]
        self._rows = slice(0, layers[0].shape[1])
        self._slot: torch.Tensor | None = None
        self._num_visible = 0

    @classmethod
    def allocate(
        cls,
        config: ChameleonXLLMXConfig,
        num_rows: int,
        num_slots: int,
        dtype: torch.dtype,
        devices: list[torch.device],
    ) -> "KVCache":
        """`devices`: of each layer."""
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (2, num_rows, config.num_key_value_heads, num_slots, head_dim)
        return cls([torch.zeros(shape, dtype=dtype, device=device) for device in devices])

    def first(self, num_rows: int) -> "KVCache":
        """The first rows, as views."""
        return KVCache([layer[:, :num_rows] for layer in self.layers])

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def begin_prefill(self, rows: slice) -> None:
        """The next forward of the decoder is over prompts, and fills these rows."""
        self._rows, self._slot = rows, None

    def begin_step(self, slot: torch.Tensor, num_visible: int) -> None:
        """The next forward of the decoder is of one token per row, for `slot`, int64 [1]; it sees `num_visible`."""
        self._slot, self._num_visible = slot, num_visible

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0: a forward over prompts begins at their start, and a step brings its own positions and mask."""
        return 0

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_unused: object):
        """Called by the decoder's forward: store keys and values [B, H_kv, T, head_dim], return those to attend to."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if self._slot is not None:
            self.append(key[:, :, 0], value[:, :, 0], layer_idx, self._slot)
            return keys[:, :, : self._num_visible], values[:, :, : self._num_visible]
        keys[self._rows, :, : key.shape[2]] = key
        values[self._rows, :, : value.shape[2]] = value
        return key, value

    def append(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, slot: torch.Tensor) -> None:
        """Store keys and values [N * T, H_kv, head_dim] in slots int64 [N, T], or with T = 1 in one, int64 [1]."""
        slot = slot.to(key.device)
        for cache, new in ((self.keys[layer_idx], key), (self.values[layer_idx], value)):
            if slot.dim() == 1:
                cache.index_copy_(2, slot, new[:, :, None])
            else:
                new = new.unflatten(0, slot.shape).transpose(1, 2)
                cache.scatter_(2, slot[:, None, :, None].expand_as(new), new)
