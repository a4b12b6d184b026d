"""Context dropout: the given share of items with images, drawn afresh each epoch."""

import numpy as np
import pytest

from data.epoch.context_dropout import keeps_image_only
from data.epoch.packing import ItemTable, OrderOptions, plan_epoch

NUM_ITEMS = 20_000
IDS, IMAGE_LENS = np.arange(NUM_ITEMS), np.where(np.arange(NUM_ITEMS) % 2, 100, 0)


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_share_of_items_with_images(probability):
    drawn = keeps_image_only(IDS, 0, IMAGE_LENS, seed=3, epoch=1, probability=probability)
    assert not drawn[::2].any()
    num_images, spread = NUM_ITEMS // 2, np.sqrt(probability * (1 - probability) * NUM_ITEMS / 2)
    assert abs(drawn.sum() - probability * num_images) <= 4 * spread


def test_a_draw_depends_on_seed_epoch_source_and_id_alone():
    def draw(ids=IDS, source=0, seed=0, epoch=0, image_lens=IMAGE_LENS):
        return keeps_image_only(ids, source, image_lens, seed, epoch, 0.5)

    first = draw()
    order = np.random.default_rng(0).permutation(NUM_ITEMS)
    np.testing.assert_array_equal(draw(IDS[order], image_lens=IMAGE_LENS[order]), first[order])
    np.testing.assert_array_equal(draw(source=np.zeros(NUM_ITEMS, int)), first)
    # Of the first 16 ids; a checkpoint of a run with context dropout resumes with the same draw.
    assert np.flatnonzero(first[:16]).tolist() == [1, 3, 9, 11, 13, 15]
    for other in (draw(source=1), draw(seed=1), draw(epoch=1)):
        assert abs((other == first)[1::2].mean() - 0.5) < 0.03
    # Ids of other tools may be negative.
    assert draw(ids=-IDS).any()


def test_packed_rows_stay_full():
    lengths = np.random.default_rng(0).integers(1200, 8001, NUM_ITEMS).astype(np.int32)
    table = ItemTable(lengths, np.array([0, NUM_ITEMS]), np.zeros(1, int), np.ones(1), np.full(NUM_ITEMS, 1060), IDS)
    order = plan_epoch(table, OrderOptions(4, 8192, 4, packing=True, context_dropout=0.5), 0)
    assert order.fill > 0.99 and order.num_tokens < 0.65 * lengths.sum()
