"""Plain pickles: what is read, by either unpickler, and that nothing in a file can run, hang or kill the process."""

import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import plain_pickle
from data.plain_pickle import MAX_DEPTH, load_plain, load_plain_sequence

INTEGERS = st.integers(-(2**63), 2**63 - 1)
PLAIN = st.recursive(
    INTEGERS | st.text(max_size=300) | st.booleans() | st.none() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3) | INTEGERS, inner, max_size=4),
    max_leaves=10,
)
ITEM = {"token": [7, 300, 70_000] * 2000, "label": [-100] * 6000, "id": 5}
# Each is made in a process of its own, where it may take 1 GB.
BOMBS = {
    "tuples as a key": rb"""b"})" + b"\x85" * 3_000_000 + b"K\x01s." """,
    "memo index": rb"""b"\x80\x04K\x01r\xff\xff\xff\x0f." """,
    "nested lists": rb"""b"]" * 3_000_000 + b"a" * 2_999_999 + b"." """,
    "nested dicts": rb"""b"}K\x01" * 1_000_000 + b"N" + b"s" * 1_000_000 + b"." """,
    "nested tuples": rb"""b")" + b"\x85" * 3_000_000 + b"." """,
    "marks": rb"""b"(" * 3_000_000 + b"." """,
    "a list in itself": rb"""b"]\x94h\x00a." """,
    "references": rb"""b"]\x94" + b"".join(b"](" + b"h%c" % i * 99 + b"e\x94" for i in range(14)) + b"." """,
    "keys of one hash": rb"""b"}(" + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N"
        for i in range(200_000)) + b"u." """,
    "the same in text": rb"""b"(" + b"".join(b"L%dL\nN" % (i * (2**61 - 1) << 61) for i in range(90_000)) + b"d." """,
    "the same in the memo": rb"""b"N" + b"".join(b"p%d\n" % (i * (2**61 - 1) << 61) for i in range(90_000)) + b"." """,
    "digits": rb"""b"I" + b"9" * 3_000_000 + b"\n." """,
    "a long integer": rb"""b"\x8b" + (3_000_000).to_bytes(4, "little") + b"\x01" * 3_000_000 + b"." """,
    "bytes that are not there": rb"""b"\x96" + (1 << 40).to_bytes(8, "little") + b"." """,
    "a string that is not there": rb"""b"\x8d" + (1 << 40).to_bytes(8, "little") + b"." """,
    "a frame that is not there": rb"""b"\x80\x04\x95" + (1 << 62).to_bytes(8, "little") + b"N." """,
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(PLAIN, st.integers(0, 5))
def test_both_unpicklers_give_what_was_pickled(value, protocol):
    payload = pickle.dumps(value, protocol)
    assert same(load_plain(payload, "x"), value)
    assert same(plain_pickle._PlainUnpickler(io.BytesIO(payload)).load(), value)
    assert same(load_plain_sequence(payload + payload, 2, "x"), [value, value])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_items_go_to_the_unpickler_in_c(protocol):
    payload = pickle.dumps(ITEM, protocol)
    assert plain_pickle._scan(payload, 0) == (len(payload), 3)
    listed = pickle.dumps([{"file": f"files/{i}.pkl", "len": i, "id": i} for i in range(9000)], protocol)
    assert plain_pickle._scan(listed, 0)[0] == len(listed)
    assert load_plain(payload, "x") == ITEM


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_pickle_is_a_value_error(data):
    payload = bytearray(pickle.dumps(data.draw(PLAIN), data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        load_plain(bytes(payload), "the file")
    except ValueError as error:
        assert str(error).startswith("the file cannot be read: ")


def test_a_bomb_is_bounded():
    """In 1 GB whatever it is, and it comes to an end: all are rejected."""
    script = """
import resource
from data.token_file import ItemReadError, parse_token_bytes
from tests.test_plain_pickle import BOMBS
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
for name, code in BOMBS.items():
    try:
        parse_token_bytes(eval(code.decode().strip()), f"{name}.pkl")
    except ItemReadError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    for name, line in zip(BOMBS, told, strict=True):
        assert line.startswith(f"token file {name}.pkl "), line


@pytest.mark.parametrize(
    "payload, reason",
    [(pickle.dumps(print), "refers to builtins.print"), (pickle.dumps(print, 0), "refers to __builtin__.print"),
     (pickle.dumps({1, 2}), "more than plain data"), (pickle.dumps(b"x"), "more than plain data"),
     (b"\x80\x04cposix\nsystem\n(\x8c\x06ls > aR.", "refers to posix.system"), (b"Pid\n.", "more than plain data"),
     (pickle.dumps({(1,): 2}), "key that is neither string nor number"), (pickle.dumps(2**64), "integer of 9 bytes"),
     (b"", "ends too early"), (pickle.dumps([1])[:-1], "ends too early"), (b"]K\x01", "ends too early"),
     (pickle.dumps([1]) + b"xyz", "3 bytes follow the end"), (b"a.", "stack underflow"),
     (b"(K\x01]K\x02s.", "damaged")],
)  # fmt: skip
def test_the_reason_is_named(payload, reason):
    with pytest.raises(ValueError, match=rf"^the file cannot be read: .*{reason}"):
        load_plain(payload, "the file")


def test_depth_is_bounded():
    value = 1
    for _ in range(MAX_DEPTH):
        value = [value]
    assert load_plain(pickle.dumps(value), "x") == value
    with pytest.raises(ValueError, match=f"nested more than {MAX_DEPTH} deep"):
        load_plain(pickle.dumps([value]), "x")
    assert load_plain(pickle.dumps({"a": (1, (2, "b"))}), "x") == {"a": (1, (2, "b"))}


def same(left: object, right: object) -> bool:
    """Equal, and of the same types: 1, 1.0 and True are not the same."""
    return left == right and repr(left) == repr(right)
