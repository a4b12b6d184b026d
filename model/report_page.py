"""How the page about a run looks: one HTML file with its style, its script and its pictures, nothing from outside.

model/report.py fills a `RunPage`; model/charts.py draws the curves. The page works without its script, which only adds
what hovering shows, the linear and log scales, and the switch between raw and smoothed curves.
"""

import base64
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.html_page import data_uri, escape
from data.vocab import IMAGE_SYMBOL
from model.charts import MIN_TO_SMOOTH, Chart, Series, chart_html, hover_data, smooth
from model.report_assets import PAGE, SCRIPT, STYLE
from model.samples_format import Sample, SampleStep

MAX_SAMPLE_STEPS = 8  # columns; more are thinned evenly, the first and the last stay
MAX_PROMPTS = 24
MAX_LISTED = 50  # lines of bad_items.jsonl and bad_steps.jsonl, the newest
MAX_SIDE = 320  # pixels of the longer side of an embedded picture
PIXELATED_BELOW = 160  # sides up to here are shown enlarged, pixel by pixel
NUM_TYPE_COLORS = 6
MAX_EPOCHS = 100_000  # more are damage, and their ends not looked for
STATUS_TEXTS = {"finished": "finished", "running": "running", "stopped": "stopped before its end", "empty": "not begun"}

Curve = tuple[np.ndarray, np.ndarray]  # steps int64 [n], values float64 [n] with nan for null


@dataclass(frozen=True)
class RunPage:
    """What the page says. `status`: a key of STATUS_TEXTS; `options`: by group, (name, value, default if another)."""

    name: str
    status: str
    last_step: int
    num_steps: int | None
    epoch: float | None
    num_epochs: int | None
    written_at: float | None
    curves: Mapping[str, Curve]
    warnings: Sequence[str]
    left_out: Sequence[str]
    skipped: Sequence[str]
    samples: Sequence[SampleStep]
    options: Mapping[str, Sequence[tuple[str, str, str | None]]]
    facts: Mapping[str, str]
    command: str | None


@dataclass(frozen=True)
class ChartKind:
    """A chart and the keys of `metrics.jsonl` that belong to it, as a pattern that must match the whole key."""

    title: str
    unit: str
    keys: str
    is_share: bool = False
    from_zero: bool = True
    can_log: bool = False
    is_wide: bool = False
    is_exact: bool = False  # not smoothed


_NATS = "nats per target"
_LOSS = {"from_zero": False, "can_log": True}
BY_TYPE = ChartKind("Loss by type of data", _NATS, r"(val_)?\w*loss\w*/.+", **_LOSS)
KINDS = (
    ChartKind("Loss", f"{_NATS}, mean over all targets", r"(val_)?loss", is_wide=True, **_LOSS),
    ChartKind("Text and image", _NATS, r"(val_)?(text|image)_loss", **_LOSS),
    BY_TYPE,
    ChartKind("Learning rate", "", r"lr", is_exact=True),
    ChartKind("Norm of the gradient", "before clipping", r"grad_norm", can_log=True),
    ChartKind("Speed", "tokens per second, all ranks", r"tokens_per_s"),
    ChartKind("MFU", "share of the devices' peak FLOP/s", r"mfu", is_share=True),
    ChartKind("Memory", "GiB", r"\w*(memory\w*|_gib)", is_exact=True),
    ChartKind("Time of a step", "milliseconds", r"step_ms|\w*wait\w*_ms"),
    ChartKind("Waiting for data", "share of the time", r"data_wait", is_share=True),
    ChartKind("Filled", "share of row positions with tokens", r"fill", is_share=True, is_exact=True),
)
UNITS = {"ms": "milliseconds", "s": "seconds", "gib": "GiB", "share": "share"}  # by the end of a key
ONLY_IF_ANY = ("skipped_steps", "bad_items")  # all zeros are no picture


def build_page(page: RunPage) -> str:
    """The whole page."""
    main_charts, more_charts = build_charts(page.curves)
    last_step = max(page.last_step, 1)
    ends = _epoch_ends(page.curves.get("epoch"))
    drawn, more = ("".join(chart_html(c, last_step, ends) for c in charts) for charts in (main_charts, more_charts))
    hover = {"charts": [hover_data(chart, last_step) for chart in (*main_charts, *more_charts)]}
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return PAGE.format(
        title=escape(page.name),
        script_hash=script_hash,
        style=STYLE,
        script=SCRIPT,
        head=_head(page),
        notes=_notes(page),
        tiles=_tiles(page.curves),
        charts=f'<div class="cards">{drawn}</div>' if drawn else "",
        controls=_CONTROLS if drawn else "",
        more=f'<details><summary>More figures</summary><div class="cards">{more}</div></details>' if more else "",
        samples=_samples(page.samples),
        bad=_listing("Items left out", page.left_out) + _listing("Skipped steps and their items", page.skipped),
        options=_options(page.options),
        facts=_facts(page.facts),
        command=_command(page.command, page.status),
        # A "<" could end the element that holds the data.
        data=json.dumps(hover, allow_nan=False).replace("<", "\\u003c"),
    )


def build_charts(curves: Mapping[str, Curve]) -> tuple[list[Chart], list[Chart]]:
    """The charts of the curves that are there: those that everybody looks at, and the rest."""
    shown = {key: curve for key, curve in curves.items() if key != "epoch" and not np.isnan(curve[1]).all()}
    main, taken = [], set()
    for kind in KINDS:
        keys = [key for key in shown if key not in taken and re.fullmatch(kind.keys, key)]
        taken.update(keys)
        if kind is BY_TYPE and len({key.removeprefix("val_") for key in keys}) == 1:
            continue  # the loss once more
        if keys:
            main.append(_chart(kind, {key: shown[key] for key in keys}))
    more = [
        Chart(key, _unit(key), (Series(key, "c-train", *curve, _style(key)),), can_log=True)
        for key, curve in shown.items()
        if key not in taken and not (key in ONLY_IF_ANY and not np.nansum(curve[1]))
    ]
    return main, more


def option_text(value: object) -> str:
    """An option's value as the page shows it; equal texts are equal values."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)


def _chart(kind: ChartKind, curves: Mapping[str, Curve]) -> Chart:
    names = {key: _series_name(key) for key in curves}
    parts = list(dict.fromkeys(name.removeprefix("validation ") for name in names.values()))
    if kind is BY_TYPE:
        parts.sort()  # a type keeps its colour, whatever comes first
    colors = {key: _color(kind, key, parts.index(name.removeprefix("validation "))) for key, name in names.items()}
    series = tuple(Series(name, colors[key], *curves[key], _style(key, kind.is_exact)) for key, name in names.items())
    # A share may be logged as 0 to 1 or in percent.
    is_share = kind.is_share and all(np.nanmax(values) <= 1.5 for _, values in curves.values())
    unit = kind.unit or _unit(next(iter(curves)))
    return Chart(
        kind.title, unit, series, is_share, kind.from_zero, kind.can_log, kind.is_wide, marks_name="validation"
    )


def _style(key: str, is_exact: bool = False) -> str:
    return "sparse" if key.startswith("val_") else "exact" if is_exact else "noisy"


def _series_name(key: str) -> str:
    """`val_text_loss` becomes "validation text", `loss_by_type/edit` "edit", `loss` "train", `step_ms` "step"."""
    is_validation, name = key.startswith("val_"), key.removeprefix("val_")
    name = re.sub(r"^\w*loss\w*/|_loss$|_(ms|gib|s)$", "", name).replace("_", " ")
    if name == "loss":
        return "validation" if is_validation else "train"
    return f"validation {name}" if is_validation else name


def _color(kind: ChartKind, key: str, index: int) -> str:
    """The class of the colour of the `index`-th part of a chart; text and image have their own everywhere."""
    name = key.removeprefix("val_")
    if name in ("text_loss", "image_loss"):
        return f"c-{name.removesuffix('_loss')}"
    if key == "val_loss":
        return "c-val"
    if kind is BY_TYPE:
        return f"c-{index % NUM_TYPE_COLORS}"
    return f"c-{(index - 1) % NUM_TYPE_COLORS}" if index else "c-train"


def _unit(key: str) -> str:
    return UNITS.get(re.split(r"[_/]", key)[-1], "")


def _epoch_ends(epochs: Curve | None) -> list[int]:
    """The steps after which epochs ended."""
    if epochs is None:
        return []
    steps, values = (part[~np.isnan(epochs[1])] for part in epochs)
    if not len(values) or values[-1] > MAX_EPOCHS:
        return []
    return np.interp(np.arange(1, int(values[-1]) + 1), values, steps).round().astype(int).tolist()


def _head(page: RunPage) -> str:
    whole = page.num_steps or (page.last_step if page.status == "finished" else None)
    share = min(page.last_step / whole, 1) if whole else 0
    done = f"step <b>{page.last_step:,}</b>" + (f" of {whole:,}" if whole else "")
    if page.epoch is not None and np.isfinite(page.epoch):
        done += f" · epoch <b>{page.epoch:.2f}</b>" + (f" of {page.num_epochs}" if page.num_epochs else "")
    written = f"last line {_moment(page.written_at)}" if page.written_at else "no line of metrics yet"
    return (
        f'<div class="title"><h1>{escape(page.name)}</h1><span class="status {page.status}">'
        f'{STATUS_TEXTS[page.status]}</span></div><p class="done"><span>{done}</span><span>{written} · page written '
        f'{_moment(time.time())}</span></p><div class="bar {page.status}"><i style="width:{100 * share:.1f}%">'
        "</i></div>"
    )


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(seconds))


def _notes(page: RunPage) -> str:
    notes = "".join(f'<p class="note">{escape(warning)}</p>' for warning in page.warnings)
    if not page.curves:
        return notes + '<p class="note calm">Nothing was logged yet: the first line comes after the first step.</p>'
    if not notes:
        return '<p class="note calm">No step was skipped, no item was left out, and every loss was finite.</p>'
    return notes


def _tiles(curves: Mapping[str, Curve]) -> str:
    """The key figures of those curves that are there."""
    tiles = [
        _tile(f"{name}, {how}", value, color)
        for key, name, color in (
            ("loss", "loss", "c-train"),
            ("val_loss", "validation loss", "c-val"),
            ("text_loss", "text loss", "c-text"),
            ("image_loss", "image loss", "c-image"),
        )
        for how, value in _end(key, curves.get(key))
    ]
    for key, name in (("tokens_per_s", "tokens/s, median"), ("mfu", "MFU, median")):
        if _last(curves.get(key)) is not None:
            middle = float(np.nanmedian(curves[key][1]))
            tiles.append(_tile(name, f"{middle:.1%}" if key == "mfu" and middle <= 1.5 else f"{middle:,.0f}"))
    memory = [np.nanmax(values) for key, (_, values) in curves.items() if key.endswith("_gib") and _last((_, values))]
    if memory:
        tiles.append(_tile("GiB of memory, most", f"{max(memory):.1f}"))
    if "step_ms" in curves:
        steps, milliseconds = curves["step_ms"]
        seconds = float(np.nansum(milliseconds * np.diff(steps, prepend=0))) / 1e3
        tiles.append(_tile("in training steps", _duration(seconds)))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _tile(name: str, value: str, color: str = "") -> str:
    return f'<div class="tile {color}"><b>{value}</b><span>{name}</span></div>'


def _last(curve: Curve | None) -> float | None:
    """The last value that is there."""
    there = curve[1][~np.isnan(curve[1])] if curve else ()
    return float(there[-1]) if len(there) else None


def _end(key: str, curve: Curve | None) -> list[tuple[str, str]]:
    """(how it is taken, where a curve ends), if there is one; of a noisy curve the end of its bold line."""
    if curve is not None and key in ("loss", "val_loss") and np.isnan(curve[1][-1]):
        return [("last", "none")]  # not an earlier one, as if all were well
    is_smoothed = curve is not None and _style(key) == "noisy" and len(curve[1]) >= MIN_TO_SMOOTH
    last = _last((curve[0], smooth(curve[1])) if is_smoothed else curve)
    return [] if last is None else [("smoothed" if is_smoothed else "last", f"{last:.4g}")]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} m"
    return f"{minutes} m {seconds:02d} s" if minutes else f"{seconds} s"


def _samples(steps: Sequence[SampleStep]) -> str:
    """A table: a row per prompt, a column per step."""
    if not steps:
        return ""
    index = np.unique(np.linspace(0, len(steps) - 1, MAX_SAMPLE_STEPS).round().astype(int)).tolist()
    columns = [steps[i] for i in index]
    by_prompt = [_by_prompt(column.samples) for column in columns]
    prompts = list(dict.fromkeys(key for cells in reversed(by_prompt) for key in cells))
    head = "".join(f"<th>step {column.step:,}</th>" for column in columns)
    asked = {key: sample for cells in by_prompt for key, sample in cells.items()}  # of the newest step
    rows = "".join(
        f"<tr>{_prompt(asked[key])}{''.join(_cell(cells.get(key)) for cells in by_prompt)}</tr>"
        for key in prompts[:MAX_PROMPTS]
    )
    hidden = [f"{len(steps) - len(columns)} of {len(steps)} steps"] if len(columns) < len(steps) else []
    hidden += [f"{len(prompts) - MAX_PROMPTS} of {len(prompts)} prompts"] if len(prompts) > MAX_PROMPTS else []
    small = f"<small>not shown: {', '.join(hidden)}</small>" if hidden else ""
    return (
        f'<h2 class="part">Samples by step {small}</h2><div class="card scroll"><table class="samples" '
        f'style="min-width:{150 + 116 * len(columns)}px"><thead><tr><th>'
        f"prompt</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _by_prompt(samples: Sequence[Sample]) -> dict[tuple[str, int], Sample]:
    """By prompt and how often it came before: a prompt may be asked twice."""
    found: dict[tuple[str, int], Sample] = {}
    for sample in samples:
        number = sum(prompt == sample.prompt for prompt, _ in found)
        found[sample.prompt, number] = sample
    return found


def _prompt(sample: Sample) -> str:
    """What was asked: its pictures, then its words."""
    words, pictures = sample.prompt, "".join(map(_picture, sample.given_paths))
    if len(sample.given_paths) == 1:
        words = words.removeprefix(IMAGE_SYMBOL).strip()  # it stands above them
    return f'<th scope="row">{pictures}{escape(words)}</th>'


def _cell(sample: Sample | None) -> str:
    if sample is None:
        return "<td></td>"
    images = "".join(map(_picture, sample.image_paths))
    return f"<td>{images}{f'<p>{escape(sample.text)}</p>' if sample.text.strip() else ''}</td>"


def _picture(path: Path) -> str:
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError as error:
        return f'<p class="unreadable">{escape(path.name)} cannot be read: {escape(error)}</p>'
    size = "{} × {}".format(*image.size)
    kind = "pixelated" if max(image.size) <= PIXELATED_BELOW else ""
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return f'<img class="{kind}" alt="" title="{size} pixels" src="{data_uri(image)}">'


def _listing(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    shown = lines[-MAX_LISTED:]
    count = f"{len(lines):,}" if len(shown) == len(lines) else f"the last {len(shown):,} of {len(lines):,}"
    items = "".join(f"<li>{escape(line)}</li>" for line in shown)
    return f'<details><summary>{title} <small>{count}</small></summary><ol class="card listing">{items}</ol></details>'


def _options(groups: Mapping[str, Sequence[tuple[str, str, str | None]]]) -> str:
    if not groups:
        return ""
    cards = "".join(
        f'<section class="options"><h3>{escape(group)}</h3><dl>{"".join(_option(*one) for one in options)}</dl>'
        "</section>"
        for group, options in groups.items()
    )
    return (
        f'<h2 class="part">Options <small>marked: not the default</small></h2><div class="card columns">{cards}</div>'
    )


def _option(name: str, value: str, default: str | None) -> str:
    if default is None:
        return f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
    return (
        f'<div class="changed" title="default: {escape(default)}"><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>'
    )


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<h2 class="part">Data, code, checkpoint</h2><div class="card"><dl class="facts">{rows}</dl></div>'


def _command(command: str | None, status: str) -> str:
    if command is None:
        return ""
    title = "The command of this run" if status == "finished" else "The command to go on"
    return f'<h2 class="part">{title} <small>on one node</small></h2><pre class="card">{escape(command)}</pre>'


_CONTROLS = (
    '<div class="controls"><h2 class="part">Curves</h2>'
    '<label><input type="checkbox" id="smoothed" checked> smoothed</label></div>'
)
