"""Samples of a run by step: `output_dir/samples/step{STEP}/samples.json` and the pictures that it names. Owner of both.

`samples.json` is a list of `{"prompt", "text", "files", "given"}` in the order of the prompts: `text` is the answer
without its pictures, `files` are names of PNG files beside it, none or more; `given` are those of the prompt's own
pictures, as the model saw them. A step's folder is whole or absent. `model/report.py` shows them.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data.whole_file import sync_path

SAMPLES_DIR_NAME = "samples"
SAMPLES_NAME = "samples.json"
_FOLDER = re.compile(r"step(\d+)")


@dataclass(frozen=True)
class Sample:
    """What the model answered to a prompt; `image_paths` are PNG files, `given_paths` those of the prompt."""

    prompt: str
    text: str
    image_paths: tuple[Path, ...] = ()
    given_paths: tuple[Path, ...] = ()


@dataclass(frozen=True)
class SampleStep:
    """The samples after `step` optimizer steps."""

    step: int
    samples: tuple[Sample, ...]


def write_samples(
    output_dir: Path,
    step: int,
    samples: Iterable[tuple[str, str, Sequence[Image.Image]]],
    given: Mapping[int, Sequence[Image.Image]] | None = None,
) -> Path:
    """Writes the (prompt, text, images) after `step` and returns the folder; an older one of that step is replaced.

    `given`: the pictures of prompts that have some, by their place in `samples`.
    """
    parent = output_dir / SAMPLES_DIR_NAME
    final = parent / f"step{step:08d}"
    writing, replaced = (parent / f".{kind}-{final.name}" for kind in ("writing", "replaced"))
    for debris in (writing, replaced):
        shutil.rmtree(debris, ignore_errors=True)
    writing.mkdir(parents=True)
    entries = []
    for index, (prompt, text, images) in enumerate(samples):
        entry = {"prompt": prompt, "text": text}
        for key, mark, pictures in (("files", "", images), ("given", "given-", (given or {}).get(index, ()))):
            entry[key] = [f"{index:03d}-{mark}{number}.png" for number in range(len(pictures))]
            for name, picture in zip(entry[key], pictures, strict=True):
                picture.save(writing / name)
        entries.append(entry)
    (writing / SAMPLES_NAME).write_text(json.dumps(entries, indent=1) + "\n")
    for path in (*writing.iterdir(), writing):
        sync_path(path)
    if final.exists():
        final.rename(replaced)
    writing.rename(final)
    sync_path(parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def read_samples(output_dir: Path) -> list[SampleStep]:
    """All samples of a run, by step; none if there is no folder of them. Raises ValueError, with file and reason."""
    folders = (output_dir / SAMPLES_DIR_NAME).glob("step*")
    steps = {int(match[1]): folder for folder in folders if (match := _FOLDER.fullmatch(folder.name))}
    return [SampleStep(step, _read_folder(steps[step])) for step in sorted(steps)]


def drop_samples_after(output_dir: Path, step: int) -> None:
    """Removes the samples of later steps, which a run that goes on from `step` will take anew, and torn ones."""
    parent = output_dir / SAMPLES_DIR_NAME
    for folder in parent.glob("*"):
        match = _FOLDER.fullmatch(folder.name)
        if folder.name.startswith(".") or (match and int(match[1]) > step):
            shutil.rmtree(folder, ignore_errors=True)


def _read_folder(folder: Path) -> tuple[Sample, ...]:
    path = folder / SAMPLES_NAME
    try:
        entries = json.loads(path.read_text())
        samples = tuple(
            Sample(
                str(entry["prompt"]),
                str(entry["text"]),
                tuple(folder / name for name in entry["files"]),
                tuple(folder / name for name in entry.get("given", ())),
            )
            for entry in entries
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}; remove {folder} or write it again") from error
    for image_path in (path for sample in samples for path in (*sample.image_paths, *sample.given_paths)):
        if image_path.parent != folder or not image_path.is_file():
            raise ValueError(f"{path} names {image_path.name}, but {folder} holds no such file")
    return samples
