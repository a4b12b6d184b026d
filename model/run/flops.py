"""Floating-point operations of training, and the peak of GPUs: what a plan, the metrics and a bench compare speed with.

Source: PaLM (Chowdhery et al. 2022), appendix B, after Kaplan et al. 2020. A matrix of N weights costs 2 N per token in
the forward, 2 N for the gradient of its input and 2 N for its own; attention 4 T D per layer in the forward and twice
that in the backward. Attention counts half here: it is causal, so a token attends to half of a document on average.
Not counted, so that MFU is of useful work: embedding look-up, norms, softmax, and recomputation (`--checkpointing`).
"""

import re

import numpy as np
import torch
from torch import nn

from model.decoder.trained_rows import ROWS_NAME

# Dense bf16 FLOP/s with fp32 accumulation, by pattern of `torch.cuda.get_device_name`; the first match counts. From
# NVIDIA's data sheets, which mostly print twice as much, "with sparsity".
PEAK_FLOPS = (
    (r"GB200", 2500e12),
    (r"B200", 2250e12),
    (r"H[12]00.* NVL", 835e12),
    (r"H[18]00.* PCIe", 756e12),
    (r"H100|H800|H200|GH200", 989e12),
    (r"A100|A800", 312e12),
    (r"L40S", 362e12),
    (r"L40\b", 181e12),
    (r"RTX 4090", 165e12),
    (r"A30\b", 165e12),
    (r"RTX A6000", 155e12),
    (r"A40\b", 150e12),
)


def trained_flops_per_token(model: nn.Module, seq_len: float) -> float:
    """FLOPs per token, forward and backward, of training the weights of a decoder that require a gradient.

    For a full training 6 N + 6 L T D: N weights of all matrices (projections and head, not the embedding), L layers,
    T = `seq_len` tokens of a document, D the width of attention (heads x head_dim). A frozen matrix has no gradient of
    its own, and no gradient of its input unless a weight before it is trained; nor has attention.

    Args:
        model: may be on meta, sharded, and hold adapters; its parameters are in the order of the forward.
        seq_len: tokens of a document.
    """
    config, total, is_below_trained = model.config, 0.0, False
    # The forward of one layer, causal.
    attention = 2.0 * seq_len * config.hidden_size
    backward_layers: set[str] = set()
    for name, parameter in model.named_parameters():
        # Trained rows of the head have a gradient, but their forward is in that of the whole head.
        if name == f"lm_head.{ROWS_NAME}":
            total += 2.0 * parameter.numel()
        elif parameter.ndim == 2 and "norm" not in name and "embed" not in name:
            total += 2.0 * parameter.numel() * (1 + is_below_trained + parameter.requires_grad)
        is_below_trained |= parameter.requires_grad
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer and is_below_trained:
            backward_layers.add(layer[1])
    return total + attention * (config.num_hidden_layers + 2 * len(backward_layers))


def peak_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of the GPU of that name; None if it is not known."""
    return next((flops for pattern, flops in PEAK_FLOPS if re.search(pattern, name)), None)


def peak_tokens_per_s(model: nn.Module, lengths: np.ndarray, device: torch.device, world_size: int) -> float | None:
    """Tokens per second of training on items of `lengths` [N] at the peak of `world_size` GPUs like this rank's.

    None if the peak is not known.
    """
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return peak and peak * world_size / trained_flops_per_token(model, mean_document_len(lengths))


def mean_document_len(lengths: np.ndarray) -> float:
    """The mean over tokens of the length of their document: long documents have more tokens."""
    return float(np.square(lengths, dtype=np.float64).sum() / lengths.sum())
