"""Is the average working, and what does it remember?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._engine import Engine
from ._errors import show_time
from ._schedules import After, CountRamp
from ._sharding import plain


@dataclass(frozen=True)
class TensorReport:
    """One tensor of the model and what becomes of it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    why: str
    stored: str  # storage dtype of the average, "" for live tensors
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What an average holds, remembers and suffered; `print` it.

    Attributes:
        rule: the schedule, or the window.
        updates: updates so far.
        now: time of the last update.
        initial_weight: share that the weights at construction still have, in [0, 1].
        mean_age: how old the averaged weights are on average, in units of time.
        noise_window: the number of equally weighted weight vectors that average as much noise away.
        distance: norm of (average - live) over the norm of live; None where that is no number.
        stall_gap: relative gap between live and average below which rounding to storage swallows
            an update like the last one (unit roundoff over 1 - decay, within a factor of two); 0
            with stochastic rounding.
        stored_bytes: memory that the average holds.
        tensors: every tensor with its role and the reason.
        nonfinite: live elements that were NaN or inf at some update, counted by name.
        notes: what deserves attention, in sentences.
    """

    rule: str
    updates: int
    now: float
    initial_weight: float
    mean_age: float
    noise_window: float
    distance: float | None
    stall_gap: float
    stored_bytes: int
    tensors: tuple[TensorReport, ...]
    nonfinite: dict[str, int]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """The report as a page of text."""
        averaged = [tensor for tensor in self.tensors if tensor.role == "average"]
        lines = [
            self.rule,
            f"  updates        {self.updates:,} (now = {show_time(self.now)})",
            f"  remembers      mean age {self.mean_age:,.4g}, as calm as the mean of "
            f"{self.noise_window:,.4g} weight vectors",
            f"  initial weight {self.initial_weight:.3g}",
            "  distance       "
            + ("unknown" if self.distance is None else f"{self.distance:.3g} of the live weights"),
            f"  stalls         at a relative gap of {self.stall_gap:.2g} between live and average",
            f"  holds          {len(averaged)} tensors, {self.stored_bytes:,} bytes",
        ]
        reasons: dict[tuple[str, str], list[TensorReport]] = {}
        for tensor in self.tensors:
            reasons.setdefault((tensor.role, tensor.why), []).append(tensor)
        for (role, why), members in sorted(reasons.items()):
            names = ", ".join(tensor.name for tensor in members[:3])
            more = f", … ({len(members)})" if len(members) > 3 else ""
            lines.append(f"  {role:<14} {why}: {names}{more}")
        lines += [f"  not finite     {name}: {n:,} elements" for name, n in self.nonfinite.items()]
        lines += [f"  note           {note}" for note in self.notes]
        return "\n".join(lines)


def report(engine: Engine, row: int, *, rule: str, stored: Sequence[Tensor]) -> Report:
    """Take stock of one average; waits for the device."""
    kept = engine.rows[row].memory
    values = engine.rows[row].tensors if engine.rows[row].damage else engine.values(row)
    return Report(
        rule=rule,
        updates=engine.updates,
        now=engine.now,
        initial_weight=kept.initial,
        mean_age=kept.age,
        noise_window=kept.noise_window,
        distance=_distance(engine, values),
        stall_gap=engine.stall_gap(row),
        stored_bytes=sum(plain(t).nbytes for t in stored),
        tensors=_tensors(engine),
        nonfinite={name: n for name, n in engine.held_back.items() if n},
        notes=tuple(notes(engine, row)),
    )


def notes(engine: Engine, row: int) -> list[str]:
    """What a tired user should be told."""
    found = []
    if damage := engine.rows[row].damage:
        found.append(f"the average is lost: {damage}; call load_state_dict or reset")
    if engine.live_changed_unseen():
        found.append(unseen(engine))
    if stalled := engine.rows[row].stalled:
        found.append(stalled)
    found += unreached_caps(engine, row)
    return found + thawed(engine)


def thawed(engine: Engine) -> list[str]:
    """What to say of parameters that were frozen once and are no longer."""
    return [
        f"{entry.name} was frozen when the average was built and requires a gradient now: it stays "
        "live; build a new average to include it, or name it in exclude="
        for entry in engine.inventory.entries
        if entry.why == "frozen parameter" and entry.live().requires_grad
    ]


def unseen(engine: Engine) -> str:
    """What to say when the live weights have changed and no update came."""
    if engine.steps:
        return (
            f"the follower saw {engine.steps:,} optimizer steps but no update came yet: "
            "`every` is longer than that"
        )
    if engine.follower is not None:
        return (
            "the live weights have changed, but the optimizer that is followed never stepped: "
            "follow the one that trains this model"
        )
    if engine.updates:
        return (
            "the live weights have changed since the average was loaded, but update was never "
            "called: call update() or follow()"
        )
    return (
        "the live weights have changed since the average was built, but update was never called: "
        "call update() or follow() (or reset() after loading weights)"
    )


def unreached_caps(engine: Engine, row: int) -> list[str]:
    """Name a `CountRamp` cap that is still out of reach: until then every cap is the same."""
    schedule = engine.rows[row].schedule
    so_far = engine.now - engine.origin
    while isinstance(schedule, After):
        so_far -= schedule.start
        schedule = schedule.schedule
    if not isinstance(schedule, CountRamp) or not 0 < so_far < schedule.saturation:
        return []
    return [
        f"{schedule!r} reaches its decay only at "
        f"{engine.now - engine.origin - so_far + schedule.saturation:,.0f}; up to "
        f"now ({show_time(engine.now)}) any larger decay would give the same average"
    ]


def _tensors(engine: Engine) -> tuple[TensorReport, ...]:
    stored = {entry.name: engine.rows[0].tensors[slot] for slot, entry in enumerate(engine.entries)}
    result = []
    for entry in engine.inventory.entries:
        live = entry.live()
        average = stored.get(entry.name)
        result.append(
            TensorReport(
                entry.name,
                tuple(live.shape),
                _short(live.dtype),
                entry.role,
                entry.why,
                "" if average is None else _short(average.dtype),
                entry.aliases,
            )
        )
    return tuple(result)


@torch.no_grad()
def _distance(engine: Engine, values: list[Tensor]) -> float | None:
    apart, size = [], []
    lent = {} if engine.loan is None else engine.loan.live
    for entry, live, average, part in zip(
        engine.entries, engine.live_pieces(), values, engine.parts, strict=True
    ):
        value = plain(average)
        if entry.name in lent:
            live = plain(lent[entry.name])
            live = live if part is None or live.shape == value.shape else part.of(live)
        wide = torch.complex128 if live.is_complex() else torch.float64
        x, y = live.to(value.device, wide), value.to(wide)
        apart.append(float((y - x).abs().square().sum()))
        size.append(float(x.abs().square().sum()))
    if not all(map(math.isfinite, apart + size)):
        return None
    # Exactly rounded sums: the order in which a model declares its layers does not show.
    if math.fsum(size) == 0.0:
        return 0.0 if math.fsum(apart) == 0.0 else None
    return math.sqrt(math.fsum(apart) / math.fsum(size))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
