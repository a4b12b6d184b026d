"""Write the training conversations of the laptop default as the recipe's input JSON, with their images.

    python exps/tiny/make_data.py --out_dir output/tiny/data

There are four kinds of items, all from scenes with exact ground truth (`scenes.py`), none with a held-out pair: text to
image, image to caption, edits of a given image, and an image drawn from text and then edited. `samples.json` has
prompts for the training's samples, also of held-out pairs. The same arguments write the same files.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.whole_file import open_whole  # noqa: E402
from exps.tiny.scenes import SCENE_PIXELS, Scene, all_scenes, caption, draw, random_edit, random_scene  # noqa: E402

CAPTION_REQUEST = "Describe the image."
KIND_WEIGHTS = {"text_to_image": 0.33, "image_to_text": 0.22, "edit": 0.3, "text_to_image_and_edit": 0.15}


def build_item(rng: random.Random) -> tuple[list[str], list[Scene]]:
    """The turns, human first, and the scenes of their `<|image|>` symbols in order; the kind by KIND_WEIGHTS."""
    (kind,) = rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))
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
    """`num_items` items of the recipe's input format."""
    rng = random.Random(seed)
    items = []
    for _ in range(num_items):
        turns, scenes = build_item(rng)
        conversations = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(turns)]
        items.append({"conversations": conversations, "image": [file_names[scene] for scene in scenes]})
    return items


def build_samples(file_names: dict[Scene, str]) -> list[dict]:
    """Prompts for `--sample_prompts`: three seen scenes and two with a held-out pair from text, a caption, an edit."""
    rng = random.Random(7)
    scenes = [random_scene(rng) for _ in range(3)] + rng.sample(all_scenes(held_out=True), 2)
    prompts = [{"prompt": caption(scene), "size": f"{SCENE_PIXELS}x{SCENE_PIXELS}"} for scene in scenes]
    described = random_scene(rng)
    requests = (CAPTION_REQUEST, random_edit(described, rng)[0])
    return prompts + [{"prompt": f"<|image|>{text}", "image": file_names[described]} for text in requests]


def write_data(out_dir: Path, num_items: int, num_val_items: int, seed: int) -> None:
    """Writes `images/`, `train.json`, `val.json` and `samples.json`, each atomically. Raises OSError."""
    (out_dir / "images").mkdir(parents=True, exist_ok=True)
    file_names = {scene: f"images/{index:04d}.png" for index, scene in enumerate(all_scenes())}
    for scene, name in tqdm(file_names.items(), desc="scenes", unit="image", mininterval=1):
        if not (out_dir / name).exists():
            # Atomic, but not synced to disk: the images are many and can be drawn again.
            draw(scene).save(out_dir / f"{name}.partial", format="PNG")
            os.replace(out_dir / f"{name}.partial", out_dir / name)
    write_list(out_dir / "train.json", build_items(num_items, seed, file_names))
    write_list(out_dir / "val.json", build_items(num_val_items, seed + 1, file_names))
    write_list(out_dir / "samples.json", build_samples(file_names))


def write_list(path: Path, items: list[dict]) -> None:
    """Writes a JSON list, one item per line. A file of the same content stays: tokens that exist belong to it."""
    text = "[\n" + ",\n".join(json.dumps(item) for item in items) + "\n]\n"
    if path.exists() and path.read_text() == text:
        print(f"{path}: already there, {len(items)} items")
        return
    with open_whole(path) as file:
        file.write(text.encode())
    print(f"{path}: {len(items)} items")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out_dir", type=Path, default=Path("output/tiny/data"), help="folder to write to (default: %(default)s)")
    add("--num_items", type=int, default=16000, help="conversations to write (default: %(default)s)")
    add("--num_val_items", type=int, default=400, help="validation conversations (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the draw (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(args.num_items, args.num_val_items) < 1:
        parser.error("--num_items and --num_val_items must be at least 1")
    try:
        write_data(args.out_dir, args.num_items, args.num_val_items, args.seed)
    except OSError as error:
        parser.error(f"--out_dir {args.out_dir} cannot be written ({error}); choose another")
    return 0


if __name__ == "__main__":
    sys.exit(main())
