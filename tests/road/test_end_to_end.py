"""The whole road through the real scripts: raw JSON, two workers, a record, two ranks, a kill, a resume, an image."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from exps.tiny.make_data import build_items
from exps.tiny.scenes import all_scenes, draw
from tests.helpers import forked
from tests.helpers.browser_helpers import MISSING
from tests.model.pages.test_report import look_at

ROOT = Path(__file__).parents[2]
GOLDEN_IMAGES = ROOT / "tests" / "golden" / "images"
VQGAN_DIR = ROOT / "exps" / "tiny" / "vqgan"
STEPS, SAVE_EVERY, KILL_AT = 14, 5, 8
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

pytestmark = pytest.mark.slow


def run_script(*arguments: object) -> str:
    """Runs a script of the repo as a user does and returns its output."""
    command = [sys.executable, "-u", *map(str, arguments)]
    done = forked.run(command, ENVIRONMENT)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


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


def training_command(road: Path, output_dir: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "finetune_solver.py"),
        *("--model_size", "tiny", "--tokenizer", str(road / "tokenizer"), "--data_config", str(road / "data.yaml")),
        *("--output_dir", str(output_dir), "--batch_size", "2", "--accum_iter", "1", "--epochs", "4"),
        *("--warmup_epochs", "0.1", "--lr", "1e-3", "--min_lr", "1e-4", "--dropout", "0.05"),
        *("--z_loss_weight", "1e-5", "--precision", "fp32"),
        *("--max_seq_len", "256", "--max_steps", str(STEPS), "--log_interval", "1", "--num_workers", "1"),
        *("--save_iteration_interval", str(SAVE_EVERY), "--auto_resume", "--unmask_image_logits"),
    ]


def read_lines(output_dir: Path) -> list[str]:
    path = output_dir / "metrics.jsonl"
    return path.read_text().split("\n") if path.exists() else []


def train_and_kill(command: list[str], output_dir: Path) -> None:
    """Starts training and kills the launcher and all its ranks once step KILL_AT is logged."""
    with open(output_dir.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.time() + 300
    # The last line may be torn.
    while len(read_lines(output_dir)) <= KILL_AT:
        assert process.poll() is None, f"training ended by itself:\n{output_dir.with_suffix('.log').read_text()}"
        assert time.time() < deadline, "training did not reach the step of the kill"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def road(tmp_path_factory) -> Path:
    """A folder with everything up to the data config, made by the real scripts."""
    folder = tmp_path_factory.mktemp("road")
    source = write_input(folder / "raw")
    run_script("exps/tiny/train_tokenizer.py", "--in_filename", source, "--out_dir", folder / "tokenizer")
    workers = [
        forked.Popen(
            [
                *(sys.executable, "-u", "pre_tokenize/pre_tokenize.py", "--splits=2", f"--rank={rank}"),
                *(f"--in_filename={source}", f"--out_dir={folder / 'tokens'}", "--target_size", "64"),
                *("--tokenizer", str(folder / "tokenizer"), "--vqgan_dir", str(VQGAN_DIR)),
                *("--device", "cpu", "--precision", "fp32"),
            ],
            ENVIRONMENT,
        )
        for rank in range(2)
    ]
    # The second worker has the broken item.
    assert [worker.wait(300) for worker in workers] == [0, 3]
    merge = ("pre_tokenize/concat_record.py", "--sub_record_dir", folder / "tokens")
    run_script(*merge, "--save_path", folder / "tokens" / "record.json")
    (folder / "data.yaml").write_text("META:\n  - path: tokens/record.json\n")
    return folder


def test_killed_and_resumed_equals_undisturbed_and_draws_an_image(road, tmp_path):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    forked.run(training_command(road, undisturbed), ENVIRONMENT, check=True)
    train_and_kill(training_command(road, disturbed), disturbed)
    forked.run(training_command(road, disturbed), ENVIRONMENT, check=True)

    expected, got = ([json.loads(line) for line in read_lines(path)[:-1]] for path in (undisturbed, disturbed))
    assert [line["step"] for line in got] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in got] == [line["loss"] for line in expected]
    assert got[-1]["loss"] < got[0]["loss"]

    folders = [max(path.glob("epoch*"), key=lambda folder: folder.stat().st_mtime) for path in (undisturbed, disturbed)]
    assert folders[0].name == folders[1].name
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    drawn = tmp_path / "out.png"
    run_script(
        *("inference_solver.py", "--model_path", folders[1], "--prompt", "a big cat on a red background"),
        *("--vqgan_dir", VQGAN_DIR, "--device", "cpu", "--precision", "fp32", "--size", "64x64", "--out", drawn),
    )
    with Image.open(drawn) as image:
        assert image.size == (64, 64) and image.mode == "RGB"


def test_the_laptop_default_in_small_and_again(request, tmp_path):
    """`exps/tiny.sh` from end to end with small counts; the second run changes nothing."""
    counts = {"OUT": str(tmp_path / "tiny"), "ITEMS": "120", "STEPS": "3", "PROMPTS": "4", "PYTHON": sys.executable}
    command = ["bash", "exps/tiny.sh"]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | counts, check=True, timeout=400)
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
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny" / "tokens" / "files").iterdir()}
    metrics = (tmp_path / "tiny" / "checkpoints" / "metrics.jsonl").read_bytes()
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | counts, check=True, timeout=400)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny" / "tokens" / "files").iterdir()}
    assert metrics == (tmp_path / "tiny" / "checkpoints" / "metrics.jsonl").read_bytes()
    assert json.loads((tmp_path / "tiny" / "score.json").read_text()) == score
