"""The VQGAN's encoder in 16 bits: convolutions without bias, and two Triton kernels for all between them.

`ImageEncoder` takes it where it can. All is in channels-last layout, which torch's GroupNorm for CUDA does not know: it
would transpose its input and output. cuDNN would add each bias in a pass of its own.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonVQVAEEncoderAttnBlock,
    ChameleonVQVAEEncoderResnetBlock,
)

from model.vqgan.vqgan import VQGAN

# Of all norms of the VQGAN.
GROUPS = 32
# Values that a program holds at once, and how often in turn.
TILE, TILES = 4096, 8


class Moments(NamedTuple):
    """Mean and variance, fp32 [B, GROUPS], of the groups of channels of B images."""

    mean: Tensor
    variance: Tensor


class FusedEncoder:
    """`features` of a frozen VQGAN by an own forward over its modules; it holds a copy of their weights in 16 bits.

    Convolutions that halve an image pad it at its end alone, which cuDNN can do only on a copy. So all kernels and
    images are turned by 180 degrees: there the padding is at the beginning, and one at the end is never read.
    """

    def __init__(self, vqgan: VQGAN, dtype: torch.dtype):
        self.vqgan, self.dtype = vqgan, dtype
        self.weights = {
            conv: conv.weight.flip(2, 3).to(dtype).contiguous(memory_format=torch.channels_last)
            for conv in vqgan.encoder.modules()
            if isinstance(conv, nn.Conv2d)
        }

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Features before quantization, fp32 [B, embed_dim, h, w], of pixels [B, 3, H, W] in [-1, 1]."""
        encoder = self.vqgan.encoder
        turned = pixels.flip(2, 3).to(self.dtype).contiguous(memory_format=torch.channels_last)
        hidden = self._convolve(encoder.conv_in, turned)
        moments = add(hidden, encoder.conv_in.bias, in_place=True)
        for level in encoder.down:
            for index, block in enumerate(level.block):
                hidden, moments = self._residual_block(block, hidden, moments)
                if len(level.attn):
                    hidden, moments = self._attention(level.attn[index], hidden, moments)
            if hasattr(level, "downsample"):
                hidden = self._convolve(level.downsample.conv, hidden, padding=1)
                moments = add(hidden, level.downsample.conv.bias, in_place=True)
        hidden, moments = self._residual_block(encoder.mid.block_1, hidden, moments)
        if isinstance(encoder.mid.attn_1, ChameleonVQVAEEncoderAttnBlock):
            hidden, moments = self._attention(encoder.mid.attn_1, hidden, moments)
        hidden, moments = self._residual_block(encoder.mid.block_2, hidden, moments)
        hidden = self._convolve(encoder.conv_out, normalize(hidden, moments, encoder.norm_out))
        return self.vqgan.quant_conv(hidden.float() + encoder.conv_out.bias[:, None, None]).flip(2, 3)

    def _convolve(self, conv: nn.Conv2d, values: Tensor, padding: int | None = None) -> Tensor:
        """The convolution without its bias."""
        return F.conv2d(values, self.weights[conv], None, conv.stride, conv.padding if padding is None else padding)

    def _residual_block(
        self, block: ChameleonVQVAEEncoderResnetBlock, residual: Tensor, moments: Moments
    ) -> tuple[Tensor, Moments]:
        hidden = self._convolve(block.conv1, normalize(residual, moments, block.norm1))
        moments = add(hidden, block.conv1.bias)
        hidden = self._convolve(block.conv2, normalize(hidden, moments, block.norm2, block.conv1.bias, in_place=True))
        bias = block.conv2.bias
        if hasattr(block, "nin_shortcut"):
            residual = self._convolve(block.nin_shortcut, residual)
            bias = bias + block.nin_shortcut.bias
        return hidden, add(hidden, bias, residual, in_place=True)

    def _attention(
        self, block: ChameleonVQVAEEncoderAttnBlock, residual: Tensor, moments: Moments
    ) -> tuple[Tensor, Moments]:
        hidden = normalize(residual, moments, block.norm, with_silu=False)
        # [B, H W, C], without a copy in this layout.
        query, key, value = (
            F.conv2d(hidden, self.weights[conv], conv.bias.to(self.dtype)).permute(0, 2, 3, 1).flatten(1, 2)
            for conv in (block.q, block.k, block.v)
        )
        attention = torch.softmax(query * block.in_channels**-0.5 @ key.mT, -1)
        hidden = (attention @ value).unflatten(1, residual.shape[2:]).permute(0, 3, 1, 2)
        hidden = self._convolve(block.proj_out, hidden)
        return hidden, add(hidden, block.proj_out.bias, residual, in_place=True)


def add(values: Tensor, bias: Tensor, residual: Tensor | None = None, in_place: bool = False) -> Moments:
    """
    The moments of values + bias, or of values + bias + residual.

    Args:
        values, residual: [B, C, H, W], channels-last.
        bias: fp32 [C].
        in_place: the sum, rounded to the type of `values`, takes their place, and the moments are those of what it is.
    """
    batch, channels, pixels, tile, blocks = _split(values)
    parts = torch.empty(3, batch, blocks, GROUPS, device=values.device)
    _add[(blocks, batch)](
        *(values, values if residual is None else residual, bias, *parts, pixels, GROUPS),
        *(channels, tile, TILES, residual is not None, in_place),
        num_warps=8,
    )
    count, mean, square = parts
    total = pixels * channels // GROUPS
    center = (mean * count).sum(1, keepdim=True) / total
    variance = (square + count * (mean - center).square()).sum(1) / total
    return Moments(center[:, 0], variance)


def normalize(
    values: Tensor,
    moments: Moments,
    norm: nn.GroupNorm,
    bias: Tensor | None = None,
    with_silu: bool = True,
    in_place: bool = False,
) -> Tensor:
    """`norm` of values + bias [B, C, H, W] by its moments, then SiLU; rounded once, to the type of `values`."""
    batch, channels, pixels, tile, blocks = _split(values)
    # [B, C] per channel. The mean is subtracted before anything is multiplied: it may be far larger than the rest.
    offset = -moments.mean[:, :, None] if bias is None else bias.view(GROUPS, -1) - moments.mean[:, :, None]
    factor = torch.rsqrt(moments.variance + norm.eps)[:, :, None] * norm.weight.view(GROUPS, -1)
    out = values if in_place else torch.empty_like(values)
    _normalize[(blocks, batch)](
        *(values, out, offset.expand_as(factor).contiguous(), factor, norm.bias, pixels),
        *(channels, tile, TILES, with_silu),
        num_warps=8,
    )
    return out


def _split(values: Tensor) -> tuple[int, int, int, int, int]:
    """Images, channels, pixels per image, pixels per tile, and the programs that an image takes."""
    if not values.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"the kernels need channels-last tensors, got strides {values.stride()}")
    batch, channels, height, width = values.shape
    tile = max(1, TILE // channels)
    return batch, channels, height * width, tile, triton.cdiv(height * width, tile * TILES)


# One compilation serves all sizes: the number of pixels is no constant, and nothing is derived from its divisors.
@triton.jit(do_not_specialize=["pixels"])
def _add(
    values_ptr,
    residual_ptr,
    bias_ptr,
    count_ptr,
    mean_ptr,
    square_ptr,
    pixels,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STORE: tl.constexpr,
):
    """Count, mean and sum of squared deviations of each group in TILES x TILE pixels of one image, by Welford's rule.

    The rule runs for each place of the tile on its own; a sum of squares would be lost beside a large mean.
    """
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, CHANNELS)[None, :]
    bias = tl.load(bias_ptr + channel)
    count = tl.zeros((TILE, 1), tl.float32)
    mean = tl.zeros((TILE, CHANNELS), tl.float32)
    square = tl.zeros((TILE, CHANNELS), tl.float32)
    for number in range(TILES):
        pixel = (block * TILES + number) * TILE + tl.arange(0, TILE)[:, None]
        is_inside = pixel < pixels
        at = image * pixels * CHANNELS + pixel * CHANNELS + channel
        value = tl.load(values_ptr + at, mask=is_inside, other=0.0).to(tl.float32) + bias
        if HAS_RESIDUAL:
            value += tl.load(residual_ptr + at, mask=is_inside, other=0.0).to(tl.float32)
        if STORE:
            rounded = value.to(values_ptr.dtype.element_ty)
            tl.store(values_ptr + at, rounded, mask=is_inside)
            value = rounded.to(tl.float32)
        count += is_inside.to(tl.float32)
        deviation = tl.where(is_inside, value - mean, 0.0)
        mean += deviation / tl.maximum(count, 1.0)
        square += deviation * (value - mean)
    shape: tl.constexpr = (TILE, GROUPS, CHANNELS // GROUPS)
    counts = tl.reshape(tl.broadcast_to(count, (TILE, CHANNELS)), shape)
    means = tl.reshape(mean, shape)
    total = tl.sum(tl.sum(counts, 2), 0)
    center = tl.sum(tl.sum(counts * means, 2), 0) / total
    from_center = means - center[None, :, None]
    squares = tl.reshape(square, shape) + counts * from_center * from_center
    place = (image * tl.num_programs(0) + block) * GROUPS + tl.arange(0, GROUPS)
    tl.store(count_ptr + place, total)
    tl.store(mean_ptr + place, center)
    tl.store(square_ptr + place, tl.sum(tl.sum(squares, 2), 0))


@triton.jit(do_not_specialize=["pixels"])
def _normalize(
    values_ptr,
    out_ptr,
    offset_ptr,
    factor_ptr,
    shift_ptr,
    pixels,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    SILU: tl.constexpr,
):
    """(value + offset) * factor + shift, then SiLU, of TILES x TILE pixels of one image."""
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, CHANNELS)[None, :]
    offset = tl.load(offset_ptr + image * CHANNELS + channel)
    factor = tl.load(factor_ptr + image * CHANNELS + channel)
    shift = tl.load(shift_ptr + channel)
    for number in range(TILES):
        pixel = (block * TILES + number) * TILE + tl.arange(0, TILE)[:, None]
        is_inside = pixel < pixels
        at = image * pixels * CHANNELS + pixel * CHANNELS + channel
        value = tl.load(values_ptr + at, mask=is_inside, other=0.0).to(tl.float32)
        value = (value + offset) * factor + shift
        if SILU:
            value = value / (1.0 + tl.exp(-value))
        tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=is_inside)
