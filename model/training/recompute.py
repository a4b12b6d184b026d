"""Recomputation: which activations of the decoder's layers are kept for the backward, and which are computed again.

The first step of `parallelize` (model/training/parallelize.py). Recomputation has the same inputs, operators and random
numbers as the forward, so the gradients are the same to the bit, if the operators are deterministic.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# Matrix products and attention, by "namespace::name": most of a layer's work, in few of its activations.
KEPT_OPERATORS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::linear",
        "aten::_scaled_mm",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_attention_math",
        # Packed rows on CUDA.
        "torch_attn::_varlen_attn",
        # Packed rows in a compiled layer (model/decoder/attention.py).
        "packed_attention::attend_documents",
    }
)


def recompute_layers(layers: nn.ModuleList, every: int, selective: bool) -> None:
    """
    Wraps layers in place, so that their backward computes again what their forward does not keep.

    Args:
        layers: the decoder's.
        every: one in `every` layers is wrapped, starting with the first: 1 for all of them, 0 for none.
        selective: keep the results of matrix products and attention, and compute again only the cheap rest (norms,
            rotary embedding, activations, dropout). Otherwise only the layer's input is kept.
    """
    arguments: dict[str, Any] = {}
    if selective:
        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, _choose_kept)
    for index in range(0, len(layers), every) if every else ():
        layers[index] = checkpoint_wrapper(layers[index], **arguments)


def _choose_kept(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    # An operator's name ends in its overload: `aten::mm.default`.
    name = operator.name().partition(".")[0] if isinstance(operator, torch._ops.OpOverload) else ""
    return CheckpointPolicy.MUST_SAVE if name in KEPT_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE
