"""What the HTML pages of the project share: text that is no markup, pictures in the page, a file that appears whole.

Where it stands: under `pre_tokenize/page.py` (what was tokenized) and `model/report_page.py` (a run). Every string that
comes from data or a user goes through `escape`.
"""

import base64
import html
import io
import os

from PIL import Image

from data.whole_file import open_whole

PNG_MAX_PIXELS = 256 * 256  # larger pictures are embedded as JPEG, or a page of 768-pixel ones would weigh tens of MB
# Characters that would vanish or reorder the text around them are shown by a picture of themselves.
VISIBLE_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
VISIBLE_CONTROLS |= {code: f"[U+{code:04X}]" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def escape(text: object) -> str:
    """Text that is safe between tags and within quotes of attributes, with nothing invisible in it."""
    return html.escape(str(text).translate(VISIBLE_CONTROLS), quote=True)


def data_uri(image: Image.Image) -> str:
    """A picture as a `data:` address: exact where it is small."""
    buffer = io.BytesIO()
    kind = "png" if image.width * image.height <= PNG_MAX_PIXELS else "jpeg"
    image.save(buffer, kind, **({"optimize": True} if kind == "png" else {"quality": 92}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_page(page: str, path: str | os.PathLike) -> None:
    """Write the page; it appears whole or not at all."""
    with open_whole(path) as file:
        file.write(page.encode(errors="xmlcharrefreplace"))  # names of files may hold bytes that are no text
