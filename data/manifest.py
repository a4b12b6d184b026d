"""`manifest.json` of an output folder: with what its items were tokenized, so that nothing else is mixed with them."""

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """Everything that all workers of one output folder must agree upon."""

    tokenizer_sha256: str
    vqgan_sha256: str
    vocab_size: int
    target_size: int
    crop: str
    seed: int | None  # None if nothing is random
    splits: int
    num_items: int  # of the whole input
    input_sha256: str
    format_version: int = FORMAT_VERSION


def settle_manifest(out_dir: str | os.PathLike, manifest: Manifest) -> None:
    """Write the manifest, or compare it with the one that is there. Several workers may do this at once.

    Raises ValueError with each field that differs.
    """
    path = Path(out_dir) / MANIFEST_NAME
    if not path.exists():
        _create(path, json.dumps(asdict(manifest), indent=2) + "\n")
    ours, theirs = asdict(manifest), load_manifest(out_dir)
    different = [f"{key} was {theirs.get(key)}, is now {ours[key]}" for key in ours if ours[key] != theirs.get(key)]
    if different:
        raise ValueError(
            f"{out_dir} was begun with other settings: {'; '.join(different)}. "
            "Use another --out_dir, or delete this one to begin again"
        )


def load_manifest(out_dir: str | os.PathLike) -> dict:
    """The fields of the manifest in a folder. Raises FileNotFoundError, or ValueError if it is damaged."""
    path = Path(out_dir) / MANIFEST_NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete the folder to begin again") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object; delete the folder to begin again")
    return fields


def _create(path: Path, text: str) -> None:
    """Let the file appear whole, unless another process was faster."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(partial, 0o644)
        try:
            os.link(partial, path)  # unlike a rename, fails where a file is there
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
