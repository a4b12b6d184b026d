"""Positions grow with --max_seq_len: longer sequences than the start's can be trained, saved, exported and drawn."""

import contextlib
import io
import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

# Registers the class with AutoModelForCausalLM.
import model.chameleon  # noqa: F401
from data.formats.record import RecordEntry, write_merged
from data.formats.token_file import save_token_file
from data.items.item_processor import load_text_tokenizer
from data.items.vocab import ChameleonVocab
from inference_solver import FlexARInferenceSolver
from inference_solver import main as infer
from model.convert import convert_checkpoint
from model.decoder.chameleon import build_config, build_model, grow_positions, init_weights
from model.plan.plan import find_config
from model.run.options import Options, build_parser
from model.vqgan.vqgan import VQGAN, save_vqgan
from model.weights.load import load_pretrained
from tests.helpers.decoder_helpers import small_config
from tests.helpers.small_run import call_main, export_hf, read_lines, solver_args, write_small_task
from tests.model.weights.test_convert import same_parameters

START, MAX_SEQ_LEN = 64, 128
# 46 tokens: two of these images are beyond the start's positions.
SIZE = (96, 96)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Edits of one image of 96 pixels into another, a start with too few positions, and a VQGAN."""
    folder = tmp_path_factory.mktemp("edits")
    write_small_task(folder, num_items=1)
    tokenizer = load_text_tokenizer(folder / "tokenizer")
    vocab = ChameleonVocab.from_tokenizer(tokenizer)
    rows = torch.randint(0, 64, (2, 6, 6), generator=torch.Generator().manual_seed(0)).numpy()
    given, drawn = (vocab.image_to_tokens(codes) for codes in rows)
    prompt, answer = [vocab.bos_id, *given, vocab.end_of_turn_id], [*drawn, vocab.end_of_turn_id]
    save_token_file(folder / "files" / "0.pkl", prompt + answer, [-100] * len(prompt) + answer, 0)
    entry = RecordEntry("files/0.pkl", len(prompt + answer), 0, len(drawn))
    write_merged([entry] * 2, folder / "record.json")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": START}
    config = build_config("tiny", tokenizer, **shape)
    model = build_model(config, "cpu")
    init_weights(model)
    export_hf(model, config, folder / "start", folder / "tokenizer")
    codes = small_config().vq_config.to_dict() | {"num_embeddings": 64}
    save_vqgan(VQGAN(small_config(vq_config=codes).vq_config), folder / "vqgan", torch.float32)
    Image.effect_noise(SIZE, 80).convert("RGB").save(folder / "in.png")
    (folder / "prompts.json").write_text('[{"prompt": "<|image|>", "image": "in.png", "size": "96x96"}]')
    return folder


def edit_args(task, out, **changes):
    return solver_args(task, out, **{"init_from": task / "start", "max_seq_len": MAX_SEQ_LEN, "max_steps": 1} | changes)


def draw(task, model_path, **more):
    """The second image, drawn from the first."""
    solver = FlexARInferenceSolver(str(model_path), "fp32", SIZE[0], vqgan_dir=task / "vqgan", device="cpu", **more)
    return solver.generate(task / "in.png", [["<|image|>", None]], 60, 0.0, size=SIZE)[1]


def positions(folder) -> int:
    return json.loads((folder / "config.json").read_text())["max_position_embeddings"]


@pytest.fixture(scope="module")
def out(task, tmp_path_factory):
    """The output folder of a step on the edits, with a sample."""
    folder = tmp_path_factory.mktemp("positions") / "out"
    flags = {"sample_interval": 1, "sample_prompts": task / "prompts.json", "vqgan_dir": task / "vqgan"}
    arguments = edit_args(task, folder, target_size=SIZE[0], **flags)
    assert find_config(Options.from_namespace(build_parser().parse_args(arguments))).max_position_embeddings == 128
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert call_main(arguments)[0] == 0
    assert said.getvalue().count("max_position_embeddings grows from 64 to 128 (--max_seq_len)") == 1
    return folder


def test_two_images_beyond_the_start_s_positions_are_trained_and_drawn(task, out, tmp_path):
    assert read_lines(out)[0]["loss"] > 0
    checkpoint = out / "epoch0"
    assert [image.size for image in draw(task, checkpoint)] == [SIZE]
    # The one given and the one drawn.
    assert len(list((out / "samples").rglob("*.png"))) == 2
    convert_checkpoint(checkpoint, tmp_path / "hf", shape="hf", vqgan_dir=task / "vqgan")
    convert_checkpoint(tmp_path / "hf", tmp_path / "back")
    assert [positions(folder) for folder in (checkpoint, tmp_path / "hf", tmp_path / "back")] == [MAX_SEQ_LEN] * 3


def test_adapters_have_the_positions_that_they_were_trained_with(task, tmp_path):
    assert call_main(edit_args(task, tmp_path / "out", lora_rank=4, max_steps=2, warmup_epochs=0))[0] == 0
    checkpoint = tmp_path / "out" / "epoch1"
    assert positions(checkpoint) == MAX_SEQ_LEN and positions(task / "start") == START
    assert [image.size for image in draw(task, checkpoint)] == [SIZE]
    by_auto = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert by_auto.config.max_position_embeddings == MAX_SEQ_LEN
    assert same_parameters(by_auto, load_pretrained(checkpoint))
    convert_checkpoint(checkpoint, tmp_path / "merged")
    assert positions(tmp_path / "merged") == MAX_SEQ_LEN


@pytest.mark.parametrize(("saved", "expected"), [(" 64", 128), ("999", 999)])
def test_a_resumed_run_has_the_larger_of_the_checkpoint_s_positions_and_max_seq_len(
    task, out, tmp_path, saved, expected
):
    shutil.copytree(out, tmp_path / "out")
    path = tmp_path / "out" / "epoch0" / "config.json"
    path.write_text(path.read_text().replace('embeddings": 128', f'embeddings": {saved}'))
    assert positions(path.parent) == int(saved)
    assert call_main(edit_args(task, tmp_path / "out", max_steps=2)) == (0, "")
    assert positions(tmp_path / "out" / "epoch1") == expected


def test_a_fresh_model_has_the_positions_of_its_data_and_positions_never_shrink(task):
    fresh = {"init_from": None, "model_size": "tiny", "tokenizer": task / "tokenizer", "max_seq_len": 5000}
    options = Options.from_namespace(build_parser().parse_args(edit_args(task, task / "out", **fresh)))
    assert find_config(options).max_position_embeddings == 5000
    config = small_config()
    assert grow_positions(config, 12) is None and config.max_position_embeddings == 512


def test_max_positions_helps_a_checkpoint_that_kept_too_few(task, tmp_path, caplog):
    arguments = ["--model_path", str(task / "start"), "--vqgan_dir", str(task / "vqgan"), "--prompt", "<|image|>"]
    arguments += ["--image", str(task / "in.png"), "--target_size", "96", "--size", "96x96", "--precision", "fp32"]
    arguments += ["--device", "cpu", "--out", str(tmp_path / "out.png")]
    assert infer(arguments) == 3
    assert "raise --max_positions" in caplog.text
    assert infer([*arguments, "--max_positions", "128"]) == 0
    assert Image.open(tmp_path / "out.png").size == SIZE
    assert positions(task / "start") == START
