"""
A Hugging Face folder, on disk or on the hub: where it is, its configuration, and the files of its tokenizer.

Where it stands: under `model/convert.py`, which reads and writes the weights that lie in such a folder
(`model/weight_files.py`).
"""

import os
import shutil
from pathlib import Path
from typing import Any

from model.chameleon import ChameleonXLLMXConfig

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def resolve_checkpoint(dir_or_hub_id: str | os.PathLike, with_weights: bool = True) -> Path:
    """
    The folder of a checkpoint; a hub id is downloaded (or found in the local cache).

    Args:
        dir_or_hub_id: a folder, or the name/name of a model of the hub.
        with_weights: whether its weights are needed too (of a folder nothing is fetched in any case).

    Raises:
        FileNotFoundError: neither a folder nor a hub id that can be fetched, or a folder of checkpoints.
    """
    folder = Path(dir_or_hub_id)
    if folder.is_dir():
        if not (folder / "config.json").exists() and (within := name_checkpoints_in(folder, "config.json")):
            raise FileNotFoundError(f"{folder} is no checkpoint, but a folder of checkpoints: give {within}")
        return folder
    looks_local = folder.is_absolute() or len(folder.parts) != 2 or str(dir_or_hub_id).startswith(".")
    if not looks_local:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        patterns = ["*.json", "*.jinja"] + ["*.safetensors"] * with_weights
        try:
            return Path(snapshot_download(str(dir_or_hub_id), allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise FileNotFoundError(
                f"{dir_or_hub_id} is not a folder here, and could not be fetched from the hub: {error}"
            ) from error
    raise FileNotFoundError(f"there is no checkpoint folder {dir_or_hub_id}; give a folder or a hub id (name/name).")


def name_checkpoints_in(folder: Path, file_name: str) -> str:
    """The newest five of the folders in `folder` that have a file of that name, for a message; "" if there is none."""
    within = sorted((path.parent for path in folder.glob(f"[!.]*/{file_name}")), key=os.path.getmtime, reverse=True)
    return " or ".join(map(str, within[:5]))


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
    source = resolve_checkpoint(tokenizer_dir, with_weights=False)
    for file_name in TOKENIZER_FILES:
        if (source / file_name).is_file():
            shutil.copyfile(source / file_name, Path(out_dir) / file_name)
