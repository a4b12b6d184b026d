"""
Packed attention: several documents in one row, none of which sees another.

Where it stands: registered with `transformers` under `ATTENTION_NAME`, and called by every attention layer of
`model/chameleon.py`, in training (a packed row, or a padded batch) and in generation (with a key/value cache).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

ATTENTION_NAME = "chameleon_packed"


@dataclass(frozen=True)
class PackedRow:
    """
    Where the documents of one row begin and end, computed once per forward and shared by all layers.

    Attributes:
        cu_seqlens: int32 [num_documents + 1] on the device of the activations, from 0 to the length of the row.
        max_seqlen: an upper bound of the longest document, in tokens.
        doc_lens: the length of every document, on the host (empty on CUDA, where the kernel reads `cu_seqlens`).
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    doc_lens: tuple[int, ...]


def build_packed_row(
    cu_seqlens: torch.Tensor, row_len: int, device: torch.device, max_seqlen: int | None = None
) -> PackedRow:
    """
    Describe a packed row for the attention layers.

    Args:
        cu_seqlens: int [num_documents + 1], cumulative lengths, `cu_seqlens[0] == 0` and `cu_seqlens[-1] == row_len`.
            On the host it costs no synchronisation.
        row_len: tokens in the row.
        device: where the activations are.
        max_seqlen: an upper bound of the longest document; found from `cu_seqlens` if not given (on CUDA, with
            `cu_seqlens` already there, that is one synchronisation per forward).

    Raises:
        ValueError: `cu_seqlens` does not cover the row (only checked when its values are on the host).
    """
    on_device = cu_seqlens.to(device=device, dtype=torch.int32, non_blocking=True)
    if cu_seqlens.device.type == "cuda" and max_seqlen is not None:
        return PackedRow(on_device, _round_up_length(max_seqlen, row_len), ())
    doc_lens = tuple(cu_seqlens.diff().tolist())
    if not doc_lens or sum(doc_lens) != row_len or min(doc_lens) < 1:
        raise ValueError(
            f"cu_seqlens gives documents of {list(doc_lens)} tokens (sum {sum(doc_lens)}); they must be at least one "
            f"token each and fill the row of {row_len}. Start at 0 and make the filler the last document."
        )
    if device.type == "cuda":
        return PackedRow(on_device, _round_up_length(max_seqlen or max(doc_lens), row_len), ())
    return PackedRow(on_device, max(doc_lens), doc_lens)


def positions_from_cu_seqlens(cu_seqlens: torch.Tensor, row_len: int, device: torch.device) -> torch.Tensor:
    """Positions [1, row_len] int64 that restart at 0 with every document of `cu_seqlens` [num_documents + 1]."""
    starts = cu_seqlens[:-1].to(device=device, dtype=torch.int64)
    positions = torch.arange(row_len, device=device)
    document_ids = torch.searchsorted(starts, positions, right=True) - 1
    return (positions - starts[document_ids])[None]


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
        module: the attention layer (`num_key_value_groups` is read).
        query: [B, H, T, head_dim].
        key, value: [B, H_kv, S, head_dim], S = T without a cache.
        attention_mask: bool [B, 1, T, S], True where a query may look; None for plain causal.
        packed_row: the documents of the row (B = 1); None for ordinary batches.

    Returns:
        ([B, T, H, head_dim], None).
    """
    if packed_row is None:
        is_causal = attention_mask is None and query.shape[2] > 1
        out = _sdpa(module, query, key, value, scaling, dropout, attention_mask, is_causal)
        return out.transpose(1, 2), None
    if query.is_cuda:
        return _varlen(module, query, key, value, scaling, dropout, packed_row), None
    # One call per document: exact in every dtype, and on a CPU faster than one batched call over gathered
    # documents (gathering costs more than it saves) or than one call with a block-diagonal mask.
    splits = (x.split(packed_row.doc_lens, dim=2) for x in (query, key, value))
    outs = [_sdpa(module, *qkv, scaling, dropout, None, True).transpose(1, 2) for qkv in zip(*splits, strict=True)]
    return torch.cat(outs, dim=1), None


def _sdpa(
    module: nn.Module,
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
        enable_gqa=module.num_key_value_groups > 1,
    )


def _varlen(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
    packed_row: PackedRow,
) -> torch.Tensor:
    """[1, H, T, head_dim] -> [1, T, H, head_dim] by the flash kernel for rows of several documents."""
    from torch.nn.attention.varlen import varlen_attn  # the first use loads CUDA-only operators

    if dropout:
        raise ValueError(
            f"attention_dropout={dropout} cannot be used with packed rows on CUDA: the kernel has no dropout. "
            "Set attention_dropout to 0 (`dropout`, on the residuals, is not affected)."
        )
    # torch 2.11's kernel knows no grouped kv heads, so they are repeated (a copy, which the backward sums up).
    groups = module.num_key_value_groups
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
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


def _round_up_length(max_seqlen: int, row_len: int) -> int:
    """The next power of two, at most the row: the kernel needs a bound, and few values mean few compilations."""
    return min(row_len, 1 << (max_seqlen - 1).bit_length())


AttentionInterface.register(ATTENTION_NAME, packed_attention)
