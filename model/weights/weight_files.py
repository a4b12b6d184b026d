"""Weight files of a Hugging Face folder: one or several safetensors and their index."""

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The types of weights on file; others are quantized.
FLOATS = ("F64", "F32", "BF16", "F16")
# The default of the hub's own tools.
MAX_FILE_BYTES = 5 * 10**9


class WeightReader:
    """
    Reads single tensors from a folder; keeps nothing in memory.

    Raises:
        FileNotFoundError: neither `model.safetensors` nor an index is there, or a file of the index is missing.
        ValueError: the index or a file is damaged. A damaged file of an index is found when it is first read.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._file_of = _find_files(self.folder)
        self._open = functools.cache(open_file)
        self._changes: dict[str, list[Callable[[torch.Tensor], torch.Tensor]]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(self._file_of[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The type on file."""
        return self._open(self._file_of[name]).get_tensor(name).dtype

    def is_float(self, name: str) -> bool:
        """Whether the tensor on file is of one of `FLOATS`."""
        return self._open(self._file_of[name]).get_slice(name).get_dtype() in FLOATS

    def change(self, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """From now on `read` gives what `change` makes of the tensor, after earlier changes of the same name."""
        self._changes.setdefault(name, []).append(change)

    def read(self, name: str) -> torch.Tensor:
        """A tensor on the host. An unchanged one is mapped: only the rows that are used are read from the disk."""
        tensor = self._open(self._file_of[name]).get_tensor(name)
        for change in self._changes.get(name, ()):
            tensor = change(tensor)
        return tensor


def write_weights(
    out_dir: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor],
    get: Callable[[str], torch.Tensor],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """
    Write safetensors (and an index, if there are several files), holding the tensors of one file at a time.

    Args:
        tensors: tensors on meta, with the shapes and types to write, by name.
        get: gives a tensor by name, on any device and in any type; called once for each, in order.
        max_file_bytes: a file is closed before it would grow beyond this (a tensor is never split).
    """
    split = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=max_file_bytes
    )
    for file_name, names in split.filename_to_tensors.items():
        loaded = {name: get(name).detach().to("cpu", tensors[name].dtype).contiguous() for name in names}
        save_file(loaded, Path(out_dir) / file_name, metadata={"format": "pt"})
        # Before the first tensor of the next file is gathered.
        del loaded
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (Path(out_dir) / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def open_file(path: Path) -> safe_open:
    """One safetensors file. Raises ValueError if it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); copy or write the checkpoint again.") from None


def _find_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    index_path = folder / INDEX_FILE
    if index_path.is_file():
        try:
            weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
            file_of = {name: folder / file for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index_path} is damaged ({error!r}); copy or write the checkpoint again.") from None
        missing = sorted({path.name for path in file_of.values() if not path.is_file()})
        if missing:
            raise FileNotFoundError(f"{index_path} names {', '.join(missing)}, which are not in the folder.")
        return file_of
    if not (folder / SINGLE_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there. Give a folder that a "
            "training run or the hub has written (PyTorch .bin files are not read)."
        )
    with open_file(folder / SINGLE_FILE) as file:
        return dict.fromkeys(file.keys(), folder / SINGLE_FILE)
