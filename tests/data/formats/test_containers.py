"""Containers: any share of the rows, the same rows in all of them, damaged ones named."""

import gzip
import importlib
import io
import json
import os
import sys
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data.formats import containers
from data.formats.containers import find_files, open_source
from data.items.conversation import ItemError

ROWS = [{"caption": f"cat {number}", "image": {"bytes": b"x" * number, "path": None}} for number in range(50)]
JSON_ROWS = [{"caption": row["caption"]} for row in ROWS]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_sources(folder: Path) -> dict[str, str]:
    """ROWS in every container, each in more than one piece where it can be; the name of each input."""
    for name in ("parquet", "tar"):
        (folder / name).mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS[:30]), folder / "parquet" / "a.parquet", row_group_size=11)
    pq.write_table(pa.Table.from_pylist(ROWS[30:]), folder / "parquet" / "b.parquet", row_group_size=7)
    for name, rows in (("a", ROWS[:20]), ("b", ROWS[20:])):
        members = []
        for row in rows:
            # A name of more than 100 characters has a header before its own.
            key = f"{'long/' * 30}{row['caption'][4:]}"
            members += [(f"{key}.jpg", row["image"]["bytes"]), (f"{key}.txt", row["caption"].encode())]
        write_tar(folder / "tar" / f"{name}.tar", [("._hidden", b"mac"), *members])
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved", num_proc=None)
    lines = "\n".join(map(json.dumps, JSON_ROWS))
    (folder / "in.json").write_text(json.dumps(JSON_ROWS))
    (folder / "in.jsonl").write_text(lines)
    (folder / "in.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    # Of two frames, as parallel writers make.
    half = len(lines) // 2
    frames = [zstandard.compress(part.encode()) for part in (lines[:half], lines[half:])]
    (folder / "in.json.zst").write_bytes(b"".join(frames))
    names = ["in.json", "in.jsonl", "in.jsonl.gz", "in.json.zst", "saved", "parquet", "parquet/*.parquet"]
    return {name: f"{folder}/{name}" for name in [*names, "tar", "tar/*.tar"]}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


def essence(row: dict) -> tuple[str, int]:
    image = row.get("image") or {"bytes": b""}
    return row["caption"], len(image[0] if isinstance(image, list) else image["bytes"])


@pytest.mark.parametrize(
    "name",
    ["in.json", "in.jsonl", "in.jsonl.gz", "in.json.zst", "saved", "parquet", "parquet/*.parquet", "tar", "tar/*.tar"],
)
def test_any_share_of_the_rows(sources, tmp_path, name):
    source = open_source(find_files(sources[name]), tmp_path)
    expected = [essence(row) for row in (JSON_ROWS if "json" in name else ROWS)]
    assert source.num_rows == (None if "json" in name else 50)
    for start, stop in ((0, None), (0, 1), (9, 13), (19, 21), (28, 42), (49, 50), (20, 20)):
        assert [essence(row) for row in source.read(start, stop)] == expected[start:stop]


def test_a_share_is_read_alone(sources, tmp_path, monkeypatch):
    """Nothing of what comes before it, where the container can."""
    opened = []
    source = open_source(find_files(sources["parquet"]), tmp_path)
    monkeypatch.setattr(source, "_open", lambda path: opened.append(path.name) or pq.ParquetFile(path))
    groups = []
    original = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, size, row_groups: groups.extend(row_groups) or original(self, size, row_groups=row_groups),
    )
    assert len(list(source.read(38, 44))) == 6
    assert opened == ["b.parquet"] and groups == [1]
    monkeypatch.setattr(containers, "_find_samples", lambda *_: pytest.fail("the index is there"))
    with pytest.raises(pytest.fail.Exception):
        open_source(find_files(sources["tar"]), tmp_path)


def test_the_index_of_a_tar_is_made_once_and_again_for_a_changed_shard(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", [("0.txt", b"a"), ("0.png", b"x")])
    first = open_source(find_files(path), tmp_path / "out")
    assert first.num_rows == 1 and len(os.listdir(tmp_path / "out")) == 1
    with monkeypatch.context() as patch:
        patch.setattr(containers, "_find_samples", lambda *_: pytest.fail("there is an index"))
        assert list(open_source(find_files(path), tmp_path / "out").read()) == list(first.read())
    write_tar(path, [("0.txt", b"a"), ("0.png", b"x"), ("1.txt", b"b"), ("1.png", b"y")])
    assert open_source(find_files(path), tmp_path / "out").num_rows == 2 and len(os.listdir(tmp_path / "out")) == 1


def test_members_of_a_sample_are_its_row(tmp_path):
    turns = [{"from": "human", "value": "x"}]
    fields = {"conversations": turns, "images": ["elsewhere.png"], "caption": "of the json"}
    members = [("a/0.json", json.dumps(fields).encode()), ("a/0.1.png", b"one"), ("a/0.2.JPG", b"two")]
    members += [("a/0.cls", b"7"), ("a/1.json", b"{"), ("a/2.png", b"x"), ("a/3.txt", b"y"), ("a/4.json", b"[]")]
    members.append(("a/5.json", b"[" * 100_000))
    rows = list(open_source(find_files(write_tar(tmp_path / "a.tar", members)), tmp_path).read())
    assert rows[0] == {
        "__key__": "a/0", "conversations": turns, "caption": "of the json", "image": [b"one", b"two"],
        "1.png": b"one", "2.JPG": b"two", "cls": b"7",
    }  # fmt: skip
    reasons = [str(row) for row in rows[1:] if isinstance(row, ItemError)]
    assert "sample a/1 of a.tar: a/1.json cannot be read: Expecting" in reasons[0]
    assert "sample a/2 of a.tar has no .json or .txt member, only a/2.png" in reasons[1]
    assert "sample a/3 of a.tar has no image member, only a/3.txt" in reasons[2]
    assert "the .json member must hold an object, got []" in reasons[3]
    assert "sample a/5 of a.tar: a/5.json cannot be read: maximum recursion" in reasons[4]


@pytest.mark.parametrize("name", ["in.json", "in.jsonl.gz", "saved", "parquet", "tar"])
def test_the_hash_changes_with_the_input(tmp_path, name):
    path = Path(write_sources(tmp_path)[name])
    before = find_files(path).sha256()
    assert find_files(path).sha256() == before
    changed = path if path.is_file() else max((file for file in path.rglob("*") if file.is_file()), key=os.path.getsize)
    content = bytearray(changed.read_bytes())
    content[-5] ^= 1
    changed.write_bytes(content)
    assert find_files(path).sha256() != before


def test_the_hash_of_json_is_that_of_its_content(tmp_path):
    """As in the manifests of folders begun before."""
    (tmp_path / "in.jsonl").write_text("{}\n")
    assert find_files(tmp_path / "in.jsonl").sha256() == (
        "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
    )


@pytest.mark.parametrize(
    "name, cut, reason",
    [
        ("parquet/a.parquet", 100, "is no Parquet file, or it is cut off"),
        ("tar/a.tar", 30_000, "is no tar file, or it is cut off after 7 samples"),
        ("in.jsonl.gz", 100, "is damaged or cut off"),
        ("in.json.zst", 100, "is damaged or cut off"),
    ],
)
def test_a_file_that_is_cut_off_is_one_error(tmp_path, name, cut, reason):
    write_sources(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=f"input {path} {reason}"):
        list(open_source(find_files(path), tmp_path / "out").read())
    assert not (tmp_path / "out").exists()


def test_a_damaged_header_in_a_tar_is_one_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.txt", b"a"), ("0.png", b"x"), ("1.txt", b"b")])
    content = bytearray(path.read_bytes())
    content[4 * 512 : 4 * 512 + 20] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cut off after 1 samples: a damaged header at byte 2,048"):
        open_source(find_files(path), tmp_path / "out")


def test_a_tar_that_was_damaged_since_costs_the_samples_from_there_on(tmp_path, monkeypatch):
    members = [(f"{number}.{kind}", bytes([97 + number])) for number in range(4) for kind in ("txt", "png")]
    source = open_source(find_files(write_tar(tmp_path / "a.tar", members)), tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(containers, "MAX_MEMBER_BYTES", 0)
        assert all("0.txt has more than 1 GiB" in str(row) for row in source.read(0, 1))
    content = (tmp_path / "a.tar").read_bytes()
    # Behind a damaged header may be more members of the second sample.
    for damaged, reason, num_good in (
        (content[: 8 * 512] + b"\xff" * 512 + content[9 * 512 :], "a damaged header at byte 4,096", 1),
        (content[: 8 * 512] + bytes(4096), "it ends too early", 2),
    ):
        (tmp_path / "a.tar").write_bytes(damaged)
        rows = list(source.read())
        assert [row["caption"] for row in rows[:num_good]] == ["a", "b"][:num_good]
        assert list(map(str, rows[num_good:])) == [f"a.tar is damaged: {reason}"] * (4 - num_good)


def test_a_damaged_row_group_costs_its_rows_alone(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(JSON_ROWS), path, row_group_size=10, use_dictionary=False, compression="gzip")
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    content = bytearray(path.read_bytes())
    start = column.data_page_offset
    content[start + 20 : start + column.total_compressed_size] = b"\xff" * (column.total_compressed_size - 20)
    path.write_bytes(content)
    rows = list(open_source(find_files(path), tmp_path).read(5, 45))
    assert rows[:15] == JSON_ROWS[5:20] and rows[25:] == JSON_ROWS[30:45]
    assert all(isinstance(row, ItemError) and "row group 2 of a.parquet is damaged" in str(row) for row in rows[15:25])


def test_a_text_that_is_not_utf8_costs_its_row_alone(tmp_path):
    texts = pa.array([b"a", b"b\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"caption": texts}), tmp_path / "a.parquet")
    first, second, third = open_source(find_files(tmp_path / "a.parquet"), tmp_path).read()
    assert (first, third) == ({"caption": "a"}, {"caption": "c"}) and "is not UTF-8" in str(second)
    pq.write_table(pa.table({"day": pa.array([0, 10**7], pa.int32()).cast(pa.date32())}), tmp_path / "b.parquet")
    first, second = open_source(find_files(tmp_path / "b.parquet"), tmp_path).read()
    assert first["day"].year == 1970 and "a value of the row cannot be read: date value out of range" in str(second)


def test_formats_are_found_by_suffix_unless_given(tmp_path, sources):
    assert find_files(sources["in.json.zst"]).format == "json" and find_files(sources["saved"]).format == "datasets"
    lines = find_files(f"{Path(sources['in.jsonl']).parent}/in.js*l")
    assert len(list(open_source(replace(lines, files=lines.files * 2), tmp_path).read())) == 100
    (tmp_path / "rows").write_text("{}")
    assert find_files(tmp_path / "rows").format == "json"
    (tmp_path / "rows.bin").write_bytes((Path(sources["parquet"]) / "a.parquet").read_bytes())
    assert open_source(find_files(tmp_path / "rows.bin", "parquet"), tmp_path).num_rows == 30
    (tmp_path / "mixed").mkdir()
    for name in ("a.tar", "b.parquet"):
        (tmp_path / "mixed" / name).touch()
    with pytest.raises(ValueError, match="mixed mixes parquet and tar files: give one kind"):
        find_files(tmp_path / "mixed")
    for name in ("gone.json", "gone/*.tar"):
        with pytest.raises(FileNotFoundError, match="is not a file, not a glob that matches any"):
            find_files(tmp_path / name)


def test_splits_of_datasets_are_named(tmp_path):
    rows = datasets.Dataset.from_list(JSON_ROWS)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match="has the splits train, test: give the folder of one of them"):
        open_source(find_files(tmp_path / "both"), tmp_path)
    assert open_source(find_files(tmp_path / "both" / "test"), tmp_path).num_rows == 50


@pytest.mark.parametrize("name, package", [("parquet", "pyarrow"), ("saved", "datasets"), ("in.json.zst", "zstandard")])
def test_a_missing_package_is_named(sources, tmp_path, monkeypatch, name, package):
    def not_found(*_):
        raise ImportError("not here")

    monkeypatch.setattr(importlib, "import_module", not_found)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=f"package {package} is needed: pip install"):
        list(open_source(find_files(sources[name]), tmp_path).read())


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Of Python; the arrow pool is looked at, too."""
    peaks = []
    for count in (2_000, 40_000):
        path = tmp_path / f"{count}.parquet"
        pq.write_table(pa.table({"caption": [f"a caption of some words {i}" * 3 for i in range(count)]}), path)
        tracemalloc.start()
        assert sum(1 for _ in open_source(find_files(path), tmp_path).read(count // 2)) == count // 2
        peaks.append(tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes())
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + (1 << 20)
