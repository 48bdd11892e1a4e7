"""Pickles read as a description: what they would call is written down, and nothing is called."""

import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from .._errors import ArgumentError


class Name(str):
    """A class or function that a pickle names, such as `collections.OrderedDict`."""

    __slots__ = ()


@dataclass(eq=False, slots=True)
class Call:
    """What a pickle would have called, with what, and the state it would have set after that."""

    function: object
    arguments: object
    state: object = None


@dataclass(eq=False, slots=True)
class Persistent:
    """Something that a pickle keeps outside of itself, by its identity there."""

    identity: object


@dataclass(eq=False, slots=True)
class OddKey:
    """A key of a dict that is not used as one: hashing it, or finding it, could take forever."""

    value: object


_MARK = object()
_DICTS = {"collections.OrderedDict", "collections.defaultdict", "builtins.dict"}
_ROOT = {"copyreg._reconstructor", "copy_reg._reconstructor"}
_KEYS = (str, bool, bytes, type(None), Name, Call)
_HASHED_AS_ITSELF = 2**61 - 1  # whole numbers below; above, all multiples of it share one hash
_OLD = (b"(", b"}", b"]", b"c")  # how an object's pickle begins before protocol 2


@dataclass(frozen=True)
class Pickled:
    """A pickle's value, the byte after it, and the identities of what it keeps elsewhere."""

    value: object
    end: int
    identities: list[object]


def read_pickle(
    data: bytes, where: str, *, at: int = 0, known: Collection[str] | None = None
) -> Pickled:
    """Read one pickle.

    Dicts (ordered ones too), lists, tuples and plain values are themselves, sets are lists; every
    other object is a `Call`. Protocols 2 to 5, all in memory of the order of the pickle's own.

    Args:
        data: the bytes.
        where: the file, for errors.
        at: where the pickle begins.
        known: the only names it may mention; None for any, since none is ever looked up.

    Raises:
        ArgumentError: not a whole pickle, or it mentions another name.
    """
    machine = _Machine(data, at, where, known)
    try:
        value = machine.run()
    except _StrayError as error:
        raise ArgumentError(
            f"{where}: its pickle must mention only {', '.join(sorted(known or ()))[:200]}, "
            f"got {error}. Load it with the program that wrote it, if you trust it, and save "
            "tensors only."
        ) from error
    except (
        IndexError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        struct.error,
    ) as error:
        if data[at : at + 1] in _OLD:
            raise ArgumentError(
                f"{where} must hold a pickle of protocol 2 to 5, got one saved with protocol 0 or "
                "1. Load it with torch.load, if you trust it, and save it with protocol 2 or newer."
            ) from error
        raise ArgumentError(
            f"{where} must hold a whole pickle of protocol 2 to 5, got a damaged one at byte "
            f"{machine.at}. Copy or download it again."
        ) from error
    return Pickled(value, machine.at, machine.identities)


class _StrayError(Exception):
    """A name that the pickle may not mention."""


class _Machine:
    """The stack machine of pickles, without the part that finds and calls things.

    https://docs.python.org/3/library/pickletools.html documents each instruction.
    """

    def __init__(self, data: bytes, at: int, where: str, known: Collection[str] | None) -> None:
        self.data, self.at, self.where, self.known = data, at, where, known
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}
        self.identities: list[object] = []
        self.copied = 0  # items of lists, by calls that make something else of them

    def run(self) -> object:
        while True:
            code = self.data[self.at]
            self.at += 1
            if code == 0x2E:  # '.', stop
                return self.stack.pop()
            _STEPS[code](self)

    # ── bytes and stack ──

    def take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        if len(piece) < count:
            raise IndexError("the pickle ends early")
        self.at += count
        return piece

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def signed(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little", signed=True)

    def line(self) -> str:
        end = self.data.index(b"\n", self.at)
        text = self.data[self.at : end].decode()
        self.at = end + 1
        return text

    def push(self, value: object) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[object]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    # ── what takes more than a line ──

    def name(self, module: object, attribute: object) -> None:
        if not (type(module) is str and type(attribute) is str):
            raise TypeError("a name must be text")
        found = Name(f"{module}.{attribute}")
        if self.known is not None and found not in self.known:
            raise _StrayError(f"{found!s:.80}")
        self.push(found)

    def call(self, arguments: object) -> None:
        function = self.stack.pop()
        if not isinstance(arguments, tuple):
            raise TypeError("arguments must be a tuple")
        if isinstance(function, Name) and function in _DICTS:
            pairs = arguments[0] if function != "collections.defaultdict" and arguments else []
            self.push({_key(key): value for key, value in self.counted(pairs)})
        elif function == "torch.Size" and arguments and isinstance(arguments[0], tuple):
            self.push(arguments[0])
        elif isinstance(function, Name) and function in _ROOT:
            self.push(Call(arguments[0], ()))
        else:
            self.push(Call(function, arguments))

    def counted(self, items: object) -> list[Any] | tuple[Any, ...]:
        """Items to be copied: more than the pickle has bytes are the same ones again and again."""
        if not isinstance(items, list | tuple):
            raise TypeError("items must be in a list")
        self.copied += len(items)
        if self.copied > len(self.data):
            raise ValueError("a list is copied again and again")
        return items

    def persistent(self) -> None:
        identity = self.stack.pop()
        self.identities.append(identity)
        self.push(Persistent(identity))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Call):
            target.state = state  # attributes of a dict, such as its _metadata, are left out

    def append(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Call):
            raise TypeError("only lists grow")

    def set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[_key(key)] = value
        elif not isinstance(target, Call):
            raise TypeError("only dicts have items")

    def as_dict(self) -> None:
        items = self.since_mark()
        self.push({})
        self.set_items(items)

    def protocol(self) -> None:
        if self.number(1) > 5:
            raise ValueError("a protocol of the future")

    def skip(self, count: int) -> None:
        self.take(count)

    def pop_mark(self) -> None:
        self.since_mark()

    def pop(self) -> None:
        # A mark may be all there is to pop.
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()


def _key(value: object) -> object:
    if type(value) is int:
        return value if abs(value) < _HASHED_AS_ITSELF else OddKey(value)
    return value if type(value) in _KEYS else OddKey(value)


def _from_top(make: Callable[..., object], count: int) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        items = m.stack[-count:]
        if len(items) < count:
            raise IndexError("the stack is empty")
        del m.stack[-count:]
        m.push(make(items))

    return step


def _text(bytes_of_length: int) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.take(m.number(bytes_of_length)).decode("utf-8", "surrogatepass"))


def _raw(bytes_of_length: int) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.take(m.number(bytes_of_length)))


def _new_with_keywords(m: _Machine) -> None:
    m.stack.pop()
    m.call(m.stack.pop())


def _name_from_stack(m: _Machine) -> None:
    attribute = m.stack.pop()
    m.name(m.stack.pop(), attribute)


_STEPS: dict[int, Callable[[_Machine], None]] = {
    # the frame of a pickle
    0x80: _Machine.protocol,
    0x95: lambda m: m.skip(8),
    ord("("): lambda m: m.marks.append(len(m.stack)),
    ord("0"): _Machine.pop,
    ord("1"): _Machine.pop_mark,
    ord("2"): lambda m: m.push(m.stack[-1]),
    # plain values
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.push(m.signed(4)),
    ord("K"): lambda m: m.push(m.number(1)),
    ord("M"): lambda m: m.push(m.number(2)),
    0x8A: lambda m: m.push(m.signed(m.number(1))),
    0x8B: lambda m: m.push(m.signed(m.number(4))),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    ord("U"): _text(1),
    ord("T"): _text(4),
    0x8C: _text(1),
    ord("X"): _text(4),
    0x8D: _text(8),
    ord("C"): _raw(1),
    ord("B"): _raw(4),
    0x8E: _raw(8),
    0x96: _raw(8),
    # containers
    ord(")"): lambda m: m.push(()),
    0x85: _from_top(tuple, 1),
    0x86: _from_top(tuple, 2),
    0x87: _from_top(tuple, 3),
    ord("t"): lambda m: m.push(tuple(m.since_mark())),
    ord("]"): lambda m: m.push([]),
    0x8F: lambda m: m.push([]),
    ord("l"): lambda m: m.push(m.since_mark()),
    0x91: lambda m: m.push(m.since_mark()),
    ord("a"): lambda m: m.append([m.stack.pop()]),
    ord("e"): lambda m: m.append(m.since_mark()),
    0x90: lambda m: m.append(m.since_mark()),
    ord("}"): lambda m: m.push({}),
    ord("d"): _Machine.as_dict,
    ord("s"): lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    ord("u"): lambda m: m.set_items(m.since_mark()),
    # memory
    ord("q"): lambda m: m.memo.__setitem__(m.number(1), m.stack[-1]),
    ord("r"): lambda m: m.memo.__setitem__(m.number(4), m.stack[-1]),
    0x94: lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    ord("h"): lambda m: m.push(m.memo[m.number(1)]),
    ord("j"): lambda m: m.push(m.memo[m.number(4)]),
    # objects
    ord("c"): lambda m: m.name(m.line(), m.line()),
    0x93: _name_from_stack,
    ord("R"): lambda m: m.call(m.stack.pop()),
    0x81: lambda m: m.call(m.stack.pop()),
    0x92: _new_with_keywords,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent,
}
