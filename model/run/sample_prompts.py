"""The options of samples, and the file of `--sample_prompts`: prompts that a training answers at intervals.

A text file has one prompt per line. A JSON or YAML file is a list of texts and of objects:

    [{"prompt": "a red cat", "size": "512x512"},
     {"prompt": "<|image|>Describe the image.", "image": "cat.png"},
     {"qas": [["a red cat", "Here:"], ["and a dog?", null]]}]
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.flags import flag
from data.hub import DEFAULT_VQGAN_DIR, find_vqgan_problems
from data.items.image_transform import crop_sizes, open_image
from data.items.vocab import ChameleonVocab
from data.messages import brief, one_line
from model.generation.requests import check_image_symbols, check_turns, parse_size
from model.generation.sampling import SamplingOptions

KEYS = ("prompt", "qas", "image", "images", "size")


@dataclass(frozen=True)
class SampleOptions:
    """Which prompts are answered during training, when and how."""

    sample_interval: int = flag(0, "optimizer steps between samples; 0: no samples", least=0)
    sample_prompts: Path | None = flag(None, "prompts: a JSON or YAML list, or a text file with one per line")
    sample_cfg: float = flag(3.0, "classifier-free guidance inside images; 1: none")
    sample_temperature: float = flag(1.0, "temperature of sampling; 0: greedy")
    sample_max_gen_len: int = flag(2400, "largest number of new tokens; an image of 768x768 has 2,356", least=1)
    vqgan_dir: Path = flag(Path(DEFAULT_VQGAN_DIR), "folder or hub id of the VQGAN for images in prompts and answers")
    any_vqgan: bool = flag(False, "sample with another VQGAN than that of the records, too")
    target_size: int = flag(512, "size of images in prompts in pixels, as in pre-tokenizing")

    def is_due(self, step: int, is_finished: bool) -> bool:
        """Whether to sample after optimizer step `step`."""
        return self.sample_interval > 0 and (step % self.sample_interval == 0 or is_finished)

    def build_sampling(self) -> SamplingOptions:
        """How tokens are drawn, with the top-k of `inference_solver.py`. Raises ValueError."""
        # The same seed in every step, so that images differ by the weights alone.
        return SamplingOptions(temperature=self.sample_temperature, cfg=self.sample_cfg, seed=0)

    def problems(self, vocab: ChameleonVocab, mask_image_logits: bool) -> list[str]:
        """What is wrong with these options and with the file of prompts, one sentence each."""
        if self.sample_interval <= 0:
            return []
        if self.sample_prompts is None:
            return ["--sample_interval needs a file of prompts: --sample_prompts"]
        if mask_image_logits:
            return ["--sample_interval needs logits of image tokens: leave --mask_image_logits out"]
        try:
            self.build_sampling()
            crop_sizes(self.target_size)
            prompts = load_prompts(self.sample_prompts)
            for width, height in {prompt.size for prompt in prompts} - {None}:
                vocab.check_image_size(width, height)
                num_tokens, most = vocab.num_image_tokens(width, height), self.sample_max_gen_len
                if num_tokens > most:
                    image = f"an image of {width}x{height} has {num_tokens} tokens"
                    raise ValueError(f"{image}, more than --sample_max_gen_len {most}")
        except (ValueError, OSError) as error:
            return [f"--sample_interval: {error}"]
        has_images = any(prompt.size or prompt.images for prompt in prompts)
        found = find_vqgan_problems(self.vqgan_dir) if has_images else []
        return [f"{problem}; {self.sample_prompts} has images" for problem in found]


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt: [question, answer] pairs, the paths of its images, and the size of the image to answer with.

    The last answer is None, or the text with which the new answer begins. `size` is (width, height) in pixels.
    """

    qas: tuple[tuple[str, str | None], ...]
    images: tuple[Path, ...] = ()
    size: tuple[int, int] | None = None

    @property
    def text(self) -> str:
        """All turns, one per line, as the prompt is shown."""
        return "\n".join(text for qa in self.qas for text in qa if text is not None)


def load_prompts(path: Path) -> list[SamplePrompt]:
    """The prompts of a file. Raises ValueError that names every wrong entry, or OSError."""
    try:
        # Editors on Windows put a mark before the first character.
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() in (".json", ".yaml", ".yml"):
            entries = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
        else:
            entries = [line.strip() for line in text.splitlines() if line.strip()]
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(' '.join(str(error).split()))}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must be a list of prompts that is not empty, got {brief(entries)}")
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
        raise ValueError(f"an entry must be a text or an object with either `prompt` or `qas`, got {brief(entry)}")
    unknown = [one_line(key) for key in entry if key not in KEYS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is unknown; an entry may have {', '.join(KEYS)}")
    qas = [[entry["prompt"], None]] if "prompt" in entry else entry["qas"]
    check_turns(qas)
    names = entry.get("images", entry.get("image")) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"`image` must be a path or a list of paths, got {brief(names)}")
    # Beside the file, else in the working directory.
    images = [next((path for path in (folder / name, Path(name)) if path.is_file()), folder / name) for name in names]
    for path in images:
        open_image(path)
    check_image_symbols((text for qa in qas for text in qa), len(images))
    size = parse_size(str(entry["size"])) if entry.get("size") is not None else None
    return SamplePrompt(tuple(map(tuple, qas)), tuple(images), size)
