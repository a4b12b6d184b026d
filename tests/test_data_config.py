"""The data config: what it says, and that everything wrong with it is said at once."""

from pathlib import Path

import pytest

from data.data_config import DataSource, load_data_config


def write(folder: Path, text: str, name: str = "data.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_paths_ratios_and_types(tmp_path, monkeypatch):
    beside, cwd = tmp_path / "beside", tmp_path / "cwd"
    for folder, names in ((beside, ["a.json", "both.json"]), (cwd, ["b.jsonl", "both.json"])):
        folder.mkdir()
        for name in names:
            write(folder, "[]", name)
    monkeypatch.chdir(cwd)
    absolute = write(tmp_path, "[]", "c.json")
    config = write(
        beside,
        f"""
        META:
          - path: a.json
          - {{path: b.jsonl, ratio: 0.5, type: captions}}
          - {{path: both.json, ratio: 2}}
          - path: {absolute}
        """,
    )
    assert load_data_config(config) == [
        DataSource(beside / "a.json", 1.0, "default"),
        DataSource(Path("b.jsonl"), 0.5, "captions"),
        DataSource(beside / "both.json", 2.0, "default"),
        DataSource(absolute, 1.0, "default"),
    ]


def test_all_problems_in_one_error(tmp_path):
    write(tmp_path, "[]", "a.json")
    write(tmp_path, "", "empty.json")
    write(tmp_path, "[]", "a.txt")
    config = write(
        tmp_path,
        """
        META:
          - {path: a.json, ratios: 2}
          - {path: missing.json, ratio: 0}
          - {path: ./a.json}
          - {path: empty.json, type: 3}
          - {path: a.txt}
          - {ratio: yes}
          - a.json
        meta: 1
        """,
    )
    with pytest.raises(ValueError) as error:
        load_data_config(config)
    for part in (
        f"data config {config}: ",
        "unknown key 'meta' beside META (did you mean 'META'?)",
        "entry 1 has an unknown key 'ratios' (did you mean 'ratio'?)",
        "entry 2: ratio must be a number above 0, got 0",
        "entry 2: record missing.json does not exist (looked for",
        "entry 3 lists",
        "as entry 1 does",
        "entry 4: record empty.json is empty",
        "entry 4: type must be a name, got 3",
        "entry 5: record a.txt must end in .json or .jsonl or .pkl or .pth",
        "entry 6: ratio must be a number above 0, got True",
        "entry 6: path must name a record file, got None",
        "entry 7 must be a mapping with the key path, got 'a.json'",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have a key META"),
        ("- path: a.json", "must have a key META"),
        ("META:", "META must be a list of one or more"),
        ("META: []", "META must be a list of one or more"),
        ("META: [", "is not valid YAML"),
        ("META: !!python/object/apply:os.getpid []", "is not valid YAML"),
        ("META: [{path: a.json, ratio: .nan}]", "ratio must be a number above 0, got nan"),
        ("META: [{path: a.json, ratio: .inf}]", "ratio must be a number above 0, got inf"),
    ],
)
def test_not_a_data_config(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_data_config(write(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("record.json", '[\n{"file": "files/0.pkl", "len": 5, "id": 0}\n]\n'),
        ("record.json", '\ufeff [{"file": "files/0.pkl", "len": 5, "id": 0}]'),
        ("0-of-1-record.jsonl", '{"file": "files/0.pkl", "len": 5, "id": 0}\n'),
        ("renamed", '{"file": "files/0.pkl", "len": 5, "id": 0}\n'),
        ("record.pkl", "\x80"),
    ],
)
def test_a_record_given_as_data_config_is_told(tmp_path, name, text):
    with pytest.raises(ValueError, match=f"seems to be a record itself; .* META: .{{path: {name}}}"):
        load_data_config(write(tmp_path, text, name))


def test_a_data_config_with_a_byte_order_mark_and_messages_of_bounded_length(tmp_path):
    write(tmp_path, "[]", "a.json")
    assert load_data_config(write(tmp_path, "\ufeffMETA: [{path: a.json}]"))
    for text in (f"META: {'x' * 9999}", f"META: [{'x' * 9999}]", f"META: [{{path: a.json, ratio: {'x' * 9999}}}]"):
        with pytest.raises(ValueError) as error:
            load_data_config(write(tmp_path, text))
        assert len(str(error.value)) < 500


def test_missing_yaml(tmp_path):
    with pytest.raises(FileNotFoundError, match="data config .*none.yaml does not exist"):
        load_data_config(tmp_path / "none.yaml")
