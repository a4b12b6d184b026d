"""Saves a checkpoint while training continues; `finetune_solver.py` builds one `CheckpointSaver` per run.

`save` copies this rank's shards of weights and optimizer state to host memory and returns. A thread of
`torch.distributed.checkpoint` (DCP) then writes the shards. The first rank completes the folder as described in
model/checkpoint.py: Hugging Face files read back from the shards, fsync, rename.
"""

import contextlib
import copy
import dataclasses
import datetime
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from model.adapter_folder import AdapterWriter
from model.checkpoint import (
    SAVING_PREFIX,
    SHARDS_NAME,
    TRAINED_STATE,
    CheckpointOptions,
    Position,
    TrainerState,
    collect_versions,
    publish,
    remove_old,
    seal,
)
from model.convert import carried_vqgan, clean_name, export_tensors, write_config
from model.decoder.chameleon import ChameleonXLLMXConfig

# Ranks wait for the slowest disk here. A dead rank is noticed much earlier, by the collectives of training.
SAVE_TIMEOUT = datetime.timedelta(hours=2)


class SaveError(Exception):
    """A checkpoint could not be written; all ranks raise it, with the same message."""

    exit_code = 1


class CheckpointSaver:
    """Saves the checkpoints of one run. All ranks build it and call its methods in the same order.

    Args:
        options: where to save, how many checkpoints to keep, and whether in the background.
        model, optimizer: sharded; what they hold when `save` is called is saved.
        config: of the model.
        write_extras: writes more Hugging Face files (the tokenizer) into a folder; called on the first rank.
        say: prints a line; called on the first rank.
        adapted: writes the trained weights instead of the whole model, if other weights are frozen.
    """

    def __init__(
        self,
        options: CheckpointOptions,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: ChameleonXLLMXConfig,
        write_extras: Callable[[Path], None],
        say: Callable[[str], None],
        adapted: AdapterWriter | None = None,
    ) -> None:
        self._options, self._model, self._optimizer, self._config = options, model, optimizer, config
        self._write_extras, self._say, self._adapted = write_extras, say, adapted
        self._is_main = dist.get_rank() == 0
        self._device = next(model.parameters()).device
        # Groups of their own: a collective of the writing thread must not mix with those of training.
        self._group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        self._first_rank_group = dist.new_group([0], backend="gloo")
        # Frozen weights already have their VQGAN beside them.
        self._vqgan = {} if adapted else carried_vqgan(model, config, self._is_main)
        self._stager = _HostStager()
        self._saving: Future[Any] | None = None
        self._name = ""
        self._last_position: Position | None = None

    @property
    def is_writing(self) -> bool:
        """Whether a save of this rank is in progress."""
        return self._saving is not None and not self._saving.done()

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows of a failed save. Ranks sum this, then all of them call `wait`."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def save(self, name: str, state: TrainerState) -> None:
        """Saves a checkpoint as `output_dir/name`; returns as soon as training may change the weights.

        Waits for the save before it. The position that was saved last is not saved again under another name.

        Raises:
            SaveError: the disk is too small (nothing was written), or the save before failed, or, without
                `--async_save`, this one.
        """
        self.wait()
        if state.position == self._last_position:
            return
        started = time.perf_counter()
        model_state, optimizer_state = get_state_dict(self._model, self._optimizer, options=TRAINED_STATE)
        tensors = {"model": model_state, "optimizer": optimizer_state}
        self._check_space(name, tensors)
        # Versions come from git, a process: a loader worker forked meanwhile by the main thread would keep its pipe.
        state = dataclasses.replace(copy.deepcopy(state), versions=collect_versions())
        shapes = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in model_state.items()}

        def complete(folder: Path, metadata: dcp.Metadata) -> None:
            self._write_hf_files(folder, shapes, metadata)
            seal(folder, state)
            publish(folder, self._options.output_dir / name)
            remove_old(self._options.output_dir, self._options.ckpt_max_keep)
            self._say(f"saved {self._options.output_dir / name} in {time.perf_counter() - started:.1f} s")

        writer = _CheckpointWriter(self._options.output_dir / f"{SAVING_PREFIX}{name}", self._device, complete)
        self._name, self._last_position = name, state.position
        if self._options.async_save:
            self._saving = dcp.async_save(
                tensors, storage_writer=writer, process_group=self._group, async_stager=self._stager
            )
            return
        self._saving = Future()
        try:
            self._saving.set_result(dcp.save(tensors, storage_writer=writer, process_group=self._group))
        except (Exception, CheckpointException) as error:
            self._saving.set_exception(error)
        self.wait()

    def wait(self) -> None:
        """Waits until the last save is complete. Raises SaveError if it failed."""
        error = self._saving.exception() if self._saving is not None else None
        if error is None:
            return
        if self._is_main:
            shutil.rmtree(self._options.output_dir / f"{SAVING_PREFIX}{self._name}", ignore_errors=True)
        if not isinstance(error, CheckpointException):
            # The process group failed: another rank is gone.
            raise SaveError(f"checkpoint {self._name} was interrupted: {_one_line(error)}") from error
        rank, (cause, _) = next(iter(error.failures.items()))
        reason = str(cause) if dist.get_world_size() == 1 else f"rank {rank}: {cause}"
        raise SaveError(
            f"checkpoint {self._name} could not be written to {self._options.output_dir} ({reason}). Earlier checkpoints "
            "are unchanged: repair the disk, then start the same command again"
        )

    def _check_space(self, name: str, tensors: Mapping[str, Any]) -> None:
        problem, folder = None, self._options.output_dir
        if self._is_main:
            needed = _num_bytes(tensors) + _num_bytes(tensors["model"]) + _num_bytes(self._vqgan)
            problem = find_space_problem(folder, needed, shutil.disk_usage(folder).free, self._options.ckpt_max_keep)
        box = [problem]
        dist.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        if box[0] is not None:
            raise SaveError(f"checkpoint {name} was not begun: {box[0]}")

    def _write_hf_files(
        self, folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: dcp.Metadata
    ) -> None:
        reader = _ShardReader(folder / SHARDS_NAME, metadata)
        key_of = {clean_name(key): key for key in shapes}

        def read(name: str) -> torch.Tensor:
            shape, dtype = shapes[key_of[name]]
            full = torch.empty(shape, dtype=dtype)
            state = {"model": {key_of[name]: full}}
            dcp.load(state, storage_reader=reader, process_group=self._first_rank_group)
            return full

        self._write_extras(folder)
        shapes_by_name = {name: shapes[key] for name, key in key_of.items()}
        if self._adapted is None:
            export_tensors(shapes_by_name, read, self._config, folder, self._vqgan)
        else:
            write_config(self._config, folder, self._adapted.dtype)
            self._adapted.write(folder, shapes_by_name, read, self._config)


def find_space_problem(folder: Path, needed: int, free: int, keep: int) -> str | None:
    """Why a checkpoint of `needed` bytes should not be begun where `free` bytes are free, if so."""
    if needed <= free:
        return None
    kept = f"{keep} of them stay" if keep > 0 else "all of them stay"
    return (
        f"it needs {needed / 1e9:.3g} GB, and the disk of {folder} has {free / 1e9:.3g} GB free. Make room there: "
        f"checkpoints that are not needed can be removed ({kept} beside the one being written: --ckpt_max_keep), or "
        "move the folder to a larger disk. Then start the same command again"
    )


class _HostStager(AsyncStager):
    """Copies shards to the host. torch's own stagers cannot copy moments in 8 bits.

    Page-locking takes longer than copying, so the memory is kept for the next save.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        staged = self._copy(state_dict, ())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return staged

    def _copy(self, value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, Mapping):
            return {key: self._copy(part, (*path, key)) for key, part in value.items()}
        if not isinstance(value, torch.Tensor):
            return copy.deepcopy(value)
        if is_traceable_wrapper_subclass(value):
            # A DTensor wraps its shard, a moment in 8 bits its codes and scales.
            names, settings = value.__tensor_flatten__()
            parts = {name: self._copy(getattr(value, name), (*path, name)) for name in names}
            return type(value).__tensor_unflatten__(parts, settings, value.shape, value.stride())
        value = value.detach()
        if path not in self._buffers:
            self._buffers[path] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return self._buffers[path].copy_(value, non_blocking=True)


class _CheckpointWriter(dcp.FileSystemWriter):
    """Writes the shards of all ranks; the first rank then completes the folder, while the others wait for the result.

    `complete(folder, metadata)` runs within DCP's last collective, so that its error reaches all ranks.
    """

    def __init__(self, folder: Path, device: torch.device, complete: Callable[[Path, dcp.Metadata], None]) -> None:
        super().__init__(folder / SHARDS_NAME)
        self._folder, self._device, self._complete = folder, device, complete

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future[Any]:
        if self._device.type == "cuda":
            # A new thread starts at the first GPU, which may be another rank's.
            torch.cuda.set_device(self._device)
        with _short_errors():
            return super().write_data(plan, planner)

    def finish(self, metadata: dcp.Metadata, results: list[Any]) -> None:
        with _short_errors():
            super().finish(metadata, results)
            self._complete(self._folder, metadata)


class _ShardReader(dcp.FileSystemReader):
    """Reads shards whose metadata is in memory: DCP's own reads that file again for every tensor."""

    def __init__(self, folder: Path, metadata: dcp.Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        return self._metadata


@contextlib.contextmanager
def _short_errors() -> Iterator[None]:
    """Replaces an error by one line that can be pickled for the other ranks: of the disk's own error, if there is one."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        cause: BaseException | None = error
        # torch's own error of a file that could not be finished hides the OSError.
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        raise SaveError(_one_line(cause or error)) from None


def _num_bytes(values: Any) -> int:
    """Bytes of all tensors in nested dictionaries; a shard counts as its full tensor."""
    if isinstance(values, Mapping):
        return sum(map(_num_bytes, values.values()))
    if not isinstance(values, torch.Tensor):
        return 0
    local = values.to_local() if isinstance(values, DTensor) else values
    if not is_traceable_wrapper_subclass(local):
        return values.numel() * values.dtype.itemsize
    # Moments in 8 bits have the dtype fp32, but hold codes and scales.
    held = sum(_num_bytes(getattr(local, name)) for name in local.__tensor_flatten__()[0])
    return held * values.numel() // max(local.numel(), 1)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
