"""What is told before a training starts: about the machine that it is on and the folders that it is given."""

import shutil
from types import SimpleNamespace

import torch

from model import checks
from tests.small_run import call_main, solver_args


def test_a_folder_of_checkpoints_is_told_with_those_in_it(small_task, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small_task / "init", folder / "epoch1")
    (folder / "epoch1" / "trainer_state.json").write_text("{}")
    for flag in ("init_from", "resume_path"):
        code, message = call_main(solver_args(small_task, tmp_path / "out", **{flag: folder}))
        assert code == 2 and f"give {folder / 'epoch1'}" in message, message


def test_shared_memory_without_room_for_semaphores_is_told_at_the_start(small_task, tmp_path, monkeypatch):
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(total=2**26, free=2**16))
    code, message = call_main(solver_args(small_task, tmp_path / "out", num_workers=8))
    assert code == 2 and "which has 64 KiB free: give the container a larger --shm-size, or fewer --num_w" in message


def test_two_ranks_on_one_gpu_are_told_before_they_wait(small_task, tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    code, message = call_main(solver_args(small_task, tmp_path / "out", device="auto"))
    assert code == 2 and message.count("2 ranks share 1 GPU: start one rank per GPU, or give --device cpu") == 1


def test_without_a_gpu_a_run_is_on_the_cpu_and_says_so(small_task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as CUDA_VISIBLE_DEVICES= does
    changes = {"device": None, "precision": None, "max_steps": 1}
    assert call_main(solver_args(small_task, tmp_path / "out", **changes)) == (0, "")
    assert capsys.readouterr().out.count("torch sees no CUDA GPU: this run is on the CPU") == 1
