"""Every shipped script and data config is one that the programs of this checkout accept."""

import argparse
import importlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from data.data_config import load_data_config

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "exps").rglob("*.sh"))
DATA_CONFIGS = sorted((ROOT / "exps").rglob("*.yaml"))
RECIPE_SCRIPTS = ["7B", "34B"]


def load_parser(path: str) -> argparse.ArgumentParser:
    """`build_parser()` of a script of this checkout, its path relative to the root."""
    return importlib.import_module(path.removesuffix(".py").replace("/", ".")).build_parser()


def python_commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, its flags) of each call of a .py file in a shell script; arrays are put in where they are used."""
    lines = re.sub(r"(^|\s)#.*", r"\1", text, flags=re.MULTILINE)  # without comments
    arrays: dict[str, str] = {}
    for name, body in re.findall(r"^\s*(\w+)\+?=\((.*?)\)\s*$", lines, re.MULTILINE | re.DOTALL):
        arrays[name] = f"{arrays.get(name, '')} {body}"
    for name, body in arrays.items():
        lines = lines.replace(f"${{{name}[@]}}", " ".join(body.split()))
    commands = re.split(r"\n|;|\||&", lines.replace("\\\n", " "))
    calls = [match for command in commands if (match := re.search(r"([\w./]+\.py)(?=[\s\"]|$)(.*)", command))]
    return [(call[1], re.findall(r"(?<![\w-])(--\w[\w-]*)", call[2])) for call in calls]


def record_call(tmp_path: Path, script: str, *args: str, cwd: Path = ROOT, **env: str) -> list[str]:
    """Runs a script with launchers in its PATH that only write down how they were called."""
    for name in ("python", "torchrun", "srun"):
        launcher = tmp_path / name
        launcher.write_text(f'#!/bin/bash\nprintf "%s\\0" {name} "$@" > "{tmp_path}/call"\n')
        launcher.chmod(0o755)
    env["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", ROOT / script, *args], check=True, cwd=cwd, env=env)
    return (tmp_path / "call").read_text().split("\0")[:-1]


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_python_commands_reads_shell():
    text = """
        options=(--epochs 2 # --not this
          --lr "$lr")
        if true; then options+=(--packing); fi
        options+=(
          --seed=1)
        torchrun --nproc_per_node=2 finetune_solver.py "${options[@]}" --max_steps 3 > --log &
        for i in 0 1; do python -u pre_tokenize/pre_tokenize.py --splits=2 \\
            --rank="$i" & done; wait
    """
    (first, flags), second = python_commands(text)
    assert first == "finetune_solver.py" and {"--epochs", "--lr", "--seed", "--max_steps"} <= set(flags)
    assert "--not" not in flags and "--nproc_per_node" not in flags
    assert second == ("pre_tokenize/pre_tokenize.py", ["--splits", "--rank"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_bash(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_flags_are_known_to_the_programs(script):
    for program, flags in python_commands(script.read_text()):
        if not (ROOT / program).is_file():
            pytest.fail(f"{script.name} runs {program}, which does not exist")
        known = set(load_parser(program)._option_string_actions)
        if program == "exps/bench/train.py":  # which takes the options of training too
            known |= load_parser("finetune_solver.py")._option_string_actions.keys()
        unknown = [flag for flag in flags if flag not in known]
        assert not unknown, f"{script.name} passes {unknown} to {program}"


@pytest.mark.parametrize("size", RECIPE_SCRIPTS)
def test_recipe_script_says_what_the_recipe_says(tmp_path, size):
    call = record_call(tmp_path, f"exps/{size}.sh", SLURM_PROCID="0")  # as srun starts it
    assert call[:3] == ["python", "-u", "finetune_solver.py"]
    options = load_parser("finetune_solver.py").parse_args(call[3:])
    expected = {
        "model_size": size, "batch_size": 8, "accum_iter": 1, "epochs": 2, "warmup_epochs": 0.01, "lr": 2e-5,
        "min_lr": 2e-5, "wd": 0.1, "clip_grad": 4, "dropout": 0.05, "z_loss_weight": 1e-5, "max_seq_len": 4096,
        "checkpointing": True, "save_iteration_interval": 1000, "num_workers": 8, "cache_ann_on_disk": True,
        "data_config": "exps/data/sample.yaml", "output_dir": f"output/{size}", "packing": False,
    }  # fmt: skip
    found = vars(options)
    assert {key: str(found[key]) if key.endswith(("config", "dir")) else found[key] for key in expected} == expected


@pytest.mark.parametrize(("card", "way"), [("24", "checkpointing"), ("48", "checkpointing_selective")])
def test_lora_script_is_for_one_card(tmp_path, card, way):
    call = record_call(tmp_path, "exps/7B_lora.sh", "--lora_rank", "32", CARD_GIB=card, OUTPUT_DIR="/a folder")
    assert call[:3] == ["python", "-u", "finetune_solver.py"]
    options = vars(load_parser("finetune_solver.py").parse_args(call[3:]))
    expected = {
        "model_size": "7B", "lora_rank": 32, "lora_alpha": 32, "train_only": ["image_head"], "batch_size": 1,
        "accum_iter": 8, "optim": "adamw", "max_seq_len": 4096, "init_from": None,
    }  # fmt: skip
    assert {key: options[key] for key in expected} == expected and str(options["output_dir"]) == "/a folder"
    switches = {name: options[name] for name in ("checkpointing", "checkpointing_selective")}
    assert switches == dict.fromkeys(switches, False) | {way: True}
    assert record_call(tmp_path, "exps/7B_lora.sh", NPROC="2")[:2] == ["torchrun", "--nproc_per_node=2"]


@pytest.mark.parametrize("size", RECIPE_SCRIPTS)
def test_recipe_script_by_torchrun_with_packing(tmp_path, size):
    call = record_call(tmp_path, f"exps/{size}.sh", "--epochs", "3", NPROC="8", PACKING="1", OUTPUT_DIR="/a folder")
    at = call.index("finetune_solver.py")
    assert call[0] == "torchrun" and "--nproc_per_node=8" in call[1:at] and "--nnodes=1" in call[1:at]
    options = load_parser("finetune_solver.py").parse_args(call[at + 1 :])
    assert options.packing is True and str(options.output_dir) == "/a folder"
    assert options.epochs == 3  # what follows on the command line wins


@pytest.mark.parametrize("script", ["7B", "34B", "7B_lora"])
def test_relative_paths_are_taken_from_where_the_user_stands(tmp_path, script):
    paths = {"DATA_CONFIG": "my data.yaml", "OUTPUT_DIR": "out"}
    call = record_call(tmp_path, f"exps/{script}.sh", cwd=tmp_path, **paths)
    options = load_parser("finetune_solver.py").parse_args(call[3:])
    assert (str(options.data_config), str(options.output_dir)) == (f"{tmp_path}/my data.yaml", f"{tmp_path}/out")


@pytest.mark.parametrize(("gpus", "ranks", "expected"), [(0, "", 2), (1, "", 1), (2, "", 2), (1, "2", 2), (0, "1", 1)])
def test_tiny_trains_two_rows_a_step_on_one_gpu_too(tmp_path, gpus, ranks, expected):
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/bash\nif [[ $1 == -c ]]; then echo {gpus}; else echo "$*" >> "{tmp_path}/calls"; fi\n')
    stub.chmod(0o755)
    (tmp_path / "out").mkdir()
    env = {**os.environ, "PYTHON": str(stub), "OUT": "out", "RANKS": ranks}
    subprocess.run(["bash", ROOT / "exps/tiny.sh"], env=env, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    calls = (tmp_path / "calls").read_text()
    assert f"--nproc_per_node={expected} " in calls and f"--accum_iter {3 - expected} " in calls
    assert f"--save_iteration_interval {400 * (3 - expected)} " in calls
    assert f"--out_dir {tmp_path}/out/tokens" in calls and f"--splits={ranks or 2} " in calls


def test_recipe_scripts_differ_in_the_model_alone():
    texts = [(ROOT / f"exps/{size}.sh").read_text().split("set -euo")[1] for size in RECIPE_SCRIPTS]
    assert texts[0].replace("7B", "34B") == texts[1]


def test_slurm_job(tmp_path):
    text = (ROOT / "exps/slurm.sh").read_text()
    directives = re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)
    assert {"--requeue", "--signal=TERM@120", "--open-mode=append"} <= set(directives)
    assert text.rindex("#SBATCH") < text.index("set -euo")  # sbatch stops reading at the first command
    assert record_call(tmp_path, "exps/slurm.sh") == ["srun", "--kill-on-bad-exit=1", "bash", "exps/7B.sh"]
    call = record_call(tmp_path, "exps/slurm.sh", "exps/34B.sh", "--epochs", "3")
    assert call == ["srun", "--kill-on-bad-exit=1", "bash", "exps/34B.sh", "--epochs", "3"]


@pytest.mark.parametrize("name", ["ITEMS", "PROMPTS", "RANKS", "STEPS"])
def test_tiny_refuses_a_number_that_is_none(tmp_path, name):
    env = {**os.environ, "OUT": str(tmp_path / "out"), name: "0x"}
    done = subprocess.run(["bash", ROOT / "exps/tiny.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and f"{name} must be a whole number" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("program", "count"), [("pre_tokenize/pre_tokenize.py", 3), ("torch.distributed.run", 1)])
def test_tiny_leaves_no_process_behind(tmp_path, program, count, number):
    """The shell alone is signalled; what it started would keep the next run out of the output folder."""
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/bash\n[[ "$*" == *{program}* ]] || exit 0\ntouch "{tmp_path}/$$.pid"\nexec sleep 60\n')
    stub.chmod(0o755)
    (tmp_path / "out").mkdir()
    env = {**os.environ, "PYTHON": str(stub), "OUT": str(tmp_path / "out")}
    shell = subprocess.Popen(["bash", ROOT / "exps/tiny.sh"], env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while len(pids := [int(path.stem) for path in tmp_path.glob("*.pid")]) < count:
        assert shell.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    shell.send_signal(number)
    if number == signal.SIGINT and count == 1:
        os.kill(pids[0], number)  # Ctrl-C reaches what stands in the foreground too
    assert shell.wait(20) != 0
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline + 20
        time.sleep(0.05)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_pipe_stands_between_launcher_and_training(script):
    assert not re.search(r"\|\s*tee\b", script.read_text())


@pytest.mark.parametrize("config", DATA_CONFIGS, ids=lambda path: path.name)
def test_data_config_loads_once_its_records_are_there(config, tmp_path, monkeypatch):
    (tmp_path / config.name).write_text(config.read_text())
    for entry in yaml.safe_load(config.read_text())["META"]:
        record = tmp_path / entry["path"]
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text("[]")
    monkeypatch.chdir(tmp_path)
    assert load_data_config(config.name)
