"""The decoder: reference figures, packed rows, padding, dropout, initialisation."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from model.decoder.chameleon import (
    ChameleonXLLMXConfig,
    TiedHeadLayerNorm,
    build_config,
    build_model,
    init_weights,
)
from model.decoder.loss import IGNORE_INDEX
from tests.helpers.decoder_helpers import code_name, random_tokens, seed_weights, small_model, small_vocabulary

GOLDEN = Path(__file__).parents[2] / "golden"
DOC_LENS = [11, 1, 29, 11, 5]


def reference_model(run: dict):
    """The two-layer decoder of a run in model.json; image tokens are ids 4 to 8195."""
    config = ChameleonXLLMXConfig(
        vocab_size=65536,
        vocabulary_map={code_name(code): 4 + code for code in range(8192)},
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=run["config"].get("kv", 4),
        max_position_embeddings=512,
        swin_norm=run["config"].get("swin", False),
        z_loss_weight=1e-5,
        mask_image_logits=run["config"].get("mask", False),
    )
    return seed_weights(build_model(config, "cpu"))


def pad_right(rows, value):
    return torch.tensor([row + [value] * (max(map(len, rows)) - len(row)) for row in rows])


@pytest.mark.parametrize(
    ("name", "is_packed"),
    [("mha_nomask", False), ("mha_nomask", True), ("swin_gqa_nomask", True), ("mha_mask_textlabels", True)],
)
def test_reference_figures(name, is_packed):
    golden = json.loads((GOLDEN / "model.json").read_text())
    run = golden["runs"][name]
    labels = golden["labels_text_only" if run["config"].get("tl") else "labels"]
    model = reference_model(run)
    lengths = torch.tensor([len(row) for row in golden["input_ids"]])
    if is_packed:
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        output = model(torch.tensor([sum(golden["input_ids"], [])]), torch.tensor([sum(labels, [])]), None, cu_seqlens)
    else:
        input_ids = pad_right(golden["input_ids"], 0)
        output = model(input_ids, pad_right(labels, IGNORE_INDEX))
    output.loss.backward()
    assert output.loss.item() == pytest.approx(run["loss"], abs=1e-5)
    assert (output.ce_loss / output.num_valid_tokens).item() == pytest.approx(run["c_loss"], abs=1e-5)
    # About 123, where numbers of fp32 are 8e-6 apart: the last two bits depend on the CPU.
    assert (output.z_loss / output.num_valid_tokens).item() == pytest.approx(run["z_loss"], rel=5e-7)
    norms = {key: parameter.grad.norm().item() for key, parameter in model.named_parameters()}
    assert norms.keys() == run["grad_norms"].keys()
    for key, norm in norms.items():
        assert norm == pytest.approx(run["grad_norms"][key], rel=1e-4), key
    assert math.hypot(*norms.values()) == pytest.approx(run["total_grad_norm"], rel=1e-4)
    # The reference logits are those before the mask.
    model.config.mask_image_logits = False
    logits = model(pad_right(golden["input_ids"], 0)).logits
    for entry in run["logits"]:
        found = logits[entry["batch"], entry["pos"], entry["idx"]]
        assert (found - torch.tensor(entry["val"])).abs().max() < 1e-5


VARIANTS = [{}, dict(num_key_value_heads=2, model_parallel_size=2, swin_norm=True)]


def pack(docs):
    """(row [1, T], cu_seqlens) of documents."""
    return torch.cat(docs)[None], F.pad(torch.tensor([len(doc) for doc in docs]).cumsum(0), (1, 0)).int()


@pytest.mark.parametrize("overrides", VARIANTS)
@pytest.mark.parametrize(
    ("device", "dtype", "hidden_bound", "grad_bound"),
    [
        ("cpu", torch.float32, 1e-5, 1e-5),
        ("cpu", torch.bfloat16, 2e-2, 2e-2),
        # The documents alone are computed by another kernel than the row, which rounds differently.
        pytest.param("cuda", torch.bfloat16, 2e-2, 5e-2, marks=pytest.mark.gpu),
    ],
)
def test_packed_row_equals_separate_documents(overrides, device, dtype, hidden_bound, grad_bound):
    packed, separate = (small_model(z_loss_weight=1e-3, **overrides).to(device, dtype) for _ in range(2))
    docs = [random_tokens(n, seed=n).to(device) for n in DOC_LENS]
    row, cu_seqlens = pack(docs)
    hidden = packed.model(row, cu_seqlens=cu_seqlens)
    expected = torch.cat([separate.model(doc[None]) for doc in docs], 1)
    assert hidden.dtype == dtype
    assert (hidden - expected).abs().max() < hidden_bound * expected.abs().max()
    scale = 1 / sum(n - 1 for n in DOC_LENS)
    output = packed(row, row, cu_seqlens=cu_seqlens, loss_scale=scale)
    output.loss.backward()
    outputs = [separate(doc[None], doc[None], loss_scale=scale) for doc in docs]
    sum(o.loss for o in outputs).backward()
    assert output.num_valid_tokens == sum(o.num_valid_tokens for o in outputs)
    for figure in ("loss", "image_ce_sum"):
        assert output[figure].item() == pytest.approx(sum(o[figure].item() for o in outputs), rel=hidden_bound)
    for (name, ours), theirs in zip(packed.named_parameters(), separate.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < grad_bound * theirs.grad.norm(), name


def test_sums_are_split_by_the_kind_of_the_target():
    model = small_model()
    tokens = random_tokens(40)[None]
    output = model(tokens, tokens)
    is_image = torch.isin(tokens[0, 1:], model.image_token_ids(torch.device("cpu")))
    ce = F.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="none")
    assert output.num_image_tokens == is_image.sum() > 0
    assert output.num_text_tokens == (~is_image).sum() > 0
    assert torch.isclose(output.image_ce_sum, ce[is_image].sum())
    assert torch.isclose(output.text_ce_sum, ce[~is_image].sum())
    assert torch.isclose(output.loss, ce.mean())


def test_padding_and_cache_agree_with_plain_rows():
    """Padding on the right needs no mask."""
    model = small_model().eval()
    rows = [random_tokens(n, seed=n) for n in (4, 9)]
    input_ids = torch.stack([F.pad(row, (9 - len(row), 0), value=1) for row in rows])
    mask = torch.stack([F.pad(torch.ones(len(row)), (9 - len(row), 0)) for row in rows])
    left = model(input_ids, attention_mask=mask).logits
    right = model(pad_right([row.tolist() for row in rows], 1)).logits
    for row, after_padding, before_padding in zip(rows, left, right, strict=True):
        expected = model(row[None]).logits[0]
        assert (after_padding[9 - len(row) :] - expected).abs().max() < 1e-5
        assert (before_padding[: len(row)] - expected).abs().max() < 1e-5
    cache = DynamicCache(config=model.config)
    steps = [model(part[None], past_key_values=cache).logits for part in rows[1].split([4, 3, 1, 1])]
    assert (torch.cat(steps, 1) - model(rows[1][None]).logits).abs().max() < 1e-5


@pytest.mark.parametrize(("is_packed", "mask_image_logits"), [(True, False), (False, True)])
def test_no_valid_target_gives_zero_loss_and_gradients(is_packed, mask_image_logits):
    model = small_model(mask_image_logits=mask_image_logits, z_loss_weight=1e-3)
    tokens = random_tokens(12)[None] if is_packed else random_tokens(12).view(2, 6)
    layout = {"cu_seqlens": torch.tensor([0, 5, 12])} if is_packed else {}
    output = model(tokens, torch.full_like(tokens, IGNORE_INDEX), **layout)
    output.loss.backward()
    assert output.loss.item() == 0 and output.num_valid_tokens == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("swin", [False, True])
def test_dropout_is_on_both_branches_in_training(monkeypatch, swin):
    """On what attention and MLP add to the residual stream, so after the norms under swin."""
    plain = small_model(swin_norm=swin)(random_tokens(12)[None]).logits
    assert torch.equal(small_model(dropout=0.25, swin_norm=swin).eval()(random_tokens(12)[None]).logits, plain)
    model = small_model(dropout=0.25, swin_norm=swin).train()
    dropped, added = [], []

    def record(hidden_states, p, training):
        dropped.append((hidden_states, p, training))
        return hidden_states

    for layer in model.model.layers:
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        for module in norms if swin else (layer.self_attn, layer.mlp):
            module.register_forward_hook(lambda _m, _i, out: added.append(out[0] if isinstance(out, tuple) else out))
    monkeypatch.setattr(F, "dropout", record)
    model(random_tokens(12)[None])
    assert len(dropped) == len(added) == 2 * model.config.num_hidden_layers
    assert all(p == 0.25 and training for _, p, training in dropped)
    assert all(seen is out for (seen, _, _), out in zip(dropped, added, strict=True))


def test_heads_of_a_group_share_norm_weights():
    norm, hidden = TiedHeadLayerNorm(num_groups=2, num_heads=4, head_dim=8), torch.randn(3, 4, 8)
    with torch.no_grad():
        norm.weight[1], norm.bias[1] = 2.0, 5.0
    plain = F.layer_norm(hidden, (8,))
    torch.testing.assert_close(norm(hidden), torch.cat([plain[:, :2], 2 * plain[:, 2:] + 5], 1))


def test_masked_image_logits():
    model = small_model(mask_image_logits=True)
    tokens = random_tokens(30)[None]
    image_ids = model.image_token_ids(torch.device("cpu"))
    assert (model(tokens).logits[..., image_ids] == torch.finfo(torch.float32).min).all()
    with pytest.raises(ValueError, match="mask_image_logits is on"):
        model(tokens, tokens)


@pytest.mark.parametrize("more", [{"attention_mask": torch.ones(1, 6)}, {"past_key_values": DynamicCache()}, None])
def test_packed_rows_take_no_batch_mask_or_cache(more):
    tokens = random_tokens(12).view(2, 6)
    with pytest.raises(ValueError, match="one row, without attention_mask or past_key_values"):
        small_model()(tokens[:1] if more else tokens, cu_seqlens=torch.tensor([0, 6]), **more or {})


def test_init_weights_depends_on_the_seed_only():
    config = build_config("tiny", small_vocabulary())
    models = [build_model(config, "cpu") for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        init_weights(model, seed)
    one, same, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert one["model.layers.0.mlp.up_proj.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert (one["model.layers.3.self_attn.q_norm.weight"] == 1).all() and (one["model.norm.weight"] == 1).all()
    assert not one["model.layers.3.self_attn.k_norm.bias"].any()


SHAPE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("swin_norm", "model_parallel_size", "vocab_size"),
)


@pytest.mark.parametrize(
    ("size", "billions", "expected"),
    [
        ("7B", 6.476, (4096, 32, 32, 32, 11008, False, 1, len(small_vocabulary()))),
        ("34B", 33.22, (8192, 48, 64, 8, 22016, True, 8, len(small_vocabulary()))),
        ("bench", 0.00316, (256, 4, 4, 4, 688, False, 1, 65536)),
    ],
)
def test_named_sizes(size, billions, expected):
    config = build_config(size, small_vocabulary())
    assert tuple(getattr(config, name) for name in SHAPE) == expected
    model = build_model(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    num_parameters = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n and "lm_head" not in n)
    assert num_parameters / 1e9 == pytest.approx(billions, rel=0.01)
    attention, head_dim = model.model.layers[0].self_attn, expected[0] // expected[2]
    assert attention.q_norm.weight.shape == attention.k_norm.weight.shape == (expected[6], head_dim)
    assert attention.k_proj.weight.shape == (expected[3] * head_dim, expected[0])


def test_bad_configurations_are_rejected():
    with pytest.raises(ValueError, match="13B.*7B, 34B"):
        build_config("13B")
    with pytest.raises(ValueError, match="vocab_size=10"):
        build_config("tiny", small_vocabulary(), vocab_size=10)
    with pytest.raises(ValueError, match="model_parallel_size must divide"):
        build_model(build_config("tiny", model_parallel_size=3))
