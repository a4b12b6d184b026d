"""The inference solver on a small seeded checkpoint: what goes in, what comes out, and its command."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.image_transform import crop_to_rgb
from inference_solver import CACHE_SHARE, FlexARInferenceSolver, build_parser, choose_device, main, parse_size
from model.generation import CUT_BY_LENGTH, CUT_BY_POSITIONS, SamplingOptions, generate_batch
from model.kv_cache import KVCache
from model.requests import Answer, describe_cuts
from model.vqgan import VQGAN, image_to_pixels, pixels_to_image, save_vqgan
from tests import forked
from tests.decoder_helpers import small_config, small_model, write_small_tokenizer
from tests.small_run import export_hf


def write_folders(root: Path) -> Path:
    """Fills `root` with `tokenizer/`, `checkpoint/` (a decoder of 2 layers, width 64) and `vqgan/`."""
    write_small_tokenizer(root / "tokenizer")
    model = small_model(scale=0.3)
    export_hf(model, model.config, root / "checkpoint", root / "tokenizer")
    torch.manual_seed(0)
    save_vqgan(VQGAN(small_config().vq_config), root / "vqgan", torch.float32)
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint with its tokenizer, and a VQGAN."""
    return write_folders(tmp_path_factory.mktemp("inference"))


@pytest.fixture(scope="module")
def solver(folders):
    return FlexARInferenceSolver(
        str(folders / "checkpoint"), "fp32", target_size=64, vqgan_dir=folders / "vqgan", device="cpu"
    )


def make_picture(width=64, height=32, seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_text_to_image_of_a_given_size(solver):
    text, images = solver.generate([], [["a red cat", None]], 60, 1.0, size=(64, 32), seed=3)
    assert text.startswith("<|image|>") and images[0].size == (64, 32)
    again = solver.generate([], [["a red cat", None]], 60, 1.0, size=(64, 32), seed=3)
    assert again[0] == text and again[1][0].tobytes() == images[0].tobytes()
    other = solver.generate([], [["a red cat", None]], 60, 1.0, size=(64, 32), seed=4)
    assert other[1][0].tobytes() != images[0].tobytes()


def test_decoded_images_are_those_of_the_tokens(solver):
    options = solver.create_logits_processor(cfg=1.0)
    prompt = solver.encode_request([["a cat", None]])
    start = solver.image_start((32, 64))
    generation = generate_batch(solver.model, [prompt], solver.vocab, options, 60, [start])[0]
    span = generation.tokens[: solver.vocab.num_image_tokens(32, 64)]
    codes = torch.from_numpy(solver.vocab.tokens_to_codes(span))[None]
    assert tuple(codes.shape) == (1, 4, 2)
    _, images = solver.generate([], [["a cat", None]], 60, 1.0, options, size=(32, 64))
    assert images[0].tobytes() == pixels_to_image(solver.vqgan.decode(codes)[0]).tobytes()


def test_images_and_turns_become_the_training_layout(solver):
    vocab, encode = solver.vocab, solver.item_processor.text_encode
    first, second = make_picture(), make_picture(32, 64, seed=1)

    def span(picture):
        pixels = image_to_pixels(crop_to_rgb(picture, 64))
        return vocab.image_to_tokens(solver.vqgan.encode(pixels[None])[0].numpy())

    qas = [["<|image|>a cat", "red <|image|>"], ["the car", None]]
    expected = [vocab.bos_id, *span(first), *encode("a cat"), vocab.end_of_turn_id]
    expected += [*encode("red "), *span(second), vocab.end_of_turn_id, *encode("the car"), vocab.end_of_turn_id]
    assert solver.encode_request(qas, [first, second]) == expected
    # without any symbol images come first; an answer that is given is left open
    expected = [vocab.bos_id, *span(first), *encode(" a cat"), vocab.end_of_turn_id, *encode("one")]
    assert solver.encode_request([["a cat", "one"]], first) == expected


def test_many_requests_equal_single_ones(solver):
    requests = [
        {"qas": [["a cat", None]], "size": (32, 32)},
        {"qas": [["<|image|>two", None]], "images": [make_picture()]},
        {"qas": [["red", None]]},
    ]
    many = solver.generate_many(requests, max_gen_len=50, temperature=0.0)
    for request, (text, images) in zip(requests, many, strict=True):
        single = solver.generate_many([request], max_gen_len=50, temperature=0.0)[0]
        assert text == single[0] and len(images) == text.count("<|image|>")
        assert [image.tobytes() for image in images] == [image.tobytes() for image in single[1]]
    assert many[0][1][0].size == (32, 32)


def test_same_seed_same_picture_on_any_batch_size(solver):
    request = {"qas": [["a cat", None]], "size": (64, 32)}
    results = [
        solver.generate_many([request] * 5, 30, 1.0, solver.create_logits_processor(), seed=7, batch_size=batch_size)
        for batch_size in (1, 2, 64)
    ]
    results.append([solver.generate([], request["qas"], 30, 1.0, size=(64, 32), seed=7 + i) for i in range(5)])
    pictures = [[(text, images[0].tobytes()) for text, images in result] for result in results]
    assert pictures[0] == pictures[1] == pictures[2] == pictures[3]
    assert len(set(pictures[0])) == 5


def test_the_model_chooses_when_no_size_is_given(solver):
    """Whatever comes of it: as many symbols as pictures, whole ones, and no token of a picture in the text."""
    options = solver.create_logits_processor(cfg=1.0, text_top_k=1000)
    answers = solver.answer_many([{"qas": [["a cat", None]]}] * 40, 60, options)
    assert any(answer.images for answer in answers) and any(answer.is_image_cut_off for answer in answers)
    sides = {32 * grids for grids in solver.vocab.grid_size_ids}
    for answer in answers:
        assert answer.text.count("<|image|>") == len(answer.images)
        assert all(sides.issuperset(image.size) for image in answer.images)
        assert not any(name in answer.text for name in ("IMGIMG", "racm3", "eoss", "reserved08799"))
        assert answer.is_cut_off or not answer.is_image_cut_off


def test_the_recipe_s_calls(solver):
    """Text to image, then its own picture back in a second turn, two pictures at once, and text alone, as published."""
    processor = solver.create_logits_processor(cfg=4.0, image_top_k=2000)
    assert (processor.cfg, processor.image_top_k, processor.text_top_k) == (4.0, 2000, 10)
    text, drawn = solver.generate(
        images=[], qas=[["a red cat", None]], max_gen_len=30, temperature=1.0, logits_processor=processor, size=(64, 32)
    )
    assert isinstance(text, str) and isinstance(drawn[0], Image.Image)
    turns = [["a red cat", text.split(">")[0] + ">"], ["blue", None]]
    second, pictures = solver.generate(drawn, turns, 30, 1.0, processor, size=(32, 64))
    assert second.startswith("<|image|>") and pictures[0].size == (32, 64)
    # the earlier turns count: another first question, another answer
    turns[0][0] = "one blue car"
    assert solver.generate(drawn, turns, 30, 1.0, processor, size=(32, 64))[1][0].tobytes() != pictures[0].tobytes()
    several = solver.generate([make_picture(), make_picture(seed=1)], [["two", None]], 9, 0.0, processor)
    assert isinstance(several[0], str) and several[1] == []
    assert solver.generate([], [["the car", None]], 9, 0.0)[1] == []


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_every_precision_draws(folders, precision):
    solver = FlexARInferenceSolver(str(folders / "checkpoint"), precision, 64, vqgan_dir=folders / "vqgan")
    assert solver.model.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}[precision]
    FlexARInferenceSolver(str(folders / "checkpoint"), "fp32" if precision == "tf32" else "tf32", 64)  # changes nothing
    assert solver.generate([], [["a cat", None]], 20, 1.0, size=(32, 32))[1][0].size == (32, 32)
    assert torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_a_device_that_is_not_here_is_named(folders, capsys, caplog):
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    assert caplog.messages == ["torch sees no CUDA GPU: generating on the CPU"]
    assert main(command(folders, "--device", "cuda")) == 2
    assert "PyTorch sees no CUDA" in capsys.readouterr().err


def test_an_image_that_is_cut_off_is_reported_and_left_out(solver, caplog):
    options = solver.create_logits_processor(cfg=1.0)
    answer = solver.answer_many([{"qas": [["a cat", None]], "size": (64, 64)}], 10, options)[0]
    assert answer.images == [] and "<|image|>" not in answer.text
    assert answer.is_cut_off and answer.is_image_cut_off
    assert "1 of 1 answers were cut off at max_gen_len=10" in caplog.text


def test_bad_requests_are_named(solver, folders):
    with pytest.raises(ValueError, match="multiples of 32 pixels, from 32 to 128"):
        solver.image_start((100, 64))
    with pytest.raises(ValueError, match="pairs"):
        solver.encode_request([["a", None], ["b", None]])
    with pytest.raises(ValueError, match=r"1 <\|image\|>, but there are 0 images"):
        solver.encode_request([["<|image|>a", None]])
    with pytest.raises(ValueError, match="precision"):
        FlexARInferenceSolver(str(folders / "checkpoint"), "int8")


@pytest.mark.parametrize(
    "call, reason",
    [
        (dict(requests=[{"qas": [["a", None]], "image": ["x.png"]}]), "request 0: a request has 'image'; it must have"),
        (dict(requests=[{"qas": [["a", None]]}, {"prompt": "a"}]), "request 1: a request has 'prompt'"),
        (dict(requests=[{"size": (32, 32)}]), "a request has no 'qas'"),
        (dict(requests=["a cat"]), "a request must be an object"),
        (dict(requests=[{"qas": ["ab"]}]), "pairs of texts"),
        (dict(requests=[{"qas": "ab"}]), "pairs of texts"),
        (dict(requests=[{"qas": [["a", 3]]}]), "pairs of texts"),
        (dict(requests=[{"qas": [["a", None]], "images": [3]}]), r"pictures or paths, got '3' \(int\)"),
        (dict(requests=[{"qas": [["a", None]], "size": (64, 32, 3)}]), "size must be"),
        (dict(requests=[{"qas": [["a", None]], "size": (64.0, 32.0)}]), "size must be"),
        (dict(requests=[{"qas": [["a", None]], "size": "64x32"}]), "size must be"),
        (dict(batch_size=0), "batch_size is 0; it must be a whole number from 1 on"),
        (dict(max_gen_len=0), "max_gen_len is 0; it must be"),
        (dict(max_gen_len=9.5), "max_gen_len is 9.5; it must be"),
        (dict(temperature=1e-39), "temperature is 1e-39; it must be 0"),
        (dict(seed=-1), "seed is -1"),
        (dict(seed=2**63 - 1, requests=[{"qas": [["a", None]]}] * 2), "the seeds go up to"),
        (dict(logits_processor=(1.0, 2000.0)), "top-k is 2000.0"),
    ],
)  # fmt: skip
def test_calls_that_cannot_be_meant_are_refused(solver, call, reason):
    with pytest.raises(ValueError, match=reason):
        if "logits_processor" in call:
            call |= {"logits_processor": solver.create_logits_processor(*call["logits_processor"])}
        solver.generate_many(**(dict(requests=[{"qas": [["a", None]]}], max_gen_len=9, temperature=1.0) | call))


def test_a_size_may_be_a_list_and_turns_too(solver):
    lists, tuples = ({"qas": kind([kind(["a", None])]), "size": kind([64, 32])} for kind in (list, tuple))
    lists, tuples = solver.generate_many([lists, tuples], 30, 0.0)
    assert lists[0] == tuples[0] and [image.size for image in lists[1][:1]] == [(64, 32)]


def test_an_answer_cut_by_the_model_s_positions_says_so(solver, caplog):
    long, most = "a", solver.model.config.max_position_embeddings
    while len(solver.encode_request([[long, None]])) < most - 10:
        long += " a"
    answer = solver.answer_many([{"qas": [[long, None]], "size": (64, 64)}], 8192, SamplingOptions())[0]
    assert answer.cut_by == CUT_BY_POSITIONS and answer.is_image_cut_off
    assert "the end of the model's positions" in caplog.text and "8192" not in caplog.text
    both = [answer, Answer("", [], CUT_BY_LENGTH)]
    assert describe_cuts(both, 9).startswith("1 of 2 answers were cut off at max_gen_len=9 tokens, 1 of 2 answers")


def test_answers_at_a_time_are_those_that_have_room(solver, monkeypatch):
    """Whatever fits, the answers are the same, and the cache is no larger than was counted."""
    sizes, counted = [], KVCache.__init__
    requests = [{"qas": [["a cat", None]], "size": (64, 32)}] * 5
    options = solver.create_logits_processor()
    expected = solver.answer_many(requests, 30, options)

    def count(self, config, num_rows, *args):
        counted(self, config, num_rows, *args)
        sizes.append((num_rows, sum(tensor.nbytes for tensor in (*self.keys, *self.values))))

    monkeypatch.setattr(KVCache, "__init__", count)
    for num_bytes, num_rows in ((1, [2] * 5), (3 << 20, [4, 4, 2]), (100 << 20, [10])):
        monkeypatch.setattr("inference_solver.free_bytes", lambda device, num_bytes=num_bytes: num_bytes)
        sizes.clear()
        found = solver.answer_many(requests, 30, options)
        assert [answer.text for answer in found] == [answer.text for answer in expected]
        assert [rows for rows, _ in sizes] == num_rows
        assert num_bytes == 1 or all(nbytes <= CACHE_SHARE * num_bytes for _, nbytes in sizes)


def write_long_checkpoint(folders: Path, folder: Path) -> None:
    """The checkpoint with 65,536 positions."""
    shutil.copytree(folders / "checkpoint", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 65536}))


@pytest.mark.slow
def test_ctrl_c_ends_a_generation_with_one_line(folders, tmp_path):
    write_long_checkpoint(folders, tmp_path / "long")
    extra = ["--model_path", str(tmp_path / "long"), "--max_gen_len", "65000", "--out", str(tmp_path / "out.png")]
    arguments = [sys.executable, "inference_solver.py", *command(folders, *extra)]
    process = forked.Popen(arguments, os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        process.wait_for_output("tokens/s", process.stderr)  # it is under way
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and out == ""
    assert error.splitlines()[-1] == "inference_solver.py: interrupted" and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["long"]


@pytest.mark.slow
def test_too_little_memory_is_one_message(folders, tmp_path):
    """A process whose memory ends: a cache that the kernel refuses."""
    write_long_checkpoint(folders, tmp_path / "long")
    script = (
        "import re, resource, sys, torch, inference_solver as command\n"
        "plain = command.fit_batch_size\n"
        "torch.set_num_threads(1)\n"
        "def fit(*args):\n"  # what is free may be gone a moment later
        "    used = 1024 * int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), -1))\n"
        "    return plain(*args)\n"
        "command.fit_batch_size = fit\n"
        "sys.exit(command.main(sys.argv[1:]))"
    )
    extra = ["--max_gen_len", "65536", "--model_path", str(tmp_path / "long")]
    done = forked.run([sys.executable, "-c", script, *command(folders, *extra)], os.environ)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "too little memory" in done.stderr and "make --max_gen_len (65536), --size or" in done.stderr


def command(folders, *extra) -> list[str]:
    return [
        *("--model_path", str(folders / "checkpoint"), "--vqgan_dir", str(folders / "vqgan")),
        *("--prompt", "a cat", "--device", "cpu", "--precision", "fp32", "--target_size", "64", *extra),
    ]


def test_command_writes_a_picture(folders, solver, tmp_path, capsys):
    """Image to image: what is written is what the solver gives for the seed; without its folder, the tokenizer too."""
    make_picture().save(tmp_path / "in.png")
    out_path = tmp_path / "out.png"
    extra = ["--image", str(tmp_path / "in.png"), "--size", "64x32", "--max_gen_len", "60", "--out", str(out_path)]
    assert main(command(folders, *extra, "--seed", "5", "--tokenizer", str(folders / "tokenizer"))) == 0
    text, images = solver.generate([make_picture()], [["a cat", None]], 60, 1.0, size=(64, 32), seed=5)
    with Image.open(out_path) as written:
        assert written.size == (64, 32) and written.tobytes() == images[0].tobytes()
    shown = capsys.readouterr()
    assert shown.out == f"{text}\n" and "tokens/s" in shown.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.png", "out.png"] + [
        f"out-{number}.png" for number in range(2, len(images) + 1)
    ]


def test_command_answers_in_text(folders, solver, tmp_path, capsys):
    """Text alone, and two pictures to text."""
    options = ["--temperature", "0", "--max_gen_len", "9"]
    assert main(command(folders, *options)) == 0
    assert capsys.readouterr().out == solver.generate([], [["a cat", None]], 9, 0.0)[0] + "\n"
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(paths):
        make_picture(seed=number).save(path)
    prompt = "<|image|>a cat <|image|>two"
    assert main(command(folders, *options, "--prompt", prompt, "--image", *map(str, paths))) == 0
    assert capsys.readouterr().out == solver.generate(paths, [[prompt, None]], 9, 0.0)[0] + "\n"


def test_pictures_may_be_given_one_flag_each():
    arguments = ["--model_path", "m", "--image", "a.png", "--image", "b.png", "c.png"]
    assert build_parser().parse_args(arguments).image == [Path("a.png"), Path("b.png"), Path("c.png")]
    assert build_parser().parse_args(arguments[:2]).image == []


def test_a_checkpoint_of_nan_draws_nothing_and_says_so(folders, tmp_path, capsys, caplog):
    model = small_model()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    export_hf(model, model.config, tmp_path / "nan", folders / "tokenizer")
    extra = ["--model_path", str(tmp_path / "nan"), "--max_gen_len", "60"]
    drawing = ["--size", "64x32", "--out", str(tmp_path / "out.png")]
    for flags in ([*extra, *drawing], [*extra, *drawing, "--temperature", "0"], extra):
        caplog.clear()
        assert main(command(folders, *flags)) == 3
        assert "1 of 1 answers were cut off at logits that are no numbers" in caplog.text
        shown = capsys.readouterr()
        assert shown.out == "\n" and ("--precision" in shown.err) == ("--out" in flags)
    assert [path.name for path in tmp_path.iterdir()] == ["nan"]


def test_command_says_why_there_is_no_picture(folders, tmp_path, capsys):
    out_path = tmp_path / "out.png"
    assert main(command(folders, "--size", "64x32", "--max_gen_len", "9", "--out", str(out_path))) == 3
    error = capsys.readouterr().err
    assert "no whole picture" in error and "give a larger --max_gen_len" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--out", "no/such/folder/out.png"], "does not exist"),
        (["--out", "out.jpg"], "must end in .png"),
        (["--out", "tests"], "is a folder"),
        (["--target_size", "100"], "--target_size: the target size must be a positive multiple of 32 pixels"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--cfg", "inf"], "cfg is inf"),
        (["--out", "/proc/out.png"], "--out /proc/out.png: nothing can be written into /proc"),
        (["--image", "absent.png"], "absent.png does not exist"),
        (["--image", "tests"], "--image: image tests cannot be read: it is a folder"),
        (["--image", "/dev/zero"], "image /dev/zero cannot be read: it is no regular file"),
        (["--image", "tests/golden/images/v_truncated.jpg"], "v_truncated.jpg cannot be read"),
        (
            ["--prompt", "<image>a", "--image", "tests/golden/images/chelsea.png"],
            "<image> but no <|image|>: did you mean",
        ),
        (["--cfg", "1e300"], "cfg is 1e+300; it must be a number from -1000000 to 1000000"),
        (["--image", "pyproject.toml"], "image pyproject.toml cannot be read: Pillow knows no such image format"),
        (["--prompt", "<|image|>what"], "--prompt, --image: the text has 1 <|image|>, but there are 0 images"),
        (["--prompt", "caf\udce9"], "the text 'caf\\udce9' is not valid UTF-8"),
        (["--seed", "-1"], "seed is -1; it must be a whole number from 0"),
        (["--serve"], "--prompt is asked for on the page"),
        (["--serve", "--port", "70000"], "--port is 70000"),
        (["--size", "32x32"], "--out"),
        (["--temperature", "-1", "--max_gen_len", "0"], "temperature"),
        (["--tokenizer", "absent/folder/x"], "absent/folder/x"),
        (["--model_path", "absent/folder/x"], "absent/folder/x"),
        (["--size", "33x32", "--out", "out.png"], "33x32"),
    ],
)
def test_command_refuses_with_one_message(folders, capsys, extra, message):
    assert main(command(folders, *extra)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_checkpoint_is_refused_by_name(folders, tmp_path, capsys, name):
    shutil.copytree(folders / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / name).write_text("{")
    assert main(command(folders, "--model_path", str(tmp_path / "checkpoint"))) == 2
    assert str(tmp_path / "checkpoint") in capsys.readouterr().err


def test_vqgan_is_checked_before_anything_is_drawn(folders, tmp_path, capsys):
    shutil.copytree(folders / "vqgan", tmp_path / "vqgan")
    (tmp_path / "vqgan" / "model.safetensors").write_bytes(b"torn")
    extra = ["--vqgan_dir", str(tmp_path / "vqgan"), "--size", "64x64", "--out", str(tmp_path / "out.png")]
    assert main(command(folders, *extra)) == 2
    error = capsys.readouterr().err
    assert "model.safetensors" in error and "tokens in" not in error
    save_vqgan(VQGAN(small_config().vq_config, with_decoder=False), tmp_path / "vqgan", torch.float32)
    assert main(command(folders, *extra)) == 2
    assert "has no decoder" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_tokenizer_of_another_model_is_refused(folders, tmp_path, capsys):
    from data.item_processor import load_text_tokenizer

    tokenizer = load_text_tokenizer(folders / "tokenizer")
    tokenizer.add_tokens([f"more{number}" for number in range(100)])
    tokenizer.save_pretrained(tmp_path)
    assert main(command(folders, "--tokenizer", str(tmp_path))) == 2
    assert "do not belong together" in capsys.readouterr().err


def test_sizes_are_width_by_height():
    assert parse_size("768x512") == (768, 512)
    for bad in ("768", "0x32", "axb", "²x32"):
        with pytest.raises(ValueError, match="is no size; write width x height"):
            parse_size(bad)
        with pytest.raises(SystemExit):
            build_parser().parse_args(["--model_path", "m", "--prompt", "p", "--size", bad])


def test_without_a_prompt_nothing_starts(capsys):
    assert main(["--model_path", "absent/folder/x"]) == 2
    assert "--prompt is missing" in capsys.readouterr().err
