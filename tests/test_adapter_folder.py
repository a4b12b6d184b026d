"""Checkpoints of what was trained alone: read as a whole, merged, loaded by peft, and refused once the rest is gone."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model.adapter_folder import (
    _NUM_ROW_SAMPLES,
    AdapterWriter,
    BaseWeights,
    _sample,
    fingerprint_weights,
    open_weights,
)
from model.convert import check_weights, clean_name, convert_checkpoint, export_hf, load_pretrained, main, write_config
from model.decoder.chameleon import build_model, init_weights
from model.trainable import TrainableOptions
from tests.test_trainable import BOTH, IMAGE_HEAD, IMAGE_IDS, LORA, NAMED, make_adapted, make_config, make_row

WAYS = {"lora": LORA, "both": BOTH, "image_head": IMAGE_HEAD, "named": NAMED}


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
    trained = write_trained(WAYS[way], base, tmp_path / "out" / "epoch0")
    loaded = load_pretrained(tmp_path / "out" / "epoch0")
    torch.testing.assert_close(logits(loaded), logits(trained), rtol=1e-4, atol=1e-4)
    assert (logits(loaded) - logits(load_pretrained(base))).abs().max() > 0.05
    assert check_weights(tmp_path / "out" / "epoch0").vocab_size == trained.config.vocab_size
    assert main([str(tmp_path / "out" / "epoch0"), str(tmp_path / "merged")]) == 0, capsys.readouterr().err
    shutil.rmtree(base)  # no longer needed
    merged = dict(load_pretrained(tmp_path / "merged").named_parameters())
    assert all(torch.equal(merged[name], parameter) for name, parameter in loaded.named_parameters())


def test_adapters_are_merged_in_fp32(base, tmp_path):
    """Base + alpha / rank * B A, rounded once at the end where the base is in bf16."""
    convert_checkpoint(base, tmp_path / "bf16", dtype=torch.bfloat16)
    write_trained(TrainableOptions(lora_rank=4, lora_alpha=10.0), tmp_path / "bf16", tmp_path / "epoch0")
    name = "model.layers.1.mlp.up_proj"
    adapter = load_file(tmp_path / "epoch0" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    stored = load_file(tmp_path / "bf16" / "model.safetensors")[f"{name}.weight"]
    assert a.dtype == b.dtype == torch.float32 and stored.dtype == torch.bfloat16
    expected = stored.float() + 10.0 / 4 * (b @ a)
    part = (slice(10, 30), slice(0, 32))
    assert torch.equal(open_weights(tmp_path / "epoch0").read(f"{name}.weight", part), expected[part])
    for dtype in (None, torch.float32):
        convert_checkpoint(tmp_path / "epoch0", tmp_path / f"merged-{dtype}", dtype=dtype)
        with safe_open(tmp_path / f"merged-{dtype}" / "model.safetensors", "pt") as file:
            assert torch.equal(file.get_tensor(f"{name}.weight"), expected.to(dtype or torch.bfloat16))


def test_image_rows_stand_in_the_place_of_the_others(base, tmp_path):
    trained = write_trained(IMAGE_HEAD, base, tmp_path / "epoch0")
    before, reader = load_file(base / "model.safetensors"), open_weights(tmp_path / "epoch0")
    others = [row for row in range(64) if row not in IMAGE_IDS]
    for name, rows in (("lm_head", trained.lm_head), ("model.embed_tokens", trained.model.embed_tokens)):
        tensor = reader.read(f"{name}.weight")
        assert torch.equal(tensor[IMAGE_IDS], rows.image_rows) and torch.equal(
            tensor[others], before[f"{name}.weight"][others]
        )
        assert torch.equal(reader.read(f"{name}.weight", (slice(3, 9), slice(None))), tensor[3:9])


@pytest.mark.parametrize("way", ["lora", "both"])
def test_peft_loads_it(base, tmp_path, way):
    peft = pytest.importorskip("peft")
    trained = write_trained(WAYS[way], base, tmp_path / "epoch0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_peft = peft.PeftModel.from_pretrained(load_pretrained(base), tmp_path / "epoch0")
    torch.testing.assert_close(logits(by_peft), logits(trained), rtol=1e-5, atol=1e-5)


def test_a_training_may_go_on_from_it_as_from_a_base(base, tmp_path):
    """Adapters of a model that is a base and adapters itself."""
    write_trained(LORA, base, tmp_path / "first" / "epoch0")
    trained = write_trained(IMAGE_HEAD, tmp_path / "first" / "epoch0", tmp_path / "second" / "epoch0")
    loaded = load_pretrained(tmp_path / "second" / "epoch0")
    torch.testing.assert_close(logits(loaded), logits(trained), rtol=1e-5, atol=1e-5)


def test_a_base_that_is_gone_or_changed_is_named(base, tmp_path):
    folder = tmp_path / "out" / "epoch0"
    write_trained(LORA, base, folder)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][3, 5] += 1  # same names, same sizes
    (base / "model.safetensors").rename(tmp_path / "kept")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="are not those any more that it was trained with"):
        open_weights(folder)
    (tmp_path / "kept").rename(base / "model.safetensors")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"the rest comes from {base}, which is gone"):
        load_pretrained(folder)
    note = json.loads((folder / "base_weights.json").read_text())
    (folder / "base_weights.json").write_text(json.dumps(note | {"source": str(tmp_path / "elsewhere")}))
    load_pretrained(folder)  # as the message says
    (folder / "base_weights.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", '{"r": 4}', "adapter_config.json is damaged .*lora_alpha"),
        ("adapter_config.json", "{", "adapter_config.json is damaged"),
        ("base_weights.json", '{"source": null, "fingerprint": ""}', "base_weights.json is damaged .*source is None"),
        ("adapter_model.safetensors", None, "adapter_model.safetensors has no model.layers.1.mlp.up_proj.lora_B"),
    ],
)
def test_a_damaged_adapter_is_named(base, tmp_path, file, content, message):
    """By the file, also to who converts it; nothing is written."""
    folder = tmp_path / "epoch0"
    write_trained(LORA, base, folder)
    if content is None:
        tensors = load_file(folder / file)
        del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
        save_file(tensors, folder / file)
    else:
        (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_weights(folder)
    assert main([str(folder), str(tmp_path / "merged")]) == 2
    assert not list(tmp_path.glob("merged*"))


def test_the_fingerprint_sees_any_tensor_of_a_large_file(tmp_path):
    """13 MB, of which 1.1 MB are looked at: rows of the head, or a layer, or a gain, are others."""
    torch.manual_seed(0)
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": torch.randn(512, 512) for n in range(4)}
    tensors |= {"model.norm.weight": torch.ones(8), "lm_head.weight": torch.randn(32768, 64)}

    def fingerprint() -> str:
        save_file(tensors, tmp_path / "model.safetensors")
        return fingerprint_weights(tmp_path)

    seen = [fingerprint(), fingerprint()]
    assert seen[0] == seen[1]
    tensors["lm_head.weight"][4100:6000] = 0
    seen.append(fingerprint())
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1.01
    seen.append(fingerprint())
    tensors["model.norm.weight"][3] = 2
    seen.append(fingerprint())
    assert len(set(seen)) == 4, seen
    sampled = sum(len(part) for part in _sample(0, 32768 * 64 * 4, _NUM_ROW_SAMPLES))
    assert sampled == 1 << 20 and sampled < (tmp_path / "model.safetensors").stat().st_size / 10
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="is damaged"):
        fingerprint_weights(tmp_path)


def test_a_base_that_was_moved_is_found_beside_though_others_took_its_place(base, tmp_path):
    (tmp_path / "run").mkdir()
    base.rename(tmp_path / "run" / "base")
    trained = write_trained(LORA, tmp_path / "run" / "base", tmp_path / "run" / "epoch0")
    (tmp_path / "run").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved" / "base", tmp_path / "run" / "base")
    with (tmp_path / "run" / "base" / "model.safetensors").open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"another.")
    torch.testing.assert_close(
        logits(load_pretrained(tmp_path / "moved" / "epoch0")), logits(trained), rtol=1e-4, atol=1e-4
    )


def test_a_base_of_the_hub_is_noted_with_its_commit(base, tmp_path, monkeypatch):
    """In a cache as the hub's own library keeps it, which then holds a newer commit."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo = tmp_path / "cache" / "models--some--base"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    shutil.copytree(base, repo / "snapshots" / ("a" * 40))
    note = BaseWeights.of("some/base", tmp_path)
    assert note.revision == "a" * 40 and note.find(tmp_path / "epoch0") == repo / "snapshots" / ("a" * 40)
    (repo / "refs" / "main").write_text("b" * 40)
    shutil.copytree(base, repo / "snapshots" / ("b" * 40))
    (repo / "snapshots" / ("b" * 40) / "other.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=f"commit {'a' * 40} of some/base"):
        note.find(tmp_path / "epoch0")


def test_image_rows_are_set_as_the_note_says_and_trained_ones_go_before(base, tmp_path):
    """An older note says nothing, and points to a `starting_point` folder, whose rows are taken as they are."""
    trained = write_trained(IMAGE_HEAD, base, tmp_path / "rows")
    write_trained(NAMED, base, tmp_path / "named")
    before = load_file(base / "model.safetensors")["lm_head.weight"]
    for name in ("rows", "named"):
        note = BaseWeights.of(base, tmp_path, "normal", seed=5)
        (tmp_path / name / "base_weights.json").write_text(json.dumps(dataclasses.asdict(note)))
    head = load_pretrained(tmp_path / "rows").lm_head.weight
    assert torch.equal(head[IMAGE_IDS], trained.lm_head.image_rows)
    drawn = torch.empty(len(IMAGE_IDS), head.shape[1]).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(5))
    head = load_pretrained(tmp_path / "named").lm_head.weight
    assert torch.equal(head, before.index_copy(0, torch.tensor(IMAGE_IDS), drawn))
    convert_checkpoint(tmp_path / "named", tmp_path / "merged")
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"], head)

    start = convert_checkpoint(base, tmp_path / "starting_point", image_head_init="zero")
    old = {key: getattr(BaseWeights.of(start, tmp_path), key) for key in ("source", "fingerprint", "relative")}
    (tmp_path / "named" / "base_weights.json").write_text(json.dumps(old))
    head = load_pretrained(tmp_path / "named").lm_head.weight
    assert torch.equal(head, before.index_fill(0, torch.tensor(IMAGE_IDS), 0.0))


def test_a_run_may_be_moved_with_its_starting_point(base, tmp_path):
    base.rename((tmp_path / "run" / "starting_point").parent.mkdir() or tmp_path / "run" / "starting_point")
    trained = write_trained(LORA, tmp_path / "run" / "starting_point", tmp_path / "run" / "epoch0")
    (tmp_path / "run").rename(tmp_path / "moved")
    torch.testing.assert_close(
        logits(load_pretrained(tmp_path / "moved" / "epoch0")), logits(trained), rtol=1e-4, atol=1e-4
    )
