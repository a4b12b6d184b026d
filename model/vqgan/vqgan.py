"""
The VQGAN that turns images into discrete codes and back: `transformers`' encoder and quantizer, and our decoder.

The state-dict keys are those of Meta's `vqgan.ckpt`. `load_vqgan` reads Meta's folder (`vqgan.yaml`, `vqgan.ckpt`), a
Hugging Face Chameleon folder (which holds no decoder), and our own (`vqgan.json`, `model.safetensors`).
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonVQVAE,
    ChameleonVQVAEEncoderAttnBlock,
    ChameleonVQVAEEncoderResnetBlock,
)

META_CONFIG, META_WEIGHTS = "vqgan.yaml", "vqgan.ckpt"
OUR_CONFIG, OUR_WEIGHTS = "vqgan.json", "model.safetensors"
HF_CONFIG, HF_PREFIX = "config.json", "model.vqmodel."
CODEBOOK = "quantize.embedding.weight"
CONFIG_FIELDS = (
    "embed_dim", "num_embeddings", "double_latent", "latent_channels", "resolution", "in_channels", "base_channels",
    "channel_multiplier", "num_res_blocks", "attn_resolutions", "dropout", "attn_type",
)  # fmt: skip


class VQGAN(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to codes [B, H/16, W/16], and back if `has_decoder`."""

    def __init__(self, config: ChameleonVQVAEConfig, with_decoder: bool = True):
        super().__init__()
        vqvae = ChameleonVQVAE(config)
        self.config = config
        self.encoder = vqvae.encoder
        self.quantize = vqvae.quantize
        self.quant_conv = vqvae.quant_conv
        self.post_quant_conv = vqvae.post_quant_conv
        if with_decoder:
            self.decoder = VQGANDecoder(config)
        for parent in list(self.modules()):
            for name, norm in parent.named_children():
                if type(norm) is nn.GroupNorm:
                    setattr(parent, name, CenteredGroupNorm(norm.num_groups, norm.num_channels, eps=norm.eps))

    @property
    def num_codes(self) -> int:
        return self.config.num_embeddings

    @property
    def downsample(self) -> int:
        """Pixels per code along one side."""
        return 2 ** (len(self.config.channel_multiplier) - 1)

    @property
    def has_decoder(self) -> bool:
        return hasattr(self, "decoder")

    @property
    def codebook_sha256(self) -> str:
        """Names this VQGAN, whatever the format of its folder, the type of its weights and its device."""
        return hash_codebook(self.quantize.embedding.weight)

    def features(self, pixels: Tensor) -> Tensor:
        """Features before quantization, [B, embed_dim, h, w], of pixels [B, 3, H, W] in [-1, 1]."""
        return self.quant_conv(self.encoder(pixels))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes, int64 [B, h, w], of pixels [B, 3, H, W] in [-1, 1]; H and W must be multiples of `downsample`."""
        height, width = pixels.shape[-2:]
        if height % self.downsample or width % self.downsample:
            raise ValueError(f"an image of {width}x{height} does not divide into codes of {self.downsample} pixels")
        weight = next(self.parameters())
        return self.nearest_codes(self.features(pixels.to(weight.device, weight.dtype)))

    def nearest_codes(self, features: Tensor) -> Tensor:
        """Codes, int64 [B, h, w], of features [B, embed_dim, h, w]."""
        _, _, codes = self.quantize(features)
        return codes.view(len(features), *features.shape[-2:])

    def decode_embedded(self, embedded: Tensor) -> Tensor:
        """Pixels [B, 3, 16h, 16w] of quantized features [B, embed_dim, h, w]; with gradient, not clamped."""
        if not self.has_decoder:
            raise ValueError("this VQGAN has no decoder (Hugging Face folders hold none); use Meta's vqgan.ckpt folder")
        return self.decoder(self.post_quant_conv(embedded))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pixels, float [B, 3, 16h, 16w] around [-1, 1] (not clamped), of codes, integers [B, h, w]."""
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.num_codes):
            raise ValueError(f"codes must lie in 0..{self.num_codes - 1}, got {int(codes.min())}..{int(codes.max())}")
        embedded = self.quantize.embedding(codes.to(self.quantize.embedding.weight.device))
        return self.decode_embedded(embedded.permute(0, 3, 1, 2).contiguous()).float()


class CenteredGroupNorm(nn.GroupNorm):
    """GroupNorm that is as exact in channels-last layout as in the other.

    There, torch's own kernel for fp32 on a CPU sums x and x^2 sequentially. On an even surface of 256 x 224 pixels its
    error is 6e-5 of the largest value, and that of the features after it up to 4e-4: enough to change codes.
    """

    def forward(self, input: Tensor) -> Tensor:
        is_cpu_fp32 = input.device.type == "cpu" and input.dtype == torch.float32 and input.dim() == 4
        if not is_cpu_fp32 or not input.is_contiguous(memory_format=torch.channels_last):
            return super().forward(input)
        centered = input - self._mean_of_groups(input)
        scale = torch.rsqrt(self._mean_of_groups(centered * centered) + self.eps) * self.weight[:, None, None]
        return torch.addcmul(self.bias[:, None, None], centered, scale)

    def _mean_of_groups(self, values: Tensor) -> Tensor:
        """[B, C, 1, 1], the mean of the group of each channel of [B, C, H, W]."""
        means = values.mean((2, 3)).unflatten(1, (self.num_groups, -1))
        return means.mean(-1, keepdim=True).expand_as(means).flatten(1)[:, :, None, None]


class VQGANDecoder(nn.Module):
    """Mirror of the encoder: convolutional blocks, nearest-neighbour doubling between levels (taming-transformers)."""

    def __init__(self, config: ChameleonVQVAEConfig):
        super().__init__()
        channels = [config.base_channels * factor for factor in config.channel_multiplier]
        resolution = config.resolution // 2 ** (len(channels) - 1)
        has_attention = config.attn_type == "vanilla"
        current = channels[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, current, 3, padding=1)
        self.mid = nn.Module()
        self.mid.block_1 = ChameleonVQVAEEncoderResnetBlock(config, current, current)
        self.mid.attn_1 = ChameleonVQVAEEncoderAttnBlock(current) if has_attention else nn.Identity()
        self.mid.block_2 = ChameleonVQVAEEncoderResnetBlock(config, current, current)
        levels = []
        for level in reversed(range(len(channels))):
            module = nn.Module()
            module.block, module.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                module.block.append(ChameleonVQVAEEncoderResnetBlock(config, current, channels[level]))
                current = channels[level]
                if has_attention and resolution in (config.attn_resolutions or []):
                    module.attn.append(ChameleonVQVAEEncoderAttnBlock(current))
            if level > 0:
                module.upsample = nn.Module()
                module.upsample.conv = nn.Conv2d(current, current, 3, padding=1)
                resolution *= 2
            levels.append(module)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = nn.GroupNorm(32, current, eps=1e-6)
        self.conv_out = nn.Conv2d(current, 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """Pixels [B, 3, 16h, 16w] of a latent [B, latent_channels, h, w]."""
        hidden = self.mid.block_1(self.conv_in(latent))
        hidden = self.mid.block_2(self.mid.attn_1(hidden))
        for level in reversed(self.up):
            for index, block in enumerate(level.block):
                hidden = block(hidden)
                if len(level.attn):
                    hidden = level.attn[index](hidden)
            if hasattr(level, "upsample"):
                hidden = level.upsample.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(hidden)))


def load_vqgan(vqgan_dir: str | os.PathLike, device: str = "cpu", dtype: torch.dtype = torch.float32) -> VQGAN:
    """The frozen VQGAN of a folder, in eval mode.

    Raises FileNotFoundError with what the folder lacks, or ValueError with the files that cannot be used.
    """
    folder = Path(vqgan_dir)
    config_path, weight_paths = _find_files(folder)
    try:
        config, state = _read_config(config_path), _read_state(weight_paths, is_hf=config_path.name == HF_CONFIG)
        vqgan = VQGAN(config, with_decoder=any(key.startswith("decoder.") for key in state))
        missing, _ = vqgan.load_state_dict({key: tensor.float() for key, tensor in state.items()}, strict=False)
    except OSError:
        raise
    except Exception as error:
        # Each format has errors of its own for a damaged file, or for files that do not belong together.
        names, reason = " and ".join(map(str, (config_path, *weight_paths))), " ".join(str(error).split())[:200]
        raise ValueError(
            f"the VQGAN cannot be read from {names}: {type(error).__name__}: {reason}. Copy the folder again, "
            "configuration and weights of one VQGAN"
        ) from error
    if missing:
        raise ValueError(f"{folder}: the VQGAN weights lack {len(missing)} tensors, first {missing[0]}")
    return vqgan.to(device=device, dtype=dtype).eval().requires_grad_(False)


@contextlib.contextmanager
def tf32_allowed(is_allowed: bool) -> Iterator[None]:
    """Whether CUDA may round products to TF32 inside of `with`: a setting of the process, restored at the end."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = is_allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def save_vqgan(vqgan: VQGAN, vqgan_dir: str | os.PathLike, dtype: torch.dtype = torch.float16) -> None:
    """Write `vqgan.json` and `model.safetensors`, the weights in `dtype` (half precision halves the committed file).

    The codebook is written in fp32: rounded to half precision and then by `hash_codebook`, its hash would be another.
    """
    folder = Path(vqgan_dir)
    folder.mkdir(parents=True, exist_ok=True)
    fields = {name: getattr(vqgan.config, name) for name in CONFIG_FIELDS}
    (folder / OUR_CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
    state = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in vqgan.state_dict().items()}
    state[CODEBOOK] = vqgan.quantize.embedding.weight.detach().to("cpu", torch.float32).contiguous()
    partial = folder / f"{OUR_WEIGHTS}.partial"
    save_file(state, partial)
    partial.replace(folder / OUR_WEIGHTS)


def hash_vqgan(vqgan_dir: str | os.PathLike) -> str:
    """SHA-256, hexadecimal, of the configuration and weight files that `load_vqgan` would read."""
    config_path, weight_paths = _find_files(Path(vqgan_dir))
    digest = hashlib.sha256()
    for path in (config_path, *weight_paths):
        with open(path, "rb") as file:
            # One digest over all files.
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def hash_codebook(embedding: Tensor) -> str:
    """SHA-256, hexadecimal, of a codebook [num_codes, embed_dim] rounded to bf16, as Hugging Face folders hold it."""
    rounded = embedding.detach().to("cpu", torch.float32).to(torch.bfloat16).contiguous()
    return hashlib.sha256(rounded.view(torch.int16).numpy().tobytes()).hexdigest()


def check_codebook(
    embedding: Tensor,
    vqgan_dir: str | os.PathLike,
    expected: str | None,
    of: str,
    other_way: str = ", or --any_vqgan if that is meant",
) -> None:
    """Raises ValueError if the hash of a VQGAN's codebook is not `expected`, that of `of`; None accepts any."""
    found = hash_codebook(embedding)
    if expected not in (None, found):
        raise ValueError(
            f"the VQGAN in {vqgan_dir} is not the one of {of}, so that images would be wrong (codebook_sha256 "
            f"{found[:12]}... instead of {expected[:12]}...): give that one (--vqgan_dir){other_way}"
        )


def image_to_pixels(image: Image.Image) -> Tensor:
    """Float pixels [3, H, W] in [-1, 1] of an RGB image."""
    return images_to_pixels([image])[0].contiguous()


def images_to_pixels(images: Sequence[Image.Image], device: torch.device | str = "cpu") -> Tensor:
    """Float pixels [B, 3, H, W] in [-1, 1], in channels-last layout, of RGB images of one size."""
    if wrong := {image.mode for image in images} - {"RGB"}:
        raise ValueError(f"the VQGAN takes RGB images, got mode {wrong.pop()}; convert it first")
    levels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).to(device)
    return _pixels_of_levels(device)[levels.int()].permute(0, 3, 1, 2)


def pixels_to_image(pixels: Tensor) -> Image.Image:
    """The 8-bit RGB image of float pixels [3, H, W], clamped to [-1, 1]."""
    array = (pixels.detach().float().clamp(-1, 1).add(1).mul(127.5)).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array.astype(np.uint8))


@functools.cache
def _pixels_of_levels(device: torch.device | str) -> Tensor:
    """The pixel of each of the 256 levels, by the recipe's arithmetic: in double before the cast."""
    return (torch.arange(256, dtype=torch.float64) / 255 * 2 - 1).float().to(device)


def _find_files(folder: Path) -> tuple[Path, list[Path]]:
    """The configuration and weight files of a VQGAN folder, in any of the three formats."""
    if (folder / META_CONFIG).is_file() and (folder / META_WEIGHTS).is_file():
        return folder / META_CONFIG, [folder / META_WEIGHTS]
    if (folder / OUR_CONFIG).is_file() and (folder / OUR_WEIGHTS).is_file():
        return folder / OUR_CONFIG, [folder / OUR_WEIGHTS]
    shards = sorted(folder.glob("*.safetensors"))
    if shards and (folder / HF_CONFIG).is_file() and '"vq_config"' in (folder / HF_CONFIG).read_text():
        return folder / HF_CONFIG, shards
    raise FileNotFoundError(
        f"no VQGAN in {folder}: it must hold {META_CONFIG} and {META_WEIGHTS} (Meta's), {OUR_CONFIG} and {OUR_WEIGHTS} "
        "(ours), or a Hugging Face Chameleon model with vq_config in its config.json; see --vqgan_dir in TRAIN.md"
    )


def _read_config(path: Path) -> ChameleonVQVAEConfig:
    if path.name == META_CONFIG:
        return _config_from_meta(yaml.safe_load(path.read_text()))
    raw = json.loads(path.read_text())
    fields = raw if path.name == OUR_CONFIG else raw["vq_config"]
    return ChameleonVQVAEConfig(**{key: fields[key] for key in CONFIG_FIELDS if key in fields})


def _config_from_meta(raw: Mapping) -> ChameleonVQVAEConfig:
    params = raw["model"]["params"]
    network = params["ddconfig"]
    return ChameleonVQVAEConfig(
        embed_dim=params["embed_dim"],
        num_embeddings=params["n_embed"],
        double_latent=network["double_z"],
        latent_channels=network["z_channels"],
        resolution=network["resolution"],
        in_channels=network["in_channels"],
        base_channels=network["ch"],
        channel_multiplier=list(network["ch_mult"]),
        num_res_blocks=network["num_res_blocks"],
        attn_resolutions=list(network["attn_resolutions"]),
        dropout=network["dropout"],
        attn_type=network.get("attn_type", "vanilla"),
    )


def _read_state(paths: list[Path], is_hf: bool) -> dict[str, Tensor]:
    if paths[0].name == META_WEIGHTS:
        state = torch.load(paths[0], map_location="cpu", weights_only=True)
        return state.get("state_dict", state)
    prefix, state = HF_PREFIX if is_hf else "", {}
    for path in paths:
        # A Hugging Face folder holds a whole model: only the VQGAN's tensors are read.
        with safe_open(path, framework="pt") as file:
            state |= {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}
    return state
