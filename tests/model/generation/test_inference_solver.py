"""The inference solver on a small seeded checkpoint: what goes in, what comes out, and its command."""

import shutil
import signal
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from data.items.image_transform import crop_to_rgb
from data.items.item_processor import load_text_tokenizer
from inference_solver import FlexARInferenceSolver, build_parser, find_problems, main
from model.generation.kv_cache import KVCache
from model.generation.loop import CUT_BY_LENGTH, CUT_BY_POSITIONS, generate_batch
from model.generation.requests import Answer, describe_cuts, parse_size
from model.generation.sampling import SamplingOptions
from model.generation.solver import CACHE_SHARE, choose_device, choose_layer_devices
from model.vqgan.vqgan import VQGAN, image_to_pixels, pixels_to_image, save_vqgan
from tests.helpers.decoder_helpers import small_config, small_model
from tests.helpers.small_run import export_hf


def make_request_image(width=64, height=32, seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def command(folders, *extra) -> list[str]:
    return [
        *("--model_path", str(folders / "checkpoint"), "--vqgan_dir", str(folders / "vqgan")),
        *("--prompt", "a cat", "--device", "cpu", "--precision", "fp32", "--target_size", "64", *map(str, extra)),
    ]


def test_decoded_images_are_those_of_the_tokens(solver):
    options = solver.create_logits_processor(cfg=1.0)
    prompt, start = solver.encode_request([["a cat", None]]), solver.image_start((32, 64))
    generation = generate_batch(solver.model, [prompt], solver.vocab, options, 60, [start])[0]
    span = generation.tokens[: solver.vocab.num_image_tokens(32, 64)]
    codes = torch.from_numpy(solver.vocab.tokens_to_codes(span))[None]
    assert tuple(codes.shape) == (1, 4, 2)
    text, images = solver.generate([], [["a cat", None]], 60, 1.0, options, size=(32, 64))
    assert text.startswith("<|image|>")
    assert images[0].tobytes() == pixels_to_image(solver.vqgan.decode(codes)[0]).tobytes()


def test_images_and_turns_become_the_training_layout(solver):
    vocab, encode = solver.vocab, solver.item_processor.text_encode
    first, second = make_request_image(), make_request_image(32, 64, seed=1)

    def span(image):
        pixels = image_to_pixels(crop_to_rgb(image, 64))
        return vocab.image_to_tokens(solver.vqgan.encode(pixels[None])[0].numpy())

    qas = [["<|image|>a cat", "red <|image|>"], ["the car", None]]
    expected = [vocab.bos_id, *span(first), *encode("a cat"), vocab.end_of_turn_id]
    expected += [*encode("red "), *span(second), vocab.end_of_turn_id, *encode("the car"), vocab.end_of_turn_id]
    assert solver.encode_request(qas, [first, second]) == expected
    # Without any symbol images come first; an answer that is given is left open.
    expected = [vocab.bos_id, *span(first), *encode(" a cat"), vocab.end_of_turn_id, *encode("one")]
    assert solver.encode_request([["a cat", "one"]], first) == expected


def test_many_requests_equal_single_ones_on_any_batch_size(solver):
    requests = [
        {"qas": [["a cat", None]], "size": [64, 32]},
        {"qas": ([["<|image|>two", None]]), "images": [make_request_image()]},
        {"qas": (("red", None),)},
        *[{"qas": [["a cat", None]], "size": (64, 32)}] * 2,
    ]
    options = solver.create_logits_processor()
    for many in (solver.generate_many(requests, 50, 1.0, options, seed=7, batch_size=size) for size in (2, 64)):
        for index, (request, (text, images)) in enumerate(zip(requests, many, strict=True)):
            more = {"size": request.get("size"), "seed": 7 + index}
            single = solver.generate(request.get("images", []), request["qas"], 50, 1.0, options, **more)
            assert text == single[0] and len(images) == text.count("<|image|>")
            assert [image.tobytes() for image in images] == [image.tobytes() for image in single[1]]
        drawn = [many[index][1][0] for index in (0, 3, 4)]
        assert drawn[0].size == (64, 32) and len({image.tobytes() for image in drawn}) == 3


def test_the_model_chooses_when_no_size_is_given(solver):
    """Any answer has as many symbols as images, complete ones, and no token of an image in the text."""
    options = solver.create_logits_processor(cfg=1.0, text_top_k=1000)
    answers = solver.answer_many([{"qas": [["a cat", None]]}] * 40, 60, options)
    assert any(answer.images for answer in answers) and any(answer.is_image_cut_off for answer in answers)
    sides = {32 * grids for grids in solver.vocab.grid_size_ids}
    for answer in answers:
        assert answer.text.count("<|image|>") == len(answer.images)
        assert all(sides.issuperset(image.size) for image in answer.images)
        assert not any(name in answer.text for name in ("IMGIMG", "racm3", "eoss", "reserved08799"))
        assert answer.cut_by or not answer.is_image_cut_off


def test_the_recipe_s_calls(solver):
    """Text to image, then its own image back in a second turn, two images at once, and text alone, as published."""
    processor = solver.create_logits_processor(cfg=4.0, image_top_k=2000)
    assert (processor.cfg, processor.image_top_k, processor.text_top_k) == (4.0, 2000, 10)
    text, drawn = solver.generate(
        images=[], qas=[["a red cat", None]], max_gen_len=30, temperature=1.0, logits_processor=processor, size=(64, 32)
    )
    assert isinstance(text, str) and drawn[0].size == (64, 32)
    turns = [["a red cat", text.split(">")[0] + ">"], ["blue", None]]
    second, images = solver.generate(drawn, turns, 30, 1.0, processor, size=(32, 64))
    assert second.startswith("<|image|>") and images[0].size == (32, 64)
    # The earlier turns count: another first question, another answer.
    turns[0][0] = "one blue car"
    assert solver.generate(drawn, turns, 30, 1.0, processor, size=(32, 64))[1][0].tobytes() != images[0].tobytes()
    several = solver.generate([make_request_image(), make_request_image(seed=1)], [["two", None]], 9, 0.0, processor)
    assert isinstance(several[0], str) and several[1] == []


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_every_precision_draws(folders, precision):
    solver = FlexARInferenceSolver(str(folders / "checkpoint"), precision, 64, vqgan_dir=folders / "vqgan")
    assert solver.model.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}[precision]
    # A setting of the process is restored.
    torch.backends.cuda.matmul.allow_tf32 = precision != "tf32"
    assert solver.generate([], [["a cat", None]], 20, 1.0, size=(32, 32))[1][0].size == (32, 32)
    assert torch.backends.cuda.matmul.allow_tf32 == (precision != "tf32")


def test_layers_on_several_devices_draw_the_same(folders, solver, monkeypatch):
    """The CPU in the place of two GPUs; only the movements between them are not tested."""
    cpus = [torch.device("cpu"), torch.device("cpu", 0)]
    monkeypatch.setattr("model.generation.solver.choose_layer_devices", lambda *args: cpus)
    flags = {"target_size": 64, "vqgan_dir": folders / "vqgan", "device": "cpu"}
    spread = FlexARInferenceSolver(str(folders / "checkpoint"), "fp32", **flags)
    assert spread.forward.layer_devices == cpus
    assert all(layer._forward_pre_hooks for layer in (*spread.model.model.layers, spread.model.model.norm))
    requests = [{"qas": [["a cat", None]], "size": (64, 32)}, {"qas": [["red", None]]}]
    options = solver.create_logits_processor()
    found, expected = (each.answer_many(requests, 30, options) for each in (spread, solver))
    assert [answer.text for answer in found] == [answer.text for answer in expected]
    # Products may depend on where in memory their factors lie.
    difference = np.asarray(found[0].images[0]).astype(int) - np.asarray(expected[0].images[0])
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("free, num_gpus, num", [(1 << 30, 2, 1), (1 << 10, 2, 2), (1 << 10, 1, 1)])
def test_layers_are_spread_where_one_gpu_is_too_small(monkeypatch, free, num_gpus, num):
    monkeypatch.setattr("model.generation.solver.free_bytes", lambda device: free)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert len(choose_layer_devices(small_config(), torch.bfloat16, torch.device("cuda"))) == num


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_a_device_that_is_not_here_is_named(caplog):
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    assert caplog.messages == ["torch sees no CUDA GPU: generating on the CPU"]
    with pytest.raises(ValueError, match="PyTorch sees no CUDA"):
        choose_device("cuda")


@pytest.mark.parametrize(
    "request_, reason",
    [
        ({"qas": [["a", None]], "image": ["x.png"]}, "it has 'qas', 'image'; it must have qas"),
        ({"size": (32, 32)}, "it has 'size'; it must have qas"),
        ({"qas": ["ab"]}, "pairs of texts"),
        ({"qas": [["a", 3]]}, "pairs of texts"),
        ({"qas": [["a", None], ["b", None]]}, "pairs of texts"),
        ({"qas": [["<|image|>a", None]]}, r"1 <\|image\|>, but there are 0 images"),
        ({"qas": [["a", None]], "images": "absent.png"}, "absent.png does not exist"),
        ({"qas": [["a", None]], "size": (100, 64)}, "multiples of 32 pixels, from 32 to 128"),
    ],
)
def test_bad_requests_are_named(solver, request_, reason):
    with pytest.raises(ValueError, match=reason):
        solver.generate_many([request_], 9, 1.0)
    if "size" not in request_:
        with pytest.raises(ValueError, match="^request 1: .*" + reason):
            solver.generate_many([{"qas": [["a", None]]}, request_], 9, 1.0)


def test_cuts_are_described(solver, caplog):
    options, request = SamplingOptions(), {"qas": [["a cat", None]], "size": (64, 64)}
    short = solver.answer_many([request], 10, options)[0]
    assert (short.text, short.images) == ("", []) and short.cut_by == CUT_BY_LENGTH and short.is_image_cut_off
    assert "1 of 1 answers were cut off at max_gen_len=10" in caplog.text
    caplog.clear()
    # A word is one token.
    request["qas"] = [["a " * (solver.model.config.max_position_embeddings - 20), None]]
    long = solver.answer_many([request], 8192, options)[0]
    assert long.cut_by == CUT_BY_POSITIONS and long.is_image_cut_off
    assert "the end of the model's positions" in caplog.text and "8192" not in caplog.text
    both = describe_cuts([long, Answer("", [], CUT_BY_LENGTH)], 9)
    assert both.startswith("1 of 2 answers were cut off at max_gen_len=9 tokens, 1 of 2 answers")


def test_answers_at_a_time_are_those_that_have_room(solver, monkeypatch):
    """The answers do not depend on what fits, and the cache is no larger than was counted."""
    requests = [{"qas": [["a cat", None]], "size": (64, 32)}] * 5
    options = solver.create_logits_processor()
    expected = solver.answer_many(requests, 30, options)
    monkeypatch.setattr("model.generation.solver.DECODING_BYTES", 0)
    for num_bytes, num_branches in ((1, 2), (3 << 20, 4)):
        solver.forward.kept_batch = None
        monkeypatch.setattr("model.generation.solver.free_bytes", lambda device, num_bytes=num_bytes: num_bytes)
        found = solver.answer_many(requests, 30, options)
        assert [answer.text for answer in found] == [answer.text for answer in expected]
        cache = solver.forward.kept_batch.cache
        assert len(cache.keys[0]) == num_branches and (num_bytes == 1 or cache.nbytes <= CACHE_SHARE * num_bytes)

    def fail(*arguments, **more):
        raise torch.OutOfMemoryError

    # The next try gets the memory of the cache.
    monkeypatch.setattr("model.generation.solver.generate_batch", fail)
    with pytest.raises(torch.OutOfMemoryError):
        solver.answer_many(requests, 30, options)
    assert solver.forward.kept_batch is None


def test_too_little_memory_is_one_message(folders, monkeypatch, capsys):
    monkeypatch.setattr(KVCache, "allocate", lambda *args: torch.empty(1 << 60))
    assert main(command(folders, "--max_gen_len", "300")) == 2
    error = capsys.readouterr().err
    assert "too little memory" in error and "make --max_gen_len (300), --size or" in error


def test_ctrl_c_ends_a_generation_with_one_line(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "model.generation.solver.generate_batch", lambda *args, **more: signal.raise_signal(signal.SIGINT)
    )
    assert main(command(folders, "--out", tmp_path / "out.png")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "inference_solver.py: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_command_writes_an_image(folders, solver, tmp_path, capsys):
    """Image to image: what is written is what the solver gives for the seed; also by a tokenizer of its own folder."""
    make_request_image().save(tmp_path / "in.png")
    out_path = tmp_path / "out.png"
    extra = ["--image", tmp_path / "in.png", "--size", "64x32", "--max_gen_len", "60", "--out", out_path]
    assert main(command(folders, *extra, "--seed", "5", "--tokenizer", folders / "tokenizer")) == 0
    text, images = solver.generate([make_request_image()], [["a cat", None]], 60, 1.0, size=(64, 32), seed=5)
    with Image.open(out_path) as written:
        assert written.size == (64, 32) and written.tobytes() == images[0].tobytes()
    shown = capsys.readouterr()
    assert shown.out == f"{text}\n" and "tokens/s" in shown.err
    more = [f"out-{number}.png" for number in range(2, len(images) + 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.png", *more, "out.png"]


def test_command_answers_in_text(folders, solver, tmp_path, capsys):
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(paths):
        make_request_image(seed=number).save(path)
    prompt = "<|image|>a cat <|image|>two"
    extra = ["--temperature", "0", "--max_gen_len", "9", "--prompt", prompt, "--image", paths[0], "--image", paths[1]]
    assert main(command(folders, *extra)) == 0
    assert capsys.readouterr().out == solver.generate(paths, [[prompt, None]], 9, 0.0)[0] + "\n"


def test_a_checkpoint_of_nan_draws_nothing_and_says_so(folders, tmp_path, capsys, caplog):
    model = small_model()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    export_hf(model, model.config, tmp_path / "nan", folders / "tokenizer")
    for flags in (["--size", "64x32", "--out", tmp_path / "out.png"], ["--temperature", "0"]):
        caplog.clear()
        assert main(command(folders, "--model_path", tmp_path / "nan", "--max_gen_len", "60", *flags)) == 3
        assert "1 of 1 answers were cut off at NaN logits: the weights are damaged" in caplog.text
        shown = capsys.readouterr()
        assert shown.out == "\n" and ("no complete image" in shown.err) == ("--out" in flags)
    assert [path.name for path in tmp_path.iterdir()] == ["nan"]


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--out", "no/such/folder/out.png"], "is not there or cannot be written"),
        (["--out", "out.jpg"], "must be a file that ends in .png"),
        (["--target_size", "100"], "--target_size: the target size must be a positive multiple of 32 pixels"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--image", "tests/golden/images/v_truncated.jpg"], "--image: image tests/golden/images/v_truncated.jpg"),
        (["--prompt", "<image>a", "--image", "tests/golden/images/chelsea.png"], "<image> but no <|image|>: did you"),
        (["--prompt", "<|image|>what"], "--prompt, --image: the text has 1 <|image|>, but there are 0 images"),
        (["--prompt", "caf\udce9"], "the text 'caf\\udce9' is not valid UTF-8"),
        (["--serve"], "--prompt is asked for on the page"),
        (["--size", "²x32", "--out", "a.png"], "--size: '²x32' is no size; write width x height"),
        (["--max_gen_len", "0"], "--max_gen_len is 0"),
        (["--vqgan_dir", "absent/a/b/c", "--out", "a.png"], "absent/a/b/c"),
        (["--size", "32x32"], "--size draws an image: add --out FILE.png"),
        (["--num_images", "4"], "--num_images is for --prompts, which is not given"),
    ],
)
def test_arguments_are_checked_before_the_model_is_loaded(folders, extra, message):
    problems, _ = find_problems(build_parser().parse_args(command(folders, *extra)))
    assert len(problems) == 1 and message in problems[0]


def test_the_command_shows_all_problems_at_once(capsys):
    assert main(["--model_path", "absent/folder/x", "--cfg", "inf", "--max_gen_len", "0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "cfg is inf" in lines[0] and "--prompt is missing" in lines[2]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_checkpoint_is_named(folders, tmp_path, capsys, name):
    shutil.copytree(folders / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / name).write_text("{")
    assert main(command(folders, "--model_path", tmp_path / "checkpoint")) == 2
    assert str(tmp_path / "checkpoint") in capsys.readouterr().err


def test_the_vqgan_is_checked_before_anything_is_drawn(folders, tmp_path, capsys):
    save_vqgan(VQGAN(small_config().vq_config, with_decoder=False), tmp_path / "vqgan", torch.float32)
    extra = ["--vqgan_dir", tmp_path / "vqgan", "--size", "64x64", "--out", tmp_path / "out.png"]
    assert main(command(folders, *extra)) == 2
    error = capsys.readouterr().err
    assert "has no decoder" in error and "tokens in" not in error and not (tmp_path / "out.png").exists()


def test_a_tokenizer_of_another_model_is_rejected(folders, tmp_path, capsys):
    tokenizer = load_text_tokenizer(folders / "tokenizer")
    tokenizer.add_tokens([f"more{number}" for number in range(100)])
    tokenizer.save_pretrained(tmp_path)
    assert main(command(folders, "--tokenizer", tmp_path)) == 2
    assert "do not belong together" in capsys.readouterr().err


def test_sizes_are_width_by_height():
    assert parse_size("768x512") == (768, 512)
    for bad in ("768", "0x32", "axb"):
        with pytest.raises(ValueError, match="is no size; write width x height"):
            parse_size(bad)


def test_buffers_are_kept_between_calls_and_go_with_the_solver(folders, monkeypatch):
    solver = FlexARInferenceSolver(str(folders / "checkpoint"), "fp32", 64, vqgan_dir=folders / "vqgan", device="cpu")
    kept = []
    for prompt in ("a cat", "two red cat", "a"):
        solver.generate([], [[prompt, None]], 30, 1.0, size=(64, 32))
        kept.append(weakref.ref(solver.forward.kept_batch.cache.layers[0]))
    # The second prompt is longer.
    assert [data() is not None for data in kept] == [False, True, True] and kept[1]() is kept[2]()
    # Little memory is left to decode images: the cache makes room.
    monkeypatch.setattr("model.generation.solver.free_bytes", lambda device: 1 << 30)
    solver.generate([], [["a", None]], 30, 1.0, size=(64, 32))
    assert solver.forward.kept_batch is None and kept[2]() is None
    monkeypatch.undo()
    solver.generate([make_request_image()], [["a", None]], 30, 1.0, size=(64, 32))
    left = weakref.ref(solver.forward.kept_batch.cache.layers[0])
    del solver
    assert left() is None
