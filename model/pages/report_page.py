"""The figures, charts and samples of the page about a run; `model/report.py` says the rest and calls this."""

import base64
import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from data.items.vocab import IMAGE_SYMBOL
from data.messages import one_line
from model.pages.assets import PAGES_DIR, render
from model.pages.charts import MIN_TO_SMOOTH, Chart, Series, draw_curves, smooth
from model.run.samples_format import SampleStep

# Columns of samples; more are thinned evenly, the first and the last stay.
MAX_SAMPLE_STEPS = 8
MAX_PROMPTS = 24
# Longer side of an embedded image in pixels, and the side up to which an image is shown enlarged, pixel by pixel.
MAX_SIDE, PIXELATED_BELOW = 320, 160
NUM_TYPE_COLORS = 6
# The ends of more epochs are not marked.
MAX_EPOCH_MARKS = 12

# Steps int64 [n], values float64 [n] with NaN for null.
Curve = tuple[np.ndarray, np.ndarray]

_NATS = "nats per target"
_LOSS = {"from_zero": False, "can_log": True}
BY_TYPE = r"(val_)?\w*loss\w*/.+"
# By a pattern that matches the whole keys of metrics.jsonl.
CHARTS = {
    r"(val_)?loss": Chart("Loss", f"{_NATS}, mean over all targets", is_wide=True, **_LOSS),
    r"(val_)?(text|image)_loss": Chart("Text and image", _NATS, **_LOSS),
    BY_TYPE: Chart("Loss by type of data", _NATS, **_LOSS),
    r"lr": Chart("Learning rate", "", is_exact=True),
    r"grad_norm": Chart("Norm of the gradient", "before clipping", can_log=True),
    r"tokens_per_s": Chart("Speed", "tokens per second, all ranks"),
    r"mfu": Chart("MFU", "share of the devices' peak FLOP/s", is_share=True),
    r"\w*(memory\w*|_gib)": Chart("Memory", "GiB", is_exact=True),
    r"step_ms|\w*wait\w*_ms": Chart("Time of a step", "milliseconds"),
    r"data_wait": Chart("Waiting for data", "share of the time", is_share=True),
    r"fill": Chart("Filled", "share of row positions with tokens", is_share=True, is_exact=True),
}
# By the end of a key.
UNITS = {"ms": "milliseconds", "s": "seconds", "gib": "GiB", "share": "share"}
LOSS_TILES = {"loss": "c-train", "val_loss": "c-val", "text_loss": "c-text", "image_loss": "c-image"}
# No chart of only zeros.
ONLY_IF_ANY = ("skipped_steps", "bad_items")


def build_page(curves: Mapping[str, Curve], last_step: int, samples: Sequence[SampleStep], **said: object) -> str:
    """The whole page. `said`: the other values of the template `run.html`."""
    ends = _epoch_ends(curves.get("epoch"))
    charts, more_charts = (
        [draw_curves(chart, max(last_step, 1), ends, "optimizer step") for chart in some]
        for some in build_charts(curves)
    )
    script = (PAGES_DIR / "run.js").read_text()
    return render(
        "run.html",
        tiles=_tiles(curves),
        charts=charts,
        more_charts=more_charts,
        samples=_sample_table(samples) if samples else None,
        embed_image=_embed_image,
        image_symbol=IMAGE_SYMBOL,
        hover={"charts": [chart["hover"] for chart in charts + more_charts]},
        script=Markup(script),
        # The page's policy allows this script alone.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **said,
    )


def build_charts(curves: Mapping[str, Curve]) -> tuple[list[Chart], list[Chart]]:
    """The charts of CHARTS, and one for each other curve."""
    shown = {key: curve for key, curve in curves.items() if key not in ("epoch", "step")}
    shown = {key: curve for key, curve in shown.items() if not np.isnan(curve[1]).all()}
    main, taken = [], set()
    for pattern, chart in CHARTS.items():
        keys = [key for key in shown if key not in taken and re.fullmatch(pattern, key)]
        taken.update(keys)
        # One type alone would be the loss once more.
        if keys and not (pattern == BY_TYPE and len({key.removeprefix("val_") for key in keys}) == 1):
            main.append(_with_series(chart, pattern == BY_TYPE, {key: shown[key] for key in keys}))
    unit_of = {key: UNITS.get(re.split(r"[_/]", key)[-1], "") for key in shown}
    more = [
        Chart(key, unit_of[key], (Series(key, "c-train", *curve, _style(key)),), can_log=True)
        for key, curve in shown.items()
        if key not in taken and not (key in ONLY_IF_ANY and not np.nansum(curve[1]))
    ]
    return main, more


def _with_series(chart: Chart, is_by_type: bool, curves: Mapping[str, Curve]) -> Chart:
    parts = list(dict.fromkeys(_part_name(key) for key in curves))
    if is_by_type:
        # A type keeps its colour, whatever is logged first.
        color_of = {part: f"c-{index % NUM_TYPE_COLORS}" for index, part in enumerate(sorted(parts))}
    else:
        color_of = {part: f"c-{index % NUM_TYPE_COLORS}" for index, part in enumerate(parts[1:])}
        # Text and image have one colour each everywhere.
        color_of |= {parts[0]: "c-train"} | {"text": "c-text", "image": "c-image"}
    series = []
    for key, curve in curves.items():
        part, is_validation = _part_name(key), key.startswith("val_")
        name = part if part != "loss" else "" if is_validation else "train"
        color = "c-val" if key == "val_loss" else color_of[part]
        name = f"validation {name}".strip() if is_validation else name
        series.append(Series(name, color, *curve, _style(key, chart.is_exact)))
    # A share may be logged as 0 to 1 or in percent.
    is_share = chart.is_share and all(np.nanmax(values) <= 1.5 for _, values in curves.values())
    return dataclasses.replace(chart, series=tuple(series), is_share=is_share)


def _style(key: str, is_exact: bool = False) -> str:
    return "sparse" if key.startswith("val_") else "exact" if is_exact else "noisy"


def _part_name(key: str) -> str:
    """`val_text_loss` becomes "text", `loss_by_type/edit` "edit", `step_ms` "step"."""
    return re.sub(r"^\w*loss\w*/|_loss$|_(ms|gib|s)$", "", key.removeprefix("val_")).replace("_", " ")


def _epoch_ends(epochs: Curve | None) -> list[int]:
    """The steps after which epochs ended; empty if there are too many to mark."""
    if epochs is None:
        return []
    steps, values = (part[~np.isnan(epochs[1])] for part in epochs)
    if not len(values) or values[-1] >= MAX_EPOCH_MARKS + 1:
        return []
    return np.interp(np.arange(1, int(values[-1]) + 1), values, steps).round().astype(int).tolist()


def _tiles(curves: Mapping[str, Curve]) -> list[tuple[str, str, str]]:
    """(name, value, color) of the key figures of the curves."""
    there = {key: values[~np.isnan(values)] for key, (_, values) in curves.items()}
    there = {key: values for key, values in there.items() if len(values)}
    found = []
    for key, color in LOSS_TILES.items():
        name = key.replace("val_", "validation ").replace("_", " ")
        if key in ("loss", "val_loss") and key in curves and np.isnan(curves[key][1][-1]):
            # An earlier loss would hide that the last one was lost.
            found.append((f"{name}, last", "none", color))
        elif key in there:
            is_smoothed = _style(key) == "noisy" and len(curves[key][1]) >= MIN_TO_SMOOTH
            values = smooth(curves[key][1]) if is_smoothed else there[key]
            how = "smoothed" if is_smoothed else "last"
            found.append((f"{name}, {how}", f"{values[~np.isnan(values)][-1]:.4g}", color))
    if "tokens_per_s" in there:
        found.append(("tokens/s, median", f"{np.median(there['tokens_per_s']):,.0f}", ""))
    if "mfu" in there:
        middle = np.median(there["mfu"])
        found.append(("MFU, median", f"{middle:.1%}" if middle <= 1.5 else f"{middle:,.0f}", ""))
    if memory := [values.max() for key, values in there.items() if key.endswith("_gib") and values.any()]:
        found.append(("GiB of memory, most", f"{max(memory):.1f}", ""))
    if "step_ms" in curves:
        steps, milliseconds = curves["step_ms"]
        found.append(("in training steps", _duration(np.nansum(milliseconds * np.diff(steps, prepend=0)) / 1e3), ""))
    return found


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(float(seconds)), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60:02d} m"
    return f"{minutes} m {seconds:02d} s" if minutes else f"{seconds} s"


def _sample_table(steps: Sequence[SampleStep]) -> dict[str, Any]:
    """A row per prompt, a column per step; the newest prompts come first."""
    index = np.unique(np.linspace(0, len(steps) - 1, MAX_SAMPLE_STEPS).round().astype(int)).tolist()
    columns = [steps[i] for i in index]
    by_prompt = []
    for column in columns:
        # A prompt may be asked twice.
        count = Counter()
        by_prompt.append({})
        for sample in column.samples:
            by_prompt[-1][sample.prompt, count[sample.prompt]] = sample
            count[sample.prompt] += 1
    keys = list(dict.fromkeys(key for cells in reversed(by_prompt) for key in cells))
    # The prompt is shown as the newest step asked it.
    asked = {key: sample for cells in by_prompt for key, sample in cells.items()}
    hidden = [f"{len(steps) - len(columns)} of {len(steps)} steps"] if len(columns) < len(steps) else []
    hidden += [f"{len(keys) - MAX_PROMPTS} of {len(keys)} prompts"] if len(keys) > MAX_PROMPTS else []
    rows = [(asked[key], [cells.get(key) for cells in by_prompt]) for key in keys[:MAX_PROMPTS]]
    return {"steps": [column.step for column in columns], "rows": rows, "hidden": hidden}


def _embed_image(path: Path) -> dict[str, Any]:
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    # Pillow raises SyntaxError, ValueError and its own errors for damaged files, too.
    except Exception as error:
        return {"error": one_line(error)}
    size, is_small = "{} × {}".format(*image.size), max(image.size) <= PIXELATED_BELOW
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return {"error": None, "size": size, "is_small": is_small, "image": image}
