"""Settles the manifest of an output folder among the workers that share the folder. Called by `pre_tokenize.py`."""

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from data.formats.manifest import DEFAULT_PRECISION, MANIFEST_NAME, WAY_OUT, Manifest, load_manifest
from data.formats.record import find_sub_records
from data.messages import one_line
from data.whole_file import open_locked, replace_locked
from pre_tokenize.worker_log import FILES_DIR

# By subfolder, the files of workers and concat_record.py.
_OURS = {
    "": re.compile(r"(\d+-of-\d+-(record|failed|retried)\.jsonl(\.moved)?|record\.json)(\.partial)?"),
    FILES_DIR: re.compile(r"\d+\.pkl(\.partial)?"),
    "shards": re.compile(r"\d+-of-\d+-\d+\.pkls(\.partial)?"),
}


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
            problem = f"{folder} has records but no {MANIFEST_NAME}, so their settings are unknown; {WAY_OUT}"
        if problem and not overwrite:
            if is_new:
                path.unlink()
            raise ValueError(problem)
        if problem:
            _clear(folder)
        if problem or is_new:
            held.enter_context(replace_locked(path, json.dumps(asdict(manifest), indent=2) + "\n"))
        yield


def recorded_precision(out_dir: str | os.PathLike, default: str) -> str:
    """The precision in which a folder was begun, with a line if it is not `default`; `default` if the folder is new."""
    try:
        manifest = load_manifest(out_dir)
    # No folder, or a damaged manifest: `settle_manifest` rejects that.
    except (OSError, ValueError):
        return default
    if manifest.get("precision") == default:
        return default
    precision = manifest.get("precision", DEFAULT_PRECISION)
    print(f"{out_dir} was begun with --precision {precision}, which is kept", flush=True)
    return precision


def _difference(folder: Path, manifest: Manifest) -> str:
    """The problem if the folder has another manifest, else "". A field that it lacks is not compared."""
    try:
        ours, theirs = asdict(manifest), load_manifest(folder)
    except ValueError as error:
        return str(error)
    # Folders without the field are older than fp16. What was given instead of the default is not known.
    if manifest.precision == "fp16":
        theirs.setdefault("precision", DEFAULT_PRECISION)
    differing = [key for key in ours if key in theirs and ours[key] != theirs[key]]
    changes = [f"{key} was {one_line(theirs[key])}, is now {one_line(ours[key])}" for key in differing]
    return f"{folder} was begun with other settings: {'; '.join(changes)}; {WAY_OUT}" if changes else ""


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
