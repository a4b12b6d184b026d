"""
A Hugging Face folder, on disk or on the hub: where it is, its configuration, and the files of its tokenizer.

Where it stands: under `model/convert.py`, which reads and writes the weights that lie in such a folder
(`model/weight_files.py`).
"""

import os
import shutil
from pathlib import Path
from typing import Any

from data.hub import TOKENIZER_FILES, fetch_folder
from model.chameleon import ChameleonXLLMXConfig


def resolve_checkpoint(dir_or_hub_id: str | os.PathLike, with_weights: bool = True) -> Path:
    """
    The folder of a checkpoint; a hub id is downloaded (or found in the local cache).

    Args:
        dir_or_hub_id: a folder, or the name/name of a model of the hub.
        with_weights: whether its weights are needed too (of a folder nothing is fetched in any case).

    Raises:
        FileNotFoundError: neither a folder nor a hub id that can be fetched.
    """
    files = ["*.json", "*.jinja"] + ["*.safetensors"] * with_weights
    return fetch_folder(dir_or_hub_id, files, "the checkpoint")


def load_config(dir_or_hub_id: str | os.PathLike, **overrides: Any) -> ChameleonXLLMXConfig:
    """
    The configuration of a checkpoint of either shape; `overrides` replace its values.

    Its `name_or_path` is the folder that it was read from.

    Raises:
        FileNotFoundError: no such checkpoint, or no `config.json` in it.
        ValueError: it is not Chameleon's.
    """
    folder = resolve_checkpoint(dir_or_hub_id, with_weights=False)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a checkpoint.")
    values, _ = ChameleonXLLMXConfig.get_config_dict(folder)
    if values.get("model_type") != ChameleonXLLMXConfig.model_type:
        raise ValueError(
            f"{folder / 'config.json'} is of model_type {values.get('model_type')!r}; "
            f"it must be {ChameleonXLLMXConfig.model_type!r}."
        )
    config = ChameleonXLLMXConfig.from_dict(values | overrides)
    config.name_or_path = folder.absolute()
    return config


def copy_tokenizer_files(tokenizer_dir: str | os.PathLike, out_dir: str | os.PathLike) -> None:
    """Copy what a tokenizer is made of from a folder or hub id (nothing, if the folder has none)."""
    source = fetch_folder(tokenizer_dir, TOKENIZER_FILES, "--tokenizer", with_subfolder=True)
    for file_name in TOKENIZER_FILES:
        if (source / file_name).is_file():
            shutil.copyfile(source / file_name, Path(out_dir) / file_name)
