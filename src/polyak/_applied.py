"""Lend the averaged weights to the live model, and bring the trained ones back whatever happens."""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from . import _kernels as kernels
from ._engine import Engine, Loan, check_fits, version_of
from ._errors import AveragingWarning, OrderError, frames_to_the_user
from ._roles import Entry
from ._sharding import (
    agreed,
    is_gathered,
    is_sharded,
    local,
    piece_for,
    plain,
    reshard,
    spread_like,
)


@contextmanager
def applied(engine: Engine, row: int = 0) -> Iterator[None]:
    """Inside the block the live model computes with the averaged weights.

    Values change in place, storages stay: optimizers, hooks, compiled code and CUDA graphs keep
    pointing at the same memory, and a graph built before the block is valid after it. Where dtype,
    device and memory order agree, live and average exchange values through a scratch of 1 MiB (16
    on a GPU). Elsewhere, and where somebody holds a view of the average, the live values wait in a
    copy. Buffers always do, so that a forward pass in training mode costs nothing. What is computed
    inside must be differentiated inside: later, a backward pass reads the trained weights.

    FSDP2 modules gather their shards anew at both ends. An average that is shared out over ranks
    which hold the model whole is gathered on entry, so all of them must enter.

    Raises:
        OrderError: on entry, inside another block over the same weights, in the middle of a
            forward pass, for a damaged average, or for shards without their module; on exit, when
            a parameter was changed inside the block. The trained weights are back before that is
            raised.
    """
    with agreed(engine.gathered(row), "applied"):  # or the others would wait for this rank
        engine.check_not_lent("applied")
        _check_module_known(engine)
        reshard(engine.inventory.model)
        lender = _Lender(engine, row)
    try:
        lender.give()
        yield
    except BaseException as error:
        if sys.is_finalizing():  # a block left open by a process that ends: torch is going already
            return
        try:
            lender.take_back()
        except BaseException:  # an interrupt at the very call: nothing of it may have run
            lender.take_back()
            raise
        if lender.changed:
            error.add_note(f"polyak: {lender.blame()}")
        raise
    try:
        lender.take_back()
    except BaseException:
        lender.take_back()
        raise
    if lender.changed:
        raise OrderError(lender.blame())


class Unentered:
    """Held by a block from the call of `applied()` on: says so when nobody ever enters it.

    As Python does for a coroutine that nobody awaits.
    """

    entered = False

    def __del__(self) -> None:
        if not (self.entered or sys.is_finalizing()):
            warnings.warn(
                "applied: nothing was lent, since the block was never entered. "
                "Write: with average.applied(): …",
                AveragingWarning,
                stacklevel=frames_to_the_user(),
            )


def _check_module_known(engine: Engine) -> None:
    """Shards may be gathered in some module: it must be told when they change."""
    if engine.inventory.model is None and any(is_sharded(entry.live()) for entry in engine.entries):
        raise OrderError(
            "applied() must know the module whose shards it writes, which may have gathered them, "
            "got an average of named tensors. Build it from the model: polyak.Average(model)."
        )


class _Lender:
    """One pass of a block: what is swapped, what is copied, what must be put back."""

    def __init__(self, engine: Engine, row: int) -> None:
        self._engine, self._row = engine, row
        self.changed: list[str] = []  # parameters that somebody else wrote, replaced or moved
        averages = engine.values(row)
        # A view that was handed out must go on showing the average, so its memory stays put. Asked
        # of all before we make views of our own: small averages share memory.
        alone = engine.alone(row)
        norms = engine.rows[row].norms
        self._parameters: list[_Live] = []
        self._buffers: list[_Live] = []
        swapped: list[tuple[Tensor, Tensor]] = []
        self._copies: list[tuple[_Live, Tensor | None]] = []  # live, and what it is to hold
        self._trained: dict[str, Callable[[], Tensor]] = {}  # where the trained values can be read
        for entry in engine.inventory.entries:
            if (entry.role == "live" and entry.kind != "buffer") or entry.is_gone():
                continue
            live = _Live(entry)
            slot = engine.slots.get(entry.name)
            average = None if slot is None else averages[slot]
            if entry.kind == "buffer":
                self._buffers.append(live)
                self._copies.append((live, norms.get(entry.name, average)))
                continue
            assert average is not None
            assert slot is not None
            self._parameters.append(live)
            stored = plain(average)
            whole_here = engine.parts[slot] is None or is_sharded(live.tensor)
            if alone[slot] and whole_here and kernels.can_exchange(live.data, stored):
                swapped.append((live.data, stored))
                live.swapped = True
            else:
                check_fits(stored, live.data.dtype, entry.name)
                self._copies.append((live, average))
        self._exchange = kernels.Exchange(swapped)
        self._memory = engine.live_memory()
        self._loan = self._where_to_read(averages)

    def _where_to_read(self, averages: list[Tensor]) -> Loan:
        """Tell where both sets of values can be read while the loan lasts."""
        tensors = list(averages)
        swapped = [parameter for parameter in self._parameters if parameter.swapped]
        for pair, parameter in enumerate(swapped):
            slot = self._engine.slots[parameter.entry.name]
            tensors[slot] = spread_like(parameter.data, averages[slot])
            # Nothing in it leads back to us: a cycle would keep all views until it is collected.
            self._trained[parameter.entry.name] = partial(
                _put_together, self._exchange, pair, parameter.data, parameter.tensor
            )
        return Loan(self._row, tensors, _Trained(self._trained), self._memory)

    @torch.no_grad()
    def give(self) -> None:
        """Put the averages into the live model."""
        for live, _ in self._copies:
            live.backup = live.data.clone()  # all copies are made before anything is written
            self._trained[live.entry.name] = partial(spread_like, live.backup, live.tensor)
        self._engine.lend(self._loan)
        self._exchange.do()
        for live, average in self._copies:
            if average is not None:
                kernels.write_(live.data, piece_for(average, live.tensor, live.data.dtype))

    def take_back(self) -> None:
        """Restore every bit; what interrupts that waits until it is done.

        Each step may run twice, so after an interrupt (Ctrl-C, a signal handler that exits) we
        begin again. An error in a copy gets one more try; after that the loan stays open, and what
        would average or train the wrong weights is refused.
        """
        first: BaseException | None = None
        errors = 0
        while True:
            try:
                self._restore()
                break
            except BaseException as error:
                first = first or error
                errors += isinstance(error, Exception)
                if errors > 1:
                    raise
        try:
            if first is not None:
                raise first
        finally:
            del first  # or the error would hold this frame, and the frame the error

    @torch.no_grad()
    def _restore(self) -> None:
        for live in (*self._parameters, *self._buffers):
            live.point_back()
        self._exchange.undo()
        for live, _ in self._copies:
            if live.backup is not None:
                kernels.write_(live.data, live.backup)
        reshard(self._engine.inventory.model, after_error=True)
        self._engine.end_loan()
        self._look_for_changes()  # when all is back: nothing that fails here costs a value
        # A traceback that somebody keeps holds these, and with them views of the averages.
        self._exchange.forget()
        self._parameters, self._buffers, self._copies, self._trained = [], [], [], {}
        self._loan = Loan(self._row, [], {}, self._memory)

    def _look_for_changes(self) -> None:
        """Note parameters that somebody wrote: by their versions, or by their bits."""
        swapped = [p for p in self._parameters if p.swapped]
        written = {id(p) for p in self._parameters if version_of(p.tensor) != p.version}
        written |= {id(swapped[pair]) for pair in self._exchange.written}
        for parameter in self._parameters:
            name = parameter.entry.name
            if (id(parameter) in written or parameter.moved) and name not in self.changed:
                self.changed.append(name)
            if id(parameter) in written and parameter.swapped:
                self._engine.rows[
                    self._row
                ].damage = f"{name!r} was changed inside applied(), in shared memory"

    def blame(self) -> str:
        """What happened inside the block, and what it means now."""
        damaged = bool(self._engine.rows[self._row].damage)
        return (
            f"parameters must not change inside applied(), got {len(self.changed)} changed: "
            f"{self.changed[:3]}. The trained weights are back as they were; "
            + (
                "the average is lost: call load_state_dict with a saved state, or reset()."
                if damaged
                else "the average is whole."
            )
            + " Train outside the block."
        )


class _Live:
    """A live tensor at the start of a block, and how to make it that again."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.tensor = entry.live()
        # `.data` has a version counter of its own: what we write does not count as a change, so
        # graphs built before the block stay valid, and what others write can be told apart.
        self.data = local(self.tensor).data
        self.version = version_of(self.tensor)
        self.backup: Tensor | None = None
        self.swapped = False  # it holds the average's values in exchange for its own
        self.moved = False

    def point_back(self) -> None:
        """Undo a replaced object, and a cast or move in place."""
        shown = self.entry.owner.get(self.entry.key)
        if shown is not self.tensor and not is_gathered(self.entry.record, shown):
            self.entry.owner[self.entry.key] = self.tensor
            self.moved = True
        if not _same_memory(local(self.tensor), self.data):
            local(self.tensor).data = self.data
            if self.entry.record is not None:  # FSDP2 keeps the padded memory around it, too
                self.entry.record.reset_sharded_param()
            self.moved = True


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype


@torch.no_grad()
def _put_together(exchange: kernels.Exchange, pair: int, data: Tensor, shown: Tensor) -> Tensor:
    """A copy of the trained values of a parameter that was exchanged: they wait in parts."""
    values = torch.empty_like(data)
    parts = exchange.waiting(pair)
    rooms = values.as_strided((values.numel(),), (1,)).split([part.numel() for part in parts])
    for room, part in zip(rooms, parts, strict=True):
        room.copy_(part)
    return spread_like(values, shown)


class _Trained(Mapping[str, Tensor]):
    """Trained values by name, read where they wait for the end of a loan; not to be kept.

    Args:
        readers: of each, what returns it: a copy, or the memory in which it waits.
    """

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)
