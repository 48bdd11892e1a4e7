"""How much does each checkpoint count? Shares of 1 from numbers, a schedule or a decay curve."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np

from ._errors import ArgumentError
from ._profiles import profile
from ._schedules import Schedule

Curve: TypeAlias = Literal["linear", "cosine", "1-sqrt"] | Callable[[float], float]

_TOLERANCE = 1e-9  # of a sum that is meant to be 1
_NODES = 32  # of the quadrature for a curve that is a plain function

# The area under each curve from 0 to u; a decay of the learning rate falls from 1 at 0 to 0 at 1.
_AREAS: dict[str, Callable[[float], float]] = {
    "linear": lambda u: u - u**2 / 2.0,
    "cosine": lambda u: u / 2.0 + math.sin(math.pi * u) / (2.0 * math.pi),
    "1-sqrt": lambda u: u - u**1.5 / 1.5,
}


def given(coefficients: Sequence[float], count: int, *, normalize: bool) -> list[float]:
    """Return the numbers of the caller, one a checkpoint, after a look at their sum."""
    values = [float(value) for value in coefficients]
    shown = ", ".join(f"{value:g}" for value in values)
    if len(values) != count:
        raise ArgumentError(
            f"coefficients must be one for each of the {count} checkpoints, "
            f"got {len(values)} ({shown})."
        )
    total = math.fsum(values)
    if not math.isfinite(total):
        raise ArgumentError(f"coefficients must be finite, got {shown}.")
    if normalize:
        if not total > 0.0:
            raise ArgumentError(f"coefficients must have a sum above 0, got {total:g} ({shown}).")
        return [value / total for value in values]
    if not abs(total - 1.0) <= _TOLERANCE:
        raise ArgumentError(
            f"coefficients must sum to 1, got {total:.12g} ({shown}). "
            "Pass normalize=True to rescale them."
        )
    return values


def uniform(count: int) -> list[float]:
    """Return the shares of a plain mean."""
    return [1.0 / count] * count


def of_schedule(schedule: Schedule, steps: Sequence[float]) -> tuple[list[float], float]:
    """Return the weights that `schedule` gives when updated at `steps` and nowhere else.

    The weights of `polyak.profile`. What a schedule leaves on the weights it started from (an
    `Exponential` without debiasing) goes to the first checkpoint, the nearest to them that there
    is; a checkpoint of step 0 is these weights.

    Args:
        schedule: any schedule; its time is counted from step 0 of the run.
        steps: increasing, from 0 on.

    Returns:
        The weights, and the share among them of the weights at the start.
    """
    if not steps[0] >= 0.0:
        raise ArgumentError(f"steps must be 0 or more for a schedule, got {steps[0]:g}.")
    starts_at_zero = steps[0] == 0.0
    updates = steps[1:] if starts_at_zero else steps
    if not updates:
        return [1.0], 1.0
    found = profile(schedule, updates)
    weights = found.weights.tolist()
    if starts_at_zero:
        return [found.initial, *weights], found.initial
    weights[0] += found.initial
    return weights, found.initial


def of_curve(curve: Curve, steps: Sequence[float]) -> list[float]:
    """Return the weights whose mean imitates a learning rate that decays along `curve`.

    theta_0 + sum of w_j (theta_j - theta_(j-1)) = sum of c_j theta_j,
    c_0 = 1 - w_1,  c_j = w_j - w_(j+1),  c_k = w_k        WSM 2025, arXiv 2507.17634

    Between two checkpoints the run moved at a constant rate; had the rate decayed, it would have
    moved by w_j, the mean of the curve over that interval. So the merge is the mean of the
    trajectory, drawn straight from checkpoint to checkpoint, with the density -curve'.

    Args:
        curve: "linear" 1 - u, "cosine" (1 + cos(pi u)) / 2, "1-sqrt" 1 - sqrt(u), or a function
            that falls within [0, 1], of the share u of the decay that is over.
        steps: increasing; the decay lasts from the first to the last.
    """
    if not callable(curve) and curve not in _AREAS:
        raise ArgumentError(
            f"curve must be one of {', '.join(_AREAS)} or a function, got {curve!r}."
        )
    if len(steps) == 1:
        return [1.0]
    first, length = steps[0], steps[-1] - steps[0]
    ends = [(step - first) / length for step in steps]
    mean = _mean_of(curve) if callable(curve) else _mean_by_area(_AREAS[curve])
    rates = [mean(begin, end) for begin, end in pairwise(ends)]
    falls = [before - after for before, after in zip([1.0, *rates], [*rates, 0.0], strict=True)]
    if not all(fall >= -_TOLERANCE for fall in falls):  # NaN is refused too
        raise ArgumentError(
            f"curve must fall and stay within [0, 1], got means of {[f'{r:.4g}' for r in rates]} "
            f"between the checkpoints from {curve!r}."
        )
    return falls


def _mean_by_area(area: Callable[[float], float]) -> Callable[[float, float], float]:
    return lambda begin, end: (area(end) - area(begin)) / (end - begin)


def _mean_of(curve: Callable[[float], float]) -> Callable[[float, float], float]:
    """The mean of a function over an interval, by Gauss's quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)

    def mean(begin: float, end: float) -> float:
        places = begin + (end - begin) * (nodes + 1.0) / 2.0
        values = [float(curve(place)) for place in places.tolist()]
        return math.fsum(w * v for w, v in zip(weights.tolist(), values, strict=True)) / 2.0

    return mean
