"""What a planned run takes on disk: its own copy of the weights that it starts from, and a checkpoint.

Where it stands: for `model/plan.py`. Only the heads of weight files are read, and of a hub id nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from model.adapter_folder import NOTE_NAME, BaseWeights
from model.convert import VQGAN_PREFIX
from model.decoder.chameleon import ChameleonXLLMXConfig, build_model
from model.storage_tracker import storages_of
from model.weight_files import WeightReader

if TYPE_CHECKING:
    from model.options import Options

# Of the recipe's weights, which are not asked for: bf16, and an encoder of pictures inside, in fp32 (the parameters of
# transformers' ChameleonVQVAE).
HUB_DTYPE = torch.bfloat16
HUB_VQGAN_BYTES = 4 * 29_423_616


@dataclass(frozen=True)
class StartFiles:
    """Bytes of what a run starts from: its own copy (0 if it makes none), and the VQGAN that checkpoints carry on."""

    copy: int = 0
    vqgan: int = 0


def size_start(options: Options, config: ChameleonXLLMXConfig) -> StartFiles:
    """What the files that the run starts from take on disk; those of the hub are not fetched, but taken for its usual.

    Raises FileNotFoundError or ValueError if `--init_from` holds only what was trained, and the rest is gone.
    """
    from model.options import resolve_model  # which imports this module

    source = resolve_model(options.model)[0]
    if source is None:
        return StartFiles()
    folder, copies = _find_base(Path(source)), options.model.copies_start
    if folder is None or not any(folder.glob("*.safetensors")):
        num_parameters = sum(parameter.numel() for parameter in build_model(config, device="meta").parameters())
        vqgan = HUB_VQGAN_BYTES if options.model.init_from is None else 0
        return StartFiles(copies * (num_parameters * HUB_DTYPE.itemsize + vqgan), vqgan)
    reader = WeightReader(folder)
    sizes = {name: math.prod(reader.shape(name)) * reader.dtype(name).itemsize for name in reader.names}
    vqgan = sum(num_bytes for name, num_bytes in sizes.items() if name.startswith(VQGAN_PREFIX))
    return StartFiles(copies * sum(sizes.values()), vqgan)


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
