"""Recomputation changes memory and work, and not one bit of the gradients."""

import contextlib
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.decoder.chameleon import build_config, build_model, init_weights
from model.training.parallelize import ParallelOptions, recompute_layers

NUM_LAYERS, ROW_LEN = 4, 24
# q, k, v, o, gate, up, down.
PRODUCTS_PER_LAYER = 7
WAYS = {"full": (1, False), "every_2nd": (2, False), "selective": (1, True), "selective_every_3rd": (3, True)}


class CountOperators(TorchDispatchMode):
    """How often matrix products, attention and SiLU were computed under it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"mm": 0, "attention": 0, "silu": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith("_scaled_dot_product") and "backward" not in name:
            name = "attention"
        if name in self.counts:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@functools.cache
def run(way: str | None = None, dtype=torch.float32, compile_backend=None, dropout=0.3):
    """(gradients by name, bytes kept for the backward, operators of the backward) of a step on one packed row."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": NUM_LAYERS, "num_key_value_heads": 2}
    model = build_model(build_config("tiny", vocab_size=96, dropout=dropout, **shape), "cpu", dtype)
    init_weights(model, seed=1)
    if way is not None:
        recompute_layers(model.model.layers, *WAYS[way])
    for layer in model.model.layers if compile_backend else ():
        layer.compile(backend=compile_backend)
    input_ids = torch.randint(0, 96, (1, ROW_LEN), generator=torch.Generator().manual_seed(2))
    cu_seqlens = torch.tensor([0, 9, 14, ROW_LEN], dtype=torch.int32)
    torch.manual_seed(5)
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=input_ids, labels=input_ids, cu_seqlens=cu_seqlens).loss
    operators = CountOperators()
    # Compiled layers call torch.func in their backward, which does not work under the mode.
    with operators if compile_backend is None else contextlib.nullcontext():
        loss.backward()
    gradients = {n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in model.named_parameters()}
    return gradients, sum(kept.values()), operators.counts


@pytest.mark.parametrize(
    ("way", "dtype"), [*((way, torch.float32) for way in WAYS), ("full", torch.bfloat16), ("selective", torch.bfloat16)]
)
def test_gradients_are_those_without_it_to_the_bit(way, dtype):
    """With dropout: the random numbers of the forward are drawn again."""
    found, expected = run(way, dtype)[0], run(None, dtype)[0]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_gradients_of_compiled_layers():
    torch._dynamo.reset()
    found, expected = run("selective", compile_backend="aot_eager", dropout=0.0)[0], run(dropout=0.0)[0]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_what_is_computed_again():
    """Attention is called once per document, three in the row."""
    plain = run(None)[2]
    again = {way: {kind: n - plain[kind] for kind, n in run(way)[2].items()} for way in WAYS}
    assert again["full"] == {"mm": NUM_LAYERS * PRODUCTS_PER_LAYER, "attention": NUM_LAYERS * 3, "silu": NUM_LAYERS}
    assert again["every_2nd"] == {"mm": 2 * PRODUCTS_PER_LAYER, "attention": 2 * 3, "silu": 2}
    assert again["selective"] == {"mm": 0, "attention": 0, "silu": NUM_LAYERS}
    assert again["selective_every_3rd"] == {"mm": 0, "attention": 0, "silu": 2}


def test_less_is_kept_by_the_graph():
    """Only what autograd itself saves: selective recomputation keeps its products elsewhere."""
    plain, full, every_2nd = (run(way)[1] for way in (None, "full", "every_2nd"))
    assert full < 0.7 * plain and full < every_2nd < plain


def test_options():
    def every(**options):
        return ParallelOptions(**options).recompute_every

    assert (every(), every(checkpointing=True), every(checkpointing_selective=True)) == (0, 1, 1)
    assert every(checkpointing_every=3) == every(checkpointing=True, checkpointing_every=3) == 3
