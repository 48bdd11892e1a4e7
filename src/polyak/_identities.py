"""Schedules under other names: as another class that is the same law, and as plain values."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from ._errors import ArgumentError
from ._schedules import (
    After,
    Cosine,
    CountRamp,
    Exponential,
    ExponentialRamp,
    HalfLifeRamp,
    InverseGamma,
    Polynomial,
    Power,
    Schedule,
    Uniform,
    given_fields,
)

_LN2 = math.log(2.0)

# ── one law, several names ───────────────────────────────────────────────────────────────────────

_S = TypeVar("_S")


def convert(schedule: Schedule, to: type[_S], *, exact: bool = True) -> _S:
    """Return the schedule of class `to` that is the same average.

    Exact, at every time that both accept:

        InverseGamma(g, power=1, min_decay=0, max_decay=1)  =  Polynomial(g - 1)
        HalfLifeRamp(r) without a limit                     =  Power(gamma=ln 2 / r - 1)
        Uniform()  =  Power(gamma=0)  =  Polynomial(0)

    With exact=False also the ones that hold in the limit of a long run:

        Polynomial(e)   ~  Power(gamma=e)      weights differ by O(1 / steps)
        CountRamp(d)    ~  Polynomial(8)       before its cap; its step n is their step n + 2

    Args:
        schedule: the schedule to rewrite.
        to: the class to write it in.
        exact: whether to refuse what holds in the limit only.

    Returns:
        A schedule of class `to`; `schedule` itself where it is one already.

    Raises:
        ArgumentError: when the two classes share no average, or only in the limit.

    Examples:
        >>> convert(InverseGamma(4.0, power=1.0, max_decay=1.0), Polynomial)
        Polynomial(eta=3.0)
        >>> convert(Uniform(), Power)
        Power(gamma=0.0)
    """
    if to not in _NAMED.values():
        raise ArgumentError(
            f"to must be a schedule class of polyak, got {to!r}. For example polyak.Power."
        )
    if isinstance(schedule, to):
        return schedule
    gamma, (eta, unit) = _as_power(schedule), _as_polynomial(schedule)
    same = _written_as(to, gamma=gamma, eta=eta, unit=unit)
    if isinstance(same, to):
        return same
    if isinstance(schedule, CountRamp):
        eta, unit = 8.0, schedule.unit
    limit = eta if eta is not None else gamma
    close = None if limit is None else _written_as(to, gamma=limit, eta=limit, unit=unit)
    if limit == 8.0 and to is CountRamp:
        close = CountRamp(1.0, unit=unit)
    if not isinstance(close, to):
        raise ArgumentError(
            f"schedule must be one that {to.__name__} can express exactly, got {schedule!r}. "
            "See polyak.convert for the list."
        )
    if exact:
        reason = (
            "a CountRamp is Polynomial(8) two steps later, before its cap holds: its initial "
            "weights play the first two steps"
            if isinstance(schedule, CountRamp) or to is CountRamp
            else "the weights agree in the limit of many steps"
        )
        raise ArgumentError(
            f"schedule must be one that {to.__name__} can express exactly, got {schedule!r}: "
            f"{reason}. Pass exact=False to take {close!r}."
        )
    return close


def _as_power(schedule: Schedule) -> float | None:
    """Return the gamma of the power function that `schedule` is, or None."""
    match schedule:
        case Power():
            return schedule.exponent - 1.0
        case HalfLifeRamp(half_life=None):
            return _LN2 / schedule.ratio - 1.0
        case Uniform() | Polynomial(eta=0.0):
            return 0.0
        case InverseGamma(inv_gamma=1.0, power=1.0, min_decay=0.0, max_decay=1.0):
            return 0.0
    return None


def _as_polynomial(schedule: Schedule) -> tuple[float | None, float]:
    """Return eta and unit of the polynomial decay that `schedule` is; None for eta if it is not."""
    match schedule:
        case Polynomial():
            return schedule.eta, schedule.unit
        case InverseGamma(power=1.0, min_decay=0.0, max_decay=1.0):
            return schedule.inv_gamma - 1.0, schedule.unit
    return (0.0 if _as_power(schedule) == 0.0 else None), 1


def _written_as(
    to: type, *, gamma: float | None, eta: float | None, unit: float
) -> Schedule | None:
    """Return the schedule of class `to` with this gamma or eta, whichever it is written in."""
    if gamma is not None:
        if to is Power:
            return Power(gamma=gamma)
        if to is HalfLifeRamp:
            return HalfLifeRamp(_LN2 / (gamma + 1.0))
        if to is Uniform and gamma == 0.0:
            return Uniform()
    if eta is not None:
        if to is Polynomial:
            return Polynomial(eta, unit=unit)
        if to is InverseGamma:
            return InverseGamma(eta + 1.0, power=1.0, max_decay=1.0, unit=unit)
    return None


def constant_decay(schedule: Schedule) -> float | None:
    """Return the decay per unit of time that `schedule` holds for ever, or None.

    Only an `Exponential`, also behind an `After`, holds one; the ramps may never reach theirs.

    Examples:
        >>> constant_decay(After(10, Exponential(decay=0.999)))
        0.999
    """
    if isinstance(schedule, After):
        return constant_decay(schedule.schedule)
    if not isinstance(schedule, Exponential):
        return None
    # Not by `in_decay`, which has no schedule for a decay that rounds to 1.
    return schedule.decay if schedule.half_life is None else math.exp2(-1.0 / schedule.half_life)


# ── saved by name and fields ─────────────────────────────────────────────────────────────────────

_OPAQUE = "opaque"
_NAMED: dict[str, type[Any]] = {
    named.__name__: named
    for named in (
        After,
        Cosine,
        CountRamp,
        Exponential,
        ExponentialRamp,
        HalfLifeRamp,
        InverseGamma,
        Polynomial,
        Power,
        Uniform,
    )
}


def schedule_state(schedule: Schedule) -> dict[str, Any]:
    """Return name and fields of a schedule: strings, numbers, booleans and dicts of them.

    What is not one of this module's classes (a function, a class of one's own) has the name
    "opaque": its code is not saved, and `schedule_from_state` asks for it again.

    Examples:
        >>> schedule_state(After(10, Power(sigma_rel=0.05)))
        {'name': 'After', 'start': 10, 'schedule': {'name': 'Power', 'sigma_rel': 0.05}}
    """
    if type(schedule) not in _NAMED.values():
        return {"name": _OPAQUE}
    state: dict[str, Any] = {"name": type(schedule).__name__}
    for name, value in given_fields(schedule).items():
        state[name] = schedule_state(value) if name == "schedule" else value
    return state


def schedule_from_state(state: Mapping[str, Any], *, opaque: Schedule | None = None) -> Schedule:
    """Return the schedule that `schedule_state` described.

    Args:
        state: what `schedule_state` returned.
        opaque: the function or object to use where the state says "opaque".

    Raises:
        ArgumentError: when the state names no schedule of this version, has other fields or values
            out of range, or is opaque and `opaque` is not given.

    Examples:
        >>> schedule_from_state({"name": "Exponential", "half_life": 1000.0, "debias": True})
        Exponential(half_life=1000.0)
    """
    name = state.get("name") if isinstance(state, Mapping) else None
    if name == _OPAQUE:
        if opaque is None:
            raise ArgumentError(
                "schedule must be passed in again, got a state saved with a function or class of "
                "your own, whose code is not saved. Pass the same one."
            )
        return opaque
    kind = _NAMED.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ArgumentError(
            f"the saved schedule must be one of {', '.join(_NAMED)} or {_OPAQUE!r}, got "
            f"{name if isinstance(name, str) else state!r}. "
            "Load it with the version of polyak that saved it, or pass a schedule of your own."
        )
    values = {key: value for key, value in state.items() if key != "name"}
    known = {item.name: item.default is MISSING for item in fields(kind)}
    unknown = sorted(str(key) for key in values if key not in known)
    missing = [key for key, needed in known.items() if needed and key not in values]
    if unknown or missing:
        raise ArgumentError(
            f"a saved {name} must have the fields {', '.join(known) or 'none'}, got "
            f"{sorted(map(str, values))} (unknown {unknown}, missing {missing}). "
            "Load it with the version of polyak that saved it, or pass a schedule of your own."
        )
    if "schedule" in values:
        values["schedule"] = schedule_from_state(values["schedule"], opaque=opaque)
    restored: Schedule = kind(**values)
    return restored
