"""
Which part of a full tensor a rank holds, and filling a parameter from it, without communication.

Used by `init_weights` (model/decoder/), `init_adapters` (model/decoder/trainable.py) and the loading in
model/convert.py. A sharded parameter (DTensor) knows its mesh and its place in it, so nothing of torch.distributed is
imported.
"""

from collections.abc import Sequence

import torch


@torch.no_grad()
def copy_into_parameter(parameter: torch.Tensor, full: torch.Tensor) -> None:
    """Fill a plain or sharded parameter from the full tensor of the same shape."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    # A rank may hold nothing of a small parameter.
    if local.numel():
        local.copy_(full[local_rows(parameter)])


def local_rows(parameter: torch.Tensor, coordinate: Sequence[int] | None = None) -> tuple[slice, ...]:
    """The part of the full tensor that a rank holds, one slice per dimension; of a plain tensor all of it.

    `coordinate` is the rank's place in the mesh; None: that of this rank.
    """
    ranges = [(0, size) for size in parameter.shape]
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is not None and coordinate is None:
        coordinate = mesh.get_coordinate()
    for mesh_dim, place in enumerate(coordinate or ()):
        placement = parameter.placements[mesh_dim]
        if placement.is_replicate():
            continue
        if type(placement).__name__ != "Shard":
            raise ValueError(f"a parameter placed as {placement} cannot be filled; use Shard or Replicate.")
        start, stop = ranges[placement.dim]
        # As torch.chunk: all parts are of the rounded-up size, the last ones shorter or empty.
        chunk = -(-(stop - start) // mesh.size(mesh_dim))
        first = min(start + chunk * place, stop)
        ranges[placement.dim] = (first, min(first + chunk, stop))
    return tuple(slice(start, stop) for start, stop in ranges)
