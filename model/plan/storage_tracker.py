"""Memory by purpose: bytes of every storage that is allocated and freed while a piece of work runs, real or fake.

torch's own tracker for FSDP (`torch.distributed._tools.fsdp2_mem_tracker`) replaces FSDP's hooks and calls each once
per module: where modules share a group, as our norm and head do, gradients are reduced at another time. This tracker
sees operators and resized storages (FSDP's gathered weights).
"""

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from model.training.optim import plain_tensors

KINDS = ("parameters", "gradients", "optimizer", "activations", "loss")
PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOSS = KINDS

# Finds the shape of a result by tensors without values, as large as before sharding. torch 2.11 calls this method for
# the optimizer at every step, 2.13 once.
_FIND_SHAPES = "_propagate_tensor_meta_non_cached"


@dataclass
class _Storage:
    """What is known of one live storage."""

    kind: str
    num_bytes: int = 0


class StorageTracker(TorchDispatchMode):
    """Counts bytes of live storages by kind, from when each is first seen, and large workspaces inside kernels.

    Attributes:
        kind, during: the kind of what operators make from now on, and the name of the present phase.
        now, most, at_peak: bytes by kind at present, at most, and at the moment of the largest sum.
        peak, peak_during: the largest sum, and the phase in which it was reached.
        on_host: kinds that are not in the sum.
    """

    def __init__(self, on_host: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.on_host = on_host
        self.kind, self.during = ACTIVATIONS, ""
        self.now, self.most, self.at_peak = Counter(), Counter(), Counter()
        self.peak, self.peak_during = 0, ""
        self._total = 0
        self._live: WeakIdKeyDictionary[torch.UntypedStorage, _Storage] = WeakIdKeyDictionary()
        self._is_counting = True

    def mark(self, tensor: torch.Tensor, kind: str) -> None:
        """Sets the kind of a tensor (plain or sharded), and counts it if it is new."""
        for storage in storages_of(tensor):
            self._see(storage, kind)
            found = self._live[storage]
            self._change(found.kind, -found.num_bytes)
            found.kind = kind
            self._change(kind, found.num_bytes)

    def __enter__(self) -> "StorageTracker":
        resize, find_shapes, tracker = torch.UntypedStorage.resize_, getattr(ShardingPropagator, _FIND_SHAPES), self

        def resize_(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            tracker._see(storage, tracker.kind)

        def find_shapes_uncounted(propagator: ShardingPropagator, *args: Any) -> Any:
            tracker._is_counting = False
            try:
                return find_shapes(propagator, *args)
            finally:
                tracker._is_counting = True

        self._resize, torch.UntypedStorage.resize_ = resize, resize_
        self._find_shapes = find_shapes
        setattr(ShardingPropagator, _FIND_SHAPES, find_shapes_uncounted)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        setattr(ShardingPropagator, _FIND_SHAPES, self._find_shapes)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # Seen again as operators on local tensors.
            return NotImplemented
        output = func(*args, **(kwargs or {}))
        if not self._is_counting:
            return output
        for value in tree_iter(output):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                for storage in storages_of(value):
                    self._see(storage, self.kind)
        workspace = _workspace(func, args)
        if workspace:
            self._change(self.kind, workspace)
            self._change(self.kind, -workspace)
        return output

    def _see(self, storage: torch.UntypedStorage, kind: str) -> None:
        found, num_bytes = self._live.get(storage), storage.nbytes()
        if found is None:
            found = self._live[storage] = _Storage(kind)
            weakref.finalize(storage, self._forget, found).atexit = False
        self._change(found.kind, num_bytes - found.num_bytes)
        found.num_bytes = num_bytes

    def _forget(self, storage: _Storage) -> None:
        self._change(storage.kind, -storage.num_bytes)

    def _change(self, kind: str, num_bytes: int) -> None:
        self.now[kind] += num_bytes
        self._total += 0 if kind in self.on_host else num_bytes
        if num_bytes > 0:
            self.most[kind] = max(self.most[kind], self.now[kind])
            if self._total > self.peak:
                self.peak, self.peak_during, self.at_peak = self._total, self.during, Counter(self.now)


def storages_of(tensor: torch.Tensor) -> list[torch.UntypedStorage]:
    """The storages under a plain, sharded or otherwise wrapped tensor."""
    return [part.untyped_storage() for part in plain_tensors(tensor)]


def _workspace(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that a kernel needs while it runs, beside what it returns."""
    # The backward of the flash kernel holds the queries' gradient in fp32, and one fp32 number per head and token, both
    # padded by up to 128 tokens per document.
    if func.name() != "torch_attn::_varlen_attn_backward":
        return 0
    query, cu_seqlens = args[1], args[6]
    num_tokens, num_heads, head_dim = query.shape
    return 4 * (num_tokens + 128 * (cu_seqlens.numel() - 1)) * num_heads * (head_dim + 1)
