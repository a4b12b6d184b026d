"""fp8 products: what is converted, what stays, and that it learns; emulated, since there is no fp8 on a CPU."""

import importlib.util
import sys

import pytest
import torch

from model.decoder.chameleon import build_config, build_model, init_weights, reset_rotary_buffers
from model.distributed import Launch, process_group
from model.float8 import Float8Options, use_float8
from model.optim import OptimOptions, build_optimizer
from model.parallelize import ParallelOptions, build_mesh, clip_grad_norm, parallelize

NEEDS_TORCHAO = pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="torchao is not installed")
NUM_STEPS = 12
SHAPE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def make_model(**changes):
    return build_model(build_config("tiny", **{**SHAPE, "num_key_value_heads": 2, **changes}), device="meta")


@NEEDS_TORCHAO
def test_linears_of_the_layers_are_converted_and_names_stay():
    plain, converted = make_model(), use_float8(make_model(), emulate=True)
    assert [(n, p.shape) for n, p in plain.named_parameters()] == [
        (n, p.shape) for n, p in converted.named_parameters()
    ]
    kinds = {name: type(module).__name__ for name, module in converted.named_modules()}
    linears = [name for name in kinds if name.endswith("_proj")]
    assert len(linears) == 2 * 7 and {kinds[name] for name in linears} == {"Float8Linear"}
    assert kinds["lm_head"] == "LossHead"


@NEEDS_TORCHAO
def test_widths_that_the_products_do_not_take_stay():
    converted = use_float8(make_model(intermediate_size=40), emulate=True)
    kinds = {name: type(module).__name__ for name, module in converted.model.layers[0].named_modules()}
    assert kinds["mlp.down_proj"] == kinds["mlp.up_proj"] == "Linear" and kinds["self_attn.o_proj"] == "Float8Linear"


@pytest.mark.slow
@NEEDS_TORCHAO
@pytest.mark.parametrize("selective", [False, True])
def test_it_learns_as_bf16_does_when_sharded(selective):
    tokens = torch.randint(0, 96, (1, 48), generator=torch.Generator().manual_seed(0))

    def losses(is_float8: bool) -> list[float]:
        with process_group(Launch(), "cpu", timeout_s=60):
            options = ParallelOptions(precision="bf16", checkpointing_selective=selective)
            mesh, model = build_mesh(options, "cpu", 1), make_model()
            model = parallelize(use_float8(model, emulate=True) if is_float8 else model, mesh, options)
            model.to_empty(device="cpu")
            reset_rotary_buffers(model)
            init_weights(model, 0)
            optimizer, found = build_optimizer(model, OptimOptions(lr=3e-3)), []
            for _ in range(NUM_STEPS):
                loss = model(tokens, tokens, cu_seqlens=torch.tensor([0, 20, 48])).loss
                loss.backward()
                clip_grad_norm(model, mesh, 4.0)
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
            return found

    plain, converted = losses(False), losses(True)
    assert plain[-1] < plain[0] - 0.3 and converted != plain
    assert max(abs(a - b) for a, b in zip(plain, converted, strict=True)) < 0.1


def test_what_cannot_run_is_refused_with_its_reason():
    assert Float8Options().problems("cpu", "fp32") == []
    found = "; ".join(Float8Options(float8=True).problems("cpu", "fp32"))
    assert "needs a GPU with fp8" in found and "--precision bf16" in found and "got fp32" in found


def test_rows_that_the_products_of_gradients_do_not_take_are_refused():
    """The tokens of a row are the inner dimension of the products that give the gradients of weights."""
    options = Float8Options(float8=True)
    assert not any("rows" in problem for problem in options.problems(None, "bf16", row_len=2 * 4096))
    (found,) = (problem for problem in options.problems(None, "bf16", row_len=3 * 4090) if "rows" in problem)
    assert "multiple of 16 tokens, got 12270" in found


def test_without_torchao_the_error_says_what_to_install(monkeypatch):
    for name in ("torchao", "torchao.float8"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    with pytest.raises(ImportError, match="--float8 needs torchao: pip install --no-deps torchao=="):
        use_float8(None)
