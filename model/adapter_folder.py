"""
A checkpoint that holds what was trained, and says where the rest comes from.

Where it stands: what a training with frozen weights (model/trainable.py) leaves as its Hugging Face files. Beside
config.json and the tokenizer such a folder holds

    base_weights.json          where the frozen weights are, a fingerprint of their files, and how training set the
                               image rows of their `lm_head`
    adapter_config.json, adapter_model.safetensors     of LoRA, as peft writes them and loads them
    trained.safetensors        without LoRA: the trained parameters by name; `NAME.image_rows` are the rows of the image
                               tokens of `NAME.weight`

`open_weights` reads it like any other checkpoint, put together tensor by tensor; `model/convert.py` writes that down.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.decoder.chameleon import ChameleonXLLMXConfig
from model.hf_folder import load_config, resolve_checkpoint
from model.image_head import ImageHeadReader, image_token_ids
from model.trainable import EMBEDDING, HEAD, TrainableOptions, lora_config
from model.trained_rows import ROWS_NAME
from model.weight_files import ChangedReader, WeightReader, open_file, write_text_file

NOTE_NAME = "base_weights.json"
TRAINED_NAME = "trained.safetensors"
ADAPTER_NAME, ADAPTER_CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"  # peft's
_PEFT_PREFIX = "base_model.model."
_PEFT_ROWS = "token_adapter.trainable_tokens_delta"
_SAMPLE_BYTES, _NUM_SAMPLES = 1 << 12, 3  # of every tensor
# Of the head and the embedding: evenly spread, so that rows of image tokens (1/8 of a Chameleon's) are among them.
_NUM_ROW_SAMPLES = 256


@dataclass(frozen=True)
class BaseWeights:
    """
    Where frozen weights come from; `base_weights.json` holds this.

    Attributes:
        source: the folder (absolute) or hub id.
        fingerprint: of its weight files, see `fingerprint_weights`.
        relative: the folder from the checkpoint's own, for an --output_dir that is moved as a whole; None: a hub id.
        revision: the commit of a hub id; None: a folder, or of an older checkpoint.
        image_head_init, seed: what became of the image rows of `lm_head`, see `open_weights`. Trained rows go before.
    """

    source: str
    fingerprint: str
    relative: str | None = None
    revision: str | None = None
    image_head_init: str = "keep"
    seed: int = 0

    @classmethod
    def of(
        cls, source: str | os.PathLike, output_dir: Path, image_head_init: str = "keep", seed: int = 0
    ) -> "BaseWeights":
        """As the checkpoints in `output_dir` shall note it. Raises FileNotFoundError if it is not there."""
        found = resolve_checkpoint(source)
        fingerprint = fingerprint_weights(found)
        if not Path(source).is_dir():  # the hub's cache keeps it in snapshots/COMMIT
            revision = found.name if found.parent.name == "snapshots" else None
            return cls(str(source), fingerprint, None, revision, image_head_init, seed)
        where = os.path.abspath(source)
        relative = os.path.relpath(where, os.path.abspath(output_dir / "checkpoint"))
        return cls(where, fingerprint, relative, None, image_head_init, seed)

    @classmethod
    def read(cls, folder: Path) -> "BaseWeights":
        """What a checkpoint notes. Raises ValueError if the note is damaged."""
        try:
            note = cls(**json.loads((folder / NOTE_NAME).read_text(encoding="utf-8")))
            if not isinstance(note.source, str):
                raise TypeError(f"source is {note.source!r}")
            return note
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / NOTE_NAME} is damaged ({error!r}); copy the checkpoint again.") from None

    def find(self, folder: Path) -> Path:
        """
        The folder of the frozen weights of the checkpoint `folder`, seen to be as they were.

        Raises:
            FileNotFoundError: they are gone.
            ValueError: they are others.
        """
        nearby = folder / self.relative if self.relative else None
        has_nearby = nearby is not None and nearby.is_dir()
        found, is_gone = None, ""
        try:
            if Path(self.source).is_dir() or not has_nearby:  # nothing is fetched that lies beside
                found = resolve_checkpoint(self.source)
        except FileNotFoundError as error:
            is_gone = str(error)
        if found is not None and fingerprint_weights(found) == self.fingerprint:
            return found
        if has_nearby and fingerprint_weights(nearby) == self.fingerprint:
            return nearby.resolve()
        if is_gone:
            raise FileNotFoundError(
                f"{folder} holds only what was trained; the rest comes from {self.source}, which is gone ({is_gone}). "
                f"Put it back, or write where it is now as `source` into {folder / NOTE_NAME}."
            )
        was = f" (commit {self.revision} of {self.source})" if self.revision else ""
        raise ValueError(
            f"{folder} holds only what was trained; the rest comes from {found or nearby.resolve()}, whose weights are "
            f"not those any more that it was trained with{was}. Put those back, or write where they are as `source` "
            f"into {folder / NOTE_NAME}."
        )


def fingerprint_weights(folder: Path) -> str:
    """
    Of the weight files of a folder: sha256 over their names, sizes, headers, and samples of every tensor.

    A few MB are read of a model of 7B. Raises ValueError for a file that is no safetensors.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        open_file(path)  # refuses what is damaged
        with path.open("rb", buffering=0) as file:  # nothing is read ahead
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
    """`count` pieces of `_SAMPLE_BYTES`, evenly spread from the first byte to the last; all of it, if it is smaller."""
    room = end - start - _SAMPLE_BYTES
    if room <= (count - 1) * _SAMPLE_BYTES:
        return [range(start, end)]
    places = [start + room * part // (count - 1) for part in range(count)]
    return [range(place, place + _SAMPLE_BYTES) for place in places]


def open_weights(folder: str | os.PathLike, image_head_init: str = "keep", seed: int = 0) -> WeightReader:
    """
    A reader of a checkpoint's whole weights, of either kind, with image rows of `lm_head` as told (`ImageHeadReader`).

    Raises like `WeightReader`, `BaseWeights.find` and `ImageHeadReader`.
    """
    folder = Path(folder)
    reader = AdaptedReader(folder) if (folder / NOTE_NAME).is_file() else WeightReader(folder)
    return reader if image_head_init == "keep" else ImageHeadReader(reader, image_head_init, seed)


class AdaptedReader(ChangedReader):
    """
    Reads weights as they are with what was trained: the adapters merged in fp32, trained rows and parameters put in.

    Their types on file are those of the frozen weights; what was trained is given in fp32.
    """

    def __init__(self, folder: Path):
        base = BaseWeights.read(folder)
        super().__init__(open_weights(base.find(folder), base.image_head_init, base.seed))
        self.folder = folder
        self._scale = 0.0
        path = folder / TRAINED_NAME
        if (folder / ADAPTER_CONFIG_NAME).is_file():
            path = folder / ADAPTER_NAME
            self._scale = _read_scale(folder / ADAPTER_CONFIG_NAME)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: copy the checkpoint again.")
        file = open_file(path)
        self._trained = {_own_name(name): file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        halves = {name[:-1] for name in self._trained if name.endswith((".lora_A", ".lora_B"))}
        lacking = [half + side for half in sorted(halves) for side in "AB" if half + side not in self._trained]
        if lacking:
            raise ValueError(f"{path} has no {lacking[0]}: copy the checkpoint again.")
        unknown = [name for name in self._trained if _weight_name(name) not in self._base]
        if unknown:
            raise ValueError(f"{path} holds {unknown[0]}, for which the frozen weights have nothing.")
        self._row_ids = image_token_ids(load_config(folder))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._trained[name].get_shape()) if name in self._trained else self._base.shape(name)

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> torch.Tensor:
        if name in self._trained:
            return self._trained[name][part or slice(None)]
        module = name.removesuffix(".weight")
        rows, adapter = self._trained.get(f"{module}.{ROWS_NAME}"), self._trained.get(f"{module}.lora_A")
        if rows is not None:
            full = self._base.read(name).float().index_copy(0, self._row_ids, rows[:].float())
        elif adapter is not None:
            added = self._trained[f"{module}.lora_B"][:].float() @ adapter[:].float()
            full = self._base.read(name).float() + self._scale * added
        else:
            return self._base.read(name, part)
        return full[part] if part else full


@dataclass(frozen=True)
class AdapterWriter:
    """Writes the Hugging Face files of a training with frozen weights, but for config.json and the tokenizer.

    `dtype` is that of the weights on file, which config.json tells."""

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
            folder: is there.
            shapes: shape and type by name of what is trained.
            get: gives each as a full tensor on the host, called once for each in this order.
        """
        write_text_file(folder / NOTE_NAME, json.dumps(dataclasses.asdict(self.base), indent=1) + "\n")
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


def _read_scale(path: Path) -> float:
    """alpha / rank, of peft's configuration. Raises ValueError if it is damaged."""
    try:
        adapter = json.loads(path.read_text(encoding="utf-8"))
        return adapter["lora_alpha"] / adapter["r"]
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); copy the checkpoint again.") from None


def _peft_name(name: str) -> str:
    name = name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")
    if name.endswith(f".{ROWS_NAME}"):
        name = name.removesuffix(ROWS_NAME) + _PEFT_ROWS
    return _PEFT_PREFIX + name


def _own_name(name: str) -> str:
    """`MODULE.lora_A`, `MODULE.lora_B`, `MODULE.image_rows`, or the parameter's own name."""
    name = name.removeprefix(_PEFT_PREFIX).replace(_PEFT_ROWS, ROWS_NAME)
    return name.removesuffix(".weight") if ".lora_" in name else name


def _weight_name(name: str) -> str:
    """The parameter of the whole model that a trained tensor belongs to."""
    module, _, kind = name.rpartition(".")
    return f"{module}.weight" if kind in (ROWS_NAME, "lora_A", "lora_B") else name
