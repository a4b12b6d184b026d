"""The page of `inspect_record.py`: some items of a record with their parts, and figures and charts of all items."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.items.vocab import CODE_PIXELS
from model.pages.assets import percent_of, render
from model.pages.charts import Chart, Series, draw_bars, draw_curves

PERCENTILES = (0, 5, 50, 95, 100)
MAX_LENGTH_BINS = 48
MAX_CURVE_POINTS = 256
# Sizes of images that have a bar of their own.
MAX_SIZES = 6


@dataclass(frozen=True)
class Part:
    """A stretch of an item: `kind` is text (with one label mask), control (one token) or image; `stop` is exclusive."""

    kind: str
    start: int
    stop: int
    turn: int
    num_targets: int
    text: str = ""
    image: Image.Image | None = None


@dataclass(frozen=True)
class ShownItem:
    """A sampled item. `is_target`: bool [length]; `num_wrong_labels`: targets whose label is not their token."""

    id: int | str
    file: str
    parts: Sequence[Part]
    is_target: np.ndarray
    num_wrong_labels: int

    @property
    def target_runs(self) -> list[tuple[int, int]]:
        """(start, stop) of tokens in a row that are targets."""
        edges = np.flatnonzero(np.diff(self.is_target.astype(np.int8), prepend=0, append=0)).tolist()
        return list(zip(edges[::2], edges[1::2], strict=True))


@dataclass(frozen=True)
class RecordStats:
    """Figures over all items of a record; `size_counts`: images by (width, height) in pixels."""

    # int64 [N], in tokens.
    lengths: np.ndarray
    # int64 [num_codes].
    code_counts: np.ndarray
    num_targets: int
    num_image_tokens: int
    size_counts: Counter[tuple[int, int]]


def build_page(record_path: str, stats: RecordStats, items: Sequence[ShownItem], notes: Sequence[str] = ()) -> str:
    """The whole page. `notes`: remarks shown at its top."""
    charts = [_draw_lengths(stats.lengths)]
    if stats.size_counts:
        charts += [_draw_usage(stats.code_counts), _draw_sizes(stats.size_counts), _draw_shares(stats.code_counts)]
    values = {"title": record_path, "notes": notes, "stats": stats, "charts": charts, "items": items}
    return render("inspect.html", code_pixels=CODE_PIXELS, **values)


def length_bins(lengths: np.ndarray, most: int = MAX_LENGTH_BINS) -> tuple[np.ndarray, np.ndarray]:
    """Counts [n] and whole edges [n + 1] of equally wide bins; bin i holds edges[i] <= length < edges[i + 1]."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // most)
    edges = np.arange(low, high + width + 1, width)
    return np.histogram(lengths, edges - 0.5)[0], edges


def usage_bins(code_counts: np.ndarray) -> list[tuple[int, int, int]]:
    """(least, most, number of codes) by how often they are used: never, once, 2-3, 4-7, ... to the most used code."""
    edges = [0, *(2**power for power in range(int(code_counts.max()).bit_length() + 1))]
    counts = np.histogram(code_counts, edges)[0].tolist()
    return [(low, high - 1, count) for low, high, count in zip(edges, edges[1:], counts, strict=False)]


def perplexity(code_counts: np.ndarray) -> float:
    """exp of the entropy of the usage: the number of codes that, evenly used, would be as varied. 0 if none is used."""
    shares = code_counts[code_counts > 0] / max(code_counts.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def _draw_lengths(lengths: np.ndarray) -> dict:
    counts, edges = length_bins(lengths)
    width = edges[1] - edges[0]
    names = [f"{a:,} tokens" if width == 1 else f"{a:,} to {a + width - 1:,} tokens" for a in edges[:-1].tolist()]
    bars = list(zip(names, counts.tolist(), strict=True))
    chart = draw_bars("Lengths", "items by tokens", "c-length", bars, [f"{edge:,}" for edge in edges.tolist()], "items")
    values = np.percentile(lengths, PERCENTILES).astype(int)
    return chart | {"figures": {f"p{p}": f"{value:,}" for p, value in zip(PERCENTILES, values, strict=True)}}


def _draw_usage(code_counts: np.ndarray) -> dict:
    bars, labels = [], []
    for low, high, count in usage_bins(code_counts):
        bars.append((f"used {low:,} to {high:,} times" if high > low else f"used {low} times", count))
        # 131072 becomes 131k: labels below bars must be short.
        labels.append(f"{low // 10**6}M" if low >= 10**6 else f"{low // 1000}k" if low >= 1000 else str(low))
    chart = draw_bars("Code usage", "codes by how often they are used", "c-code", bars, labels, "codes")
    figures = {
        "codes used": f"{int((code_counts > 0).sum()):,} of {len(code_counts):,}",
        "perplexity": f"{perplexity(code_counts):,.0f}",
        f"most used: code {int(code_counts.argmax()):,}": percent_of(int(code_counts.max()), int(code_counts.sum())),
    }
    return chart | {"figures": figures}


def _draw_sizes(size_counts: Counter[tuple[int, int]]) -> dict:
    bars = [(f"{width} × {height}", count) for (width, height), count in size_counts.most_common(MAX_SIZES)]
    if other := size_counts.total() - sum(count for _, count in bars):
        bars.append(("other", other))
    labels = [name for name, _ in bars]
    return draw_bars("Sizes", "images by width × height in pixels", "c-size", bars, labels, "images")


def _draw_shares(code_counts: np.ndarray) -> dict:
    """The share of all codes in the images that the n most used codes make up, over n."""
    shares = np.concatenate([[0.0], np.sort(code_counts)[::-1].cumsum() / code_counts.sum()])
    ranks = np.unique(np.linspace(0, len(code_counts), min(len(shares), MAX_CURVE_POINTS)).astype(int))
    curve = Series("share", "c-code", ranks, shares[ranks], "exact")
    chart = Chart("Share of all image tokens", "of the 1, 2, 3, ... most used codes", (curve,), is_share=True)
    return draw_curves(chart, len(code_counts))
