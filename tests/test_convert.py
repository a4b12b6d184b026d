"""Weights in and out: both shapes of checkpoint, plain and sharded, and what stock transformers makes of them."""

import contextlib
import gc
import json
import math
import re
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, ChameleonConfig, ChameleonForConditionalGeneration

from model.chameleon import ChameleonXLLMXForConditionalGeneration
from model.convert import (
    VQGAN_PREFIX,
    convert_checkpoint,
    export_hf,
    load_checkpoint_weights,
    load_config,
    load_pretrained,
    main,
    resolve_checkpoint,
)
from model.decoder.chameleon import (
    build_model,
    init_weights,
    reset_rotary_buffers,
)
from model.vqgan import VQGAN, load_vqgan, save_vqgan
from model.weight_files import INDEX_FILE, WeightReader, write_weights
from tests import forked
from tests.decoder_helpers import random_tokens, small_config, small_model


@pytest.fixture(scope="module")
def vqgan_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqgan")
    torch.manual_seed(0)
    save_vqgan(VQGAN(small_config().vq_config), folder, torch.float32)
    return folder


def write_stock_checkpoint(folder) -> ChameleonForConditionalGeneration:
    """A small model as stock transformers draws and saves it; it is returned."""
    values = small_config().to_dict()
    for ours in ("dropout", "z_loss_weight", "mask_image_logits", "tie_head_norm", "architectures"):
        values.pop(ours, None)
    torch.manual_seed(0)
    stock = ChameleonForConditionalGeneration(ChameleonConfig.from_dict(values)).eval()
    stock.save_pretrained(folder)
    return stock


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
    assert config.model_type == "chameleon_xllmx" and config.vocab_size == model.config.vocab_size
    assert config.architectures == ["ChameleonXLLMXForConditionalGeneration"]


@pytest.mark.parametrize("overrides", [{}, dict(model_parallel_size=2, num_key_value_heads=2, swin_norm=True)])
def test_stock_transformers_loads_the_hf_shape(tmp_path, vqgan_dir, overrides):
    model = small_model(**overrides).eval()
    export_hf(model, model.config, tmp_path / "hf", shape="hf", vqgan_dir=vqgan_dir)
    stock = load_stock(tmp_path / "hf")
    tokens = random_tokens(20)[None]
    ours = model.model(tokens)
    assert torch.equal(ours, stock.model(input_ids=tokens, use_cache=False).last_hidden_state)
    assert same_parameters(model, load_pretrained(tmp_path / "hf"))  # tied again


def load_stock(folder):
    """Stock transformers' model, which must find every key of its own, each in its shape, and no other."""
    stock, info = ChameleonForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return stock


def stored(folder, prefix=""):
    """The tensors of a folder whose names begin so."""
    reader = WeightReader(folder)
    return {name: reader.read(name) for name in reader.names if name.startswith(prefix)}


def same_tensors(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_vqgan_is_carried_along(tmp_path):
    """From stock's shape to ours and back, through both roads: by files, and by a model in memory."""
    stock = write_stock_checkpoint(tmp_path / "stock")
    convert_checkpoint(tmp_path / "stock", tmp_path / "hf", shape="hf")
    convert_checkpoint(tmp_path / "stock", tmp_path / "xllmx", image_head_init="keep")
    convert_checkpoint(tmp_path / "xllmx", tmp_path / "back", shape="hf", max_file_bytes=100_000)
    assert same_tensors(stored(tmp_path / "xllmx", VQGAN_PREFIX), stored(tmp_path / "stock", VQGAN_PREFIX))
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    stock_config = AutoConfig.from_pretrained(tmp_path / "stock")
    codes = stock.model.vqmodel.encode(pixels).image_tokens.view(2, 2, 2)
    assert codes.unique().numel() > 1
    for name in ("hf", "back"):
        assert same_tensors(stored(tmp_path / name), stored(tmp_path / "stock")), name
        loaded = load_stock(tmp_path / name)
        assert AutoConfig.from_pretrained(tmp_path / name).vq_config.to_dict() == stock_config.vq_config.to_dict()
        assert torch.equal(loaded.model.vqmodel.encode(pixels).image_tokens.view(2, 2, 2), codes)
        assert torch.equal(load_vqgan(tmp_path / name).encode(pixels), codes)

    model = load_pretrained(tmp_path / "xllmx")
    assert not any("vqmodel" in name for name in model.state_dict())
    export_hf(model, model.config, tmp_path / "first")
    shutil.rmtree(tmp_path / "xllmx")  # as a training removes the checkpoint that it went on from
    export_hf(model, model.config, tmp_path / "second", shape="hf")
    assert same_tensors(stored(tmp_path / "first", VQGAN_PREFIX), stored(tmp_path / "stock", VQGAN_PREFIX))
    assert same_tensors(stored(tmp_path / "second"), stored(tmp_path / "stock"))


def test_a_start_without_vqgan_can_be_saved(tmp_path):
    """Gone before the first save, or damaged: the save goes on, and says what it lacks."""
    write_stock_checkpoint(tmp_path / "stock")
    model = load_pretrained(tmp_path / "stock")
    (tmp_path / "stock" / "model.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="model.safetensors is damaged"):
        export_hf(model, model.config, tmp_path / "out")
    assert same_parameters(model, load_pretrained(tmp_path / "out"))
    with pytest.raises(ValueError, match="--vqgan_dir"):
        export_hf(model, model.config, tmp_path / "hf", shape="hf")


def test_types_are_kept_or_cast(tmp_path):
    model = small_model()
    export_hf(model, model.config, tmp_path / "fp32")
    export_hf(model, model.config, tmp_path / "bf16", dtype=torch.bfloat16)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        reader = WeightReader(tmp_path / name)
        assert {reader.dtype(tensor) for tensor in reader.names} == {dtype}
        assert load_pretrained(tmp_path / name).lm_head.weight.dtype == dtype
    into_fp32 = load_pretrained(tmp_path / "bf16", dtype=torch.float32)
    assert torch.equal(into_fp32.lm_head.weight, model.lm_head.weight.bfloat16().float())
    assert load_pretrained(tmp_path / "bf16").model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("shape", ["xllmx", "hf"])
def test_converting_keeps_or_casts_the_type(tmp_path, shape):
    write_stock_checkpoint(tmp_path / "fp32")
    for source, flags, dtype in (
        ("fp32", [], torch.float32),
        ("fp32", ["--dtype", "bf16"], torch.bfloat16),
        ("bf16", [], torch.bfloat16),
        ("bf16", ["--dtype", "fp32"], torch.float32),
    ):
        out = tmp_path / f"{shape}-{source}-{'-'.join(flags)}"
        source = tmp_path / (source if source == "fp32" else f"{shape}-fp32---dtype-bf16")
        assert main([str(source), str(out), "--shape", shape, *flags]) == 0
        reader = WeightReader(out)
        is_vqgan = {name: name.startswith(VQGAN_PREFIX) for name in reader.names}
        assert {reader.dtype(name) for name in reader.names if not is_vqgan[name]} == {dtype}
        assert {reader.dtype(name) for name in reader.names if is_vqgan[name]} == {torch.float32}
        assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        if shape == "hf":
            load_stock(out)
    expected = load_pretrained(tmp_path / "fp32").model.layers[0].mlp.up_proj.weight
    assert torch.equal(load_pretrained(out).model.layers[0].mlp.up_proj.weight, expected.bfloat16().float())


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


def test_untie_flag_of_the_command(tmp_path, capsys):
    write_stock_checkpoint(tmp_path / "stock")
    weights = load_file(tmp_path / "stock" / "model.safetensors")
    weights["model.layers.1.self_attn.q_norm.weight"][2] += 0.5
    save_file(weights, tmp_path / "stock" / "model.safetensors", metadata={"format": "pt"})
    assert main([str(tmp_path / "stock"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "layers.1.self_attn.q_norm.weight" in said and "--untie_head_norm" in said
    assert not (tmp_path / "out").exists()
    assert main([str(tmp_path / "stock"), str(tmp_path / "out"), "--untie_head_norm"]) == 0
    config, reader = load_config(tmp_path / "out"), WeightReader(tmp_path / "out")
    rows = (config.num_attention_heads, config.hidden_size // config.num_attention_heads)
    assert not config.tie_head_norm and reader.shape("model.layers.1.self_attn.q_norm.weight") == rows
    norm = "model.layers.1.self_attn.q_norm.weight"
    assert torch.equal(load_pretrained(tmp_path / "out").get_parameter(norm), weights[norm])


def test_a_hub_id_is_read_from_the_local_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo, commit = tmp_path / "cache" / "models--some--model", "0123456789abcdef0123456789abcdef01234567"
    model = small_model()
    export_hf(model, model.config, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert resolve_checkpoint("some/model").resolve() == (repo / "snapshots" / commit).resolve()
    assert same_parameters(model, load_pretrained("some/model"))
    assert main(["some/model", str(tmp_path / "out")]) == 0
    assert same_parameters(model, load_pretrained(tmp_path / "out"))
    assert main(["some/other", str(tmp_path / "new")]) == 2
    assert "some/other is not a folder here, and could not be fetched from the hub" in capsys.readouterr().err


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
    assert "--vqgan_dir" in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "new")]) == 2


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="the checkpoint .*absent is not a folder"):
        resolve_checkpoint(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="llama"):
        load_config(tmp_path)
    model = small_model()
    export_hf(model, model.config, tmp_path / "run" / "epoch1")
    with pytest.raises(FileNotFoundError, match="is no checkpoint, but a folder of checkpoints: give .*run/epoch1$"):
        load_config(tmp_path / "run")
    export_hf(model, model.config, tmp_path)
    with pytest.raises(ValueError, match="missing.*layers.2"):
        load_checkpoint_weights(build_model(small_config(num_hidden_layers=3), "cpu"), tmp_path)
    with pytest.raises(ValueError, match="unknown.*layers.1"):
        load_checkpoint_weights(build_model(small_config(num_hidden_layers=1), "cpu"), tmp_path)
    with pytest.raises(ValueError, match="another shape"):
        load_checkpoint_weights(build_model(small_config(intermediate_size=96), "cpu"), tmp_path)


def test_writing_holds_one_file_and_gathers_one_tensor(tmp_path):
    """`get` stands for the gathering of a sharded tensor: the ranks that do not write hold one at a time."""
    for is_writer, most in ((True, 3), (False, 1)):
        alive, high = [0], [0]

        def get(name, alive=alive, high=high):
            values = np.ones((64, 64), dtype=np.float32)  # lives as long as the tensor's memory is held
            weakref.finalize(values, lambda: alive.__setitem__(0, alive[0] - 1))
            alive[0] += 1
            high[0] = max(high[0], alive[0])
            return torch.from_numpy(values)

        entries = [(f"w{i}", (64, 64), torch.float32) for i in range(12)]
        write_weights(tmp_path, entries, get, is_writer, max_file_bytes=3 * 64 * 64 * 4)
        assert high[0] == most
    assert len(WeightReader(tmp_path).names) == 12


# Long ones: memory of a larger model, and sharded models on several ranks


def peak_growth_mib(work) -> tuple[float, object]:
    """How far the resident memory of this process rose above what it was, in MiB, while `work()` ran; its result."""

    def status(name: str) -> int:
        return int(re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M).group(1))

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = status("VmRSS")
    result = work()
    return (status("VmHWM") - before) / 1024, result


def measure_memory(_: int, folder: str) -> None:
    """In a process of its own, so that memory freed by earlier work hides nothing; figures in MiB into memory.json."""
    shape = dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=8)
    model = build_model(small_config(num_hidden_layers=8, **shape), "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    figures = {"model": sum(parameter.nbytes for parameter in model.parameters()) / 2**20}
    small_files = dict(dtype=torch.bfloat16, max_file_bytes=8 * 2**20)
    figures["export"], _ = peak_growth_mib(lambda: export_hf(model, model.config, folder + "/bf16", **small_files))
    export_hf(model, model.config, folder + "/fp32")
    figures["load"], other = peak_growth_mib(lambda: load_pretrained(folder + "/fp32"))
    assert same_parameters(model, other)
    figures["convert"], _ = peak_growth_mib(
        lambda: convert_checkpoint(folder + "/fp32", folder + "/converted", **small_files)
    )
    (Path(folder) / "memory.json").write_text(json.dumps(figures))


@pytest.mark.slow
def test_memory_of_export_load_and_convert(tmp_path):
    forked.spawn(measure_memory, (str(tmp_path),), 1)
    figures = json.loads((tmp_path / "memory.json").read_text())
    print(figures)
    assert figures["model"] > 100
    assert figures["export"] < 20, "one file of 8 MiB, and the tensor that is cast"
    # Files that are read are mapped: their pages count, but are shared by all processes and given back at need.
    assert figures["model"] < figures["load"] < 2 * figures["model"] + 20, "the pages of the file and one copy"
    assert figures["convert"] < figures["model"] + 20, "the pages of the source and one file"


@contextlib.contextmanager
def counted_reads():
    """Bytes that `WeightReader` gives out, by tensor."""
    read, num_bytes = WeightReader.read, {}

    def counting_read(self, name, part=None):
        tensor = read(self, name, part)
        num_bytes[name] = num_bytes.get(name, 0) + tensor.nbytes
        return tensor

    WeightReader.read = counting_read
    yield num_bytes
    WeightReader.read = read


def write_in_small_files(source: str, out_dir: str) -> None:
    load_config(source).save_pretrained(out_dir)
    reader = WeightReader(source)
    entries = [(name, reader.shape(name), reader.dtype(name)) for name in reader.names]
    write_weights(out_dir, entries, reader.read, max_file_bytes=30_000)
    assert len(list(Path(out_dir).glob("model-*.safetensors"))) > 5


def sharded_round_trip(rank: int, world_size: int, folder: str) -> None:
    """Runs on every rank: init, export and load of a sharded model, against a plain one.

    What each rank read, by folder and tensor, goes into reads-{rank}.json.
    """
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
    reads = {}
    for filled_from in (None, "export", "hf", "split"):
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
            if rank == 0:
                write_in_small_files(folder + "/export", folder + "/split")
            torch.distributed.barrier()
        else:
            with counted_reads() as reads[filled_from]:
                load_checkpoint_weights(model, f"{folder}/{filled_from}")
        if filled_from == "hf":  # the VQGAN comes from there without being asked for
            export_hf(model, load_config(folder + "/hf"), folder + "/again", shape="hf")
        for (name, sharded), (_, whole) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            assert torch.equal(sharded.full_tensor(), whole), (filled_from, name)
    Path(f"{folder}/reads-{rank}.json").write_text(json.dumps(reads))
    tokens = random_tokens(20)[None]
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    torch.distributed.barrier()
    destroy_process_group()


@pytest.fixture(scope="module", params=[3, 4])  # 3 does not divide the sizes; 4 is two replicas of two shards
def sharded_run(request, tmp_path_factory, vqgan_dir):
    """(folder, number of ranks) after `sharded_round_trip`."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "vqgan").symlink_to(vqgan_dir)
    forked.spawn(sharded_round_trip, (request.param, str(folder)), request.param)
    return folder, request.param


@pytest.mark.slow
def test_sharded_models_init_export_and_load(sharded_run):
    plain = build_model(small_config(model_parallel_size=2), "cpu")
    init_weights(plain, seed=3)
    assert same_parameters(plain, load_pretrained(sharded_run[0] / "export"))
    assert same_tensors(stored(sharded_run[0] / "again"), stored(sharded_run[0] / "hf"))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["export", "split", "hf"])
def test_each_rank_reads_only_its_rows(sharded_run, source):
    folder, world_size = sharded_run
    num_shards = 2 if world_size == 4 else world_size
    reads = [json.loads((folder / f"reads-{rank}.json").read_text())[source] for rank in range(world_size)]
    reader = WeightReader(folder / source)
    sizes = {name: reader.read(name).nbytes for name in reader.names if not name.startswith(VQGAN_PREFIX)}
    matrices = [name for name in sizes if len(reader.shape(name)) == 2 and "_norm." not in name]
    total = sum(sizes[name] for name in matrices)
    for num_bytes in reads:
        assert not any(name.startswith(VQGAN_PREFIX) for name in num_bytes)
        for name in matrices:
            rows = reader.shape(name)[0]
            assert num_bytes.get(name, 0) <= math.ceil(rows / num_shards) * sizes[name] / rows, name
        assert abs(sum(num_bytes.get(name, 0) for name in matrices) - total / num_shards) < 0.05 * total
        assert sum(num_bytes.values()) < 1.1 * sum(sizes.values()) / num_shards
    assert sum(num_bytes.get(name, 0) for num_bytes in reads for name in matrices) == total * world_size / num_shards
