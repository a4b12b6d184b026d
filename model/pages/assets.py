"""What the HTML pages share: templates, images inside the page, and writing it; a page opens without a network."""

import base64
import io
import os
from pathlib import Path

import jinja2
from PIL import Image

from data.whole_file import open_whole

PAGES_DIR = Path(__file__).parent
# Larger images are embedded as JPEG: a page of 768-pixel PNGs would weigh tens of MB.
PNG_MAX_PIXELS = 256 * 256
# Characters that would vanish, or reorder the text around them, are shown by a symbol.
VISIBLE_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
VISIBLE_CONTROLS |= {code: f"[U+{code:04X}]" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def render(template: str, **values: object) -> str:
    """The page of a template of PAGES_DIR. Every value is escaped, except `markupsafe.Markup`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES_DIR),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value.translate(VISIBLE_CONTROLS) if isinstance(value, str) else value,
    )
    environment.filters |= {"count": "{:,}".format, "percent_of": percent_of, "data_uri": data_uri}
    return environment.get_template(template).render(values)


def percent_of(part: int, whole: int) -> str:
    """The share of `part` in `whole`, such as `12.5%`."""
    return f"{100 * part / max(whole, 1):.1f}%"


def data_uri(image: Image.Image) -> str:
    """An image as a `data:` address, without loss up to PNG_MAX_PIXELS."""
    buffer, kind = io.BytesIO(), "png" if image.width * image.height <= PNG_MAX_PIXELS else "jpeg"
    # PNG knows no quality, JPEG is a bit smaller when optimized.
    image.save(buffer, kind, optimize=True, quality=92)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_page(page: str, path: str | os.PathLike) -> None:
    """Writes the page atomically."""
    with open_whole(path) as file:
        # Names of files may hold bytes that are not text.
        file.write(page.encode(errors="xmlcharrefreplace"))
