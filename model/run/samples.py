"""Samples of a training: answers to a few prompts with the current weights, at intervals and at the end.

All ranks run the same forwards of the sharded model, rank 0 decodes and writes. In fp32 the answers are those of
`inference_solver.py` on the checkpoint of the step, with seed 0. Training does not change: each of its steps seeds its
own dropout, and sampling has generators of its own.

A step's folder `output_dir/samples/step{STEP}/` holds PNG files and `samples.json`, a list in the order of the prompts;
`files` are images of the answer, `given` those of the prompt as the model saw them:

    {"prompt": "a red cat", "text": "Here:", "files": ["000-0.png"], "given": []}
"""

import json
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from data.hub import find_vqgan_problems
from data.items.image_transform import crop_to_rgb, open_image
from data.items.vocab import IMAGE_SYMBOL
from data.whole_file import publish_folder
from model.decoder.chameleon import ChameleonXLLMXConfig
from model.generation.decode_step import RootForward
from model.generation.kv_cache import free_bytes
from model.generation.loop import Generation, fit_batch_size, generate_batch
from model.generation.requests import RequestCodec, describe_cuts
from model.run.bad_data import RunError
from model.run.checks import Setup
from model.run.sample_prompts import SamplePrompt, load_prompts
from model.training.distributed import barrier, broadcast_from_main, from_main, gather_over_ranks
from model.training.parallelize import DTYPES, evaluating

SAMPLES_DIR_NAME = "samples"
SAMPLES_NAME = "samples.json"
# Prompts at a time, where memory allows.
MAX_BATCH = 16
# Share of free memory that gathered weights may take; the rest is for the cache of keys and values.
GATHERED_SHARE = 0.6


class Sampler:
    """Answers the prompts of a run; built and called by all ranks at once."""

    def __init__(self, setup: Setup, config: ChameleonXLLMXConfig, tokenizer: Any, resume_step: int) -> None:
        """Encodes the prompts and removes samples of steps after `resume_step`. Raises RunError, on all ranks."""
        self._setup, self._options, self._config = setup, setup.options.samples, config
        self._device, self._dtype = setup.device, DTYPES[setup.options.parallel.precision]
        options, cpu = self._options, torch.device("cpu")
        expected = None if options.any_vqgan else config.codebook_sha256
        self._codec = RequestCodec(tokenizer, options.vqgan_dir, cpu, options.target_size, expected)
        self._has_vqgan = not find_vqgan_problems(options.vqgan_dir)
        self._prompts: list[SamplePrompt] = []
        encoded, problem = ([], []), None
        if setup.launch.is_main:
            try:
                self._prompts = load_prompts(options.sample_prompts)
                encoded = self._encode_prompts()
                drop_samples_after(setup.options.checkpoint.output_dir, resume_step)
            except (ValueError, OSError) as error:
                problem = f"--sample_interval: {error}"
        (self._contexts, self._starts), problem = from_main((encoded, problem))
        if problem is not None:
            raise RunError(problem, exit_code=2)

    def _encode_prompts(self) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of the prompts, and token ids with which the answers begin; loads the VQGAN where there is one."""
        codec, options, most = self._codec, self._options, self._config.max_position_embeddings
        if self._has_vqgan:
            codec.check_vqgan()
            codec.vqgan.to(self._device)
        self._given = [
            [crop_to_rgb(open_image(path), options.target_size) for path in prompt.images] for prompt in self._prompts
        ]
        contexts = [codec.encode_request(prompt.qas, prompt.images) for prompt in self._prompts]
        starts = [codec.image_start(prompt.size) for prompt in self._prompts]
        if self._has_vqgan:
            codec.vqgan.to("cpu")
        for index, (context, start) in enumerate(zip(contexts, starts, strict=True)):
            if len(context) + len(start) >= most:
                raise ValueError(
                    f"entry {index} of {options.sample_prompts} has {len(context) + len(start)} tokens, which leaves "
                    f"no room in the {most} positions of the model; shorten the entry, lower --target_size or raise "
                    "--max_seq_len"
                )
        return contexts, starts

    def run(self, model: nn.Module, step: int) -> dict[str, Image.Image]:
        """Answers the prompts after `step` optimizer steps with a sharded model, which is not changed.

        What cannot be decoded or written is reported and raises nothing. Returns the images by name, on rank 0.
        """
        started, images = time.perf_counter(), {}
        keep_gathered, batch_size = self._fit_memory(model)
        vocab, sampling = self._codec.vocab, self._options.build_sampling()
        forward = RootForward(model, vocab, self._device, self._dtype, agree=broadcast_from_main)
        lengths = self._options.sample_max_gen_len, self._starts, batch_size
        with evaluating(model, self._setup.options.parallel, keep_gathered):
            generations = generate_batch(model, self._contexts, vocab, sampling, *lengths, forward=forward)
        if self._setup.launch.is_main:
            try:
                images, note = self._keep(generations, step)
                self._setup.say(f"samples of step {step} in {time.perf_counter() - started:.1f} s{note}")
            except (OSError, ValueError, RuntimeError) as error:
                # Too little disk or memory for samples is no reason to end the training.
                self._setup.say(f"no samples of step {step}, training continues: {type(error).__name__}: {error}")
        # No rank starts a step, and its clock, while rank 0 still decodes.
        barrier()
        return images

    def _fit_memory(self, model: nn.Module) -> tuple[bool, int]:
        """(whether all weights can stay gathered between tokens, prompts at a time), for the GPU with least memory."""
        if self._device.type != "cuda":
            return True, MAX_BATCH
        free = int(gather_over_ranks(torch.tensor([free_bytes(self._device)])).min())
        gathered = self._dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
        keep_gathered = gathered <= GATHERED_SHARE * free
        left = free - (gathered if keep_gathered else 0)
        lens = [len(context) + len(start) for context, start in zip(self._contexts, self._starts, strict=True)]
        limits = self._options.sample_max_gen_len, self._options.build_sampling(), self._dtype, left // 2, MAX_BATCH
        return keep_gathered, fit_batch_size(self._config, lens, *limits)

    def _keep(self, generations: Sequence[Generation], step: int) -> tuple[dict[str, Image.Image], str]:
        """Decodes and writes the answers; returns (their images by name, what is missing or cut off)."""
        if self._has_vqgan:
            # On the device only while it decodes: training needs the memory.
            self._codec.vqgan.to(self._device)
        try:
            answers = self._codec.decode(generations, with_images=self._has_vqgan)
        finally:
            if self._has_vqgan:
                self._codec.vqgan.to("cpu")
        entries, named, num_lost, note = [], {}, 0, ""
        for index, (prompt, answer) in enumerate(zip(self._prompts, answers, strict=True)):
            entries.append((prompt.text, answer.text.replace(IMAGE_SYMBOL, "").strip(), answer.images))
            named |= {f"samples/{index:03d}/{number}": image for number, image in enumerate(answer.images)}
            num_lost += answer.text.count(IMAGE_SYMBOL) - len(answer.images)
        write_samples(self._setup.options.checkpoint.output_dir, step, entries, dict(enumerate(self._given)))
        if num_lost:
            note = f"; images that are missing for want of --vqgan_dir {self._options.vqgan_dir}: {num_lost}"
        if any(answer.cut_by for answer in answers):
            note += f"; {describe_cuts(answers, self._options.sample_max_gen_len)}"
        return named, note


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
    """Writes the (prompt, text, images) after `step` atomically, in place of older ones; returns the folder.

    `given`: the images of prompts, by the index of the prompt in `samples`.
    """
    final = output_dir / SAMPLES_DIR_NAME / f"step{step:08d}"
    writing = final.with_name(f".writing-{final.name}")
    for folder in (writing, final):
        shutil.rmtree(folder, ignore_errors=True)
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
    publish_folder(writing, final)
    return final


def read_samples(output_dir: Path) -> list[SampleStep]:
    """All samples of a run, by step; none without a folder of them. Raises ValueError that names the file."""
    return [SampleStep(step, _read_folder(folder)) for step, folder in sorted(_step_folders(output_dir).items())]


def drop_samples_after(output_dir: Path, step: int) -> None:
    """Removes samples of later steps, which a run that resumes at `step` writes again."""
    for found, folder in _step_folders(output_dir).items():
        if found > step:
            shutil.rmtree(folder)


def _step_folders(output_dir: Path) -> dict[int, Path]:
    folders = (output_dir / SAMPLES_DIR_NAME).glob("step*")
    return {int(match[1]): folder for folder in folders if (match := re.fullmatch(r"step(\d+)", folder.name))}


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
