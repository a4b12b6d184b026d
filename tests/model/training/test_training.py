"""A row is on the device before the model gets it, by copies that do not block the host."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.epoch.rows import collate_row
from exps.bench.train_ways import make_items
from model.training.step import forward_row


class RecordCopies(TorchDispatchMode):
    """Notes of every copy to another device whether it is non-blocking."""

    def __init__(self) -> None:
        super().__init__()
        self.non_blocking: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") != args[0].device:
            self.non_blocking.append(kwargs.get("non_blocking", False))
        return func(*args, **(kwargs or {}))


def test_a_row_is_on_the_device_before_the_model_gets_it():
    """On CUDA, FSDP would copy tensors of the host itself, and wait for all queued work."""
    row, seen = collate_row(make_items((20, 30), 512, seed=0), 64, pad_id=1), {}
    with RecordCopies() as record:
        forward_row(lambda **arguments: seen.update(arguments), row, torch.device("meta"), max_seqlen=30)
    tensors = {name: value for name, value in seen.items() if isinstance(value, torch.Tensor)}
    assert tensors.keys() == {"input_ids", "labels", "position_ids", "cu_seqlens"}
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    assert record.non_blocking == [True] * len(tensors)
    assert all(tensor.shape == row[name].shape for name, tensor in tensors.items())
