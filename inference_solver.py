"""
Generation from a checkpoint: text to image, image to text, image to image, several turns.

    python inference_solver.py --model_path output/7B/epoch1 --prompt "Draw a cat." --size 768x512 --out cat.png
    python inference_solver.py --model_path output/7B/epoch1 --serve    # the same on a page in the browser
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data.hub import DEFAULT_VQGAN_DIR, VQGAN_HELP, find_vqgan_problems
from data.items.image_transform import crop_sizes, open_image
from data.items.item_processor import load_text_tokenizer
from data.items.vocab import IMAGE_SYMBOL
from data.whole_file import open_whole
from model.decoder.chameleon import grow_positions
from model.generation.decode_step import LeanForward
from model.generation.kv_cache import free_bytes, naming_shortage
from model.generation.loop import CUT_BY_NAN, SamplingOptions, fit_batch_size, generate_batch
from model.generation.progress import GenerationMeter, show_progress
from model.generation.requests import Answer, RequestCodec, check_image_symbols, describe_cuts, parse_size
from model.generation.serve import serve
from model.vqgan.vqgan import tf32_allowed
from model.weights.hf_folder import find_tokenizer, load_config, resolve_checkpoint
from model.weights.load import load_pretrained

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
# Of free memory; the rest is for what a forward needs.
CACHE_SHARE = 0.8

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
        self.model = load_pretrained(folder, DTYPES[precision], self.device, config)
        self.forward = LeanForward(self.model, self.vocab, compile_step)

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
        self,
        requests: Sequence[Mapping[str, Any]],
        max_gen_len: int,
        options: SamplingOptions,
        *,
        batch_size: int = 64,
        desc: str | None = None,
        on_progress: Callable[[GenerationMeter], None] | None = None,
    ) -> list[Answer]:
        """`generate_many` with all that is known of each answer.

        Without `desc`, `on_progress` is called after every forward; an error that it raises ends the generation.
        """
        prompts, sizes = self.encode_requests(requests)
        starts = [self.image_start(size) for size in sizes]
        lens = [len(prompt) + len(start) for prompt, start in zip(prompts, starts, strict=True)]
        num_bytes, dtype = int(CACHE_SHARE * free_bytes(self.device)), self.model.dtype
        batch_size = fit_batch_size(self.model.config, lens, max_gen_len, options, dtype, num_bytes, batch_size)
        advice = f"make --max_gen_len ({max_gen_len}), --size or the number of answers ({len(requests)}) smaller"
        with naming_shortage(advice), tf32_allowed(self.allow_tf32):
            with show_progress(desc) if desc else nullcontext(on_progress) as show:
                report = GenerationMeter(sizes, batch_size, max_gen_len, show).update
                arguments = (self.model, prompts, self.vocab, options, max_gen_len, starts, batch_size, report)
                generations = generate_batch(*arguments, forward=self.forward)
            answers = self.decode(generations)
        if cuts := describe_cuts(answers, max_gen_len):
            logger.warning("%s", cuts)
        return answers


def choose_device(device: str) -> torch.device:
    """The device of "auto", "cuda" or "cpu". Raises ValueError for CUDA where there is none."""
    if device != "cpu" and not torch.cuda.is_available():
        if device != "auto":
            raise ValueError(f"the device {device} is not here: PyTorch sees no CUDA. Use cpu (or auto).")
        logger.warning("torch sees no CUDA GPU: generating on the CPU")
        device = "cpu"
    return torch.device("cuda" if device == "auto" else device)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Generate text and images from a checkpoint.")
    add = parser.add_argument
    add("--prompt", help=f"the request; {IMAGE_SYMBOL} marks where images stand (default: first)")
    add("--image", nargs="+", action="extend", type=Path, default=[], help="images of the prompt, in order")
    add("--size", help="WIDTHxHEIGHT in pixels of an image to draw first (default: the model decides)")
    add("--out", type=Path, help="PNG to write; further images get -2, -3, ... (default: images are not kept)")
    add("--serve", action="store_true", help="open a page in the browser instead; it begins with the values below")
    add("--host", default="127.0.0.1", help="address of the page, which has no password (default: %(default)s)")
    add("--port", type=int, default=7860, help="port of the page, 0 for any free one (default: %(default)s)")
    add("--model_path", required=True, help="checkpoint folder or hub id")
    add("--tokenizer", help="tokenizer folder or hub id (default: that of the checkpoint, else the recipe's)")
    add("--vqgan_dir", type=Path, default=DEFAULT_VQGAN_DIR, help=VQGAN_HELP)
    add("--any_vqgan", action="store_true", help="accept another VQGAN than the checkpoint names (default: off)")
    add("--max_positions", type=int, default=0, help="least positions of the model (default: the checkpoint's)")
    add("--target_size", type=int, default=512, help="size in pixels that images of the prompt get (default: 512)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute (default: %(default)s)")
    add("--precision", choices=tuple(DTYPES), default="bf16", help="precision of the model (default: %(default)s)")
    add("--max_gen_len", type=int, default=8192, help="most new tokens (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="sampling temperature, 0 is greedy (default: %(default)s)")
    add("--cfg", type=float, default=3.0, help="guidance inside images, 1 switches it off (default: %(default)s)")
    add("--image_top_k", type=int, default=2000, help="most probable codes drawn from (default: %(default)s)")
    add("--text_top_k", type=int, default=10, help="most probable text tokens drawn from (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed; the same one gives the same answer (default: %(default)s)")
    add("--compile", action="store_true", help="fuse the small operations of a token, which takes a minute; for CUDA")
    return parser


def find_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the arguments, as far as it shows before a model is loaded; one sentence each."""
    checks: list[tuple[str, Callable[[], Any]]] = [
        ("", lambda: build_options(args)),
        ("--target_size: ", lambda: crop_sizes(args.target_size)),
        ("--size: ", lambda: args.size and parse_size(args.size)),
        ("--prompt, --image: ", lambda: check_image_symbols([args.prompt], len(args.image))),
        *(("--image: ", lambda path=path: open_image(path)) for path in args.image),
    ]
    problems = []
    for flag, check in checks:
        try:
            check()
        except ValueError as error:
            problems.append(f"{flag}{error}")
    if args.max_gen_len < 1:
        problems.append(f"--max_gen_len is {args.max_gen_len}; it must be at least 1")
    if args.image or args.size or args.out or args.serve:
        problems += find_vqgan_problems(args.vqgan_dir)
    if args.serve:
        given = [flag for flag in ("prompt", "image", "size", "out") if getattr(args, flag)]
        problems += [f"--{flag} is asked for on the page; leave it out with --serve" for flag in given]
        return problems
    if args.prompt is None:
        problems.append("--prompt is missing: say what to draw or to answer (or open a page with --serve)")
    if args.out and (args.out.is_dir() or args.out.suffix.lower() != ".png"):
        problems.append(f"--out {args.out} must be a file that ends in .png")
    if args.size and not args.out:
        problems.append("--size draws an image: add --out FILE.png, where to write the image")
    if args.out and not (args.out.parent.is_dir() and os.access(args.out.parent, os.W_OK | os.X_OK)):
        problems.append(f"--out {args.out}: the folder {args.out.parent} is not there or cannot be written")
    return problems


def build_options(args: argparse.Namespace) -> SamplingOptions:
    return SamplingOptions(args.temperature, args.image_top_k, args.text_top_k, args.cfg, args.seed)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")
    try:
        if problems := find_problems(args):
            raise ValueError("\n".join(problems))
        if not args.serve:
            return answer_once(build_solver(args), args)
        serve(lambda: build_solver(args), build_options(args), args.max_gen_len, args.host, args.port, args.model_path)
        return 0
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        print(f"inference_solver.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("inference_solver.py: interrupted", file=sys.stderr)
        return 130


def build_solver(args: argparse.Namespace) -> FlexARInferenceSolver:
    """The solver of the command line; a VQGAN that is needed is loaded and checked."""
    more = dict(tokenizer=args.tokenizer, vqgan_dir=args.vqgan_dir, any_vqgan=args.any_vqgan, device=args.device)
    more |= dict(compile_step=args.compile, max_positions=args.max_positions)
    solver = FlexARInferenceSolver(args.model_path, args.precision, args.target_size, **more)
    if args.image or args.out or args.serve:
        solver.check_vqgan(with_decoder=args.out is not None or args.serve)
    return solver


def answer_once(solver: FlexARInferenceSolver, args: argparse.Namespace) -> int:
    """One answer on the command line: its text on stdout, its images in files. Returns the exit code."""
    request = {"qas": [[args.prompt, None]], "images": args.image, "size": args.size and parse_size(args.size)}
    answer = solver.answer_many([request], args.max_gen_len, build_options(args), desc="generating")[0]
    print(answer.text)
    if args.out is None and answer.images:
        print(f"{len(answer.images)} images were drawn and not kept; give --out to keep them.", file=sys.stderr)
    if args.out is not None and not answer.images:
        advice = "" if answer.is_cut_off else "; --size makes it draw one"
        print(f"inference_solver.py: no complete image in the answer, so no {args.out}{advice}.", file=sys.stderr)
        return 3
    for number, image in enumerate(answer.images if args.out else (), start=1):
        path = args.out if number == 1 else args.out.with_stem(f"{args.out.stem}-{number}")
        with open_whole(path) as file:
            image.save(file, format="PNG")
        print(path, file=sys.stderr)
    return 3 if answer.cut_by == CUT_BY_NAN else 0


if __name__ == "__main__":
    sys.exit(main())
