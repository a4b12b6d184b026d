"""fp8 products: what is converted, and that it learns; emulated, since a CPU has no fp8."""

import importlib.util
import sys

import pytest
import torch

from model.decoder.chameleon import build_config, build_model, init_weights
from model.training.distributed import Launch, process_group
from model.training.float8 import Float8Options, use_float8
from model.training.optim import OptimOptions, build_optimizer
from model.training.parallelize import ParallelOptions, allocate, build_mesh, clip_grad_norm, parallelize

NEEDS_TORCHAO = pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="torchao is not installed")
SHAPE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def make_model(intermediate_size: int = 64):
    return build_model(build_config("tiny", **SHAPE, num_key_value_heads=2, intermediate_size=intermediate_size))


@NEEDS_TORCHAO
def test_linears_of_the_layers_are_converted_and_names_stay():
    plain, converted = make_model(), use_float8(make_model(), emulate=True)
    shapes = [[(n, p.shape) for n, p in model.named_parameters()] for model in (plain, converted)]
    assert shapes[0] == shapes[1]
    kinds = {name: type(module).__name__ for name, module in converted.named_modules()}
    linears = [name for name in kinds if name.endswith("_proj")]
    assert len(linears) == 2 * 7 and {kinds[name] for name in linears} == {"Float8Linear"}
    assert kinds["lm_head"] == "LossHead"
    layer = use_float8(make_model(intermediate_size=40), emulate=True).model.layers[0]
    assert type(layer.self_attn.o_proj).__name__ == "Float8Linear"
    assert type(layer.mlp.down_proj) is type(layer.mlp.up_proj) is torch.nn.Linear, "40 is no multiple of 16"


@pytest.mark.slow
@NEEDS_TORCHAO
def test_it_learns_as_bf16_does_when_sharded():
    tokens = torch.randint(0, 96, (1, 48), generator=torch.Generator().manual_seed(0))
    options = ParallelOptions(precision="bf16", checkpointing_selective=True)

    def losses(model: torch.nn.Module) -> list[float]:
        mesh = build_mesh(options, "cpu", 1)
        model = parallelize(model, mesh, options)
        allocate(model, torch.device("cpu"), options)
        init_weights(model, 0)
        optimizer, found = build_optimizer(model, OptimOptions(lr=3e-3)), []
        for _ in range(12):
            loss = model(tokens, tokens, cu_seqlens=torch.tensor([0, 20, 48])).loss
            loss.backward()
            clip_grad_norm(model, mesh, 4.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    with process_group(Launch(), "cpu", timeout_s=60):
        plain, converted = losses(make_model()), losses(use_float8(make_model(), emulate=True))
    assert plain[-1] < plain[0] - 0.3 and converted != plain
    assert max(abs(a - b) for a, b in zip(plain, converted, strict=True)) < 0.1


def test_problems():
    assert Float8Options().problems("cpu", "fp32") == []
    options = Float8Options(float8=True)
    found = "; ".join(options.problems("cpu", "fp32"))
    assert "needs a GPU of compute capability 8.9" in found and "--precision bf16" in found and "got fp32" in found
    # The tokens of a row are the inner dimension of the products that give the gradients of weights.
    rows = [options.problems(None, "bf16", row_len=row_len) for row_len in (2 * 4096, 3 * 4090)]
    assert not any("rows" in problem for problem in rows[0])
    assert any("multiple of 16 tokens, got 12270" in problem for problem in rows[1])


def test_without_torchao_the_error_names_the_command(monkeypatch):
    for name in ("torchao", "torchao.float8"):
        # Importing it fails.
        monkeypatch.setitem(sys.modules, name, None)
    (problem,) = Float8Options(float8=True).problems(None, "bf16")
    assert problem.startswith("--float8 needs torchao: pip install --no-deps torchao==")
