"""`--precision` of pre_tokenize.py: its default, what the manifest keeps of it, and batches that overflow in fp16."""

import json

from model.vqgan.image_encoder import ImageEncoder
from pre_tokenize import options
from pre_tokenize.pre_tokenize import main as pre_tokenize
from tests.helpers.tokenize_helpers import snapshot
from tests.pre_tokenize.test_pre_tokenize import arguments, task, undisturbed  # noqa: F401  (fixtures)


def without_flag(task, out_dir, **changes) -> list[str]:  # noqa: F811
    return [argument for argument in arguments(task, out_dir, **changes) if not argument.startswith("--precision")]


def chosen(argv: list[str]) -> str | None:
    return options.choose_precision(options.parse_options(options.build_parser().parse_args(argv)))


def test_the_default_is_fp16_where_a_gpu_can(task, tmp_path, monkeypatch):  # noqa: F811
    assert chosen(without_flag(task, tmp_path)) == "tf32"
    monkeypatch.setattr(options, "default_precision", lambda device: "fp16")
    assert chosen(without_flag(task, tmp_path)) == "fp16"
    assert chosen(arguments(task, tmp_path, precision="tf32")) == "tf32"
    (tmp_path / "manifest.json").write_text('{"precision": "fp32"}')
    assert chosen(without_flag(task, tmp_path)) == "fp32"
    assert chosen([*without_flag(task, tmp_path), "--overwrite"]) == "fp16"


def test_one_folder_has_one_precision(task, tmp_path, capsys):  # noqa: F811
    assert pre_tokenize(arguments(task, tmp_path, splits=2, rank=0)) == 3
    assert json.loads((tmp_path / "manifest.json").read_text())["precision"] == "fp32"
    before = snapshot(tmp_path)
    assert pre_tokenize(arguments(task, tmp_path, splits=2, rank=1, precision="bf16")) == 2
    assert "precision was fp32, is now bf16" in capsys.readouterr().err
    assert snapshot(tmp_path) == before
    assert pre_tokenize(without_flag(task, tmp_path, splits=2, rank=1)) == 3
    assert capsys.readouterr().out.count(f"{tmp_path} was begun with --precision fp32, which is kept\n") == 1
    assert pre_tokenize(arguments(task, tmp_path, "--overwrite", precision="bf16")) == 3
    assert json.loads((tmp_path / "manifest.json").read_text())["precision"] == "bf16"


def test_a_folder_from_before_the_field_is_continued_in_tf32(task, tmp_path, monkeypatch, capsys):  # noqa: F811
    assert pre_tokenize(arguments(task, tmp_path, precision="tf32")) == 3
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["precision"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    before = snapshot(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(options, "default_precision", lambda device: "fp16")
    assert pre_tokenize(without_flag(task, tmp_path)) == 3
    assert f"{tmp_path} was begun with --precision tf32, which is kept\n" in capsys.readouterr().out
    assert pre_tokenize(arguments(task, tmp_path, precision="fp16")) == 2
    assert "precision was tf32, is now fp16" in capsys.readouterr().err
    # It may have been given another one then.
    assert pre_tokenize(arguments(task, tmp_path, precision="bf16")) == 3
    assert snapshot(tmp_path) == before


def test_batches_encoded_again_are_counted_at_the_end(task, tmp_path, undisturbed, monkeypatch, capsys):  # noqa: F811
    encode = ImageEncoder._encode

    def overflow(encoder: ImageEncoder, images, precision: str):
        codes = encode(encoder, images, precision)
        return codes.clone().fill_(-1) if precision == "fp16" and images[0].size == (64, 64) else codes

    monkeypatch.setattr(ImageEncoder, "_encode", overflow)
    assert pre_tokenize(arguments(task, tmp_path, precision="fp16")) == 3
    said = "rank 0 of 1: 5 batches of images overflowed in fp16 and were encoded again in tf32\n"
    assert capsys.readouterr().out.count(said) == 1
    files = snapshot(tmp_path)
    assert all(files[f"files/{item_id}.pkl"] == undisturbed[f"files/{item_id}.pkl"] for item_id in range(0, 30, 3))
