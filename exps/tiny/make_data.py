"""Write the training conversations of the laptop default as the recipe's input JSON, with their pictures.

    python exps/tiny/make_data.py --out_dir output/tiny/data

Four kinds of items, all from scenes with exact ground truth (`scenes.py`), none with a held-out pair: text to image,
image to caption, edits of a given picture, and a picture drawn from text and then edited. The same arguments write
the same files; what is already there is left alone.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from exps.tiny.scenes import Scene, all_scenes, caption, draw, random_edit, random_scene  # noqa: E402

CAPTION_REQUEST = "Describe the image."
KIND_WEIGHTS = {"text_to_image": 0.33, "image_to_text": 0.22, "edit": 0.3, "text_to_image_and_edit": 0.15}


def build_item(kind: str, rng: random.Random) -> tuple[list[str], list[Scene]]:
    """The turns, human first, and the scenes of their `<|image|>` symbols in order, for one item of a kind."""
    scene = random_scene(rng)
    if kind == "text_to_image":
        return [caption(scene), "<|image|>"], [scene]
    if kind == "image_to_text":
        return [f"<|image|>{CAPTION_REQUEST}", caption(scene)], [scene]
    instruction, edited = random_edit(scene, rng)
    if kind == "edit":
        return [f"<|image|>{instruction}", "<|image|>"], [scene, edited]
    return [caption(scene), "<|image|>", instruction, "<|image|>"], [scene, edited]


def build_items(num_items: int, seed: int, file_names: dict[Scene, str]) -> list[dict]:
    """`num_items` items of the recipe's input format, kinds drawn by KIND_WEIGHTS."""
    rng = random.Random(seed)
    items = []
    for _ in range(num_items):
        (kind,) = rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))
        turns, scenes = build_item(kind, rng)
        roles = ["human", "gpt"] * (len(turns) // 2)
        conversations = [{"from": role, "value": text} for role, text in zip(roles, turns, strict=True)]
        items.append({"conversations": conversations, "image": [file_names[scene] for scene in scenes]})
    return items


def write_data(out_dir: Path, num_items: int, seed: int) -> None:
    """Write `images/` and `train.json`, each file whole; what is there already stays. Raises OSError."""
    (out_dir / "images").mkdir(parents=True, exist_ok=True)
    file_names = {scene: f"images/{index:04d}.png" for index, scene in enumerate(all_scenes())}
    for scene, name in tqdm(file_names.items(), desc="scenes", unit="image", mininterval=1):
        if not (out_dir / name).exists():
            draw(scene).save(out_dir / f"{name}.partial", format="PNG")
            os.replace(out_dir / f"{name}.partial", out_dir / name)

    lines = [json.dumps(item) for item in build_items(num_items, seed, file_names)]
    text = "[\n" + ",\n".join(lines) + "\n]\n"
    path = out_dir / "train.json"
    if path.exists() and path.read_bytes() == text.encode():
        print(f"{path}: already there, {num_items} items")
        return
    partial = path.with_name("train.json.partial")
    partial.write_text(text)
    os.replace(partial, path)
    print(f"{path}: {num_items} items over {len(file_names)} pictures")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out_dir", type=Path, default=Path("output/tiny/data"), help="default: %(default)s")
    parser.add_argument("--num_items", type=int, default=16000, help="conversations to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.num_items < 1:
        print(f"--num_items must be at least 1, got {args.num_items}", file=sys.stderr)
        return 2

    try:
        write_data(args.out_dir, args.num_items, args.seed)
    except OSError as error:
        print(f"make_data.py: --out_dir {args.out_dir} cannot be written ({error}); choose another", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
