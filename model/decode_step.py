"""
The decoder's forward for one new token per row: the numbers of `model/decoder/` in fewer and larger operations.

Where it stands: `model/generation.py` calls `LeanForward`, the step and the head, for every token after the prompts.
Around the matrix products a step costs calls on a CPU and kernels on a GPU, so projections of the same input are one
product, norms one operation, residuals part of the products that they follow, and grouped heads are not repeated. No
operation waits for the device or has a shape that depends on values: a step can be captured in a CUDA graph.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data.vocab import ChameleonVocab
from model.decoder.chameleon import ChameleonXLLMXDecoderLayer, ChameleonXLLMXForConditionalGeneration
from model.kv_cache import KVCache


class _Layer(NamedTuple):
    """Weights of one layer; q and k are one block of H + H_kv heads."""

    swin_norm: bool
    eps: float
    head_eps: float
    num_heads: int
    num_kv_heads: int
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor  # [H + H_kv, head_dim]
    qk_norm_bias: torch.Tensor
    out: torch.Tensor
    out_bias: torch.Tensor | None
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


class DecodeStep:
    """
    Hidden states of one token per row over a cache.

    The weights are the model's own: those that are multiplied with the same input are moved next to each other in
    memory, once, and the model's parameters become views of them (see `_join`).
    """

    def __init__(self, model: ChameleonXLLMXForConditionalGeneration, is_compiled: bool = False):
        """`is_compiled`: fuse what stands between the products with `torch.compile`, which takes a minute."""
        self.embedding, self.norm = model.model.embed_tokens.weight, model.model.norm
        with torch.inference_mode(False), torch.no_grad():  # the model must remain one that can be trained
            self.layers = [_collect(layer) for layer in model.model.layers]
        self.act = model.model.layers[0].mlp.act_fn
        positions = torch.arange(model.config.max_position_embeddings, device=self.embedding.device)
        cos, sin = model.model.rotary_emb(self.embedding[:1], positions[None])
        half = cos.shape[-1] // 2
        self.cos, self.sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)  # sin for a rolled head
        self._project, self._finish = _project, _finish
        if is_compiled:
            self._project, self._finish = torch.compile(_project), torch.compile(_finish)

    def __call__(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        slot: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """
        Args:
            input_ids, positions: int64 [N].
            cache: of N rows; gets the tokens' keys and values.
            slot: int64 [1], where.
            mask: [N, num_visible] of the weights' type, 0 at the slots that a row sees, minus infinity elsewhere.

        Returns:
            [N, D], after the final norm.
        """
        hidden_states = F.embedding(input_ids, self.embedding)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        num_visible = mask.shape[1]
        mask = mask[:, None, None]
        for index, layer in enumerate(self.layers):
            query, key, value = self._project(layer, hidden_states, cos, sin)
            cache.append(key, value, index, slot)
            # Heads that share keys are queries at the same place: nothing is repeated, and any kernel will do.
            query = query.view(len(query), layer.num_kv_heads, -1, query.shape[-1])
            keys, values = cache.keys[index][:, :, :num_visible], cache.values[index][:, :, :num_visible]
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
            hidden_states = self._finish(layer, hidden_states, attended.reshape(len(attended), -1), self.act)
        return F.rms_norm(hidden_states, self.norm.weight.shape, self.norm.weight, self.norm.variance_epsilon)


class LeanForward:
    """Logits of one token per row: the decoding step, then the model's head."""

    def __init__(self, model: ChameleonXLLMXForConditionalGeneration, vocab: ChameleonVocab, is_compiled: bool = False):
        """`code_ids`: sorted ids of the image codes, int64 [num_codes]; their part of the head is no copy if they are
        in a row. `is_compiled` as in `DecodeStep`."""
        self._step, self._head = DecodeStep(model, is_compiled), model.lm_head
        with torch.inference_mode(False), torch.no_grad():
            weight, bias = _join([self._head.weight]), self._head.bias
        self.device, self.dtype = weight.device, weight.dtype
        ids = sorted(vocab.image_token_ids.tolist())
        self.code_ids = torch.tensor(ids, device=self.device)
        part = slice(ids[0], ids[-1] + 1) if ids[-1] - ids[0] == len(ids) - 1 else self.code_ids
        self._code_head = weight[part], None if bias is None else bias[part]

    def __call__(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        slot: torch.Tensor,
        mask: torch.Tensor,
        is_image: bool,
    ) -> torch.Tensor:
        """Logits [N, V], with `is_image` of the image codes alone, [N, num_codes]; the rest as in `DecodeStep`."""
        hidden_states = self._step(input_ids, positions, cache, slot, mask)
        return F.linear(hidden_states, *self._code_head) if is_image else self._head(hidden_states)

    def agree(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens that were drawn: there is nobody to agree with."""
        return tokens


def _project(
    layer: _Layer, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N, D] -> query [N, H, head_dim], key and value [N, H_kv, head_dim], with their norms and positions."""
    normed = hidden_states if layer.swin_norm else _rms_norm(hidden_states, layer.input_norm, layer.eps)
    heads = F.linear(normed, layer.qkv, layer.qkv_bias).unflatten(-1, (-1, cos.shape[-1]))
    num_normed = layer.num_heads + layer.num_kv_heads
    head_dim = heads.shape[-1]
    query_key = F.layer_norm(heads[:, :num_normed], (head_dim,), None, None, layer.head_eps)
    query_key = torch.addcmul(layer.qk_norm_bias, query_key, layer.qk_norm)
    query_key = torch.addcmul(query_key * cos, query_key.roll(head_dim // 2, -1), sin)
    return query_key[:, : layer.num_heads], query_key[:, layer.num_heads :], heads[:, num_normed:]


def _finish(layer: _Layer, hidden_states: torch.Tensor, attended: torch.Tensor, act) -> torch.Tensor:
    """The rest of the layer: [N, D] and what attention gave, [N, H * head_dim] -> [N, D]."""
    if layer.swin_norm:
        added = F.linear(attended, layer.out, layer.out_bias)
        hidden_states = hidden_states + _rms_norm(added, layer.input_norm, layer.eps)
        normed = hidden_states
    else:
        hidden_states = _add_linear(hidden_states, attended, layer.out, layer.out_bias)
        normed = _rms_norm(hidden_states, layer.post_norm, layer.eps)
    gate, up = F.linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
    inner = act(gate) * up
    if layer.swin_norm:
        return hidden_states + _rms_norm(F.linear(inner, layer.down, layer.down_bias), layer.post_norm, layer.eps)
    return _add_linear(hidden_states, inner, layer.down, layer.down_bias)


def _rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(hidden_states, weight.shape, weight, eps)


def _add_linear(
    hidden_states: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    added = torch.addmm(hidden_states, x, weight.t())
    return added if bias is None else added + bias


def _collect(layer: ChameleonXLLMXDecoderLayer) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    heads, kv_heads = attention.num_heads, attention.num_key_value_heads
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    norms = ((attention.q_norm, heads), (attention.k_norm, kv_heads))
    return _Layer(
        layer.swin_norm,
        layer.input_layernorm.variance_epsilon,
        attention.q_norm.eps,
        heads,
        kv_heads,
        layer.input_layernorm.weight,
        layer.post_attention_layernorm.weight,
        _join([linear.weight for linear in projections]),
        _cat([linear.bias for linear in projections]),
        _cat([norm.weight.repeat_interleave(num // len(norm.weight), 0) for norm, num in norms]),
        _cat([norm.bias.repeat_interleave(num // len(norm.bias), 0) for norm, num in norms]),
        _join([attention.o_proj.weight]),
        attention.o_proj.bias,
        _join([mlp.gate_proj.weight, mlp.up_proj.weight]),
        _cat([mlp.gate_proj.bias, mlp.up_proj.bias]),
        _join([mlp.down_proj.weight]),
        mlp.down_proj.bias,
    )


def _cat(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    return None if tensors[0] is None else torch.cat([tensor.detach() for tensor in tensors])


def _join(weights: list[torch.nn.Parameter]) -> torch.Tensor:
    """
    Weights [n_i, D] as one [sum of n_i, D] that shares their memory; they are moved if they do not lie like that.

    On a CPU in fp32 it lies column by column, [D, sum of n_i] in memory: products with few rows are faster with it.
    """
    first, sizes = weights[0], [len(weight) for weight in weights]
    num_rows, width = sum(sizes), first.shape[1]
    by_column = first.device.type == "cpu" and first.dtype == torch.float32
    strides = (1, num_rows) if by_column else (width, 1)
    storage, starts = first.untyped_storage().data_ptr(), itertools.accumulate(sizes[:-1], initial=0)
    places = [(storage, first.data_ptr() + start * strides[0] * first.itemsize, strides) for start in starts]
    if [(weight.untyped_storage().data_ptr(), weight.data_ptr(), weight.stride()) for weight in weights] == places:
        return first.detach().as_strided((num_rows, width), strides)
    joined = first.new_empty(width, num_rows).t() if by_column else first.new_empty(num_rows, width)
    for weight, part in zip(weights, joined.split(sizes), strict=True):
        part.copy_(weight)
        weight.data = part
    return joined
