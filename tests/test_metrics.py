"""Sums, the format of metrics.jsonl, and what is shown."""

import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_run import call_main, environment, read_lines, solver_args, train

from model.distributed import detect_launch, process_group
from model.flops import mean_document_len, peak_flops
from model.metrics import (
    SUMMED_FIELDS,
    MetricsFile,
    MetricSums,
    Progress,
    flatten,
    read_metrics,
    read_numbers,
    summarize,
)
from model.options import Options, build_parser
from model.run_log import RunLog, memory_bytes
from tests import forked

CPU = torch.device("cpu")
# In the order of SUMMED_FIELDS: ce, z, targets, text ce, text targets, image ce, image targets.
FIRST = SimpleNamespace(**dict(zip(SUMMED_FIELDS, map(torch.tensor, (6.0, 30.0, 3, 2.0, 1, 4.0, 2)), strict=True)))
SECOND = SimpleNamespace(**dict(zip(SUMMED_FIELDS, map(torch.tensor, (2.0, 10.0, 1, 2.0, 1, 0.0, 0)), strict=True)))


def test_summarize_means_over_targets_not_over_steps():
    sums = MetricSums(CPU)
    sums.add(FIRST, num_tokens=10)
    sums.add(SECOND, num_tokens=30)
    (numbers,) = read_numbers(sums.take()[0])
    line = summarize([numbers], z_loss_weight=0.1)
    assert line == {
        "loss": pytest.approx(8 / 4 + 0.1 * 40 / 4),
        "ce": 2.0,
        "z_loss": 10.0,
        "text_loss": 2.0,
        "image_loss": 2.0,
        "num_valid_tokens": 4,
    }
    assert numbers[-1] == 40, "tokens processed"
    assert not sums.take().any(), "taking begins anew"


def test_summarize_without_targets_has_no_loss():
    line = summarize(MetricSums(CPU).take().tolist(), z_loss_weight=1e-5)
    assert line["loss"] is None and line["text_loss"] is None


def test_summarize_tells_the_loss_of_each_type():
    sums = MetricSums(CPU, num_types=3)
    sums.add(FIRST, num_tokens=10, type_id=0)
    sums.add(SECOND, num_tokens=30, type_id=2)
    line = summarize(sums.take().tolist(), 0.1, ["captions", "edits", "text"])
    assert line["loss_by_type"] == {"captions": pytest.approx(2 + 0.1 * 10), "text": pytest.approx(2 + 0.1 * 10)}
    assert line["loss"] == pytest.approx(8 / 4 + 0.1 * 40 / 4), "over all types"


def test_flatten_gives_trackers_plain_numbers():
    line = {"step": 3, "loss": 1.5, "mfu": None, "note": "x", "loss_by_type": {"a": 1.0, "b": None}}
    assert flatten(line) == {"step": 3, "loss": 1.5, "loss_by_type/a": 1.0}


def test_metrics_file_cuts_torn_line_and_later_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)) + '{"step": 5, "lo')
    file = MetricsFile(tmp_path, resume_step=2)
    file.append({"step": 3, "loss": 1.0})
    file.sync()
    file.close()
    assert list(read_metrics(path)) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_damaged_lines_cost_no_good_ones(tmp_path):
    path, said = tmp_path / "metrics.jsonl", []
    lines = [json.dumps({"step": step}).encode() + b"\n" for step in range(1, 8)]
    path.write_bytes(b"".join([*lines[:3], b"\0\0\n", lines[3], b'{"step": 5, "lo\n', b"[1]\n", *lines[4:], b'{"st']))
    file = MetricsFile(tmp_path, 6, said.append)
    file.append({"step": 7, "loss": 1.0})
    file.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7] and file.last_step == 7
    assert len(path.read_text().splitlines()) == 7
    assert said == [f"3 lines of {path} cannot be read: 4, 6, 7; the curves go on without them"]


def test_metrics_file_starts_empty_and_holds_only_json(tmp_path):
    file = MetricsFile(tmp_path, resume_step=0)
    file.append({"step": 1, "loss": float("nan"), "loss_by_type": {"a": float("inf")}})
    file.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "loss_by_type": {"a": null}}\n'


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
        "step 3/12 epoch 0.250 loss 2.5000 lr 1.00e-03 1,234 tokens/s ETA 00:00",
        "step 3/12 epoch 0.250 loss nan lr 1.00e-03 1,234 tokens/s ETA 00:00",
    ]


def test_progress_tells_the_time_that_is_left(capsys):
    progress = Progress(enabled=True)
    progress.expect(1002, done=0)
    time.sleep(0.4)
    for _ in range(2):
        progress.advance()
    progress.show({"step": 2, "epoch": 0.25, "loss": 2.5, "lr": 1e-3, "tokens_per_s": 1234.0})
    minutes, seconds = capsys.readouterr().out.split("ETA ")[1].split(":")
    assert 200 <= 60 * int(minutes) + int(seconds) < 400, "1,000 steps at 0.2 s or a little more"


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    """On a real pseudo-terminal: loss, tokens/s and time left beside the bar, and lines that leave it whole."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        progress = Progress(True)
        progress.expect(4, 0)
        progress.advance()
        progress.show({"step": 1, "epoch": 0.25, "loss": 2.5, "lr": 1e-3, "tokens_per_s": 1234.0})
        progress.say("saved")
        progress.close()
        terminal.flush()
        said = os.read(master, 1 << 16).decode()
    os.close(master)
    assert "train:  25%" in said and "loss 2.5000 lr 1.00e-03 1,234 tokens/s" in said
    assert re.search(r"1/4 \[\d\d:\d\d<\d\d:\d\d", said) and "saved" in said


# In a run

FIGURES = {
    *("step", "epoch", "lr", "loss", "ce", "z_loss", "text_loss", "image_loss", "num_valid_tokens", "grad_norm"),
    *("tokens_per_s", "mfu", "step_ms", "data_wait_ms", "data_wait", "memory_gib", "memory_reserved_gib", "fill"),
    *("skipped_steps", "bad_items", "loss_by_type"),
}


def test_a_line_of_a_run_holds_every_figure(two_types, tmp_path):
    assert call_main(solver_args(two_types, tmp_path / "out", epochs=1)) == (0, "")
    lines = read_lines(tmp_path / "out")
    assert all(line.keys() == FIGURES for line in lines)
    for line in lines:
        assert line["mfu"] is None, "the peak of a CPU is not known"
        assert 0.05 < line["memory_gib"] < 50 and 0 < line["fill"] <= 1
        assert 0 <= line["data_wait"] < 1 and 0 < line["data_wait_ms"] < line["step_ms"]
        (by_type,) = line["loss_by_type"].values()
        assert by_type == pytest.approx(line["loss"]), "all rows of a step are of one type"
    assert {name for line in lines for name in line["loss_by_type"]} == {"text", "images"}
    assert {line["image_loss"] is None for line in lines if "text" in line["loss_by_type"]} == {True}


@pytest.mark.slow
def test_figures_are_reduced_once_per_interval_and_over_ranks(two_types, tmp_path):
    """One rank that takes two rows per step and logs all, against two ranks that log every third step."""
    assert call_main(solver_args(two_types, tmp_path / "one", epochs=1, accum_iter=2)) == (0, "")
    train(2, solver_args(two_types, tmp_path / "two", epochs=1, log_interval=3))
    one, two = read_lines(tmp_path / "one"), read_lines(tmp_path / "two")
    assert [line["step"] for line in two] == [1, 3, 6]
    for line, steps in zip(two, ([1], [2, 3], [4, 5, 6]), strict=True):
        mine = [other for other in one if other["step"] in steps]
        assert line["num_valid_tokens"] == sum(other["num_valid_tokens"] for other in mine)
        total = sum(other["loss"] * other["num_valid_tokens"] for other in mine)
        assert line["loss"] == pytest.approx(total / line["num_valid_tokens"], rel=1e-4)
        for name, loss in line["loss_by_type"].items():
            of_type = [other for other in mine if name in other["loss_by_type"]]
            total = sum(other["loss"] * other["num_valid_tokens"] for other in of_type)
            assert loss == pytest.approx(total / sum(other["num_valid_tokens"] for other in of_type), rel=1e-4)


def log_of_a_rank_that_waits(folder: Path) -> None:
    """Run on two ranks: rank 1 waits for its rows half a second, and holds 0.3 GiB more."""
    launch = detect_launch()
    options = Options.from_namespace(build_parser().parse_args(["--data_config", "x", "--output_dir", str(folder)]))
    with process_group(launch, "cpu", timeout_s=60) as device:
        held = b"1" * (launch.rank * 3 * 2**30 // 10)
        run_log = RunLog(options, 0, device, launch.is_main, ["a"])
        with run_log.waiting():
            time.sleep(0.5 * launch.rank)
        figures, _ = run_log.collect(torch.zeros(1))
        if launch.is_main:
            print(json.dumps(figures | {"own_gib": memory_bytes(device)[0] / 2**30, "held": len(held)}))


@pytest.mark.slow
def test_waiting_and_memory_are_those_of_the_rank_with_the_most(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = forked.run([*launcher, __file__, str(tmp_path)], environment(), check=True)
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["held"] == 0 and line["data_wait_ms"] >= 500
    assert line["memory_gib"] > line["own_gib"] + 0.2


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA L40S", 362e12),
        ("Some GPU of tomorrow", None),
    ],
)
def test_peak_flops_by_name(name, flops):
    assert peak_flops(name) == flops


def test_the_mean_document_is_that_of_a_token():
    assert mean_document_len(np.array([100, 300], np.int32)) == pytest.approx((100 * 100 + 300 * 300) / 400)


if __name__ == "__main__":
    log_of_a_rank_that_waits(Path(sys.argv[1]))
