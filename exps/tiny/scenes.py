"""Scenes of emoji on coloured backgrounds: how to draw, describe, edit and read a scene.

Drawing and reading are exact. Some unordered pairs of objects never stand side by side in the training data
(`HELD_OUT_PAIRS`).
"""

import itertools
import random
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

SPRITE_DIR = Path(__file__).parent / "sprites"
SCENE_PIXELS = 64
# Background pixels around a sprite inside its slot.
MARGIN = 1
BACKGROUNDS = {
    "red": (214, 40, 40), "yellow": (250, 220, 70), "green": (60, 160, 75),
    "blue": (50, 100, 215), "purple": (130, 60, 170), "white": (245, 245, 245),
}  # fmt: skip
# (left, top, side) of each object's square, by layout.
SLOTS = {
    "big": ((8, 8, 48),),
    "small": ((16, 16, 32),),
    "pair": ((0, 16, 32), (32, 16, 32)),
    "three": ((16, 0, 32), (0, 32, 32), (32, 32, 32)),
    "four": ((0, 0, 32), (32, 0, 32), (0, 32, 32), (32, 32, 32)),
}
LAYOUT_WEIGHTS = {"big": 4, "small": 2, "pair": 4, "three": 1.5, "four": 1.5}
OBJECTS = tuple(sorted(path.stem.replace("_", " ") for path in SPRITE_DIR.glob("*.png")))
HELD_OUT_SHARE = 0.15


@dataclass(frozen=True)
class Scene:
    """`objects` has one name per slot of `layout`; only in a "pair" may they differ."""

    layout: str
    objects: tuple[str, ...]
    background: str

    @property
    def is_held_out(self) -> bool:
        return frozenset(self.objects) in HELD_OUT_PAIRS


_ALL_PAIRS = list(itertools.product(OBJECTS, repeat=2))
_PAIRS = list(itertools.combinations(OBJECTS, 2))
HELD_OUT_PAIRS = frozenset(map(frozenset, random.Random(1234).sample(_PAIRS, round(HELD_OUT_SHARE * len(_PAIRS)))))


def all_scenes(held_out: bool = False) -> list[Scene]:
    """Every scene of the training world, or every one with a held-out pair, in a fixed order."""
    scenes = [
        Scene(layout, objects, background)
        for background in BACKGROUNDS
        for layout, slots in SLOTS.items()
        for objects in (_ALL_PAIRS if layout == "pair" else [(name,) * len(slots) for name in OBJECTS])
    ]
    return [scene for scene in scenes if scene.is_held_out == held_out]


def random_scene(rng: random.Random) -> Scene:
    """A scene of the training world: layouts by LAYOUT_WEIGHTS, objects and background uniform, no held-out pair."""
    while True:
        (layout,) = rng.choices(list(LAYOUT_WEIGHTS), list(LAYOUT_WEIGHTS.values()))
        first = rng.choice(OBJECTS)
        objects = (first,) * len(SLOTS[layout])
        if layout == "pair" and rng.random() < 0.9:
            objects = (first, rng.choice(OBJECTS))
        scene = Scene(layout, objects, rng.choice(list(BACKGROUNDS)))
        if not scene.is_held_out:
            return scene


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    return name if name == "fish" else f"{name}s"


def caption(scene: Scene) -> str:
    """The one sentence that describes the scene, such as "three cars on a white background"."""
    first = scene.objects[0]
    if scene.layout in ("big", "small"):
        what = f"a {scene.layout} {first}"
    elif scene.layout in ("three", "four"):
        what = f"{scene.layout} {plural(first)}"
    elif first == scene.objects[1]:
        what = f"two {plural(first)}"
    else:
        what = f"{with_article(first)} on the left and {with_article(scene.objects[1])} on the right"
    return f"{what} on a {scene.background} background"


def random_edit(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    """An instruction ("replace the cat with a rocket") and the scene it leads to, which is in the training world."""
    while True:
        if rng.random() < 0.4:
            background = rng.choice([name for name in BACKGROUNDS if name != scene.background])
            return f"make the background {background}", replace(scene, background=background)
        new = rng.choice([name for name in OBJECTS if name not in scene.objects])
        old = rng.choice(scene.objects)
        edited = replace(scene, objects=tuple(new if name == old else name for name in scene.objects))
        if edited.is_held_out:
            continue
        if scene.objects.count(old) == 1:
            return f"replace the {old} with {with_article(new)}", edited
        return f"replace the {plural(old)} with {plural(new)}", edited


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB image of SCENE_PIXELS."""
    image = Image.new("RGB", (SCENE_PIXELS, SCENE_PIXELS), BACKGROUNDS[scene.background])
    for name, slot in zip(scene.objects, SLOTS[scene.layout], strict=True):
        _paste(image, name, *slot)
    return image


def read(image: Image.Image) -> Scene | None:
    """The scene that an image shows: nearest background, then the layout and objects whose drawing is nearest.

    None if the image has another size, or if some slot of the nearest layout looks most like empty background.
    """
    if image.size != (SCENE_PIXELS, SCENE_PIXELS):
        return None
    pixels = np.asarray(image.convert("RGB"), np.float32)
    # No sprite covers the frame of one pixel.
    frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    distances = ((np.median(frame, 0) - np.float32(list(BACKGROUNDS.values()))) ** 2).sum(1)
    background = list(BACKGROUNDS)[int(distances.argmin())]
    best_error, best_scene = np.inf, None
    for layout, slots in SLOTS.items():
        drawn = np.broadcast_to(np.float32(BACKGROUNDS[background]), pixels.shape).copy()
        objects = []
        for left, top, side in slots:
            templates = _templates(side, background)
            box = (slice(top, top + side), slice(left, left + side))
            nearest = int(((templates - pixels[box]) ** 2).mean((1, 2, 3)).argmin())
            drawn[box] = templates[nearest]
            objects.append(OBJECTS[nearest] if nearest < len(OBJECTS) else None)
        error = float(((drawn - pixels) ** 2).mean())
        if error < best_error:
            best_error, best_scene = error, None if None in objects else Scene(layout, tuple(objects), background)
    return best_scene


def _paste(image: Image.Image, name: str, left: int, top: int, side: int) -> None:
    sprite = _sprite(name, side - 2 * MARGIN)
    image.paste(sprite, (left + MARGIN, top + MARGIN), sprite)


@cache
def _sprite(name: str, side: int) -> Image.Image:
    with Image.open(SPRITE_DIR / f"{name.replace(' ', '_')}.png") as sprite:
        return sprite.convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)


@cache
def _templates(side: int, background: str) -> np.ndarray:
    """[len(OBJECTS) + 1, side, side, 3]: each object in a slot, and last the empty slot."""
    slots = [Image.new("RGB", (side, side), BACKGROUNDS[background]) for _ in range(len(OBJECTS) + 1)]
    for name, slot in zip(OBJECTS, slots, strict=False):
        _paste(slot, name, 0, 0, side)
    return np.stack([np.asarray(slot, np.float32) for slot in slots])
