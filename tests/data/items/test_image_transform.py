"""Opening and cropping images: the reference's bytes, every mode and format, and damaged files."""

import hashlib
import random
import re

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from data.items.conversation import ItemError
from data.items.image_transform import choose_crop_size, crop_sizes, crop_to_rgb, open_image
from tests.helpers.tokenize_helpers import REFERENCE_DIR, reference_items, reference_results

SIDE = 64
RED, WHITE = (255, 0, 0), (255, 255, 255)


def plain(color: tuple[int, ...] | int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (SIDE, SIDE), color)


def palette_image() -> Image.Image:
    """All red; blue is the second colour of the palette."""
    image = Image.new("P", (SIDE, SIDE), 0)
    image.putpalette([*RED, 0, 0, 255] + [0] * 762)
    return image


def save(image: Image.Image, path, **kwargs):
    image.save(path, **kwargs)
    return path


def crop(path) -> np.ndarray:
    return np.asarray(crop_to_rgb(open_image(path), SIDE)).astype(int)


def test_crops_equal_the_reference_byte_by_byte():
    compared = 0
    for item in reference_items():
        paths = [item["image"]] if isinstance(item["image"], str) else item["image"]
        for path, expected in zip(paths, reference_results()[item["id"]]["images"], strict=False):
            image = crop_to_rgb(open_image(REFERENCE_DIR / path), 256)
            assert list(image.size) == expected["out_size"], path
            assert hashlib.sha1(image.tobytes()).hexdigest() == expected["rgb_sha1"], path
            compared += 1
    assert compared >= 12


def test_crop_sizes():
    assert set(crop_sizes(64)) == {(128, 32), (96, 32), (64, 32), (64, 64), (32, 64), (32, 96), (32, 128)}
    for width, height in crop_sizes(512):
        assert width % 32 == height % 32 == 0 and width * height <= 512**2
        assert max(width, height) <= 4 * min(width, height)
    assert choose_crop_size(1000, 10, 64) == (128, 32)
    with pytest.raises(ValueError, match="multiple of 32 pixels, got 100"):
        crop_sizes(100)


@pytest.mark.parametrize(
    "image, name, expected",
    [
        (plain((0, 255, 255, 0), "CMYK"), "cmyk.tif", RED),
        (plain((0, 255, 255, 0), "CMYK"), "cmyk.jpg", RED),
        (plain(1, "1"), "white.png", WHITE),
        (plain(200, "L"), "grey.png", (200, 200, 200)),
        (plain((90, 0), "LA"), "clear.png", WHITE),
        (plain((90, 255), "LA"), "solid.png", (90, 90, 90)),
        (plain((0, 128), "LA"), "half.png", (127, 127, 127)),
        (plain((*RED, 0), "RGBA"), "rgba.webp", WHITE),
        (plain((*RED, 255), "RGBA"), "rgba.tif", RED),
        (plain(RED), "rgb.avif", RED),
        (plain(RED), "rgb.bmp", RED),
    ],
)
def test_modes_and_formats_keep_their_colour(tmp_path, image, name, expected):
    if name.endswith("avif") and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    assert np.abs(crop(save(image, tmp_path / name)) - expected).max() <= 2


@pytest.mark.parametrize(
    "image, suffix, transparency, expected",
    [
        (palette_image(), "png", 0, WHITE),
        (palette_image(), "png", 1, RED),
        (palette_image(), "png", b"\x00\xff", WHITE),
        (palette_image(), "gif", 0, WHITE),
        (plain(RED), "png", RED, WHITE),
    ],
)
def test_a_transparent_colour_is_white(tmp_path, image, suffix, transparency, expected):
    path = save(image, tmp_path / f"a.{suffix}", transparency=transparency)
    assert (crop(path) == expected).all()


@pytest.mark.parametrize(
    "top, dtype, suffix",
    [
        (65535, np.uint16, "png"),
        (65535, ">u2", "tif"),
        (65535, np.int32, "tif"),
        (1, np.float32, "tif"),
        (255, np.float32, "tif"),
        (65535, np.float32, "tif"),
        (1e9, np.float32, "tif"),
    ],
)
def test_high_depth_is_scaled_not_clipped(tmp_path, top, dtype, suffix):
    image = Image.fromarray(np.linspace(0, top, SIDE).astype(dtype)[None].repeat(SIDE, 0))
    pixels = crop(save(image, tmp_path / f"ramp.{suffix}"))
    assert np.abs(pixels - np.linspace(0, 255, SIDE)[None, :, None]).max() <= 1


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [plain(color) for color in (RED, (0, 255, 0))]
    for suffix in ("gif", "png", "tif"):
        path = save(frames[0], tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
        assert (crop(path) == RED).all()


@pytest.mark.parametrize(
    "orientation, undo, suffix",
    [
        (3, Image.Transpose.ROTATE_180, "png"),
        (6, Image.Transpose.ROTATE_90, "jpg"),
        (8, Image.Transpose.ROTATE_270, "webp"),
        (2, Image.Transpose.FLIP_LEFT_RIGHT, "tif"),
        (4, Image.Transpose.FLIP_TOP_BOTTOM, "jpg"),
        (5, Image.Transpose.TRANSPOSE, "jpg"),
        (7, Image.Transpose.TRANSVERSE, "jpg"),
    ],
)
def test_exif_orientation_is_honoured(tmp_path, orientation, undo, suffix):
    upright = plain(WHITE)
    upright.paste(RED, (0, 0, SIDE // 2, SIDE // 2))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = crop(save(upright.transpose(undo), tmp_path / f"e.{suffix}", exif=exif))
    assert np.abs(pixels[: SIDE // 2 - 8, : SIDE // 2 - 8] - RED).max() <= 12
    assert np.abs(pixels[SIDE // 2 + 8 :] - WHITE).max() <= 12
    assert np.abs(pixels[:, SIDE // 2 + 8 :] - WHITE).max() <= 12


def test_orientation_is_read_from_metadata_that_are_damaged_elsewhere(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    # The maker must be text. Pillow reads this, and cannot write it again.
    exif[0x010F] = 77
    path = save(Image.new("RGB", (40, 20)), tmp_path / "a.jpg", exif=exif)
    content = path.read_bytes()
    assert open_image(path).size == (20, 40)
    generator = random.Random(0)
    start = content.index(b"Exif") + 6
    # Whatever the metadata hold, the pixels are good.
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[generator.randrange(start, start + 38)] = generator.randrange(256)
        path.write_bytes(damaged)
        assert sorted(open_image(path).size) == [20, 40]


def test_bad_files_are_rejected_by_name(tmp_path, monkeypatch):
    good = save(plain(RED), tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("<html>not found</html>")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:80])
    for name, reason in (
        ("empty.png", r"empty\.png cannot be read: it is empty"),
        ("text.png", r"text\.png cannot be read: Pillow knows no such image format"),
        ("cut.png", r"cut\.png cannot be read"),
        ("gone.png", r"gone\.png does not exist"),
        (REFERENCE_DIR / "images" / "v_truncated.jpg", "truncated"),
    ):
        with pytest.raises(ItemError, match=reason):
            open_image(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ItemError, match=r"good\.png.*decompression bomb"):
        open_image(good)
    with pytest.raises(ItemError, match="too narrow"):
        crop_to_rgb(Image.new("L", (500, 1)), 64)


def test_random_crops_come_from_the_generator():
    image = Image.fromarray(np.arange(200 * 70 * 3, dtype=np.uint32).astype(np.uint8).reshape(70, 200, 3))
    crops = [crop_to_rgb(image, 64, np.random.default_rng([0, seed])).tobytes() for seed in (1, 1, 2, 3)]
    assert crops[0] == crops[1] and len(set(crops)) > 1


def test_colours_of_print_are_cropped_in_their_own_mode_as_the_recipe_does():
    pixels = np.random.default_rng(0).integers(0, 256, (150, 200, 4), dtype=np.uint8)
    image = Image.frombytes("CMYK", (200, 150), pixels.tobytes())
    # The recipe: halve while both sides stay larger than the crop, scale to cover it, crop, and then convert.
    expected = image.resize((100, 75), Image.Resampling.BOX).resize((85, 64), Image.Resampling.BICUBIC)
    expected = expected.crop((10, 0, 74, 64)).convert("RGB")
    assert crop_to_rgb(image, 64).tobytes() == expected.tobytes()
    assert crop_to_rgb(image.convert("RGB"), 64).tobytes() != expected.tobytes()


def test_an_image_in_lab_is_not_made_white():
    pixels = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    image = np.asarray(crop_to_rgb(Image.frombytes("LAB", (200, 150), pixels.tobytes()), 64))
    assert image.mean() < 200, "Pillow gives LAB an alpha of 0"


def test_long_text_in_a_png_is_read_over(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * (8 << 20), zip=True)
    assert open_image(save(Image.new("RGB", (40, 20)), tmp_path / "a.png", pnginfo=info)).size == (40, 20)


def test_a_damaged_file_raises_nothing_but_an_item_error(tmp_path):
    generator = random.Random(0)
    image = Image.effect_noise((40, 20), 80).convert("RGB")
    for suffix in ("jpg", "png", "webp", "tif", "gif", "bmp"):
        content = save(image, tmp_path / f"a.{suffix}").read_bytes()
        for _ in range(40):
            damaged = bytearray(content)
            for _ in range(4):
                damaged[generator.randrange(min(len(content), 120))] = generator.randrange(256)
            (tmp_path / f"b.{suffix}").write_bytes(damaged)
            try:
                open_image(tmp_path / f"b.{suffix}")
            except ItemError as error:
                assert re.match(r"image .* cannot be read: ", str(error)) and len(str(error)) < 600
