"""The whole road through the real scripts: raw JSON, two workers, a record, two ranks, a kill, a resume, an image."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from exps.tiny.make_data import build_items
from exps.tiny.scenes import all_scenes, draw
from tests.helpers import forked
from tests.helpers.browser_helpers import MISSING
from tests.helpers.forked import ROOT, environment
from tests.helpers.small_run import losses
from tests.model.pages.test_report import look_at

GOLDEN_IMAGES = ROOT / "tests" / "golden" / "images"
STEPS, SAVE_EVERY, KILL_AT = 14, 5, 8
PYTHON = [sys.executable, "-u"]
VQGAN_FLAGS = ["--vqgan_dir", "exps/tiny/vqgan", "--device", "cpu", "--precision", "fp32"]

pytestmark = pytest.mark.slow


def write_input(folder: Path) -> Path:
    """40 items over drawn scenes and real photographs, one of them broken."""
    scenes = all_scenes()
    names = {scene: f"images/{index:04d}.png" for index, scene in enumerate(scenes)}
    items = build_items(30, seed=5, file_names=names)
    (folder / "images").mkdir(parents=True)
    for scene, name in names.items():
        if any(name in item["image"] for item in items):
            draw(scene).save(folder / name)
    for index, path in enumerate(sorted(GOLDEN_IMAGES.glob("*.png"))):
        shutil.copy(path, folder / "images" / path.name)
        turns = [("human", f"draw a photograph number {index}"), ("gpt", "Sure: <|image|>")]
        conversations = [{"from": role, "value": text} for role, text in turns]
        items.append({"conversations": conversations, "image": f"images/{path.name}"})
    turns = [{"from": "human", "value": "a missing cat"}, {"from": "gpt", "value": "<|image|>"}]
    items.append({"conversations": turns, "image": ["images/missing.png"]})
    (folder / "train.json").write_text(json.dumps(items))
    return folder / "train.json"


def training_command(road: Path, output_dir: Path) -> list[object]:
    return [
        *(*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "finetune_solver.py"),
        *("--model_size", "tiny", "--tokenizer", road / "tokenizer", "--data_config", road / "data.yaml"),
        *("--output_dir", output_dir, "--batch_size", 2, "--accum_iter", 1, "--epochs", 4),
        *("--warmup_epochs", 0.1, "--lr", 1e-3, "--min_lr", 1e-4, "--dropout", 0.05, "--z_loss_weight", 1e-5),
        *("--precision", "fp32", "--max_seq_len", 256, "--max_steps", STEPS, "--log_interval", 1, "--num_workers", 1),
        *("--save_iteration_interval", SAVE_EVERY, "--auto_resume", "--unmask_image_logits"),
    ]


def train_and_kill(command: list[object], output_dir: Path) -> None:
    """Starts training and kills the launcher and all its ranks once step KILL_AT is logged."""
    run = forked.Popen(command, environment(), start_new_session=True)
    run.wait_for_output(f'"step": {KILL_AT},', output_dir / "metrics.jsonl", timeout=300)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()


@pytest.fixture(scope="module")
def road(tmp_path_factory) -> Path:
    """A folder with everything up to the data config, made by the real scripts."""
    folder = tmp_path_factory.mktemp("road")
    source, tokenizer, tokens = write_input(folder / "raw"), folder / "tokenizer", folder / "tokens"
    train_tokenizer = ("exps/tiny/train_tokenizer.py", "--in_filename", source, "--out_dir", tokenizer)
    forked.run([*PYTHON, *train_tokenizer], environment(), check=True)
    flags = ["--in_filename", source, "--out_dir", tokens, "--target_size", 64, "--tokenizer", tokenizer, *VQGAN_FLAGS]
    workers = [
        forked.Popen([*PYTHON, "pre_tokenize/pre_tokenize.py", "--splits=2", f"--rank={rank}", *flags], environment())
        for rank in range(2)
    ]
    # The second worker has the broken item.
    assert [worker.wait(300) for worker in workers] == [0, 3]
    merge = ("pre_tokenize/concat_record.py", "--sub_record_dir", tokens, "--save_path", tokens / "record.json")
    forked.run([*PYTHON, *merge], environment(), check=True)
    (folder / "data.yaml").write_text("META:\n  - path: tokens/record.json\n")
    return folder


def test_killed_and_resumed_equals_undisturbed_and_draws_an_image(road, tmp_path):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    forked.run(training_command(road, undisturbed), environment(), check=True)
    train_and_kill(training_command(road, disturbed), disturbed)
    forked.run(training_command(road, disturbed), environment(), check=True)
    got = losses(disturbed)
    assert list(got) == list(range(1, STEPS + 1)) and got == losses(undisturbed) and got[STEPS] < got[1]

    folders = [max(path.glob("epoch*"), key=lambda folder: folder.stat().st_mtime) for path in (undisturbed, disturbed)]
    assert folders[0].name == folders[1].name
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    drawn = tmp_path / "out.png"
    flags = ("--model_path", folders[1], "--prompt", "a big cat on a red background", "--size", "64x64", "--out", drawn)
    forked.run([*PYTHON, "inference_solver.py", *flags, *VQGAN_FLAGS], environment(), check=True)
    with Image.open(drawn) as image:
        assert image.size == (64, 64) and image.mode == "RGB"


def test_the_laptop_default_in_small(request, tmp_path):
    """`exps/tiny.sh` from end to end with small counts, by its own processes and launcher."""
    counts = {"OUT": str(tmp_path / "tiny"), "ITEMS": "120", "STEPS": "3", "PROMPTS": "4", "PYTHON": sys.executable}
    command = {"args": ["bash", "exps/tiny.sh"], "cwd": ROOT, "env": environment() | counts}
    done = subprocess.run(**command, stderr=subprocess.PIPE, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    # Installed for the tests, it warns in every process that imports transformers.
    assert "torchao" not in done.stderr and "_pytree" not in done.stderr, done.stderr
    score = json.loads((tmp_path / "tiny" / "score.json").read_text())
    for key in ("seen_exact", "held_out_pairs_exact", "edits_exact", "captions_exact"):
        assert 0 <= score[key] <= 1
    with Image.open(tmp_path / "tiny" / "contact_sheet.png") as sheet:
        assert sheet.width > 800
    page = (tmp_path / "tiny" / "checkpoints" / "report.html").read_text()
    assert "Describe the image." in page and "validation loss, last" in page and page.count("data:image/png") >= 5
    if not MISSING:
        seen = look_at(request.getfixturevalue("browser"), tmp_path / "tiny" / "checkpoints" / "report.html")
        assert seen["wrong"] == [] and seen["other"] == [] and seen["images"].count("64x64") >= 5
        lengths = {chart["title"]: max(chart["paths"]) for chart in seen["charts"]}
        drawn = {title for title, length in lengths.items() if length > 0}
        assert {"Loss", "Learning rate", "Speed", "Memory"} <= drawn, lengths
