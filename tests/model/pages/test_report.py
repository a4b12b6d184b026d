"""The page about a run: its words, its curves, and how a real browser shows it."""

import base64
import hashlib
import json
import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.whole_file import is_locked
from model.pages.charts import MAX_POINTS, log_ticks, nice_ticks, smooth, thin, tick_label
from model.pages.report_page import build_charts
from model.report import collect_curves, command_to_resume, main, report_at_end, write_report
from model.run.options import build_parser
from model.run.samples_format import read_samples, write_samples
from model.training.checkpoint import find_newest, lock_output_dir, read_state
from tests.helpers.browser_helpers import needs_browser, seen_by_probe, show

NASTY = "a cat <script>document.title='taken'</script> \"'><img src=x onerror=\"document.title='taken'\"> &\x00"
PROBE = (Path(__file__).parent / "probe.js").read_text()


@pytest.fixture
def full_run(trained, tmp_path) -> Path:
    """A copy of `trained` with what a longer run has: validation, types, memory, samples, bad items."""
    folder = shutil.copytree(trained, tmp_path / "full")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"memory_gib": 61.25, "data_wait": 0.01, "data_wait_ms": 2.0, "step_ms": 200.0, "mfu": 0.41}
        line |= {"loss_by_type": {"captions": line["loss"] * 0.9, "<b>edits": line["loss"] * 1.1}, "new figure": 3}
        if line["step"] % 8 == 0:
            line |= {"val_loss": 5.0, "val_text_loss": 5.0, "val_image_loss": 5.0, "val_loss_by_type": {"captions": 5}}
            write_samples(folder, line["step"], [(NASTY, "plain", [Image.new("RGB", (64, 32), "red")])])
    write_lines(folder, lines)
    return write_lines(folder, [{"step": 3, "place": "7.pkl", "reason": NASTY}], "bad_items.jsonl")


def write_lines(folder: Path, lines, name: str = "metrics.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def line_at(step: int, **changes) -> dict:
    line = {"step": step, "epoch": step / 1000, "lr": 1e-5, "loss": 2 + 5 / step, "num_valid_tokens": 10}
    line |= {"grad_norm": 1.0, "tokens_per_s": 1000.0, "skipped_steps": 0, "bad_items": 0, "fill": 0.99}
    return line | changes


def look_at(browser, report: Path, width: int = 1400) -> dict:
    """What the probe sees of a report in a real browser; writes `probed.html` beside it."""
    probe_hash = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    probed = report.read_text().replace("script-src ", f"script-src 'sha256-{probe_hash}' ", 1)
    probed = probed.replace("<style>", f"<script>{PROBE}</script><style>", 1)
    (report.parent / "probed.html").write_text(probed)
    show(browser, report.parent / "probed.html", width)
    return json.loads(seen_by_probe(browser))


@pytest.mark.slow
@needs_browser
def test_a_browser_draws_the_page_of_a_real_run(browser, full_run):
    report = write_report(full_run)
    for width in (500, 1400):
        seen = look_at(browser, report, width)
        assert seen["wrong"] == [] and seen["other"] == [] and seen["overflow"] <= 0
        assert all(min(chart["size"]) > 150 for chart in seen["charts"])
    assert seen["title"] == "/".join(full_run.parts[-2:])
    assert seen["smoothed"] == [1, 0] and seen["tip"] == "none"
    assert seen["images"] == ["64x32"] * 3 and seen["prompts"] == [NASTY.replace("\x00", "\u2400")]

    charts = {chart["title"]: chart for chart in seen["charts"]}
    assert {"Loss", "Text and image", "Loss by type of data", "Learning rate", "Norm of the gradient"} <= set(charts)
    assert {"Speed", "MFU", "Memory", "Time of a step", "Waiting for data", "Filled", "new figure"} <= set(charts)
    for chart in charts.values():
        assert max(chart["paths"]) > 400 and len(chart["labels"]) >= 2, chart
        assert chart["tip"].startswith("step 24"), chart
        assert chart["cursor"] == "block" and all(len(shown) == 1 for shown in chart["scales"]), chart
    assert charts["Loss"]["scales"][1:] == [["scale linear"], ["scale log"]]
    assert "train" in charts["Loss"]["tip"] and "validation 5" in charts["Loss"]["tip"]
    assert "<b>edits" in charts["Loss by type of data"]["tip"] and "41.0%" in charts["MFU"]["tip"]

    for is_dark, colors in ((False, ("#f5f7f9", "#d06a00", "#2f6fde")), (True, ("#12181c", "#f5a04c", "#6ea3ff"))):
        show(browser, report, 1400, 2400, is_dark)
        browser.save_screenshot(full_run / "shot.png")
        shot = np.asarray(Image.open(full_run / "shot.png").convert("RGB"))
        for name, color in zip(("page", "text", "image"), colors, strict=True):
            drawn = (shot == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum()
            assert drawn > 300, f"{name} {color} is not on the page"


def test_what_a_finished_run_says(trained, tmp_path):
    written = (trained / "report.html").stat().st_mtime_ns
    assert main([str(trained), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    state = read_state(find_newest(trained)[0])
    assert '<span class="status finished">finished</span>' in text
    last = state.position.global_step
    assert f"step <b>{last}</b> of {last} · epoch <b>2.00</b> of 2" in text
    for value in (*state.versions.values(), state.data_fingerprint, "runs/first"):
        assert str(value) in text
    assert '<div class="changed" title="default: 2e-05"><dt>lr</dt><dd>0.01</dd></div>' in text
    assert "<div><dt>packing</dt><dd>no</dd></div>" in text
    assert "No step was skipped" in text and "The command of this run" in text
    assert (trained / "report.html").stat().st_mtime_ns == written, "the page goes to --out"
    words = shlex.split(command_to_resume(state).replace("\\\n", " "))
    assert words[:3] == ["python", "-u", "finetune_solver.py"]
    again = vars(build_parser().parse_args(words[3:]))
    assert {name: str(again[name]) for name in again} == {name: str(value) for name, value in state.options.items()}


def test_thinning_keeps_spikes_gaps_and_ends():
    values = np.random.default_rng(0).normal(size=100_000)
    values[[54_321, 12_345]] = 1e6, -1e6
    kept = thin(values)
    assert len(kept) <= MAX_POINTS and (np.diff(kept) > 0).all() and {0, 12_345, 54_321, 99_999} <= set(kept.tolist())
    values[20_000] = values[30_000:40_000] = np.nan
    gaps = [index for index in thin(values).tolist() if np.isnan(values[index])]
    assert gaps[0] == 20_000 and 40 <= len(gaps) < 60


def test_smoothing_is_a_mean_taken_twice():
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    values[[7, 200]] = np.nan
    half = max(len(values) // 30 // 4, 1)

    def plain(old: np.ndarray) -> np.ndarray:
        windows = [old[i - min(i, half) : min(i + min(i, half), len(old) - 1) + 1] for i in range(len(old))]
        return np.array([np.nan if np.isnan(v) else np.nanmean(w) for v, w in zip(old, windows, strict=True)])

    np.testing.assert_allclose(smooth(values), plain(plain(values)), rtol=1e-12)
    assert smooth(values)[0] == values[0] and np.isnan(smooth(np.full(50, np.nan))).all()


@pytest.mark.parametrize(
    "make_ticks, low, high",
    [
        *((partial(nice_ticks, about=5), *ends) for ends in [(0, 1120), (2.31, 2.34), (-5, 12), (0, 3e-5), (0, 2e9)]),
        *((log_ticks, *ends) for ends in [(0.03, 8), (2.1, 2.9), (1e-9, 1e9), (1, 1.001)]),
    ],
)
def test_ticks_are_few_round_and_inside(make_ticks, low, high):
    ticks = make_ticks(low, high)
    assert 2 <= len(ticks) <= 7 and ticks == sorted(ticks)
    assert low - abs(low) / 100 <= ticks[0] and ticks[-1] <= high * 1.01
    assert len({tick_label(tick) for tick in ticks}) == len(ticks), "labels tell the ticks apart"
    assert all(len(tick_label(tick)) <= 7 for tick in ticks)


def test_labels_are_short():
    labels = {20_000: "20k", 1_500_000: "1.5M", 2e-5: "2e-5", 1_500: "1,500", 2e9: "2G", 1e30: "1e30", 0.3: "0.3"}
    assert {value: tick_label(value) for value in labels} == labels and tick_label(0.415, is_share=True) == "41.5%"


def test_a_null_breaks_the_curve_and_is_reported(tmp_path):
    lines = [line_at(step) for step in range(1, 11)]
    lines[4]["loss"] = None
    lines[7] |= {"loss": None, "num_valid_tokens": 0}
    validation = [{"step": 5, "epoch": 0.1, "val_loss": 3.0}, {"step": 9, "epoch": 0.1, "val_loss": None}]
    text = write_report(write_lines(tmp_path, lines + validation)).read_text()
    curve = re.search(r'<path class="line c-train" d="([^"]*)"', text)[1]
    points = [1 + part.count("L") for part in curve.split("M")[1:]]
    assert points == [4, 2, 2], "broken at 5 and at 8"
    assert "The loss was not finite in 1 log line at step 5." in text
    assert "The validation loss was not finite in 1 log line at step 9." in text


def test_warnings_count_skipped_steps_and_bad_items(tmp_path):
    folder = write_lines(tmp_path, [line_at(1), line_at(10, skipped_steps=2, bad_items=1), line_at(20, bad_items=1)])
    # Steps that were noted twice, or after the last step, do not count.
    write_lines(tmp_path, [{"step": step, "items": ["7.pkl"]} for step in (4, 5, 5, 70)], "bad_steps.jsonl")
    write_lines(tmp_path, [{"step": 2, "place": "3.pkl", "reason": NASTY}], "bad_items.jsonl")
    text = write_report(folder).read_text()
    assert "2 steps were skipped" in text and "(step 4, 5)" in text and "1 item could not be read and was" in text
    assert NASTY.split(" ")[2] not in text and "onerror=&#34;" in text
    assert text.lower().count("<script") == 2 and "<img" not in text


def test_many_lines_give_a_page_of_a_sane_size(tmp_path):
    noise = np.random.default_rng(0).normal(size=(3_000, 2)).tolist()
    lines = (line_at(10 * i, loss=2 + a / 10, image_loss=4 + b / 10) for i, (a, b) in enumerate(noise, 1))
    out = write_report(write_lines(tmp_path, lines))
    assert out.stat().st_size < 1_000_000
    longest = max(len(re.findall("[ML]", d)) for d in re.findall(r'class="line[^"]*" d="([^"]*)"', out.read_text()))
    assert MAX_POINTS * 0.9 < longest <= MAX_POINTS


def test_young_runs_have_a_page(tmp_path):
    for lines, said in (([], "Nothing was logged yet"), ([line_at(1)], "step <b>1</b>")):
        text = write_report(write_lines(tmp_path, lines)).read_text()
        assert said in text and ("<svg" in text) == bool(lines)


def test_steps_that_go_back_are_drawn_in_order():
    (steps, _), *others = collect_curves([line_at(step) for step in (1, 9, 3, 4, 2, 10, 5, 5)]).values()
    assert steps.tolist() == [1, 2, 3, 4, 5, 5, 9, 10] and all((steps == other).all() for other, _ in others)


def test_damaged_lines_and_samples_leave_a_page_that_names_them(tmp_path):
    folder = write_lines(tmp_path, [line_at(step) for step in range(1, 6)])
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'\0\0\0\n\xff\xfe\n{"step": true}\n{"step": -3}\n')
        file.write(b'{"step": 6, "epoch": 1e99}\n{"step": 7, "epoch": null}\n')
        file.write((json.dumps(line_at(7)) + "\n").encode() + b'{"step": 8, "lo')
    strange = [{"step": 2, "place": ["a", {}], "reason": {"b": 1}}, {"step": 3, "place": None}]
    (folder / "bad_items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in strange) + "{\n")
    (folder / "bad_steps.jsonl").write_text('{"step": 2, "items": 3}\n{"step": 3}\n')
    (write_samples(folder, 2, [("a", "b", [])]) / "samples.json").write_text("[{}]")
    text = write_report(folder).read_text()
    assert "step <b>7</b>" in text and "samples are not shown" in text and "samples.json cannot be read" in text
    assert "4 lines of metrics.jsonl cannot be read: 6, 7, 8, 9." in text
    assert "1 line of bad_items.jsonl cannot be read: 3." in text and "2 items could not be read" in text


@pytest.mark.parametrize(
    ("folder", "flags", "reason"),
    [
        ("run", ["--out", "gone/page.html"], "No such file or directory: 'gone/page.html"),
        ("run", ["--out", "."], "is a folder"),
        (".", [], "is no output folder of a run"),
        ("none", [], "there is no folder"),
    ],
)
def test_what_cannot_be_is_one_clear_error(tmp_path, monkeypatch, capsys, folder, flags, reason):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "run", [line_at(1)])
    assert main([folder, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("report.py: ") and error.count("\n") == 1 and reason in error
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "metrics.jsonl"]


def test_a_page_that_fails_at_the_end_is_a_line_and_no_error(tmp_path):
    folder = write_lines(tmp_path / "run", [line_at(1)])
    assert report_at_end(folder) == f"{folder / 'report.html'} shows this run"
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    said = report_at_end(folder)
    assert said.startswith("no report.html: IsADirectoryError") and "\n" not in said
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "report.html"]


def test_a_running_run_is_known_by_its_lock(tmp_path):
    folder = write_lines(tmp_path / "run", [line_at(1), line_at(2)])
    with lock_output_dir(folder):
        assert main([str(folder)]) == 0 and is_locked(folder / ".lock"), "the run must keep its lock"
        assert '<span class="status running">' in (folder / "report.html").read_text()
    assert main([str(folder)]) == 0
    assert '<span class="status stopped">' in (folder / "report.html").read_text()


def test_every_number_becomes_a_curve_and_empty_ones_none():
    steps, ones, nothing = np.arange(3), np.ones(3), np.full(3, np.nan)
    keys = ("loss", "val_loss", "loss_by_type/a", "loss_by_type/b", "my_figure", "memory_gib", "data_wait")
    curves = {key: (steps, ones) for key in keys} | {"mfu": (steps, nothing), "skipped_steps": (steps, 0 * ones)}
    main_charts, more = build_charts(curves | {"epoch": (steps, ones)})
    names = {chart.title: [one.name for one in chart.series] for chart in (*main_charts, *more)}
    expected = {"Loss": ["train", "validation"], "Loss by type of data": ["a", "b"], "Memory": ["memory"]}
    assert names == expected | {"Waiting for data": ["data wait"], "my_figure": ["my_figure"]}


def test_text_and_image_have_one_colour_each():
    keys = ("text_loss", "image_loss", "val_text_loss", "val_image_loss")
    (chart,), _ = build_charts({key: (np.arange(3), np.ones(3)) for key in keys})
    assert [one.color for one in chart.series] == ["c-text", "c-image", "c-text", "c-image"]
    assert [one.style for one in chart.series] == ["noisy", "noisy", "sparse", "sparse"]


def test_samples_come_back_as_they_were_written(tmp_path):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 64, 3), np.uint8)) for _ in range(2)]
    write_samples(tmp_path, 20, [("two", "", images), (NASTY, "words\n", [])])
    write_samples(tmp_path, 5, [("old", "x", images)])
    # A resumed run comes by this step once more.
    write_samples(tmp_path, 5, [("two", "y", images[:1])])
    found = {one.step: [(s.prompt, s.text, len(s.image_paths)) for s in one.samples] for one in read_samples(tmp_path)}
    assert found == {5: [("two", "y", 1)], 20: [("two", "", 2), (NASTY, "words\n", 0)]} and list(found) == [5, 20]
    for path, image in zip(read_samples(tmp_path)[1].samples[0].image_paths, images, strict=True):
        assert Image.open(path).tobytes() == image.tobytes()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step00000005", "step00000020"]


@pytest.mark.parametrize(
    ("key", "name"), [("files", "../../secret.png"), ("given", "gone.png"), ("given", "/etc/hostname")]
)
def test_samples_name_only_files_of_their_folder(tmp_path, name, key):
    (tmp_path / "secret.png").touch()
    folder = write_samples(tmp_path, 1, [("a", "b", [])])
    (folder / "samples.json").write_text(json.dumps([{"prompt": "a", "text": "b", "files": [], key: [name]}]))
    with pytest.raises(ValueError, match="holds no such file"):
        read_samples(tmp_path)


def test_images_of_a_prompt_stand_beside_its_words(tmp_path):
    """Images tell two prompts of the same words apart; samples of before images were kept are shown too."""
    folder, colors = write_lines(tmp_path, [line_at(2)]), ("red", "blue")
    given = {number: [Image.new("RGB", (8, 4), color)] for number, color in enumerate(colors)}
    write_samples(folder, 2, [("<|image|>Describe it.", f"it is {color}", []) for color in colors], given)
    samples = read_samples(folder)[0].samples
    assert [Image.open(one.given_paths[0]).getpixel((0, 0)) for one in samples] == [(255, 0, 0), (0, 0, 255)]
    asked = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', write_report(folder).read_text())
    words = {re.sub('src="[^"]*"', "", question) for question, _ in asked}
    assert words == {'<img class="pixelated" alt="" title="8 × 4 pixels" >Describe it.'}
    assert asked[0][0] != asked[1][0] and [answer for _, answer in asked] == ["<p>it is red</p>", "<p>it is blue</p>"]
    path = folder / "samples" / "step00000002" / "samples.json"
    path.write_text(json.dumps([{"prompt": "<|image|>Describe it.", "text": "it is red", "files": []}]))
    assert '<th scope="row">&lt;|image|&gt;Describe it.</th>' in write_report(folder).read_text()


def test_the_losses_on_top_are_the_ends_of_the_drawn_curves(tmp_path):
    """The end of the smoothed curve, where there is one; none if the last loss is not finite."""

    def tiles(num_lines: int, **last) -> list[str]:
        lines = [line_at(step, loss=2.0 + 0.5 * (-1) ** step) for step in range(1, num_lines + 1)]
        lines[-1] |= last
        lines.append({"step": num_lines, "epoch": 1.0, "val_loss": 2.25})
        text = write_report(write_lines(tmp_path / str(num_lines), lines)).read_text()
        return re.findall(r'<div class="tile c-\w+"><b>(.*?)</b><span>(.*?)</span>', text)

    assert tiles(20) == [("2.5", "loss, last"), ("2.25", "validation loss, last")]
    assert tiles(40, loss=None)[0] == ("none", "loss, last")
    (value, how), validation = tiles(600)
    assert how == "loss, smoothed" and 1.9 < float(value) < 2.1 and validation == ("2.25", "validation loss, last")


def test_many_validations_and_samples_are_thinned(tmp_path):
    folder = write_lines(tmp_path, [{"step": step, "epoch": 0.1, "val_loss": 2.0} for step in range(1, 62)])
    for step in range(1, 31):
        write_samples(folder, step, [("a", f"answer {step}", [])])
    text = write_report(folder).read_text()
    assert set(re.findall(r'<path class="(dots[^"]*) c-val"', text)) == {"dots many"}
    columns = [int(step) for step in re.findall(r"<th>step (\d+)</th>", text)]
    assert len(columns) == 8 and columns[0] == 1 and columns[-1] == 30 and columns == sorted(columns)
    assert "22 of 30 steps" in text
