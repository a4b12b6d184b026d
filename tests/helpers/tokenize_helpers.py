"""What the tests of the tokenizing side share: the reference tokenizer and items, tiny ones, and running scripts."""

import gzip
import json
import lzma
import os
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig

from data.items.item_processor import load_text_tokenizer
from exps.tiny.train_tokenizer import special_names
from model.vqgan.vqgan import VQGAN, save_vqgan
from tests.helpers.decoder_helpers import VQ_CONFIG
from tests.helpers.forked import ROOT, environment  # noqa: F401

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

    def is_usable(item: dict) -> bool:
        paths = [item["image"]] if isinstance(item["image"], str) else item["image"]
        return item["id"] == "missing_file" or all((REFERENCE_DIR / path).exists() for path in paths)

    return list(filter(is_usable, json.loads((GOLDEN / "input.json").read_text())))


def write_reference_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(lzma.decompress((GOLDEN / "text_tokenizer.json.xz").read_bytes()))
    return folder


def write_tiny_tokenizer(folder: Path):
    """A byte-level tokenizer in Chameleon's layout with 64 image codes, as a folder; returns it loaded."""
    special = special_names(NUM_CODES, max_grids=8)
    names = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: token_id for token_id, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_text_tokenizer(folder)


def write_tiny_vqgan(folder: Path) -> VQGAN:
    """A VQGAN with random weights, 32 channels and 64 codes."""
    torch.manual_seed(0)
    shape = VQ_CONFIG | {"num_embeddings": NUM_CODES, "resolution": 64}
    config = ChameleonVQVAEConfig(**shape, attn_resolutions=[], attn_type="none")
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


def command(*args: object) -> list[str]:
    return [sys.executable, "-u", *map(str, args)]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Content of every file under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
