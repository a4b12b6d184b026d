"""Items from token files, rows of documents, and loaders that give the same rows however they run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data.data_config import DataSource
from data.dataset import EpochRows, TokenDataset, build_loader, collate_row
from data.packing import PlanOptions
from data.record import RecordEntry, write_merged
from data.token_file import TokenItem, save_token_file, write_shard
from data.vocab import IGNORE_INDEX

PAD_ID = 7
OPTIONS = PlanOptions(batch_size=2, max_seq_len=64, units_per_step=4, seed=3)


def write_source(folder: Path, lengths, type_name="default", ratio=1.0, image_lens=None) -> DataSource:
    """Token files in which token t of item i is 1000 * i + t, every other one a target."""
    (folder / "files").mkdir(parents=True)
    entries = []
    for i, length in enumerate(lengths):
        token = [1000 * i + t for t in range(length)]
        label = [value if t % 2 else IGNORE_INDEX for t, value in enumerate(token)]
        save_token_file(folder / "files" / f"{i}.pkl", token, label, i)
        entries.append(RecordEntry(f"files/{i}.pkl", length, i, image_lens[i] if image_lens else None))
    write_merged(entries, folder / "record.json")
    return DataSource(folder / "record.json", ratio, type_name)


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
    return EpochRows(dataset, dataset.plan_epoch(options, epoch), rank, world_size, PAD_ID)


def plain(row: dict) -> dict:
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in row.items()}


def test_items_of_all_sources(tmp_path):
    sources = [
        write_source(tmp_path / "a", [3, 5], "x", image_lens=[None, 4]),
        write_source(tmp_path / "b", [4], "w", ratio=2.0),
    ]
    dataset = TokenDataset(sources, max_seq_len=5)
    assert dataset.lengths.tolist() == [3, 5, 4] and dataset.lengths.dtype == np.int32
    assert dataset.image_lens.tolist() == [0, 4, 0]
    assert dataset.source_ids.tolist() == [0, 0, 1] and dataset.ratios.tolist() == [1.0, 2.0]
    assert [dataset.type_names[t] for t in dataset.type_ids] == ["x", "x", "w"]
    assert len(dataset) == 3 and dataset.num_overlong == 0
    assert dataset[1].token.tolist() == [1000, 1001, 1002, 1003, 1004] and dataset[1].id == 1
    assert dataset[2].label.tolist() == [IGNORE_INDEX, 1, IGNORE_INDEX, 3]


def test_items_of_shards_and_of_files_are_the_same(tmp_path):
    source = write_source(tmp_path, [3, 5, 4, 60], image_lens=[None, 4, 2, None])
    before = TokenDataset([source], max_seq_len=64)
    folder = tmp_path / "files"
    places = write_shard(folder / "s.pkls", [(folder / f"{i}.pkl").read_bytes() for i in (1, 3)])
    in_shard = dict(zip((1, 3), places, strict=True))
    entries = [
        RecordEntry("files/s.pkls" if i in in_shard else f"files/{i}.pkl", length, i, image_len, *in_shard.get(i, ()))
        for i, (length, image_len) in enumerate(zip([3, 5, 4, 60], [None, 4, 2, None], strict=True))
    ]
    expected = [(before[i].token.tolist(), before[i].label.tolist(), before[i].id) for i in range(4)]
    write_merged(entries, source.path)
    for i in in_shard:
        (folder / f"{i}.pkl").unlink()
    after = TokenDataset([source], max_seq_len=64)
    assert [(after[i].token.tolist(), after[i].label.tolist(), after[i].id) for i in range(4)] == expected
    assert after.image_lens.tolist() == before.image_lens.tolist()
    dropped = TokenDataset([source], max_seq_len=4, overlong="drop")
    assert [dropped[i].id for i in range(2)] == [0, 2]


def test_overlong_is_an_error_that_names_the_way_out(tmp_path):
    source = write_source(tmp_path, [10, 70, 65])
    with pytest.raises(ValueError, match=r"2 of 3 items .*max_seq_len 64; .*70 tokens .*1\.pkl.*--max_seq_len 70"):
        TokenDataset([source], max_seq_len=64)
    assert len(TokenDataset([source], max_seq_len=70)) == 3


def test_overlong_drop(tmp_path):
    dataset = TokenDataset([write_source(tmp_path, [70, 10, 65, 64])], 64, overlong="drop")
    assert dataset.lengths.tolist() == [10, 64] and dataset.num_overlong == 2
    assert [dataset[i].id for i in range(2)] == [1, 3]


def test_overlong_truncate(tmp_path):
    dataset = TokenDataset([write_source(tmp_path, [70, 10], image_lens=[20, 5])], 64, overlong="truncate")
    assert dataset.lengths.tolist() == [64, 10] and dataset.num_overlong == 1
    assert dataset[0].token.tolist() == list(range(64)) and len(dataset[0].label) == 64
    assert dataset.image_lens.tolist() == [0, 5]  # the cut item no longer ends in its image


def test_overlong_that_leaves_nothing_or_is_unknown(tmp_path):
    source = write_source(tmp_path, [70, 65])
    with pytest.raises(ValueError, match="the shortest: 65"):
        TokenDataset([source], 64, overlong="drop")
    with pytest.raises(ValueError, match="overlong must be one of error, drop, truncate, got 'cut'"):
        TokenDataset([source], 64, overlong="cut")


def test_record_without_items(tmp_path):
    write_merged([], tmp_path / "record.json")
    with pytest.raises(ValueError, match="record.json has no items"):
        TokenDataset([DataSource(tmp_path / "record.json")], 64)


def test_file_that_is_not_what_its_record_says(tmp_path):
    dataset = TokenDataset([write_source(tmp_path, [10])], 64)
    save_token_file(tmp_path / "files/0.pkl", [1, 2], [1, 2], 0)
    with pytest.raises(ValueError, match=r"files/0\.pkl has 2 tokens, but its record says 10"):
        dataset[0]
    (tmp_path / "files/0.pkl").unlink()
    with pytest.raises(FileNotFoundError, match=r"files/0\.pkl"):
        dataset[0]


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


def test_collate_row_without_items():
    row = collate_row([], 4, PAD_ID)
    assert row["input_ids"].tolist() == [[7] * 4] and row["cu_seqlens"].tolist() == [0, 4]
    assert row["num_valid_tokens"] == 0 and row["num_tokens"] == 0


def test_collate_row_that_overflows():
    with pytest.raises(ValueError, match="1 items of 3 tokens do not fit a row of 2"):
        collate_row([TokenItem(np.arange(3), np.arange(3), 0)], 2, PAD_ID)


@pytest.mark.parametrize("packing", [False, True])
def test_rows_of_an_epoch_hold_every_item_once(dataset, packing):
    options = PlanOptions(batch_size=2, max_seq_len=64, units_per_step=4, packing=packing)
    rows = make_rows(dataset, options=options)
    drawn = np.bincount([i for k in range(len(rows)) for i in rows[k]["item_indices"]], minlength=len(dataset))
    assert drawn[:31].tolist() == [1] * 31 and drawn[31:].sum() == 11 and drawn.max() == 1
    for k in range(len(rows)):
        row = rows[k]
        documents = np.split(row["input_ids"][0].numpy(), row["cu_seqlens"][1:-1].numpy())
        for document, index in zip(documents, row["item_indices"], strict=False):
            np.testing.assert_array_equal(document, dataset[index].token)
        assert row["num_valid_tokens"] == sum(int(dataset.lengths[i]) // 2 for i in row["item_indices"])
        assert row["num_tokens"] == sum(int(dataset.lengths[i]) for i in row["item_indices"])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_steps_hold_the_same_items_on_any_number_of_ranks(dataset, world_size):
    alone = make_rows(dataset)
    expected = [sorted(i for m in range(4) for i in alone[4 * k + m]["item_indices"]) for k in range(len(alone) // 4)]
    of_ranks = [make_rows(dataset, rank, world_size) for rank in range(world_size)]
    found = [[] for _ in expected]
    for rows in of_ranks:
        assert len(rows) == len(expected) * rows.micro_steps
        for i in range(len(rows)):
            row = rows[i]
            assert (row["step"], row["micro_step"]) == divmod(i, rows.micro_steps)
            found[row["step"]] += row["item_indices"]
    assert [sorted(items) for items in found] == expected


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("start_step", [0, 2])
def test_any_number_of_workers_gives_the_same_rows_from_any_step(dataset, num_workers, start_step):
    rows = make_rows(dataset, rank=1, world_size=2, epoch=1)
    loader = build_loader(rows, num_workers, start_step=start_step)
    expected = [plain(rows[i]) for i in range(start_step * rows.micro_steps, len(rows))]
    assert len(loader) == len(expected)
    assert [plain(row) for row in loader] == expected


def test_resuming_reads_nothing_that_was_consumed(dataset, monkeypatch):
    rows, read = make_rows(dataset), []
    original = TokenDataset.__getitem__
    monkeypatch.setattr(TokenDataset, "__getitem__", lambda self, i: read.append(i) or original(self, i))
    list(build_loader(rows, start_step=3))
    consumed = {i for k in range(3) for unit in rows.plan.units_of_step(k) for i in unit.items.tolist()}
    assert read and not consumed & set(read)


def test_start_step_at_and_beyond_the_end(dataset):
    rows = make_rows(dataset)
    assert not list(build_loader(rows, start_step=rows.plan.num_steps))
    with pytest.raises(ValueError, match="start_step .* is outside"):
        build_loader(rows, start_step=rows.plan.num_steps + 1)


def test_a_missing_file_in_a_worker_reaches_the_rank(tmp_path):
    dataset = TokenDataset([write_source(tmp_path, [10] * 8)], 64)
    (tmp_path / "files/5.pkl").unlink()
    with pytest.raises(FileNotFoundError, match=r"files/5\.pkl"):
        list(build_loader(make_rows(dataset), num_workers=1))


RANK_SCRIPT = """
import multiprocessing, sys, time
from pathlib import Path
from data.data_config import DataSource
from data.dataset import EpochRows, TokenDataset, build_loader
from data.packing import PlanOptions

dataset = TokenDataset([DataSource(Path(sys.argv[1]))], 64)
rows = EpochRows(dataset, dataset.plan_epoch(PlanOptions(1, 64, 1), 0), 0, 1, 0)
loader = iter(build_loader(rows, num_workers=2))
seen = [next(loader), next(loader)]  # one of each worker, so that both are up
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
sys.stdin.readline()
seen += list(loader)
print(len(seen), flush=True)
"""


@pytest.fixture
def rank_process(tmp_path):
    """A process that has read two of 40 rows by two workers and waits for a line; and the ids of its workers."""
    record = write_source(tmp_path, [10] * 40).path
    process = subprocess.Popen(
        [sys.executable, "-c", RANK_SCRIPT, str(record)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    yield process, [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()


def test_workers_go_on_after_the_signals_of_a_launcher(rank_process):
    process, workers = rank_process
    assert len(workers) == 2
    for pid in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.kill(pid, number)
    output, _ = process.communicate("go on\n", timeout=60)
    assert output.split() == ["40"] and process.returncode == 0
    wait_until_gone(workers)


def test_workers_die_with_their_rank(rank_process):
    process, workers = rank_process
    assert all(map(is_alive, workers))
    process.kill()
    process.wait()
    wait_until_gone(workers)


def wait_until_gone(pids: list[int], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"still alive: {[pid for pid in pids if is_alive(pid)]}"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
