"""In-place arithmetic on lists of tensors: one file a backend, no state but the views it cut."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from .._sharding import Part
from ._blocks import BlockPlan
from ._elements import FLOAT8 as FLOAT8
from ._elements import all_finite as all_finite
from ._elements import beyond_range as beyond_range
from ._elements import lerp_ as lerp_
from ._elements import storage_dtype as storage_dtype
from ._exchange import Exchange as Exchange
from ._exchange import can_exchange as can_exchange
from ._fingerprint import fingerprint as fingerprint
from ._flat import overlaps_itself as overlaps_itself
from ._flat import write_ as write_
from ._foreach import ForeachPlan
from ._mean import mean_ as mean_
from ._narrow import narrowed as narrowed
from ._rounding import stream_key as stream_key
from ._rows import side_by_side as side_by_side


class MixPlan(Protocol):
    """Live tensors and the averages they flow into, ready to be mixed again and again.

    Attributes:
        cuts: how often views of the averages were cut or dropped; as long as it is the same number,
            as many are held.
    """

    cuts: int

    def mix_(
        self,
        weights: Sequence[float],
        *,
        guard: bool,
        keys: Sequence[int] | None = None,
        skip: Tensor | None = None,
    ) -> Tensor | None:
        """Fold the live tensors into each average.

        Returns:
            How many elements of each slot were held back, [slots] int64, on the device of the
            averages: nobody has waited for it. None when there are none for sure, and without the
            guard.
        """

    def not_finite(self) -> dict[int, int]:
        """Count live elements that are not finite, by slot."""


def plan(
    averages: Sequence[Sequence[Tensor]],
    live: Sequence[Tensor],
    suspects: set[int],
    parts: Sequence[Part | None] | None = None,
    guard: bool = True,
) -> MixPlan:
    """Choose the backend for averages that all lie on one device.

    Args:
        averages: [averages][slots].
        live: [slots], detached, one shape a slot.
        suspects: slots whose averages hold NaN or inf.
        parts: [slots], where the elements lie in a tensor that is shared out over ranks; None
            where all are here.
        guard: whether `mix_` will be asked for the guard, so that it can be made ready now.
    """
    return _backend(averages[0][0].device)(averages, live, suspects, parts, guard)


@cache
def _backend(device: torch.device) -> Callable[..., MixPlan]:
    """Triton where it supports the chip and works (NVIDIA, compute capability 8.0 and up)."""
    if device.type == "cpu":
        return BlockPlan
    if device.type != "cuda" or torch.version.hip is not None:
        return ForeachPlan
    if torch.cuda.get_device_capability(device) < (8, 0):
        return ForeachPlan
    try:
        from ._triton import TritonPlan, works
    except ImportError:  # torch brings it on Linux only
        return ForeachPlan
    return TritonPlan if works(device) else ForeachPlan
