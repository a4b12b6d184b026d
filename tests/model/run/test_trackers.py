"""Trackers: TensorBoard's files are read back, also of a resumed run; a stand-in records the steps of the others."""

import shutil

import pytest
from PIL import Image

from model.run import trackers as trackers_module
from model.run.trackers import RUN_ID_NAME, TENSORBOARD_DIR, TrackerOptions, Trackers, open_run
from tests.helpers.small_run import call_main, read_lines, solver_args


def curves(output_dir):
    """TensorBoard's events, and per figure the (step, value) of its curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output_dir / TENSORBOARD_DIR), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events, {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


FIGURES = {
    *("step", "epoch", "lr", "loss", "ce", "z_loss", "text_loss", "image_loss", "num_valid_tokens", "grad_norm"),
    *("tokens_per_s", "mfu", "step_ms", "data_wait_ms", "data_wait", "memory_gib", "memory_reserved_gib", "fill"),
    *("skipped_steps", "bad_items", "loss_by_type"),
}


def test_metrics_and_tensorboard_have_every_figure_of_every_step_of_a_resumed_run(two_types, tmp_path):
    """Step 5 is logged, the last checkpoint is of step 3: no step is missing, none is there twice."""
    out = tmp_path / "out"
    changes = {"save_iteration_interval": 3, "log_with": "tensorboard"}
    assert call_main(solver_args(two_types, out, max_steps=5, **changes)) == (0, "")
    shutil.rmtree(out / "epoch0-iter5")
    assert call_main(solver_args(two_types, out, max_steps=7, **changes)) == (0, "")
    lines, (_, found) = read_lines(out), curves(out)
    assert [line["step"] for line in lines] == list(range(1, 8))
    for line in lines:
        assert line.keys() == FIGURES and line["mfu"] is None, "the peak of a CPU is not known"
        assert 0.05 < line["memory_gib"] < 50 and 0 < line["fill"] <= 1
        assert 0 <= line["data_wait"] < 1 and 0 < line["data_wait_ms"] < line["step_ms"]
        ((kind, loss),) = line["loss_by_type"].items()
        assert loss == pytest.approx(line["loss"]), "all rows of a step are of one type"
        assert (line["image_loss"] is None) == (kind == "text")
    for key in FIGURES - {"step", "mfu", "loss_by_type"}:
        expected = [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines if line[key] is not None]
        assert found[key] == expected, key
    for kind in ("text", "images"):
        by_type = [(line["step"], line["loss_by_type"][kind]) for line in lines if kind in line["loss_by_type"]]
        assert found[f"loss_by_type/{kind}"] == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in by_type]
    assert "step" not in found and "mfu" not in found


def test_images_reach_tensorboard(tmp_path):
    trackers = Trackers(TrackerOptions("tensorboard"), tmp_path, 0, {}, print)
    trackers.log_images(7, {"samples/0": Image.new("RGB", (8, 4), "red"), "samples/1": Image.new("L", (2, 2))})
    trackers.close()
    events, _ = curves(tmp_path)
    assert events.Tags()["images"] == ["samples/0", "samples/1"]
    (image,) = events.Images("samples/0")
    assert (image.step, image.width, image.height) == (7, 8, 4)


def test_a_tracker_that_fails_is_reported_once_and_switched_off(tmp_path):
    """At the start: a file has the name of TensorBoard's folder. Later: what is sent is no image."""
    lines = []
    (tmp_path / TENSORBOARD_DIR).write_text("not a folder")
    for folder in (tmp_path, tmp_path / "other"):
        folder.mkdir(exist_ok=True)
        trackers = Trackers(TrackerOptions("tensorboard"), folder, 0, {}, lines.append)
        trackers.log_images(1, {"samples/0": "no image"})
        trackers.log(2, {"loss": 1.0})
        trackers.close()
    assert len(lines) == 2 and "AttributeError" in lines[1]
    assert all(line.startswith("--log_with tensorboard is off from here on: ") for line in lines)
    assert all(line.endswith("metrics.jsonl continues") for line in lines)


def test_a_resumed_run_continues_under_its_id(tmp_path, monkeypatch):
    """The file of an older version has more than the id."""
    starts, sent = [], []

    class Recorder:
        def __init__(self, project: str, **settings: object) -> None:
            starts.append((project, settings["id"], settings["resume"]))

        def start(self) -> None: ...

        def finish(self) -> None: ...

        def log(self, figures: dict[str, float], step: int) -> None:
            sent.append((step, figures))

    from accelerate import tracking

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    line = {"step": 1, "loss": 1.5, "mfu": None, "note": "x", "loss_by_type": {"a": 1.0, "b": None}}
    # After a kill steps come again, after two kills metrics.jsonl does not know it.
    for last_step, steps in ((0, [1]), (2, [1, 2, 3]), (0, [2, 3])):
        trackers = Trackers(TrackerOptions("wandb", "a_project"), tmp_path, 0, {}, pytest.fail, last_step)
        for step in steps:
            trackers.log(step, line)
        trackers.close()
    run_id, _ = (tmp_path / RUN_ID_NAME).read_text().split()
    assert len(run_id) == 8 and starts == [("a_project", run_id, "allow")] * 3
    assert sent == [(step, {"loss": 1.5, "loss_by_type/a": 1.0}) for step in (1, 3, 3)]
    (tmp_path / RUN_ID_NAME).write_text("0a1b2c3d\n5\n")
    assert open_run(tmp_path, 3) == ("0a1b2c3d", 5)


def test_unknown_and_missing_trackers_are_problems(monkeypatch):
    monkeypatch.setattr(trackers_module.importlib.util, "find_spec", lambda name: None)
    assert TrackerOptions("tensorbord, wandb,wandb").problems() == [
        "--log_with knows tensorboard, wandb, trackio, got 'tensorbord'",
        "--log_with wandb needs a package that is missing: pip install wandb",
    ]
