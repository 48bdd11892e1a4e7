"""How do two checkpoints differ? Names, shapes, dtypes, and how far apart each tensor is."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from threading import Lock

import torch
from torch import Tensor

from ._files import Checkpoint, TensorInfo, open_checkpoint
from ._slices import Progress, Slice, on_threads, slices


@dataclass(frozen=True)
class Distance:
    """How far a tensor of the second checkpoint is from that of the first.

    Args:
        name: of the tensor.
        shape: of both.
        dtypes: in the first and in the second.
        relative: ||second - first|| / ||first||; inf where only the first is
            zero, or one is infinite.
        largest: of |second - first| over the elements.
        changed: how many elements differ.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype]
    relative: float
    largest: float
    changed: int


@dataclass(frozen=True)
class Diff:
    """What two checkpoints have in common and what not.

    Args:
        only_first: names in the first only.
        only_second: names in the second only.
        reshaped: names of both with the shape in each, where these differ.
        distances: of all others, in the order of the first.
        relative: ||second - first|| / ||first|| over all of these.
    """

    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    distances: tuple[Distance, ...]
    relative: float

    @property
    def same(self) -> bool:
        """Whether both hold the same values under the same names, in whatever dtype."""
        return not (
            self.only_first
            or self.only_second
            or self.reshaped
            or any(distance.changed for distance in self.distances)
        )


def diff(
    first: str | PathLike[str],
    second: str | PathLike[str],
    *,
    key: str | None = None,
    progress: Progress | None = None,
) -> Diff:
    """Compare two checkpoints of any formats, slice by slice, in float64.

    Raises:
        ArgumentError: a file that cannot be read.
    """
    with open_checkpoint(first, key=key) as one, open_checkpoint(second, key=key) as other:
        both = [name for name in one.tensors if name in other.tensors]
        reshaped = {
            name: (one.tensors[name].shape, other.tensors[name].shape)
            for name in both
            if one.tensors[name].shape != other.tensors[name].shape
        }
        compared = {name: one.tensors[name] for name in both if name not in reshaped}
        sums = _sums(one, other, compared, progress)
        distances = tuple(
            Distance(
                name,
                info.shape,
                (info.dtype, other.tensors[name].dtype),
                relative=_ratio(sums[name].apart, sums[name].size),
                largest=sums[name].largest,
                changed=sums[name].changed,
            )
            for name, info in compared.items()
        )
        return Diff(
            only_first=tuple(name for name in one.tensors if name not in other.tensors),
            only_second=tuple(name for name in other.tensors if name not in one.tensors),
            reshaped=reshaped,
            distances=distances,
            relative=_ratio(
                math.fsum(found.apart for found in sums.values()),
                math.fsum(found.size for found in sums.values()),
            ),
        )


@dataclass
class _Sums:
    """Sums of squares of a tensor so far, and what else is kept of it."""

    apart: float = 0.0
    size: float = 0.0
    largest: float = 0.0
    changed: int = 0

    def add(self, more: "_Sums") -> None:
        """Count another slice."""
        self.apart += more.apart
        self.size += more.size
        if not math.isnan(self.largest):  # one NaN, and nobody knows the largest
            self.largest = max(more.largest, self.largest)  # of NaN and a number the first
        self.changed += more.changed


def _difference(first: Tensor, second: Tensor) -> _Sums:
    """How far two slices are apart; NaN is equal to NaN, inf to inf."""
    left, right = _wide(first), _wide(second)
    # Integers as they are: float64 cannot tell 2**53 from its neighbours.
    differ = first != second if first.dtype == second.dtype else left != right
    differ &= ~(left.isnan() & right.isnan())
    apart = torch.where(differ, (right - left).abs(), 0.0)
    size = torch.where(differ | left.isfinite(), left.abs(), 0.0)  # a mask of infinities has none
    return _Sums(
        apart=float(apart.square().sum()),
        size=float(size.square().sum()),
        largest=float(apart.max()),
        changed=int(differ.sum()),
    )


def _sums(
    one: Checkpoint,
    other: Checkpoint,
    tensors: Mapping[str, TensorInfo],
    progress: Progress | None,
) -> dict[str, _Sums]:
    sums: dict[str, _Sums] = defaultdict(_Sums)
    lock = Lock()

    def add(piece: Slice) -> None:
        left, right = one.read(*piece), other.read(*piece)
        found = _difference(left, right)
        with lock:
            sums[piece.name].add(found)

    total = sum(info.numel for info in tensors.values())
    on_threads(slices(tensors), add, total=total, progress=progress)
    return sums


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def _ratio(apart: float, size: float) -> float:
    """The root of a ratio of sums of squares; 0 / 0 is no distance."""
    if apart in (0.0, math.inf):
        return apart
    return math.sqrt(apart / size) if size > 0.0 else math.inf
