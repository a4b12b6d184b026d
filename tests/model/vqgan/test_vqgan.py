"""VQGAN: reference figures of the decoder, the three folder formats, and their errors."""

import json
import math
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import save_file

from model.vqgan.vqgan import (
    HF_PREFIX,
    VQGAN,
    CenteredGroupNorm,
    hash_vqgan,
    image_to_pixels,
    load_vqgan,
    pixels_to_image,
    save_vqgan,
)

GOLDEN = Path(__file__).parents[2] / "golden"
TINY = Path(__file__).parents[3] / "exps" / "tiny" / "vqgan"


def seeded_tensor(name: str, shape: list[int]) -> torch.Tensor:
    """The seeding rule of the reference figures: a normal draw per parameter name, scaled by its kind."""
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    parent = name.split(".")[-2]
    if "norm" in parent:
        return 1 + 0.05 * draw if name.endswith("weight") else 0.05 * draw
    if name == "quantize.embedding.weight":
        return 0.5 * draw
    return 0.02 * draw if name.endswith("bias") else draw / math.sqrt(math.prod(shape[1:]))


@pytest.fixture(scope="session")
def meta_vqgan_dir(tmp_path_factory) -> Path:
    """A folder in Meta's format with the seeded weights of the reference figures."""
    folder = tmp_path_factory.mktemp("vqgan")
    keys = json.loads((GOLDEN / "vqgan_keys.json").read_text())
    state = {name: seeded_tensor(name, shape) for name, shape in keys.items()}
    torch.save({"state_dict": state}, folder / "vqgan.ckpt")
    (folder / "vqgan.yaml").write_text((GOLDEN / "vqgan.yaml").read_text())
    return folder


def test_decoder_meets_the_reference(meta_vqgan_dir):
    vqgan = load_vqgan(meta_vqgan_dir)
    for case in json.loads((GOLDEN / "vqgan_decode.json").read_text()):
        height, width = case["latent_grid"]
        factor, offset = map(int, re.match(r"\((\d+)\*i\+(\d+)\) % 8192", case["codes"]).groups())
        codes = ((factor * torch.arange(height * width) + offset) % 8192).view(1, height, width)
        pixels = vqgan.decode(codes)[0]
        image = pixels_to_image(pixels)
        assert list(image.size) == case["size"]
        assert abs(np.asarray(image).mean() - case["uint8_mean"]) < 1e-2
        for channel, y, x, value in case["points"]:
            assert abs(float(pixels[channel, y, x]) - value) < 1e-4
        assert abs(float(pixels.mean()) - case["mean"]) < 1e-4
        assert abs(float(pixels.std()) - case["std"]) < 1e-4


def test_keys_are_those_of_metas_checkpoint(meta_vqgan_dir):
    keys = json.loads((GOLDEN / "vqgan_keys.json").read_text())
    vqgan = load_vqgan(meta_vqgan_dir)
    assert {name: list(tensor.shape) for name, tensor in vqgan.state_dict().items()} == keys
    norms = [module for module in vqgan.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert norms and all(type(norm) is CenteredGroupNorm for norm in norms)


def test_our_format_and_hf_format_give_the_same_codes(meta_vqgan_dir, tmp_path):
    vqgan = load_vqgan(meta_vqgan_dir)
    pixels = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = vqgan.encode(pixels)
    assert codes.shape == (2, 4, 2) and codes.dtype == torch.int64
    save_vqgan(vqgan, tmp_path / "ours", dtype=torch.float32)
    assert torch.equal(load_vqgan(tmp_path / "ours").encode(pixels), codes)

    hf = tmp_path / "hf"
    hf.mkdir()
    fields = json.loads((tmp_path / "ours" / "vqgan.json").read_text())
    (hf / "config.json").write_text(json.dumps({"model_type": "chameleon", "vq_config": fields}))
    state = {HF_PREFIX + k: v.clone() for k, v in vqgan.state_dict().items() if not k.startswith("decoder.")}
    save_file(state, hf / "model.safetensors")
    encoder_only = load_vqgan(hf)
    assert torch.equal(encoder_only.encode(pixels), codes)
    with pytest.raises(ValueError, match="no decoder"):
        encoder_only.decode(codes)
    assert hash_vqgan(hf) != hash_vqgan(tmp_path / "ours")


def test_a_folder_without_a_vqgan_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no VQGAN in {tmp_path}"):
        load_vqgan(tmp_path)


def test_missing_tensors_are_named(meta_vqgan_dir, tmp_path):
    state = torch.load(meta_vqgan_dir / "vqgan.ckpt", weights_only=True)["state_dict"]
    del state["encoder.conv_in.weight"]
    torch.save({"state_dict": state}, tmp_path / "vqgan.ckpt")
    (tmp_path / "vqgan.yaml").write_text(yaml.safe_dump(yaml.safe_load((GOLDEN / "vqgan.yaml").read_text())))
    with pytest.raises(ValueError, match="encoder.conv_in.weight"):
        load_vqgan(tmp_path)


@pytest.mark.parametrize(
    "name, content",
    [
        ("model.safetensors", b""),
        ("model.safetensors", (TINY / "model.safetensors").read_bytes()[:5000]),
        ("vqgan.json", b"[]"),
        # Weights of another shape.
        ("vqgan.json", b'{"embed_dim": 8}'),
    ],
)
def test_a_damaged_folder_of_ours_is_named(tmp_path, name, content):
    shutil.copytree(TINY, tmp_path / "vqgan")
    (tmp_path / "vqgan" / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"vqgan/{name}|lack"):
        load_vqgan(tmp_path / "vqgan")


@pytest.mark.parametrize("weights, config", [(b"PK\x03\x04torn", None), (None, "model: {"), (None, "model: 3")])
def test_a_damaged_folder_of_metas_is_named(tmp_path, weights, config):
    torch.save([1, 2], tmp_path / "vqgan.ckpt")
    if weights is not None:
        (tmp_path / "vqgan.ckpt").write_bytes(weights)
    (tmp_path / "vqgan.yaml").write_text(config or (GOLDEN / "vqgan.yaml").read_text())
    with pytest.raises(ValueError, match="vqgan.yaml and .*vqgan.ckpt"):
        load_vqgan(tmp_path)


def test_wrong_sizes_and_codes_are_rejected():
    vqgan: VQGAN = load_vqgan(TINY)
    with pytest.raises(ValueError, match="65x64"):
        vqgan.encode(torch.zeros(1, 3, 64, 65))
    with pytest.raises(ValueError, match="codes must lie in"):
        vqgan.decode(torch.full((1, 4, 4), vqgan.num_codes))


def test_pixels_round_trip():
    image = Image.effect_noise((32, 16), 80).convert("RGB")
    pixels = image_to_pixels(image)
    assert pixels.shape == (3, 16, 32) and pixels.min() >= -1 and pixels.max() <= 1
    again = image_to_pixels(pixels_to_image(pixels))
    assert (again - pixels).abs().max() <= 2 / 255 + 1e-6
    with pytest.raises(ValueError, match="RGB"):
        image_to_pixels(image.convert("L"))


@pytest.mark.parametrize("size", [(256, 224), (64, 64)])
def test_group_norm_is_exact_in_channels_last_layout(size):
    torch.manual_seed(0)
    norm = CenteredGroupNorm(32, 64, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 64, *size) * 0.3 + torch.randn(2, 64, 1, 1) * 3
    expected = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), eps=1e-6)
    for layout in (torch.contiguous_format, torch.channels_last):
        out = norm(x.to(memory_format=layout))
        assert out.is_contiguous(memory_format=layout)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-6)
