"""A cache of the Hugging Face hub on disk, laid out as the hub's own library does it."""

import os
import shutil
from pathlib import Path

import torch
import yaml

from model.vqgan.vqgan import VQGAN

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
    names = {"double_z": "double_latent", "z_channels": "latent_channels", "ch": "base_channels"}
    names |= {"ch_mult": "channel_multiplier", "attn_resolutions": "attn_resolutions", "attn_type": "attn_type"}
    names |= {name: name for name in ("resolution", "in_channels", "num_res_blocks", "dropout")}
    network = {name: getattr(config, ours) for name, ours in names.items()}
    network["attn_resolutions"] = network["attn_resolutions"] or []
    params = {"embed_dim": config.embed_dim, "n_embed": config.num_embeddings, "ddconfig": network}
    (folder / "vqgan.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    torch.save({"state_dict": vqgan.state_dict()}, folder / "vqgan.ckpt")
