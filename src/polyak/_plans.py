"""What the kernels work on, and whether somebody else looks at the memory of an average."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor

from . import _kernels as kernels
from ._places import Places
from ._roles import Entry
from ._sharding import is_sharded, local


@dataclass(frozen=True, eq=False)
class Group:
    """Slots that one kernel mixes, and where their live tensors lay when its views were cut."""

    slots: list[int]
    plan: kernels.MixPlan
    entries: list[Entry]
    live: list[Tensor]
    places: Places
    is_sharded: bool
    suspects: set[int]  # indices here; the plan takes out what heals

    def is_where_it_was(self) -> bool:
        """Whether the live tensors are the same, in the same memory, shape and order.

        Asked at every update, for a thousand tensors too: so by maps, without a loop in Python.
        """
        shown = [entry.owner.get(entry.key) for entry in self.entries]
        live = self.live
        if not all(map(is_, shown, live)):  # another buffer, or FSDP2 shows whole parameters
            live = [local(entry.live()) for entry in self.entries]
        elif self.is_sharded:
            live = [local(tensor) for tensor in live]
        return self.places.still_hold(live)

    def moved_slots(self) -> set[int]:
        """The slots whose live tensors are at another address now."""
        live = [local(entry.live()) for entry in self.entries]
        return {self.slots[index] for index in self.places.left_by(live)}

    def healed_slots(self) -> set[int]:
        """The slots whose averages are not suspected of NaN or inf, or not any more."""
        return set(self.slots) - {self.slots[index] for index in self.suspects}


class Plans:
    """What the kernels work on, cut for all slots.

    Args:
        groups: of all slots.
        averages: which these work on, one for each memory that they lie in.
        holders: [averages][slots], how many views of each average's memory the plans hold.
    """

    def __init__(
        self, groups: list[Group], averages: list[Tensor], holders: list[list[int]]
    ) -> None:
        self.groups, self._averages = groups, averages
        self._holders, self._when_counted = holders, self._cuts()

    def _cuts(self) -> list[tuple[int, int]]:
        return [(id(group), group.plan.cuts) for group in self.groups]

    def holders(self, row: int) -> list[int] | None:
        """How many views the plans hold, [slots]; None where some were cut since the count."""
        return self._holders[row] if self._cuts() == self._when_counted else None

    def memory(self) -> frozenset[int]:
        """Addresses of the memory that the averages lie in, now: whoever has a view may move it."""
        return memory_of(self._averages)

    def moved(self) -> list[Group]:
        """The groups of which some live tensor is elsewhere now."""
        return [group for group in self.groups if not group.is_where_it_was()]

    def exchange(self, old: Sequence[Group], new: Sequence[Group]) -> None:
        """Work on `new` instead of `old`."""
        self.groups = [*(group for group in self.groups if group not in old), *new]
        self._when_counted = []


def memory_of(tensors: Iterable[Tensor]) -> frozenset[int]:
    """Addresses of the memory that tensors lie in."""
    pieces = (local(tensor) for tensor in tensors)
    return frozenset(t.untyped_storage().data_ptr() for t in pieces if t.numel())


def shares_memory(average: Tensor) -> bool:
    """Whether it lies in a row with others."""
    return not is_sharded(average) and average.untyped_storage().nbytes() > average.nbytes


def count_holders(tensor: Tensor) -> int:
    """How many tensors, arrays and storages refer to this tensor's memory.

    More than at allocation means that somebody was handed a view and may still look at it. Without
    the count (it is not documented) we answer -1, and everyone is taken to be looking.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    storage = local(tensor).untyped_storage()  # one object for all who ask: its holders count too
    return -1 if count is None else int(count(storage._cdata)) + sys.getrefcount(storage)
