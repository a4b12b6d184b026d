"""Curves over the steps of a run as HTML and inline SVG that need no script: thinned, smoothed, on two scales.

The SVG of a chart is stretched to its box (strokes keep their width), and labels are HTML beside it, so that they are
as large on a phone as on a wide screen. What hovering shows comes from `hover_data`. Nothing here knows what the curves
are about: `model/report.py` says that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.html_page import escape

MAX_POINTS = 1000  # of a drawn curve, gaps not counted
SMOOTHING_SHARE = 30  # the smoothed curve is a mean over one part of so many of the lines
MIN_TO_SMOOTH = 30  # fewer values are only drawn raw
LOG_FROM_RATIO = 30  # curves that span this factor start on the log scale
NUM_X_TICKS, NUM_Y_TICKS = 6, 5  # about
MAX_EPOCH_MARKS = 12
MAX_LARGE_DOTS = 60  # of a sparse curve
BOX = 1000  # width and height of the SVG's own units


@dataclass(frozen=True)
class Series:
    """One curve. `steps` int64 [n], ascending; `values` float64 [n], nan is a gap; `color` is a class of the page.

    `style`: noisy (smoothed too), exact (as it is) or sparse (few values, such as those of validation: marks with a
    thin line between).
    """

    name: str
    color: str
    steps: np.ndarray
    values: np.ndarray
    style: str = "noisy"


@dataclass(frozen=True)
class Chart:
    """Curves that share their axes. `unit` stands beside the title; `is_share` shows values of 0 to 1 as percent.

    `from_zero`: the linear scale starts at 0. `can_log`: offer the log scale where no value is below 0. `marks_name`:
    what the legend says of sparse curves that share the colour of another.
    """

    title: str
    unit: str
    series: tuple[Series, ...]
    is_share: bool = False
    from_zero: bool = True
    can_log: bool = False
    is_wide: bool = False
    marks_name: str = ""


def thin(steps: np.ndarray, values: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points (and a nan per bucket that has one): least and greatest of each bucket, in their order.

    Spikes and gaps stay. The first and the last point stay too.
    """
    if len(steps) <= most:
        return steps, values
    edges = np.linspace(0, len(steps), most // 2).astype(int)  # one bucket less than pairs: room for both ends
    kept = [0, len(steps) - 1]
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        bucket = values[start:stop]
        is_gap = np.isnan(bucket)
        if is_gap.any():
            kept.append(start + int(is_gap.argmax()))
        if not is_gap.all():
            kept += [start + int(np.nanargmin(bucket)), start + int(np.nanargmax(bucket))]
    index = np.unique(kept)
    return steps[index], values[index]


def smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over one part of SMOOTHING_SHARE of the values, [n]; nan where a value is nan.

    The window is centred, smaller at the start, where curves fall fast, and one-sided at the end. The mean is taken
    twice, so that a spike becomes a small hill and no table mountain.
    """
    half = max(len(values) // SMOOTHING_SHARE // 4, 1)
    return _running_mean(_running_mean(values, half), half)


def _running_mean(values: np.ndarray, half: int) -> np.ndarray:
    is_there = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_there, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_there)])
    index = np.arange(len(values))
    start, stop = index - np.minimum(index, half), index + np.minimum(index, half) + 1
    stop = np.minimum(stop, len(values))
    with np.errstate(invalid="ignore"):
        means = (sums[stop] - sums[start]) / (counts[stop] - counts[start])
    return np.where(is_there, means, np.nan)


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], with 2 and 5 times them if there are few; thinned if there are many."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [float(f"{factor}e{power}") for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) >= 3:
            return ticks[:: -(-len(ticks) // (NUM_Y_TICKS + 2))]
    return nice_ticks(low, high, NUM_Y_TICKS)


def tick_label(value: float, is_share: bool = False) -> str:
    """20,000 becomes 20k and 0.00002 becomes 2e-5: labels beside axes must be short."""
    if is_share:
        return f"{100 * value:.6g}%"
    size = abs(value)
    if 0 < size < 1e-3 or size >= 1e12:
        mantissa, power = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(power)}"
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= factor:
            return f"{value / min(factor, 1e3 if unit == 'k' else factor):.6g}{unit}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.6g}"


def chart_html(chart: Chart, last_step: int, epoch_steps: Sequence[int] = ()) -> str:
    """The card of a chart over steps 0 to `last_step`; `epoch_steps`: where epochs end, marked by thin lines."""
    values = np.concatenate([series.values for series in chart.series])
    values = values[np.isfinite(values)]
    has_log = chart.can_log and (values > 0).any() and (values >= 0).all() and values.max() > values[values > 0].min()
    starts_log = has_log and values.max() > LOG_FROM_RATIO * np.quantile(values[values > 0], 0.01)
    marks = list(epoch_steps) if len(epoch_steps) <= MAX_EPOCH_MARKS else []
    scales = _scale(chart, _linear_axis(values, chart), last_step, marks, "linear")
    if has_log:
        scales += _scale(chart, _log_axis(values), last_step, marks, "log")
    buttons = "".join(f'<button type="button" data-scale="{name}">{name}</button>' for name in ("linear", "log"))
    switch = f'<div class="switch">{buttons}</div>' if has_log else ""
    ticks = "".join(
        f'<span style="left:{100 * tick / last_step:.2f}%">{tick_label(tick)}</span>'
        for tick in nice_ticks(0, last_step, NUM_X_TICKS)
        if tick == round(tick)
    )
    axis = "optimizer step" + ("; dotted: the end of an epoch" if marks and chart.is_wide else "")
    classes, scale = "card chart wide" if chart.is_wide else "card chart", "log" if starts_log else "linear"
    return (
        f'<section class="{classes}" data-scale="{scale}"><header><h2>{escape(chart.title)} '
        f"<small>{escape(chart.unit)}</small></h2>{switch}</header>{_legend(chart)}"
        f'<div class="plot"><div class="area">{scales}<div class="cursor"></div></div>'
        f'<div class="x">{ticks}</div><div class="x-name">{axis}</div></div></section>'
    )


def hover_data(chart: Chart, last_step: int) -> dict[str, Any]:
    """What the page's script shows on hovering, for JSON: the drawn points of every curve, to 5 digits."""
    series = []
    for one in chart.series:
        kept = ~np.isnan(one.values)
        steps, values = thin(one.steps[kept], one.values[kept])
        entry = {"name": one.name, "color": one.color, "x": steps.tolist(), "y": _short(values)}
        if _is_smoothed(one):
            entry["smooth"] = _short(smooth(one.values)[np.searchsorted(one.steps, steps)])
        series.append(entry)
    return {"last": last_step, "isShare": bool(chart.is_share), "series": series}


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


def _is_smoothed(series: Series) -> bool:
    return series.style == "noisy" and len(series.values) >= MIN_TO_SMOOTH


def _legend(chart: Chart) -> str:
    """Names beside their colours; marks that share the colour of a line are named once for all."""
    if len(chart.series) == 1 and chart.series[0].style != "sparse":
        return ""
    lines = {one.color for one in chart.series if one.style != "sparse"}
    named = [one for one in chart.series if one.style != "sparse" or one.color not in lines]
    items = [
        f'<span class="{one.color} {one.style}"><i></i>{escape(one.name)}</span>'  # the style decides the mark
        for one in named
    ]
    if len(named) < len(chart.series):
        items.append(f'<span class="c-soft sparse"><i></i>{escape(chart.marks_name)}</span>')
    return f'<div class="legend">{"".join(items)}</div>'


@dataclass(frozen=True)
class _Axis:
    """Where values lie: `low` and `high` are the ends, `ticks` the labelled values."""

    low: float
    high: float
    ticks: list[float]
    is_log: bool

    def heights(self, values: np.ndarray) -> np.ndarray:
        """Distances from the top, 0 to BOX; nan for what this scale cannot show."""
        low, high = self.low, self.high
        if self.is_log:
            values = np.log10(np.where(values > 0, values, np.nan))
            low, high = math.log10(low), math.log10(high)
        return BOX * (high - values) / (high - low)


def _linear_axis(values: np.ndarray, chart: Chart) -> _Axis:
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if chart.from_zero or 0 <= low < 0.3 * high:
        low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        low, high = (0.0, 1.0) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    if chart.is_share and low >= 0 and 0.5 < high <= 1:
        low, high = 0.0, 1.0
    else:
        room = (high - low) * 0.06
        low, high = low - (room if low else 0), high + room
    return _Axis(low, high, nice_ticks(low, high, NUM_Y_TICKS), is_log=False)


def _log_axis(values: np.ndarray) -> _Axis:
    values = values[values > 0]
    low, high = float(values.min()), float(values.max())
    room = (high / low) ** 0.05
    low, high = low / room, high * room
    return _Axis(low, high, log_ticks(low, high), is_log=True)


def _scale(chart: Chart, axis: _Axis, last_step: int, marks: Sequence[int], name: str) -> str:
    heights = axis.heights(np.array(axis.ticks))
    labels = "".join(
        f'<span class="y" style="top:{100 * height / BOX:.2f}%">{tick_label(tick, chart.is_share)}</span>'
        for tick, height in zip(axis.ticks, heights.tolist(), strict=True)
    )
    grid = "".join(f"M0 {height:.1f}h{BOX}" for height in heights.tolist())
    ends = "".join(f"M{BOX * step / last_step:.1f} 0v{BOX}" for step in marks)
    curves = "".join(_curve(one, axis, last_step) for one in chart.series)
    return (
        f'<div class="scale {name}"><svg viewBox="0 0 {BOX} {BOX}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(chart.title)}, {name} scale"><path class="grid" d="{grid}"/><path class="epochs" '
        f'd="{ends}"/>{curves}</svg>{labels}</div>'
    )


def _curve(series: Series, axis: _Axis, last_step: int) -> str:
    """The raw curve, and over it the smoothed one or, for sparse ones, marks."""
    steps, heights = thin(series.steps, axis.heights(series.values))
    x = BOX * steps / last_step
    is_there = ~np.isnan(heights)
    dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x[is_there], heights[is_there], strict=True))
    if series.style == "sparse":
        line = _path(x[is_there], heights[is_there])
        kind = "dots many" if is_there.sum() > MAX_LARGE_DOTS else "dots"  # which must not hide the line below
        return f'<path class="line sparse {series.color}" d="{line}"/><path class="{kind} {series.color}" d="{dots}"/>'
    if not _is_smoothed(series):
        line = f'<path class="line {series.color}" d="{_path(x, heights)}"/>'
        # A young run's few values would hardly be seen as a line.
        return line + (f'<path class="dots small {series.color}" d="{dots}"/>' if len(steps) < MIN_TO_SMOOTH else "")
    smooth_steps, smooth_heights = thin(series.steps, axis.heights(smooth(series.values)))
    return (
        f'<path class="line raw {series.color}" d="{_path(x, heights)}"/>'
        f'<path class="line smooth {series.color}" d="{_path(BOX * smooth_steps / last_step, smooth_heights)}"/>'
    )


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """The `d` of a line that is broken at nan; a point alone is a line of no length, which round caps make a dot."""
    parts, is_open = [], False
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if math.isnan(b):
            is_open = False
            continue
        parts.append(f"{'L' if is_open else 'M'}{a:.1f} {b:.1f}")
        if not is_open:
            parts.append("h0")
        is_open = True
    return "".join(parts)
