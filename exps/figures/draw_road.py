"""Draws `exps/figures/road.svg`, the figure of the README, from a finished laptop default.

bash exps/tiny.sh && python exps/figures/draw_road.py
"""

import argparse
import base64
import colorsys
import json
import pickle
import textwrap
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
PANEL, GAP, HEIGHT = 228, 32, 250
ARROW = 'fill="none" stroke="#3b6fd4" stroke-width="3"'
SCRIPT = 'fill="#3b6fd4" text-anchor="end" font-family="monospace"'
GREY = 'fill="#666"'
STAGES = [
    ("data.json", "pre_tokenize/pre_tokenize.py"),
    ("token files", "finetune_solver.py"),
    ("training", "inference_solver.py"),
    ("images", ""),
]


def text(x: float, y: float, words: str, size: int = 12, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" {style}>{escape(words)}</text>'


def image(path: Path, x: float, y: float, side: float) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    place = f'x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" style="image-rendering: pixelated"'
    return f'<image href="data:image/png;base64,{data}" {place}/>'


def draw_item(item: dict, image_path: Path, x: float) -> str:
    prompt = item["conversations"][0]["value"]
    words = ["human:", *textwrap.wrap(prompt, 28), "gpt:", "<|image|>"]
    lines = (text(x, 60 + 16 * row, line, 12, 'font-family="monospace"') for row, line in enumerate(words))
    return "".join(lines) + image(image_path, x + 124, 128, 80)


def draw_tokens(tokens: list[int], labels: list[int], x: float) -> str:
    """One square per token: grey for the prompt, a colour per id for what is predicted."""
    squares, columns, side = [], 9, 22
    for place, (token, label) in enumerate(zip(tokens, labels, strict=True)):
        hue = colorsys.hls_to_rgb(token * 0.618 % 1, 0.6, 0.65) if label != -100 else (0.75, 0.75, 0.75)
        colour = "#" + "".join(f"{round(255 * part):02x}" for part in hue)
        row, column = divmod(place, columns)
        squares.append(f'<rect x="{x + side * column}" y="{50 + side * row}" width="19" height="19" fill="{colour}"/>')
    return "".join(squares) + text(x, 214, "grey: given, colours: predicted", 11, GREY)


def draw_loss(metrics: list[dict], x: float) -> str:
    points = [(line["step"], line["image_loss"]) for line in metrics if line.get("image_loss")]
    width, top, bottom = PANEL - 30, 64, 216
    last, most = points[-1][0], max(loss for _, loss in points)
    places = ((x + width * step / last, bottom - (bottom - top) * loss / most) for step, loss in points)
    path = " ".join(f"{left:.1f},{height:.1f}" for left, height in places)
    axes = f'<path d="M{x},{top} V{bottom} H{x + width}" fill="none" stroke="#999"/>'
    curve = f'<polyline points="{path}" fill="none" stroke="#3b6fd4" stroke-width="1.5"/>'
    return axes + curve + text(x + 60, 84, "image_loss by step", 11, GREY)


def draw_samples(folder: Path, number: int, x: float) -> str:
    steps = sorted(folder.iterdir())
    prompt = json.loads((steps[-1] / "samples.json").read_text())[number]["prompt"]
    parts = [text(x + 98, 160 + 15 * row, line, 11) for row, line in enumerate(textwrap.wrap(prompt, 17))]
    for place, step in enumerate((steps[0], steps[1], steps[-1])):
        row, column = divmod(place, 2)
        left, top = x + 98 * column, 48 + 96 * row
        parts += [image(step / f"{number:03d}-0.png", left, top, 72)]
        parts += [text(left, top + 84, f"step {int(step.name.removeprefix('step'))}", 10, GREY)]
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", type=Path, default=HERE.parents[1] / "output" / "tiny", help="folder of exps/tiny.sh")
    args = parser.parse_args()
    data, run = args.tiny / "data", args.tiny / "checkpoints"
    items = json.loads((data / "train.json").read_text())
    number = next(i for i, item in enumerate(items) if len(item["image"]) == 1 and "cat" in str(item))
    with (args.tiny / "tokens" / "files" / f"{number}.pkl").open("rb") as file:
        tokens = pickle.load(file)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    lefts = [10 + (PANEL + GAP) * place for place in range(len(STAGES))]
    parts = []
    for left, (name, script) in zip(lefts, STAGES, strict=True):
        parts += [f'<rect x="{left}" y="10" width="{PANEL}" height="{HEIGHT - 20}" rx="8" fill="#fff" stroke="#bbb"/>']
        parts += [text(left + 12, 34, name, 15, 'font-weight="bold"')]
        if script:
            parts += [f'<path d="M{left + PANEL + 4},{HEIGHT / 2} h18 m-7,-6 l8,6 l-8,6" {ARROW}/>']
            parts += [text(left + PANEL - 6, HEIGHT - 18, script, 10, SCRIPT)]
    parts += [draw_item(items[number], data / items[number]["image"][0], lefts[0] + 12)]
    parts += [draw_tokens(tokens["token"], tokens["label"], lefts[1] + 14), draw_loss(metrics, lefts[2] + 14)]
    parts += [draw_samples(run / "samples", 1, lefts[3] + 16)]
    width = lefts[-1] + PANEL + 10
    style = f'viewBox="0 0 {width} {HEIGHT}" font-family="sans-serif" fill="#222"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {style}>{"".join(parts)}</svg>\n'
    (HERE / "road.svg").write_text(svg)


if __name__ == "__main__":
    main()
