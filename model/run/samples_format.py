"""Samples of a run on disk: `output_dir/samples/step{STEP}/samples.json` and the PNG files that it names.

model/run/samples.py writes them, model/report.py shows them. A step's folder appears atomically. `samples.json` is a
list in the order of the prompts; `files` are images of the answer, `given` those of the prompt as the model saw them:

    {"prompt": "a red cat", "text": "Here:", "files": ["000-0.png"], "given": []}
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data.whole_file import sync_path
from model.training.checkpoint import publish

SAMPLES_DIR_NAME = "samples"
SAMPLES_NAME = "samples.json"
_FOLDER = re.compile(r"step(\d+)")


@dataclass(frozen=True)
class Sample:
    """The answer to a prompt; `image_paths` are PNG files of the answer, `given_paths` those of the prompt."""

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
    """Writes the (prompt, text, images) after `step`, in place of older ones, and returns the folder.

    `given`: the images of prompts, by the index of the prompt in `samples`.
    """
    final = output_dir / SAMPLES_DIR_NAME / f"step{step:08d}"
    writing = final.with_name(f".writing-{final.name}")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    entries = []
    for index, (prompt, text, images) in enumerate(samples):
        entry = {"prompt": prompt, "text": text}
        for key, mark, drawn in (("files", "", images), ("given", "given-", (given or {}).get(index, ()))):
            entry[key] = [f"{index:03d}-{mark}{number}.png" for number in range(len(drawn))]
            for name, image in zip(entry[key], drawn, strict=True):
                image.save(writing / name)
        entries.append(entry)
    (writing / SAMPLES_NAME).write_text(json.dumps(entries, indent=1) + "\n")
    for path in (*writing.iterdir(), writing):
        sync_path(path)
    publish(writing, final)
    return final


def read_samples(output_dir: Path) -> list[SampleStep]:
    """All samples of a run, by step; none without a folder of them. Raises ValueError that names the file."""
    folders = (output_dir / SAMPLES_DIR_NAME).glob("step*")
    steps = {int(match[1]): folder for folder in folders if (match := _FOLDER.fullmatch(folder.name))}
    return [SampleStep(step, _read_folder(steps[step])) for step in sorted(steps)]


def drop_samples_after(output_dir: Path, step: int) -> None:
    """Removes samples of later steps, which a run that resumes at `step` writes again, and partial ones."""
    for folder in (output_dir / SAMPLES_DIR_NAME).glob("*"):
        match = _FOLDER.fullmatch(folder.name)
        if folder.name.startswith(".") or (match and int(match[1]) > step):
            shutil.rmtree(folder, ignore_errors=True)


def _read_folder(folder: Path) -> tuple[Sample, ...]:
    path = folder / SAMPLES_NAME
    try:
        samples = tuple(
            Sample(
                str(entry["prompt"]),
                str(entry["text"]),
                tuple(folder / name for name in entry["files"]),
                tuple(folder / name for name in entry.get("given", ())),
            )
            for entry in json.loads(path.read_text())
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}; remove {folder} or write it again") from error
    for image_path in (path for sample in samples for path in (*sample.image_paths, *sample.given_paths)):
        # A name with a folder in it would let a page show files from elsewhere.
        if image_path.parent != folder or not image_path.is_file():
            raise ValueError(f"{path} names {image_path.name}, but {folder} holds no such file")
    return samples
