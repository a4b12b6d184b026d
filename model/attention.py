"""
Packed attention: several documents in one row, none of which sees another.

Where it stands: registered with `transformers` under `ATTENTION_NAME`, and called by every attention layer of
`model/decoder/chameleon.py`, in training (a packed row, or a padded batch) and in generation (with a key/value cache).
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
FLASH_DTYPES = (torch.float16, torch.bfloat16)  # all that the kernel for rows of several documents computes in


_plans_for_cuda = False  # see `as_on_cuda`


@dataclass(frozen=True)
class PackedRow:
    """
    Where the documents of one row begin and end, found once per forward and shared by all layers.

    The bounds are tensors on the host too: a compiled layer that read them as integers would hold for one layout only.

    Attributes:
        cu_seqlens: int32 [num_documents + 1] on the device of the activations, from 0 to the length of the row.
        max_seqlen: an upper bound of the longest document, in tokens.
        host_cu_seqlens: `cu_seqlens` on the host; None if only the device knows it.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    host_cu_seqlens: torch.Tensor | None


def build_packed_row(
    cu_seqlens: torch.Tensor,
    row_len: int,
    device: torch.device,
    max_seqlen: int | None = None,
    dtype: torch.dtype | None = None,
) -> PackedRow:
    """
    Describe a packed row for the attention layers.

    Args:
        cu_seqlens: int [num_documents + 1], cumulative lengths, `cu_seqlens[0] == 0` and `cu_seqlens[-1] == row_len`.
            On the host it costs no synchronisation. If it is on CUDA already, the host waits for it once when it must
            know the lengths: `max_seqlen` is not given, or `dtype` is one that the kernel does not take.
        row_len: tokens in the row.
        device: where the activations are.
        max_seqlen: an upper bound of the longest document, filler included; found from `cu_seqlens` if not given.
        dtype: of the activations; None if not known, which is taken for one of `FLASH_DTYPES`.

    Raises:
        ValueError: `cu_seqlens` does not cover the row, or `max_seqlen` is below a document (only checked when the
            host knows the lengths).
    """
    on_device = cu_seqlens.to(device=device, dtype=torch.int32, non_blocking=True)
    on_host = None
    if cu_seqlens.device.type != "cuda" or max_seqlen is None or dtype not in (None, *FLASH_DTYPES):
        on_host = cu_seqlens.to(device="cpu", dtype=torch.int32)
        longest = _check_documents(on_host, row_len, max_seqlen)
        max_seqlen = max_seqlen or longest
    for bounds in (on_device, on_host):
        if bounds is not None:  # one graph for any number of documents
            torch._dynamo.maybe_mark_dynamic(bounds, 0)
    return PackedRow(on_device, _round_up_length(max_seqlen, row_len), on_host)


def positions_from_cu_seqlens(cu_seqlens: torch.Tensor, row_len: int, device: torch.device) -> torch.Tensor:
    """Positions [1, row_len] int64 that restart at 0 with every document of `cu_seqlens` [num_documents + 1]."""
    starts = cu_seqlens[:-1].to(device=device, dtype=torch.int64)
    positions = torch.arange(row_len, device=device)
    document_ids = torch.searchsorted(starts, positions, right=True) - 1
    return (positions - starts[document_ids])[None]


def positions_from_mask(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, past_len: int) -> torch.Tensor:
    """Positions [B or 1, T] that skip padding, or just count on from the cache."""
    num_new = input_ids.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_new:]
    return torch.arange(past_len, past_len + num_new, device=input_ids.device)[None]


def causal_mask(
    attention_mask: torch.Tensor | None, past_len: int, num_new: int, device: torch.device
) -> torch.Tensor | None:
    """
    The mask of `packed_attention` from a padding mask [B, S], S = past_len + num_new (a 4D mask is taken as it is).

    Padding may see itself, so that no softmax is empty: a NaN there would reach other rows through 0 * NaN.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask
    if attention_mask is None and (past_len == 0 or num_new == 1):
        return None
    queries = torch.arange(past_len, past_len + num_new, device=device)[:, None]
    keys = torch.arange(past_len + num_new, device=device)[None]
    causal = (keys <= queries)[None, None]
    if attention_mask is None:
        return causal
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
    """
    Causal attention, with the signature that `transformers` calls.

    Args:
        module: the attention layer; not looked at.
        query: [B, H, T, head_dim].
        key, value: [B, H_kv, S, head_dim], S = T without a cache; H is a multiple of H_kv.
        attention_mask: bool [B, 1, T, S], True where a query may look; None for plain causal.
        packed_row: the documents of the row (B = 1); None for ordinary batches.

    Returns:
        ([B, T, H, head_dim], None).

    Raises:
        ValueError: dropout with the kernel for packed rows, which has none.
    """
    if packed_row is None:
        is_causal = attention_mask is None and query.shape[2] > 1
        return _sdpa(query, key, value, scaling, dropout, attention_mask, is_causal).transpose(1, 2), None
    if (query.is_cuda or _plans_for_cuda) and query.dtype in FLASH_DTYPES:
        return _varlen(query, key, value, scaling, dropout, packed_row), None
    cu_seqlens = packed_row.cu_seqlens if packed_row.host_cu_seqlens is None else packed_row.host_cu_seqlens
    if torch.compiler.is_compiling() and not dropout:
        return _attend_documents_in_graph(query, key, value, cu_seqlens, scaling), None
    return _attend_documents(query, key, value, cu_seqlens, scaling, dropout), None


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Inside, fake tensors take the kernel of CUDA wherever they are: a plan counts what a GPU would keep."""
    global _plans_for_cuda
    _plans_for_cuda = True
    try:
        yield
    finally:
        _plans_for_cuda = False


def _attend_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scaling: float | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """
    [1, H or H_kv, T, head_dim] -> [1, T, H, head_dim], by one call per document.

    Exact in every dtype, and on a CPU faster than one batched call over gathered documents (gathering costs more than
    it saves) or than one call with a block-diagonal mask.
    """
    doc_lens = _document_lens(cu_seqlens)
    splits = (x.split(doc_lens, dim=2) for x in (query, key, value))
    outs = [_sdpa(*qkv, scaling, dropout, None, True).transpose(1, 2) for qkv in zip(*splits, strict=True)]
    return torch.cat(outs, dim=1).contiguous()


# The same as one operator, whose inside a compiler does not look into: split into documents, a graph would hold for
# one layout only. Its backward computes the forward again, so outside of compiled layers it is not used.
@torch.library.custom_op("packed_attention::attend_documents", mutates_args=())
def _attend_documents_in_graph(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    return _attend_documents(query, key, value, cu_seqlens, scaling)


@_attend_documents_in_graph.register_fake
def _(query, key, value, cu_seqlens, scaling):
    batch_size, num_heads, row_len, head_dim = query.shape
    return query.new_empty(batch_size, row_len, num_heads, head_dim)


@torch.library.custom_op("packed_attention::attend_documents_backward", mutates_args=())
def _attend_documents_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scaling: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # vjp, since inside an operator autograd does not record.
    _, pull_back = torch.func.vjp(lambda *qkv: _attend_documents(*qkv, cu_seqlens, scaling), query, key, value)
    grad_query, grad_key, grad_value = (grad.contiguous() for grad in pull_back(grad_out))
    return grad_query, grad_key, grad_value


@_attend_documents_backward.register_fake
def _(grad_out, query, key, value, cu_seqlens, scaling):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _backward_in_graph(ctx, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_attend_documents_backward(grad_out, *ctx.saved_tensors, ctx.scaling), None, None


_attend_documents_in_graph.register_autograd(_backward_in_graph, setup_context=_keep_for_backward)


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
    mask: torch.Tensor | None,
    is_causal: bool,
) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=query.shape[1] > key.shape[1],
    )


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
    packed_row: PackedRow,
) -> torch.Tensor:
    """[1, H or H_kv, T, head_dim] -> [1, T, H, head_dim] by the flash kernel for rows of several documents."""
    from torch.nn.attention.varlen import varlen_attn  # the first use loads CUDA-only operators

    if dropout:
        raise ValueError(
            f"attention_dropout={dropout} cannot be used with packed rows on CUDA: the kernel has no dropout. "
            "Set attention_dropout to 0 (`dropout`, on the residuals, is not affected)."
        )
    # torch 2.11's kernel knows no grouped kv heads, so they are repeated (a copy, which the backward sums up).
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # squeeze: the backward of x[0] would fill a tensor with zeros and copy the gradient into it.
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
        window_size=(-1, 0),  # causal
    )
    return out[None]


def _check_documents(cu_seqlens: torch.Tensor, row_len: int, max_seqlen: int | None) -> int:
    """The length of the longest document. Raises ValueError as `build_packed_row` does."""
    doc_lens = _document_lens(cu_seqlens)
    if not doc_lens or cu_seqlens.tolist()[0] or sum(doc_lens) != row_len or min(doc_lens) < 1:
        raise ValueError(
            f"cu_seqlens {cu_seqlens.tolist()} gives documents of {doc_lens} tokens (sum {sum(doc_lens)}); they must "
            f"be at least one token each and fill the row of {row_len}. Start at 0 and make the filler the last "
            "document."
        )
    longest = max(doc_lens)
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(
            f"max_seqlen={max_seqlen} must be an upper bound of the documents of the row, but the longest has "
            f"{longest} tokens: the kernel would leave out the rest. Give a bound of at least {longest}."
        )
    return longest


def _document_lens(cu_seqlens: torch.Tensor) -> list[int]:
    bounds = cu_seqlens.tolist()  # read before it is reckoned with: a plan without values has these alone
    return [stop - start for start, stop in pairwise(bounds)]


def _round_up_length(max_seqlen: int, row_len: int) -> int:
    """The next power of two, at most the row: the kernel needs a bound, and few values mean few compilations."""
    return min(row_len, 1 << (max_seqlen - 1).bit_length())


AttentionInterface.register(ATTENTION_NAME, packed_attention)
