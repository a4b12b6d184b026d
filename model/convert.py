"""
Weights in and out of the decoder, in both shapes of checkpoint.

`xllmx` is the recipe's shape and ours (q/k-norms tied per model-parallel group, no VQGAN); `hf` is stock Chameleon's (a
row per head, the VQGAN inside), which `transformers.ChameleonForConditionalGeneration` loads. Where it stands: between
the folders on disk and `model/chameleon.py`, for training (plain or sharded models), generation, and by hand:

    python model/convert.py output/7B/epoch1 chameleon-hf --shape hf --vqgan_dir ckpts/chameleon/tokenizer
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.chameleon.configuration_chameleon import ChameleonConfig

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.chameleon import (  # noqa: E402
    ChameleonXLLMXConfig,
    ChameleonXLLMXForConditionalGeneration,
    build_model,
)
from model.local_shards import copy_into_parameter, local_rows  # noqa: E402
from model.weight_files import WeightReader, write_weights  # noqa: E402

SHAPES = ("xllmx", "hf")
IMAGE_HEAD_INITS = ("zero", "keep", "normal")
HEAD = "lm_head.weight"
VQGAN_PREFIX = "model.vqmodel."
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_IGNORED = (VQGAN_PREFIX, "model.rotary_emb.")
_WRAPPER_PARTS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # of activation checkpointing and torch.compile


def resolve_checkpoint(dir_or_hub_id: str | os.PathLike, with_weights: bool = True) -> Path:
    """
    The folder of a checkpoint; a hub id is downloaded (or found in the local cache).

    Args:
        dir_or_hub_id: a folder, or the name/name of a model of the hub.
        with_weights: whether its weights are needed too (of a folder nothing is fetched in any case).

    Raises:
        FileNotFoundError: neither a folder nor a hub id that can be fetched.
    """
    folder = Path(dir_or_hub_id)
    if folder.is_dir():
        return folder
    looks_local = folder.is_absolute() or len(folder.parts) != 2 or str(dir_or_hub_id).startswith(".")
    if not looks_local:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        patterns = ["*.json", "*.jinja"] + ["*.safetensors"] * with_weights
        try:
            return Path(snapshot_download(str(dir_or_hub_id), allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise FileNotFoundError(
                f"{dir_or_hub_id} is not a folder here, and could not be fetched from the hub: {error}"
            ) from error
    raise FileNotFoundError(f"there is no checkpoint folder {dir_or_hub_id}; give a folder or a hub id (name/name).")


def load_config(dir_or_hub_id: str | os.PathLike, **overrides: Any) -> ChameleonXLLMXConfig:
    """
    The configuration of a checkpoint of either shape; `overrides` replace its values.

    Raises:
        FileNotFoundError: no such checkpoint, or no `config.json` in it.
        ValueError: it is not Chameleon's.
    """
    folder = resolve_checkpoint(dir_or_hub_id, with_weights=False)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a checkpoint.")
    values, _ = ChameleonXLLMXConfig.get_config_dict(folder)
    if values.get("model_type") != ChameleonXLLMXConfig.model_type:
        raise ValueError(
            f"{folder / 'config.json'} is of model_type {values.get('model_type')!r}; "
            f"it must be {ChameleonXLLMXConfig.model_type!r}."
        )
    return ChameleonXLLMXConfig.from_dict(values | overrides)


def load_checkpoint_weights(model: nn.Module, dir_or_hub_id: str | os.PathLike) -> None:
    """
    Fill a plain or sharded model, on any device, from a checkpoint of either shape.

    Every rank reads only its own part of each tensor; values are cast to the type of the parameter, so fp32 files stay
    fp32 in an fp32 model.

    Raises:
        FileNotFoundError: no such checkpoint or no weights in it.
        ValueError: tensors that are missing, unknown or of another shape, or q/k-norms that cannot be tied.
    """
    reader = WeightReader(resolve_checkpoint(dir_or_hub_id))
    parameters = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    _check_names_and_shapes(parameters, reader)
    for name, parameter in parameters.items():
        if reader.shape(name) != tuple(parameter.shape):
            copy_into_parameter(parameter, regroup_head_norm(name, reader.read(name), parameter.shape[0]))
            continue
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if local.numel():
            with torch.no_grad():
                local.copy_(reader.read(name, local_rows(parameter)))


def check_weights(dir_or_hub_id: str | os.PathLike) -> ChameleonXLLMXConfig:
    """
    The configuration of a checkpoint, once the weights beside it are seen to fit it.

    Only names and shapes are read, and of a folder alone: the weights of a hub id are checked when they are loaded.

    Raises:
        FileNotFoundError: no weights in it.
        ValueError: a damaged file; tensors that are missing, unknown or of another shape.
    """
    config = load_config(dir_or_hub_id)
    if Path(dir_or_hub_id).is_dir():
        model = build_model(config)  # on meta
        _check_names_and_shapes(dict(model.named_parameters()), WeightReader(dir_or_hub_id))
    return config


def load_pretrained(
    dir_or_hub_id: str | os.PathLike,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    **overrides: Any,
) -> ChameleonXLLMXForConditionalGeneration:
    """
    A whole model in evaluation mode, from a checkpoint of either shape.

    Args:
        dir_or_hub_id: the checkpoint.
        dtype: of the parameters; None keeps the type of the files.
        device: where the model is put.
        overrides: configuration values, e.g. `tie_head_norm=False` for a stock checkpoint that cannot be tied.
    """
    folder = resolve_checkpoint(dir_or_hub_id)
    config = load_config(folder, **overrides)
    model = build_model(config, device, dtype or WeightReader(folder).dtype(HEAD))
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
) -> None:
    """
    Write config.json, safetensors and the tokenizer's files of a plain or sharded model.

    A sharded model is gathered tensor by tensor, so all ranks must call this; one of them writes, and holds at most one
    file's tensors. The folder is filled in place: write beside and rename after a barrier to make it appear whole.

    Args:
        model: plain, or sharded by `fully_shard`.
        config: its configuration.
        out_dir: made if it is not there.
        tokenizer_dir: folder or hub id whose tokenizer files are copied; None for none.
        shape: one of `SHAPES`; "hf" needs the VQGAN.
        vqgan_dir: the VQGAN to put in for "hf".
        dtype: type of the written weights; None keeps the model's.
        is_writer: whether this process writes; None: the first rank of the mesh of a sharded model, every process
            that has a plain one.
    """
    parameters = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    if is_writer is None:
        mesh = getattr(next(iter(parameters.values())), "device_mesh", None)
        is_writer = mesh is None or not any(mesh.get_coordinate())
    shapes = {name: (tuple(p.shape), dtype or p.dtype) for name, p in parameters.items()}

    def get(name: str) -> torch.Tensor:
        parameter = parameters[name]
        return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter

    _write_checkpoint(config, out_dir, shapes, get, shape, vqgan_dir, tokenizer_dir, is_writer)


def convert_checkpoint(
    source: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    shape: str = "xllmx",
    image_head_init: str = "keep",
    vqgan_dir: str | os.PathLike | None = None,
    tokenizer_dir: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """
    Rewrite a checkpoint file by file; the new folder appears whole.

    Args:
        source: folder or hub id of either shape.
        out_dir: must not exist.
        shape: one of `SHAPES`. For "hf" the VQGAN comes from `vqgan_dir`, or from the source if that holds one.
        image_head_init: what becomes of the rows of `lm_head` of image tokens: "zero" (the recipe's start from a
            text model), "keep", or "normal" (drawn with `initializer_range`).
        tokenizer_dir: its tokenizer files are copied; by default those of the source.
        dtype: type of the written weights; None keeps the source's.
        seed: of "normal".
        overrides: configuration values, e.g. `tie_head_norm=False`.

    Raises:
        FileExistsError: `out_dir` is there already.
        ValueError: an unknown option, or no image tokens in the vocabulary of the configuration.
    """
    out_dir, source = Path(out_dir), resolve_checkpoint(source)
    if image_head_init not in IMAGE_HEAD_INITS:
        raise ValueError(f"image_head_init is {image_head_init!r}; it must be one of {', '.join(IMAGE_HEAD_INITS)}.")
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists already; remove it or choose another folder.")
    config, reader = load_config(source, **overrides), WeightReader(source)
    model = build_model(config)  # on meta: only names and shapes
    image_ids = model.image_token_ids(torch.device("cpu"))
    if image_head_init != "keep" and not len(image_ids):
        raise ValueError(f"the vocabulary_map in {source / 'config.json'} names no image tokens (IMGIMG...).")
    parameters = dict(model.named_parameters())
    _check_names_and_shapes(parameters, reader)

    def get(name: str) -> torch.Tensor:
        tensor = reader.read(name)
        if name in parameters and tensor.shape != parameters[name].shape:
            tensor = regroup_head_norm(name, tensor, parameters[name].shape[0])
        if name == HEAD and image_head_init == "zero":
            tensor = tensor.index_fill(0, image_ids, 0)
        elif name == HEAD and image_head_init == "normal":
            rows = torch.empty(len(image_ids), tensor.shape[1])
            rows.normal_(0.0, config.initializer_range, generator=torch.Generator().manual_seed(seed))
            tensor = tensor.index_copy(0, image_ids, rows.to(tensor.dtype))
        return tensor

    shapes = {name: (tuple(p.shape), dtype or reader.dtype(name)) for name, p in parameters.items()}
    if shape == "hf" and vqgan_dir is None:
        vqgan_names = [name for name in reader.names if name.startswith(VQGAN_PREFIX)]
        shapes |= {name: (reader.shape(name), reader.dtype(name)) for name in vqgan_names}
    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    _write_checkpoint(config, partial, shapes, get, shape, vqgan_dir, tokenizer_dir or source, True)
    os.replace(partial, out_dir)
    return out_dir


def prepare_starting_point(
    source: str | os.PathLike, out_dir: str | os.PathLike, image_head_init: str = "zero", seed: int = 0
) -> Path:
    """
    The recipe's starting point: `source` with new image rows in `lm_head`, kept in `out_dir`.

    An `out_dir` that is there is taken as it is (it is whole). To be called by one process.
    """
    if Path(out_dir).is_dir():
        return Path(out_dir)
    Path(out_dir).parent.mkdir(parents=True, exist_ok=True)
    return convert_checkpoint(source, out_dir, image_head_init=image_head_init, seed=seed)


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


def copy_tokenizer_files(tokenizer_dir: str | os.PathLike, out_dir: str | os.PathLike) -> None:
    """Copy what a tokenizer is made of from a folder or hub id (nothing, if the folder has none)."""
    source = resolve_checkpoint(tokenizer_dir, with_weights=False)
    for file_name in TOKENIZER_FILES:
        if (source / file_name).is_file():
            shutil.copyfile(source / file_name, Path(out_dir) / file_name)


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


def _write_checkpoint(
    config: ChameleonXLLMXConfig,
    out_dir: str | os.PathLike,
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]],
    get: Callable[[str], torch.Tensor],
    shape: str,
    vqgan_dir: str | os.PathLike | None,
    tokenizer_dir: str | os.PathLike | None,
    is_writer: bool,
) -> None:
    """Write one checkpoint in the given shape from named tensors in ours (and VQGAN tensors, for "hf")."""
    if shape not in SHAPES:
        raise ValueError(f"the shape of a checkpoint is {shape!r}; it must be one of {', '.join(SHAPES)}.")
    values, get_out = config.to_dict(), get
    values["architectures"] = ["ChameleonXLLMXForConditionalGeneration"]
    if shape == "hf":
        vqgan_state, vqgan_config = _vqgan_tensors(vqgan_dir) if vqgan_dir else ({}, None)
        shapes = shapes | {name: (tuple(t.shape), t.dtype) for name, t in vqgan_state.items()}
        if not any(name.startswith(VQGAN_PREFIX) for name in shapes):
            raise ValueError("the hf shape holds the VQGAN, and there is none: give its folder (vqgan_dir).")
        rows = {".q_norm.": config.num_attention_heads, ".k_norm.": config.num_key_value_heads}
        heads = {name: n for name in shapes for part, n in rows.items() if part in name}
        shapes |= {name: ((n, *shapes[name][0][1:]), shapes[name][1]) for name, n in heads.items()}
        values["architectures"] = ["ChameleonForConditionalGeneration"]
        values["vq_config"] = vqgan_config or values["vq_config"]
        for ours in ("dropout", "z_loss_weight", "mask_image_logits", "tie_head_norm"):
            values.pop(ours, None)

        def get_out(name: str) -> torch.Tensor:
            tensor = vqgan_state[name] if name in vqgan_state else get(name)
            return regroup_head_norm(name, tensor, heads[name]) if name in heads else tensor

    values["dtype"] = str(shapes[HEAD][1]).removeprefix("torch.")
    if is_writer:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
    write_weights(out_dir, [(n, s, t) for n, (s, t) in shapes.items()], get_out, is_writer)
    if is_writer:
        config_class = ChameleonConfig if shape == "hf" else ChameleonXLLMXConfig
        config_class.from_dict(values).save_pretrained(out_dir)
        if tokenizer_dir is not None:
            copy_tokenizer_files(tokenizer_dir, out_dir)


def _vqgan_tensors(vqgan_dir: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The VQGAN as stock Chameleon names it (without the decoder half, which it lacks), and its configuration."""
    from model.vqgan import load_vqgan

    vqgan = load_vqgan(vqgan_dir)
    state = {name: tensor for name, tensor in vqgan.state_dict().items() if not name.startswith("decoder.")}
    return {VQGAN_PREFIX + name: tensor.contiguous() for name, tensor in state.items()}, vqgan.config.to_dict()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Rewrite a checkpoint: its shape, type or image head.")
    parser.add_argument("source", help="checkpoint folder or hub id, of either shape")
    parser.add_argument("out_dir", help="folder to write; must not exist")
    parser.add_argument("--shape", choices=SHAPES, default="xllmx", help="shape to write (default: %(default)s)")
    parser.add_argument("--vqgan_dir", help="VQGAN to put into the hf shape (default: the source's own)")
    parser.add_argument("--tokenizer", help="folder or hub id of the tokenizer to copy (default: the source)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="type to write (default: the source's)")
    parser.add_argument(
        "--image_head_init",
        choices=IMAGE_HEAD_INITS,
        default="keep",
        help="rows of lm_head of image tokens: zero (start from a text model), keep, normal (default: %(default)s)",
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
        convert_checkpoint(
            args.source,
            args.out_dir,
            shape=args.shape,
            image_head_init=args.image_head_init,
            vqgan_dir=args.vqgan_dir,
            tokenizer_dir=args.tokenizer,
            dtype=dtype,
            seed=args.seed,
            **overrides,
        )
    except (ValueError, OSError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out_dir} ({args.shape})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
