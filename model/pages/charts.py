"""Charts of the HTML pages: curves, thinned and smoothed, on a linear and a logarithmic scale, and bars.

`model/pages/chart.html` draws them. The SVG is stretched to its box, and labels are HTML beside it: text is as large on
a phone as on a wide screen.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Of a drawn curve, gaps not counted.
MAX_POINTS = 1000
# The smoothed curve is a mean over this fraction of all values; curves with fewer than MIN_TO_SMOOTH are drawn raw.
SMOOTHING_SHARE = 30
MIN_TO_SMOOTH = 30
# Curves that span this factor start on the log scale.
LOG_FROM_RATIO = 30
NUM_X_TICKS, NUM_Y_TICKS, MAX_BAR_LABELS = 6, 5, 8
# Of a sparse curve; more dots are drawn small, or the curve below would be hidden.
MAX_LARGE_DOTS = 60
# Fewer bars leave room to their right.
MIN_BAR_COLUMNS = 7
# Width and height of the SVG in its own units.
BOX = 1000


@dataclass(frozen=True)
class Series:
    """One curve. `steps` int64 [n], ascending; `values` float64 [n], NaN is a gap; `color` is a class of page.css.

    `style`: noisy (smoothed too), exact (not smoothed) or sparse (few values, such as validation: dots, thin line).
    """

    name: str
    color: str
    steps: np.ndarray
    values: np.ndarray
    style: str = "noisy"


@dataclass(frozen=True)
class Chart:
    """Curves that share their axes. `unit` stands beside the title; `is_share` shows values of 0 to 1 as percent.

    `from_zero`: the linear scale starts at 0. `can_log`: offer the log scale where no value is below 0. `is_exact`:
    the curves are not smoothed.
    """

    title: str
    unit: str
    series: tuple[Series, ...] = ()
    is_share: bool = False
    from_zero: bool = True
    can_log: bool = False
    is_wide: bool = False
    is_exact: bool = False


def thin(values: np.ndarray, most: int = MAX_POINTS) -> np.ndarray:
    """Ascending indices of at most `most` values, and of one NaN for each stretch that has some.

    The least and the greatest value of each stretch, and both ends of the curve, are kept.
    """
    if len(values) <= most:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    # One stretch less than pairs of points, to leave room for both ends.
    for stretch in np.array_split(np.arange(len(values)), most // 2 - 1):
        is_gap = np.isnan(values[stretch])
        kept.update(stretch[is_gap][:1].tolist())
        if not is_gap.all():
            kept |= {int(stretch[np.nanargmin(values[stretch])]), int(stretch[np.nanargmax(values[stretch])])}
    return np.array(sorted(kept))


def smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over one part of SMOOTHING_SHARE of the values, [n]; NaN where a value is NaN.

    The window is centred, smaller at the start, where curves fall fast, and one-sided at the end. The mean is taken
    twice: a spike becomes a small hill instead of a plateau.
    """
    half, index, is_there = max(len(values) // SMOOTHING_SHARE // 4, 1), np.arange(len(values)), ~np.isnan(values)
    reach = np.minimum(index, half)
    start, stop = index - reach, np.minimum(index + reach + 1, len(values))
    counts = np.concatenate([[0], np.cumsum(is_there)])
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(np.where(is_there, values, 0.0))])
        with np.errstate(invalid="ignore"):
            values = np.where(is_there, (sums[stop] - sums[start]) / (counts[stop] - counts[start]), np.nan)
    return values


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
    """Powers of ten within [low, high], with multiples if there are few powers; thinned if there are many."""
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
    for least, unit_size, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= least:
            return f"{value / unit_size:.6g}{unit}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.6g}"


def draw_curves(chart: Chart, last_x: int, epoch_ends: Sequence[int] = (), x_name: str = "") -> dict[str, Any]:
    """A chart over 0 to `last_x`. Thin lines mark `epoch_ends`; `hover` is for run.js."""
    values = np.concatenate([series.values for series in chart.series])
    values = values[np.isfinite(values)]
    positive = values[values > 0]
    has_log = chart.can_log and len(positive) and values.min() >= 0 and values.max() > positive.min()
    starts_log = has_log and values.max() > LOG_FROM_RATIO * np.quantile(positive, 0.01)
    curves = [_thin_and_smooth(series) for series in chart.series]
    scales = {}
    for name in ("linear", "log") if has_log else ("linear",):
        if name == "log":
            room = (positive.max() / positive.min()) ** 0.05
            low, high = positive.min() / room, positive.max() * room
            ticks = log_ticks(low, high)
        else:
            low, high = _linear_ends(values, chart)
            ticks = nice_ticks(low, high, NUM_Y_TICKS)
        heights = _heights(low, high, np.log10 if name == "log" else np.asarray)
        paths = [path for curve in curves for path in _curve_paths(*curve, heights, last_x)]
        scales[name] = {"ticks": _y_ticks(ticks, heights, chart.is_share), "paths": paths}
    ticks = [tick for tick in nice_ticks(0, last_x, NUM_X_TICKS) if tick.is_integer()]
    return {
        "title": chart.title,
        "unit": chart.unit,
        "kind": "wide" if chart.is_wide else "",
        "scales": scales,
        "first_scale": "log" if starts_log else "linear",
        "epoch_ends": [BOX * step / last_x for step in epoch_ends],
        "x_ticks": [(100 * tick / last_x, tick_label(tick)) for tick in ticks],
        "x_name": x_name + ("; dotted: the end of an epoch" if epoch_ends and chart.is_wide else ""),
        "legend": _legend(chart.series),
        "hover": {"last": last_x, "isShare": bool(chart.is_share), "series": [_hover(*curve) for curve in curves]},
    }


def draw_bars(
    title: str, unit: str, color: str, bars: Sequence[tuple[str, int]], labels: Sequence[str], counted: str
) -> dict[str, Any]:
    """A chart of (name, count) as bars; `labels` stand below; hovering shows name and count of what is `counted`."""
    highest, width = max(count for _, count in bars), BOX / max(len(bars), MIN_BAR_COLUMNS)
    paths = []
    for index, (name, count) in enumerate(bars):
        # A bar that is there must be seen.
        height = max(BOX * count / highest, 9) if count else 0
        d = f"M{index * width:.1f} {BOX}v{-height:.1f}h{width * 0.94:.1f}v{height:.1f}z"
        paths.append((f"bar {color}", d, f"{name}: {count:,} {counted}"))
    every = -(-len(bars) // MAX_BAR_LABELS)
    ticks = [tick for tick in nice_ticks(0, highest, NUM_Y_TICKS) if tick.is_integer()]
    return {
        "title": title,
        "unit": unit,
        "kind": "bars",
        "scales": {"linear": {"ticks": _y_ticks(ticks, _heights(0, highest)), "paths": paths}},
        "first_scale": "linear",
        "x_ticks": [((index + 0.5) * width * 100 / BOX, labels[index]) for index in range(0, len(bars), every)],
    }


def _legend(series: Sequence[Series]) -> list[tuple[str, str, str]]:
    """(color, style, name) of the curves; dots that share the colour of a line are named once for all."""
    if len(series) == 1 and series[0].style != "sparse":
        return []
    lines = {one.color for one in series if one.style != "sparse"}
    named = [one for one in series if one.style != "sparse" or one.color not in lines]
    entries = [(one.color, one.style, one.name) for one in named]
    return entries + [("c-soft", "sparse", "validation")] * (len(named) < len(series))


def _heights(low: float, high: float, transform: Callable = np.asarray) -> Callable[[np.ndarray], np.ndarray]:
    """Gives distances of values from the top, 0 (`high`) to BOX (`low`); NaN for what the scale cannot show."""

    def heights(values: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            found = BOX * (transform(high) - transform(values)) / (transform(high) - transform(low))
        # A smoothed value may lie below the least value of a log scale.
        return np.where(np.isfinite(found), np.clip(found, 0, BOX), np.nan)

    return heights


def _y_ticks(ticks: Sequence[float], heights: Callable, is_share: bool = False) -> list[tuple[float, str]]:
    """(distance from the top in percent, label)."""
    return [(100 * float(heights(tick)) / BOX, tick_label(tick, is_share)) for tick in ticks]


def _linear_ends(values: np.ndarray, chart: Chart) -> tuple[float, float]:
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if chart.from_zero or 0 <= low < 0.3 * high:
        low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        low, high = (0.0, 1.0) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    if chart.is_share and low >= 0 and 0.5 < high <= 1:
        return 0.0, 1.0
    room = (high - low) * 0.06
    return low - (room if low else 0), high + room


def _thin_and_smooth(series: Series) -> tuple[Series, np.ndarray | None]:
    """The thinned points, and the smoothed values at these."""
    kept = thin(series.values)
    is_smoothed = series.style == "noisy" and len(series.values) >= MIN_TO_SMOOTH
    thinned = dataclasses.replace(series, steps=series.steps[kept], values=series.values[kept])
    return thinned, smooth(series.values)[kept] if is_smoothed else None


def _hover(series: Series, smoothed: np.ndarray | None) -> dict[str, Any]:
    """The points for JSON, to 5 digits."""
    is_there = ~np.isnan(series.values)
    entry = {"name": series.name, "color": series.color, "x": series.steps[is_there].tolist()}
    for name, values in (("y", series.values), ("smooth", smoothed)):
        if values is not None:
            entry[name] = [float(f"{value:.5g}") for value in values[is_there].tolist()]
    return entry


def _curve_paths(
    series: Series, smoothed: np.ndarray | None, heights: Callable, last_x: int
) -> list[tuple[str, str, str]]:
    """(class, d, name) of the raw curve, and over it the smoothed one, or dots where values are few."""
    x, y = BOX * series.steps / last_x, heights(series.values)
    is_there = ~np.isnan(y)
    dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x[is_there], y[is_there], strict=True))
    if series.style == "sparse":
        size = "dots many" if is_there.sum() > MAX_LARGE_DOTS else "dots"
        found = {"line sparse": _path(x[is_there], y[is_there]), size: dots}
    elif smoothed is not None:
        found = {"line raw": _path(x, y), "line smooth": _path(x, heights(smoothed))}
    else:
        found = {"line": _path(x, y)}
        # The few values of a young run would hardly be seen as a line.
        if len(x) < MIN_TO_SMOOTH:
            found["dots small"] = dots
    return [(f"{kind} {series.color}", d, "") for kind, d in found.items()]


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """The `d` of a line that is broken at NaN; a line of no length (`h0`) makes a lone point a dot."""
    is_there = ~np.isnan(y)
    starts = is_there & np.concatenate([[True], ~is_there[:-1]])
    points = zip(x[is_there], y[is_there], starts[is_there], strict=True)
    return "".join(f"M{a:.1f} {b:.1f}h0" if is_start else f"L{a:.1f} {b:.1f}" for a, b, is_start in points)
