"""Records, checkpoints and images of different VQGANs are not mixed unless a flag allows it."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ChameleonForConditionalGeneration

from inference_solver import FlexARInferenceSolver
from inference_solver import main as inference
from model.convert import convert_checkpoint
from model.vqgan.vqgan import CODEBOOK, HF_PREFIX, load_vqgan, save_vqgan
from model.weights.hf_folder import load_config
from tests.helpers.hub_helpers import write_meta_vqgan
from tests.helpers.small_run import call_main, find_problems, solver_args
from tests.helpers.tokenize_helpers import write_tiny_vqgan

A, B = "a" * 64, "b" * 64


@pytest.fixture(scope="module")
def vqgans(tmp_path_factory):
    """`one` and `two`, which have the same weights and another order of codes; their codebook_sha256 by name."""
    folder = tmp_path_factory.mktemp("vqgans")
    vqgan = write_tiny_vqgan(folder / "one")
    with torch.no_grad():
        vqgan.quantize.embedding.weight.copy_(vqgan.quantize.embedding.weight.flip(0))
    save_vqgan(vqgan, folder / "two")
    return folder, {name: load_vqgan(folder / name).codebook_sha256 for name in ("one", "two")}


def write_records(task, folder, **manifests) -> None:
    """A copy of a small task: `NAME/record.json` beside a manifest of these fields (None: none), all in `data.yaml`."""
    for name, fields in manifests.items():
        (folder / name).mkdir(parents=True)
        shutil.copyfile(task / "record.json", folder / name / "record.json")
        shutil.copytree(task / "files", folder / name / "files")
        if fields is not None:
            (folder / name / "manifest.json").write_text(json.dumps(fields))
    config = "".join(f"  - path: {name}/record.json\n" for name in manifests)
    (folder / "data.yaml").write_text("META:\n" + config)


def train(task, folder, name="out", **changes) -> tuple[int, str]:
    """A run of a step on `folder/data.yaml`: (exit code, what it said on stderr)."""
    changes = {"data_config": folder / "data.yaml", "max_steps": 1, "epochs": 1} | changes
    return call_main(solver_args(task, folder / name, **changes))


def test_one_vqgan_has_one_hash_in_all_three_formats(tmp_path):
    # Written in fp16.
    vqgan = write_tiny_vqgan(tmp_path / "half")
    write_meta_vqgan(vqgan, tmp_path / "meta")
    save_vqgan(vqgan, tmp_path / "ours", torch.float32)
    (tmp_path / "hf").mkdir()
    fields = json.loads((tmp_path / "ours" / "vqgan.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"vq_config": fields}))
    state = {HF_PREFIX + name: value.bfloat16() for name, value in vqgan.state_dict().items() if "decoder" not in name}
    save_file(state, tmp_path / "hf" / "model.safetensors")
    hashes = {load_vqgan(tmp_path / name).codebook_sha256 for name in ("half", "meta", "ours", "hf")}
    assert hashes == {vqgan.codebook_sha256} and len(vqgan.codebook_sha256) == 64
    other = load_file(tmp_path / "half" / "model.safetensors")
    save_file(other | {CODEBOOK: other[CODEBOOK].flip(0)}, tmp_path / "half" / "model.safetensors")
    assert load_vqgan(tmp_path / "half").codebook_sha256 != vqgan.codebook_sha256


def test_records_of_different_vqgans_train_only_with_the_flag(small_task, tmp_path):
    write_records(small_task, tmp_path, one={"codebook_sha256": A}, two={"codebook_sha256": B})
    problem = find_problems(small_task, tmp_path / "out", data_config=tmp_path / "data.yaml")
    assert problem.count("were made with different VQGANs") == 1 and "--mix_vqgans" in problem
    assert str(tmp_path / "one") in problem and str(tmp_path / "two") in problem
    assert train(small_task, tmp_path, mix_vqgans=True) == (0, "")
    assert load_config(tmp_path / "out" / "epoch0-iter1").codebook_sha256 is None
    # A record that was merged elsewhere is known by the folder of its tokens.
    entries = json.loads((tmp_path / "two" / "record.json").read_text())
    moved = [entry | {"file": str(tmp_path / "two" / entry["file"])} for entry in entries]
    (tmp_path / "two.json").write_text(json.dumps(moved))
    (tmp_path / "data.yaml").write_text("META:\n  - path: one/record.json\n  - path: two.json\n")
    assert "different VQGANs" in find_problems(small_task, tmp_path / "moved", data_config=tmp_path / "data.yaml")


def test_records_to_validate_on_are_compared_with_those_to_train_on(small_task, tmp_path):
    write_records(small_task, tmp_path / "train", one={"codebook_sha256": A})
    write_records(small_task, tmp_path / "val", two={"codebook_sha256": B})
    configs = {"data_config": tmp_path / "train" / "data.yaml", "val_data_config": tmp_path / "val" / "data.yaml"}
    assert "different VQGANs" in find_problems(small_task, tmp_path / "out", **configs)


@pytest.mark.slow
def test_a_checkpoint_names_the_vqgan_of_its_records_and_rejects_others(small_task, vqgans, tmp_path, capsys):
    folder, hashes = vqgans
    write_records(small_task, tmp_path, one={"codebook_sha256": hashes["one"]}, old=None)
    assert train(small_task, tmp_path) == (0, "")
    assert capsys.readouterr().out.count("1 of 2 records have no manifest.json") == 1
    checkpoint = tmp_path / "out" / "epoch0-iter1"
    assert load_config(checkpoint).codebook_sha256 == hashes["one"]

    write_records(small_task, tmp_path / "other", two={"codebook_sha256": hashes["two"]})
    data = {"data_config": tmp_path / "other" / "data.yaml"}
    resumed = {"max_steps": 2, "resume_anyway": True}
    evaluated = {"eval_only": True, "val_data_config": tmp_path / "other" / "data.yaml"}
    started = {"name": "new", "init_from": checkpoint}
    for changes in (started, resumed, started | evaluated):
        code, said = train(small_task, tmp_path, **data | changes)
        assert code == 2 and f"the checkpoint {checkpoint} and" in said and "different VQGANs" in said, said
    assert train(small_task, tmp_path, **data | resumed, mix_vqgans=True) == (0, "")
    assert load_config(tmp_path / "out" / "epoch0-iter2").codebook_sha256 == hashes["two"]

    for shape in ("xllmx", "hf"):
        convert_checkpoint(checkpoint, tmp_path / shape, shape=shape, vqgan_dir=folder / "one")
        assert load_config(tmp_path / shape).codebook_sha256 == hashes["one"]
    _, info = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with pytest.raises(ValueError, match="not the one of the model's training data"):
        convert_checkpoint(checkpoint, tmp_path / "wrong", shape="hf", vqgan_dir=folder / "two")


def test_adapters_name_the_vqgan_too(small_task, tmp_path):
    write_records(small_task, tmp_path, one={"codebook_sha256": A})
    assert train(small_task, tmp_path, train_only="image_head") == (0, "")
    assert load_config(tmp_path / "out" / "epoch0-iter1").codebook_sha256 == A


def test_records_that_name_no_codebook_are_not_compared(small_task, tmp_path, capsys):
    first, second = {"vqgan_sha256": "1"}, {"vqgan_sha256": "2"}
    cases = [
        (first, {"codebook_sha256": A}, ""),
        (first, second, "were made with different VQGAN files"),
        (first, second | {"codebook_sha256": A}, "were made with different VQGAN files"),
        (first | {"codebook_sha256": A}, second | {"codebook_sha256": A}, ""),
        (None, second, "1 of 2 records have no manifest.json"),
    ]
    for number, (one, two, said) in enumerate(cases):
        folder = tmp_path / str(number)
        write_records(small_task, folder, one=one, two=two)
        assert find_problems(small_task, folder / "out", data_config=folder / "data.yaml") == ""
        lines = [line for line in capsys.readouterr().out.splitlines() if "VQGAN" in line or "manifest" in line]
        assert said in " ".join(lines) and len(lines) == bool(said)


@pytest.fixture(scope="module")
def checkpoint(small_task, vqgans, tmp_path_factory):
    """The small task's start, as one that was trained on codes of the VQGAN `one`."""
    folder = tmp_path_factory.mktemp("named") / "init"
    shutil.copytree(small_task / "init", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"codebook_sha256": vqgans[1]["one"]}))
    return folder


def test_nothing_is_drawn_by_another_vqgan_without_the_flag(checkpoint, vqgans, tmp_path, capsys):
    flags = ["--model_path", checkpoint, "--prompt", "word90", "--size", "32x32", "--out", tmp_path / "out.png"]
    flags += ["--precision", "fp32", "--device", "cpu", "--max_gen_len", "20", "--cfg", "1"]
    assert inference([*map(str, flags), "--vqgan_dir", str(vqgans[0] / "two")]) == 2
    assert "not the one of the model's training data" in capsys.readouterr().err and not (tmp_path / "out.png").exists()
    for more in (["--vqgan_dir", str(vqgans[0] / "two"), "--any_vqgan"], ["--vqgan_dir", str(vqgans[0] / "one")]):
        assert inference([*map(str, flags), *more]) == 0
        assert Image.open(tmp_path / "out.png").size == (32, 32)
    solver = FlexARInferenceSolver(str(checkpoint), "fp32", vqgan_dir=vqgans[0] / "two", device="cpu")
    with pytest.raises(ValueError, match="--any_vqgan"):
        solver.encode_request([["word90", None]], Image.new("RGB", (32, 32)))


def test_no_samples_are_drawn_by_another_vqgan_without_the_flag(small_task, checkpoint, vqgans, tmp_path):
    write_records(small_task, tmp_path, old=None)
    (tmp_path / "prompts.json").write_text('[{"prompt": "word90", "size": "32x32"}]')
    changes = {"init_from": checkpoint, "sample_interval": 1, "sample_prompts": tmp_path / "prompts.json"}
    changes |= {"sample_max_gen_len": 12, "vqgan_dir": vqgans[0] / "two", "target_size": 64}
    code, said = train(small_task, tmp_path, **changes)
    assert code == 2 and "not the one of the model's training data" in said
    assert train(small_task, tmp_path, **changes, any_vqgan=True) == (0, "")
    assert list((tmp_path / "out" / "samples").rglob("*.png"))
