"""RGB pictures to VQGAN codes, in batches of pictures of one size."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from model.vqgan import VQGAN, image_to_pixels

PRECISIONS = ("tf32", "fp32", "bf16")


class ImageEncoder:
    """The `image_encode` of an ItemProcessor. Which pictures share a batch depends on the list given alone."""

    def __init__(self, vqgan: VQGAN, precision: str = "tf32", batch_size: int = 1):
        """`precision`: tf32 differs from fp32 on CUDA only; bf16 is for the features, codes are chosen in fp32."""
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.device = next(vqgan.parameters()).device
        self.precision = precision
        # In channels-last layout torch's CPU GroupNorm errs by up to 1e-3 in fp32, enough to change codes.
        is_exact = precision == "fp32" or (precision == "tf32" and self.device.type == "cpu")
        self.memory_format = torch.contiguous_format if is_exact else torch.channels_last
        self.vqgan = vqgan.to(memory_format=self.memory_format)
        self.batch_size = batch_size

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[np.ndarray]:
        """Codes, int64 [h, w], of RGB pictures whose sides are multiples of 16 pixels, in their order."""
        codes: list[np.ndarray | None] = [None] * len(images)
        for batch in group_by_size([image.size for image in images], self.batch_size):
            pixels = torch.stack([image_to_pixels(images[index]) for index in batch])
            encoded = self._encode(pixels.to(self.device, memory_format=self.memory_format)).cpu().numpy()
            for index, one in zip(batch, encoded, strict=True):
                codes[index] = one
        return codes

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Codes [B, h, w] of pixels [B, 3, H, W]."""
        allow_tf32 = self.precision == "tf32"
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
        if self.precision != "bf16":
            return self.vqgan.encode(pixels)
        with torch.autocast(self.device.type, torch.bfloat16):
            features = self.vqgan.features(pixels)
        _, _, codes = self.vqgan.quantize(features.float())
        return codes.view(len(pixels), *features.shape[-2:])


def group_by_size(sizes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Indices of `sizes` in batches of at most `batch_size` of equal size, in order of first appearance."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
