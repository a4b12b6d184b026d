"""The bench of generation runs, small: all ways draw the same greedy tokens, and the figures belong together."""

import pytest

from data.items.vocab import ChameleonVocab
from exps.bench.generate import main, make_vocabulary, needed_bytes
from model.decoder.chameleon import build_config, build_model
from tests.exps.test_bench_all import run_bench


@pytest.mark.slow
def test_all_ways_draw_the_same_greedy_tokens():
    flags = ("--batch_sizes", "1", "2", "--cfg", "1", "4", "--num_tokens=12", "--repeats=1")
    summary = run_bench("generate", *flags)
    cases = [(row["batch_size"], row["cfg"], row["way"]) for row in summary["rows"]]
    both = [(2, 1, "batched"), (2, 1, "one by one"), (2, 4, "batched"), (2, 4, "one by one")]
    assert cases == [(1, 1, "batched"), (1, 4, "batched"), *both], "a single prompt has one baseline"
    for row in summary["rows"]:
        assert row["baseline"]["equal_tokens"] == 1
        speeds = row["ours"]["tokens_per_s"], row["baseline"]["tokens_per_s"]
        assert row["ratio"]["tokens_per_s"] == pytest.approx(speeds[0] / speeds[1])
        ours = row["ours"]
        assert ours["image_s"] == pytest.approx(2352 / ours["tokens_per_s"]) and ours["first_image_s"] > 0
    assert (summary["batch_size"], summary["cfg"]) == (2, 1)


def test_needed_bytes_of_7b():
    names = make_vocabulary("7B")
    model = build_model(build_config("7B", names), "meta").bfloat16()
    vocab = ChameleonVocab.from_mapping(names)
    needed = [needed_bytes(model, vocab, "ours", 1024, batch_size, cfg) for batch_size, cfg in ((0, 1), (1, 1), (1, 4))]
    # 32 layers of 4 * 4096^2 + 3 * 4096 * 11008 weights and 8,192 codes of the head, two bytes each; norms are small.
    assert needed[0] == pytest.approx(2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 8192 * 4096), rel=1e-3)
    per_token = 2 * 32 * 4096 * 2
    assert [needed[1] - needed[0], needed[2] - needed[1]] == [per_token * (32 + 512 + 3), per_token * (512 + 3)]


@pytest.mark.parametrize("flags", [["--num_tokens=5000"], ["--repeats=0"]])
def test_a_bad_argument_is_named(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2 and flags[0].partition("=")[0] in capsys.readouterr().err
