"""VQGAN and tokenizer of the hub: found in its cache, or one line with what was looked for and where."""

import json
import pickle
import shutil

import huggingface_hub
import pytest
from safetensors.torch import save_file

from data.hub import DEFAULT_VQGAN_DIR, HUB_VQGAN, find_vqgan
from data.items.item_processor import hash_tokenizer, load_text_tokenizer
from inference_solver import FlexARInferenceSolver
from model.convert import convert_checkpoint
from model.vqgan.vqgan import HF_PREFIX, load_vqgan
from pre_tokenize import inspect_record
from pre_tokenize.concat_record import main as concat
from pre_tokenize.pre_tokenize import main as pre_tokenize
from tests.helpers.hub_helpers import put_into_cache, write_meta_vqgan
from tests.helpers.tokenize_helpers import write_items, write_tiny_tokenizer, write_tiny_vqgan

HUB_REPO, _, SUBFOLDER = HUB_VQGAN.rpartition("/")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """`hub/` with the default VQGAN beside foreign files, a tokenizer `some/text`, and an input of three items."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = write_tiny_tokenizer(folder / "tokenizer")
    write_meta_vqgan(write_tiny_vqgan(folder / "vqgan"), folder / "meta")
    (folder / "meta" / "text_tokenizer.json").write_bytes((folder / "tokenizer" / "tokenizer.json").read_bytes())
    put_into_cache(folder / "hub", HUB_REPO, folder / "meta", SUBFOLDER)
    put_into_cache(folder / "hub", "some/text", folder / "tokenizer")
    write_items(folder, 3)
    return folder, tokenizer


@pytest.fixture
def offline(world, monkeypatch):
    """This process sees that cache, no network, and no default folder; returns the cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(world[0] / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(world[0])
    return world[0] / "hub"


def test_without_the_default_folder_every_script_takes_the_hub_s_vqgan(world, small_task, offline, tmp_path, capsys):
    folder, _ = world
    command = f"--in_filename in.json --out_dir {tmp_path} --target_size 64 --tokenizer some/text".split()
    assert pre_tokenize([*command, "--device", "cpu", "--num_workers", "0"]) == 0, capsys.readouterr().err
    codebook = load_vqgan(folder / "meta").codebook_sha256
    assert json.loads((tmp_path / "manifest.json").read_text())["codebook_sha256"] == codebook

    assert concat(["--sub_record_dir", str(tmp_path), "--save_path", str(tmp_path / "record.json")]) == 0
    shown = [str(tmp_path / "record.json"), "--out", str(tmp_path / "page.html"), "--device", "cpu"]
    assert inspect_record.main([*shown, "--tokenizer", "some/text"]) == 0
    solver = FlexARInferenceSolver(str(small_task / "init"), "fp32", device="cpu")
    assert solver.vqgan.codebook_sha256 == codebook
    convert_checkpoint(small_task / "init", tmp_path / "hf", shape="hf", vqgan_dir=DEFAULT_VQGAN_DIR)
    assert load_vqgan(tmp_path / "hf").codebook_sha256 == codebook


def test_a_local_folder_takes_precedence_over_the_hub(offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEFAULT_VQGAN_DIR).mkdir(parents=True)
    assert str(find_vqgan(DEFAULT_VQGAN_DIR)) == DEFAULT_VQGAN_DIR


def test_only_what_is_needed_is_downloaded(world, offline, tmp_path, monkeypatch):
    """Meta's two files, or the one file of a large Hugging Face model that holds the VQGAN."""
    state = {HF_PREFIX + name: value for name, value in load_vqgan(world[0] / "meta").state_dict().items()}
    model, fields = tmp_path / "model", json.loads((world[0] / "vqgan" / "vqgan.json").read_text())
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"vq_config": fields}))
    save_file(state, model / "model-2.safetensors")
    places = {"lm_head.weight": "model-1.safetensors"} | dict.fromkeys(state, "model-2.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    put_into_cache(offline, "some/model", model)
    asked, is_here = [], huggingface_hub.snapshot_download

    def download(repo, revision, allow_patterns):
        asked.extend(allow_patterns)
        return is_here(repo, revision=revision, allow_patterns=allow_patterns)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    find_vqgan(HUB_VQGAN)
    assert all(name.startswith(f"{SUBFOLDER}/") for name in asked) and asked[-1] == f"{SUBFOLDER}/vqgan.ckpt"
    assert not any(name.endswith(".safetensors") for name in asked)
    asked.clear()
    found = find_vqgan("some/model")
    assert [name for name in asked if name.endswith(".safetensors")] == ["model-2.safetensors"]
    assert load_vqgan(found).codebook_sha256 == load_vqgan(world[0] / "vqgan").codebook_sha256


@pytest.mark.parametrize("cached", ["", "text_tokenizer.json", "vqgan.yaml"])
def test_what_is_not_in_the_cache_is_named_in_one_line(world, offline, tmp_path, monkeypatch, cached):
    """Also where the cache holds other files of the model, or half of the VQGAN."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    if cached:
        (tmp_path / "part").mkdir()
        shutil.copy(world[0] / "meta" / cached, tmp_path / "part")
        put_into_cache(tmp_path / "hub", HUB_REPO, tmp_path / "part", SUBFOLDER)
    with pytest.raises(FileNotFoundError) as caught:
        find_vqgan(DEFAULT_VQGAN_DIR)
    said = str(caught.value)
    for word in (DEFAULT_VQGAN_DIR, HUB_VQGAN, str(tmp_path / "hub"), "HF_HUB_OFFLINE=1", "vqgan."):
        assert word in said
    assert "\n" not in said and len(said) < 1000


def test_a_tokenizer_comes_by_the_same_rules(world, offline, tmp_path):
    folder, tokenizer = world
    # The latter two hold text_tokenizer.json alone.
    for name in ("some/text", HUB_VQGAN, folder / "meta"):
        assert hash_tokenizer(load_text_tokenizer(name)) == hash_tokenizer(tokenizer)
    said = "nobody/nothing is not a folder here, and could not be fetched .* its cache .*hub lacks .* HF_HUB_OFFLINE=1"
    for look_up in (load_text_tokenizer, find_vqgan):
        with pytest.raises(FileNotFoundError, match=said):
            look_up("nobody/nothing")


def test_what_is_no_hub_id_is_never_looked_up(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    for name in ("gone", "/gone/too", "./a/b", "a/b/c/d", tmp_path / "gone"):
        with pytest.raises(FileNotFoundError, match=r"--vqgan_dir .* is not a folder; give a folder or a hub id"):
            find_vqgan(name)


def test_metas_weights_run_no_code(world, tmp_path):
    """A pickle that would run code when it is read is rejected by name."""

    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    (tmp_path / "vqgan.yaml").write_bytes((world[0] / "meta" / "vqgan.yaml").read_bytes())
    (tmp_path / "vqgan.ckpt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"vqgan\.ckpt"):
        load_vqgan(tmp_path)
    assert not (tmp_path / "ran").exists()
