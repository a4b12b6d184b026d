"""Steps with a gradient that is not finite, or too large, change nothing; the optimizer decides without the host."""

import json

import pytest
import torch

from model.optim import OPTIMIZERS, OptimOptions, build_optimizer, plain_tensors, set_lr
from model.step_guard import GuardOptions, StepGuard
from tests.small_run import call_main, read_lines, solver_args

CPU = torch.device("cpu")


def take_steps(norms, options, optimizer=None, gradients=None) -> tuple[list, bool]:
    guard = StepGuard(options, CPU)
    flags = [guard.check(torch.tensor(norm), step, [10 * step]) for step, norm in enumerate(norms, start=1)]
    assert [bool(flag) for flag in flags] == [not norm < (options.skip_grad_norm or float("inf")) for norm in norms]
    return guard.read(guard.numbers().tolist())


def test_skipped_steps_are_known_with_their_items():
    skipped, is_too_many = take_steps([1.0, float("nan"), 2.0, float("inf")], GuardOptions(max_bad_steps=2))
    assert skipped == [(2, [20]), (4, [40])] and not is_too_many
    assert take_steps([1.0, float("nan"), float("inf"), 1.0], GuardOptions(max_bad_steps=2))[1]
    assert take_steps([5.0, 7.0], GuardOptions(skip_grad_norm=6.0)) == ([(2, [20])], False)


def test_bad_steps_in_a_row_are_counted_over_log_lines():
    guard = StepGuard(GuardOptions(max_bad_steps=3), CPU)
    found = []
    for step, norm in enumerate([float("nan"), float("nan"), float("nan"), 1.0, float("nan")]):
        guard.check(torch.tensor(norm), step, [])
        found.append(guard.read(guard.numbers().tolist())[1])
    assert found == [False, False, True, False, False]


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("is_first_bad", [False, True])
def test_a_skipped_step_leaves_weights_moments_and_counts(optim, is_first_bad):
    """Also where nothing came before: the moments are then zero."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64)
    optimizer = build_optimizer(layer, OptimOptions(optim=optim, lr=0.1, wd=0.1))

    def step(is_bad: bool) -> dict:
        layer(torch.randn(2, 64)).square().sum().backward()
        if is_bad:
            layer.weight.grad[0, 0] = float("nan")
        norm = torch.nn.utils.get_total_norm([p.grad for p in layer.parameters()])
        optimizer.found_inf = StepGuard(GuardOptions(), CPU).check(norm, 1, [])
        set_lr(optimizer, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        return held_values()

    def held_values() -> dict:
        state = {
            f"{name}.{key}{part}": tensor
            for name, p in layer.named_parameters()
            for key, value in optimizer.state[p].items()
            for part, tensor in enumerate(plain_tensors(value))
        }
        return {key: value.clone() for key, value in (layer.state_dict() | state).items()}

    if is_first_bad:
        before = held_values()
        first = step(True)
        assert all(torch.equal(first[key], before[key]) for key in before)
        moments = [_dequantized(optimizer.state[layer.weight][name]) for name in ("exp_avg", "exp_avg_sq")]
        assert not any(moment.any() for moment in moments)
    else:
        first = step(False)
    second, third = step(True), step(False)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert float(third["weight.step0"]) == 2 - is_first_bad and not torch.equal(third["weight"], first["weight"])
    assert all(torch.isfinite(value.float()).all() for value in third.values())


def _dequantized(moment: torch.Tensor) -> torch.Tensor:
    return moment.dequantize() if hasattr(moment, "dequantize") else moment


# In a run


@pytest.fixture
def task(small_task):
    return small_task


def held(output_dir) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "bad_steps.jsonl").read_text().splitlines()]


def test_too_many_bad_steps_end_the_run_with_their_items(task, tmp_path):
    out = tmp_path / "out"
    code, message = call_main(solver_args(task, out, skip_grad_norm=1e-9, max_bad_steps=3))
    assert code == 1 and "3 steps in a row had a gradient" in message and "Traceback" not in message
    assert [line["step"] for line in held(out)] == [1, 2, 3]
    assert all(place.endswith(".pkl") for line in held(out) for place in line["items"])
    assert [line["skipped_steps"] for line in read_lines(out)] == [1, 1, 1]


def test_one_item_that_gives_no_finite_gradient_costs_its_step_alone(task, tmp_path):
    """A token that a single item holds gets an embedding that is not finite."""
    import shutil

    from safetensors.torch import load_file, save_file

    from data.token_file import load_token_file

    tokens = {item: set(load_token_file(task / "files" / f"{item}.pkl").token.tolist()) for item in range(24)}
    item, token = next(
        (item, token)
        for item, own in tokens.items()
        for token in own
        if token >= 80 and sum(token in other for other in tokens.values()) == 1
    )
    start = shutil.copytree(task / "init", tmp_path / "init")
    weights = load_file(start / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("inf")
    save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    code, message = call_main(solver_args(task, out, init_from=start, epochs=1))
    assert code == 0, message
    (line,) = held(out)
    assert any(place.endswith(f"/{item}.pkl") for place in line["items"])
    lines = read_lines(out)
    assert sum(line["skipped_steps"] for line in lines) == 1
    assert [line["loss"] is None for line in lines].count(True) == 1
