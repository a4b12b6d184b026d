"""The pre-tokenizing worker and the merging on real files: started, killed, started again, misused."""

import json
import os
import re
import signal
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

from data.manifest import Manifest, settle_manifest
from data.record import read_record
from data.token_file import load_token_file
from data.vocab import ChameleonVocab
from data.worker_log import WorkerLog, read_failed
from model.vqgan import load_vqgan
from pre_tokenize.concat_record import main as concat
from pre_tokenize.image_encoder import ImageEncoder
from pre_tokenize.options import build_parser, default_batch_size, parse_options
from pre_tokenize.pre_tokenize import main as pre_tokenize
from tests import forked
from tests.tokenize_helpers import (
    command,
    environment,
    snapshot,
    write_items,
    write_tiny_tokenizer,
    write_tiny_vqgan,
)

SCRIPT = "pre_tokenize/pre_tokenize.py"
NUM_ITEMS, BAD = 30, (4, 17)


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
        "batch_size": 2, **changes,
    }  # fmt: skip
    return [*(f"--{name}={value}" for name, value in options.items()), *flags]


@pytest.fixture(scope="module")
def undisturbed(task):
    """Content of the output folder of one worker that nothing disturbed."""
    if not (task / "undisturbed").exists():
        assert pre_tokenize(arguments(task, task / "undisturbed")) == 3
    return snapshot(task / "undisturbed")


def test_two_workers_give_one_record_in_input_order(task, tmp_path):
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
    refused = [json.loads(line) for line in (out / "0-of-2-failed.jsonl").read_text().splitlines()]
    assert refused[0]["id"] == 4 and "img/4.png does not exist" in refused[0]["reason"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["num_items"], manifest["splits"], manifest["target_size"]) == (NUM_ITEMS, 2, 64)
    assert len(manifest["tokenizer_sha256"]) == len(manifest["vqgan_sha256"]) == 64


def test_a_second_run_changes_nothing_and_says_so(task, undisturbed, capsys):
    before = {path: path.stat().st_mtime_ns for path in (task / "undisturbed").rglob("*")}
    assert pre_tokenize(arguments(task, task / "undisturbed")) == 3
    assert "nothing to do, all 30 items are done already (28 tokenized, 2 refused" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (task / "undisturbed").rglob("*")}


@pytest.mark.slow
def test_a_killed_worker_goes_on_where_it_was(task, tmp_path, undisturbed):
    out = tmp_path / "out"
    worker = forked.Popen(command(SCRIPT, *arguments(task, out, num_workers=1)), environment())
    record = out / "0-of-1-record.jsonl"
    while worker.poll() is None and (not record.exists() or record.read_bytes().count(b"\n") < 11):
        time.sleep(0.002)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert pre_tokenize(arguments(task, out)) == 3
    assert snapshot(out) == undisturbed


@pytest.mark.parametrize(
    "damage",
    [
        *("torn_record", "lost_failed_line", "lost_token_file"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("torn_failed", "half_token_file_beside", "lost_logs")
        ),
    ],
)
def test_whatever_was_interrupted_is_repaired(task, tmp_path, undisturbed, damage):
    for name, content in undisturbed.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    record, failed = tmp_path / "0-of-1-record.jsonl", tmp_path / "0-of-1-failed.jsonl"
    if damage == "torn_record":
        record.write_bytes(record.read_bytes()[:-9])
    elif damage == "torn_failed":
        failed.write_bytes(failed.read_bytes()[:-9])
    elif damage == "lost_failed_line":  # the record went on without it, as after a power cut
        failed.write_bytes(b"")
    elif damage == "lost_token_file":
        (tmp_path / "files" / "9.pkl").unlink()
    elif damage == "half_token_file_beside":
        (tmp_path / "files" / "9.pkl").rename(tmp_path / "files" / "9.pkl.partial")
    else:
        record.unlink()
        failed.unlink()
    assert pre_tokenize(arguments(task, tmp_path)) == 3
    assert snapshot(tmp_path) == undisturbed


def test_jsonl_and_any_number_of_loaders_give_the_same_tokens(task, tmp_path, undisturbed):
    items = json.loads((task / "in.json").read_text())
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({**item, "id": "mine"}) + "\n" for item in items))
    changes = {"in_filename": tmp_path / "in.jsonl", "num_workers": 0, "image_root": task}
    assert pre_tokenize(arguments(task, tmp_path / "out", **changes)) == 3
    ours = snapshot(tmp_path / "out")
    assert ours.keys() == undisturbed.keys()
    for name in undisturbed:  # the manifest has another hash, and the reasons name other folders
        if name.startswith("files") or name.endswith("record.jsonl"):
            assert ours[name] == undisturbed[name], name


def test_all_good_ends_with_zero(task, tmp_path):
    items = [item for i, item in enumerate(json.loads((task / "in.json").read_text())) if i not in BAD][:3]
    (task / "good.json").write_text(json.dumps(items))
    assert pre_tokenize(arguments(task, tmp_path, in_filename=task / "good.json", splits=5, rank=0)) == 0  # empty share
    assert pre_tokenize(arguments(task, tmp_path, in_filename=task / "good.json", splits=5, rank=4)) == 0
    assert not (tmp_path / "0-of-5-record.jsonl").read_bytes()


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"conversations": [}]', "not valid JSON at line 1, column 21"),
        ("hello", "not valid JSON at line 1"),
        ("[]", "holds no items"),
        ("", "holds no items"),
        (
            '[{"conversations": []}, {"prompt": "a"}]',
            "1 of 2 items .*first item 1: .*must have `conversations`.*`prompt`",
        ),
        ("[1, 2]", "2 of 2 items .*must be an object"),
        (None, "does not exist"),
    ],
)
def test_bad_input_is_one_message_and_nothing_written(task, tmp_path, capsys, content, message):
    path = tmp_path / "in.json"
    if content is not None:
        path.write_text(content)
    assert pre_tokenize(arguments(task, tmp_path / "out", in_filename=path)) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err), captured.err
    assert captured.err.count("\n") == 1 and not captured.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rank": 1}, "--rank 1 --splits 1"),
        ({"target_size": 100}, "multiple of 32 pixels, got 100"),
        ({"target_size": 2048}, "size tokens up to"),
        ({"vqgan_dir": "nowhere"}, "--vqgan_dir nowhere is not a folder"),
        ({"tokenizer": "."}, "has no tokenizer.json"),
        ({"batch_size": 0}, "--batch_size must be at least 1"),
        ({"image_root": "nowhere"}, "--image_root nowhere"),
        ({"max_seq_len": 0}, "--max_seq_len must be at least 1, got 0"),
        ({"max_failures": -1}, "--max_failures must be at least 0, got -1"),
    ],
)
def test_bad_arguments_are_one_message_and_nothing_written(task, tmp_path, capsys, changes, message):
    assert pre_tokenize(arguments(task, tmp_path / "out", **changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_problems_with_the_arguments_are_told_at_once(task, tmp_path, capsys):
    assert pre_tokenize(arguments(task, tmp_path / "out", rank=3, target_size=7, in_filename="gone")) == 2
    message = capsys.readouterr().err
    assert "--rank" in message and "--target_size" in message and "gone" in message
    with pytest.raises(SystemExit) as caught:
        pre_tokenize([*arguments(task, tmp_path / "out"), "--no_such_option"])
    assert caught.value.code == 2


@pytest.mark.parametrize("max_failures, code", [(0, 3), (1, 3), (2, 0)])
def test_max_failures_are_tolerated(task, undisturbed, max_failures, code):
    assert pre_tokenize(arguments(task, task / "undisturbed", max_failures=max_failures)) == code


def test_longer_items_are_refused_with_the_length_they_need(task, tmp_path, undisturbed):
    lengths = {entry.id: entry.len for entry in read_record(task / "undisturbed" / "0-of-1-record.jsonl")}
    limit = sorted(lengths.values())[len(lengths) // 2]
    assert limit < max(lengths.values())
    assert pre_tokenize(arguments(task, tmp_path, max_seq_len=limit)) == 3
    kept = {entry.id: entry.len for entry in read_record(tmp_path / "0-of-1-record.jsonl")}
    assert kept == {item_id: length for item_id, length in lengths.items() if length <= limit}
    reasons = dict(read_failed(tmp_path / "0-of-1-failed.jsonl"))
    for item_id in lengths.keys() - kept.keys():
        assert reasons[item_id] == f"it needs {lengths[item_id]} tokens, --max_seq_len is {limit}"
    for item_id in kept:  # not cut: the same tokens as without a limit
        assert (tmp_path / f"files/{item_id}.pkl").read_bytes() == undisturbed[f"files/{item_id}.pkl"]


def test_a_folder_begun_with_other_settings_is_refused(task, undisturbed, capsys):
    assert pre_tokenize(arguments(task, task / "undisturbed", target_size=96)) == 2
    message = capsys.readouterr().err
    assert "target_size was 64, is now 96" in message and "another --out_dir" in message
    assert snapshot(task / "undisturbed") == undisturbed


def test_the_same_rank_twice_is_refused(tmp_path):
    with WorkerLog(tmp_path, 0, 1, 0, 5), pytest.raises(ValueError, match="another worker is running as --rank 0"):
        WorkerLog(tmp_path, 0, 1, 0, 5)


def test_manifests_are_settled_once_and_compared(tmp_path):
    manifest = Manifest("a", "b", 100, 64, "center", None, 2, 10, "c")
    for _ in range(2):
        with settle_manifest(tmp_path, manifest):
            assert os.listdir(tmp_path) == ["manifest.json"]
    with (
        pytest.raises(ValueError, match="crop was center, is now random; seed was None, is now 3"),
        settle_manifest(tmp_path, Manifest("a", "b", 100, 64, "random", 3, 2, 10, "c")),
    ):
        pass


def test_a_field_that_the_manifest_of_an_older_folder_lacks_is_not_compared(tmp_path):
    manifest = Manifest("a", "b", 100, 64, "center", None, 2, 10, "c")
    older = {key: value for key, value in vars(manifest).items() if key != "max_seq_len"}
    (tmp_path / "manifest.json").write_text(json.dumps(older))
    with settle_manifest(tmp_path, replace(manifest, max_seq_len=77)):
        pass
    assert json.loads((tmp_path / "manifest.json").read_text()) == older


def test_the_recipes_command_is_understood(task):
    argv = [
        "--splits=8",
        "--rank=0",
        "--in_filename",
        str(task / "in.json"),
        "--out_dir",
        "out",
        "--target_size",
        "768",
    ]
    options = parse_options(build_parser().parse_args([*argv, "--vqgan_dir", str(task / "vqgan"), "--device", "cpu"]))
    assert (options.splits, options.crop, options.precision, options.target_size) == (8, "center", "tf32", 768)
    assert [default_batch_size(size, "cpu") for size in (64, 256, 512, 768)] == [16, 4, 1, 1]


def test_without_a_gpu_images_are_encoded_on_the_cpu_and_a_line_says_so(task, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as CUDA_VISIBLE_DEVICES= does
    argv = ["--in_filename", str(task / "in.json"), "--out_dir", "out", "--vqgan_dir", str(task / "vqgan")]
    assert parse_options(build_parser().parse_args(argv)).device == "cpu"
    assert capsys.readouterr().out == "torch sees no CUDA GPU: images are encoded on the CPU\n"


@pytest.mark.slow
def test_merging_refuses_what_is_not_whole(task, tmp_path, capsys):
    out = tmp_path / "out"

    def refusal(folder=out) -> str:
        assert concat([f"--sub_record_dir={folder}", f"--save_path={out}/record.json"]) == 2
        assert not (out / "record.json").exists()
        return capsys.readouterr().err

    assert "is not a folder" in refusal()
    out.mkdir()
    assert "has no sub-record" in refusal()
    pre_tokenize(arguments(task, out, splits=2, rank=0))
    assert "lacks the sub-records of --rank 1 of --splits 2" in refusal()
    pre_tokenize(arguments(task, out, splits=2, rank=1))
    record = out / "1-of-2-record.jsonl"
    whole = record.read_text()
    record.write_text(whole[: whole.rindex("{")])
    assert "30 items, but 27 are tokenized and 2 refused: a worker has not finished" in refusal()
    record.write_text(whole + whole.splitlines()[0] + "\n")
    assert "id 15 occurs twice" in refusal()
    record.write_text(whole[:-5])
    assert "not valid JSON at line" in refusal()
    record.write_text(whole)
    (out / "files" / "20.pkl").rename(out / "files" / "gone")
    assert "20.pkl of id 20 does not exist" in refusal()
    (out / "files" / "gone").rename(out / "files" / "20.pkl")
    (out / "0-of-3-record.jsonl").touch()
    assert "mixes sub-records of --splits 2, 3" in refusal()


def test_merging_prints_totals_and_works_into_another_folder(task, tmp_path, undisturbed, capsys):
    assert concat([f"--sub_record_dir={task / 'undisturbed'}", f"--save_path={tmp_path}/deep/record.json"]) == 0
    printed = capsys.readouterr().out
    assert "28 items" in printed and "2 items refused" in printed and "p50" in printed
    assert all(os.path.exists(entry.file) for entry in read_record(tmp_path / "deep" / "record.json"))


def test_sub_records_of_the_old_recipe_are_merged(tmp_path):
    """Absolute files, no manifest, no list of refused items."""
    for rank in (0, 1):
        (tmp_path / f"{rank}.pkl").touch()
        entry = {"file": str(tmp_path / f"{rank}.pkl"), "len": 3, "id": rank}
        (tmp_path / f"{rank}-of-2-record.jsonl").write_text(json.dumps(entry) + "\n")
    assert concat([f"--sub_record_dir={tmp_path}", f"--save_path={tmp_path}/record.json"]) == 0
    assert [entry.file for entry in read_record(tmp_path / "record.json")] == [f"{tmp_path}/0.pkl", f"{tmp_path}/1.pkl"]


def test_nothing_tokenized_is_an_error(tmp_path, capsys):
    (tmp_path / "0-of-1-record.jsonl").touch()
    (tmp_path / "0-of-1-failed.jsonl").write_text('{"id": 0, "reason": "bad"}\n')
    assert concat([f"--sub_record_dir={tmp_path}", f"--save_path={tmp_path}/record.json"]) == 2
    assert "no item was tokenized, all 1 were refused" in capsys.readouterr().err


@pytest.mark.slow
def test_a_compiled_encoder_gives_the_same_codes_with_few_graphs(task, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # spares half a minute of C++
    pictures = [
        Image.effect_noise(size, 90).convert("RGB") for size in ((64, 64), (96, 32), (32, 96), (64, 64), (128, 32))
    ]
    plain = ImageEncoder(load_vqgan(task / "vqgan"), "fp32", batch_size=2)(pictures)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = ImageEncoder(load_vqgan(task / "vqgan"), "fp32", batch_size=2, compile=True)(pictures)
    assert all((a == b).mean() > 0.95 for a, b in zip(plain, compiled, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4  # not one for each size
