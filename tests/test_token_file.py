"""The token file: round trip, and refusal of all that is not plain data."""

import os
import pickle
import tracemalloc
from contextlib import nullcontext

import numpy as np
import pytest

from data.token_file import MAX_ID, ItemReadError, check_tokens, load_token_file, save_token_file, write_shard


class Evil:
    """Unpickled by the plain `pickle`, it would run a command."""

    def __reduce__(self):
        return os.mkdir, ("it_ran",)


def test_round_trip(tmp_path):
    save_token_file(tmp_path / "7.pkl", [0, 5, 65535], [-100, 5, 65535], 7)
    item = load_token_file(tmp_path / "7.pkl")
    assert (item.token.tolist(), item.label.tolist(), item.id) == ([0, 5, 65535], [-100, 5, 65535], 7)
    assert os.listdir(tmp_path) == ["7.pkl"]
    assert pickle.loads((tmp_path / "7.pkl").read_bytes()) == {
        "token": [0, 5, 65535], "label": [-100, 5, 65535], "id": 7
    }  # fmt: skip


def test_nothing_is_left_of_a_wrong_item(tmp_path):
    with pytest.raises(ValueError, match="item 7: 2 tokens but 1 labels"):
        save_token_file(tmp_path / "7.pkl", [1, 2], [1], 7)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_files_of_the_recipe_load(tmp_path, protocol):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"token": [1, 2], "label": [-100, 2], "id": "x"}, protocol))
    assert load_token_file(tmp_path / "a.pkl").id == "x"


def test_code_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"token": Evil(), "label": []}))
    with pytest.raises(ValueError, match=r"evil\.pkl.*refers to posix\.mkdir"):
        load_token_file(tmp_path / "evil.pkl")
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"not a pickle", pickle.dumps([1]), pickle.dumps({"token": [1], "label": [1, 2]}),
     pickle.dumps({"token": [], "label": []}), pickle.dumps({"token": [1.5], "label": [1]}),
     pickle.dumps({"token": ["a"], "label": [1]}), pickle.dumps({"token": [[1], [2, 3]], "label": [1]}),
     pickle.dumps({"token": [True], "label": [1]}), pickle.dumps({"token": [2**31], "label": [1]}),
     pickle.dumps({"token": (1,), "label": (1,)})],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / "bad.pkl").write_bytes(content)
    with pytest.raises(ItemReadError, match=r"bad\.pkl"):
        load_token_file(tmp_path / "bad.pkl")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pkl"):
        load_token_file(tmp_path / "gone.pkl")


def test_items_of_a_shard(tmp_path):
    payloads = [pickle.dumps({"token": [i] * (i + 1), "label": [-100] * (i + 1), "id": i}, i) for i in range(4)]
    places = write_shard(tmp_path / "0.pkls", iter(payloads))
    assert (tmp_path / "0.pkls").read_bytes() == b"".join(payloads) and os.listdir(tmp_path) == ["0.pkls"]
    for i in (2, 0, 3, 1):
        item = load_token_file(tmp_path / "0.pkls", *places[i])
        assert item.token.tolist() == [i] * (i + 1) and item.id == i


def test_a_shard_that_is_cut_or_holds_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = write_shard("0.pkls", [pickle.dumps({"token": [1], "label": [1]}), pickle.dumps({"token": Evil()})])
    with pytest.raises(ValueError, match=r"0\.pkls.*refers to posix\.mkdir"):
        load_token_file("0.pkls", *places[1])
    assert not (tmp_path / "it_ran").exists()
    with pytest.raises(ValueError, match=rf"0\.pkls ends before byte {sum(places[1]) + 1}"):
        load_token_file("0.pkls", places[1][0], places[1][1] + 1)
    with pytest.raises(ValueError, match="cannot be read"):
        load_token_file("0.pkls", places[0][0] + 3, 5)


def test_nothing_is_left_of_a_shard_that_fails(tmp_path):
    def payloads():
        yield b"one"
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write_shard(tmp_path / "0.pkls", payloads())
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("protocol", range(6))
def test_the_largest_item_of_its_length_is_read(tmp_path, protocol):
    for num_tokens in (1, 2000):
        item = {"token": [MAX_ID] * num_tokens, "label": [-MAX_ID] * num_tokens, "id": "x" * 999}
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(item, protocol))
        assert load_token_file(tmp_path / "a.pkl", expected_len=num_tokens).label[-1] == -MAX_ID


def test_a_file_that_is_too_large_is_refused_unread(tmp_path):
    """10 GB, of which the disk holds nothing."""
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"token": [1], "label": [1]}))
    os.truncate(tmp_path / "a.pkl", 10 << 30)
    tracemalloc.start()
    for expected_len in (1, None):
        with pytest.raises(ItemReadError, match=r"a\.pkl cannot be read: 10737418240 bytes are more than an item"):
            load_token_file(tmp_path / "a.pkl", expected_len=expected_len)
    with pytest.raises(ItemReadError, match=r"8192 bytes are more than an item of 100 tokens can take \(8096\)"):
        load_token_file(tmp_path / "a.pkl", offset=0, nbytes=8192, expected_len=100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.pkl")
    (tmp_path / "folder.pkl").mkdir()
    (tmp_path / "file").touch()
    for name, reason in (
        ("pipe.pkl", "no regular file"),
        ("folder.pkl", "directory"),
        ("file/0.pkl", "Not a directory"),
    ):
        with pytest.raises(ItemReadError, match=rf"{name}.*{reason}"):
            load_token_file(tmp_path / name)
    with pytest.raises(ItemReadError, match=r"gone\.pkl does not exist"):
        load_token_file(tmp_path / "gone.pkl")


def test_an_item_of_another_length_than_its_record_says_is_refused(tmp_path):
    save_token_file(tmp_path / "7.pkl", [1, 2, 3], [1, 2, 3], 7)
    assert len(load_token_file(tmp_path / "7.pkl", expected_len=3).token) == 3
    with pytest.raises(ItemReadError, match=r"7\.pkl has 3 tokens, but its record says 4"):
        load_token_file(tmp_path / "7.pkl", expected_len=4)


@pytest.mark.parametrize(
    "token, label, reason",
    [([0, 9], [-100, 9], None), ([0, 10], [0, 0], "holds ids from 0 to 10, but the model has 10"),
     ([-1, 9], [0, 0], "holds ids from -1 to 9"), ([0, 1], [0, 10], "has label 10 at position 1"),
     ([0, 1], [-1, 0], "has label -1 at position 0"), ([0, 1], [-101, 0], "has label -101")],
)  # fmt: skip
def test_ids_outside_of_the_vocabulary_are_refused(tmp_path, token, label, reason):
    save_token_file(tmp_path / "7.pkl", token, label, 7)
    with pytest.raises(ItemReadError, match=rf"token file .*7\.pkl {reason}") if reason else nullcontext():
        load_token_file(tmp_path / "7.pkl", num_ids=10)
    with pytest.raises(ItemReadError, match=f"item 7 {reason}") if reason else nullcontext():
        check_tokens(np.array(token, np.int32), np.array(label, np.int32), 10, "item 7")
