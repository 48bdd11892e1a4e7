"""Linear combinations of checkpoints, slice by slice: any number of them in the same memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ._errors import ArgumentError
from ._files import Checkpoint, TensorInfo
from ._slices import SLICE, THREADS, Progress, Slice, on_threads, slices

# Called with a name, the index of the first element, and the elements.
Sink: TypeAlias = Callable[[str, int, Tensor], None]
NonFinite: TypeAlias = Literal["raise", "ignore"]

# Shorter than the length from which torch splits an operation over threads of its own, which would
# fight with ours; and short enough to stay in the cache of one core.
_BLOCK = 31 * 2**10

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

    def compute(self, sink: Sink, *, progress: Progress | None = None) -> None:
        """Give every element to `sink`, from several threads, in any order.

        Raises:
            ArgumentError: NaN or inf in a checkpoint; a result that its dtype cannot hold.
        """
        total = sum(info.numel for info in self.tensors.values())
        on_threads(
            slices(self.tensors),
            lambda piece: self._one(piece, sink),
            total=total,
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
        return _OVERHEAD + THREADS * (SLICE * (wide + read + widest) + 2 * _BLOCK * wide)

    def _one(self, piece: Slice, sink: Sink) -> None:
        """One slice of the result, from reading to writing."""
        info = self.tensors[piece.name]
        if not is_averaged(info.dtype):
            sink(piece.name, piece.start, self.exact.read(*piece))
            return
        checkpoints, coefficients = self._counting()
        equal = len(set(coefficients)) == 1
        blocks: list[Tensor] = []
        for checkpoint, coefficient in zip(checkpoints, coefficients, strict=True):
            _add(blocks, _as_reals(checkpoint.read(*piece)), 1.0 if equal else coefficient)
        if equal:
            for block in blocks:
                block.mul_(coefficients[0])
        if not _in_range(blocks, info.dtype):
            self._look_closer(blocks, piece)
        sink(piece.name, piece.start, _rounded(blocks, info.dtype))

    def _counting(self) -> tuple[list[Checkpoint], list[float]]:
        """The checkpoints whose coefficient is not 0, and these."""
        pairs = zip(self.checkpoints, self.coefficients, strict=True)
        kept = [(checkpoint, c) for checkpoint, c in pairs if c != 0.0]
        return [checkpoint for checkpoint, _ in kept], [c for _, c in kept]

    def _look_closer(self, blocks: list[Tensor], piece: Slice) -> None:
        """Settle a slice with NaN or inf in the sum, or with more than its dtype can hold."""
        info = self.tensors[piece.name]
        total = torch.cat(blocks)
        places = (~total.isfinite()).nonzero().squeeze(1)
        if places.numel():
            self._settle(total, places, piece)
            for block, settled in zip(blocks, total.split(_BLOCK), strict=True):
                block.copy_(settled)
        lost = total.isfinite() & ~_rounded(blocks, info.dtype, real=True).isfinite()
        if lost.any():
            raise ArgumentError(
                f"dtype must hold every result, got {total[lost][0]:g} in {piece.name!r} for "
                f"{info.dtype}. Pass a wider dtype."
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


def _add(blocks: list[Tensor], values: Tensor, coefficient: float) -> None:
    """Add coefficient * values to `blocks`, in float64; no blocks yet are zero."""
    parts = values.split(_BLOCK)
    if blocks:
        for block, part in zip(blocks, parts, strict=True):
            block.add_(_wide(part), alpha=coefficient)
    else:
        blocks += [_wide(part).mul_(coefficient) for part in parts]


def _wide(part: Tensor) -> Tensor:
    # torch converts float16 to float64 five times as slowly as by way of float32.
    return part.float().double() if part.dtype == torch.float16 else part.double()


def _in_range(blocks: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether all is finite and below the largest number of `dtype`; one pass, NaN fails."""
    largest = torch.finfo(dtype).max
    for block in blocks:
        low, high = torch.aminmax(block)
        if not (-largest <= low.item() and high.item() <= largest):
            return False
    return True


def _rounded(blocks: list[Tensor], dtype: torch.dtype, *, real: bool = False) -> Tensor:
    """The elements of `dtype` nearest to the sums; its real and imaginary parts when `real`."""
    part = torch.empty(0, dtype=dtype).real.dtype if dtype.is_complex else dtype
    result = torch.empty(sum(map(len, blocks)), dtype=part, device="cpu")
    for into, block in zip(result.split(_BLOCK), blocks, strict=True):
        into.copy_(block)
    return torch.view_as_complex(result.view(-1, 2)) if dtype.is_complex and not real else result
