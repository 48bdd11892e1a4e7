"""Folders of torch.distributed.checkpoint: `.metadata` says which piece of a tensor lies where.

Each piece is a file of `torch.save` inside of a larger one. The metadata is a pickle; of it only
the names below may be mentioned, and none of them is called.
https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._errors import ArgumentError
from ._bytes import File
from ._checkpoint import Contents, Files, Later, Unreadable
from ._folder import inside, read_json, trusted_ties
from ._pickle import Call, Name, read_pickle
from ._stored import Stored, TensorInfo, check_unfolded, checked_shape, read_boxes
from ._torch import DTYPES, read_torch

METADATA = ".metadata"
WORDS = "polyak.json"  # what a folder of ours says of itself; files say it in their headers
_MODULE = "torch.distributed.checkpoint"
_KNOWN = {
    *DTYPES,
    f"{_MODULE}.metadata.Metadata",
    f"{_MODULE}.metadata.TensorStorageMetadata",
    f"{_MODULE}.metadata.BytesStorageMetadata",
    f"{_MODULE}.metadata.ChunkStorageMetadata",
    f"{_MODULE}.metadata.TensorProperties",
    f"{_MODULE}.metadata.MetadataIndex",
    f"{_MODULE}.metadata.StorageMeta",
    f"{_MODULE}.metadata._MEM_FORMAT_ENCODING",
    f"{_MODULE}.filesystem._StorageInfo",
    "builtins.set",
    "builtins.list",
    "collections.OrderedDict",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "torch.Size",
    "torch.serialization._get_layout",
}
_SMALL = 2**16  # bytes of a value that is no tensor


@dataclass(frozen=True, eq=False)
class Chunked:
    """A tensor in pieces that together hold each element once.

    Args:
        info: dtype and shape of the whole.
        pieces: each with its own place on disk.
        low: first indices of each piece: [pieces, dimensions].
        high: the indices that each piece stays below: [pieces, dimensions].
    """

    info: TensorInfo
    pieces: Sequence[Stored]
    low: Any
    high: Any

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor, row by row, in fresh memory."""
        return read_boxes(self, start, stop)

    def box(self, low: Sequence[int], high: Sequence[int]) -> Tensor:
        """The elements with indices from `low` on and below `high`."""
        sizes = [above - below for below, above in zip(low, high, strict=True)]
        result = torch.empty(sizes, dtype=self.info.dtype, device="cpu")
        first, last = np.maximum(self.low, low), np.minimum(self.high, high)
        for piece in np.flatnonzero((first < last).all(axis=1)).tolist():
            begin, end = first[piece].tolist(), last[piece].tolist()
            origin = self.low[piece].tolist()
            target = result
            for axis, (b, e) in enumerate(zip(begin, end, strict=True)):
                target = target.narrow(axis, b - low[axis], e - b)
            target.copy_(
                self.pieces[piece].box(
                    [b - o for b, o in zip(begin, origin, strict=True)],
                    [e - o for e, o in zip(end, origin, strict=True)],
                )
            )
        return result


class _Pieces(Sequence[Stored]):
    """Pieces of a tensor, each looked at when it is asked for: a folder may hold thousands."""

    def __init__(self, look: Sequence[Callable[[], Stored]]) -> None:
        self._look = look
        self._found: dict[int, Stored] = {}

    def __len__(self) -> int:
        return len(self._look)

    def __getitem__(self, index: Any) -> Any:
        if index not in self._found:
            self._found[index] = self._look[index]()
        return self._found[index]


def outline(folder: Path) -> tuple[Mapping[str, str], dict[str, TensorInfo]]:
    """What a folder says of itself and of its tensors; the pieces are not looked at."""
    files = Files()
    try:
        contents = read_dcp(folder, files, closely=False)
    finally:
        files.close()
    tensors = {name: value for name, value in contents.tree.items() if isinstance(value, Chunked)}
    return contents.metadata, {name: tensor.info for name, tensor in tensors.items()}


def read_dcp(folder: Path, files: Files, *, closely: bool = True) -> Contents:
    """The state dict of a folder, nested as it was saved.

    Args:
        folder: where it lies.
        files: those that are opened.
        closely: look at every piece, so that nothing is left to be refused when it is read.
    """
    file = files.open(inside(folder, METADATA))
    root = read_pickle(file.read(0, file.size), METADATA, known=_KNOWN).value
    fields = _fields(root, "Metadata")
    entries, places = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not (isinstance(entries, dict) and isinstance(places, dict)):
        raise _damaged(folder, "it lists no tensors")
    reader = _Reader(folder, files, _by_name(places, folder))
    paths = fields.get("planner_data")
    tree: dict[str, object] = {}
    for name, entry in entries.items():
        if type(name) is not str:
            raise _damaged(folder, "a name is not text")
        path = paths.get(name) if isinstance(paths, dict) else None
        if not _put(tree, path if _is_path(path) else (name,), reader.node(name, entry)):
            raise _damaged(folder, f"something else has the place of {name!r:.80}")
    check_unfolded(reader.tensors, reader.size, METADATA)
    for tensor in reader.tensors if closely else ():
        list(tensor.pieces)
    words = _words(folder, files)
    ties = trusted_ties(entries, words)
    return Contents("torch distributed checkpoint", tree, words, ties)


def _words(folder: Path, files: Files) -> dict[str, str]:
    """What a folder of ours says of itself, as metadata of a safetensors file."""
    if not (folder / WORDS).exists():
        return {}
    return {"polyak": json.dumps(read_json(inside(folder, WORDS), files))}


def _is_path(path: object) -> bool:
    """Names of mappings, and places in lists."""
    return (
        isinstance(path, tuple)
        and path != ()
        and all(type(key) is str or (type(key) is int and 0 <= key < 2**31) for key in path)
    )


def _put(tree: dict[Any, object], path: Any, value: object) -> bool:
    """Place a value in nested mappings; False when its place is taken."""
    here = tree
    for key in path[:-1]:
        inner = here.setdefault(key, {})
        if not isinstance(inner, dict):
            return False
        here = inner
    return here.setdefault(path[-1], value) is value


Piece = tuple[tuple[int, ...] | None, Mapping[Any, object]]


def _by_name(places: Mapping[object, object], folder: Path) -> dict[str, list[Piece]]:
    """For each name its pieces: the offset of each and where it is stored."""
    found: dict[str, list[Piece]] = {}
    for index, info in places.items():
        key = _fields(index, "MetadataIndex")
        name, offset = key.get("fqn"), key.get("offset")
        if type(name) is not str:
            raise _damaged(folder, "a piece has no name")
        at = None if offset is None else checked_shape(offset, name, METADATA)
        found.setdefault(name, []).append((at, _fields(info, "_StorageInfo")))
    return found


def _fields(value: object, of: str) -> Mapping[Any, object]:
    """The attributes of an object of that class."""
    if (
        isinstance(value, Call)
        and isinstance(value.function, Name)
        and value.function.rpartition(".")[2] == of
        and (isinstance(value.state, dict) or value.state is None)
    ):
        return value.state or {}
    raise ArgumentError(f"{METADATA} must be that of a torch.distributed.checkpoint, got no {of}.")


class _Reader:
    """Turns entries of the metadata into tensors on disk."""

    def __init__(self, folder: Path, files: Files, pieces: Mapping[str, list[Piece]]) -> None:
        self.folder, self.files, self.pieces = folder, files, pieces
        self.tensors: list[Chunked] = []
        self._checked: dict[str, File] = {}

    @property
    def size(self) -> int:
        """Bytes of the files that hold pieces."""
        return sum(file.size for file in {*self._checked.values()})

    def node(self, name: str, entry: object) -> object:
        """One entry: a tensor in pieces, or a small value that is read when asked for."""
        pieces = self.pieces.get(name, [])
        if not isinstance(entry, Call) or not str(entry.function).endswith(
            ".TensorStorageMetadata"
        ):
            return Later(lambda: self._value(name, pieces))
        fields = _fields(entry, "TensorStorageMetadata")
        dtype = self._dtype(fields.get("properties"))
        if dtype is None:
            return Unreadable("a tensor of an unknown dtype", "Convert it to another one.")
        info = TensorInfo(dtype, checked_shape(fields.get("size"), name, METADATA))
        self.tensors.append(self._tensor(name, info, fields.get("chunks"), pieces))
        return self.tensors[-1]

    def _dtype(self, properties: object) -> torch.dtype | None:
        state = properties.state if isinstance(properties, Call) else None
        dtype = state[0] if isinstance(state, tuple) and state else None
        return DTYPES.get(dtype) if isinstance(dtype, Name) else None

    def _tensor(self, name: str, info: TensorInfo, chunks: object, pieces: list[Piece]) -> Chunked:
        sizes: dict[tuple[int, ...], tuple[int, ...]] = {}
        for chunk in chunks if isinstance(chunks, list) else []:
            fields = _fields(chunk, "ChunkStorageMetadata")
            offset = checked_shape(fields.get("offsets"), name, METADATA)
            size = checked_shape(fields.get("sizes"), name, METADATA)
            if not (len(offset) == len(size) == len(info.shape)) or any(
                at + count > whole
                for at, count, whole in zip(offset, size, info.shape, strict=True)
            ):
                raise _damaged(self.folder, f"a piece of {name!r:.80} lies outside of the whole")
            if math.prod(size):
                sizes[offset] = size
        low = np.array(list(sizes), dtype=np.int64).reshape(len(sizes), len(info.shape))
        high = low + np.array(list(sizes.values()), dtype=np.int64).reshape(low.shape)
        if not _tiles(low, high, info.shape):
            raise _damaged(self.folder, f"the pieces of {name!r:.80} do not make up the whole")
        # One piece may be listed without its offset: it is the whole.
        stored = {(0,) * len(info.shape) if at is None else at: place for at, place in pieces}
        if not sizes.keys() <= stored.keys():
            raise _damaged(self.folder, f"a piece of {name!r:.80} is nowhere")
        return Chunked(
            info,
            _Pieces(
                [
                    self._piece(name, stored[at], TensorInfo(info.dtype, size))
                    for at, size in sizes.items()
                ]
            ),
            low,
            high,
        )

    def _piece(
        self, name: str, place: Mapping[Any, object], info: TensorInfo
    ) -> Callable[[], Stored]:
        stretch = self._stretch(name, place)

        def look() -> Stored:
            found = read_torch(*stretch)
            if not isinstance(found, Stored) or found.info != info:
                raise _damaged(self.folder, f"a piece of {name!r:.80} is not what it should be")
            return found

        return look

    def _value(self, name: str, pieces: list[Piece]) -> object:
        """A value that is no tensor."""
        if len(pieces) != 1:
            return None
        file, start, size = self._stretch(name, pieces[0][1])
        return read_torch(file, start, size) if size <= _SMALL else None

    def _stretch(self, name: str, place: Mapping[Any, object]) -> tuple[File, int, int]:
        """The part of a file that holds a piece, checked."""
        path, start, size = (place.get(key) for key in ("relative_path", "offset", "length"))
        if not (type(path) is str and type(start) is int and type(size) is int):
            raise _damaged(self.folder, f"the place of {name!r:.80} cannot be read")
        if place.get("transform_descriptors"):
            raise ArgumentError(
                f"{METADATA}: {name!r:.80} must be stored as it is, got it compressed. Load the "
                "checkpoint with torch.distributed.checkpoint and save it without extensions."
            )
        if path not in self._checked:
            self._checked[path] = self.files.open(inside(self.folder, path, listed_in=METADATA))
        file = self._checked[path]
        if start < 0 or size < 0 or start + size > file.size:
            raise _damaged(self.folder, f"{path!r:.80} is too short for {name!r:.80}")
        return file, start, size


def _tiles(low: Any, high: Any, shape: tuple[int, ...]) -> bool:
    """Whether boxes inside of a tensor of this shape hold each of its elements exactly once."""
    volume = sum(math.prod(size) for size in (high - low).tolist())
    if volume != math.prod(shape):
        return False
    if not shape or not volume:
        return len(low) < 2
    # As much as the whole, all inside: they cover it unless two of them overlap. Sorted along the
    # axis with most cuts, only few others begin before a box ends.
    axis = max(range(len(shape)), key=lambda axis: len(set(low[:, axis].tolist())))
    order = np.argsort(low[:, axis], kind="stable")
    low, high = low[order], high[order]
    ends = np.searchsorted(low[:, axis], high[:, axis], side="left")
    return not any(
        ((low[i + 1 : end] < high[i]) & (low[i] < high[i + 1 : end])).all(axis=1).any()
        for i, end in enumerate(ends.tolist())
    )


def _damaged(folder: Path, why: str) -> ArgumentError:
    return ArgumentError(
        f"path must be a whole torch.distributed.checkpoint, got {str(folder)!r} ({why}). "
        "Copy it again."
    )
