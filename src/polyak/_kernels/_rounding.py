"""Stochastic rounding with bits that are a hash: unbiased, nothing to save, equal everywhere."""

import hashlib

import torch
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # integers as wide as a float of so many


def stream_key(seed: int, name: str, update: int) -> int:
    """32 bits that are this tensor's own at this update: a hash of seed, name and update number."""
    text = f"{seed}:{update}:{name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little", signed=True)


def hashed_bits(key: int, index: Tensor) -> Tensor:
    """32 hashed bits, as int32, for each element by its index in the whole tensor (int64).

    The finalizer of MurmurHash3 over index and key, twice (its constants are public domain): every
    bit of the result depends on every bit of both. An element has the same bits whoever computes
    them: any device, block, shard or mesh.
    """
    low, high = index.to(torch.int32), (index >> 32).to(torch.int32)
    return _finish(_finish(low ^ key) ^ high ^ (key >> 7))


def element_indices(tensor: Tensor) -> Tensor:
    """The index of each real number of a tensor, counted in logical order whatever its strides.

    Shaped and laid out like `as_real(tensor)`, int64.
    """
    parts = 2 if tensor.is_complex() else 1
    index = torch.arange(tensor.numel() * parts, dtype=torch.int64, device=tensor.device)
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return torch.empty_strided(
        real.shape, real.stride(), dtype=torch.int64, device=tensor.device
    ).copy_(index.view(real.shape))


def _finish(h: Tensor) -> Tensor:
    """Mix the bits of int32 numbers; products wrap, shifts bring in zeros."""
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * -2048144789  # 0x85EBCA6B
    h = h ^ ((h >> 13) & 0x7FFFF)
    h = h * -1028477387  # 0xC2B2AE35
    return h ^ ((h >> 16) & 0xFFFF)


def round_stochastically(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round each value to one of its two neighbours in `dtype`, the nearer one more often.

    Up with the probability of how far up it already is, so the mean of the result is the value.
    What `dtype` holds exactly stays; so do NaN and infinity.

    Args:
        values: float64 or float32, wider than `dtype`.
        dtype: a real floating dtype of at most 32 bits.
        bits: 32 hashed bits an element.
    """
    nearest = values.to(dtype)
    wide = values.to(torch.float64)
    # Floats of one sign are ordered like the integers of their bits, away from zero. Step back to
    # the neighbour towards zero where rounding went away from it; the other one is one further.
    pattern = nearest.view(_BITS[dtype.itemsize])
    beyond = nearest.to(torch.float64).abs() > wide.abs()
    inner = (pattern - beyond.to(pattern.dtype)).view(dtype)
    outer = (pattern - beyond.to(pattern.dtype) + 1).view(dtype)
    near, far = inner.to(torch.float64), outer.to(torch.float64)
    # Between zero and the first number of the other sign there is nothing to step over: where the
    # inner neighbour is zero the sign of the value decides which number is further.
    far = torch.where(near == 0, far.abs().copysign(wide), far)
    outer = far.to(dtype)
    share = (wide - near) / (far - near)  # in [0, 1)
    chance = (bits.to(torch.int64) & 0xFFFFFFFF).to(torch.float64) * 2.0**-32
    exact = (nearest.to(torch.float64) == wide) | ~torch.isfinite(far) | ~torch.isfinite(wide)
    return torch.where(exact, nearest, torch.where(chance < share, outer, inner))
