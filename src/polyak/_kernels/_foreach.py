"""Accelerators: whole tensors at a time, and never a wait for the device.

Without the guard a group is one multi-tensor call; with it, some forty small launches a tensor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._sharding import Part
from ._elements import WIDE, as_real, held_back, keep_, lerp_, lerp_finite_, widened
from ._rounding import element_indices, hashed_bits


class ForeachPlan:
    """The same arithmetic as `BlockPlan`, in multi-tensor calls.

    Args:
        averages: [averages][slots].
        live: [slots], detached, one shape a slot.
        suspects: not needed here: the exact path is the only guarded one.
        parts: [slots], where the elements lie in a tensor that is shared out over ranks.
        guard: nothing is prepared for it here.
    """

    cuts = 0  # the views are those it was given

    def __init__(
        self,
        averages: Sequence[Sequence[Tensor]],
        live: Sequence[Tensor],
        suspects: set[int],
        parts: Sequence[Part | None] | None = None,
        guard: bool = True,
    ) -> None:
        self._averages, self._live = averages, live
        self._parts = [None] * len(live) if parts is None else parts

    @torch.no_grad()
    def mix_(
        self,
        weights: Sequence[float],
        *,
        guard: bool,
        keys: Sequence[int] | None = None,
        skip: Tensor | None = None,
    ) -> Tensor | None:
        """Fold the live tensors into each average with its weight; see `BlockPlan.mix_`.

        With the guard the counts are there also when all are zero: they stay on the device.
        """
        found: list[Tensor] = []
        bits: list[Tensor | None] = [None] * len(self._live)
        if keys is not None:
            bits = [
                hashed_bits(key, element_indices(average, part))
                for key, average, part in zip(keys, self._averages[0], self._parts, strict=True)
            ]
        for row, (averages, weight) in enumerate(zip(self._averages, weights, strict=True)):
            if guard:
                for slot, (average, live) in enumerate(zip(averages, self._live, strict=True)):
                    kept = None if skip is None else [average.clone()]
                    held = lerp_finite_(average, live, weight, bits[slot])
                    keep_([average], kept, skip)
                    if row == 0:
                        found.append(held.sum())
            elif keys is None and skip is None and 0.0 < weight < 1.0 and _one_dtype(averages):
                live_wide = [
                    as_real(widened(x, y)) for x, y in zip(self._live, averages, strict=True)
                ]
                torch._foreach_lerp_([as_real(y) for y in averages], live_wide, weight)
            else:
                for average, live, own in zip(averages, self._live, bits, strict=True):
                    kept = None if skip is None else [average.clone()]
                    lerp_(average, live, weight, own)
                    keep_([average], kept, skip)
        return torch.stack(found) if found else None

    @torch.no_grad()
    def not_finite(self) -> dict[int, int]:
        """Count the live elements that the guard would hold back; this one does wait."""
        counts = [
            int(held_back(average, live).sum())
            for average, live in zip(self._averages[0], self._live, strict=True)
        ]
        return {slot: count for slot, count in enumerate(counts) if count}


def _one_dtype(averages: Sequence[Tensor]) -> bool:
    dtypes = {average.dtype for average in averages}
    return len(dtypes) == 1 and dtypes <= WIDE
