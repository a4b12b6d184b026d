"""What a checkpoint of a planned run takes on disk.

Where it stands: for `model/plan.py`. Only the heads of weight files are read, and of a hub id nothing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from model.adapter_folder import NOTE_NAME, BaseWeights
from model.storage_tracker import storages_of
from model.vqgan import HF_PREFIX
from model.weight_files import WeightReader

if TYPE_CHECKING:
    from model.options import Options

# Of the recipe's weights, which are not fetched: an image encoder in fp32 (the parameters of transformers'
# ChameleonVQVAE).
HUB_VQGAN_BYTES = 4 * 29_423_616


def vqgan_bytes(options: Options) -> int:
    """Bytes of the VQGAN that checkpoints carry on from what the run starts from.

    Raises FileNotFoundError or ValueError if `--init_from` holds only what was trained, and the rest is gone.
    """
    from model.options import resolve_model  # which imports this module

    source = resolve_model(options.model)[0]
    folder = None if source is None else _find_base(Path(source))
    if folder is None or not any(folder.glob("*.safetensors")):
        return HUB_VQGAN_BYTES if source is not None and options.model.init_from is None else 0
    reader = WeightReader(folder)
    names = [name for name in reader.names if name.startswith(HF_PREFIX)]
    return sum(math.prod(reader.shape(name)) * reader.dtype(name).itemsize for name in names)


def checkpoint_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of a checkpoint's large parts (model/checkpoint.py): the trained weights once for Hugging Face, as they are
    in memory, and once more, with the optimizer's states, to go on from."""
    weights = sum(_full_bytes(parameter) for parameter in model.parameters() if parameter.requires_grad)
    states = [value for state in optimizer.state.values() for value in state.values()]
    moments = sum(_full_bytes(value) for value in states if isinstance(value, torch.Tensor))
    return {"weights": weights, "training state": weights + moments}


def _find_base(folder: Path) -> Path | None:
    """The folder of whole weights from which a checkpoint folder comes; None if they are not here but on the hub.

    Raises what `BaseWeights.read` and `BaseWeights.find` raise.
    """
    while (folder / NOTE_NAME).is_file():
        base = BaseWeights.read(folder)
        if base.relative is None:  # of the hub: `find` would fetch it
            return None
        folder = base.find(folder)
    return folder if folder.is_dir() else None


def _full_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a plain or sharded tensor over all ranks."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    local_bytes = sum(storage.nbytes() for storage in storages_of(local))
    return round(local_bytes * tensor.numel() / local.numel()) if local.numel() else 0
