"""Packed attention: bounds of documents, and the kernel on CUDA where there is one."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from model.attention import build_packed_row, packed_attention, positions_from_cu_seqlens

CPU = torch.device("cpu")


def block_diagonal_attention(query, key, value, doc_lens, scaling):
    """One masked softmax over the whole row."""
    document_ids = torch.repeat_interleave(torch.arange(len(doc_lens)), torch.tensor(doc_lens))
    mask = (document_ids[:, None] == document_ids) & torch.ones(len(document_ids), len(document_ids)).tril().bool()
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.mT * scaling).masked_fill(~mask.to(query.device), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    "device, dtype, bound",
    [
        ("cpu", torch.float32, 1e-5),
        ("cpu", torch.float64, 1e-12),
        pytest.param(
            "cuda", torch.bfloat16, 2e-2, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
        ),
    ],
)
def test_equals_block_diagonal_attention(device, dtype, bound, kv_heads):
    doc_lens, head_dim = [1, 37, 64, 5], 64
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(doc_lens), head_dim) for heads in (4, kv_heads, kv_heads)]
    qkv = [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]
    cu_seqlens = F.pad(torch.tensor(doc_lens).cumsum(0), (1, 0)).int()
    row = build_packed_row(cu_seqlens, sum(doc_lens), torch.device(device))
    layer = SimpleNamespace(num_key_value_groups=4 // kv_heads)
    out, _ = packed_attention(layer, *qkv, None, scaling=0.125, packed_row=row)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = block_diagonal_attention(*exact, doc_lens, 0.125)
    assert (out.double() - expected).abs().max() < bound
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(device)
    (out * weights.to(dtype)).sum().backward()
    (expected * weights).sum().backward()
    for ours, theirs in zip(qkv, exact, strict=True):
        assert (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm() < bound


def test_positions_restart_with_every_document():
    cu_seqlens = torch.tensor([0, 1, 4, 9], dtype=torch.int32)
    assert positions_from_cu_seqlens(cu_seqlens, 9, CPU).tolist() == [[0, 0, 1, 2, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("cu_seqlens", [[0, 4], [0, 4, 9], [0, 4, 4, 8], [0], [1, 8]])
def test_documents_that_do_not_fill_the_row_are_refused(cu_seqlens):
    with pytest.raises(ValueError, match="fill the row of 8"):
        build_packed_row(torch.tensor(cu_seqlens), 8, CPU)
