"""Records in all the forms they come in, and the streaming JSON beneath."""

import json
import os

import pytest

from data import json_stream
from data.json_stream import iter_json_values
from data.record import RecordEntry, find_sub_records, read_record, write_merged, write_sub_record

VALUES = [{"a": [1, {"b": 'é\n"]}'}]}, 12345678901, "s", None, {}, [[]], -1.5e10]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("form", ["list", "indented", "jsonl", "with_bom"])
def test_values_are_streamed_whatever_the_chunks(tmp_path, monkeypatch, chunk, form):
    monkeypatch.setattr(json_stream, "CHUNK_CHARS", chunk)
    text = {
        "list": json.dumps(VALUES),
        "indented": "\n\n  " + json.dumps(VALUES, indent=1, ensure_ascii=False) + "\n",
        "jsonl": "\n".join(map(json.dumps, VALUES)) + "\n\n",
        "with_bom": "\ufeff" + json.dumps(VALUES),
    }[form]
    (tmp_path / "in").write_text(text, encoding="utf-8")
    assert list(iter_json_values(tmp_path / "in")) == VALUES


@pytest.mark.parametrize(
    "text, where",
    [('[{"a":1},\n{"b":]', "line 2, column 6"), ("[1,2", "end of the file"), ("[]x", "follows the end"),
     ('{"a":1}\n{"b"', "line 2, column 5"), ("[1 2]", "line 1, column 4"), ('[{"a": 1}', "end of the file")],
)  # fmt: skip
def test_wrong_json_is_located(tmp_path, text, where):
    (tmp_path / "in.json").write_text(text)
    with pytest.raises(ValueError, match=rf"input .*in\.json is not valid JSON at .*{where}"):
        list(iter_json_values(tmp_path / "in.json", what="input"))


def test_other_bytes_and_missing_files_are_named(tmp_path):
    (tmp_path / "in.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        list(iter_json_values(tmp_path / "in.json"))
    with pytest.raises(FileNotFoundError, match=r"input .*gone\.json does not exist"):
        list(iter_json_values(tmp_path / "gone.json", what="input"))


def test_merged_record_round_trip(tmp_path):
    entries = [RecordEntry("files/0.pkl", 10, 0, 6), RecordEntry("/abs/1.pkl", 3, 1)]
    assert write_merged(iter(entries), tmp_path / "record.json") == 2
    lines = (tmp_path / "record.json").read_text().splitlines()
    assert len(lines) == 4 and json.loads("".join(lines))[0]["image_len"] == 6
    read = list(read_record(tmp_path / "record.json"))
    assert [entry.file for entry in read] == [str(tmp_path / "files/0.pkl"), "/abs/1.pkl"]
    assert os.listdir(tmp_path) == ["record.json"]


def test_entries_of_shards_and_of_single_files_round_trip(tmp_path):
    entries = [RecordEntry("shards/0.pkls", 10, 0, 6, 0, 99), RecordEntry("shards/0.pkls", 4, 1, None, 99, 50)]
    entries.append(RecordEntry("files/2.pkl", 3, 2))
    write_merged(entries, tmp_path / "record.json")
    write_sub_record(entries, tmp_path / "0-of-1-record.jsonl")
    assert json.loads((tmp_path / "0-of-1-record.jsonl").read_text().splitlines()[1]) == {
        "file": "shards/0.pkls", "len": 4, "id": 1, "offset": 99, "nbytes": 50
    }  # fmt: skip
    for name in ("record.json", "0-of-1-record.jsonl"):
        read = list(read_record(tmp_path / name))
        assert [(entry.offset, entry.nbytes, entry.is_sharded) for entry in read] == [
            (0, 99, True), (99, 50, True), (None, None, False)
        ]  # fmt: skip
        assert read[0].file == str(tmp_path / "shards/0.pkls") and read[0].image_len == 6


def test_a_failed_merge_leaves_the_old_record(tmp_path):
    write_merged([RecordEntry("a", 1, 0)], tmp_path / "record.json")

    def breaks():
        yield RecordEntry("b", 1, 0)
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write_merged(breaks(), tmp_path / "record.json")
    assert next(read_record(tmp_path / "record.json")).file.endswith("a")
    assert os.listdir(tmp_path) == ["record.json"]


def test_files_relative_to_the_working_directory_load_too(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0.pkl").touch()
    (tmp_path / "out" / "record.json").write_text('[{"file": "out/0.pkl", "len": 3, "id": 0}]')
    monkeypatch.chdir(tmp_path)
    assert next(read_record("out/record.json")).file == "out/0.pkl"
    monkeypatch.chdir("/")
    assert next(read_record(tmp_path / "out/record.json")).file == str(tmp_path / "out" / "out/0.pkl")


@pytest.mark.parametrize(
    "entry",
    ["{}", "[]", '{"file": 1, "len": 2}', '{"file": "a", "len": 0}', '{"file": "a", "len": true}',
     '{"file": "a", "len": 2, "image_len": "x"}', '{"file": "a", "len": 2, "offset": 3}',
     '{"file": "a", "len": 2, "offset": -1, "nbytes": 9}', '{"file": "a", "len": 2, "offset": 0, "nbytes": 0}'],
)  # fmt: skip
def test_wrong_entries_are_numbered(tmp_path, entry):
    (tmp_path / "record.json").write_text('[{"file": "a", "len": 2}, ' + entry + "]")
    with pytest.raises(ValueError, match="entry 2"):
        list(read_record(tmp_path / "record.json"))


def test_sub_records_are_found_in_order(tmp_path):
    for name in ("10-of-11-record.jsonl", "2-of-11-record.jsonl", "0-of-2-failed.jsonl", "record.json"):
        (tmp_path / name).touch()
    assert list(find_sub_records(tmp_path)) == [(2, 11), (10, 11)]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, f"[1{'0' * 6000}]", "1" * 6000])
def test_json_that_python_cannot_read_is_named(tmp_path, text):
    (tmp_path / "in.json").write_text(text)
    with pytest.raises(ValueError, match=r"input .*in\.json holds JSON that cannot be read"):
        list(iter_json_values(tmp_path / "in.json", what="input"))
