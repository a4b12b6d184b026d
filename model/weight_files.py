"""
The weight files of a Hugging Face folder: one or several safetensors and their index.

Where it stands: the one module that knows their names and layout; `model/convert.py` decides what is read and written.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.whole_file import open_whole

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_FILE_BYTES = 5 * 10**9  # what the hub's own tools use

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class WeightReader:
    """
    Reads single tensors, or parts of them, from a folder; nothing is kept in memory.

    Args:
        folder: holds `model.safetensors`, or an index and the files that it names.

    Raises:
        FileNotFoundError: neither is there, or a file of the index is missing.
        ValueError: the index or a file is damaged; the latter is found when it is first read.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._file_of = _find_files(self.folder)
        self._open: dict[str, safe_open] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Raises ValueError for a type that weights do not have (quantised files cannot be trained)."""
        stored = self._slice(name).get_dtype()
        if stored not in DTYPES:
            raise ValueError(f"{name} in {self.folder} has the type {stored}; weights must be one of {list(DTYPES)}.")
        return DTYPES[stored]

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> torch.Tensor:
        """A tensor, or the part of it given by one slice per dimension, in its own type on the host."""
        return self._slice(name)[part] if part else self._file(name).get_tensor(name)

    def _slice(self, name: str):
        return self._file(name).get_slice(name)

    def _file(self, name: str) -> safe_open:
        file_name = self._file_of[name]
        if file_name not in self._open:
            self._open[file_name] = open_file(self.folder / file_name)
        return self._open[file_name]


class ChangedReader(WeightReader):
    """Reads what `base` reads; subclasses change some of the tensors."""

    def __init__(self, base: WeightReader):
        self.folder, self._base = base.folder, base

    def __contains__(self, name: str) -> bool:
        return name in self._base

    @property
    def names(self) -> list[str]:
        return self._base.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(name)


def write_weights(
    out_dir: str | os.PathLike,
    tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]],
    get: Callable[[str], torch.Tensor],
    is_writer: bool = True,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """
    Write safetensors (and an index, if there are several files), holding one file's tensors at a time.

    Args:
        out_dir: an existing folder.
        tensors: name, shape and type of all tensors to write, in order.
        get: gives a tensor by name, on any device. It is called for every tensor in the same order, also where
            `is_writer` is false, because gathering a sharded tensor needs all ranks.
        is_writer: whether this process writes.
        max_file_bytes: a file is closed before it would grow beyond this (a tensor is never split).
    """
    out_dir, groups, sizes = Path(out_dir), [[]], []
    file_bytes = 0
    for name, shape, dtype in tensors:
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if groups[-1] and file_bytes + num_bytes > max_file_bytes:
            groups.append([])
            file_bytes = 0
        groups[-1].append((name, dtype))
        file_bytes += num_bytes
        sizes.append(num_bytes)
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = [SINGLE_FILE]
    for file_name, group in zip(names, groups, strict=True):
        loaded = {}
        for name, dtype in group:
            tensor = get(name)
            if is_writer:
                loaded[name] = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
            del tensor  # before the next one is gathered
        if is_writer:
            partial = out_dir / (file_name + ".partial")
            save_file(loaded, partial, metadata={"format": "pt"})
            os.replace(partial, out_dir / file_name)
    if is_writer and len(groups) > 1:
        weight_map = {name: file for file, group in zip(names, groups, strict=True) for name, _ in group}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        write_text_file(out_dir / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")


def open_file(path: Path) -> safe_open:
    """One safetensors file. Raises ValueError if it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); copy or write the checkpoint again.") from None


def write_text_file(path: str | os.PathLike, text: str) -> None:
    """Write a small file so that it is whole or absent."""
    with open_whole(path) as file:
        file.write(text.encode())


def _find_files(folder: Path) -> dict[str, str]:
    """The file of every tensor."""
    index_path = folder / INDEX_FILE
    if index_path.is_file():
        try:
            file_of = dict(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"])
            missing = sorted({file for file in file_of.values() if not (folder / file).is_file()})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index_path} is damaged ({error!r}); copy or write the checkpoint again.") from None
        if missing:
            raise FileNotFoundError(f"{index_path} names {', '.join(missing)}, which are not in the folder.")
        return file_of
    if not (folder / SINGLE_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there. Give a folder that a "
            "training run or the hub has written (PyTorch .bin files are not read)."
        )
    with open_file(folder / SINGLE_FILE) as file:
        return dict.fromkeys(file.keys(), SINGLE_FILE)
