"""Where the elements of a tensor lie on disk, and how any stretch of them is read."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .._errors import ArgumentError
from ._bytes import File

_MOST_DIMENSIONS = 64
_MOST_ELEMENTS = 2**63 - 1
_GAP = 4096  # elements: a second read costs about as much as reading past so many
_SMALL = 16 * 2**20  # bytes beyond its own size that any file may unfold to
_FOLD = 4  # times its own size to which a large file may unfold


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint says of a tensor before it is read.

    Args:
        dtype: of its elements.
        shape: its sizes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of memory when read."""
        return self.numel * self.dtype.itemsize


class Source(Protocol):
    """A tensor on disk."""

    @property
    def info(self) -> TensorInfo:
        """Its dtype and shape."""
        ...

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor, row by row, in fresh memory."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor in one file: its first byte and how far apart its elements lie.

    Equal when it is the same memory seen the same way: a tie.

    Args:
        file: where.
        offset: byte of the element at index zero.
        info: dtype and shape.
        strides: in elements, not negative; None when they lie row by row without gaps.
    """

    file: File
    offset: int
    info: TensorInfo
    strides: tuple[int, ...] | None = None

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor, row by row, in fresh memory."""
        dtype = self.info.dtype
        if self.strides is None:
            return self.file.read_elements(
                self.offset + start * dtype.itemsize, stop - start, dtype
            )
        return read_boxes(self, start, stop)

    def box(self, low: Sequence[int], high: Sequence[int]) -> Tensor:
        """The elements with indices from `low` on and below `high`.

        One read when they lie close together, else the box is halved where it is widest, so that
        neither the memory nor the bytes read grow with the gaps.
        """
        sizes = [above - below for below, above in zip(low, high, strict=True)]
        strides = self.strides if self.strides is not None else row_strides(self.info.shape)
        reach = [(n - 1) * stride for n, stride in zip(sizes, strides, strict=True)]
        if sum(reach) <= 2 * math.prod(sizes) + _GAP:
            first = sum(index * stride for index, stride in zip(low, strides, strict=True))
            dtype = self.info.dtype
            span = self.file.read_elements(
                self.offset + first * dtype.itemsize, 1 + sum(reach), dtype
            )
            return span.as_strided(sizes, strides)
        widest = reach.index(max(reach))
        middle = low[widest] + sizes[widest] // 2
        lower, upper = list(high), list(low)
        lower[widest] = upper[widest] = middle
        return torch.cat([self.box(low, lower), self.box(upper, high)], dim=widest)


class Boxed(Protocol):
    """A source that can be read by ranges of its indices."""

    @property
    def info(self) -> TensorInfo:
        """Its dtype and shape."""
        ...

    def box(self, low: Sequence[int], high: Sequence[int]) -> Tensor:
        """The elements with indices from `low` on and below `high`."""
        ...


def read_boxes(source: Boxed, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the flattened tensor, put together from boxes of indices."""
    result = torch.empty(stop - start, dtype=source.info.dtype, device="cpu")
    done = 0
    for low, high in boxes(source.info.shape, start, stop):
        piece = source.box(low, high)
        result[done : done + piece.numel()].view(piece.shape).copy_(piece)
        done += piece.numel()
    return result


Box = tuple[tuple[int, ...], tuple[int, ...]]


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Boxes of indices that hold, in order, the elements [start, stop) in row-major order.

    Each is its lowest indices and the ones it stays below: part of a row, whole rows, part of one.

    Examples:
        >>> list(boxes((4, 3), 2, 10))
        [((0, 2), (1, 3)), ((1, 0), (3, 3)), ((3, 0), (4, 1))]
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:
        yield from _inside(shape, last, start - last * row, stop - last * row)
        return
    yield from _inside(shape, first - 1, start - (first - 1) * row, row if start % row else 0)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last, *shape[1:])
    yield from _inside(shape, last, 0, stop - last * row)


def _inside(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Box]:
    for low, high in boxes(shape[1:], start, stop):
        yield (index, *low), (index + 1, *high)


def row_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor that lies row by row without gaps."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def shown(value: object) -> str:
    """A value from a file for an error: short, and quick however deep or large the value is."""
    if isinstance(value, list | tuple) and len(value) <= _MOST_DIMENSIONS:
        return f"[{', '.join(shown(item) if type(item) is int else '…' for item in value)}]"
    if type(value) is int and abs(value) > 2**64:
        return "a number beyond 64 bits"
    return f"{value!r:.80}" if type(value) in (int, float, str, bool) else type(value).__name__


def checked_shape(shape: object, name: str, where: str) -> tuple[int, ...]:
    """A shape from a file, or an `ArgumentError` when no tensor can have it."""
    if not (isinstance(shape, list | tuple) and all(type(size) is int for size in shape)):
        raise ArgumentError(f"{where}: the shape of {name!r:.80} must be a list of whole numbers.")
    if (
        len(shape) > _MOST_DIMENSIONS
        or any(size < 0 for size in shape)
        or math.prod(max(size, 1) for size in shape) > _MOST_ELEMENTS
    ):
        raise ArgumentError(
            f"{where}: the shape of {name!r:.80} must be one that a tensor can have, "
            f"got {shown(shape)}."
        )
    return tuple(shape)


def check_unfolded(sources: Iterable[Source], size: int, where: str) -> None:
    """Raise when tensors, each read once, are much more than the `size` bytes they lie in.

    Views may share bytes, and an expanded one repeats them: a file of a few hundred bytes could
    ask for all the memory there is.
    """
    total = sum(source.info.nbytes for source in sources)
    if total > max(_FOLD * size, size + _SMALL):
        raise ArgumentError(
            f"{where}: tensors must not unfold to much more than the file, got views of {total} "
            f"bytes in {size}. Save them with .clone(), or leave the expanded ones out."
        )


def checked_view(
    file: File,
    storage: range,
    first: object,
    info: TensorInfo,
    strides: object,
) -> Stored:
    """A view of the bytes in `storage`, or an `ArgumentError` when it reaches outside of them."""
    where, size = file.path.name, info.dtype.itemsize
    fits = (
        isinstance(strides, list | tuple)
        and len(strides) == len(info.shape)
        and all(type(n) is int and 0 <= n <= _MOST_ELEMENTS for n in (first, *strides))
    )
    if not fits:
        raise ArgumentError(
            f"{where}: a tensor must be a view of its storage, got strides "
            f"{shown(strides)}. The file is damaged; copy it again."
        )
    assert isinstance(first, int)
    assert isinstance(strides, list | tuple)
    if not info.numel:
        return Stored(file, storage.start, info)
    last = first + sum((n - 1) * stride for n, stride in zip(info.shape, strides, strict=True))
    if (last + 1) * size > len(storage):
        raise ArgumentError(
            f"{where}: a tensor must lie in its storage of {len(storage)} bytes, got a view that "
            f"ends at byte {(last + 1) * size}. The file is damaged; copy it again."
        )
    # Where a size is 1 its stride says nothing.
    plain = all(
        n == 1 or ours == theirs
        for n, ours, theirs in zip(info.shape, strides, row_strides(info.shape), strict=True)
    )
    return Stored(file, storage.start + first * size, info, None if plain else tuple(strides))
