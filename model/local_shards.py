"""
Which part of a full tensor a rank holds, and filling a parameter from it, without communication.

Used by `init_weights` (model/decoder/), the loading in model/convert.py and the gathering in model/async_checkpoint.py.
A sharded parameter (DTensor) knows its mesh and its place in it, so nothing of torch.distributed is imported.
"""

from collections.abc import Sequence

import torch


def local_rows(parameter: torch.Tensor) -> tuple[slice, ...]:
    """The part of the full tensor that this rank holds, one slice per dimension; of a plain tensor all of it."""
    mesh = getattr(parameter, "device_mesh", None)
    return _rows_at(parameter, () if mesh is None else mesh.get_coordinate())


def rows_by_rank(parameter: torch.Tensor) -> dict[int, tuple[slice, ...]]:
    """The parts of a sharded tensor by global rank, without empty parts and second replicas: the full tensor once."""
    mesh, found = parameter.device_mesh, {}
    for coordinate in (mesh.mesh >= 0).nonzero().tolist():
        is_replica = any(c and p.is_replicate() for c, p in zip(coordinate, parameter.placements, strict=True))
        rows = _rows_at(parameter, coordinate)
        if not is_replica and all(part.stop > part.start for part in rows):
            found[int(mesh.mesh[tuple(coordinate)])] = rows
    return found


@torch.no_grad()
def copy_into_parameter(parameter: torch.Tensor, full: torch.Tensor) -> None:
    """Fill a plain or sharded parameter from the full tensor of the same shape."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    if local.numel():
        local.copy_(full[local_rows(parameter)])


def _rows_at(parameter: torch.Tensor, coordinate: Sequence[int]) -> tuple[slice, ...]:
    """The part of the rank at `coordinate` in the mesh; () for a plain tensor."""
    ranges = [(0, size) for size in parameter.shape]
    for mesh_dim, place in enumerate(coordinate):
        placement = parameter.placements[mesh_dim]
        if placement.is_replicate():
            continue
        if type(placement).__name__ != "Shard":
            raise ValueError(f"a parameter placed as {placement} cannot be filled; use Shard or Replicate.")
        start, stop = ranges[placement.dim]
        # As torch.chunk: all parts are of the rounded-up size, the last ones shorter or empty.
        chunk = -(-(stop - start) // parameter.device_mesh.size(mesh_dim))
        first = min(start + chunk * place, stop)
        ranges[placement.dim] = (first, min(first + chunk, stop))
    return tuple(slice(start, stop) for start, stop in ranges)
