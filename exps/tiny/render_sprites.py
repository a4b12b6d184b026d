"""Render the committed sprites from the Debian font `fonts-noto-color-emoji` (done once; Noto: SIL OFL 1.1).

apt-get install fonts-noto-color-emoji
python exps/tiny/render_sprites.py
"""

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT_PATH = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
# The one bitmap size of the font.
FONT_SIZE = 109
SPRITE_PIXELS = 48
EMOJI = {
    "apple": "🍎", "banana": "🍌", "watermelon": "🍉", "carrot": "🥕", "mushroom": "🍄", "sunflower": "🌻",
    "pine tree": "🌲", "cat": "🐱", "dog": "🐶", "frog": "🐸", "panda": "🐼", "fish": "🐟",
    "car": "🚗", "rocket": "🚀", "gift": "🎁", "soccer ball": "⚽",
}  # fmt: skip


def render(emoji: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji, trimmed, centred on a transparent square of SPRITE_PIXELS."""
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((8, 8), emoji, font=font, embedded_color=True)
    glyph = canvas.crop(canvas.getbbox())
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return square.resize((SPRITE_PIXELS, SPRITE_PIXELS), Image.Resampling.LANCZOS)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--font", type=Path, default=FONT_PATH, help="the colour font (default: %(default)s)")
    parser.add_argument("--out_dir", type=Path, default=Path(__file__).parent / "sprites", help="folder of the PNGs")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not args.font.is_file():
        print(f"{args.font} is missing: apt-get install fonts-noto-color-emoji, or pass --font", file=sys.stderr)
        return 2
    font = ImageFont.truetype(str(args.font), FONT_SIZE)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for name, emoji in EMOJI.items():
        render(emoji, font).save(args.out_dir / f"{name.replace(' ', '_')}.png", optimize=True)
    print(f"{len(EMOJI)} sprites in {args.out_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
