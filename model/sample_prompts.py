"""The file of prompts that a training answers now and then (`--sample_prompts`), read and checked.

A text file has one prompt per line. A JSON or YAML file is a list; an entry is a text, or an object with `prompt` (a
text) or `qas` (turns as `inference_solver.py` takes them: [question, answer] pairs, the last answer null), and where
wanted `image` or `images` (a path or a list of them, looked for beside the file and in the working directory) and
`size` (such as "768x512": the answer begins with a picture of that size).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.image_transform import open_image
from data.messages import one_line
from model.requests import check_image_symbols, parse_size

KEYS = ("prompt", "qas", "image", "images", "size")


@dataclass(frozen=True)
class SamplePrompt:
    """One request. `qas`: [question, answer] pairs, the last answer None or what the answer must begin with; `images`:
    those of its image symbols, in order; `size`: (width, height) in pixels of the picture to begin with."""

    qas: tuple[tuple[str, str | None], ...]
    images: tuple[Path, ...] = ()
    size: tuple[int, int] | None = None

    @property
    def text(self) -> str:
        """What is shown as the prompt: all turns, a line each."""
        return "\n".join(text for qa in self.qas for text in qa if text is not None)


def load_prompts(path: Path) -> list[SamplePrompt]:
    """The prompts of a file. Raises ValueError that names every entry that is wrong, or OSError."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors put a mark before the first character
        if path.suffix.lower() == ".json":
            entries = json.loads(text)
        elif path.suffix.lower() in (".yaml", ".yml"):
            entries = yaml.safe_load(text)
        else:
            entries = [line.strip() for line in text.splitlines() if line.strip()]
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read: {reason}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must be a list of prompts that is not empty, got {str(entries)[:60]!r}")
    prompts, problems = [], []
    for index, entry in enumerate(entries):
        try:
            prompts.append(_parse(entry, path.parent))
        except ValueError as error:
            problems.append(f"entry {index} of {path}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return prompts


def _parse(entry: Any, folder: Path) -> SamplePrompt:
    entry = {"prompt": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or ("prompt" in entry) == ("qas" in entry):
        raise ValueError(f"it must be a text or an object with either `prompt` or `qas`, got {str(entry)[:60]!r}")
    unknown = [one_line(key) for key in entry if key not in KEYS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is unknown; it may have {', '.join(KEYS)}")
    qas = _parse_turns([[entry["prompt"], None]] if "prompt" in entry else entry["qas"])
    images = _parse_images(entry.get("images", entry.get("image")), folder)
    check_image_symbols((text for qa in qas for text in qa), len(images))
    size = entry.get("size")
    return SamplePrompt(qas, images, parse_size(str(size)) if size is not None else None)


def _parse_turns(raw: Any) -> tuple[tuple[str, str | None], ...]:
    is_list = isinstance(raw, list) and raw and all(isinstance(qa, list) and len(qa) == 2 for qa in raw)
    if not is_list or not all(isinstance(text, str) for qa in raw for text in qa[: 1 if qa is raw[-1] else 2]):
        raise ValueError(f"turns must be [question, answer] pairs of texts, the last answer null, got {str(raw)[:60]}")
    if not isinstance(raw[-1][1], str | None):
        raise ValueError(f"the last answer must be null or the text it begins with, got {str(raw[-1][1])[:60]}")
    return tuple((question, answer) for question, answer in raw)


def _parse_images(raw: Any, folder: Path) -> tuple[Path, ...]:
    names: Sequence[Any] = [] if raw is None else [raw] if isinstance(raw, str) else raw
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"`image` must be a path or a list of paths, got {str(raw)[:60]!r}")
    paths = [next((path for path in (folder / name, Path(name)) if path.is_file()), folder / name) for name in names]
    for path in paths:
        open_image(path)  # an ItemError is a ValueError that says which and why
    return tuple(paths)
