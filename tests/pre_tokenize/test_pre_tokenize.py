"""The pre-tokenizing worker and the merging on real files: what they write, what they reject, with which exit code."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from data.formats.manifest import Manifest
from data.formats.record import read_record
from data.formats.token_file import load_token_file
from data.items.vocab import ChameleonVocab
from model.vqgan.image_encoder import ImageEncoder
from model.vqgan.vqgan import load_vqgan
from pre_tokenize.concat_record import main as concat
from pre_tokenize.options import build_parser, parse_options
from pre_tokenize.out_folder import settle_manifest
from pre_tokenize.pre_tokenize import main as pre_tokenize
from pre_tokenize.worker_log import WorkerLog, read_failed
from tests.helpers.tokenize_helpers import snapshot, write_items, write_tiny_tokenizer, write_tiny_vqgan

SCRIPT = "pre_tokenize/pre_tokenize.py"
NUM_ITEMS, BAD = 30, (4, 17)
MANIFEST = Manifest("a", "b", 100, 64, "center", None, 2, 10, "c")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder of the session with tokenizer, VQGAN and an input of 30 items, two of which name a missing image."""
    folder = tmp_path_factory.getbasetemp() / "token_task"
    if not folder.exists():
        write_tiny_tokenizer(folder / "tokenizer")
        write_tiny_vqgan(folder / "vqgan")
        write_items(folder, NUM_ITEMS, BAD)
    return folder


def arguments(task, out_dir, *flags: str, **changes) -> list[str]:
    options = {
        "splits": 1, "rank": 0, "in_filename": task / "in.json", "out_dir": out_dir, "target_size": 64,
        "tokenizer": task / "tokenizer", "vqgan_dir": task / "vqgan", "device": "cpu", "precision": "fp32",
        "batch_size": 2, "num_workers": 0, **changes,
    }  # fmt: skip
    return [*(f"--{name}={value}" for name, value in options.items()), *flags]


@pytest.fixture(scope="module")
def undisturbed(task):
    """Content of the output folder of one worker that nothing disturbed."""
    if not (task / "undisturbed").exists():
        assert pre_tokenize(arguments(task, task / "undisturbed")) == 3
    return snapshot(task / "undisturbed")


def test_two_workers_give_one_record_in_input_order(task, tmp_path, undisturbed):
    out = tmp_path / "out"
    assert [pre_tokenize(arguments(task, out, splits=2, rank=rank)) for rank in (1, 0)] == [3, 3]
    assert concat([f"--sub_record_dir={out}", f"--save_path={out}/record.json"]) == 0
    entries = list(read_record(out / "record.json"))
    assert [entry.id for entry in entries] == [i for i in range(NUM_ITEMS) if i not in BAD]
    vocab = ChameleonVocab.from_tokenizer(write_tiny_tokenizer(tmp_path / "tokenizer"))
    for entry in entries:
        item = load_token_file(entry.file)
        assert (len(item.token), item.id) == (entry.len, entry.id)
        (span,) = vocab.find_images(item.token)
        assert entry.image_len == span[1] - span[0]
    rejected = [json.loads(line) for line in (out / "0-of-2-failed.jsonl").read_text().splitlines()]
    assert rejected[0]["id"] == 4 and "img/4.png does not exist" in rejected[0]["reason"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["num_items"], manifest["splits"], manifest["target_size"]) == (NUM_ITEMS, 2, 64)
    assert len(manifest["tokenizer_sha256"]) == len(manifest["vqgan_sha256"]) == 64


@pytest.mark.parametrize("max_failures, code", [(1, 3), (2, 0)])
def test_a_second_run_changes_nothing_and_says_so(task, undisturbed, capsys, max_failures, code):
    before = {path: path.stat().st_mtime_ns for path in (task / "undisturbed").rglob("*")}
    assert pre_tokenize(arguments(task, task / "undisturbed", "--overwrite", max_failures=max_failures)) == code
    assert "nothing to do, all 30 items are done already (28 tokenized, 2 rejected" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (task / "undisturbed").rglob("*")}


@pytest.mark.slow
def test_jsonl_and_any_number_of_loaders_give_the_same_tokens(task, tmp_path, undisturbed):
    items = json.loads((task / "in.json").read_text())
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({**item, "id": "mine"}) + "\n" for item in items))
    changes = {"in_filename": tmp_path / "in.jsonl", "num_workers": 2, "image_root": task}
    assert pre_tokenize(arguments(task, tmp_path / "out", **changes)) == 3
    ours = snapshot(tmp_path / "out")
    assert ours.keys() == undisturbed.keys()
    # The manifest has another hash, and the reasons name other folders.
    for name in undisturbed:
        if name.startswith("files") or name.endswith("record.jsonl"):
            assert ours[name] == undisturbed[name], name


def test_a_worker_without_items_ends_with_zero(task, tmp_path):
    (task / "one.json").write_text(json.dumps(json.loads((task / "in.json").read_text())[:1]))
    assert pre_tokenize(arguments(task, tmp_path, in_filename=task / "one.json", splits=2, rank=0)) == 0
    assert not (tmp_path / "0-of-2-record.jsonl").read_bytes()


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"conversations": [}]', "not valid JSON at line 1, column 21"),
        ("", "holds no items"),
        ('[{"conversations": []}, {"prompt": "a"}]', "1 of 2 items .*first item 1: .*`conversations`.*`prompt`"),
        ("[1, 2]", "2 of 2 items .*must be an object"),
    ],
)
def test_bad_input_is_one_message_and_nothing_written(task, tmp_path, capsys, content, message):
    (tmp_path / "in.json").write_text(content)
    assert pre_tokenize(arguments(task, tmp_path / "out", in_filename=tmp_path / "in.json")) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err), captured.err
    assert captured.err.count("\n") == 1 and not captured.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, messages",
    [
        ({"target_size": 2048}, ["size tokens up to"]),
        ({"tokenizer": "."}, ["has no tokenizer.json"]),
        (
            {"rank": 3, "target_size": 100, "in_filename": "gone", "vqgan_dir": "nowhere", "image_root": "missing"},
            ["--rank 3 --splits 1", "multiple of 32 pixels, got 100", "gone is not a file", "--vqgan_dir nowhere"]
            + ["--image_root missing"],
        ),
        ({"batch_size": 0, "max_seq_len": 0}, ["--batch_size must be at least 1", "--max_seq_len must be at least 1"]),
    ],
)
def test_bad_arguments_are_one_message_and_nothing_written(task, tmp_path, capsys, changes, messages):
    assert pre_tokenize(arguments(task, tmp_path / "out", **changes)) == 2
    error = capsys.readouterr().err
    assert all(message in error for message in messages), error
    assert not (tmp_path / "out").exists()


def test_longer_items_are_rejected_with_the_length_they_need(task, tmp_path, undisturbed):
    lengths = {entry.id: entry.len for entry in read_record(task / "undisturbed" / "0-of-1-record.jsonl")}
    limit = sorted(lengths.values())[len(lengths) // 2]
    assert limit < max(lengths.values())
    assert pre_tokenize(arguments(task, tmp_path, max_seq_len=limit)) == 3
    kept = {entry.id: entry.len for entry in read_record(tmp_path / "0-of-1-record.jsonl")}
    assert kept == {item_id: length for item_id, length in lengths.items() if length <= limit}
    reasons = dict(read_failed(tmp_path / "0-of-1-failed.jsonl"))
    for item_id in lengths.keys() - kept.keys():
        assert reasons[item_id] == f"it needs {lengths[item_id]} tokens, --max_seq_len is {limit}"


def test_the_same_rank_twice_is_rejected(tmp_path):
    with WorkerLog(tmp_path, 0, 1, 0, 5), pytest.raises(ValueError, match="a worker is running on .*0-of-1-record"):
        WorkerLog(tmp_path, 0, 1, 0, 5)


def test_manifests_are_settled_once_and_compared(tmp_path):
    for _ in range(2):
        with settle_manifest(tmp_path, MANIFEST):
            assert os.listdir(tmp_path) == ["manifest.json"]
    other = replace(MANIFEST, crop="random", seed=3)
    with (
        pytest.raises(ValueError, match="crop was center, is now random; seed was None, is now 3.*another --out_dir"),
        settle_manifest(tmp_path, other),
    ):
        pass


def test_a_field_that_the_manifest_of_an_older_folder_lacks_is_not_compared(tmp_path):
    older = {key: value for key, value in vars(MANIFEST).items() if key != "max_seq_len"}
    (tmp_path / "manifest.json").write_text(json.dumps(older))
    with settle_manifest(tmp_path, replace(MANIFEST, max_seq_len=77)):
        pass
    assert json.loads((tmp_path / "manifest.json").read_text()) == older


def test_the_recipes_command_is_understood(task, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = f"--splits=8 --rank=0 --in_filename {task}/in.json --out_dir out --target_size 768 --vqgan_dir {task}/vqgan"
    options = parse_options(build_parser().parse_args(argv.split()))
    assert (options.splits, options.crop, options.precision, options.target_size) == (8, "center", None, 768)
    assert (options.device, options.num_workers) == ("cpu", 2)
    assert capsys.readouterr().out == "torch sees no CUDA GPU: images are encoded on the CPU\n"
    assert pre_tokenize([*argv.split(), "--device=cuda"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--device cuda: no CUDA device is visible" in line


@pytest.mark.gpu
def test_a_compiled_encoder_gives_the_same_codes_with_few_graphs(task):
    images = [
        Image.effect_noise(size, 90).convert("RGB") for size in ((64, 64), (96, 32), (32, 96), (64, 64), (128, 32))
    ]
    plain, compiled = (
        ImageEncoder(load_vqgan(task / "vqgan", device="cuda"), "fp32", batch_size=2, compile=compile)
        for compile in (False, True)
    )
    torch._dynamo.utils.counters.clear()
    assert all((a == b).mean() > 0.95 for a, b in zip(plain(images), compiled(images), strict=True))
    # Not one graph for each size.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
