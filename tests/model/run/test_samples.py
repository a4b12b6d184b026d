"""Samples of a training: the prompts, answers equal to those of the checkpoint, and a training that does not change."""

import codecs
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

from data.items.item_processor import load_text_tokenizer
from data.items.vocab import ChameleonVocab
from inference_solver import FlexARInferenceSolver
from model.generation.decode_step import RootForward
from model.generation.loop import generate_batch
from model.generation.sampling import SamplingOptions
from model.run.sample_prompts import SampleOptions, SamplePrompt, load_prompts
from model.run.samples import read_samples, write_samples
from model.training.distributed import Launch, process_group
from model.training.parallelize import ParallelOptions, build_mesh, evaluating, parallelize
from model.vqgan.vqgan import VQGAN, save_vqgan
from tests.helpers.decoder_helpers import small_config
from tests.helpers.small_run import call_main, find_problems, losses, solver_args, train
from tests.model.generation.test_generation import GREEDY, IMAGE_START, VOCAB, make_model, make_prompts

PROMPTS = [
    {"prompt": "word90 word91", "size": "64x32"},
    {"prompt": "word100 word101 word102"},
    {"prompt": "<|image|>word80", "image": "in.png", "size": "32x32"},
    {"qas": [["word85", "word86"], ["word87", None]]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`vqgan/` of as many codes as the small task's vocabulary, `in.png`, and `prompts.json` that names it."""
    folder = tmp_path_factory.mktemp("samples")
    torch.manual_seed(0)
    codes = small_config().vq_config.to_dict() | {"num_embeddings": 64}
    save_vqgan(VQGAN(small_config(vq_config=codes).vq_config), folder / "vqgan", torch.float32)
    Image.effect_noise((96, 64), 80).convert("RGB").save(folder / "in.png")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    return folder


def sample_flags(folder, interval: int, **changes) -> dict:
    flags = {"sample_interval": interval, "sample_prompts": folder / "prompts.json", "vqgan_dir": folder / "vqgan"}
    return flags | {"target_size": 64, "sample_max_gen_len": 40} | changes


def test_all_ranks_draw_the_tokens_of_rank_0_which_are_those_of_the_decode_step():
    """GPUs may round differently, and ranks with different tokens would wait for each other forever."""
    overrides, device = dict(num_key_value_heads=2, model_parallel_size=2, swin_norm=True), torch.device("cpu")
    drawn = []

    def record(tokens):
        drawn.append(tokens.clone())
        return tokens

    model, other = make_model(**overrides), make_model(**overrides)
    other.lm_head.register_forward_hook(lambda module, args, logits: -logits)
    options = SamplingOptions(image_top_k=20, cfg=2.5, seed=3)
    arguments = (make_prompts(), VOCAB, options, 40, [IMAGE_START, [], IMAGE_START[:1], [], IMAGE_START], 3)
    expected = generate_batch(model, *arguments)
    assert any(VOCAB.end_image_id in generation.tokens for generation in expected)
    forward = RootForward(model, VOCAB, device, torch.float32, agree=record)
    assert generate_batch(model, *arguments, forward=forward) == expected
    forward = RootForward(other, VOCAB, device, torch.float32, agree=lambda tokens: drawn.pop(0))
    assert generate_batch(other, *arguments, forward=forward) == expected


@pytest.mark.slow
@pytest.mark.parametrize("keep_gathered", [True, False])
def test_compiled_layers_of_a_sharded_model_sample_uncompiled(keep_gathered):
    """No graph for each number of rows and slots; afterwards the layers are compiled and trained as before."""
    torch._dynamo.reset()
    counter, plain = CompileCounterWithBackend("aot_eager"), make_model()
    expected = generate_batch(plain, make_prompts(), VOCAB, GREEDY, 30)
    options = ParallelOptions(precision="fp32", compile=True)
    with process_group(Launch(), "cpu", timeout_s=60) as device:
        model = parallelize(make_model().train(), build_mesh(options, "cpu", 1), options, counter)
        root_forward = RootForward(model, VOCAB, device, torch.float32)
        with evaluating(model, options, keep_gathered):
            assert not model.training
            found = generate_batch(model, make_prompts(), VOCAB, GREEDY, 30, forward=root_forward)
        assert found == expected and counter.frame_count == 0 and model.training
        assert not any(module._get_fsdp_state()._fsdp_param_group.is_unsharded for module in model.model.layers)
        row = torch.tensor([make_prompts()[1]])
        model(row, labels=row).loss.backward()
        assert counter.frame_count == 1
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_training_does_not_change_and_the_report_shows_samples(small_task, undisturbed, folder, tmp_path):
    """A resumed run has dropped the samples of later steps."""
    out = tmp_path / "out"
    for max_steps in (4, 6):
        flags = sample_flags(folder, 3, max_steps=max_steps, dropout=0.1)
        assert call_main(solver_args(small_task, out, **flags)) == (0, "")
        if max_steps == 4:
            write_samples(out, 9, [("a sample of a run that was lost", "", [])])
    assert losses(out) == {step: loss for step, loss in losses(undisturbed).items() if step <= 6}
    steps = read_samples(out)
    assert [step.step for step in steps] == [3, 4, 6]
    for step in steps:
        assert [sample.prompt for sample in step.samples][2:] == ["<|image|>word80", "word85\nword86\nword87"]
        sizes = [[Image.open(path).size for path in sample.image_paths[:1]] for sample in step.samples]
        assert sizes[0] == [(64, 32)] and sizes[2] == [(32, 32)]
        given = [[Image.open(path).size for path in sample.given_paths] for sample in step.samples]
        assert given == [[], [], [(64, 32)], []], "cropped as the model saw it"
        assert not any("<|image|>" in sample.text for sample in step.samples)
    page = (out / "report.html").read_text()
    assert "word90 word91" in page and page.count("data:image/png") >= 2


@pytest.mark.slow
def test_samples_of_two_ranks_are_those_of_the_checkpoint(small_task, folder, tmp_path):
    out = tmp_path / "out"
    flags = sample_flags(folder, 4, max_steps=4, dropout=0.1)
    assert "samples of step 4 in" in train(2, solver_args(small_task, out, **flags))
    (sampled,) = read_samples(out)
    checkpoint = str(out / "epoch0-iter4")
    solver = FlexARInferenceSolver(checkpoint, "fp32", 64, vqgan_dir=folder / "vqgan", device="cpu")
    requests = [{"qas": p.qas, "images": p.images, "size": p.size} for p in load_prompts(folder / "prompts.json")]
    answers = solver.generate_many(requests, 40, 1.0, solver.create_logits_processor())
    for sample, (text, images) in zip(sampled.samples, answers, strict=True):
        assert sample.text == text.replace("<|image|>", "").strip()
        assert [Image.open(path).tobytes() for path in sample.image_paths] == [image.tobytes() for image in images]


def test_a_prompt_that_is_too_long_is_rejected_and_samples_that_cannot_be_written_are_not(
    small_task, folder, tmp_path, capsys
):
    (tmp_path / "long.txt").write_text(" ".join(["word90"] * 600))
    out, flags = tmp_path / "out", sample_flags(folder, 1, max_steps=2, vqgan_dir=tmp_path / "none")
    code, message = call_main(solver_args(small_task, out, **flags | {"sample_prompts": tmp_path / "long.txt"}))
    assert code == 2 and "leaves no room in the 512 positions of the model" in message
    (out / "samples").write_text("no folder")
    (tmp_path / "prompts.txt").write_text("word90 word91\n\nword92\n")
    flags |= {"sample_prompts": tmp_path / "prompts.txt"}
    assert call_main(solver_args(small_task, out, **flags)) == (0, "")
    assert "no samples of step 1, training continues: " in capsys.readouterr().out and list(losses(out)) == [1, 2]


# The options and the prompts


def test_prompts_that_cannot_be_used_are_all_named(tmp_path):
    path = tmp_path / "prompts.json"
    entries = {
        '"caf\\ud8e9"': "",
        "3": "must be a text or an object",
        '{"prompt": "a", "cfg": 3}': "cfg is unknown; an entry may have prompt, qas",
        '{"prompt": "<|image|>a"}': "the text has 1 <|image|>, but there are 0 images",
        '{"prompt": "a", "image": "absent.png"}': "absent.png does not exist",
        '{"prompt": "<img>a", "image": "tests/golden/images/color.png"}': "<img> but no <|image|>: did you mean",
        '{"qas": [["a", null], ["b", null]]}': "qas must be [question, answer] pairs",
    }
    path.write_text(f"[{', '.join(entries)}]")
    with pytest.raises(ValueError) as error:
        load_prompts(path)
    problems = str(error.value).split("; entry ")
    assert len(problems) == len(entries)
    assert all(text in problem for problem, text in zip(problems, entries.values(), strict=True))
    for text, problem in (("[", "prompts.json cannot be read"), ("[]", "must be a list of prompts that is not empty")):
        path.write_text(text)
        with pytest.raises(ValueError, match=problem):
            load_prompts(path)


def test_options_that_cannot_be_used_are_rejected(small_task, folder, tmp_path):
    vocab = ChameleonVocab.from_tokenizer(load_text_tokenizer(small_task / "tokenizer"))
    (tmp_path / "prompts.json").write_text('[{"prompt": "a", "size": "64x64"}]')
    (tmp_path / "small.json").write_text('[{"prompt": "a", "size": "33x32"}]')
    for changes, problem in (
        ({"sample_prompts": None}, "--sample_interval needs a file of prompts"),
        ({"sample_prompts": Path("absent.json")}, "absent.json"),
        ({"sample_prompts": tmp_path / "small.json"}, "the size 33x32 is not possible"),
        ({"sample_max_gen_len": 9}, "has 24 tokens, more than --sample_max_gen_len 9"),
        ({"vqgan_dir": Path("absent")}, "--vqgan_dir absent is not a folder"),
        ({"sample_temperature": -1}, "temperature is -1"),
        ({"target_size": 100}, "the target size must be"),
    ):
        files = {"sample_prompts": tmp_path / "prompts.json", "vqgan_dir": folder / "vqgan", "target_size": 64}
        (found,) = SampleOptions(sample_interval=2, **files | changes).problems(vocab, mask_image_logits=False)
        assert problem in found
    flags = sample_flags(folder, 2, mask_image_logits=True)
    assert "--sample_interval needs logits of image tokens" in find_problems(small_task, tmp_path / "out", **flags)


def test_prompts_in_three_formats(tmp_path):
    image = tmp_path / "an image.png"
    Image.new("RGB", (32, 32)).save(image)
    (tmp_path / "p.yaml").write_text(
        "- a cat\n- {prompt: two of them, images: [an image.png], size: 64x32}\n- qas: [[a, b], [c, begins]]\n"
    )
    cat = SamplePrompt((("a cat", None),))
    assert load_prompts(tmp_path / "p.yaml") == [
        cat,
        SamplePrompt((("two of them", None),), (image,), (64, 32)),
        SamplePrompt((("a", "b"), ("c", "begins"))),
    ]
    (tmp_path / "p.txt").write_text("a cat\n")
    (tmp_path / "p.json").write_text('["a cat"]')
    assert load_prompts(tmp_path / "p.txt") == load_prompts(tmp_path / "p.json") == [cat]
    # As editors on Windows save a text.
    for path in tmp_path.glob("p.*"):
        plain = load_prompts(path)
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
        assert load_prompts(path) == plain
