"""CUDA: all tensors of a kind in one launch, and the live weights read once for all averages."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from .._errors import AveragingWarning
from .._sharding import Part
from ._flat import flat_views
from ._foreach import ForeachPlan
from ._triton_kernel import mix

# Elements a program, 8 a thread: compiled for compute capability 9.0 that leaves registers for four
# programs at a time and more, with 16 for two. Not tuned by measurement.
BLOCK = 2048
WARPS = 8

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# The least number that rounds to infinity: half a step above the largest one, in an even place.
LIMITS = {
    torch.float32: math.inf,
    torch.bfloat16: 2.0**128 - 2.0**119,
    torch.float16: 2.0**16 - 2.0**4,
}


@dataclass(frozen=True)
class _Kind:
    """What slots must have in common to be mixed in one launch.

    Args:
        live: dtype.
        stored: dtype of the averages.
        aligned: all tensors start at multiples of 16 bytes.
        ordered: elements lie in memory as they are counted in the whole tensor.
    """

    live: torch.dtype
    stored: torch.dtype
    aligned: bool
    ordered: bool


@dataclass(frozen=True)
class _Group:
    """Slots of one kind.

    Args:
        kind: what they share.
        first: the first program of each slot; the others follow.
        slot_of: [programs] int32, the slot that each program works on.
        watched: the averages of which autograd counts the writes: all but inference tensors.
    """

    kind: _Kind
    first: dict[int, int]
    slot_of: Tensor
    watched: list[Tensor]


@dataclass(frozen=True)
class _Others:
    """Slots that go another way.

    Args:
        slots: which.
        index: the same on the device: sent with each update, the host would wait for it.
        plan: how.
    """

    slots: list[int]
    index: Tensor
    plan: ForeachPlan


class TritonPlan:
    """The same arithmetic as `BlockPlan`, as one kernel over a table of addresses.

    For float32, bfloat16 and float16 in any pairing, live and averages in the same memory order on
    one device; all else in the group goes through a `ForeachPlan`. One launch for each kind of
    slot: a pair of dtypes, and apart from the others those that do not start at 16 bytes and those
    that lie in memory in another order than they are counted, like channels-last weights. To round
    these last ones stochastically is left to `ForeachPlan`, too.

    The table holds addresses: tensors that move need a new plan.

    Args:
        averages: [averages][slots].
        live: [slots], detached, one shape a slot.
        suspects: not needed here: each element is looked at.
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
        self._averages, self._live = averages, live  # addresses stay good as long as the plan
        self._parts = [None] * len(live) if parts is None else parts
        self._device = averages[0][0].device
        by_kind: dict[_Kind | None, list[int]] = {}
        for slot in range(len(live)):
            by_kind.setdefault(self._kind_of(slot), []).append(slot)
        self._unfit = self._foreach(by_kind.pop(None, []))
        kinds = [(kind, slots) for kind, slots in by_kind.items() if kind is not None]
        self._unordered = self._foreach(
            [slot for kind, slots in kinds if not kind.ordered for slot in slots]
        )
        self._groups = [self._group(kind, slots) for kind, slots in kinds]
        self._table = self._addresses()

    def _kind_of(self, slot: int) -> _Kind | None:
        """How the kernel has to be compiled for a slot; None where it cannot."""
        live, part = self._live[slot], self._parts[slot]
        averages = [row[slot] for row in self._averages]
        tensors = [*averages, live]
        if any(t.device != self._device or t.dtype not in _DTYPES for t in tensors):
            return None
        if any(average.dtype != averages[0].dtype for average in averages):
            return None
        if live.is_neg() or flat_views(tensors) is None:
            return None
        ordered = averages[0].is_contiguous() and _first_index(part) is not None
        aligned = all(t.data_ptr() % 16 == 0 for t in tensors)
        return _Kind(live.dtype, averages[0].dtype, aligned=aligned, ordered=ordered)

    def _foreach(self, slots: list[int]) -> _Others:
        """Another plan for some of the slots."""
        rows = [[row[slot] for slot in slots] for row in self._averages]
        live = [self._live[slot] for slot in slots]
        plan = ForeachPlan(rows, live, set(), [self._parts[slot] for slot in slots])
        return _Others(slots, torch.tensor(slots, dtype=torch.int64, device=self._device), plan)

    def _group(self, kind: _Kind, slots: list[int]) -> _Group:
        sizes = [self._live[slot].numel() for slot in slots]
        blocks = torch.tensor([-(-size // BLOCK) for size in sizes], device="cpu")
        slot_of = torch.tensor(slots, dtype=torch.int32, device="cpu").repeat_interleave(blocks)
        first = (blocks.cumsum(0) - blocks).tolist()
        averages = [row[slot] for slot in slots for row in self._averages]
        watched = [average for average in averages if not average.is_inference()]
        return _Group(kind, dict(zip(slots, first, strict=True)), slot_of.to(self._device), watched)

    def _addresses(self) -> Tensor:
        """The table of `_triton_kernel`: [slots, columns] int64."""
        first_program = {slot: n for group in self._groups for slot, n in group.first.items()}
        table = [
            [
                live.data_ptr(),
                live.numel(),
                _first_index(self._parts[slot]) or 0,
                first_program.get(slot, 0),
                *(row[slot].data_ptr() for row in self._averages),
            ]
            for slot, live in enumerate(self._live)
        ]
        return torch.tensor(table, dtype=torch.int64, device=self._device)

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
        groups = [group for group in self._groups if keys is None or group.kind.ordered]
        found = self._launch(groups, weights, guard, keys, skip)
        for others in [self._unfit] if keys is None else [self._unfit, self._unordered]:
            own = None if keys is None else [keys[slot] for slot in others.slots]
            counts = others.plan.mix_(weights, guard=guard, keys=own, skip=skip)
            if counts is not None:
                found.index_copy_(0, others.index, counts)
        for average in (average for group in groups for average in group.watched):
            increment_version(average)  # autograd cannot see what a kernel writes
        return found if guard else None

    @torch.no_grad()
    def not_finite(self) -> dict[int, int]:
        """Count the live elements that the guard would hold back; this one does wait."""
        unfit = self._unfit
        counts = {unfit.slots[index]: n for index, n in unfit.plan.not_finite().items()}
        numbers = self._launch(self._groups, [0.0], True, None, None).tolist()
        counts |= {slot: number for slot, number in enumerate(numbers) if number}
        return dict(sorted(counts.items()))

    def _launch(
        self,
        groups: Sequence[_Group],
        weights: Sequence[float],
        guard: bool,
        keys: Sequence[int] | None,
        skip: Tensor | None,
    ) -> Tensor:
        """Mix into the first averages, one for each weight; return the counts [slots]."""
        counts = torch.zeros(len(self._live), dtype=torch.int64, device=self._device)
        sent = self._sent(weights, torch.float64)
        sent_keys = counts if keys is None else self._sent(keys, torch.int32)
        flag = counts if skip is None else skip.to(self._device, non_blocking=True)
        with torch.cuda.device_of(counts):
            for group in groups:
                if not group.slot_of.numel():
                    continue  # nothing but empty tensors
                mix[(group.slot_of.numel(),)](
                    self._table,
                    group.slot_of,
                    sent,
                    sent_keys,
                    flag,
                    counts,
                    live_type=_DTYPES[group.kind.live],
                    stored_type=_DTYPES[group.kind.stored],
                    limit=LIMITS[group.kind.stored],
                    averages=len(self._averages),
                    mixed=len(weights),
                    guard=guard,
                    stochastic=keys is not None,
                    skippable=skip is not None,
                    aligned=group.kind.aligned,
                    block=BLOCK,
                    num_warps=WARPS,
                    enable_fp_fusion=False,  # only where the kernel says so
                )
        return counts

    def _sent(self, numbers: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Numbers of this update on the device. They are data, so no other value is compiled in."""
        pinned = self._device.type == "cuda"  # or the host would wait for all work before it
        on_host = torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=pinned)
        return on_host.to(self._device, non_blocking=True)


def _first_index(part: Part | None) -> int | None:
    """Where a part begins in the whole, if its elements follow each other there; else None."""
    if part is None:
        return 0
    cut = [dim for dim, size in enumerate(part.sizes) if size != part.shape[dim]]
    if cut and any(size > 1 for size in part.sizes[: cut[-1]]):
        return None
    first = 0
    for offset, whole in zip(part.offsets, part.shape, strict=True):
        first = first * whole + offset
    return first


def works(device: torch.device) -> bool:
    """Whether kernels can be built and run here: tried on one number, once a device and process.

    Triton needs more than a GPU: a C compiler, Python's headers, a folder it may write to.
    """
    average, live = torch.zeros(1, device=device), torch.ones(1, device=device)
    try:
        TritonPlan([[average]], [live], set()).mix_([0.25], guard=True)
        result = average.item()
    except Exception as error:  # each thing that is missing says so in an error of its own kind
        reason = f"{type(error).__name__}: {error}"
    else:
        if result == 0.25:
            return True
        reason = f"0.25 came out as {result!r}"
    warnings.warn(
        f"Triton is installed but does not work on {device} ({reason}): averages are updated "
        "by torch, more slowly. A C compiler and Python's headers are what is usually missing.",
        AveragingWarning,
        stacklevel=2,
    )
    return False
