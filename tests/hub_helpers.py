"""A cache of the Hugging Face hub on disk, laid out as the hub's own library does it."""

import os
import shutil
from pathlib import Path

import torch
import yaml

from model.vqgan import VQGAN

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_into_cache(cache: Path, repo: str, folder: Path, subfolder: str = "") -> Path:
    """Puts the files of a folder into a model's snapshot (links to blobs); returns where they lie."""
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)
    there = home / "snapshots" / COMMIT / subfolder
    there.mkdir(parents=True, exist_ok=True)
    (home / "blobs").mkdir(exist_ok=True)
    for path in folder.iterdir():
        blob = home / "blobs" / f"{len(os.listdir(home / 'blobs')):040x}"
        shutil.copyfile(path, blob)
        (there / path.name).symlink_to(os.path.relpath(blob, there))
    return there


def write_meta_vqgan(vqgan: VQGAN, folder: Path) -> None:
    """`vqgan.yaml` and `vqgan.ckpt`, as Meta's folder has them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = vqgan.config
    network = dict(
        double_z=config.double_latent, z_channels=config.latent_channels, resolution=config.resolution,
        in_channels=config.in_channels, ch=config.base_channels, ch_mult=list(config.channel_multiplier),
        num_res_blocks=config.num_res_blocks, attn_resolutions=list(config.attn_resolutions or []),
        dropout=config.dropout, attn_type=config.attn_type,
    )  # fmt: skip
    params = {"embed_dim": config.embed_dim, "n_embed": config.num_embeddings, "ddconfig": network}
    (folder / "vqgan.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    torch.save({"state_dict": vqgan.state_dict()}, folder / "vqgan.ckpt")
