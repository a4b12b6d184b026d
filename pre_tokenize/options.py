"""The command line of a pre-tokenizing worker."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from data.hub import DEFAULT_TOKENIZER, DEFAULT_VQGAN_DIR, VQGAN_HELP, find_vqgan_problems
from data.image_transform import crop_sizes

PRECISIONS = ("tf32", "fp32", "bf16")


@dataclass(frozen=True)
class Options:
    in_filename: Path
    out_dir: Path
    splits: int
    rank: int
    target_size: int
    tokenizer: str
    vqgan_dir: Path
    device: str
    precision: str
    crop: str
    seed: int
    image_root: Path | None
    batch_size: int
    num_workers: int
    compile: bool
    max_seq_len: int | None
    retry_failed: bool
    overwrite: bool
    max_failures: int


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # what to tokenize, and this worker's share of it
    add("--in_filename", type=Path, required=True, help="JSON list or JSONL of items")
    add("--out_dir", type=Path, required=True, help="folder for token files and records")
    add("--splits", type=int, default=1, help="number of workers (default 1)")
    add("--rank", type=int, default=0, help="number of this worker, from 0 (default 0)")
    add("--image_root", type=Path, help="folder of relative image paths (default: the input's, then the working one)")
    # how to tokenize it
    add("--target_size", type=int, default=512, help="side in pixels of a square crop (default 512)")
    add("--crop", choices=("center", "random"), default="center", help="place of the crops (default center)")
    add("--seed", type=int, default=0, help="of random crops, together with the item's id (default 0)")
    add("--tokenizer", default=DEFAULT_TOKENIZER, help=f"of text, folder or hub id (default {DEFAULT_TOKENIZER})")
    add("--vqgan_dir", type=Path, default=DEFAULT_VQGAN_DIR, help=VQGAN_HELP)
    add("--max_seq_len", type=int, help="refuse items of more tokens; none is ever cut (default: no limit)")
    # what to do with what is there, and with items that cannot be used
    add("--retry_failed", action="store_true", help="try the items once more that were refused in an earlier run")
    add("--overwrite", action="store_true", help="delete what was tokenized with other settings, and begin again")
    add("--max_failures", type=int, default=0, help="refused items of this worker that still end with 0 (default 0)")
    # where and how fast
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default auto: cuda if there is one")
    add("--precision", choices=PRECISIONS, default="tf32", help="of the VQGAN (default tf32)")
    add("--batch_size", type=int, help="images encoded at once (default: by target size and device)")
    add("--num_workers", type=int, default=2, help="processes that load images; 0: none but this one (default 2)")
    add("--compile", action="store_true", help="torch.compile the VQGAN; a minute at the start (default: off)")
    return parser


def parse_options(args: argparse.Namespace) -> Options:
    """The options of a parsed command line. Raises ValueError with everything that is wrong with them."""
    args.vqgan_dir = Path(args.vqgan_dir)
    if args.device == "auto":
        args.device = "cuda" if _has_cuda() else "cpu"
        if args.device == "cpu":
            print("torch sees no CUDA GPU: images are encoded on the CPU", flush=True)
    if args.batch_size is None:
        args.batch_size = default_batch_size(args.target_size, args.device)
    options = Options(**vars(args))
    validate(options)
    return options


def validate(options: Options) -> None:
    """Raise one ValueError with every problem that can be seen without loading anything."""
    problems = []
    if options.in_filename.is_dir():
        problems.append(f"--in_filename {options.in_filename} is a folder; give the JSON or JSONL file in it")
    elif not options.in_filename.is_file():
        problems.append(f"--in_filename {options.in_filename} does not exist")
    if options.out_dir.exists() and not options.out_dir.is_dir():
        problems.append(f"--out_dir {options.out_dir} is not a folder")
    if options.splits < 1 or not 0 <= options.rank < options.splits:
        problems.append(f"--rank must lie in 0..splits-1, got --rank {options.rank} --splits {options.splits}")
    try:
        crop_sizes(options.target_size)
    except ValueError as error:
        problems.append(f"--target_size: {error}")
    if options.image_root is not None and not options.image_root.is_dir():
        problems.append(f"--image_root {options.image_root} is not a folder")
    problems += find_vqgan_problems(options.vqgan_dir)
    if options.device == "cuda" and not _has_cuda():
        problems.append("--device cuda: no CUDA device is visible; use --device cpu")
    for name, least in (("batch_size", 1), ("num_workers", 0), ("seed", 0), ("max_failures", 0), ("max_seq_len", 1)):
        if getattr(options, name) is not None and getattr(options, name) < least:
            problems.append(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if problems:
        raise ValueError("\n  ".join(["cannot start:", *problems] if len(problems) > 1 else problems))


def default_batch_size(target_size: int, device: str) -> int:
    """As many pixels as keep the device busy and fit in its memory: 8 pictures of 512 on a GPU, 4 of 256 on a CPU."""
    pixels, most = (8 * 512**2, 64) if device == "cuda" else (4 * 256**2, 16)
    return max(1, min(most, pixels // max(1, target_size) ** 2))


def _has_cuda() -> bool:
    import torch  # not above, so that processes that load images do not wait for it

    return torch.cuda.is_available()
