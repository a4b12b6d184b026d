"""The recipe's inference solver, which users import from `inference_solver`."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from data.items.item_processor import load_text_tokenizer
from data.items.vocab import ChameleonVocab
from model.decoder.chameleon import (
    ChameleonXLLMXConfig,
    ChameleonXLLMXForConditionalGeneration,
    build_model,
    grow_positions,
)
from model.generation.decode_step import LeanForward, RootForward
from model.generation.kv_cache import free_bytes, naming_shortage
from model.generation.loop import SamplingOptions, fit_batch_size, generate_batch
from model.generation.progress import GenerationMeter, show_progress
from model.generation.requests import Answer, RequestCodec, describe_cuts
from model.vqgan.vqgan import tf32_allowed
from model.weights.hf_folder import find_tokenizer, load_config, resolve_checkpoint
from model.weights.load import load_pretrained

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
# Of free memory; the rest is for what a forward needs.
CACHE_SHARE = 0.8
# Of the free memory of a GPU; a model whose weights need more is spread over several.
WEIGHTS_SHARE = 0.9
# With less free memory than this the cache is given back before images are decoded.
DECODING_BYTES = 4 << 30

logger = logging.getLogger(__name__)


class FlexARInferenceSolver(RequestCodec):
    """A model, its tokenizer and its VQGAN, with the recipe's interface."""

    def __init__(
        self,
        model_path: str,
        precision: str = "bf16",
        target_size: int = 512,
        *,
        tokenizer: str | None = None,
        vqgan_dir: str | Path | None = None,
        any_vqgan: bool = False,
        device: str = "auto",
        compile_step: bool = False,
        max_positions: int = 0,
        may_spread: bool = True,
    ):
        """
        Args:
            model_path: checkpoint folder or hub id, of either shape.
            precision: "bf16", "fp16", "tf32" or "fp32", of weights and arithmetic; the VQGAN is always in fp32.
            target_size: of images put in, in pixels: they are cropped to about its square, as in pre-tokenizing.
            tokenizer: folder or hub id; by default that of the checkpoint, or where it has none the recipe's.
            vqgan_dir: folder or hub id, needed once an image is put in or comes out.
            any_vqgan: accept another one than the checkpoint names.
            device: "auto" (CUDA where there is one), "cuda", "cpu".
            compile_step: fuse the small operations of a token with `torch.compile`, which takes a minute at first.
            max_positions: least positions of the model, e.g. the --max_seq_len of its training.
            may_spread: a model that does not fit one GPU has its layers on all of them, which is slower: no graphs.
        """
        if precision not in DTYPES:
            raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(DTYPES)}")
        self.allow_tf32 = precision == "tf32"
        folder = resolve_checkpoint(model_path)
        config, tokenizer = load_config(folder, mask_image_logits=False), tokenizer or find_tokenizer(folder)
        grow_positions(config, max_positions)
        codebook_sha256 = None if any_vqgan else config.codebook_sha256
        super().__init__(load_text_tokenizer(tokenizer), vqgan_dir, choose_device(device), target_size, codebook_sha256)
        if self.vocab.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer {tokenizer} has {self.vocab.vocab_size} ids, but the model {folder} "
                f"{config.vocab_size}: they do not belong together; give the tokenizer that it was trained with."
            )
        devices = choose_layer_devices(config, DTYPES[precision], self.device) if may_spread else [self.device]
        self.model = load_pretrained(folder, DTYPES[precision], self.device if len(devices) == 1 else "cpu", config)
        if len(devices) == 1:
            self.forward = LeanForward(self.model, self.vocab, compile_step)
        else:
            self.forward = spread_layers(self.model, self.vocab, devices)

    @staticmethod
    def create_logits_processor(cfg: float = 3.0, image_top_k: int = 2000, text_top_k: int = 10) -> SamplingOptions:
        """How tokens are drawn, with the recipe's defaults; for `generate` and `generate_many`."""
        return SamplingOptions(cfg=cfg, image_top_k=image_top_k, text_top_k=text_top_k)

    def generate(
        self,
        images: Sequence[Image.Image | str | Path] | Image.Image | str | Path,
        qas: Sequence[Sequence[str | None]],
        max_gen_len: int,
        temperature: float,
        logits_processor: SamplingOptions | None = None,
        *,
        size: tuple[int, int] | None = None,
        seed: int = 0,
    ) -> tuple[str, list[Image.Image]]:
        """
        (text, images) of one answer, as the recipe's solver gives it.

        Args:
            images: images or their paths, one per image symbol in `qas`; without any symbol they come first.
            qas: [question, answer] of every turn; the last answer is None, or the text it must begin with.
            max_gen_len: most new tokens.
            temperature: 0 is greedy.
            logits_processor: from `create_logits_processor`; None: its defaults.
            size: (width, height) in pixels of the image that the answer must begin with.
            seed: the same seed gives the same answer; for one among others see `generate_many`.
        """
        request = {"images": images, "qas": qas, "size": size}
        options = logits_processor or self.create_logits_processor()
        return self.generate_many([request], max_gen_len, temperature, options, seed=seed, desc=None)[0]

    def generate_many(
        self,
        requests: Sequence[Mapping[str, Any]],
        max_gen_len: int,
        temperature: float,
        logits_processor: SamplingOptions | None = None,
        *,
        seed: int = 0,
        batch_size: int = 64,
        desc: str | None = "generating",
    ) -> list[tuple[str, list[Image.Image]]]:
        """
        (text, images) of each of many requests, batched.

        A request is {"qas", "images" (optional), "size" (optional)}, as the arguments of `generate`; request i draws
        with the seed `seed` + i. Without a `logits_processor` there is no guidance. At most `batch_size` are drawn at a
        time, fewer where memory is short. In fp32 an answer is the same alone and among others; in tf32, bf16 and fp16
        it may differ: the last digits of logits depend on the number of rows. `desc` names the progress bar, if any.

        Raises ValueError for what cannot be used, torch.OutOfMemoryError if not even one answer has room.
        """
        options = replace(logits_processor or SamplingOptions(), temperature=temperature, seed=seed)
        answers = self.answer_many(requests, max_gen_len, options, batch_size=batch_size, desc=desc)
        return [(answer.text, answer.images) for answer in answers]

    def answer_many(
        self, requests: Sequence[Mapping[str, Any]], max_gen_len: int, options: SamplingOptions, **more: Any
    ) -> list[Answer]:
        """`generate_many` with all that is known of each answer; `more` as in `answer_prompts`."""
        answers = self.answer_prompts(*self.encode_requests(requests), max_gen_len, options, **more)
        if cuts := describe_cuts(answers, max_gen_len):
            logger.warning("%s", cuts)
        return answers

    def answer_prompts(
        self,
        prompts: Sequence[list[int]],
        sizes: Sequence[tuple[int, int] | None],
        max_gen_len: int,
        options: SamplingOptions,
        *,
        seeds: Sequence[int] | None = None,
        batch_size: int = 64,
        desc: str | None = None,
        on_progress: Callable[[GenerationMeter], None] | None = None,
        with_images: bool = True,
    ) -> list[Answer]:
        """
        Answers to encoded prompts; only `with_images` decodes the images in them.

        Without `desc`, `on_progress` is called after every forward, and may raise.
        """
        starts = [self.image_start(size) for size in sizes]
        batch_size = self.fit_batch_size(prompts, starts, max_gen_len, options, batch_size)
        advice = f"make --max_gen_len ({max_gen_len}), --size or the number of answers ({len(prompts)}) smaller"
        longest = [min(max_gen_len, self.vocab.num_image_tokens(*size)) if size else max_gen_len for size in sizes]
        meter = GenerationMeter(sum(longest), len(prompts), on_progress)
        try:
            with naming_shortage(advice), tf32_allowed(self.allow_tf32):
                with show_progress(desc, meter) if desc else nullcontext():
                    arguments = (self.model, prompts, self.vocab, options, max_gen_len, starts, batch_size)
                    more = {"forward": self.forward, "seeds": seeds}
                    generations = generate_batch(*arguments, meter.update, **more)
                if free_bytes(self.device) < DECODING_BYTES:
                    self.forward.kept_batch = None
                return self.decode(generations, with_images)
        except torch.OutOfMemoryError:
            # Fewer answers at a time need the memory.
            self.forward.kept_batch = None
            raise

    def fit_batch_size(
        self,
        prompts: Sequence[list[int]],
        starts: Sequence[list[int]],
        max_gen_len: int,
        options: SamplingOptions,
        most: int,
    ) -> int:
        """How many of these prompts at a time have room in memory, at most `most`."""
        lens = [len(prompt) + len(start) for prompt, start in zip(prompts, starts, strict=True)]
        kept = self.forward.kept_batch.cache.nbytes if self.forward.kept_batch else 0
        num_bytes = int(CACHE_SHARE * (free_bytes(self.device) + kept))
        return fit_batch_size(self.model.config, lens, max_gen_len, options, self.model.dtype, num_bytes, most)


def choose_layer_devices(config: ChameleonXLLMXConfig, dtype: torch.dtype, device: torch.device) -> list[torch.device]:
    """The devices for the layers of a model: the one of the rest where all fit, else all GPUs that it needs."""
    with torch.device("meta"):
        num_bytes = dtype.itemsize * sum(p.numel() for p in build_model(config).parameters())
    num_gpus = torch.cuda.device_count() if device.type == "cuda" else 1
    if num_gpus == 1 or num_bytes < WEIGHTS_SHARE * free_bytes(device):
        return [device]
    return [torch.device("cuda", index) for index in range(num_gpus)]


def spread_layers(
    model: ChameleonXLLMXForConditionalGeneration, vocab: ChameleonVocab, devices: Sequence[torch.device]
) -> RootForward:
    """Puts the layers in equal runs on several devices, the rest on the first; the forward of one token."""
    layers = model.model.layers
    placed = [devices[index * len(devices) // len(layers)] for index in range(len(layers))]
    for part in (model.model.embed_tokens, model.model.rotary_emb, model.model.norm, model.lm_head):
        part.to(devices[0])
    for layer, device in zip(layers, placed, strict=True):
        layer.to(device).register_forward_pre_hook(partial(_move_inputs, device), with_kwargs=True)
    model.model.norm.register_forward_pre_hook(partial(_move_inputs, devices[0]), with_kwargs=True)
    return RootForward(model, vocab, devices[0], model.dtype, layer_devices=placed)


def _move_inputs(device: torch.device, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    def move(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(move, value))
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return move(args), {name: move(value) for name, value in kwargs.items()}


def choose_device(device: str) -> torch.device:
    """The device of "auto", "cuda" or "cpu". Raises ValueError for CUDA where there is none."""
    if device != "cpu" and not torch.cuda.is_available():
        if device != "auto":
            raise ValueError(f"the device {device} is not here: PyTorch sees no CUDA. Use cpu (or auto).")
        logger.warning("torch sees no CUDA GPU: generating on the CPU")
        device = "cpu"
    return torch.device("cuda" if device == "auto" else device)
