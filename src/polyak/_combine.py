"""Linear combinations of checkpoints, slice by slice: any number of them in the same memory."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ._errors import ArgumentError
from ._files import ALONE, Checkpoint, Team, TensorInfo
from ._slices import BLOCK, SLICE, THREADS, Progress, Slice, on_threads, share

# Called with a name, the index of the first element, and the elements.
Sink: TypeAlias = Callable[[str, int, Tensor], None]
NonFinite: TypeAlias = Literal["raise", "ignore"]

# Measured by benchmarks/merge.py: threads, the allocator, code that is loaded on first use.
_OVERHEAD = 12 * 2**20

_AVERAGED = {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
}


def is_averaged(dtype: torch.dtype) -> bool:
    """Whether means of such elements mean something.

    Not those of integers, nor of 8-bit floats: these are codes that need their scales.
    """
    return dtype in _AVERAGED


@dataclass(frozen=True)
class Combination:
    """The sum of coefficient * checkpoint over checkpoints of one model.

    Accumulated in float64; equal coefficients are taken out of the sum, which for 16-bit and mostly
    for 32-bit inputs is then exact. The result is off by at most n 2**-53 sum |c x| before it is
    rounded to its dtype, which costs half an ulp (and 2**-13 of one more, below 32 bits, where
    torch rounds through float32).

    Args:
        checkpoints: open, with the same names and shapes.
        labels: what to call each in errors.
        coefficients: one each; a checkpoint whose coefficient is 0 is not read.
        tensors: what to make, in this order: dtypes are those of the result.
        exact: the checkpoint from which whatever is not averaged is copied.
        nonfinite: what to do where a checkpoint holds NaN or inf: "raise", or "ignore" and let the
            sum have it. Where all hold the same infinity (a mask), the result does too.
    """

    checkpoints: Sequence[Checkpoint]
    labels: Sequence[str]
    coefficients: Sequence[float]
    tensors: Mapping[str, TensorInfo]
    exact: Checkpoint
    nonfinite: NonFinite = "raise"

    def __post_init__(self) -> None:
        if self.nonfinite not in ("raise", "ignore"):
            raise ArgumentError(f"nonfinite must be 'raise' or 'ignore', got {self.nonfinite!r}.")
        if not any(self.coefficients):
            raise ArgumentError("coefficients must have one that is not 0, got none.")

    def compute(self, sink: Sink, *, progress: Progress | None = None, team: Team = ALONE) -> None:
        """Give every element to `sink`, from several threads, in any order.

        Args:
            sink: where they go.
            progress: called now and then with elements done and in all, of this rank.
            team: the ranks that share out the elements.

        Raises:
            ArgumentError: NaN or inf in a checkpoint; a result that its dtype cannot hold.
        """
        pieces = list(share(self.tensors, rank=team.rank, size=team.size))
        on_threads(
            pieces,
            lambda piece: self._one(piece, sink),
            total=sum(piece.stop - piece.start for piece in pieces),
            progress=progress,
        )

    @property
    def bytes_read(self) -> int:
        """Bytes of all inputs that count."""
        return sum(
            checkpoint.tensors[name].nbytes
            for checkpoint in self._counting()[0]
            for name in self.tensors
        )

    @property
    def peak_bytes(self) -> int:
        """Memory that `compute` takes, about, whatever the number and size of the checkpoints."""
        widest = max((info.dtype.itemsize for info in self.tensors.values()), default=0)
        read = max(
            (c.tensors[n].dtype.itemsize for c in self.checkpoints for n in self.tensors), default=0
        )
        wide = 16 if any(info.dtype.is_complex for info in self.tensors.values()) else 8
        return _OVERHEAD + THREADS * (SLICE * (wide + read + widest) + 2 * BLOCK * wide)

    def _one(self, piece: Slice, sink: Sink) -> None:
        """One slice of the result, from reading to writing."""
        info = self.tensors[piece.name]
        if not is_averaged(info.dtype):
            sink(piece.name, piece.start, self.exact.read(*piece))
            return
        checkpoints, coefficients = self._counting()
        equal = len(set(coefficients)) == 1
        reals = (2 if info.dtype.is_complex else 1) * (piece.stop - piece.start)
        total = torch.empty(reals, dtype=torch.float64, device="cpu")
        blocks = total.split(BLOCK)
        for index, (checkpoint, coefficient) in enumerate(
            zip(checkpoints, coefficients, strict=True)
        ):
            values = _as_reals(checkpoint.read(*piece))
            _add(blocks, values, 1.0 if equal else coefficient, first=index == 0)
        if equal:
            torch._foreach_mul_(blocks, coefficients[0])
        result = _rounded(blocks, info.dtype)
        if not _is_finite(result):
            self._look_closer(total, result, piece)
            result = _rounded(blocks, info.dtype)
        sink(piece.name, piece.start, result)

    def _counting(self) -> tuple[list[Checkpoint], list[float]]:
        """The checkpoints whose coefficient is not 0, and these."""
        pairs = zip(self.checkpoints, self.coefficients, strict=True)
        kept = [(checkpoint, c) for checkpoint, c in pairs if c != 0.0]
        return [checkpoint for checkpoint, _ in kept], [c for _, c in kept]

    def _look_closer(self, total: Tensor, rounded: Tensor, piece: Slice) -> None:
        """Settle a slice with NaN or inf in the sum, or with more than its dtype can hold."""
        places = (~total.isfinite()).nonzero().squeeze(1)
        lost = total.isfinite() & ~_as_reals(rounded).isfinite()
        if places.numel():
            self._settle(total, places, piece)
        if lost.any():
            raise ArgumentError(
                f"dtype must hold every result, got {total[lost][0]:g} in {piece.name!r} for "
                f"{self.tensors[piece.name].dtype}. Pass a wider dtype."
            )

    def _settle(self, total: Tensor, places: Tensor, piece: Slice) -> None:
        """Put back the infinities that all checkpoints share, and refuse any other."""
        seen = [
            (label, _as_reals(checkpoint.read(*piece))[places].double())
            for label, checkpoint, coefficient in zip(
                self.labels, self.checkpoints, self.coefficients, strict=True
            )
            if coefficient != 0.0
        ]
        first = seen[0][1]
        shared = first.isinf()
        for _, values in seen:
            shared &= values == first
        total[places[shared]] = first[shared]
        if self.nonfinite == "ignore" or bool(shared.all()):
            return
        for label, values in seen:
            if not values[~shared].isfinite().all():
                raise ArgumentError(
                    f"{label} must hold finite values, got NaN or inf in {piece.name!r}. Leave "
                    'this checkpoint out, or pass nonfinite="ignore" to let them into the result.'
                )
        raise ArgumentError(  # float64 itself overflowed: the inputs are finite
            f"sums of checkpoints must stay within float64, got more in {piece.name!r}, though "
            "each is finite. Values so near to 1.8e308 are no weights: leave out the checkpoint "
            "that has them."
        )


def _as_reals(values: Tensor) -> Tensor:
    return torch.view_as_real(values).flatten() if values.is_complex() else values


def _add(blocks: tuple[Tensor, ...], values: Tensor, coefficient: float, *, first: bool) -> None:
    """blocks += coefficient * values, in float64; where these are the `first`, blocks = that."""
    # One call for all blocks: two threads that ask for the interpreter less often wait less.
    parts = values.split(BLOCK)
    if values.dtype == torch.float16:
        # torch converts it to float64 five times as slowly as by way of float32.
        parts = tuple(part.float() for part in parts)
    if first:
        torch._foreach_copy_(blocks, parts)
        if coefficient != 1.0:
            torch._foreach_mul_(blocks, coefficient)
    else:
        torch._foreach_add_(blocks, parts, alpha=coefficient)


def _rounded(blocks: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """The elements of `dtype` nearest to the sums."""
    result = torch.empty(sum(map(len, blocks)), dtype=dtype.to_real(), device="cpu")
    torch._foreach_copy_(result.split(BLOCK), blocks)
    return torch.view_as_complex(result.view(-1, 2)) if dtype.is_complex else result


def _is_finite(result: Tensor) -> bool:
    """Whether neither NaN nor an infinity is there; faster than isfinite, which makes a tensor."""
    ends = (end for block in _as_reals(result).split(BLOCK) for end in torch.aminmax(block))
    return all(math.isfinite(end.item()) for end in ends)
