"""Training from the recipe's published checkpoints: small seeded folders of their shape, given by their hub ids."""

import json
from pathlib import Path

import pytest
import torch

from data.items.item_processor import load_text_tokenizer
from inference_solver import FlexARInferenceSolver
from model.decoder.chameleon import build_config, build_model
from model.weights.adapter_folder import BaseWeights
from model.weights.hf_folder import DEFAULT_TOKENIZER, find_tokenizer, resolve_checkpoint
from model.weights.load import load_pretrained
from tests.helpers.decoder_helpers import seed_weights
from tests.helpers.hub_helpers import COMMIT, put_into_cache
from tests.helpers.small_run import call_main, export_hf, solver_args, write_small_task

# With positions below, at and above the --max_seq_len of 64; one alone has a tokenizer; one has the shape of 34B.
STARTS = {
    "Lumina-mGPT-7B-512": {"max_position_embeddings": 40, "num_attention_heads": 4},
    "Lumina-mGPT-7B-768-Omni": {"max_position_embeddings": 64, "num_attention_heads": 4},
    "Lumina-mGPT-7B-1024": {"max_position_embeddings": 128, "num_attention_heads": 4},
    "Lumina-mGPT-7B-768": {"max_position_embeddings": 40, "num_attention_heads": 4},
    "Lumina-mGPT-34B-512": {
        "max_position_embeddings": 80,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "model_parallel_size": 4,
        "swin_norm": True,
    },
}


def write_start(folder: Path, name: str, tokenizer: Path) -> None:
    """A checkpoint in bf16 with the config.json of transformers 4.43."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config = build_config("tiny", load_text_tokenizer(tokenizer), **shape | STARTS[name])
    own = tokenizer if name == "Lumina-mGPT-7B-768" else None
    export_hf(seed_weights(build_model(config, "cpu")), config, folder, own, dtype=torch.bfloat16)
    values = json.loads((folder / "config.json").read_text())
    for newer in ("rope_parameters", "dtype", "tie_head_norm"):
        values.pop(newer, None)
    values |= {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "bfloat16", "model_type": "chameleon"}
    values |= {"transformers_version": "4.43.3", "attention_dropout": 0.0, "dropout": 0.05, "z_loss_weight": 1e-5}
    (folder / "config.json").write_text(json.dumps(values, indent=2))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Items, and `hub/`, a cache of the hub that holds all starts."""
    folder = tmp_path_factory.mktemp("starts")
    write_small_task(folder, num_items=4)
    for name in STARTS:
        write_start(folder / name, name, folder / "tokenizer")
        put_into_cache(folder / "hub", f"Alpha-VLLM/{name}", folder / name)
    return folder


@pytest.fixture(autouse=True)
def offline(task, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(task / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def train(task, out, name, **changes) -> Path:
    """Takes the first step, which has a learning rate of 0, from a hub id; returns its checkpoint."""
    assert call_main(solver_args(task, out, init_from=f"Alpha-VLLM/{name}", max_steps=1, **changes)) == (0, "")
    return out / "epoch0-iter1"


@pytest.mark.parametrize("name", STARTS)
def test_training_starts_from_a_hub_id(task, tmp_path, name):
    checkpoint = train(task, tmp_path / "out", name, tokenizer=None)
    start, trained = load_pretrained(f"Alpha-VLLM/{name}", torch.float32), load_pretrained(checkpoint)
    for (parameter_name, before), after in zip(start.named_parameters(), trained.parameters(), strict=True):
        # The image rows of the head included.
        assert torch.equal(before, after), parameter_name
    groups = STARTS[name].get("model_parallel_size", 1)
    assert trained.model.layers[0].self_attn.q_norm.weight.shape[0] == groups
    assert trained.config.swin_norm == STARTS[name].get("swin_norm", False)
    assert trained.config.max_position_embeddings == max(64, STARTS[name]["max_position_embeddings"])
    assert load_text_tokenizer(checkpoint).get_vocab() == load_text_tokenizer(task / "tokenizer").get_vocab()
    own = resolve_checkpoint(f"Alpha-VLLM/{name}")
    assert find_tokenizer(own) == (str(own) if name == "Lumina-mGPT-7B-768" else DEFAULT_TOKENIZER)
    solver = FlexARInferenceSolver(f"Alpha-VLLM/{name}", "fp32", device="cpu")
    assert solver.generate([], [["word80", None]], 4, 0.0)[0] is not None


def test_adapters_and_plan_of_a_hub_id(task, tmp_path, capsys):
    name = "Lumina-mGPT-34B-512"
    note = BaseWeights.read(train(task, tmp_path / "out", name, lora_rank=4))
    assert (note.source, note.revision) == (f"Alpha-VLLM/{name}", COMMIT)
    capsys.readouterr()
    assert call_main([*solver_args(task, tmp_path / "out", init_from=f"Alpha-VLLM/{name}"), "--plan"])[0] == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    parameters = load_pretrained(f"Alpha-VLLM/{name}").parameters()
    assert figures["num_parameters"] == sum(parameter.numel() for parameter in parameters)
