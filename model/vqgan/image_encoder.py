"""RGB images to VQGAN codes, in batches of images of one size, for an ItemProcessor and for inference."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image

from data.formats.manifest import PRECISIONS
from data.messages import one_line
from model.vqgan.vqgan import VQGAN, images_to_pixels, tf32_allowed

_AUTOCAST_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class ImageEncoder:
    """The `image_encode` of an ItemProcessor. Which images share a batch depends on the list given alone."""

    def __init__(self, vqgan: VQGAN, precision: str = "tf32", batch_size: int = 1, compile: bool = False):
        """
        Args:
            precision: of the features; tf32 differs from fp32 on CUDA only, and codes are chosen in fp32. In 16 bits
                `FusedEncoder` computes them where it can, else autocast. A batch that overflows in fp16 is encoded
                again in tf32 and counted in `num_encoded_again`. Raises ValueError if Triton cannot compile.
            batch_size: most images of one size at a time.
            compile: fuse what stands between the convolutions by torch.compile, which takes a minute at first;
                ignored where `FusedEncoder` computes the features.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.device = next(vqgan.parameters()).device
        self.precision = precision
        self.vqgan = vqgan.to(memory_format=torch.channels_last)
        self.features = torch.compile(vqgan.features, dynamic=True) if compile else vqgan.features
        self.fused = None
        if precision in _AUTOCAST_DTYPES and has_fast_fp16(self.device.type) and _has_full_tiles(vqgan):
            # Imported late: it needs Triton.
            from model.vqgan.fused_encoder import FusedEncoder

            self.fused = FusedEncoder(self.vqgan, _AUTOCAST_DTYPES[precision])
            try:
                self.fused(torch.zeros(1, 3, 64, 64, device=self.device))
            # Without a C compiler or the headers of Python; the errors have no common class.
            except Exception as error:
                raise ValueError(
                    f"--precision {precision} needs kernels that Triton compiles, which fails here: {one_line(error)}; "
                    "install gcc, or give --precision tf32"
                ) from error
        self.batch_size = batch_size
        self.num_encoded_again = 0

    def __call__(self, images: Sequence[Image.Image]) -> list[np.ndarray]:
        """Codes, int64 [h, w], of RGB images whose sides are multiples of 16 pixels, in their order."""
        return self.begin(images)()

    def begin(self, images: Sequence[Image.Image]) -> Callable[[], list[np.ndarray]]:
        """Start to encode; returns a function that waits for the codes. On CUDA the host is free in between."""
        batches = group_by_size([image.size for image in images], self.batch_size)
        pending = [self._encode([images[index] for index in batch], self.precision) for batch in batches]

        def collect() -> list[np.ndarray]:
            codes: list[np.ndarray | None] = [None] * len(images)
            for batch, on_device in zip(batches, pending, strict=True):
                encoded = on_device.cpu().numpy()
                if encoded.min() < 0:
                    self.num_encoded_again += 1
                    # One at a time: the modules' own forward needs three times the memory.
                    encoded = [self._encode([images[index]], "tf32")[0].cpu().numpy() for index in batch]
                for index, one in zip(batch, encoded, strict=True):
                    codes[index] = one
            return codes

        return collect

    @torch.inference_mode()
    def _encode(self, images: Sequence[Image.Image], precision: str) -> torch.Tensor:
        """Codes [B, h, w] of images of one size, still on the device; all are -1 if fp16 was too small for a value."""
        pixels = images_to_pixels(images, self.device)
        dtype = _AUTOCAST_DTYPES.get(precision)
        with tf32_allowed(precision == "tf32"):
            if dtype and self.fused:
                features = self.fused(pixels)
            else:
                with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                    features = self.features(pixels)
            codes = self.vqgan.nearest_codes(features.float())
        return codes.masked_fill(~features.isfinite().all(), -1) if precision == "fp16" else codes


def has_fast_fp16(device_type: str) -> bool:
    """Whether the kernels of `FusedEncoder` run here: a GPU from Ampere on, and Triton."""
    return device_type == "cuda" and torch.cuda.get_device_capability() >= (8, 0) and find_spec("triton") is not None


def _has_full_tiles(vqgan: VQGAN) -> bool:
    """Whether all numbers of channels are powers of two, as the sides of Triton's tiles are."""
    norms = [module for module in vqgan.encoder.modules() if isinstance(module, torch.nn.GroupNorm)]
    return all(norm.num_channels & (norm.num_channels - 1) == 0 for norm in norms)


def group_by_size(sizes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Indices of `sizes` in batches of at most `batch_size` of equal size, in order of first appearance."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
