"""Trackers: event files of TensorBoard read back, also of a run that was cut off; wandb and trackio where they are."""

import importlib.util
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from small_run import ROOT, call_main, environment, read_lines, solver_args

from model.trackers import RUN_ID_NAME, TENSORBOARD_DIR, TRACKERS, TrackerOptions, Trackers, open_run


def curves(output_dir):
    """Per figure the (step, value) that TensorBoard would draw."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output_dir / TENSORBOARD_DIR), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events, {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_figure_of_metrics_jsonl(two_types, tmp_path):
    out = tmp_path / "out"
    assert call_main(solver_args(two_types, out, epochs=1, log_with="tensorboard")) == (0, "")
    _, found = curves(out)
    lines = read_lines(out)
    for key in ("loss", "text_loss", "lr", "grad_norm", "tokens_per_s", "data_wait_ms", "memory_gib", "epoch"):
        expected = [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines if line[key] is not None]
        assert found[key] == expected, key
    by_type = [(line["step"], line["loss_by_type"]["text"]) for line in lines if "text" in line["loss_by_type"]]
    assert found["loss_by_type/text"] == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in by_type]
    assert "step" not in found and "mfu" not in found


@pytest.mark.slow
def test_a_run_cut_off_resumes_in_the_same_curve(small_task, tmp_path):
    """Step 5 is logged, the last checkpoint is of step 3: no step is missing, none is there twice."""
    out = tmp_path / "out"
    changes = {"save_iteration_interval": 3, "epochs": 1, "log_with": "tensorboard"}
    assert call_main(solver_args(small_task, out, max_steps=5, **changes)) == (0, "")
    shutil.rmtree(out / "epoch0-iter5")
    assert call_main(solver_args(small_task, out, **changes)) == (0, "")
    _, found = curves(out)
    lines = read_lines(out)
    assert [step for step, _ in found["loss"]] == [line["step"] for line in lines] == list(range(1, 13))
    assert [loss for _, loss in found["loss"]] == pytest.approx([line["loss"] for line in lines], rel=1e-6)
    assert len(list((out / TENSORBOARD_DIR).iterdir())) == 2, "one file of each process"


def test_pictures_reach_tensorboard(tmp_path):
    trackers = Trackers(TrackerOptions("tensorboard"), tmp_path, 0, 0, {}, print)
    trackers.log_images(7, {"samples": [Image.new("RGB", (8, 4), "red"), Image.new("L", (2, 2))]})
    trackers.close()
    events, _ = curves(tmp_path)
    assert events.Tags()["images"] == ["samples/0", "samples/1"]
    (image,) = events.Images("samples/0")
    assert (image.step, image.width, image.height) == (7, 8, 4)


def test_a_tracker_that_fails_is_said_once_and_left_out(tmp_path):
    """A file stands where TensorBoard's folder would be; later its folder is taken away under it."""
    said = []
    (tmp_path / TENSORBOARD_DIR).write_text("not a folder")
    trackers = Trackers(TrackerOptions("tensorboard"), tmp_path, 0, 0, {}, said.append)
    for step in (1, 2):
        trackers.log(step, {"loss": 1.0})
    trackers.close()
    (line,) = said
    assert line.startswith("--log_with tensorboard is off from here on: ") and "metrics.jsonl goes on" in line


def test_a_failure_on_the_way_leaves_the_others(tmp_path):
    said = []
    trackers = Trackers(TrackerOptions("tensorboard"), tmp_path, 0, 0, {}, said.append)
    trackers.log(1, {"loss": object})  # no number: TensorBoard passes over it
    trackers.log_images(1, {"samples": ["no picture"]})
    trackers.log(2, {"loss": 1.0})
    assert len(said) == 1 and "AttributeError" in said[0]


def test_how_far_each_tracker_has_come_outlives_a_second_kill(tmp_path):
    """Step 5, killed; from 2 on to 4, killed again: what has the steps up to 5 is not sent 5 once more."""
    run_id, known = open_run(tmp_path, ["wandb"], last_step=0)
    assert known == {"wandb": 0}
    assert open_run(tmp_path, ["wandb"], last_step=5) == (run_id, {"wandb": 5})
    assert open_run(tmp_path, ["wandb", "trackio"], last_step=4) == (run_id, {"wandb": 5, "trackio": 0})
    assert open_run(tmp_path, ["trackio"], last_step=9)[1]["trackio"] == 9
    (tmp_path / RUN_ID_NAME).write_bytes(f"{run_id}\nwandb\n\ntrackio x 3\n".encode() + b"\xff\n")
    assert open_run(tmp_path, ["wandb"], last_step=9) == (run_id, {"wandb": 0})
    (tmp_path / RUN_ID_NAME).write_text("")
    assert open_run(tmp_path, [], last_step=9)[0] == (tmp_path / RUN_ID_NAME).read_text().strip() != ""


def test_unknown_and_missing_trackers_are_told_before_anything_starts(small_task, tmp_path):
    code, message = call_main(solver_args(small_task, tmp_path / "out", log_with="tensorbord"))
    assert code == 2 and "--log_with knows tensorboard, wandb, trackio, got 'tensorbord'; did you mean" in message
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_told_with_its_pip_install(small_task, tmp_path):
    name = next((name for name in TRACKERS if importlib.util.find_spec(name) is None), None)
    if name is None:
        pytest.skip("every tracker is installed here")
    code, message = call_main(solver_args(small_task, tmp_path / "out", log_with=f"tensorboard,{name}"))
    assert code == 2 and f"--log_with {name} needs the package {name}, which is not here: pip install {name}" in message
    assert not (tmp_path / "out").exists()


def log_thrice(name, out):
    """Steps 1 to 5; then, as a run that goes on after step 2 and is killed again, 3 and 4; then, from step 2 once more,
    3 to 7. Returns the id of the run."""
    for resume_step, last_step, stop in ((0, 0, 5), (2, 5, 4), (2, 4, 7)):
        trackers = Trackers(TrackerOptions(name, "a_project"), out, resume_step, last_step, {"lr": 0.1}, pytest.fail)
        for step in range(resume_step + 1, stop + 1):
            trackers.log(step, {"loss": 1.0 / step})
            trackers.log_images(step, {"samples": [Image.new("RGB", (8, 4), "red")]})
        trackers.close()
    return (out / RUN_ID_NAME).read_text().split()[0]


def test_trackio_goes_on_in_the_same_run(tmp_path):
    pytest.importorskip("trackio", reason="optional, not in tests/requirements.txt: passed by hand with 0.43.0")
    code = f"""
import sys; from pathlib import Path; from test_trackers import log_thrice
run_id = log_thrice("trackio", Path({str(tmp_path)!r}))
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("a_project")
lines = [line for line in SQLiteStorage.get_logs("a_project", run) if "loss" in line]
print([run.endswith(run_id) if isinstance(run, str) else run, [line["step"] for line in lines]])
"""
    folders = {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment() | folders)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[True, [1, 2, 3, 4, 5, 6, 7]]" in done.stdout.splitlines(), done.stdout


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="optional, not in tests/requirements.txt: passed by hand with 0.31.0")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_id = log_thrice("wandb", tmp_path)
    # The folder's name holds the second of the start and, from the second run of one second on, a count.
    runs = {path.stem for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")}
    assert runs == {f"run-{run_id}"}, "all parts are of one run"
