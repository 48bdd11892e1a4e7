"""The exact mean of several tensors, for windows."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def mean_(target: Tensor, terms: Sequence[Tensor]) -> None:
    """target = mean(terms), summed in twice the precision of float64 and rounded at the end.

    Compensated summation (Neumaier 1974): what each addition loses is exact, and summed too.
    """
    wide = torch.complex128 if target.is_complex() else torch.float64
    total = torch.zeros_like(target, dtype=wide)
    lost = torch.zeros_like(total)
    for term in terms:
        x = term.to(wide)
        new = total + x
        part = new - total
        slip = (total - (new - part)) + (x - part)  # Knuth's two-sum
        lost += torch.where(torch.isfinite(slip), slip, 0.0)  # an infinity loses nothing
        total = new
    target.copy_((total + lost) / len(terms))
