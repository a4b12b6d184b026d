"""Opening and cropping pictures: the reference's bytes, and what it does not get right."""

import hashlib
import random

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from data.conversation import ItemError
from data.image_transform import choose_crop_size, crop_sizes, crop_to_rgb, open_image
from tests.tokenize_helpers import REFERENCE_DIR, reference_items, reference_results


def test_crops_equal_the_reference_byte_by_byte():
    compared = 0
    for item in reference_items():
        paths = [item["image"]] if isinstance(item["image"], str) else item["image"]
        for path, expected in zip(paths, reference_results()[item["id"]]["images"], strict=False):
            crop = crop_to_rgb(open_image(REFERENCE_DIR / path), 256)
            assert list(crop.size) == expected["out_size"], path
            assert hashlib.sha1(crop.tobytes()).hexdigest() == expected["rgb_sha1"], path
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


def save(image: Image.Image, path, **kwargs):
    image.save(path, **kwargs)
    return path


def test_sixteen_bits_and_floats_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(64, 0)
    expected = np.round(ramp / 257)
    for path in (
        save(Image.fromarray(ramp), tmp_path / "16.png"),
        save(Image.fromarray((ramp / 65535).astype(np.float32)), tmp_path / "f.tif"),
    ):
        crop = np.asarray(crop_to_rgb(open_image(path), 64)).astype(float)
        assert np.abs(crop[..., 0] - expected).max() <= 1


def test_transparency_is_white_in_every_mode(tmp_path):
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    palette = Image.new("P", (64, 64), 0)
    palette.putpalette([255, 0, 0] * 256)
    files = [
        save(clear, tmp_path / "rgba.png"),
        save(clear.convert("LA"), tmp_path / "la.png"),
        save(palette, tmp_path / "p.png", transparency=0),
        save(Image.new("RGB", (64, 64), (255, 0, 0)), tmp_path / "rgb.png", transparency=(255, 0, 0)),
    ]
    for path in files:
        assert (np.asarray(crop_to_rgb(open_image(path), 64)) == 255).all(), path


def test_orientation_is_honoured_and_other_modes_open(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert open_image(save(Image.new("RGB", (40, 20)), tmp_path / "e.jpg", exif=exif)).size == (20, 40)
    for mode, suffix in (("CMYK", "jpg"), ("1", "png"), ("L", "png"), ("RGB", "webp"), ("I;16", "png")):
        path = save(Image.new(mode, (40, 40)), tmp_path / f"{mode}.{suffix}")
        assert crop_to_rgb(open_image(path), 32).size == (32, 32)
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    path = save(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert crop_to_rgb(open_image(path), 32).getpixel((5, 5)) == (255, 0, 0)


def test_bad_files_are_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    big = save(Image.new("L", (100, 100)), tmp_path / "bomb.png")
    with pytest.raises(ItemError, match=r"empty\.png cannot be read: it is empty"):
        open_image(tmp_path / "empty.png")
    with pytest.raises(ItemError, match=r"text\.png.*format"):
        open_image(tmp_path / "text.png")
    with pytest.raises(ItemError, match=r"gone\.png does not exist"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(ItemError, match="truncated"):
        open_image(REFERENCE_DIR / "images" / "v_truncated.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ItemError, match=r"bomb\.png.*decompression bomb"):
        open_image(big)
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
    plain = image.resize((100, 75), Image.Resampling.BOX).resize((85, 64), Image.Resampling.BICUBIC)
    plain = plain.crop((10, 0, 74, 64)).convert("RGB")
    assert crop_to_rgb(image, 64).tobytes() == plain.tobytes()
    assert crop_to_rgb(image.convert("RGB"), 64).tobytes() != plain.tobytes()


def test_an_image_in_lab_is_not_made_white():
    pixels = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    crop = np.asarray(crop_to_rgb(Image.frombytes("LAB", (200, 150), pixels.tobytes()), 64))
    assert crop.mean() < 200, "Pillow gives LAB an alpha of 0"


def test_orientation_is_read_from_metadata_that_are_damaged_elsewhere(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = 77  # the maker must be text; Pillow reads this, and cannot write it again
    path = save(Image.new("RGB", (40, 20)), tmp_path / "a.jpg", exif=exif)
    content = path.read_bytes()
    assert open_image(path).size == (20, 40)
    generator = random.Random(0)
    start = content.index(b"Exif") + 6
    for _ in range(200):  # whatever the metadata hold, the pixels are good
        damaged = bytearray(content)
        for _ in range(3):
            damaged[generator.randrange(start, start + 38)] = generator.randrange(256)
        path.write_bytes(damaged)
        assert sorted(open_image(path).size) == [20, 40]


def test_long_text_in_a_png_is_read_over(tmp_path, monkeypatch):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * (8 << 20), zip=True)
    path = save(Image.new("RGB", (40, 20)), tmp_path / "a.png", pnginfo=info)
    assert open_image(path).size == (40, 20)
    assert PngImagePlugin.MAX_TEXT_CHUNK == 64 << 20
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 4 << 20)
    with pytest.raises(ItemError, match=r"a\.png cannot be read: .*too large"):
        open_image(path)


def test_no_damaged_file_is_anything_but_an_item_error(tmp_path):
    generator = random.Random(0)
    image = Image.effect_noise((40, 20), 80).convert("RGB")
    for suffix in ("jpg", "png", "webp", "tif", "gif", "bmp"):
        content = save(image, tmp_path / f"a.{suffix}").read_bytes()
        for _ in range(60):
            damaged = bytearray(content)
            for _ in range(4):
                damaged[generator.randrange(min(len(content), 120))] = generator.randrange(256)
            (tmp_path / f"b.{suffix}").write_bytes(damaged)
            try:
                open_image(tmp_path / f"b.{suffix}")
            except ItemError as error:
                assert len(str(error)) < 600
