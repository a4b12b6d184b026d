"""The token file: round trip, and refusal of all that is not plain data."""

import os
import pickle

import pytest

from data.token_file import load_token_file, save_token_file


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
