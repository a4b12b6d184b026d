"""Where a training starts: what becomes of the image rows of the head, and which folder is taken as it is."""

import json

import pytest
import torch

from model.convert import convert_checkpoint, export_hf, load_pretrained, main, prepare_starting_point
from model.image_head import NOTE_NAME, read_starting_point
from model.weight_files import WeightReader
from tests.decoder_helpers import small_config, small_model, write_small_tokenizer
from tests.test_convert import same_parameters, write_stock_checkpoint

IMAGE_IDS = torch.tensor([i for name, i in small_config().vocabulary_map.items() if name.startswith("IMGIMG")])


def image_rows(folder) -> torch.Tensor:
    return WeightReader(folder).read("lm_head.weight")[IMAGE_IDS]


def test_image_head_default(tmp_path, capsys):
    """Zeroed where stock Chameleon becomes a start of training, and nowhere else; the command says which it was."""
    write_stock_checkpoint(tmp_path / "stock")
    model = small_model()
    export_hf(model, model.config, tmp_path / "trained")
    for source, out, shape, done in (
        ("stock", "start", "xllmx", "zero"),
        ("stock", "stock again", "hf", "keep"),
        ("stock again", "start again", "xllmx", "zero"),
        ("trained", "copy", "xllmx", "keep"),
        ("start", "start in hf", "hf", "keep"),
    ):
        assert main([str(tmp_path / source), str(tmp_path / out), "--shape", shape]) == 0
        assert f"image rows of lm_head: {done})" in capsys.readouterr().out
        assert image_rows(tmp_path / source).any() or source == "start"
        kept = torch.equal(image_rows(tmp_path / out), image_rows(tmp_path / source))
        assert kept if done == "keep" else not image_rows(tmp_path / out).any()
    assert main([str(tmp_path / "stock"), str(tmp_path / "kept"), "--image_head_init", "keep"]) == 0
    assert torch.equal(image_rows(tmp_path / "kept"), image_rows(tmp_path / "stock"))


def test_a_trained_head_survives_stocks_shape(tmp_path):
    """An export of ours in stock's shape is not taken for stock Chameleon when it comes back, by default too."""
    write_stock_checkpoint(tmp_path / "stock")
    model = load_pretrained(tmp_path / "stock")
    export_hf(model, model.config, tmp_path / "from_memory", shape="hf")
    convert_checkpoint(tmp_path / "stock", tmp_path / "xllmx", image_head_init="keep")
    convert_checkpoint(tmp_path / "xllmx", tmp_path / "from_files", shape="hf")
    for name in ("from_memory", "from_files"):
        convert_checkpoint(tmp_path / name, tmp_path / f"{name}_back")
        assert same_parameters(model, load_pretrained(tmp_path / f"{name}_back"))


def test_without_image_tokens_the_head_can_only_be_kept(tmp_path):
    model = small_model(vocabulary_map={"<s>": 0})
    export_hf(model, model.config, tmp_path / "source")
    with pytest.raises(ValueError, match="names no image tokens.*--image_head_init keep"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", image_head_init="zero")
    convert_checkpoint(tmp_path / "source", tmp_path / "out")


def test_starting_point_zeroes_the_image_rows_of_the_head(tmp_path):
    model = small_model()
    export_hf(model, model.config, tmp_path / "source")
    write_small_tokenizer(tmp_path / "source")
    start = prepare_starting_point(tmp_path / "source", tmp_path / "run" / "starting_point")
    loaded = load_pretrained(start)
    assert not loaded.lm_head.weight[IMAGE_IDS].any()
    kept = torch.ones(len(loaded.lm_head.weight), dtype=torch.bool).index_fill(0, IMAGE_IDS, False)
    assert torch.equal(loaded.lm_head.weight[kept], model.lm_head.weight[kept])
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert (start / "tokenizer.json").is_file()
    drawn = [convert_checkpoint(start, tmp_path / f"n{i}", image_head_init="normal", seed=i) for i in (0, 1)]
    rows = [image_rows(folder) for folder in drawn]
    assert not torch.equal(*rows) and 0.015 < rows[0].std() < 0.025


def test_a_starting_point_is_taken_only_if_it_was_made_so(tmp_path, monkeypatch):
    model = small_model()
    monkeypatch.chdir(tmp_path)
    for name in ("source", "other"):
        export_hf(model, model.config, tmp_path / name)
    start = prepare_starting_point("source", tmp_path / "start", "normal", seed=1)
    written = {path.name: path.stat().st_mtime_ns for path in start.iterdir()}
    (tmp_path / "source").rename(tmp_path / "gone")  # what is there needs no source
    for source in ("source", tmp_path / "source"):
        assert prepare_starting_point(source, start, "normal", seed=1) == start
    assert {path.name: path.stat().st_mtime_ns for path in start.iterdir()} == written
    for source, how, seed, said in (
        ("source", "zero", 1, "was made by --image_head_init normal, not zero. Remove that folder"),
        ("source", "normal", 2, "was made with --seed 1, not 2"),
        ("other", "normal", 1, f"was made from {tmp_path / 'source'}, not {tmp_path / 'other'}"),
        ("Alpha-VLLM/Chameleon_7B_mGPT", "keep", 1, "by --image_head_init normal, not keep and from"),
    ):
        with pytest.raises(ValueError, match=said) as refused:
            prepare_starting_point(source, start, how, seed)
        assert str(start) in str(refused.value) and "--output_dir" in str(refused.value)


def test_a_starting_point_without_note(tmp_path):
    """The recipe's own: taken if its image rows are zero, as the recipe leaves them."""
    model = small_model()
    export_hf(model, model.config, tmp_path / "source")
    start = prepare_starting_point(tmp_path / "source", tmp_path / "start")
    assert json.loads((start / NOTE_NAME).read_text())["image_head_init"] == "zero"
    (start / NOTE_NAME).unlink()
    assert prepare_starting_point("elsewhere", start) == start
    with pytest.raises(ValueError, match="--image_head_init zero, not keep"):
        prepare_starting_point("elsewhere", start, "keep")
    with pytest.raises(ValueError, match="no telling how it was made"):
        prepare_starting_point("elsewhere", tmp_path / "source")
    (start / NOTE_NAME).write_text("{")
    with pytest.raises(ValueError, match="starting_point.json is damaged"):
        read_starting_point(start)
