"""The pre-tokenizing bench runs, with a small VQGAN, and its figures belong together."""

import json

import pytest

from data.items.item_processor import load_text_tokenizer
from data.items.vocab import ChameleonVocab
from exps.bench import pre_tokenize as bench
from exps.bench.pre_tokenize import seeded_vqgan, write_inputs, write_tokenizer
from tests.exps.test_bench_all import run_bench
from tests.helpers.tokenize_helpers import ROOT


@pytest.mark.slow
def test_the_bench_compares_both_ways_on_a_small_vqgan():
    vqgan_dir = ROOT / "exps" / "tiny" / "vqgan"
    flags = ("--num_images=3", "--target_size=64", "--precision=fp32", f"--vqgan_dir={vqgan_dir}")
    summary = run_bench("pre_tokenize", *flags)
    ours, baseline, ratio = (summary[name] for name in ("ours", "baseline", "ratio"))
    assert ours["equal_codes"] == 1 and ours["host_gib"] > 0.1
    speeds = ours["images_per_s"], baseline["images_per_s"]
    assert min(speeds) > 0 and ratio["images_per_s"] == pytest.approx(speeds[0] / speeds[1])
    assert baseline["images_per_s_without_lookups"] > speeds[1]
    assert ours["start_s"] > 0


@pytest.mark.slow
def test_the_bench_measures_the_host_alone_in_its_steady_state(monkeypatch, capfd):
    """In a process of its own, which asserts that it has not imported torch."""
    monkeypatch.setattr(bench, "IMAGE_SIDE", 64)
    flags = ["--encoder=none", "--num_images=600", "--target_size=64", "--num_workers=2", "--seconds=0.5"]
    code, printed = bench.main(flags), capfd.readouterr()
    assert code == 0, printed.err
    summary = json.loads(printed.out.splitlines()[-1])
    assert summary["host"]["main_cpu_ms_per_image"] > 0 and summary["start_s"] > 0
    assert summary["host"]["images_per_s"] == summary["ours"]["images_per_s"] > 0


def test_many_items_show_few_different_images(tmp_path):
    write_inputs(tmp_path, 30, with_vqgan=False)
    items = json.loads((tmp_path / "in.json").read_text())
    assert len(items) == 30 and len({item["image"] for item in items}) == len(list(tmp_path.glob("*.jpg"))) == 24


def test_the_benchs_tokenizer_and_vqgan_have_chameleons_size(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    vocab = ChameleonVocab.from_tokenizer(load_text_tokenizer(tmp_path / "tokenizer"))
    assert (vocab.vocab_size, vocab.num_codes) == (65536, 8192)
    vqgan = seeded_vqgan()
    assert (vqgan.num_codes, vqgan.downsample) == (8192, 16)
    assert vqgan.config.base_channels == 128 and vqgan.config.embed_dim == 256
