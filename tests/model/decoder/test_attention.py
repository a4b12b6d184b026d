"""Packed attention: bounds of documents, one graph for all layouts, and the kernel on CUDA where there is one."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from model.decoder.attention import FLASH_DTYPES, _varlen, build_packed_row, packed_attention, positions_from_cu_seqlens
from tests.helpers.decoder_helpers import count_graphs

CPU = torch.device("cpu")
DOC_LENS, HEAD_DIM, SCALING = [1, 37, 64, 5], 64, 0.125


def block_diagonal_attention(query, key, value, doc_lens, scaling):
    """One masked softmax over the whole row."""
    document_ids = torch.repeat_interleave(torch.arange(len(doc_lens)), torch.tensor(doc_lens))
    mask = (document_ids[:, None] == document_ids) & torch.ones(len(document_ids), len(document_ids)).tril().bool()
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.mT * scaling).masked_fill(~mask.to(query.device), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def bounds_of(doc_lens, device=CPU):
    return F.pad(torch.tensor(doc_lens).cumsum(0), (1, 0)).int().to(device)


def random_qkv(kv_heads, device=CPU, dtype=torch.float32):
    """Query [1, 4, T, HEAD_DIM], key and value [1, kv_heads, T, HEAD_DIM], leaves of the graph."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(DOC_LENS), HEAD_DIM) for heads in (4, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def assert_near_block_diagonal(out, qkv, bound):
    """`out` [1, T, 4, HEAD_DIM] of `qkv`, and their gradients, against one masked softmax in fp64."""
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = block_diagonal_attention(*exact, DOC_LENS, SCALING)
    assert out.shape == expected.shape
    assert (out.double() - expected).abs().max() < bound
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(out.device)
    (out * weights.to(out.dtype)).sum().backward()
    (expected * weights).sum().backward()
    for ours, theirs in zip(qkv, exact, strict=True):
        assert (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm() < bound


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    "device, dtype, bound, bounds_on",
    [
        ("cpu", torch.float64, 1e-12, "cpu"),
        ("cpu", torch.bfloat16, 2e-2, "cpu"),
        # fp32 is not for the kernel: one call per document.
        pytest.param("cuda", torch.float32, 1e-5, "cpu", marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float32, 1e-5, "cuda", marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, 2e-2, "cpu", marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, 2e-2, "cuda", marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float16, 5e-3, "cuda", marks=pytest.mark.gpu),
    ],
)
def test_equals_block_diagonal_attention(device, dtype, bound, bounds_on, kv_heads):
    qkv = random_qkv(kv_heads, device, dtype)
    cu_seqlens = bounds_of(DOC_LENS, bounds_on)
    row = build_packed_row(cu_seqlens, sum(DOC_LENS), torch.device(device), max_seqlen=64, dtype=dtype)
    out, _ = packed_attention(None, *qkv, None, scaling=SCALING, packed_row=row)
    assert_near_block_diagonal(out, qkv, bound)


def stand_in_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """Checks its arguments as `varlen_attn` does, and computes in fp64, by one call per document over [T, H, D]."""
    num_tokens, num_heads, head_dim = query.shape
    for x in (query, key, value):
        assert x.shape == (num_tokens, num_heads, head_dim) and x.is_contiguous()
        assert x.dtype == query.dtype and x.dtype in FLASH_DTYPES
    for bounds in (cu_seq_q, cu_seq_k):
        assert bounds.dtype == torch.int32 and bounds.ndim == 1 and bounds.device == query.device
    assert window_size == (-1, 0) and max_q == max_k >= int(cu_seq_q.diff().max())
    outs = []
    for start, stop in pairwise(cu_seq_q.tolist()):
        document = [x[None, start:stop].transpose(1, 2).double() for x in (query, key, value)]
        out = F.scaled_dot_product_attention(*document, is_causal=True, scale=scale)
        outs.append(out.transpose(1, 2)[0])
    return torch.cat(outs).to(query.dtype)


@pytest.mark.parametrize(("kv_heads", "dtype"), [(4, torch.bfloat16), (2, torch.float16)])
def test_varlen_plumbing_without_cuda(monkeypatch, kv_heads, dtype):
    """All around the kernel: layouts, repeated kv heads, bounds, and the gradients back through them."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in_kernel)
    qkv = random_qkv(kv_heads, dtype=dtype)
    row = build_packed_row(bounds_of(DOC_LENS), sum(DOC_LENS), CPU, max_seqlen=64)
    assert_near_block_diagonal(_varlen(*qkv, SCALING, row), qkv, 1e-2)


def test_packed_rows_have_no_attention_dropout():
    row = build_packed_row(bounds_of(DOC_LENS), sum(DOC_LENS), CPU)
    with pytest.raises(ValueError, match="attention_dropout=0.1 cannot be used with packed rows"):
        packed_attention(None, *random_qkv(4), None, SCALING, 0.1, packed_row=row)


def attend(query, key, value, row):
    return packed_attention(None, query, key, value, None, SCALING, packed_row=row)[0]


@pytest.mark.parametrize(
    "device, dtype, bound, grad_bound",
    [
        pytest.param("cpu", torch.float32, 1e-6, 1e-6, marks=pytest.mark.slow),
        # Traced as for inductor, but not compiled: `test_compiled_layers_on_cuda` has the one compilation.
        pytest.param("cuda", torch.float32, 1e-5, 2e-2, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, 2e-2, 2e-2, marks=pytest.mark.gpu),
    ],
)
def test_one_graph_for_all_layouts(device, dtype, bound, grad_bound):
    counter = count_graphs("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    for doc_lens in ([107], [50, 57], DOC_LENS, [100, 7], [20] * 5 + [7]):
        row = build_packed_row(bounds_of(doc_lens), sum(doc_lens), torch.device(device), max_seqlen=107)
        qkv, same = (random_qkv(2, device, dtype) for _ in range(2))
        out, expected = compiled(*qkv, row), attend(*same, row)
        (out.sum() + expected.sum()).backward()
        assert (out - expected).abs().max() < bound
        for ours, theirs in zip(qkv, same, strict=True):
            assert (ours.grad - theirs.grad).norm() < grad_bound * theirs.grad.norm()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_one_graph_for_all_layouts_of_the_kernel(monkeypatch):
    """No length is read on the host around the kernel, which a sum of its arguments replaces."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda q, k, v, cu_q, *_, **__: q + k + v + cu_q.sum())
    counter = count_graphs("aot_eager")
    compiled = torch.compile(_varlen, backend=counter, fullgraph=True)
    for doc_lens in ([107], [50, 57], DOC_LENS, [20] * 5 + [7]):
        row = build_packed_row(bounds_of(doc_lens), sum(doc_lens), CPU, max_seqlen=107)
        compiled(*random_qkv(2), SCALING, row).sum().backward()
    assert counter.frame_count == 1


def test_operator_in_graphs_is_registered_well():
    """torch's own checks: schema, autograd, shapes without data, tracing with dynamic shapes."""
    op = torch.ops.packed_attention.attend_documents.default
    torch.library.opcheck(op, (*random_qkv(2), bounds_of(DOC_LENS), SCALING))


def test_positions_restart_with_every_document():
    cu_seqlens = torch.tensor([0, 1, 4, 9], dtype=torch.int32)
    assert positions_from_cu_seqlens(cu_seqlens, 9, CPU).tolist() == [[0, 0, 1, 2, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("cu_seqlens", [[0, 4], [0, 4, 9], [0, 4, 4, 8], [0], [1, 8], [0, 3, 8]])
def test_documents_that_do_not_fill_the_row_are_rejected(cu_seqlens):
    message = "at least the longest document of the row, 5 tokens" if 3 in cu_seqlens else "fill the row of 8"
    with pytest.raises(ValueError, match=message):
        build_packed_row(torch.tensor(cu_seqlens), 8, CPU, max_seqlen=4)


def test_the_bound_of_documents_is_a_power_of_two():
    assert build_packed_row(torch.tensor([0, 3, 8]), 8, CPU, max_seqlen=5).max_seqlen == 8
