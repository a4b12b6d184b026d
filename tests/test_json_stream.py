"""Streaming JSON: one value at a time, and many at a time with the same values and errors."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import json_stream
from data.json_stream import iter_json_batches, iter_json_values

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
    [('[{"a":1},\n{"b":]', "line 2, column 6"), ("[1,2", "end of the file"), ("[]x", "follows the end"),
     ('{"a":1}\n{"b"', "line 2, column 5"), ("[1 2]", "line 1, column 4"), ('[{"a": 1}', "end of the file")],
)  # fmt: skip
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


# What a batch must not be cut by: the ends of objects and lists in strings, and in what an object holds.
TEXT = st.sampled_from(["},", "]", "[", "}\\n{", '"},"', "a", "\u2028", "\x85", "é😀", "\\", ""])
NESTED = st.recursive(
    TEXT | st.integers() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECT = st.dictionaries(TEXT, NESTED, max_size=4)
FORMS = {
    "one line": json.dumps,
    "indented": lambda values: json.dumps(values, indent=1, ensure_ascii=False),
    "one per line": lambda values: "[" + ",".join("\n" + json.dumps(value) for value in values) + "\n]\n",
    "compact": lambda values: json.dumps(values, separators=(",", ":")),
    "jsonl": lambda values: "\n".join(map(json.dumps, values)) + "\n",
    "jsonl with gaps": lambda values: " \n\r\n" + "\r\n \n".join(map(json.dumps, values)),
}
BATCH_CHARS = st.sampled_from([7, 30, 200, 1_000_000])
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(values=st.lists(OBJECT | NESTED, max_size=12), form=st.sampled_from(list(FORMS)), batch_chars=BATCH_CHARS)
def test_batches_give_the_same_values(tmp_path, values, form, batch_chars):
    path = tmp_path / "in.json"
    path.write_text(FORMS[form](values), encoding="utf-8", newline="")
    expected = outcome(iter_json_values(path))
    if not (form.startswith("jsonl") and values and isinstance(values[0], list)):  # which would seem to be the list
        assert expected == (values, None)
    assert outcome(chain.from_iterable(batches(path, batch_chars))) == expected


@QUICK
@given(st.data())
def test_batches_give_the_same_errors(tmp_path, data):
    text = FORMS[data.draw(st.sampled_from(list(FORMS)))](data.draw(st.lists(OBJECT, max_size=8)))
    place, width = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 2))
    text = text[:place] + data.draw(st.sampled_from([*'",:{}[]\n 0', ""])) + text[place + width :]
    path = tmp_path / "in.json"
    path.write_text(text, encoding="utf-8", newline="")
    expected = outcome(iter_json_values(path))
    assert outcome(chain.from_iterable(batches(path, data.draw(BATCH_CHARS)))) == expected


@pytest.mark.parametrize("form", FORMS)
def test_records_are_read_in_batches(tmp_path, form):
    values = [{"file": f"files/{i}.pkl", "len": i, "id": i} for i in range(1000)]
    (tmp_path / "in.json").write_text(FORMS[form](values), newline="")
    sizes = list(map(len, batches(tmp_path / "in.json", 5000)))
    assert sum(sizes) == 1000 and 5 < len(sizes) < 50  # one by one if an error had been met


def test_batches_stop_at_bytes_that_are_no_text(tmp_path):
    (tmp_path / "in.json").write_bytes(b'{"a": 1}\n' * 9000 + b"\xff\n")
    for values in (iter_json_values(tmp_path / "in.json"), chain.from_iterable(batches(tmp_path / "in.json", 5000))):
        with pytest.raises(ValueError, match="is not UTF-8 text"):
            list(values)
    with pytest.raises(FileNotFoundError, match=r"record .*gone\.json does not exist"):
        next(iter_json_batches(tmp_path / "gone.json", what="record"))


def batches(path: Path, batch_chars: int) -> Iterator[list]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "BATCH_CHARS", batch_chars)
        yield from iter_json_batches(path)


def outcome(values: Iterator) -> tuple[list, str | None]:
    """The values, and the error in which they end."""
    seen = []
    try:
        seen.extend(values)
    except ValueError as error:
        return seen, str(error)
    return seen, None
