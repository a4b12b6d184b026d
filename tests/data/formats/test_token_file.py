"""The token file: round trip, and rejection of all that is not plain data."""

import os
import pickle
import tracemalloc

import pytest

from data.formats.token_file import MAX_ID, ItemReadError, load_token_file, save_token_file, write_shard


class Evil:
    """Unpickled by the plain `pickle`, it would run a command."""

    def __reduce__(self):
        return os.mkdir, ("it_ran",)


def test_round_trip(tmp_path):
    save_token_file(tmp_path / "7.pkl", [0, 5, 65535], [-100, 5, 65535], 7)
    item = load_token_file(tmp_path / "7.pkl")
    assert (item.token.tolist(), item.label.tolist(), item.id) == ([0, 5, 65535], [-100, 5, 65535], 7)
    expected = {"token": [0, 5, 65535], "label": [-100, 5, 65535], "id": 7}
    assert pickle.loads((tmp_path / "7.pkl").read_bytes()) == expected
    with pytest.raises(ValueError, match="item 8: 2 tokens but 1 labels"):
        save_token_file(tmp_path / "8.pkl", [1, 2], [1], 8)
    assert os.listdir(tmp_path) == ["7.pkl"]


@pytest.mark.parametrize("protocol", range(6))
def test_items_of_any_pickle_protocol_load_up_to_the_largest_of_their_length(tmp_path, protocol):
    for num_tokens in (1, 2000):
        item = {"token": [MAX_ID] * num_tokens, "label": [-MAX_ID] * num_tokens, "id": "x" * 999}
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(item, protocol))
        found = load_token_file(tmp_path / "a.pkl", expected_len=num_tokens)
        assert found.label[-1] == -MAX_ID and found.id == "x" * 999


@pytest.mark.parametrize(
    "value",
    [
        [1],
        {"token": [1]},
        {"token": [1], "label": [1, 2]},
        {"token": [], "label": []},
        {"token": [1.5], "label": [1]},
        {"token": [[1], [2, 3]], "label": [1]},
        {"token": [True], "label": [1]},
        {"token": [2**31], "label": [1]},
        {"token": [2**70], "label": [1]},
        {"token": (1,), "label": (1,)},
    ],
)
def test_wrong_content_is_rejected(tmp_path, value):
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(ItemReadError, match=r"bad\.pkl"):
        load_token_file(tmp_path / "bad.pkl")


def test_items_of_a_shard(tmp_path):
    payloads = [pickle.dumps({"token": [i] * (i + 1), "label": [-100] * (i + 1), "id": i}, i) for i in range(4)]
    places = write_shard(tmp_path / "0.pkls", iter(payloads))
    assert (tmp_path / "0.pkls").read_bytes() == b"".join(payloads) and os.listdir(tmp_path) == ["0.pkls"]
    for i in (2, 0, 3, 1):
        item = load_token_file(tmp_path / "0.pkls", *places[i])
        assert item.token.tolist() == [i] * (i + 1) and item.id == i


def test_a_shard_that_is_cut_or_holds_code_is_rejected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = write_shard("0.pkls", [pickle.dumps({"token": [1], "label": [1]}), pickle.dumps({"token": Evil()})])
    with pytest.raises(ItemReadError, match=r"0\.pkls.*refers to posix\.mkdir"):
        load_token_file("0.pkls", *places[1])
    assert not (tmp_path / "it_ran").exists()
    with pytest.raises(ItemReadError, match=rf"0\.pkls ends before byte {sum(places[1]) + 1}"):
        load_token_file("0.pkls", places[1][0], places[1][1] + 1)
    with pytest.raises(ItemReadError, match="cannot be read"):
        load_token_file("0.pkls", places[0][0] + 3, 5)


def test_a_file_that_is_too_large_is_rejected_unread(tmp_path):
    """10 GB, all of them a hole."""
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"token": [1], "label": [1]}))
    os.truncate(tmp_path / "a.pkl", 10 << 30)
    tracemalloc.start()
    for expected_len in (1, None):
        with pytest.raises(ItemReadError, match=r"a\.pkl cannot be read: 10737418240 bytes are more than its item"):
            load_token_file(tmp_path / "a.pkl", expected_len=expected_len)
    with pytest.raises(ItemReadError, match=r"8192 bytes are more than its item can take \(8096\)"):
        load_token_file(tmp_path / "a.pkl", offset=0, nbytes=8192, expected_len=100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_what_is_no_file_is_rejected(tmp_path):
    (tmp_path / "folder.pkl").mkdir()
    os.mkfifo(tmp_path / "pipe.pkl")
    reasons = {"folder.pkl": "no regular file", "pipe.pkl": "no regular file", "gone.pkl": "does not exist"}
    for name, reason in reasons.items():
        with pytest.raises(ItemReadError, match=rf"{name}.*{reason}"):
            load_token_file(tmp_path / name)


@pytest.mark.parametrize(
    "token, label, reason",
    [
        ([0, 9, 0], [-100, 9, 0], "has 3 tokens, but its record says 2"),
        ([0, 10], [0, 0], "holds ids from 0 to 10, but the model has 10"),
        ([-1, 9], [0, 0], "holds ids from -1 to 9"),
        ([0, 1], [0, 10], "has label 10 at position 1"),
        ([0, 1], [-101, 0], "has label -101 at position 0"),
    ],
)
def test_items_that_do_not_fit_record_or_vocabulary_are_rejected(tmp_path, token, label, reason):
    save_token_file(tmp_path / "7.pkl", [0, 9], [-100, 9], 7)
    assert load_token_file(tmp_path / "7.pkl", expected_len=2, num_ids=10).token.tolist() == [0, 9]
    save_token_file(tmp_path / "7.pkl", token, label, 7)
    with pytest.raises(ItemReadError, match=rf"token file .*7\.pkl {reason}"):
        load_token_file(tmp_path / "7.pkl", expected_len=2, num_ids=10)
