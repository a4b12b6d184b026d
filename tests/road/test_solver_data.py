"""Training on data with faults: items that cannot be read, records that changed; and context dropout."""

import json
import shutil

import pytest

from tests.helpers.small_run import call_main, find_problems, losses, read_lines, run_solver, solver_args


@pytest.fixture
def task(small_task, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(small_task, tmp_path / "task")


def damage(task, *items: int) -> None:
    for item in items:
        (task / "files" / f"{item}.pkl").write_bytes(b"no pickle at all")


def write_config(task, without: tuple[int, ...]):
    """The config of a record without some items."""
    entries = [json.loads(line.rstrip(",\n")) for line in (task / "record.json").read_text().splitlines()[1:-1]]
    (task / "kept.json").write_text(json.dumps([entry for entry in entries if entry["id"] not in without]))
    (task / "kept.yaml").write_text("META:\n  - path: kept.json\n")
    return task / "kept.yaml"


def targets(output_dir) -> int:
    return sum(line["num_valid_tokens"] for line in read_lines(output_dir))


def test_bad_items_are_skipped_logged_and_counted_once(task, tmp_path):
    damage(task, 5, 12)
    out = tmp_path / "out"
    assert call_main(solver_args(task, out, max_bad_items=2)) == (0, "")
    lines = read_lines(out)
    assert [line["bad_items"] for line in lines] == sorted(line["bad_items"] for line in lines)
    # Once each, although there were two epochs.
    assert lines[-1]["bad_items"] == 2
    logged = [json.loads(line) for line in (out / "bad_items.jsonl").read_text().splitlines()]
    assert {line["place"].rpartition("/")[2] for line in logged} == {"5.pkl", "12.pkl"}
    assert all("pkl" in line["reason"] and line["step"] >= 1 for line in logged)
    # No other item took the place of a skipped one.
    assert call_main(solver_args(task, tmp_path / "calm", data_config=write_config(task, without=(5, 12)))) == (0, "")
    assert targets(out) == targets(tmp_path / "calm")
    code, message = call_main(solver_args(task, tmp_path / "fewer", max_bad_items=1))
    assert code == 3 and "2 items cannot be read (--max_bad_items 1)" in message and "Traceback" not in message


@pytest.mark.slow
def test_bad_items_survive_a_resume_and_end_all_ranks_together(task, tmp_path):
    damage(task, 5)
    out = tmp_path / "out"
    assert call_main(solver_args(task, out, max_bad_items=1, epochs=1))[0] == 0
    damage(task, 12)
    done = run_solver(2, solver_args(task, out, max_bad_items=1, epochs=2))
    assert done.returncode != 0
    assert done.stderr.count("2 items cannot be read (--max_bad_items 1)") == 1
    assert 'finetune_solver.py", line' not in done.stderr, "no traceback but that of the launcher"


@pytest.mark.slow
def test_other_items_are_rejected_unless_intended(task, tmp_path, capsys):
    """An epoch that has fewer steps now is over: 7 steps, and 2 of the second epoch."""
    out = tmp_path / "out"
    assert call_main(solver_args(task, out, max_steps=7)) == (0, "")
    fewer = {"data_config": write_config(task, without=tuple(range(4, 24)))}
    problems = find_problems(task, out, **fewer)
    assert "the items of --data_config" in problems and "--resume_anyway" in problems
    assert call_main(solver_args(task, out, **fewer, resume_anyway=True)) == (0, "")
    assert "warning: the items of --data_config" in capsys.readouterr().out
    assert [line["step"] for line in read_lines(out)] == list(range(1, 10))


@pytest.mark.slow
def test_context_dropout_trains_on_images_alone_and_resumes_the_same(task, tmp_path):
    changes = {"context_dropout": 0.7, "packing": True, "epochs": 1}
    assert call_main(solver_args(task, tmp_path / "once", **changes)) == (0, "")
    for max_steps in (2, None):
        assert call_main(solver_args(task, tmp_path / "twice", max_steps=max_steps, **changes)) == (0, "")
    assert losses(tmp_path / "once") == losses(tmp_path / "twice")
    assert call_main(solver_args(task, tmp_path / "plain", packing=True, epochs=1)) == (0, "")
    # A begin-image token that begins its document is no target.
    assert targets(tmp_path / "once") < targets(tmp_path / "plain")


def test_overlong_items_and_filler_are_reported(task, tmp_path, capsys):
    assert call_main(solver_args(task, tmp_path / "out", max_seq_len=20, overlong="drop", max_steps=2)) == (0, "")
    printed = capsys.readouterr().out
    assert f"items of {task / 'data.yaml'} above --max_seq_len 20 are dropped" in printed and "% filled" in printed
    assert all(0.3 < line["fill"] <= 1 for line in read_lines(tmp_path / "out"))


def test_the_index_is_kept_in_the_output_folder_on_request(task, tmp_path):
    assert find_problems(task, tmp_path / "other") == "" and not (tmp_path / "other").exists()
    assert find_problems(task, tmp_path / "out", cache_ann_on_disk=True) == ""
    assert list((tmp_path / "out" / "data_index").iterdir())
