"""Saving a checkpoint while the training goes on.

`CheckpointSaver.save` copies this rank's shards of weights and Adam moments to the host and returns; a thread writes
them, as `model/checkpoint.py` says a checkpoint looks, and makes the folder whole. The ranks' threads talk over a
process group of their own (gloo): a collective of a save never stands in the line of one of the training. At most one
save is on its way. A failure is agreed on by all ranks, and raised by the next `save` or `wait`.

The host needs memory for one copy of the shards (12 bytes per parameter, divided by the ranks that share it; kept for
the next save, page-locked where the shards are on a GPU), and on the first rank one file of weights (5 GB at most).
"""

import contextlib
import copy
import datetime
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh
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
from model.local_shards import local_rows

# The others wait while one rank writes its share, on a disk that may be slow; a dead rank ends the training's own
# collectives long before.
PATIENCE = datetime.timedelta(hours=2)


class SaveError(Exception):
    """A checkpoint could not be written; all ranks raise it, with the same message."""

    exit_code = 1


class CheckpointSaver:
    """Saves checkpoints of one run; built and called by all ranks, in the same order.

    `write_extras(folder)` puts beside the weights what else a Hugging Face folder needs (the tokenizer), `say` takes a
    line for people; both are called on the first rank only, from the thread. `adapted` is given where weights are
    frozen: it writes what is trained in the place of the whole model.
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
        collect_versions()  # not for the first time in the thread that saves
        self._device = next(model.parameters()).device
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        # Adapters leave the VQGAN where the frozen weights are.
        self._vqgan = carried_vqgan(config) if self._is_main and not adapted else {}
        self._stager = _Stager()
        self._thread: threading.Thread | None = None
        self._error: SaveError | None = None
        self._last: Position | None = None

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows of a save that failed: sum it over the ranks, then let all of them `wait`."""
        return self._error is not None

    @property
    def is_writing(self) -> bool:
        """Whether a save of this rank is on its way."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, name: str, state: TrainerState) -> None:
        """Saves a checkpoint as `output_dir/name`; returns as soon as the training may change the weights.

        Waits for the save before it. What this saver saved last is not saved again under another name.

        Raises:
            SaveError: the disk is too small, in which case nothing was written; or the save before failed; or, without
                `--async_save`, this one.
        """
        self.wait()
        if state.position == self._last:
            return
        started = time.perf_counter()
        model_state, optimizer_state = get_state_dict(self._model, self._optimizer, options=TRAINED_STATE)
        tensors = {"model": model_state, "optimizer": optimizer_state}
        self._check_space(name, tensors)
        is_copied = None
        if self._options.async_save:
            tensors, is_copied = self._stager.stage(tensors)
        state = copy.deepcopy(state)
        self._last = state.position
        task = (name, state, tensors, is_copied, started)
        if self._options.async_save:
            # A daemon: where the training fails, its process ends without waiting for ranks that may be gone.
            self._thread = threading.Thread(target=self._run, args=task, name=f"save {name}", daemon=True)
            self._thread.start()
        else:
            self._run(*task)
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is whole. Raises SaveError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _check_space(self, name: str, tensors: Mapping[str, Any]) -> None:
        problem, folder = None, self._options.output_dir
        if self._is_main:
            weights = [*tensors["model"].values(), *self._vqgan.values()]
            needed = _num_bytes(tensors) + _num_bytes(weights)
            problem = find_space_problem(folder, needed, shutil.disk_usage(folder).free, self._options.ckpt_max_keep)
        box = [problem]
        dist.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        if box[0] is not None:
            raise SaveError(f"checkpoint {name} was not begun: {box[0]}")

    def _run(self, name: str, *task: Any) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a new thread stands at the first GPU, which may be another rank's
        try:
            self._write(name, *task)
        except SaveError as error:
            self._error = SaveError(
                f"checkpoint {name} could not be written to {self._options.output_dir} ({error}). The checkpoints "
                "before it are as they were: put the disk in order, then start the same command again"
            )
        except Exception as error:  # of the process group: another rank is gone
            self._error = SaveError(f"checkpoint {name} was broken off: {_one_line(error)}")
        if self._error is not None and self._is_main:
            shutil.rmtree(self._options.output_dir / f"{SAVING_PREFIX}{name}", ignore_errors=True)

    def _write(
        self,
        name: str,
        state: TrainerState,
        tensors: Mapping[str, Any],
        is_copied: torch.cuda.Event | None,
        started: float,
    ) -> None:
        """Writes a checkpoint beside its place, makes it whole, names it, removes older ones."""
        stood_still = time.perf_counter() - started
        output_dir = self._options.output_dir
        saving = output_dir / f"{SAVING_PREFIX}{name}"
        if is_copied is not None:
            is_copied.synchronize()
        with self._agreed():
            if self._is_main:
                shutil.rmtree(saving, ignore_errors=True)
                saving.mkdir(parents=True)
        with self._agreed():
            writer = _ShardWriter(saving / SHARDS_NAME)
            dcp.save(dict(tensors), storage_writer=writer, process_group=self._group)
        with self._agreed():
            self._write_hf_files(saving, tensors["model"])
        with self._agreed():
            if self._is_main:
                seal(saving, state)
                publish(saving, output_dir / name)
                remove_old(output_dir, self._options.ckpt_max_keep)
        if self._is_main:
            seconds = time.perf_counter() - started
            still = f", training stood still for {stood_still:.1f} s" if self._options.async_save else ""
            self._say(f"saved {output_dir / name} in {seconds:.1f} s{still}")

    def _write_hf_files(self, folder: Path, parameters: Mapping[str, torch.Tensor]) -> None:
        """The first rank writes, and asks the others for one tensor after the other."""
        gather = _Gather({clean_name(name): tensor for name, tensor in parameters.items()}, self._group)
        if not self._is_main:
            gather.serve()
            return
        try:
            self._write_extras(folder)
            if self._adapted is None:
                export_tensors(gather.shapes, gather.get, self._config, folder, self._vqgan)
            else:
                write_config(self._config, folder, self._adapted.dtype)
                self._adapted.write(folder, gather.shapes, gather.get, self._config)
        finally:
            gather.end()

    @contextlib.contextmanager
    def _agreed(self) -> Iterator[None]:
        """Work of which all ranks know at the end whether it went well everywhere. Raises SaveError if it did not."""
        culprit = None
        try:
            yield
        except CheckpointException as error:  # the same on all ranks, whoever met it
            rank, (cause, _) = next(iter(error.failures.items()))
            culprit = rank, _one_line(cause)
        except Exception as error:
            culprit = dist.get_rank(self._group), _one_line(error)
        culprits: list[tuple[int, str] | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(culprits, culprit, group=self._group)
        for found in filter(None, culprits):
            raise SaveError(found[1] if len(culprits) == 1 else f"rank {found[0]}: {found[1]}")


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


class _Stager:
    """Copies the shards of nested dictionaries to the host, into memory that is kept for the next time."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}
        self._uses_gpu = False

    def stage(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event | None]:
        """The copy, and what to wait for before reading it; the originals may be changed at once, in stream order."""
        staged = self._copy(values, ())
        is_copied = None
        if self._uses_gpu:
            is_copied = torch.cuda.Event()
            is_copied.record()
        return staged, is_copied

    def _copy(self, value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, Mapping):
            return {key: self._copy(part, (*path, key)) for key, part in value.items()}
        if isinstance(value, DTensor):
            local = self._copy_tensor(value.to_local(), path)
            place = {"shape": value.shape, "stride": value.stride()}
            return DTensor.from_local(local, self._on_host(value.device_mesh), value.placements, **place)
        if isinstance(value, torch.Tensor):
            return self._copy_tensor(value, path)
        return copy.deepcopy(value)

    def _copy_tensor(self, tensor: torch.Tensor, path: tuple[Any, ...]) -> torch.Tensor:
        if is_traceable_wrapper_subclass(tensor):  # moments in 8 bits: codes and scales
            names, settings = tensor.__tensor_flatten__()
            parts = {name: self._copy_tensor(getattr(tensor, name), (*path, name)) for name in names}
            return type(tensor).__tensor_unflatten__(parts, settings, tensor.shape, tensor.stride())
        tensor = tensor.detach()
        self._uses_gpu |= tensor.is_cuda
        if path not in self._buffers:
            self._buffers[path] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return self._buffers[path].copy_(tensor, non_blocking=True)

    def _on_host(self, mesh: DeviceMesh) -> DeviceMesh:
        """The same mesh for tensors on the host; all ranks ask for it at the same time."""
        if mesh.device_type == "cpu":
            return mesh
        if mesh not in self._meshes:
            self._meshes[mesh] = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
        return self._meshes[mesh]


class _ShardWriter(dcp.FileSystemWriter):
    """Says what the disk said: torch's own error of a file that could not be finished hides it."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future[Any]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise (cause or error) from None


class _Gather:
    """Full tensors, one at a time, on the first rank of a group: it asks by number, and the others serve."""

    END = -1

    def __init__(self, tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup) -> None:
        self._tensors, self._group = tensors, group
        self._names = list(tensors)
        self.shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}

    def get(self, name: str) -> torch.Tensor:
        """A full tensor on the host; called by the first rank alone."""
        tensor = self._tensors[name]
        if not isinstance(tensor, DTensor):
            return tensor
        parts = _rows_by_rank(tensor)
        if list(parts) == [0]:
            return tensor.to_local()
        self._ask(self._names.index(name))
        full = torch.empty(tensor.shape, dtype=tensor.dtype)
        coming = [dist.irecv(full[rows], src=rank, group=self._group) for rank, rows in parts.items() if rank]
        if 0 in parts:
            full[parts[0]] = tensor.to_local()
        for work in coming:
            work.wait()
        return full

    def serve(self) -> None:
        """Sends what the first rank asks for until it asks no more; called by all others."""
        rank = dist.get_rank()
        while (number := self._ask()) != self.END:
            tensor = self._tensors[self._names[number]]
            if rank in _rows_by_rank(tensor):
                dist.send(tensor.to_local().cpu().contiguous(), dst=0, group=self._group)

    def end(self) -> None:
        self._ask(self.END)

    def _ask(self, number: int = 0) -> int:
        """The first rank's number, on all ranks."""
        box = torch.tensor(number, dtype=torch.int64)
        dist.broadcast(box, src=0, group=self._group)
        return int(box)


def _rows_by_rank(tensor: torch.Tensor) -> dict[int, tuple[slice, ...]]:
    """The parts of a sharded tensor by global rank, without empty parts and second replicas: the full tensor once."""
    mesh, found = tensor.device_mesh, {}
    for coordinate in (mesh.mesh >= 0).nonzero().tolist():
        is_replica = any(c and p.is_replicate() for c, p in zip(coordinate, tensor.placements, strict=True))
        rows = local_rows(tensor, coordinate)
        if not is_replica and all(part.stop > part.start for part in rows):
            found[int(mesh.mesh[tuple(coordinate)])] = rows
    return found


def _num_bytes(values: Any) -> int:
    """Bytes of all tensors in nested dictionaries and lists, shards counted as the full tensors that they belong to."""
    if isinstance(values, torch.Tensor):
        local = values.to_local() if isinstance(values, DTensor) else values
        if is_traceable_wrapper_subclass(local):  # moments in 8 bits, which give themselves out as fp32
            held = sum(_num_bytes(getattr(local, name)) for name in local.__tensor_flatten__()[0])
            return held * values.numel() // max(local.numel(), 1)
        return values.numel() * values.dtype.itemsize
    if isinstance(values, Mapping):
        values = values.values()
    return sum(map(_num_bytes, values)) if not isinstance(values, str) and hasattr(values, "__iter__") else 0


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
