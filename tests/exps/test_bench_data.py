"""The bench of the data engine runs, with few short items, and both of its ways read the same tokens."""

import pytest

from tests.exps.test_bench_all import run_bench


@pytest.mark.slow
def test_both_ways_read_all_tokens_of_an_epoch_and_our_rows_are_fuller():
    task = ("--num_items", 2000, "--num_rows", 1000, "--batch_size", 4, "--num_ranks", 1, "--num_workers", 0, 1)
    sizes = ("--lengths", 30, 800, "--max_seq_len", 832)
    summary = run_bench("data", *task, *sizes, "--repeats", 1)
    ours, baseline, ratio = summary["ours"], summary["baseline"], summary["ratio"]
    assert len({count for way in (ours, baseline) for count in way["num_tokens"].values()}) == 1
    assert ours["num_tokens"]["0"] == pytest.approx(2000 * (30 + 800) / 2, rel=0.05)
    assert baseline["plan"]["fill"] < 0.8 < 0.95 < min(ours["plan"]["fill"], ours["packing"]["fill"]) <= 1
    assert ratio["plan.fill"] == pytest.approx(ours["plan"]["fill"] / baseline["plan"]["fill"])
    assert min(*ours["tokens_per_s"].values(), *baseline["tokens_per_s"].values()) > 0
