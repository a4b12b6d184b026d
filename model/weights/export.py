"""Writing a checkpoint in either shape, with the VQGAN of its start. Saves and model/convert.py call it."""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from model.decoder.chameleon import ChameleonXLLMXConfig
from model.vqgan.vqgan import HF_PREFIX
from model.weights.adapter_folder import open_weights
from model.weights.image_head import HEAD
from model.weights.load import regroup_head_norm
from model.weights.stock_folder import write_config
from model.weights.weight_files import MAX_FILE_BYTES, WeightReader, write_weights


def export_tensors(
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    get: Callable[[str], torch.Tensor],
    config: ChameleonXLLMXConfig,
    out_dir: str | os.PathLike,
    vqgan: Mapping[str, torch.Tensor],
    shape: str = "xllmx",
    is_trained: bool = True,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """
    Write config.json and safetensors of a checkpoint in either shape, from full tensors.

    Args:
        shapes: shape and type of every parameter to write, by name.
        get: gives a parameter when it is its turn.
        config: its configuration.
        out_dir: made if it is not there, and filled in place.
        vqgan: the VQGAN's tensors by name, which keep their type; "hf" needs them.
        is_trained: see `write_config`.
        max_file_bytes: see `write_weights`.
    """
    if shape == "hf" and not vqgan:
        raise ValueError(
            "the hf shape holds the VQGAN, and there is none in the source: give its folder (--vqgan_dir). Only "
            "what was started from a checkpoint with a VQGAN carries it along."
        )
    tensors = {}
    for name, (size, dtype) in shapes.items():
        if shape == "hf" and ".q_norm." in name:
            size = (config.num_attention_heads, *size[1:])
        elif shape == "hf" and ".k_norm." in name:
            size = (config.num_key_value_heads, *size[1:])
        tensors[name] = torch.empty(size, dtype=dtype, device="meta")

    def get_out(name: str) -> torch.Tensor:
        return vqgan[name] if name in vqgan else regroup_head_norm(name, get(name), tensors[name].shape[0])

    Path(out_dir).mkdir(parents=True, exist_ok=True)
    tensors |= {name: tensor.to("meta") for name, tensor in vqgan.items()}
    write_weights(out_dir, tensors, get_out, max_file_bytes)
    write_config(config, Path(out_dir), tensors[HEAD].dtype, shape, is_trained)


def carried_vqgan(config: ChameleonXLLMXConfig) -> dict[str, torch.Tensor]:
    """
    The VQGAN's tensors, by name, of the folder that a configuration was read from; without a VQGAN none.

    In memory (0.1 GiB for Chameleon's): that folder may be a checkpoint which the training removes.
    """
    try:
        if config.name_or_path and Path(config.name_or_path).is_dir():
            return {name: tensor.clone() for name, tensor in stored_vqgan(open_weights(config.name_or_path)).items()}
    except (ValueError, OSError) as error:
        # A training must be able to save without the VQGAN.
        warnings.warn(f"the VQGAN's tensors, if any, are not carried along: {error}", stacklevel=2)
    return {}


def stored_vqgan(reader: WeightReader) -> dict[str, torch.Tensor]:
    """The VQGAN's tensors of a checkpoint, by name; without a VQGAN none."""
    return {name: reader.read(name) for name in reader.names if name.startswith(HF_PREFIX)}
