"""`manifest.json` of an output folder: the settings by which its items were tokenized, so that no others are mixed in.

Written and compared by `pre_tokenize.py`; read by `concat_record.py`, the trainer and `inspect_record.py`.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from data.formats.record import find_sub_records
from data.messages import one_line
from data.whole_file import open_locked, replace_locked
from pre_tokenize.worker_log import FILES_DIR

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SHIPPED_PROCESSOR = "shipped"
_WAY_OUT = "use another --out_dir, or --overwrite to begin this one again"
# By subfolder, the files of workers and concat_record.py.
_OURS = {
    "": re.compile(r"(\d+-of-\d+-(record|failed|retried)\.jsonl(\.moved)?|record\.json)(\.partial)?"),
    FILES_DIR: re.compile(r"\d+\.pkl(\.partial)?"),
    "shards": re.compile(r"\d+-of-\d+-\d+\.pkls(\.partial)?"),
}


@dataclass(frozen=True)
class Manifest:
    """The settings that all workers of one output folder share.

    `codebook_sha256` names the VQGAN whatever its file format (None: an older version), `item_processor` is the SHA-256
    of the source of an edited one, `num_items` counts the whole input, `seed` is None if nothing is random.
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


@contextmanager
def settle_manifest(out_dir: str | os.PathLike, manifest: Manifest, overwrite: bool = False) -> Iterator[None]:
    """Write the manifest, or compare it with the one in the folder; other workers wait while the block runs.

    Open the log of a worker inside the block, so that no other worker finds the folder unused and clears it.
    With `overwrite` a folder of another manifest is cleared, unless a worker runs in it. Of several workers of one
    manifest, the first clears the folder. Raises ValueError with each field that differs.
    """
    folder = Path(out_dir)
    path = folder / MANIFEST_NAME
    with ExitStack() as held:
        held.enter_context(open_locked(path, patience_s=math.inf))
        is_new = not path.stat().st_size
        problem = "" if is_new else _difference(folder, manifest)
        if is_new and find_sub_records(folder):
            problem = f"{folder} has records but no {MANIFEST_NAME}, so their settings are unknown; {_WAY_OUT}"
        if problem and not overwrite:
            if is_new:
                path.unlink()
            raise ValueError(problem)
        if problem:
            _clear(folder)
        if problem or is_new:
            held.enter_context(replace_locked(path, json.dumps(asdict(manifest), indent=2) + "\n"))
        yield


def load_manifest(out_dir: str | os.PathLike) -> dict:
    """The fields of the manifest in a folder. Raises FileNotFoundError, or ValueError if it is damaged."""
    path = Path(out_dir) / MANIFEST_NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {_WAY_OUT}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object; {_WAY_OUT}")
    return fields


def find_manifest(record: Path, first_file: str | os.PathLike) -> dict | None:
    """The manifest of a record, beside it or in the output folder of its first token file; None if there is neither."""
    for folder in (record.parent, Path(first_file).parent.parent):
        if (folder / MANIFEST_NAME).is_file():
            return load_manifest(folder)
    return None


def _difference(folder: Path, manifest: Manifest) -> str:
    """The problem if the folder has another manifest, else "". A field that it lacks is not compared."""
    try:
        ours, theirs = asdict(manifest), load_manifest(folder)
    except ValueError as error:
        return str(error)
    differing = [key for key in ours if key in theirs and ours[key] != theirs[key]]
    changes = [f"{key} was {one_line(theirs[key])}, is now {one_line(ours[key])}" for key in differing]
    return f"{folder} was begun with other settings: {'; '.join(changes)}; {_WAY_OUT}" if changes else ""


def _clear(folder: Path) -> None:
    """Delete the files of workers and the merged record, nothing else. Raises ValueError if a worker runs."""
    # The manifest is replaced afterwards: interrupted here, the folder still has the old one.
    with ExitStack() as held:
        for path in find_sub_records(folder).values():
            try:
                held.enter_context(open_locked(path))
            except BlockingIOError:
                raise ValueError(
                    f"--overwrite: the worker of {path.name} is running in {folder} with other settings; "
                    "stop it first, or use another --out_dir"
                ) from None
        for subfolder, pattern in _OURS.items():
            for path in list((folder / subfolder).glob("*")):
                if pattern.fullmatch(path.name):
                    path.unlink()
