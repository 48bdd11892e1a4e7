"""CPU: block by block, so that a block is checked and mixed while it is in the cache."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from .._sharding import Part
from ._elements import (
    FLOAT8,
    WIDE,
    all_finite,
    as_real,
    held_back,
    keep_,
    lerp_,
    lerp_finite_,
    widened,
)
from ._flat import flat_views
from ._rounding import element_indices, hashed_bits, index_range
from ._rows import ROW, SMALL, follows

# Elements. Measured on 2 cores: at 256k the calls cost more, above 1M the check and the mixing read
# the memory twice.
BLOCK = 1 << 20

# Elements, where live weights are converted on the way: then their scratch is in the cache as well.
# Blocks of 256k took 0.9 of the time of those of 1M, on one thread as on two.
CONVERTED = 1 << 18

# Their range is narrower than that of the float32 in which the quick check is made.
_SHORT_RANGE = {torch.float16, *FLOAT8}


class Block(NamedTuple):
    """The same stretch of a live tensor and of each average of it."""

    slot: int
    averages: list[Tensor]
    live: Tensor
    start: int  # elements before it


@dataclass(frozen=True)
class Stretch:
    """What is read, checked and mixed at once: one block, or small ones whose averages adjoin."""

    blocks: list[Block]
    averages: list[Tensor]  # of all the blocks
    read: Callable[[], Tensor]  # the live values now, as one tensor that `lerp_` takes with them
    is_wide: bool  # whether the averages are kept in the dtype of the arithmetic

    def mix_(self, weights: Sequence[float], *, guard: bool) -> bool:
        """Fold the live values into each average; with `guard` only if all are surely finite."""
        live = self.read()
        if guard and not isfinite(torch.dot(live, live).item()):
            return False
        for average, weight in zip(self.averages, weights):  # noqa: B905 - as many, by the plan
            if self.is_wide and 0.0 < weight < 1.0:
                average.lerp_(live, weight)  # what `lerp_` comes to, in a quarter of the time
            else:
                lerp_(average, live, weight)
        return True

    @property
    def is_row(self) -> bool:
        """Whether it is several tensors, of numbers that are finite or not each by itself."""
        return len(self.blocks) > 1 and not self.blocks[0].live.is_complex()

    def mix_finite_(self, weights: Sequence[float]) -> Tensor:
        """Fold in what is finite; return how much of each block was held back, [blocks] int64."""
        live = self.read()
        pairs = zip(self.averages, weights, strict=True)
        held, *_ = [lerp_finite_(average, live, weight) for average, weight in pairs]
        ends = torch.tensor([block.live.numel() for block in self.blocks], device="cpu").cumsum(0)
        sums = held.cumsum(0)[ends - 1]
        return sums.diff(prepend=sums.new_zeros(1))


class BlockPlan:
    """Views into live and averaged tensors, cut once and used at every update.

    Args:
        averages: [averages][slots].
        live: [slots], detached, one shape a slot.
        suspects: slots whose averages hold NaN or inf; those that heal are taken out.
        parts: [slots], where the elements lie in a tensor that is shared out over ranks.
        guard: what `mix_` will be asked for; the other way is prepared when it comes.
    """

    def __init__(
        self,
        averages: Sequence[Sequence[Tensor]],
        live: Sequence[Tensor],
        suspects: set[int],
        parts: Sequence[Part | None] | None = None,
        guard: bool = True,
    ) -> None:
        self._live = live
        # The quick check looks at the live weights only, and in float32 range. An average that
        # starts out with NaN or inf (as the model did) takes the exact path until it is healed,
        # short-ranged storage always.
        self._averages, self._suspects, self._updates = averages, suspects, 0
        self._parts = [None] * len(live) if parts is None else parts
        self.cuts = 0
        self._short = {s for s, average in enumerate(averages[0]) if average.dtype in _SHORT_RANGE}
        self._blocks = list(self._cut(BLOCK))
        self._sort_out()
        self._stretches(guard)

    def _cut(self, length: int) -> Iterator[Block]:
        for slot, live in enumerate(self._live):
            yield from _cut(slot, [row[slot] for row in self._averages], live, length)

    # No `no_grad` here: what we are given is detached, and to enter it is a tenth of an update of
    # a small model.
    def mix_(
        self,
        weights: Sequence[float],
        *,
        guard: bool,
        keys: Sequence[int] | None = None,
        skip: Tensor | None = None,
    ) -> Tensor | None:
        """Fold the live tensors into each average with its weight.

        Args:
            weights: of the live tensors, one for each average.
            guard: hold back live elements that are not finite.
            keys: one for each slot to round stochastically with; None rounds to nearest.
            skip: on the device; where it is not zero nothing changes, and nobody waits to know.

        Returns:
            How many elements of each slot were held back because they were not finite, [slots]
            int64; None when there are none.
        """
        found: list[tuple[list[int], Tensor]] = []  # slots, and how much of each was held back
        one_by_one = self._blocks if keys is not None else list(self._loose)
        for stretch in () if keys is not None else self._stretches(guard):
            kept = None if skip is None else [average.clone() for average in stretch.averages]
            if not stretch.mix_(weights, guard=guard):
                if not stretch.is_row:
                    one_by_one += stretch.blocks
                    continue
                slots = [block.slot for block in stretch.blocks]
                found.append((slots, stretch.mix_finite_(weights)))
            if kept is not None:
                keep_(stretch.averages, kept, skip)
        for block in one_by_one:
            live = widened(block.live, block.averages[0])
            bits = None if keys is None else self._bits(block, keys[block.slot])
            kept = None if skip is None else [average.clone() for average in block.averages]
            if not guard or (block.slot not in self._exact and _surely_finite(live)):
                for average, weight in zip(block.averages, weights, strict=True):
                    lerp_(average, live, weight, bits)
            else:
                pairs = zip(block.averages, weights, strict=True)
                held, *_ = [lerp_finite_(average, live, w, bits) for average, w in pairs]
                found.append(([block.slot], held.sum().view(1)))
            keep_(block.averages, kept, skip)
        if self._suspects:
            self._forget_healed()
        return _total(found, len(self._live)) if found else None

    def _bits(self, block: Block, key: int) -> Tensor:
        """Hashed bits for one block; elements are counted in logical order, not in memory's."""
        piece, start = block.averages[0], block.start
        whole, part = self._averages[0][block.slot], self._parts[block.slot]
        if piece.shape == whole.shape:
            return hashed_bits(key, element_indices(piece, part))
        if whole.is_contiguous() and part is None:
            parts = 2 if whole.is_complex() else 1
            first, count = start * parts, piece.numel() * parts
            index = index_range(first, first + count, whole.device)
            return hashed_bits(key, index).view(as_real(piece).shape)
        flat = flat_views([element_indices(whole, part)])
        assert flat is not None, "blocks are cut from dense tensors"
        parts = flat[0].numel() // whole.numel()
        index = flat[0][start * parts : (start + piece.numel()) * parts]
        return hashed_bits(key, index).view(as_real(piece).shape)

    def _forget_healed(self) -> None:
        """Take slots whose averages have become finite off the exact path.

        Looked for at the 1st, 2nd, 4th, 8th … update: what starts as NaN is nearly always healed by
        the first one, and what never heals (a mask of infinities) is not read again each time.
        """
        self._updates += 1
        if self._updates & (self._updates - 1):
            return
        healed = {s for s in self._suspects if all(all_finite(row[s]) for row in self._averages)}
        if healed:
            self._suspects -= healed
            self._sort_out()

    def not_finite(self) -> dict[int, int]:
        """Count the live elements that the guard would hold back, by slot; writes nothing."""
        doubtful = list(self._loose)
        for stretch in self._stretches(guard=True):
            if not _is_finite(stretch.read()):
                doubtful += stretch.blocks
        counts: dict[int, int] = {}
        for block in doubtful:
            live = widened(block.live, block.averages[0])
            sure = block.slot not in self._exact and _surely_finite(live)
            if not sure and (count := int(held_back(block.averages[0], live).sum())):
                counts[block.slot] = counts.get(block.slot, 0) + count
        return dict(sorted(counts.items()))

    def _sort_out(self) -> None:
        """Tell apart which blocks are read quickly, and forget how they were joined."""
        self._exact = self._suspects | self._short
        self._loose = [block for block in self._blocks if not self._is_quick(block)]
        self._joined: dict[bool, list[Stretch]] = {}
        self.cuts += 1

    def _stretches(self, guard: bool) -> list[Stretch]:
        """What is read quickly; in blocks what is read twice, to be checked or mixed again."""
        found = self._joined.get(guard)
        if found is None:
            once = not guard and len(self._averages) == 1
            blocks = self._cut(sys.maxsize) if once else self._blocks
            found = _joined([block for block in blocks if self._is_quick(block)])
            self._joined[guard] = found
            self.cuts += 1
        return found

    def _is_quick(self, block: Block) -> bool:
        """Whether it can be read by plain calls: flat, here, and nothing to be turned round."""
        live = block.live
        if (
            block.slot in self._exact
            or live.device.type != "cpu"
            or live.is_conj()
            or live.is_neg()
        ):
            return False
        return all(t.dim() == 1 and t.is_contiguous() for t in (live, *block.averages))


def _cut(slot: int, averages: list[Tensor], live: Tensor, length: int) -> Iterator[Block]:
    """Blocks of one tensor in the order of memory, or all of it where the orders differ."""
    if live.numel() == 0:
        return
    flat = flat_views([*averages, live])
    if flat is None:  # other strides: correct as a whole, only without the cache
        yield Block(slot, averages, live, 0)
        return
    *flat_averages, flat_live = flat
    if live.dtype != averages[0].dtype or live.dtype not in WIDE:
        length = min(length, CONVERTED)
    for start in range(0, live.numel(), length):
        end = start + length
        yield Block(slot, [t[start:end] for t in flat_averages], flat_live[start:end], start)


def _joined(blocks: Sequence[Block]) -> list[Stretch]:
    """What is read and mixed at once: each large block, and small ones whose averages adjoin."""
    large: list[list[Block]] = []
    runs: dict[torch.dtype, list[_Run]] = {}  # of small ones, by what is read
    for block in blocks:
        if block.live.numel() > SMALL:
            large.append([block])
        else:
            _join(runs.setdefault(block.live.dtype, []), block)
    joined = [*(run.blocks for some in runs.values() for run in some), *large]
    joined.sort(key=lambda blocks: -sum(block.live.numel() for block in blocks))
    scratch: dict[torch.dtype, Tensor] = {}  # the first to ask needs most
    return [_stretch(blocks, scratch) for blocks in joined]


@dataclass
class _Run:
    """Small blocks whose averages adjoin, and how many elements they have."""

    blocks: list[Block]
    size: int


def _join(runs: list[_Run], block: Block) -> None:
    """Add `block` to the last run where its averages go on from there, else begin another."""
    size = block.live.numel()
    if runs and runs[-1].size + size <= ROW:
        last = runs[-1].blocks[-1]
        if all(map(follows, block.averages, last.averages)):
            runs[-1].blocks.append(block)
            runs[-1].size += size
            return
    runs.append(_Run([block], size))


def _stretch(blocks: list[Block], scratch: dict[torch.dtype, Tensor]) -> Stretch:
    """What is read and mixed at once, complex numbers as two real ones."""
    pieces = [as_real(block.live).view(-1) for block in blocks]
    size = sum(piece.numel() for piece in pieces)
    averages = [as_real(t).view(-1).as_strided((size,), (1,)) for t in blocks[0].averages]
    dtype = averages[0].dtype if averages[0].dtype in WIDE else torch.float32

    def room(dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(False):  # else it could not be written outside of it
            if dtype not in scratch:
                scratch[dtype] = torch.empty(size, dtype=dtype, device="cpu")
        return scratch[dtype][:size]

    is_wide = all(average.dtype == dtype for average in averages)
    return Stretch(blocks, averages, _reader(pieces, dtype, room), is_wide)


def _reader(
    pieces: list[Tensor], dtype: torch.dtype, room: Callable[[torch.dtype], Tensor]
) -> Callable[[], Tensor]:
    """A function that gathers and converts what is to be gathered and converted.

    Without a frame of our own where it is called most: for one row of small tensors.
    """
    first = pieces[0]
    gather = None
    if len(pieces) > 1:
        gather = partial(torch.cat, pieces, out=room(first.dtype))
    if first.dtype == dtype:
        return gather or (lambda: first)
    wide = room(dtype)
    return partial(wide.copy_, first) if gather is None else (lambda: wide.copy_(gather()))


def _total(found: Sequence[tuple[list[int], Tensor]], slots: int) -> Tensor | None:
    """The sum of counts of some slots each, [slots]; None where all are zero."""
    total = torch.zeros(slots, dtype=torch.int64, device="cpu")
    for some, counts in found:
        total.index_add_(0, torch.tensor(some, device="cpu"), counts)
    return total if total.any() else None


def _surely_finite(live: Tensor) -> bool:
    """Whether all elements are finite, by one quick pass; if that overflows, look again."""
    return _is_finite(as_real(live).reshape(-1))


def _is_finite(flat: Tensor) -> bool:
    """A sum of squares is finite only if all are."""
    return isfinite(torch.dot(flat, flat).item())
