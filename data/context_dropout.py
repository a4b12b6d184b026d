"""Context dropout: which items are shown as their generated image alone, as classifier-free guidance needs it.

An item that ends in a generated image of `image_len` tokens then begins at its begin-image token, and ends, as always,
with the end of the turn. Whether it does is drawn from (seed, epoch, source, item id) and nothing else, so that the
plan, every rank and a resumed run agree without a list of what was drawn.
"""

import numpy as np

# Of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
_GOLDEN, _MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def keeps_image_only(
    ids: np.ndarray, source_ids: np.ndarray | int, image_lens: np.ndarray, seed: int, epoch: int, probability: float
) -> np.ndarray:
    """Bool [n]: items whose context is dropped in `epoch`. `image_lens` is 0 for items without a generated image."""
    if not 0 <= probability <= 1:
        raise ValueError(f"the probability of context dropout must lie between 0 and 1, got {probability}")
    with np.errstate(over="ignore"):  # 64-bit arithmetic that wraps around is meant
        state = _mix(np.full(1, seed, np.uint64))
        state = _mix(state ^ np.uint64(epoch))
        state = _mix(state ^ np.atleast_1d(np.asarray(source_ids)).astype(np.uint64))
        state = _mix(state ^ np.asarray(ids, np.int64).view(np.uint64))
    uniform = (state >> np.uint64(11)) * 2.0**-53
    return (uniform < probability) & (np.asarray(image_lens) > 0)


def kept_lengths(lengths: np.ndarray, image_lens: np.ndarray, image_only: np.ndarray) -> np.ndarray:
    """Tokens that each item has in a row: all of them, or its image and the end of the turn."""
    return np.where(image_only, np.asarray(image_lens) + 1, lengths).astype(np.int32)


def _mix(state: np.ndarray) -> np.ndarray:
    state = state + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))
