"""Sharding of a decoder over the ranks by FSDP2, and what depends on it: a micro-step's switches, the gradient's norm.

`parallelize` takes a decoder on meta, `allocate` gives its shards memory, and the caller fills them.
"""

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from data.flags import flag
from model.decoder.chameleon import reset_rotary_buffers

try:
    from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
except ImportError:
    # Of torch 2.11 to 2.13, not of its public interface.
    ReduceScatter = object

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    # For exact tests only, not a choice of the command line.
    "fp64": torch.float64,
}

CAN_REUSE_BUFFER = ReduceScatter is not object and hasattr(FSDPModule, "set_custom_reduce_scatter")
# Attributes of FSDP's communication context in torch 2.11 to 2.13.
STREAMS = ("all_gather_copy_in_stream", "all_gather_stream", "reduce_scatter_stream", "all_reduce_stream")

# Matrix products and attention, by "namespace::name": most of a layer's work, in few of its activations.
KEPT_OPERATORS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::linear",
        "aten::_scaled_mm",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_attention_math",
        # Packed rows on CUDA, and on a CPU in a compiled layer.
        "torch_attn::_varlen_attn",
        "packed_attention::attend_documents",
    }
)


# Of --master_weights.
SPLIT = "split"
# For the warning of slow reductions between nodes: bf16 FLOP/s that a large GPU reaches, and bytes per second of its
# share of the network. Predictions; no run on several nodes was measured.
FLOPS_OF_A_GPU, BYTES_BETWEEN_NODES = 4e14, 5e10


@dataclass(frozen=True)
class ParallelOptions:
    """How a decoder is spread over the ranks, and in which types it computes."""

    data_parallel: str = flag(
        "fsdp",
        "fsdp gathers parameters again for the backward pass, sdp keeps them gathered, hsdp is fsdp within groups",
        choices=("fsdp", "sdp", "hsdp"),
    )
    hsdp_shard_size: int = flag(0, "number of ranks in a group of hsdp; 0: the ranks of a node")
    precision: str = flag(
        "bf16", "of the computation; masters are fp32. fp16 is rejected", choices=("bf16", "fp16", "tf32", "fp32")
    )
    grad_precision: str = flag(
        "fp32", "of the sums of gradients over ranks; fp16 is rejected", choices=("fp32", "bf16", "fp16")
    )
    master_weights: str = flag(
        "fp32",
        "split: weights in bf16, the lower halves of their fp32 masters in the optimizer; micro-steps add in bf16",
        choices=("fp32", SPLIT),
    )
    checkpointing: bool = flag(False, "recompute activations in the backward pass: about a third more computation")
    checkpointing_every: int = flag(0, "recompute one of so many layers only; 0: all, with --checkpointing")
    checkpointing_selective: bool = flag(False, "recompute everything but matrix products and attention")
    cpu_offload: bool = flag(False, "weights, gradients and optimizer in host memory, where the step is taken")
    compile: bool | None = flag(None, "torch.compile of the layers; by default on CUDA only", off="no_compile")

    @property
    def recompute_every(self) -> int:
        """One in so many layers recomputes its activations; 0: none."""
        return self.checkpointing_every or int(self.checkpointing or self.checkpointing_selective)

    def problems(self, world_size: int, local_world_size: int, is_partial: bool = False) -> list[str]:
        """What is wrong with these options for `world_size` ranks; `is_partial`: some weights are frozen."""
        found = []
        if self.precision == "fp16":
            found.append(
                "--precision fp16 is not supported: it overflows above 65,504 and underflows without loss scaling, "
                "which is not done here; --precision bf16 has the range of fp32 at the same cost"
            )
        if self.grad_precision == "fp16":
            found.append("--grad_precision fp16 is not supported: sums of gradients overflow; use fp32 or bf16")
        if self.checkpointing_every < 0:
            found.append(f"--checkpointing_every must be at least 1, or 0 for none, got {self.checkpointing_every}")
        if self.data_parallel == "hsdp":
            size = self.hsdp_shard_size or local_world_size
            if size < 1 or world_size % size:
                found.append(
                    f"--hsdp_shard_size must divide the number of ranks ({world_size}), got {size}; "
                    "choose a divisor or use --data_parallel fsdp"
                )
            if self.grad_precision == "bf16" and torch.__version__ < "2.12":
                found.append(
                    "--grad_precision bf16 with --data_parallel hsdp may mix up gradients of layers on torch "
                    f"{torch.__version__} (pytorch #180900): use --grad_precision fp32, --data_parallel fsdp, or torch "
                    "2.12"
                )
        elif self.hsdp_shard_size:
            found.append(f"--hsdp_shard_size {self.hsdp_shard_size} has a meaning only with --data_parallel hsdp")
        if self.master_weights == SPLIT and (self.precision != "bf16" or self.cpu_offload or is_partial):
            found.append(
                "--master_weights split goes with --precision bf16, and trains all weights on the device: leave out "
                "--cpu_offload, --lora_rank and --train_only, or use --master_weights fp32"
            )
        return found

    def slow_reduction(self, row_len: int, world_size: int, local_world_size: int) -> str | None:
        """A warning if the exchange between nodes cannot hide behind the backward of rows of `row_len` tokens."""
        if self.data_parallel == "hsdp" or world_size == local_world_size:
            return None
        # Per weight: gathered in bf16 and reduced, against 4 FLOPs for each token.
        num_bytes = 2 + DTYPES[self.grad_precision].itemsize
        least = round(num_bytes / BYTES_BETWEEN_NODES * FLOPS_OF_A_GPU / 4)
        if row_len >= least:
            return None
        return (
            f"warning: rows of {row_len:,} tokens are short for {world_size} ranks on several nodes: at 400 Gbit/s per "
            f"GPU gradients are reduced behind the backward of {least:,} tokens or more (a prediction). Use a larger "
            "--batch_size, --grad_precision bf16 or --data_parallel hsdp"
        )


def build_mesh(options: ParallelOptions, device_type: str, local_world_size: int) -> DeviceMesh:
    """The mesh of all ranks: one dimension `shard`, or `replicate` x `shard` under hsdp."""
    world_size = dist.get_world_size()
    if options.data_parallel != "hsdp":
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    size = options.hsdp_shard_size or local_world_size
    return init_device_mesh(device_type, (world_size // size, size), mesh_dim_names=("replicate", "shard"))


def set_matmul_precision(precision: str) -> None:
    """Lets fp32 matrix products run in TF32 on GPUs, except under `fp32`."""
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")


def parallelize(
    model: nn.Module, mesh: DeviceMesh, options: ParallelOptions, compile_backend: str | Callable = "inductor"
) -> nn.Module:
    """Shards a decoder on meta in place, and returns it. `compile_backend` is that of `torch.compile`.

    Gradients are summed over the ranks, not averaged: the loss is already divided by the targets of the whole step.
    """
    # The order is fixed: recomputation is part of the compiled graph, FSDP's hooks are not.
    decoder = model.model
    recompute_layers(decoder.layers, options.recompute_every, options.checkpointing_selective)
    if mesh.device_type == "cuda" if options.compile is None else options.compile:
        # Layer by layer: all layers share one graph, compiled once for rows of one length, once more for any length.
        for layer in decoder.layers:
            # In place: a wrapper of `torch.compile` would rename the parameters.
            layer.compile(backend=compile_backend)

    reduce_dtype = DTYPES[options.grad_precision]
    if mesh.size() == 1 and options.master_weights == SPLIT:
        # Nothing is summed, so gradients need not be wider than the shards that they are for.
        reduce_dtype = torch.bfloat16
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[options.precision], reduce_dtype=reduce_dtype, cast_forward_inputs=True
    )
    sharding = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": options.data_parallel != "sdp"}
    if options.cpu_offload:
        sharding["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for layer in decoder.layers:
        fully_shard(layer, **sharding)
    fully_shard(decoder.embed_tokens, **sharding)
    # The head is the last of the forward and the first of the backward: gathered once for both.
    fully_shard([decoder.norm, model.lm_head], **{**sharding, "reshard_after_forward": False})
    fully_shard(model, **sharding)

    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A sum over the ranks. With one rank no factor is needed: dividing by 1.0 would copy each gradient in fp32.
            if mesh.size() > 1:
                module.set_gradient_divide_factor(1.0)
            elif CAN_REUSE_BUFFER:
                module.set_custom_reduce_scatter(_SameBuffer())
            # A plain sum: gloo has no premultiplied one, and NCCL's mean is not reliable with one rank.
            module.set_force_sum_reduction_for_comms(True)
    return model


def recompute_layers(layers: nn.ModuleList, every: int, selective: bool) -> None:
    """Wraps one in `every` layers (0: none) in place, so that the backward computes again what the forward drops.

    With `selective` the results of matrix products and attention are kept, otherwise only the layer's input.
    """
    settings = {"context_fn": partial(create_selective_checkpoint_contexts, _choose_kept)} if selective else {}
    for index in range(0, len(layers), every) if every else ():
        layers[index] = checkpoint_wrapper(layers[index], **settings)


def _choose_kept(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    # An operator's name ends in its overload: `aten::mm.default`.
    name = operator.name().partition(".")[0] if isinstance(operator, torch._ops.OpOverload) else ""
    return CheckpointPolicy.MUST_SAVE if name in KEPT_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


def allocate(model: nn.Module, device: torch.device, options: ParallelOptions) -> None:
    """Gives a sharded model on meta its memory, on the host under `cpu_offload`; weights are undefined."""
    model.to_empty(device="cpu" if options.cpu_offload else device)
    # FSDP moves parameters to the device for the computation, but not buffers.
    reset_rotary_buffers(model, device)
    if options.master_weights == SPLIT:
        for parameter in model.parameters():
            parameter.low_bits = torch.zeros_like(parameter.to_local(), dtype=torch.int16)
    if dist.get_world_size() == 1 and not options.cpu_offload and not (CAN_REUSE_BUFFER and share_one_stream(model)):
        what = "has other streams and buffers in FSDP: a GPU alone is slower and takes more memory"
        print(f"warning: torch {torch.__version__} {what}", file=sys.stderr)


class _SameBuffer(ReduceScatter):
    """Lets FSDP in a group of one "reduce" gradients where they are: its output is the tensor of its input."""

    def __init__(self) -> None:
        # The input without its output; weak, so that a buffer is never given out again.
        self._unpaired: Callable[[], torch.Tensor | None] = lambda: None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        # FSDP asks for an input, then for an output, and copies the input into the output: onto itself, which is free.
        buffer, self._unpaired = self._unpaired(), lambda: None
        if buffer is None:
            buffer = torch.empty(*size, dtype=dtype, device=device)
            self._unpaired = weakref.ref(buffer)
        assert (*buffer.shape, buffer.dtype) == (*size, dtype), "FSDP asks for no output of the size of its input"
        return buffer

    def __call__(self, *arguments: Any, **settings: Any) -> None:
        raise RuntimeError("a group of one has nothing to reduce")


def share_one_stream(model: nn.Module) -> bool:
    """Lets FSDP in a group of one work in the stream of the computation; False if torch names its streams otherwise.

    The allocator keeps a pool per stream. With gradients (26 GiB at 7B) in another pool than activations, memory is
    unmapped and mapped again in every step, and the GPU idles.
    """
    try:
        state = model._get_fsdp_state()
        state._lazy_init()
        context, stream = state._comm_ctx, state._comm_ctx.device_handle.current_stream()
        if not all(hasattr(context, name) for name in STREAMS):
            return False
    except AttributeError:
        return False
    for name in STREAMS:
        setattr(context, name, stream)
    return True


def reshard(model: nn.Module) -> None:
    """Frees the gathered parameters that a forward without a backward leaves behind."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def evaluating(model: nn.Module, options: ParallelOptions, keep_gathered: bool) -> Iterator[None]:
    """For many forwards without a backward: evaluation mode, no compilation; `keep_gathered` gathers weights once."""
    was_training = model.training
    parts = [model.model.embed_tokens, *model.model.layers]
    model.eval()
    for part in parts:
        part.set_reshard_after_forward(not keep_gathered, recurse=False)
    try:
        # Each shape would compile another graph.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(options.data_parallel != "sdp", recurse=False)
        model.train(was_training)
        reshard(model)


def begin_micro_step(model: nn.Module, options: ParallelOptions, is_last: bool) -> None:
    """To be called before the forward of each micro-step."""
    # Every micro-step reduce-scatters its gradients: unsharded ones would take 26 GiB at 7B.
    model.set_is_last_backward(is_last)
    if options.data_parallel == "hsdp":
        # One sum over the replicas, after the last micro-step, is enough.
        model.set_requires_all_reduce(is_last)


def clip_grad_norm(model: nn.Module, mesh: DeviceMesh, max_norm: float) -> torch.Tensor:
    """Scales the gradient down to `max_norm`, if that is above 0.

    Returns the L2 norm before, a scalar on the gradients' device, in fp32 or wider, without waiting for the device.
    """
    # On the local shards: one collective for the whole gradient.
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    gradients = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients]
    dtype, device = torch.promote_types(gradients[0].dtype, torch.float32), gradients[0].device
    # A rank may hold nothing of a small parameter. An empty tensor keeps `_foreach_norm` from its fused kernel.
    gradients = [grad for grad in gradients if grad.numel()]
    norms = torch._foreach_norm(gradients, dtype=dtype) if gradients else [torch.zeros((), dtype=dtype, device=device)]
    squares = torch.stack(norms).square().sum()
    # Under hsdp the replicas hold equal gradients: the sum is over one group of shards.
    group = mesh.get_group("shard")
    if dist.get_world_size(group) > 1:
        dist.all_reduce(squares, group=group)
    norm = squares.sqrt()
    if max_norm > 0 and gradients:
        torch._foreach_mul_(gradients, clip_factor(norm, max_norm))
    return norm


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """What scales a gradient down to `max_norm`: 1 below it, so that the host need not know the norm."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
