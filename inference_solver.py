"""Generation from a checkpoint: text to image, image to text, image to image, several turns.

    python inference_solver.py --model_path output/7B/epoch1 --prompt "Draw a cat." --size 768x512 --out cat.png
    python inference_solver.py --model_path output/7B/epoch1 --serve    # the same on a page in the browser
    torchrun --nproc_per_node=8 inference_solver.py --model_path output/7B/epoch1 \\
      --prompts evaluation_metadata.jsonl --size 768x768 --out_dir output/geneval/images
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from data.hub import DEFAULT_VQGAN_DIR, VQGAN_HELP, find_vqgan, find_vqgan_problems
from data.items.image_transform import crop_sizes, open_image
from data.items.vocab import IMAGE_SYMBOL
from data.whole_file import open_whole
from model.generation.answer_folder import LAYOUTS, TEXT, AnswerFolder, draw_missing
from model.generation.loop import CUT_BY_NAN, SamplingOptions
from model.generation.prompt_files import read_prompts
from model.generation.requests import check_image_symbols, parse_size
from model.generation.serve import serve
from model.generation.solver import DTYPES, FlexARInferenceSolver
from model.pages.assets import render, write_page
from model.training.distributed import (
    Launch,
    barrier,
    detect_launch,
    end_process,
    from_main,
    process_group,
    stop_at_start,
)
from model.vqgan.vqgan import hash_vqgan
from model.weights.adapter_folder import fingerprint_weights
from model.weights.hf_folder import resolve_checkpoint

# Ranks with more or harder prompts than others are waited for.
RANK_TIMEOUT_S = 24 * 3600.0
# What else decides how an answer to one of --prompts looks.
FOLDER_SETTINGS = ("layout", "num_images", "seed", "temperature", "cfg", "image_top_k", "text_top_k", "max_gen_len")
FOLDER_SETTINGS += ("precision", "target_size", "speculative", "max_positions", "tokenizer")
# Flags that say nothing without --prompts.
PROMPTS_FLAGS = ("out_dir", "num_images", "layout", "no_prompt_template")

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Generate text and images from a checkpoint.")
    add = parser.add_argument
    add("--prompt", help=f"the request; {IMAGE_SYMBOL} marks where images stand (default: first)")
    add("--image", nargs="+", action="extend", type=Path, default=[], help="images of the prompt, in order")
    add("--size", help="WIDTHxHEIGHT in pixels of an image to draw first (default: the model decides)")
    add("--out", type=Path, help="PNG to write; further images get -2, -3, ... (default: images are not kept)")
    # Many prompts.
    add("--prompts", type=Path, help="text file, .jsonl file or folder of .txt files: answer all of these prompts")
    add("--out_dir", type=Path, help="folder of the answers to --prompts; a run that was killed continues there")
    add("--num_images", type=int, default=1, help="answers to each prompt of --prompts (default: %(default)s)")
    layouts = "images as GenEval or as DPG-Bench reads them, or texts"
    add("--layout", choices=LAYOUTS, default=LAYOUTS[0], help=f"files in --out_dir: {layouts} (default: %(default)s)")
    add("--no_prompt_template", action="store_true", help="prompts of --prompts with a size stay as they are")
    # A page in the browser.
    add("--serve", action="store_true", help="open a page in the browser instead; it begins with the values below")
    add("--host", default="127.0.0.1", help="address of the page, which has no password (default: %(default)s)")
    add("--port", type=int, default=7860, help="port of the page, 0 for any free one (default: %(default)s)")
    # The model.
    add("--model_path", required=True, help="checkpoint folder or hub id")
    add("--tokenizer", help="tokenizer folder or hub id (default: that of the checkpoint, else the recipe's)")
    add("--vqgan_dir", type=Path, default=DEFAULT_VQGAN_DIR, help=VQGAN_HELP)
    add("--any_vqgan", action="store_true", help="accept another VQGAN than the checkpoint names (default: off)")
    add("--max_positions", type=int, default=0, help="least positions of the model (default: the checkpoint's)")
    add("--target_size", type=int, default=512, help="size in pixels that images of the prompt get (default: 512)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute (default: %(default)s)")
    add("--precision", choices=tuple(DTYPES), default="bf16", help="precision of the model (default: %(default)s)")
    add("--compile", action="store_true", help="fuse the small operations of a token, which takes a minute; for CUDA")
    # Sampling.
    add("--max_gen_len", type=int, default=8192, help="most new tokens (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="sampling temperature, 0 is greedy (default: %(default)s)")
    add("--cfg", type=float, default=3.0, help="guidance inside images, 1 switches it off (default: %(default)s)")
    add("--image_top_k", type=int, default=2000, help="most probable codes drawn from (default: %(default)s)")
    add("--text_top_k", type=int, default=10, help="most probable text tokens drawn from (default: %(default)s)")
    ahead = "codes guessed ahead in each forward, 0 for none; every number but 0 draws the same image"
    add("--speculative", type=int, default=0, help=f"{ahead} (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed; the same one gives the same answer (default: %(default)s)")
    return parser


def find_problems(args: argparse.Namespace) -> tuple[list[str], AnswerFolder | None]:
    """What is wrong with the arguments, as far as it shows before a model is loaded, one sentence each.

    Also returns the folder of the answers to `--prompts`.
    """
    problems: list[str] = []

    def attempt(flag: str, check: Callable[[], Any]) -> Any:
        try:
            return check()
        except (ValueError, OSError) as error:
            problems.append(f"{flag}{error}")

    attempt("", lambda: build_options(args))
    attempt("--target_size: ", lambda: crop_sizes(args.target_size))
    attempt("--prompt, --image: ", lambda: check_image_symbols([args.prompt], len(args.image)))
    for path in args.image:
        attempt("--image: ", lambda path=path: open_image(path))
    size, folder = attempt("--size: ", lambda: args.size and parse_size(args.size)), None
    if args.prompts and args.out_dir and bool(size) == bool(args.size):
        folder = attempt("--prompts: ", lambda: build_folder(args, size or None))
    if args.max_gen_len < 1:
        problems.append(f"--max_gen_len is {args.max_gen_len}; it must be at least 1")
    if needs_vqgan(args, folder):
        problems += find_vqgan_problems(args.vqgan_dir)
    if not args.prompts:
        given = [flag for flag in PROMPTS_FLAGS if getattr(args, flag) != build_parser().get_default(flag)]
        problems += [f"--{flag} is for --prompts, which is not given" for flag in given]
    if args.serve or args.prompts:
        others = {"prompts", "prompt", "image", "size", "out"} if args.serve else {"prompt", "image", "out"}
        place = "is asked for on the page; leave it out with --serve" if args.serve else "is not for --prompts"
        problems += [f"--{flag} {place}" for flag in sorted(others) if getattr(args, flag)]
        if args.prompts and not args.out_dir:
            problems.append("--prompts needs --out_dir, the folder for the answers")
        return problems, folder
    if args.prompt is None:
        problems.append("--prompt is missing: say what to draw or to answer (or give --prompts, or --serve)")
    if args.out and (args.out.is_dir() or args.out.suffix.lower() != ".png"):
        problems.append(f"--out {args.out} must be a file that ends in .png")
    if args.size and not args.out:
        problems.append("--size draws an image: add --out FILE.png, where to write the image")
    if args.out and not (args.out.parent.is_dir() and os.access(args.out.parent, os.W_OK | os.X_OK)):
        problems.append(f"--out {args.out}: the folder {args.out.parent} is not there or cannot be written")
    return problems, folder


def build_options(args: argparse.Namespace) -> SamplingOptions:
    return SamplingOptions(*(getattr(args, field.name) for field in fields(SamplingOptions)))


def build_folder(args: argparse.Namespace, size: tuple[int, int] | None) -> AnswerFolder:
    prompts = read_prompts(args.prompts, size, not args.no_prompt_template)
    folder = AnswerFolder(args.out_dir, args.layout, prompts, args.num_images)
    folder.check()
    return folder


def draws_images(args: argparse.Namespace) -> bool:
    """Whether images are kept or shown."""
    return bool(args.out or args.serve or (args.prompts and args.layout != TEXT))


def needs_vqgan(args: argparse.Namespace, folder: AnswerFolder | None) -> bool:
    """Whether images are certain to be drawn or put in."""
    has_images = folder is not None and any(prompt.images for prompt in folder.prompts)
    return bool(args.image or args.size or has_images or draws_images(args))


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")
    launch = detect_launch() if args.prompts else Launch()
    try:
        problems, folder = find_problems(args)
        if problems:
            raise ValueError("\n".join(problems))
        if folder:
            return answer_file(args, folder, launch)
        if not args.serve:
            return answer_once(build_solver(args), args)
        serve(lambda: build_solver(args), build_options(args), args.max_gen_len, args.host, args.port, args.model_path)
        return 0
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        return stop_at_start(launch, f"inference_solver.py: {error}")
    except KeyboardInterrupt:
        print("inference_solver.py: interrupted", file=sys.stderr)
        return 130


def build_solver(args: argparse.Namespace, folder: AnswerFolder | None = None) -> FlexARInferenceSolver:
    """The solver of the command line; a VQGAN that is needed is loaded and checked."""
    more = dict(tokenizer=args.tokenizer, vqgan_dir=args.vqgan_dir, any_vqgan=args.any_vqgan, device=args.device)
    more |= dict(compile_step=args.compile, max_positions=args.max_positions)
    # Ranks of one node have a GPU each.
    more["may_spread"] = not args.prompts or detect_launch().local_world_size == 1
    solver = FlexARInferenceSolver(args.model_path, args.precision, args.target_size, **more)
    if needs_vqgan(args, folder):
        solver.check_vqgan(with_decoder=draws_images(args))
    return solver


def answer_once(solver: FlexARInferenceSolver, args: argparse.Namespace) -> int:
    """One answer on the command line: its text on stdout, its images in files. Returns the exit code."""
    request = {"qas": [[args.prompt, None]], "images": args.image, "size": args.size and parse_size(args.size)}
    answer = solver.answer_many([request], args.max_gen_len, build_options(args), desc="generating")[0]
    print(answer.text)
    if args.out is None and answer.images:
        print(f"{len(answer.images)} images were drawn and not kept; give --out to keep them.", file=sys.stderr)
    if args.out is not None and not answer.images:
        advice = "" if answer.cut_by else "; --size makes it draw one"
        print(f"inference_solver.py: no complete image in the answer, so no {args.out}{advice}.", file=sys.stderr)
        return 3
    for number, image in enumerate(answer.images if args.out else (), start=1):
        path = args.out if number == 1 else args.out.with_stem(f"{args.out.stem}-{number}")
        with open_whole(path) as file:
            image.save(file, format="PNG")
        print(path, file=sys.stderr)
    return 3 if answer.cut_by == CUT_BY_NAN else 0


def folder_settings(args: argparse.Namespace, folder: AnswerFolder) -> dict[str, Any]:
    """What the answers in a folder depend on besides the prompts."""
    settings = {name: getattr(args, name) for name in FOLDER_SETTINGS}
    settings["checkpoint"] = fingerprint_weights(resolve_checkpoint(args.model_path))
    settings["vqgan"] = hash_vqgan(find_vqgan(args.vqgan_dir)) if needs_vqgan(args, folder) else None
    return settings


def answer_file(args: argparse.Namespace, folder: AnswerFolder, launch: Launch) -> int:
    """All answers to `--prompts`, shared by the ranks. Returns the exit code."""
    with process_group(launch, args.device, RANK_TIMEOUT_S):
        problem = None
        if launch.is_main:
            try:
                folder.open(folder_settings(args, folder))
            except (ValueError, OSError) as error:
                problem = str(error)
                print(f"inference_solver.py: {problem}", file=sys.stderr, flush=True)
        if from_main(problem):
            return 2
        if missing := folder.missing(launch.rank, launch.world_size):
            solver, options = build_solver(args, folder), build_options(args)
            draw_missing(solver, folder, missing, options, args.max_gen_len, is_shown=launch.is_main)
        barrier()
        num_missing = 0
        if launch.is_main:
            missing, page_path = folder.finish(), folder.page_path()
            num_missing = len(missing)
            write_page(render("contact_sheet.html", **folder.page_values(missing)), page_path)
            note = f"; {num_missing} are missing, the same command tries them again" if num_missing else ""
            print(f"The answers are in {args.out_dir}{note}. Look at {page_path}", flush=True)
        return 3 if from_main(num_missing) else 0


if __name__ == "__main__":
    # Threads of the process group may outlive the interpreter.
    end_process(main())
