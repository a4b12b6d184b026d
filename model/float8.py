"""fp8 matrix products in the decoder's layers, through torchao: `--float8`.

Where it stands: `build_sharded` (model/training.py) converts the decoder on meta, before `parallelize` compiles and
shards it. Weights stay what they were (bf16 from fp32 masters, the same names in checkpoints); in each product of a
layer, forward and backward, both sides are rounded to fp8 with one scale for the tensor, found anew each time. The head
is not converted: its loss is computed in chunks by model/loss.py, in bf16 and fp32.
"""

import importlib.util
from dataclasses import dataclass

import torch
from torch import nn

from data.flags import flag
from model.optim import TORCHAO_PIN

MIN_CAPABILITY = (8, 9)  # the first GPUs with fp8 products: Ada, then Hopper (9, 0)
MULTIPLE_OF = 16  # what the products take; a layer of another width stays as it is


@dataclass(frozen=True)
class Float8Options:
    """`float8`: the products of the decoder's layers in fp8."""

    float8: bool = flag(False, "matrix products of the layers in fp8, by torchao, on GPUs of capability 8.9 or more")

    def problems(self, device: str | None, precision: str, is_partial: bool = False, row_len: int = 0) -> list[str]:
        """What is wrong with these options on a device (`auto`, `cuda` or `cpu`), one sentence each.

        Without a device (None: a plan) its abilities are not asked for. `is_partial`: some weights are frozen.
        `row_len`: tokens of the longest row, which is the inner dimension of the products that give gradients.
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
            found.append(
                f"--float8 needs a GPU of compute capability {'.'.join(map(str, MIN_CAPABILITY))} or more (Ada, Hopper "
                f"and later), but {torch.cuda.get_device_name()} has "
                f"{'.'.join(map(str, torch.cuda.get_device_capability()))}: leave it out"
            )
        return found


def use_float8(model: nn.Module, emulate: bool = False) -> nn.Module:
    """Lets the linear layers of a decoder's layers (`model.model.layers`) compute in fp8, in place; returns the model.

    `emulate` rounds to fp8 and multiplies in the type of the weights: for tests where no GPU is.

    Raises ImportError if torchao is not there.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ImportError(f"--float8 needs torchao: pip install --no-deps {TORCHAO_PIN} ({error})") from error

    convert_to_float8_training(
        model.model.layers, module_filter_fn=_is_converted, config=Float8LinearConfig(emulate=emulate)
    )
    return model


def _is_converted(module: nn.Module, _name: str) -> bool:
    return not (module.in_features % MULTIPLE_OF or module.out_features % MULTIPLE_OF)
