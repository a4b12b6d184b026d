"""Floating-point operations of training, per token: what a plan, the metrics and a bench measure speed against.

Source: PaLM (Chowdhery et al. 2022), appendix B, after Kaplan et al. 2020: a matrix of N weights costs 2 N in the
forward (a multiplication and an addition per weight), 2 N for the gradient of its input and 2 N for its own, and
attention 4 T D per layer and token in the forward and twice that in the backward. Since it is causal, a token attends
to half of a document on average, so attention counts half here (PaLM counts all of it). Left out, as there: the look-up
of the embedding, norms, softmax, and what is computed again because of `--checkpointing`, so that a share of a GPU's
peak (MFU) is of useful work.
"""

import re

from torch import nn
from transformers import PretrainedConfig

from model.trained_rows import ROWS_NAME


def flops_per_token(config: PretrainedConfig, seq_len: float) -> float:
    """FLOPs per token, forward and backward, of training every weight of a decoder.

    6 N + 6 L T D with N the weights of all matrices (projections and head, not the embedding), L layers, T = `seq_len`
    the tokens of a document and D the width of attention (heads x head_dim).
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    attention_width, kv_width = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    per_layer = 2 * hidden * attention_width + 2 * hidden * kv_width + 3 * hidden * config.intermediate_size
    matrices = layers * per_layer + hidden * config.vocab_size
    return 6.0 * matrices + 6.0 * layers * seq_len * attention_width


def trained_flops_per_token(model: nn.Module, seq_len: float) -> float:
    """FLOPs per token, forward and backward, of training those weights of a decoder that require a gradient.

    As `flops_per_token`, except that of frozen matrices only the forward counts (2 N) and, where a weight before them
    is trained, the gradient of their input (2 N); likewise attention in the backward. Parameters are taken in the
    model's own order, which is that of the forward; the model may be on meta, sharded, and hold adapters.
    """
    config, total, is_below_trained = model.config, 0.0, False
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2.0 * seq_len * config.num_attention_heads * head_dim  # forward, causal, of one layer
    backward_layers: set[str] = set()
    for name, parameter in model.named_parameters():
        if name == f"lm_head.{ROWS_NAME}":  # they are rows of the head's matrix, which has been counted
            total += 2.0 * parameter.numel()
        elif parameter.ndim == 2 and "norm" not in name and "embed" not in name:
            total += 2.0 * parameter.numel() * (1 + is_below_trained + parameter.requires_grad)
        is_below_trained |= parameter.requires_grad
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer and is_below_trained:
            backward_layers.add(layer[1])
    return total + attention * (config.num_hidden_layers + 2 * len(backward_layers))
