"""What GPUs can do at most, by their datasheets: FLOPs per second of dense bf16 matrix products, without sparsity."""

# Substrings of `torch.cuda.get_device_name()`, the first that fits; NVIDIA's datasheets.
PEAK_BF16_FLOPS = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("GH200", 989e12),
    ("H200 NVL", 836e12),
    ("H200", 989e12),
    ("H100 NVL", 836e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 150e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)


def peak_bf16_flops(device_name: str) -> float | None:
    """FLOPs per second of a GPU of that name, None if it is not in the table."""
    return next((flops for part, flops in PEAK_BF16_FLOPS if part in device_name), None)
