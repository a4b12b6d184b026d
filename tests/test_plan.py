"""The plan of a run: equal to sums by hand and to a run with values, and what it says of the shipped scripts."""

import dataclasses
import gc
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, record_function

from data.data_config import load_data_config
from data.dataset import TokenDataset
from data.packing import PlanOptions, plan_epoch
from exps import plan_table
from model import storage_tracker
from model.adapter_folder import NOTE_NAME, BaseWeights
from model.convert import convert_checkpoint, load_config
from model.decoder.chameleon import build_config, build_model, init_weights
from model.distributed import Launch, process_group
from model.flops import trained_flops_per_token
from model.optim import build_optimizer
from model.options import Options, build_parser
from model.parallelize import allocate, build_mesh
from model.plan import CARDS_GIB, GIB, count_step, needed_gib, plan_memory
from model.plan_disk import vqgan_bytes
from model.step_guard import StepGuard
from model.storage_tracker import ACTIVATIONS, GRADIENTS, LOSS, OPTIMIZER, PARAMETERS, StorageTracker
from model.trainable import init_adapters
from model.training import build_sharded, micro_step, optimizer_step
from tests import forked
from tests.small_run import ROOT, call_main, environment, solver_args
from tests.test_exps import record_call

ROW_LEN = 128


def parse(folder: Path, **changes: object) -> Options:
    """The options of a plan of the small task; `changes` as for `solver_args`."""
    flags = {"plan": True, "data_config": None} | changes
    return Options.from_namespace(build_parser().parse_args(solver_args(folder, folder / "none", **flags)))


def plan(folder: Path, world_size: int = 1, row_len: int = ROW_LEN, document_len: int = 64, **changes: object):
    options = parse(folder, max_seq_len=document_len, **changes)
    config = load_config(folder / "init", dropout=options.model.dropout)
    return plan_memory(config, options, world_size, row_len, document_len)


def run_plan(tmp_path: Path, capsys, script: str, *flags: str, **env: str) -> tuple[dict, str]:
    """The plan of what a script starts: the figures of its last line, and all that it printed."""
    call = record_call(tmp_path, script, "--plan", *flags, OUTPUT_DIR=str(tmp_path / "out"), **env)
    assert call[:3] == ["python", "-u", "finetune_solver.py"]
    assert call_main(call[3:])[0] == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


@pytest.mark.parametrize("world_size", [1, 3])
def test_parameters_gradients_and_states_are_the_sums_by_hand(small_task, world_size):
    found = plan(small_task, world_size)
    parameters = list(build_model(load_config(small_task / "init")).parameters())
    # fp32; rank 0 holds the first of world_size equal chunks of rows
    shards = sum(4 * -(-p.shape[0] // world_size) * p[0].numel() for p in parameters)
    assert found.num_parameters == found.num_trained == sum(p.numel() for p in parameters)
    assert found.most[PARAMETERS] == shards
    assert found.most[GRADIENTS] == shards
    # beside both moments: a count of steps per parameter, and scalars of the clipping
    assert 0 <= found.most[OPTIMIZER] - 2 * shards <= 32 * len(parameters)
    assert found.checkpoint["weights"] == 4 * found.num_parameters
    assert 0 <= found.checkpoint["training state"] - 12 * found.num_parameters <= 4 * len(parameters)


def count_real_step(options: Options, config, device: torch.device) -> StorageTracker:
    """What `plan_memory` does, with values and one real rank that has joined its group."""
    mesh = build_mesh(options.parallel, device.type, 1)
    model = build_sharded(config, mesh, options.parallel, options.trainable, options.float8)
    allocate(model, device, options.parallel)
    init_weights(model)
    optimizer = build_optimizer(model, options.optim)
    tracker = StorageTracker()
    bounds = torch.arange(0, options.data.batch_size * options.data.max_seq_len + 1, options.data.max_seq_len)
    count_step(model.train(), mesh, optimizer, tracker, options, bounds.to(torch.int32))
    return tracker


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"checkpointing": True, "accum_iter": 2}], ids=["plain", "checkpointing"])
def test_a_run_with_values_has_the_same_peak(small_task, changes):
    """In fp32 a CPU attends as the plan does: by one call per document."""
    options = parse(small_task, max_seq_len=64, **changes)
    config = load_config(small_task / "init")
    planned = plan_memory(config, options, 1, ROW_LEN, 64)
    with process_group(Launch(), "cpu", 60) as device:
        real = count_real_step(options, config, device)
    assert planned.peak == pytest.approx(real.peak, rel=0.01)
    for kind in (PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOSS):
        assert planned.most[kind] == pytest.approx(real.most[kind], rel=0.01), kind


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [["--checkpointing"], []], ids=["checkpointing", "plain"])
def test_peak_is_within_5_percent_of_what_a_gpu_measures(flags):
    """Four layers of the 1B shape: enough that what CUDA's libraries keep for themselves does not count."""
    sizes = ["--batch_size", "4", "--max_seq_len", "2048", "--accum_iter", "1"]
    options = Options.from_namespace(build_parser().parse_args(["--plan", "--no_compile", *sizes, *flags]))
    config = build_config("1B", vocab_size=65536, num_hidden_layers=4, dropout=0.05)
    planned = plan_memory(config, options, 1, 4 * 2048, 2048)
    with process_group(Launch(), "cuda", 600) as device:
        torch.cuda.reset_peak_memory_stats()
        count_real_step(options, config, device)
        measured = torch.cuda.max_memory_allocated()
    assert planned.peak == pytest.approx(measured, rel=0.05)


def storage_bytes(tensors) -> int:
    """Bytes of the distinct storages under the tensors, sharded or not."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in local)}
    return sum(storages.values())


def measure_step(options: Options, config, device: torch.device) -> dict[str, int]:
    """Bytes that the second step of a run on one rank takes, by no tracker of ours.

    Parameters, gradients and moments are summed up where they lie; the peak is that of all that torch's allocator said
    to its profiler, from before there was a model.
    """
    mesh = build_mesh(options.parallel, device.type, 1)
    guard = StepGuard(options.guard)
    found, num_micro = {}, options.data.accum_iter
    gc.collect()  # what earlier tests left would else be given back while the allocator is listened to
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = build_sharded(config, mesh, options.parallel, options.trainable, options.float8)
        allocate(model, device, options.parallel)
        init_weights(model.train())
        init_adapters(model, 0)
        optimizer = build_optimizer(model, options.optim)
        parameters = list(model.parameters())
        for _ in range(2):
            row = {name: torch.zeros(1, ROW_LEN, dtype=torch.int64) for name in ("input_ids", "labels", "position_ids")}
            row |= {"cu_seqlens": torch.arange(0, ROW_LEN + 1, 64).int(), "num_valid_tokens": ROW_LEN - ROW_LEN // 64}
            with record_function("a step"):
                for micro in range(num_micro):
                    is_last = micro == num_micro - 1
                    micro_step(model, row, device, options.parallel, is_last=is_last, max_seqlen=64, divisor=ROW_LEN)
                found[GRADIENTS] = storage_bytes(p.grad for p in parameters if p.grad is not None)
                optimizer_step(model, mesh, optimizer, guard, options.optim.clip_grad, 1, [])
        moments = [value for state in optimizer.state.values() for value in state.values()]
        found[OPTIMIZER] = storage_bytes(value for value in moments if isinstance(value, torch.Tensor))
        found[PARAMETERS] = storage_bytes(parameters)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    *_, began = (event.start_ns() for event in events if event.name() == "a step")
    taken, found["peak"] = 0, 0
    for event in events:
        taken += event.nbytes() if event.name() == "[memory]" else 0
        found["peak"] = max(found["peak"], taken if event.start_ns() >= began else 0)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"accum_iter": 3}, marks=pytest.mark.slow),
        pytest.param({"lora_rank": 4, "train_only": "image_head"}, marks=pytest.mark.slow),
    ],
    ids=["all_weights", "checkpointing", "accumulated", "lora"],
)
def test_a_run_takes_what_its_plan_says(small_task, changes):
    """Against sums over its own tensors, and against what torch's allocator gave out."""
    options = parse(small_task, max_seq_len=64, **changes)
    config = load_config(small_task / "init")
    planned = plan_memory(config, options, 1, ROW_LEN, 64)
    with process_group(Launch(), "cpu", 60) as device:
        taken = measure_step(options, config, device)
        again = measure_step(options, config, device)
    taken["peak"] = max(taken["peak"], again["peak"])  # what others give back meanwhile makes it seem less
    assert planned.most[PARAMETERS] == taken[PARAMETERS]
    assert planned.most[GRADIENTS] == taken[GRADIENTS]
    assert planned.at_peak[OPTIMIZER] == pytest.approx(taken[OPTIMIZER], rel=0.01)
    assert planned.peak == pytest.approx(taken["peak"], rel=0.01)


@pytest.mark.slow
def test_attention_keeps_nothing_of_rows_by_rows(small_task):
    """With the kernel of CUDA the activations of a row grow as the row, also if it is one document."""
    short, long = (plan(small_task, row_len=n, document_len=n, precision="bf16") for n in (1024, 2048))
    assert long.most[ACTIVATIONS] < 2.1 * short.most[ACTIVATIONS]


def test_packed_rows_in_bf16_take_the_kernel_of_cuda_and_its_workspace(small_task, monkeypatch):
    """Two documents of 64 tokens: in the backward fp32 sums of queries, and one number for each head."""
    workspaces, count = {}, storage_tracker._workspace

    def count_and_note(func, args):
        workspaces[func.name()] = count(func, args)
        return workspaces[func.name()]

    monkeypatch.setattr(storage_tracker, "_workspace", count_and_note)
    plan(small_task, precision="bf16")
    config = load_config(small_task / "init")
    assert "torch_attn::_varlen_attn" in workspaces and not any("scaled_dot_product" in name for name in workspaces)
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    padded = ROW_LEN + 2 * 128
    assert workspaces["torch_attn::_varlen_attn_backward"] == padded * heads * (head_dim * 4 + 4)


@pytest.mark.slow
def test_dropout_keeps_a_byte_per_element(small_task):
    without, with_dropout = (plan(small_task, precision="bf16", dropout=p) for p in (0.0, 0.1))
    hidden, branches = 32, 2 * 2  # two layers
    kept = with_dropout.most[ACTIVATIONS] - without.most[ACTIVATIONS]
    assert branches * ROW_LEN * hidden <= kept < 2 * branches * ROW_LEN * hidden


@pytest.mark.slow
def test_memory_falls_as_the_options_promise(small_task):
    full = plan(small_task, precision="bf16", row_len=1024)
    recomputed = plan(small_task, precision="bf16", row_len=1024, checkpointing=True)
    assert recomputed.most[ACTIVATIONS] < full.most[ACTIVATIONS]
    lora = plan(small_task, precision="bf16", row_len=1024, lora_rank=2)
    assert lora.most[GRADIENTS] == 4 * lora.num_trained < full.most[GRADIENTS]
    frozen = lora.num_parameters - lora.num_trained
    assert lora.most[PARAMETERS] == 2 * frozen + 4 * lora.num_trained
    assert lora.checkpoint["weights"] == 4 * lora.num_trained
    assert 2 / 3 < lora.flops_per_token / full.flops_per_token < 1
    rows = plan(small_task, precision="bf16", row_len=1024, train_only="image_head")
    assert rows.num_parameters == full.num_parameters, "trained rows are rows of what is there"
    assert rows.num_trained == 2 * 64 * 32 and rows.most[GRADIENTS] == 4 * rows.num_trained
    offloaded = plan(small_task, precision="bf16", row_len=1024, cpu_offload=True)
    assert {PARAMETERS, GRADIENTS, OPTIMIZER} == set(offloaded.on_host)
    assert offloaded.peak <= full.peak - full.at_peak[PARAMETERS] - full.at_peak[OPTIMIZER]


@pytest.mark.slow
def test_states_in_8_bits(small_task):
    pytest.importorskip("torchao")
    config = build_config("tiny", vocab_size=1024, num_hidden_layers=2)
    full, small = (
        plan_memory(config, parse(small_task, optim=optim), 1, ROW_LEN, 64) for optim in ("adamw", "adamw_8bit")
    )
    moments = [found.checkpoint["training state"] - found.checkpoint["weights"] for found in (full, small)]
    # a byte of code and 4 / 256 bytes of scale for every fp32 value of 4 bytes
    assert moments[1] == pytest.approx(moments[0] * (1 + 4 / 256) / 4, rel=0.02)


def test_steps_and_tokens_are_those_of_the_data(small_task, tmp_path, capsys):
    flags = {"plan": True, "plan_world_size": 2, "accum_iter": 2, "plan_gpu_gib": 80}
    code, said = call_main(solver_args(small_task, tmp_path / "out", **flags))
    assert code == 0, said
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    dataset = TokenDataset(load_data_config(small_task / "data.yaml"), 64)
    expected = plan_epoch(dataset.table, PlanOptions(batch_size=2, max_seq_len=64, units_per_step=4), 0)
    assert figures["steps_per_epoch"] == expected.num_steps
    assert figures["tokens_per_epoch"] == expected.num_tokens
    assert expected.row_lens.max() <= figures["row_tokens"] <= 2 * 64
    assert figures["world_size"] == 2 and figures["model_size"].endswith("init")
    assert figures["fits"] is True and figures["fits_cards_gb"] == [24, 48, 80, 141]
    assert not (tmp_path / "out").exists() and not torch.distributed.is_initialized()
    # as `mfu` of the run has them: of the document in which a token stands, on average
    model, lengths = build_model(load_config(small_task / "init")), dataset.table.lengths.astype(float)
    mean_len = (lengths**2).sum() / lengths.sum()
    assert figures["flops_per_token"] == pytest.approx(trained_flops_per_token(model, mean_len), rel=1e-12)
    assert mean_len < lengths.max()


def test_plans_without_data_and_says_so(small_task, tmp_path, capsys):
    args = solver_args(small_task, tmp_path / "out", plan=True, data_config=tmp_path / "none.yaml", plan_gpu_gib=1)
    assert call_main(args)[0] == 0  # also if it does not fit
    out = capsys.readouterr().out
    assert "steps and tokens per epoch are not known" in out and "none.yaml does not exist" in out
    figures = json.loads(out.splitlines()[-1])
    assert figures["steps_per_epoch"] is None and figures["row_tokens"] == 2 * 64
    assert figures["fits"] is False and figures["needed_gib"] == pytest.approx(needed_gib(0), abs=0.1)


def test_data_config_is_required_without_plan(small_task, tmp_path):
    code, said = call_main(solver_args(small_task, tmp_path, data_config=None))
    assert code == 2 and "--data_config" in said


def test_wrong_options_are_told_at_once(small_task, tmp_path):
    flags = {"plan": True, "plan_world_size": 0, "lr": -1, "init_from": tmp_path / "none", "plan_gpu_gib": 0}
    code, said = call_main(solver_args(small_task, tmp_path / "out", **flags))
    assert code == 2
    for name in ("--plan_world_size", "--plan_gpu_gib", "--lr", str(tmp_path / "none")):
        assert name in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": 0}, "--batch_size must be at least 1, got 0"),
        ({"accum_iter": 0}, "--accum_iter must be at least 1, got 0"),
        ({"max_seq_len": -5}, "--max_seq_len must be at least 1, got -5"),
        ({"batch_size": 2**20, "max_seq_len": 2**12}, "a row of 4,294,967,296 tokens is too long"),
        ({"dropout": 2}, "--dropout must lie between 0 and 1, got 2"),
        ({"z_loss_weight": -1}, "--z_loss_weight must not be negative, got -1"),
        ({"float8": True, "precision": "fp32"}, "--float8 goes with --precision bf16"),
        ({"float8": True, "precision": "bf16", "lora_rank": 2}, "--float8 trains every weight"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_training_refuses_is_not_planned(small_task, tmp_path, flags, message):
    code, said = call_main(solver_args(small_task, tmp_path / "out", plan=True, data_config=None, **flags))
    assert code == 2 and message in said and "needs a GPU" not in said


def test_adapters_without_their_base_are_not_planned(small_task, tmp_path):
    shutil.copytree(small_task / "init", tmp_path / "base")
    shutil.copytree(small_task / "init", tmp_path / "adapters", ignore=shutil.ignore_patterns("*.safetensors"))
    note = dataclasses.asdict(BaseWeights.of(tmp_path / "base", tmp_path))
    (tmp_path / "adapters" / NOTE_NAME).write_text(json.dumps(note))
    args = solver_args(small_task, tmp_path / "out", plan=True, data_config=None, init_from=tmp_path / "adapters")
    assert call_main(args)[0] == 0
    shutil.rmtree(tmp_path / "base")
    code, said = call_main(args)
    assert code == 2 and f"the rest comes from {tmp_path / 'base'}, which is gone" in said


def test_disk_of_the_vqgan_that_checkpoints_carry(small_task, tmp_path, capsys):
    folder = convert_checkpoint(small_task / "init", tmp_path / "start", vqgan_dir=ROOT / "exps/tiny/vqgan")
    tensors = load_file(folder / "model.safetensors").items()
    carried = vqgan_bytes(parse(small_task, init_from=folder, image_head_init="zero"))
    assert carried == sum(tensor.nbytes for name, tensor in tensors if "vqmodel" in name) > 0
    assert vqgan_bytes(parse(small_task, init_from=None, model_size="tiny")) == 0
    assert 0.1 < vqgan_bytes(parse(small_task, init_from=None, model_size="7B")) / GIB < 0.12
    args = solver_args(small_task, tmp_path / "out", plan=True, data_config=None, init_from=folder)
    for flags, is_carried in (([], True), (["--image_head_init=zero", "--train_only=image_head"], False)):
        assert call_main([*args, *flags])[0] == 0
        assert ("VQGAN 0.00" in capsys.readouterr().out) == is_carried


@pytest.mark.slow
@pytest.mark.parametrize(("size", "world_size", "most_gib"), [("7B", 1, 125), ("34B", 32, 65)])
def test_shipped_scripts_fit(tmp_path, capsys, size, world_size, most_gib):
    figures, out = run_plan(tmp_path, capsys, f"exps/{size}.sh", "--plan_world_size", str(world_size))
    assert figures["model_size"] == size and figures["row_tokens"] == 8 * 4096
    assert 0.5 * most_gib < figures["peak_gib"] < most_gib
    assert sum(figures["at_peak_gib"].values()) == pytest.approx(figures["peak_gib"], abs=0.05)
    assert "steps and tokens per epoch are not known" in out  # the sample data are not there
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("card_gib", [24, 48])
def test_the_lora_script_fits_its_card(tmp_path, capsys, card_gib):
    figures, _ = run_plan(tmp_path, capsys, "exps/7B_lora.sh", CARD_GIB=str(card_gib))
    assert figures["world_size"] == 1 and figures["num_trained_parameters"] < 0.02 * figures["num_parameters"]
    fitting = CARDS_GIB[card_gib]
    assert figures["needed_gib"] < fitting and figures["peak_gib"] > 0.5 * fitting


@pytest.mark.slow
def test_table_holds_the_plans():
    args = ["--model_sizes", "tiny", "--world_sizes", "1", "4", "--batch_size", "1", "--max_seq_len", "256"]
    done = forked.run([sys.executable, ROOT / "exps/plan_table.py", *args], environment())
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0] == "| trained | 1 rank | 4 ranks |" and len(lines) == 2 + len(plan_table.METHODS)
    planned = plan_table.make_plan(("tiny", "image head", 4, 1, 256))
    assert lines[-1].startswith("| tiny, image head |") and lines[-1].endswith(f" {plan_table.format_cell(planned)} |")


@pytest.mark.slow
def test_a_plan_of_adapters_needs_no_peft(small_task, monkeypatch):
    """What peft makes of the layers, it counts by itself; a training is told what to install."""
    pytest.importorskip("peft")
    changes = {"lora_rank": 4, "train_only": "image_head", "precision": "bf16"}
    by_peft = plan(small_task, **changes)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "peft", None)
        assert plan(small_task, **changes) == by_peft
        assert call_main(solver_args(small_task, small_task / "none", plan=True, **changes))[0] == 0
        code, message = call_main(solver_args(small_task, small_task / "none", **changes))
        assert code == 2 and "pip install peft==" in message
