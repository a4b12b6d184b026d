"""Sums, the format of metrics.jsonl, and the lines of a run."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.run import run_log
from model.run.checks import Setup
from model.run.flops import mean_document_len, peak_flops
from model.run.metrics import SUMMED_FIELDS, MetricSums, read_metrics, summarize
from model.run.options import Options, build_parser
from model.run.run_log import RunLog
from model.training.distributed import Launch, process_group
from tests.helpers.small_run import read_lines

CPU = torch.device("cpu")
# In the order of SUMMED_FIELDS: ce, z, targets, text ce, text targets, image ce, image targets.
FIRST = SimpleNamespace(**dict(zip(SUMMED_FIELDS, map(torch.tensor, (6.0, 30.0, 3, 2.0, 1, 4.0, 2)), strict=True)))
SECOND = SimpleNamespace(**dict(zip(SUMMED_FIELDS, map(torch.tensor, (2.0, 10.0, 1, 2.0, 1, 0.0, 0)), strict=True)))


def test_summarize_gives_means_over_targets_not_over_steps():
    sums = MetricSums(CPU, num_types=3)
    sums.add(FIRST, num_tokens=10, type_id=0)
    sums.add(SECOND, num_tokens=30, type_id=2)
    numbers = sums.take()
    assert numbers[:, -1].tolist() == [10, 0, 30], "tokens processed"
    assert summarize(numbers.tolist(), 0.1, ["captions", "edits", "text"]) == {
        "loss": pytest.approx(8 / 4 + 0.1 * 40 / 4),
        "ce": 2.0,
        "z_loss": 10.0,
        "text_loss": 2.0,
        "image_loss": 2.0,
        "loss_by_type": {"captions": pytest.approx(2 + 0.1 * 10), "text": pytest.approx(2 + 0.1 * 10)},
        "num_valid_tokens": 4,
    }
    line = summarize(sums.take().tolist(), z_loss_weight=1e-5)
    assert line["num_valid_tokens"] == 0 and line["loss"] is None and line["text_loss"] is None


# The log of a run

LINE = {"step": 3, "epoch": 0.25, "loss": 2.5, "lr": 1e-3, "tokens_per_s": 1234.0}


def make_log(folder, rank=0) -> RunLog:
    args = ["--data_config", "x", "--output_dir", str(folder)]
    setup = Setup(
        options=Options.from_namespace(build_parser().parse_args(args)),
        launch=Launch(rank=rank),
        device=CPU,
        dataset=SimpleNamespace(types=["a"]),
        val_dataset=None,
    )
    log = RunLog(setup, resume_step=2)
    log.expect(12)
    return log


def test_a_log_drops_later_steps_and_damaged_lines(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}).encode() + b"\n" for step in range(1, 5)]
    path.write_bytes(b"".join([*lines[:2], b"\0\0\n", b'{"step": 5, "lo\n', b"[1]\n", *lines[2:], b'{"st']))
    log = make_log(tmp_path)
    log.advance()
    log.write(LINE | {"loss": None, "ce": float("nan"), "loss_by_type": {"a": float("inf")}})
    log.sync()
    log.close()
    *kept, appended = read_metrics(path)
    assert kept == [{"step": 1}, {"step": 2}]
    assert appended == LINE | {"loss": None, "ce": None, "loss_by_type": {"a": None}}
    assert len(path.read_text().splitlines()) == 3 and [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert f"3 lines of {path} cannot be read: 3, 4, 5; these lines are dropped\n" in capsys.readouterr().out


def test_lines_are_printed_on_rank_0_with_the_time_left(tmp_path, capsys):
    for rank in (0, 1):
        log = make_log(tmp_path, rank)
        log.advance()
        log.write(LINE)
        log.write(LINE | {"step": 12, "loss": None})
        log.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 3/12 epoch 0.250 loss 2.5000 lr 1.00e-03 1,234 tokens/s ETA 00:0")
    assert second == "step 12/12 epoch 0.250 loss nan lr 1.00e-03 1,234 tokens/s ETA 00:00"
    assert len(read_lines(tmp_path)) == 2


def test_waiting_and_memory_are_those_of_the_rank_with_the_most(tmp_path, monkeypatch):
    """Another rank has the same sums, waited 7 s longer and holds a GiB more."""
    other = torch.tensor([0.0] * (len(SUMMED_FIELDS) + 1) + [7.0, 2**30, 2**30], dtype=torch.float64)
    monkeypatch.setattr(run_log, "gather_over_ranks", lambda own: torch.stack([own, own + other]))
    own_gib = run_log.memory_bytes(CPU)[0] / 2**30
    with process_group(Launch(), "cpu", timeout_s=60):
        log = make_log(tmp_path)
        with log.waiting():
            time.sleep(0.01)
        log.sums.add(FIRST, num_tokens=10)
        log.advance()
        figures, ((extra,),) = log.collect(torch.tensor([5.0]))
        log.close()
    assert figures["num_valid_tokens"] == 6 and figures["ce"] == 2.0 and extra == 5.0
    assert figures["data_wait_ms"] >= 7010 and figures["memory_gib"] > own_gib + 0.5


def test_peak_flops_by_name():
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200 NVL": 835e12, "Some GPU": None}
    assert {name: peak_flops(name) for name in names} == names


def test_the_mean_document_is_that_of_a_token():
    assert mean_document_len(np.array([100, 300], np.int32)) == pytest.approx((100 * 100 + 300 * 300) / 400)
