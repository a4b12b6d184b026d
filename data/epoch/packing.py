"""The order of an epoch: which items share a row, and which rows share an optimizer step.

A *unit* is the row that one rank takes through the model at once; a *step* is `units_per_step` (G) units, and rank r of
W takes units r, r + W, ... of a step. The order is a pure function of lengths, types, ratios, options and epoch: the
k-th step of an epoch holds the same items on any number of ranks. `data/epoch/rows.py` reads the items.

By default a unit is `batch_size` items of similar length, its row rounded up to one of few lengths. With `packing` a
unit is a row of exactly `batch_size * max_seq_len` tokens, filled best-fit inside large shuffled windows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

# Items packed together. Larger windows fill 0.1% more, but give the same rows in every epoch.
PACKING_WINDOW = 100_000
# Allowed row lengths between a power of two and the next: about 2% filler on average.
ROW_LENS_PER_OCTAVE = 16
# Row lengths are multiples of this, as tensor cores want.
MIN_ROW_MULTIPLE = 16

# Constants of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
_GOLDEN, _MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
# Items [M], one group after the other, and the size of each group.
Groups = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class OrderOptions:
    """What decides the order of an epoch beside the data."""

    batch_size: int
    max_seq_len: int
    # G = accum_iter x ranks at the start of the run.
    units_per_step: int
    packing: bool = False
    length_clustering: bool = True
    seed: int = 0
    # Probability that an item is shown as its generated image alone.
    context_dropout: float = 0.0

    @property
    def max_row_len(self) -> int:
        """Tokens of a packed row; no row is longer."""
        return self.batch_size * self.max_seq_len


@dataclass(frozen=True)
class ItemTable:
    """What the order of an epoch depends on, of N items in S sources.

    `lengths`: int32 [N] tokens. `source_starts`: int64 [S + 1]; source s has the items `source_starts[s]` to
    `source_starts[s + 1] - 1`. `type_of_source`: int [S]; types share no step. `ratios`: float [S], how often each
    item of the source occurs in an epoch. For context dropout, `image_lens` int32 [N], tokens of the generated image
    that ends an item (0: none), and `ids` int64 [N].
    """

    lengths: np.ndarray
    source_starts: np.ndarray
    type_of_source: np.ndarray
    ratios: np.ndarray
    image_lens: np.ndarray | None = None
    ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def source_ids(self, items: np.ndarray) -> np.ndarray:
        """The source of each item, int64 [n]."""
        return np.searchsorted(self.source_starts, items, side="right") - 1

    def image_only(self, items: np.ndarray, options: OrderOptions, epoch: int) -> np.ndarray:
        """Bool [n]: which of `items` context dropout shows as their image alone in `epoch`.

        The draw depends on (seed, epoch, source, item id) alone: all ranks and a resumed run agree without a list.
        """
        if not options.context_dropout:
            return np.zeros(len(items), bool)
        # 64-bit arithmetic that wraps around is meant.
        with np.errstate(over="ignore"):
            state = _mix(np.full(1, options.seed, np.uint64))
            state = _mix(state ^ np.uint64(epoch))
            state = _mix(state ^ self.source_ids(items).astype(np.uint64))
            state = _mix(state ^ self.ids[items].view(np.uint64))
        uniform = (state >> np.uint64(11)) * 2.0**-53
        return (uniform < options.context_dropout) & (self.image_lens[items] > 0)


@dataclass(frozen=True)
class Unit:
    """One row: dataset indices `items` int32 [n] (none: a row without targets), and its length with filler."""

    items: np.ndarray
    row_len: int


@dataclass(frozen=True)
class EpochOrder:
    """Units in the order in which an epoch takes them.

    `items`: int32 [M] dataset indices. `unit_offsets`: int64 [U + 1]; unit u is
    `items[unit_offsets[u]:unit_offsets[u + 1]]`. `row_lens`: int32 [U] tokens of each row. `step_offsets`: int64
    [K + 1]; step k is the units `step_offsets[k]` to `step_offsets[k + 1] - 1`. `num_tokens`: of all items together.
    """

    items: np.ndarray
    unit_offsets: np.ndarray
    row_lens: np.ndarray
    step_offsets: np.ndarray
    options: OrderOptions
    epoch: int
    num_tokens: int

    @property
    def units_per_step(self) -> int:
        """G, the most units of a step."""
        return self.options.units_per_step

    @property
    def num_steps(self) -> int:
        return len(self.step_offsets) - 1

    @property
    def num_units(self) -> int:
        return len(self.row_lens)

    @property
    def fill(self) -> float:
        """Share of row positions that hold tokens of items, 0 to 1."""
        return self.num_tokens / int(self.row_lens.sum(dtype=np.int64))

    def units_of_step(self, step: int) -> list[Unit]:
        """The units of step `step` (from 0), at most G; fewer only where a type runs out of items."""
        units = range(int(self.step_offsets[step]), int(self.step_offsets[step + 1]))
        starts = self.unit_offsets
        return [Unit(self.items[starts[u] : starts[u + 1]], int(self.row_lens[u])) for u in units]


def plan_epoch(table: ItemTable, options: OrderOptions, epoch: int) -> EpochOrder:
    """The order of one epoch, in which no item is longer than `max_seq_len`.

    A whole ratio r gives each item of the source r times. A fraction adds a sample without replacement, drawn afresh
    each epoch. Full steps come in random order, the short last step of each type at the end.
    """
    lengths = shown_lengths(table, options, epoch)
    drawn = _draw_items(table, np.random.default_rng([options.seed, epoch, 0]))
    parts, full_steps, short_steps, num_units = [], [], [], 0
    for type_id in np.unique(table.type_of_source).tolist():
        rng = np.random.default_rng([options.seed, epoch, 1, int(type_id)])
        of_type = [part for part, other in zip(drawn, table.type_of_source, strict=True) if other == type_id]
        items = rng.permutation(np.concatenate(of_type))
        if not len(items):
            continue
        build_rows = _pack_rows if options.packing else _batch_rows
        parts.append(build_rows(items, lengths, options, rng))
        type_units = np.arange(num_units, num_units + len(parts[-1][1]))
        num_full = len(type_units) // options.units_per_step * options.units_per_step
        full_steps.append(type_units[:num_full].reshape(-1, options.units_per_step))
        short_steps += [type_units[num_full:]] if num_full < len(type_units) else []
        num_units += len(type_units)
    steps = np.random.default_rng([options.seed, epoch, 2]).permutation(np.concatenate(full_steps))
    step_sizes = np.array([options.units_per_step] * len(steps) + [len(units) for units in short_steps])
    order = np.concatenate([steps.reshape(-1), *short_steps])
    items, sizes = _reorder(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), order)
    unit_offsets = _offsets(sizes)
    num_tokens = np.diff(_offsets(lengths[items])[unit_offsets])
    row_lens = np.full(len(sizes), options.max_row_len)
    if not options.packing:
        row_lens = np.minimum(round_row_len(num_tokens), row_lens)
    return EpochOrder(
        items=items,
        unit_offsets=unit_offsets,
        row_lens=row_lens.astype(np.int32),
        step_offsets=_offsets(step_sizes),
        options=options,
        epoch=epoch,
        num_tokens=int(num_tokens.sum()),
    )


def shown_lengths(table: ItemTable, options: OrderOptions, epoch: int) -> np.ndarray:
    """Tokens int32 [N] of each item in `epoch`: all, or after context dropout its image and the end of the turn."""
    if not options.context_dropout:
        return np.asarray(table.lengths)
    image_only = table.image_only(np.arange(len(table)), options, epoch)
    return np.where(image_only, table.image_lens + 1, table.lengths).astype(np.int32)


def num_micro_steps(order: EpochOrder, world_size: int) -> int:
    """Rows that every rank takes in every step: ceil(G / world_size)."""
    return -(-order.units_per_step // world_size)


def rank_units(order: EpochOrder, step: int, rank: int, world_size: int) -> list[Unit]:
    """The ceil(G / world_size) units of `rank` in `step`; missing ones are units without items."""
    units = order.units_of_step(step)
    # As long as the shortest row of the step: it costs little and is no new row length.
    blank = Unit(np.empty(0, np.int32), min(unit.row_len for unit in units))
    of_rank = units[rank::world_size]
    return of_rank + [blank] * (num_micro_steps(order, world_size) - len(of_rank))


def round_row_len(num_tokens: np.ndarray | int) -> np.ndarray:
    """Row lengths rounded up to one of few values, so that few graphs are compiled."""
    num_tokens = np.asarray(num_tokens, np.int64)
    octave = 2 ** (np.frexp(np.maximum(num_tokens, 1))[1].astype(np.int64) - 1)
    multiple = np.maximum(octave // ROW_LENS_PER_OCTAVE, MIN_ROW_MULTIPLE)
    return -(-num_tokens // multiple) * multiple


def best_fit_rows(lengths: np.ndarray, row_len: int) -> tuple[np.ndarray, int]:
    """Best-fit-decreasing: each item, longest first, goes to the open row with the least space that still takes it.

    Takes `lengths` [n], none above `row_len`. Returns the row of each item, int64 [n], and the number of rows.
    """
    # Items of equal length are interchangeable, and rows with equal space too: whole groups are placed at once. The
    # tightest row, with space s, takes s // L items of length L, because it stays the tightest while they fit.
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    group_lens, group_sizes = np.unique(lengths, return_counts=True)
    # Space left -> batches of rows that have it; and its keys, ascending.
    open_rows: dict[int, list[np.ndarray]] = {}
    spaces: list[int] = []
    rows = np.empty(len(lengths), np.int64)
    num_rows, start = 0, 0

    def give_back(space: int, batch: np.ndarray) -> None:
        # Rows with less space than the shortest item are full.
        if len(batch) and space >= group_lens[0]:
            if space not in open_rows:
                insort(spaces, space)
            open_rows.setdefault(space, []).append(batch)

    for length, size in zip(group_lens[::-1].tolist(), group_sizes[::-1].tolist(), strict=True):
        stop = start + size
        while start < stop:
            at = bisect_left(spaces, length)
            is_open = at < len(spaces)
            space = spaces[at] if is_open else row_len
            per_row = space // length
            wanted = -(-(stop - start) // per_row)
            if is_open:
                batch = open_rows[space].pop()
                if not open_rows[space]:
                    del open_rows[space], spaces[at]
            else:
                batch = np.arange(num_rows, num_rows + wanted)
                num_rows += wanted
            taken, rest = batch[:wanted], batch[wanted:]
            num_placed = min(len(taken) * per_row, stop - start)
            rows[order[start : start + num_placed]] = np.repeat(taken, per_row)[:num_placed]
            num_in_last = num_placed - (len(taken) - 1) * per_row
            give_back(space, rest)
            give_back(space - per_row * length, taken[:-1])
            give_back(space - num_in_last * length, taken[-1:])
            start += num_placed
    return rows, num_rows


def _mix(state: np.ndarray) -> np.ndarray:
    state = state + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


def _draw_items(table: ItemTable, rng: np.random.Generator) -> list[np.ndarray]:
    """Indices int32 of the epoch's items of each source, repeated or sampled according to its ratio."""
    drawn = []
    for source_id, ratio in enumerate(table.ratios):
        items = np.arange(table.source_starts[source_id], table.source_starts[source_id + 1], dtype=np.int32)
        num_drawn = max(round(float(ratio) * len(items)), 1) if len(items) else 0
        whole, sampled = divmod(num_drawn, max(len(items), 1))
        drawn.append(np.concatenate([*[items] * whole, rng.permutation(items)[:sampled]]))
    return drawn


def _batch_rows(items: np.ndarray, lengths: np.ndarray, options: OrderOptions, rng: np.random.Generator) -> Groups:
    """Items in units of `batch_size`: (items, unit sizes)."""
    # What fills no whole step comes last, and is drawn at random: cut after sorting, it would be the longest items.
    step_size = options.batch_size * options.units_per_step
    num_full = len(items) // step_size * step_size
    if options.length_clustering:
        head = _cluster(lengths[items[:num_full]], step_size, rng)
        tail = _cluster(lengths[items[num_full:]], 1, rng)
        items = items[np.concatenate([head, num_full + tail])]
    sizes = np.full(-(-len(items) // options.batch_size), options.batch_size)
    sizes[-1] -= sizes.sum() - len(items)
    return items, sizes


def _cluster(lengths: np.ndarray, spread: int, rng: np.random.Generator) -> np.ndarray:
    """Order int64 [n] by length in which an item strays up to `spread` places."""
    # Without straying, all epochs would have the same steps.
    by_length = np.argsort(lengths, kind="stable")
    return by_length[np.argsort(np.arange(len(lengths)) + rng.uniform(0, spread, len(lengths)))]


def _pack_rows(items: np.ndarray, lengths: np.ndarray, options: OrderOptions, rng: np.random.Generator) -> Groups:
    """Shuffled items in best-fit rows, in random order: (items, unit sizes)."""
    packed, sizes = [], []
    for start in range(0, len(items), PACKING_WINDOW):
        window = items[start : start + PACKING_WINDOW]
        rows, num_rows = best_fit_rows(lengths[window], options.max_row_len)
        packed.append(window[np.argsort(rows, kind="stable")])
        sizes.append(np.bincount(rows, minlength=num_rows))
    all_sizes = np.concatenate(sizes)
    return _reorder(np.concatenate(packed), all_sizes, rng.permutation(len(all_sizes)))


def _reorder(items: np.ndarray, sizes: np.ndarray, order: np.ndarray) -> Groups:
    """The groups taken in `order`."""
    starts, new_sizes = _offsets(sizes)[:-1][order], sizes[order]
    source = np.repeat(starts - _offsets(new_sizes)[:-1], new_sizes) + np.arange(len(items))
    return items[source], new_sizes


def _offsets(sizes: np.ndarray) -> np.ndarray:
    """[0, sizes[0], sizes[0] + sizes[1], ...] int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
