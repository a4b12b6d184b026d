"""The learning-rate curve, and which parameters weight decay touches."""

import math

import pytest
import torch

from data.flags import range_problems
from model.decoder.chameleon import build_config, build_model
from model.training.optim import OptimOptions, build_optimizer, lr_at, plain_tensors, set_lr, split_by_decay

OPTIONS = OptimOptions(lr=1.0, min_lr=0.1, warmup_epochs=0.5, epochs=2)


@pytest.mark.parametrize(
    ("options", "curve"),
    [
        (OPTIONS, {0.0: 0.0, 0.25: 0.5, 0.5: 1.0, 1.0: 0.1 + 0.45 * 1.5, 1.25: 0.55, 2.0: 0.1, 3.0: 0.1}),
        (OptimOptions(lr=2e-5, warmup_epochs=0.0), {0.0: 2e-5}),
        (OptimOptions(lr=2e-5, min_lr=2e-5, warmup_epochs=0.01, epochs=2), {0.01: 2e-5, 0.3: 2e-5, 2.0: 2e-5}),
        (OptimOptions(lr=1.0, warmup_epochs=1.0, epochs=1), {0.5: 0.5, 1.0: 0.0}),
    ],
)
def test_lr_at(options, curve):
    assert {epoch: lr_at(epoch, options) for epoch in curve} == pytest.approx(curve)


def test_split_by_decay_takes_matrices_only():
    model = build_model(build_config("tiny", vocab_size=64))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = split_by_decay(model.named_parameters(), decay_all=False)
    decayed, kept = ({names[id(parameter)] for parameter in group} for group in groups)
    assert len(decayed) + len(kept) == len(names) and "model.layers.0.self_attn.q_norm.weight" in kept
    assert all("norm" in name for name in kept) and not any("norm" in name for name in decayed)
    assert len(split_by_decay(model.named_parameters(), decay_all=True)[1]) == 0


def test_build_optimizer_follows_adamw():
    """One step of two parameters against the update rule by hand (Loshchilov and Hutter, 2019)."""
    module = torch.nn.Module()
    module.matrix = torch.nn.Parameter(torch.full((2, 2), 3.0))
    module.norm = torch.nn.Parameter(torch.full((2,), 3.0))
    optimizer = build_optimizer(module, OptimOptions(wd=0.5))
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    set_lr(optimizer, 0.1)
    for parameter in (module.matrix, module.norm):
        parameter.grad = torch.full_like(parameter, 2.0)
    optimizer.step()
    moved = 0.1 * 2.0 / (math.sqrt(2.0**2) + 1e-8)
    assert torch.allclose(module.matrix, torch.full((2, 2), 3.0 * (1 - 0.1 * 0.5) - moved))
    assert torch.allclose(module.norm, torch.full((2,), 3.0 - moved))


def train(optim: str):
    """Losses of a regression, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.normal_(generator=generator), layer.bias.zero_()
    inputs, wanted = torch.randn(256, 64, generator=generator), torch.randn(256, 64, generator=generator)
    optimizer, losses = build_optimizer(layer, OptimOptions(optim=optim, wd=0.1)), []
    for _ in range(30):
        set_lr(optimizer, 0.03)
        loss = (layer(inputs) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer, layer


def test_smaller_states_train_as_adamw_does_and_stay_small_when_loaded():
    losses, optimizer, layer = train("adamw_8bit")
    expected, _, _ = train("adamw")
    assert losses[0] == expected[0] and losses[-1] < 0.2 * losses[0]
    assert losses == pytest.approx(expected, rel=0.03)
    moments = [optimizer.state[layer.weight][name] for name in ("exp_avg", "exp_avg_sq")]
    held = [tensor for moment in moments for tensor in plain_tensors(moment) if tensor.numel() > 256]
    assert sum(tensor.numel() * tensor.itemsize for tensor in held) == 2 * layer.weight.numel()
    loaded = build_optimizer(layer, OptimOptions(optim="adamw_8bit", wd=0.1))
    loaded.load_state_dict(optimizer.state_dict())
    before, after = (
        [tensor for value in o.state[layer.weight].values() for tensor in plain_tensors(value)]
        for o in (optimizer, loaded)
    )
    for old, new in zip(before, after, strict=True):
        assert old.dtype == new.dtype and torch.equal(old, new)


def test_all_problems_are_reported():
    wrong = OptimOptions(lr=-1.0, min_lr=1.0, warmup_epochs=5.0, epochs=0, wd=-1.0)
    assert len(wrong.problems() + range_problems(wrong)) == 5
    assert not OPTIONS.problems()
