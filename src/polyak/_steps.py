"""The product of the decays of many steps, in a time that does not grow with their number."""

import math
from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from ._errors import ArgumentError

FloatArray: TypeAlias = npt.NDArray[np.float64]
Parts: TypeAlias = Callable[[FloatArray], tuple[FloatArray, FloatArray]]

# Below this step a ramp is summed term by term; above it, the sum is an integral and two
# differences at each end. Every ramp is analytic but for points at or left of step 1, so what is
# left out is of the order of (steps / 1024) ** -5.
_SMOOTH_FROM = 1024
_FEW = 32  # steps that are multiplied one by one sooner than NumPy starts
_NODES = 20  # Gauss-Legendre nodes for a panel [x, 2 x]; 13 would do for 1e-16


class Ramp(Protocol):
    """A decay that is a function of the step, the same or larger at every further step."""

    def _of_step(self, n: int, /) -> float:
        """Return the decay of step `n`, before limits."""
        ...

    def _parts(self, n: FloatArray, /) -> tuple[FloatArray, FloatArray]:
        """Return decay and 1 - decay of the steps `n`, each to full relative precision."""
        ...


def steps_between(now: float, elapsed: float, unit: float) -> tuple[int, int]:
    """Return the first and the last step that the interval covers; steps count from 1."""
    check_times(now, elapsed)
    end, begin = now / unit, (now - elapsed) / unit
    last, before = round(end), round(begin)
    slack = min(1e-9 * end, 1e-2)  # times may carry rounding, never half a step
    if last == before or not (
        (last == end and before == begin)  # as nearly always
        or (abs(end - last) <= slack and abs(begin - before) <= slack)
    ):
        raise ArgumentError(
            f"now must be a whole number of steps of unit={unit!r} since the start of the "
            f"schedule, at every update, got {now!r} and {now - elapsed!r} before it. "
            "Pass the time that one optimizer step takes as unit, "
            f"for example unit={elapsed!r} if this update was one step."
        )
    return before + 1, last


def product(ramp: Ramp, first: int, last: int, *, low: float = 0.0, high: float = 1.0) -> float:
    """Return the product of clamp(decay of step, low, high) over the steps first..last.

    A ramp only grows, so it is `low` up to some step, `high` from some step on, and smooth between
    them: two powers and one sum of logarithms. Relative error below 1e-13 for products down to
    1e-100; it grows with the logarithm of the product.
    """
    steps = range(first, last + 1)
    if len(steps) <= _FEW:
        return math.prod(min(high, max(low, ramp._of_step(n))) for n in steps)
    risen = bisect_left(steps, low, key=ramp._of_step)
    capped = max(risen, bisect_left(steps, high, key=ramp._of_step))
    flat = math.pow(low, risen) * math.pow(high, len(steps) - capped)
    if risen == capped:
        return flat
    if ramp._of_step(steps[risen]) == 0.0:
        return 0.0
    return flat * math.exp(_sum_of_logs(ramp._parts, steps[risen], steps[capped - 1]))


def _sum_of_logs(parts: Parts, first: int, last: int) -> float:
    """Return the sum of log(decay) over first..last in a time that grows with its logarithm.

    Early steps term by term. For the rest the Euler-Maclaurin formula at midpoints, with central
    differences d, d3 of step 1 in place of derivatives:

        sum f(n) = integral of f from first - 1/2 to last + 1/2 - [d / 24 - 17 d3 / 5760] + ...

    (d/dx = d - d3 / 24 in 1/24 f' - 7/5760 f'''; NIST DLMF 2.10(i) and 3.4(iii).)
    """

    def log_decay(n: FloatArray) -> FloatArray:
        kept, dropped = parts(n)
        # Near 1 a decay has lost the digits that its logarithm is made of; 1 - decay has them.
        near_one = dropped < 0.5
        return np.where(
            near_one,
            np.log1p(-np.where(near_one, dropped, 0.0)),
            np.log(np.where(near_one, 1.0, kept)),
        )

    early = min(last, _SMOOTH_FROM - 1)
    total = 0.0
    if first <= early:
        total = math.fsum(log_decay(np.arange(first, early + 1, dtype=np.float64)))
        first = early + 1
    if last - first < _SMOOTH_FROM:
        return total + math.fsum(log_decay(np.arange(first, last + 1, dtype=np.float64)))

    begin, end = first - 0.5, last + 0.5
    panels = 1 + math.frexp(end / begin)[1]
    edges = np.minimum(begin * np.exp2(np.arange(panels + 1)), end)
    half, middle = 0.5 * np.diff(edges), 0.5 * (edges[1:] + edges[:-1])
    nodes, weights = _gauss_legendre()
    values = log_decay(middle[:, None] + half[:, None] * nodes) @ weights
    integral = math.fsum(half * values)

    around = log_decay(np.add.outer([begin, end], [-1.5, -0.5, 0.5, 1.5]))
    d = around[:, 2] - around[:, 1]
    d3 = around[:, 3] - around[:, 0] - 3.0 * d
    ends = d / 24.0 - 17.0 * d3 / 5760.0
    return total + (integral - float(ends[1] - ends[0]))


@cache
def _gauss_legendre() -> tuple[FloatArray, FloatArray]:
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    return nodes, weights


def check_times(now: float, elapsed: float) -> None:
    if not 0.0 < elapsed <= now < math.inf:
        raise ArgumentError(
            f"elapsed must be above 0 and at most now ({now!r}), both finite, got {elapsed!r}. "
            "Both count from the start of the average."
        )
