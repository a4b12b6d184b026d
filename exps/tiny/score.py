"""Draw the contact sheet of a checkpoint of the laptop default and score its answers exactly.

    python exps/tiny/score.py --model_path output/tiny/checkpoints --out_dir output/tiny

Four sets of prompts: scenes of the training data from text, scenes with a held-out pair from text, edits of given
images, and captions of given images. The reader of `scenes.py` reads generated images; an answer is exact if layout,
objects and background (or the whole caption) are right. `score.json` and `contact_sheet.png` are the results; they stay
if they belong to this checkpoint and number of prompts.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.whole_file import open_whole  # noqa: E402
from exps.tiny.contact_sheet import Tile, draw_contact_sheet  # noqa: E402
from exps.tiny.make_data import CAPTION_REQUEST  # noqa: E402
from exps.tiny.scenes import SCENE_PIXELS, Scene, all_scenes, caption, draw, random_edit, random_scene, read  # noqa: E402


@dataclass
class Prompt:
    """A question of `text` and `image`. The answer should show `target`, or describe it with `wants_text`."""

    text: str
    target: Scene
    image: Image.Image | None = None
    wants_text: bool = False


@dataclass
class Scored:
    """An answer and, by attribute, whether it is right."""

    prompt: Prompt
    text: str
    image: Image.Image | None
    attributes: dict[str, bool] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        return self.attributes["exact"]


def build_prompts(num_prompts: int, seed: int) -> dict[str, list[Prompt]]:
    """The four sets, `num_prompts` each, distinct scenes within a set where there are enough."""
    rng = random.Random(seed)
    seen, described = _distinct_scenes(num_prompts, rng), _distinct_scenes(num_prompts, rng)
    held_out = rng.sample(all_scenes(held_out=True), min(num_prompts, len(all_scenes(held_out=True))))
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


def score_answer(prompt: Prompt, text: str, images: list[Image.Image]) -> Scored:
    """What an answer got right; the last image counts."""
    if prompt.wants_text:
        return Scored(prompt, text.strip(), None, {"exact": text.strip() == caption(prompt.target)})
    image = images[-1] if images else None
    scene = read(image) if image is not None else None
    attributes = {
        name: scene is not None and getattr(scene, name) == getattr(prompt.target, name)
        for name in ("layout", "objects", "background")
    }
    return Scored(prompt, text, image, {"exact": scene == prompt.target, **attributes})


def answer_all(solver, prompts: dict[str, list[Prompt]], max_gen_len: int) -> dict[str, list[Scored]]:
    """Greedy answers to every set, in batches. Guidance makes answers of so small a model worse."""
    scored = {}
    sampling = solver.create_logits_processor(cfg=1.0)
    for name, questions in prompts.items():
        requests = [
            {
                "qas": [["<|image|>" * (prompt.image is not None) + prompt.text, None]],
                "images": [prompt.image] if prompt.image is not None else [],
            }
            for prompt in questions
        ]
        answers = solver.generate_many(requests, max_gen_len, 0.0, sampling, desc=name)
        scored[name] = [score_answer(p, *answer) for p, answer in zip(questions, answers, strict=True)]
    return scored


def summarize(scored: dict[str, list[Scored]]) -> dict[str, float]:
    """`{set}_{attribute}` in 0..1 and `{set}_prompts`."""
    figures = {}
    for name, answers in scored.items():
        for attribute in answers[0].attributes:
            right = sum(answer.attributes[attribute] for answer in answers)
            figures[f"{name}_{attribute}"] = round(right / len(answers), 4)
        figures[f"{name}_prompts"] = len(answers)
    return figures


def build_sections(
    scored: dict[str, list[Scored]], figures: dict[str, float], columns: int
) -> list[tuple[str, list[Tile]]]:
    """The first answers of each set, as tiles for the sheet; edits show the image before and after."""
    titles = {
        "seen": "Scenes of the training data, from text",
        "held_out_pairs": "Pairs of objects never seen together, from text",
        "edits": "Edits: before and after",
        "captions": "Captions of images",
    }
    sections = []
    for name, answers in scored.items():
        tiles = []
        for answer in answers[: columns if name in ("edits", "captions") else 2 * columns]:
            prompt = answer.prompt
            images = [prompt.image, answer.image] if name == "edits" else [answer.image or prompt.image]
            tiles.append(Tile(images, answer.text if prompt.wants_text else prompt.text, answer.exact))
        title = f"{titles[name]}: {figures[f'{name}_exact']:.0%} of {figures[f'{name}_prompts']} exact"
        sections.append((title, tiles))
    return sections


def newest_checkpoint(model_path: Path) -> Path:
    """`model_path` itself if it holds a model, else its newest checkpoint; FileNotFoundError if there is none."""
    if (model_path / "config.json").is_file():
        return model_path
    found = [path.parent for path in model_path.glob("epoch*/config.json")]
    if not found:
        raise FileNotFoundError(f"no checkpoint in {model_path}: train one first (bash exps/tiny.sh)")
    return max(found, key=lambda path: (path / "config.json").stat().st_mtime)


def is_scored(model_path: Path, num_prompts: int, score_path: Path, sheet_path: Path) -> bool:
    """Whether both files are newer than the checkpoint and belong to it and to `num_prompts`."""
    if not (score_path.is_file() and sheet_path.is_file()):
        return False
    made = json.loads(score_path.read_text())
    newest = (model_path / "config.json").stat().st_mtime
    is_newer = min(score_path.stat().st_mtime, sheet_path.stat().st_mtime) > newest
    return is_newer and (made.get("checkpoint"), made.get("edits_prompts")) == (str(model_path), num_prompts)


def load_solver(model_path: Path, vqgan_dir: str):
    """The inference solver with its VQGAN. Raises ValueError or FileNotFoundError if either cannot be loaded."""
    from inference_solver import FlexARInferenceSolver

    solver = FlexARInferenceSolver(str(model_path), "fp32", target_size=SCENE_PIXELS, vqgan_dir=vqgan_dir, device="cpu")
    solver.check_vqgan()
    return solver


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--model_path",
        type=Path,
        default=Path("output/tiny/checkpoints"),
        help="a checkpoint or a folder of them (default: %(default)s)",
    )
    add("--vqgan_dir", default="exps/tiny/vqgan", help="folder of the VQGAN (default: %(default)s)")
    add("--out_dir", type=Path, default=Path("output/tiny"), help="folder to write to (default: %(default)s)")
    add("--num_prompts", type=int, default=256, help="prompts of each set (default: %(default)s)")
    add("--seed", type=int, default=1, help="seed of the prompts (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    score_path, sheet_path = args.out_dir / "score.json", args.out_dir / "contact_sheet.png"
    start = time.time()
    try:
        if args.num_prompts < 1:
            raise ValueError(f"--num_prompts must be at least 1, got {args.num_prompts}")
        model_path = newest_checkpoint(args.model_path)
        if is_scored(model_path, args.num_prompts, score_path, sheet_path):
            print(f"{score_path}: already there\n{score_path.read_text()}", end="")
            return 0
        solver = load_solver(model_path, args.vqgan_dir)
        args.out_dir.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"score.py: {error}", file=sys.stderr)
        return 2
    scored = answer_all(solver, build_prompts(args.num_prompts, args.seed), max_gen_len=64)
    figures = summarize(scored)
    print(f"{model_path}: {sum(map(len, scored.values()))} answers in {time.time() - start:.0f} s")
    with open_whole(sheet_path) as file:
        draw_contact_sheet(build_sections(scored, figures, columns=8)).save(file, format="PNG")
    with open_whole(score_path) as file:
        file.write((json.dumps({"checkpoint": str(model_path), **figures}, indent=2) + "\n").encode())
    print(f"{score_path.read_text()}{sheet_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
