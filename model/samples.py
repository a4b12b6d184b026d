"""Samples of a training: answers to a few prompts by the weights as they are, at intervals and at the end.

All ranks run the same forwards of the sharded model on the same prompts, and draw what `inference_solver.py` draws from
a checkpoint of the same step with the same options and seed 0; rank 0 decodes, writes `samples/` and tells the
trackers. The training notices nothing: each of its steps seeds its own dropout, and noise has generators of its own.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from data.hub import DEFAULT_VQGAN_DIR, find_vqgan_problems
from data.image_transform import crop_sizes, crop_to_rgb, open_image
from data.vocab import IMAGE_SYMBOL, ChameleonVocab
from model.decoder.chameleon import ChameleonXLLMXConfig
from model.distributed import barrier, broadcast_from_main, from_main, gather_over_ranks
from model.generation import Generation, SamplingOptions, fit_batch_size, generate_batch
from model.kv_cache import free_bytes
from model.parallelize import DTYPES, ParallelOptions, evaluating
from model.requests import Answer, RequestCodec, describe_cuts
from model.root_forward import RootForward
from model.sample_prompts import SamplePrompt, load_prompts
from model.samples_format import drop_samples_after, write_samples

MAX_BATCH = 16  # prompts at a time, where memory allows
SEED = 0  # always: from step to step pictures differ by the weights alone


@dataclass(frozen=True)
class SampleOptions:
    """
    Which prompts are answered, when and how.

    Attributes:
        sample_interval: optimizer steps from one set of samples to the next; 0: none, also not at the end.
        sample_prompts: file of prompts, see model/sample_prompts.py.
        sample_cfg, sample_temperature: guidance inside pictures (1: none), and temperature (0: greedy).
        sample_max_gen_len: most new tokens of an answer.
        vqgan_dir: of pictures that go in or come out, folder or hub id.
        any_vqgan: take it also if the records name another one.
        target_size: of pictures that go in, in pixels, as in pre-tokenizing.
    """

    sample_interval: int = 0
    sample_prompts: Path | None = None
    sample_cfg: float = 3.0
    sample_temperature: float = 1.0
    sample_max_gen_len: int = 2400  # a picture of 768x768 has 2,356
    vqgan_dir: Path = Path(DEFAULT_VQGAN_DIR)
    any_vqgan: bool = False
    target_size: int = 512

    def is_due(self, step: int, is_finished: bool) -> bool:
        """Whether to sample after optimizer step `step`."""
        return self.sample_interval > 0 and (step % self.sample_interval == 0 or is_finished)

    def build_sampling(self) -> SamplingOptions:
        """How tokens are drawn, top-k as by default in `inference_solver.py`. Raises ValueError."""
        return SamplingOptions(temperature=self.sample_temperature, cfg=self.sample_cfg, seed=SEED)

    def problems(self, vocab: ChameleonVocab, mask_image_logits: bool) -> list[str]:
        """What is wrong with these options and the file of prompts, one sentence each."""
        if self.sample_interval <= 0:
            return [f"--sample_interval must not be negative, got {self.sample_interval}"] * (self.sample_interval < 0)
        found = []
        if mask_image_logits:
            found.append("--sample_interval cannot be used with --mask_image_logits, under which nothing is drawn")
        if self.sample_max_gen_len < 1:
            found.append(f"--sample_max_gen_len must be at least 1, got {self.sample_max_gen_len}")
        for flag, check in (
            ("--sample_cfg, --sample_temperature", self.build_sampling),
            ("--target_size", lambda: crop_sizes(self.target_size)),
        ):
            try:
                check()
            except ValueError as error:
                found.append(f"{flag}: {error}")
        if self.sample_prompts is None:
            return [*found, "--sample_interval needs a file of prompts: --sample_prompts"]
        try:
            prompts = load_prompts(self.sample_prompts)
            for prompt in prompts:
                self._check_size(prompt, vocab)
        except (ValueError, OSError) as error:
            return [*found, f"--sample_prompts: {error}"]
        if any(prompt.size or prompt.images for prompt in prompts):
            found += [f"{problem}; {self.sample_prompts} has images" for problem in find_vqgan_problems(self.vqgan_dir)]
        return found

    def _check_size(self, prompt: SamplePrompt, vocab: ChameleonVocab) -> None:
        if prompt.size is None:
            return
        vocab.check_image_size(*prompt.size)
        num_tokens = vocab.num_image_tokens(*prompt.size)
        if num_tokens > self.sample_max_gen_len:
            raise ValueError(
                f"a picture of {prompt.size[0]}x{prompt.size[1]} has {num_tokens} tokens, more than "
                f"--sample_max_gen_len {self.sample_max_gen_len}"
            )


class Sampler:
    """Answers the prompts of a run; built and run by all ranks."""

    def __init__(
        self,
        options: SampleOptions,
        parallel: ParallelOptions,
        config: ChameleonXLLMXConfig,
        tokenizer: Any,
        device: torch.device,
        output_dir: Path,
        resume_step: int,
        is_main: bool,
    ) -> None:
        """Goes on after `resume_step`: samples of later steps are removed. Raises ValueError, on all ranks."""
        self._options, self._parallel, self._config = options, parallel, config
        self._device, self._output_dir, self._is_main = device, output_dir, is_main
        self._vocab, self._sampling = ChameleonVocab.from_tokenizer(tokenizer), options.build_sampling()
        self._prompts: list[SamplePrompt] = []
        encoded, problem = [], None
        if is_main:
            try:
                self._prompts = load_prompts(options.sample_prompts)
                encoded = self._encode_prompts(tokenizer)
                drop_samples_after(output_dir, resume_step)
            except (ValueError, OSError) as error:
                problem = f"--sample_interval: {error}"
        encoded, problem = from_main((encoded, problem))
        if problem is not None:
            raise ValueError(problem)
        self._contexts, self._starts = encoded

    def _encode_prompts(self, tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of the prompts and of what their answers begin with; loads the VQGAN, if there is one."""
        expected = None if self._options.any_vqgan else self._config.codebook_sha256
        self._codec = RequestCodec(
            tokenizer, self._options.vqgan_dir, torch.device("cpu"), self._options.target_size, expected
        )
        self._has_vqgan = not find_vqgan_problems(self._options.vqgan_dir)
        if self._has_vqgan:
            self._codec.check_vqgan()
            self._codec.vqgan.to(self._device)
        size = self._options.target_size
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
                    f"entry {index} of {self._options.sample_prompts} has {len(context) + len(start)} tokens, which "
                    f"leaves no room in the model's {most} positions; make it shorter, --target_size smaller or "
                    "--max_seq_len larger"
                )
        return contexts, starts

    def run(
        self,
        model: nn.Module,
        step: int,
        say: Callable[[str], None],
        log_images: Callable[[int, dict[str, Sequence[Image.Image]]], None] | None = None,
    ) -> None:
        """
        Answers the prompts after `step` optimizer steps; what cannot be decoded or written is said, and no error.

        Args:
            model: sharded; it is in the end as it was.
            say: tells a line on rank 0.
            log_images: takes (step, pictures by name) on rank 0.
        """
        started = time.perf_counter()
        keep_gathered, batch_size = self._fit_memory(model)
        forward = RootForward(
            model, self._vocab, self._device, DTYPES[self._parallel.precision], agree=broadcast_from_main
        )
        with evaluating(model, self._parallel, keep_gathered):
            generations = generate_batch(
                model, self._contexts, self._vocab, self._sampling, self._options.sample_max_gen_len, self._starts,
                batch_size, forward=forward,
            )  # fmt: skip
        if self._is_main:
            try:
                note = self._keep(generations, step, log_images)
                say(f"samples of step {step} in {time.perf_counter() - started:.1f} s{note}")
            except (OSError, ValueError, RuntimeError) as error:  # too little disk or memory: no reason to end
                say(f"no samples of step {step}, training goes on: {type(error).__name__}: {error}")
        barrier()  # nobody begins a step, and its clock, while rank 0 still draws

    def _fit_memory(self, model: nn.Module) -> tuple[bool, int]:
        """(whether all weights can stay gathered between tokens, prompts at a time), as the tightest GPU allows."""
        if self._device.type != "cuda":
            return True, MAX_BATCH
        free = int(gather_over_ranks(torch.tensor([free_bytes(self._device)])).min())
        dtype = DTYPES[self._parallel.precision]
        gathered = dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
        keep_gathered = gathered <= 0.6 * free
        left = free - (gathered if keep_gathered else 0)
        lens = [len(context) + len(start) for context, start in zip(self._contexts, self._starts, strict=True)]
        batch_size = fit_batch_size(
            self._config, lens, self._options.sample_max_gen_len, self._sampling, dtype, left // 2, MAX_BATCH
        )
        return keep_gathered, batch_size

    def _keep(self, generations: Sequence[Generation], step: int, log_images: Callable | None) -> str:
        """Decodes, writes and logs answers; returns what else there is to say about them."""
        answers, note = self._decode(generations), ""
        texts = [answer.text.replace(IMAGE_SYMBOL, "").strip() for answer in answers]
        entries = [
            (prompt.text, text, answer.images)
            for prompt, text, answer in zip(self._prompts, texts, answers, strict=True)
        ]
        write_samples(self._output_dir, step, entries, self._given)
        if log_images is not None:
            named = {f"samples/{index:03d}": answer.images for index, answer in enumerate(answers) if answer.images}
            if named:
                log_images(step, named)
        num_lost = sum(answer.text.count(IMAGE_SYMBOL) - len(answer.images) for answer in answers)
        if num_lost:
            left_out = "1 picture is left out" if num_lost == 1 else f"{num_lost} pictures are left out"
            note += f"; {left_out}: there is no --vqgan_dir {self._options.vqgan_dir}"
        if any(answer.is_cut_off for answer in answers):
            note += f"; {describe_cuts(answers, self._options.sample_max_gen_len)}"
        return note

    def _decode(self, generations: Sequence[Generation]) -> list[Answer]:
        if not self._has_vqgan:
            return self._codec.decode(generations, with_images=False)
        # Beside the weights only for as long as it draws.
        self._codec.vqgan.to(self._device)
        try:
            return self._codec.decode(generations)
        finally:
            self._codec.vqgan.to("cpu")
