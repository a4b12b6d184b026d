"""Plain pickles: what was pickled is read; code and damage are rejected with the reason."""

import io
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.formats.plain_pickle import load_plain

PLAIN = st.recursive(
    st.integers() | st.text(max_size=300) | st.booleans() | st.none() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_pickle_is_a_value_error(data):
    payload = bytearray(pickle.dumps(data.draw(PLAIN), data.draw(st.integers(0, 5))))
    # The index of a memo of 4 bytes is left out: it can ask for memory that is not there.
    byte = st.integers(0, 255).filter(lambda value: value != pickle.LONG_BINPUT[0])
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(byte)
    try:
        load_plain(io.BytesIO(payload), "the file")
    except ValueError as error:
        assert str(error).startswith("the file cannot be read: ")


class Evil:
    def __reduce__(self):
        return print, ("it ran",)


@pytest.mark.parametrize(
    "payload, reason",
    [
        (pickle.dumps(Evil()), "refers to builtins.print"),
        (pickle.dumps(Evil(), 0), "refers to __builtin__.print"),
        (b"\x80\x04cposix\nsystem\n(\x8c\x06ls > aR.", "refers to posix.system"),
        (b"c" + b"m" * 10**6 + b"\nname\n.", "refers to mmm"),
        (b"Pid\n.", "persistent"),
        (b"\x82\xfe.", "unregistered extension"),
        (b"", "ends too early"),
        (pickle.dumps([1])[:-1], "ends too early|truncated"),
    ],
)
def test_the_reason_is_named(payload, reason, capsys):
    with pytest.raises(ValueError, match=rf"^the file cannot be read: .*({reason})") as error:
        load_plain(io.BytesIO(payload), "the file")
    assert not capsys.readouterr().out and len(str(error.value)) < 300
