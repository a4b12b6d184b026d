"""When to save, which checkpoints are complete, which one a run resumes, and the lock of the output folder."""

import os
import sys
from pathlib import Path

import pytest

from model.decoder.trainable import LORA_TARGETS
from model.training import checkpoint
from model.training.checkpoint import (
    CheckpointOptions,
    Position,
    TrainerState,
    due_checkpoint,
    find_changes,
    find_newest,
    find_start,
    lock_output_dir,
    publish,
    read_state,
    remove_old,
)
from tests.helpers import forked


def make_checkpoint(folder: Path, global_step: int, **options: object) -> Path:
    """A folder as a save leaves it, with small files."""
    folder.mkdir(parents=True)
    (folder / "shards").write_bytes(b"12345")
    (folder / "base_weights.json").write_text("{}")
    state = TrainerState(Position(0, global_step, global_step), units_per_step=2, world_size=1, options=options)
    checkpoint.seal(folder, state)
    return folder


@pytest.mark.parametrize(
    ("step", "flags", "expected"),
    [
        (1, {"is_first": True}, "epoch0-iter2"),
        # Micro-step 5 is reached within step 3.
        (3, {}, "epoch0-iter6"),
        (4, {}, None),
        (5, {}, "epoch0-iter10"),
        (7, {"is_last": True}, "epoch0-iter14"),
        (9, {}, "epoch0"),
    ],
)
def test_due_checkpoint(step, flags, expected):
    options = CheckpointOptions(Path("out"), save_iteration_interval=5)
    assert due_checkpoint(options, 0, step, num_steps=9, micro_steps=2, **({"is_last": False} | flags)) == expected


@pytest.mark.parametrize(
    ("interval", "expected"), [(2, [None, "epoch1", None, "epoch3", "epoch4"]), (0, [None] * 4 + ["epoch4"])]
)
def test_due_checkpoint_by_epochs(interval, expected):
    options = CheckpointOptions(Path("out"), save_interval=interval, save_iteration_interval=0)
    assert [due_checkpoint(options, epoch, 9, 9, 1, is_last=epoch == 4) for epoch in range(5)] == expected


def test_read_state_returns_what_was_sealed_or_why_a_folder_is_incomplete(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint folder"):
        read_state(tmp_path / "nothing")
    folder = make_checkpoint(tmp_path / "epoch0", 7)
    state = read_state(folder)
    assert (state.position, state.units_per_step) == (Position(0, 7, 7), 2)
    assert state.files == {"shards": 5, "base_weights.json": 2}
    # The note of where the frozen weights are may be edited.
    (folder / "base_weights.json").write_text('{"source": "elsewhere"}')
    assert read_state(folder) == state
    steps = (
        (lambda: (folder / "shards").write_bytes(b"123"), "is incomplete: shards has 3 bytes instead of 5"),
        ((folder / "base_weights.json").unlink, "is incomplete: base_weights.json is missing"),
        (lambda: (folder / "trainer_state.json").write_text("{"), "cannot be read"),
        ((folder / "trainer_state.json").unlink, "has no trainer_state.json"),
    )
    for damage, message in steps:
        damage()
        with pytest.raises(ValueError, match=message):
            read_state(folder)


def test_the_start_is_the_newest_complete_checkpoint_of_the_run(tmp_path):
    elsewhere = make_checkpoint(tmp_path / "other" / "epoch0", 5)
    out = tmp_path / "out"
    options = CheckpointOptions(out, resume_path=elsewhere)
    assert find_newest(out) == (None, [])
    assert find_start(CheckpointOptions(out)) == (None, []) and find_start(options)[0] == elsewhere
    make_checkpoint(out / "epoch0-iter90", 9)
    newest = make_checkpoint(out / "epoch0-iter100", 10)
    (make_checkpoint(out / "epoch1", 20) / "shards").unlink()
    skipped = f"{out / 'epoch1'} is incomplete: shards is missing"
    assert find_newest(out) == find_start(CheckpointOptions(out)) == (newest, [skipped])
    start, notes = find_start(options)
    assert start == newest and notes[0] == skipped and "this run has begun already" in notes[1]


def test_what_is_trained_must_stay(tmp_path):
    fixed = {"lora_rank": 0, "lora_alpha": 16.0, "lora_targets": None, "train_only": None, "optim": "adamw"}
    now = dict.fromkeys(checkpoint.OPTIONS_TO_KEEP, 1) | fixed
    options = CheckpointOptions(tmp_path / "out")
    assert find_changes(options, now | {"lora_rank": 8}, "") == ([], [])
    # A checkpoint that is older than these options.
    make_checkpoint(tmp_path / "out" / "epoch0", 5, seed=0)
    # Without adapters lora_alpha has no meaning.
    assert find_changes(options, now | {"lora_alpha": 3.0}, "") == ([], ["--seed was 0 and is 1"])
    # All projections are the default, in any order.
    targets = {"lora_targets": [*reversed(LORA_TARGETS)]}
    assert find_changes(options, now | targets, "") == find_changes(options, now, "")
    changes, _ = find_changes(options, now | {"lora_rank": 8, "train_only": ["image_head"]}, "")
    assert changes == ["--lora_rank was 0 and is 8", "--train_only was None and is ['image_head']"]


def test_problems(tmp_path):
    out = tmp_path / "out"
    old, new = make_checkpoint(out / "epoch0", 5), make_checkpoint(out / "epoch1", 10)
    assert not CheckpointOptions(out).problems()
    assert not CheckpointOptions(out, auto_resume=False, resume_path=new).problems()
    assert "holds checkpoints of an earlier run (epoch1)" in CheckpointOptions(out, auto_resume=False).problems()[0]
    assert f"is older than {new}" in CheckpointOptions(out, resume_path=old).problems()[0]
    (problem,) = CheckpointOptions(tmp_path / "new", resume_path=tmp_path / "none").problems()
    assert problem.startswith("--resume_path: there is no checkpoint folder") and "--init_from" in problem
    (tmp_path / "file").touch()
    assert "is a file" in CheckpointOptions(tmp_path / "file").problems()[0]


def test_a_run_does_not_start_over_incomplete_checkpoints(tmp_path):
    (make_checkpoint(tmp_path / ".saving-epoch0-iter1", 1) / "trainer_state.json").unlink()
    # A kill in the first save, and a file, are no reason.
    (tmp_path / "epochs.txt").touch()
    assert not CheckpointOptions(tmp_path).problems()
    (make_checkpoint(tmp_path / "epoch0", 5) / "shards").write_bytes(b"123")
    elsewhere = make_checkpoint(tmp_path / "other" / "epoch0", 3)
    for changes in ({}, {"auto_resume": False}, {"resume_path": elsewhere}):
        (problem,) = CheckpointOptions(tmp_path, **changes).problems()
        assert "none is complete" in problem and "shards has 3 bytes instead of 5" in problem and "Restore" in problem
    make_checkpoint(tmp_path / "epoch0-iter1", 1)
    assert not CheckpointOptions(tmp_path).problems()


def test_remove_old_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        make_checkpoint(tmp_path / f"epoch{step}", step)
    # Incomplete: neither counted nor removed.
    (tmp_path / "epoch9").mkdir()
    remove_old(tmp_path, keep=0)
    assert len(list(tmp_path.iterdir())) == 4
    remove_old(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch2", "epoch3", "epoch9"]


def test_publish_replaces_a_folder_of_the_same_name(tmp_path):
    make_checkpoint(tmp_path / "epoch0", 1)
    publish(make_checkpoint(tmp_path / ".saving-epoch0", 2), tmp_path / "epoch0")
    assert read_state(tmp_path / "epoch0").position.global_step == 2 and os.listdir(tmp_path) == ["epoch0"]


def test_lock_clears_what_a_kill_left_and_publishes_a_sealed_save(tmp_path):
    (tmp_path / ".saving-epoch1").mkdir()
    make_checkpoint(tmp_path / ".saving-epoch0", 4)
    (tmp_path / ".replaced-epoch0").mkdir()
    lock_output_dir(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "epoch0"]
    assert read_state(tmp_path / "epoch0").position.global_step == 4


def test_lock_keeps_a_second_process_out(tmp_path, monkeypatch):
    imports = "import pathlib, sys, time; from model.training.checkpoint import lock_output_dir; "
    lock = f"{imports} file = lock_output_dir(pathlib.Path(sys.argv[1])); "
    hold = f"{lock} print('held', flush=True); time.sleep(600)"
    holder = forked.Popen([sys.executable, "-c", hold, tmp_path], os.environ)
    holder.wait_for_output("held")
    monkeypatch.setattr(checkpoint, "LOCK_PATIENCE_S", 0.5)
    with pytest.raises(ValueError, match="another run writes to"):
        lock_output_dir(tmp_path)
    holder.kill()
    holder.wait()
    lock_output_dir(tmp_path).close()
