"""`manifest.json` of an output folder: with what its items were tokenized, so that nothing else is mixed with them."""

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from data.file_lock import open_locked, replace_locked
from data.messages import one_line
from data.record import find_sub_records
from data.worker_log import FILES_DIR

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SHIPPED_PROCESSOR = "shipped"
_WAY_OUT = "use another --out_dir, or --overwrite to begin this one again"
_OURS = {  # by subfolder, what workers and concat_record.py write
    "": re.compile(r"(\d+-of-\d+-(record|failed|retried)\.jsonl(\.moved)?|record\.json)(\.partial)?"),
    FILES_DIR: re.compile(r"\d+\.pkl(\.partial)?"),
    "shards": re.compile(r"\d+-of-\d+-\d+\.pkls(\.partial)?"),
}


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
    max_seq_len: int | None = None  # None if nothing is too long
    codebook_sha256: str | None = None  # names the VQGAN whatever its file format; None: of an older version
    item_processor: str = SHIPPED_PROCESSOR  # an edited one: SHA-256 of its source


@contextmanager
def settle_manifest(out_dir: str | os.PathLike, manifest: Manifest, overwrite: bool = False) -> Iterator[None]:
    """Write the manifest, or compare it with the one that is there. While it is entered, other workers wait.

    Enter it to open the log of a worker, so that no other worker finds the folder unused and clears it in between.
    With `overwrite` a folder of another manifest is cleared, but none in which a worker runs: of several workers of
    one manifest the first clears it, and the others find theirs. Raises ValueError with each field that differs.
    """
    folder = Path(out_dir)
    path = folder / MANIFEST_NAME
    with ExitStack() as held:
        held.enter_context(open_locked(path, patience_s=math.inf))
        is_new = not path.stat().st_size
        refusal = _foreign_records(folder) if is_new else _difference(folder, manifest)
        if refusal and not overwrite:
            if is_new:
                path.unlink()
            raise ValueError(refusal)
        if refusal:
            _clear(folder)
        if refusal or is_new:
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
    """Why the manifest in the folder is not this one; nothing if it is. A field that it lacks is not compared."""
    try:
        ours, theirs = asdict(manifest), load_manifest(folder)
    except ValueError as error:
        return str(error)
    differing = [key for key in ours if key in theirs and ours[key] != theirs[key]]
    different = [f"{key} was {one_line(theirs[key])}, is now {one_line(ours[key])}" for key in differing]
    return f"{folder} was begun with other settings: {'; '.join(different)}; {_WAY_OUT}" if different else ""


def _foreign_records(folder: Path) -> str:
    """Why a folder without a manifest cannot be used; nothing if it can."""
    found = [path.name for path in find_sub_records(folder).values()]
    return f"{folder} has {found[0]} but no {MANIFEST_NAME}, so nobody knows of what; {_WAY_OUT}" if found else ""


def _clear(folder: Path) -> None:
    """Delete the workers' files and the merged record, nothing else. Raises ValueError if a worker runs in it.

    The manifest is left, to be replaced after it: interrupted here, the folder is still that of the old manifest.
    """
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
            if (folder / subfolder).is_dir():
                for name in filter(pattern.fullmatch, os.listdir(folder / subfolder)):
                    (folder / subfolder / name).unlink()
