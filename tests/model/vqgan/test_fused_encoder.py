"""The VQGAN's encoder in 16 bits: its kernels, on a CPU by Triton's interpreter, its memory, and the codes it gives."""

import sys
from collections import defaultdict
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig

from data.items.image_transform import crop_to_rgb, open_image
from exps.bench.pre_tokenize import seeded_vqgan
from model.plan.storage_tracker import StorageTracker
from model.vqgan import image_encoder
from model.vqgan.image_encoder import ImageEncoder
from model.vqgan.vqgan import VQGAN, images_to_pixels, load_vqgan, tf32_allowed
from pre_tokenize.options import default_precision
from tests.model.vqgan.test_vqgan import GOLDEN, TINY, seeded_tensor

if find_spec("triton"):
    from model.vqgan import fused_encoder
    from model.vqgan.fused_encoder import FusedEncoder, add, normalize

# Of numpy, where a batch overflows or a sigmoid is 0.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
# `tests/conftest.py` turns it on where there is no CUDA.
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled for the GPU, so not for the CPU")
on_each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=needs_interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)


@pytest.fixture
def on_cpu(monkeypatch):
    """An `ImageEncoder` on a CPU takes the kernels too, with tiles that suit the interpreter."""
    monkeypatch.setattr(image_encoder, "has_fast_fp16", lambda device_type: True)
    monkeypatch.setattr(fused_encoder, "TILE", 2**14)
    monkeypatch.setattr(fused_encoder, "TILES", 1)


def small_vqgan(**changes) -> VQGAN:
    """With attention in a level and in the middle, a shortcut, and two levels; seeded weights."""
    fields = {"embed_dim": 16, "num_embeddings": 128, "latent_channels": 16, "base_channels": 32, "resolution": 32}
    fields |= {"channel_multiplier": [1, 2], "num_res_blocks": 1, "attn_resolutions": [16], "attn_type": "vanilla"}
    vqgan = VQGAN(ChameleonVQVAEConfig(**fields | changes), with_decoder=False).eval().requires_grad_(False)
    for name, parameter in vqgan.named_parameters():
        parameter.copy_(seeded_tensor(name, list(parameter.shape)))
    return vqgan


def draw(*shape: int, device: str = "cpu") -> torch.Tensor:
    """Normal numbers, channels-last."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return values.to(device).contiguous(memory_format=torch.channels_last)


def noise_images(sizes: list[tuple[int, int]]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    blocks = (rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8) for width, height in sizes)
    return [Image.fromarray(block.repeat(8, 0).repeat(8, 1)) for block in blocks]


@needs_triton
@on_each_device
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize(
    ("channels", "height", "width", "mean"),
    [(32, 17, 23, 0.0), (64, 1, 1, 2.0), (128, 19, 37, 300.0), (256, 13, 7, -8.0), (512, 3, 5, 40.0)],
)
def test_kernels_meet_the_plain_modules(device, has_residual, channels, height, width, mean):
    """In fp32, against fp64, with images that fill no tile and whose mean is far from 0."""
    values = 0.3 * draw(2, channels, height, width, device=device) + mean
    residual = draw(2, channels, height, width, device=device) if has_residual else None
    bias = 0.1 * draw(1, channels, 1, 1, device=device).flatten()
    norm = torch.nn.GroupNorm(32, channels, eps=1e-6).requires_grad_(False).to(device)
    norm.weight.copy_(seeded_tensor("norm.weight", [channels]))
    norm.bias.copy_(seeded_tensor("norm.bias", [channels]))
    exact = values.double() + bias.double()[:, None, None] + (residual.double() if has_residual else 0)
    groups = exact.unflatten(1, (32, -1)).flatten(2)
    std = (groups.var(-1, unbiased=False) + norm.eps).sqrt()
    tolerance = (1e-6 * (groups.mean(-1).abs() / std).clamp(min=1)).repeat_interleave(channels // 32, 1)[
        ..., None, None
    ]

    moments = add(values, bias, residual, in_place=has_residual)
    out = normalize(values, moments, norm, None if has_residual else bias, with_silu=not has_residual)
    expected = F.group_norm(exact, 32, norm.weight.double(), norm.bias.double(), norm.eps)
    expected = expected if has_residual else F.silu(expected)
    assert ((out.double() - expected).abs() <= tolerance).all()
    if has_residual:
        torch.testing.assert_close(values.double(), exact, rtol=1e-6, atol=1e-6)
        assert normalize(values, moments, norm, in_place=True) is values


def plain_add(values, bias, residual=None, in_place=False):
    """What the kernel computes, in torch's operators."""
    total = values.float() + bias[:, None, None] + (0 if residual is None else residual.float())
    if in_place:
        total = values.copy_(total).float()
    groups = total.unflatten(1, (32, -1)).flatten(2)
    return fused_encoder.Moments(groups.mean(-1), groups.var(-1, unbiased=False))


def plain_normalize(values, moments, norm, bias=None, with_silu=True, in_place=False):
    mean, variance = (moment.repeat_interleave(values.shape[1] // 32, 1)[:, :, None, None] for moment in moments)
    centered = values.float() + (0 if bias is None else bias[:, None, None]) - mean
    out = centered * torch.rsqrt(variance + norm.eps) * norm.weight[:, None, None] + norm.bias[:, None, None]
    return (F.silu(out) if with_silu else out).to(values.dtype)


@needs_triton
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", torch.float16, marks=needs_interpreter),
        pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
        # The interpreter cuts off what bfloat16 has no bits for.
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
def test_kernels_round_once(device, dtype):
    """Against fp32 rounded at the end: equal, or neighbours where fp32 differs in its last bit."""
    values, residual = (draw(2, 64, 9, 11, device=device).to(dtype) * factor for factor in (1, 3))
    bias, norm = torch.linspace(-1, 1, 64, device=device), torch.nn.GroupNorm(32, 64).requires_grad_(False).to(device)
    copy = values.clone(memory_format=torch.preserve_format)
    for rest, in_place in ((None, False), (residual, True)):
        moments, expected = add(values, bias, rest, in_place), plain_add(copy, bias, rest, in_place)
        for ours, theirs in zip(moments, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert (values == copy).float().mean() > 0.99
        out, plain = (way(values, moments, norm, bias) for way in (normalize, plain_normalize))
        torch.testing.assert_close(out, plain, rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert (out == plain).float().mean() > 0.99


@needs_triton
@on_each_device
@pytest.mark.parametrize("changes", [{}, {"attn_type": "none"}, {"channel_multiplier": [1, 1, 4]}])
def test_the_forward_is_that_of_the_modules(device, changes):
    vqgan = small_vqgan(**changes).to(device)
    pixels = draw(2, 3, 24, 40, device=device)
    with tf32_allowed(False):
        expected = vqgan.features(pixels)
        features = FusedEncoder(vqgan, torch.float32)(pixels)
    assert features.shape == expected.shape and (features - expected).abs().max() < 2e-5 * expected.std()
    assert torch.equal(vqgan.nearest_codes(features), vqgan.nearest_codes(expected))


@needs_triton
@pytest.mark.slow
def test_fp16_gives_the_codes_of_fp32(monkeypatch):
    """A VQGAN of Chameleon's size; `exps/bench/encoder.py` counts on larger images."""
    plain = F.conv2d

    def convolve(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *where) -> torch.Tensor:
        """As a GPU does: products of fp16 summed in fp32, rounded once. torch's own for CPUs takes twice as long."""
        return plain(values.float(), weight.float(), bias if bias is None else bias.float(), *where).to(values.dtype)

    monkeypatch.setattr(F, "conv2d", convolve)
    # The interpreter takes minutes.
    monkeypatch.setattr(fused_encoder, "add", plain_add)
    monkeypatch.setattr(fused_encoder, "normalize", plain_normalize)
    vqgan, num_equal, num_codes = seeded_vqgan().requires_grad_(False), 0, 0
    fused = FusedEncoder(vqgan, torch.float16)
    for name in ("camera", "color", "chelsea", "coffee"):
        pixels = images_to_pixels([crop_to_rgb(open_image(GOLDEN / "images" / f"{name}.png"), 96)])
        exact, rounded = vqgan.features(pixels), fused(pixels)
        assert (rounded - exact).square().mean().sqrt() < 4e-3 * exact.std()
        # Several codebooks tell as much as many images.
        for seed in range(16):
            codebook = torch.randn(8192, 256, generator=torch.Generator().manual_seed(seed))
            vqgan.quantize.embedding.weight.copy_(0.5 * codebook)
            equal = vqgan.nearest_codes(rounded) == vqgan.nearest_codes(exact)
            num_equal, num_codes = num_equal + int(equal.sum()), num_codes + equal.numel()
    assert num_codes > 1900 and num_equal / num_codes >= 0.995


@needs_triton
def test_an_image_of_768_takes_less_than_600_mib(monkeypatch):
    """Chameleon's VQGAN on tensors without values, where kernels have nothing to do."""
    for kernel in ("_add", "_normalize"):
        monkeypatch.setattr(fused_encoder, kernel, defaultdict(lambda: lambda *args, **options: None))
    with FakeTensorMode():
        fused = FusedEncoder(VQGAN(ChameleonVQVAEConfig(), with_decoder=False), torch.float16)
        pixels = torch.empty(2, 3, 768, 768)
        with StorageTracker() as tracker:
            assert fused(pixels).shape == (2, 256, 48, 48)
    assert 0.4 < tracker.peak / len(pixels) / 2**30 <= 0.6


@needs_triton
@pytest.mark.parametrize("is_fused", [pytest.param(True, marks=needs_interpreter), False])
def test_a_batch_that_overflows_is_encoded_again_in_tf32(monkeypatch, request, is_fused):
    if is_fused:
        request.getfixturevalue("on_cpu")
    vqgan = small_vqgan()
    # Only values near 0 stay below 65,504, the largest of fp16.
    vqgan.encoder.conv_in.weight.mul_(9e4)
    gray, noise = Image.new("RGB", (16, 32), (127, 127, 127)), noise_images([(16, 16)])[0]
    images = [noise, gray, noise, gray]
    encoder = ImageEncoder(vqgan, "fp16", batch_size=2)
    assert (encoder.fused is not None) == is_fused
    codes, exact = encoder(images), ImageEncoder(vqgan, "tf32", batch_size=2)(images)
    assert encoder.num_encoded_again == 1
    for index in (0, 2):
        np.testing.assert_array_equal(codes[index], exact[index])
    assert all(code.min() >= 0 for code in codes)


@needs_triton
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_plain_way_runs_where_the_kernels_cannot(monkeypatch, precision):
    """Without Triton, on a GPU before Ampere, and with numbers of channels that are no powers of two."""
    images = noise_images([(64, 32), (32, 32)])
    exact = ImageEncoder(load_vqgan(TINY), "fp32")(images)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert image_encoder.has_fast_fp16("cuda") and not image_encoder.has_fast_fp16("cpu")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", None)
        assert not image_encoder.has_fast_fp16("cuda")
        encoder = ImageEncoder(small_vqgan(), precision)
        assert encoder.fused is None and encoder(images)[0].shape == (16, 32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert not image_encoder.has_fast_fp16("cuda")
    monkeypatch.setattr(image_encoder, "has_fast_fp16", lambda device_type: True)
    encoder = ImageEncoder(load_vqgan(TINY), precision)
    assert encoder.fused is None
    equal = [np.mean(a == b) for a, b in zip(encoder(images), exact, strict=True)]
    assert min(equal) >= 0.5


def test_an_unknown_precision_is_rejected():
    with pytest.raises(ValueError, match="one of fp16, tf32, fp32, bf16, got 'fp8'"):
        ImageEncoder(small_vqgan(), "fp8")


def test_pixels_are_the_recipes_arithmetic():
    levels = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, 2)
    pixels = images_to_pixels([Image.fromarray(levels)] * 2)
    expected = torch.from_numpy(levels).permute(2, 0, 1).double() / 255 * 2 - 1
    assert torch.equal(pixels[1], expected.float()) and pixels.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_fp16_on_cuda_gives_the_codes_of_fp32_with_one_compilation():
    if not image_encoder.has_fast_fp16("cuda"):
        pytest.skip("needs a GPU from Ampere on, and Triton")
    assert default_precision("cuda") == "fp16"
    vqgan = small_vqgan().cuda()
    images = noise_images([(64, 64), (96, 32), (64, 64), (32, 80), (64, 64), (48, 16)])
    exact, encoder = ImageEncoder(vqgan, "fp32", 2)(images), ImageEncoder(vqgan, "fp16", 2)
    kernels = (fused_encoder._add, fused_encoder._normalize)
    encoder(images[:1])
    compiled = [[len(cache[0]) for cache in kernel.device_caches.values()] for kernel in kernels]
    equal = np.concatenate([(a == b).ravel() for a, b in zip(exact, encoder(images), strict=True)])
    assert encoder.fused and encoder.num_encoded_again == 0 and equal.mean() >= 0.98
    assert compiled == [[len(cache[0]) for cache in kernel.device_caches.values()] for kernel in kernels]
