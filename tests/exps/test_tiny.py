"""The laptop default: scenes and their reader, the data, the tokenizer, and the gates of the committed VQGAN."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.items.vocab import ChameleonVocab
from exps.tiny import make_data, score, train_tokenizer, train_vqgan
from exps.tiny.scenes import HELD_OUT_PAIRS, OBJECTS, Scene, all_scenes, caption, draw, random_edit, random_scene, read
from exps.tiny.train_vqgan import k_means
from model.decoder.chameleon import build_config, build_model
from model.vqgan.vqgan import image_to_pixels, load_vqgan, pixels_to_image
from tests.helpers.small_run import export_hf

VQGAN_DIR = Path(__file__).parents[2] / "exps" / "tiny" / "vqgan"


def test_the_reader_reads_drawings_and_noisy_ones_and_rejects_emptiness():
    rng = np.random.default_rng(0)
    for number, scene in enumerate((all_scenes() + all_scenes(held_out=True))[::3]):
        assert read(draw(scene)) == scene
        if number % 40 == 0:
            noisy = np.asarray(draw(scene)) + rng.normal(0, 20, (64, 64, 3))
            assert read(Image.fromarray(noisy.clip(0, 255).astype(np.uint8))) == scene
    assert read(Image.new("RGB", (64, 64), (214, 40, 40))) is None
    assert read(Image.new("RGB", (32, 64))) is None


def test_captions_tell_scenes_apart():
    scenes = all_scenes() + all_scenes(held_out=True)
    assert len({caption(scene) for scene in scenes}) == len(scenes)
    assert caption(Scene("three", ("car",) * 3, "white")) == "three cars on a white background"


def test_held_out_pairs_are_never_trained_on():
    assert len(HELD_OUT_PAIRS) == round(0.15 * len(list(itertools.combinations(OBJECTS, 2))))
    rng = random.Random(0)
    for _ in range(3000):
        scene = random_scene(rng)
        instruction, edited = random_edit(scene, rng)
        assert not scene.is_held_out and not edited.is_held_out and edited != scene and instruction


@pytest.mark.slow
def test_make_data_writes_the_same_files_twice(tmp_path, capsys):
    arguments = ["--out_dir", str(tmp_path), "--num_items", "50"]
    assert make_data.main(arguments) == 0
    text = (tmp_path / "train.json").read_text()
    items = json.loads(text)
    assert len(items) == 50
    for item in items:
        symbols = sum(turn["value"].count("<|image|>") for turn in item["conversations"])
        assert symbols == len(item["image"])
        assert all((tmp_path / name).is_file() for name in item["image"])
    assert make_data.main(arguments) == 0
    assert "already there" in capsys.readouterr().out
    assert (tmp_path / "train.json").read_text() == text
    assert len(json.loads((tmp_path / "val.json").read_text())) == 400
    prompts = json.loads((tmp_path / "samples.json").read_text())
    assert all((tmp_path / prompt.get("image", "train.json")).is_file() for prompt in prompts) and len(prompts) == 7


def test_the_tokenizer_has_chameleons_layout():
    texts = [caption(scene) for scene in all_scenes()[::7]]
    tokenizer = train_tokenizer.train_tokenizer(texts)
    vocab = ChameleonVocab.from_tokenizer(tokenizer)
    assert len(tokenizer) == vocab.vocab_size == train_tokenizer.VOCAB_SIZE
    assert vocab.num_codes == train_tokenizer.NUM_CODES
    codes = np.arange(16).reshape(4, 4)
    assert (vocab.tokens_to_codes(vocab.image_to_tokens(codes)) == codes).all()
    ids = tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == texts[0] and len(ids) < 16


def test_k_means_finds_separate_groups():
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(5, 8, generator=generator) * 50
    points = (groups[:, None] + torch.randn(5, 20, 8, generator=generator)).reshape(-1, 8)
    nearest = torch.cdist(points, k_means(points, 5, generator)).argmin(1).view(5, 20)
    assert (nearest == nearest[:, :1]).all() and len(nearest[:, 0].unique()) == 5


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [False, True])
def test_first_gate_scenes_survive_encode_and_decode(held_out):
    vqgan, scenes = load_vqgan(VQGAN_DIR), all_scenes(held_out)[:: 3 if held_out else 16]
    codes = vqgan.encode(torch.stack([image_to_pixels(draw(scene)) for scene in scenes]))
    images = [pixels_to_image(pixels) for pixels in vqgan.decode(codes)]
    assert np.mean([read(image) == scene for image, scene in zip(images, scenes, strict=True)]) >= 0.99


@pytest.mark.slow
def test_second_gate_codes_are_local():
    """The left half of a pair has the same codes whatever stands on the right."""
    pairs = [Scene("pair", pair, "white") for pair in itertools.product(OBJECTS[:8], OBJECTS[::3])]
    codes = load_vqgan(VQGAN_DIR).encode(torch.stack([image_to_pixels(draw(scene)) for scene in pairs]))
    left = {name: [] for name in OBJECTS[:8]}
    for scene, code in zip(pairs, codes[:, :, :2], strict=True):
        left[scene.objects[0]].append(code)
    kept = [(code == group[0]).float().mean() for group in left.values() for code in group[1:]]
    assert np.mean(kept) >= 0.98


def test_the_committed_vqgan_is_small():
    assert sum(path.stat().st_size for path in VQGAN_DIR.iterdir()) <= 5e6


def test_scoring_is_exact_and_by_attribute():
    scene = Scene("pair", (OBJECTS[0], OBJECTS[1]), "white")
    prompt = score.Prompt(caption(scene), scene)
    attributes, tile = score.score_answer(prompt, "", [draw(scene)])
    assert attributes["exact"] and tile.right and tile.text == caption(scene)
    attributes, _ = score.score_answer(prompt, "", [draw(Scene("pair", (OBJECTS[0], OBJECTS[2]), "white"))])
    assert attributes == {"exact": False, "layout": True, "objects": False, "background": True}
    attributes, tile = score.score_answer(prompt, "no image", [])
    assert not any(attributes.values()) and tile.images == [None]
    described = score.Prompt("Describe the image.", scene, image=draw(scene), wants_text=True)
    for text, is_right in ((f" {caption(scene)} ", True), ("a cat", False)):
        attributes, tile = score.score_answer(described, text, [])
        assert attributes == {"exact": is_right} and tile.right == is_right and tile.text == text.strip()


def test_prompts_are_many_and_held_out_ones_are_held_out():
    prompts = score.build_prompts(24, seed=1)
    assert all(len(questions) == 24 for questions in prompts.values())
    assert all(prompt.target.is_held_out == (name == "held_out_pairs") for name in prompts for prompt in prompts[name])


@pytest.mark.slow
def test_score_is_made_again_for_other_prompts_and_other_checkpoints(tmp_path, capsys):
    """An untrained decoder with the tokenizer of the laptop default."""
    tokenizer = train_tokenizer.train_tokenizer([caption(scene) for scene in all_scenes()[::7]])
    model = build_model(build_config("tiny", tokenizer, hidden_size=64, intermediate_size=64), "cpu")
    export_hf(model, model.config, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def run(num_prompts: int) -> str:
        flags = ("--model_path", tmp_path / "model", "--out_dir", tmp_path / "out", "--num_prompts", num_prompts)
        assert score.main([str(flag) for flag in flags]) == 0
        return capsys.readouterr().out

    assert "already there" not in run(2)
    assert "already there" in run(2)
    assert "already there" not in run(1)
    made = json.loads((tmp_path / "out" / "score.json").read_text())
    assert made["edits_prompts"] == 1 and (tmp_path / "out" / "contact_sheet.png").is_file()
    (tmp_path / "out" / "score.json").write_text(json.dumps(made | {"checkpoint": "another"}))
    assert "already there" not in run(1)


VQGAN_FLAGS = ["--steps", "0", "--init_from"]


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (make_data, ["--out_dir", "train.json"], "--out_dir train.json cannot be written"),
        (make_data, ["--num_items", "0"], "must be at least 1"),
        (make_data, ["--num_val_items", "0"], "must be at least 1"),
        (train_tokenizer, ["--in_filename", "train.json"], "train.json is not what exps/tiny/make_data.py writes"),
        (train_tokenizer, ["--in_filename", "nowhere.json"], "nowhere.json is not what exps/tiny/make_data.py writes"),
        (train_tokenizer, ["--out_dir", "."], "choose another"),
        (score, ["--num_prompts", "0"], "--num_prompts must be at least 1"),
        (score, ["--model_path", "."], "no checkpoint"),
        (train_vqgan, ["--steps", "0"], "give --steps above 0"),
        (train_vqgan, [*VQGAN_FLAGS, "."], "no VQGAN in"),
        (train_vqgan, [*VQGAN_FLAGS, str(VQGAN_DIR), "--decoder_steps", "-1"], "no steps below 0"),
    ],
)
def test_scripts_reject_bad_arguments_with_one_message(tmp_path, monkeypatch, capsys, script, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("train.json").write_text('[{"image": "a.png"}]')
    with pytest.raises(SystemExit) as ended:
        script.main(flags)
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]
