"""Sharding: how one decoder is spread over the ranks, in a fixed order, without the model knowing.

`parallelize` takes a decoder built on the meta device and gives it recomputation (model/recompute.py),
`torch.compile`, then FSDP2 with fp32 master weights, layer by layer; `allocate` gives the shards their memory, and the
caller fills them. The gradient's norm and the switches between micro-steps live here too, since they depend on the
sharding.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from data.flags import flag
from model.decoder.chameleon import reset_rotary_buffers
from model.recompute import recompute_layers

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,  # not on the command line: for tests of exactness
}


@dataclass(frozen=True)
class ParallelOptions:
    """`data_parallel`: fsdp (parameters, gradients and optimizer sharded, parameters gathered again for the backward),
    sdp (parameters stay gathered from forward to backward: faster, more memory), hsdp (fsdp within groups of
    `hsdp_shard_size` ranks, replicated between them). Master weights are fp32 under every `precision`.
    `checkpointing`: layers compute their activations again in the backward, every one or every `checkpointing_every`th;
    with `checkpointing_selective` all but matrix products and attention. `cpu_offload`: weights, gradients and
    optimizer live on the host, and the optimizer's step is taken there.
    `compile`: `torch.compile` of the decoder's layers; None: on CUDA only."""

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
    checkpointing: bool = flag(False, "recompute activations in the backward pass: about a third more computation")
    checkpointing_every: int = flag(0, "recompute one of so many layers only; 0: all, with --checkpointing")
    checkpointing_selective: bool = flag(False, "recompute everything but matrix products and attention")
    cpu_offload: bool = flag(False, "weights, gradients and optimizer in host memory, where the step is taken")
    compile: bool | None = flag(None, "torch.compile of the layers; by default on CUDA only", off="no_compile")

    @property
    def recompute_every(self) -> int:
        """Of each so many layers one computes its activations again; 0: none does."""
        is_on = self.checkpointing or self.checkpointing_selective
        return self.checkpointing_every or int(is_on)

    def problems(self, world_size: int, local_world_size: int) -> list[str]:
        """What is wrong with these options for so many ranks, one sentence each."""
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
        elif self.hsdp_shard_size:
            found.append(f"--hsdp_shard_size {self.hsdp_shard_size} has a meaning only with --data_parallel hsdp")
        return found


def build_mesh(options: ParallelOptions, device_type: str, local_world_size: int) -> DeviceMesh:
    """The mesh of all ranks: one dimension `shard`, or `replicate` x `shard` under hsdp."""
    world_size = dist.get_world_size()
    if options.data_parallel != "hsdp":
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    size = options.hsdp_shard_size or local_world_size
    return init_device_mesh(device_type, (world_size // size, size), mesh_dim_names=("replicate", "shard"))


def set_matmul_precision(precision: str) -> None:
    """Lets fp32 matrix products run in TF32 on GPUs that have it, unless `fp32` asks for every bit."""
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")


def parallelize(
    model: nn.Module, mesh: DeviceMesh, options: ParallelOptions, compile_backend: str | Callable = "inductor"
) -> nn.Module:
    """Shards a decoder (`model.model.layers`, `.embed_tokens`, `.norm`, `lm_head`) in place, and returns it.

    Gradients are summed over the ranks, not averaged: the loss is already divided by the targets of the whole step.
    Layers are compiled one by one (by `compile_backend`, as `torch.compile` takes it): equal as they are, they share
    one graph, compiled once for rows of a fixed length and once more when other lengths come.
    """
    decoder = model.model
    recompute_layers(decoder.layers, options.recompute_every, options.checkpointing_selective)
    is_compiled = mesh.device_type == "cuda" if options.compile is None else options.compile
    if is_compiled:
        for layer in decoder.layers:
            layer.compile(backend=compile_backend)  # in place: the names of the parameters stay

    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[options.precision], reduce_dtype=DTYPES[options.grad_precision], cast_forward_inputs=True
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
            if mesh.size() > 1:  # a rank alone would divide by 1.0: another copy of each gradient in fp32
                module.set_gradient_divide_factor(1.0)
            # A plain sum: gloo has no premultiplied one, and NCCL's mean is not to be trusted with a single rank.
            module.set_force_sum_reduction_for_comms(True)
    return model


def allocate(model: nn.Module, device: torch.device, options: ParallelOptions) -> None:
    """Gives a sharded model on meta its memory: on `device`, where it computes, or on the host under `cpu_offload`.

    Weights are undefined until they are filled; the rotary buffers are right, and always on `device`.
    """
    model.to_empty(device="cpu" if options.cpu_offload else device)
    if options.cpu_offload:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
    reset_rotary_buffers(model)


def reshard(model: nn.Module) -> None:
    """Lets go of gathered parameters, which a forward without a backward leaves behind."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def evaluating(model: nn.Module, options: ParallelOptions, keep_gathered: bool) -> Iterator[None]:
    """For many forwards without a backward: evaluation mode, layers not compiled (each shape would be another graph),
    and with `keep_gathered` every weight gathered once for all of them. Afterwards the model is as it was."""
    was_training = model.training
    parts = [model.model.embed_tokens, *model.model.layers]
    model.eval()
    for part in parts:
        part.set_reshard_after_forward(not keep_gathered, recurse=False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(options.data_parallel != "sdp", recurse=False)
        model.train(was_training)
        reshard(model)


def begin_micro_step(model: nn.Module, options: ParallelOptions, is_last: bool) -> None:
    """To be called before each micro-step's forward.

    Gradients are reduce-scattered in every micro-step (to keep them whole would cost 26 GiB at 7B); under hsdp the sum
    over the replicas waits for the last one.
    """
    model.set_is_last_backward(is_last)
    if options.data_parallel == "hsdp":
        model.set_requires_all_reduce(is_last)


def clip_grad_norm(model: nn.Module, mesh: DeviceMesh, max_norm: float) -> torch.Tensor:
    """The L2 norm of the whole gradient (a scalar on the device), after which the gradient is scaled to `max_norm`.

    The norm is in fp32, or in the type of the gradients if that is wider, and on the device where they are: the host
    under `cpu_offload`. `max_norm` of 0 or less only measures. One collective over the local shards; nothing waits for
    the host.
    """
    gradients = [_local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    squares = torch.stack(torch._foreach_norm(gradients, dtype=dtype)).square().sum()
    group = mesh.get_group("shard")
    if dist.get_world_size(group) > 1:
        dist.all_reduce(squares, group=group)
    norm = squares.sqrt()
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
