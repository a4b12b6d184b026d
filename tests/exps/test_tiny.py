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
from exps.tiny import make_data, render_sprites, score, train_tokenizer, train_vqgan
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
    for flag in ("--num_items", "--num_val_items"):
        assert make_data.main(["--out_dir", str(tmp_path / "none"), flag, "0"]) == 2
    assert not (tmp_path / "none").exists()


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


@pytest.fixture(scope="module")
def vqgan():
    return load_vqgan(VQGAN_DIR)


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [False, True])
def test_first_gate_scenes_survive_encode_and_decode(vqgan, held_out):
    scenes = all_scenes(held_out)[:: 3 if held_out else 16]
    codes = vqgan.encode(torch.stack([image_to_pixels(draw(scene)) for scene in scenes]))
    images = [pixels_to_image(pixels) for pixels in vqgan.decode(codes)]
    assert np.mean([read(image) == scene for image, scene in zip(images, scenes, strict=True)]) >= 0.99


@pytest.mark.slow
def test_second_gate_codes_are_local(vqgan):
    """The left half of a pair has the same codes whatever stands on the right."""
    pairs = [Scene("pair", pair, "white") for pair in itertools.product(OBJECTS[:8], OBJECTS[::3])]
    codes = vqgan.encode(torch.stack([image_to_pixels(draw(scene)) for scene in pairs]))
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
    assert score.score_answer(prompt, "", [draw(scene)]).exact
    other = score.score_answer(prompt, "", [draw(Scene("pair", (OBJECTS[0], OBJECTS[2]), "white"))])
    assert other.attributes == {"exact": False, "layout": True, "objects": False, "background": True}
    assert not score.score_answer(prompt, "no image", []).exact
    described = score.Prompt("Describe the image.", scene, image=draw(scene), wants_text=True)
    assert score.score_answer(described, f" {caption(scene)} ", []).exact
    assert not score.score_answer(described, "a cat", []).exact


def test_prompts_are_many_and_held_out_ones_are_held_out():
    prompts = score.build_prompts(24, seed=1)
    assert all(len(questions) == 24 for questions in prompts.values())
    assert all(prompt.target.is_held_out == (name == "held_out_pairs") for name in prompts for prompt in prompts[name])


@pytest.fixture(scope="module")
def fresh_checkpoint(tmp_path_factory):
    """An untrained decoder with the tokenizer of the laptop default."""
    folder = tmp_path_factory.mktemp("fresh")
    tokenizer = train_tokenizer.train_tokenizer([caption(scene) for scene in all_scenes()[::7]])
    model = build_model(build_config("tiny", tokenizer, hidden_size=64, intermediate_size=64), "cpu")
    export_hf(model, model.config, folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_score_is_made_again_for_other_prompts_and_other_checkpoints(fresh_checkpoint, tmp_path, capsys):
    def run(num_prompts: int, out_dir=tmp_path / "out") -> str:
        flags = ["--model_path", str(fresh_checkpoint), "--out_dir", str(out_dir), "--num_prompts", str(num_prompts)]
        assert score.main(flags) == 0
        assert not list(out_dir.glob("*.partial"))
        return capsys.readouterr().out

    assert "already there" not in run(2)
    assert "already there" in run(2)
    assert "already there" not in run(1)
    made = json.loads((tmp_path / "out" / "score.json").read_text())
    assert made["edits_prompts"] == 1
    (tmp_path / "out" / "score.json").write_text(json.dumps(made | {"checkpoint": "another"}))
    assert "already there" not in run(1)


def run_main(main, *flags: object) -> int:
    return main([str(flag) for flag in flags])


def test_scripts_reject_bad_arguments_with_one_message(tmp_path, capsys):
    out = ("--out_dir", tmp_path / "out")
    (tmp_path / "file").touch()
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    score_flags, vqgan_flags = ("--model_path", tmp_path / "checkpoint", *out), ("--steps", "0", *out)
    for main, flags, said in (
        (make_data.main, ("--out_dir", tmp_path / "file"), f"--out_dir {tmp_path / 'file'} cannot be written"),
        (score.main, (*score_flags, "--num_prompts", "0"), "--num_prompts must be at least 1"),
        (score.main, ("--model_path", tmp_path, *out), "no checkpoint"),
        (render_sprites.main, ("--font", tmp_path / "font.ttf", *out), "is missing"),
        (train_vqgan.main, vqgan_flags, "give --steps above 0"),
        (train_vqgan.main, (*vqgan_flags, "--init_from", tmp_path), "no VQGAN in"),
        (train_vqgan.main, (*vqgan_flags, "--init_from", VQGAN_DIR, "--decoder_steps", "-1"), "no steps below 0"),
        (train_vqgan.main, (*vqgan_flags, "--init_from", VQGAN_DIR, "--batch_size", "0"), "must be above 0"),
    ):
        assert run_main(main, *flags) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[1]", '[{"image": "a.png"}]'])
def test_train_tokenizer_rejects_other_files_and_folders(tmp_path, capsys, text):
    (tmp_path / "train.json").write_text(text)
    flags = ("--in_filename", tmp_path / "train.json", "--out_dir")
    assert run_main(train_tokenizer.main, *flags, tmp_path / "tokenizer") == 2
    assert "train.json" in capsys.readouterr().err and not (tmp_path / "tokenizer").exists()
    assert run_main(train_tokenizer.main, *flags, tmp_path) == 2
    assert "choose another" in capsys.readouterr().err
