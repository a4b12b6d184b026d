"""Streaming JSON: the same values as `json` gives, one at a time, and errors with their place."""

import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import json_stream
from data.json_stream import iter_json_values

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
    [
        ('[{"a":1},\n{"b":]', "line 2, column 6"),
        ("[1,2", "line 1, column 5: Expecting .,. or"),
        ("[]x", "follows the end"),
        ('{"a":1}\n{"b"', "line 2, column 5"),
        ("[1 2]", "line 1, column 4"),
        ('[{"a": 1}', "line 1, column 10: Expecting .,. or"),
    ],
)
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


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, f"[1{'0' * 6000}]", "1" * 6000])
def test_json_that_python_cannot_read_is_named(tmp_path, text):
    (tmp_path / "in.json").write_text(text)
    with pytest.raises(ValueError, match=r"input .*in\.json holds JSON that cannot be read"):
        list(iter_json_values(tmp_path / "in.json", what="input"))


@pytest.mark.parametrize("form", ["list", "jsonl"])
def test_every_value_that_python_writes_is_read(tmp_path, form):
    """Also those that `ijson` rejects or changes: NaN, integers of more than 64 bits, half of a surrogate pair."""
    values = [{"a": float("nan")}, {"b": 2**64}, {"c": 10**30}, {"d": "\ud83d"}, {"e": 1e400}]
    text = json.dumps(values) if form == "list" else "\n".join(map(json.dumps, values))
    (tmp_path / "in").write_text(text)
    assert list(map(repr, iter_json_values(tmp_path / "in"))) == list(map(repr, values))


NESTED = st.recursive(
    st.sampled_from(["},", "]", "[", "}\\n{", '"},"', "\u2028", "é😀", "\\", ""]) | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(NESTED, max_size=8), indent=st.sampled_from([None, 1]), data=st.data())
def test_a_changed_list_is_read_as_json_reads_it(tmp_path, values, indent, data):
    """Whatever the chunks; the same values as `json.loads` gives, or an error at the line that it names."""
    text = json.dumps(values, indent=indent)
    place, width = data.draw(st.integers(1, len(text))), data.draw(st.integers(0, 2))
    text = text[:place] + data.draw(st.sampled_from([*'",:{}[]\n 0', ""])) + text[place + width :]
    (tmp_path / "in.json").write_text(text, newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK_CHARS", data.draw(st.sampled_from([1, 9, 1 << 20])))
        try:
            expected = json.loads(text)
        except json.JSONDecodeError as error:
            with pytest.raises(ValueError, match=rf"in\.json is not valid JSON at line {error.lineno}, "):
                list(iter_json_values(tmp_path / "in.json"))
        else:
            assert list(iter_json_values(tmp_path / "in.json")) == expected


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK_CHARS", 1 << 14)
    (tmp_path / "in.json").write_text("[" + '{"file": "files/0.pkl", "len": 100},\n' * 20_000 + "0]")
    tracemalloc.start()
    assert sum(1 for _ in iter_json_values(tmp_path / "in.json")) == 20_001
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (tmp_path / "in.json").stat().st_size / 4
