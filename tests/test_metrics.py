"""Sums, the format of metrics.jsonl, and what is shown."""

import json
from types import SimpleNamespace

import pytest
import torch

from model.metrics import SUMMED_FIELDS, MetricsFile, MetricSums, Progress, read_metrics, read_numbers, summarize

CPU = torch.device("cpu")
# In the order of SUMMED_FIELDS: ce, z, targets, text ce, text targets, image ce, image targets.
FIRST = SimpleNamespace(**dict(zip(SUMMED_FIELDS, map(torch.tensor, (6.0, 30.0, 3, 2.0, 1, 4.0, 2)), strict=True)))
SECOND = SimpleNamespace(**dict(zip(SUMMED_FIELDS, map(torch.tensor, (2.0, 10.0, 1, 2.0, 1, 0.0, 0)), strict=True)))


def test_summarize_means_over_targets_not_over_steps():
    sums = MetricSums(CPU)
    sums.add(FIRST, num_tokens=10)
    sums.add(SECOND, num_tokens=30)
    taken, _ = sums.take()
    (numbers,) = read_numbers(taken)
    line = summarize(numbers, seconds=2.0, z_loss_weight=0.1)
    assert line == {
        "loss": pytest.approx(8 / 4 + 0.1 * 40 / 4),
        "ce": 2.0,
        "z_loss": 10.0,
        "text_loss": 2.0,
        "image_loss": 2.0,
        "num_valid_tokens": 4,
        "tokens_per_s": 20.0,
    }
    assert not sums.take()[0].any(), "taking begins anew"


def test_summarize_without_targets_has_no_loss():
    line = summarize(MetricSums(CPU).take()[0].tolist(), seconds=1.0, z_loss_weight=1e-5)
    assert line["loss"] is None and line["text_loss"] is None


def test_metrics_file_cuts_torn_line_and_later_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)) + '{"step": 5, "lo')
    file = MetricsFile(tmp_path, resume_step=2)
    file.append({"step": 3, "loss": 1.0})
    file.sync()
    file.close()
    assert list(read_metrics(path)) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_file_starts_empty_and_holds_only_json(tmp_path):
    file = MetricsFile(tmp_path, resume_step=0)
    file.append({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    file.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "grad_norm": null}\n'


def test_progress_writes_plain_lines_without_a_terminal(capsys):
    line = {"step": 3, "epoch": 0.25, "loss": 2.5, "lr": 1e-3, "tokens_per_s": 1234.0}
    for enabled in (True, False):
        progress = Progress(enabled)
        progress.expect(12, done=2)
        progress.advance()
        progress.show(line)
        progress.show(line | {"loss": None})
        progress.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 3/12 epoch 0.250 loss 2.5000 lr 1.00e-03 1,234 tokens/s",
        "step 3/12 epoch 0.250 loss nan lr 1.00e-03 1,234 tokens/s",
    ]
