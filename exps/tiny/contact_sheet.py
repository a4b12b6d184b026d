"""One image of many answers: titled sections of tiles, each one or two images with their text, right or wrong."""

import textwrap
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

# Images of 64 pixels are shown at twice their size.
SIDE = 128
GAP = 14
FRAME = 4
LINE_HEIGHT = 15
TEXT_LINES = 4
TITLE_HEIGHT = 40
RIGHT, WRONG, INK, PAPER = (46, 139, 87), (205, 60, 50), (30, 30, 34), (252, 252, 250)


@dataclass(frozen=True)
class Tile:
    """`images` side by side (None: an empty frame), the `text` under them, and whether the answer was `right`."""

    images: list[Image.Image | None]
    text: str
    right: bool

    @property
    def width(self) -> int:
        return len(self.images) * (SIDE + FRAME) + FRAME


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
