"""Weights in and out: both shapes of checkpoint, plain and sharded, image rows, and what stock transformers loads."""

import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, ChameleonConfig, ChameleonForConditionalGeneration

from model.chameleon import ChameleonXLLMXForConditionalGeneration
from model.convert import convert_checkpoint, main
from model.decoder.chameleon import build_model, init_weights, reset_rotary_buffers
from model.vqgan.vqgan import HF_PREFIX, VQGAN, load_vqgan, save_vqgan
from model.weights.adapter_folder import open_weights
from model.weights.export import carried_vqgan
from model.weights.hf_folder import load_config
from model.weights.load import load_checkpoint_weights, load_pretrained
from model.weights.weight_files import INDEX_FILE, WeightReader, write_weights
from tests.helpers import forked
from tests.helpers.decoder_helpers import random_tokens, small_config, small_model
from tests.helpers.small_run import export_hf

GROUPED = {"model_parallel_size": 2, "num_key_value_heads": 2, "swin_norm": True}
NORM = "model.layers.1.self_attn.q_norm.weight"
IMAGE_IDS = torch.tensor([i for name, i in small_config().vocabulary_map.items() if name.startswith("IMGIMG")])


@pytest.fixture(scope="module")
def vqgan_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqgan")
    torch.manual_seed(0)
    save_vqgan(VQGAN(small_config().vq_config), folder, torch.float32)
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """A small model as stock transformers draws and saves it."""
    values = small_config().to_dict()
    for ours in ("dropout", "z_loss_weight", "mask_image_logits", "tie_head_norm", "architectures"):
        values.pop(ours, None)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("stock")
    ChameleonForConditionalGeneration(ChameleonConfig.from_dict(values)).save_pretrained(folder)
    return folder


def load_stock(folder) -> ChameleonForConditionalGeneration:
    """Stock transformers' model, which must find every key of its own, each in its shape, and no other."""
    stock, info = ChameleonForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return stock


def same_parameters(one, other) -> bool:
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return all(n == m and p.dtype == q.dtype and torch.equal(p, q) for (n, p), (m, q) in pairs)


def stored(folder, prefix="") -> dict[str, torch.Tensor]:
    """The tensors of a folder whose names begin so."""
    reader = WeightReader(folder)
    return {name: reader.read(name) for name in reader.names if name.startswith(prefix)}


def same_tensors(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("overrides", [{}, GROUPED])
def test_both_shapes_load_bit_equal(tmp_path, vqgan_dir, overrides):
    model = small_model(**overrides).eval()
    export_hf(model, model.config, tmp_path / "out")
    loaded = ChameleonXLLMXForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert same_parameters(model, loaded) and not loaded.training
    tokens = random_tokens(20)[None]
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.model_type == "chameleon_xllmx" and config.vocab_size == model.config.vocab_size
    assert config.architectures == ["ChameleonXLLMXForConditionalGeneration"]

    convert_checkpoint(tmp_path / "out", tmp_path / "hf", shape="hf", vqgan_dir=vqgan_dir)
    expected = load_stock(tmp_path / "hf").model(input_ids=tokens, use_cache=False).last_hidden_state
    assert torch.equal(model.model(tokens), expected)
    # The q/k-norms are tied again.
    assert same_parameters(model, load_pretrained(tmp_path / "hf"))


def test_the_vqgan_is_carried_along(stock, tmp_path):
    """From stock's shape to ours and back, by files and by a model in memory."""
    convert_checkpoint(stock, tmp_path / "xllmx", image_head_init="keep")
    convert_checkpoint(tmp_path / "xllmx", tmp_path / "back", shape="hf", max_file_bytes=100_000)
    model = load_pretrained(tmp_path / "xllmx")
    assert not any("vqmodel" in name for name in model.state_dict())
    carried = carried_vqgan(model.config)
    # As a training removes the checkpoint that it resumed from.
    shutil.rmtree(tmp_path / "xllmx")
    assert same_tensors(carried, stored(stock, HF_PREFIX)) and len(carried) > 10
    assert same_tensors(stored(tmp_path / "back"), stored(stock))
    configs = [AutoConfig.from_pretrained(folder).vq_config.to_dict() for folder in (tmp_path / "back", stock)]
    assert configs[0] == configs[1]
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = load_stock(tmp_path / "back").model.vqmodel.encode(pixels).image_tokens.view(2, 2, 2)
    assert torch.equal(load_vqgan(tmp_path / "back").encode(pixels), codes) and codes.unique().numel() > 1


def test_types_are_kept_or_cast(stock, tmp_path):
    (tmp_path / "fp32").symlink_to(stock)
    for source, out, flags, dtype in (
        ("fp32", "xllmx", [], torch.float32),
        ("fp32", "bf16", ["--dtype", "bf16"], torch.bfloat16),
        ("bf16", "hf-bf16", ["--shape", "hf"], torch.bfloat16),
        ("hf-bf16", "hf-fp32", ["--shape", "hf", "--dtype", "fp32"], torch.float32),
    ):
        assert main([str(tmp_path / source), str(tmp_path / out), *flags]) == 0
        reader = WeightReader(tmp_path / out)
        assert {reader.dtype(name) for name in reader.names if not name.startswith(HF_PREFIX)} == {dtype}
        assert {reader.dtype(name) for name in reader.names if name.startswith(HF_PREFIX)} == {torch.float32}
        assert json.loads((tmp_path / out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    load_stock(tmp_path / "hf-fp32")
    name = "model.layers.0.mlp.up_proj.weight"
    expected = WeightReader(tmp_path / "fp32").read(name).bfloat16()
    assert torch.equal(WeightReader(tmp_path / "hf-fp32").read(name), expected.float())
    for dtype in (None, torch.float32):
        loaded = load_pretrained(tmp_path / "bf16", dtype)
        assert loaded.dtype == (dtype or torch.bfloat16) and torch.equal(loaded.get_parameter(name), expected.to(dtype))
        assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32


def test_weights_are_written_one_file_at_a_time(tmp_path):
    alive, most = [0], [0]

    def get(name):
        # This array lives as long as the tensor's memory is held.
        values = np.full((64, 64), int(name), dtype=np.float32)
        weakref.finalize(values, lambda: alive.__setitem__(0, alive[0] - 1))
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        return torch.from_numpy(values)

    tensors = {str(i): torch.empty(64, 64, device="meta") for i in range(12)}
    write_weights(tmp_path, tensors, get, max_file_bytes=3 * 64 * 64 * 4)
    assert most[0] == 3 and len(list(tmp_path.glob("model-*-of-00004.safetensors"))) == 4
    reader = WeightReader(tmp_path)
    assert all(reader.read(name).eq(int(name)).all() for name in tensors)
    some_file = json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"]["5"]
    (tmp_path / some_file).unlink()
    with pytest.raises(FileNotFoundError, match=some_file):
        WeightReader(tmp_path)


def test_stock_norms_that_differ_are_rejected_or_kept_untied(stock, tmp_path, capsys):
    shutil.copytree(stock, tmp_path / "stock")
    weights = load_file(tmp_path / "stock" / "model.safetensors")
    weights[NORM][2] += 0.5
    save_file(weights, tmp_path / "stock" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="layers.1.self_attn.q_norm.weight.*tie_head_norm=False"):
        load_pretrained(tmp_path / "stock")
    untied = load_pretrained(tmp_path / "stock", tie_head_norm=False)
    tokens = random_tokens(20)[None]
    expected = load_stock(tmp_path / "stock").model(input_ids=tokens, use_cache=False).last_hidden_state
    assert torch.equal(untied.model(tokens), expected)

    assert main([str(tmp_path / "stock"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert NORM in said and "--untie_head_norm" in said and not (tmp_path / "out").exists()
    assert main([str(tmp_path / "stock"), str(tmp_path / "out"), "--untie_head_norm"]) == 0
    assert not load_config(tmp_path / "out").tie_head_norm
    assert torch.equal(load_pretrained(tmp_path / "out").get_parameter(NORM), weights[NORM])


def test_bad_folders_are_named(tmp_path, capsys):
    for name, said in (("absent", "the checkpoint .*absent is not a folder"), (".", "has no config.json")):
        with pytest.raises(FileNotFoundError, match=said):
            load_config(tmp_path / name)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="llama"):
        load_config(tmp_path)
    model, folder = small_model(), tmp_path / "run" / "epoch1"
    export_hf(model, model.config, folder)
    with pytest.raises(FileNotFoundError, match="is no checkpoint, but a folder of checkpoints: give .*run/epoch1$"):
        load_config(tmp_path / "run")
    for message, change in (
        ("missing.*layers.2", {"num_hidden_layers": 3}),
        ("unknown.*layers.1", {"num_hidden_layers": 1}),
        ("another shape", {"intermediate_size": 96}),
    ):
        with pytest.raises(ValueError, match=message):
            load_checkpoint_weights(build_model(small_config(**change), "cpu"), folder)
    assert main([str(folder), str(tmp_path / "run")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([str(folder), str(tmp_path / "new"), "--shape", "hf"]) == 2
    assert "--vqgan_dir" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_image_rows_are_zeroed_only_from_stock_to_a_start(stock, tmp_path, capsys):
    """An export of ours in stock's shape is not taken for stock Chameleon. The command prints what was done."""
    (tmp_path / "stock").symlink_to(stock)
    model = small_model()
    export_hf(model, model.config, tmp_path / "trained")
    for source, out, flags, done in (
        ("stock", "start", [], "zero"),
        ("stock", "stock again", ["--shape", "hf"], "keep"),
        ("stock again", "start again", [], "zero"),
        ("trained", "copy", [], "keep"),
        ("stock", "kept", ["--image_head_init", "keep"], "keep"),
        ("kept", "kept in hf", ["--shape", "hf"], "keep"),
        ("kept in hf", "kept again", [], "keep"),
    ):
        assert main([str(tmp_path / source), str(tmp_path / out), *flags]) == 0
        assert f"image rows of lm_head: {done})" in capsys.readouterr().out
        before, after = (stored(tmp_path / name, "lm_head")["lm_head.weight"][IMAGE_IDS] for name in (source, out))
        assert before.any() and torch.equal(after, before if done == "keep" else torch.zeros_like(before))


@pytest.mark.parametrize("how", ["zero", "normal"])
def test_only_the_image_rows_are_reinitialized(tmp_path, how):
    model = small_model()
    export_hf(model, model.config, tmp_path / "source", dtype=torch.bfloat16)
    drawn = torch.zeros(len(IMAGE_IDS), model.config.hidden_size)
    if how == "normal":
        drawn.normal_(0.0, model.config.initializer_range, generator=torch.Generator().manual_seed(1))
    expected = stored(tmp_path / "source")
    expected["lm_head.weight"] = expected["lm_head.weight"].index_copy(0, IMAGE_IDS, drawn.bfloat16())
    reader = open_weights(tmp_path / "source", how, seed=1)
    assert same_tensors({name: reader.read(name) for name in reader.names}, expected)
    assert same_tensors(
        stored(convert_checkpoint(tmp_path / "source", tmp_path / "start", image_head_init=how, seed=1)), expected
    )


def test_without_image_tokens_the_head_can_only_be_kept(tmp_path):
    model = small_model(vocabulary_map={"<s>": 0})
    export_hf(model, model.config, tmp_path / "source")
    with pytest.raises(ValueError, match="names no image tokens.*--image_head_init keep"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", image_head_init="zero")
    convert_checkpoint(tmp_path / "source", tmp_path / "out")


def sharded_round_trip(rank: int, world_size: int, folder: str) -> None:
    """Runs on every rank: fills a sharded model from files of either shape, against a plain one."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    mesh_shape = (2, 2) if world_size == 4 else (1, world_size)
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard"))
    plain = build_model(small_config(**GROUPED), "cpu")
    init_weights(plain, seed=3)
    for source in (None, "raw", "hf"):
        model = build_model(small_config(**GROUPED))
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = fully_shard(checkpoint_wrapper(layer), mesh=mesh)
        fully_shard([model.model.norm, model.lm_head], mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        reset_rotary_buffers(model)
        if source is None:
            init_weights(model, seed=3)
        else:
            load_checkpoint_weights(model, f"{folder}/{source}")
        for (name, sharded), (_, whole) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            assert torch.equal(sharded.full_tensor(), whole), (source, name)
    tokens = random_tokens(20)[None]
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    torch.distributed.barrier()
    destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [3, 4])
def test_sharded_models_init_and_load(tmp_path, vqgan_dir, world_size):
    """3 does not divide the sizes; 4 is two replicas of two shards."""
    model = build_model(small_config(**GROUPED), "cpu")
    init_weights(model, seed=3)
    export_hf(model, model.config, tmp_path / "raw")
    convert_checkpoint(tmp_path / "raw", tmp_path / "hf", shape="hf", vqgan_dir=vqgan_dir, max_file_bytes=30_000)
    forked.spawn(sharded_round_trip, (world_size, str(tmp_path)), world_size)
