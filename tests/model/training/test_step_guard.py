"""Steps with a gradient that is not finite, or too large, change nothing; the optimizer decides without the host."""

import json
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.formats.token_file import load_token_file
from model.training.distributed import Launch, process_group
from model.training.optim import OPTIMIZERS, OptimOptions, build_optimizer, plain_tensors, set_lr
from model.training.parallelize import ParallelOptions, build_mesh
from model.training.step import optimizer_step
from model.training.step_guard import GuardOptions, StepGuard
from tests.helpers.small_run import call_main, read_lines, solver_args

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def alone():
    with process_group(Launch(), "cpu", timeout_s=60):
        yield


@pytest.mark.parametrize(
    ("norms", "bad", "is_too_many"),
    [([1.0, NAN, 2.0, INF], [2, 4], False), ([1.0, NAN, INF, 1.0], [2, 3], True), ([5.0, 7.0], [2], False)],
)
def test_skipped_steps_are_known_with_their_items(norms, bad, is_too_many):
    guard = StepGuard(GuardOptions(max_bad_steps=2, skip_grad_norm=6.0))
    flags = [guard.check(torch.tensor(norm), step, [10 * step]) for step, norm in enumerate(norms, start=1)]
    assert [step for step, flag in enumerate(flags, start=1) if flag] == bad
    assert guard.read(guard.numbers().tolist()) == ([(step, [10 * step]) for step in bad], is_too_many)


def test_bad_steps_in_a_row_are_counted_over_log_lines():
    guard, found = StepGuard(GuardOptions(max_bad_steps=3)), []
    for step, norm in enumerate([NAN, NAN, NAN, 1.0, NAN]):
        guard.check(torch.tensor(norm), step, [])
        found.append(guard.read(guard.numbers().tolist())[1])
    assert found == [False, False, True, False, False]


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("is_first_bad", [False, True])
def test_a_skipped_step_leaves_weights_moments_and_counts(alone, optim, is_first_bad):
    """Also in the first step: the moments are then zero."""
    mesh = build_mesh(ParallelOptions(), "cpu", 1)
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64)
    optimizer = build_optimizer(layer, OptimOptions(optim=optim, lr=0.1, wd=0.1))
    start = {name: value.clone() for name, value in layer.state_dict().items()}

    def step(is_bad: bool) -> dict[str, torch.Tensor]:
        """All that is held after a step."""
        layer(torch.randn(2, 64)).square().sum().backward()
        if is_bad:
            layer.weight.grad[0, 0] = NAN
        set_lr(optimizer, 0.1)
        optimizer_step(layer, mesh, optimizer, StepGuard(GuardOptions()), 0.0, 1, [])
        state = {
            f"{name}.{key}{part}": tensor
            for name, p in layer.named_parameters()
            for key, value in optimizer.state[p].items()
            for part, tensor in enumerate(plain_tensors(value))
        }
        return {key: value.clone() for key, value in (layer.state_dict() | state).items()}

    first = step(is_first_bad)
    if is_first_bad:
        assert all(torch.equal(first[name], start[name]) for name in start)
        assert not any(optimizer.state[layer.weight][name].dequantize().any() for name in ("exp_avg", "exp_avg_sq"))
    second, third = step(True), step(False)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert float(third["weight.step0"]) == 2 - is_first_bad and not torch.equal(third["weight"], first["weight"])
    assert all(torch.isfinite(value.float()).all() for value in third.values())


# In a run


def read_bad_steps(output_dir) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "bad_steps.jsonl").read_text().splitlines()]


def test_too_many_bad_steps_end_the_run_with_their_items(small_task, tmp_path):
    out = tmp_path / "out"
    code, message = call_main(solver_args(small_task, out, skip_grad_norm=1e-9, max_bad_steps=3))
    assert code == 1 and "3 steps in a row had a gradient" in message and "Traceback" not in message
    assert [line["step"] for line in read_bad_steps(out)] == [1, 2, 3]
    assert all(place.endswith(".pkl") for line in read_bad_steps(out) for place in line["items"])
    assert [line["skipped_steps"] for line in read_lines(out)] == [1, 1, 1]


@pytest.mark.slow
def test_one_item_that_gives_no_finite_gradient_costs_its_step_alone(small_task, tmp_path):
    """The embedding of a word that a single item has is infinite."""
    tokens = {item: set(load_token_file(small_task / "files" / f"{item}.pkl").token.tolist()) for item in range(24)}
    times = Counter(token for own in tokens.values() for token in own if token >= 80)
    item, token = next((item, token) for item, own in tokens.items() for token in own if times[token] == 1)
    start = shutil.copytree(small_task / "init", tmp_path / "init")
    weights = load_file(start / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = INF
    save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    code, message = call_main(solver_args(small_task, out, init_from=start, epochs=1))
    assert code == 0, message
    (line,) = read_bad_steps(out)
    assert any(place.endswith(f"/{item}.pkl") for place in line["items"])
    assert sum(line["skipped_steps"] for line in read_lines(out)) == 1
    assert [line["loss"] is None for line in read_lines(out)].count(True) == 1
