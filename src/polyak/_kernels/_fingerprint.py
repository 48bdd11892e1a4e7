"""Have the bits of a tensor changed? One fast read, and one wait for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._flat import flat_views

_COLUMNS = 257  # odd and prime: rows, blocks and halves of a tensor do not line up with it

# Integers of as many bytes as an element; two for one of complex128.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class Bits:
    """The bits of a tensor, to be summed up now and again.

    Writes through `.data` pass by the version counter of a parameter; the bits show them. The sums
    run over every 257th word of eight bytes, so moving values about shows as well.

    Args:
        flat: one-dimensional and contiguous; the same memory is read each time.
    """

    def __init__(self, flat: Tensor) -> None:
        self._summed: Tensor | None = None
        self._others = [flat.view(_INTEGERS[flat.element_size()])]  # few: taken as they are
        data = flat.view(torch.uint8)
        start = -data.storage_offset() % 8  # from there on one can read eight bytes at a time
        # Two halves: torch shares a sum out over its threads by results, and each of two cores has
        # half of what was just copied in its cache.
        rows = (data.numel() - start) // (8 * 2 * _COLUMNS)
        if rows <= 0:
            return
        end = start + rows * 8 * 2 * _COLUMNS
        self._summed = data[start:end].view(torch.int64).view(2, rows, _COLUMNS)
        self._others = [rest for rest in (data[:start], data[end:]) if rest.numel()]

    def sums(self) -> list[Tensor]:
        """Sums over the bits as they are now, in short vectors on the device of the tensor."""
        others = [rest.clone() for rest in self._others]
        return others if self._summed is None else [self._summed.sum(1).view(-1), *others]


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """A short vector of sums over the bits of a dense tensor, on its device."""
    flat = flat_views([tensor])
    assert flat is not None, "only dense tensors have one"
    return torch.cat([sums.to(torch.int64) for sums in Bits(flat[0]).sums()])


@torch.no_grad()
def differing(before: Sequence[Sequence[Tensor]], after: Sequence[Sequence[Tensor]]) -> list[int]:
    """Indices of the sums that differ; where none do, one wait a device finds out."""
    flat = [[one for sums in group for one in sums] for group in (before, after)]
    for kind in {(one.device, one.dtype) for one in flat[0]}:
        pair = [
            torch.cat([one for one in ones if (one.device, one.dtype) == kind]) for ones in flat
        ]
        if not torch.equal(*pair):
            break
    else:
        return []
    pairs = enumerate(zip(before, after, strict=True))
    return [i for i, (a, b) in pairs if not all(map(torch.equal, a, b))]
