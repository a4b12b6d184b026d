"""Saves a checkpoint while training continues; `finetune_solver.py` builds one `CheckpointSaver` per run.

A thread of `torch.distributed.checkpoint` (DCP) writes a copy of the shards. The first rank then completes the folder
(model/training/checkpoint.py): Hugging Face files read back from the shards, fsync, rename.
"""

import contextlib
import copy
import dataclasses
import datetime
import functools
import mmap
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from model.decoder.chameleon import ChameleonXLLMXConfig
from model.training.checkpoint import (
    SAVING_PREFIX,
    SHARDS_NAME,
    TRAINED_STATE,
    CheckpointOptions,
    TrainerState,
    collect_versions,
    publish,
    remove_old,
    seal,
    split_parameters,
)
from model.training.optim import join_local, plain_tensors
from model.weights.adapter_folder import AdapterWriter
from model.weights.export import carried_vqgan, export_tensors, write_config
from model.weights.load import clean_name

# Ranks wait for the slowest disk here. A dead rank is noticed much earlier, by the collectives of training.
SAVE_TIMEOUT = datetime.timedelta(hours=2)


class SaveError(Exception):
    """A checkpoint could not be written; all ranks raise it, with the same message."""

    exit_code = 1


class CheckpointSaver:
    """Saves the checkpoints of one run. All ranks build it and call its methods in the same order.

    The first rank calls `write_extras` (which writes more Hugging Face files into a folder) and `say`. With `adapted`
    only the trained weights are written.
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
        self.options, self.config, self.adapted = options, config, adapted
        self.write_extras, self.say = write_extras, say
        self._model, self._optimizer = model, optimizer
        self._is_main = dist.get_rank() == 0
        self.device = next(model.parameters()).device
        # Groups of their own: a collective of the writing thread must not mix with those of training.
        self._group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        self.first_rank_group = dist.new_group([0], backend="gloo")
        # A checkpoint of adapters notes where the frozen weights are, and the VQGAN is there.
        self.vqgan: Mapping[str, torch.Tensor] = {}
        if self._is_main and not adapted:
            try:
                self.vqgan = carried_vqgan(config)
            except (ValueError, OSError) as error:
                say(f"warning: the VQGAN of the start cannot be read, and checkpoints hold none: {error}")
        self._stager = HostStager(split_parameters(model), say)
        self._saving: Future[Any] | None = None
        self._folder = Path()

    @property
    def is_writing(self) -> bool:
        """Whether a save of this rank is in progress."""
        return self._saving is not None and not self._saving.done()

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows of a failed save. Ranks sum this, then all of them call `wait`."""
        return self._saving is not None and not self.is_writing and self._saving.exception() is not None

    def save(self, name: str, state: TrainerState) -> None:
        """Saves a checkpoint as `output_dir/name`; returns as soon as training may change the weights.

        Waits for the save before. Raises SaveError if the save before failed or, without `--async_save`, this one.
        """
        self.wait()
        model_state, optimizer_state = get_state_dict(self._model, self._optimizer, options=TRAINED_STATE)
        tensors = {"model": model_state, "optimizer": optimizer_state}
        if self.options.async_save or self._stager.split:
            tensors = self._stager.stage(tensors)
        # Versions come from git, a process: a loader worker forked meanwhile by the main thread would keep its pipe.
        state = dataclasses.replace(copy.deepcopy(state), versions=collect_versions())
        self._folder = self.options.output_dir / name
        writer = _CheckpointWriter(self, self._folder, state, tensors)
        if self.options.async_save:
            self._saving = dcp.async_save(
                tensors, storage_writer=writer, process_group=self._group, async_stager=_Staged()
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
            shutil.rmtree(_hidden(self._folder), ignore_errors=True)
        if not isinstance(error, CheckpointException):
            # The process group failed: another rank is gone.
            raise SaveError(f"checkpoint {self._folder} was interrupted: {_one_line(error)}") from error
        rank, (reason, _) = next(iter(error.failures.items()))
        raise SaveError(
            f"checkpoint {self._folder} could not be written (rank {rank}: {reason}). Earlier checkpoints are "
            "unchanged: repair the disk, then start the same command again to resume"
        )


class _CheckpointWriter(dcp.FileSystemWriter):
    """Writes one checkpoint within DCP's collectives, so that all ranks raise the error of one."""

    def __init__(self, saver: CheckpointSaver, folder: Path, state: TrainerState, tensors: Mapping[str, Any]) -> None:
        super().__init__(_hidden(folder) / SHARDS_NAME)
        self._saver, self._folder, self._state, self._started = saver, folder, state, time.perf_counter()
        weights = tensors["model"]
        self._num_bytes = _num_bytes(tensors) + _num_bytes(weights) + _num_bytes(saver.vqgan)
        self._keys = {clean_name(key): key for key in weights}
        self._shapes = {name: (tuple(weights[key].shape), weights[key].dtype) for name, key in self._keys.items()}

    def prepare_global_plan(self, plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
        free, keep = shutil.disk_usage(self._folder.parent).free, self._saver.options.ckpt_max_keep
        if free < self._num_bytes:
            raise SaveError(
                f"it needs {self._num_bytes / 1e9:.3g} GB, and the disk has {free / 1e9:.3g} GB free; remove other "
                f"checkpoints (--ckpt_max_keep is {keep}), or use a larger disk"
            )
        return super().prepare_global_plan(plans)

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future[Any]:
        if self._saver.device.type == "cuda":
            # A new thread starts at the first GPU, which may be another rank's.
            torch.cuda.set_device(self._saver.device)
        with _short_errors():
            return super().write_data(plan, planner)

    def finish(self, metadata: dcp.Metadata, results: list[Any]) -> None:
        options = self._saver.options
        with _short_errors():
            super().finish(metadata, results)
            self._write_hf_files(_hidden(self._folder))
            seal(_hidden(self._folder), self._state)
            publish(_hidden(self._folder), self._folder)
            remove_old(options.output_dir, options.ckpt_max_keep)
        self._saver.say(f"saved {self._folder} in {time.perf_counter() - self._started:.1f} s")

    def _write_hf_files(self, folder: Path) -> None:
        saver = self._saver
        reader = dcp.FileSystemReader(self.path)
        # DCP would read the metadata of all shards again for every tensor.
        reader.read_metadata = functools.cache(reader.read_metadata)

        def read(name: str) -> torch.Tensor:
            shape, dtype = self._shapes[name]
            full = torch.empty(shape, dtype=dtype)
            state = {"model": {self._keys[name]: full}}
            dcp.load(state, storage_reader=reader, process_group=saver.first_rank_group)
            return full

        saver.write_extras(folder)
        if saver.adapted is None:
            export_tensors(self._shapes, read, saver.config, folder, saver.vqgan)
        else:
            write_config(saver.config, folder, saver.adapted.dtype)
            saver.adapted.write(folder, self._shapes, read, saver.config)


class HostStager:
    """Copies shards to the host, in memory kept for the next save, and joins the masters of `split_parameters`.

    torch's stagers cannot copy moments in 8 bits, and round each page-locked tensor up to a power of two: 106 GB for
    84 GB at 7B. Here a thread locks the pages of exact memory after the first save, which takes longer than to copy.
    Copies meanwhile are slow, and right.
    """

    def __init__(self, split: Mapping[str, nn.Parameter], say: Callable[[str], None] = print) -> None:
        self.split, self._say = split, say
        self.copies: dict[tuple[Any, ...], torch.Tensor] = {}
        self._is_locked = False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state with its tensors on the host; returns when the copies are done."""
        staged = self._map(state_dict, self._copy)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            if not self._is_locked:
                place = list(self.copies.values()), torch.cuda.current_device(), self._say
                threading.Thread(target=lock_pages, args=place, daemon=True).start()
                self._is_locked = True
        return staged

    def _copy(self, path: tuple[Any, ...], value: torch.Tensor) -> torch.Tensor:
        is_split = path[0] == "model" and path[1] in self.split
        values = join_local(self.split[path[1]]) if is_split else value
        if path not in self.copies:
            self.copies[path] = _empty_on_own_pages(values)
        return self.copies[path].copy_(values, non_blocking=True)

    def _map(
        self, value: Any, change: Callable[[tuple[Any, ...], torch.Tensor], torch.Tensor], path: tuple = ()
    ) -> Any:
        """The nested dictionaries with every plain tensor, also those inside of sharded ones, replaced by another."""
        if isinstance(value, Mapping):
            return {key: self._map(part, change, (*path, key)) for key, part in value.items()}
        if not isinstance(value, torch.Tensor):
            return copy.deepcopy(value)
        if is_traceable_wrapper_subclass(value):
            # A DTensor wraps its shard, a moment in 8 bits its codes and scales.
            names, settings = value.__tensor_flatten__()
            parts = {name: self._map(getattr(value, name), change, (*path, name)) for name in names}
            return type(value).__tensor_unflatten__(parts, settings, value.shape, value.stride())
        return change(path, value.detach())


class _Staged(AsyncStager):
    """For `dcp.async_save`, of a state that is on the host already."""

    _synchronize_after_execute = False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict


def lock_pages(tensors: Sequence[torch.Tensor], device: int, say: Callable[[str], None]) -> None:
    """Page-locks memory where it is, so that a GPU copies to it at full speed. Copies work without it, too."""
    # A new thread starts at the first GPU, which may be another rank's.
    torch.cuda.set_device(device)
    cudart = torch.cuda.cudart()
    for tensor in tensors:
        if tensor.nbytes:
            error = cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
            if error != cudart.cudaError.success:
                say(f"warning: saves copy slowly to the host: its memory cannot be page-locked ({error})")
                return


def _empty_on_own_pages(like: torch.Tensor) -> torch.Tensor:
    # A page can be locked only once, so tensors must not share one.
    if not like.nbytes:
        return torch.empty(like.shape, dtype=like.dtype)
    memory = mmap.mmap(-1, like.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Locked pages are copied at a fork, and loader workers never read them. Huge pages lock faster.
    for advice in ("MADV_DONTFORK", "MADV_HUGEPAGE"):
        with contextlib.suppress(AttributeError, OSError):
            memory.madvise(getattr(mmap, advice))
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)


@contextlib.contextmanager
def _short_errors() -> Iterator[None]:
    """Replaces an error by one line, which can be pickled for the other ranks."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        cause: BaseException | None = error
        # torch's own error of a file that could not be finished hides the OSError.
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        raise SaveError(_one_line(cause or error)) from None


def _hidden(folder: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return folder.with_name(f"{SAVING_PREFIX}{folder.name}")


def _num_bytes(values: Any) -> int:
    """Bytes of all tensors in nested dictionaries; a shard counts as its full tensor."""
    if isinstance(values, Mapping):
        return sum(map(_num_bytes, values.values()))
    if not isinstance(values, torch.Tensor):
        return 0
    local = values.to_local() if isinstance(values, DTensor) else values
    return sum(part.nbytes for part in plain_tensors(values)) * values.numel() // max(local.numel(), 1)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
