"""Weights in and out of the decoder, in both shapes of checkpoint, for training, generation, and by hand.

`xllmx` is the recipe's shape and ours: q/k-norms tied per model-parallel group. `hf` is the shape of stock Chameleon
(`transformers.ChameleonForConditionalGeneration`): a q/k-norm row per head, the VQGAN inside. Both shapes carry the
tensors of the VQGAN along where the source has them; the decoder never loads these.

    python model/convert.py facebook/chameleon-7b start               # image rows of lm_head zeroed, the recipe's way
    python model/convert.py output/7B/epoch1 chameleon-hf --shape hf  # --vqgan_dir, if there was none at the start
    python model/convert.py output/7B_lora/epoch1 merged --shape hf   # what was trained, merged into the base
"""

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.hub import find_vqgan  # noqa: E402
from data.whole_file import sync_path  # noqa: E402
from model.decoder.chameleon import (  # noqa: E402
    ChameleonXLLMXConfig,
    ChameleonXLLMXForConditionalGeneration,
    build_model,
)
from model.decoder.local_shards import copy_into_parameter  # noqa: E402
from model.decoder.trainable import is_added  # noqa: E402
from model.decoder.trained_rows import ROWS_NAME  # noqa: E402
from model.vqgan.vqgan import CODEBOOK, HF_PREFIX, check_codebook, load_vqgan  # noqa: E402
from model.weights.adapter_folder import open_weights  # noqa: E402
from model.weights.hf_folder import copy_tokenizer_files, load_config, resolve_checkpoint  # noqa: E402
from model.weights.image_head import HEAD, IMAGE_HEAD_INITS, default_image_head_init, is_stock  # noqa: E402
from model.weights.stock_folder import PROCESSOR_NAME, SHAPES, write_config, write_processor_files  # noqa: E402
from model.weights.weight_files import MAX_FILE_BYTES, WeightReader, write_weights  # noqa: E402

# What a checkpoint may hold beside the decoder.
_IGNORED = (HF_PREFIX, "model.rotary_emb.")
# What recomputation, torch.compile and peft put into names.
_WRAPPER_PARTS = ("_checkpoint_wrapped_module.", "_orig_mod.", "base_layer.")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_checkpoint_weights(
    model: nn.Module, dir_or_hub_id: str | os.PathLike, image_head_init: str = "keep", seed: int = 0
) -> None:
    """
    Fill a plain or sharded model, on any device, from a checkpoint of either shape.

    Every rank reads only its own rows. Values are cast to the type of the parameter. Adapters are left as they are;
    trained image rows are filled from the whole weights. The image rows of `lm_head` are set by `set_image_rows`, to
    the same values on any number of ranks.

    Raises:
        FileNotFoundError: no such checkpoint or no weights in it.
        ValueError: tensors that are missing, unknown or of another shape, or q/k-norms that cannot be tied.
    """
    reader = open_weights(resolve_checkpoint(dir_or_hub_id), image_head_init, seed)
    parameters = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    _check_names_and_shapes({name: p for name, p in parameters.items() if not is_added(name)}, reader)
    for name, parameter in parameters.items():
        if name.endswith(f".{ROWS_NAME}"):
            ids = model.image_token_ids(torch.device("cpu"))
            copy_into_parameter(parameter, reader.read(f"{name.removesuffix(ROWS_NAME)}weight")[ids])
        elif not is_added(name):
            copy_into_parameter(parameter, regroup_head_norm(name, reader.read(name), parameter.shape[0]))


def check_weights(dir_or_hub_id: str | os.PathLike, image_head_init: str = "keep") -> ChameleonXLLMXConfig:
    """
    The configuration of a checkpoint, after a check that its weights fit it and have the image rows to set.

    Only names and shapes are read. The weights of a hub id are checked when they are loaded.

    Raises:
        FileNotFoundError: no weights in it.
        ValueError: a damaged file; tensors that are missing, unknown or of another shape.
    """
    config = load_config(dir_or_hub_id)
    if Path(dir_or_hub_id).is_dir():
        # On meta: only names and shapes.
        model = build_model(config)
        _check_names_and_shapes(dict(model.named_parameters()), open_weights(dir_or_hub_id, image_head_init))
    return config


def load_pretrained(
    dir_or_hub_id: str | os.PathLike,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    config: ChameleonXLLMXConfig | None = None,
    **overrides: Any,
) -> ChameleonXLLMXForConditionalGeneration:
    """
    A whole model in evaluation mode, from a checkpoint of either shape.

    Args:
        dtype: of the parameters; None keeps the type of the files.
        config: its configuration; None: that of the checkpoint.
        overrides: configuration values, e.g. `tie_head_norm=False` for a stock checkpoint that cannot be tied.
    """
    folder = resolve_checkpoint(dir_or_hub_id)
    config = config or load_config(folder, **overrides)
    model = build_model(config, device, dtype or open_weights(folder).dtype(HEAD))
    load_checkpoint_weights(model, folder)
    return model.eval()


def export_tensors(
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    get: Callable[[str], torch.Tensor],
    config: ChameleonXLLMXConfig,
    out_dir: str | os.PathLike,
    vqgan: Mapping[str, torch.Tensor],
    shape: str = "xllmx",
    is_trained: bool = True,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """
    Write config.json and safetensors of a checkpoint in either shape, from full tensors.

    Args:
        shapes: shape and type of every parameter to write, by name.
        get: gives a parameter when it is its turn.
        config: its configuration.
        out_dir: made if it is not there, and filled in place.
        vqgan: the VQGAN's tensors by name, which keep their type; "hf" needs them.
        is_trained: see `write_config`.
        max_file_bytes: see `write_weights`.
    """
    if shape == "hf" and not vqgan:
        raise ValueError(
            "the hf shape holds the VQGAN, and there is none in the source: give its folder (--vqgan_dir). Only "
            "what was started from a checkpoint with a VQGAN carries it along."
        )
    tensors = {}
    for name, (size, dtype) in shapes.items():
        if shape == "hf" and ".q_norm." in name:
            size = (config.num_attention_heads, *size[1:])
        elif shape == "hf" and ".k_norm." in name:
            size = (config.num_key_value_heads, *size[1:])
        tensors[name] = torch.empty(size, dtype=dtype, device="meta")

    def get_out(name: str) -> torch.Tensor:
        return vqgan[name] if name in vqgan else regroup_head_norm(name, get(name), tensors[name].shape[0])

    Path(out_dir).mkdir(parents=True, exist_ok=True)
    tensors |= {name: tensor.to("meta") for name, tensor in vqgan.items()}
    write_weights(out_dir, tensors, get_out, max_file_bytes)
    write_config(config, Path(out_dir), tensors[HEAD].dtype, shape, is_trained)


def carried_vqgan(config: ChameleonXLLMXConfig) -> dict[str, torch.Tensor]:
    """
    The VQGAN's tensors, by name, of the folder that a configuration was read from; without a VQGAN none.

    In memory (0.1 GiB for Chameleon's): that folder may be a checkpoint which the training removes.
    """
    try:
        if config.name_or_path and Path(config.name_or_path).is_dir():
            return {name: tensor.clone() for name, tensor in _stored_vqgan(open_weights(config.name_or_path)).items()}
    except (ValueError, OSError) as error:
        # A training must be able to save without the VQGAN.
        warnings.warn(f"the VQGAN's tensors, if any, are not carried along: {error}", stacklevel=2)
    return {}


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
        out_dir: must not exist.
        shape: one of `SHAPES`.
        image_head_init, seed: see `set_image_rows`; None: `default_image_head_init`.
        vqgan_dir: the VQGAN to put in; None: the source's own, if it has one ("hf" needs one).
        tokenizer_dir: its tokenizer files are copied; None: those of the source.
        dtype: type of the written weights (the VQGAN's keep theirs); None keeps the source's.
        max_file_bytes: see `write_weights`.
        overrides: configuration values, e.g. `tie_head_norm=False`.

    Raises:
        FileExistsError: `out_dir` is there already.
        ValueError: what `load_checkpoint_weights` or `set_image_rows` rejects, or another VQGAN than the records'.
    """
    out_dir, source = Path(out_dir), resolve_checkpoint(source)
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists already; remove it or choose another folder.")
    config = load_config(source, **overrides)
    reader = open_weights(source, image_head_init or default_image_head_init(config, shape), seed)
    # On meta: only names and shapes.
    parameters = dict(build_model(config).named_parameters())
    _check_names_and_shapes(parameters, reader)
    vqgan = _stored_vqgan(reader)
    if vqgan_dir:
        model = load_vqgan(find_vqgan(vqgan_dir))
        config.vq_config = model.config
        # Stock Chameleon lacks the decoder half.
        state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("decoder.")}
        vqgan = {HF_PREFIX + name: tensor for name, tensor in state.items()}
    if shape == "hf" and vqgan:
        codebook, of = vqgan[HF_PREFIX + CODEBOOK], "the model's training data"
        check_codebook(codebook, vqgan_dir or source, config.codebook_sha256, of, other_way="")

    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shapes = {name: (tuple(p.shape), dtype or reader.dtype(name)) for name, p in parameters.items()}
    is_trained = not is_stock(config)
    export_tensors(shapes, reader.read, config, partial, vqgan, shape, is_trained, max_file_bytes)
    copy_tokenizer_files(tokenizer_dir or source, partial)
    if shape == "hf":
        write_processor_files(partial)
    # On disk before the folder gets its name.
    for path in (*partial.iterdir(), partial):
        sync_path(path)
    os.replace(partial, out_dir)
    sync_path(out_dir.parent)
    return out_dir


def clean_name(name: str) -> str:
    """The name of a parameter in a checkpoint, without what wrappers add to it."""
    for part in _WRAPPER_PARTS:
        name = name.replace(part, "")
    return name


def regroup_head_norm(name: str, tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    """
    A q/k-norm [rows, head_dim] with another number of rows: repeated, or tied if the rows of each group are equal.

    Other tensors are returned unchanged.

    Raises:
        ValueError: rows to tie differ, or the numbers do not divide each other.
    """
    stored_rows = tensor.shape[0]
    if stored_rows == num_rows:
        return tensor
    if num_rows % stored_rows == 0:
        return tensor.repeat_interleave(num_rows // stored_rows, 0)
    if stored_rows % num_rows:
        raise ValueError(f"{name} has {stored_rows} rows, which cannot be regrouped into {num_rows}.")
    groups = tensor.unflatten(0, (num_rows, -1))
    if not torch.equal(groups, groups[:, :1].expand_as(groups)):
        raise ValueError(
            f"{name}: the rows of the heads differ within the {num_rows} model-parallel group(s), so they cannot be "
            "tied. Load it untied: tie_head_norm=False (--untie_head_norm in model/convert.py)."
        )
    return groups[:, 0].contiguous()


def _check_names_and_shapes(parameters: dict[str, torch.Tensor], reader: WeightReader) -> None:
    missing = [name for name in parameters if name not in reader]
    unknown = [n for n in reader.names if n not in parameters and not n.startswith(_IGNORED)]
    other = [
        f"{name} {list(reader.shape(name))} instead of {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in reader
        and reader.shape(name) != tuple(parameter.shape)
        and not (".q_norm." in name or ".k_norm." in name)
    ]
    problems = [
        f"{len(names)} {what} (e.g. {', '.join(names[:3])})"
        for names, what in ((missing, "missing"), (unknown, "unknown"), (other, "of another shape"))
        if names
    ]
    if problems:
        raise ValueError(
            f"the weights in {reader.folder} do not fit the model: {'; '.join(problems)}. "
            "Is the config.json beside them the one that they were written with?"
        )


def _stored_vqgan(reader: WeightReader) -> dict[str, torch.Tensor]:
    return {name: reader.read(name) for name in reader.names if name.startswith(HF_PREFIX)}


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
