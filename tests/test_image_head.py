"""Where a training starts: what becomes of the image rows of the head."""

import pytest
import torch

from model.adapter_folder import open_weights
from model.convert import convert_checkpoint, export_hf, load_pretrained, main
from model.weight_files import WeightReader
from tests.decoder_helpers import small_config, small_model
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


@pytest.mark.parametrize("how", ["zero", "normal"])
def test_the_image_rows_alone_are_set_whatever_part_is_read(tmp_path, how):
    """In files and in memory, for ranks that hold a part of the head too."""
    model = small_model()
    export_hf(model, model.config, tmp_path / "source", dtype=torch.bfloat16)
    written = convert_checkpoint(tmp_path / "source", tmp_path / "start", image_head_init=how, seed=1)
    before, head = (WeightReader(folder).read("lm_head.weight") for folder in (tmp_path / "source", written))
    expected = torch.zeros(len(IMAGE_IDS), head.shape[1])
    if how == "normal":
        expected.normal_(0.0, model.config.initializer_range, generator=torch.Generator().manual_seed(1))
    assert torch.equal(head[IMAGE_IDS], expected.bfloat16())
    kept = torch.ones(len(head), dtype=torch.bool).index_fill(0, IMAGE_IDS, False)
    assert torch.equal(head[kept], before[kept])
    reader, first = open_weights(tmp_path / "source", how, seed=1), int(IMAGE_IDS[0])
    for rows in (slice(0, first + 3), slice(first + 3, len(head)), slice(0, 0)):
        for columns in (slice(None), slice(2, 5)):
            assert torch.equal(reader.read("lm_head.weight", (rows, columns)), head[rows, columns])
    assert torch.equal(reader.read("model.embed_tokens.weight"), model.model.embed_tokens.weight.bfloat16())
