"""RGB images to VQGAN codes, in batches of images of one size, for an ItemProcessor and for inference."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from model.vqgan.vqgan import VQGAN, images_to_pixels, tf32_allowed


class ImageEncoder:
    """The `image_encode` of an ItemProcessor. Which images share a batch depends on the list given alone."""

    def __init__(self, vqgan: VQGAN, precision: str = "tf32", batch_size: int = 1, compile: bool = False):
        """
        Args:
            precision: of the features, "tf32" (which differs from fp32 on CUDA only), "fp32" or "bf16"; codes are
                chosen in fp32.
            batch_size: most images of one size at a time.
            compile: fuse what stands between the convolutions by torch.compile, which takes a minute at first.
        """
        if precision not in ("tf32", "fp32", "bf16"):
            raise ValueError(f"precision must be tf32, fp32 or bf16, got {precision!r}")
        self.device = next(vqgan.parameters()).device
        self.precision = precision
        self.vqgan = vqgan.to(memory_format=torch.channels_last)
        self.features = torch.compile(vqgan.features, dynamic=True) if compile else vqgan.features
        self.batch_size = batch_size

    def __call__(self, images: Sequence[Image.Image]) -> list[np.ndarray]:
        """Codes, int64 [h, w], of RGB images whose sides are multiples of 16 pixels, in their order."""
        return self.begin(images)()

    @torch.inference_mode()
    def begin(self, images: Sequence[Image.Image]) -> Callable[[], list[np.ndarray]]:
        """Start to encode; returns a function that waits for the codes. On CUDA the host is free in between."""
        batches = group_by_size([image.size for image in images], self.batch_size)
        pending = [self._encode([images[index] for index in batch]) for batch in batches]

        def collect() -> list[np.ndarray]:
            codes: list[np.ndarray | None] = [None] * len(images)
            for batch, encoded in zip(batches, pending, strict=True):
                for index, one in zip(batch, encoded.cpu().numpy(), strict=True):
                    codes[index] = one
            return codes

        return collect

    def _encode(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Codes [B, h, w] of images of one size, still on the device."""
        pixels = images_to_pixels(images, self.device)
        with tf32_allowed(self.precision == "tf32"):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                features = self.features(pixels)
            return self.vqgan.nearest_codes(features.float())


def group_by_size(sizes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Indices of `sizes` in batches of at most `batch_size` of equal size, in order of first appearance."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
