"""Recomputation: which activations of the decoder's layers are kept for the backward, and which are computed again.

Where it stands: the first step of `parallelize` (model/parallelize.py). Whatever is chosen, what is computed again is
computed from the same inputs, by the same operators and with the same random numbers, so that gradients are those of a
run that keeps everything, to the bit where the operators themselves give the same bits twice.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# Operators by "namespace::name", whatever their overload: most of a layer's work, in few of its activations.
MATRIX_PRODUCTS = frozenset(
    {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::_scaled_mm"}
)
ATTENTION = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_attention_math",
        "torch_attn::_varlen_attn",  # packed rows on CUDA
        "packed_attention::attend_documents",  # packed rows in a compiled layer (model/attention.py)
    }
)


def recompute_layers(layers: nn.ModuleList, every: int, selective: bool) -> None:
    """
    Wraps layers in place, so that their backward computes again what their forward does not keep.

    Args:
        layers: the decoder's.
        every: of each so many layers the first is wrapped: 1 for all of them, 0 for none.
        selective: keep the results of matrix products and of attention, and compute again only what lies between them
            (norms, rotary embedding, activations, dropout), cheap to compute. Otherwise nothing is kept but the input.
    """
    arguments: dict[str, Any] = {}
    if selective:
        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, keep_products_and_attention)
    for index in range(0, len(layers), every) if every else ():
        layers[index] = checkpoint_wrapper(layers[index], **arguments)


def keep_products_and_attention(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """The policy of selective recomputation, as `create_selective_checkpoint_contexts` calls it."""
    name = operator.name().partition(".")[0] if isinstance(operator, torch._ops.OpOverload) else ""
    is_kept = name in MATRIX_PRODUCTS or name in ATTENTION
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
