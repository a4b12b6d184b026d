"""The index: its content for each form of record, never stale or half, and small in memory."""

import json
import os
import pickle
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from data.formats import json_stream, record_index
from data.formats.record import read_record
from data.formats.record_index import RecordIndex, node_cache_dir, open_index
from data.formats.token_file import load_token_file
from tests.helpers import forked

ENTRIES = [
    {"file": "files/0.pkl", "len": 10, "id": 0},
    {"file": "files/é.pkl", "len": 7, "id": 3, "image_len": 5},
    {"file": "shards/0.pkls", "len": 9, "id": 4, "offset": 0, "nbytes": 100},
    {"file": "shards/0.pkls", "len": 300, "id": 6, "image_len": 299, "offset": 100, "nbytes": 2**40},
    {"file": "/elsewhere/9.pkl", "len": 2**31 - 1, "id": -1},
    {"file": "files/0.pkl", "len": 1},
]
LINES = [json.dumps(entry, ensure_ascii=False) for entry in ENTRIES]
TEXTS = {
    "lines.json": "[\n" + ",\n".join(LINES) + "\n]\n",
    "indented.json": json.dumps(ENTRIES, indent=2),
    "lines.jsonl": "\n".join(LINES) + "\n",
}


@pytest.fixture
def record(tmp_path) -> Path:
    """A record in a folder of its own; the index goes to `tmp_path / "cache"`."""
    path = tmp_path / "out" / "record.json"
    path.parent.mkdir()
    path.write_text(TEXTS["lines.json"])
    return path


@pytest.mark.parametrize("name", [*TEXTS, "list.pkl", "list.pth"])
def test_it_holds_the_content_of_the_record(tmp_path, record, name, monkeypatch):
    path = record.with_name(name)
    if name in TEXTS:
        path.write_text(TEXTS[name])
    elif name == "list.pkl":
        path.write_bytes(pickle.dumps(ENTRIES))
    else:
        torch.save(ENTRIES, path)
    entries = list(read_record(record))
    index = open_index(path, tmp_path / "cache")
    assert_same_items(index, entries)
    monkeypatch.setattr(record_index, "BATCH_ITEMS", 2)
    in_batches = open_index(path, tmp_path / "again")
    assert_same_items(in_batches, entries)
    assert in_batches.digest == index.digest


def test_a_list_may_hold_the_tokens_themselves(tmp_path):
    items = [{"token": [i, 5, 6], "label": [-100, 5, 6 + i], "id": 40 + i} for i in range(3)]
    entries = [items[0], {"file": "files/1.pkl", "len": 8, "id": 7}, items[1], {**items[2], "image_len": 2}]
    torch.save(entries, tmp_path / "list.pth")
    index = open_index(tmp_path / "list.pth", tmp_path / "cache")
    assert index.lens.tolist() == [3, 8, 3, 3] and index.image_lens.tolist() == [0, 0, 0, 2]
    assert index.ids.tolist() == [40, 7, 41, 42]
    assert index.place(1) == (str(tmp_path / "files/1.pkl"), None, None)
    for position, expected in ((0, items[0]), (2, items[1]), (3, items[2])):
        item = load_token_file(*index.place(position), expected_len=3)
        assert (item.token.tolist(), item.label.tolist(), item.id) == tuple(expected.values())
    entries[2] = {"token": [1, 2], "label": [1], "id": 9}
    torch.save(entries, tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth: entry 3 holds 2 tokens but 1 labels"):
        open_index(tmp_path / "list.pth", tmp_path / "cache")


def test_a_damaged_archive_is_rejected(tmp_path):
    torch.save(ENTRIES, tmp_path / "list.pth")
    content = (tmp_path / "list.pth").read_bytes()
    (tmp_path / "list.pth").write_bytes(content.replace(b"PK\x01\x02", b"PK\xff\xff"))
    with pytest.raises(ValueError, match=r"record .*list\.pth cannot be read: Bad magic number"):
        open_index(tmp_path / "list.pth", tmp_path / "cache")


@pytest.mark.parametrize(
    "content, reason",
    [
        ({"file": "a"}, "must hold a list of dicts, got dict"),
        ([{"file": "a", "len": 1}, 5], "entry 2 must be a dict"),
        ([{"file": "a", "len": 0}], "entry 1 must be"),
        ([torch.zeros(2)], "refers to torch._utils"),
    ],
)
def test_a_list_of_anything_else_is_rejected(tmp_path, content, reason):
    torch.save(content, tmp_path / "list.pth")
    with pytest.raises(ValueError, match=rf"record .*list\.pth.*{reason}"):
        open_index(tmp_path / "list.pth", tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*.building-*"))


def test_relative_files_are_found_as_the_record_finds_them(tmp_path, record, monkeypatch):
    """From the working directory of the process that opens the index, if the first file is there."""
    monkeypatch.chdir(tmp_path)
    open_index(record, "cache")
    (tmp_path / "files").mkdir()
    (tmp_path / "files/0.pkl").touch()
    index = open_index(record, "cache", say=pytest.fail)
    assert [index.place(i)[0] for i in (0, 4)] == [str(tmp_path / "files/0.pkl"), "/elsewhere/9.pkl"]
    assert [entry.file for entry in read_record(record)][0] == "files/0.pkl"


@pytest.mark.parametrize("change", ["size", "time", "head", "tail"])
def test_a_changed_record_has_a_new_index(tmp_path, record, change, monkeypatch):
    monkeypatch.setattr(record_index, "HEAD_TAIL_BYTES", 100)
    first = open_index(record, tmp_path / "cache")
    status, content = record.stat(), record.read_text()
    old, new = {"head": ("10", "11"), "tail": ('"len": 1}', '"len": 2}'), "size": ("10", "100")}.get(change, ("", ""))
    record.write_text(content.replace(old, new, 1))
    os.utime(record, ns=(status.st_atime_ns, status.st_mtime_ns + (change == "time")))
    said = []
    second = open_index(record, tmp_path / "cache", said.append)
    assert len(said) == 1 and second.lens.tolist() == [entry.len for entry in read_record(record)]
    assert (second.digest == first.digest) == (change == "time")
    assert len(list((tmp_path / "cache").iterdir())) == 1, "the index of the former state stays"
    assert open_index(record, tmp_path / "cache", pytest.fail).digest == second.digest


def test_the_digest_is_of_the_items_and_not_of_their_place(tmp_path, record):
    digests = []
    for number, (old, new) in enumerate([("/elsewhere/", "/there/"), ("", ""), ('"id": 6', '"id": 5'), ("299", "298")]):
        path = tmp_path / str(number) / "r.json"
        path.parent.mkdir()
        path.write_text(record.read_text().replace(old, new))
        digests.append(open_index(path, tmp_path / "cache").digest)
    assert digests[0] == digests[1] and len(set(digests)) == 3
    # Checkpoints have it in the fingerprint of their data.
    assert digests[0] == "7acb5a282b75bfa9066641a30a0220f7"


KILLED = """
import os, signal, sys
from data.formats import json_stream
from data.formats import record_index
record_index.publish_folder = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
record_index.open_index(sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow
def test_a_killed_build_is_not_used_and_removed(tmp_path, record):
    done = forked.run([sys.executable, "-c", KILLED, record, tmp_path / "cache"], os.environ)
    assert done.returncode == -9
    assert any(".building-" in path.name for path in (tmp_path / "cache").iterdir())
    said = []
    assert_same_items(open_index(record, tmp_path / "cache", said.append), list(read_record(record)))
    assert len(said) == 1 and len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("name", ["lens", "names", "index.json"])
def test_a_damaged_index_is_built_again(tmp_path, record, name):
    open_index(record, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob(f"*/{name}")
    os.truncate(path, path.stat().st_size - 1)
    said = []
    assert_same_items(open_index(record, tmp_path / "cache", said.append), list(read_record(record)))
    assert len(said) == 1


def test_the_index_of_a_faster_node_is_kept(tmp_path, record):
    """Nodes that share the cache folder may not share its locks."""
    open_index(record, tmp_path / "cache")
    (header,) = tmp_path.glob("cache/*/index.json")
    inode = header.stat().st_ino
    record_index._build(str(record), header.parent)
    assert header.stat().st_ino == inode and list((tmp_path / "cache").iterdir()) == [header.parent]


BUILD_OR_OPEN = """
import sys
from data.formats.record_index import open_index
index = open_index(sys.argv[1], sys.argv[2])
print(index.digest, index.place(9_999))
"""


@pytest.mark.slow
def test_three_processes_build_it_once(tmp_path, record):
    entries = ({"file": f"files/{i}.pkl", "len": i % 999 + 1, "id": i} for i in range(50_000))
    record.write_text("[" + ",\n".join(map(json.dumps, entries)) + "]")
    command = [sys.executable, "-c", BUILD_OR_OPEN, record, tmp_path / "cache"]
    ranks = [forked.Popen(command, os.environ) for _ in range(3)]
    outputs = [rank.communicate(timeout=120)[0].splitlines() for rank in ranks]
    assert sum(line.startswith("building ") for lines in outputs for line in lines) == 1
    assert len({lines[-1] for lines in outputs}) == 1 and "9999.pkl" in outputs[0][-1]
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("written", ["\n", '{"file": "files/7.p'])
def test_a_record_that_changes_while_it_is_read_is_rejected(tmp_path, record, written):
    def write(_):
        with record.open("a") as file:
            file.write(written)

    with pytest.raises(ValueError, match=r"record\.json changed while it was read; is a worker still writing\?"):
        open_index(record, tmp_path / "cache", say=write)
    assert not list(tmp_path.glob("cache/*.building-*")) and not list(tmp_path.glob("cache/*/index.json"))


def test_wrong_records_are_named(tmp_path, record):
    with pytest.raises(FileNotFoundError, match=r"record .*gone\.json does not exist"):
        open_index(tmp_path / "gone.json", tmp_path / "cache")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"record .*record\.json cannot be kept in .*file/cache: .*Not a directory"):
        open_index(record, tmp_path / "file/cache")
    record.write_text('[{"file": "a", "len": 3},\n{"file": "b", "len": 3')
    with pytest.raises(ValueError, match=r"record\.json is not valid JSON at line 2"):
        open_index(record, tmp_path / "cache")
    record.write_text("[]")
    with pytest.raises(ValueError, match=r"record .*record\.json has no items"):
        open_index(record, tmp_path / "cache")


def test_the_temporary_folder_belongs_to_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = node_cache_dir()
    assert path == node_cache_dir() == tmp_path / f"token-index-{os.getuid()}" and path.stat().st_mode & 0o777 == 0o700
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    (tmp_path / f"token-index-{uid + 1}").symlink_to(path)
    with pytest.raises(ValueError, match=rf"not a folder of this user \(uid {uid + 1}\).*set TMPDIR"):
        node_cache_dir()


def test_memory_does_not_grow_with_the_record(tmp_path, record, monkeypatch):
    """Arrays that are mapped from disk do not count."""
    monkeypatch.setattr(record_index, "BATCH_ITEMS", 1000)
    monkeypatch.setattr(json_stream, "CHUNK_CHARS", 1 << 14)
    line = '{"file": "files/%d.pkl", "len": %d, "id": %d}'
    record.write_text("[" + ",\n".join(line % (i, i % 8000 + 1, i) for i in range(40_000)) + "]")
    tracemalloc.start()
    index = open_index(record, tmp_path / "cache")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (index.num_items, index.max_len) == (40_000, 8000)
    assert index.place(39_999)[0] == f"{record.parent}/files/39999.pkl"
    assert peak < 2 << 20


def assert_same_items(index: RecordIndex, entries: list) -> None:
    assert index.num_items == len(index.lens) == len(entries)
    assert index.lens.tolist() == [entry.len for entry in entries] and index.lens.dtype == np.int32
    assert index.image_lens.tolist() == [entry.image_len or 0 for entry in entries]
    assert index.ids.tolist() == [entry.id for entry in entries]
    assert index.max_len == max(entry.len for entry in entries)
    for position, entry in enumerate(entries):
        assert index.place(position) == (os.path.abspath(entry.file), entry.offset, entry.nbytes)
