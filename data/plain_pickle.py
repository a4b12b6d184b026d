"""Pickles as data and never as code: numbers, strings, None, lists, tuples and dicts, in bounded time and memory.

Stands beneath `data/token_file.py` (items) and `data/record_list.py` (lists of items of the recipe). Python's own
unpickler is not fit for a file from elsewhere even if it refuses every class: three megabytes of nested tuples as the
key of a dict end the process, and ten bytes with a large memo index take gigabytes. So the opcodes are looked at first:

- the few that such files are made of cannot do harm, and go to the unpickler in C;
- anything else goes to the one in Python, cut down to plain data, where no container is the key of a dict.

Neither takes more than some 100 bytes of memory per byte of the pickle; how long that may be is for the caller to say.
"""

import io
import pickle
import re
from collections.abc import Callable
from functools import lru_cache

from data.messages import one_line

MAX_DEPTH = 16  # containers inside each other; an item has 2, a list of items 3
MAX_INT_BYTES = 8  # of larger integers, thousands can share one hash, so that a dict of them takes hours
MAX_INT_CHARS = 24  # the same for integers in text, with sign and suffix, and for the indices of the memo
_CONTAINERS = frozenset({dict, list, tuple})
_SCALARS = frozenset({int, float, bool, str, type(None)})
_STOP, _LONG1 = pickle.STOP[0], pickle.LONG1[0]
_LENGTH_BYTES = {pickle.SHORT_BINUNICODE[0]: 1, pickle.BINUNICODE[0]: 4, _LONG1: 1}
_PLAIN_OPCODES = b"".join(
    (pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP)
    + (pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.LONG, pickle.FLOAT, pickle.BINFLOAT)
    + (pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1)
    + (pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8)
    + (pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS)
    + (pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
    + (pickle.EMPTY_DICT, pickle.DICT, pickle.SETITEM, pickle.SETITEMS)
    + (pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GET, pickle.BINGET, pickle.LONG_BINGET)
    + (pickle.GLOBAL, pickle.STACK_GLOBAL)  # only for the message: what they name is refused
)


def load_plain(payload: bytes, name: str) -> object:
    """The value of one pickle of any protocol. Raises ValueError, which begins with `name`, for anything but plain data
    nested at most MAX_DEPTH deep, and for bytes after its end."""
    value, end = _load_at(payload, 0, name)
    if end != len(payload):
        raise ValueError(f"{name} cannot be read: {len(payload) - end} bytes follow the end of its pickle")
    return value


def load_plain_sequence(payload: bytes, num_values: int, name: str) -> list[object]:
    """The values of the first pickles of several in a row. Raises ValueError as `load_plain` does."""
    values, position = [], 0
    for _ in range(num_values):
        value, position = _load_at(payload, position, name)
        values.append(value)
    return values


def _load_at(payload: bytes, start: int, name: str) -> tuple[object, int]:
    """The value of the pickle from byte `start` on, and where it ends."""
    try:
        end, num_containers = _scan(payload, start)
        is_harmless = end > 0
        if is_harmless:
            with memoryview(payload)[start:end] as view:
                # The buffer saves a read per opcode where the pickle has no frames (protocols 2 and 3).
                value = _RefusingUnpickler(io.BufferedReader(io.BytesIO(view), 1 << 17)).load()
        else:
            file = io.BytesIO(payload)
            file.seek(start)
            value = _PlainUnpickler(file).load()
            end = file.tell()
        if not is_harmless or num_containers > MAX_DEPTH:
            _check_depth(value)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{name} cannot be read: {one_line(error)}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything; all of it means the same
        reason = "it ends too early" if isinstance(error, EOFError) else f"it is damaged ({one_line(error)})"
        raise ValueError(f"{name} cannot be read: {reason}") from error
    return value, end


def _scan(payload: bytes, start: int) -> tuple[int, int]:
    """Where a pickle ends, and how many lists and dicts it makes, or a number above MAX_DEPTH; 0 for its end if the
    unpickler in C might be harmed.

    Each opcode is looked at exactly as the unpickler will, so that nothing can hide in what is taken for a number.
    """
    max_memo_byte = min(len(payload) >> 16, 255)
    skip_harmless = _harmless_run(max_memo_byte)
    position, num_containers = start, 0
    while (position := skip_harmless(payload, position).end()) < len(payload):
        opcode = payload[position]
        if opcode == _STOP:
            return position + 1, num_containers
        if opcode in b"]}":
            num_containers += 1
            position += 1
            if num_containers > MAX_DEPTH:  # more of them need not be counted
                skip_harmless = _harmless_run(max_memo_byte, rb"|[]}]")
        elif opcode in _LENGTH_BYTES:
            text = position + 1 + _LENGTH_BYTES[opcode]
            num_bytes = int.from_bytes(payload[position + 1 : text], "little")
            if opcode == _LONG1 and num_bytes > MAX_INT_BYTES:
                break
            position = text + num_bytes
        else:
            break
    return 0, num_containers


@lru_cache
def _harmless_run(max_memo_byte: int, more: bytes = b"") -> Callable[[bytes, int], re.Match]:
    """The match of a pattern that takes opcodes of numbers, lists and dicts, without those that open a container.

    The unpickler in C keeps its memo in an array; no index in it may go far beyond the size of the pickle.
    """
    put_long = b"r..[\\x00-\\x%02x]\\x00" % max_memo_byte
    numbers = rb"M..|K.|J....|G.{8}|[N\x88\x89]"
    others = rb"|[ae(us\x94]|[hq].|j....|\x80.|\x95.{8}|"
    return re.compile(rb"(?:" + numbers + others + put_long + more + rb")*+", re.S).match


class _RefusingUnpickler(pickle.Unpickler):
    """A second barrier: the opcodes that call these are not let through to it."""

    def find_class(self, module_name: str, global_name: str):
        raise pickle.UnpicklingError(f"it refers to {module_name}.{global_name}, but only plain data is allowed")

    def persistent_load(self, pid: object):
        raise pickle.UnpicklingError("it holds a persistent reference, but only plain data is allowed")


class _OnlyPlain(dict):
    def __missing__(self, opcode: int):
        raise pickle.UnpicklingError(f"it is damaged, or more than plain data (opcode {bytes([opcode])!r})")


class _PlainUnpickler(pickle._Unpickler):
    """Python's unpickler in Python, of which there is one in every version, without what is not plain data."""

    dispatch = _OnlyPlain((opcode, pickle._Unpickler.dispatch[opcode]) for opcode in _PLAIN_OPCODES)

    def find_class(self, module_name: str, global_name: str):
        raise pickle.UnpicklingError(f"it refers to {module_name}.{global_name}, but only plain data is allowed")

    def load_integer_text(self) -> None:
        line = self._read_integer_line()
        booleans = {b"00\n": False, b"01\n": True}  # how protocol 0 writes them
        self.append(booleans[line] if line in booleans else int(line.rstrip(b"L\n"), 0))

    def load_integer_bytes(self) -> None:
        num_bytes = self.read(1)[0]
        if num_bytes > MAX_INT_BYTES:
            raise pickle.UnpicklingError(f"it holds an integer of {num_bytes} bytes")
        self.append(pickle.decode_long(self.read(num_bytes)))

    def load_put_text(self) -> None:
        self.memo[int(self._read_integer_line())] = self.stack[-1]

    def load_pairs(self) -> None:
        self._set_pairs(self.pop_mark())

    def load_pair(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_pairs([key, value])

    def load_dict_of_pairs(self) -> None:
        pairs = self.pop_mark()
        self.append({})
        self._set_pairs(pairs)

    def _read_integer_line(self) -> bytes:
        line = self.readline()
        if len(line) > MAX_INT_CHARS:
            raise pickle.UnpicklingError(f"it holds an integer of {len(line)} digits")
        return line

    def _set_pairs(self, pairs: list) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(pairs) % 2 or not set(map(type, pairs[::2])) <= _SCALARS:
            raise pickle.UnpicklingError("it is damaged, or has a key that is neither string nor number")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    dispatch[pickle.INT[0]] = dispatch[pickle.LONG[0]] = load_integer_text
    dispatch[_LONG1] = load_integer_bytes
    dispatch[pickle.PUT[0]] = load_put_text
    dispatch[pickle.SETITEMS[0]] = load_pairs
    dispatch[pickle.SETITEM[0]] = load_pair
    dispatch[pickle.DICT[0]] = load_dict_of_pairs


def _check_depth(value: object) -> None:
    """Raises UnpicklingError for containers nested too deep, or in themselves; walks level by level."""
    level = [value] if type(value) in _CONTAINERS else []
    for _ in range(MAX_DEPTH):
        found: dict[int, object] = {}  # each once, where a list is a thousand times in another
        for container in level:
            children = container.values() if type(container) is dict else container
            if not _SCALARS.issuperset(map(type, children)):
                found.update((id(child), child) for child in children if type(child) in _CONTAINERS)
        level = list(found.values())
        if not level:
            return
    raise pickle.UnpicklingError(f"it is nested more than {MAX_DEPTH} deep, as no item or list of items is")
