"""The bench of the data engine runs, with few short items, and both of its ways read the same tokens."""

import json

import pytest

from data.data_config import DataSource
from data.dataset import TokenDataset
from exps.bench.data import summarize, why_not_recipe
from exps.bench.synthetic import write_index, write_placeholder, write_pool, write_record
from tests.tokenize_helpers import run_script


@pytest.mark.slow
def test_both_ways_read_all_tokens_of_an_epoch_and_ours_leaves_less_of_its_rows_empty():
    done = run_script(
        "exps/bench/data.py", "--num_items", 2000, "--num_rows", 1000, "--batch_size", 4, "--num_ranks", 1,
        "--lengths", 30, 800, "--max_seq_len", 832, "--num_workers", 0, 1, "--repeats", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert [line.split(" | ")[:2] for line in table[-2:]] == [["| 2,000", "ours"], ["| 2,000", "recipe"]]
    summary = json.loads(last)
    assert {"bench", "device", "versions", "ours", "baseline", "ratio", "rows"} <= summary.keys()
    ours, baseline, ratio = summary["ours"], summary["baseline"], summary["ratio"]
    assert len({read["num_tokens"] for way in (ours, baseline) for read in way["read"]}) == 1
    assert ours["read"][0]["num_tokens"] == pytest.approx(2000 * (30 + 800) / 2, rel=0.05)
    assert baseline["plan"]["fill"] < 0.8 < 0.95 < min(ours["plan"]["fill"], ours["packing"]["fill"]) <= 1
    assert ratio["fill"] == pytest.approx(ours["plan"]["fill"] / baseline["plan"]["fill"])
    speeds = [way["read"][-1]["tokens_per_s"] for way in (ours, baseline)]
    assert min(speeds) > 0 and ratio["tokens_per_s"] == pytest.approx(speeds[0] / speeds[1])
    assert ratio["open_time"] == pytest.approx(ours["open"]["seconds"] / baseline["open"]["seconds"])
    assert ratio["open_memory"] == pytest.approx(ours["open"]["extra_mib"] / baseline["open"]["extra_mib"])


def test_an_index_without_a_record_holds_the_items_that_the_record_of_as_many_would(tmp_path):
    pool = write_pool(tmp_path / "pool", 30, 45)
    datasets = []
    for write in (write_record, write_placeholder):
        folder = tmp_path / write.__name__
        folder.mkdir()
        record = write(folder, pool, 50)
        if write is write_placeholder:
            write_index(record, folder / "cache", pool, 50)
        datasets.append(TokenDataset([DataSource(record)], 64, cache_dir=folder / "cache", say=lambda line: None))
    listed, unlisted = datasets
    assert len(listed) == len(unlisted) == 50
    assert "30.pkl" not in unlisted.place(0) and "at byte" in unlisted.place(0)
    for item in range(50):
        assert (listed.read(item).token == unlisted.read(item).token).all()
    assert len(set(listed.table.lengths.tolist())) > 10


def test_where_the_recipes_way_does_not_fit_the_figures_are_of_fewer_items():
    assert why_not_recipe(1000) is None
    assert "47 GiB" in why_not_recipe(100_000_000)

    def row(num_items: int, baseline: dict | None) -> dict:
        return {"num_items": num_items, "ours": {}, "baseline": baseline, "ratio": baseline}

    rows = [row(1000, {"fill": 2}), row(2000, {"fill": 3}), row(4000, None)]
    assert summarize(rows)["ratio"] == {"fill": 3} and summarize(rows)["rows"] == rows
    assert summarize(rows[2:])["ratio"] is None
