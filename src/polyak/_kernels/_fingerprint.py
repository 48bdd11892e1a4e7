"""Have the bits of these tensors changed? One fast read, and one wait for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._flat import flat_views

_COLUMNS = 257  # odd and prime: rows, blocks and halves of a tensor do not line up with it


@torch.no_grad()
def fingerprints(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A short vector of sums over the bits of each dense tensor, on its device.

    Writes through `.data` pass by the version counter of a parameter; the bits show them. The sums
    run over every 257th word of eight bytes, so moving values about shows as well.
    """
    return [_fingerprint(tensor) for tensor in tensors]


@torch.no_grad()
def differing(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[int]:
    """Indices of the fingerprints that differ; where none do, one wait a device finds out."""
    devices = {print_.device for print_ in before}
    for device in devices:
        pair = [torch.cat([p for p in prints if p.device == device]) for prints in (before, after)]
        if not torch.equal(*pair):
            break
    else:
        return []
    return [i for i, pair in enumerate(zip(before, after, strict=True)) if not torch.equal(*pair)]


def _fingerprint(tensor: Tensor) -> Tensor:
    flat = flat_views([tensor])
    assert flat is not None, "only dense tensors are exchanged"
    data = flat[0].view(torch.uint8)
    if data.storage_offset() % 8:  # cannot be read eight bytes at a time
        words, rest = data.to(torch.int64), data[:0]
    else:
        whole = data.numel() // 8 * 8
        words, rest = data[:whole].view(torch.int64), data[whole:]
    even = words.numel() // _COLUMNS * _COLUMNS
    sums = words[:even].view(-1, _COLUMNS).sum(0)
    return torch.cat([sums, words[even:], rest.to(torch.int64)])
