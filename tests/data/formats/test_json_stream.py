"""Streaming JSON: the same values as `json` gives, one at a time, and errors with their place."""

import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.formats import json_stream
from data.formats.json_stream import iter_json_values

# `ijson` would reject or change the last three.
VALUES = [{"a": [1, {"b": 'é\n"]}'}]}, 12345678901, "s", None, {}, [[]], -1.5e10, 10**30, "\ud83d", float("inf")]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("form", ["indented", "jsonl", "with_bom"])
def test_values_are_streamed_whatever_the_chunks(tmp_path, monkeypatch, chunk, form):
    monkeypatch.setattr(json_stream, "CHUNK_CHARS", chunk)
    text = {
        "indented": "\n\n  " + json.dumps(VALUES, indent=1) + "\n",
        "jsonl": "\n".join(map(json.dumps, VALUES)) + "\n\n",
        "with_bom": "\ufeff" + json.dumps(VALUES),
    }[form]
    (tmp_path / "in").write_text(text, encoding="utf-8")
    assert list(iter_json_values(tmp_path / "in")) == VALUES


@pytest.mark.parametrize(
    "text, reason",
    [
        (b'[{"a":1},\n{"b":]', "is not valid JSON at line 2, column 6"),
        (b"[1,2", "is not valid JSON at line 1, column 5: Expecting .,. or"),
        (b"[]x", "follows the end"),
        (b'{"a":1}\n{"b"', "is not valid JSON at line 2, column 5"),
        (b"[1 2]", "is not valid JSON at line 1, column 4"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"[" * 100_000, "holds JSON that cannot be read"),
        (b"1" * 6000, "holds JSON that cannot be read"),
    ],
)
def test_wrong_json_is_located(tmp_path, text, reason):
    (tmp_path / "in.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"input .*in\.json .*{reason}"):
        list(iter_json_values(tmp_path / "in.json", what="input"))
    with pytest.raises(FileNotFoundError, match=r"input .*gone\.json does not exist"):
        list(iter_json_values(tmp_path / "gone.json", what="input"))


NESTED = st.recursive(
    st.sampled_from(["},", "]", "[", "}\\n{", '"},"', "\u2028", "é😀", "\\", ""]) | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
