"""Render the committed sprites from the Debian font `fonts-noto-color-emoji` (done once; Noto: SIL OFL 1.1).

apt-get install fonts-noto-color-emoji
python exps/tiny/render_sprites.py
"""

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


def main() -> None:
    if not FONT_PATH.is_file():
        sys.exit(f"{FONT_PATH} is missing: apt-get install fonts-noto-color-emoji")
    font = ImageFont.truetype(str(FONT_PATH), FONT_SIZE)
    for name, emoji in EMOJI.items():
        path = Path(__file__).parent / "sprites" / f"{name.replace(' ', '_')}.png"
        render(emoji, font).save(path, optimize=True)


if __name__ == "__main__":
    main()
