"""One picture of many answers: titled sections of tiles, each a picture or two with its text and a mark of right or
wrong."""

import textwrap
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SCALE = 2  # pictures are shown at twice their size
PICTURE = 64 * SCALE
GAP = 14
FRAME = 4
LINE_HEIGHT = 15
TEXT_LINES = 4
TITLE_HEIGHT = 40
RIGHT, WRONG, INK, PAPER = (46, 139, 87), (205, 60, 50), (30, 30, 34), (252, 252, 250)


@dataclass(frozen=True)
class Tile:
    """`pictures` side by side (None: an empty frame), the `text` under them, and whether the answer was `right`."""

    pictures: list[Image.Image | None]
    text: str
    right: bool

    @property
    def width(self) -> int:
        return len(self.pictures) * PICTURE + (len(self.pictures) - 1) * FRAME + 2 * FRAME


@dataclass(frozen=True)
class Section:
    title: str
    tiles: list[Tile]


def draw_contact_sheet(sections: list[Section], columns: int = 8) -> Image.Image:
    """All sections, one under the other, `columns` single pictures wide."""
    width = columns * (PICTURE + 2 * FRAME) + (columns + 1) * GAP
    tile_height = PICTURE + 2 * FRAME + TEXT_LINES * LINE_HEIGHT + GAP
    rows = [(section.title, _rows(section.tiles, width)) for section in sections]
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
    box = (left, top, left + tile.width - 1, top + PICTURE + 2 * FRAME - 1)
    pen.rectangle(box, fill=RIGHT if tile.right else WRONG)
    for index, picture in enumerate(tile.pictures):
        place = (left + FRAME + index * (PICTURE + FRAME), top + FRAME)
        if picture is None:
            pen.rectangle((*place, place[0] + PICTURE - 1, place[1] + PICTURE - 1), fill=PAPER)
        else:
            sheet.paste(picture.resize((PICTURE, PICTURE), Image.Resampling.NEAREST), place)
    lines = textwrap.wrap(tile.text, width=max(8, tile.width // 6))[:TEXT_LINES]
    pen.multiline_text((left, box[3] + 3), "\n".join(lines), fill=INK, font=font, spacing=2)
