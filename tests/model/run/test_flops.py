"""FLOPs per token against the count of torch's own counter, and of frozen weights."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.decoder.chameleon import build_config, build_model, init_weights
from model.run.flops import trained_flops_per_token

SEQ_LEN = 48


@pytest.fixture
def model():
    shape = dict(hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4)
    config = build_config("tiny", vocab_size=96, num_key_value_heads=2, **shape)
    model = build_model(config, device="cpu")
    init_weights(model)
    # In fp32 the loss adds its products up in place, which torch does not count.
    return model.to(torch.bfloat16)


def count(model) -> float:
    """FLOPs per token of one forward and backward over a document, by torch's counter, without attention."""
    ids = torch.arange(SEQ_LEN)[None]
    with FlopCounterMode(display=False) as counter:
        loss = model(ids, ids, cu_seqlens=torch.tensor([0, SEQ_LEN]), num_valid=SEQ_LEN - 1, loss_scale=1.0).loss
        loss.backward()
    operations = counter.get_flop_counts()["Global"]
    return sum(n for name, n in operations.items() if "mm" in str(name) and "bmm" not in str(name)) / SEQ_LEN


def attention(config, passes: int) -> float:
    """FLOPs per token of causal attention in all layers; a forward is 1 pass, a backward 2."""
    return passes * 2.0 * config.num_hidden_layers * SEQ_LEN * config.hidden_size


def test_full_training_is_what_torch_counts(model):
    expected = count(model) + attention(model.config, 3)
    # The head skips the last token, which has no target.
    assert trained_flops_per_token(model, SEQ_LEN) == pytest.approx(expected, rel=0.02)


def test_frozen_weights_cost_their_forward(model):
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    expected = count(model) + attention(model.config, 1)
    assert trained_flops_per_token(model, SEQ_LEN) == pytest.approx(expected, rel=0.02)


def test_what_lies_below_the_first_trained_layer_has_no_backward(model):
    model.requires_grad_(False)
    model.model.layers[1].self_attn.v_proj.weight.requires_grad_(True)
    total = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "norm" not in name)
    matrices = total - model.model.embed_tokens.weight.numel()
    above = matrices - sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2)
    found = trained_flops_per_token(model, SEQ_LEN)
    assert 2 * matrices < found - attention(model.config, 1) < 2 * matrices + 2 * above + attention(model.config, 2)
