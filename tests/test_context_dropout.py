"""What is drawn for context dropout: the asked share, anew each epoch, of items with images only."""

import numpy as np
import pytest

from data.context_dropout import keeps_image_only, kept_lengths
from data.packing import ItemTable, PlanOptions, plan_epoch

NUM_ITEMS = 20_000
IDS, IMAGE_LENS = np.arange(NUM_ITEMS), np.where(np.arange(NUM_ITEMS) % 2, 100, 0)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
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
    for other in (draw(source=1), draw(seed=1), draw(epoch=1)):
        agreement = (other == first)[1::2].mean()
        assert abs(agreement - 0.5) < 0.03
    assert draw(ids=-IDS).any()  # ids of other tools may be negative


def test_wrong_probability():
    with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
        keeps_image_only(IDS, 0, IMAGE_LENS, 0, 0, 1.5)


def test_kept_lengths():
    lengths = kept_lengths(np.array([50, 60]), np.array([20, 20]), np.array([True, False]))
    assert lengths.tolist() == [21, 60] and lengths.dtype == np.int32


def test_packed_rows_stay_full():
    lengths = np.random.default_rng(0).integers(1200, 8001, NUM_ITEMS).astype(np.int32)
    table = ItemTable(lengths, np.array([0, NUM_ITEMS]), np.zeros(1, int), np.ones(1), np.full(NUM_ITEMS, 1060), IDS)
    plan = plan_epoch(table, PlanOptions(4, 8192, 4, packing=True, context_dropout=0.5), 0)
    assert plan.fill > 0.99 and plan.num_tokens < 0.65 * lengths.sum()
