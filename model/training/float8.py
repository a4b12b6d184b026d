"""`--float8`: matrix products of the decoder's layers in fp8, by torchao; weights and checkpoints stay as they are.

Each product, forward and backward, rounds both sides to fp8 with one dynamic scale per tensor.
"""

import importlib.util
from dataclasses import dataclass

import torch
from torch import nn

from data.flags import flag
from model.training.optim import TORCHAO_PIN

# The first GPUs with fp8 products: Ada, then Hopper (9, 0).
MIN_CAPABILITY = (8, 9)
# Sizes of an fp8 product must be multiples of it; a layer of another width is not converted.
MULTIPLE_OF = 16


@dataclass(frozen=True)
class Float8Options:
    """Whether the layers multiply in fp8."""

    float8: bool = flag(False, "matrix products of the layers in fp8, by torchao, on GPUs of capability 8.9 or more")

    def problems(self, device: str | None, precision: str, is_partial: bool = False, row_len: int = 0) -> list[str]:
        """What is wrong with these options, one sentence each.

        `device` is `auto`, `cuda`, `cpu`, or None (a plan): not checked. `is_partial`: some weights are frozen.
        `row_len`, of the longest row, is the inner dimension of the products that give gradients of weights.
        """
        if not self.float8:
            return []
        found = []
        if precision != "bf16":
            found.append(f"--float8 goes with --precision bf16 (what is not in fp8 is in bf16), got {precision}")
        if is_partial:
            found.append("--float8 trains every weight: leave it out with --lora_rank or --train_only")
        if row_len % MULTIPLE_OF:
            found.append(
                f"--float8 needs rows of a multiple of {MULTIPLE_OF} tokens, got {row_len} (--batch_size times "
                "--max_seq_len): choose another --max_seq_len"
            )
        if importlib.util.find_spec("torchao") is None:
            found.append(f"--float8 needs torchao: pip install --no-deps {TORCHAO_PIN}")
        has_cuda = device != "cpu" and torch.cuda.is_available()
        if device and not (has_cuda and torch.cuda.get_device_capability() >= MIN_CAPABILITY):
            found.append(
                "--float8 needs a GPU of compute capability 8.9 or more (Ada, Hopper and later), and this run has "
                f"{torch.cuda.get_device_name() if has_cuda else 'none'}: leave it out"
            )
        return found


def use_float8(model: nn.Module, emulate: bool = False) -> nn.Module:
    """Converts the linear modules of a decoder's layers (`model.model.layers`) to fp8, in place; returns the model.

    `emulate` rounds to fp8 and multiplies in the type of the weights, for tests without a GPU. Raises ImportError if
    torchao is missing.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def is_converted(module: nn.Linear, _name: str) -> bool:
        return module.in_features % MULTIPLE_OF == 0 and module.out_features % MULTIPLE_OF == 0

    config = Float8LinearConfig(emulate=emulate)
    convert_to_float8_training(model.model.layers, module_filter_fn=is_converted, config=config)
    return model
