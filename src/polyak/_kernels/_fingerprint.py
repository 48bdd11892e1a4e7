"""Have the bits of a tensor changed? One fast read, and one wait for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._flat import flat_views

_COLUMNS = 257  # odd and prime: rows, blocks and halves of a tensor do not line up with it


class Bits:
    """The bits of a dense tensor, to be summed up now and again.

    Writes through `.data` pass by the version counter of a parameter; the bits show them. The sums
    run over every 257th word of eight bytes, so moving values about shows as well.

    Args:
        tensor: dense; the same memory is read each time.
    """

    def __init__(self, tensor: Tensor) -> None:
        flat = flat_views([tensor])
        assert flat is not None, "only dense tensors are exchanged"
        data = flat[0].view(torch.uint8)
        self._summed: Tensor | None = None
        self._others = [data]  # few: taken as they are
        if data.storage_offset() % 8:  # cannot be read eight bytes at a time
            return
        end = data.numel() // 8 * 8
        words = data[:end].view(torch.int64)
        # Two halves: torch shares a sum out over its threads by results, and each of two cores has
        # half of what was just copied in its cache.
        rows = words.numel() // (2 * _COLUMNS)
        summed = rows * 2 * _COLUMNS
        if summed:
            self._summed = words[:summed].view(2, rows, _COLUMNS)
        self._others = [rest for rest in (words[summed:], data[end:]) if rest.numel()]

    def sums(self) -> list[Tensor]:
        """Sums over the bits as they are now, in short vectors on the device of the tensor."""
        others = [rest.to(torch.int64, copy=True) for rest in self._others]
        return others if self._summed is None else [self._summed.sum(1).view(-1), *others]


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """A short vector of sums over the bits of a dense tensor, on its device."""
    return torch.cat(
        [torch.empty(0, dtype=torch.int64, device=tensor.device), *Bits(tensor).sums()]
    )


@torch.no_grad()
def differing(before: Sequence[Sequence[Tensor]], after: Sequence[Sequence[Tensor]]) -> list[int]:
    """Indices of the sums that differ; where none do, one wait a device finds out."""
    flat = [[one for sums in group for one in sums] for group in (before, after)]
    for device in {one.device for one in flat[0]}:
        pair = [torch.cat([one for one in ones if one.device == device]) for ones in flat]
        if not torch.equal(*pair):
            break
    else:
        return []
    pairs = enumerate(zip(before, after, strict=True))
    return [i for i, (a, b) in pairs if not all(map(torch.equal, a, b))]
