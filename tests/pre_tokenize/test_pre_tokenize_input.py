"""Rejected items, foreign formats and full disks: one line says why, and how to begin again."""

import json
import resource

import pytest
from PIL import Image

from data.items import item_processor
from pre_tokenize import pre_tokenize as script
from pre_tokenize.pre_tokenize import main as pre_tokenize
from pre_tokenize.worker_log import read_failed
from tests.helpers.tokenize_helpers import snapshot
from tests.pre_tokenize.test_pre_tokenize import arguments, task, undisturbed  # noqa: F401  (fixtures)

TURNS = [{"from": "human", "value": "draw"}, {"from": "gpt", "value": "<|image|>"}]
FOREIGN = {
    "conversations": [{"from": "human", "value": "<img>\nWhat?"}, {"from": "gpt", "value": "It."}],
    "image": "a.png",
}


def write(folder, items: list) -> dict:
    """An input and its image. Returns what `arguments` has to change for it."""
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    (folder / "in.json").write_text(json.dumps(items))
    return {"in_filename": folder / "in.json"}


def test_items_rejected_for_one_reason_end_with_it_and_with_how_to_begin_again(task, tmp_path, capsys):  # noqa: F811
    names = ("one", "two", "three")
    items = [{"conversations": TURNS, "image": f"{name}.png"} for name in names]
    argv = arguments(task, tmp_path / "out", **write(tmp_path, items))
    assert pre_tokenize(argv) == 3
    last = capsys.readouterr().out.splitlines()[-1]
    assert "3 of 3 rejected items have one reason: image one.png does not exist" in last
    assert "--retry_failed if only images were missing" in last and "--overwrite after a change" in last
    for name in names:
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    assert pre_tokenize([*argv, "--retry_failed"]) == 0


def test_an_edited_process_item_begins_again_only_if_asked(task, tmp_path, capsys, monkeypatch):  # noqa: F811
    class ItemProcessor(item_processor.ItemProcessor):
        def process_item(self, raw_item, item_id):
            turns = [{**t, "value": t["value"].replace("<img>", "<|image|>")} for t in raw_item["conversations"]]
            return super().process_item({"conversations": turns, "image": raw_item["image"]}, item_id)

    argv = arguments(task, tmp_path / "out", **write(tmp_path, [FOREIGN] * 3))
    assert pre_tokenize(argv) == 3
    assert "have one reason: the text has <img> but no <|image|>: did you mean" in capsys.readouterr().out
    before = snapshot(tmp_path / "out")
    # Changed the class in pre_tokenize.py? Then put its new hash into SHIPPED_PROCESSOR_SHA256.
    assert json.loads(before["manifest.json"])["item_processor"] == "shipped"
    monkeypatch.setattr(script, "ItemProcessor", ItemProcessor)
    assert pre_tokenize(argv) == 2
    assert "item_processor was shipped, is now " in capsys.readouterr().err
    assert snapshot(tmp_path / "out") == before
    assert pre_tokenize([*argv, "--overwrite"]) == 0
    assert "3 items done (3 tokenized, none rejected)" in capsys.readouterr().out
    # The edited class is now the one of the folder.
    assert pre_tokenize(argv) == 0


def test_long_reasons_of_an_older_worker_are_cut_where_they_are_read(tmp_path):
    (tmp_path / "failed.jsonl").write_text(json.dumps({"id": 3, "reason": "x" * 10**6}) + "\n")
    ((item_id, reason),) = read_failed(tmp_path / "failed.jsonl")
    assert item_id == 3 and len(reason) == 500


@pytest.mark.parametrize("num_bytes", [100, 1100])
def test_a_full_disk_is_one_line_and_the_same_command_resumes(task, tmp_path, undisturbed, capsys, num_bytes):  # noqa: F811
    argv = arguments(task, tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # The system writes no more into a file, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
        code = pre_tokenize(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = capsys.readouterr().err.splitlines()
    assert "File too large" in line
    # Of 100 bytes not even the manifest can be written.
    assert code == (2 if num_bytes == 100 else 1) and ("the same command resumes" in line) == (code == 1)
    assert pre_tokenize(argv) == 3
    assert snapshot(tmp_path / "out") == undisturbed
