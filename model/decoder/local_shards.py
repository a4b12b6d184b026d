"""Filling a parameter, plain or sharded, from a full tensor, without communication and without torch.distributed."""

import torch


@torch.no_grad()
def copy_into_parameter(parameter: torch.Tensor, full: torch.Tensor) -> None:
    """Fills a plain or sharded parameter from the full tensor of the same shape."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    # A rank may hold nothing of a small parameter.
    if local.numel():
        local.copy_(full[_local_rows(parameter)])


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
