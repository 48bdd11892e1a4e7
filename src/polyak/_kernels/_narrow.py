"""Copies in fewer bits, where that costs no more than rounding."""

import torch
from torch import Tensor

_BLOCK = 2**22  # elements looked at together, so that a look costs no memory


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the host in `dtype`, or in a wider one where that would lose more than rounding.

    float16 ends at 65504 and thins out below 6e-5: a tensor with much of its length out there (the
    running variance of a large activation, a scale of 1e-7) becomes float32. Complex ones become
    complex64.
    """
    source = tensor.detach()
    if source.is_complex():
        return source.to("cpu", torch.complex64, copy=True)
    for candidate in (dtype, torch.float32):
        narrow = source.to(candidate)
        if _is_kept(source, narrow):
            return narrow.to("cpu", copy=narrow.data_ptr() == source.data_ptr())
    return source.to("cpu", copy=True)


def _is_kept(wide: Tensor, narrow: Tensor) -> bool:
    """Whether the cast moved the whole by at most twice the unit roundoff of its length."""
    info = torch.finfo(narrow.dtype)
    if info.bits >= torch.finfo(wide.dtype).bits:
        return True
    scale = float(wide.abs().nan_to_num(0.0, 0.0, 0.0).max()) if wide.numel() else 0.0
    if scale == 0.0:
        return True
    lost = kept = 0.0
    for ours, theirs in zip(
        wide.reshape(-1).split(_BLOCK), narrow.reshape(-1).split(_BLOCK), strict=True
    ):
        exact, cast = ours.double() / scale, theirs.double() / scale
        error = cast - exact
        error[(cast == exact) | (cast.isnan() & exact.isnan())] = 0.0  # infinities too
        lost += float(error.square().sum())
        kept += float(exact.nan_to_num(0.0, 0.0, 0.0).square().sum())
    return lost <= info.eps**2 * kept
