"""The pre-tokenizing bench runs, with a small VQGAN, and says what it promises."""

import json

import pytest

from data.item_processor import load_text_tokenizer
from data.vocab import ChameleonVocab
from exps.bench.pre_tokenize import seeded_vqgan, write_tokenizer
from tests.tokenize_helpers import ROOT, run_script


@pytest.mark.slow
def test_the_bench_compares_both_ways_on_a_small_vqgan():
    done = run_script(
        "exps/bench/pre_tokenize.py", "--num_images=3", "--target_size", 64, "--precision", "fp32", "bf16",
        "--device=cpu", f"--vqgan_dir={ROOT / 'exps' / 'tiny' / 'vqgan'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert {"bench", "device", "versions", "ours", "baseline", "ratio"} <= summary.keys()
    fp32, bf16 = summary["rows"]
    assert (fp32["precision"], bf16["precision"]) == ("fp32", "bf16") and summary["ours"] == bf16["ours"]
    assert fp32["ours"]["equal_codes"] == 1 and bf16["ours"]["equal_codes"] > 0.5
    for row in summary["rows"]:
        speeds = row["ours"]["images_per_s"], row["baseline"]["images_per_s"]
        assert min(speeds) > 0 and row["ratio"]["images_per_s"] == pytest.approx(speeds[0] / speeds[1])
        assert row["baseline"]["images_per_s_without_lookups"] > speeds[1] and row["ours"]["host_gib"] > 0.1


def test_the_benchs_tokenizer_and_vqgan_have_chameleons_size(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    vocab = ChameleonVocab.from_tokenizer(load_text_tokenizer(tmp_path / "tokenizer"))
    assert (vocab.vocab_size, vocab.num_codes) == (65536, 8192)
    vqgan = seeded_vqgan()
    assert (vqgan.num_codes, vqgan.downsample) == (8192, 16)
    assert vqgan.config.base_channels == 128 and vqgan.config.embed_dim == 256
