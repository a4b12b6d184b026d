"""
Generation from a checkpoint: text to image, image to text, image to image, several turns.

    python inference_solver.py --model_path output/7B/epoch1 --prompt "Draw a cat." --size 768x512 --out cat.png
    python inference_solver.py --model_path output/7B/epoch1 --serve    # the same on a page in the browser

Where it stands: the end of the road. Conversations become token ids as in pre-tokenizing (`data/item_processor.py`),
`model/generation.py` continues them; `model/requests.py` is the way in and out of token ids, and decodes images by the
VQGAN's decoder half.
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data.hub import DEFAULT_VQGAN_DIR, VQGAN_HELP, find_vqgan_problems
from data.image_transform import crop_sizes, open_image
from data.item_processor import load_text_tokenizer
from data.vocab import IMAGE_SYMBOL
from model import serve
from model.convert import load_config, load_pretrained, resolve_checkpoint
from model.decoder.chameleon import grow_positions
from model.generation import (
    CUT_BY_LENGTH,
    CUT_BY_NAN,
    CUT_BY_POSITIONS,
    SamplingOptions,
    fit_batch_size,
    generate_batch,
)
from model.hf_folder import find_tokenizer
from model.kv_cache import free_bytes, naming_shortage
from model.progress import GenerationMeter, ProgressDisplay
from model.requests import (
    Answer,
    RequestCodec,
    check_image_symbols,
    check_request,
    check_size,
    describe_cuts,
    parse_size,
)
from model.sampling import MAX_SEED

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
CACHE_SHARE = 0.8  # of free memory; the rest is for what a forward needs

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
            any_vqgan: take it also if the checkpoint names another one.
            device: "auto" (CUDA where there is one), "cuda", "cpu".
            compile_step: fuse the small operations of a token with `torch.compile`, which takes a minute at first.
            max_positions: the model's positions are at least so many, e.g. the --max_seq_len of a training whose
                checkpoints kept fewer.
        """
        if precision not in DTYPES:
            raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(DTYPES)}.")
        device, self.compile_step, self.allow_tf32 = choose_device(device), compile_step, precision == "tf32"
        folder = resolve_checkpoint(model_path)
        config, tokenizer = load_config(folder, mask_image_logits=False), tokenizer or find_tokenizer(folder)
        grow_positions(config, max_positions)
        codebook_sha256 = None if any_vqgan else config.codebook_sha256
        super().__init__(load_text_tokenizer(tokenizer), vqgan_dir, device, target_size, codebook_sha256)
        if self.vocab.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer {tokenizer} has {self.vocab.vocab_size} ids, but the model {folder} "
                f"{config.vocab_size}: they do not belong together; give the tokenizer that it was trained with."
            )
        self.model = load_pretrained(folder, DTYPES[precision], self.device, config)

    @staticmethod
    def create_logits_processor(cfg: float = 3.0, image_top_k: int = 2000, text_top_k: int = 10) -> SamplingOptions:
        """How tokens are drawn, with the recipe's defaults; for `generate` and its kin."""
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
        One answer, as the recipe's solver gives it.

        Args:
            images: pictures or their paths, one per image symbol in `qas`; without any symbol they come first.
            qas: [question, answer] of every turn; the last answer is None, or the text it must begin with.
            max_gen_len: most new tokens.
            temperature: 0 is greedy.
            logits_processor: from `create_logits_processor`; None: its defaults.
            size: (width, height) in pixels of the image that the answer must begin with.
            seed: same seed, same answer; for one among others see `generate_many`.

        Returns:
            (text, images).
        """
        request = {"images": images, "qas": qas, "size": size}
        options = logits_processor or self.create_logits_processor()
        answer = self.answer_many([request], max_gen_len, replace(options, temperature=temperature, seed=seed))[0]
        return answer.text, answer.images

    def generate_many(
        self,
        requests: Sequence[Mapping[str, Any]],
        max_gen_len: int,
        temperature: float,
        logits_processor: SamplingOptions | None = None,
        *,
        seed: int = 0,
        batch_size: int = 64,
        desc: str | None = None,
    ) -> list[tuple[str, list[Image.Image]]]:
        """
        Answers to many requests, batched: (text, images) of each.

        A request is {"qas", "images" (optional), "size" (optional)}, as the arguments of `generate`; request i draws
        with the seed `seed` + i. Without a `logits_processor` there is no guidance. At most `batch_size` are drawn at a
        time, fewer where memory is short. `desc` names the progress bar.

        In fp32 an answer is the same alone and among others. In tf32, bf16 and fp16 it may differ: the last digits of
        logits depend on how many rows are computed at once.

        Raises:
            ValueError: a request, number or picture that cannot be used.
            torch.OutOfMemoryError: not even one answer has room.
        """
        options = replace(logits_processor or SamplingOptions(), temperature=temperature, seed=seed)
        answers = self.answer_many(requests, max_gen_len, options, batch_size=batch_size, desc=desc or "generating")
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

        Progress is shown on stderr under the name `desc`, or handed to `on_progress` after every forward; what that
        raises ends the generation.
        """
        _check_call(requests, max_gen_len, options, batch_size)
        torch.backends.cuda.matmul.allow_tf32 = self.allow_tf32  # of the process: another solver may have set it
        encoded: dict[int, list[int]] = {}
        for request in requests:  # the same request several times is encoded once
            if id(request) not in encoded:
                encoded[id(request)] = self.encode_request(request["qas"], request.get("images"))
        prompts = [encoded[id(request)] for request in requests]
        sizes = [check_size(request.get("size")) for request in requests]
        starts = [self.image_start(size) for size in sizes]
        batch_size = self._fit_memory(prompts, starts, max_gen_len, options, batch_size)
        advice = f"make --max_gen_len ({max_gen_len}), --size or the number of answers ({len(requests)}) smaller"
        with ProgressDisplay(desc) if desc else nullcontext() as display, naming_shortage(advice):
            meter = GenerationMeter(sizes, batch_size, max_gen_len, display.show if display else on_progress)
            generations = generate_batch(
                self.model, prompts, self.vocab, options, max_gen_len, starts, batch_size, meter.update,
                compile_step=self.compile_step,
            )  # fmt: skip
        with naming_shortage(advice):
            answers = self.decode(generations)
        if any(answer.is_cut_off for answer in answers):
            logger.warning("%s", describe_cuts(answers, max_gen_len))
        return answers

    def _fit_memory(
        self,
        prompts: Sequence[Sequence[int]],
        starts: Sequence[Sequence[int]],
        max_gen_len: int,
        options: SamplingOptions,
        most: int,
    ) -> int:
        """Answers at a time, from 1 to `most`, that the free memory of the device allows."""
        lens = [len(prompt) + len(start) for prompt, start in zip(prompts, starts, strict=True)]
        num_bytes = int(CACHE_SHARE * free_bytes(self.device))
        return fit_batch_size(self.model.config, lens, max_gen_len, options, self.model.dtype, num_bytes, most)


def _check_call(requests: Sequence[Any], max_gen_len: int, options: SamplingOptions, batch_size: int) -> None:
    """Raises ValueError with what is wrong with the arguments of `answer_many`."""
    for name, value in (("max_gen_len", max_gen_len), ("batch_size", batch_size)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 on")
    if options.seed + len(requests) - 1 > MAX_SEED:
        raise ValueError(f"the seeds go up to {options.seed + len(requests) - 1}; the last must be {MAX_SEED} at most")
    for index, request in enumerate(requests):
        try:
            check_request(request)
        except ValueError as error:
            raise ValueError(f"request {index}: {error}") from None


def choose_device(device: str) -> torch.device:
    """The device of "auto", "cuda" or "cpu". Raises ValueError for CUDA where there is none."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            logger.warning("torch sees no CUDA GPU: generating on the CPU")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"the device {device} is not here: PyTorch sees no CUDA. Use cpu (or auto).")
    return torch.device(device)


def size_argument(text: str) -> tuple[int, int]:
    """`parse_size` for argparse, which shows no other error's message."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Generate text and images from a checkpoint.")
    add = parser.add_argument
    # what to answer
    add("--prompt", help=f"what is asked; {IMAGE_SYMBOL} marks where images stand (default: first)")
    add("--image", nargs="+", action="extend", type=Path, default=[], help="pictures of the prompt, in order")
    add("--size", type=size_argument, help="draw a picture of WIDTHxHEIGHT pixels first (default: as the model likes)")
    add("--out", type=Path, help="PNG to write; further pictures get -2, -3, ... (default: pictures are not kept)")
    add("--serve", action="store_true", help="a page in the browser instead; the flags below are its first settings")
    add("--host", default="127.0.0.1", help="address of the page; any other than %(default)s has no password")
    add("--port", type=int, default=7860, help="of the page, 0 for any that is free (default: %(default)s)")
    # with what
    add("--model_path", required=True, help="checkpoint folder or hub id")
    add("--tokenizer", help="folder or hub id (default: that of the checkpoint, else the recipe's)")
    add("--vqgan_dir", type=Path, default=DEFAULT_VQGAN_DIR, help=VQGAN_HELP)
    add("--any_vqgan", action="store_true", help="take another VQGAN than the checkpoint's, too (default: off)")
    add("--max_positions", type=int, default=0, help="least positions of the model (default: as the checkpoint says)")
    add("--target_size", type=int, default=512, help="size in pixels of pictures put in (default: %(default)s)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    add("--precision", choices=tuple(DTYPES), default="bf16", help="of the model (default: %(default)s)")
    # how
    add("--max_gen_len", type=int, default=8192, help="most new tokens (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="0 is greedy (default: %(default)s)")
    add("--cfg", type=float, default=3.0, help="guidance inside pictures, 1 switches it off (default: %(default)s)")
    add("--image_top_k", type=int, default=2000, help="tokens drawn from inside pictures (default: %(default)s)")
    add("--text_top_k", type=int, default=10, help="tokens drawn from in text (default: %(default)s)")
    add("--seed", type=int, default=0, help="same seed, same answer (default: %(default)s)")
    add("--compile", action="store_true", help="fuse the small operations of a token (a minute at first; on CUDA)")
    return parser


def validate(args: argparse.Namespace) -> SamplingOptions:
    """Check all that can be checked before a model is loaded. Raises ValueError with every problem."""
    problems, options = [], None
    try:
        options = SamplingOptions(args.temperature, args.image_top_k, args.text_top_k, args.cfg, args.seed)
    except ValueError as error:
        problems.append(str(error))
    try:
        crop_sizes(args.target_size)
    except ValueError as error:
        problems.append(f"--target_size: {error}")
    if args.max_gen_len < 1:
        problems.append(f"--max_gen_len is {args.max_gen_len}; it must be at least 1")
    if args.image or args.size or args.out or args.serve:
        problems += find_vqgan_problems(args.vqgan_dir)
    problems += _serve_problems(args) if args.serve else _answer_problems(args)
    if problems:
        raise ValueError("\n".join(problems))
    return options


def _serve_problems(args: argparse.Namespace) -> list[str]:
    given = [flag for flag in ("prompt", "image", "size", "out") if getattr(args, flag)]
    problems = [f"--{flag} is asked for on the page; leave it out with --serve" for flag in given]
    if not 0 <= args.port < 2**16:
        problems.append(f"--port is {args.port}; it must be from 0 (any that is free) to 65535")
    return problems


def _answer_problems(args: argparse.Namespace) -> list[str]:
    problems = []
    for path in args.image:
        try:
            open_image(path)
        except ValueError as error:
            problems.append(f"--image: {error}")
    if args.prompt is None:
        problems.append("--prompt is missing: say what to draw or to answer (or open a page with --serve)")
    try:
        check_image_symbols([args.prompt], len(args.image))
    except ValueError as error:
        problems.append(f"--prompt, --image: {error}")
    if args.out:
        problems += _folder_problems(args.out)
    if args.out and args.out.is_dir():
        problems.append(f"--out {args.out} is a folder; give the name of a file in it")
    if args.out and args.out.suffix.lower() != ".png":
        problems.append(f"--out {args.out} must end in .png")
    if args.size and not args.out:
        problems.append("--size draws a picture, so say where to write it: --out")
    return problems


def _folder_problems(out_path: Path) -> list[str]:
    if not out_path.parent.is_dir():
        return [f"--out {out_path}: the folder {out_path.parent} does not exist"]
    try:
        with tempfile.TemporaryFile(dir=out_path.parent):
            return []
    except OSError as error:
        return [f"--out {out_path}: nothing can be written into {out_path.parent} ({error.strerror})"]


def save_images(images: Sequence[Image.Image], out_path: Path) -> list[Path]:
    """Write PNGs: `out_path`, then the same with -2, -3, ...; each appears whole."""
    paths = [out_path if i == 1 else out_path.with_stem(f"{out_path.stem}-{i}") for i in range(1, len(images) + 1)]
    for image, path in zip(images, paths, strict=True):
        partial = path.with_name(path.name + ".partial")
        image.save(partial, format="PNG")
        partial.replace(path)
    return paths


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")
    try:
        options = validate(args)
        if args.serve:
            serve.serve(
                lambda: build_solver(args), options, args.max_gen_len, args.host, args.port, title=args.model_path
            )
            return 0
        solver = build_solver(args)
        return answer_once(solver, args, options)
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        print(f"inference_solver.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("inference_solver.py: interrupted", file=sys.stderr)
        return 130


def build_solver(args: argparse.Namespace) -> FlexARInferenceSolver:
    """The solver of the command line; what is wrong with the VQGAN is told now if it is needed."""
    solver = FlexARInferenceSolver(
        args.model_path,
        args.precision,
        args.target_size,
        tokenizer=args.tokenizer,
        vqgan_dir=args.vqgan_dir,
        any_vqgan=args.any_vqgan,
        device=args.device,
        compile_step=args.compile,
        max_positions=args.max_positions,
    )
    if args.image or args.out or args.serve:
        solver.check_vqgan(with_decoder=args.out is not None or args.serve)
    return solver


def answer_once(solver: FlexARInferenceSolver, args: argparse.Namespace, options: SamplingOptions) -> int:
    """One answer on the command line: its text on stdout, its pictures in files. Returns the exit code."""
    request = {"qas": [[args.prompt, None]], "images": args.image, "size": args.size}
    answer = solver.answer_many([request], args.max_gen_len, options, desc="generating")[0]
    print(answer.text)
    code = 3 if answer.cut_by == CUT_BY_NAN else 0
    if args.out is None:
        if answer.images:
            print(f"{len(answer.images)} pictures were drawn and not kept; give --out to keep them.", file=sys.stderr)
        return code
    for path in save_images(answer.images, args.out):
        print(path, file=sys.stderr)
    if not answer.images:
        advice = {
            None: "--size makes it draw one",
            CUT_BY_LENGTH: "give a larger --max_gen_len",
            CUT_BY_POSITIONS: "make --prompt, --target_size or --size smaller, or give more --max_positions",
            CUT_BY_NAN: "give another --model_path or --precision (fp32, bf16)",
        }[answer.cut_by]
        print(f"inference_solver.py: no whole picture in the answer, so no {args.out}; {advice}.", file=sys.stderr)
        return 3
    return code


if __name__ == "__main__":
    sys.exit(main())
