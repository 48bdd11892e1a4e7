"""What one update does to one element, for every dtype: the arithmetic that all backends share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._rounding import round_stochastically

# Narrower storage is mixed in float32 and rounded once, at the end.
WIDE = {torch.float32, torch.float64, torch.complex64, torch.complex128}

FLOAT8 = {
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
}


def storage_dtype(live: torch.dtype, wanted: torch.dtype | None = None) -> torch.dtype:
    """The dtype an average of `live` tensors is kept in: float32 for anything narrower.

    `wanted` holds for real tensors; complex ones keep their own (complex64 at least).
    """
    if live.is_complex:
        return live if live in WIDE else torch.complex64
    if wanted is not None:
        return wanted
    return live if live in WIDE else torch.float32


def as_real(tensor: Tensor) -> Tensor:
    """The tensor itself, or real and imaginary parts side by side: lerp acts on each alone."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def widened(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` on the device of an average stored as `like`, in the dtype it is computed in."""
    wide = tensor.to(like.device, like.dtype if like.dtype in WIDE else torch.float32)
    return wide.resolve_conj()  # views as real numbers need it; free for all others


def lerp_(average: Tensor, live: Tensor, weight: float, bits: Tensor | None = None) -> None:
    """average += weight * (live - average), computed in float32 or wider and rounded once.

    Both ends are exact: weight 0 leaves the average alone, weight 1 copies.

    Args:
        average: written in place.
        live: of the same shape.
        weight: in [0, 1].
        bits: round stochastically with these, 32 for each real number; None rounds to nearest.
            float64 has nothing wider to be rounded from, and is always rounded to nearest.
    """
    if weight == 0.0:
        return
    if weight == 1.0:
        average.copy_(widened(live, average))
    elif bits is not None and average.dtype not in (torch.float64, torch.complex128):
        stored, new = as_real(average), as_real(widened(live, average))
        wide = torch.float64 if stored.dtype == torch.float32 else torch.float32
        mixed = stored.to(wide).lerp_(new.to(wide), weight)
        stored.copy_(round_stochastically(mixed, stored.dtype, bits))
    elif average.dtype in WIDE:
        as_real(average).lerp_(as_real(widened(live, average)), weight)
    else:
        average.copy_(widened(average, average).lerp_(widened(live, average), weight))


def _usable(average: Tensor, live: Tensor) -> Tensor:
    """Where a live element is finite, and so is its value in storage dtype.

    Both: casts to some float8 types turn infinity into their largest number.
    """
    usable = torch.isfinite(live)
    if live.dtype == average.dtype:
        return usable
    return usable & torch.isfinite(_comparable(live.to(average.dtype)))


def held_back(average: Tensor, live: Tensor) -> Tensor:
    """Where the guard holds a live element back: it is not finite in storage dtype.

    An infinity that the average holds too (an attention mask) is no incident. NaN always is.
    """
    live = widened(live, average)
    return ~_usable(average, live) & (live != widened(average, average))


def lerp_finite_(
    average: Tensor, live: Tensor, weight: float, bits: Tensor | None = None
) -> Tensor:
    """`lerp_` where the live element is finite in storage dtype; elsewhere the average stays.

    An element of the average that is itself not finite (the model was built with it) is replaced by
    the first finite live value. On finite elements the result has the same bits as `lerp_`.

    Returns:
        Where live elements were held back, as `held_back` says: of their shape, on the device.
    """
    live, old = widened(live, average), widened(average, average)
    if live.device.type == "cpu" and torch.equal(live, old):
        # A constant, as attention masks with -inf are.
        return torch.zeros_like(live, dtype=torch.bool)
    usable = _usable(average, live)
    held = ~usable & (live != old)
    if weight == 0.0:
        return held
    both = usable & torch.isfinite(old)
    base, new = (torch.where(both, t, torch.zeros_like(t)) for t in (old, live))
    stored = base.to(average.dtype, copy=True)
    lerp_(stored, new, weight, bits)
    mixed = widened(stored, average)
    # x - y overflows when both are huge and of opposite sign; the convex form cannot.
    mixed = torch.where(torch.isfinite(mixed), mixed, base * (1.0 - weight) + new * weight)
    average.copy_(torch.where(both, mixed, torch.where(usable, live, old)))
    return held


def beyond_range(values: Tensor, dtype: torch.dtype) -> int:
    """How many finite values a cast to `dtype` would lose to infinity, or to its largest number."""
    if not (dtype.is_floating_point and values.is_floating_point()):
        return 0
    limits = torch.finfo(dtype)
    if limits.max >= torch.finfo(values.dtype).max:
        return 0
    wide = _comparable(values)
    if wide.numel() == 0:
        return 0
    least, most = (float(end) for end in torch.aminmax(wide))
    if -limits.max <= least and most <= limits.max:
        return 0  # one read, and nearly always the answer
    infinite = ~torch.isfinite(_comparable(wide.to(dtype)))
    clipped = wide.abs() > limits.max * (1.0 + limits.eps)  # some float8 casts saturate
    return int((torch.isfinite(wide) & (infinite | clipped)).sum())


def keep_(averages: Sequence[Tensor], kept: Sequence[Tensor] | None, skip: Tensor | None) -> None:
    """Put back what was kept where `skip`, a number on the device, is not zero."""
    if kept is None or skip is None:
        return
    for average, before in zip(averages, kept, strict=True):
        skipped = skip.to(average.device, non_blocking=True).reshape(()) != 0
        average.copy_(torch.where(skipped, before, average))


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; waits for the device."""
    return bool(torch.isfinite(_comparable(tensor)).all())


def _comparable(tensor: Tensor) -> Tensor:
    """Float8 has no comparisons in torch; its values all fit float32."""
    return tensor.to(torch.float32) if tensor.dtype in FLOAT8 else tensor
