"""The decoder's forward for one new token per row, which `loop.py` calls for every token after the prompts.

`LeanForward` gives the numbers of `model/decoder/` in fewer and larger operations: projections of the same input are
one product, norms are one operation, residuals are part of the products. No operation waits for the device or has a
shape that depends on values, as CUDA graphs need. `RootForward` is for a sharded model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.items.vocab import ChameleonVocab
from model.decoder.chameleon import (
    ChameleonXLLMXDecoderLayer,
    ChameleonXLLMXForConditionalGeneration,
    TiedHeadLayerNorm,
)
from model.generation.kv_cache import KVCache

Linear = tuple[Tensor, Tensor | None]  # weight and bias


class _Layer(NamedTuple):
    """Weights of one layer. A tuple: of a module, torch.compile would compile every layer for itself."""

    swin_norm: bool
    eps: float
    head_eps: float
    num_heads: int
    num_kv_heads: int
    input_norm: Tensor
    post_norm: Tensor
    # Query, key and value heads are one product; query and key heads are normed as one block of H + H_kv.
    qkv: Linear
    qk_norm: Linear
    out: Linear
    gate_up: Linear
    down: Linear


class LeanForward:
    """
    Logits of one token per row over a cache.

    Weights that are multiplied with the same input are joined in memory, and the model's parameters become views of
    them: the model computes as before, and can be trained. Biases and q/k-norm weights are copies: build it again after
    a training.

    Attributes:
        device, dtype: of the weights and activations.
        layer_devices: of each layer.
        kept_batch: the buffers of `loop.py`, kept from one call to the next.
    """

    kept_batch: Any = None

    def __init__(self, model: ChameleonXLLMXForConditionalGeneration, vocab: ChameleonVocab, is_compiled: bool = False):
        """`is_compiled`: fuse what stands between the products with `torch.compile`, which takes a minute."""
        decoder = model.model
        self._embedding, self._norm, self._act = decoder.embed_tokens.weight, decoder.norm, decoder.layers[0].mlp.act_fn
        self.device, self.dtype = self._embedding.device, self._embedding.dtype
        self.layer_devices = [self.device] * len(decoder.layers)
        self._layers = [_join_layer(layer) for layer in decoder.layers]
        self._head = _join([model.lm_head])
        ids = sorted(vocab.image_token_ids.tolist())
        # A slice is a view, an index makes a copy of this part of the head.
        part = slice(ids[0], ids[-1] + 1) if ids[-1] - ids[0] == len(ids) - 1 else torch.tensor(ids, device=self.device)
        self._code_head = tuple(None if tensor is None else tensor[part] for tensor in self._head)
        positions = torch.arange(model.config.max_position_embeddings, device=self.device)
        cos, sin = decoder.rotary_emb(self._embedding[:1].detach(), positions[None])
        half = cos.shape[-1] // 2
        # The signs of the rotation are in the sine, so that a rolled head is all that it needs.
        self._cos, self._sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
        self._project, self._finish = _project, _finish
        if is_compiled:
            self._project, self._finish = torch.compile(_project), torch.compile(_finish)

    def __call__(
        self, input_ids: Tensor, positions: Tensor, cache: KVCache, slot: Tensor, mask: Tensor, is_image: bool
    ) -> Tensor:
        """
        Args:
            input_ids, positions: int64 [N], or [N, T] for several tokens per row.
            cache: of N rows; gets the tokens' keys and values.
            slot: int64 [1], the place in the cache of all tokens, or [N, T].
            mask: [N, num_visible] or [N, T, num_visible] of the activations' type, 0 at the slots that a token sees,
                minus infinity elsewhere.
            is_image: only image codes can come.

        Returns:
            Logits [N, V] or [N, T, V], with `is_image` of the image codes alone, [N, num_codes].
        """
        shape, num_visible = input_ids.shape, mask.shape[-1]
        input_ids, positions, num_tokens = input_ids.flatten(), positions.flatten(), input_ids.numel() // len(mask)
        hidden_states = F.embedding(input_ids, self._embedding)
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        num_groups = self._layers[0].num_heads // self._layers[0].num_kv_heads
        mask = mask.view(len(mask), 1, -1, num_visible)
        if num_tokens > 1:
            mask = mask.repeat(1, 1, num_groups, 1)
        for index, layer in enumerate(self._layers):
            query, key, value = self._project(layer, hidden_states, cos, sin)
            cache.append(key, value, index, slot)
            # Heads that share keys become queries at the same place: keys are not repeated, and any kernel will do.
            if num_tokens > 1:
                query = query.view(len(mask), num_tokens, layer.num_kv_heads, num_groups, -1).permute(0, 2, 3, 1, 4)
            query = query.reshape(len(mask), layer.num_kv_heads, num_groups * num_tokens, -1)
            keys, values = cache.keys[index][:, :, :num_visible], cache.values[index][:, :, :num_visible]
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
            if num_tokens > 1:
                attended = attended.unflatten(2, (num_groups, num_tokens)).permute(0, 3, 1, 2, 4)
            hidden_states = self._finish(layer, hidden_states, attended.reshape(len(input_ids), -1), self._act)
        hidden_states = _rms_norm(hidden_states, self._norm.weight, self._norm.variance_epsilon)
        return F.linear(hidden_states, *(self._code_head if is_image else self._head)).unflatten(0, shape)

    def agree(self, tokens: Tensor) -> Tensor:
        """The tokens that were drawn: there are no other ranks."""
        return tokens


class RootForward:
    """
    Logits of one token per row by the forward of the whole model; interface as `LeanForward`.

    FSDP gathers weights where the forwards of the root and of its parts are called, and hooks there move activations
    between GPUs, so nothing here looks at a weight: adapters and frozen rows work too.

    Attributes:
        device, dtype: of the activations. Under mixed precision, weights have another type.
        layer_devices: of each layer.
        agree: from the tokens int64 [N] that this rank drew to those that all ranks continue with. Ranks with other
            tokens would run another number of forwards, and wait for one another forever.
    """

    kept_batch: Any = None

    def __init__(
        self,
        model: nn.Module,
        vocab: ChameleonVocab,
        device: torch.device,
        dtype: torch.dtype,
        agree: Callable[[Tensor], Tensor] = lambda tokens: tokens,
        layer_devices: list[torch.device] | None = None,
    ):
        self._model, self.device, self.dtype, self.agree = model, device, dtype, agree
        self.layer_devices = layer_devices or [device] * model.config.num_hidden_layers
        self._code_ids = torch.tensor(sorted(vocab.image_token_ids.tolist()), device=device)

    def __call__(
        self, input_ids: Tensor, positions: Tensor, cache: KVCache, slot: Tensor, mask: Tensor, is_image: bool
    ) -> Tensor:
        """Arguments and result as in `LeanForward`."""
        cache.begin_step(slot, mask.shape[1])
        logits = self._model(
            input_ids[:, None],
            position_ids=positions[:, None],
            attention_mask=mask[:, None, None],
            past_key_values=cache,
        ).logits[:, 0]
        return logits[:, self._code_ids] if is_image else logits


def _project(layer: _Layer, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N, D] -> query [N, H, head_dim], key and value [N, H_kv, head_dim], with their norms and positions."""
    normed = hidden_states if layer.swin_norm else _rms_norm(hidden_states, layer.input_norm, layer.eps)
    heads = F.linear(normed, *layer.qkv).unflatten(-1, (-1, cos.shape[-1]))
    num_normed = layer.num_heads + layer.num_kv_heads
    head_dim = heads.shape[-1]
    query_key = F.layer_norm(heads[:, :num_normed], (head_dim,), None, None, layer.head_eps)
    weight, bias = layer.qk_norm
    query_key = torch.addcmul(bias, query_key, weight)
    query_key = torch.addcmul(query_key * cos, query_key.roll(head_dim // 2, -1), sin)
    return query_key[:, : layer.num_heads], query_key[:, layer.num_heads :], heads[:, num_normed:]


def _finish(layer: _Layer, hidden_states: Tensor, attended: Tensor, act: nn.Module) -> Tensor:
    """The rest of the layer: [N, D] and what attention gave, [N, H * head_dim] -> [N, D]."""
    if layer.swin_norm:
        added = F.linear(attended, *layer.out)
        hidden_states = hidden_states + _rms_norm(added, layer.input_norm, layer.eps)
        normed = hidden_states
    else:
        hidden_states = _add_linear(hidden_states, attended, *layer.out)
        normed = _rms_norm(hidden_states, layer.post_norm, layer.eps)
    gate, up = F.linear(normed, *layer.gate_up).chunk(2, -1)
    inner = act(gate) * up
    if layer.swin_norm:
        return hidden_states + _rms_norm(F.linear(inner, *layer.down), layer.post_norm, layer.eps)
    return _add_linear(hidden_states, inner, *layer.down)


def _rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(hidden_states, weight.shape, weight, eps)


def _add_linear(hidden_states: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    added = torch.addmm(hidden_states, x, weight.t())
    return added if bias is None else added + bias


def _join_layer(layer: ChameleonXLLMXDecoderLayer) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        swin_norm=layer.swin_norm,
        eps=layer.input_layernorm.variance_epsilon,
        head_eps=attention.q_norm.eps,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_key_value_heads,
        input_norm=layer.input_layernorm.weight,
        post_norm=layer.post_attention_layernorm.weight,
        qkv=_join([attention.q_proj, attention.k_proj, attention.v_proj]),
        qk_norm=_join_norms([attention.q_norm, attention.k_norm]),
        out=_join([attention.o_proj]),
        gate_up=_join([mlp.gate_proj, mlp.up_proj]),
        down=_join([mlp.down_proj]),
    )


@torch.no_grad()
def _join(linears: list[nn.Linear]) -> Linear:
    """Linear layers of the same input as one; their weights become views of its weight, [sum of n_i, D]."""
    weights = [linear.weight for linear in linears]
    joined = torch.cat(weights) if len(weights) > 1 else weights[0].detach()
    if joined.device.type == "cpu" and joined.dtype == torch.float32:
        # Column by column in memory: there, products with few rows are faster.
        joined = joined.t().contiguous().t()
    for linear, part in zip(linears, joined.split([len(weight) for weight in weights]), strict=True):
        linear.weight.data = part
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    return joined, bias


@torch.no_grad()
def _join_norms(norms: list[TiedHeadLayerNorm]) -> Linear:
    """Weight and bias of head norms as one block, [sum of their heads, head_dim]."""
    repeats = [norm.num_heads // len(norm.weight) for norm in norms]
    weights = [norm.weight.repeat_interleave(num, 0) for norm, num in zip(norms, repeats, strict=True)]
    biases = [norm.bias.repeat_interleave(num, 0) for norm, num in zip(norms, repeats, strict=True)]
    return torch.cat(weights), torch.cat(biases)
