"""Checkpoints of a training with frozen weights (model/decoder/trainable.py), and the one reader of all checkpoints.

base_weights.json          where the frozen weights are, a fingerprint of their files, and how training set the
                           image rows of their `lm_head`
adapter_config.json, adapter_model.safetensors     of LoRA, as peft writes and loads them
trained.safetensors        without LoRA: the trained parameters by name; `NAME.image_rows` are the rows of the image
                           tokens of `NAME.weight`
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.decoder.chameleon import ChameleonXLLMXConfig, build_model
from model.decoder.trainable import EMBEDDING, HEAD, TrainableOptions, lora_config
from model.decoder.trained_rows import ROWS_NAME
from model.weights.hf_folder import load_config, resolve_checkpoint
from model.weights.weight_files import WeightReader, open_file

NOTE_NAME = "base_weights.json"
TRAINED_NAME = "trained.safetensors"
# The names that peft gives to files and tensors.
ADAPTER_NAME, ADAPTER_CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
_PEFT_PREFIX = "base_model.model."
_PEFT_ROWS = "token_adapter.trainable_tokens_delta"
_HALVES = {"lora_A", "lora_B"}
IMAGE_HEAD_INITS = ("zero", "keep", "normal")
# Samples of every tensor in a fingerprint.
_SAMPLE_BYTES, _NUM_SAMPLES = 1 << 12, 3
# Of the head and the embedding: evenly spread, so that rows of image tokens (1/8 of a Chameleon's) are among them.
_NUM_ROW_SAMPLES = 256


@dataclass(frozen=True)
class BaseWeights:
    """
    Where frozen weights come from; `base_weights.json` holds these fields.

    `image_head_init` and `seed`: see `set_image_rows`; trained rows replace those rows.
    """

    # A folder (absolute) or hub id.
    source: str
    # See `fingerprint_weights`.
    fingerprint: str
    # From the checkpoint to the folder, for an --output_dir that is moved as a whole; None: a hub id.
    relative: str | None = None
    # The commit of a hub id; None: a folder, or an older checkpoint.
    revision: str | None = None
    image_head_init: str = "keep"
    seed: int = 0

    @classmethod
    def of(
        cls, source: str | os.PathLike, output_dir: Path, image_head_init: str = "keep", seed: int = 0
    ) -> "BaseWeights":
        """The note of checkpoints in `output_dir`. Raises FileNotFoundError if `source` is not there."""
        found = resolve_checkpoint(source)
        relative = revision = None
        if Path(source).is_dir():
            source = os.path.abspath(source)
            relative = os.path.relpath(source, os.path.abspath(output_dir / "checkpoint"))
        elif found.parent.name == "snapshots":
            # The hub's cache keeps a model in snapshots/COMMIT.
            revision = found.name
        return cls(str(source), fingerprint_weights(found), relative, revision, image_head_init, seed)

    @classmethod
    def read(cls, folder: Path) -> "BaseWeights":
        """The note of a checkpoint. Raises ValueError if it is damaged."""
        try:
            return cls(**json.loads((folder / NOTE_NAME).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / NOTE_NAME} is damaged ({error!r}); copy the checkpoint again.") from None

    def find(self, folder: Path) -> Path:
        """
        The folder of the frozen weights of the checkpoint `folder`, with the fingerprint of the note.

        Raises FileNotFoundError if it is gone, ValueError if it has other weights.
        """
        places = [Path(self.source), *([(folder / self.relative).resolve()] if self.relative else [])]
        places = [place for place in places if place.is_dir()]
        partial = f"{folder} holds only what was trained; the rest comes from"
        try:
            # Nothing is fetched from the hub while a folder is there.
            places = places or [resolve_checkpoint(self.source)]
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{partial} {self.source}, which is gone ({error}). Put it back, or write where it is now as `source` "
                f"into {folder / NOTE_NAME}."
            ) from None
        for place in places:
            if fingerprint_weights(place) == self.fingerprint:
                return place
        was = f" (commit {self.revision} of {self.source})" if self.revision else ""
        raise ValueError(
            f"{partial} {places[0]}, whose weights have changed since the training{was}. Put the old ones back, or "
            f"write where they are as `source` into {folder / NOTE_NAME}."
        )


def fingerprint_weights(folder: Path) -> str:
    """
    SHA-256 (hexadecimal) over names, sizes and headers of a folder's weight files, and samples of every tensor.

    Reads a few MB of a 7B model. Raises ValueError for a damaged file.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        # Raises for a damaged file.
        open_file(path)
        # Without a buffer nothing is read ahead of the samples.
        with path.open("rb", buffering=0) as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            digest.update(header)
            for name, place in json.loads(header).items():
                if name == "__metadata__":
                    continue
                start, end = (8 + len(header) + offset for offset in place["data_offsets"])
                is_vocabulary = name.endswith((f"{HEAD}.weight", f"{EMBEDDING.rpartition('.')[2]}.weight"))
                for part in _sample(start, end, _NUM_ROW_SAMPLES if is_vocabulary else _NUM_SAMPLES):
                    file.seek(part.start)
                    digest.update(file.read(len(part)))
    if (folder / NOTE_NAME).is_file():
        digest.update(BaseWeights.read(folder).fingerprint.encode())
    return digest.hexdigest()


def _sample(start: int, end: int, count: int) -> list[range]:
    """`count` pieces of `_SAMPLE_BYTES`, evenly spread from the first byte to the last, or the whole range."""
    room = end - start - _SAMPLE_BYTES
    if room <= (count - 1) * _SAMPLE_BYTES:
        return [range(start, end)]
    places = [start + room * part // (count - 1) for part in range(count)]
    return [range(place, place + _SAMPLE_BYTES) for place in places]


def open_weights(folder: str | os.PathLike, image_head_init: str = "keep", seed: int = 0) -> WeightReader:
    """
    A reader of a checkpoint's whole weights, of either kind, with image rows of `lm_head` set by `set_image_rows`.

    Of a folder of what was trained: adapters are merged in fp32, trained rows and parameters replace the frozen ones.
    `dtype` remains the frozen weights' type; changed tensors are read in fp32. Raises FileNotFoundError and ValueError
    as `WeightReader`, `BaseWeights.find` and `set_image_rows`, or for a damaged file of what was trained.
    """
    folder = Path(folder)
    if (folder / NOTE_NAME).is_file():
        base = BaseWeights.read(folder)
        reader = open_weights(base.find(folder), base.image_head_init, base.seed)
        reader.folder = folder
        _change_to_trained(reader)
    else:
        reader = WeightReader(folder)
    set_image_rows(reader, image_head_init, seed)
    return reader


def image_token_ids(config: ChameleonXLLMXConfig) -> torch.Tensor:
    """Sorted int64 ids of the image tokens of a configuration."""
    # On meta: no weights are made.
    return build_model(config).image_token_ids(torch.device("cpu"))


def set_image_rows(reader: WeightReader, image_head_init: str, seed: int) -> None:
    """
    Makes a reader give `lm_head` with image rows of zeros ("zero"), or of normal(0, `initializer_range`) by `seed`.

    "keep" changes nothing. Raises ValueError if the vocabulary of the configuration has no image tokens.
    """
    if image_head_init == "keep":
        return
    config = load_config(reader.folder)
    ids = image_token_ids(config)
    if not len(ids):
        raise ValueError(
            f"the vocabulary_map in {reader.folder / 'config.json'} names no image tokens (IMGIMG...), whose rows of "
            f"lm_head are to be reinitialized ({image_head_init}); keep them as they are: --image_head_init keep."
        )

    def reinitialize(head: torch.Tensor) -> torch.Tensor:
        # All rows at once, on every rank: the values do not depend on how ranks share the head.
        rows = torch.zeros(len(ids), head.shape[1])
        if image_head_init == "normal":
            rows.normal_(0.0, config.initializer_range, generator=torch.Generator().manual_seed(seed))
        return head.index_copy(0, ids, rows.to(head.dtype))

    reader.change(f"{HEAD}.weight", reinitialize)


def _change_to_trained(reader: WeightReader) -> None:
    """Makes a reader of frozen weights give what was trained, from the files in `reader.folder`."""
    path, scale = reader.folder / TRAINED_NAME, 0.0
    if (reader.folder / ADAPTER_CONFIG_NAME).is_file():
        path = reader.folder / ADAPTER_CONFIG_NAME
        try:
            adapter = json.loads(path.read_text(encoding="utf-8"))
            scale = adapter["lora_alpha"] / adapter["r"]
        except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); copy the checkpoint again.") from None
        path = reader.folder / ADAPTER_NAME
    file = open_file(path)
    ids = image_token_ids(load_config(reader.folder))
    # By the whole model's parameter: the halves of its adapter, its image rows, or all of it.
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name in file.keys():  # noqa: SIM118
        module, _, kind = _own_name(name).rpartition(".")
        target = f"{module}.weight" if kind in {ROWS_NAME, *_HALVES} else f"{module}.{kind}"
        parts.setdefault(target, {})[kind] = file.get_tensor(name).float()
    for target, trained in parts.items():
        if target not in reader or len(trained) != (2 if _HALVES & trained.keys() else 1):
            raise ValueError(
                f"{path}: {', '.join(sorted(trained))} of {target.rpartition('.')[0]} fits no parameter of the model; "
                "an adapter is a pair of lora_A and lora_B. Copy the checkpoint again."
            )
        reader.change(target, functools.partial(_merge, trained=trained, ids=ids, scale=scale))


def _merge(weight: torch.Tensor, trained: Mapping[str, torch.Tensor], ids: torch.Tensor, scale: float) -> torch.Tensor:
    """A frozen weight with what was trained of it, in fp32."""
    if ROWS_NAME in trained:
        return weight.float().index_copy(0, ids, trained[ROWS_NAME])
    if "lora_A" in trained:
        return weight.float() + scale * (trained["lora_B"] @ trained["lora_A"])
    return next(iter(trained.values()))


@dataclass(frozen=True)
class AdapterWriter:
    """
    Writes the Hugging Face files of a training with frozen weights, except config.json and the tokenizer.

    `dtype`: of the frozen weights on file, for config.json.
    """

    base: BaseWeights
    options: TrainableOptions
    dtype: torch.dtype

    def write(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        get: Callable[[str], torch.Tensor],
        config: ChameleonXLLMXConfig,
    ) -> None:
        """
        Args:
            shapes: shape and type of the trained parameters by name.
            get: gives each as a full tensor on the host, called once for each in this order.
        """
        (folder / NOTE_NAME).write_text(json.dumps(dataclasses.asdict(self.base), indent=1) + "\n")
        tensors = {name: get(name).detach().clone().contiguous() for name in shapes}
        if not self.options.lora_rank:
            save_file(tensors, folder / TRAINED_NAME, metadata={"format": "pt"})
            return
        save_file({_peft_name(name): t for name, t in tensors.items()}, folder / ADAPTER_NAME, {"format": "pt"})
        more = {"base_model_name_or_path": self.base.source, "task_type": "CAUSAL_LM"}
        if self.options.trains_image_rows:
            ids = image_token_ids(config).tolist()
            more["trainable_token_indices"] = {part.rpartition(".")[2]: ids for part in (EMBEDDING, HEAD)}
        lora_config(self.options, **more).save_pretrained(folder)


def _peft_name(name: str) -> str:
    # After `.default.`, peft's name of the adapter in memory.
    module, _, kind = name.replace(".default.", ".").rpartition(".")
    return f"{_PEFT_PREFIX}{module}.{_PEFT_ROWS if kind == ROWS_NAME else kind}"


def _own_name(name: str) -> str:
    """`MODULE.lora_A`, `MODULE.lora_B`, `MODULE.image_rows`, or the parameter's own name."""
    name = name.removeprefix(_PEFT_PREFIX).replace(_PEFT_ROWS, ROWS_NAME)
    return name.removesuffix(".weight") if ".lora_" in name else name
