"""Reading the weights of a decoder, in both shapes of checkpoint, for training, generation and conversion."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.decoder.chameleon import ChameleonXLLMXConfig, ChameleonXLLMXForConditionalGeneration, build_model
from model.decoder.local_shards import copy_into_parameter
from model.decoder.trainable import is_added
from model.decoder.trained_rows import ROWS_NAME
from model.vqgan.vqgan import HF_PREFIX
from model.weights.adapter_folder import open_weights
from model.weights.hf_folder import load_config, resolve_checkpoint
from model.weights.weight_files import FLOATS, WeightReader

# What a checkpoint may hold beside the decoder, which never loads it.
_IGNORED = (HF_PREFIX, "model.rotary_emb.")
# What recomputation, torch.compile and peft put into names.
_WRAPPER_PARTS = ("_checkpoint_wrapped_module.", "_orig_mod.", "base_layer.")


def load_checkpoint_weights(
    model: nn.Module, dir_or_hub_id: str | os.PathLike, image_head_init: str = "keep", seed: int = 0
) -> None:
    """
    Fill a plain or sharded model, on any device, from a checkpoint of either shape; see `set_image_rows`.

    Every rank reads only its own rows. Values are cast to the type of the parameter. Adapters are left as they are;
    trained image rows are filled from the whole weights.

    Raises:
        FileNotFoundError: no such checkpoint or no weights in it.
        ValueError: tensors that are missing, unknown or of another shape, or q/k-norms that cannot be tied.
    """
    reader = open_weights(resolve_checkpoint(dir_or_hub_id), image_head_init, seed)
    parameters = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    check_names_and_shapes({name: p for name, p in parameters.items() if not is_added(name)}, reader)
    for name, parameter in parameters.items():
        if name.endswith(f".{ROWS_NAME}"):
            ids = model.image_token_ids(torch.device("cpu"))
            copy_into_parameter(parameter, reader.read(f"{name.removesuffix(ROWS_NAME)}weight")[ids])
        elif not is_added(name):
            copy_into_parameter(parameter, regroup_head_norm(name, reader.read(name), parameter.shape[0]))


def check_weights(dir_or_hub_id: str | os.PathLike, image_head_init: str = "keep") -> ChameleonXLLMXConfig:
    """
    The configuration of a checkpoint, after a check that its weights fit it and have the image rows to set.

    Only names and shapes are read. The weights of a hub id are checked when they are loaded. Raises as
    `load_checkpoint_weights`.
    """
    config = load_config(dir_or_hub_id)
    if Path(dir_or_hub_id).is_dir():
        # On meta: only names and shapes.
        model = build_model(config)
        check_names_and_shapes(dict(model.named_parameters()), open_weights(dir_or_hub_id, image_head_init))
    return config


def load_pretrained(
    dir_or_hub_id: str | os.PathLike,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    config: ChameleonXLLMXConfig | None = None,
    **overrides: Any,
) -> ChameleonXLLMXForConditionalGeneration:
    """
    A whole model in evaluation mode, from a checkpoint of either shape.

    Args:
        dtype: of the parameters; None keeps the type of the files.
        config: its configuration; None: that of the checkpoint.
        overrides: configuration values, e.g. `tie_head_norm=False` for a stock checkpoint that cannot be tied.
    """
    folder = resolve_checkpoint(dir_or_hub_id)
    config = config or load_config(folder, **overrides)
    model = build_model(config, device, dtype or open_weights(folder).dtype("lm_head.weight"))
    load_checkpoint_weights(model, folder)
    return model.eval()


def clean_name(name: str) -> str:
    """The name of a parameter in a checkpoint, without what wrappers add to it."""
    for part in _WRAPPER_PARTS:
        name = name.replace(part, "")
    return name


def regroup_head_norm(name: str, tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    """
    A q/k-norm [rows, head_dim] with another number of rows: repeated, or tied if the rows of each group are equal.

    Other tensors are returned unchanged. Raises ValueError if rows to tie differ, or cannot be divided.
    """
    stored_rows = tensor.shape[0]
    if num_rows % stored_rows == 0:
        return tensor.repeat_interleave(num_rows // stored_rows, 0) if num_rows > stored_rows else tensor
    if stored_rows % num_rows:
        raise ValueError(f"{name}: {stored_rows} rows on file cannot be divided among {num_rows} rows of the model.")
    groups = tensor.unflatten(0, (num_rows, -1))
    if not torch.equal(groups, groups[:, :1].expand_as(groups)):
        raise ValueError(
            f"{name}: the rows of the heads differ within the {num_rows} model-parallel group(s), so they cannot be "
            "tied. Load it untied: tie_head_norm=False (--untie_head_norm in model/convert.py)."
        )
    return groups[:, 0].contiguous()


def check_names_and_shapes(parameters: dict[str, torch.Tensor], reader: WeightReader) -> None:
    """Raises ValueError unless a checkpoint has the parameters of a decoder, by name and shape, and no others."""
    missing = [name for name in parameters if name not in reader]
    quantized = [name for name in parameters if name in reader and not reader.is_float(name)]
    unknown = [name for name in reader.names if name not in parameters and not name.startswith(_IGNORED)]
    # Rows of q/k-norms are regrouped.
    fixed = {name: p for name, p in parameters.items() if name in reader and "_norm." not in name}
    other = [
        f"{name} {list(reader.shape(name))} instead of {list(parameter.shape)}"
        for name, parameter in fixed.items()
        if reader.shape(name) != tuple(parameter.shape)
    ]
    problems = [
        f"{len(names)} {what} (e.g. {', '.join(names[:3])})"
        for names, what in (
            *((missing, "missing"), (unknown, "unknown"), (other, "of another shape")),
            (quantized, f"quantized: training reads {', '.join(FLOATS)}"),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"the weights in {reader.folder} do not fit the model: {'; '.join(problems)}. "
            "Is the config.json beside them the one that they were written with?"
        )
