"""Inputs and disks on which a worker does not end as it should: one line says why, and how to begin again."""

import json
import resource
from contextlib import contextmanager

import pytest
from PIL import Image

from data import item_processor
from data.worker_log import read_failed
from pre_tokenize import pre_tokenize as script
from pre_tokenize.concat_record import main as concat
from pre_tokenize.pre_tokenize import main as pre_tokenize
from tests.test_pre_tokenize import arguments, task, undisturbed  # noqa: F401  (fixtures)
from tests.tokenize_helpers import snapshot

LLAVA = {
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}],
    "image": "a.png",
}
OPENAI = {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


def write(folder, items: list) -> dict:
    """An input and its image. Returns what `arguments` has to change for it."""
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    (folder / "in.json").write_text(json.dumps(items))
    return {"in_filename": folder / "in.json", "num_workers": 0}


@pytest.mark.parametrize(
    "items, reason",
    [
        ([OPENAI] * 3, "turn 0 must be an object with `from` and `value`, .* did you mean `from` for `role`"),
        ([LLAVA] * 3, r"the text has <image> but no <\|image\|>: did you mean"),
        ([{**LLAVA, "images": [f"{i}.png"]} for i in range(3)], "`images` is not read: did you mean `image`"),
        ([{**LLAVA, "image": f"{name}.png"} for name in "bcd"], "the text has <image>"),
    ],
)
def test_items_rejected_for_one_reason_end_with_it_and_with_how_to_begin_again(task, tmp_path, capsys, items, reason):  # noqa: F811
    assert pre_tokenize(arguments(task, tmp_path / "out", **write(tmp_path, items))) == 3
    last = capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(
        AssertionError, match=f"3 of 3 rejected items have one reason: {reason}.*--retry_failed.*--over"
    ):
        raise AssertionError(last)


def test_images_that_are_all_missing_are_one_reason(task, tmp_path, capsys):  # noqa: F811
    items = [{**LLAVA, "conversations": task_turns(task), "image": f"{name}.png"} for name in ("one", "two", "three")]
    changes = write(tmp_path, items)
    assert pre_tokenize(arguments(task, tmp_path / "out", **changes)) == 3
    assert "3 of 3 rejected items have one reason: image one.png does not exist" in capsys.readouterr().out
    for name in ("one", "two", "three"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    assert pre_tokenize([*arguments(task, tmp_path / "out", **changes), "--retry_failed"]) == 0  # what was said helps


def task_turns(folder) -> list[dict]:
    return json.loads((folder / "in.json").read_text())[0]["conversations"]


def test_an_edited_process_item_begins_again_only_if_asked(task, tmp_path, capsys, monkeypatch):  # noqa: F811
    class ItemProcessor(item_processor.ItemProcessor):
        def process_item(self, raw_item, item_id):
            turns = [{**t, "value": t["value"].replace("<image>", "<|image|>")} for t in raw_item["conversations"]]
            return super().process_item({"conversations": turns, "image": raw_item["image"]}, item_id)

    argv = arguments(task, tmp_path / "out", **write(tmp_path, [LLAVA] * 3))
    assert pre_tokenize(argv) == 3
    before = snapshot(tmp_path / "out")
    assert json.loads(before["manifest.json"])["item_processor"] == "shipped"
    monkeypatch.setattr(script, "ItemProcessor", ItemProcessor)
    assert pre_tokenize(argv) == 2
    assert "item_processor was shipped, is now " in capsys.readouterr().err
    assert snapshot(tmp_path / "out") == before
    assert pre_tokenize([*argv, "--overwrite"]) == 0
    assert "3 items done (3 tokenized, none refused)" in capsys.readouterr().out
    assert pre_tokenize(argv) == 0  # the edited one is now that of the folder


def test_the_shipped_process_item_is_that_of_the_constant():
    """Changed the class in pre_tokenize.py? Then put its new hash into SHIPPED_PROCESSOR_SHA256."""
    assert script._describe_processor() == "shipped"


def test_base64_in_an_item_fills_no_log_and_no_terminal(task, tmp_path, capsys):  # noqa: F811
    image = "data:image/png;base64," + "QUJD" * 250_000
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    items = [
        {**LLAVA, "image": image},
        {**LLAVA, "image": image[22:]},  # without what it begins with elsewhere
        {"conversations": image},
        {"conversations": [{"from": image, "value": ""}]},
        {"conversations": [{"from": "human", "value": [image]}]},
        {"conversations": [turns[0], {**turns[1], "from": {image: image}}]},
        {"conversations": turns},
    ]
    changes = write(tmp_path, items)
    assert pre_tokenize(arguments(task, tmp_path / "out", **changes)) == 3
    reasons = dict(read_failed(tmp_path / "out" / "0-of-1-failed.jsonl"))
    assert list(reasons) == [0, 1, 2, 3, 4, 5] and max(map(len, reasons.values())) < 500
    assert concat([f"--sub_record_dir={tmp_path / 'out'}", f"--save_path={tmp_path}/record.json"]) == 0
    assert pre_tokenize(arguments(task, tmp_path / "o", **write(tmp_path, [{image: 1}, image]))) == 2
    printed = capsys.readouterr()
    assert len(printed.out + printed.err) < 5000


def test_long_reasons_of_an_older_worker_are_cut_where_they_are_read(tmp_path):
    (tmp_path / "failed.jsonl").write_text(json.dumps({"id": 3, "reason": "x" * 10**6}) + "\n")
    ((item_id, reason),) = read_failed(tmp_path / "failed.jsonl")
    assert item_id == 3 and len(reason) == 500


@contextmanager
def files_of_at_most(num_bytes: int):
    """The system refuses to write more into a file of this process, as a full disk or a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_bytes", [100, 700, 1100, 1500])
def test_a_full_disk_is_one_line_and_the_same_command_resumes(task, tmp_path, undisturbed, capsys, num_bytes):  # noqa: F811
    argv = arguments(task, tmp_path / "out", num_workers=0)
    with files_of_at_most(num_bytes):
        code = pre_tokenize(argv)
    captured = capsys.readouterr()
    assert code == (2 if num_bytes == 100 else 1)  # not even the manifest
    (line,) = [line for line in captured.err.splitlines() if "left" not in line]
    assert "File too large" in line and ("the same command resumes" in line or code == 2)
    assert pre_tokenize(argv) == 3
    assert snapshot(tmp_path / "out") == undisturbed


def test_a_full_disk_while_items_are_tried_again_loses_nothing(task, tmp_path, undisturbed, capsys):  # noqa: F811
    argv = arguments(task, tmp_path / "out", num_workers=0)
    assert pre_tokenize(argv) == 3
    with files_of_at_most(150):
        assert pre_tokenize([*argv, "--retry_failed"]) == 1
    assert "the same command resumes" in capsys.readouterr().err
    assert pre_tokenize([*argv, "--retry_failed"]) == 3
    assert snapshot(tmp_path / "out") == undisturbed


def test_a_folder_as_input_is_named(task, tmp_path, capsys):  # noqa: F811
    assert pre_tokenize(arguments(task, tmp_path / "out", in_filename=task)) == 2
    error = capsys.readouterr().err
    assert "is a folder; give the JSON or JSONL file in it" in error and error.count("\n") == 1
