"""The HTML page of `inspect_record.py`: what it shows, as dataclasses, and how. No script, nothing from outside.

Every string that comes from a record or a user's text goes through `escape`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.html_page import data_uri, escape
from data.vocab import CODE_PIXELS

PERCENTILES = (0, 5, 50, 95, 100)
NUM_LENGTH_BINS = 48  # at most
MAX_CURVE_POINTS = 256
MAX_SIZES = 6  # sizes of images shown by name
MAX_TICKS, MAX_USAGE_TICKS = 8, 16  # labels below a chart, which are wider below lengths
MIN_COLUMNS = 7  # fewer bars than this leave room to their right
SHOWN_SIDES = (160, 384)  # least and most pixels of the longer side of a picture on the page

CHART_WIDTH, CHART_HEIGHT, CHART_TOP, CHART_LEFT = 600, 170, 22, 8  # of the area of the bars, in units of the SVG


@dataclass(frozen=True)
class Part:
    """A stretch of an item: text with one label mask, one control token, or one image. `stop` is exclusive."""

    kind: str  # text, control or image
    start: int
    stop: int
    num_targets: int
    text: str = ""
    image: Image.Image | None = None


@dataclass(frozen=True)
class ShownItem:
    """A sampled item. `turns`: its parts, a list for each turn; `is_target`: bool [length]."""

    id: int | str
    file: str
    turns: tuple[tuple[Part, ...], ...]
    is_target: np.ndarray
    num_wrong_labels: int  # targets whose label is not their token


@dataclass(frozen=True)
class RecordStats:
    """Figures over all items of a record."""

    lengths: np.ndarray  # int64 [N], tokens of each item
    code_counts: np.ndarray  # int64 [num_codes]
    num_targets: int
    num_image_tokens: int
    size_counts: Counter[tuple[int, int]]  # (width, height) in pixels -> pictures


def build_page(record_path: str, stats: RecordStats, items: Sequence[ShownItem], notes: Sequence[str] = ()) -> str:
    """The whole page. `notes`: remarks shown at its top."""
    name = escape(record_path)
    remarks = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    shown = "".join(map(_item_card, items))
    return PAGE.format(
        title=name,
        style=STYLE,
        notes=remarks,
        tiles=_tiles(stats),
        cards=_cards(stats),
        num_shown=f"{len(items):,}",
        num_items=f"{len(stats.lengths):,}",
        items=shown,
    )


def length_bins(lengths: np.ndarray, most: int = NUM_LENGTH_BINS) -> tuple[np.ndarray, np.ndarray]:
    """Counts [n] and whole edges [n + 1] of equally wide bins; bin i holds edges[i] <= length < edges[i + 1]."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // most)
    edges = np.arange(low, high + width + 1, width)
    return np.histogram(lengths, edges - 0.5)[0], edges


def usage_bins(code_counts: np.ndarray) -> list[tuple[int, int, int]]:
    """(least, most, number of codes) by how often they are used: never, once, 2-3, 4-7, ... to the most used code."""
    bins = [(0, 0, int((code_counts == 0).sum()))]
    low = 1
    while low <= code_counts.max(initial=0):
        high = 2 * low - 1
        bins.append((low, high, int(((code_counts >= low) & (code_counts <= high)).sum())))
        low *= 2
    return bins


def perplexity(code_counts: np.ndarray) -> float:
    """exp of the entropy of the usage: the number of codes that, evenly used, would be as varied. 0 if none is used."""
    shares = code_counts[code_counts > 0] / max(code_counts.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def _tiles(stats: RecordStats) -> str:
    num_tokens = int(stats.lengths.sum())
    figures = {
        "items": f"{len(stats.lengths):,}",
        "tokens": f"{num_tokens:,}",
        "of them in images": _percent(stats.num_image_tokens, num_tokens),
        "of them predicted": _percent(stats.num_targets, num_tokens),
        "images": f"{stats.size_counts.total():,}",
    }
    return "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in figures.items())


def _cards(stats: RecordStats) -> str:
    cards = [_length_card(stats.lengths)]
    if stats.size_counts:
        cards += [_usage_card(stats.code_counts), _size_card(stats.size_counts), _share_card(stats.code_counts)]
    return "".join(cards)


def _length_card(lengths: np.ndarray) -> str:
    counts, edges = length_bins(lengths)
    width = edges[1] - edges[0]
    names = [f"{a:,} tokens" if width == 1 else f"{a:,} to {a + width - 1:,} tokens" for a in edges[:-1].tolist()]
    step = -(-len(counts) // MAX_TICKS)
    ticks = {index: f"{edges[index]:,}" for index in range(0, len(counts), step)}
    values = np.percentile(lengths, PERCENTILES).astype(int)
    figures = {f"p{p}": f"{value:,}" for p, value in zip(PERCENTILES, values, strict=True)}
    return _card("Lengths", "items by tokens", _bars(counts.tolist(), names, ticks, "items", "length"), figures)


def _usage_card(code_counts: np.ndarray) -> str:
    bins = usage_bins(code_counts)
    names = [f"used {low:,} to {high:,} times" if high > low else f"used {low} times" for low, high, _ in bins]
    step = -(-len(bins) // MAX_USAGE_TICKS)
    ticks = {index: _short(low) for index, (low, _, _) in enumerate(bins) if index % step == 0}
    chart = _bars([count for _, _, count in bins], names, ticks, "codes", "code")
    figures = {
        "codes used": f"{int((code_counts > 0).sum()):,} of {len(code_counts):,}",
        "perplexity": f"{perplexity(code_counts):,.0f}",
        f"most used: code {int(code_counts.argmax()):,}": _percent(int(code_counts.max()), int(code_counts.sum())),
    }
    return _card("Code usage", "codes by how often they are used", chart, figures)


def _size_card(size_counts: Counter[tuple[int, int]]) -> str:
    shown = [(f"{width} × {height}", count) for (width, height), count in size_counts.most_common(MAX_SIZES)]
    if other := size_counts.total() - sum(count for _, count in shown):
        shown.append(("other", other))
    names = [name for name, _ in shown]
    chart = _bars([count for _, count in shown], names, dict(enumerate(names)), "images", "size")
    return _card("Sizes", "images by width × height in pixels", chart)


def _share_card(code_counts: np.ndarray) -> str:
    return _card("Share of all image tokens", "of the 1, 2, 3, ... most used codes", _share_curve(code_counts))


def _card(title: str, subtitle: str, chart: str, figures: Mapping[str, str] | None = None) -> str:
    cells = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in (figures or {}).items())
    below = f'<div class="figures">{cells}</div>' if cells else ""
    return f'<section class="card"><h2>{title} <small>{subtitle}</small></h2>{chart}{below}</section>'


def _bars(counts: list[int], names: list[str], ticks: dict[int, str], unit: str, color_class: str) -> str:
    """A bar chart; `ticks`: labels below some of the bars."""
    step, highest = CHART_WIDTH / max(len(counts), MIN_COLUMNS), max(counts)
    marks = []
    for index, (count, name) in enumerate(zip(counts, names, strict=True)):
        height = CHART_HEIGHT * count / highest
        height = max(height, 1.5) if count else 0  # a bar that is there is seen
        x, y = CHART_LEFT + index * step, CHART_TOP + CHART_HEIGHT - height
        marks.append(
            f'<rect class="{color_class}" x="{x:.1f}" y="{y:.1f}" width="{max(step - 1.5, 0.5):.1f}" '
            f'height="{height:.1f}"><title>{name}: {count:,} {unit}</title></rect>'
        )
    below = CHART_TOP + CHART_HEIGHT + 18
    marks += [
        f'<text x="{CHART_LEFT + (index + 0.5) * step:.1f}" y="{below}" text-anchor="middle">{label}</text>'
        for index, label in ticks.items()
    ]
    return _chart("".join(marks), f"{highest:,} {unit}")


def _share_curve(counts: np.ndarray) -> str:
    """The share of all codes in the images (0 to 100%) that the n most used codes make up, over n."""
    shares = np.sort(counts)[::-1].cumsum() / counts.sum()
    shown = np.unique(np.linspace(0, len(shares), min(len(shares) + 1, MAX_CURVE_POINTS)).astype(int))
    heights = [float(shares[rank - 1]) if rank else 0.0 for rank in shown.tolist()]
    points = " ".join(
        f"{CHART_LEFT + CHART_WIDTH * rank / len(shares):.1f},{CHART_TOP + CHART_HEIGHT * (1 - height):.1f}"
        for rank, height in zip(shown.tolist(), heights, strict=True)
    )
    floor = CHART_TOP + CHART_HEIGHT
    area = f'<polygon class="area" points="{CHART_LEFT},{floor} {points} {CHART_LEFT + CHART_WIDTH},{floor}"/>'
    ticks = "".join(
        f'<text x="{CHART_LEFT + CHART_WIDTH * part:.1f}" y="{floor + 18}" text-anchor="{anchor}">'
        f"{round(len(shares) * part):,}</text>"
        for part, anchor in ((0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1, "end"))
    )
    return _chart(f'{area}<polyline class="curve" points="{points}"/>{ticks}', "100%")


def _chart(marks: str, top_label: str) -> str:
    width, floor = CHART_WIDTH + 2 * CHART_LEFT, CHART_TOP + CHART_HEIGHT
    return (
        f'<svg class="chart" viewBox="0 0 {width} {floor + 24}" role="img">'
        f'<line x1="{CHART_LEFT}" y1="{CHART_TOP}" x2="{CHART_LEFT + CHART_WIDTH}" y2="{CHART_TOP}"/>'
        f'<text x="{CHART_LEFT}" y="{CHART_TOP - 5}">{top_label}</text>{marks}'
        f'<line class="floor" x1="{CHART_LEFT}" y1="{floor}" x2="{CHART_LEFT + CHART_WIDTH}" y2="{floor}"/></svg>'
    )


def _item_card(item: ShownItem) -> str:
    length, num_targets = len(item.is_target), int(item.is_target.sum())
    images = [part for turn in item.turns for part in turn if part.kind == "image"]
    num_image_tokens = sum(part.stop - part.start for part in images)
    counts = (
        f"<b>{length:,}</b> tokens: {length - num_image_tokens:,} of text, {num_image_tokens:,} of "
        f"{len(images)} image{'' if len(images) == 1 else 's'} · <b>{num_targets:,}</b> predicted "
        f"({_percent(num_targets, length)})"
    )
    wrong = f'<p class="note">{item.num_wrong_labels:,} labels differ from their tokens</p>'
    turns = "".join(f'<div class="turn">{"".join(map(_part, turn))}</div>' for turn in item.turns)
    head = f"<h3>item {escape(item.id)}</h3><span>{counts}</span><code>{escape(item.file)}</code>"
    return (
        f"<article><header>{head}</header>"
        f"{wrong if item.num_wrong_labels else ''}{_mask_bar(item.is_target, images)}{turns}</article>"
    )


def _mask_bar(is_target: np.ndarray, images: Sequence[Part]) -> str:
    """A thin bar, as long as the item: above, which tokens are targets; below, which belong to images."""
    edges = np.flatnonzero(np.diff(is_target.astype(np.int8), prepend=0, append=0)).tolist()
    runs = list(zip(edges[::2], edges[1::2], strict=True))
    marks = [_mask_rect("target", 0, 10, start, stop, "predicted") for start, stop in runs]
    marks += [_mask_rect("image", 12, 4, part.start, part.stop, "image") for part in images]
    return (
        f'<svg class="mask" viewBox="0 0 {len(is_target)} 16" preserveAspectRatio="none" role="img">'
        f'<rect class="empty" width="{len(is_target)}" height="10"/>{"".join(marks)}</svg>'
    )


def _mask_rect(color_class: str, y: int, height: int, start: int, stop: int, name: str) -> str:
    return (
        f'<rect class="{color_class}" x="{start}" y="{y}" width="{stop - start}" height="{height}">'
        f"<title>{name}: tokens {start:,} to {stop - 1:,}</title></rect>"
    )


def _part(part: Part) -> str:
    if part.kind == "image":
        return _figure(part)
    if part.kind == "control":
        return f'<kbd class="{"predicted" if part.num_targets else ""}">{escape(part.text)}</kbd>'
    tag = "mark" if part.num_targets else "span"
    return f'<{tag} class="text">{escape(part.text)}</{tag}>'


def _figure(part: Part) -> str:
    width, height = part.image.size
    longest, (least, most) = max(width, height), SHOWN_SIDES
    scale = max(least, min(longest, most)) / longest
    where = "predicted" if part.num_targets else "given"
    if 0 < part.num_targets < part.stop - part.start:
        where = f"{part.num_targets:,} tokens predicted"
    rows, columns = height // CODE_PIXELS, width // CODE_PIXELS
    lines = f"{rows} rows of {columns} codes<br>tokens {part.start:,}–{part.stop - 1:,}<br>{where}"
    return (
        f'<figure class="{"predicted" if part.num_targets else ""}"><img alt="" src="{data_uri(part.image)}" '
        f'width="{round(width * scale)}" height="{round(height * scale)}">'
        f"<figcaption><b>{width} × {height}</b> pixels<br>{lines}</figcaption></figure>"
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f}%"


def _short(count: int) -> str:
    """512 stays, 131072 becomes 131k: labels below bars must be short."""
    for factor, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= factor:
            return f"{count // factor}{unit}"
    return str(count)


STYLE = """
:root { --ink: #263238; --soft: #6b7a83; --line: #e3e8ec; --target: #2e9e6b; --target-soft: #d9f2e5; --image: #5b8def; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7f9; color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { margin: 0; font-size: 26px; font-weight: 650; }
h2 { margin: 0 0 10px; font-size: 16px; } h2 small { color: var(--soft); font-weight: 400; font-size: 13px; }
h3 { margin: 0; font-size: 16px; }
p { margin: 10px 0; } code { color: var(--soft); font: 12px ui-monospace, Menlo, monospace; overflow-wrap: anywhere; }
.note { background: #fff4e0; border-left: 4px solid #f0a63a; border-radius: 6px; padding: 8px 14px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px; margin: 22px 0 14px; }
.tile, .card, article { background: #fff; border: 1px solid var(--line); border-radius: 12px;
  box-shadow: 0 1px 3px rgb(38 50 56 / 6%); }
.tile { padding: 14px 18px; } .tile b { display: block; font-size: 22px; font-weight: 650; }
.tile span, .figures span { color: var(--soft); font-size: 13px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 14px; }
.card { padding: 18px 20px; }
.figures { display: flex; flex-wrap: wrap; gap: 4px 28px; margin-top: 6px; } .figures span { display: block; }
.chart { width: 100%; display: block; } .chart text { font-size: 15px; fill: var(--soft); }
.chart line { stroke: var(--line); } .chart .floor { stroke: #b5c0c7; }
.length { fill: #7c8ff0; } .code { fill: #e58fb1; } .size { fill: #6fbfc4; } .area { fill: #fbe9f0; }
.curve { fill: none; stroke: #e58fb1; stroke-width: 2; }
.legend { display: flex; flex-wrap: wrap; gap: 8px 22px; align-items: center; margin: 34px 0 14px; }
.legend h2 { margin: 0; font-size: 20px; } .legend span { color: var(--soft); font-size: 13px; }
.legend i { display: inline-block; width: 26px; height: 10px; border-radius: 3px; margin-right: 6px; }
article { padding: 16px 20px; margin-bottom: 14px; overflow: hidden; }
article header { display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: baseline; }
article header span { font-size: 13.5px; } article header code { margin-left: auto; }
.mask { display: block; width: 100%; height: 16px; margin: 10px 0 12px; shape-rendering: crispEdges; }
.empty { fill: #e3e8ec; } .target { fill: var(--target); } .image { fill: var(--image); }
.turn { border-top: 1px dashed var(--line); padding: 10px 0 4px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
mark { background: var(--target-soft); color: inherit; border-bottom: 2px solid var(--target); border-radius: 3px;
  padding: 1px 2px; box-decoration-break: clone; -webkit-box-decoration-break: clone; }
kbd { font: 11px ui-monospace, Menlo, monospace; color: var(--soft); background: #eef1f4; border-radius: 5px;
  padding: 2px 6px; margin: 0 4px; white-space: nowrap; }
kbd.predicted { background: var(--target-soft); color: #1f7550; }
figure { display: inline-flex; flex-wrap: wrap; gap: 14px; align-items: center; margin: 8px 12px 8px 0;
  vertical-align: middle; }
figure img { border-radius: 8px; border: 3px solid #e3e8ec; max-width: 100%; height: auto; box-sizing: content-box; }
figure.predicted img { border-color: var(--target); }
figcaption { font-size: 13px; color: var(--soft); } figcaption b { color: var(--ink); }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>What was tokenized</h1>
<code>{title}</code>
{notes}
<div class="tiles">{tiles}</div>
<div class="cards">{cards}</div>
<div class="legend"><h2>{num_shown} of {num_items} items</h2>
<span><i style="background:#2e9e6b"></i>predicted (target)</span>
<span><i style="background:#e3e8ec"></i>given, not predicted</span>
<span><i style="background:#5b8def"></i>tokens of an image</span>
<span><mark>text that is predicted</mark></span>
<span><kbd>control token</kbd></span></div>
{items}
</main>
</body>
</html>
"""
