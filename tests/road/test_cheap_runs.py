"""Trainings that cost less, from start to image: cut off, resumed, exported, drawn.

Three runs hold every option of memory and of what is trained. The one whose moments are in 8 bits takes 2 ranks.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import ChameleonForConditionalGeneration

from data.items.item_processor import load_text_tokenizer
from inference_solver import FlexARInferenceSolver
from model.convert import convert_checkpoint, main
from model.decoder.chameleon import build_config, build_model, init_weights
from model.vqgan.vqgan import VQGAN, save_vqgan
from model.weights.load import load_pretrained
from tests.helpers.decoder_helpers import small_config
from tests.helpers.small_run import call_main, export_hf, losses, run_solver, solver_args, train, write_small_task

pytestmark = pytest.mark.slow
NUM_STEPS = 8
LORA = {"lora_rank": 64, "train_only": "image_head", "optim": "adamw_8bit", "checkpointing_selective": True}
RUNS = {
    "lora": LORA | {"precision": "bf16"},
    "image_head": {"train_only": "image_head", "checkpointing_every": 2, "precision": "bf16"},
    "named": {"train_only": "model.layers.1.mlp.*", "cpu_offload": True, "checkpointing": True, "dropout": 0.1},
}
HEADS = ("lm_head.weight", "model.embed_tokens.weight")
TRAINED = {
    "lora": ("_proj.weight",),
    "image_head": HEADS,
    "named": (".layers.1.mlp.gate_proj.weight", ".layers.1.mlp.up_proj.weight", ".layers.1.mlp.down_proj.weight"),
}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Some items, and `start`: bf16, with a VQGAN, wide enough for moments in 8 bits."""
    folder = tmp_path_factory.mktemp("task")
    write_small_task(folder, num_items=30)
    torch.manual_seed(0)
    vq_config = small_config().vq_config.to_dict() | {"num_embeddings": 64}
    save_vqgan(VQGAN(small_config(vq_config=vq_config).vq_config), folder / "vqgan", torch.float32)
    tokenizer = load_text_tokenizer(folder / "tokenizer")
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 512}
    config = build_config("tiny", tokenizer, **shape)
    model = build_model(config, "cpu")
    init_weights(model, seed=0)
    export_hf(model, config, folder / "start", folder / "tokenizer", vqgan_dir=folder / "vqgan", dtype=torch.bfloat16)
    return folder


def run_args(task: Path, out: Path, name: str, **more: object) -> list[str]:
    changes = {"init_from": task / "start", "batch_size": 1, "lr": 2e-3, "warmup_epochs": 0, "save_interval": 0}
    return solver_args(task, out, **changes | RUNS[name] | more)


@pytest.fixture(scope="module", params=RUNS)
def finished(request, task, tmp_path_factory):
    """(name, losses of the run that lost its last checkpoint, its folder once it resumed to the end)."""
    name, out = request.param, tmp_path_factory.mktemp(request.param) / "out"
    changes = {"batch_size": 1 if name == "lora" else 2, "max_steps": NUM_STEPS, "save_iteration_interval": 4}
    args, before = run_args(task, out, name, **changes), {}
    for _ in range(2):
        if name == "lora":
            train(2, args)
        else:
            assert call_main(args) == (0, "")
        if not before:
            before = losses(out)
            shutil.rmtree(out / f"epoch0-iter{NUM_STEPS}")
    return name, before, out


def test_a_run_that_was_cut_off_resumes_with_the_same_losses(finished, task):
    """Its checkpoint holds what was trained, and where the rest is."""
    name, before, out = finished
    assert losses(out) == before and list(before) == list(range(1, NUM_STEPS + 1))
    assert min(before.values()) < before[1] - 0.05
    folder = out / f"epoch0-iter{NUM_STEPS}"
    assert json.loads((folder / "base_weights.json").read_text())["source"] == str(task / "start")
    assert not (folder / "model.safetensors").exists()
    file = "adapter_model.safetensors" if name == "lora" else "trained.safetensors"
    trained = load_file(folder / file)
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    num_trained = sum(tensor.numel() for tensor in trained.values())
    state_bytes = sum(path.stat().st_size for path in (folder / "training_state").iterdir())
    # 4 bytes of weight, 2 or 8 of moments; names, and tables of 8 bits.
    assert state_bytes / num_trained < {"lora": 9.5, "image_head": 15, "named": 14}[name]


def test_export_is_the_start_with_what_was_trained(finished, task, tmp_path, capsys):
    """Frozen weights keep their bits. The export draws; stock transformers (of LoRA also peft) computes the same."""
    name, _, out = finished
    checkpoint = out / f"epoch0-iter{NUM_STEPS}"
    assert main([str(checkpoint), str(tmp_path / "merged"), "--shape", "hf"]) == 0, capsys.readouterr().err
    convert_checkpoint(task / "start", tmp_path / "base", shape="hf")
    config = build_config("tiny", load_text_tokenizer(task / "tokenizer"))
    image_ids = build_model(config).image_token_ids(torch.device("cpu"))
    start, end = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    assert start.keys() == end.keys()
    for key, before in start.items():
        assert before.dtype == end[key].dtype
        if key in HEADS and name != "named":
            # Rows of the embedding that no item has may keep their bits.
            others = (before != end[key]).any(1).nonzero().flatten().tolist()
            assert others and set(others) <= set(image_ids.tolist())
            assert len(others) == len(image_ids) or key == HEADS[1]
        else:
            assert torch.equal(before, end[key]) != key.endswith(TRAINED[name]), key
    solver = FlexARInferenceSolver(
        str(tmp_path / "merged"), "fp32", target_size=64, vqgan_dir=task / "vqgan", device="cpu"
    )
    _, images = solver.generate([], [["word1 word2", None]], 60, 1.0, size=(64, 32))
    assert images[0].size == (64, 32)

    input_ids = torch.arange(40, 100)[None]
    expected = load_pretrained(checkpoint, torch.float32, mask_image_logits=True)
    convert_checkpoint(checkpoint, tmp_path / "fp32", shape="hf", dtype=torch.float32)
    merged, report = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "fp32", output_loading_info=True)
    assert not any(report.values()), report
    base = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = [model(input_ids=input_ids).logits for model in (expected, merged.eval(), base)]
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)
        assert (logits[2] - logits[0]).abs().max() > 0.01
        if name == "lora":
            by_peft = pytest.importorskip("peft").PeftModel.from_pretrained(base, checkpoint).eval()
            torch.testing.assert_close(by_peft(input_ids=input_ids).logits, logits[0], rtol=1e-5, atol=1e-5)


def test_a_run_with_reinitialized_image_rows_is_that_from_a_start_on_disk(task, tmp_path):
    """Also once its base was moved: the same command, whose --init_from names the old place, resumes by the note."""
    out, base, elsewhere = tmp_path / "new", tmp_path / "base", tmp_path / "elsewhere"
    changes = {"image_head_init": "normal", "seed": 3, "precision": "fp32"}
    start = convert_checkpoint(task / "start", tmp_path / "start", image_head_init="normal", seed=3)
    on_disk = changes | {"init_from": start, "image_head_init": "keep"}
    assert call_main(run_args(task, tmp_path / "old", "image_head", max_steps=4, **on_disk)) == (0, "")
    shutil.copytree(task / "start", base)
    changes |= {"init_from": base}
    assert call_main(run_args(task, out, "image_head", max_steps=2, **changes)) == (0, "")
    base.rename(elsewhere)
    args, path = run_args(task, out, "image_head", max_steps=4, **changes), out / "epoch0-iter2" / "base_weights.json"
    code, message = call_main(args)
    assert code == 2 and message.count("\n") == 2 and f"write where it is now as `source` into {path}" in message
    path.write_text(json.dumps(json.loads(path.read_text()) | {"source": str(elsewhere)}))
    assert call_main(args) == (0, "")
    assert losses(tmp_path / "old") == losses(out) and sorted(losses(out)) == [1, 2, 3, 4]
    note = json.loads((out / "epoch0-iter4" / "base_weights.json").read_text())
    assert (note["source"], note["image_head_init"], note["seed"]) == (str(elsewhere), "normal", 3)
    code, message = call_main(run_args(task, out, "lora", max_steps=6, resume_anyway=True, **changes))
    assert code == 2 and "cannot be resumed: --lora_rank was 0 and is 64" in message


def test_moments_in_8_bits_stay_with_their_optimizer_and_their_blocks(task, tmp_path):
    """Matrices of rank 66 have halves that are no whole blocks."""
    out, changes = tmp_path / "out", {"name": "lora", "train_only": None, "lora_rank": 66}
    assert call_main(run_args(task, out, **changes, max_steps=1)) == (0, "")
    code, message = call_main(run_args(task, out, **changes | {"optim": "adamw"}, max_steps=2, resume_anyway=True))
    assert code == 2 and "--optim was adamw_8bit and is adamw" in message and "--resume_anyway" not in message
    done = run_solver(2, run_args(task, out, **changes, max_steps=2))
    said = [line for line in done.stderr.splitlines() if line.startswith("finetune_solver.py: ")]
    assert len(said) == 1 and "was saved by 1 ranks and cannot be divided among 2" in said[0], done.stderr
    assert "moments in 8 bits" in said[0] and done.returncode == 1
    assert 'finetune_solver.py", line' not in done.stderr, "a traceback of a rank"
    assert list(losses(out)) == [1]
