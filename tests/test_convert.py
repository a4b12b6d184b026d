"""Weights in and out: both shapes of checkpoint, plain and sharded, and what stock transformers makes of them."""

import json

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, ChameleonForConditionalGeneration

from model.chameleon import (
    ChameleonXLLMXForConditionalGeneration,
    build_model,
    init_weights,
    reset_rotary_buffers,
)
from model.convert import (
    VQGAN_PREFIX,
    convert_checkpoint,
    export_hf,
    load_checkpoint_weights,
    load_config,
    load_pretrained,
    main,
    prepare_starting_point,
    resolve_checkpoint,
)
from model.vqgan import VQGAN, save_vqgan
from model.weight_files import INDEX_FILE, WeightReader, write_weights
from tests.decoder_helpers import random_tokens, small_config, small_model, write_small_tokenizer


@pytest.fixture(scope="module")
def vqgan_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqgan")
    torch.manual_seed(0)
    save_vqgan(VQGAN(small_config().vq_config), folder, torch.float32)
    return folder


def same_parameters(one, other) -> bool:
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return all(n == m and p.dtype == q.dtype and torch.equal(p, q) for (n, p), (m, q) in pairs)


@pytest.mark.parametrize("overrides", [{}, dict(model_parallel_size=2, num_key_value_heads=2, swin_norm=True)])
def test_export_loads_back_bit_equal(tmp_path, overrides):
    model = small_model(**overrides)
    export_hf(model, model.config, tmp_path / "out")
    loaded = ChameleonXLLMXForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert same_parameters(model, loaded)
    assert not loaded.training
    tokens = random_tokens(20)[None]
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.model_type == "chameleon" and config.vocab_size == model.config.vocab_size
    assert config.architectures == ["ChameleonXLLMXForConditionalGeneration"]


@pytest.mark.parametrize("overrides", [{}, dict(model_parallel_size=2, num_key_value_heads=2, swin_norm=True)])
def test_stock_transformers_loads_the_hf_shape(tmp_path, vqgan_dir, overrides):
    model = small_model(**overrides).eval()
    export_hf(model, model.config, tmp_path / "hf", shape="hf", vqgan_dir=vqgan_dir)
    stock, info = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = random_tokens(20)[None]
    ours = model.model(tokens)
    assert torch.equal(ours, stock.model(input_ids=tokens, use_cache=False).last_hidden_state)
    assert same_parameters(model, load_pretrained(tmp_path / "hf"))  # tied again


def test_types_are_kept_or_cast(tmp_path):
    model = small_model()
    export_hf(model, model.config, tmp_path / "fp32")
    export_hf(model, model.config, tmp_path / "bf16", dtype=torch.bfloat16)
    assert WeightReader(tmp_path / "bf16").dtype("lm_head.weight") == torch.bfloat16
    assert load_pretrained(tmp_path / "bf16").lm_head.weight.dtype == torch.bfloat16
    into_fp32 = load_pretrained(tmp_path / "bf16", dtype=torch.float32)
    assert torch.equal(into_fp32.lm_head.weight, model.lm_head.weight.bfloat16().float())
    assert load_pretrained(tmp_path / "bf16").model.rotary_emb.inv_freq.dtype == torch.float32


def test_several_weight_files(tmp_path):
    model = small_model()
    state = dict(model.named_parameters())
    entries = [(name, tuple(p.shape), p.dtype) for name, p in state.items()]
    model.config.save_pretrained(tmp_path)
    write_weights(tmp_path, entries, state.__getitem__, max_file_bytes=40_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert same_parameters(model, load_pretrained(tmp_path))
    some_file = next(iter(json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"].values()))
    (tmp_path / some_file).unlink()
    with pytest.raises(FileNotFoundError, match=some_file):
        load_pretrained(tmp_path)


def test_stock_norms_that_differ_are_refused_or_loaded_untied(tmp_path, vqgan_dir):
    model = small_model()
    export_hf(model, model.config, tmp_path / "hf", shape="hf", vqgan_dir=vqgan_dir)
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.layers.1.self_attn.q_norm.weight"][2] += 0.5
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="layers.1.self_attn.q_norm.weight.*tie_head_norm=False"):
        load_pretrained(tmp_path / "hf")
    untied = load_pretrained(tmp_path / "hf", tie_head_norm=False)
    stock = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf")
    tokens = random_tokens(20)[None]
    assert torch.equal(untied.model(tokens), stock.model(input_ids=tokens, use_cache=False).last_hidden_state)


def test_starting_point_zeroes_the_image_rows_of_the_head(tmp_path):
    model = small_model()
    export_hf(model, model.config, tmp_path / "source")
    write_small_tokenizer(tmp_path / "source")
    start = prepare_starting_point(tmp_path / "source", tmp_path / "run" / "starting_point")
    loaded = load_pretrained(start)
    image_ids = model.image_token_ids(torch.device("cpu"))
    assert not loaded.lm_head.weight[image_ids].any()
    kept = torch.ones(len(loaded.lm_head.weight), dtype=torch.bool).index_fill(0, image_ids, False)
    assert torch.equal(loaded.lm_head.weight[kept], model.lm_head.weight[kept])
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert (start / "tokenizer.json").is_file()
    assert prepare_starting_point(tmp_path / "no such source", start) == start  # taken as it is
    drawn = [convert_checkpoint(start, tmp_path / f"n{i}", image_head_init="normal", seed=i) for i in (0, 1)]
    rows = [load_pretrained(folder).lm_head.weight[image_ids] for folder in drawn]
    assert not torch.equal(*rows) and 0.015 < rows[0].std() < 0.025


def test_convert_command(tmp_path, vqgan_dir, capsys):
    model = small_model()
    export_hf(model, model.config, tmp_path / "source")
    there_and_back = tmp_path / "hf", tmp_path / "back"
    assert main([str(tmp_path / "source"), str(there_and_back[0]), "--shape", "hf", "--vqgan_dir", str(vqgan_dir)]) == 0
    assert any(name.startswith(VQGAN_PREFIX) for name in WeightReader(there_and_back[0]).names)
    assert main([str(there_and_back[0]), str(there_and_back[1])]) == 0
    assert same_parameters(model, load_pretrained(there_and_back[1]))
    capsys.readouterr()
    assert main([str(tmp_path / "source"), str(there_and_back[1])]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([str(tmp_path / "source"), str(tmp_path / "new"), "--shape", "hf"]) == 2
    assert "vqgan_dir" in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "new")]) == 2


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        resolve_checkpoint(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="llama"):
        load_config(tmp_path)
    model = small_model()
    export_hf(model, model.config, tmp_path)
    with pytest.raises(ValueError, match="missing.*layers.2"):
        load_checkpoint_weights(build_model(small_config(num_hidden_layers=3), "cpu"), tmp_path)
    with pytest.raises(ValueError, match="unknown.*layers.1"):
        load_checkpoint_weights(build_model(small_config(num_hidden_layers=1), "cpu"), tmp_path)
    with pytest.raises(ValueError, match="another shape"):
        load_checkpoint_weights(build_model(small_config(intermediate_size=96), "cpu"), tmp_path)


def sharded_round_trip(rank: int, world_size: int, folder: str) -> None:
    """Runs on every rank: init, export and load of a sharded model, against a plain one."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    mesh_shape = (2, 2) if world_size == 4 else (1, world_size)
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard"))
    config = small_config(model_parallel_size=2)
    plain = build_model(config, "cpu")
    init_weights(plain, seed=3)
    for filled_from in (None, folder + "/export", folder + "/hf"):
        model = build_model(config)
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = fully_shard(checkpoint_wrapper(layer), mesh=mesh)
        fully_shard([model.model.norm, model.lm_head], mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        reset_rotary_buffers(model)
        if filled_from is None:
            init_weights(model, seed=3)
            export_hf(model, config, folder + "/export")
            export_hf(model, config, folder + "/hf", shape="hf", vqgan_dir=folder + "/vqgan")
            torch.distributed.barrier()
        else:
            load_checkpoint_weights(model, filled_from)
        for (name, sharded), (_, whole) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            assert torch.equal(sharded.full_tensor(), whole), (filled_from, name)
    tokens = random_tokens(20)[None]
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    torch.distributed.barrier()
    destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [3, 4])  # 3 does not divide the sizes; 4 is replicas of shards
def test_sharded_models_init_export_and_load(tmp_path, vqgan_dir, world_size):
    (tmp_path / "vqgan").symlink_to(vqgan_dir)
    mp.spawn(sharded_round_trip, (world_size, str(tmp_path)), nprocs=world_size)
    plain = build_model(small_config(model_parallel_size=2), "cpu")
    init_weights(plain, seed=3)
    assert same_parameters(plain, load_pretrained(tmp_path / "export"))
