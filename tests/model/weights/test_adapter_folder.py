"""Checkpoints of what was trained alone: read as a whole, merged, loaded by peft, rejected once the rest is gone."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.convert import convert_checkpoint, main
from model.decoder.chameleon import build_model, init_weights
from model.decoder.trainable import TrainableOptions
from model.weights.adapter_folder import (
    _NUM_ROW_SAMPLES,
    AdapterWriter,
    BaseWeights,
    _sample,
    fingerprint_weights,
    open_weights,
)
from model.weights.export import write_config
from model.weights.load import check_weights, clean_name, load_pretrained
from tests.helpers.hub_helpers import COMMIT, put_into_cache
from tests.helpers.small_run import export_hf
from tests.model.decoder.test_trainable import (
    BOTH,
    IMAGE_HEAD,
    IMAGE_IDS,
    LORA,
    NAMED,
    make_adapted,
    make_config,
    make_row,
)

WAYS = {"lora": LORA, "both": BOTH, "image_head": IMAGE_HEAD, "named": NAMED}
PROJECTION = "model.layers.1.mlp.up_proj"


@pytest.fixture
def base(tmp_path):
    model = build_model(make_config(), "cpu")
    init_weights(model, seed=3)
    export_hf(model, model.config, tmp_path / "base")
    return tmp_path / "base"


def write_trained(options: TrainableOptions, base: Path, folder: Path):
    """A checkpoint of a model whose trained parameters all have moved, and that model."""
    model = make_adapted(options, base)
    torch.manual_seed(4)
    trained = {clean_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    folder.mkdir(parents=True)
    writer = AdapterWriter(BaseWeights.of(base, folder.parent), options, torch.float32)
    shapes = {name: (tuple(parameter.shape), parameter.dtype) for name, parameter in trained.items()}
    writer.write(folder, shapes, trained.__getitem__, model.config)
    write_config(model.config, folder, torch.float32)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=make_row()["input_ids"]).logits


@pytest.mark.parametrize("way", WAYS)
def test_it_loads_and_converts_like_any_other(base, tmp_path, way, capsys):
    folder = tmp_path / "epoch0"
    trained = write_trained(WAYS[way], base, folder)
    loaded = load_pretrained(folder)
    torch.testing.assert_close(logits(loaded), logits(trained), rtol=1e-4, atol=1e-4)
    assert (logits(loaded) - logits(load_pretrained(base))).abs().max() > 0.05
    assert check_weights(folder).vocab_size == trained.config.vocab_size
    if WAYS[way].lora_rank and pytest.importorskip("peft"):
        import peft

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            by_peft = peft.PeftModel.from_pretrained(load_pretrained(base), folder)
        torch.testing.assert_close(logits(by_peft), logits(trained), rtol=1e-5, atol=1e-5)
    assert main([str(folder), str(tmp_path / "merged")]) == 0, capsys.readouterr().err
    # The merged checkpoint does not need the base.
    shutil.rmtree(base)
    merged = dict(load_pretrained(tmp_path / "merged").named_parameters())
    assert all(torch.equal(merged[name], parameter) for name, parameter in loaded.named_parameters())


def test_adapters_are_merged_in_fp32(base, tmp_path):
    """Base + alpha / rank * B A, rounded once at the end where the base is in bf16."""
    convert_checkpoint(base, tmp_path / "bf16", dtype=torch.bfloat16)
    write_trained(TrainableOptions(lora_rank=4, lora_alpha=10.0), tmp_path / "bf16", tmp_path / "epoch0")
    adapter = load_file(tmp_path / "epoch0" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{PROJECTION}.lora_{side}.weight"] for side in "AB")
    stored = load_file(tmp_path / "bf16" / "model.safetensors")[f"{PROJECTION}.weight"]
    assert a.dtype == b.dtype == torch.float32 and stored.dtype == torch.bfloat16
    expected = stored.float() + 10.0 / 4 * (b @ a)
    for name, dtype in (("kept", torch.bfloat16), ("fp32", torch.float32)):
        convert_checkpoint(tmp_path / "epoch0", tmp_path / name, dtype=dtype if name == "fp32" else None)
        merged = load_file(tmp_path / name / "model.safetensors")[f"{PROJECTION}.weight"]
        assert torch.equal(merged, expected.to(dtype))


def test_image_rows_replace_those_of_the_base_and_a_base_may_have_adapters_itself(base, tmp_path):
    write_trained(LORA, base, tmp_path / "first" / "epoch0")
    trained = write_trained(IMAGE_HEAD, tmp_path / "first" / "epoch0", tmp_path / "second" / "epoch0")
    before, reader = load_file(base / "model.safetensors"), open_weights(tmp_path / "second" / "epoch0")
    for name, module in (("lm_head", trained.lm_head), ("model.embed_tokens", trained.model.embed_tokens)):
        expected = before[f"{name}.weight"].index_copy(0, torch.tensor(IMAGE_IDS), module.image_rows.detach())
        assert torch.equal(reader.read(f"{name}.weight"), expected)
    loaded = load_pretrained(tmp_path / "second" / "epoch0")
    torch.testing.assert_close(logits(loaded), logits(trained), rtol=1e-5, atol=1e-5)


def test_a_base_that_is_gone_or_changed_is_named(base, tmp_path):
    folder = tmp_path / "out" / "epoch0"
    write_trained(LORA, base, folder)
    tensors = load_file(base / "model.safetensors")
    # Same names, same sizes.
    tensors["lm_head.weight"][3, 5] += 1
    (base / "model.safetensors").rename(tmp_path / "kept")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="whose weights have changed since the training"):
        open_weights(folder)
    (tmp_path / "kept").rename(base / "model.safetensors")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"the rest comes from {base}, which is gone"):
        load_pretrained(folder)
    note = json.loads((folder / "base_weights.json").read_text())
    # As the message says.
    (folder / "base_weights.json").write_text(json.dumps(note | {"source": str(tmp_path / "elsewhere")}))
    load_pretrained(folder)


@pytest.mark.parametrize("file", ["base_weights.json", "adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter_is_named(base, tmp_path, capsys, file):
    write_trained(LORA, base, tmp_path / "epoch0")
    (tmp_path / "epoch0" / file).write_text("{")
    assert main([str(tmp_path / "epoch0"), str(tmp_path / "merged")]) == 2
    assert f"{file} is damaged" in capsys.readouterr().err and not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize("change", ["half", "unknown"])
def test_parts_of_an_adapter_that_fit_nothing_are_named(base, tmp_path, change):
    write_trained(LORA, base, tmp_path / "epoch0")
    path = tmp_path / "epoch0" / "adapter_model.safetensors"
    tensors = load_file(path)
    half = tensors.pop(f"base_model.model.{PROJECTION}.lora_B.weight")
    if change == "unknown":
        tensors[f"base_model.model.{PROJECTION}.lora_B.weight"] = half
        tensors["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = half.clone()
    save_file(tensors, path, metadata={"format": "pt"})
    name = PROJECTION if change == "half" else "model.layers.9.mlp.up_proj"
    with pytest.raises(ValueError, match=f"lora_A of {name} fits no parameter of the model"):
        open_weights(tmp_path / "epoch0")


def test_the_fingerprint_sees_any_tensor_of_a_large_file(tmp_path):
    """Of 13 MB 1.1 MB are sampled: enough to see other rows of the head, another layer, or another gain."""
    torch.manual_seed(0)
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": torch.randn(512, 512) for n in range(4)}
    tensors |= {"model.norm.weight": torch.ones(8), "lm_head.weight": torch.randn(32768, 64)}
    seen = []
    changed = [("lm_head.weight", slice(0)), ("lm_head.weight", slice(4100, 6000))]
    changed += [("model.layers.2.mlp.up_proj.weight", slice(None)), ("model.norm.weight", slice(3, 4))]
    for name, rows in changed:
        tensors[name][rows] *= 1.01
        save_file(tensors, tmp_path / "model.safetensors")
        seen.append(fingerprint_weights(tmp_path))
        assert seen[-1] == fingerprint_weights(tmp_path)
    assert len(set(seen)) == 4, seen
    sampled = sum(len(part) for part in _sample(0, 32768 * 64 * 4, _NUM_ROW_SAMPLES))
    assert sampled == 1 << 20 and sampled < (tmp_path / "model.safetensors").stat().st_size / 10


def test_a_base_that_was_moved_with_the_run_is_found_though_others_took_its_place(base, tmp_path):
    (tmp_path / "run").mkdir()
    base.rename(tmp_path / "run" / "base")
    trained = write_trained(LORA, tmp_path / "run" / "base", tmp_path / "run" / "epoch0")
    (tmp_path / "run").rename(tmp_path / "moved")
    for other in ("none", "another"):
        if other == "another":
            shutil.copytree(tmp_path / "moved" / "base", tmp_path / "run" / "base")
            with (tmp_path / "run" / "base" / "model.safetensors").open("r+b") as file:
                file.seek(-8, 2)
                file.write(b"another.")
        loaded = load_pretrained(tmp_path / "moved" / "epoch0")
        torch.testing.assert_close(logits(loaded), logits(trained), rtol=1e-4, atol=1e-4)


def test_a_base_of_the_hub_is_noted_with_its_commit(base, tmp_path, monkeypatch):
    """In a cache as the hub's own library keeps it, which then holds a newer commit."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    there = put_into_cache(tmp_path / "cache", "some/base", base)
    note = BaseWeights.of("some/base", tmp_path)
    assert note.revision == COMMIT and note.find(tmp_path / "epoch0") == there
    newer = shutil.copytree(there, there.with_name("b" * 40))
    (newer / "other.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    (there.parents[1] / "refs" / "main").write_text("b" * 40)
    with pytest.raises(ValueError, match=f"commit {COMMIT} of some/base"):
        note.find(tmp_path / "epoch0")


def test_image_rows_are_set_as_the_note_says_and_trained_ones_replace_them(base, tmp_path):
    trained = write_trained(IMAGE_HEAD, base, tmp_path / "rows")
    write_trained(NAMED, base, tmp_path / "named")
    before = load_file(base / "model.safetensors")["lm_head.weight"]
    for name in ("rows", "named"):
        note = BaseWeights.of(base, tmp_path, "normal", seed=5)
        (tmp_path / name / "base_weights.json").write_text(json.dumps(dataclasses.asdict(note)))
    head = load_pretrained(tmp_path / "rows").lm_head.weight
    assert torch.equal(head[IMAGE_IDS], trained.lm_head.image_rows)
    drawn = torch.empty(len(IMAGE_IDS), head.shape[1]).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(5))
    expected = before.index_copy(0, torch.tensor(IMAGE_IDS), drawn)
    assert torch.equal(load_pretrained(tmp_path / "named").lm_head.weight, expected)
    convert_checkpoint(tmp_path / "named", tmp_path / "merged")
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"], expected)
