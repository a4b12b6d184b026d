"""The programs of this checkout accept what the shipped scripts and data configs give them."""

import argparse
import contextlib
import importlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import yaml

from data.formats.data_config import load_data_config
from exps.bench.train_measure import parse_training

ROOT = Path(__file__).parents[2]
DATA_CONFIGS = sorted((ROOT / "exps").rglob("*.yaml"))
RECIPE_SCRIPTS = ["7B", "34B"]


def parse_call(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command line of Python, by the parser of its script; SystemExit if one is unknown."""
    script = next(word for word in words if word.endswith(".py"))
    flags = words[words.index(script) + 1 :]
    parser = importlib.import_module(script.removesuffix(".py").replace("/", ".")).build_parser()
    if script != "exps/bench/train.py":
        return parser.parse_args(flags)
    # This bench takes the options of training, too.
    args, training = parser.parse_known_args(flags)
    parse_training(training)
    return args


def write_stub(path: Path, body: str) -> Path:
    """A program that does `body`, in bash."""
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


def record_call(tmp_path: Path, script: str, *args: str, cwd: Path = ROOT, **env: str) -> list[str]:
    """Runs a script with launchers in its PATH that only record their arguments."""
    for name in ("python", "torchrun", "srun"):
        write_stub(tmp_path / name, f'printf "%s\\0" {name} "$@" > "{tmp_path}/call"')
    env["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", ROOT / script, *args], check=True, cwd=cwd, env=env)
    return (tmp_path / "call").read_text().split("\0")[:-1]


def is_running(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("size", RECIPE_SCRIPTS)
def test_recipe_script_says_what_the_recipe_says(tmp_path, size):
    # As srun starts it.
    call = record_call(tmp_path, f"exps/{size}.sh", SLURM_PROCID="0")
    assert call[:3] == ["python", "-u", "finetune_solver.py"]
    expected = {
        "model_size": size, "batch_size": 8, "accum_iter": 1, "epochs": 2, "warmup_epochs": 0.01, "lr": 2e-5,
        "min_lr": 2e-5, "wd": 0.1, "clip_grad": 4, "dropout": 0.05, "z_loss_weight": 1e-5, "max_seq_len": 4096,
        "checkpointing": True, "save_iteration_interval": 1000, "num_workers": 8, "cache_ann_on_disk": True,
        "data_config": Path("exps/data/sample.yaml"), "output_dir": Path(f"output/{size}"), "packing": False,
    }  # fmt: skip
    options = vars(parse_call(call))
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(("card", "way"), [("24", "checkpointing"), ("48", "checkpointing_selective")])
def test_lora_script_is_for_one_card(tmp_path, card, way):
    call = record_call(tmp_path, "exps/7B_lora.sh", "--lora_rank", "32", CARD_GIB=card, OUTPUT_DIR="/a folder")
    assert call[:3] == ["python", "-u", "finetune_solver.py"]
    expected = {
        "model_size": "7B", "lora_rank": 32, "lora_alpha": 32, "train_only": ["image_head"], "batch_size": 1,
        "accum_iter": 8, "optim": "adamw", "max_seq_len": 4096, "init_from": None, "output_dir": Path("/a folder"),
        "checkpointing": False, "checkpointing_selective": False,
    } | {way: True}  # fmt: skip
    options = vars(parse_call(call))
    assert {name: options[name] for name in expected} == expected
    assert record_call(tmp_path, "exps/7B_lora.sh", NPROC="2")[:2] == ["torchrun", "--nproc_per_node=2"]


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("80", {"master_weights": "split", "optim": "adamw_8bit", "checkpointing": True}),
        ("141", {"master_weights": "fp32", "optim": "adamw", "checkpointing_selective": True}),
    ],
)
def test_one_gpu_script_trains_all_weights(tmp_path, card, expected):
    call = record_call(tmp_path, "exps/7B_one_gpu.sh", "--epochs", "3", CARD_GIB=card, OUTPUT_DIR="/a folder")
    options = vars(parse_call(call))
    expected |= {"model_size": "7B", "lora_rank": 0, "train_only": None, "max_seq_len": 4096, "epochs": 3}
    assert {key: options[key] for key in expected} == expected and str(options["output_dir"]) == "/a folder"
    assert options["batch_size"] * options["accum_iter"] == 8


@pytest.mark.parametrize("script", ["7B", "34B", "7B_lora"])
def test_script_by_torchrun_from_another_folder(tmp_path, script):
    """Relative paths belong to the caller's folder; flags of the command line win."""
    env = {"NPROC": "8", "PACKING": "1", "DATA_CONFIG": "my data.yaml", "OUTPUT_DIR": "out"}
    call = record_call(tmp_path, f"exps/{script}.sh", "--epochs", "3", cwd=tmp_path, **env)
    launcher, options = call[: call.index("finetune_solver.py")], parse_call(call)
    assert launcher[0] == "torchrun" and {"--nproc_per_node=8", "--nnodes=1"} <= set(launcher)
    assert options.packing == (script in RECIPE_SCRIPTS) and options.epochs == 3
    assert (options.data_config, options.output_dir) == (tmp_path / "my data.yaml", tmp_path / "out")


@pytest.mark.parametrize(("gpus", "ranks", "expected"), [(0, "", 2), (1, "", 1), (1, "2", 2), (0, "1", 1)])
def test_tiny_trains_two_rows_a_step_on_one_gpu_too(tmp_path, gpus, ranks, expected):
    stub = f'if [[ $1 == -c ]]; then echo {gpus}; else echo "$*" >> "{tmp_path}/calls"; fi'
    env = os.environ | {"PYTHON": str(write_stub(tmp_path / "python", stub)), "OUT": "out", "RANKS": ranks}
    (tmp_path / "out").mkdir()
    subprocess.run(["bash", ROOT / "exps/tiny.sh"], env=env, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    calls = (tmp_path / "calls").read_text()
    assert f"--nproc_per_node={expected} " in calls and f"--accum_iter {3 - expected} " in calls
    assert f"--save_iteration_interval {400 * (3 - expected)} " in calls
    assert f"--out_dir {tmp_path}/out/tokens" in calls and f"--splits={ranks or 2} " in calls
    assert len([parse_call(call.split()) for call in calls.splitlines()]) == 7 + int(ranks or 2)


def test_no_pipe_stands_between_a_launchers_signals_and_the_training():
    assert all("tee" not in path.read_text() for path in (ROOT / "exps").glob("*B*.sh"))


def test_slurm_job(tmp_path):
    text = (ROOT / "exps/slurm.sh").read_text()
    directives = re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)
    assert {"--requeue", "--signal=TERM@120", "--open-mode=append"} <= set(directives)
    assert text.rindex("#SBATCH") < text.index("set -euo"), "sbatch stops reading at the first command"
    assert record_call(tmp_path, "exps/slurm.sh") == ["srun", "--kill-on-bad-exit=1", "bash", "exps/7B.sh"]
    call = record_call(tmp_path, "exps/slurm.sh", "exps/34B.sh", "--epochs", "3")
    assert call == ["srun", "--kill-on-bad-exit=1", "bash", "exps/34B.sh", "--epochs", "3"]


def test_tiny_rejects_what_is_no_number(tmp_path):
    env = os.environ | {"OUT": str(tmp_path / "out"), "RANKS": "0x"}
    done = subprocess.run(["bash", ROOT / "exps/tiny.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "RANKS must be a whole number" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("program", "count", "number"),
    [
        ("pre_tokenize/pre_tokenize.py", 3, signal.SIGTERM),
        ("pre_tokenize/pre_tokenize.py", 3, signal.SIGINT),
        ("torch.distributed.run", 1, signal.SIGINT),
    ],
)
def test_tiny_leaves_no_process_behind(tmp_path, program, count, number):
    """Only the shell gets the signal; its children would block the output folder for the next run."""
    body = f'[[ "$*" == *{program}* ]] || exit 0\ntouch "{tmp_path}/$$.pid"\nexec sleep 60'
    env = os.environ | {"PYTHON": str(write_stub(tmp_path / "python", body)), "OUT": str(tmp_path / "out")}
    (tmp_path / "out").mkdir()
    shell = subprocess.Popen(["bash", ROOT / "exps/tiny.sh"], env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while len(pids := [int(path.stem) for path in tmp_path.glob("*.pid")]) < count:
        assert shell.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    shell.send_signal(number)
    if number == signal.SIGINT and count == 1:
        # Ctrl-C reaches the process in the foreground, too.
        os.kill(pids[0], number)
    assert shell.wait(20) != 0
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline + 20
        time.sleep(0.05)


@pytest.mark.parametrize("config", DATA_CONFIGS, ids=lambda path: path.name)
def test_data_config_loads_once_its_records_are_there(config, tmp_path, monkeypatch):
    (tmp_path / config.name).write_text(config.read_text())
    for entry in yaml.safe_load(config.read_text())["META"]:
        record = tmp_path / entry["path"]
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text("[]")
    monkeypatch.chdir(tmp_path)
    assert load_data_config(config.name)
