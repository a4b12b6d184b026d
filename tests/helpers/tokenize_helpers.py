"""What the tests of the tokenizing side share: the reference tokenizer and items, tiny ones, and running scripts."""

import gzip
import json
import lzma
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig

from data.items.item_processor import load_text_tokenizer
from model.vqgan.vqgan import VQGAN, save_vqgan
from tests.helpers import forked

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
# The whole reference folder, for the items whose images are too large to be committed.
REFERENCE_DIR = Path(os.environ.get("REFERENCE_DIR", GOLDEN))
NUM_CODES = 64


@cache
def reference_results() -> dict[str, dict]:
    """Result of each reference item by its name."""
    with gzip.open(GOLDEN / "pre_tokenize_256.json.gz", "rt") as file:
        return {result["id"]: result for result in json.load(file)["results"]}


@cache
def reference_items() -> list[dict]:
    """Reference items whose images are there, and the one whose image is missing in the reference too."""
    items = json.loads((GOLDEN / "input.json").read_text())
    return [item for item in items if item["id"] == "missing_file" or all(map(_exists, _paths(item)))]


def write_reference_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(lzma.decompress((GOLDEN / "text_tokenizer.json.xz").read_bytes()))
    return folder


def write_tiny_tokenizer(folder: Path):
    """A byte-level tokenizer in Chameleon's layout with 64 image codes, as a folder; returns it loaded."""
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    names += [f"IMGIMG{''.join('ABCDEFGHIJ'[int(digit)] for digit in str(code))}Z" for code in range(NUM_CODES)]
    names += ["<eoss>", "<racm3:break>", "<reserved08706>", "<reserved08799>"]
    names += [f"<reserved{8800 + n:05d}>" for n in range(1, 9)]
    names += sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: token_id for token_id, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([name for name in names if len(name) > 1])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_text_tokenizer(folder)


def write_tiny_vqgan(folder: Path) -> VQGAN:
    """A VQGAN with random weights, 32 channels and 64 codes."""
    import torch

    torch.manual_seed(0)
    config = ChameleonVQVAEConfig(
        embed_dim=8,
        num_embeddings=NUM_CODES,
        latent_channels=8,
        resolution=64,
        base_channels=32,
        channel_multiplier=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        attn_resolutions=[],
        attn_type="none",
    )
    vqgan = VQGAN(config).eval()
    torch.nn.init.normal_(vqgan.quantize.embedding.weight, std=0.5)
    save_vqgan(vqgan, folder)
    return vqgan


def write_items(folder: Path, num_items: int, bad: tuple[int, ...] = ()) -> Path:
    """`in.json` with images of random blocks of several sizes; items in `bad` name an image that does not exist."""
    rng = np.random.default_rng(0)
    (folder / "img").mkdir(parents=True)
    items = []
    for item_id in range(num_items):
        path = f"img/{item_id}.png"
        if item_id not in bad:
            width, height = ((64, 64), (128, 32), (32, 64))[item_id % 3]
            blocks = rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
            Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(folder / path)
        turns = [{"from": "human", "value": f"picture {item_id}"}, {"from": "gpt", "value": "<|image|>"}]
        items.append({"conversations": turns, "image": [path]})
    (folder / "in.json").write_text(json.dumps(items))
    return folder / "in.json"


def run_script(*args: object) -> subprocess.CompletedProcess:
    """Run a script of the project as a user does, from its root."""
    return forked.run(command(*args), environment())


def command(*args: object) -> list[str]:
    return [sys.executable, "-u", *map(str, args)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Content of every file under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _paths(item: dict) -> list[str]:
    return [item["image"]] if isinstance(item["image"], str) else item["image"]


def _exists(path: str) -> bool:
    return (REFERENCE_DIR / path).exists()
