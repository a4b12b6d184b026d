"""The bench of generation runs, small: all ways draw the same greedy tokens, and the figures belong together."""

import json

import pytest

from data.vocab import ChameleonVocab
from exps.bench.generate import image_start, make_vocabulary, needed_bytes
from model.decoder.chameleon import build_config, build_model
from tests.tokenize_helpers import run_script


@pytest.mark.slow
def test_all_ways_draw_the_same_greedy_tokens():
    done = run_script(
        "exps/bench/generate.py", "--device=cpu", "--num_tokens=12", "--prompt_len=6", "--repeats=1",
        "--batch_sizes", "1", "2", "--cfg", "1", "4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert {"bench", "device", "versions", "ours", "baseline", "ratio"} <= summary.keys()
    assert [(row["batch_size"], row["cfg"]) for row in summary["rows"]] == [(1, 1), (1, 4), (2, 1), (2, 4)]
    for row in summary["rows"]:
        assert row["equal_tokens"] == 1 and row["ratio"].keys() == row["baseline"].keys() == {"batched", "one by one"}
        for way, baseline in row["baseline"].items():
            assert row["ratio"][way] == pytest.approx(row["ours"]["tokens_per_s"] / baseline["tokens_per_s"])
            assert row["cpu_time_ratio"][way] == pytest.approx(baseline["cpu_seconds"] / row["ours"]["cpu_seconds"])
    assert (summary["batch_size"], summary["cfg"]) == (2, 1)


def test_needed_bytes_of_7b():
    names = make_vocabulary("7B")
    model = build_model(build_config("7B", names), "meta").bfloat16()
    needed = needed_bytes(model, ChameleonVocab.from_mapping(names), "ours", {"num_tokens": 1024, "prompt_len": 32})
    # 32 layers of 4 * 4096^2 + 3 * 4096 * 11008 weights and 8,192 codes of the head, two bytes each; norms are small
    assert needed["weights"] == pytest.approx(2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 8192 * 4096), rel=1e-3)
    assert needed["unconditional"] == 2 * 32 * 4096 * 2 * (512 + 3)


@pytest.mark.parametrize("num_tokens, side", [(6, 2), (7, 4), (256, 16), (2400, 50)])
def test_the_image_is_not_over_too_early(num_tokens, side):
    vocab = ChameleonVocab.from_mapping(make_vocabulary("tiny"))
    assert image_start(num_tokens, vocab)[1:] == [vocab.grid_size_ids[side // 2]] * 2


def test_bad_arguments_are_named_together():
    done = run_script("exps/bench/generate.py", "--num_tokens=5000", "--repeats=0", "--batch_sizes", "0")
    assert done.returncode == 2
    assert all(name in done.stderr for name in ("--num_tokens", "--repeats", "--batch_sizes"))
