"""`inference_solver.py --prompts`: the folders that benchmarks read, resuming, ranks, and what cannot be drawn."""

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inference_solver import build_parser, find_problems, folder_settings, main
from model.generation.answer_folder import AnswerFolder, draw_missing
from model.generation.prompt_files import read_prompts
from model.generation.requests import RequestCodec
from model.generation.sampling import SamplingOptions
from model.vqgan.vqgan import VQGAN, save_vqgan
from tests.helpers import forked
from tests.helpers.decoder_helpers import small_config, small_model
from tests.helpers.small_run import export_hf
from tests.helpers.tokenize_helpers import environment
from tests.model.generation.test_inference_solver import make_request_image

LINES = [
    '{"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cat"}',
    '{"prompt": "a red car", "size": "64x96"}',
    '{"prompt": "blue", "seed": 5}',
]


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(LINES))
    return path


def flags(folders, prompts, out_dir, *extra) -> list[str]:
    return [
        *("--model_path", str(folders / "checkpoint"), "--vqgan_dir", str(folders / "vqgan"), "--device", "cpu"),
        *("--precision", "fp32", "--target_size", "64", "--prompts", str(prompts), "--out_dir", str(out_dir)),
        *("--num_images", "4", "--size", "64x64", "--cfg", "2", *map(str, extra)),
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_image(path: Path, image: Image.Image | np.ndarray) -> bool:
    """Equal up to rounding: products may depend on where in memory their factors lie."""
    difference = np.asarray(Image.open(path)).astype(int) - np.asarray(image)
    return np.abs(difference).max() <= 1


def same_files(folder: Path, other: Path) -> bool:
    names = files(folder).keys()
    return names == files(other).keys() and all(
        same_image(folder / name, Image.open(other / name))
        if name.endswith(".png")
        else (folder / name).read_bytes() == (other / name).read_bytes()
        for name in names
    )


def read_as_geneval(folder: Path) -> dict[str, list[Path]]:
    """Prompts and images by GenEval's rules: folders named by digits, one JSON object, names that begin as a PNG's."""
    found = {}
    for sub in (path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()):
        metadata = json.loads((sub / "metadata.jsonl").read_text())
        found[metadata["prompt"]] = [p for p in sorted((sub / "samples").iterdir()) if re.match(r"\d+\.png", p.name)]
    return found


def test_geneval_reads_the_folder(folders, prompts, tmp_path, capsys, solver):
    out_dir = tmp_path / "out" / "images"
    assert main(flags(folders, prompts, out_dir)) == 0
    found = read_as_geneval(out_dir)
    assert list(map(len, found.values())) == [4, 4, 4] and found.keys() == {"two cat", "a red car", "blue"}
    assert (out_dir / "00000" / "metadata.jsonl").read_text() == LINES[0] + "\n"
    sizes = {prompt: {Image.open(path).size for path in paths} for prompt, paths in found.items()}
    assert sizes == {"two cat": {(64, 64)}, "a red car": {(64, 96)}, "blue": {(64, 64)}}
    assert len(set(files(out_dir).values())) == 15
    assert sorted(path.name for path in out_dir.parent.iterdir()) == ["images", "images.run.json", "index.html"]
    assert f"The answers are in {out_dir}. Look at {out_dir.parent}/index.html" in capsys.readouterr().out
    # A line's own seed is that of its first image, as on the command line.
    text = "Generate an image of 64x64 according to the following prompt:\nblue"
    options = solver.create_logits_processor(cfg=2.0)
    for number in range(4):
        _, images = solver.generate([], [[text, None]], 60, 1.0, options, size=(64, 64), seed=5 + number)
        assert same_image(found["blue"][number], images[0])


def test_a_second_run_draws_what_is_missing(folders, prompts, tmp_path, monkeypatch):
    out_dir, drawn = tmp_path / "images", []
    assert main(flags(folders, prompts, out_dir)) == 0
    shutil.copytree(out_dir, tmp_path / "copy")
    (out_dir / "00001" / "samples" / "0002.png").unlink()
    shutil.rmtree(out_dir / "00002")
    plain = AnswerFolder.keep
    monkeypatch.setattr(AnswerFolder, "keep", lambda self, *which: drawn.append(which[:2]) or plain(self, *which))
    assert main(flags(folders, prompts, out_dir)) == 0
    assert drawn == [(1, 2), (2, 0), (2, 1), (2, 2), (2, 3)] and same_files(out_dir, tmp_path / "copy")
    # With nothing to draw no model is loaded.
    monkeypatch.setattr("inference_solver.build_solver", None)
    assert main(flags(folders, prompts, out_dir)) == 0


@pytest.mark.slow
def test_ranks_and_a_kill_draw_the_same_images(folders, prompts, tmp_path):
    """Two ranks, killed by SIGKILL while they write, against one process; a rank has more answers than a batch."""
    prompts.write_text("\n".join([*LINES, *[json.dumps({"prompt": "a car " * n}) for n in range(1, 31)]]))
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert main(flags(folders, prompts, alone, "--size", "32x32")) == 0
    command = ["python", "-m", "torch.distributed.run", "--nproc_per_node=2", "inference_solver.py"]
    command += flags(folders, prompts, shared, "--size", "32x32")
    process, deadline = forked.Popen(command, environment(), start_new_session=True), time.monotonic() + 120
    while not list(shared.rglob("*.png")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    assert process.wait(60) != 0
    images = list(shared.rglob("*.png"))
    for path in images:
        assert same_image(path, Image.open(alone / path.relative_to(shared)))
    assert all((folder / "metadata.jsonl").read_text().endswith("}\n") for folder in shared.iterdir())
    assert {path.suffix for path in shared.rglob("*") if path.is_file()} == {".png", ".jsonl"}
    assert 1 <= len(images) < 132
    done = forked.run(command, environment())
    assert done.returncode == 0, done.stderr
    assert same_files(shared, alone) and not (tmp_path / ".shared.partial").exists()
    assert done.stdout.count("The answers are in") == 1


def test_dpg_bench_gets_squares_of_four_and_nothing_else(folders, tmp_path):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for name, text in (("partiprompts1", "a red car"), ("12", "two cat")):
        (prompts / f"{name}.txt").write_text(text)
    single, squares, ones = tmp_path / "single", tmp_path / "squares", tmp_path / "ones"
    assert main(flags(folders, prompts, single)) == 0
    assert main(flags(folders, prompts, squares, "--layout", "dpg")) == 0
    assert main(flags(folders, prompts, ones, "--layout", "dpg", "--num_images", 1)) == 0
    for place, name in enumerate(("12", "partiprompts1")):
        parts = [np.asarray(Image.open(single / f"{place:05}" / "samples" / f"{n:04}.png")) for n in range(4)]
        rows = [np.concatenate(parts[first : first + 2], axis=1) for first in (0, 2)]
        assert same_image(squares / f"{name}.png", np.concatenate(rows))
        assert same_image(ones / f"{name}.png", parts[0])
    for folder in (squares, ones):
        assert sorted(path.name for path in folder.iterdir()) == ["12.png", "partiprompts1.png"]


def test_images_in_texts_out(folders, tmp_path, solver):
    lines = []
    for number in range(3):
        make_request_image(seed=number).save(tmp_path / f"{number}.png")
        lines.append({"prompt": "a cat", "image": f"{number}.png", "id": f"c{number}"})
    prompts = tmp_path / "captions.jsonl"
    prompts.write_text("\n".join(map(json.dumps, lines)))
    out_dir, more = tmp_path / "out", ["--layout", "text", "--temperature", "0", "--max_gen_len", "9"]
    arguments = [flag for flag in flags(folders, prompts, out_dir, "--num_images", 1, *more)]
    size = arguments.index("--size")
    assert main(arguments[:size] + arguments[size + 2 :]) == 0
    options = solver.create_logits_processor(cfg=2.0)
    texts = [solver.generate(tmp_path / f"{n}.png", [["a cat", None]], 9, 0.0, options)[0] for n in range(3)]
    answers = [json.loads(line) for line in (out_dir / "answers.jsonl").read_text().splitlines()]
    assert answers == [{**line, "place": n, "number": 0, "text": texts[n]} for n, line in enumerate(lines)]


def test_images_within_texts_are_not_decoded(folders, tmp_path, monkeypatch):
    prompts, out_dir = tmp_path / "captions.txt", tmp_path / "out"
    prompts.write_text("a cat")
    more = ["--layout", "text", "--num_images", "40", "--text_top_k", "1000", "--cfg", "1", "--max_gen_len", "60"]
    monkeypatch.setattr(RequestCodec, "vqgan", None)
    assert main(flags(folders, prompts, out_dir, *more, "--size", "")) == 0
    assert "<|image|>" in (out_dir / "answers.jsonl").read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        (["--seed", "1"], "seed was 0 and is 1"),
        (["--temperature", "0.5"], "temperature was 1.0 and is 0.5"),
        (["--size", "64x32"], "the text of prompt 0 was"),
        (["--no_prompt_template"], "the text of prompt 0 was"),
        (["--num_images", "2"], "num_images was 4 and is 2"),
        ("prompt", "the text of prompt 2 was 'Generate an image of 64x64"),
        ("line", "there were 3 prompts and are 4"),
        ("tag", "the line of prompt 0 was"),
        ("vqgan", "vqgan was "),
        ("checkpoint", "checkpoint was "),
        ("no run.json", "is not empty, but there is no"),
        ("damaged run.json", "images.run.json is damaged"),
        ("lock", "another run writes there"),
    ],
)
def test_answers_to_something_else_are_one_error(folders, prompts, tmp_path, capsys, monkeypatch, change, message):
    out_dir = tmp_path / "images"
    folder = AnswerFolder(out_dir, "geneval", read_prompts(prompts, (64, 64), has_template=True), 4)
    args = build_parser().parse_args(flags(folders, prompts, out_dir))
    folder.open(folder_settings(args, folder))
    folder.finish()
    (out_dir / "00000").mkdir()
    before, extra = files(tmp_path), change if isinstance(change, list) else []
    if change == "prompt":
        prompts.write_text("\n".join([*LINES[:2], '{"prompt": "red", "seed": 5}']))
    elif change == "line":
        prompts.write_text("\n".join([*LINES, '{"prompt": "red"}']))
    elif change == "checkpoint":
        export_hf(small_model(scale=0.2), small_model().config, tmp_path / "other", folders / "tokenizer")
        extra = ["--model_path", tmp_path / "other"]
    elif change == "tag":
        prompts.write_text("\n".join([LINES[0].replace("counting", "colors"), *LINES[1:]]))
    elif change == "vqgan":
        torch.manual_seed(1)
        save_vqgan(VQGAN(small_config().vq_config), tmp_path / "vqgan", torch.float32)
        extra = ["--vqgan_dir", tmp_path / "vqgan"]
    elif change == "no run.json":
        (tmp_path / "images.run.json").unlink()
    elif change == "damaged run.json":
        (tmp_path / "images.run.json").write_text("{}")
    elif change == "lock":
        monkeypatch.setattr("model.generation.answer_folder.LOCK_PATIENCE_S", 0)
        folder.open(folder_settings(args, folder))
    assert main(flags(folders, prompts, out_dir, *extra)) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and ("Give another folder" in error) == (change != "lock")
    assert "run.json" in change or (files(tmp_path)["images.run.json"] == before["images.run.json"])


def test_what_one_prompt_cannot_do_is_reported_and_the_others_are_drawn(folders, prompts, tmp_path, capsys):
    (tmp_path / "broken.png").write_text("no image")
    bad = [{"prompt": "a", "image": "broken.png"}, {"prompt": "b", "size": "640x640"}, {"prompt": "cat " * 600}]
    prompts.write_text("\n".join([LINES[0], *map(json.dumps, bad), LINES[2]]))
    out_dir = tmp_path / "images"
    assert main(flags(folders, prompts, out_dir)) == 3
    shown = capsys.readouterr()
    assert [place.name for place in sorted(out_dir.iterdir())] == ["00000", "00004"]
    for place, reason in (
        (1, "cannot be read"),
        (2, "640x640 is not possible"),
        (3, "leave no room in the model's 512"),
    ):
        lines = [line for line in shown.err.splitlines() if line.startswith(f"prompt {place}, ")]
        assert len(lines) == 1 and reason in lines[0]
    assert "; 12 are missing, the same command tries them again" in shown.out
    page = (tmp_path / "index.html").read_text()
    assert page.count("missing: 4") == 3 and "8 answers" in page and "12 answers are missing" in page
    # An answer without an image, here for want of tokens.
    assert main(flags(folders, prompts, tmp_path / "short", "--max_gen_len", "10")) == 3
    assert "prompt 0, " in (error := capsys.readouterr().err) and "cut off by max_gen_len" in error


def test_batches_shrink_where_memory_is_short(prompts, tmp_path, solver, monkeypatch, capsys):
    """Also at a prompt that does not even fit alone, which is reported."""
    folder = AnswerFolder(tmp_path / "images", "geneval", read_prompts(prompts, (64, 64), has_template=True), 4)
    folder.open({})
    plain, sizes = type(solver).answer_prompts, []

    def answer(self, tokens, *arguments, **more):
        sizes.append(len(tokens))
        if len(tokens) > 3:
            raise torch.OutOfMemoryError("too little memory: none")
        return plain(self, tokens, *arguments, **more)

    monkeypatch.setattr(type(solver), "answer_prompts", answer)
    draw_missing(solver, folder, folder.missing(), SamplingOptions(), 60)
    assert sizes == [12, 6, 3, 6, 3, 6, 3, 3] and folder.missing() == []


def test_the_share_of_a_rank_is_fixed(prompts, tmp_path):
    folder = AnswerFolder(tmp_path / "images", "geneval", read_prompts(prompts, None, has_template=True), 2)
    assert folder.missing(0, 2) == [(0, 0), (0, 1), (2, 0), (2, 1)] and folder.missing(1, 2) == [(1, 0), (1, 1)]
    folder.path(0, 1).parent.mkdir(parents=True)
    folder.path(0, 1).touch()
    assert folder.missing(0, 2) == [(0, 0), (2, 0), (2, 1)]


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--layout", "dpg", "--num_images", "3"], "--num_images is 3; it must be 1 or 4 with --layout dpg"),
        (["--num_images", "0"], "--num_images is 0; it must be at least 1"),
        (["--layout", "dpg", "--size", "64x32"], "prompt 0 has the size (64, 32); --layout dpg needs squares"),
        (["--layout", "text"], "prompt 0 has a size, which draws an image"),
        (["--prompts", "absent.jsonl"], "--prompts: [Errno 2] No such file or directory: 'absent.jsonl'"),
        (["--prompt", "a"], "--prompt is not for --prompts"),
        (["--serve"], "--prompts is asked for on the page"),
        (["--size", "big"], "--size: 'big' is no size"),
        (["--out_dir", "/proc"], "--out_dir /proc is a mount point"),
        (["--layout", "text", "--size", "", "--vqgan_dir", "absent/a/b"], "absent/a/b"),
        ("keys", "prompt 0 has the key 'text', which is the answer's"),
        ("a" * 201, "which cannot be the name of a file"),
        ("../a", "prompt 0 has the id '../a', which cannot be the name of a file"),
        ("b", "two prompts have the id 'b'"),
    ],
)
def test_arguments_are_checked_before_the_model_is_loaded(folders, prompts, tmp_path, extra, message):
    if isinstance(extra, str):
        lines = [{"prompt": "a", "id": extra, "text": ""}, {"prompt": "b", "id": "b"}]
        prompts.write_text("\n".join(map(json.dumps, lines)))
        extra = ["--layout", "text", "--size", ""] if extra == "keys" else ["--layout", "dpg"]
    if "absent/a/b" in extra:
        prompts.write_text('{"prompt": "a", "image": "cat.png"}')
    prompts.with_name("cat.png").touch()
    problems, _ = find_problems(build_parser().parse_args(flags(folders, prompts, tmp_path / "out", *extra)))
    assert sum(message in problem for problem in problems) == 1


def test_an_unknown_layout_and_a_missing_folder_are_named(prompts, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--model_path", "absent", "--prompts", str(prompts), "--layout", "coco"])
    assert ended.value.code == 2 and "'coco' (choose from" in capsys.readouterr().err
    assert main(["--model_path", "absent", "--prompts", str(prompts), "--vqgan_dir", "exps/tiny/vqgan"]) == 2
    assert "--prompts needs --out_dir" in capsys.readouterr().err


def test_the_page_shows_every_prompt_and_keeps_other_pages(folders, prompts, tmp_path):
    prompts.write_text(json.dumps({"prompt": "<b>a cat</b>"}))
    (tmp_path / "index.html").write_text("my own page")
    assert main(flags(folders, prompts, tmp_path / "my images", "--num_images", "2")) == 0
    assert (tmp_path / "index.html").read_text() == "my own page"
    page = (tmp_path / "my images.html").read_text()
    assert "&lt;b&gt;a cat&lt;/b&gt;" in page and page.count("<a href=") == 2
    assert 'src="my%20images/00000/samples/0001.png"' in page
