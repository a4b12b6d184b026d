"""Records in all their forms."""

import json
import os

import pytest

from data.formats.record import (
    RecordEntry,
    append_record_line,
    check_entry,
    find_sub_records,
    read_record,
    resolve_base,
    write_merged,
)


def test_records_round_trip(tmp_path):
    entries = [RecordEntry("shards/0.pkls", 10, 0, 6, 0, 99), RecordEntry("shards/0.pkls", 4, 1, None, 99, 50)]
    entries.append(RecordEntry("/abs/2.pkl", 3, 2))
    write_merged(iter(entries), tmp_path / "record.json")
    with open(tmp_path / "0-of-1-record.jsonl", "w") as file:
        for entry in entries:
            append_record_line(file, entry)
    lines = (tmp_path / "record.json").read_text().splitlines()
    assert len(lines) == 5 and json.loads("".join(lines))[0]["image_len"] == 6
    second = {"file": "shards/0.pkls", "len": 4, "id": 1, "offset": 99, "nbytes": 50}
    assert json.loads((tmp_path / "0-of-1-record.jsonl").read_text().splitlines()[1]) == second
    for name in ("record.json", "0-of-1-record.jsonl"):
        read = list(read_record(tmp_path / name))
        assert [entry.file for entry in read] == [str(tmp_path / "shards/0.pkls")] * 2 + ["/abs/2.pkl"]
        places = [(entry.offset, entry.nbytes, entry.is_sharded) for entry in read]
        assert places == [(0, 99, True), (99, 50, True), (None, None, False)]
    assert sorted(os.listdir(tmp_path)) == ["0-of-1-record.jsonl", "record.json"]


def test_a_failed_merge_leaves_the_old_record(tmp_path):
    write_merged([RecordEntry("a", 1, 0)], tmp_path / "record.json")

    def breaks():
        yield RecordEntry("b", 1, 0)
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write_merged(breaks(), tmp_path / "record.json")
    assert next(read_record(tmp_path / "record.json")).file.endswith("a")
    assert os.listdir(tmp_path) == ["record.json"]


def test_relative_files_are_beside_the_record_or_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "here.pkl").touch()
    (tmp_path / "out" / "record.json").write_text('[{"file": "here.pkl", "len": 3, "id": 0}]')
    monkeypatch.chdir(tmp_path)
    # The first relative file decides for all.
    assert resolve_base("out/record.json", "here.pkl") == "" and resolve_base("out/record.json", "gone.pkl") == "out"
    assert next(read_record("out/record.json")).file == "here.pkl"
    (tmp_path / "out" / "here.pkl").touch()
    assert next(read_record("out/record.json")).file == "out/here.pkl"


def test_sub_records_are_found_in_order(tmp_path):
    for name in ("10-of-11-record.jsonl", "2-of-11-record.jsonl", "0-of-2-failed.jsonl", "record.json"):
        (tmp_path / name).touch()
    assert list(find_sub_records(tmp_path)) == [(2, 11), (10, 11)]


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"len": 0}, "must be {"),
        ({"len": True}, "must be {"),
        ({"len": 2**31}, "has len 2147483648, but no item"),
        ({"file": "a\0b"}, "cannot be the path"),
        ({"file": "\ud800"}, "cannot be the path"),
        ({"file": "a" * 10**6}, "has file 'aaa.*cannot be the path"),
        ({"id": 2**63}, "has id 9223372036854775808"),
        ({"id": None}, "has id None"),
        ({"image_len": 9}, "has image_len 9, which must be an integer from 1, below len .9."),
        ({"nbytes": 5}, "has offset None"),
        ({"offset": -1, "nbytes": 9}, "has offset -1"),
        ({"offset": 2**63 - 5, "nbytes": 5}, "has offset 9223372036854775803"),
    ],
)
def test_entries_that_no_array_could_hold_are_rejected(tmp_path, fields, reason):
    good = {"file": "é", "len": 9, "id": 0}
    assert check_entry(good, "r.json", 1) == RecordEntry("é", 9, 0)
    with pytest.raises(ValueError, match=f"record r.json: entry 7 .*{reason}") as raised:
        check_entry({**good, **fields}, "r.json", 7)
    assert len(str(raised.value)) < 300
    for wrong in ({**good, **fields}, [], 5):
        (tmp_path / "r.json").write_text(json.dumps([good, wrong]))
        with pytest.raises(ValueError, match="entry 2"):
            list(read_record(tmp_path / "r.json"))
