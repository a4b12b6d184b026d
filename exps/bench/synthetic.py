"""Synthetic vocabularies and weights, and for exps/bench/data.py a small dataset of any number of items.

One folder holds a token file for each length; `files/0`, `files/1`, ... are links to the folder. Lengths of items are
drawn evenly from a seed; nearly every item has its own path, which opens and holds as many tokens.
"""

from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from data.formats.record import RecordEntry, write_merged
from data.formats.token_file import save_token_file
from data.items.vocab import BEGIN_IMAGE, BOS, END_IMAGE, END_OF_TURN, EOS, FIRST_GRID_SIZE, IGNORE_INDEX, NEW_LINE, PAD

# Chameleon's.
VOCAB_SIZE = 65536
ITEMS_PER_FOLDER = 1000
WEIGHT_STD = 0.02


def write_pool(folder: Path, min_len: int, max_len: int) -> None:
    """A token file `{n}.pkl` of random tokens for each length n; the first half of an item has no targets."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for length in range(min_len, max_len + 1):
        token = rng.integers(0, VOCAB_SIZE, length).tolist()
        save_token_file(folder / f"{length}.pkl", token, [IGNORE_INDEX] * (length // 2) + token[length // 2 :], length)


def write_record(folder: Path, pool: Path, min_len: int, max_len: int, num_items: int) -> Path:
    """Writes a `record.json` of items with files of `pool`, as pre-tokenizing does; returns its path."""
    (folder / "files").mkdir()
    for number in range(-(-num_items // ITEMS_PER_FOLDER)):
        (folder / "files" / str(number)).symlink_to(pool.absolute(), target_is_directory=True)
    lens = np.random.default_rng(1).integers(min_len, max_len + 1, num_items).tolist()
    entries = (
        RecordEntry(f"files/{number // ITEMS_PER_FOLDER}/{length}.pkl", length, number)
        for number, length in enumerate(lens)
    )
    path = folder / "record.json"
    write_merged(entries, path)
    return path


def special_names(num_codes: int, max_grids: int) -> list[str]:
    """The first token names of Chameleon's layout: all that are not text."""
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    names = [BOS, PAD, EOS, "<unk>", *(f"IMGIMG{str(code).translate(letters)}Z" for code in range(num_codes))]
    names += [END_IMAGE, BEGIN_IMAGE, END_OF_TURN, NEW_LINE]
    return names + [f"<reserved{FIRST_GRID_SIZE + grids:05d}>" for grids in range(1, max_grids + 1)]


@torch.no_grad()
def fill_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of norms become 1, biases 0, all else normal in the order of the parameters.

    Our model and stock `transformers` get the same weights. They are drawn on the device: a host takes a minute for 7B.
    """
    generator = None
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if "norm" in module.rpartition(".")[2]:
            local.fill_(float(kind == "weight"))
            continue
        generator = generator or torch.Generator(local.device).manual_seed(0)
        local.normal_(0.0, WEIGHT_STD, generator=generator)
    return model
