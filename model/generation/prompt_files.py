"""Many prompts from a file or a folder, for `inference_solver.py --prompts`.

A text file has one prompt per line. A .jsonl file has one object per line, such as GenEval's
evaluation_metadata.jsonl; only `prompt` is needed. A folder has one prompt per .txt file, as DPG-Bench's:

    {"prompt": "a red cat", "image": "cat.png", "size": "512x512", "seed": 3, "id": "cat"}
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.items.vocab import GRID_PIXELS
from data.messages import MAX_VALUE, brief, one_line
from model.generation.requests import check_image_symbols, has_surrogates, parse_size
from model.generation.sampling import MAX_SEED

# The words of the recipe's training data.
TEMPLATE = "Generate an image of {width}x{height} according to the following prompt:\n{text}"
TEMPLATE_START = "Generate an image"
# Wrong lines that a message names.
MAX_PROBLEMS = 5


@dataclass(frozen=True)
class Prompt:
    """
    One prompt of many.

    Attributes:
        text: what the model gets.
        name: the `id` of a line, the stem of a .txt file, else its place with five digits.
        source: the input as one JSON object.
        images: paths of the images of the prompt.
        size: (width, height) in pixels of the image that the answer must begin with.
        seed: of its first answer, if the line has one.
    """

    text: str
    name: str
    source: str
    images: tuple[Path, ...] = ()
    size: tuple[int, int] | None = None
    seed: int | None = None


def read_prompts(path: Path, size: tuple[int, int] | None, has_template: bool) -> list[Prompt]:
    """
    The prompts of a file or folder, in its order.

    Args:
        path: a .jsonl or .json file is JSON lines, any other file is text.
        size: of prompts without a size of their own.
        has_template: put prompts without images that have a size into the recipe's words.

    Raises:
        ValueError: nothing in it, or wrong lines; the message names the first of them.
        OSError: it cannot be read.
    """
    prompts: list[Prompt] = []
    problems = []
    for where, raw, entry in _read_entries(path):
        try:
            prompts.append(_parse(raw, entry, f"{len(prompts):05}", path, size, has_template))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if len(problems) > MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = [f"and {len(problems) - MAX_PROBLEMS} more like these"]
    if problems:
        raise ValueError("\n".join(problems))
    if not prompts:
        form = "*.txt files with a prompt each" if path.is_dir() else "a prompt on each line"
        raise ValueError(f"{path} has no prompts; it must have {form}")
    return prompts


def answer_seed(prompt: Prompt, place: int, number: int, seed: int) -> int:
    """The seed of answer `number` to the prompt at `place`: the same on any number of ranks."""
    if prompt.seed is not None:
        return (prompt.seed + number) & MAX_SEED
    digest = hashlib.sha256(f"{seed} {place} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & MAX_SEED


def _read_entries(path: Path) -> Iterator[tuple[str, str, Any]]:
    """(where it is, the input as it is, JSON object or text) of every prompt; blank lines are none."""
    if path.is_dir():
        # DPG-Bench's names are numbers and words: any fixed order will do.
        for file in sorted(path.glob("*.txt")):
            text = _read_text(file).strip()
            yield str(file), json.dumps({"prompt": text, "id": file.stem}), {"prompt": text, "id": file.stem}
        return
    is_json = path.suffix.lower() in (".jsonl", ".json")
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        line = line.strip()
        if not line:
            continue
        try:
            entry = json.loads(line) if is_json else {"prompt": line}
        except (ValueError, RecursionError) as error:
            entry = ValueError(f"no JSON ({one_line(error)}): {brief(line)}")
        yield f"line {number} of {path}", line if is_json else json.dumps(entry), entry


def _read_text(path: Path) -> str:
    try:
        # Editors on Windows put a mark before the first character.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8 (byte {error.start}); convert it to UTF-8 first") from None


def _parse(raw: str, entry: Any, name: str, path: Path, size: tuple[int, int] | None, has_template: bool) -> Prompt:
    if isinstance(entry, ValueError):
        raise entry
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise ValueError(f"it must be an object with a text `prompt`, got {brief(raw)}")
    text, seed, folder = entry["prompt"], entry.get("seed"), path if path.is_dir() else path.parent
    images = _find_images(entry.get("image"), folder)
    check_image_symbols([text], len(images))
    if entry.get("size") is not None:
        size = parse_size(entry["size"] if isinstance(entry["size"], str) else brief(entry["size"]))
    if size and any(side % GRID_PIXELS for side in size):
        shown = one_line(f"{size[0]}x{size[1]}", MAX_VALUE)
        raise ValueError(f"the size {shown} must be in multiples of {GRID_PIXELS} pixels")
    if seed is not None and not (type(seed) is int and 0 <= seed <= MAX_SEED):
        raise ValueError(f"`seed` must be a whole number from 0 to {MAX_SEED}, got {brief(seed)}")
    if entry.get("id") is not None:
        name = entry["id"]
    if not isinstance(name, str | int) or has_surrogates(str(name)):
        raise ValueError(f"`id` must be a text or a number, in valid UTF-8, got {brief(name)}")
    if has_template and size and not images and not text.startswith(TEMPLATE_START):
        text = TEMPLATE.format(width=size[0], height=size[1], text=text)
    return Prompt(text, str(name), raw, images, size, seed)


def _find_images(raw: Any, folder: Path) -> tuple[Path, ...]:
    """Paths beside the file of prompts, else in the working directory."""
    names = [raw] if isinstance(raw, str) else [] if raw is None else raw
    if not (isinstance(names, list) and all(isinstance(n, str) and n and not has_surrogates(n) for n in names)):
        raise ValueError(f"`image` must be a path or a list of paths, got {brief(raw)}")
    # `Path.is_file` raises an error for a name that is too long.
    paths = [next((path for path in (folder / name, Path(name)) if os.path.isfile(path)), None) for name in names]
    if None in paths:
        missing = names[paths.index(None)]
        raise ValueError(f"image {brief(missing)} is not there, neither in {folder} nor in the working directory")
    return tuple(paths)
