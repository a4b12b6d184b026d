"""Rewrite a checkpoint: its shape, type or image rows; adapters are merged.

`xllmx` is the recipe's shape and ours: q/k-norms tied per model-parallel group. `hf` is the shape of stock Chameleon
(`transformers.ChameleonForConditionalGeneration`): a q/k-norm row per head, the VQGAN inside.

    python model/convert.py facebook/chameleon-7b start               # image rows of lm_head zeroed, the recipe's way
    python model/convert.py output/7B/epoch1 chameleon-hf --shape hf  # --vqgan_dir, if there was none at the start
    python model/convert.py output/7B_lora/epoch1 merged --shape hf   # what was trained, merged into the base
"""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.hub import find_vqgan  # noqa: E402
from data.whole_file import publish_folder  # noqa: E402
from model.decoder.chameleon import ChameleonXLLMXConfig, build_model  # noqa: E402
from model.vqgan.vqgan import CODEBOOK, HF_PREFIX, check_codebook, load_vqgan  # noqa: E402
from model.weights.adapter_folder import IMAGE_HEAD_INITS, open_weights  # noqa: E402
from model.weights.export import (  # noqa: E402
    PROCESSOR_NAME,
    SHAPES,
    export_tensors,
    is_stock,
    stored_vqgan,
    write_processor_files,
)
from model.weights.hf_folder import copy_tokenizer_files, load_config, resolve_checkpoint  # noqa: E402
from model.weights.load import check_names_and_shapes  # noqa: E402
from model.weights.weight_files import MAX_FILE_BYTES  # noqa: E402

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_image_head_init(config: ChameleonXLLMXConfig, shape: str) -> str:
    """What a conversion to `shape` does with the image rows: "zero" from stock Chameleon to "xllmx", else "keep"."""
    return "zero" if shape == "xllmx" and is_stock(config) else "keep"


def convert_checkpoint(
    source: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    shape: str = "xllmx",
    image_head_init: str | None = None,
    vqgan_dir: str | os.PathLike | None = None,
    tokenizer_dir: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    max_file_bytes: int = MAX_FILE_BYTES,
    **overrides: Any,
) -> Path:
    """
    Rewrite a checkpoint of either shape, tensor by tensor, adapters merged; the new folder appears atomically.

    Args:
        source: folder or hub id.
        image_head_init, seed: see `set_image_rows`; None: `default_image_head_init`.
        vqgan_dir: the VQGAN to put in; None: the source's own, if it has one ("hf" needs one).
        tokenizer_dir: its tokenizer files are copied; None: those of the source.
        dtype: type of the written weights (the VQGAN's keep theirs); None keeps the source's.
        max_file_bytes: see `write_weights`.
        overrides: configuration values, e.g. `tie_head_norm=False`.

    Raises:
        FileExistsError: `out_dir` exists.
        ValueError: what `load_checkpoint_weights` or `set_image_rows` rejects, or another VQGAN than the records'.
    """
    out_dir, source = Path(out_dir), resolve_checkpoint(source)
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists already; remove it or choose another folder.")
    config = load_config(source, **overrides)
    reader = open_weights(source, image_head_init or default_image_head_init(config, shape), seed)
    # On meta: only names and shapes.
    parameters = dict(build_model(config).named_parameters())
    check_names_and_shapes(parameters, reader)
    vqgan = stored_vqgan(reader)
    if vqgan_dir:
        model = load_vqgan(find_vqgan(vqgan_dir))
        config.vq_config = model.config
        # Stock Chameleon lacks the decoder half.
        vqgan = {HF_PREFIX + name: t for name, t in model.state_dict().items() if not name.startswith("decoder.")}
    if shape == "hf" and vqgan:
        codebook, of = vqgan[HF_PREFIX + CODEBOOK], "the model's training data"
        check_codebook(codebook, vqgan_dir or source, config.codebook_sha256, of, other_way="")

    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shapes = {name: (tuple(p.shape), dtype or reader.dtype(name)) for name, p in parameters.items()}
    export_tensors(shapes, reader.read, config, partial, vqgan, shape, max_file_bytes)
    copy_tokenizer_files(tokenizer_dir or source, partial)
    if shape == "hf":
        write_processor_files(partial)
    publish_folder(partial, out_dir)
    return out_dir


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Rewrite a checkpoint: its shape, type or image head.")
    parser.add_argument("source", help="checkpoint folder or hub id, of either shape")
    parser.add_argument("out_dir", help="folder to write; must not exist")
    parser.add_argument("--shape", choices=SHAPES, default="xllmx", help="shape to write (default: %(default)s)")
    parser.add_argument(
        "--vqgan_dir",
        help="VQGAN to put in (default: the source's own, which training carries along from its start). The hf shape "
        "needs a VQGAN: give one for checkpoints of trainings that started without",
    )
    parser.add_argument("--tokenizer", help="folder or hub id of the tokenizer to copy (default: the source)")
    parser.add_argument("--dtype", choices=_DTYPES, help="type to write (default: the source's)")
    parser.add_argument(
        "--image_head_init",
        choices=IMAGE_HEAD_INITS,
        help="rows of lm_head of image tokens: zero (the recipe's start from a text model), keep, or normal (drawn "
        "from a normal distribution) (default: zero from stock Chameleon to xllmx, else keep; the config.json of our "
        "exports in stock's shape says that they are not stock Chameleon)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of --image_head_init normal (default: %(default)s)")
    parser.add_argument(
        "--untie_head_norm",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep one q/k-norm row per head, for stock checkpoints whose rows differ (default: off)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    overrides = {"tie_head_norm": False} if args.untie_head_norm else {}
    try:
        image_head_init = args.image_head_init or default_image_head_init(load_config(args.source), args.shape)
        convert_checkpoint(
            args.source,
            args.out_dir,
            shape=args.shape,
            image_head_init=image_head_init,
            vqgan_dir=args.vqgan_dir,
            tokenizer_dir=args.tokenizer,
            dtype=_DTYPES.get(args.dtype),
            seed=args.seed,
            **overrides,
        )
    except (ValueError, OSError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out_dir} ({args.shape}; image rows of lm_head: {image_head_init})")
    if args.shape == "hf" and not (Path(args.out_dir) / PROCESSOR_NAME).is_file():
        print("without a processor: that needs a tokenizer with <image> or <reserved08707> (--tokenizer)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
