"""The full set of tensors that an average stands for: to load, to save, to write into a module."""

import copy
import math
import numbers
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from . import _kernels as kernels
from ._checks import kind
from ._engine import Engine, check_fits, check_memory_not_lent
from ._errors import ArgumentError, AveragingWarning, MatchError, frames_to_the_user
from ._pairing import Coverage, Names, pair
from ._roles import Entry, take_inventory
from ._sharding import agreed, is_spread_like, local, piece_for, plain, reshard, spread_like, whole


@torch.no_grad()
def full_set(engine: Engine, row: int = 0, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Fresh copies under every name of the model's state dict, tied ones sharing one copy.

    Averaged tensors come from the average, all others from the live model as it is now. Dtypes are
    those of the live tensors, unless `dtype` is given for the real floating ones.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ArgumentError(f"dtype must be a floating point dtype, got {dtype}.")
    with agreed(engine.gathered(row), "weights"):
        check_all_fit(engine, row, dtype)
    copies: dict[int, Tensor] = {}
    result: dict[str, Tensor] = {}
    for (name, index), value in zip(engine.inventory.order, _values(engine, row), strict=True):
        if index not in copies:
            live = engine.inventory.entries[index].live()
            target = dtype_in(live, dtype)
            piece = piece_for(value, live, target).to(live.device, target, copy=True)
            copies[index] = spread_like(piece, live)
        result[name] = copies[index]
    for name, module in engine.inventory.extras:
        result[name] = copy.deepcopy(module.get_extra_state())
    return result


def _values(engine: Engine, row: int) -> Iterator[Tensor]:
    """Where each tensor of the full set can be read right now, in the order of its names."""
    averages, norms = engine.values(row), engine.rows[row].norms
    for _, index in engine.inventory.order:
        yield value_of(engine, engine.inventory.entries[index], averages, norms)


def dtype_in(live: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a tensor in the full set: the live one's, or `dtype` for real floating ones."""
    return dtype if dtype is not None and live.is_floating_point() else live.dtype


def check_all_fit(engine: Engine, row: int, dtype: torch.dtype | None) -> None:
    """Raise `ArgumentError` where `gathered_set` would lose a value to infinity."""
    for (name, index), value in zip(engine.inventory.order, _values(engine, row), strict=True):
        check_fits(plain(value), dtype_in(engine.inventory.entries[index].live(), dtype), name)


@torch.no_grad()
def gathered_set(
    engine: Engine, row: int, dtype: torch.dtype | None
) -> Iterator[tuple[list[str], Tensor]]:
    """`full_set` one tensor at a time, with all of its names, whole on every rank.

    All ranks over which the average is spread must take all of it, in step.
    """
    names: dict[int, list[str]] = {}
    for name, index in engine.inventory.order:
        names.setdefault(index, []).append(name)
    values = dict(zip((i for _, i in engine.inventory.order), _values(engine, row), strict=True))
    for index, tied in names.items():
        target = dtype_in(engine.inventory.entries[index].live(), dtype)
        yield tied, whole(values[index], target).detach()


def value_of(
    engine: Engine, entry: Entry, averages: Sequence[Tensor], norms: Mapping[str, Tensor]
) -> Tensor:
    """Where the value of one tensor of the full set can be read right now."""
    if entry.name in norms:
        return norms[entry.name]
    if entry.role == "average":
        return averages[engine.slots[entry.name]]
    # Inside applied() the live buffers may be those of an evaluation; ours wait in the loan.
    if engine.loan is not None and entry.name in engine.loan.live:
        return engine.loan.live[entry.name]
    return entry.live()


@torch.no_grad()
def copy_to(
    engine: Engine,
    row: int,
    module: nn.Module,
    *,
    share: float = 1.0,
    names: Names | None = None,
    partial: bool = False,
) -> Coverage:
    """Move `module` towards the average by `share`; at 1 it becomes the average's full set.

    Names, shapes and kinds are compared before anything is written.
    """
    share = _checked_share(share)
    target = take_inventory(module)
    check_memory_not_lent((entry.live() for entry in target.entries), "copy_to")
    coverage, pairs = pair(engine.inventory, target, names=names, partial=partial)
    averages, norms = engine.values(row), engine.rows[row].norms
    moves = [
        (entry, other.live(), value_of(engine, entry, averages, norms))
        for entry, other in pairs
        if entry.role == "average" or share == 1.0
    ]
    gathered = [source for _, there, source in moves if not is_spread_like(source, there)]
    with agreed(gathered, "copy_to"):
        for entry, there, source in moves:
            check_fits(plain(source), there.dtype, entry.name)
        reshard(module)
    all_seen = not engine.live_changed_unseen()
    for entry, there, source in moves:
        ours, value = local(there), piece_for(source, there)
        if entry.role == "average":
            if kernels.overlaps_itself(ours):
                kernels.write_(ours, ours.clone().lerp_(value.to(ours), share))
            else:
                kernels.lerp_(ours, value, share)
        elif there is not source:
            kernels.write_(ours, value)
    if all_seen and any(there is entry.live() for entry, there, _ in moves):
        engine.note_own_write()  # feedback is not training
    return coverage


def _checked_share(share: object) -> float:
    is_number = isinstance(share, numbers.Real) and not isinstance(share, bool)
    number = float(share) if is_number else math.nan  # type: ignore[arg-type]
    if not 0.0 < number <= 1.0:
        raise ArgumentError(f"share must be above 0 and at most 1, got {share!r}.")
    return number


@torch.no_grad()
def load_into(
    model: nn.Module, tensors: Mapping[str, Tensor], origin: str, *, may_lack: Collection[str] = ()
) -> None:
    """Write tensors into a model by canonical name, after all of them were checked.

    What the tensors `may_lack` stays as it is in the model.
    """
    target = take_inventory(model)
    check_memory_not_lent((entry.live() for entry in target.entries), "load_weights")
    order = [(name, i) for name, i in target.order if name in tensors or name not in may_lack]
    names = [name for name, _ in order]
    missing, extra = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names))
    no_longer = [name for name in extra if name in target.index]  # non-persistent by now
    extra = [name for name in extra if name not in target.index]
    if missing or extra:
        raise MatchError(
            f"{origin} and the model must hold the same tensors, got {len(missing)} only in the "
            f"model {missing[:3]} and {len(extra)} only in the file {extra[:3]}. "
            "Pass a model of the class that was saved."
        )
    for name, index in order:
        live = target.entries[index].live()
        value = tensors[name]
        if live.shape != value.shape or kind(live) != kind(value):
            raise MatchError(
                f"{name!r} must have shape {list(live.shape)} and kind {live.dtype} as in the "
                f"model, got {list(value.shape)} {value.dtype} in {origin}."
            )
    reshard(model)
    for name, index in order:
        there = target.entries[index].live()
        kernels.write_(local(there), piece_for(tensors[name], there))
    if no_longer:
        warnings.warn(
            f"load_weights: {origin} holds {no_longer[:3]}, which the model no longer saves "
            "(non-persistent buffers): left as they are in the model.",
            AveragingWarning,
            stacklevel=frames_to_the_user(),
        )
