"""When to save, what is whole, which checkpoint a run goes on from, and the lock."""

import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from model import checkpoint
from model.checkpoint import (
    CheckpointOptions,
    Position,
    TrainerState,
    due_checkpoint,
    find_newest,
    find_start,
    lock_output_dir,
    read_state,
    remove_old,
)
from model.trainable import LORA_TARGETS
from tests import forked


def make_checkpoint(folder: Path, global_step: int, **options: object) -> Path:
    """A folder as a save leaves it, with one small file in place of the shards."""
    folder.mkdir(parents=True)
    (folder / "shards").write_bytes(b"12345")
    state = TrainerState(Position(0, global_step, global_step), units_per_step=2, world_size=1, options=options)
    checkpoint.seal(folder, state)
    return folder


@pytest.mark.parametrize(
    ("step", "is_last", "expected"),
    [
        (1, False, None),
        (3, False, "epoch0-iter6"),  # micro-step 5 is reached within step 3
        (4, False, None),
        (5, False, "epoch0-iter10"),
        (7, True, "epoch0-iter14"),
        (9, False, "epoch0"),
        (9, True, "epoch0"),
    ],
)
def test_due_checkpoint(step, is_last, expected):
    options = CheckpointOptions(Path("out"), save_iteration_interval=5)
    assert due_checkpoint(options, 0, step, num_steps=9, micro_steps=2, is_last=is_last) == expected


def test_due_checkpoint_every_second_epoch_or_never():
    options = CheckpointOptions(Path("out"), save_interval=2, save_iteration_interval=0)
    assert [due_checkpoint(options, epoch, 9, 9, 1, is_last=epoch == 4) for epoch in range(5)] == [
        *(None, "epoch1", None, "epoch3", "epoch4")
    ]
    never = CheckpointOptions(Path("out"), save_interval=0, save_iteration_interval=0)
    assert due_checkpoint(never, 0, 9, 9, 1, is_last=False) is None
    assert due_checkpoint(never, 0, 9, 9, 1, is_last=True) == "epoch0"


def test_read_state_gives_back_what_was_sealed(tmp_path):
    folder = make_checkpoint(tmp_path / "epoch0", 7)
    state = read_state(folder)
    assert state.position == Position(0, 7, 7) and state.files == {"shards": 5}
    assert asdict(state)["units_per_step"] == 2


def test_read_state_says_why_a_folder_is_not_whole(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint folder"):
        read_state(tmp_path / "nothing")
    folder = make_checkpoint(tmp_path / "epoch0", 7)
    (folder / "shards").write_bytes(b"123")
    with pytest.raises(ValueError, match="shards has 3 bytes instead of 5"):
        read_state(folder)
    (folder / "shards").unlink()
    with pytest.raises(ValueError, match="shards is missing"):
        read_state(folder)
    (folder / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        read_state(folder)
    (folder / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="has no trainer_state.json"):
        read_state(folder)


def test_find_newest_goes_by_position_and_names_what_it_skips(tmp_path):
    make_checkpoint(tmp_path / "epoch0-iter90", 9)
    make_checkpoint(tmp_path / "epoch0-iter100", 10)
    (make_checkpoint(tmp_path / "epoch1", 20) / "shards").unlink()
    newest, skipped = find_newest(tmp_path)
    assert newest == tmp_path / "epoch0-iter100"
    assert len(skipped) == 1 and "epoch1 is not whole: shards is missing" in skipped[0]
    assert find_newest(tmp_path / "absent") == (None, [])


def test_find_start(tmp_path):
    elsewhere = make_checkpoint(tmp_path / "other" / "epoch0", 5)
    options = CheckpointOptions(tmp_path / "out", resume_path=elsewhere)
    assert find_start(options)[0] == elsewhere
    own = make_checkpoint(tmp_path / "out" / "epoch0", 3)
    start, notes = find_start(options)
    assert start == own and "already on its way" in notes[0]
    assert find_start(CheckpointOptions(tmp_path / "out"))[0] == own
    assert find_start(CheckpointOptions(tmp_path / "new"))[0] is None


def test_what_is_trained_must_stay(tmp_path):
    now = {"lora_rank": 0, "lora_alpha": 16.0, "lora_targets": None, "train_only": None, "optim": "adamw"}
    options = CheckpointOptions(tmp_path / "out")
    assert not checkpoint.find_fixed_changes(options, now | {"lora_rank": 8})
    make_checkpoint(tmp_path / "out" / "epoch0", 5)  # of before these options were there
    assert not checkpoint.find_fixed_changes(options, now)
    assert not checkpoint.find_fixed_changes(options, now | {"lora_alpha": 3.0})  # without adapters it means nothing
    changes = checkpoint.find_fixed_changes(options, now | {"lora_rank": 8, "train_only": ["image_head"]})
    assert changes == ["--lora_rank was 0 and is 8", "--train_only was None and is ['image_head']"]


def test_what_is_trained_is_told_by_meaning(tmp_path):
    """Names in another order, or all of them by name, are the same; moments in 8 bits are of their own kind."""
    now = {"lora_rank": 8, "lora_alpha": 16.0, "lora_targets": None, "train_only": ["*norm*", "lm_head.weight"]}
    make_checkpoint(tmp_path / "a" / "epoch0", 5, **now, optim="adamw")
    same = {"lora_targets": ["v_proj", *(name for name in LORA_TARGETS if name != "v_proj")], "optim": "adamw"}
    options = CheckpointOptions(tmp_path / "a")
    assert not checkpoint.find_fixed_changes(options, now | same | {"train_only": ["lm_head.weight", "*norm*"]})
    changes = checkpoint.find_fixed_changes(options, now | {"lora_targets": ["v_proj"], "optim": "adamw_8bit"})
    assert changes[0] == "--lora_targets was None and is ['v_proj']"
    assert changes[1].startswith("--optim was adamw and is adamw_8bit") and len(changes) == 2


def test_damaged_checkpoints_alone_are_not_begun_over(tmp_path):
    (make_checkpoint(tmp_path / "epoch0", 5) / "shards").write_bytes(b"123")
    for options in (CheckpointOptions(tmp_path), CheckpointOptions(tmp_path, auto_resume=False)):
        (problem,) = options.problems()
        assert "none is whole" in problem and "shards has 3 bytes instead of 5" in problem and "Restore" in problem
    elsewhere = make_checkpoint(tmp_path / "other" / "epoch0", 3)
    assert "none is whole" in CheckpointOptions(tmp_path, resume_path=elsewhere).problems()[0]
    make_checkpoint(tmp_path / "epoch0-iter1", 1)
    assert not CheckpointOptions(tmp_path).problems()


def test_a_kill_in_the_first_save_keeps_nothing_from_starting(tmp_path):
    (make_checkpoint(tmp_path / ".saving-epoch0-iter1", 1) / "trainer_state.json").unlink()
    (tmp_path / "epochs.txt").touch()
    assert not CheckpointOptions(tmp_path).problems()


def test_the_note_of_frozen_weights_may_be_edited(tmp_path):
    folder = tmp_path / "epoch0"
    folder.mkdir()
    (folder / "base_weights.json").write_text("{}")
    checkpoint.seal(folder, TrainerState(Position(0, 1, 1), units_per_step=2, world_size=1, options={}))
    (folder / "base_weights.json").write_text('{"source": "elsewhere"}')
    assert read_state(folder).position.global_step == 1
    (folder / "base_weights.json").unlink()
    with pytest.raises(ValueError, match=r"base_weights.json is missing"):
        read_state(folder)


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


def test_remove_old_keeps_the_furthest(tmp_path):
    for step in (1, 2, 3):
        make_checkpoint(tmp_path / f"epoch{step}", step)
    (tmp_path / "epoch9").mkdir()  # not whole: not counted, not touched
    remove_old(tmp_path, keep=0)
    assert len(list(tmp_path.iterdir())) == 4
    remove_old(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch2", "epoch3", "epoch9"]


def test_lock_clears_debris_and_names_a_sealed_save(tmp_path):
    (tmp_path / ".saving-epoch1").mkdir()
    make_checkpoint(tmp_path / ".saving-epoch0", 4)
    (tmp_path / ".replaced-epoch0").mkdir()
    lock_output_dir(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "epoch0"]
    assert read_state(tmp_path / "epoch0").position.global_step == 4


def test_publish_replaces_a_folder_of_the_same_name(tmp_path):
    make_checkpoint(tmp_path / "epoch0", 1)
    checkpoint.publish(make_checkpoint(tmp_path / ".saving-epoch0", 2), tmp_path / "epoch0")
    assert read_state(tmp_path / "epoch0").position.global_step == 2
    assert os.listdir(tmp_path) == ["epoch0"]


def test_lock_keeps_a_second_process_out(tmp_path, monkeypatch):
    hold = f"""
import sys, time
from pathlib import Path
from model.checkpoint import lock_output_dir
file = lock_output_dir(Path({str(tmp_path)!r}))
print("held", flush=True)
time.sleep(600)
"""
    holder = forked.Popen([sys.executable, "-c", hold], os.environ)
    holder.wait_for_output("held")
    monkeypatch.setattr(checkpoint, "LOCK_PATIENCE_S", 0.5)
    with pytest.raises(ValueError, match="another run writes to"):
        lock_output_dir(tmp_path)
    holder.kill()
    holder.wait()
    lock_output_dir(tmp_path).close()
