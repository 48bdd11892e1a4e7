"""An `nn.Module` with an average inside: its files, its moves, and the model it follows."""

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .._average import Average
from .._checks import kind
from .._engine import check_undamaged
from .._errors import ArgumentError, MatchError, OrderError
from .._history import History
from .._identities import schedule_state
from .._module import Instead, averaged_module
from .._roles import bare, take_inventory
from .._schedules import Schedule
from .._state import LOADING
from ._memory import memory_after
from ._prefix import bare_names


class AverageModule(nn.Module):
    """What wrappers that hold an averaged model as a child have in common.

    The child shows the average. Where the two differ in dtype it is a rounded copy, so files are
    written from the average itself, and read into it. How many updates there were stands in a
    buffer that people read, load and set, and on the average's own clock: what both were when this
    class last wrote them tells which of them somebody has moved since.
    """

    _child: ClassVar[str]  # the attribute, and so the prefix in files
    _counter: ClassVar[str]  # the buffer that counts

    def __init__(self) -> None:
        super().__init__()
        self._average: Average | None = None
        self._seen: tuple[int, tuple[int, float]] = (0, (0, 0))  # the counter and the clock

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse another child: what it holds would not be in the average."""
        if name == self._child and value is not getattr(self, name, self):
            raise OrderError(
                f"{name} must stay the module that shows the average, got another "
                f"{type(value).__name__}. Load into it: {name}.load_state_dict(other.state_dict())."
            )
        super().__setattr__(name, value)

    @property
    def average(self) -> Average:
        """The `polyak.Average` behind it, for `applied`, `report`, `weights` and `polyak.save`."""
        self._check_made()
        assert self._average is not None
        return self._average

    def _check_made(self) -> None:
        if self._average is None:
            raise OrderError("the average must be made before it is used. Call update first.")

    def _build(self, model: nn.Module) -> Average:
        """An average over `model` by the rule of this class."""
        raise NotImplementedError

    def _restore_clock(self) -> None:
        """Set the average's clock to what the counter says."""
        raise NotImplementedError

    def _accept_average(self, *, counted: bool) -> None:
        """Go on from an average that was updated, loaded or reset by itself, or refuse to.

        Args:
            counted: whether the counter was set as well.
        """
        raise NotImplementedError

    # ── the counter and the clock ────────────────────────────────────────────────────────────────

    def _count(self) -> int:
        """What the counter says."""
        counter: Tensor = getattr(self, self._counter)
        return _checked_count(self._counter, counter)

    def _reconcile(self) -> None:
        """Bring counter and clock together where one of them was moved from outside."""
        count, clock = self._seen
        counted = self._count() != count
        if (self.average.updates, self.average.now) != clock:
            self._accept_average(counted=counted)
        elif counted:
            self._restore_clock()
        self._note()

    def _note(self) -> None:
        """Remember counter and clock as they are now, which is as they belong together."""
        self._seen = self._count(), (self.average.updates, self.average.now)

    # ── the averaged module ──────────────────────────────────────────────────────────────────────

    def _show(self, average: Average) -> nn.Module:
        """A copy of the live model that shows `average`, with a `train` that works."""
        shown = averaged_module(
            average._engine,
            average._row,
            average._engine.inventory.model,
            share_buffers=True,  # what is loaded into the child itself is in the average then
            before=average._refresh,
        )
        _unpin(shown)
        return shown

    def _adopt_child(self, child: nn.Module) -> None:
        """Make `child` the module that shows the average."""
        super().__setattr__(self._child, child)
        self._watch_loads()

    def _watch_loads(self) -> None:
        """Hear of it when somebody loads into the child itself."""
        child = getattr(self, self._child)
        child.__dict__["load_state_dict"] = _LoadIntoOwner(child, self)

    @torch.no_grad()
    def _take_over(self) -> None:
        """Make what was loaded into the child that of the average.

        Where the child is a rounded copy, elements to which the average rounds keep all digits.
        """
        engine, child = self.average._engine, getattr(self, self._child)
        loaded, shown = child.state_dict(), take_inventory(child)
        for entry, tensor in zip(engine.entries, engine.rows[0].tensors, strict=True):
            value = shown.entries[shown.index[entry.name]].live().to(tensor.device)
            if value.data_ptr() != tensor.data_ptr():
                same = tensor.to(value.dtype) == value
                loaded[entry.name] = torch.where(same, tensor, value.to(tensor.dtype))
        self._write(loaded, "")

    def _fill(self, average: Average, child: nn.Module) -> None:
        """Let `child` show `average` from now on, in its own dtype and where it is."""
        tensors = [t for t in (*child.parameters(), *child.buffers()) if t.is_floating_point()]
        dtypes, devices = {t.dtype for t in tensors}, {t.device for t in tensors}
        modes = [part.training for part in child.modules()]
        averaged_module(
            average._engine,
            average._row,
            average._engine.inventory.model,
            factory=lambda: child,
            dtype=dtypes.pop() if len(dtypes) == 1 else None,
            share_buffers=True,
            before=average._refresh,
        )
        _unpin(child)
        if getattr(self, self._child, None) is child:
            self._watch_loads()
        for part, training in zip(child.modules(), modes, strict=True):
            part.training = training
        if len(devices) == 1:
            child.to(devices.pop())

    def _follow(self, model: nn.Module) -> None:
        """Go on with the weights of `model`, which may be another object than before."""
        before = self.average._engine.inventory.model
        assert before is not None  # it was built over a module
        if model is not before and bare(model) is not bare(before):
            average = self._build(model)
            state, tensors = self.average.state_dict(), average.tensors
            saved = state["averages"]["average"]  # of a model that may have had another dtype
            saved["tensors"] = {
                name: tensor.to(tensors[name]) if name in tensors else tensor
                for name, tensor in saved["tensors"].items()
            }
            average.load_state_dict(state)
            self._fill(average, getattr(self, self._child))
            self._average = average
            self._stay_with_child()

    def _use(self, schedule: Schedule) -> None:
        """Go on by `schedule`, and note it where it is a new one."""
        row = self.average._engine.rows[0]
        if schedule != row.schedule:
            row.past.append(schedule_state(row.schedule))
            row.schedule = schedule

    def _go_on_after(self, updates: int, every: int = 1) -> None:
        """Set clock, history and memory as `updates` have left them: at 1, 1 + every, ..."""
        engine = self.average._engine
        row, runs = engine.rows[0], [[1, 1, 0], [every, updates - 1, 0]]
        if every == 1 or updates < 2:
            runs = [[1, updates, 0]] if updates else []
        memory = memory_after(row.schedule, updates, every=every)
        now = 1 + every * (updates - 1) if updates else 0
        engine.set_clock(0, now, updates, 0, History.from_state(runs))
        row.memory, row.past = memory, []

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Come out of a copy or a pickle."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._average is not None:
            self._watch_loads()

    # ── moves ────────────────────────────────────────────────────────────────────────────────────

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._average is not None:
            self._stay_with_child()
        return self

    def _stay_with_child(self) -> None:
        """Let the average live where the averaged module lives now."""
        engine = self.average._engine
        row, shown = engine.rows[0], take_inventory(getattr(self, self._child))
        moved = {}
        for slot, entry in enumerate(engine.entries):
            device = shown.entries[shown.index[entry.name]].live().device
            if row.tensors[slot].device != device:
                moved[slot] = row.tensors[slot].to(device)
        engine.give_memory(row, moved)
        pairs = list(zip(engine.entries, row.tensors, strict=True))
        if any(entry.live().device != tensor.device for entry, tensor in pairs):
            engine._device = pairs[0][1].device  # else it would go after the live weights
        engine.show()

    # ── files ────────────────────────────────────────────────────────────────────────────────────

    def state_dict(  # type: ignore[override]  # torch has overloads for positional arguments
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Return the keys of the original, with the average in the dtype it is kept in.

        Raises:
            OrderError: the average was moved by itself, in a way that the counter cannot tell.
        """
        if self._average is not None:
            self._reconcile()
        return self._state(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _state(
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        state: dict[str, Any] = super().state_dict(
            destination=destination, prefix=prefix, keep_vars=keep_vars
        )
        if self._average is not None:
            inventory, tensors = self._average._engine.inventory, self._average.tensors
            for name, index in inventory.index.items():
                key, entry = f"{prefix}{self._child}.{name}", inventory.entries[index]
                if key in state and entry.role == "average":
                    state[key] = tensors[entry.name]
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Go on from a state of the original or of this class; all is checked before a write.

        Raises:
            MatchError: other names (when `strict`), shapes or kinds.
            ArgumentError: `assign=True`, which would tear the model from its average.
            OrderError: inside `applied()`.
        """
        self._check_loadable(state_dict, "", assign)
        mine, theirs = self._state(), self._adapted(state_dict, "")
        missing, extra = sorted(set(mine) - set(theirs)), sorted(set(theirs) - set(mine))
        if strict and (missing or extra):
            raise MatchError(
                f"the state must hold the tensors of this {type(self).__name__}, got "
                f"{len(missing)} missing {missing[:3]} and {len(extra)} unknown {extra[:3]}. "
                "Build it as it was saved, or pass strict=False."
            )
        return super().load_state_dict(state_dict, strict=strict)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        *args: Any,
    ) -> None:
        # torch calls this before it loads the children, which then write the same values again.
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        self._check_loadable(state_dict, prefix, assign)
        adapted = self._adapted(state_dict, prefix)
        state_dict.clear()
        state_dict.update(adapted)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if self._average is not None:
            self._restore_clock()
            self._note()
            self._write(state_dict, f"{prefix}{self._child}.")

    def _check_may_load(self, assign: bool) -> None:
        if assign:
            raise ArgumentError(
                "assign must be False, got True: other parameter objects would no longer be those "
                "that are averaged. Load without it."
            )
        if self._average is not None:
            self._average._engine.check_not_lent("load_state_dict")

    def _check_loadable(self, state: Mapping[str, Any], prefix: str, assign: bool) -> None:
        self._check_may_load(assign)
        theirs = self._adapted(state, prefix)
        counted = theirs.get(f"{prefix}{self._counter}")
        if isinstance(counted, Tensor) and counted.numel() == 1:
            _checked_count(f"{prefix}{self._counter}", counted)
        for key, mine in self._state(prefix=prefix).items():
            value = theirs.get(key)
            if not (isinstance(mine, Tensor) and isinstance(value, Tensor)):
                continue
            counter = "." not in key[len(prefix) :]  # old files have a float for started or not
            if mine.shape != value.shape or not (counter or kind(mine) == kind(value)):
                raise MatchError(
                    f"{key!r} must have shape {list(mine.shape)} and kind {mine.dtype}, got "
                    f"{list(value.shape)} {value.dtype} in the state. Build the model as it was "
                    "saved."
                )

    def _adapted(self, state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """The state under our names: a copy of a wrapped model is saved with the wrapper's.

        Counters may be one element in a list, as old versions have them.
        """
        start = f"{prefix}{self._child}."
        known = self.average._engine.inventory.index if self._average is not None else {}
        bare_ = bare_names((key[len(start) :] for key in state if key.startswith(start)), known)
        renamed = {start + name: start + short for name, short in bare_.items()}
        adapted = {renamed.get(key, key): value for key, value in state.items()}
        for name in self._buffers:
            value = adapted.get(f"{prefix}{name}")
            if isinstance(value, Tensor) and value.shape == (1,):
                adapted[f"{prefix}{name}"] = value.reshape(())
        return adapted

    @torch.no_grad()
    def _write(self, state: Mapping[str, Any], start: str) -> None:
        """Make what `state` has under names that begin with `start` those of the average.

        Buffers that are not averaged (running statistics recomputed by `update_bn`) are kept as
        statistics are: until the next update.
        """
        engine = self.average._engine
        row, norms = engine.rows[0], {}
        row.damage = LOADING
        for name, index in engine.inventory.index.items():
            entry, value = engine.inventory.entries[index], state.get(start + name)
            if not isinstance(value, Tensor):
                continue
            if entry.role == "average":
                row.tensors[engine.slots[entry.name]].copy_(value)
            elif entry.kind == "buffer" and value.is_floating_point():
                norms[entry.name] = value.to(entry.live(), copy=True)
        row.norms = norms
        engine.after_load()
        engine.show()


class _LoadIntoOwner(Instead):
    """What is loaded into a child is loaded into the average, statistics and all digits included.

    A copy of the child alone is an ordinary module; one of the whole watches its own child.
    """

    def __init__(self, child: nn.Module, owner: AverageModule) -> None:
        super().__init__(child, "load_state_dict")
        self._owner = weakref.ref(owner)

    def __call__(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        owner = self._owner()
        if owner is None:
            return self.usual(state_dict, strict=strict, assign=assign)
        owner._check_may_load(assign)
        check_undamaged(owner.average._engine.rows[0])
        found = self.usual(state_dict, strict=strict)
        owner._take_over()
        return found


def _checked_count(name: str, counter: Tensor) -> int:
    """The number in a counter; `ArgumentError` where it counts nothing."""
    count: float = counter.item()
    if not 0 <= count < math.inf:
        raise ArgumentError(f"{name} must be a count, at least 0, got {count!r}.")
    return int(count)


def _unpin(module: nn.Module) -> None:
    """Take back that `Average.module` holds its modules in evaluation mode: `train` works."""
    for part in module.modules():
        part.__dict__.pop("train", None)
