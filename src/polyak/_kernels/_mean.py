"""The exact mean of several tensors, for windows."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def mean_(target: Tensor, terms: Sequence[Tensor]) -> None:
    """target = mean(terms), summed in float64 (complex128) and rounded once."""
    total = torch.zeros_like(
        target, dtype=torch.complex128 if target.is_complex() else torch.float64
    )
    for term in terms:
        total += term
    target.copy_(total / len(terms))
