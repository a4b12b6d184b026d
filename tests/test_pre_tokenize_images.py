"""Every kind of picture and of item that the input rules name, through a worker: used rightly, or refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from data.image_transform import crop_to_rgb, open_image
from data.record import read_record
from data.token_file import load_token_file
from data.vocab import ChameleonVocab
from data.worker_log import read_failed
from pre_tokenize.loading import count_tokens, prepare_item
from pre_tokenize.pre_tokenize import main as pre_tokenize
from tests.test_item_processor import tiny_processor  # noqa: F401  (a fixture)
from tests.test_pre_tokenize import arguments, task  # noqa: F401  (fixtures)
from tests.tokenize_helpers import REFERENCE_DIR, write_tiny_tokenizer

SIDE = 64
RED, WHITE = (255, 0, 0), (255, 255, 255)


def plain(color: tuple[int, ...] | int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (SIDE, SIDE), color)


def ramp(top: float, dtype: type) -> Image.Image:
    """Grey from 0 at the left to `top` at the right."""
    return Image.fromarray(np.linspace(0, top, SIDE).astype(dtype)[None].repeat(SIDE, 0))


def palette_image(index: int) -> Image.Image:
    image = Image.new("P", (SIDE, SIDE), index)
    image.putpalette([*RED, 0, 0, 255] + [0] * 762)
    return image


def upright_after_exif(orientation: int) -> tuple[Image.Image, dict]:
    """A picture of a red left half as a camera stores it when held so, and how to save it."""
    upright = Image.new("RGB", (SIDE, SIDE), WHITE)
    upright.paste(RED, (0, 0, SIDE // 2, SIDE))
    undo = {
        3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270,
        2: Image.Transpose.FLIP_LEFT_RIGHT, 5: Image.Transpose.TRANSPOSE,
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    return upright.transpose(undo[orientation]), {"exif": exif}


def crop(path: Path) -> np.ndarray:
    return np.asarray(crop_to_rgb(open_image(path), SIDE)).astype(int)


@pytest.mark.parametrize(
    "image, name, expected",
    [
        (plain((0, 255, 255, 0), "CMYK"), "cmyk.tif", RED),
        (plain((0, 255, 255, 0), "CMYK"), "cmyk.jpg", RED),
        (plain(1, "1"), "white.png", WHITE),
        (plain(0, "1"), "black.png", (0, 0, 0)),
        (plain(200, "L"), "grey.png", (200, 200, 200)),
        (plain((90, 0), "LA"), "clear.png", WHITE),
        (plain((90, 255), "LA"), "solid.png", (90, 90, 90)),
        (plain((0, 128), "LA"), "half.png", (127, 127, 127)),
        (plain((*RED, 0), "RGBA"), "rgba.png", WHITE),
        (plain((*RED, 0), "RGBA"), "rgba.webp", WHITE),
        (plain((*RED, 255), "RGBA"), "rgba.tif", RED),
        (plain(RED), "rgb.webp", RED),
        (plain(RED), "rgb.avif", RED),
        (plain(RED), "rgb.tif", RED),
        (plain(RED), "rgb.bmp", RED),
    ],
)
def test_modes_and_formats_keep_their_colour(tmp_path, image, name, expected):
    if name.endswith("avif") and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    image.save(tmp_path / name)
    assert np.abs(crop(tmp_path / name) - expected).max() <= 2


def test_transparency_of_a_palette_is_white_where_it_is_and_a_colour_where_not(tmp_path):
    for index, transparency, expected in ((0, 0, WHITE), (0, 1, RED), (0, b"\x00\xff", WHITE), (1, 0, (0, 0, 255))):
        palette_image(index).save(tmp_path / "p.png", transparency=transparency)
        assert (crop(tmp_path / "p.png") == expected).all(), (index, transparency)
    palette_image(0).save(tmp_path / "p.gif", transparency=0)
    assert (crop(tmp_path / "p.gif") == WHITE).all()


@pytest.mark.parametrize(
    "image, name",
    [
        (ramp(65535, np.uint16), "16.png"),
        (ramp(65535, np.uint16), "16.tif"),
        (ramp(65535, ">u2"), "16_big_endian.tif"),
        (ramp(65535, np.int32), "32.tif"),
        (ramp(1, np.float32), "unit_float.tif"),
        (ramp(255, np.float32), "byte_float.tif"),
        (ramp(65535, np.float32), "word_float.tif"),
        (ramp(1e9, np.float32), "wide_float.tif"),
    ],
)
def test_high_depth_is_scaled_not_clipped(tmp_path, image, name):
    image.save(tmp_path / name)
    assert np.abs(crop(tmp_path / name) - np.linspace(0, 255, SIDE)[None, :, None]).max() <= 1


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_frame_of_an_animation_is_taken(tmp_path, suffix):
    frames = [plain(color) for color in (RED, (0, 255, 0), (0, 0, 255))]
    lossless = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **lossless)
    with Image.open(tmp_path / f"a.{suffix}") as file:
        assert file.n_frames == 3
    assert (crop(tmp_path / f"a.{suffix}") == RED).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [2, 3, 5, 6, 8])
def test_exif_orientation_is_honoured(tmp_path, orientation, suffix):
    image, how = upright_after_exif(orientation)
    image.save(tmp_path / f"e.{suffix}", **how)
    pixels = crop(tmp_path / f"e.{suffix}")
    assert np.abs(pixels[:, : SIDE // 2 - 8] - RED).max() <= 12
    assert np.abs(pixels[:, SIDE // 2 + 8 :] - WHITE).max() <= 12


def item(human: str, gpt: str | None, image: object = None) -> dict:
    turns = [{"from": "human", "value": human}, *([] if gpt is None else [{"from": "gpt", "value": gpt}])]
    return {"conversations": turns, "image": image}


def test_a_worker_refuses_what_is_bad_by_name_and_reason_and_goes_on(task, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)
    plain(RED).save(tmp_path / "good.png")
    Image.new("L", (700, 700)).save(tmp_path / "bomb.png")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:80])
    (tmp_path / "cut.jpg").write_bytes((REFERENCE_DIR / "images" / "v_truncated.jpg").read_bytes())
    (tmp_path / "page.png").write_text("<html>not found</html>")
    (tmp_path / "folder.png").mkdir()
    good = item("draw", "<|image|>", "good.png")
    cases = [
        (good, None),
        (item("draw", "<|image|>", "bomb.png"), r"bomb\.png.*decompression bomb"),
        (item("draw", "<|image|>", "empty.jpg"), r"empty\.jpg cannot be read: it is empty"),
        (item("draw", "<|image|>", "cut.png"), r"cut\.png cannot be read"),
        (item("draw", "<|image|>", "cut.jpg"), r"cut\.jpg cannot be read: .*truncated"),
        (item("draw", "<|image|>", "page.png"), r"page\.png cannot be read: Pillow knows no such image format"),
        (item("draw", "<|image|>", "gone.png"), r"gone\.png does not exist"),
        (item("draw", "<|image|>", "folder.png"), r"folder\.png does not exist"),
        (item("draw", "<|image|><|image|>", "good.png"), r"2 <\|image\|> but `image` lists 1"),
        (item("draw", "<|image|>"), r"1 <\|image\|> but `image` lists 0"),
        (item("draw", None, "good.png"), "nothing to predict"),
        (item("hello", "good day", []), None),
        (item("hello", "good day", ""), None),
        (item("look at", "two", ["good.png", "good.png"]), None),
        (good, None),
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(raw) + "\n" for raw, _ in cases))
    out = tmp_path / "out"
    assert pre_tokenize(arguments(task, out, in_filename=tmp_path / "in.jsonl", num_workers=0)) == 3
    reasons = dict(read_failed(out / "0-of-1-failed.jsonl"))
    assert list(reasons) == [i for i, (_, reason) in enumerate(cases) if reason]
    for item_id, reason in reasons.items():
        with pytest.raises(AssertionError, match=cases[item_id][1]):
            raise AssertionError(reason)
    entries = list(read_record(out / "0-of-1-record.jsonl"))
    assert [entry.id for entry in entries] == [i for i, (_, reason) in enumerate(cases) if not reason]
    vocab = ChameleonVocab.from_tokenizer(write_tiny_tokenizer(tmp_path / "tokenizer"))
    num_images = [len(vocab.find_images(load_token_file(entry.file).token)) for entry in entries]
    assert num_images == [1, 0, 0, 2, 1]


def test_the_length_is_known_before_the_images_are_encoded(tiny_processor, tmp_path):  # noqa: F811
    Image.new("RGB", (128, 32)).save(tmp_path / "wide.png")
    paths = [str(tmp_path / "wide.png")] * 2
    for raw in (item("a <|image|> b <|image|>", "c", paths), item("a", "<|image|> c <|image|>", paths), item("a", " ")):
        prepared = prepare_item(tiny_processor, 0, raw)
        token = tiny_processor.tokenize_item(raw, 0)["token"]
        assert count_tokens(prepared, tiny_processor.vocab) == len(token)
        assert prepare_item(tiny_processor, 0, raw, len(token)) == prepared
        refused = prepare_item(tiny_processor, 0, raw, len(token) - 1)
        assert refused.reason == f"it needs {len(token)} tokens, --max_seq_len is {len(token) - 1}"
