"""Gradients and their norm do not depend on how the model is spread over ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.chameleon import build_config, build_model, init_weights, reset_rotary_buffers
from model.parallelize import ParallelOptions, begin_micro_step, build_mesh, clip_grad_norm, parallelize

ROOT = Path(__file__).parents[1]
NUM_ROWS, ROW_LEN = 4, 24


def make_model(device: str):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = build_config("tiny", vocab_size=96, z_loss_weight=1e-3, **shape)
    return build_model(config, device=device)


def make_rows() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids, labels) [1, ROW_LEN] of the step's rows, with very uneven numbers of targets."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for row in range(NUM_ROWS):
        input_ids = torch.randint(0, 96, (1, ROW_LEN), generator=generator)
        labels = input_ids.clone()
        labels[:, : 5 * row] = -100
        rows.append((input_ids, labels))
    return rows


def plain_gradients() -> dict[str, torch.Tensor]:
    model = make_model("cpu")
    init_weights(model, seed=1)
    rows = make_rows()
    num_valid = sum(int((labels[:, 1:] != -100).sum()) for _, labels in rows)
    for input_ids, labels in rows:
        model(input_ids, labels, loss_scale=1.0 / num_valid).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def sharded_gradients(options: ParallelOptions, out_path: Path) -> None:
    """Run on every rank: one step, and rank 0 writes the whole gradients, their norm, and the norm after clipping."""
    from model.distributed import detect_launch, process_group

    launch = detect_launch()
    with process_group(launch, "cpu", timeout_s=60):
        mesh = build_mesh(options, "cpu", launch.local_world_size)
        model = parallelize(make_model("meta"), mesh, options)
        model.to_empty(device="cpu")
        reset_rotary_buffers(model)
        init_weights(model, seed=1)
        rows = make_rows()
        num_valid = sum(int((labels[:, 1:] != -100).sum()) for _, labels in rows)
        mine = rows[launch.rank :: launch.world_size]
        for micro_step, (input_ids, labels) in enumerate(mine):
            begin_micro_step(model, options, is_last=micro_step == len(mine) - 1)
            model(input_ids, labels, loss_scale=1.0 / num_valid).loss.backward()
        gradients = {
            name.replace("_checkpoint_wrapped_module.", ""): parameter.grad.full_tensor().clone()
            for name, parameter in model.named_parameters()
        }
        norm = clip_grad_norm(model, mesh, max_norm=0.01)
        clipped = clip_grad_norm(model, mesh, max_norm=0.0)
        if launch.is_main:
            torch.save((gradients, norm, clipped), out_path)


def assert_equal_to_plain(saved: Path) -> None:
    gradients, norm, clipped = torch.load(saved)
    expected = plain_gradients()
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=2e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    plain_norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    torch.testing.assert_close(norm, plain_norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(clipped, torch.tensor(0.01), rtol=1e-3, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_single_rank(tmp_path, checkpointing):
    sharded_gradients(ParallelOptions(precision="fp32", checkpointing=checkpointing), tmp_path / "saved.pt")
    assert_equal_to_plain(tmp_path / "saved.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {"data_parallel": "fsdp"}),
        (2, {"data_parallel": "sdp", "checkpointing": True}),
        (4, {"data_parallel": "hsdp", "hsdp_shard_size": 2}),
        (2, {"data_parallel": "hsdp", "hsdp_shard_size": 1}),
    ],
    ids=str,
)
def test_gradients_of_several_ranks(tmp_path, ranks, options):
    """Two ranks take two micro-steps, four take one; the sum over all is that of one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    given = json.dumps({"precision": "fp32", **options})
    subprocess.run([*command, given, str(tmp_path / "saved.pt")], env=environment, check=True, timeout=240)
    assert_equal_to_plain(tmp_path / "saved.pt")


def test_problems():
    assert not ParallelOptions().problems(8, 8)
    assert not ParallelOptions(data_parallel="hsdp").problems(16, 8)
    assert "must divide" in ParallelOptions(data_parallel="hsdp", hsdp_shard_size=3).problems(8, 8)[0]
    assert "only with" in ParallelOptions(hsdp_shard_size=2).problems(8, 8)[0]
    assert "bf16" in ParallelOptions(precision="fp16").problems(1, 1)[0]
    assert "fp32 or bf16" in ParallelOptions(grad_precision="fp16").problems(1, 1)[0]


if __name__ == "__main__":
    from model.distributed import end_process

    sharded_gradients(ParallelOptions(**json.loads(sys.argv[1])), Path(sys.argv[2]))
    end_process(0)
