"""What is trained and what is frozen: names, types, gradients, and that frozen weights do not move by a bit."""

import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from model.decoder.chameleon import build_config, build_model, init_weights, reset_rotary_buffers
from model.decoder.trainable import LORA_TARGETS, TrainableOptions, choose_trainable, init_adapters, is_added
from model.run.checks import prepare
from model.run.options import Options, build_parser
from model.training.distributed import Launch, process_group
from model.training.optim import OptimOptions, build_optimizer
from model.training.parallelize import ParallelOptions, allocate, build_mesh, clip_grad_norm, parallelize
from model.weights.load import clean_name, load_checkpoint_weights, load_pretrained
from tests.helpers import forked
from tests.helpers.small_run import export_hf, solver_args

LORA = TrainableOptions(lora_rank=4)
IMAGE_HEAD = TrainableOptions(train_only=["image_head"])
BOTH = TrainableOptions(lora_rank=4, train_only=["image_head"])
NAMED = TrainableOptions(train_only=["model.layers.1.*", "*norm*"])
WAYS = {"lora": LORA, "image_head": IMAGE_HEAD, "both": BOTH, "named": NAMED}
IMAGE_IDS = list(range(5, 25))


def make_config(**changes):
    names = {f"word{n}": n for n in range(64)} | {f"IMGIMG{chr(65 + n)}Z": id_ for n, id_ in enumerate(IMAGE_IDS)}
    names = {name: id_ for name, id_ in names.items() if name.startswith("IMG") or id_ not in IMAGE_IDS}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2}
    return build_config("tiny", names, **shape | changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of fp32 weights."""
    folder = tmp_path_factory.mktemp("base")
    model = build_model(make_config(z_loss_weight=1e-3), "cpu")
    init_weights(model, seed=3)
    export_hf(model, model.config, folder)
    return folder


def make_adapted(options: TrainableOptions, base, frozen_dtype=torch.float32):
    """A plain model with the weights of `base` and fresh adapters."""
    model = choose_trainable(build_model(make_config(z_loss_weight=1e-3)), options, frozen_dtype)
    model.to_empty(device="cpu")
    reset_rotary_buffers(model)
    load_checkpoint_weights(model, base)
    init_adapters(model, seed=1)
    return model


def make_row():
    input_ids = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(2))
    return {"input_ids": input_ids, "labels": input_ids, "cu_seqlens": torch.tensor([0, 9, 24], dtype=torch.int32)}


def trained_names(model) -> set[str]:
    return {clean_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_frozen_is_bf16_and_not_in_the_optimizer(way):
    model = choose_trainable(build_model(make_config()), WAYS[way])
    trained = trained_names(model)
    layers = [f"model.layers.{layer}.{part}" for layer in range(2) for part in ("self_attn", "mlp")]
    adapters = {
        f"{layer}.{target}.lora_{side}.default.weight"
        for layer in layers
        for target in LORA_TARGETS
        for side in "AB"
        if (target[0] in "qkvo") == layer.endswith("self_attn")
    }
    rows = {"lm_head.image_rows", "model.embed_tokens.image_rows"}
    names = {name for name, _ in build_model(make_config()).named_parameters()}
    named = {name for name in names if name.startswith("model.layers.1.") or "norm" in name}
    assert trained == {"lora": adapters, "image_head": rows, "both": adapters | rows, "named": named}[way]
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if clean_name(name) in trained else torch.bfloat16), name
    held = [id(p) for group in build_optimizer(model, OptimOptions(wd=0.1)).param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert names == {clean_name(name) for name, _ in model.named_parameters() if not is_added(clean_name(name))}


def test_adapters_are_where_they_are_asked_for():
    chosen = TrainableOptions(lora_rank=2, lora_targets=["q_proj", "v_proj"])
    trained = trained_names(choose_trainable(build_model(make_config()), chosen))
    assert len(trained) == 2 * 2 * 2 and all("q_proj" in name or "v_proj" in name for name in trained)


@pytest.mark.parametrize("way", WAYS)
def test_a_fresh_start_computes_what_the_weights_compute(base, way):
    row = make_row()
    plain = load_pretrained(base)
    adapted = make_adapted(WAYS[way], base)
    assert torch.equal(adapted(**row).loss, plain(**row).loss)
    assert torch.equal(adapted(row["input_ids"]).logits, plain(row["input_ids"]).logits)


@pytest.mark.parametrize("options", [IMAGE_HEAD, NAMED])
def test_gradients_are_those_of_a_full_training(base, options):
    """Of image rows: those rows of the whole embedding and head. Nothing else gets a gradient."""
    plain, adapted = load_pretrained(base).train(), make_adapted(options, base).train()
    for model in (plain, adapted):
        model(**make_row()).loss.backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name in ("lm_head", "model.embed_tokens"):
        expected[f"{name}.image_rows"] = expected[f"{name}.weight"][IMAGE_IDS]
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-8)
            assert parameter.grad.any()


def test_a_masked_head_with_trained_rows_masks_them(base):
    model = make_adapted(IMAGE_HEAD, base)
    model.config.mask_image_logits = True
    logits = model(make_row()["input_ids"]).logits
    assert (logits[..., IMAGE_IDS] == torch.finfo(torch.float32).min).all()


def test_rows_of_the_head_learn_where_nothing_below_it_does(base):
    head, hidden = make_adapted(IMAGE_HEAD, base).lm_head, torch.randn(12, 32)
    labels = torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(0))
    head(hidden, labels).loss.backward()
    weight = head.weight.detach().index_copy(0, torch.tensor(IMAGE_IDS), head.image_rows.detach()).requires_grad_()
    torch.nn.functional.cross_entropy(hidden @ weight.t(), labels).backward()
    torch.testing.assert_close(head.image_rows.grad, weight.grad[IMAGE_IDS])


def test_fresh_adapters_depend_on_the_seed_alone(base):
    first, again = (dict(make_adapted(BOTH, base).named_parameters()) for _ in range(2))
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        if ".lora_A." in name:
            assert 0.9 / parameter.shape[1] ** 0.5 < parameter.abs().max() <= 1 / parameter.shape[1] ** 0.5
        if ".lora_B." in name:
            assert not parameter.any()


def check_steps(base: Path, way: str, compiled: bool = False) -> None:
    """Four steps of a sharded model in bf16, under weight decay, move what is trained, and nothing else by a bit."""
    options = ParallelOptions(compile=compiled)
    mesh = build_mesh(options, "cpu", dist.get_world_size())
    model = choose_trainable(build_model(make_config()), WAYS[way])
    model = parallelize(model, mesh, options, "aot_eager")
    allocate(model, torch.device("cpu"), options)
    load_checkpoint_weights(model, base)
    init_adapters(model)
    model.train()
    optimizer = build_optimizer(model, OptimOptions(wd=0.5, lr=1e-2, decay_all=True))
    named = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    before, losses = {name: parameter.full_tensor().clone() for name, parameter in named.items()}, []
    for _ in range(4):
        loss = model(**make_row(), max_seqlen=24).loss
        loss.backward()
        assert torch.isfinite(clip_grad_norm(model, mesh, 1.0))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    stored = load_file(base / "model.safetensors")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in named.items():
        is_trained, after = parameter.requires_grad, parameter.full_tensor()
        assert torch.equal(after, before[name]) != is_trained, name
        assert (id(parameter) in held) == is_trained, name
        assert parameter.dtype == (torch.float32 if is_trained else torch.bfloat16), name
        assert is_trained or torch.equal(after, stored[name].bfloat16()), name


@pytest.mark.parametrize(
    ("way", "compiled"), [("image_head", False), ("named", False), pytest.param("both", True, marks=pytest.mark.slow)]
)
def test_steps_under_weight_decay_move_what_is_trained_alone(base, way, compiled):
    if compiled:
        torch._dynamo.reset()
    with process_group(Launch(), "cpu", timeout_s=60):
        check_steps(base, way, compiled)


def check_steps_of_rank(rank: int, base: Path, store: Path) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    check_steps(base, "both")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_steps_of_two_ranks_move_what_is_trained_alone(base, tmp_path):
    forked.spawn(check_steps_of_rank, (base, tmp_path / "store"), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TrainableOptions(train_only=["model.layer.*"]), r"--train_only model.layer.\* names no parameter"),
        (TrainableOptions(train_only=["image_head", "lm_head.*"]), "another pattern names lm_head.weight as a whole"),
    ],
)
def test_names_that_match_nothing_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        choose_trainable(build_model(make_config()), options)
    with pytest.raises(ValueError, match="no image tokens"):
        choose_trainable(build_model(build_config("tiny", vocab_size=64)), IMAGE_HEAD)


def test_problems(monkeypatch):
    assert not LORA.problems() and not BOTH.problems() and not TrainableOptions().problems()
    assert len(TrainableOptions(lora_rank=-1, lora_alpha=0.0).problems()) == 2
    assert "only with --lora_rank" in TrainableOptions(lora_targets=["q_proj"]).problems()[0]
    assert "may only be image_head" in TrainableOptions(lora_rank=2, train_only=["*norm*"]).problems()[0]
    assert "query: no such projection" in TrainableOptions(lora_rank=2, lora_targets=["query"]).problems()[0]
    with monkeypatch.context() as patch, pytest.raises(ImportError, match="peft does not work here: too old"):
        patch.setattr("peft.inject_adapter_in_model", Mock(side_effect=ImportError("too old")))
        choose_trainable(build_model(make_config()), LORA)
    for name in ("peft", "torchao.optim"):
        # Importing it fails.
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install peft==" in LORA.problems()[0]
    assert "pip install torchao==" in OptimOptions(optim="adamw_8bit").problems()[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_only": "lm_heat.weight"}, "--train_only lm_heat.weight names no parameter"),
        ({"lora_rank": 2, "image_head_init": "zero"}, "Add --train_only image_head"),
        ({"init_from": None, "model_size": "tiny", "lora_rank": 2}, "need weights to start from: give --init_from$"),
    ],
)
def test_a_start_that_could_train_nothing_is_rejected(small_task, tmp_path, changes, message):
    args = solver_args(small_task, tmp_path, **{"tokenizer": small_task / "tokenizer"} | changes)
    with pytest.raises(ValueError, match=message):
        prepare(Options.from_namespace(build_parser().parse_args(args)), Launch())
