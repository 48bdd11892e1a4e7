"""The exact mean of several tensors, for windows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._flat import flat_views

BLOCK = 1 << 18  # elements


@torch.no_grad()
def mean_(target: Tensor, terms: Sequence[Tensor]) -> None:
    """target = mean(terms), summed in wider numbers than they are and rounded at the end.

    float32 and narrower in float64; float64 in two of them by compensated summation (Neumaier
    1974): what each addition loses is exact, and summed too. By block, so that the sums stay in
    the cache and small beside the tensors.
    """
    flat = flat_views([target, *terms])
    if flat is None:
        _mean(target, terms)
        return
    for start in range(0, target.numel(), BLOCK):
        block, *parts = (view[start : start + BLOCK] for view in flat)
        _mean(block, parts)


def _mean(target: Tensor, terms: Sequence[Tensor]) -> None:
    wide = torch.complex128 if target.is_complex() else torch.float64
    total = torch.zeros_like(target, dtype=wide)
    if target.dtype not in (torch.float64, torch.complex128):
        for term in terms:
            total += term
        target.copy_(total / len(terms))
        return
    lost = torch.zeros_like(total)
    for term in terms:
        x = term.to(wide)
        new = total + x
        part = new - total
        slip = (total - (new - part)) + (x - part)  # Knuth's two-sum
        lost += torch.where(torch.isfinite(slip), slip, 0.0)  # an infinity loses nothing
        total = new
    target.copy_((total + lost) / len(terms))
