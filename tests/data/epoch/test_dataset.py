"""Items of all records: read from files and shards, limited in length, checked against record and vocabulary."""

from pathlib import Path

import numpy as np
import pytest

from data.epoch.dataset import TokenDataset
from data.formats.data_config import DataSource
from data.formats.record import RecordEntry, write_merged
from data.formats.token_file import ItemReadError, save_token_file, write_shard
from data.items.vocab import IGNORE_INDEX


def write_source(folder: Path, lengths, type_name="default", ratio=1.0, image_lens=None) -> DataSource:
    """Token files in which token t of item i is 1000 * i + t, every other one a target."""
    (folder / "files").mkdir(parents=True)
    entries = []
    for i, length in enumerate(lengths):
        token = [1000 * i + t for t in range(length)]
        label = [value if t % 2 else IGNORE_INDEX for t, value in enumerate(token)]
        save_token_file(folder / "files" / f"{i}.pkl", token, label, i)
        entries.append(RecordEntry(f"files/{i}.pkl", length, i, image_lens[i] if image_lens else None))
    write_merged(entries, folder / "record.json")
    return DataSource(folder / "record.json", ratio, type_name)


def plain(item) -> tuple:
    return item.token.tolist(), item.label.tolist(), item.id


def test_items_of_all_sources(tmp_path):
    sources = [
        write_source(tmp_path / "a", [3, 5], "x", image_lens=[None, 4]),
        write_source(tmp_path / "b", [4], "w", ratio=2.0),
    ]
    dataset = TokenDataset(sources, max_seq_len=5)
    table = dataset.table
    assert table.lengths.tolist() == [3, 5, 4] and table.lengths.dtype == np.int32
    assert table.image_lens.tolist() == [0, 4, 0] and dataset.has_images
    assert table.source_ids(np.arange(3)).tolist() == [0, 0, 1] and table.ratios.tolist() == [1.0, 2.0]
    assert table.type_of_source.tolist() == [1, 0]
    assert len(dataset) == 3 and dataset.num_overlong == 0
    assert dataset.read(1).token.tolist() == [1000, 1001, 1002, 1003, 1004] and dataset.read(1).id == 1
    assert dataset.read(2).label.tolist() == [IGNORE_INDEX, 1, IGNORE_INDEX, 3]


def test_items_of_shards_and_of_files_are_the_same(tmp_path):
    source, folder = write_source(tmp_path, [3, 5, 4]), tmp_path / "files"
    before = TokenDataset([source], max_seq_len=64)
    expected = [plain(before.read(i)) for i in range(3)]
    first, last = write_shard(folder / "s.pkls", [(folder / f"{i}.pkl").read_bytes() for i in (0, 2)])
    entries = [
        RecordEntry("files/s.pkls", 3, 0, None, *first),
        RecordEntry("files/1.pkl", 5, 1),
        RecordEntry("files/s.pkls", 4, 2, None, *last),
    ]
    write_merged(entries, source.path)
    (folder / "0.pkl").unlink()
    dataset = TokenDataset([source], max_seq_len=64)
    assert [plain(dataset.read(i)) for i in range(3)] == expected
    assert dataset.place(2).endswith(f"s.pkls at byte {last[0]}")


def test_overlong_items_are_an_error_or_dropped_or_truncated(tmp_path):
    source = write_source(tmp_path, [10, 70, 65], image_lens=[5, 20, 20])
    with pytest.raises(ValueError, match=r"2 of 3 items .*max_seq_len 64; .*70 tokens .*1\.pkl.*--max_seq_len 70"):
        TokenDataset([source], max_seq_len=64)
    assert len(TokenDataset([source], max_seq_len=70)) == 3
    dropped = TokenDataset([source], 65, overlong="drop")
    assert dropped.table.lengths.tolist() == [10, 65] and dropped.num_overlong == 1
    assert [dropped.read(i).id for i in range(2)] == [0, 2]
    truncated = TokenDataset([source], 64, overlong="truncate")
    assert truncated.table.lengths.tolist() == [10, 64, 64] and truncated.num_overlong == 2
    assert truncated.read(1).token.tolist() == list(range(1000, 1064)) and len(truncated.read(1).label) == 64
    # A truncated item does not end in its image.
    assert truncated.table.image_lens.tolist() == [5, 0, 0]
    with pytest.raises(ValueError, match="the shortest: 10"):
        TokenDataset([source], 9, overlong="drop")


def test_ids_outside_of_the_vocabulary_are_rejected(tmp_path):
    dataset = TokenDataset([write_source(tmp_path, [5, 5])], 64)
    assert len(dataset.read(1).token) == 5
    dataset.use_vocabulary(1000, begin_image_id=3)
    assert len(dataset.read(0).token) == 5
    with pytest.raises(ItemReadError, match=r"files/1\.pkl.*1000"):
        dataset.read(1)


def test_the_image_alone_is_the_end_of_the_item(tmp_path):
    dataset = TokenDataset([write_source(tmp_path, [9, 6], image_lens=[4, 4])], 64)
    # The token of item 0 at 9 - 1 - 4.
    dataset.use_vocabulary(5000, begin_image_id=4)
    alone = dataset.read(0, image_only=True)
    assert alone.token.tolist() == [4, 5, 6, 7, 8] and alone.label.tolist() == dataset.read(0).label[4:].tolist()
    with pytest.raises(ItemReadError, match=r"files/1\.pkl.*an image of 4 tokens, but none begins there"):
        dataset.read(1, image_only=True)


def test_first_items_may_be_bad_if_that_is_allowed(tmp_path):
    dataset = TokenDataset([write_source(tmp_path / "a", [5] * 3), write_source(tmp_path / "b", [5])], 64)
    dataset.check_first_items()
    for number in (0, 1):
        (tmp_path / f"a/files/{number}.pkl").write_bytes(b"no pickle")
    dataset.check_first_items(max_bad_items=2)
    with pytest.raises(ItemReadError, match=r"a/files/1\.pkl"):
        dataset.check_first_items(max_bad_items=1)


def test_the_fingerprint_changes_with_all_that_decides_the_order(tmp_path):
    sources = [write_source(tmp_path / name, [10, 20], image_lens=[None, 4]) for name in "abc"]
    first = TokenDataset(sources[:1], 64).fingerprint
    # The same items in another folder.
    assert TokenDataset(sources[1:2], 64).fingerprint == first
    others = [
        TokenDataset(sources[:2], 64),
        TokenDataset([DataSource(sources[0].path, 2.0)], 64),
        TokenDataset([DataSource(sources[0].path, type="x")], 64),
        TokenDataset(sources[:1], 32),
        TokenDataset(sources[:1], 64, overlong="drop"),
        TokenDataset([write_source(tmp_path / "d", [10, 20])], 64),
    ]
    assert len({first, *(other.fingerprint for other in others)}) == 7


def test_all_problems_of_the_records_are_in_one_error(tmp_path):
    good, empty = write_source(tmp_path / "good", [5]), tmp_path / "empty.json"
    empty.write_text("[]")
    broken = tmp_path / "broken.json"
    broken.write_text('[{"len": 3}]')
    sources = [DataSource(empty), good, DataSource(broken), DataSource(tmp_path / "gone.json")]
    with pytest.raises(ValueError, match=r"empty\.json has no items.*broken\.json.*gone\.json"):
        TokenDataset(sources, 64)
