"""The data config: its sources, and one error with all problems."""

from pathlib import Path

import pytest

from data.formats.data_config import DataSource, load_data_config


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
    text = f"""
        META:
          - path: a.json
          - {{path: b.jsonl, ratio: 0.5, type: captions}}
          - {{path: both.json, ratio: 2}}
          - path: {absolute}
        """
    for byte_order_mark in ("", "\ufeff"):
        assert load_data_config(write(beside, byte_order_mark + text)) == [
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
          - {path: ./a.json, ratio: HUGE}
          - {path: empty.json, type: 3}
          - {path: a.txt, ratio: .nan}
          - {ratio: yes}
          - a.json
        meta: 1
        """.replace("HUGE", "1" + "0" * 400),
    )
    with pytest.raises(ValueError) as error:
        load_data_config(config)
    for part in (
        f"data config {config}: ",
        "unknown key 'meta' beside META",
        "entry 1 has an unknown key 'ratios' (known: path, ratio, type)",
        "entry 2: ratio must be a number above 0 and below 1e9, got 0",
        "entry 2: record missing.json does not exist (looked for",
        "entry 3: ratio must be a number above 0 and below 1e9, got 1000",
        "entry 3 lists",
        "as entry 1 does",
        "entry 4: record empty.json is empty",
        "entry 4: type must be a name, got 3",
        "entry 5: record a.txt must end in .json or .jsonl or .pkl or .pth",
        "entry 5: ratio must be a number above 0 and below 1e9, got nan",
        "entry 6: ratio must be a number above 0 and below 1e9, got True",
        "entry 6: path must name a record file, got None",
        "entry 7 must be a mapping with the key path, got 'a.json'",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("data.yaml", "- path: a.json", "must have a key META"),
        ("data.yaml", "META: []", "must have a key META with a list of one or more"),
        ("data.yaml", f"META: {'x' * 9999}", "must have a key META"),
        ("data.yaml", "META: [", "is not valid YAML"),
        ("data.yaml", "META: !!python/object/apply:os.getpid []", "is not valid YAML"),
        ("record.json", '\ufeff [{"file": "files/0.pkl"}]', "a record itself; .* META: .{path: record.json}"),
        ("renamed", '{"file": "files/0.pkl", "len": 5, "id": 0}\n', "a record itself; .* META: .{path: renamed}"),
        ("record.pkl", "\x80", "a record itself; .* META: .{path: record.pkl}"),
    ],
)
def test_what_is_no_data_config(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message) as error:
        load_data_config(write(tmp_path, text, name))
    assert len(str(error.value)) < 500
    with pytest.raises(FileNotFoundError, match="data config .*none.yaml does not exist"):
        load_data_config(tmp_path / "none.yaml")
