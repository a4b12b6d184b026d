"""The bench of attention: a kernel that does not take a layout leaves a gap, and costs no other figure."""

import pytest

from exps.bench.attention import CUDNN, MASK, OURS, measure

SIZES = {"num_heads": 2, "head_dim": 16, "precision": "fp32", "device": "cpu", "repeats": 1}


def test_a_kernel_that_does_not_take_a_layout_leaves_a_gap(monkeypatch, capsys):
    """cuDNN's runs nowhere here; where it takes one of the layouts, the other is still a gap."""
    layouts = {"items": [8, 8], "causal": [16]}
    assert measure(CUDNN, layouts, **SIZES) == {"items": None, "causal": None}
    assert capsys.readouterr().err.count(CUDNN) == 2

    def takes_one_item(way, lens, *_):
        if len(lens) > 1:
            raise RuntimeError("no mask")
        return {"ms": 1.0, "difference": 0.0}

    monkeypatch.setattr("exps.bench.attention.measure_layout", takes_one_item)
    assert measure(CUDNN, layouts, **SIZES) == {"items": None, "causal": {"ms": 1.0, "difference": 0.0}}
    for way in (OURS, MASK):
        with pytest.raises(RuntimeError, match="no mask"):
            measure(way, layouts, **SIZES)
