"""Draw the contact sheet of a checkpoint of the laptop default and score its answers exactly.

    python exps/tiny/score.py --model_path output/tiny/checkpoints --out_dir output/tiny

There are four sets of prompts (TITLES). `scenes.read` reads generated images; an answer is exact if layout, objects and
background (or the whole caption) are right. `score.json` and `contact_sheet.png` are the results; they stay if they
belong to this checkpoint and number of prompts.
"""

import argparse
import json
import random
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.whole_file import open_whole  # noqa: E402
from exps.tiny.make_data import CAPTION_REQUEST  # noqa: E402
from exps.tiny.scenes import SCENE_PIXELS, Scene, all_scenes, caption, draw, random_edit, random_scene, read  # noqa: E402
from inference_solver import FlexARInferenceSolver  # noqa: E402

TITLES = {
    "seen": "Scenes of the training data, from text",
    "held_out_pairs": "Pairs of objects never seen together, from text",
    "edits": "Edits: before and after",
    "captions": "Captions of images",
}
# Of the contact sheet: images of 64 pixels are shown at twice their size.
SIDE = 128
GAP = 14
FRAME = 4
LINE_HEIGHT = 15
TEXT_LINES = 4
TITLE_HEIGHT = 40
RIGHT, WRONG, INK, PAPER = (46, 139, 87), (205, 60, 50), (30, 30, 34), (252, 252, 250)


@dataclass
class Prompt:
    """A question of `text` and `image`. The answer should show `target`, or describe it with `wants_text`."""

    text: str
    target: Scene
    image: Image.Image | None = None
    wants_text: bool = False


@dataclass(frozen=True)
class Tile:
    """`images` side by side (None: an empty frame), the `text` under them, and whether the answer was `right`."""

    images: list[Image.Image | None]
    text: str
    right: bool

    @property
    def width(self) -> int:
        return len(self.images) * (SIDE + FRAME) + FRAME


def build_prompts(num_prompts: int, seed: int) -> dict[str, list[Prompt]]:
    """The four sets, `num_prompts` each, distinct scenes within a set where there are enough."""
    rng = random.Random(seed)
    seen, described = _distinct_scenes(num_prompts, rng), _distinct_scenes(num_prompts, rng)
    held_out = all_scenes(held_out=True)
    held_out = rng.sample(held_out, min(num_prompts, len(held_out)))
    edits = []
    for _ in range(num_prompts):
        scene = random_scene(rng)
        instruction, target = random_edit(scene, rng)
        edits.append(Prompt(instruction, target, image=draw(scene)))
    return {
        "seen": [Prompt(caption(scene), scene) for scene in seen],
        "held_out_pairs": [Prompt(caption(scene), scene) for scene in held_out],
        "edits": edits,
        "captions": [Prompt(CAPTION_REQUEST, scene, image=draw(scene), wants_text=True) for scene in described],
    }


def _distinct_scenes(count: int, rng: random.Random) -> list[Scene]:
    """Distinct scenes of the training world, layouts as often as in the training data."""
    scenes: dict[Scene, None] = {}
    while len(scenes) < min(count, len(all_scenes())):
        scenes[random_scene(rng)] = None
    return list(scenes)


def score_answer(prompt: Prompt, text: str, images: list[Image.Image]) -> tuple[dict[str, bool], Tile]:
    """Whether an answer is right, by attribute, and its tile; the last image counts. Edits show both images."""
    if prompt.wants_text:
        attributes = {"exact": text.strip() == caption(prompt.target)}
        return attributes, Tile([prompt.image], text.strip(), attributes["exact"])
    image = images[-1] if images else None
    scene = read(image) if image else None
    attributes = {"exact": scene == prompt.target}
    for name in ("layout", "objects", "background"):
        attributes[name] = getattr(scene, name, None) == getattr(prompt.target, name)
    return attributes, Tile([prompt.image, image] if prompt.image else [image], prompt.text, attributes["exact"])


def score_all(solver: FlexARInferenceSolver, prompts: dict[str, list[Prompt]]) -> tuple[dict, list]:
    """Greedy answers: `{set}_{attribute}` in 0..1 and `{set}_prompts`; and the first tiles of each set with a title.

    Guidance makes answers of so small a model worse.
    """
    figures, sections, sampling = {}, [], solver.create_logits_processor(cfg=1.0)
    for name, questions in prompts.items():
        requests = []
        for prompt in questions:
            images = [prompt.image] if prompt.image else []
            requests.append({"qas": [["<|image|>" * len(images) + prompt.text, None]], "images": images})
        answers = solver.generate_many(requests, 64, 0.0, sampling, desc=name)
        scored = [score_answer(prompt, *answer) for prompt, answer in zip(questions, answers, strict=True)]
        for attribute in scored[0][0]:
            figures[f"{name}_{attribute}"] = round(sum(right[attribute] for right, _ in scored) / len(scored), 4)
        figures[f"{name}_prompts"] = len(scored)
        title = f"{TITLES[name]}: {figures[f'{name}_exact']:.0%} of {len(scored)} exact"
        sections.append((title, [tile for _, tile in scored[: 8 if name in ("edits", "captions") else 16]]))
    return figures, sections


def draw_contact_sheet(sections: list[tuple[str, list[Tile]]], columns: int = 8) -> Image.Image:
    """All sections, each a title and tiles, one under the other, `columns` single images wide."""
    width = columns * (SIDE + 2 * FRAME) + (columns + 1) * GAP
    tile_height = SIDE + 2 * FRAME + TEXT_LINES * LINE_HEIGHT + GAP
    titles, places, top = [], [], GAP
    for title, tiles in sections:
        titles.append((top + 2, title))
        left, top = GAP, top + TITLE_HEIGHT
        for tile in tiles:
            if left > GAP and left + tile.width + GAP > width:
                left, top = GAP, top + tile_height
            places.append((left, top, tile))
            left += tile.width + GAP
        top += tile_height
    sheet = Image.new("RGB", (width, top), PAPER)
    pen, title_font, text_font = ImageDraw.Draw(sheet), ImageFont.load_default(20), ImageFont.load_default(12)
    for top, title in titles:
        pen.text((GAP, top), title, fill=INK, font=title_font)
    for left, top, tile in places:
        bottom = top + SIDE + 2 * FRAME - 1
        pen.rectangle((left, top, left + tile.width - 1, bottom), fill=RIGHT if tile.right else WRONG)
        for index, image in enumerate(tile.images):
            shown = image or Image.new("RGB", (SIDE, SIDE), PAPER)
            place = (left + FRAME + index * (SIDE + FRAME), top + FRAME)
            sheet.paste(shown.resize((SIDE, SIDE), Image.Resampling.NEAREST), place)
        lines = textwrap.wrap(tile.text, width=max(8, tile.width // 6))[:TEXT_LINES]
        pen.multiline_text((left, bottom + 3), "\n".join(lines), fill=INK, font=text_font, spacing=2)
    return sheet


def is_scored(model_path: Path, num_prompts: int, score_path: Path) -> bool:
    """Whether scores are there, of this checkpoint and number of prompts."""
    if not score_path.is_file() or score_path.stat().st_mtime <= (model_path / "config.json").stat().st_mtime:
        return False
    made = json.loads(score_path.read_text())
    return (made["checkpoint"], made["edits_prompts"]) == (str(model_path), num_prompts)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    path_help = "a checkpoint or a folder of them (default: %(default)s)"
    add("--model_path", type=Path, default=Path("output/tiny/checkpoints"), help=path_help)
    add("--vqgan_dir", default="exps/tiny/vqgan", help="folder of the VQGAN (default: %(default)s)")
    add("--out_dir", type=Path, default=Path("output/tiny"), help="folder to write to (default: %(default)s)")
    add("--num_prompts", type=int, default=256, help="prompts of each set (default: %(default)s)")
    add("--seed", type=int, default=1, help="seed of the prompts (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    score_path, sheet_path = args.out_dir / "score.json", args.out_dir / "contact_sheet.png"
    start = time.time()
    configs = [*args.model_path.glob("config.json"), *args.model_path.glob("epoch*/config.json")]
    if args.num_prompts < 1:
        parser.error(f"--num_prompts must be at least 1, got {args.num_prompts}")
    if not configs:
        parser.error(f"no checkpoint in --model_path {args.model_path}: train one first (bash exps/tiny.sh)")
    model_path = max(configs, key=lambda path: path.stat().st_mtime).parent
    if is_scored(model_path, args.num_prompts, score_path):
        print(f"{score_path}: already there\n{score_path.read_text()}", end="")
        return 0
    try:
        settings = {"target_size": SCENE_PIXELS, "vqgan_dir": args.vqgan_dir, "device": "cpu"}
        solver = FlexARInferenceSolver(str(model_path), "fp32", **settings)
        solver.check_vqgan()
        args.out_dir.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    prompts = build_prompts(args.num_prompts, args.seed)
    figures, sections = score_all(solver, prompts)
    print(f"{model_path}: {sum(map(len, prompts.values()))} answers in {time.time() - start:.0f} s")
    with open_whole(sheet_path) as file:
        draw_contact_sheet(sections).save(file, format="PNG")
    # Last: `is_scored` takes it as the sign of both files.
    with open_whole(score_path) as file:
        file.write((json.dumps({"checkpoint": str(model_path), **figures}, indent=2) + "\n").encode())
    print(f"{score_path.read_text()}{sheet_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
