"""The order of an epoch: each item once, no row too long, the same steps on any number of ranks, well filled rows."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.epoch.packing import (
    ItemTable,
    OrderOptions,
    best_fit_rows,
    num_micro_steps,
    plan_epoch,
    rank_units,
    round_row_len,
    shown_lengths,
)


@st.composite
def order_tasks(draw):
    max_seq_len = draw(st.integers(2, 200))
    sizes = draw(st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(sum))
    num_items = sum(sizes)
    lengths = np.array(draw(st.lists(st.integers(1, max_seq_len), min_size=num_items, max_size=num_items)), np.int32)
    shares = draw(st.lists(st.sampled_from([0, 0, 0.5, 1]), min_size=num_items, max_size=num_items))
    table = ItemTable(
        lengths=lengths,
        source_starts=np.concatenate([[0], np.cumsum(sizes)]),
        type_of_source=np.array([draw(st.integers(0, 2)) for _ in sizes]),
        ratios=np.array([draw(st.sampled_from([1.0, 1.0, 0.3, 2.25])) for _ in sizes]),
        image_lens=np.floor((lengths - 1) * shares).astype(np.int32),
        ids=np.arange(num_items) * 7,
    )
    options = OrderOptions(
        batch_size=draw(st.integers(1, 6)),
        max_seq_len=max_seq_len,
        units_per_step=draw(st.integers(1, 8)),
        packing=draw(st.booleans()),
        length_clustering=draw(st.booleans()),
        seed=draw(st.integers(0, 5)),
        context_dropout=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )
    return table, options


def make_order(lengths, epoch=0, ratios=(1.0,), source_starts=None, **options):
    num_items = len(lengths)
    starts = np.array(source_starts or [0, num_items])
    table = ItemTable(np.asarray(lengths), starts, np.zeros(len(ratios), int), np.array(ratios))
    options = OrderOptions(**{"batch_size": 4, "max_seq_len": 8192, "units_per_step": 4, **options})
    return plan_epoch(table, options, epoch)


def step_items(order):
    return [np.concatenate([unit.items for unit in order.units_of_step(k)]) for k in range(order.num_steps)]


def types_of(table, items):
    return table.type_of_source[table.source_ids(items)]


@settings(deadline=None, max_examples=300)
@given(order_tasks(), st.integers(0, 3))
def test_each_item_as_often_as_its_ratio_says_and_no_row_overflows(task, epoch):
    table, options = task
    order = plan_epoch(table, options, epoch)
    counts = np.bincount(order.items, minlength=len(table))
    for start, stop, ratio in zip(table.source_starts, table.source_starts[1:], table.ratios, strict=False):
        of_source = counts[start:stop]
        if len(of_source):
            assert of_source.sum() == max(round(ratio * len(of_source)), 1)
            assert of_source.min() >= int(ratio) and of_source.max() <= int(np.ceil(ratio))
    assert sum(len(items) for items in step_items(order)) == len(order.items)
    lengths = shown_lengths(table, options, epoch)
    assert order.num_tokens == lengths[order.items].sum()
    for k in range(order.num_steps):
        units = order.units_of_step(k)
        assert 1 <= len(units) <= options.units_per_step
        assert len(np.unique(types_of(table, np.concatenate([unit.items for unit in units])))) == 1
        for unit in units:
            assert 0 < lengths[unit.items].sum() <= unit.row_len <= options.max_row_len
            if options.packing:
                assert unit.row_len == options.max_row_len
            else:
                assert 1 <= len(unit.items) <= options.batch_size
    assert 0 < order.fill <= 1
    short = [k for k in range(order.num_steps) if len(order.units_of_step(k)) < options.units_per_step]
    assert short == list(range(order.num_steps - len(short), order.num_steps))
    short_types = [types_of(table, order.units_of_step(k)[0].items)[0] for k in short]
    assert len(set(short_types)) == len(short_types)


@settings(deadline=None, max_examples=50)
@given(order_tasks(), st.sampled_from([1, 2, 3, 4, 8]))
def test_a_step_holds_the_same_items_on_any_number_of_ranks(task, world_size):
    order = plan_epoch(*task, 1)
    for k, items in enumerate(step_items(order)):
        of_ranks = [rank_units(order, k, rank, world_size) for rank in range(world_size)]
        assert {len(units) for units in of_ranks} == {num_micro_steps(order, world_size)}
        assert sorted(i for units in of_ranks for unit in units for i in unit.items) == sorted(items.tolist())
        row_lens = {unit.row_len for unit in order.units_of_step(k)}
        assert all(unit.row_len in row_lens for units in of_ranks for unit in units)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=150), st.integers(60, 200))
def test_best_fit_rows_hold_and_beat_next_fit(lengths, row_len):
    lengths = np.array(lengths, np.int32)
    rows, num_rows = best_fit_rows(lengths, row_len)
    loads = np.bincount(rows, weights=lengths, minlength=num_rows)
    assert loads.min() > 0 and loads.max() <= row_len
    assert num_rows == reference_best_fit(lengths.tolist(), row_len)


def reference_best_fit(lengths, row_len):
    """Best-fit-decreasing one item at a time; returns the number of rows."""
    spaces = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, space in enumerate(spaces) if space >= length]
        if fitting:
            spaces[min(fitting, key=lambda i: spaces[i])] -= length
        else:
            spaces.append(row_len - length)
    return len(spaces)


def test_the_order_is_a_function_of_its_arguments_and_differs_between_epochs_and_seeds():
    lengths = np.random.default_rng(0).integers(300, 8001, 500)
    for packing in (False, True):
        first, again = make_order(lengths, packing=packing), make_order(lengths, packing=packing)
        np.testing.assert_array_equal(first.items, again.items)
        np.testing.assert_array_equal(first.unit_offsets, again.unit_offsets)
        together = {frozenset(items.tolist()) for items in step_items(first)}
        for other in (make_order(lengths, epoch=1, packing=packing), make_order(lengths, seed=1, packing=packing)):
            assert not together & {frozenset(items.tolist()) for items in step_items(other)}


@pytest.mark.parametrize("packing, digest", [(False, "af5b2748006605c0"), (True, "63ef2c25af8d2389")])
def test_checkpoints_of_before_resume_in_the_same_order(packing, digest):
    lengths = np.random.default_rng(0).integers(300, 8001, 600).astype(np.int32)
    image_lens, ids = np.full(600, 200), np.arange(600)
    table = ItemTable(lengths, np.array([0, 200, 600]), np.array([1, 0]), np.array([1.0, 1.5]), image_lens, ids)
    order = plan_epoch(table, OrderOptions(4, 8192, 4, packing=packing, seed=5, context_dropout=0.3), 1)
    arrays = (order.items, order.unit_offsets, order.row_lens, order.step_offsets)
    content = b"".join(np.asarray(array, np.int64).tobytes() for array in arrays)
    assert hashlib.sha256(content).hexdigest()[:16] == digest


def test_a_ratio_below_one_is_a_fresh_sample_each_epoch():
    lengths, starts = np.full(300, 10), [0, 100, 300]
    draws = []
    for epoch in range(2):
        counts = np.bincount(make_order(lengths, epoch, (0.3, 1.0), starts).items, minlength=300)
        assert counts[:100].sum() == 30 and counts.max() == 1
        np.testing.assert_array_equal(counts[100:], 1)
        draws.append(set(np.flatnonzero(counts[:100]).tolist()))
    assert draws[0] != draws[1]


def test_default_batches_are_of_similar_length():
    lengths = np.random.default_rng(0).integers(300, 8001, 4000)
    spread = lambda order: np.mean([np.ptp(lengths[items]) for items in step_items(order)])  # noqa: E731
    assert spread(make_order(lengths)) < 0.2 * spread(make_order(lengths, length_clustering=False))


def test_short_last_step_is_not_made_of_the_longest():
    lengths = np.arange(1, 1 + 16 * 50 + 8)
    tails = [lengths[step_items(make_order(lengths, epoch))[-1]].mean() for epoch in range(20)]
    assert 300 < np.mean(tails) < 500


def test_default_rows_have_few_lengths_and_little_filler():
    order = make_order(np.random.default_rng(0).integers(300, 8001, 10_000))
    assert order.fill > 0.97
    assert len(np.unique(order.row_lens)) <= 16 * 5 + 1


@pytest.mark.parametrize(
    ("low", "high", "batch_size", "max_seq_len", "goal"),
    [(300, 8000, 1, 8192, 0.99), (300, 8000, 4, 8192, 0.99), (2140, 2404, 8, 4096, 0.95)],
)
def test_packed_rows_are_full(low, high, batch_size, max_seq_len, goal):
    lengths = np.random.default_rng(0).integers(low, high + 1, 20_000)
    assert make_order(lengths, batch_size=batch_size, max_seq_len=max_seq_len, packing=True).fill >= goal


def test_round_row_len():
    values = round_row_len(np.arange(1, 70_000))
    assert (values >= np.arange(1, 70_000)).all() and (values % 16 == 0).all()
    assert (values[1000:] / np.arange(1001, 70_000)).max() <= 1 + 1 / 16
    np.testing.assert_array_equal(round_row_len(values), values)


# Context dropout

NUM_ITEMS = 20_000
IDS, IMAGE_LENS = np.arange(NUM_ITEMS), np.where(np.arange(NUM_ITEMS) % 2, 100, 0)


def draw(probability=0.5, ids=IDS, sources=(0, NUM_ITEMS), seed=0, epoch=0, image_lens=IMAGE_LENS):
    table = ItemTable(np.full(NUM_ITEMS, 200), np.array(sources), None, None, image_lens, ids)
    return table.image_only(IDS, OrderOptions(4, 8192, 4, seed=seed, context_dropout=probability), epoch)


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_context_dropout_draws_a_share_of_the_items_with_images(probability):
    drawn, num_images = draw(probability, seed=3, epoch=1), NUM_ITEMS // 2
    assert not drawn[::2].any()
    assert abs(drawn.sum() - probability * num_images) <= 4 * np.sqrt(probability * (1 - probability) * num_images)


def test_context_dropout_depends_on_seed_epoch_source_and_id_alone():
    first, order = draw(), np.random.default_rng(0).permutation(NUM_ITEMS)
    np.testing.assert_array_equal(draw(ids=IDS[order], image_lens=IMAGE_LENS[order]), first[order])
    # Of the first 16 ids; a checkpoint of a run with context dropout resumes with the same draw.
    assert np.flatnonzero(first[:16]).tolist() == [1, 3, 9, 11, 13, 15]
    for other in (draw(sources=(0, 0, NUM_ITEMS)), draw(seed=1), draw(epoch=1)):
        assert abs((other == first)[1::2].mean() - 0.5) < 0.03
    # Ids of other tools may be negative.
    assert draw(ids=-IDS).any()


def test_packed_rows_stay_full_with_context_dropout():
    lengths = np.random.default_rng(0).integers(1200, 8001, NUM_ITEMS).astype(np.int32)
    table = ItemTable(lengths, np.array([0, NUM_ITEMS]), np.zeros(1, int), np.ones(1), np.full(NUM_ITEMS, 1060), IDS)
    order = plan_epoch(table, OrderOptions(4, 8192, 4, packing=True, context_dropout=0.5), 0)
    assert order.fill > 0.99 and order.num_tokens < 0.65 * lengths.sum()
