"""
Filling a parameter from its full tensor, sharded or not, without importing anything distributed.

Where it stands: under `init_weights` in `model/chameleon.py` and the loading in `model/convert.py`. A sharded parameter
(DTensor) knows its mesh and its place in it; that is all that is asked of it here, and nothing is communicated.
"""

import torch


def local_rows(parameter: torch.Tensor) -> tuple[slice, ...]:
    """
    The part of the full tensor that this rank holds, as one slice per dimension.

    Works on plain tensors (everything) and on sharded ones (DTensor, sharded in contiguous chunks or replicated over
    each dimension of their mesh), without importing anything distributed.
    """
    ranges = [(0, size) for size in parameter.shape]
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is not None:
        for mesh_dim, placement in enumerate(parameter.placements):
            if placement.is_replicate():
                continue
            if type(placement).__name__ != "Shard":
                raise ValueError(f"a parameter placed as {placement} cannot be filled; use Shard or Replicate.")
            start, stop = ranges[placement.dim]
            chunk = -(-(stop - start) // mesh.size(mesh_dim))
            first = min(start + chunk * mesh.get_local_rank(mesh_dim), stop)
            ranges[placement.dim] = (first, min(first + chunk, stop))
    return tuple(slice(start, stop) for start, stop in ranges)


@torch.no_grad()
def copy_into_parameter(parameter: torch.Tensor, full: torch.Tensor) -> None:
    """Fill a plain or sharded parameter from the full tensor of the same shape (no communication)."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    if local.numel():
        local.copy_(full[local_rows(parameter)])
