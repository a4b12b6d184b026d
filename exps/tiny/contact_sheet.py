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
    rows = [(title, _rows(tiles, width)) for title, tiles in sections]
    height = sum(TITLE_HEIGHT + len(tiles) * tile_height for _, tiles in rows) + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    title_font, text_font = ImageFont.load_default(20), ImageFont.load_default(12)
    top = GAP
    for title, section_rows in rows:
        pen.text((GAP, top + 2), title, fill=INK, font=title_font)
        top += TITLE_HEIGHT
        for tiles in section_rows:
            left = GAP
            for tile in tiles:
                _draw_tile(sheet, pen, tile, left, top, text_font)
                left += tile.width + GAP
            top += tile_height
    return sheet


def _rows(tiles: list[Tile], width: int) -> list[list[Tile]]:
    rows: list[list[Tile]] = [[]]
    left = GAP
    for tile in tiles:
        if rows[-1] and left + tile.width + GAP > width:
            rows.append([])
            left = GAP
        rows[-1].append(tile)
        left += tile.width + GAP
    return rows


def _draw_tile(sheet: Image.Image, pen: ImageDraw.ImageDraw, tile: Tile, left: int, top: int, font) -> None:
    box = (left, top, left + tile.width - 1, top + SIDE + 2 * FRAME - 1)
    pen.rectangle(box, fill=RIGHT if tile.right else WRONG)
    for index, image in enumerate(tile.images):
        place = (left + FRAME + index * (SIDE + FRAME), top + FRAME)
        shown = Image.new("RGB", (SIDE, SIDE), PAPER) if image is None else image
        sheet.paste(shown.resize((SIDE, SIDE), Image.Resampling.NEAREST), place)
    lines = textwrap.wrap(tile.text, width=max(8, tile.width // 6))[:TEXT_LINES]
    pen.multiline_text((left, box[3] + 3), "\n".join(lines), fill=INK, font=font, spacing=2)
