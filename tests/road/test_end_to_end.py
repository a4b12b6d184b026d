"""The whole road through the real scripts: raw JSON, two workers, a record, two ranks, a kill, a resume, images."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from tests.helpers.browser_helpers import MISSING
from tests.helpers.forked import ROOT, environment
from tests.model.pages.test_report import look_at


@pytest.mark.slow
def test_the_laptop_default_in_small_killed_in_training_and_run_again(request, tmp_path):
    """`exps/tiny.sh` with small counts; the second run writes no token file again and resumes the training."""
    out = tmp_path / "tiny"
    counts = {"OUT": str(out), "ITEMS": "120", "STEPS": "10", "PROMPTS": "4", "PYTHON": sys.executable}
    command, settings = ["bash", "exps/tiny.sh"], {"cwd": ROOT, "env": environment() | counts}
    first = subprocess.Popen(command, start_new_session=True, **settings)
    while not (out / "checkpoints" / "epoch0-iter1").exists():
        assert first.poll() is None
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    tokens = {path: path.stat().st_mtime_ns for path in (out / "tokens" / "files").iterdir()}
    second = subprocess.run(command, capture_output=True, text=True, timeout=400, **settings)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "epoch0-iter1 after step 1\n" in second.stdout
    assert tokens == {path: path.stat().st_mtime_ns for path in (out / "tokens" / "files").iterdir()}
    lines = [json.loads(line) for line in (out / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps[0] == 1 and steps[-1] == 10 and sorted(set(steps)) == steps and lines[-1]["val_loss"] > 0

    # torchao is installed for the tests, and warns in every process that imports transformers.
    assert "torchao" not in second.stderr and "_pytree" not in second.stderr, second.stderr
    score = json.loads((out / "score.json").read_text())
    for key in ("seen_exact", "held_out_pairs_exact", "edits_exact", "captions_exact"):
        assert 0 <= score[key] <= 1
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > 800
    page = (out / "checkpoints" / "report.html").read_text()
    assert "Describe the image." in page and "validation loss, last" in page and page.count("data:image/png") >= 5
    if not MISSING:
        seen = look_at(request.getfixturevalue("browser"), out / "checkpoints" / "report.html")
        assert seen["wrong"] == [] and seen["other"] == [] and seen["images"].count("64x64") >= 5
        lengths = {chart["title"]: max(chart["paths"]) for chart in seen["charts"]}
        drawn = {title for title, length in lengths.items() if length > 0}
        assert {"Loss", "Learning rate", "Speed", "Memory"} <= drawn, lengths
