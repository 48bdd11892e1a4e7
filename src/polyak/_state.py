"""What is saved to go on with an average, and how it is checked before anything is written."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ._engine import Engine, Memory
from ._errors import ArgumentError, AveragingWarning, MatchError, frames_to_the_user
from ._history import History
from ._identities import schedule_from_state, schedule_state
from ._kernels import write_
from ._sharding import (
    agreed,
    is_sharded,
    local,
    piece_for,
    place_in_mesh,
    place_of_this_rank,
    plain,
    spread_like,
    spread_of,
)

FORMAT = 1
LOADING = "a load was interrupted half-way"

OnSchedule = Literal["same", "replace"]
OnLive = Literal["restore", "leave"]
OnMismatch = Literal["error", "reinit"]

# Gives the elements of a saved tensor (first) that another one (second) holds on this rank.
Fetch = Callable[[Tensor, Tensor], Tensor]


def engine_state(engine: Engine, kind: str, rows: Mapping[str, int]) -> dict[str, Any]:
    """Tensors (references, like a module's state dict), clock, schedules and counters.

    Nothing but dicts, lists, strings, numbers and tensors: `torch.load(weights_only=True)` reads
    it. Inside `applied()` the tensors are copies, since the memory changes hands at the end of the
    block, and the lent live weights are in it too.
    """
    engine.settle()
    lent = engine.loan is not None
    state: dict[str, Any] = {
        "format": FORMAT,
        "kind": kind,
        "clock": {
            "origin": engine.origin,
            "now": engine.now,
            "updates": engine.updates,
            "steps": engine.steps,
            "history": engine.history.state(),
        },
        "rounding": {"mode": engine.rounding, "seed": engine.seed},
        # Each rank counts in its own part: what one has seen must not become that of all.
        "nonfinite": {} if engine.is_spread else dict(engine.held_back),
        "averages": {name: _row_state(engine, row, copies=lent) for name, row in rows.items()},
    }
    ties = {alias: entry.name for entry in engine.inventory.entries for alias in entry.aliases}
    if ties:  # for readers of files: formats that write each name on its own forget them
        state["ties"] = ties
    if engine.loan is not None:
        state["live"] = {name: tensor.clone() for name, tensor in engine.loan.live.items()}
    return state


def _row_state(engine: Engine, index: int, *, copies: bool) -> dict[str, Any]:
    row, values = engine.rows[index], engine.values(index)
    return {
        "schedule": schedule_state(row.schedule),
        "past": list(row.past),  # by the index that the history gives
        "memory": asdict(row.memory),
        "tensors": tensor_state(engine, values, copies=copies),
        "norms": dict(row.norms),
    }


def tensor_state(engine: Engine, tensors: Sequence[Tensor], *, copies: bool) -> dict[str, Tensor]:
    """Tensors by canonical name; views, so that holding them is seen by `applied()`."""
    return {
        entry.name: tensor.detach().clone() if copies else tensor.detach()
        for entry, tensor in zip(engine.entries, tensors, strict=True)
    }


def load_engine_state(
    engine: Engine,
    state: Mapping[str, Any],
    kind: str,
    names: Sequence[str],
    *,
    schedule: OnSchedule,
    live: OnLive,
    on_mismatch: OnMismatch = "error",
    fetch: Fetch = piece_for,
) -> None:
    """Go on from `state`: check all of it, then write what `fetch` gives."""
    with agreed(to_gather(engine, state), "load_state_dict"):
        engine.check_not_lent("load_state_dict")
        engine.check_shown()
        check_header(state, kind)
        state, anew, left_out = fitted(engine, state, on_mismatch)
        for name in part(state, "ties", Mapping) if "ties" in state else ():
            part(state["ties"], name, str)
        averages = part(state, "averages", Mapping)
        if set(averages) != set(names):
            raise MatchError(
                f"the state must hold the averages {sorted(names)}, got {sorted(averages)}. "
                "Build with the same names."
            )
        if schedule not in ("same", "replace"):
            raise ArgumentError(f"schedule must be 'same' or 'replace', got {schedule!r}.")
        if live not in ("restore", "leave"):
            raise ArgumentError(f"live must be 'restore' or 'leave', got {live!r}.")
        clock = _clock(state)
        incidents = _incidents(engine, state)
        _check_rounding(engine, part(state, "rounding", Mapping))
        rows = [_row(engine, part(averages, name, Mapping), fetch) for name in names]
        pasts = _pasts(
            engine, [averages[name] for name in names], history=clock[-1], same=schedule == "same"
        )
        restored = _live_targets(engine, state) if live == "restore" else []
    for row in engine.rows:
        row.damage = LOADING
    with torch.no_grad():
        for row, past, (tensors, memory, norms) in zip(engine.rows, pasts, rows, strict=True):
            for entry, target in zip(engine.entries, row.tensors, strict=True):
                plain(target).copy_(fetch(tensors[entry.name], target))
            row.memory, row.norms, row.past = memory, norms, past
        for target, value in restored:
            write_(local(target), fetch(value, target))
    engine.set_clock(*clock)
    engine.held_back = incidents
    engine.after_load()
    if anew or left_out:
        warnings.warn(
            f"load_state_dict: {len(anew)} averages did not fit the state and start from the live "
            f"weights: {anew[:3]}; {len(left_out)} that only the state has were left out: "
            f"{left_out[:3]}.",
            AveragingWarning,
            stacklevel=frames_to_the_user(),
        )


def to_gather(engine: Engine, state: Mapping[str, Any]) -> list[Tensor]:
    """Parts in a state that are cut as none of ours is: the ranks must put them together."""
    ours = {spread_of(tensor) for tensor in engine.rows[0].tensors}
    if not dist.is_available() or not dist.is_initialized():
        return []
    return [t for t in tree_leaves(state) if is_sharded(t) and spread_of(t) not in ours]


def fitted(
    engine: Engine, state: Mapping[str, Any], on_mismatch: OnMismatch
) -> tuple[Mapping[str, Any], list[str], list[str]]:
    """With "reinit": a state that fits the model, what it had to be given anew, and what it lost.

    Tensors that the state lacks or has in another shape are those of the live model (a new head);
    what only the state has is left out. With "error": the state as it is.
    """
    if on_mismatch not in ("error", "reinit"):
        raise ArgumentError(f"on_mismatch must be 'error' or 'reinit', got {on_mismatch!r}.")
    if on_mismatch == "error":
        return state, [], []
    misfits: set[str] = set()
    strangers: set[str] = set()

    def fit(saved: Mapping[str, Any]) -> dict[str, Any]:
        tensors = {}
        strangers.update(set(saved) - set(engine.slots))
        for entry, ours in zip(engine.entries, engine.rows[0].tensors, strict=True):
            theirs = saved.get(entry.name)
            if isinstance(theirs, Tensor) and theirs.shape == ours.shape:
                tensors[entry.name] = theirs
            else:
                misfits.add(entry.name)
                tensors[entry.name] = entry.live().detach().to(ours.device, ours.dtype)
        return tensors

    new = dict(state)
    new["averages"] = {}
    for name, saved in part(state, "averages", Mapping).items():
        if not isinstance(saved, Mapping):
            raise ArgumentError(f"the state's average {name!r} must be a dict, got {saved!r:.40}.")
        tensors = fit(part(saved, "tensors", Mapping))
        norms = {n: t for n, t in part(saved, "norms", Mapping).items() if n not in misfits}
        norms = {n: t for n, t in norms.items() if n in engine.inventory.index}
        new["averages"][name] = {**saved, "tensors": tensors, "norms": norms}
    if "window" in state:
        window = part(state, "window", Mapping)
        new["window"] = {**window, "ring": [fit(row) for row in part(window, "ring", list)]}
    if "live" in state:
        lent = part(state, "live", Mapping)
        new["live"] = {n: t for n, t in lent.items() if n not in misfits}
    counts = part(state, "nonfinite", Mapping)
    new["nonfinite"] = {n: c for n, c in counts.items() if n in engine.slots}
    if misfits == set(engine.slots):
        raise MatchError(
            f"the state must have something that fits the average, got none of {len(misfits)} "
            f"tensors such as {sorted(misfits)[:3]}. Load the state of this model."
        )
    return new, sorted(misfits), sorted(strangers)


def check_header(state: Mapping[str, Any], kind: str) -> None:
    """Raise unless `state` was written by a class of this kind in a format that we know."""
    if not isinstance(state, Mapping) or "format" not in state or "kind" not in state:
        found = sorted(map(str, state))[:3] if isinstance(state, Mapping) else type(state).__name__
        raise ArgumentError(
            f"state must be what state_dict() of a polyak average returned, got {found}."
        )
    if not isinstance(state["format"], int) or state["format"] != FORMAT:
        raise ArgumentError(
            f"the state must have format {FORMAT}, got {state['format']!r}. "
            "Load it with the version of polyak that saved it."
        )
    if not isinstance(state["kind"], str) or state["kind"] != kind:
        raise MatchError(
            f"the state must be of a polyak.{kind}, got one of {state['kind']!r}. "
            "Load it into the class that saved it."
        )


def part(state: Mapping[str, Any], key: str, *kinds: type) -> Any:
    """`state[key]`, or an `ArgumentError` when it is missing or of another kind."""
    value = state.get(key)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ArgumentError(
            f"the state must have {key!r} as {' or '.join(kind.__name__ for kind in kinds)}, got "
            f"{type(value).__name__}. The file is damaged; take an older one."
        )
    return value


def _clock(state: Mapping[str, Any]) -> tuple[float, float, int, int, History]:
    """Origin, now, updates, steps and history of a state."""
    clock = part(state, "clock", Mapping)
    origin, now = part(clock, "origin", int, float), part(clock, "now", int, float)
    updates, steps = part(clock, "updates", int), part(clock, "steps", int)
    history = History.from_state(part(clock, "history", list))
    if not (math.isfinite(origin) and origin <= now < math.inf and steps >= 0):
        raise ArgumentError(
            f"the state's clock must run forward, got origin {origin}, now {now}, steps {steps}. "
            "The file is damaged; take an older one."
        )
    if len(history) != updates:
        raise ArgumentError(
            f"the state's history must have its {updates} updates, got {len(history)}. "
            "The file is damaged; take an older one."
        )
    return origin, now, updates, steps, history


def _incidents(engine: Engine, state: Mapping[str, Any]) -> dict[str, int]:
    counts = part(state, "nonfinite", Mapping)
    unknown = sorted(set(counts) - set(engine.slots))
    if unknown:
        raise MatchError(
            f"the state must count incidents of tensors that the average has, got {unknown[:3]}. "
            "Build the model as it was saved."
        )
    return {name: part(counts, name, int) for name in counts}


def _check_rounding(engine: Engine, saved: Mapping[str, Any]) -> None:
    mode, seed = part(saved, "mode", str), part(saved, "seed", int)
    same = mode == engine.rounding and (mode == "nearest" or seed == engine.seed)
    if not same:
        raise MatchError(
            f"the state must be of an average with rounding={engine.rounding!r} and "
            f"seed={engine.seed}, got {mode!r} and {seed}. Build the average as it was saved."
        )


def _row(
    engine: Engine, saved: Mapping[str, Any], fetch: Fetch
) -> tuple[Mapping[str, Tensor], Memory, dict[str, Tensor]]:
    """Tensors, memory and statistics of one average."""
    tensors = part(saved, "tensors", Mapping)
    check_tensors(engine, tensors)
    numbers = part(saved, "memory", Mapping)
    memory = Memory(**{f.name: part(numbers, f.name, float, int) for f in fields(Memory)})
    if not all(math.isfinite(v) and v >= 0.0 for v in asdict(memory).values()):
        raise ArgumentError(
            f"the state's memory must be finite and not negative, got {memory}. "
            "The file is damaged; take an older one."
        )
    norms = {}
    for name, value in part(saved, "norms", Mapping).items():
        index = engine.inventory.index.get(name)
        live = None if index is None else engine.inventory.entries[index].live()
        if live is None or not isinstance(value, Tensor) or live.shape != value.shape:
            raise MatchError(
                f"the state's statistics must be of buffers of the model, got {name!r}, which is "
                "not there or has another shape. Build the model as it was saved."
            )
        norms[name] = spread_like(fetch(value, live).detach().clone(), live)
    return tensors, memory, norms


def check_tensors(engine: Engine, saved: Mapping[str, Tensor]) -> None:
    """Raise `MatchError`, naming the culprits, unless names, shapes and dtypes agree."""
    if not isinstance(saved, Mapping):
        raise ArgumentError(f"the state's tensors must be by name, got {type(saved).__name__}.")
    missing, extra = sorted(set(engine.slots) - set(saved)), sorted(set(saved) - set(engine.slots))
    if missing or extra:
        raise MatchError(
            "the state and the average must hold the same tensors, "
            f"got {len(missing)} only in the average {missing[:3]} "
            f"and {len(extra)} only in the state {extra[:3]}. Build the model as it was saved."
        )
    for name, slot in engine.slots.items():
        ours, theirs = engine.rows[0].tensors[slot], part(saved, name, Tensor)
        if ours.shape != theirs.shape:
            raise MatchError(
                f"{name!r} must have shape {list(ours.shape)}, got {list(theirs.shape)} in the "
                "state. Build the model as it was saved."
            )
        if place_in_mesh(theirs) != place_of_this_rank(theirs):
            raise MatchError(
                f"{name!r} must come from this rank's part of the state, got that of the rank at "
                f"{place_in_mesh(theirs)} of its mesh, here is {place_of_this_rank(theirs)}. Save "
                "sharded states with torch.distributed.checkpoint, or in a file for each rank."
            )
        if ours.dtype != theirs.dtype:
            raise MatchError(
                f"{name!r} must be stored as {ours.dtype}, got {theirs.dtype} in the state. "
                "Build the average with the dtype it was saved with, dtype=…"
            )


def _pasts(
    engine: Engine, saved: Sequence[Mapping[str, Any]], *, history: History, same: bool
) -> list[list[dict[str, Any]]]:
    """Schedules that each average had before the one it goes on with; refuse others if `same`."""
    past = [[_schedule(item) for item in part(row, "past", list)] for row in saved]
    last = [_schedule(part(row, "schedule", Mapping)) for row in saved]
    now = [schedule_state(row.schedule) for row in engine.rows]
    used = max((index for _, _, index in history.runs), default=0)
    if len({len(before) for before in past}) > 1 or used > len(past[0]):
        raise ArgumentError(
            "the state must name the schedule of each update, got histories that do not fit. "
            "The file is damaged; take an older one."
        )
    if now == last:
        return past
    if same:
        ours, theirs = next(pair for pair in zip(now, last, strict=True) if pair[0] != pair[1])
        raise MatchError(
            f"the state's schedule must be this average's, {ours}, got {theirs}. "
            'Build with the saved one, or pass schedule="replace" to go on with the new one.'
        )
    return [[*before, replaced] for before, replaced in zip(past, last, strict=True)]


def _schedule(saved: Any) -> dict[str, Any]:
    """A schedule in saved form, checked."""
    return schedule_state(schedule_from_state(saved, opaque=_some_function))


def _some_function(*, now: float, elapsed: float) -> float:
    """Stand-in for a function that was saved without its code."""
    raise AssertionError("only compared, never called")


def _live_targets(engine: Engine, state: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Live tensors to be written back, when the state was taken inside `applied()`."""
    lent = part(state, "live", Mapping) if "live" in state else {}
    targets = []
    for entry in engine.inventory.entries:
        if entry.name in lent:
            live, value = entry.live(), part(lent, entry.name, Tensor)
            if live.shape != value.shape:
                raise MatchError(
                    f"{entry.name!r} must have shape {list(live.shape)} in the model, got "
                    f"{list(value.shape)} in the state. Build the model as it was saved."
                )
            targets.append((live, value))
    return targets
