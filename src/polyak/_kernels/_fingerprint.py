"""Have the bits of a tensor changed? One fast read, and one wait for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._flat import flat_views

# Prime, and no width that tensors have: what changes places lands in another column. A tensor takes
# the first of which its sums are at most an eighth of it, so that all sums together stay small.
_COLUMNS = (251, 31)

# Integers of as many bytes as an element; two for one of complex128.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class Bits:
    """The bits of a tensor, to be summed up now and again.

    Writes through `.data` pass by the version counter of a parameter; the bits show them. The sums
    run over every 251st word of eight bytes, so moving values about shows as well, unless by just
    that far. As in every sum, changes that cancel do not show: of an odd number of words no change
    of all signs does.

    Args:
        flat: one-dimensional and contiguous; the same memory is read each time.
    """

    def __init__(self, flat: Tensor) -> None:
        self._summed: Tensor | None = None
        words, self._others = _words(flat)
        count = 0 if words is None else words.numel()
        columns = next((n for n in _COLUMNS if count >= 8 * 2 * n), None)
        if words is None or columns is None:
            self._others = [flat.view(_INTEGERS[flat.element_size()])]  # few: taken as they are
            return
        # Two halves: torch shares a sum out over its threads by results, and each of two cores has
        # half of what was just copied in its cache. They overlap where they must to cover all, of
        # an odd number of rows each, or the signs of all float64 would cancel.
        rows = -(-count // (2 * columns)) | 1
        strides = (count - rows * columns, columns, 1)
        self._summed = words.as_strided((2, rows, columns), strides, words.storage_offset())

    def sums(self) -> list[Tensor]:
        """Sums over the bits as they are now, in short vectors on the device of the tensor."""
        others = [rest.clone() for rest in self._others]
        return others if self._summed is None else [self._summed.sum(1).view(-1), *others]


def _words(flat: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """The eight-byte words of a tensor as integers, and the bytes before and after them."""
    size = flat.element_size()
    start = -flat.storage_offset() * size % 8  # from there on one can read eight bytes at a time
    whole = (flat.numel() * size - start) // 8
    if whole <= 0:
        return None, []
    if whole * 8 == flat.numel() * size:
        return flat.view(torch.int64), []
    data = flat.view(torch.uint8)
    end = start + 8 * whole
    rests = [rest for rest in (data[:start], data[end:]) if rest.numel()]
    return data[start:end].view(torch.int64), rests


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """A short vector of sums over the bits of a dense tensor, on its device.

    Of the values alone: the same wherever in its memory the tensor begins.
    """
    views = flat_views([tensor])
    assert views is not None, "only dense tensors have one"
    flat = views[0]
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    return torch.cat([sums.to(torch.int64) for sums in Bits(flat).sums()])


@torch.no_grad()
def differing(before: Sequence[Sequence[Tensor]], after: Sequence[Sequence[Tensor]]) -> list[int]:
    """Indices of the sums that differ; where none do, one wait a device and dtype finds out."""
    if len(before) == 1:
        return [] if _same(before[0], after[0]) else [0]
    flat = [[one for sums in group for one in sums] for group in (before, after)]
    kinds = {(one.device, one.dtype) for one in flat[0]}
    if all(_same(*([t for t in ones if (t.device, t.dtype) == k] for ones in flat)) for k in kinds):
        return []
    pairs = enumerate(zip(before, after, strict=True))
    return [index for index, pair in pairs if not _same(*pair)]


def _same(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether two lists of vectors are equal, end to end."""
    if len(ones) != len(others):
        return False
    if len(ones) == 1:
        return torch.equal(ones[0], others[0])
    return torch.equal(torch.cat(list(ones)), torch.cat(list(others)))
