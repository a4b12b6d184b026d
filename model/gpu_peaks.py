"""What a GPU can do at most, for the share of it that a run does (MFU)."""

import re

import numpy as np
import torch
from torch import nn

from model.flops import trained_flops_per_token

# Dense bf16 FLOP/s with fp32 accumulation, from NVIDIA's data sheets (which mostly print twice as much, "with
# sparsity"), by what `torch.cuda.get_device_name` says; the first that matches counts.
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
MAX_LENGTHS = 100_000  # of items looked at for their mean


def peak_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of the GPU of that name; None if it is not known."""
    return next((flops for pattern, flops in PEAK_FLOPS if re.search(pattern, name)), None)


def peak_tokens_per_s(model: nn.Module, lengths: np.ndarray, device: torch.device, world_size: int) -> float | None:
    """Tokens per second of training at the peak of all GPUs, with items of `lengths` [N]; None where it is not known.

    All GPUs are taken to be like this rank's.
    """
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return peak and peak * world_size / trained_flops_per_token(model, mean_document_len(lengths))


def mean_document_len(lengths: np.ndarray) -> float:
    """Tokens of the document in which a token stands, on average; long items have more of the tokens."""
    some = np.asarray(lengths[:: -(-len(lengths) // MAX_LENGTHS)], np.float64)
    return float((some**2).sum() / some.sum())
