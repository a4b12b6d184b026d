"""Rows of documents, and loaders that give the same rows however they run."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data.epoch.dataset import TokenDataset
from data.epoch.packing import OrderOptions, plan_epoch, shown_lengths
from data.epoch.rows import EpochRows, build_loader, collate_row
from data.formats.token_file import TokenItem
from data.items.vocab import IGNORE_INDEX
from tests.data.epoch.test_dataset import write_source
from tests.helpers import forked

PAD_ID = 7
OPTIONS = OrderOptions(batch_size=2, max_seq_len=64, units_per_step=4, seed=3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("items")
    return TokenDataset(
        [
            write_source(folder / "a", rng.integers(5, 65, 31).tolist(), "captions"),
            write_source(folder / "b", rng.integers(5, 65, 22).tolist(), "edits", 0.5),
        ],
        max_seq_len=64,
    )


def make_rows(dataset, rank=0, world_size=1, epoch=0, options=OPTIONS) -> EpochRows:
    return EpochRows(dataset, plan_epoch(dataset.table, options, epoch), rank, world_size, PAD_ID)


def plain(row: dict) -> dict:
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in row.items()}


def test_collate_row():
    first = TokenItem(np.array([1, 2, 3]), np.array([1, 2, IGNORE_INDEX]), 0)
    items = [first, TokenItem(np.array([4]), np.array([4]), 1)]
    row = collate_row(items, 9, PAD_ID, max_document_len=3)
    assert row["input_ids"].tolist() == [[1, 2, 3, 4, 7, 7, 7, 7, 7]]
    assert row["labels"].tolist() == [[-100, 2, -100, -100, -100, -100, -100, -100, -100]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 0, 1]]
    assert row["cu_seqlens"].tolist() == [0, 3, 4, 7, 9] and row["cu_seqlens"].dtype == torch.int32
    assert {row[key].dtype for key in ("input_ids", "labels", "position_ids")} == {torch.int64}
    assert row["num_valid_tokens"] == 1 and row["num_tokens"] == 4
    assert collate_row(items, 9, PAD_ID)["cu_seqlens"].tolist() == [0, 3, 4, 9]
    assert collate_row(items, 4, PAD_ID)["cu_seqlens"].tolist() == [0, 3, 4]
    blank = collate_row([], 4, PAD_ID)
    assert blank["input_ids"].tolist() == [[7] * 4] and blank["cu_seqlens"].tolist() == [0, 4]
    assert blank["num_valid_tokens"] == 0 and blank["num_tokens"] == 0
    with pytest.raises(ValueError, match="2 items of 4 tokens do not fit a row of 3"):
        collate_row(items, 3, PAD_ID)


@pytest.mark.parametrize("packing", [False, True])
def test_rows_of_an_epoch_hold_every_item_once(dataset, packing):
    options = OrderOptions(batch_size=2, max_seq_len=64, units_per_step=4, packing=packing)
    rows = make_rows(dataset, options=options)
    drawn = np.bincount([i for k in range(len(rows)) for i in rows[k]["item_indices"]], minlength=len(dataset))
    assert drawn[:31].tolist() == [1] * 31 and drawn[31:].sum() == 11 and drawn.max() == 1
    for k in range(len(rows)):
        row = rows[k]
        documents = np.split(row["input_ids"][0].numpy(), row["cu_seqlens"][1:-1].numpy())
        for document, index in zip(documents, row["item_indices"], strict=False):
            np.testing.assert_array_equal(document, dataset.read(index).token)
        assert row["num_valid_tokens"] == sum(int(dataset.table.lengths[i]) // 2 for i in row["item_indices"])
        assert row["num_tokens"] == sum(int(dataset.table.lengths[i]) for i in row["item_indices"])


@pytest.mark.parametrize("num_workers, start_step", [(0, 0), (0, 2), (2, 2)])
def test_any_number_of_workers_gives_the_same_rows_from_any_step(dataset, num_workers, start_step):
    rows = make_rows(dataset, rank=1, world_size=2, epoch=1)
    loader = build_loader(rows, num_workers, start_step=start_step)
    expected = [plain(rows[i]) for i in range(start_step * rows.micro_steps, len(rows))]
    assert [(row["step"], row["micro_step"]) for row in expected] == [
        divmod(i, rows.micro_steps) for i in range(start_step * rows.micro_steps, len(rows))
    ]
    assert len(loader) == len(expected)
    found = list(loader)
    assert [plain(row) for row in found] == expected
    # A container may have little of it, and a worker that cannot send would keep its rank waiting for ever.
    assert not any(value.is_shared() for row in found for value in row.values() if isinstance(value, torch.Tensor))
    assert not list(build_loader(rows, num_workers, start_step=rows.order.num_steps))


def test_resuming_reads_nothing_that_was_consumed(dataset, monkeypatch):
    rows, read = make_rows(dataset), []
    original = TokenDataset.read
    monkeypatch.setattr(TokenDataset, "read", lambda self, i, *rest: read.append(i) or original(self, i, *rest))
    list(build_loader(rows, start_step=3))
    consumed = {i for k in range(3) for unit in rows.order.units_of_step(k) for i in unit.items.tolist()}
    assert read and not consumed & set(read)


def test_a_bad_item_is_left_out_of_its_row_and_reported(tmp_path):
    source = write_source(tmp_path, [10] * 8)
    whole = {row["item_indices"][0]: row for row in build_loader(make_rows(TokenDataset([source], 64)))}
    (tmp_path / "files/5.pkl").write_bytes(b"no pickle")
    bad_items = []
    for row in build_loader(make_rows(TokenDataset([source], 64)), num_workers=1):
        bad_items += row["bad_items"]
        before = whole[row["item_indices"][0]]
        assert row["item_indices"] == before["item_indices"] and row["input_ids"].shape == before["input_ids"].shape
        if row["bad_items"]:
            assert (row["num_tokens"], row["num_valid_tokens"]) == (10, 5) and not before["bad_items"]
        else:
            torch.testing.assert_close(row["labels"], before["labels"])
    (bad,) = bad_items
    assert bad.place.endswith("files/5.pkl") and "files/5.pkl" in bad.reason


RANK_SCRIPT = """
import multiprocessing, sys, time
from pathlib import Path
from data.formats.data_config import DataSource
from data.epoch.dataset import TokenDataset
from data.epoch.packing import OrderOptions, plan_epoch
from data.epoch.rows import EpochRows, build_loader

dataset = TokenDataset([DataSource(Path(sys.argv[1]))], 64, say=lambda message: None)
rows = EpochRows(dataset, plan_epoch(dataset.table, OrderOptions(1, 64, 1), 0), 0, 1, 0)
loader = iter(build_loader(rows, num_workers=2))
seen = [next(loader), next(loader)]  # one of each worker, so that both are up
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
while not Path(sys.argv[2]).exists():
    time.sleep(0.01)
seen += list(loader)
print(len(seen), flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_workers_survive_the_signals_of_a_launcher_and_die_with_their_rank(tmp_path):
    record = write_source(tmp_path, [10] * 40).path
    rank = forked.Popen([sys.executable, "-c", RANK_SCRIPT, record, tmp_path / "read_on"], os.environ)
    try:
        workers = [int(pid) for pid in rank.wait_for_output("\n").split()]
        assert len(workers) == 2
        for pid in workers:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                os.kill(pid, number)
        (tmp_path / "read_on").touch()
        rank.wait_for_output("40\n")
    finally:
        rank.kill()
        rank.wait()
    deadline = time.monotonic() + 20
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline, "workers outlive their rank"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# The same items in the same steps, however they are spread


def occurrences(dataset, options, epoch, world_size, start_step=0) -> list[tuple]:
    """(step, item, length in its row, whether it begins an image) of all ranks, sorted."""
    found = []
    for rank in range(world_size):
        rows = make_rows(dataset, rank, world_size, epoch, options)
        for row in build_loader(rows, start_step=start_step):
            starts, stops = row["cu_seqlens"][:-1].tolist(), row["cu_seqlens"][1:].tolist()
            for item, start, stop in zip(row["item_indices"], starts, stops, strict=False):
                found.append((row["step"], item, stop - start, int(row["input_ids"][0, start])))
    return sorted(found)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Items that end in an image of a third of their length, but every fourth without."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(9, 65, 40).tolist()
    image_lens = [None if number % 4 == 0 else length // 3 for number, length in enumerate(lengths)]
    return TokenDataset([write_source(tmp_path_factory.mktemp("images"), lengths, image_lens=image_lens)], 64)


@pytest.mark.parametrize("packing, epoch, context_dropout", [(False, 0, 0.0), (True, 1, 0.0), (False, 1, 0.5)])
def test_items_of_a_step_do_not_depend_on_ranks_or_resuming(images, monkeypatch, packing, epoch, context_dropout):
    monkeypatch.setattr(images, "begin_image_id", AnyId())
    options = OrderOptions(2, 64, units_per_step=8, packing=packing, seed=1, context_dropout=context_dropout)
    expected = occurrences(images, options, epoch, world_size=1)
    lengths = shown_lengths(images.table, options, epoch)
    assert {(item, length) for _, item, length, _ in expected} == set(enumerate(lengths.tolist()))
    for world_size in (2, 3, 8):
        assert occurrences(images, options, epoch, world_size) == expected
    resumed = [place for place in expected if place[0] >= 1]
    assert resumed and occurrences(images, options, epoch, world_size=3, start_step=1) == resumed


class AnyId:
    """Equal to every token: the items of `images` have no begin-image tokens."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None
