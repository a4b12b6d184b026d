"""
Weights in and out of the decoder, in both shapes of checkpoint.

`xllmx` is the recipe's shape and ours (q/k-norms tied per model-parallel group); `hf` is stock Chameleon's (a row per
head, the VQGAN inside), which `transformers.ChameleonForConditionalGeneration` loads. The VQGAN's tensors are carried
along in both shapes where the source has them, and never loaded with the decoder. Where it stands: between the folders
on disk and `model/decoder/chameleon.py`, for training (plain or sharded models), generation, and by hand:

    python model/convert.py facebook/chameleon-7b start               # image rows of lm_head zeroed, the recipe's way
    python model/convert.py output/7B/epoch1 chameleon-hf --shape hf  # --vqgan_dir, if there was none at the start
    python model/convert.py output/7B_lora/epoch1 merged --shape hf   # what was trained, and the rest, as one
"""

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.chameleon.configuration_chameleon import ChameleonConfig

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.hub import find_vqgan  # noqa: E402
from data.whole_file import sync_path  # noqa: E402
from model.adapter_folder import open_weights  # noqa: E402
from model.decoder.chameleon import (  # noqa: E402
    ChameleonXLLMXConfig,
    ChameleonXLLMXForConditionalGeneration,
    build_model,
)
from model.hf_folder import copy_tokenizer_files, load_config, resolve_checkpoint  # noqa: E402
from model.image_head import HEAD, IMAGE_HEAD_INITS, default_image_head_init, is_stock  # noqa: E402
from model.local_shards import copy_into_parameter, local_rows  # noqa: E402
from model.stock_folder import PROCESSOR_NAME, SHAPES, config_values, write_processor_files  # noqa: E402
from model.trainable import is_added  # noqa: E402
from model.trained_rows import ROWS_NAME  # noqa: E402
from model.vqgan import CODEBOOK, check_codebook, load_vqgan  # noqa: E402
from model.weight_files import MAX_FILE_BYTES, WeightReader, write_weights  # noqa: E402

VQGAN_PREFIX = "model.vqmodel."
_IGNORED = (VQGAN_PREFIX, "model.rotary_emb.")
_WRAPPER_PARTS = ("_checkpoint_wrapped_module.", "_orig_mod.", "base_layer.")  # of recomputation, compile, peft


def load_checkpoint_weights(
    model: nn.Module, dir_or_hub_id: str | os.PathLike, image_head_init: str = "keep", seed: int = 0
) -> None:
    """
    Fill a plain or sharded model, on any device, from a checkpoint of either shape.

    Every rank reads only its own part of each tensor; values are cast to the type of the parameter, so fp32 files stay
    fp32 in an fp32 model. Adapters are left as they are, trained image rows are those of the weights. The image rows of
    `lm_head` are set as told, to the same values on any number of ranks, see `open_weights`.

    Raises:
        FileNotFoundError: no such checkpoint or no weights in it.
        ValueError: tensors that are missing, unknown or of another shape, or q/k-norms that cannot be tied.
    """
    reader = open_weights(resolve_checkpoint(dir_or_hub_id), image_head_init, seed)
    named = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    parameters = {name: parameter for name, parameter in named.items() if not is_added(name)}
    _check_names_and_shapes(parameters, reader)
    for name, parameter in parameters.items():
        if reader.shape(name) != tuple(parameter.shape):
            copy_into_parameter(parameter, regroup_head_norm(name, reader.read(name), parameter.shape[0]))
            continue
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if local.numel():
            with torch.no_grad():
                local.copy_(reader.read(name, local_rows(parameter)))
    for name, parameter in named.items():
        if name.endswith(f".{ROWS_NAME}"):
            ids = model.image_token_ids(torch.device("cpu"))
            first, last = int(ids[0]), int(ids[-1])
            rows = reader.read(f"{name.removesuffix(ROWS_NAME)}weight", (slice(first, last + 1), slice(None)))
            copy_into_parameter(parameter, rows[ids - first])


def check_weights(dir_or_hub_id: str | os.PathLike, image_head_init: str = "keep") -> ChameleonXLLMXConfig:
    """
    The configuration of a checkpoint, once the weights beside it are seen to fit it, and to have image rows to set.

    Only names and shapes are read, and of a folder alone: the weights of a hub id are checked when they are loaded.

    Raises:
        FileNotFoundError: no weights in it.
        ValueError: a damaged file; tensors that are missing, unknown or of another shape.
    """
    config = load_config(dir_or_hub_id)
    if Path(dir_or_hub_id).is_dir():
        model = build_model(config)  # on meta
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
        dir_or_hub_id: the checkpoint.
        dtype: of the parameters; None keeps the type of the files.
        device: where the model is put.
        config: its configuration; None: that of the checkpoint.
        overrides: configuration values, e.g. `tie_head_norm=False` for a stock checkpoint that cannot be tied.
    """
    folder = resolve_checkpoint(dir_or_hub_id)
    config = config or load_config(folder, **overrides)
    model = build_model(config, device, dtype or open_weights(folder).dtype(HEAD))
    load_checkpoint_weights(model, folder)
    return model.eval()


def export_hf(
    model: nn.Module,
    config: ChameleonXLLMXConfig,
    out_dir: str | os.PathLike,
    tokenizer_dir: str | os.PathLike | None = None,
    *,
    shape: str = "xllmx",
    vqgan_dir: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    is_writer: bool | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """
    Write config.json, safetensors and the tokenizer's files of a plain or sharded model.

    A sharded model is gathered tensor by tensor, so all ranks must call this; one of them writes, and holds at most one
    file's tensors. The folder is filled in place: write beside and rename after a barrier to make it appear whole. The
    writer reads the VQGAN's tensors at the first export and keeps them (0.1 GiB for Chameleon's).

    Args:
        model: plain, or sharded by `fully_shard`.
        config: its configuration. The VQGAN's tensors, if any, come from the folder that it was read from.
        out_dir: made if it is not there.
        tokenizer_dir: folder or hub id whose tokenizer files are copied; None for none.
        shape: one of `SHAPES`; "hf" needs the VQGAN.
        vqgan_dir: the VQGAN to put in instead.
        dtype: type of the written weights (the VQGAN's keep theirs); None keeps the model's.
        is_writer: whether this process writes; None: the first rank of the mesh of a sharded model, every process
            that has a plain one.
        max_file_bytes: see `write_weights`.
    """
    parameters = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    if is_writer is None:
        mesh = getattr(next(iter(parameters.values())), "device_mesh", None)
        is_writer = mesh is None or not any(mesh.get_coordinate())
    shapes = {name: (tuple(p.shape), dtype or p.dtype) for name, p in parameters.items()}
    if vqgan_dir:
        vqgan, values = _load_vqgan_tensors(vqgan_dir)
    else:
        vqgan, values = carried_vqgan(model, config, is_writer), {}

    def get(name: str) -> torch.Tensor:
        parameter = parameters[name]
        return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter

    values = config_values(config, shape, is_trained=True) | values
    _write_checkpoint(values, out_dir, shapes, get, vqgan, shape, is_writer, max_file_bytes)
    if is_writer and tokenizer_dir is not None:
        copy_tokenizer_files(tokenizer_dir, out_dir)
        if shape == "hf":
            write_processor_files(Path(out_dir))


def export_tensors(
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]],
    get: Callable[[str], torch.Tensor],
    config: ChameleonXLLMXConfig,
    out_dir: str | os.PathLike,
    vqgan: dict[str, torch.Tensor],
) -> None:
    """
    Write config.json and safetensors of a trained model from full tensors, given by name, shape and type; one process.

    `get` gives a tensor when it is its turn, `vqgan` comes from `carried_vqgan`; see `export_hf` for the rest.
    """
    values = config_values(config, "xllmx", is_trained=True)
    _write_checkpoint(values, out_dir, shapes, get, vqgan, "xllmx", True, MAX_FILE_BYTES)


def carried_vqgan(model: nn.Module, config: ChameleonXLLMXConfig, is_writer: bool) -> dict[str, torch.Tensor]:
    """The VQGAN's tensors of the folder that the model started from, by name; values on the writer alone.

    They are read once and stay with the model: that folder may be a checkpoint that makes room for newer ones.
    """
    if not hasattr(model, "carried_vqgan"):
        model.carried_vqgan = {}
        try:
            if config.name_or_path and Path(config.name_or_path).is_dir():
                stored = _stored_vqgan(open_weights(config.name_or_path))
                model.carried_vqgan = {n: t.clone() if is_writer else t.to("meta") for n, t in stored.items()}
        except (ValueError, OSError) as error:  # a training must be able to save without
            warnings.warn(f"the VQGAN's tensors, if any, are not carried along: {error}", stacklevel=3)
    return model.carried_vqgan


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
    Rewrite a checkpoint file by file; the new folder appears whole. Of a checkpoint that holds only what was trained
    (model/adapter_folder.py) all weights are written, adapters merged.

    Args:
        source: folder or hub id of either shape.
        out_dir: must not exist.
        shape: one of `SHAPES`.
        image_head_init: what becomes of the rows of `lm_head` of image tokens: "zero" (the recipe's start from a
            text model), "keep", or "normal" (drawn with `initializer_range`); None: "zero" from stock Chameleon to
            "xllmx", else "keep".
        vqgan_dir: the VQGAN to put in; None: the source's own, if it has one ("hf" needs one).
        tokenizer_dir: its tokenizer files are copied; by default those of the source.
        dtype: type of the written weights (the VQGAN's keep theirs); None keeps the source's.
        seed: of "normal".
        max_file_bytes: see `write_weights`.
        overrides: configuration values, e.g. `tie_head_norm=False`.

    Raises:
        FileExistsError: `out_dir` is there already.
        ValueError: an unknown option, or no image tokens in the vocabulary of the configuration.
    """
    out_dir, source = Path(out_dir), resolve_checkpoint(source)
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists already; remove it or choose another folder.")
    config = load_config(source, **overrides)
    reader = open_weights(source, image_head_init or default_image_head_init(config, shape), seed)
    parameters = dict(build_model(config).named_parameters())  # on meta: only names and shapes
    _check_names_and_shapes(parameters, reader)

    def get(name: str) -> torch.Tensor:
        tensor = reader.read(name)
        if tensor.shape != parameters[name].shape:
            tensor = regroup_head_norm(name, tensor, parameters[name].shape[0])
        return tensor

    shapes = {name: (tuple(p.shape), dtype or reader.dtype(name)) for name, p in parameters.items()}
    vqgan, values = _load_vqgan_tensors(vqgan_dir) if vqgan_dir else (_stored_vqgan(reader), {})
    if shape == "hf" and vqgan:
        codebook, of = vqgan[VQGAN_PREFIX + CODEBOOK], "the model's training data"
        check_codebook(codebook, vqgan_dir or source, config.codebook_sha256, of, other_way="")
    values = config_values(config, shape, is_trained=not is_stock(config)) | values
    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    _write_checkpoint(values, partial, shapes, get, vqgan, shape, True, max_file_bytes)
    copy_tokenizer_files(tokenizer_dir or source, partial)
    if shape == "hf":
        write_processor_files(partial)
    _publish(partial, out_dir)
    return out_dir


def clean_name(name: str) -> str:
    """The name of a parameter as in a checkpoint, without what wrappers add to it."""
    for part in _WRAPPER_PARTS:
        name = name.replace(part, "")
    return name


def regroup_head_norm(name: str, tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    """
    A q/k-norm [rows, head_dim] with another number of rows: repeated, or tied if the rows of each group are equal.

    Raises:
        ValueError: rows that would be tied differ, or the numbers do not divide each other.
    """
    stored_rows = tensor.shape[0]
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


def _is_head_norm(name: str) -> bool:
    return ".q_norm." in name or ".k_norm." in name


def _check_names_and_shapes(parameters: dict[str, torch.Tensor], reader: WeightReader) -> None:
    missing = [name for name in parameters if name not in reader]
    unknown = [n for n in reader.names if n not in parameters and not n.startswith(_IGNORED)]
    other = [
        f"{name} {list(reader.shape(name))} instead of {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in reader and reader.shape(name) != tuple(parameter.shape) and not _is_head_norm(name)
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


def write_config(config: ChameleonXLLMXConfig, folder: Path, dtype: torch.dtype) -> None:
    """The config.json of a trained model in our shape, whose weights have that type."""
    values = config_values(config, "xllmx", is_trained=True) | {"dtype": str(dtype).removeprefix("torch.")}
    ChameleonXLLMXConfig.from_dict(values).save_pretrained(folder)


def _write_checkpoint(
    values: dict[str, Any],
    out_dir: str | os.PathLike,
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]],
    get: Callable[[str], torch.Tensor],
    vqgan: dict[str, torch.Tensor],
    shape: str,
    is_writer: bool,
    max_file_bytes: int,
) -> None:
    """Write config.json and weights, from named tensors in our shape and those of the VQGAN, in the given shape."""
    heads: dict[str, int] = {}
    if shape == "hf":
        if not vqgan:
            raise ValueError(
                "the hf shape holds the VQGAN, and there is none in the source: give its folder (--vqgan_dir). Only "
                "what was started from a checkpoint with a VQGAN carries it along."
            )
        rows = {".q_norm.": values["num_attention_heads"], ".k_norm.": values["num_key_value_heads"]}
        heads = {name: n for name in shapes for part, n in rows.items() if part in name}
    entries = [(name, (heads.get(name, of[0]), *of[1:]), dtype) for name, (of, dtype) in shapes.items()]
    entries += [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in vqgan.items()]

    def get_out(name: str) -> torch.Tensor:
        if name in vqgan:
            return vqgan[name]
        return regroup_head_norm(name, get(name), heads[name]) if name in heads else get(name)

    if is_writer:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
    write_weights(out_dir, entries, get_out, is_writer, max_file_bytes)
    if is_writer:
        config_class = ChameleonConfig if shape == "hf" else ChameleonXLLMXConfig
        values = values | {"dtype": str(shapes[HEAD][1]).removeprefix("torch.")}
        config_class.from_dict(values).save_pretrained(out_dir)


def _load_vqgan_tensors(vqgan_dir: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The VQGAN as stock Chameleon names it (without the decoder half, which it lacks), and its part of config.json."""
    vqgan = load_vqgan(find_vqgan(vqgan_dir))
    state = {name: tensor for name, tensor in vqgan.state_dict().items() if not name.startswith("decoder.")}
    tensors = {VQGAN_PREFIX + name: tensor.contiguous() for name, tensor in state.items()}
    return tensors, {"vq_config": vqgan.config.to_dict()}


def _stored_vqgan(reader: WeightReader) -> dict[str, torch.Tensor]:
    """The VQGAN's tensors of a checkpoint, by name; mapped files, of which nothing is read before it is used."""
    return {name: reader.read(name) for name in reader.names if name.startswith(VQGAN_PREFIX)}


def _publish(unnamed: Path, final: Path) -> None:
    """Put a folder's files on disk and give it its name."""
    for path in (*unnamed.iterdir(), unnamed):
        sync_path(path)
    os.replace(unnamed, final)
    sync_path(final.parent)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Rewrite a checkpoint: its shape, type or image head.")
    parser.add_argument("source", help="checkpoint folder or hub id, of either shape")
    parser.add_argument("out_dir", help="folder to write; must not exist")
    parser.add_argument("--shape", choices=SHAPES, default="xllmx", help="shape to write (default: %(default)s)")
    parser.add_argument(
        "--vqgan_dir",
        help="VQGAN to put in (default: the source's own, which training carries along from where it started). The hf "
        "shape needs one: give it for checkpoints of trainings that started without",
    )
    parser.add_argument("--tokenizer", help="folder or hub id of the tokenizer to copy (default: the source)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="type to write (default: the source's)")
    parser.add_argument(
        "--image_head_init",
        choices=IMAGE_HEAD_INITS,
        help="rows of lm_head of image tokens: zero (the recipe's start from a text model), keep, normal (drawn anew) "
        "(default: zero from stock Chameleon to xllmx, a start of training; else keep: exports of trained models, "
        "in either shape, are known by their config.json)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --image_head_init normal (default: %(default)s)")
    parser.add_argument(
        "--untie_head_norm",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep one q/k-norm row per head, for stock checkpoints whose rows differ (default: off)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    dtype = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
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
            dtype=dtype,
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
