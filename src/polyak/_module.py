"""The averaged module: the same network beside the live one, and its weights are the average."""

import copy
import weakref
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ._engine import Engine, check_dtype, check_fits, plain
from ._errors import ArgumentError, OrderError
from ._pairing import Names, pair
from ._roles import Entry, Inventory, inner_name, take_inventory, walk
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
        before: brings the stored average up to date, where it is computed on demand.
    """
    if engine.loan is not None:
        raise OrderError(
            "module must come outside applied() of the same average, got it inside: the average's "
            "memory holds the trained weights there. Call module() before the block."
        )
    if dtype is not None:
        check_dtype(dtype)
    view = _View(engine, row, dtype, before)
    module = (
        _copy_of(model, view)
        if factory is None
        else _filled(factory, view, names=names, partial=partial)
    )
    for part in module.modules():
        part.training = False
        # Else the `train()` of a parent, which it calls on all its children, would undo this.
        part.__dict__["train"] = MethodType(_train, part)
        for parameter in part._parameters.values():
            if parameter is not None and not _is_of_its_own_kind(parameter):
                parameter.requires_grad_(False)
    engine.views[id(view)] = view.update
    # The module is what people hold: when they drop it, nothing is left to bring up to date.
    weakref.finalize(module, _forget, weakref.ref(engine), id(view)).atexit = False
    return module


def _forget(engine: "weakref.ref[Engine]", key: int) -> None:
    alive = engine()
    if alive is not None:
        alive.views.pop(key, None)


def _named_train() -> Callable[[nn.Module, bool], nn.Module]:
    # Pickle looks a bound method up by its function's name: under this one a module that was
    # pickled with it loads where polyak is not installed.
    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        """Return the module unchanged: an averaged module stays in evaluation mode."""
        return self

    return train


_train = _named_train()


class _View:
    """The tensors of an averaged module, and what each of them shows."""

    def __init__(
        self, engine: Engine, row: int, dtype: torch.dtype | None, before: Callable[[], None]
    ) -> None:
        self._engine, self._row, self._dtype, self._before = engine, row, dtype, before
        self._shown: dict[int, tuple[Entry, Tensor]] = {}  # by id of the entry
        self._places: dict[int, int] = {}  # address at which we made a tensor share memory
        self._check_range()

    @property
    def inventory(self) -> Inventory:
        """Every tensor of the live model."""
        return self._engine.inventory

    def entry(self, name: str) -> Entry:
        """The live tensor of that canonical name."""
        return self.inventory.entries[self.inventory.index[name]]

    def _check_range(self) -> None:
        averages, norms = self._engine.values(self._row), self._engine.rows[self._row].norms
        for entry in self._engine.entries:
            value = value_of(self._engine, entry, averages, norms)
            check_fits(value, self._wanted(entry.live())[0], entry.name)

    def _wanted(self, live: Tensor) -> tuple[torch.dtype, torch.device]:
        real = self._dtype is not None and live.is_floating_point()
        return (self._dtype if real and self._dtype else live.dtype), live.device

    def tensor(self, entry: Entry, *, parameter: bool) -> Tensor:
        """The one tensor of the module that stands for `entry`, made at the first call."""
        if id(entry) not in self._shown:
            self._shown[id(entry)] = entry, self._make(entry, parameter)
        return self._shown[id(entry)][1]

    def _make(self, entry: Entry, parameter: bool) -> Tensor:
        live, value = entry.live(), self._value(entry)
        if entry.role == "live" and _is_of_its_own_kind(live):
            return live  # a quantised base: only its library could make another, and it never moves
        dtype, device = self._wanted(live)
        shared = self._shares(entry) and (value.dtype, value.device) == (dtype, device)
        with torch.inference_mode(False):
            data = plain(value) if shared else plain(value).to(device, dtype, copy=True)
            made = nn.Parameter(data, requires_grad=False) if parameter else data
        if shared:
            self._places[id(entry)] = made.data_ptr()
        return made

    @staticmethod
    def _shares(entry: Entry) -> bool:
        """Whether memory may be shared; not with live buffers, which a forward pass may write."""
        return entry.role == "average" or entry.kind == "parameter"

    def _value(self, entry: Entry) -> Tensor:
        row = self._engine.rows[self._row]
        return value_of(self._engine, entry, row.tensors, row.norms)

    @torch.no_grad()
    def update(self) -> None:
        """Show the average as it is now: memory that is shared already does, the rest is copied."""
        if self._engine.loan is not None:
            return  # its memory is lent; the end of the loan calls again
        self._before()
        behind: list[tuple[Tensor, Tensor]] = []
        for key, (entry, shown) in self._shown.items():
            value = self._value(entry)
            if shown is value:
                continue
            if self._shares(entry) and self._may_share(key, shown, value):
                if shown.data_ptr() != value.data_ptr():
                    shown.data = plain(value)
                    self._places[key] = shown.data_ptr()
            elif shown.shape == value.shape:
                behind.append((shown, value))
            else:  # a live buffer that was resized
                shown.data = plain(value).to(shown.device, shown.dtype, copy=True)
        if behind:
            torch._foreach_copy_([plain(shown) for shown, _ in behind], [v for _, v in behind])

    def _may_share(self, key: int, shown: Tensor, value: Tensor) -> bool:
        """Where dtype and device agree, and where we shared before and the average has moved."""
        alike = (shown.dtype, shown.device) == (value.dtype, value.device)
        return alike or (shown.data_ptr() == self._places.get(key) and shown.dtype == value.dtype)


def _is_of_its_own_kind(tensor: Tensor) -> bool:
    return type(tensor) not in (Tensor, nn.Parameter) and not tensor.requires_grad


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
    while (inner := inner_name(model)) is not None:
        model = model.get_submodule(inner)
    memo: dict[int, Any] = {}
    for name, _, _, tensor in _places(model):
        memo[id(tensor)] = view.tensor(view.entry(name), parameter=isinstance(tensor, nn.Parameter))
    for part in model.modules():
        for value in part.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:
                # What a forward pass left behind (a weight norm its weight) belongs to a graph,
                # and cannot be copied with it.
                memo[id(value)] = value.detach().clone()
            elif _is_process_group(value):
                memo[id(value)] = value  # one for all modules of a process
    try:
        return copy.deepcopy(model, memo)
    except MemoryError:
        raise
    except Exception as error:
        raise ArgumentError(
            f"the model must be one that copy.deepcopy can copy, got {type(model).__name__} "
            f"({error}). Pass a function that builds it: module(factory=lambda: Net())."
        ) from error


def _is_process_group(value: object) -> bool:
    return torch.distributed.is_available() and isinstance(value, torch.distributed.ProcessGroup)


def _filled(
    factory: Callable[[], nn.Module], view: _View, *, names: Names | None, partial: bool
) -> nn.Module:
    """The factory's module with our tensors in the places of its own."""
    module = factory()
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"factory must return a module, got {type(module).__name__}.")
    target = take_inventory(module)
    _, pairs = pair(view.inventory, target, names=names, partial=partial)
    if any(mine.live() is there.live() for mine, there in pairs):
        raise ArgumentError(
            "factory must return a new module, got one that holds the live model's own tensors. "
            "Build it anew: module(factory=lambda: Net())."
        )
    partner = {id(there): mine for mine, there in pairs}
    for name, owner, key, tensor in list(_places(module)):
        mine = partner.get(id(target.entries[target.index[name]]))
        if mine is not None:
            owner[key] = view.tensor(mine, parameter=isinstance(tensor, nn.Parameter))
    return module
