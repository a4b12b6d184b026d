"""`--float8`: matrix products of the decoder's layers in fp8, by torchao.

`build_sharded` (model/training/step.py) converts the decoder on meta. Weights and checkpoints stay as they are: each
product, forward and backward, rounds both sides to fp8 with one dynamic scale per tensor. The head is not converted.
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
    """`float8`: matrix products of the decoder's layers in fp8."""

    float8: bool = flag(False, "matrix products of the layers in fp8, by torchao, on GPUs of capability 8.9 or more")

    def problems(self, device: str | None, precision: str, is_partial: bool = False, row_len: int = 0) -> list[str]:
        """What is wrong with these options, one sentence each.

        Args:
            device: `auto`, `cuda` or `cpu`; None (a plan): not checked.
            is_partial: whether some weights are frozen.
            row_len: tokens of the longest row, the inner dimension of the products that give gradients of weights.
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
        if device is None:
            return found
        if device == "cpu" or not torch.cuda.is_available():
            found.append("--float8 needs a GPU with fp8, and this run has none: leave it out, or train on a GPU")
        elif torch.cuda.get_device_capability() < MIN_CAPABILITY:
            needed, has = (".".join(map(str, pair)) for pair in (MIN_CAPABILITY, torch.cuda.get_device_capability()))
            found.append(
                f"--float8 needs a GPU of compute capability {needed} or more (Ada, Hopper and later), but "
                f"{torch.cuda.get_device_name()} has {has}: leave it out"
            )
        return found


def use_float8(model: nn.Module, emulate: bool = False) -> nn.Module:
    """Converts the linear modules of a decoder's layers (`model.model.layers`) to fp8, in place; returns the model.

    `emulate` rounds to fp8 and multiplies in the type of the weights, for tests without a GPU. Raises ImportError if
    torchao is missing.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ImportError(f"--float8 needs torchao: pip install --no-deps {TORCHAO_PIN} ({error})") from error

    def is_converted(module: nn.Linear, _name: str) -> bool:
        return module.in_features % MULTIPLE_OF == 0 and module.out_features % MULTIPLE_OF == 0

    config = Float8LinearConfig(emulate=emulate)
    convert_to_float8_training(model.model.layers, module_filter_fn=is_converted, config=config)
    return model
