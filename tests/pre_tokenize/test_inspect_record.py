"""The page about a record: what it shows, what it rejects, and how a real browser shows it."""

import base64
import html
import io
import itertools
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.formats.record import RecordEntry, read_raw_record, write_merged
from data.formats.token_file import save_token_file, write_shard
from data.items.item_processor import build_text_encode, load_text_tokenizer
from data.items.vocab import IGNORE_INDEX, ChameleonVocab
from model.pages.assets import data_uri
from model.vqgan.vqgan import load_vqgan, pixels_to_image
from pre_tokenize.inspect_record import count_items, main, split_parts, survey_record
from pre_tokenize.page import (
    MAX_LENGTH_BINS,
    Part,
    RecordStats,
    ShownItem,
    build_page,
    length_bins,
    perplexity,
    usage_bins,
)
from tests.helpers.browser_helpers import needs_browser, seen_by_probe, show
from tests.helpers.tokenize_helpers import NUM_CODES, write_tiny_tokenizer, write_tiny_vqgan

SCRIPT = "<script>document.title='taken'</script>"
NASTY = f"a cat {SCRIPT} \"'><img src=x onerror=\"document.title='taken'\"> & </span><reserved08706>\x00\u202e"
CAPTIONS = (NASTY, "ein Kätzchen 🐈\n  on a mat", "plain")
# (width, height) in codes of the images of each item, one item after the other
IMAGE_SIZES = (((4, 4),), ((8, 2), (2, 4)), ())
PROBE = """<script>addEventListener('load', () => {
  const images = [...document.images].map(image => image.naturalWidth + 'x' + image.naturalHeight);
  const other = performance.getEntriesByType('resource').filter(entry => !entry.name.startsWith('data:'));
  const seen = {title: document.title, images, other: other.map(entry => entry.name),
    overflow: document.documentElement.scrollWidth - innerWidth,
    texts: [...document.querySelectorAll('.text')].map(node => node.textContent),
    predicted: [...document.querySelectorAll('mark.text')].map(node => node.textContent)};
  document.body.dataset.seen = JSON.stringify(seen);
})</script>"""


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> Path:
    """A record of three items: a caption for one image, two images for a caption, text alone."""
    folder = tmp_path_factory.mktemp("inspect")
    tokenizer = write_tiny_tokenizer(folder / "tokenizer")
    write_tiny_vqgan(folder / "vqgan")
    vocab, encode = ChameleonVocab.from_tokenizer(tokenizer), build_text_encode(tokenizer)
    (folder / "files").mkdir()
    entries = []
    for item_id, (caption, codes) in enumerate(zip(CAPTIONS, all_codes(), strict=True)):
        images = [token for one in codes for token in vocab.image_to_tokens(one)]
        turns = [encode(caption), images] if item_id == 0 else [[*images, *encode("say")], encode(caption)]
        asked, answered = ([*turn, vocab.end_of_turn_id] for turn in turns)
        label = [IGNORE_INDEX] * (1 + len(asked)) + answered
        save_token_file(folder / "files" / f"{item_id}.pkl", [vocab.bos_id, *asked, *answered], label, item_id)
        entries.append(RecordEntry(f"files/{item_id}.pkl", len(label), item_id))
    write_merged(entries, folder / "record.json")
    return folder / "record.json"


@pytest.fixture(scope="module")
def page(record) -> str:
    """The page of that record, made once."""
    out = record.parent / "made" / "page.html"
    assert main(arguments(record, out)) == 0
    return out.read_text()


@pytest.fixture
def copied(record, tmp_path) -> Path:
    """A copy of the folder of that record, to change."""
    return shutil.copytree(record.parent, tmp_path / "copy")


def all_codes() -> list[list[np.ndarray]]:
    rng = np.random.default_rng(0)
    return [[rng.integers(0, NUM_CODES // 2, (h, w)) for w, h in sizes] for sizes in IMAGE_SIZES]


def arguments(record: Path, out: Path, *more: str) -> list[str]:
    folder = record.parent
    flags = ("--out", out, "--tokenizer", folder / "tokenizer", "--vqgan_dir", folder / "vqgan", "--device", "cpu")
    return [str(record), *map(str, flags), *more]


def test_texts_are_shown_and_predicted_parts_marked(page):
    texts = re.findall(r'<(mark|span) class="text">(.*?)</\1>', page, re.DOTALL)
    shown = [(tag, html.unescape(text)) for tag, text in texts]
    visible = NASTY.replace("\x00", "\u2400").replace("\u202e", "[U+202E]")
    given, predicted = [("span", visible), ("span", "say")], ("mark", CAPTIONS[1])
    assert shown == [*given, predicted, ("span", "say"), ("mark", CAPTIONS[2])]
    assert page.count('<kbd class="">&lt;reserved08706&gt;</kbd>') == 3
    assert page.count('<kbd class="predicted">&lt;reserved08706&gt;</kbd>') == 3


def test_images_are_decoded_from_their_tokens_beside_their_size(page, record):
    vqgan = load_vqgan(record.parent / "vqgan")
    uris = re.findall(r'<img alt="" src="data:image/png;base64,([^"]+)"', page)
    expected = [codes for item in all_codes() for codes in item]
    assert len(uris) == len(expected) == 3
    for uri, codes in zip(uris, expected, strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(uri)))
        decoded = pixels_to_image(vqgan.decode(torch.from_numpy(codes)[None])[0])
        assert image.tobytes() == decoded.tobytes()
        assert f"<b>{image.width} × {image.height}</b> pixels" in page


def test_token_counts_and_label_mask(page, record):
    cards = re.findall(r"<article.*?</article>", page, re.DOTALL)
    lengths = [json.loads(line.rstrip(","))["len"] for line in record.read_text().splitlines()[1:-1]]
    num_image_tokens = [sum(4 + h * (w + 1) for w, h in sizes) for sizes in IMAGE_SIZES]
    targets = [num_image_tokens[0] + 1, len(CAPTIONS[1].encode()) + 1, len(CAPTIONS[2]) + 1]
    for card, length, in_images, num_targets in zip(cards, lengths, num_image_tokens, targets, strict=True):
        assert f"<b>{length:,}</b> tokens: {length - in_images:,} of text, {in_images:,} of" in card
        assert f"<b>{num_targets:,}</b> predicted" in card and f'viewBox="0 0 {length} 16"' in card
        assert f'<rect class="target" x="{length - num_targets}" y="0" width="{num_targets}"' in card
    assert '<rect class="image" x="1" y="12" width="22" height="4"><title>image: tokens 1 to 22' in cards[1]


def test_nothing_of_a_user_becomes_markup(page):
    assert "<script" not in page.lower() and "<img src=x" not in page and "default-src 'none'" in page
    assert "&lt;script&gt;document.title=&#39;taken&#39;&lt;/script&gt;" in page
    stats = RecordStats(np.array([1]), np.zeros(4, int), 1, 0, Counter())
    item = ShownItem("<b>7", f"{SCRIPT}.pkl", [Part("text", 0, 1, 0, 1, SCRIPT)], np.array([True]), 0)
    text = build_page(SCRIPT, stats, [item], [SCRIPT])
    assert "item &lt;b&gt;7" in text and "<b>7" not in text and "<script" not in text and text.count("&lt;script") == 5


def test_figures_cover_the_whole_record(record):
    vocab = ChameleonVocab.from_tokenizer(load_text_tokenizer(record.parent / "tokenizer"))
    stats = count_items(record, survey_record(record, 1, seed=0)[0], vocab)
    flat = np.concatenate([codes.ravel() for item in all_codes() for codes in item])
    assert stats.code_counts.tolist() == np.bincount(flat, minlength=NUM_CODES).tolist()
    assert stats.size_counts == {(64, 64): 1, (128, 32): 1, (32, 64): 1}
    assert stats.num_image_tokens == sum(4 + h * (w + 1) for sizes in IMAGE_SIZES for w, h in sizes)


@pytest.mark.parametrize("lengths", [[5], [5, 5], list(range(3, 4000, 7)), [1, 2, 48], [1, 49]])
def test_every_length_falls_into_one_bin(lengths):
    lengths = np.array(lengths)
    counts, edges = length_bins(lengths)
    assert counts.sum() == len(lengths) and len(counts) <= MAX_LENGTH_BINS and counts[0] and counts[-1]
    assert counts.tolist() == [((a <= lengths) & (lengths < b)).sum() for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("side, kind", [(256, "PNG"), (512, "JPEG")])
def test_large_images_are_embedded_as_jpeg(side, kind):
    image = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    head, content = data_uri(image).split(",")
    embedded = Image.open(io.BytesIO(base64.b64decode(content)))
    assert (head, embedded.format, embedded.size) == (f"data:image/{kind.lower()};base64", kind, image.size)
    assert np.abs(np.asarray(embedded, int) - np.asarray(image, int)).mean() < (2 if kind == "JPEG" else 1e-9)


def test_code_usage_is_counted_by_doublings():
    counts = np.array([0, 0, 1, 2, 3, 4, 9])
    assert usage_bins(counts) == [(0, 0, 2), (1, 1, 1), (2, 3, 2), (4, 7, 1), (8, 15, 1)]
    assert usage_bins(np.zeros(4, int)) == [(0, 0, 4)]
    assert perplexity(np.full(64, 3)) == pytest.approx(64) and perplexity(np.zeros(4)) == 0


def test_the_sample_is_in_order_and_depends_on_the_seed_alone(tmp_path):
    write_merged((RecordEntry(f"{i}.pkl", 1 + i, i) for i in range(50)), tmp_path / "r.json")
    lengths, sample = survey_record(tmp_path / "r.json", 10, 1)
    ids = [entry.id for entry in sample]
    assert lengths.tolist() == list(range(1, 51)) and ids == sorted(set(ids)) and len(ids) == 10
    assert survey_record(tmp_path / "r.json", 10, 1)[1] == sample != survey_record(tmp_path / "r.json", 10, 2)[1]
    assert len(survey_record(tmp_path / "r.json", 99, 0)[1]) == 50


def test_parts_follow_each_other_without_gaps(record):
    vocab = ChameleonVocab.from_tokenizer(load_text_tokenizer(record.parent / "tokenizer"))
    image = vocab.image_to_tokens(np.zeros((2, 2), int))
    letter = vocab.vocab_size - 1
    token = np.array([vocab.bos_id, *image, letter, letter, letter, vocab.end_of_turn_id, *image])
    is_target = np.zeros(len(token), bool)
    # From the second letter on.
    is_target[13:] = True
    parts = list(split_parts(token, is_target, vocab.find_images(token), vocab))
    texts = [("text", 11, 13), ("text", 13, 14), ("control", 14, 15)]
    assert parts == [("control", 0, 1), ("image", 1, 11), *texts, ("image", 15, 25)]


def test_items_in_shards_give_the_same_page(copied, page, tmp_path):
    entries = list(read_raw_record(copied / "record.json"))
    places = write_shard(copied / "0.pkls", [(copied / entry.file).read_bytes() for entry in entries])
    moved = [replace(entry, file="0.pkls", offset=o, nbytes=n) for entry, (o, n) in zip(entries, places, strict=True)]
    write_merged(moved, copied / "record.json")
    assert main(arguments(copied / "record.json", tmp_path / "page.html")) == 0
    texts = (re.sub(r"<(code|title)>.*?</\1>", "", text) for text in (page, (tmp_path / "page.html").read_text()))
    assert len(set(texts)) == 1


def test_a_wrong_label_and_another_manifest_are_remarked(copied, tmp_path, capsys):
    (copied / "manifest.json").write_text('{"tokenizer_sha256": "0", "vqgan_sha256": "0"}')
    save_token_file(copied / "files" / "2.pkl", [0, 70, 71], [IGNORE_INDEX, 70, 72], 2)
    (copied / "record.json").write_text('[{"file": "files/2.pkl", "len": 3, "id": 2}]')
    assert main(arguments(copied / "record.json", tmp_path / "page.html")) == 0
    text = (tmp_path / "page.html").read_text()
    assert "1 labels differ from their tokens" in text
    assert "another tokenizer" in text and "other VQGAN files" in capsys.readouterr().out


def test_another_vqgan_is_rejected_without_any_vqgan(copied, tmp_path, capsys):
    flags = arguments(copied / "record.json", tmp_path / "page.html")
    own = load_vqgan(copied / "vqgan").codebook_sha256
    for codebook, code in ((own, 0), ("0" * 64, 2)):
        (copied / "manifest.json").write_text(json.dumps({"codebook_sha256": codebook, "vqgan_sha256": "0"}))
        assert main(flags) == code
        said = capsys.readouterr()
        assert ("is not the one of the record" in said.err) == bool(code) and "other VQGAN files" not in said.out
    assert main([*flags, "--any_vqgan"]) == 0
    assert "other VQGAN files" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, flags, reason",
    [
        ("[]", [], "has no items"),
        ('[{"file": "files/2.pkl", "len": 3, "id": 2}]', [], "the record says 3"),
        ('[{"file": "other.pkl", "len": 2, "id": 0}]', [], "holds token 65000"),
        ("", ["--tokenizer", "tests"], "tests has no tokenizer.json"),
        ("", ["--vqgan_dir", "."], "no VQGAN in"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(copied, tmp_path, capsys, content, flags, reason):
    save_token_file(copied / "other.pkl", [0, 65000], [IGNORE_INDEX, 65000], 0)
    if content:
        (copied / "record.json").write_text(content)
    assert main(arguments(copied / "record.json", tmp_path / "page.html", *flags)) == 2
    error = capsys.readouterr().err
    assert reason in error and error.startswith("inspect_record.py: ") and "Traceback" not in error
    assert not (tmp_path / "page.html").exists()


def test_all_problems_of_the_arguments_are_one_error(record, tmp_path, capsys):
    flags = ["--num", "0", "--out", str(tmp_path), "--vqgan_dir", str(tmp_path / "gone")]
    assert main([str(tmp_path / "record.json"), *flags]) == 2
    said = capsys.readouterr().err
    for reason in ("record.json does not exist", "--num must be at least 1", "is a folder", "gone is not a folder"):
        assert reason in said
    assert main(arguments(record, record)) == 2 and "is the record itself" in capsys.readouterr().err


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_the_page(browser, page, tmp_path):
    """A probe replaces the page's policy: escaping alone must keep the caption's script out."""
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', page)[0]
    (tmp_path / "probed.html").write_text(page.replace(policy, PROBE))
    for width in (480, 1200):
        show(browser, tmp_path / "probed.html", width, 2400)
        seen = json.loads(seen_by_probe(browser))
        assert seen["other"] == [] and seen["overflow"] <= 0
    assert seen["title"].endswith("record.json")
    assert seen["images"] == ["64x64", "128x32", "32x64"]
    assert seen["predicted"] == list(CAPTIONS[1:]) and SCRIPT in seen["texts"][0]
    browser.save_screenshot(tmp_path / "shot.png")
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))
    # Targets, images, lengths, codes.
    for color in ("#2e9e6b", "#5b8def", "#7c8ff0", "#e58fb1"):
        drawn = (shot == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum()
        assert drawn > 100, f"{color} is not on the page"
