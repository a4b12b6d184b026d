"""The decoder: `transformers`' Chameleon, without its VQGAN, with what training needs.

It adds residual dropout, q/k-norm weights tied per model-parallel group, packed rows, a forward that returns the loss,
and image logits that are masked only if asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin
from transformers.models.chameleon.configuration_chameleon import ChameleonConfig
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonAttention,
    ChameleonMLP,
    ChameleonPreTrainedModel,
    ChameleonRMSNorm,
    ChameleonRotaryEmbedding,
)
from transformers.utils import ModelOutput

from model.decoder.attention import (
    ATTENTION_NAME,
    build_packed_row,
    causal_mask,
    positions_from_cu_seqlens,
    positions_from_mask,
)
from model.decoder.local_shards import copy_into_parameter
from model.decoder.loss import HeadLoss, LossHead, reject_image_targets, shift_labels

IMAGE_TOKEN_PREFIX = "IMGIMG"


SHAPE_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {
    "7B": (4096, 11008, 32, 32, 32),
    "34B": (8192, 22016, 48, 64, 8),
    "1B": (2048, 5504, 20, 16, 16),
    "tiny": (256, 688, 4, 4, 4),
    "bench": (256, 688, 4, 4, 4),
}
MODEL_SIZES: dict[str, dict[str, Any]] = {
    size: dict(zip(SHAPE_FIELDS, shape, strict=True)) for size, shape in SHAPES.items()
}
MODEL_SIZES["34B"] |= {"model_parallel_size": 8, "swin_norm": True}
MODEL_SIZES["bench"] |= {"vocab_size": 65536}


class ChameleonXLLMXConfig(ChameleonConfig):
    """Chameleon's configuration and what training adds to it."""

    # "chameleon", which the recipe's checkpoints have, is the type of stock Chameleon.
    model_type = "chameleon_xllmx"
    # On what attention and MLP add to the residual stream, in training.
    dropout: float | int = 0.0
    # Weight of the squared log-normalizer in the loss.
    z_loss_weight: float | int = 0.0
    # As stock Chameleon always does.
    mask_image_logits: bool = False
    # q/k-norm weights are [model_parallel_size, head_dim], as in the recipe; False: [heads, head_dim], as in stock.
    tie_head_norm: bool = True
    # The VQGAN whose codes the model was trained on (model/vqgan/vqgan.py); None: not known.
    codebook_sha256: str | None = None


@dataclass
class ChameleonXLLMXOutput(ModelOutput):
    """What the decoder returns: without labels `logits` and `past_key_values`, with labels all the others.

    Sums are over valid targets, detached; two of them, and their numbers, are by the kind of the target.
    """

    # A scalar to call `backward` on.
    loss: torch.Tensor | None = None
    # [B, T, V], fewer positions with `logits_to_keep`.
    logits: torch.Tensor | None = None
    ce_loss: torch.Tensor | None = None
    # Sum of the squared log-normalizer, without its weight.
    z_loss: torch.Tensor | None = None
    num_valid_tokens: torch.Tensor | None = None
    text_ce_sum: torch.Tensor | None = None
    image_ce_sum: torch.Tensor | None = None
    num_text_tokens: torch.Tensor | None = None
    num_image_tokens: torch.Tensor | None = None
    past_key_values: Any = None


def build_config(model_size: str, vocabulary: Any = None, **overrides: Any) -> ChameleonXLLMXConfig:
    """The configuration of a named size, with values replaced by `overrides`.

    `vocabulary` is a tokenizer or a mapping of token name to id, and gives `vocab_size`, unless the named size or an
    override does. Raises ValueError for an unknown size, or a vocabulary with ids beyond `vocab_size`.
    """
    if model_size not in MODEL_SIZES:
        raise ValueError(f"model size {model_size!r} is unknown; choose one of {', '.join(MODEL_SIZES)}.")
    name_to_id: Mapping[str, int] = vocabulary.get_vocab() if hasattr(vocabulary, "get_vocab") else vocabulary or {}
    values: dict[str, Any] = dict(
        vocabulary_map=dict(name_to_id),
        bos_token_id=name_to_id.get("<s>"),
        eos_token_id=name_to_id.get("</s>"),
        pad_token_id=name_to_id.get("<pad>"),
    )
    num_ids = max(name_to_id.values(), default=-1) + 1
    if num_ids:
        values["vocab_size"] = num_ids
    config = ChameleonXLLMXConfig(**(values | MODEL_SIZES[model_size] | overrides))
    if num_ids > config.vocab_size:
        raise ValueError(
            f"the vocabulary has ids up to {num_ids - 1}, but the model ({model_size}) has vocab_size="
            f"{config.vocab_size}. Give a vocab_size of at least {num_ids}, or another tokenizer."
        )
    return config


def grow_positions(config: ChameleonXLLMXConfig, least: int) -> str | None:
    """Raises `max_position_embeddings` to `least`. Returns a message to print, None if nothing changed."""
    had = config.max_position_embeddings
    if had >= least:
        return None
    # No weight depends on it: rotary frequencies are the same for any number of positions.
    config.max_position_embeddings = least
    return f"max_position_embeddings grows from {had:,} to {least:,}"


def build_model(
    config: ChameleonXLLMXConfig, device: str | torch.device = "meta", dtype: torch.dtype = torch.float32
) -> "ChameleonXLLMXForConditionalGeneration":
    """The decoder on "meta", or on a device with undefined weights and the right rotary buffers."""
    with torch.device("meta"):
        model = ChameleonXLLMXForConditionalGeneration(config).to(dtype)
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        reset_rotary_buffers(model)
    return model


@torch.no_grad()
def init_weights(model: nn.Module, seed: int = 0) -> None:
    """Fills a plain or sharded model: norms 1, biases 0, all else normal(0, `initializer_range`)."""
    # Every rank draws every full tensor and keeps its part: the values depend neither on the number of ranks nor on the
    # device.
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        is_norm = "norm" in module.rpartition(".")[2]
        if is_norm or kind != "weight":
            parameter.fill_(1.0 if kind == "weight" else 0.0)
        else:
            full = torch.empty(parameter.shape, dtype=torch.float32)
            full.normal_(0.0, model.config.initializer_range, generator=generator)
            copy_into_parameter(parameter, full)


def reset_rotary_buffers(model: nn.Module, device: torch.device | None = None) -> None:
    """Computes the rotary frequencies, in fp32, on `device` (None: where they are): `to_empty` leaves garbage."""
    rotary = next(module for module in model.modules() if isinstance(module, ChameleonRotaryEmbedding))
    device = device or rotary.inv_freq.device
    with torch.device("cpu"):
        fresh = ChameleonRotaryEmbedding(rotary.config)
    rotary.inv_freq = fresh.inv_freq.to(device)
    rotary.original_inv_freq = fresh.original_inv_freq.to(device)


class TiedHeadLayerNorm(nn.Module):
    """Layer norm over each head, with one weight and bias per group of heads: [num_groups, head_dim]."""

    def __init__(self, num_groups: int, num_heads: int, head_dim: int, eps: float = 1e-5):
        super().__init__()
        if num_heads % num_groups:
            raise ValueError(
                f"{num_heads} heads cannot be split into {num_groups} groups of q/k-norm weights; "
                "model_parallel_size must divide the numbers of heads and of kv heads."
            )
        self.num_heads, self.head_dim, self.eps = num_heads, head_dim, eps
        self.weight = nn.Parameter(torch.ones(num_groups, head_dim))
        self.bias = nn.Parameter(torch.zeros(num_groups, head_dim))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[N, num_heads, head_dim] -> the same shape."""
        weight, bias = self.weight, self.bias
        # A single group broadcasts by itself.
        if 1 < weight.shape[0] < self.num_heads:
            repeats = self.num_heads // weight.shape[0]
            weight, bias = weight.repeat_interleave(repeats, 0), bias.repeat_interleave(repeats, 0)
        return F.layer_norm(hidden_states, (self.head_dim,), None, None, self.eps) * weight + bias


class ChameleonXLLMXDecoderLayer(nn.Module):
    """Attention and MLP on the residual stream, each with a norm before it, or with `swin_norm` after it."""

    def __init__(self, config: ChameleonXLLMXConfig, layer_idx: int):
        super().__init__()
        self.swin_norm = bool(config.swin_norm)
        self.dropout = float(config.dropout)
        self.self_attn = ChameleonAttention(config, layer_idx)
        head_dim, heads, kv_heads = self.self_attn.head_dim, config.num_attention_heads, config.num_key_value_heads
        groups = config.model_parallel_size if config.tie_head_norm else None
        self.self_attn.q_norm = TiedHeadLayerNorm(groups or heads, heads, head_dim)
        self.self_attn.k_norm = TiedHeadLayerNorm(groups or kv_heads, kv_heads, head_dim)
        self.mlp = ChameleonMLP(config)
        self.input_layernorm = ChameleonRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = ChameleonRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **attention: Any) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]; the other arguments are for the attention."""
        # Dropout is on what is added to the residual stream: after the norm under swin_norm, as in the recipe.
        if self.swin_norm:
            added = self.input_layernorm(self.self_attn(hidden_states, **attention)[0])
            hidden_states = hidden_states + F.dropout(added, self.dropout, self.training)
            added = self.post_attention_layernorm(self.mlp(hidden_states))
        else:
            added = self.self_attn(self.input_layernorm(hidden_states), **attention)[0]
            hidden_states = hidden_states + F.dropout(added, self.dropout, self.training)
            added = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + F.dropout(added, self.dropout, self.training)


class ChameleonXLLMXModel(ChameleonPreTrainedModel):
    """Embedding, layers and final norm, with the parameter names of stock Chameleon; no `vqmodel`."""

    config_class = ChameleonXLLMXConfig

    def __init__(self, config: ChameleonXLLMXConfig):
        super().__init__(config)
        self.config._attn_implementation = ATTENTION_NAME
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChameleonXLLMXDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = ChameleonRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = ChameleonRotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        max_seqlen: int | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, T, D] after the final norm; arguments as in the model's `forward`."""
        hidden_states = self.embed_tokens(input_ids)
        packed_row = None
        if cu_seqlens is not None:
            if input_ids.shape[0] != 1 or attention_mask is not None or past_key_values is not None:
                raise ValueError(
                    "cu_seqlens describes the documents of one row, without attention_mask or past_key_values; got a "
                    f"batch of {input_ids.shape[0]} rows, or one of the two"
                )
            packed_row = build_packed_row(
                cu_seqlens, input_ids.shape[1], hidden_states.device, max_seqlen, hidden_states.dtype
            )
            if position_ids is None:
                position_ids = positions_from_cu_seqlens(packed_row.cu_seqlens, input_ids.shape[1], input_ids.device)
        past_len = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = positions_from_mask(input_ids, attention_mask, past_len)
        mask = None if packed_row else causal_mask(attention_mask, past_len, input_ids.shape[1], input_ids.device)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                packed_row=packed_row,
            )
        return self.norm(hidden_states)


class ChameleonXLLMXForConditionalGeneration(ChameleonPreTrainedModel, GenerationMixin):
    """The decoder with its head: a loss with labels, logits without."""

    config_class = ChameleonXLLMXConfig
    _no_split_modules = ["ChameleonXLLMXDecoderLayer"]
    _keys_to_ignore_on_load_unexpected = [r"model\.vqmodel\..*"]

    def __init__(self, config: ChameleonXLLMXConfig):
        super().__init__(config)
        self.config._attn_implementation = ATTENTION_NAME
        if config.tie_word_embeddings:
            raise ValueError("tie_word_embeddings=True is not supported: Chameleon's head has its own weights.")
        self.model = ChameleonXLLMXModel(config)
        self.lm_head = LossHead(config.hidden_size, config.vocab_size, bias=False)
        self._image_ids: dict[torch.device, torch.Tensor] = {}
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        loss_scale: float | torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        max_seqlen: int | None = None,
        num_valid: int | None = None,
        **_unused: Any,
    ) -> ChameleonXLLMXOutput:
        """The loss with `labels`, logits without.

        Args:
            input_ids: int64 [B, T]; a packed row has B = 1.
            labels: int64 [B, T], labels[t] is the token at t or `IGNORE_INDEX`; shifted here.
            position_ids: int64 [B, T] or [1, T]; None: from `cu_seqlens`, `attention_mask` or the cache.
            cu_seqlens, max_seqlen: as for `build_packed_row`. The first token of a document is never a target.
            attention_mask: [B, S] with 0 at padding (right padding alone needs none), or bool [B, 1, T, S].
            past_key_values: a cache with `get_seq_length` and `update`.
            logits_to_keep: number of positions at the end that get logits (0: all), or int64 [B], one per row.
            loss_scale, num_valid: as for `LossHead.forward`.

        Raises ValueError for `cu_seqlens` with a batch, mask or cache, or an image target under `mask_image_logits`.
        """
        hidden_states = self.model(input_ids, position_ids, cu_seqlens, attention_mask, past_key_values, max_seqlen)
        if labels is None:
            if isinstance(logits_to_keep, torch.Tensor):
                rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
                hidden_states = hidden_states[rows, logits_to_keep][:, None]
            elif logits_to_keep:
                hidden_states = hidden_states[:, -logits_to_keep:]
            logits = self.lm_head(hidden_states)
            if self.config.mask_image_logits:
                logits = logits.index_fill(-1, self.image_token_ids(logits.device), torch.finfo(logits.dtype).min)
            return ChameleonXLLMXOutput(logits=logits, past_key_values=past_key_values)
        targets = shift_labels(labels, cu_seqlens)
        image_ids = self.image_token_ids(labels.device)
        if self.config.mask_image_logits:
            reject_image_targets(targets, image_ids)
        head_loss = self.lm_head(
            hidden_states,
            targets,
            loss_scale,
            self.config.z_loss_weight,
            image_ids if self.config.mask_image_logits else None,
            num_valid,
        )
        return self._loss_output(head_loss, image_ids)

    def image_token_ids(self, device: torch.device) -> torch.Tensor:
        """Sorted int64 ids of the image tokens (named `IMGIMG...`) on a device."""
        # Kept per device, not as a buffer: `to_empty` would fill a buffer with garbage.
        if device not in self._image_ids:
            names = self.config.vocabulary_map or {}
            ids = sorted(token_id for name, token_id in names.items() if name.startswith(IMAGE_TOKEN_PREFIX))
            self._image_ids[device] = torch.tensor(ids, dtype=torch.int64, device=device)
        return self._image_ids[device]

    def _loss_output(self, head_loss: HeadLoss, image_ids: torch.Tensor) -> ChameleonXLLMXOutput:
        ce, targets = head_loss.ce, head_loss.targets
        # A look-up table over the vocabulary: torch.isin would sort thousands of ids.
        is_image = torch.zeros(self.config.vocab_size, dtype=torch.bool, device=ce.device)
        is_image = is_image.index_fill_(0, image_ids, True)[targets]
        ce_sum, image_ce_sum, num_image = ce.sum(), (ce * is_image).sum(), is_image.sum()
        num_valid = torch.full_like(num_image, targets.numel())
        return ChameleonXLLMXOutput(
            loss=head_loss.loss,
            ce_loss=ce_sum,
            z_loss=head_loss.lse.square().sum(),
            num_valid_tokens=num_valid,
            text_ce_sum=ce_sum - image_ce_sum,
            image_ce_sum=image_ce_sum,
            num_text_tokens=num_valid - num_image,
            num_image_tokens=num_image,
        )
