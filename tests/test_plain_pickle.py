"""Plain pickles: what was pickled is read, code and damage are rejected by name."""

import copyreg
import io
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.plain_pickle import load_plain

PLAIN = st.recursive(
    st.integers() | st.text(max_size=300) | st.booleans() | st.none() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None)
@given(PLAIN, st.integers(0, 5), st.sampled_from([io.BytesIO, lambda data: io.BufferedReader(io.BytesIO(data))]))
def test_what_was_pickled_is_read_and_the_next_one_after_it(value, protocol, open_file):
    payload = pickle.dumps(value, protocol)
    file = open_file(payload + payload)
    for _ in range(2):
        assert repr(load_plain(file, "x")) == repr(value)


@settings(max_examples=300, deadline=None)
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
        (b"Pid\n.", "persistent"),
        (b"K\x01Q.", "persistent"),
        (b"\x82\xfe.", "unregistered extension|refers to"),
        (b"", "ends too early"),
        (pickle.dumps([1])[:-1], "ends too early|truncated"),
        (b"]K\x01", "ends too early"),
        (b"a.", "stack underflow"),
    ],
)
def test_the_reason_is_named(payload, reason, capsys):
    with pytest.raises(ValueError, match=rf"^the file cannot be read: .*({reason})"):
        load_plain(io.BytesIO(payload), "the file")
    assert not capsys.readouterr().out


def test_a_registered_extension_is_code_too(capsys):
    copyreg.add_extension("builtins", "print", 0xFE)
    try:
        with pytest.raises(ValueError, match=r"refers to builtins\.print"):
            load_plain(io.BytesIO(b"\x80\x02\x82\xfe)R."), "the file")
    finally:
        copyreg.remove_extension("builtins", "print", 0xFE)
