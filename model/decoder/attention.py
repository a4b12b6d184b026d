"""Packed attention: several documents in one row, none of which attends to another.

Registered with `transformers` as `ATTENTION_NAME`, for training (a packed row or a padded batch) and generation.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

ATTENTION_NAME = "chameleon_packed"
# The only types that the flash kernel for packed rows takes.
FLASH_DTYPES = (torch.float16, torch.bfloat16)

# Set by `as_on_cuda`.
_plans_for_cuda = False


@dataclass(frozen=True)
class PackedRow:
    """The bounds of the documents in one row, computed once per forward and shared by all layers."""

    # int32 [num_documents + 1] on the device of the activations, from 0 to the length of the row.
    cu_seqlens: torch.Tensor
    # An upper bound of the longest document, in tokens.
    max_seqlen: int
    # As a tensor: integers would be constants of a compiled graph. None if only the device knows the bounds.
    host_cu_seqlens: torch.Tensor | None


def build_packed_row(
    cu_seqlens: torch.Tensor,
    row_len: int,
    device: torch.device,
    max_seqlen: int | None = None,
    dtype: torch.dtype | None = None,
) -> PackedRow:
    """Describes a row of `row_len` tokens for the attention layers.

    Args:
        cu_seqlens: int [num_documents + 1], cumulative lengths, `cu_seqlens[0] == 0` and `cu_seqlens[-1] == row_len`.
        device, dtype: of the activations; None: one of `FLASH_DTYPES`.
        max_seqlen: an upper bound of the longest document, filler included; None: read from `cu_seqlens`.

    On CUDA the host waits for the lengths once, if `max_seqlen` is None or the flash kernel is not used. Raises
    ValueError, if the host knows the lengths, for documents that do not fill the row or exceed `max_seqlen`.
    """
    on_device = cu_seqlens.to(device=device, dtype=torch.int32, non_blocking=True)
    on_host = None
    if cu_seqlens.device.type != "cuda" or max_seqlen is None or dtype not in (None, *FLASH_DTYPES):
        on_host = cu_seqlens.to(device="cpu", dtype=torch.int32)
        max_seqlen = _check_documents(on_host, row_len, max_seqlen)
        torch._dynamo.maybe_mark_dynamic(on_host, 0)
    # One graph of a compiled layer for any number of documents.
    torch._dynamo.maybe_mark_dynamic(on_device, 0)
    # The kernel takes the bound as an integer, so each value is another graph: powers of two are few.
    max_seqlen = min(row_len, 1 << (max_seqlen - 1).bit_length())
    return PackedRow(on_device, max_seqlen, on_host)


def positions_from_cu_seqlens(cu_seqlens: torch.Tensor, row_len: int, device: torch.device) -> torch.Tensor:
    """Positions [1, row_len] int64 that restart at 0 with every document of `cu_seqlens` [num_documents + 1]."""
    starts = cu_seqlens[:-1].to(device=device, dtype=torch.int64)
    positions = torch.arange(row_len, device=device)
    document_ids = torch.searchsorted(starts, positions, right=True) - 1
    return (positions - starts[document_ids])[None]


def positions_from_mask(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, past_len: int) -> torch.Tensor:
    """Positions [B or 1, T] that skip the padding of a mask [B, S], or continue those of the cache."""
    num_new = input_ids.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_new:]
    return torch.arange(past_len, past_len + num_new, device=input_ids.device)[None]


def causal_mask(
    attention_mask: torch.Tensor | None, past_len: int, num_new: int, device: torch.device
) -> torch.Tensor | None:
    """The mask of `packed_attention` from a padding mask [B, S], S = past_len + num_new; 4D masks are returned."""
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask
    # No mask at all is the fast way: the kernel masks the future itself, and one new token sees the whole cache.
    if attention_mask is None and (past_len == 0 or num_new == 1):
        return None
    queries = torch.arange(past_len, past_len + num_new, device=device)[:, None]
    keys = torch.arange(past_len + num_new, device=device)[None]
    causal = (keys <= queries)[None, None]
    if attention_mask is None:
        return causal
    # Padding attends to itself: a softmax over nothing is NaN, and 0 * NaN would spread to other rows.
    return (causal & attention_mask.to(device=device, dtype=torch.bool)[:, None, None]) | (keys == queries)[None, None]


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_row: PackedRow | None = None,
    **_unused: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention with the signature that `transformers` calls; returns ([B, T, H, head_dim], None).

    Args:
        query: [B, H, T, head_dim].
        key, value: [B, H_kv, S, head_dim], S = T without a cache; H is a multiple of H_kv.
        attention_mask: bool [B, 1, T, S], True where a query attends to a key; None: plain causal.
        packed_row: the documents of the row (B = 1), without dropout (ValueError); None: an ordinary batch.
    """
    if packed_row is None:
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=dropout,
            is_causal=attention_mask is None and query.shape[2] > 1,
            scale=scaling,
            enable_gqa=query.shape[1] > key.shape[1],
        )
        return out.transpose(1, 2), None
    if dropout:
        raise ValueError(
            f"attention_dropout={dropout} cannot be used with packed rows: the kernel has no dropout. "
            "Set attention_dropout to 0 (`dropout`, on the residuals, is not affected)."
        )
    if computes_as_cuda(query) and query.dtype in FLASH_DTYPES:
        return _varlen(query, key, value, scaling, packed_row), None
    attend = _attend_documents_in_graph if torch.compiler.is_compiling() else _attend_documents
    return attend(query, key, value, packed_row.host_cu_seqlens, scaling), None


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Fake tensors take the branches of CUDA on any device: `--plan` counts the memory of a GPU."""
    global _plans_for_cuda
    _plans_for_cuda = True
    try:
        yield
    finally:
        _plans_for_cuda = False


def computes_as_cuda(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on CUDA, or a plan counts as if it were."""
    return tensor.is_cuda or _plans_for_cuda


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, packed_row: PackedRow
) -> torch.Tensor:
    """[1, H or H_kv, T, head_dim] -> [1, T, H, head_dim] by the flash kernel for packed rows."""
    # Imported late: the module registers operators of CUDA.
    from torch.nn.attention.varlen import varlen_attn

    # The kernel of torch 2.11 has no grouped kv heads. Repeating copies them, and the backward sums the copies.
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # squeeze, not x[0]: the backward of indexing fills a tensor with zeros and copies the gradient into it.
    query, key, value = (x.squeeze(0).transpose(0, 1).contiguous() for x in (query, key, value))
    out = varlen_attn(
        query,
        key,
        value,
        packed_row.cu_seqlens,
        packed_row.cu_seqlens,
        packed_row.max_seqlen,
        packed_row.max_seqlen,
        scale=scaling,
        # All keys before the query, none after: causal.
        window_size=(-1, 0),
    )
    return out[None]


def _attend_documents(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """[1, H or H_kv, T, head_dim] -> [1, T, H, head_dim] by one call per document, in any type."""
    # On a CPU faster than one call with a block-diagonal mask, and than one batch of documents gathered by length.
    doc_lens = _document_lens(cu_seqlens)
    documents = zip(*(x.split(doc_lens, dim=2) for x in (query, key, value)), strict=True)
    outs = [packed_attention(None, *document, None, scaling)[0] for document in documents]
    return torch.cat(outs, dim=1).contiguous()


# `_attend_documents` for compiled layers: an operator that the compiler does not trace into, as a traced split would be
# right for one layout of documents only. The price: the backward runs the forward again.
@torch.library.custom_op("packed_attention::attend_documents", mutates_args=())
def _attend_documents_in_graph(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    return _attend_documents(query, key, value, cu_seqlens, scaling)


@_attend_documents_in_graph.register_fake
def _(query, key, value, cu_seqlens, scaling):
    batch_size, num_heads, row_len, head_dim = query.shape
    return query.new_empty(batch_size, row_len, num_heads, head_dim)


# The backward reads the layout too, so it is an operator of its own.
@torch.library.custom_op("packed_attention::attend_documents_backward", mutates_args=())
def _attend_documents_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scaling: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # vjp, because autograd does not record inside an operator.
    _, pull_back = torch.func.vjp(lambda *qkv: _attend_documents(*qkv, cu_seqlens, scaling), query, key, value)
    grad_query, grad_key, grad_value = (grad.contiguous() for grad in pull_back(grad_out))
    return grad_query, grad_key, grad_value


@_attend_documents_backward.register_fake
def _(grad_out, query, key, value, cu_seqlens, scaling):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _backward_in_graph(ctx, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # cu_seqlens and scaling have no gradient.
    return *_attend_documents_backward(grad_out, *ctx.saved_tensors, ctx.scaling), None, None


_attend_documents_in_graph.register_autograd(_backward_in_graph, setup_context=_save_inputs)


def _document_lens(cu_seqlens: torch.Tensor) -> list[int]:
    # tolist() before any arithmetic: under `--plan` cu_seqlens has values, but operators return tensors without.
    return [stop - start for start, stop in pairwise(cu_seqlens.tolist())]


def _check_documents(cu_seqlens: torch.Tensor, row_len: int, max_seqlen: int | None) -> int:
    """`max_seqlen` or, if None, the longest document. Raises ValueError as `build_packed_row` does."""
    bounds, doc_lens = cu_seqlens.tolist(), _document_lens(cu_seqlens)
    if not doc_lens or bounds[0] != 0 or bounds[-1] != row_len or min(doc_lens) < 1:
        raise ValueError(
            f"cu_seqlens {bounds} gives documents of {doc_lens} tokens (sum {sum(doc_lens)}); they must be at least "
            f"one token each and fill the row of {row_len}. Start at 0 and make the filler the last document."
        )
    longest = max(doc_lens)
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(f"max_seqlen={max_seqlen} must be at least the longest document of the row, {longest} tokens")
    return max_seqlen or longest


AttentionInterface.register(ATTENTION_NAME, packed_attention)
