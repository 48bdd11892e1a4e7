"""The one thing with state: live tensors, the averages of them, a clock, and schedules."""

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import sub
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from . import _kernels as kernels
from ._checks import (
    check_decay,
    check_device,
    check_dtype,
    check_schedule,
    check_time,
    kind,
    unit_roundoff,
)
from ._errors import (
    ArgumentError,
    AveragingWarning,
    MatchError,
    OrderError,
    frames_to_the_user,
    show_time,
)
from ._history import History
from ._identities import constant_decay
from ._places import Places
from ._plans import Group, Plans, count_holders, memory_of, shares_memory
from ._roles import Entry, Inventory, check_some_averaged
from ._schedules import Schedule
from ._sharding import (
    is_sharded,
    is_spread_like,
    local,
    mesh_of,
    part_of,
    plain,
    spread_like,
    spread_of,
    spread_over,
)

if TYPE_CHECKING:  # a build of torch may be without it
    from torch.distributed import ProcessGroup

NonFinite = Literal["skip", "raise", "ignore"]
Rounding = Literal["nearest", "stochastic"]

# Memory that some average has lent its weights to at this moment: nobody may average it, or lend
# it a second time, until it is given back. Process-wide, since averages of one model are many.
_lent_memory: set[int] = set()


@dataclass
class Memory:
    """What an average remembers, kept up to date in three numbers.

    Each update multiplies all weights by its decay and adds one: so do these sums over them.
    """

    initial: float = 1.0  # weight of the weights at construction
    age: float = 0.0  # mean age of what is averaged, the initial weights included
    squares: float = 0.0  # sum of the squared weights of all updates
    share: float = 1.0  # weight of the live weights in the last update

    def fold(self, decay: float, elapsed: float) -> None:
        """One update by `decay`, `elapsed` after the one before."""
        self.initial *= decay
        self.age = decay * (self.age + elapsed)
        self.squares = decay * decay * self.squares + (1.0 - decay) ** 2
        self.share = 1.0 - decay

    @property
    def noise_window(self) -> float:
        """Of how many equally weighted weight vectors the average is worth."""
        return 1.0 / (self.squares + self.initial**2)


@dataclass
class Row:
    """One of the averages of an engine."""

    schedule: Schedule
    tensors: list[Tensor]  # [slots], storage dtype; sharded where the ranks share them out
    holders: list[int]  # references to each tensor's memory while it is ours alone
    memory: Memory
    norms: dict[str, Tensor]  # recomputed statistics, valid until the next update
    past: list[dict[str, Any]] = field(default_factory=list)  # schedules it had before, saved form
    damage: str = ""  # why it must not be used
    stalled: str = ""  # what to say when rounding has swallowed whole updates

    def __getstate__(self) -> dict[str, Any]:
        """For pickles: each average in memory of its own, or each would bring its whole row.

        Who will hold it where it is read cannot be known: so it is taken to be looked at.
        """
        tensors = [
            tensor.detach().clone() if shares_memory(tensor) else tensor for tensor in self.tensors
        ]
        return {**vars(self), "tensors": tensors, "holders": [-1] * len(tensors)}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Row":
        """With the same tensors side by side, so that the same holders count."""
        copied = memo[id(self)] = replace(self)
        for name, value in vars(self).items():
            setattr(copied, name, copy.deepcopy(value, memo))
        return copied


@dataclass(frozen=True)
class Loan:
    """One row's values sit in the live model; here is where each can be read meanwhile."""

    row: int
    tensors: list[Tensor]  # [slots]
    live: Mapping[str, Tensor]  # the trained values, which wait for the end of the loan
    memory: frozenset[int]  # addresses of the lent live weights


class Ticker(Protocol):
    """Somebody who counts steps for an engine."""

    def time(self) -> float:
        """What time it is."""


class Later:
    """A number on the device that the host may read later without waiting for what is queued now.

    The copy to the host is queued behind the work so far; asking waits for that work only.
    """

    def __init__(self, number: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if number.device.type == "cuda":
            self._host = torch.empty(number.shape, dtype=number.dtype, pin_memory=True)
            self._host.copy_(number, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = plain(number).clone()

    def read(self) -> float:
        """The number."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._host)


@dataclass(frozen=True)
class Doubt:
    """A step that may have been skipped, and the clock as it was before it was counted."""

    skip: Later
    now: float
    updates: int
    steps: int
    rows: list[tuple[Memory, dict[str, Tensor]]]

    def was_skipped(self) -> bool:
        """Whether it was; waits for the device to have come so far."""
        return self.skip.read() != 0.0


class Engine:
    """Live tensors in slots, K averages of them, one clock, and K schedules.

    Args:
        inventory: every tensor of the model, with its role.
        schedules: one for each average.
        now: the clock at construction; schedules see the time since then.
        dtype: storage of real averages; None keeps float32 for anything narrower, else the
            tensor's own.
        device: where the averages live; None follows each live tensor.
        nonfinite: what to do with live elements that are NaN or infinite.
        rounding: how a mixed value is rounded to storage.
        seed: of stochastic rounding.
        shard: the process group that shares out what each of its ranks holds whole.
    """

    def __init__(
        self,
        inventory: Inventory,
        schedules: Sequence[Schedule],
        *,
        now: float = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        nonfinite: NonFinite = "skip",
        rounding: Rounding = "nearest",
        seed: int = 0,
        shard: "ProcessGroup | None" = None,
    ) -> None:
        if nonfinite not in get_args(NonFinite):
            raise ArgumentError(
                f"nonfinite must be 'skip', 'raise' or 'ignore', got {nonfinite!r}."
            )
        if rounding not in get_args(Rounding):
            raise ArgumentError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}.")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ArgumentError(f"seed must be a whole number, got {seed!r}.")
        if dtype is not None:
            check_dtype(dtype)
        for schedule in schedules:
            check_schedule(schedule)
        check_some_averaged(inventory)
        self.inventory = inventory
        self.entries = inventory.averaged()
        self.slots = {entry.name: slot for slot, entry in enumerate(self.entries)}
        self.nonfinite: NonFinite = nonfinite
        self.rounding: Rounding = rounding
        self.seed = seed
        self.loan: Loan | None = None
        self.follower: Ticker | None = None
        self.jumps = 0  # how often the clock was set: by construction, reset and load
        self.views: dict[int, Callable[[], None]] = {}  # of modules that show an average
        self.watchers: dict[int, Callable[[], None]] = {}  # called after each update
        self._moved: set[int] = set()  # slots whose live tensors had moved when they last did,
        self._moved_at = -1  # before the update after this one
        self._restless: set[int] = set()  # those that moved before two updates running
        self._watched: list[int] = []  # versions of the live tensors when the watch began
        self._watched_updates = self._watched_steps = 0
        self._device = None if device is None else check_device(device)
        self._dtype = dtype
        if self._device is not None and (
            shard is not None or any(is_sharded(entry.live()) for entry in self.entries)
        ):
            raise ArgumentError(
                f"device must be left out where ranks share out the average, got {device!r}: its "
                "parts stay beside those of the model."
            )
        self._mesh = None if shard is None else mesh_of(shard, self.entries[0].live().device)
        self.rows = [Row(s, [], [], Memory(), {}) for s in schedules]
        self._suspects: set[int] = set()  # slots whose averages hold NaN or inf
        self._cached: Plans | None = None
        self._start_clock(check_time(now))
        live = [entry.live() for entry in self.entries]
        for row in self.rows:
            row.tensors = self._placed(
                [self._allocate(t, entry) for t, entry in zip(live, self.entries, strict=True)],
                live,
            )
            row.holders = [count_holders(tensor) for tensor in row.tensors]
        self.parts = [part_of(tensor) for tensor in self.rows[0].tensors]
        self.is_spread = any(part is not None for part in self.parts)
        self._dtypes = {tensor.dtype for tensor in self.rows[0].tensors}
        self._least_share = max(map(unit_roundoff, self._dtypes))  # below it some storage may stall
        self.copy_live()

    def __getstate__(self) -> dict[str, Any]:
        """All but the plans: they are views of these tensors, and a copy has others.

        Inside `applied()` the averaged values are in the live model; the copy has them for itself,
        over a copy of the model that shows them too.
        """
        state = {**vars(self), "_cached": None}
        if self.loan is not None:
            rows, lent = list(self.rows), self.rows[self.loan.row]
            values = [tensor.detach().clone() for tensor in self.loan.tensors]
            rows[self.loan.row] = replace(lent, tensors=values, holders=[-1] * len(values))
            state |= {"rows": rows, "loan": None}
        return state

    # ── the clock ────────────────────────────────────────────────────────────────────────────────

    def _start_clock(self, now: float) -> None:
        self.jumps += 1
        self.origin = self.now = now
        self.updates = 0
        self.history = History()
        self.held_back = {}
        self.steps = 0  # optimizer steps seen by a follower since the last update
        self._doubts: list[Doubt] = []  # steps that the device may have skipped
        self._warned: set[str] = set()
        for row in self.rows:
            row.memory, row.norms, row.past, row.stalled = Memory(), {}, [], ""

    def next_time(self, now: float | None) -> tuple[float, float]:
        """The time of an update at `now` (None: one more), and the time since the last one.

        While optimizers are followed, one more is what their steps have made of it.
        """
        if self._doubts:
            self.settle()
        if now is not None:
            now = check_time(now)
        elif self.follower is not None:
            now = check_time(self.follower.time())
            if now == self.now and not self.steps:
                raise OrderError(
                    "update must come after a step of the optimizer, got none since the last "
                    "update: follow() updates by itself. Remove this call."
                )
        else:  # steps that a follower saw count, also after it was removed
            now = self.now + max(1, self.steps)
        if not now > self.now:
            raise OrderError(
                f"now must be above {show_time(self.now)} (the last update), got {show_time(now)}. "
                "Call update once per optimizer step."
            )
        return now, now - self.now

    # ── one update ───────────────────────────────────────────────────────────────────────────────

    def update(self, now: float | None = None, skip: Tensor | None = None) -> list[float]:
        """Fold in the live weights as they are at `now`; return the decay of each average.

        Everything that can be refused is refused before a tensor or the clock is touched.

        Args:
            now: the time; None: one more.
            skip: on the device, not zero when the optimizer's step was skipped there. Then no value
                changes; the clock, which does not know yet, is set back by `settle`.
        """
        now, elapsed = self.next_time(now)
        self.check_may_update()
        decays = [
            check_decay(row.schedule(now=now - self.origin, elapsed=elapsed), row.schedule)
            for row in self.rows
        ]
        if not self.updates:
            self._check_expressible(elapsed)
        if self.nonfinite == "raise":
            self.check_finite(self.rows)
        if self._cached is None:
            self._plans(self.rows)  # what fails while views are cut has changed nothing
        for row in self.rows:  # an interrupt from here on leaves some tensors moved, some not
            row.damage = "an update was interrupted half-way"
        doubt = None if skip is None else self._doubt(skip)
        self.fold([1.0 - decay for decay in decays], self.rows, skip)
        self.commit(now)
        if doubt is not None:
            self._doubts.append(doubt)
        for row, decay in zip(self.rows, decays, strict=True):
            row.memory.fold(decay, elapsed)
            row.norms = {}
            row.damage = ""
        if self.views:
            self.show()
        if self.watchers:
            for watch in list(self.watchers.values()):
                watch()
        if 1.0 - max(decays) < self._least_share:
            self._warn_of_stall(decays)  # last: a warning may be an error
        return decays

    def check_may_update(self) -> None:
        """Refuse an update of lent or damaged averages, or from live weights that are lent."""
        self.check_not_lent("update")
        for row in self.rows:
            if row.damage:
                check_undamaged(row)
        self._follow_live()
        if self.views:
            self.check_shown()

    def check_shown(self) -> None:
        """Where a module shows all of the live model, raise `MatchError` unless all is there."""
        for entry in self.inventory.entries if self.views else ():
            if not entry.is_gone():
                entry.live()

    def check_finite(self, rows: Sequence[Row]) -> None:
        """Raise `ArgumentError` where `fold` would hold elements back, if that was asked for."""
        if self.nonfinite != "raise":
            return
        found = {
            self.entries[group.slots[index]].name: count
            for group in self._plans(rows)
            for index, count in group.plan.not_finite().items()
        }
        if found:
            some = ", ".join(f"{name!r} ({count})" for name, count in list(found.items())[:3])
            raise ArgumentError(
                f"live weights must be finite with nonfinite='raise', got NaN or inf in "
                f"{len(found)} tensors: {some}. Go back to a checkpoint, or use nonfinite='skip'."
            )

    def fold(
        self, weights: Sequence[float], rows: Sequence[Row], skip: Tensor | None = None
    ) -> None:
        """Mix the live tensors into `rows`, under the guard against NaN and inf."""
        guard = self.nonfinite != "ignore"
        for group in self._plans(rows):
            keys = None if self.rounding == "nearest" else self._rounding_keys(group.slots)
            counts = group.plan.mix_(weights, guard=guard, keys=keys, skip=skip)
            if counts is not None:
                self._note_held_back(group.slots, counts)

    def _note_held_back(self, slots: list[int], counts: Tensor) -> None:
        """Add to the counts of these slots, on the device: an update does not wait for them."""
        for index, (known, total) in enumerate(self._counted):
            if total.device == counts.device and (known is slots or known == slots):
                # Not in place: it may have been made under inference_mode.
                self._counted[index] = (slots, total + counts)
                return
        self._counted.append((slots, counts))

    @property
    def held_back(self) -> dict[str, int]:
        """How many elements the guard held back, by name; waits for the device."""
        if self._counted:
            total = Counter(self._held_back)
            for slots, counts in self._counted:
                for slot, count in zip(slots, counts.tolist(), strict=True):
                    if count:
                        total[self.entries[slot].name] += count
            self.held_back = dict(total)  # all at once, or an interrupt would count some twice
        return self._held_back

    @held_back.setter
    def held_back(self, counts: dict[str, int]) -> None:
        self._held_back = counts
        self._counted: list[tuple[list[int], Tensor]] = []  # slots, and what is not read yet

    def commit(self, now: float) -> None:
        """Move the clock to `now`."""
        self.history.append(now - self.now, len(self.rows[0].past))
        self.now = now
        self.updates += 1
        self.steps = 0

    def note_skip(self, skip: Tensor) -> None:
        """Note that the last step counted by a follower may have been skipped on the device."""
        self._doubts.append(self._doubt(skip))

    def settle(self) -> None:
        """Set the clock back by the steps that turn out to have been skipped on the device.

        Called at the next step and by all who read the clock: the host then waits for the device
        to have come as far as the step before, no further. The values need no correction.
        """
        skipped = [doubt for doubt in reversed(self._doubts) if doubt.was_skipped()]
        for doubt in skipped:
            self._set_back(doubt)
        self._doubts = []
        if skipped:
            self.show()  # recomputed statistics are valid again

    def _doubt(self, skip: Tensor) -> Doubt:
        before = [(replace(row.memory), row.norms) for row in self.rows]
        return Doubt(Later(skip), self.now, self.updates, self.steps, before)

    def _set_back(self, doubt: Doubt) -> None:
        if self.updates > doubt.updates:  # an update came with the step
            self.history.take_back()
            self.now, self.updates, self.steps = doubt.now, doubt.updates, doubt.steps
            for row, (memory, norms) in zip(self.rows, doubt.rows, strict=True):
                row.memory, row.norms = memory, norms
        self.steps -= 1

    def show(self) -> None:
        """Bring the modules that were handed out up to date."""
        for view in list(self.views.values()):
            view()

    def copy_live(self) -> None:
        """Set every average to the live weights."""
        with torch.no_grad():
            for row in self.rows:
                for live, tensor in zip(self.live_pieces(), row.tensors, strict=True):
                    plain(tensor).copy_(live)
        self._equal_to_live = True
        self._watch()

    def reset(self, now: float | None = None) -> None:
        """Start again from the live weights at time `now` (None: where the clock stands)."""
        self.check_not_lent("reset")
        at = self.now if now is None else check_time(now)
        self._follow_live()
        self.check_shown()
        for row in self.rows:  # an interrupt from here on leaves some tensors reset, some not
            row.damage = "a reset was interrupted half-way"
        self._start_clock(at)
        self.copy_live()
        for row in self.rows:
            row.damage = ""

    # ── what others may read ─────────────────────────────────────────────────────────────────────

    def values(self, row: int) -> list[Tensor]:
        """Where the averaged values of `row` can be read right now, [slots]."""
        check_undamaged(self.rows[row])
        if self.loan is not None and self.loan.row == row:
            return self.loan.tensors
        return self.rows[row].tensors

    def gathered(self, row: int) -> list[Tensor]:
        """What its uses must gather from other ranks: the shares of a model that is whole here."""
        return [] if self._mesh is None else self.rows[row].tensors

    def check_live(self, slots: Iterable[int] | None = None) -> None:
        """Raise `MatchError` where a live tensor (of these slots) no longer fits its average."""
        for slot in range(len(self.entries)) if slots is None else slots:
            entry, average = self.entries[slot], self.rows[0].tensors[slot]
            live = entry.live()
            if live.numel() and not is_sharded(live) and live.data_ptr() == 0:
                raise MatchError(
                    f"{entry.name!r} must hold its values, got memory that was freed. Update while "
                    "the parameters are in memory."
                )
            if live.shape != average.shape:
                raise MatchError(
                    f"{entry.name!r} must keep its shape {list(average.shape)}, got "
                    f"{list(live.shape)}. Build a new average after layers are resized."
                )
            if kind(live) != kind(average):
                raise MatchError(
                    f"{entry.name!r} must stay {kind(average)}, got {live.dtype}. "
                    "Build a new average after layers are converted."
                )
            if is_sharded(live) and not is_spread_like(live, average):
                raise MatchError(
                    f"{entry.name!r} must stay spread over the ranks as it was, got "
                    f"{spread_of(live)} instead of {spread_of(average)}. Save the average's state "
                    "and load it into a new average of the model as it is now."
                )

    def live_pieces(self, slots: Iterable[int] | None = None) -> list[Tensor]:
        """What this rank averages of each live tensor (of these slots), detached."""
        found = []
        for slot in range(len(self.entries)) if slots is None else slots:
            live, part = self.entries[slot].live(), self.parts[slot]
            piece = plain(live)
            found.append(piece if part is None or is_sharded(live) else part.of(piece))
        return found

    def check_not_lent(self, action: str) -> None:
        """Raise `OrderError` while the live weights are lent, to this average or to another."""
        if self.loan is not None or _lent_memory:
            check_memory_not_lent((entry.live() for entry in self.entries), action)

    def lend(self, loan: Loan) -> None:
        """Note that `loan` has begun; `end_loan` must follow."""
        self.loan = loan
        _lent_memory.update(loan.memory)

    def end_loan(self) -> None:
        """Note that the live weights are back."""
        if self.loan is not None:
            _lent_memory.difference_update(self.loan.memory)
            self.loan = None

    def live_changed_unseen(self) -> bool:
        """Whether live weights were written since construction, reset or load, with no update."""
        if self.updates != self._watched_updates:
            return False
        if _lent_memory and _lent_memory & self.live_memory():
            return False  # averaged weights, not trained ones
        if self.steps > self._watched_steps:
            return True
        if self.live_was_written():
            return True
        # Fused optimizers write without raising the version; the values show it.
        if self._equal_to_live and not self._still_equals_live():
            self._equal_to_live, self._differs = False, True
        return self._differs

    def live_was_written(self) -> bool:
        """Whether a parameter was written in place since then, by anybody but fused optimizers."""
        versions = zip(self.entries, self._watched, strict=True)
        return any(version_of(e.live()) > seen for e, seen in versions if e.kind != "buffer")

    def note_own_write(self) -> None:
        """Take what the live weights are now for seen: an average was written into them."""
        self._watched = [version_of(entry.live()) for entry in self.entries]
        self._equal_to_live = False

    @torch.no_grad()
    def _still_equals_live(self) -> bool:
        for entry, live, average in zip(
            self.entries, self.live_pieces(), self.rows[0].tensors, strict=True
        ):
            tensor = plain(average)
            live = live.to(tensor.device, tensor.dtype)
            same = (live == tensor) | ((live != live) & (tensor != tensor))  # NaN is itself here
            if entry.kind != "buffer" and not bool(same.all()):
                return False
        return True

    def warn_once(self, key: str, message: str) -> None:
        """Say `message` as a warning at the user's line, the first time that `key` comes up."""
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, AveragingWarning, stacklevel=frames_to_the_user())

    def alone(self, index: int) -> list[bool]:
        """Of which averages nobody but us holds a view, [slots]."""
        row = self.rows[index]
        if self._cached is not None:
            ours = self._cached.holders(index)
            if ours is not None and -1 not in row.holders:
                now = map(sub, map(count_holders, row.tensors), ours)
                if list(now) == row.holders:
                    return [True] * len(row.holders)
            self.drop_plans()
        counts = zip(map(count_holders, row.tensors), row.holders, strict=True)
        return [now == before != -1 for now, before in counts]

    def drop_plans(self) -> None:
        """Let go of all views into averages, so that references to their memory can be counted."""
        if self._cached is not None:
            self._note_healed(self._cached.groups)
        self._cached = None

    def _note_healed(self, groups: Sequence[Group]) -> None:
        """What these plans have found to be healed is no suspect for the next ones."""
        for group in groups if self._suspects else ():
            self._suspects -= group.healed_slots()

    def set_clock(
        self, origin: float, now: float, updates: int, steps: int, history: History
    ) -> None:
        """Set the clock as it was saved."""
        self.jumps += 1
        self._doubts = []
        self.origin, self.now, self.updates, self.steps = origin, now, updates, steps
        self.history = history

    def after_load(self) -> None:
        """Take note of averages that were written from outside."""
        for row in self.rows:
            row.damage = ""
        self._equal_to_live = False
        self._watch()
        if self.updates:  # one write more is the model's own part of the same checkpoint
            self._watched = [version + 1 for version in self._watched]

    # ── inside ───────────────────────────────────────────────────────────────────────────────────

    def _allocate(self, live: Tensor, entry: Entry) -> Tensor:
        # Memory made under inference_mode could never be updated outside of it.
        with torch.inference_mode(False):
            dtype = kernels.storage_dtype(live.dtype, self._dtype)
            # Buffers may differ by rank: cut, they would become a patchwork of several ranks'.
            if self._mesh is not None and entry.kind != "buffer" and not is_sharded(live):
                return spread_over(plain(live), dtype, self._mesh)
            average = torch.empty_like(
                plain(live),
                dtype=dtype,
                device=self._device or live.device,
                memory_format=torch.preserve_format,
                requires_grad=False,
            )
            return spread_like(average, live)

    def _placed(self, averages: list[Tensor], live: Sequence[Tensor]) -> list[Tensor]:
        """The same averages, small ones in common rows of memory; shards stay on their own."""
        whole = [slot for slot, tensor in enumerate(averages) if not is_sharded(tensor)]
        with torch.inference_mode(False):
            placed = kernels.side_by_side(
                [averages[slot] for slot in whole], [live[slot].dtype for slot in whole]
            )
        for slot, tensor in zip(whole, placed, strict=True):
            averages[slot] = tensor
        return averages

    def live_memory(self) -> frozenset[int]:
        """Addresses of the memory that the averaged live tensors lie in."""
        return memory_of(entry.live() for entry in self.entries)

    def _watch(self) -> None:
        """Remember what the averages and the live weights look like before the next update."""
        self._watched = [version_of(entry.live()) for entry in self.entries]
        self._watched_updates, self._watched_steps = self.updates, self.steps
        self._differs = False
        self.drop_plans()
        self._suspects = {
            slot
            for row in self.rows
            for slot, tensor in enumerate(row.tensors)
            if not kernels.all_finite(plain(tensor))
        }

    def _follow_live(self) -> None:
        """Notice live tensors that were moved, cast or replaced since the last update."""
        self.inventory.follow_modules()
        plans = self._cached
        moved = [] if plans is None else plans.moved()
        if plans is not None and not moved:
            return
        slots = [slot for group in moved for slot in group.slots] or range(len(self.entries))
        self.check_live(slots)
        averages = (tensor for row in self.rows for tensor in row.tensors)
        own = memory_of(averages) if plans is None else plans.memory()
        if memory_of(self.entries[slot].live() for slot in slots) & own:
            raise MatchError(
                "live weights must have memory of their own, got some that lie in the average's: "
                "it would average itself. Write the average into a model with copy_to."
            )
        if plans is None or self._are_restless(moved) or len(moved) == len(plans.groups):
            self.drop_plans()
        if self._device is None:
            for row in self.rows:
                self._move(row, slots)
        if self._cached is not None:
            self._note_healed(moved)
            self._cached.exchange(moved, self._groups(self.rows, slots))

    def _are_restless(self, moved: Sequence[Group]) -> bool:
        """Whether some live tensors turn out to move at every update, as replaced buffers do.

        From then on they are a group by themselves, and the views of all others stay. A model that
        is cast or offloaded as a whole tells nothing.
        """
        slots = {slot for group in moved for slot in group.moved_slots()}
        again = self._moved if self._moved_at == self.updates - 1 else set()
        found = (slots & again) - self._restless
        self._moved, self._moved_at = slots, self.updates
        if len(slots) == len(self.entries):
            return False
        self._restless |= found
        return bool(found)

    def _move(self, row: Row, slots: Sequence[int]) -> None:
        """Take the averages of `row` in these slots to where the live tensors are."""
        live = {slot: self.entries[slot].live() for slot in slots}
        slots = [slot for slot in slots if row.tensors[slot].device != live[slot].device]
        if not slots:
            return
        moved = self._placed(
            [
                spread_like(plain(row.tensors[slot]).to(live[slot].device), row.tensors[slot])
                for slot in slots
            ],
            [live[slot] for slot in slots],
        )
        self.give_memory(row, dict(zip(slots, moved, strict=True)))

    def own_memory(self, row: Row) -> None:
        """Take averages that nobody looks at out of the memory that they share with others.

        Those of a module must each have their own: writers of files, and whoever looks at where a
        tensor lies, take one memory for one tensor under several names.
        """
        sharing = [slot for slot, average in enumerate(row.tensors) if shares_memory(average)]
        if not sharing:
            return
        self.drop_plans()
        with torch.inference_mode(False):
            own = {
                slot: row.tensors[slot].clone(memory_format=torch.preserve_format)
                for slot in sharing
                if count_holders(row.tensors[slot]) == row.holders[slot] != -1
            }
        self.give_memory(row, own)

    def give_memory(self, row: Row, new: Mapping[int, Tensor]) -> None:
        """Put averages elsewhere, by slot; their neighbours in a row lose a holder each."""
        self.drop_plans()
        left = Counter(local(row.tensors[slot]).untyped_storage().data_ptr() for slot in new)
        for slot, average in enumerate(row.tensors):
            if slot in new:
                row.tensors[slot] = new[slot]
            elif left:
                row.holders[slot] -= left[local(average).untyped_storage().data_ptr()]
        for slot in new:
            row.holders[slot] = count_holders(row.tensors[slot])

    def _plans(self, rows: Sequence[Row]) -> list[Group]:
        """What the kernels work on, for all slots."""
        if rows is not self.rows:
            return self._groups(rows, range(len(self.entries)))
        if self._cached is None:
            before = [list(map(count_holders, row.tensors)) for row in rows]
            groups = self._groups(rows, range(len(self.entries)))
            after = [list(map(count_holders, row.tensors)) for row in rows]
            holders = [list(map(sub, *counts)) for counts in zip(after, before, strict=True)]
            averages = {
                local(tensor).untyped_storage().data_ptr(): tensor
                for row in rows
                for tensor in row.tensors
            }
            self._cached = Plans(groups, list(averages.values()), holders)
        return self._cached.groups

    def _groups(self, rows: Sequence[Row], slots: Iterable[int]) -> list[Group]:
        """Slots by device and storage dtype, with the views that the kernels work on."""
        kinds: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
        for slot in slots:
            tensor = plain(rows[0].tensors[slot])
            kind = (tensor.device, tensor.dtype, slot in self._restless)
            kinds.setdefault(kind, []).append(slot)
        return [self._group(rows, slots) for slots in kinds.values()]

    def _group(self, rows: Sequence[Row], slots: list[int]) -> Group:
        entries = [self.entries[slot] for slot in slots]
        live = [entry.live() for entry in entries]
        suspects = {i for i, slot in enumerate(slots) if slot in self._suspects}
        plan = kernels.plan(
            [[plain(row.tensors[slot]) for slot in slots] for row in rows],
            self.live_pieces(slots),
            suspects,
            [self.parts[slot] for slot in slots],
            self.nonfinite != "ignore",
        )
        places = Places([plain(tensor) for tensor in live])
        return Group(slots, plan, entries, live, places, any(map(is_sharded, live)), suspects)

    def _rounding_keys(self, slots: Sequence[int]) -> list[int]:
        update = self.updates + 1
        return [kernels.stream_key(self.seed, self.entries[slot].name, update) for slot in slots]

    def stall_gap(self, row: int) -> float:
        """Relative gap between live and average below which rounding swallows the last update.

        unit roundoff / (1 - decay), within a factor of two by the mantissa; the largest over the
        storage dtypes. Stochastic rounding has none.
        """
        share = self.rows[row].memory.share
        dtypes = [dtype for dtype in self._dtypes if not self._never_stalls(dtype)]
        if share == 0.0 or not dtypes:
            return 0.0
        return max(unit_roundoff(dtype) for dtype in dtypes) / share

    def _never_stalls(self, dtype: torch.dtype) -> bool:
        """Stochastic rounding moves the mean by however little; float64 is rounded to nearest."""
        return self.rounding == "stochastic" and dtype not in (torch.float64, torch.complex128)

    def _check_expressible(self, elapsed: float) -> None:
        """Refuse, before the first update, a constant decay that the storage cannot express."""
        for row in self.rows:
            per_unit = constant_decay(row.schedule)
            if per_unit is None or per_unit in (0.0, 1.0):
                continue
            share = -math.expm1(elapsed * math.log(per_unit))
            for entry, tensor in zip(self.entries, row.tensors, strict=True):
                if share < unit_roundoff(tensor.dtype) and not self._never_stalls(tensor.dtype):
                    raise ArgumentError(
                        f"1 - decay must be at least {unit_roundoff(tensor.dtype):.2g}, the "
                        f"rounding of {tensor.dtype}, got {share:.2g} an update: {entry.name!r} "
                        "would never move. Store the average in a wider dtype, update less often, "
                        'or use rounding="stochastic".'
                    )

    def _warn_of_stall(self, decays: Sequence[float]) -> None:
        for index, (row, decay) in enumerate(zip(self.rows, decays, strict=True)):
            if decay == 1.0:
                continue
            for dtype in self._dtypes:
                if 1.0 - decay < unit_roundoff(dtype) and not self._never_stalls(dtype):
                    row.stalled = (
                        "the average no longer moves: 1 - decay is below the rounding of "
                        f'{dtype}; store it in a wider dtype, or use rounding="stochastic"'
                    )
                    self.warn_once(f"stall {index}", f"{row.stalled}.")


# ── checks of averages ───────────────────────────────────────────────────────────────────────


def check_memory_not_lent(tensors: Iterable[Tensor], action: str) -> None:
    """Raise `OrderError` when some average has lent its values to one of these tensors."""
    if _lent_memory & memory_of(tensors):
        raise OrderError(
            f"{action} must come outside applied() over the same weights, got it inside: the live "
            "model holds averaged weights there. Leave the block first."
        )


def check_fits(source: Tensor, dtype: torch.dtype, name: str) -> None:
    """What is finite in the average must not become infinite in a file or a model.

    Raises:
        ArgumentError: a value beyond the range of `dtype`.
    """
    if lost := kernels.beyond_range(source, dtype):
        raise ArgumentError(
            f"{name!r} must fit {dtype}, got {lost} values beyond its range (largest "
            f"{float(source.abs().max()):.4g}). Use torch.bfloat16 or torch.float32 for it."
        )


def check_undamaged(row: Row) -> None:
    """Refuse an average whose memory was overwritten while it was lent."""
    if row.damage:
        raise OrderError(
            f"the average must be whole, but {row.damage}. "
            "Call load_state_dict with a saved state, or reset() to start again."
        )


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written in place; -1 for inference tensors, which do not count."""
    return -1 if tensor.is_inference() else tensor._version
