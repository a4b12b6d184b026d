"""Samples of a training: what is asked, that answers are those of the checkpoint, and that training notices nothing."""

import codecs
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_run import call_main, environment, losses, solver_args, train
from torch._dynamo.testing import CompileCounterWithBackend

from data.item_processor import load_text_tokenizer
from inference_solver import FlexARInferenceSolver
from model import samples
from model.distributed import Launch, detect_launch, process_group
from model.generation import SamplingOptions, generate_batch
from model.parallelize import ParallelOptions, build_mesh, evaluating, parallelize
from model.requests import RequestCodec
from model.root_forward import RootForward
from model.sample_prompts import SamplePrompt, load_prompts
from model.samples import SampleOptions, Sampler
from model.samples_format import drop_samples_after, read_samples, write_samples
from model.vqgan import VQGAN, save_vqgan
from tests import forked
from tests.decoder_helpers import small_config, write_small_tokenizer
from tests.test_generation import GREEDY, IMAGE_START, VOCAB, make_model, make_prompts

PROMPTS = [
    {"prompt": "word90 word91", "size": "64x32"},
    {"prompt": "word100 word101 word102"},
    {"prompt": "<|image|>word80", "image": "in.png", "size": "32x32"},
    {"qas": [["word85", "word86"], ["word87", None]]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`vqgan/` of as many codes as the small task's vocabulary, `in.png`, and `prompts.json` that asks for it."""
    folder = tmp_path_factory.mktemp("samples")
    torch.manual_seed(0)
    save_vqgan(VQGAN(small_config(vq_config=small_config().vq_config.to_dict() | {"num_embeddings": 64}).vq_config),
               folder / "vqgan", torch.float32)  # fmt: skip
    Image.effect_noise((96, 64), 80).convert("RGB").save(folder / "in.png")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    return folder


def sample_flags(folder, interval: int, **changes) -> dict:
    flags = {"sample_interval": interval, "sample_prompts": folder / "prompts.json", "vqgan_dir": folder / "vqgan"}
    return flags | {"target_size": 64, "sample_max_gen_len": 40, "batch_size": 1, "epochs": 1} | changes


@pytest.mark.parametrize("overrides", [{}, dict(num_key_value_heads=2, model_parallel_size=2, swin_norm=True)])
@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(image_top_k=20, cfg=2.5, seed=3)], ids=["greedy", "cfg"])
def test_the_whole_model_s_forward_draws_what_the_lean_step_draws(overrides, options):
    model, forced = make_model(**overrides), [IMAGE_START, [], IMAGE_START[:1], [], IMAGE_START]
    arguments = (model, make_prompts(), VOCAB, options, 40, forced, 3)
    root_forward = RootForward(model, VOCAB, torch.device("cpu"), torch.float32)
    found = generate_batch(*arguments, forward=root_forward)
    assert found == generate_batch(*arguments)
    assert any(VOCAB.end_image_id in generation.tokens for generation in found)


@pytest.mark.slow
@pytest.mark.parametrize("keep_gathered", [True, False])
def test_compiled_layers_of_a_sharded_model_are_run_as_they_are_written(keep_gathered):
    """No graph for each number of rows and slots; afterwards the layers are compiled, and trained, as before."""
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
        with pytest.raises(ValueError, match="leaves no room"), evaluating(model, options, keep_gathered):
            generate_batch(model, [[VOCAB.bos_id] * 512], VOCAB, GREEDY, 30, forward=root_forward)
        assert model.training, "an error leaves it as it was, too"
        row = torch.tensor([make_prompts()[1]])
        model(row, labels=row).loss.backward()
        assert counter.frame_count == 1
        assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "way",
    [{}, pytest.param({"data_parallel": "sdp", "checkpointing": True, "precision": "bf16"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_training_notices_nothing_and_the_report_shows_them(small_task, folder, tmp_path, way):
    changes = sample_flags(folder, 5, max_steps=12, dropout=0.1, **way)
    plain = solver_args(small_task, tmp_path / "plain", **changes | {"sample_interval": None})
    sampled = solver_args(small_task, tmp_path / "sampled", **changes)
    assert call_main(plain) == call_main(sampled) == (0, "")
    assert losses(tmp_path / "sampled") == losses(tmp_path / "plain")
    steps = read_samples(tmp_path / "sampled")
    assert [step.step for step in steps] == [5, 10, 12]
    for step in steps:
        assert [sample.prompt for sample in step.samples][2:] == ["<|image|>word80", "word85\nword86\nword87"]
        sizes = [[Image.open(path).size for path in sample.image_paths[:1]] for sample in step.samples]
        assert sizes[0] == [(64, 32)] and sizes[2] == [(32, 32)]
        given = [[Image.open(path).size for path in sample.given_paths] for sample in step.samples]
        assert given == [[], [], [(64, 32)], []], "cropped as the model saw it"
        assert not any("<|image|>" in sample.text for sample in step.samples)
    assert not (tmp_path / "plain" / "samples").exists()
    page = (tmp_path / "sampled" / "report.html").read_text()
    assert "word90 word91" in page and page.count("data:image/png") >= 2
    assert "data:image/png" not in (tmp_path / "plain" / "report.html").read_text()


@pytest.mark.slow
def test_samples_of_two_ranks_are_those_of_the_checkpoint(small_task, folder, tmp_path):
    out = tmp_path / "out"
    flags = sample_flags(folder, 4, max_steps=8, save_iteration_interval=4, dropout=0.1)
    said = train(2, solver_args(small_task, out, **flags))
    assert "samples of step 4 in" in said and "samples of step 8 in" in said
    assert losses(out) == losses_without(small_task, tmp_path / "plain", flags)
    for step, sampled in ((4, read_samples(out)[0]), (8, read_samples(out)[1])):
        solver = FlexARInferenceSolver(
            str(out / f"epoch0-iter{step}"), "fp32", 64, vqgan_dir=folder / "vqgan", device="cpu"
        )
        requests = [{"qas": p.qas, "images": p.images, "size": p.size} for p in load_prompts(folder / "prompts.json")]
        answers = solver.generate_many(requests, 40, 1.0, solver.create_logits_processor())
        assert sampled.step == step
        for sample, (text, images) in zip(sampled.samples, answers, strict=True):
            assert sample.text == text.replace("<|image|>", "").strip()
            assert [Image.open(path).tobytes() for path in sample.image_paths] == [image.tobytes() for image in images]


def sample_with_other_logits(folder: Path) -> None:
    """Run on two ranks: the samples of a sharded model, whose logits rank 1 sees with the other sign."""
    launch = detect_launch()
    parallel = ParallelOptions(precision="fp32", compile=False)
    options = SampleOptions(1, folder / "asked.txt", 1.0, 0.0, 12, vqgan_dir=folder / "none", target_size=64)
    found = []

    def keep(*arguments, **more):
        found.extend(generate_batch(*arguments, **more))
        return found

    with process_group(launch, "cpu", timeout_s=20) as device:
        model = parallelize(make_model(), build_mesh(parallel, "cpu", 2), parallel)
        if not launch.is_main:
            model.lm_head.register_forward_hook(lambda module, args, logits: -logits)
        tokenizer = load_text_tokenizer(folder)
        sampler = Sampler(options, parallel, model.config, tokenizer, device, folder, 0, launch.is_main)
        samples.generate_batch = keep  # what each rank went on with, and not rank 0 alone
        sampler.run(model, 1, print)
        answers = [(generation.tokens, generation.finished) for generation in found]
        (folder / f"rank{launch.rank}.json").write_text(json.dumps(answers))


@pytest.mark.slow
def test_ranks_that_would_draw_differently_go_on_with_the_same_tokens(tmp_path):
    """As where GPUs round differently: ranks of other tokens would wait for one another forever."""
    write_small_tokenizer(tmp_path)
    (tmp_path / "asked.txt").write_text("a cat\nred\nthe car on\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    forked.run([*launcher, __file__, str(tmp_path)], environment(), check=True)
    of_main, of_other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert of_main == of_other and len(of_main) == 3
    codec = RequestCodec(load_text_tokenizer(tmp_path), None, torch.device("cpu"))
    contexts = [codec.encode_request([[text, None]]) for text in ("a cat", "red", "the car on")]
    alone = generate_batch(make_model(), contexts, codec.vocab, GREEDY, 12)
    assert of_main == [[generation.tokens, generation.finished] for generation in alone]


def losses_without(small_task, out, flags) -> dict[int, float]:
    train(2, solver_args(small_task, out, **flags | {"sample_interval": None}))
    return losses(out)


@pytest.mark.slow
def test_a_resumed_run_takes_later_samples_anew(small_task, folder, tmp_path):
    out = tmp_path / "out"
    flags = sample_flags(folder, 3, max_steps=6, save_iteration_interval=4)
    assert call_main(solver_args(small_task, out, **flags)) == (0, "")
    first = {step.step: step.samples for step in read_samples(out)}
    newest = max(out.glob("epoch0-iter*"), key=lambda path: int(path.name.partition("iter")[2]))
    newest.rename(tmp_path / newest.name)
    (out / "samples" / ".writing-step00000006").mkdir()
    write_samples(out, 5, [("a sample of a run that was lost", "", [])])
    flags |= {"max_steps": 7}
    assert call_main(solver_args(small_task, out, **flags)) == (0, "")
    found = {step.step: step.samples for step in read_samples(out)}
    assert sorted(found) == [3, 6, 7] and [found[3], found[6]] == [first[3], first[6]]
    assert not list((out / "samples").glob(".*"))


def test_what_cannot_be_written_does_not_end_the_training(small_task, folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "samples").write_text("no folder")
    assert call_main(solver_args(small_task, out, **sample_flags(folder, 2, max_steps=3)))[0] == 0
    assert "no samples of step 2, training goes on: NotADirectoryError" in capsys.readouterr().out
    assert list(losses(out)) == [1, 2, 3]


@pytest.mark.slow
def test_a_run_that_diverges_ends_with_its_own_message(small_task, folder, tmp_path, capsys):
    """Samples of weights that give no finite logits end nothing: that the steps are skipped does."""
    flags = sample_flags(folder, 2, lr=1e30, clip_grad=0)
    code, message = call_main(solver_args(small_task, tmp_path / "out", **flags))
    assert code == 1 and "5 steps in a row had a gradient that is not finite" in message
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("samples of step 4 in")]
    assert len(lines) == 1 and "answers were cut off at NaN logits" in lines[0]


def test_samples_of_text_need_no_vqgan(small_task, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("word90 word91\n\nword92\n")
    flags = sample_flags(tmp_path, 2, max_steps=2, sample_prompts=prompts, precision="bf16", sample_cfg=1)
    assert call_main(solver_args(small_task, tmp_path / "out", **flags)) == (0, "")
    assert [sample.prompt for sample in read_samples(tmp_path / "out")[0].samples] == ["word90 word91", "word92"]


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        (None, {"sample_prompts": None}, "--sample_interval needs a file of prompts"),
        (None, {"sample_prompts": "absent.json"}, "absent.json"),
        ('["caf\\ud8e9"]', {}, "entry 0 of"),
        ("[", {}, "prompts.json cannot be read"),
        ("[]", {}, "must be a list of prompts that is not empty"),
        ('["a", 3]', {}, "entry 1 of"),
        ('[{"prompt": "a", "cfg": 3}]', {}, "cfg is unknown; it may have prompt, qas"),
        ('[{"prompt": "<|image|>a"}]', {}, "the text has 1 <|image|>, but there are 0 images"),
        ('[{"prompt": "a", "image": "absent.png"}]', {}, "absent.png does not exist"),
        (
            '[{"prompt": "<img>a", "image": "tests/golden/images/color.png"}]',
            {},
            "<img> but no <|image|>: did you mean",
        ),
        ('[{"qas": [["a", null], ["b", null]]}]', {}, "turns must be [question, answer] pairs"),
        ('[{"prompt": "a", "size": "33x32"}]', {}, "the size 33x32 is not possible"),
        ('[{"prompt": "a", "size": "big"}]', {}, "'big' is no size"),
        ('[{"prompt": "a", "size": "64x64"}]', {"sample_max_gen_len": 9}, "has 24 tokens, more than"),
        ('[{"prompt": "a", "size": "64x64"}]', {"vqgan_dir": "absent"}, "--vqgan_dir absent is not a folder"),
        ('["a"]', {"sample_temperature": -1}, "temperature is -1"),
        ('["a"]', {"target_size": 100}, "--target_size"),
        ('["a"]', {"sample_interval": -1}, "--sample_interval must not be negative"),
        ('["a"]', {"mask_image_logits": True}, "--mask_image_logits"),
        (json.dumps([" ".join(["word90"] * 600)]), {}, "leaves no room in the model's 512 positions"),
    ],
)
def test_what_cannot_be_sampled_is_refused_at_the_start(small_task, folder, tmp_path, prompts, changes, message):
    path = tmp_path / "prompts.json"
    path.write_text(prompts or '["a"]')
    flags = sample_flags(folder, 2, sample_prompts=path) | changes
    code, said = call_main(solver_args(small_task, tmp_path / "out", **flags))
    assert code == 2 and message in said and "Traceback" not in said


def test_prompts_in_three_formats(tmp_path):
    picture = tmp_path / "a picture.png"
    Image.new("RGB", (32, 32)).save(picture)
    (tmp_path / "p.yaml").write_text(
        "- a cat\n- {prompt: two of them, images: [a picture.png], size: 64x32}\n- qas: [[a, b], [c, begins]]\n"
    )
    cat = SamplePrompt((("a cat", None),))
    assert load_prompts(tmp_path / "p.yaml") == [
        cat,
        SamplePrompt((("two of them", None),), (picture,), (64, 32)),
        SamplePrompt((("a", "b"), ("c", "begins"))),
    ]
    (tmp_path / "p.txt").write_text("a cat\n")
    (tmp_path / "p.json").write_text('["a cat"]')
    assert load_prompts(tmp_path / "p.txt") == load_prompts(tmp_path / "p.json") == [cat]
    for path in tmp_path.glob("p.*"):  # as editors on Windows save it
        plain = load_prompts(path)
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
        assert load_prompts(path) == plain


def test_later_samples_are_dropped(tmp_path):
    for step in (2, 4, 6):
        write_samples(tmp_path, step, [("a", "b", [])])
    (tmp_path / "samples" / "notes.txt").write_text("mine")
    drop_samples_after(tmp_path, 4)
    assert [step.step for step in read_samples(tmp_path)] == [2, 4]
    assert (tmp_path / "samples" / "notes.txt").exists()
    drop_samples_after(tmp_path / "absent", 4)


if __name__ == "__main__":
    sample_with_other_logits(Path(sys.argv[1]))
