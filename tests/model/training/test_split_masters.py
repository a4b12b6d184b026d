"""`--master_weights split`: every bit of a master is kept, and a run is that of a plain loop over fp32 masters."""

import pytest
import torch
from safetensors.torch import load_file

from model.decoder.chameleon import build_config, build_model, init_weights
from model.decoder.local_shards import join_master, split_master
from model.decoder.trainable import TrainableOptions
from model.training.checkpoint import split_parameters
from model.training.distributed import Launch, process_group
from model.training.float8 import Float8Options
from model.training.optim import OptimOptions, build_optimizer, join_local, plain_tensors, set_lr, split_by_decay
from model.training.parallelize import ParallelOptions, allocate, build_mesh
from model.training.step import build_sharded, micro_step, optimizer_step
from model.training.step_guard import GuardOptions, StepGuard
from tests.helpers.small_run import call_main, losses, solver_args
from tests.helpers.small_run import train as run_ranks

NUM_STEPS, ROW_LEN = 50, 96
OPTIM = OptimOptions(lr=1e-4, wd=0.1)
CLIP_GRAD = 1.0
# Its gradient is made infinite.
BAD_STEP = 3
CONFIG = build_config("tiny", vocab_size=512, hidden_size=64, intermediate_size=160, z_loss_weight=1e-4)


def make_row(step: int) -> dict[str, torch.Tensor]:
    """One of four rows of two documents."""
    input_ids = torch.randint(0, 512, (1, ROW_LEN), generator=torch.Generator().manual_seed(step % 4))
    positions = torch.cat([torch.arange(40), torch.arange(ROW_LEN - 40)])[None]
    bounds = torch.tensor([0, 40, ROW_LEN], dtype=torch.int32)
    row = {"input_ids": input_ids, "labels": input_ids, "position_ids": positions, "cu_seqlens": bounds}
    return row | {"num_valid_tokens": ROW_LEN - 2}


def train(
    master_weights: str, optim: str = "adamw", num_steps: int = NUM_STEPS
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of the project's own step, and the masters after the last one."""
    parallel = ParallelOptions(master_weights=master_weights)
    options, found = OptimOptions(lr=OPTIM.lr, wd=OPTIM.wd, optim=optim), []
    with process_group(Launch(), "cpu", timeout_s=60) as device:
        mesh = build_mesh(parallel, "cpu", 1)
        model = build_sharded(CONFIG, mesh, parallel, TrainableOptions(), Float8Options())
        allocate(model, device, parallel)
        init_weights(model.train(), 0)
        optimizer, guard = build_optimizer(model, options), StepGuard(GuardOptions())
        for step in range(num_steps):
            settings = {"is_last": True, "max_seqlen": ROW_LEN, "divisor": ROW_LEN - 2}
            found.append(micro_step(model, make_row(step), device, parallel, **settings).loss.item())
            if step == BAD_STEP:
                plain_tensors(model.lm_head.weight.grad)[0][0, 0] = torch.inf
            set_lr(optimizer, OPTIM.lr)
            norm = optimizer_step(model, mesh, optimizer, guard, CLIP_GRAD, step, [])
            assert step > 0 or norm > CLIP_GRAD
        split = split_parameters(model)
        assert len(split) == (len(list(model.parameters())) if master_weights == "split" else 0)
        assert all(split[name].dtype == torch.bfloat16 and split[name].low_bits.any() for name in split)
        masters = {
            name: join_local(parameter) if name in split else plain_tensors(parameter)[0]
            for name, parameter in model.named_parameters()
        }
    return found, masters


def train_plainly(num_steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same steps on one plain model in bf16: its gradients move fp32 masters, which are rounded for every step."""
    model, found = build_model(CONFIG, "cpu", torch.bfloat16).train(), []
    start = build_model(CONFIG, "cpu")
    init_weights(start, 0)
    masters = dict(start.named_parameters())
    groups = split_by_decay(masters.items(), decay_all=False)
    groups = [{"params": group, "weight_decay": wd} for group, wd in zip(groups, (OPTIM.wd, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=(0.9, 0.95), fused=True)
    for step in range(num_steps):
        for name, parameter in model.named_parameters():
            parameter.data = split_master(masters[name].detach())[0]
        row = {name: value for name, value in make_row(step).items() if name != "num_valid_tokens"}
        loss = model(**row, max_seqlen=ROW_LEN, loss_scale=1 / (ROW_LEN - 2)).loss
        loss.backward()
        found.append(loss.item())
        gradients = {name: parameter.grad.float() for name, parameter in model.named_parameters()}
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).square().sum().sqrt()
        factor = (CLIP_GRAD / (norm + 1e-6)).clamp(max=1.0)
        for name, gradient in gradients.items():
            masters[name].grad = gradient * factor
        if step != BAD_STEP:
            optimizer.step()
        model.zero_grad()
    return found, {name: master.detach() for name, master in masters.items()}


def test_the_round_trip_of_masters_is_exact():
    """Over all kinds of bit patterns: ties, infinities and NaN among them. Weights are the nearest in bf16."""
    bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=torch.Generator().manual_seed(0))
    edges = [0, -1, 0x7FFF, 0x8000, 0x18000, 0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF, -(2**31), -8388609, -0x8000]
    bits = torch.cat([bits, torch.tensor(edges)]).to(torch.int32)
    weight, low_bits = split_master(bits.view(torch.float32))
    assert (weight.dtype, low_bits.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join_master(weight, low_bits).view(torch.int32), bits)
    master = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    is_tie = master.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(split_master(master)[0][~is_tie], master.bfloat16()[~is_tie])


@pytest.mark.parametrize("num_steps", [6, pytest.param(NUM_STEPS, marks=pytest.mark.slow)])
def test_steps_are_those_of_a_plain_loop_to_the_bit(num_steps):
    """With clipping, weight decay, and a step that is skipped; the loss is that with fp32 masters."""
    found, masters = train("split", num_steps=num_steps)
    plain, plain_masters = train_plainly(num_steps)
    assert found == plain and found[-1] < found[0] - 0.01 * num_steps
    assert all(torch.equal(masters[name], plain_masters[name]) for name in plain_masters)
    assert found == pytest.approx(train("fp32", num_steps=num_steps)[0], abs=1e-3)


@pytest.mark.slow
def test_moments_in_8_bits_train_split_masters():
    pytest.importorskip("torchao")
    found, expected = (train(way, "adamw_8bit", num_steps=9)[0] for way in ("split", "fp32"))
    # The first and the last step have the same row.
    assert found == pytest.approx(expected, abs=5e-3) and found[-1] < found[0] - 0.05


@pytest.mark.parametrize(
    ("before", "after", "flags"),
    [
        ("split", "split", {}),
        pytest.param("split", "fp32", {"no_async_save": True}, marks=pytest.mark.slow),
        pytest.param("fp32", "split", {}, marks=pytest.mark.slow),
    ],
)
def test_checkpoints_hold_whole_masters_and_either_way_resumes_the_other(small_task, tmp_path, before, after, flags):
    """Resumed in its own way, a run is the uninterrupted one to the bit."""
    flags = {"precision": "bf16", "save_iteration_interval": 0} | flags
    args = [solver_args(small_task, tmp_path / name, max_steps=6, **flags) for name in ("out", "whole")]
    first = solver_args(small_task, tmp_path / "out", max_steps=3, master_weights=before, **flags)
    assert call_main(first) == (0, "")
    weights = load_file(tmp_path / "out" / "epoch0-iter3" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any((tensor.bfloat16() != tensor).any() for tensor in weights.values())
    resumed, whole = ([*part, "--master_weights", way] for part, way in zip(args, (after, before), strict=True))
    assert call_main(resumed) == call_main(whole) == (0, "")
    found, expected = losses(tmp_path / "out"), losses(tmp_path / "whole")
    assert found == (expected if before == after else pytest.approx(expected, abs=1e-2))
    # The first loss after the resume has seen masters of the other way, rounded to the same weights.
    assert found[4] == expected[4]


@pytest.mark.slow
def test_split_masters_of_two_ranks_go_on_on_one(small_task, tmp_path):
    flags = {"precision": "bf16", "master_weights": "split", "save_iteration_interval": 0}
    run_ranks(2, solver_args(small_task, tmp_path / "two", max_steps=3, **flags))
    assert call_main(solver_args(small_task, tmp_path / "two", max_steps=5, **flags)) == (0, "")
    alone = solver_args(small_task, tmp_path / "one", max_steps=5, accum_iter=2, **flags)
    assert call_main(alone) == (0, "")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-2)


def test_what_does_not_go_with_split_masters():
    assert not ParallelOptions(master_weights="split").problems(8, 8)
    for problems in (
        ParallelOptions(master_weights="split", precision="fp32").problems(1, 1),
        ParallelOptions(master_weights="split", cpu_offload=True).problems(1, 1),
        ParallelOptions(master_weights="split").problems(1, 1, is_partial=True),
    ):
        assert "--master_weights split goes with --precision bf16" in problems[0]
