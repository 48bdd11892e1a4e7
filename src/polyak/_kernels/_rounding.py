"""Stochastic rounding with bits that are a hash: unbiased, nothing to save, equal everywhere."""

import hashlib
import math

import torch
from torch import Tensor

from .._sharding import Part

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # integers as wide as a float of so many


def stream_key(seed: int, name: str, update: int) -> int:
    """32 bits that are this tensor's own at this update: a hash of seed, name and update number."""
    text = f"{seed}:{update}:{name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little", signed=True)


def hashed_bits(key: int, index: Tensor) -> Tensor:
    """32 hashed bits, as int32, for each element by its index in the whole tensor.

    The finalizer of MurmurHash3 over index and key, twice (its constants are public domain): every
    bit of the result depends on every bit of both. An element has the same bits whoever computes
    them: any device, block, shard or mesh. Several averages of one tensor share them.

    Args:
        key: from `stream_key`.
        index: whole numbers from 0, int32 or int64, of any shape.
    """
    bits = _finish(index.to(torch.int32) ^ key)
    bits ^= key >> 7
    if index.dtype == torch.int64:  # beyond the first 2^31 elements
        bits ^= (index >> 32).to(torch.int32)
    return _finish(bits)


def element_indices(tensor: Tensor, part: Part | None = None) -> Tensor:
    """The index of each real number of a tensor, counted in logical order whatever its strides.

    Shaped and laid out like the tensor, complex numbers as two real ones.

    Args:
        tensor: all of a tensor, or one rank's part of it.
        part: where that lies: elements are counted in the whole.
    """
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if part is None:
        index = index_range(0, real.numel(), tensor.device).view(real.shape)
    else:
        index = _indices_in_whole(real, part)
    if real.is_contiguous():
        return index
    laid_out = torch.empty_strided(
        real.shape, real.stride(), dtype=index.dtype, device=tensor.device
    )
    return laid_out.copy_(index)


def _indices_in_whole(real: Tensor, part: Part) -> Tensor:
    """`element_indices` of a box of a larger tensor, in row-major order."""
    pair = real.dim() - len(part.sizes)  # of real and imaginary part
    shape = (*part.shape, *real.shape[len(part.sizes) :])
    offsets = (*part.offsets, *(0,) * pair)
    dtype = torch.int32 if math.prod(shape) <= 2**31 else torch.int64
    index = torch.zeros((), dtype=dtype, device=real.device)
    for offset, size, whole in zip(offsets, real.shape, shape, strict=True):
        steps = torch.arange(offset, offset + size, dtype=dtype, device=real.device)
        index = index.unsqueeze(-1) * whole + steps
    return index


def index_range(start: int, stop: int, device: torch.device) -> Tensor:
    """The numbers start … stop - 1, in four bytes where they fit."""
    dtype = torch.int32 if stop <= 2**31 else torch.int64
    return torch.arange(start, stop, dtype=dtype, device=device)


def _finish(h: Tensor) -> Tensor:
    """Mix the bits of int32 numbers, in place; products wrap, shifts bring in zeros."""
    h ^= (h >> 16) & 0xFFFF
    h *= -2048144789  # 0x85EBCA6B
    h ^= (h >> 13) & 0x7FFFF
    h *= -1028477387  # 0xC2B2AE35
    h ^= (h >> 16) & 0xFFFF
    return h


def round_stochastically(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round each value to one of its two neighbours in `dtype`, the nearer one more often.

    Up with the probability of how far up it already is, so the mean of the result is the value.
    What `dtype` holds exactly stays; so do NaN and infinity.

    Args:
        values: float64 or float32, wider than `dtype`.
        dtype: a real floating dtype of at most 32 bits.
        bits: 32 hashed bits an element.
    """
    if values.dtype == torch.float32 and dtype == torch.bfloat16:
        return _by_carry(values, dtype, bits & 0xFFFF, 16)
    if values.dtype == torch.float64 and dtype == torch.float32:
        return _by_carry(values, dtype, bits.to(torch.int64) & 0x1FFFFFFF, 29)
    return _by_share(values, dtype, bits)


def _by_carry(values: Tensor, dtype: torch.dtype, bits: Tensor, drop: int) -> Tensor:
    """Add random bits below the last one that is kept and cut them off: the carry rounds up.

    For a pair of formats whose patterns share sign and exponent's place in the number, as the
    integers of their bits are ordered like their values. What overflows is rounded to nearest
    instead; so are float32's subnormals (below 1.2e-38), which have fewer bits.
    """
    nearest = values.to(dtype)
    pattern = values.view(bits.dtype)
    cut = ((pattern + bits) >> drop << drop).view(values.dtype).to(dtype)
    usual = torch.isfinite(cut) & torch.isfinite(values)
    return torch.where(usual, cut, nearest)


def _by_share(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Find both neighbours; take the outer one as often as the value is nearer to it."""
    nearest = values.to(dtype)
    wide = values.to(torch.float64)
    # Without the sign, floats are ordered like the integers of their bits. Step back to the
    # neighbour towards zero where rounding went away from it; the other one is one further.
    size = nearest.abs() if dtype.itemsize > 1 else nearest.to(torch.float32).abs().to(dtype)
    pattern = size.view(_BITS[dtype.itemsize])
    inner = pattern - (size.to(torch.float64) > wide.abs()).to(pattern.dtype)
    near, far = (p.view(dtype).to(torch.float64) for p in (inner, inner + 1))
    share = (wide.abs() - near) / (far - near)  # in [0, 1)
    chance = (bits.to(torch.int64) & 0xFFFFFFFF).to(torch.float64) * 2.0**-32
    rounded = torch.where(chance < share, far, near).copysign(wide).to(dtype)
    exact = (nearest.to(torch.float64) == wide) | ~torch.isfinite(far) | ~torch.isfinite(wide)
    return torch.where(exact, nearest.to(torch.float32), rounded.to(torch.float32)).to(dtype)
