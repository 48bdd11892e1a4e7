"""The update as code for the GPU: each program mixes one block of one tensor into all averages.

The same arithmetic as `_elements.py` and `_rounding.py`, element by element, in the same order of
operations. A kernel is compiled for the values of its `constexpr` arguments. Weights, keys and
sizes are none: they are read from memory, and other ones need no other kernel.
"""

import triton
import triton.language as tl

# What the table of a plan holds of each slot, in one row of int64: these, then the address of each
# average.
LIVE_ADDRESS = tl.constexpr(0)
ELEMENTS = tl.constexpr(1)
FIRST_INDEX = tl.constexpr(2)  # of its first element, in the tensor that it is a part of
FIRST_PROGRAM = tl.constexpr(3)
COLUMNS = tl.constexpr(4)

_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def mix(
    table,  # [slots, COLUMNS + averages] int64
    slot_of,  # [programs] int32
    weights,  # [averages] float64, of the live weights
    keys,  # [slots] int32; read with stochastic
    skip,  # one number; read with skippable
    counts,  # [slots] int64, to which elements held back are added; written with guard
    live_type: tl.constexpr,
    stored_type: tl.constexpr,
    limit: tl.constexpr,  # the least number that rounds to infinity in stored_type
    averages: tl.constexpr,  # in the table
    mixed: tl.constexpr,  # how many of them to mix
    guard: tl.constexpr,
    stochastic: tl.constexpr,
    skippable: tl.constexpr,
    aligned: tl.constexpr,  # all addresses are multiples of 16
    block: tl.constexpr,  # elements
):
    """Fold one block of live elements into the averages of its slot."""
    program = tl.program_id(0)
    slot = tl.load(slot_of + program)
    row = table + slot * (COLUMNS + averages)
    start = (program - tl.load(row + FIRST_PROGRAM)) * block  # int64, as the table is
    left = tl.load(row + ELEMENTS) - start
    # Two copies of the code: only without a mask are 16 bytes read and written at a time.
    if left >= block:
        _mix_block(row, slot, start, left, weights, keys, skip, counts, live_type, stored_type,
                   limit, mixed, guard, stochastic, skippable, aligned, block, True)  # fmt: skip
    else:
        _mix_block(row, slot, start, left, weights, keys, skip, counts, live_type, stored_type,
                   limit, mixed, guard, stochastic, skippable, aligned, block, False)  # fmt: skip


@triton.jit
def _mix_block(
    row, slot, start, left, weights, keys, skip, counts,
    live_type: tl.constexpr, stored_type: tl.constexpr, limit: tl.constexpr,
    mixed: tl.constexpr, guard: tl.constexpr, stochastic: tl.constexpr, skippable: tl.constexpr,
    aligned: tl.constexpr, block: tl.constexpr, full: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, block)
    inside = None if full else offsets < left
    beyond = None if full else 0.0
    address = _address(row, LIVE_ADDRESS, start, live_type, aligned) + offsets
    live = tl.load(address, inside, beyond).to(tl.float32)
    usable = tl.abs(live) < limit  # not for NaN
    bits = offsets
    if stochastic:
        bits = _hashed_bits(tl.load(keys + slot), tl.load(row + FIRST_INDEX) + start + offsets)

    for k in tl.static_range(mixed):
        weight = tl.load(weights + k)
        average = _address(row, COLUMNS + k, start, stored_type, aligned) + offsets
        old = tl.load(average, inside, beyond).to(tl.float32)
        if guard and k == 0:
            _count(~usable & (live != old), counts + slot)
        moves = weight != 0.0
        if skippable:
            moves = moves & (tl.load(skip) == 0)
        if moves:
            new = _lerp(old, live, weight, bits, stored_type, stochastic)
            if guard:
                new = _guarded(new, old, live, weight, usable, limit)
            tl.store(average, new.to(stored_type), inside)


@triton.jit
def _count(held_back, counter):
    """Add how many there are. Past the end of a tensor old and live are zeros, which are finite."""
    count = tl.sum(held_back.to(tl.int32), 0).to(tl.int64)
    tl.atomic_add(counter, count, mask=count > 0)


@triton.jit
def _guarded(new, old, live, weight, usable, limit: tl.constexpr):
    """`_elements.lerp_finite_`, once the usual result is there."""
    # x - y overflows where both are huge and of opposite sign; the convex form cannot.
    convex = old * (1.0 - weight).to(tl.float32) + live * weight.to(tl.float32)
    new = tl.where(tl.abs(new) < limit, new, convex)
    return tl.where(usable & (tl.abs(old) < _INFINITY), new, tl.where(usable, live, old))


@triton.jit
def _address(row, column: tl.constexpr, start, dtype: tl.constexpr, aligned: tl.constexpr):
    """Where the block starts in the tensor whose address is in this column of the table."""
    address = tl.load(row + column).to(tl.pointer_type(dtype))
    if aligned:
        address = tl.multiple_of(address, 16)
    return address + start


@triton.jit
def _lerp(old, live, weight, bits, stored_type: tl.constexpr, stochastic: tl.constexpr):
    """`_elements.lerp_`: what the average will hold, as float32 that is yet to be cast.

    Rounded stochastically it is a number of `stored_type` already, else the cast rounds to nearest.
    """
    if stochastic and stored_type == tl.float32:
        wide = _fused_lerp(old.to(tl.float64), live.to(tl.float64), weight)
        mixed = _float64_to_float32(wide, bits)
    else:
        mixed = _fused_lerp(old, live, weight.to(tl.float32))
        if stochastic and stored_type == tl.bfloat16:
            mixed = _float32_to_bfloat16(mixed, bits)
        elif stochastic:
            mixed = _float32_to_float16(mixed, bits)
    return tl.where(weight == 1.0, live, mixed)


@triton.jit
def _fused_lerp(a, b, weight):
    """`torch.lerp`, with the product and the sum in one rounding, as its vector code has them."""
    small = weight < 0.5
    return tl.fma(tl.where(small, weight, weight - 1.0), b - a, tl.where(small, a, b))


# ── stochastic rounding ──────────────────────────────────────────────────────────────────────────


@triton.jit
def _hashed_bits(key, index):
    """`_rounding.hashed_bits`, as uint32: bits of int32 that products wrap and shifts fill with 0.

    For an index of 31 bits the upper half is zero, which changes nothing.
    """
    bits = _finish(index.to(tl.uint32) ^ key.to(tl.uint32, bitcast=True))
    bits ^= (key >> 7).to(tl.uint32, bitcast=True)  # the sign moves in, as in a Python int
    return _finish(bits ^ (index >> 32).to(tl.uint32))


@triton.jit
def _finish(h):
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    h ^= h >> 16
    return h


@triton.jit
def _float64_to_float32(values, bits):
    """`_rounding._by_carry`: random bits are added below the last that is kept, and cut off."""
    added = values.to(tl.int64, bitcast=True) + (bits & 0x1FFFFFFF).to(tl.int64)
    cut = ((added >> 29) << 29).to(tl.float64, bitcast=True).to(tl.float32)
    usual = (tl.abs(cut) < _INFINITY) & (tl.abs(values) < _INFINITY)
    return tl.where(usual, cut, values.to(tl.float32))


@triton.jit
def _float32_to_bfloat16(values, bits):
    """`_rounding._by_carry`, as float32."""
    added = values.to(tl.int32, bitcast=True) + (bits & 0xFFFF).to(tl.int32)
    cut = ((added >> 16) << 16).to(tl.float32, bitcast=True)
    usual = (tl.abs(cut) < _INFINITY) & (tl.abs(values) < _INFINITY)
    return tl.where(usual, cut, values)


@triton.jit
def _float32_to_float16(values, bits):
    """`_rounding._by_share`: one of the two neighbours, as float32."""
    size = tl.abs(values)
    nearest = size.to(tl.float16)
    pattern = nearest.to(tl.int16, bitcast=True)
    inner = pattern - (nearest.to(tl.float32) > size).to(tl.int16)
    near = inner.to(tl.float16, bitcast=True).to(tl.float32)
    far = (inner + 1).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    # Both differences are exact in float32, and so are the products with a power of two. A chance
    # has 32 bits, too many for float32.
    chance = bits.to(tl.float64) * 2.3283064365386963e-10  # 2^-32
    above = chance * (far - near).to(tl.float64) < (size - near).to(tl.float64)
    rounded = tl.where(above, far, near)
    exact = (nearest.to(tl.float32) == size) | ~(far < _INFINITY) | ~(size < _INFINITY)
    # Minus is 0 - x in Triton, and would lose the sign of zero.
    return tl.where(exact, values, tl.where(values < 0.0, rounded * -1.0, rounded))
