"""Samples of a training: answers to a few prompts with the current weights, at intervals and at the end.

All ranks run the same forwards of the sharded model. Rank 0 decodes, writes `samples/` and sends the images to the
trackers. In fp32 the answers are those of `inference_solver.py` on the checkpoint of the step, with seed 0. Training
does not change: each of its steps seeds its own dropout, and sampling has generators of its own.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from data.hub import find_vqgan_problems
from data.items.image_transform import crop_to_rgb, open_image
from data.items.vocab import IMAGE_SYMBOL, ChameleonVocab
from model.decoder.chameleon import ChameleonXLLMXConfig
from model.generation.decode_step import RootForward
from model.generation.kv_cache import free_bytes
from model.generation.loop import Generation, fit_batch_size, generate_batch
from model.generation.requests import Answer, RequestCodec, describe_cuts
from model.run.bad_data import RunError
from model.run.checks import Setup
from model.run.sample_prompts import SamplePrompt, load_prompts
from model.run.samples_format import drop_samples_after, write_samples
from model.training.distributed import barrier, broadcast_from_main, from_main, gather_over_ranks
from model.training.parallelize import DTYPES, evaluating

# Prompts at a time, where memory allows.
MAX_BATCH = 16
# Share of free memory that gathered weights may take; the rest is for the cache of keys and values.
GATHERED_SHARE = 0.6

LogImages = Callable[[int, dict[str, Sequence[Image.Image]]], None]


class Sampler:
    """Answers the prompts of a run; built and called by all ranks at once."""

    def __init__(self, setup: Setup, config: ChameleonXLLMXConfig, tokenizer: Any, resume_step: int) -> None:
        """Encodes the prompts and removes samples of steps after `resume_step`. Raises RunError, on all ranks."""
        self._setup, self._options, self._config = setup, setup.options.samples, config
        self._device, self._dtype = setup.device, DTYPES[setup.options.parallel.precision]
        self._vocab, self._sampling = ChameleonVocab.from_tokenizer(tokenizer), self._options.build_sampling()
        self._prompts: list[SamplePrompt] = []
        encoded, problem = ([], []), None
        if setup.launch.is_main:
            try:
                self._prompts = load_prompts(self._options.sample_prompts)
                encoded = self._encode_prompts(tokenizer)
                drop_samples_after(setup.options.checkpoint.output_dir, resume_step)
            except (ValueError, OSError) as error:
                problem = f"--sample_interval: {error}"
        (self._contexts, self._starts), problem = from_main((encoded, problem))
        if problem is not None:
            raise RunError(problem, exit_code=2)

    def _encode_prompts(self, tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of the prompts, and token ids with which the answers begin; loads the VQGAN where there is one."""
        options, size = self._options, self._options.target_size
        expected = None if options.any_vqgan else self._config.codebook_sha256
        self._codec = RequestCodec(tokenizer, options.vqgan_dir, torch.device("cpu"), size, expected)
        self._has_vqgan = not find_vqgan_problems(options.vqgan_dir)
        if self._has_vqgan:
            self._codec.check_vqgan()
            self._codec.vqgan.to(self._device)
        self._given = {
            index: [crop_to_rgb(open_image(path), size) for path in prompt.images]
            for index, prompt in enumerate(self._prompts)
        }
        contexts = [self._codec.encode_request(prompt.qas, prompt.images) for prompt in self._prompts]
        if self._has_vqgan:
            self._codec.vqgan.to("cpu")
        starts = [self._codec.image_start(prompt.size) for prompt in self._prompts]
        most = self._config.max_position_embeddings
        for index, (context, start) in enumerate(zip(contexts, starts, strict=True)):
            if len(context) + len(start) >= most:
                raise ValueError(
                    f"entry {index} of {options.sample_prompts} has {len(context) + len(start)} tokens, which leaves "
                    f"no room in the {most} positions of the model; shorten the entry, lower --target_size or raise "
                    "--max_seq_len"
                )
        return contexts, starts

    def run(self, model: nn.Module, step: int, log_images: LogImages | None = None) -> None:
        """Answers the prompts after `step` optimizer steps with a sharded model, which is not changed.

        What cannot be decoded or written is reported and raises nothing. `log_images` takes (step, images by name).
        """
        started = time.perf_counter()
        keep_gathered, batch_size = self._fit_memory(model)
        forward = RootForward(model, self._vocab, self._device, self._dtype, agree=broadcast_from_main)
        lengths = self._options.sample_max_gen_len, self._starts, batch_size
        with evaluating(model, self._setup.options.parallel, keep_gathered):
            generations = generate_batch(model, self._contexts, self._vocab, self._sampling, *lengths, forward=forward)
        if self._setup.launch.is_main:
            try:
                note = self._keep(generations, step, log_images)
                self._setup.say(f"samples of step {step} in {time.perf_counter() - started:.1f} s{note}")
            except (OSError, ValueError, RuntimeError) as error:
                # Too little disk or memory for samples is no reason to end the training.
                self._setup.say(f"no samples of step {step}, training continues: {type(error).__name__}: {error}")
        # No rank starts a step, and its clock, while rank 0 still decodes.
        barrier()

    def _fit_memory(self, model: nn.Module) -> tuple[bool, int]:
        """(whether all weights can stay gathered between tokens, prompts at a time), for the GPU with least memory."""
        if self._device.type != "cuda":
            return True, MAX_BATCH
        free = int(gather_over_ranks(torch.tensor([free_bytes(self._device)])).min())
        gathered = self._dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
        keep_gathered = gathered <= GATHERED_SHARE * free
        left = free - (gathered if keep_gathered else 0)
        lens = [len(context) + len(start) for context, start in zip(self._contexts, self._starts, strict=True)]
        batch_size = fit_batch_size(
            self._config, lens, self._options.sample_max_gen_len, self._sampling, self._dtype, left // 2, MAX_BATCH
        )
        return keep_gathered, batch_size

    def _keep(self, generations: Sequence[Generation], step: int, log_images: LogImages | None) -> str:
        """Decodes, writes and logs the answers; returns what is missing or cut off, for the message."""
        answers, note = self._decode(generations), ""
        texts = [answer.text.replace(IMAGE_SYMBOL, "").strip() for answer in answers]
        entries = [
            (prompt.text, text, answer.images)
            for prompt, text, answer in zip(self._prompts, texts, answers, strict=True)
        ]
        write_samples(self._setup.options.checkpoint.output_dir, step, entries, self._given)
        named = {f"samples/{index:03d}": answer.images for index, answer in enumerate(answers) if answer.images}
        if log_images is not None and named:
            log_images(step, named)
        num_lost = sum(answer.text.count(IMAGE_SYMBOL) - len(answer.images) for answer in answers)
        if num_lost:
            note += f"; images that are missing for want of --vqgan_dir {self._options.vqgan_dir}: {num_lost}"
        if any(answer.cut_by for answer in answers):
            note += f"; {describe_cuts(answers, self._options.sample_max_gen_len)}"
        return note

    def _decode(self, generations: Sequence[Generation]) -> list[Answer]:
        if not self._has_vqgan:
            return self._codec.decode(generations, with_images=False)
        # On the device only while it decodes: training needs the memory.
        self._codec.vqgan.to(self._device)
        try:
            return self._codec.decode(generations)
        finally:
            self._codec.vqgan.to("cpu")
