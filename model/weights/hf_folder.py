"""A checkpoint folder, on disk or on the hub: where it is, its configuration, and the files of its tokenizer."""

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import ChameleonConfig

from data.hub import DEFAULT_TOKENIZER, TOKENIZER_FILES, fetch_folder
from model.decoder.chameleon import ChameleonXLLMXConfig

# Ours, and that of stock Chameleon, of the recipe's checkpoints and of our older ones.
MODEL_TYPES = (ChameleonXLLMXConfig.model_type, ChameleonConfig.model_type)


def resolve_checkpoint(
    dir_or_hub_id: str | os.PathLike, with_weights: bool = True, revision: str | None = None
) -> Path:
    """
    The folder of a checkpoint; a hub id (name/name) is downloaded, or found in the local cache.

    `with_weights` and `revision` (None: the newest) are of a hub id. Raises FileNotFoundError if it is neither a folder
    nor a hub id that can be fetched, or a folder of checkpoints.
    """
    files = ["*.json", "*.jinja"] + ["*.safetensors"] * with_weights
    folder = fetch_folder(dir_or_hub_id, files, "the checkpoint", revision=revision)
    if not (folder / "config.json").exists() and (within := name_checkpoints_in(folder, "config.json")):
        raise FileNotFoundError(f"{folder} is no checkpoint, but a folder of checkpoints: give {within}")
    return folder


def name_checkpoints_in(folder: Path, file_name: str) -> str:
    """The newest five of the folders in `folder` that have a file of that name, for a message; "" if there is none."""
    within = sorted((path.parent for path in folder.glob(f"[!.]*/{file_name}")), key=os.path.getmtime, reverse=True)
    return " or ".join(map(str, within[:5]))


def load_config(dir_or_hub_id: str | os.PathLike, **overrides: Any) -> ChameleonXLLMXConfig:
    """
    The configuration of a checkpoint of either shape; `overrides` replace its values, `name_or_path` is its folder.

    Raises FileNotFoundError if there is none, ValueError if it is another model's than Chameleon.
    """
    folder = resolve_checkpoint(dir_or_hub_id, with_weights=False)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a checkpoint.")
    values, _ = ChameleonXLLMXConfig.get_config_dict(folder)
    model_type = values.pop("model_type", None)
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{folder / 'config.json'} is of model_type {model_type!r}; it must be one of {', '.join(MODEL_TYPES)}."
        )
    config = ChameleonXLLMXConfig.from_dict(values | overrides)
    config.name_or_path = folder.absolute()
    return config


def find_tokenizer(dir_or_hub_id: str | os.PathLike) -> str:
    """The folder of the tokenizer that goes with a checkpoint: its own, or the hub id of the recipe's."""
    try:
        folder = resolve_checkpoint(dir_or_hub_id, with_weights=False)
    except FileNotFoundError:
        # Reported where the weights are looked up.
        return DEFAULT_TOKENIZER
    return str(folder) if (folder / "tokenizer.json").is_file() else DEFAULT_TOKENIZER


def copy_tokenizer_files(tokenizer_dir: str | os.PathLike, out_dir: str | os.PathLike) -> None:
    """Copy the files of a tokenizer from a folder or hub id (nothing, if the folder has none)."""
    source = fetch_folder(tokenizer_dir, TOKENIZER_FILES, "--tokenizer", with_subfolder=True)
    for file_name in TOKENIZER_FILES:
        if (source / file_name).is_file():
            shutil.copyfile(source / file_name, Path(out_dir) / file_name)
