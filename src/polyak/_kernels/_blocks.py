"""CPU: block by block, so that a block is checked and mixed while it is in the cache."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._sharding import Part
from ._elements import FLOAT8, all_finite, as_real, held_back, keep_, lerp_, lerp_finite_, widened
from ._flat import flat_views
from ._rounding import element_indices, hashed_bits, index_range

# Elements. Measured on 2 cores: at 256k the calls cost more, above 1M the check and the mixing read
# the memory twice.
BLOCK = 1 << 20

# Their range is narrower than that of the float32 in which the quick check is made.
_SHORT_RANGE = {torch.float16, *FLOAT8}


class BlockPlan:
    """Views into live and averaged tensors, cut once and used at every update.

    Args:
        averages: [averages][slots].
        live: [slots], detached, one shape a slot.
        suspects: slots whose averages hold NaN or inf; those that heal are taken out.
        parts: [slots], where the elements lie in a tensor that is shared out over ranks.
    """

    def __init__(
        self,
        averages: Sequence[Sequence[Tensor]],
        live: Sequence[Tensor],
        suspects: set[int],
        parts: Sequence[Part | None] | None = None,
    ) -> None:
        self._blocks = [
            (slot, rows, piece, start)
            for slot, tensor in enumerate(live)
            for rows, piece, start in _cut([row[slot] for row in averages], tensor)
        ]
        # The quick check looks at the live weights only, and in float32 range. An average that
        # starts out with NaN or inf (as the model did) takes the exact path until it is healed,
        # short-ranged storage always.
        self._averages, self._suspects, self._updates = averages, suspects, 0
        self._parts = [None] * len(live) if parts is None else parts
        self._exact = suspects | {
            slot for slot, average in enumerate(averages[0]) if average.dtype in _SHORT_RANGE
        }

    @torch.no_grad()
    def mix_(
        self,
        weights: Sequence[float],
        *,
        guard: bool,
        keys: Sequence[int] | None = None,
        skip: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """Fold the live tensors into each average with its weight.

        Args:
            weights: of the live tensors, one for each average.
            guard: hold back live elements that are not finite.
            keys: one for each slot to round stochastically with; None rounds to nearest.
            skip: on the device; where it is not zero nothing changes, and nobody waits to know.

        Returns:
            Elements held back because they were not finite, by slot.
        """
        found: dict[int, Tensor] = {}
        for slot, rows, piece, start in self._blocks:
            live = widened(piece, rows[0])
            bits = None if keys is None else self._bits(slot, keys[slot], rows[0], start)
            kept = None if skip is None else [average.clone() for average in rows]
            if not guard or (slot not in self._exact and _surely_finite(live)):
                for average, weight in zip(rows, weights, strict=True):
                    lerp_(average, live, weight, bits)
                keep_(rows, kept, skip)
                continue
            counts = [lerp_finite_(a, live, w, bits) for a, w in zip(rows, weights, strict=True)]
            keep_(rows, kept, skip)
            if counts[0]:
                found[slot] = counts[0] + found.get(slot, 0)
        self._forget_healed()
        return found

    def _bits(self, slot: int, key: int, piece: Tensor, start: int) -> Tensor:
        """Hashed bits for one block; elements are counted in logical order, not in memory's."""
        whole, part = self._averages[0][slot], self._parts[slot]
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
        for slot in list(self._suspects):
            if all(all_finite(row[slot]) for row in self._averages):
                self._suspects.discard(slot)
                self._exact.discard(slot)

    @torch.no_grad()
    def not_finite(self) -> dict[int, int]:
        """Count the live elements that the guard would hold back, by slot; writes nothing."""
        counts: dict[int, int] = {}
        for slot, rows, piece, _ in self._blocks:
            live = widened(piece, rows[0])
            sure = slot not in self._exact and _surely_finite(live)
            if not sure and (count := int(held_back(rows[0], live).sum())):
                counts[slot] = counts.get(slot, 0) + count
        return counts


def _cut(rows: list[Tensor], live: Tensor) -> list[tuple[list[Tensor], Tensor, int]]:
    """The same stretch of each average and of the live tensor, and where it starts."""
    if live.numel() == 0:
        return []
    flat = flat_views([*rows, live])
    if flat is None:  # other strides: correct as a whole, only without the cache
        return [(rows, live, 0)]
    *rows, live = flat
    return [
        ([row[start : start + BLOCK] for row in rows], live[start : start + BLOCK], start)
        for start in range(0, live.numel(), BLOCK)
    ]


def _surely_finite(live: Tensor) -> bool:
    """One quick pass: a sum of squares is finite only if all are (if it overflows, look again)."""
    flat = as_real(live).reshape(-1)
    return math.isfinite(torch.dot(flat, flat).item())
