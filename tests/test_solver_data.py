"""Training on data that is not what it should be: items that cannot be read, records that changed, context dropout."""

import json
import shutil

import pytest

from data.item_processor import hash_tokenizer, load_text_tokenizer
from tests.small_run import call_main, losses, read_lines, run_solver, solver_args, train


@pytest.fixture
def task(small_task, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(small_task, tmp_path / "task")


def damage(task, *items: int) -> None:
    for item in items:
        (task / "files" / f"{item}.pkl").write_bytes(b"no pickle at all")


def logged(output_dir) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "bad_items.jsonl").read_text().splitlines()]


def test_bad_items_are_left_out_logged_and_counted_once(task, tmp_path):
    damage(task, 5, 12)
    out = tmp_path / "out"
    code, message = call_main(solver_args(task, out, max_bad_items=2))
    assert code == 0, message
    lines = read_lines(out)
    assert [line["bad_items"] for line in lines] == sorted(line["bad_items"] for line in lines)
    assert lines[-1]["bad_items"] == 2  # once each, although there were two epochs
    assert {line["place"].rpartition("/")[2] for line in logged(out)} == {"5.pkl", "12.pkl"}
    assert all("pkl" in line["reason"] and line["step"] >= 1 for line in logged(out))
    call_main(solver_args(task, tmp_path / "calm", data_config=write_config(task, leave_out=(5, 12))))
    targets = [sum(line["num_valid_tokens"] for line in read_lines(folder)) for folder in (out, tmp_path / "calm")]
    assert targets[0] == targets[1]  # nothing has taken the place of what was left out


def write_config(task, leave_out: tuple[int, ...]):
    entries = [json.loads(line.rstrip(",\n")) for line in (task / "record.json").read_text().splitlines()[1:-1]]
    kept = [entry for entry in entries if entry["id"] not in leave_out]
    (task / "kept.json").write_text(json.dumps(kept))
    (task / "kept.yaml").write_text("META:\n  - path: kept.json\n")
    return task / "kept.yaml"


def test_one_bad_item_too_many_stops_with_file_reason_and_flag(task, tmp_path):
    damage(task, 5, 12)
    code, message = call_main(solver_args(task, tmp_path / "out", max_bad_items=1))
    assert code == 3
    assert "2 items cannot be read (--max_bad_items 1)" in message and ".pkl" in message and "Traceback" not in message
    code, message = call_main(solver_args(task, tmp_path / "other"))
    assert code == 3 and "1 items cannot be read (--max_bad_items 0)" in message


@pytest.mark.slow
def test_bad_items_survive_a_resume(task, tmp_path):
    damage(task, 5)
    out = tmp_path / "out"
    assert call_main(solver_args(task, out, max_bad_items=1, epochs=1))[0] == 0
    damage(task, 12)
    code, message = call_main(solver_args(task, out, max_bad_items=1, epochs=2))
    assert code == 3 and "2 items cannot be read" in message


@pytest.mark.slow
def test_two_ranks_leave_out_and_stop_together(task, tmp_path):
    damage(task, 5, 12)
    args = solver_args(task, tmp_path / "out", max_bad_items=2, num_workers=1, epochs=1)
    train(2, args)
    assert read_lines(tmp_path / "out")[-1]["bad_items"] == 2
    done = run_solver(2, solver_args(task, tmp_path / "stopped", max_bad_items=1, epochs=1))
    assert done.returncode != 0
    assert done.stderr.count("2 items cannot be read (--max_bad_items 1)") == 1
    assert 'finetune_solver.py", line' not in done.stderr  # no traceback but the launcher's own


@pytest.mark.slow
def test_other_items_are_refused_unless_they_are_meant(task, tmp_path, capsys):
    out = tmp_path / "out"
    assert call_main(solver_args(task, out, max_steps=3)) == (0, "")
    shorter = write_config(task, leave_out=(23,))
    code, message = call_main(solver_args(task, out, max_steps=5, data_config=shorter))
    assert code == 2 and "the items of --data_config" in message and "--resume_anyway" in message
    assert call_main(solver_args(task, out, max_steps=5)) == (0, "")
    capsys.readouterr()
    assert call_main(solver_args(task, out, max_steps=6, data_config=shorter, resume_anyway=True)) == (0, "")
    assert "careful: the items of --data_config" in capsys.readouterr().out


@pytest.mark.slow
def test_an_epoch_that_has_fewer_steps_now_is_over(task, tmp_path):
    out, few = tmp_path / "out", tuple(range(4, 24))
    assert call_main(solver_args(task, out, max_steps=7)) == (0, "")
    config = write_config(task, leave_out=few)
    assert call_main(solver_args(task, out, data_config=config, resume_anyway=True)) == (0, "")
    assert [line["step"] for line in read_lines(out)] == list(range(1, 10))  # 7, and 2 of the second epoch


@pytest.mark.slow
def test_context_dropout_trains_on_images_alone_and_resumes_the_same(task, tmp_path):
    changes = {"context_dropout": 0.7, "packing": True}
    assert call_main(solver_args(task, tmp_path / "once", **changes)) == (0, "")
    assert call_main(solver_args(task, tmp_path / "twice", max_steps=2, **changes)) == (0, "")
    assert call_main(solver_args(task, tmp_path / "twice", **changes)) == (0, "")
    assert losses(tmp_path / "once") == losses(tmp_path / "twice")
    assert call_main(solver_args(task, tmp_path / "plain", packing=True)) == (0, "")
    targets = [sum(line["num_valid_tokens"] for line in read_lines(tmp_path / name)) for name in ("once", "plain")]
    assert targets[0] < targets[1]  # a begin-image token that begins its document is no target


def test_context_dropout_needs_images_in_the_record(task, tmp_path):
    config = write_config(task, leave_out=tuple(range(1, 24, 2)))
    code, message = call_main(solver_args(task, tmp_path / "out", data_config=config, context_dropout=0.1))
    assert code == 2 and "--context_dropout: no record says that an item ends in a generated image" in message


def test_filler_and_overlong_items_are_reported(task, tmp_path, capsys):
    assert call_main(solver_args(task, tmp_path / "out", max_seq_len=20, overlong="drop", epochs=1)) == (0, "")
    said = capsys.readouterr().out
    assert "items of --data_config above --max_seq_len 20 are left out" in said and "% filled" in said
    assert all(0.3 < line["fill"] <= 1 for line in read_lines(tmp_path / "out"))


def test_the_index_is_kept_on_disk_if_asked_for(task, tmp_path):
    assert call_main(solver_args(task, tmp_path / "out", max_steps=1, cache_ann_on_disk=True)) == (0, "")
    assert list((tmp_path / "out" / "data_index").iterdir())
    assert call_main(solver_args(task, tmp_path / "other", max_steps=1)) == (0, "")
    assert not (tmp_path / "other" / "data_index").exists()


def test_records_of_another_tokenizer_are_refused(task, tmp_path):
    (task / "manifest.json").write_text(json.dumps({"tokenizer_sha256": "0" * 64}))
    code, message = call_main(solver_args(task, tmp_path / "out"))
    assert code == 2 and "record.json was tokenized with another tokenizer than" in message
    tokenizer = load_text_tokenizer(task / "tokenizer")
    (task / "manifest.json").write_text(json.dumps({"tokenizer_sha256": hash_tokenizer(tokenizer)}))
    assert call_main(solver_args(task, tmp_path / "out", max_steps=1)) == (0, "")
