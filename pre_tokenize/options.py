"""The command line of a pre-tokenizing worker: one field of `Options` per flag. TRAIN.md lists the flags."""

import argparse
import os
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from pathlib import Path

from data.formats.containers import FORMATS, InputFiles, find_files
from data.formats.manifest import DEFAULT_PRECISION, PRECISIONS
from data.hub import DEFAULT_TOKENIZER, DEFAULT_VQGAN_DIR, VQGAN_HELP, find_vqgan_problems
from data.items.image_transform import crop_sizes
from data.items.rows import TASKS, Pairs, parse_pairs
from pre_tokenize.out_folder import recorded_precision


def flag(help: str, default: object = MISSING, **arguments: object) -> object:
    """A field of `Options`; `arguments` are those of `add_argument`. Without a default the flag is required."""
    return field(default=default, metadata={"help": help, **arguments})


@dataclass(frozen=True, kw_only=True)
class Options:
    # what to tokenize, and this worker's share of it
    in_filename: Path = flag(
        "JSON list or JSONL (also .gz, .zst), .parquet or .tar; a folder or quoted glob of those; a `datasets` folder",
        type=Path,
    )
    in_format: str | None = flag("format of the input (default: by its suffix)", None, choices=FORMATS)
    out_dir: Path = flag("folder for token files and records", type=Path)
    splits: int = flag("number of workers (default 1)", 1, type=int)
    rank: int = flag("number of this worker, from 0 (default 0)", 0, type=int)
    task: str | None = flag(
        "rows are pairs: draw the image of a text (t2i), describe the image (i2t) (default: off)", None, choices=TASKS
    )
    columns: str | None = flag("columns of the pairs of --task (default prompt=caption,image=image)", None)
    image_root: Path | None = flag("folder of relative image paths (default: of the input)", None, type=Path)
    confine_images: bool = flag(
        "reject image paths that lead out of --image_root (default: off)", False, action="store_true"
    )
    allow_urls: bool = flag("fetch images by http(s) (default: off)", False, action="store_true")
    # how to tokenize it
    target_size: int = flag("side in pixels of a square crop (default 512)", 512, type=int)
    crop: str = flag("place of the crops (default center)", "center", choices=("center", "random"))
    seed: int = flag("seed of random crops, used together with the item's id (default 0)", 0, type=int)
    tokenizer: str = flag(f"text tokenizer, folder or hub id (default {DEFAULT_TOKENIZER})", DEFAULT_TOKENIZER)
    vqgan_dir: Path = flag(VQGAN_HELP, Path(DEFAULT_VQGAN_DIR), type=Path)
    max_seq_len: int | None = flag("reject items of more tokens; none is cut (default: no limit)", None, type=int)
    # what to do with existing files, and with items that cannot be used
    retry_failed: bool = flag(
        "tokenize again from the first rejected item on, for example once its image is there (default: off)",
        False,
        action="store_true",
    )
    overwrite: bool = flag(
        "delete what was tokenized with other settings and begin again (default: off)", False, action="store_true"
    )
    max_failures: int = flag("number of rejected items with which the exit code is still 0 (default 0)", 0, type=int)
    # where and how fast
    device: str = flag("default auto: cuda if there is a GPU", "auto", choices=("auto", "cuda", "cpu"))
    precision: str | None = flag(
        "precision of the VQGAN (default: of the output folder; of a new one fp16 on a GPU from Ampere on, else tf32)",
        None,
        choices=PRECISIONS,
    )
    batch_size: int | None = flag("images encoded at once (default: by target size and device)", None, type=int)
    num_workers: int | None = flag(
        "processes that load images; 0: only the worker itself (default: 2 on a CPU, on a GPU its share of the cores)",
        None,
        type=int,
    )
    compile: bool = flag(
        "torch.compile the VQGAN, a minute at the start; fp16 has kernels of its own (default: off)",
        False,
        action="store_true",
    )

    @cached_property
    def files(self) -> InputFiles:
        """Raises ValueError or FileNotFoundError."""
        return find_files(self.in_filename, self.in_format)

    @property
    def pairs(self) -> Pairs | None:
        """Raises ValueError."""
        return parse_pairs(self.task, self.columns)


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for one in fields(Options):
        how = {"required": True} if one.default is MISSING else {"default": one.default}
        parser.add_argument(f"--{one.name}", **how, **one.metadata)
    return parser


def parse_options(args: argparse.Namespace) -> Options:
    """The options of a parsed command line. Raises ValueError with everything that is wrong with them."""
    if args.device == "auto":
        args.device = "cuda" if _has_cuda() else "cpu"
        if args.device == "cpu":
            print("torch sees no CUDA GPU: images are encoded on the CPU", flush=True)
    if args.num_workers is None:
        args.num_workers = default_num_workers(args.device, args.splits)
    options = Options(**vars(args))
    if problems := find_problems(options):
        raise ValueError("\n  ".join(["cannot start:", *problems] if len(problems) > 1 else problems))
    return options


def find_problems(options: Options) -> list[str]:
    """Every problem that can be seen without loading anything."""
    problems = []
    for check in (lambda: options.files, lambda: options.pairs):
        try:
            check()
        except (ValueError, OSError) as error:
            problems.append(str(error))
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
    return problems


def default_batch_size(target_size: int, device: str, is_fused: bool = False) -> int:
    """As many pixels as keep the device busy and fit in its memory.

    4 images of 256 on a CPU, and of 768 on a GPU 3, or 12 with `FusedEncoder`, which needs a third of the memory.
    """
    pixels, most = ((12 if is_fused else 3) * 768**2, 64) if device == "cuda" else (4 * 256**2, 16)
    return max(1, min(most, pixels // max(1, target_size) ** 2))


def choose_precision(options: Options) -> str:
    """The given precision, else that of the output folder. It may open CUDA: the loaders must be forked before."""
    if options.precision:
        return options.precision
    default = default_precision(options.device)
    return default if options.overwrite else recorded_precision(options.out_dir, default)


def default_precision(device: str) -> str:
    if device == "cpu":
        return DEFAULT_PRECISION
    from model.vqgan.image_encoder import has_fast_fp16

    return "fp16" if has_fast_fp16(device) else DEFAULT_PRECISION


def default_window_items(target_size: int, device: str, batch_size: int | None) -> int:
    """Items that are prepared, encoded and written at once.

    It decides which images share a batch, so on a GPU it depends on the target size alone: 256 items up to 768 pixels
    fill batches although images have many sizes. 8 batches on a CPU, where a window takes minutes.
    """
    if device == "cuda":
        return min(256, max(1, 256 * 768**2 // target_size**2))
    return 8 * (batch_size or default_batch_size(target_size, device))


def default_num_workers(device: str, splits: int) -> int:
    """On a GPU this worker's share of the cores that the process may use, as loading needs more than encoding."""
    if device == "cpu":
        return 2
    return min(16, max(2, len(os.sched_getaffinity(0)) // max(1, splits)))


def _has_cuda() -> bool:
    # CUDA must not be opened before the loaders are forked. They do not import torch if it is imported late.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    return torch.cuda.is_available()
