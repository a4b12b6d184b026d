"""Filling a parameter, plain or sharded, from a full tensor, without communication and without torch.distributed.

A parameter in bf16 with the attribute `low_bits` is the upper half of an fp32 master, `low_bits` (int16, of the shape
of this rank's part) the lower half.
"""

import torch


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 -> (bf16, the nearest one; int16, from which `join_master` gets every bit of the fp32 value back)."""
    bits = master.view(torch.int32)
    # Ties go away from zero. The rest is then -2^15 to 2^15 - 1: int16, by the wrapping of integers.
    return bits.add(0x8000).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_master(weight: torch.Tensor, low_bits: torch.Tensor) -> torch.Tensor:
    """The fp32 value of both halves."""
    return weight.view(torch.int16).to(torch.int32).bitwise_left_shift_(16).add_(low_bits).view(torch.float32)


@torch.no_grad()
def copy_into_parameter(parameter: torch.Tensor, full: torch.Tensor) -> None:
    """Fills a plain or sharded parameter from the full tensor of the same shape."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    # A rank may hold nothing of a small parameter.
    if local.numel():
        set_local(parameter, full[_local_rows(parameter)])


@torch.no_grad()
def set_local(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Gives this rank's part of a parameter its values, those of masters with both halves."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    if hasattr(parameter, "low_bits"):
        values, low_bits = split_master(values.to(local.device, torch.float32))
        parameter.low_bits.copy_(low_bits)
    local.copy_(values)


def _local_rows(parameter: torch.Tensor) -> tuple[slice, ...]:
    """The part of the full tensor that this rank holds, one slice per dimension; of a plain tensor all of it."""
    rows = [slice(0, size) for size in parameter.shape]
    for mesh_dim, placement in enumerate(getattr(parameter, "placements", ())):
        if placement.is_replicate():
            continue
        if not placement.is_shard():
            raise ValueError(f"a parameter placed as {placement} cannot be filled; use Shard or Replicate.")
        held, mesh = rows[placement.dim], parameter.device_mesh
        # As torch.chunk: all parts are of the rounded-up size, the last ones shorter or empty.
        chunk = -(-(held.stop - held.start) // mesh.size(mesh_dim))
        first = min(held.start + chunk * mesh.get_coordinate()[mesh_dim], held.stop)
        rows[placement.dim] = slice(first, min(first + chunk, held.stop))
    return tuple(rows)
