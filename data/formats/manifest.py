"""`manifest.json` of an output folder: the settings by which its items were tokenized, so that no others are mixed in.

Written and compared by `pre_tokenize/out_folder.py`; read by `concat_record.py`, the trainer and `inspect_record.py`.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SHIPPED_PROCESSOR = "shipped"
PRECISIONS = ("fp16", "tf32", "fp32", "bf16")
DEFAULT_PRECISION = "tf32"
WAY_OUT = "use another --out_dir, or --overwrite to begin this one again"


@dataclass(frozen=True)
class Manifest:
    """The settings that all workers of one output folder share.

    `codebook_sha256` names the VQGAN whatever its file format (None: an older version). `item_processor` is the SHA-256
    of the source of an edited one. `seed` is None if nothing is random. `pairs` names the task and the columns.
    Folders without `precision` were begun when its default was tf32.
    """

    tokenizer_sha256: str
    vqgan_sha256: str
    vocab_size: int
    target_size: int
    crop: str
    seed: int | None
    splits: int
    num_items: int
    input_sha256: str
    format_version: int = FORMAT_VERSION
    max_seq_len: int | None = None
    codebook_sha256: str | None = None
    item_processor: str = SHIPPED_PROCESSOR
    pairs: str | None = None
    precision: str = DEFAULT_PRECISION


def load_manifest(out_dir: str | os.PathLike) -> dict:
    """The fields of the manifest in a folder. Raises FileNotFoundError, or ValueError if it is damaged."""
    path = Path(out_dir) / MANIFEST_NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {WAY_OUT}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object; {WAY_OUT}")
    return fields


def find_manifest(record: Path, first_file: str | os.PathLike) -> dict | None:
    """The manifest of a record, beside it or in the output folder of its first token file; None if there is neither."""
    for folder in (record.parent, Path(first_file).parent.parent):
        if (folder / MANIFEST_NAME).is_file():
            return load_manifest(folder)
    return None
