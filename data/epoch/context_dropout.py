"""Context dropout: which items are shown as their generated image alone, as classifier-free guidance needs it.

The draw depends on (seed, epoch, source, item id) and nothing else, so that the epoch's order, every rank and a resumed
run agree without a list of what was drawn. Called by `data/epoch/packing.py`.
"""

import numpy as np

# Constants of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
_GOLDEN, _MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def keeps_image_only(
    ids: np.ndarray, source_ids: np.ndarray | int, image_lens: np.ndarray, seed: int, epoch: int, probability: float
) -> np.ndarray:
    """Bool [n]: items whose context is dropped in `epoch`.

    Takes `ids` int64 [n], `source_ids` [n] or a single one, and `image_lens` [n], 0 without a generated image.
    """
    # 64-bit arithmetic that wraps around is meant.
    with np.errstate(over="ignore"):
        state = _mix(np.full(1, seed, np.uint64))
        state = _mix(state ^ np.uint64(epoch))
        state = _mix(state ^ np.atleast_1d(np.asarray(source_ids)).astype(np.uint64))
        state = _mix(state ^ np.asarray(ids, np.int64).view(np.uint64))
    uniform = (state >> np.uint64(11)) * 2.0**-53
    return (uniform < probability) & (np.asarray(image_lens) > 0)


def _mix(state: np.ndarray) -> np.ndarray:
    state = state + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))
