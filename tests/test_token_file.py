"""The token file: round trip, and refusal of all that is not plain data."""

import os
import pickle

import pytest

from data.token_file import load_token_file, save_token_file, write_shard


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
     pickle.dumps({"token": ["a"], "label": [1]}), pickle.dumps({"token": [[1], [2, 3]], "label": [1]})],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / "bad.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.pkl"):
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
