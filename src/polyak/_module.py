"""The averaged module: the same network beside the live one, and its weights are the average."""

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_dtype
from ._engine import Engine, check_fits, check_undamaged
from ._errors import ArgumentError, OrderError
from ._pairing import Names, pair
from ._roles import Entry, Inventory, bare, may_hold_anything, take_inventory, walk
from ._sharding import is_sharded, plain
from ._weights import value_of


def averaged_module(
    engine: Engine,
    row: int,
    model: nn.Module | None,
    *,
    factory: Callable[[], nn.Module] | None = None,
    names: Names | None = None,
    partial: bool = False,
    dtype: torch.dtype | None = None,
    share_buffers: bool = False,
    before: Callable[[], None],
) -> nn.Module:
    """Return a module in evaluation mode that shows the average, now and after every update.

    Args:
        engine: the averages.
        row: which of them.
        model: what it was built over; copied unless there is a factory.
        factory: returns a module with the same names.
        names: how the names of the factory's module differ, see `pair`.
        partial: whether it may have more or less than the average.
        dtype: of the real floating tensors, instead of the live one.
        share_buffers: whether averaged buffers share the average's memory too. Then a layer that
            writes one in evaluation mode writes into the average.
        before: brings the stored average up to date, where it is computed on demand.
    """
    if engine.loan is not None:
        raise OrderError(
            "module must come outside applied() of the same average, got it inside: the average's "
            "memory holds the trained weights there. Call module() before the block."
        )
    if any(is_sharded(tensor) for tensor in engine.rows[row].tensors):
        raise ArgumentError(
            "a second module must be that of an average which this rank holds whole, got one that "
            "is spread over ranks. Lend the average with polyak.Average(model) and applied(), or "
            "build a second module as the first was built (fully_shard and all) and call "
            "copy_to(second) after each update."
        )
    if dtype is not None:
        check_dtype(dtype)
    if factory is None and (names is not None or partial):
        raise ArgumentError(
            "names and partial must come with a factory: a copy of the model has its names."
        )
    engine.own_memory(engine.rows[row])
    view = _View(engine, row, dtype, share_buffers, before)
    with torch.inference_mode(False):  # what is made here must serve outside too
        module = (
            _copy_of(model, view)
            if factory is None
            else _filled(factory, view, names=names, partial=partial)
        )
    for part in module.modules():
        part.training = False
        part.__dict__["train"] = _StayInEval(part, "train")
        for parameter in part._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(False)
    module.__dict__["load_state_dict"] = _LoadIntoAverage(module, view)
    view.update()
    engine.views[id(view)] = view.update
    # The module is what people hold: when they drop it, nothing is left to bring up to date.
    weakref.finalize(module, _forget, weakref.ref(engine), id(view)).atexit = False
    return module


def _forget(engine: "weakref.ref[Engine]", key: int) -> None:
    alive = engine()
    if alive is not None:
        alive.views.pop(key, None)


class Instead:
    """In the place of a method of one module.

    A copy or a pickle of the module is an ordinary module again. The module is held weakly: in a
    cycle with itself its memory would wait for the garbage collector.
    """

    def __init__(self, part: nn.Module, name: str) -> None:
        self._part, self._name = weakref.ref(part), name

    def usual(self, *args: Any, **named: Any) -> Any:
        """What the class of the module would do."""
        part = self._part()
        return getattr(type(part), self._name)(part, *args, **named)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Instead":
        copied = memo.get(id(self._part()))
        return self if copied is None else _AsUsual(copied, self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._part(), self._name)


class _AsUsual(Instead):
    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.usual(*args, **named)


class _StayInEval(Instead):
    """Else the `train()` of a parent, which it calls on all its children, would wake the module."""

    def __call__(self, mode: bool = True) -> nn.Module | None:
        return self._part()


class _LoadIntoAverage(Instead):
    """What is loaded into the module is loaded into the average, where it is a copy too."""

    def __init__(self, part: nn.Module, view: "_View") -> None:
        super().__init__(part, "load_state_dict")
        self._view = weakref.ref(view)  # as long as the engine lives, which the module outlives

    def __call__(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        view = self._view()
        if view is None:
            return self.usual(state_dict, strict=strict, assign=assign)
        if assign:
            raise ArgumentError(
                "assign must be False for a module that shows an average, got True: it would hold "
                "other tensors. Load without it, or into a copy.deepcopy of the module."
            )
        view.before_load()
        found = self.usual(state_dict, strict=strict)
        view.after_load()
        return found


# ── which tensor shows what ──────────────────────────────────────────────────────────────────────


class _View:
    """The tensors of an averaged module, and what each of them shows."""

    def __init__(
        self,
        engine: Engine,
        row: int,
        dtype: torch.dtype | None,
        share_buffers: bool,
        before: Callable[[], None],
    ) -> None:
        self._engine, self._row, self._dtype, self._before = engine, row, dtype, before
        self._share_buffers = share_buffers
        self._made: dict[tuple[int, bool], Tensor] = {}  # by id of the entry, and as what
        # Where each stands in the module: `to`, `half` and the like put new buffers there.
        self._places: list[tuple[Entry, dict[str, Any], str]] = []
        self._shared_at: dict[int, int] = {}  # the address at which we made it share memory
        check_undamaged(engine.rows[row])
        for entry in self.inventory.entries:
            if not (entry.is_gone() or may_hold_anything(entry.live())):
                check_fits(self._value(entry), self._wanted(entry.live())[0], entry.name)

    @property
    def inventory(self) -> Inventory:
        """Every tensor of the live model."""
        return self._engine.inventory

    def tensor(self, entry: Entry, *, parameter: bool) -> Tensor:
        """The tensor of the module that stands for `entry`, made at the first call."""
        key = id(entry), parameter  # a buffer over a parameter's memory is both
        if key not in self._made:
            self._made[key] = self._make(entry, parameter)
        return self._made[key]

    def place(self, entry: Entry, owner: dict[str, Any], key: str) -> None:
        """Note where in the module that tensor stands."""
        self._places.append((entry, owner, key))

    def _make(self, entry: Entry, parameter: bool) -> Tensor:
        live, value = entry.live(), self._value(entry)
        if entry.role == "live" and may_hold_anything(live):
            # A quantised base, say: its memory cannot be told from outside, but it is frozen.
            data = live.detach()
            if type(data) is not type(live):
                return live
            return nn.Parameter(data, requires_grad=False) if parameter else data
        dtype, device = self._wanted(live)
        shared = self._shares(entry) and (value.dtype, value.device) == (dtype, device)
        data = plain(value) if shared else value.detach().to(device, dtype, copy=True)
        if shared:
            self._shared_at[id(entry)] = data.data_ptr()
        return nn.Parameter(data, requires_grad=False) if parameter else data

    def _wanted(self, live: Tensor) -> tuple[torch.dtype, torch.device]:
        """Dtype and device of a tensor of the module."""
        if self._dtype is not None and live.is_floating_point():
            return self._dtype, live.device
        return live.dtype, live.device

    def _shares(self, entry: Entry) -> bool:
        """Whether its memory may be shared.

        Not with buffers, which a forward pass may write, nor with what trains in the live model.
        """
        live = entry.live()
        if live.layout != torch.strided or (entry.role == "live" and live.requires_grad):
            return False
        return entry.kind != "buffer" or (entry.role == "average" and self._share_buffers)

    def _value(self, entry: Entry) -> Tensor:
        row = self._engine.rows[self._row]
        return value_of(self._engine, entry, row.tensors, row.norms)

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self) -> None:
        """Show the average as it is now: memory that is shared already does, the rest is copied."""
        if self._engine.loan is not None:
            return  # its memory is lent; the end of the loan calls again
        self._before()
        copies: list[tuple[Tensor, Tensor]] = []
        for entry, owner, key in self._places:
            shown = owner.get(key)
            if shown is None or entry.is_gone():
                continue  # a cache that was dropped, here or there
            value = self._value(entry)
            if may_hold_anything(value):
                continue
            if self._shares(entry) and self._may_share(entry, shown, value):
                if shown.data_ptr() != value.data_ptr():
                    shown.data = plain(value)
                    self._shared_at[id(entry)] = shown.data_ptr()
            elif shown.shape != value.shape:  # a buffer that was resized
                owner[key] = value.detach().to(shown.device, shown.dtype, copy=True)
            elif value.layout != torch.strided:
                shown.copy_(value)
            else:
                copies.append((plain(shown), plain(value)))
        if copies:
            torch._foreach_copy_([shown for shown, _ in copies], [value for _, value in copies])

    def before_load(self) -> None:
        """Share again what was cast and cast back, so that a load reaches the average."""
        self._engine.check_not_lent("load_state_dict")
        self.update()

    @torch.no_grad()
    def after_load(self) -> None:
        """Take over into the average what was loaded into copies of it."""
        row = self._engine.rows[self._row]
        for entry, owner, key in self._places:
            shown = owner.get(key)
            if shown is None or entry.role != "average":
                continue
            tensor = row.tensors[self._engine.slots[entry.name]]
            if shown.data_ptr() != tensor.data_ptr():
                tensor.copy_(plain(shown))
        row.norms = {}
        self._engine.after_load()
        self._engine.show()

    def _may_share(self, entry: Entry, shown: Tensor, value: Tensor) -> bool:
        """Where dtype and device agree, and where we shared before and the average has moved."""
        if shown.dtype != value.dtype:
            return False
        return shown.device == value.device or shown.data_ptr() == self._shared_at.get(id(entry))


# ── a module to show them in ─────────────────────────────────────────────────────────────────────


def _places(module: nn.Module) -> Iterator[tuple[str, dict[str, Any], str, Tensor]]:
    """Canonical name, owner, key and tensor of every parameter and buffer, ties several times."""
    for prefix, part in walk(module):
        for owner in (part._parameters, part._buffers):
            for key, tensor in owner.items():
                if tensor is not None:
                    yield prefix + key, owner, key, tensor


def _copy_of(model: nn.Module | None, view: _View) -> nn.Module:
    """A deep copy of the bare model in which no tensor was copied."""
    if model is None:
        raise ArgumentError(
            "module must be given a factory when the average is one of named tensors. "
            "Pass a function that builds the module: module(factory=lambda: Net())."
        )
    model = bare(model)
    memo: dict[int, Any] = {}
    for name, _, _, tensor in _places(model):
        index = view.inventory.index.get(name)
        if index is not None:  # None: a non-persistent buffer that came later, copied like the rest
            entry = view.inventory.entries[index]
            memo[id(tensor)] = view.tensor(entry, parameter=isinstance(tensor, nn.Parameter))
    for part in model.modules():
        for value in part.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:
                # What a forward pass left behind (a weight norm its weight) belongs to a graph,
                # and cannot be copied with it.
                memo[id(value)] = value.detach().clone()
            elif _is_process_group(value):
                memo[id(value)] = value  # one for all modules of a process
    try:
        copied = copy.deepcopy(model, memo)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ArgumentError(
            f"the model must be one that copy.deepcopy can copy, got {type(model).__name__} "
            f"({error}). Pass a function that builds it: module(factory=lambda: Net())."
        ) from error
    _check_new(copied, model, "the model must be one that copy.deepcopy can copy")
    for name, owner, key, tensor in _places(copied):
        index = view.inventory.index.get(name)
        if index is not None:
            entry = view.inventory.entries[index]
            if tensor is not view.tensor(entry, parameter=isinstance(tensor, nn.Parameter)):
                raise ArgumentError(
                    f"the model must be one that copy.deepcopy can copy, got {name!r} in a layer "
                    "that is built anew by a __deepcopy__ of its own. Pass a function that builds "
                    "the model: module(factory=lambda: Net())."
                )
            view.place(entry, owner, key)
    return copied


def _is_process_group(value: object) -> bool:
    return torch.distributed.is_available() and isinstance(value, torch.distributed.ProcessGroup)


def _filled(
    factory: Callable[[], nn.Module], view: _View, *, names: Names | None, partial: bool
) -> nn.Module:
    """The factory's module with our tensors in the places of its own."""
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ArgumentError(
            f"factory must be a function that returns a module, got {type(factory).__name__}. Pass "
            "module(factory=lambda: Net()); to write into a module you have, use copy_to."
        )
    module = factory()
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"factory must return a module, got {type(module).__name__}.")
    target = take_inventory(module, may_be_meta=True)  # ours take the places of all its tensors
    _, pairs = pair(view.inventory, target, names=names, partial=partial)
    if view.inventory.model is not None:
        _check_new(module, view.inventory.model, "factory must return a new module")
    if any(mine.live() is there.live() for mine, there in pairs):
        raise ArgumentError(
            "factory must return a new module, got one that holds the live tensors themselves. "
            "Build it anew: module(factory=lambda: Net())."
        )
    partner = {id(there): mine for mine, there in pairs}
    for name, owner, key, tensor in list(_places(module)):
        mine = partner.get(id(target.entries[target.index[name]]))
        if mine is not None:
            owner[key] = view.tensor(mine, parameter=isinstance(tensor, nn.Parameter))
            view.place(mine, owner, key)
        elif tensor.device.type == "meta":
            raise ArgumentError(
                f"factory must return a module with data, got {name!r} on the meta device and "
                "nothing in the average for it. Build it on a real device."
            )
    _copy_extra_state(view.inventory, target)
    return module


def _check_new(module: nn.Module, model: nn.Module, rule: str) -> None:
    """Refuse a module with parts of the live one: they would be frozen with it."""
    parts = {id(part) for part in model.modules()}
    tensors = {id(tensor) for _, _, _, tensor in _places(model) if not may_hold_anything(tensor)}
    shared = [name for name, part in module.named_modules() if id(part) in parts]
    shared += [name for name, _, _, tensor in _places(module) if id(tensor) in tensors]
    if shared:
        raise ArgumentError(
            f"{rule}, got one that holds the live model's own {shared[0] or 'self'!r}. "
            "Pass a function that builds it anew: module(factory=lambda: Net())."
        )


def _copy_extra_state(ours: Inventory, theirs: Inventory) -> None:
    """What modules keep beside tensors, as it is now."""
    live = dict(ours.extras)
    for name, module in theirs.extras:
        if name in live:
            module.set_extra_state(copy.deepcopy(live[name].get_extra_state()))
