"""From an image file to the RGB crop that the VQGAN sees: opened upright, scaled and cropped to one of a few sizes.

The sizes for a target size of T pixels are whole 32-pixel grids, at most (T/32)^2 of them, with an aspect ratio up to
4. As in the recipe, the crop is done in the mode of the file and transparency is put on white after it, so that the
same file gives the same codes.
"""

import os
from functools import cache
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from data.items.conversation import ItemError
from data.items.vocab import GRID_PIXELS
from data.messages import one_line

MAX_ASPECT_RATIO = 4.0
# Images of these modes are cropped as they are; all others are converted before.
CROP_MODES = ("L", "LA", "RGB", "RGBA", "P", "CMYK", "YCbCr")
_ODD_ALPHA = ("La", "PA", "RGBa")
_HIGH_DEPTH = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
# Orientation of the EXIF data -> how to turn the image. `ImageOps.exif_transpose` fails where other data are damaged.
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# Editors and generators put whole documents into a text chunk of a PNG; Pillow's own bound of a chunk is 1 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20


@cache
def crop_sizes(target_size: int) -> tuple[tuple[int, int], ...]:
    """(width, height) in pixels that a crop may have, widest first. Raises ValueError unless T is a multiple of 32."""
    if target_size < GRID_PIXELS or target_size % GRID_PIXELS:
        raise ValueError(f"the target size must be a positive multiple of {GRID_PIXELS} pixels, got {target_size}")
    max_grids = (target_size // GRID_PIXELS) ** 2
    sizes = []
    # For each width the largest height, and all heights between it and that of the next width.
    for width in range(max_grids, 0, -1):
        tallest, shortest = max_grids // width, (max_grids // (width + 1)) or 1
        for height in range(shortest, tallest + 1):
            if max(width, height) <= MAX_ASPECT_RATIO * min(width, height):
                sizes.append((width * GRID_PIXELS, height * GRID_PIXELS))
    return tuple(sizes)


def choose_crop_size(width: int, height: int, target_size: int) -> tuple[int, int]:
    """The crop size that keeps the largest share of an image of width x height; the wider one on a tie."""

    def share_kept(size: tuple[int, int]) -> tuple[float, tuple[int, int]]:
        ratios = size[0] / width, size[1] / height
        return min(ratios) / max(ratios), size

    return max(crop_sizes(target_size), key=share_kept)


def open_image(source: str | os.PathLike | BytesIO, name: str = "") -> Image.Image:
    """The first frame of an image, decoded whole and upright, of a path or of bytes.

    Raises ItemError with the reason and `name` (default: the path).
    """
    name = name or f"image {one_line(source)}"
    try:
        # Opening a pipe would wait for its writer.
        if not isinstance(source, BytesIO) and os.path.exists(source) and not os.path.isfile(source):
            raise ItemError("it is a folder" if os.path.isdir(source) else "it is no regular file")
        with Image.open(source) as file:
            # Pillow runs Ghostscript, which executes programs of the file: not for what comes from the net.
            if file.format == "EPS" and isinstance(source, BytesIO):
                raise ItemError("EPS is read from files alone")
            file.load()
            return _upright(file)
    except FileNotFoundError:
        raise ItemError(f"{name} does not exist") from None
    except UnidentifiedImageError:
        size = source.getbuffer().nbytes if isinstance(source, BytesIO) else os.path.getsize(source)
        reason = "Pillow knows no such image format" if size else "it is empty"
    # The errors of the decoders for a damaged file have no common class.
    except Exception as error:
        reason = one_line(error) or type(error).__name__
    raise ItemError(f"{name} cannot be read: {reason}")


def _upright(image: Image.Image) -> Image.Image:
    try:
        transpose = _TO_UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    # The pixels are good, and the errors of damaged metadata have no common class.
    except Exception:
        transpose = None
    return image.copy() if transpose is None else image.transpose(transpose)


def crop_to_rgb(image: Image.Image, target_size: int, generator: np.random.Generator | None = None) -> Image.Image:
    """The RGB crop of an image of any mode: scaled to cover the best of `crop_sizes`, cut from the centre.

    With a generator the place of the cut is drawn from it. Raises ItemError for an image too narrow to be scaled.
    """
    image = _to_crop_mode(image)
    return to_rgb(_scale_and_crop(image, choose_crop_size(*image.size, target_size), generator))


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with what is transparent laid on white."""
    if image.mode == "RGB":
        return image
    rgba = np.asarray(image.convert("RGBA"))
    if rgba[..., 3].min() == 255:
        return image.convert("RGB")
    alpha = rgba[..., 3:] / 255.0
    return Image.fromarray(((1 - alpha) * 255 + alpha * rgba[..., :3]).astype(np.uint8))


def _scale_and_crop(image: Image.Image, size: tuple[int, int], generator: np.random.Generator | None) -> Image.Image:
    while image.width >= 2 * size[0] and image.height >= 2 * size[1]:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = max(size[0] / image.width, size[1] / image.height)
    scaled = round(image.width * scale), round(image.height * scale)
    if scaled[0] * scaled[1] > (Image.MAX_IMAGE_PIXELS or float("inf")):
        raise ItemError(f"an image of {image.width}x{image.height} pixels is too narrow to fill {size[0]}x{size[1]}")
    image = image.resize(scaled, resample=Image.Resampling.BICUBIC)
    room = image.width - size[0], image.height - size[1]
    left, top = (side // 2 if generator is None else int(generator.integers(0, side + 1)) for side in room)
    return image.crop((left, top, left + size[0], top + size[1]))


def _to_crop_mode(image: Image.Image) -> Image.Image:
    if image.mode in _HIGH_DEPTH:
        return _to_8_bit(image)
    if image.mode in _ODD_ALPHA or ("transparency" in image.info and image.mode in ("1", "L", "RGB")):
        return image.convert("RGBA")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in CROP_MODES else image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or float, scaled to 8: from 0..1 (float), 0..255, 0..65535, or else its own range."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        values = (values - low) / max(high - low, 1e-12) * 255
    elif image.mode == "F":
        values = values * 255 if high <= 1 else values if high <= 255 else values / 257
    else:
        values = values / 257
    return Image.fromarray(np.round(values).astype(np.uint8))
