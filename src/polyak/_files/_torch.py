"""Files of `torch.save`: the pickle is read as a description, the elements where they lie.

Since torch 1.6 a file is a zip archive: `<name>/data.pkl`, a pickle that refers to storages by key,
and their bytes, not compressed, in `<name>/data/<key>`. Before, it was four pickles, then a pickle
of the keys, then each storage as its number of elements and its bytes.
https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

import io
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .._errors import ArgumentError
from ._bytes import File
from ._checkpoint import Unreadable
from ._pickle import Call, Name, Persistent, Pickled, read_pickle
from ._stored import Stored, TensorInfo, check_unfolded, checked_shape, checked_view

ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # a pickle of one long number
_DEEPEST = 32  # mappings in mappings
_RESAVE = "Load it with torch.load, if you trust it, and save the state dict again with torch.save."

_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.UntypedStorage": torch.uint8,
}
_UNREAD_WIDTHS = {  # bytes of an element of storages that are not read, only passed over
    "torch.QInt8Storage": 1,
    "torch.QInt32Storage": 4,
    "torch.QUInt8Storage": 1,
    "torch.QUInt4x2Storage": 1,
    "torch.QUInt2x4Storage": 1,
}
_LATER_DTYPES = (  # of tensors whose storage says only how many bytes it has
    "uint16 uint32 uint64 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
)
DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in _LATER_DTYPES.split()
    if hasattr(torch, name)  # the last one since torch 2.7
} | {str(dtype): dtype for dtype in _STORAGES.values()}


@dataclass(frozen=True)
class _Storage:
    """Bytes that tensors are views of, and what the pickle says of them."""

    place: range
    dtype: torch.dtype
    count: int


def read_torch(file: File, start: int = 0, size: int | None = None) -> object:
    """What `torch.save` wrote into a file, or into a stretch of one; tensors as `Stored`.

    Nothing that the file names is imported or called: what is no tensor, no container and no plain
    value is `Unreadable`.
    """
    size = file.size - start if size is None else size
    head = file.read(start, min(size, len(LEGACY)))
    if head.startswith(ZIP):
        return _read_zip(file, start, size)
    if head == LEGACY:
        return _read_legacy(file, start, size)
    raise ArgumentError(
        f"{file.path.name} must be a file of torch.save, got another format. {_RESAVE}"
    )


# ── the zip archive ──────────────────────────────────────────────────────────────────────────────


class _Stretch(io.RawIOBase):
    """A stretch of a file as a stream, for `zipfile`."""

    def __init__(self, file: File, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("before the start")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, count: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        count = left if count is None or count < 0 else min(count, left)
        found = self._file.read(self._start + self._at, count) if count else b""
        self._at += len(found)
        return found


def _read_zip(file: File, start: int, size: int) -> object:
    records = _records(file, start, size)
    roots = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise ArgumentError(
            f"{file.path.name} must be a file of torch.save, got another zip archive. {_RESAVE}"
        )
    folder = roots[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in records:
        raise ArgumentError(
            f"{file.path.name} must hold tensors by name, got a TorchScript program. Load it with "
            "torch.jit.load, if you trust it, and save its state_dict()."
        )

    packed = [info for info in records.values() if info.compress_type or info.flag_bits & 1]
    if packed:
        raise ArgumentError(
            f"{file.path.name} must hold its records as they are, got {packed[0].filename!r:.80} "
            f"compressed or encrypted. {_RESAVE}"
        )

    def contents(name: str) -> bytes:
        place = _place(file, start, size, records[name])
        return file.read(place.start, len(place))

    order = f"{folder}byteorder"
    if order in records and contents(order) != b"little":
        raise ArgumentError(
            f"{file.path.name} must hold its numbers in little-endian order, got another. {_RESAVE}"
        )
    pickle = contents(roots[0])

    def place(key: str) -> range:
        name = f"{folder}data/{key}"
        if name not in records:
            raise _damaged(file, f"storage {key!r:.40} is not in it")
        return _place(file, start, size, records[name])

    return _Reader(file, place).tree(read_pickle(pickle, file.path.name).value, size)


def _records(file: File, start: int, size: int) -> dict[str, zipfile.ZipInfo]:
    """The archive's directory, each record once."""
    try:
        with zipfile.ZipFile(_Stretch(file, start, size)) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError) as e:
        raise _damaged(file, f"its archive cannot be read: {e!s:.80}") from e
    records = {info.filename: info for info in listed}
    if len(records) < len(listed):
        raise _damaged(file, "a record occurs twice in its archive")
    return records


def _place(file: File, start: int, size: int, info: zipfile.ZipInfo) -> range:
    """Where in the file the bytes of a record lie."""
    header = info.header_offset
    if not 0 <= header <= size - 30 or info.file_size != info.compress_size:
        raise _damaged(file, f"record {info.filename!r:.80} lies outside of it")
    local = file.read(start + header, 30)
    name, extra = struct.unpack("<HH", local[26:])
    first = header + 30 + name + extra
    if local[:4] != ZIP or not 0 <= info.file_size <= size - first:
        raise _damaged(file, f"record {info.filename!r:.80} lies outside of it")
    return range(start + first, start + first + info.file_size)


# ── before torch 1.6 ─────────────────────────────────────────────────────────────────────────────


def _read_legacy(file: File, start: int, size: int) -> object:
    data = file.read(start, min(size, 2**16))
    found: list[Pickled] = []
    while len(found) < 5:  # magic number, version, system, the object, keys of its storages
        try:
            found.append(read_pickle(data, file.path.name, at=found[-1].end if found else 0))
        except ArgumentError:
            if len(data) == size:
                raise
            # The pickles end somewhere: read further, twice as far as before.
            data = file.read(start, min(size, 2 * len(data)))
    _, version, system, value, keys = (pickled.value for pickled in found)
    if version != 1001 or not (isinstance(system, dict) and system.get("little_endian") is True):
        raise _damaged(file, "its version or byte order is unknown")
    if not (isinstance(keys, list) and all(type(key) is str for key in keys)):
        raise _damaged(file, "its list of storages cannot be read")
    widths = {}
    for identity in found[3].identities:
        kind, key, _ = _storage_identity(identity, file)
        widths[key] = _width(kind, file)
    places = _places(file, range(start + found[4].end, start + size), keys, widths)

    def place(key: str) -> range:
        if key not in places:
            raise _damaged(file, f"storage {key!r:.40} is not in it")
        return places[key]

    return _Reader(file, place).tree(value, size)


def _width(kind: str, file: File) -> int:
    """Bytes of an element, without which the storages after it cannot be found."""
    if kind in _STORAGES:
        return _STORAGES[kind].itemsize
    if kind not in _UNREAD_WIDTHS:
        raise ArgumentError(
            f"{file.path.name} must hold storages of known classes, got {kind:.80}. {_RESAVE}"
        )
    return _UNREAD_WIDTHS[kind]


def _places(
    file: File, stretch: range, keys: list[str], widths: Mapping[str, int]
) -> dict[str, range]:
    """Where storages lie that follow one another, each after its number of elements."""
    places, at = {}, stretch.start
    for key in keys:
        if key not in widths:
            raise _damaged(file, f"storage {key!r:.40} belongs to no tensor")
        first = at + 8
        at = first + int.from_bytes(file.read(at, 8), "little") * widths[key]
        if at > stretch.stop:
            raise _damaged(file, f"storage {key!r:.40} ends after it")
        places[key] = range(first, at)
    return places


# ── from the pickle to tensors ───────────────────────────────────────────────────────────────────


def _storage_identity(identity: object, file: File) -> tuple[str, str, int]:
    """Class, key and number of elements of ("storage", class, key, device, elements, …)."""
    match identity:
        # What follows is None, or in an old file the part of another storage that this one is.
        case ("storage", Name() as kind, str() as key, _, int() as count, *rest) if not any(rest):
            if 0 <= count <= file.size:
                return kind.replace("torch.cuda.", "torch.", 1), key, count
    raise _damaged(file, "one of its storages cannot be read")


class _Reader:
    """Turns what the pickle describes into names, tensors and plain values."""

    def __init__(self, file: File, place: Callable[[str], range]) -> None:
        self.file, self.place = file, place
        self._done: dict[int, object] = {}
        self._storages: dict[str, _Storage] = {}
        self._views: set[Stored] = set()

    def tree(self, value: object, size: int) -> object:
        """The node of the whole, which lies in `size` bytes."""
        root = self.node(value)
        check_unfolded(self._views, size, self.file.path.name)
        return root

    def node(self, value: object, depth: int = 0) -> object:
        """Mappings of names to nodes, tensors, plain values and `Unreadable`."""
        if isinstance(value, Call | dict):
            if id(value) not in self._done:
                self._done[id(value)] = self._new(value, depth)
            return self._done[id(value)]
        if isinstance(value, Persistent):
            return Unreadable("a bare storage", "Save tensors instead.")
        return Unreadable(_words(value), _RESAVE) if isinstance(value, Name) else value

    def _new(self, value: Call | dict[object, object], depth: int) -> object:
        if isinstance(value, Call):
            return self._tensor(value)
        if depth > _DEEPEST:
            return Unreadable("a mapping too deep inside of others", _RESAVE)
        self._done[id(value)] = {}  # what holds itself is seen empty
        return {key: self.node(item, depth + 1) for key, item in value.items()}

    def _tensor(self, call: Call, inside: bool = False) -> object:
        """The tensor that the call would build; `inside` of a parameter there is no other."""
        assert isinstance(call.arguments, tuple)  # `_pickle` lets no other pass
        match call.function, *call.arguments:
            case "torch._utils._rebuild_parameter", Call() as data, _, _ if not inside:
                return self._tensor(data, inside=True)
            case "torch._utils._rebuild_parameter_with_state", Call() as data, *_ if not inside:
                return self._tensor(data, inside=True)
            case "torch._tensor._rebuild_from_type_v2", Name() as f, kind, tuple() as given, _:
                if inside or kind not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
                    return Unreadable(_words(kind), "Save plain tensors instead.")
                return self._tensor(Call(f, given), inside=True)
            case "torch._utils._rebuild_tensor", Persistent(storage), first, shape, strides:
                return self._view(storage, first, shape, strides)
            case "torch._utils._rebuild_tensor_v2", Persistent(
                storage
            ), first, shape, strides, *more:
                return self._view(storage, first, shape, strides, flags=more[2:])
            case (
                "torch._utils._rebuild_tensor_v3",
                Persistent(storage),
                first,
                shape,
                strides,
                _,
                _,
                Name() as dtype,
                *flags,
            ):
                return self._view(storage, first, shape, strides, flags=flags, later=dtype)
        return Unreadable(_words(call.function), _RESAVE)

    def _view(
        self,
        identity: object,
        first: object,
        shape: object,
        strides: object,
        flags: Sequence[object] = (),
        later: Name | None = None,
    ) -> object:
        """A view of a storage; `later` is the dtype where the storage does not know it."""
        if any(flags):
            return Unreadable(
                "a tensor to be conjugated or negated",
                "Save it with .resolve_conj().resolve_neg().",
            )
        kind, key, count = _storage_identity(identity, self.file)
        if kind not in _STORAGES:
            return Unreadable(f"a tensor in a {kind:.80}", "Convert it to a usual dtype.")
        storage = self._storage(_STORAGES[kind], key, count)
        dtype = storage.dtype if later is None else DTYPES.get(later)
        if dtype is None:
            return Unreadable("a tensor of an unknown dtype", "Convert it to another one.")
        info = TensorInfo(dtype, checked_shape(shape, "a tensor", self.file.path.name))
        view = checked_view(self.file, storage.place, first, info, strides)
        self._views.add(view)
        return view

    def _storage(self, dtype: torch.dtype, key: str, count: int) -> _Storage:
        """The storage of that key, which must be the same wherever it is named."""
        if key not in self._storages:
            self._storages[key] = _Storage(self.place(key), dtype, count)
        storage = self._storages[key]
        if (storage.dtype, storage.count) != (dtype, count):
            raise _damaged(self.file, f"storage {key!r:.40} is given two dtypes or sizes")
        if count * dtype.itemsize > len(storage.place):
            raise _damaged(self.file, f"storage {key!r:.40} is smaller than its {count} elements")
        return storage


def _words(value: object) -> str:
    return f"{value:.80}" if isinstance(value, Name) else "an unknown object"


def _damaged(file: File, why: str) -> ArgumentError:
    return ArgumentError(
        f"path must be a whole file of torch.save, got {str(file.path)!r} ({why}). "
        "Copy or download it again."
    )
