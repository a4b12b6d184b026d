"""The bench of checkpoints runs, small, and its figures belong together."""

import pytest

from exps.bench.checkpoint import BYTES_PER_PARAMETER, model_shape
from model.decoder.chameleon import build_config, build_model
from tests.exps.test_bench_all import run_bench


@pytest.mark.slow
def test_the_bench_saves_both_ways_and_leaves_nothing(tmp_path):
    summary = run_bench("checkpoint", "--gigabytes=0.15", "--num_tokens=16", "--repeats=1", f"--output_dir={tmp_path}")
    ours, baseline = summary["ours"], summary["baseline"]
    assert ours["gigabytes"] == pytest.approx(baseline["gigabytes"], rel=1e-3) and ours["gigabytes"] > 0.1
    assert baseline["slowed_s"] == 0 and ours["lost_s"] == ours["stall_s"] + ours["slowed_s"]
    assert not list(tmp_path.iterdir()), "nothing is left on the disk that was measured"


def test_the_shape_gives_the_size():
    model = build_model(build_config("tiny", **model_shape(1.0)))
    size = sum(parameter.numel() for parameter in model.parameters()) * BYTES_PER_PARAMETER
    assert size == pytest.approx(1e9, rel=0.1)
