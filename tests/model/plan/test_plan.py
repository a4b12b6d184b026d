"""The plan of a run: equal to sums by hand and to a run with values, and its figures for the shipped scripts."""

import gc
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, record_function

from data.epoch.dataset import TokenDataset
from data.epoch.packing import OrderOptions, plan_epoch
from data.formats.data_config import load_data_config
from exps import plan_table
from model.decoder.chameleon import build_config, build_model, init_weights
from model.decoder.trainable import choose_trainable, init_adapters
from model.plan import storage_tracker
from model.plan.plan import (
    CARDS_GIB,
    MOMENTS_BYTES,
    checkpoint_bytes,
    count_trained,
    needed_gib,
    plan_memory,
)
from model.plan.storage_tracker import ACTIVATIONS, GRADIENTS, OPTIMIZER, PARAMETERS
from model.run.flops import trained_flops_per_token
from model.run.options import Options, build_parser
from model.training.distributed import Launch, process_group
from model.training.optim import build_optimizer
from model.training.parallelize import allocate, build_mesh
from model.training.step import build_sharded, micro_step, optimizer_step
from model.training.step_guard import StepGuard
from model.weights.hf_folder import load_config
from tests.exps.test_exps import record_call
from tests.helpers import forked
from tests.helpers.small_run import ROOT, call_main, environment, solver_args

ROW_LEN = 128


def parse(folder: Path, **changes: object) -> Options:
    """The options of a plan of the small task; `changes` as for `solver_args`."""
    flags = {"plan": True, "data_config": None} | changes
    return Options.from_namespace(build_parser().parse_args(solver_args(folder, folder / "none", **flags)))


def plan(folder: Path, world_size: int = 1, row_len: int = ROW_LEN, document_len: int = 64, **changes: object):
    options = parse(folder, max_seq_len=document_len, **changes)
    config = load_config(folder / "init", dropout=options.model.dropout)
    return plan_memory(config, options, world_size, row_len, document_len)


@pytest.mark.parametrize(("world_size", "master_weights"), [(1, "fp32"), (3, "fp32"), (3, "split")])
def test_parameters_gradients_and_states_are_the_sums_by_hand(small_task, world_size, master_weights):
    found = plan(small_task, world_size, precision="bf16", master_weights=master_weights)
    model = build_model(load_config(small_task / "init"))
    parameters = list(model.parameters())
    # Rank 0 holds the first of world_size equal chunks of rows. Halves of masters are in the optimizer.
    size, halves = sum(-(-p.shape[0] // world_size) * p[0].numel() for p in parameters), 2 * (master_weights == "split")
    assert found.most[PARAMETERS] == found.most[GRADIENTS] == (4 - halves) * size
    # Beside both moments: a count of steps per parameter, and scalars of the clipping.
    largest = halves and max(8 * p.numel() for p in parameters) * 3
    assert 0 <= found.most[OPTIMIZER] - (8 + halves) * size <= 32 * len(parameters) + largest
    size = count_trained(model)
    assert checkpoint_bytes(model, parse(small_task)) == {"weights": 4 * size, "training state": 12 * size}


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
        measure_step(options, config, device)
        measured = torch.cuda.max_memory_allocated()
    assert planned.peak == pytest.approx(measured, rel=0.05)


def storage_bytes(tensors) -> int:
    """Bytes of the distinct storages under the tensors, sharded or not."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in local)}
    return sum(storages.values())


def measure_step(options: Options, config, device: torch.device) -> dict[str, int]:
    """Bytes that the second step of a run on one rank takes, without our tracker.

    Parameters, gradients and moments are summed; the peak is counted from the profiler's memory events.
    """
    mesh, guard, found = build_mesh(options.parallel, device.type, 1), StepGuard(options.guard), {}
    num_micro, max_seqlen = options.data.accum_iter, options.data.max_seq_len
    bounds = torch.arange(0, options.data.max_row_len + 1, max_seqlen).int()
    row_len, num_documents = int(bounds[-1]), len(bounds) - 1
    row = {name: torch.zeros(1, row_len, dtype=torch.int64) for name in ("input_ids", "labels", "position_ids")}
    row |= {"cu_seqlens": bounds, "num_valid_tokens": row_len - num_documents}
    # What earlier tests left would else be given back while the profiler listens.
    gc.collect()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = build_sharded(config, mesh, options.parallel, options.trainable, options.float8)
        allocate(model, device, options.parallel)
        init_weights(model.train())
        init_adapters(model, 0)
        optimizer = build_optimizer(model, options.optim)
        parameters = list(model.parameters())
        for _ in range(2):
            with record_function("a step"):
                for micro in range(num_micro):
                    settings = {"is_last": micro == num_micro - 1, "max_seqlen": max_seqlen, "divisor": row_len}
                    micro_step(model, row, device, options.parallel, **settings)
                found[GRADIENTS] = storage_bytes(p.grad for p in parameters if p.grad is not None)
                optimizer_step(model, mesh, optimizer, guard, options.optim.clip_grad, 1, [])
        moments = [value for state in optimizer.state.values() for value in state.values()]
        found |= {OPTIMIZER: storage_bytes(moments), PARAMETERS: storage_bytes(parameters)}
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
        pytest.param({"checkpointing": True, "accum_iter": 3}, marks=pytest.mark.slow),
        pytest.param({"lora_rank": 4, "train_only": "image_head"}, marks=pytest.mark.slow),
    ],
    ids=["all_weights", "checkpointing", "lora"],
)
def test_a_run_takes_what_its_plan_says(small_task, changes):
    """Against sums over the run's own tensors, and against torch's allocator."""
    options = parse(small_task, max_seq_len=64, **changes)
    config = load_config(small_task / "init")
    planned = plan_memory(config, options, 1, ROW_LEN, 64)
    with process_group(Launch(), "cpu", 60) as device:
        taken = measure_step(options, config, device)
        again = measure_step(options, config, device)
    # What earlier tests give back meanwhile makes the peak seem less.
    taken["peak"] = max(taken["peak"], again["peak"])
    assert planned.most[PARAMETERS] == taken[PARAMETERS]
    assert planned.most[GRADIENTS] == taken[GRADIENTS]
    assert planned.at_peak[OPTIMIZER] == pytest.approx(taken[OPTIMIZER], rel=0.01)
    assert planned.peak == pytest.approx(taken["peak"], rel=0.01)


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
def test_memory_falls_as_the_options_promise(small_task):
    full = plan(small_task, precision="bf16", row_len=1024)
    recomputed = plan(small_task, precision="bf16", row_len=1024, checkpointing=True)
    assert recomputed.most[ACTIVATIONS] < full.most[ACTIVATIONS]
    dropped = plan(small_task, precision="bf16", row_len=1024, dropout=0.1)
    # A byte per element of the hidden states, in two branches of two layers.
    kept = dropped.most[ACTIVATIONS] - full.most[ACTIVATIONS]
    assert 4 * 1024 * 32 <= kept < 2 * 4 * 1024 * 32
    offloaded = plan(small_task, precision="bf16", row_len=1024, cpu_offload=True)
    assert {PARAMETERS, GRADIENTS, OPTIMIZER} == set(offloaded.on_host)
    assert offloaded.peak <= full.peak - full.at_peak[PARAMETERS] - full.at_peak[OPTIMIZER]

    whole = trained_flops_per_token(build_model(load_config(small_task / "init")), 64)
    changes = {"lora_rank": 2, "train_only": "image_head"}
    found = plan(small_task, precision="bf16", row_len=1024, **changes)
    options = parse(small_task, **changes)
    model = choose_trainable(build_model(load_config(small_task / "init")), options.trainable)
    trained = count_trained(model)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    assert found.most[GRADIENTS] == 4 * trained < full.most[GRADIENTS]
    assert found.most[PARAMETERS] == 2 * frozen + 4 * trained
    assert checkpoint_bytes(model, options)["weights"] == 4 * trained
    assert 1 / 3 < trained_flops_per_token(model, 64) / whole < 1


@pytest.mark.slow
def test_states_in_8_bits(small_task):
    pytest.importorskip("torchao")
    config = build_config("tiny", vocab_size=1024, num_hidden_layers=2)
    size = count_trained(build_model(config))
    for optim, num_bytes in MOMENTS_BYTES.items():
        found = plan_memory(config, parse(small_task, optim=optim), 1, 16 * ROW_LEN, 64)
        assert found.peak_during == "forward and backward"
        assert found.at_peak[OPTIMIZER] == pytest.approx(num_bytes * size, rel=0.02)


def test_steps_and_tokens_are_those_of_the_data(small_task, tmp_path, capsys):
    flags = {"plan": True, "plan_world_size": 2, "accum_iter": 2, "plan_gpu_gib": 80}
    code, said = call_main(solver_args(small_task, tmp_path / "out", **flags))
    assert code == 0, said
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    dataset = TokenDataset(load_data_config(small_task / "data.yaml"), 64)
    expected = plan_epoch(dataset.table, OrderOptions(batch_size=2, max_seq_len=64, units_per_step=4), 0)
    assert figures["steps_per_epoch"] == expected.num_steps
    assert figures["tokens_per_epoch"] == expected.num_tokens
    assert expected.row_lens.max() <= figures["row_tokens"] <= 2 * 64
    assert figures["world_size"] == 2 and figures["model_size"].endswith("init")
    assert figures["fits"] is True and figures["fits_cards_gb"] == [24, 48, 80, 141]
    assert not (tmp_path / "out").exists() and not torch.distributed.is_initialized()
    # As in the run's `mfu`: of the document in which a token stands, on average.
    model, lengths = build_model(load_config(small_task / "init")), dataset.table.lengths.astype(float)
    mean_len = (lengths**2).sum() / lengths.sum()
    assert figures["flops_per_token"] == pytest.approx(trained_flops_per_token(model, mean_len), rel=1e-12)
    assert mean_len < lengths.max()
    assert figures["num_parameters"] == figures["num_trained_parameters"] == count_trained(model)


def test_a_plan_without_data_names_them_and_may_not_fit(small_task, tmp_path, capsys):
    args = solver_args(small_task, tmp_path / "out", plan=True, data_config=tmp_path / "none.yaml", plan_gpu_gib=1)
    assert call_main(args)[0] == 0
    out = capsys.readouterr().out
    assert "steps and tokens per epoch are not known" in out and "none.yaml does not exist" in out
    figures = json.loads(out.splitlines()[-1])
    assert figures["steps_per_epoch"] is None and figures["row_tokens"] == 2 * 64
    assert figures["fits"] is False and figures["needed_gib"] == pytest.approx(needed_gib(0), abs=0.1)


def test_what_training_rejects_is_not_planned(small_task, tmp_path):
    wrong = {
        "plan_world_size": (0, "--plan_world_size"),
        "plan_gpu_gib": (0, "--plan_gpu_gib"),
        "lr": (-1, "--lr"),
        "init_from": (tmp_path / "none", str(tmp_path / "none")),
        "batch_size": (0, "--batch_size must be at least 1, got 0"),
        "accum_iter": (0, "--accum_iter must be at least 1, got 0"),
        "max_seq_len": (-5, "--max_seq_len must be at least 1, got -5"),
        "dropout": (2, "--dropout must be at most 0.99, got 2"),
        "z_loss_weight": (-1, "--z_loss_weight must be at least 0, got -1"),
        "float8": (True, "--float8 goes with --precision bf16"),
    }
    flags = {name: value for name, (value, _) in wrong.items()}
    code, said = call_main(solver_args(small_task, tmp_path / "out", plan=True, data_config=None, **flags))
    assert code == 2 and all(message in said for _, message in wrong.values()) and "needs a GPU" not in said


def test_a_row_beyond_int32_is_one_line(small_task, tmp_path):
    code, said = call_main(solver_args(small_task, tmp_path / "out", plan=True, batch_size=2**31))
    assert code == 2 and said.count("\n") == 2 and "a row of 137,438,953,472 tokens is too long" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "card", "trained"),
    [("7B_lora", {"CARD_GIB": "24"}, (0.001, 0.02)), ("7B_one_gpu", {"CARD_GIB": "80"}, (1, 1))],
)
def test_the_scripts_for_one_gpu_fit_their_card(tmp_path, capsys, script, card, trained):
    ((_, size),) = card.items()
    # Micro-steps add to the same gradients: the plan of one takes half the time.
    flags = ["--plan", "--accum_iter", "1", "--plan_gpu_gib", "78"]
    call = record_call(tmp_path, f"exps/{script}.sh", *flags, OUTPUT_DIR=str(tmp_path / "out"), **card)
    assert call[:3] == ["python", "-u", "finetune_solver.py"]
    assert call_main(call[3:])[0] == 0
    out = capsys.readouterr().out
    figures = json.loads(out.splitlines()[-1])
    share = figures["num_trained_parameters"] / figures["num_parameters"]
    assert figures["world_size"] == 1 and trained[0] <= share <= trained[1]
    assert figures["fits"] is True and figures["needed_gib"] < CARDS_GIB[int(size)]
    assert 0.5 * CARDS_GIB[int(size)] < figures["peak_gib"] <= 72.8
    assert sum(figures["at_peak_gib"].values()) == pytest.approx(figures["peak_gib"], abs=0.05)
    # The sample data are not there.
    assert "steps and tokens per epoch are not known" in out and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_table_holds_the_plans():
    args = ["--model_sizes", "tiny", "--world_sizes", "4", "--batch_size", "1", "--max_seq_len", "256"]
    done = forked.run([sys.executable, ROOT / "exps/plan_table.py", *args], environment())
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0] == "| trained | 4 ranks |" and len(lines) == 2 + len(plan_table.METHODS)
    assert re.fullmatch(r"\| tiny, image head \| 0\.\d: 24 GB \|", lines[-1])


@pytest.mark.slow
def test_a_plan_of_adapters_needs_no_peft(small_task, monkeypatch):
    """The plan's own adapters count the same. A training names what to install."""
    pytest.importorskip("peft")
    changes = {"lora_rank": 4, "train_only": "image_head", "precision": "bf16"}
    by_peft = plan(small_task, **changes).most
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "peft", None)
        assert plan(small_task, **changes).most == by_peft
        assert call_main(solver_args(small_task, small_task / "none", plan=True, **changes))[0] == 0
        code, message = call_main(solver_args(small_task, small_task / "none", **changes))
        assert code == 2 and "pip install peft==" in message
