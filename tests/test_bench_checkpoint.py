"""The bench of checkpoints runs, small, and its figures belong together."""

import json

import pytest

from exps.bench.checkpoint import BYTES_PER_PARAMETER, model_shape
from model.decoder.chameleon import build_config, build_model
from tests.tokenize_helpers import run_script


@pytest.mark.slow
def test_the_bench_saves_both_ways_and_leaves_nothing(tmp_path):
    size = ("--gigabytes=0.15", "--num_tokens=16", "--repeats=1")
    done = run_script("exps/bench/checkpoint.py", "--device=cpu", *size, f"--output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    ours, baseline = summary["ours"], summary["baseline"]
    assert ours["gigabytes"] == pytest.approx(baseline["gigabytes"], rel=1e-3) and ours["gigabytes"] > 0.1
    assert baseline["slowed_s"] == 0 and ours["lost_s"] == ours["stall_s"] + ours["slowed_s"]
    assert not list(tmp_path.iterdir()), "nothing is left on the disk that was measured"


def test_the_shape_gives_the_size():
    model = build_model(build_config("tiny", **model_shape(1.0)))
    size = sum(parameter.numel() for parameter in model.parameters()) * BYTES_PER_PARAMETER
    assert size == pytest.approx(1e9, rel=0.1)
