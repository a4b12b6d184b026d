"""Folders that may lie on the Hugging Face hub: of weights, of a tokenizer, of a VQGAN.

A local folder takes precedence over the hub, the hub's cache over a download, and HF_HUB_OFFLINE=1 forbids downloads.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

# The recipe's; its other checkpoints come without a tokenizer.
DEFAULT_TOKENIZER = "Alpha-VLLM/Lumina-mGPT-7B-768"
DEFAULT_VQGAN_DIR = "ckpts/chameleon/tokenizer"
# Taken where that folder is absent.
HUB_VQGAN = "Alpha-VLLM/Chameleon_7B_mGPT/original_tokenizers"
VQGAN_HELP = f"of images, folder or hub id (default {DEFAULT_VQGAN_DIR}; where that is absent {HUB_VQGAN})"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "text_tokenizer.json",
)
# Meta's, ours, a Hugging Face model's.
_VQGAN_CONFIGS = ("vqgan.yaml", "vqgan.json", "config.json")
_INDEX = "model.safetensors.index.json"


def fetch_folder(
    dir_or_hub_id: str | os.PathLike,
    files: Sequence[str],
    what: str,
    with_subfolder: bool = False,
    revision: str | None = None,
) -> Path:
    """
    A local folder, or one of the hub: downloaded, or found in the local cache. Raises FileNotFoundError for neither.

    Args:
        dir_or_hub_id: a folder, or the name/name of a model of the hub, or `with_subfolder` name/name/subfolder.
        files: names or patterns of the files to fetch from the hub; names that the model lacks are ignored.
        what: what is looked for, for the message.
        revision: branch, tag or commit of a model of the hub; None: its main branch.
    """
    name, folder = str(dir_or_hub_id), Path(dir_or_hub_id)
    if folder.is_dir():
        return folder
    parts = folder.parts
    if folder.is_absolute() or name.startswith(".") or len(parts) not in ((2, 3) if with_subfolder else (2,)):
        ids = "name/name or name/name/subfolder" if with_subfolder else "name/name"
        raise FileNotFoundError(f"{what} {name} is not a folder; give a folder or a hub id ({ids})")
    reason = ""
    try:
        patterns = [os.path.join(*parts[2:], file) for file in files]
        home = huggingface_hub.snapshot_download("/".join(parts[:2]), revision=revision, allow_patterns=patterns)
        found = Path(home, *parts[2:])
        # Offline, `snapshot_download` returns a cached model even if it has none of the files.
        if any(next(found.glob(file), None) for file in files):
            return found
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if not constants.HF_HUB_OFFLINE:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    raise FileNotFoundError(_describe_absence(what, name, files, reason))


def find_vqgan(vqgan_dir: str | os.PathLike) -> Path:
    """
    The folder of a VQGAN, given as folder, name/name or name/name/subfolder.

    Raises FileNotFoundError, which says what was looked for and where.
    """
    if Path(vqgan_dir).is_dir():
        return Path(vqgan_dir)
    name, what = os.fspath(vqgan_dir), "--vqgan_dir"
    if name == DEFAULT_VQGAN_DIR:
        name, what = HUB_VQGAN, f"--vqgan_dir {name} is not a folder, and the default in its place"
    folder = fetch_folder(name, [*_VQGAN_CONFIGS, _INDEX], what, with_subfolder=True)
    weights = _list_vqgan_weights(folder)
    if not weights:
        raise FileNotFoundError(f"{what} {name} is a model without a VQGAN; give a folder or a hub id that holds one")
    folder = fetch_folder(name, weights, what, with_subfolder=True)
    missing = [file for file in weights if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(_describe_absence(what, name, missing))
    return folder


def find_vqgan_problems(vqgan_dir: str | os.PathLike) -> list[str]:
    """Why there is no such VQGAN, in one sentence; empty if there is one."""
    try:
        find_vqgan(vqgan_dir)
    except (ValueError, OSError) as error:
        return [str(error)]
    return []


def _list_vqgan_weights(folder: Path) -> list[str]:
    """The weight files to fetch for the VQGAN whose configuration is in a folder."""
    if (folder / "vqgan.yaml").is_file():
        return ["vqgan.ckpt"]
    has_vqgan = (folder / "vqgan.json").is_file() or "vq_config" in (folder / "config.json").read_text("utf-8")
    if not has_vqgan or not (folder / _INDEX).is_file():
        return ["model.safetensors"] * has_vqgan
    file_of = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
    return sorted({file for name, file in file_of.items() if name.startswith("model.vqmodel.")})


def _describe_absence(what: str, name: str, files: Sequence[str], reason: str = "") -> str:
    offline = ", and HF_HUB_OFFLINE=1 forbids to download" if constants.HF_HUB_OFFLINE else ""
    return (
        f"{what} {name} is not a folder here, and could not be fetched from the hub: its cache "
        f"{constants.HF_HUB_CACHE} lacks {', '.join(files)}{offline}{reason and f' ({reason})'}"
    )
