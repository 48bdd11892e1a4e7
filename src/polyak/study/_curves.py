"""What does one validation curve say? Best epoch, patience, overtaking, spread.

A curve is a sequence of values, one an evaluation; epochs are counted from 1. Everything here is
stated for "lower is better"; a metric where higher is better is negated by the caller.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HOLD = 5  # an average overtakes when it stays ahead this many evaluations: not by one lucky epoch


@dataclass(frozen=True)
class Stopped:
    """Where early stopping leaves a curve.

    Args:
        best: epoch of the lowest value seen before stopping; None when no value was finite.
        stop: epoch after which training would have ended.
        ran_out: True when the curve ended before its patience did.
    """

    best: int | None
    stop: int
    ran_out: bool


def early_stop(curve: Sequence[float], *, patience: int | None) -> Stopped:
    """Walk a curve until `patience` evaluations in a row brought nothing better.

    A value that is not finite is never better. Without patience the whole curve counts.

    Examples:
        >>> early_stop([3.0, 1.0, 2.0, 2.0, 0.5], patience=2)
        Stopped(best=2, stop=4, ran_out=False)
    """
    best, lowest = None, float("inf")
    since = 0
    for epoch, value in enumerate(curve, start=1):
        if value < lowest:  # False for NaN, as it must be
            best, lowest, since = epoch, value, 0
        else:
            since += 1
        if patience is not None and since >= patience:
            return Stopped(best=best, stop=epoch, ran_out=False)
    return Stopped(best=best, stop=len(curve), ran_out=True)


def overtakes(
    average: Sequence[float], live: Sequence[float], *, hold: int = HOLD, first: int = 1
) -> int | None:
    """Epoch from which the average stays below the live curve for `hold` evaluations in a row.

    Args:
        average: values of the average, the first of them at epoch `first`.
        live: values of the live weights, from epoch 1.
        hold: evaluations in a row that it must stay ahead.
        first: epoch of the first value of `average`.

    Returns:
        The first such epoch, or None when it never does.

    Examples:
        >>> overtakes([5, 1, 5, 1, 1], [2, 2, 2, 2, 2], hold=2)
        4
    """
    run = 0
    for epoch, value in enumerate(average, start=first):
        run = run + 1 if epoch <= len(live) and value < live[epoch - 1] else 0
        if run == hold:
            return epoch - hold + 1
    return None


def spread(curve: Sequence[float], *, detrend: bool = False) -> float:
    """Standard deviation of a stretch of a curve, with its trend or without.

    sqrt(mean (v - mean v)^2), the population form that `numpy.std` gives. With `detrend` a
    straight line is first taken out by least squares, and the two fitted numbers are paid for:
    sqrt(sum r^2 / (n - 2)). Without that a curve that falls smoothly would count as restless.
    A line does not follow the steep start of training: there the figure is mostly descent.

    Returns:
        The spread; NaN where there are too few finite values (2, or 3 with `detrend`).

    Examples:
        >>> spread([1.0, 2.0, 3.0], detrend=True) < 1e-12
        True
    """
    values = np.asarray(curve, dtype=np.float64)
    if len(values) < (3 if detrend else 2) or not np.isfinite(values).all():
        return float("nan")
    if not detrend:
        return float(values.std())
    epochs = np.arange(len(values), dtype=np.float64)
    line = np.polynomial.Polynomial.fit(epochs, values, 1)
    residual: NDArray[np.float64] = values - line(epochs)
    return float(np.sqrt((residual**2).sum() / (len(values) - 2)))


@dataclass(frozen=True)
class Spreads:
    """How restless a curve is: plainly, and in each third without its trend.

    Args:
        whole: plain standard deviation of the whole curve, as the article gives it.
        settled: plain standard deviation after the first third.
        early: first third, a straight line taken out.
        middle: second third, a straight line taken out.
        late: last third, a straight line taken out.
        jumps: sqrt(mean d^2 / 2), d the change from one evaluation to the next, after the first
            third: for noise that is new each time the standard deviation, whatever the trend; for
            an average, whose noise is slow, much less.
    """

    whole: float
    settled: float
    early: float
    middle: float
    late: float
    jumps: float

    @property
    def noise(self) -> float:
        """Middle and late thirds pooled: sqrt((middle^2 + late^2) / 2); late alone if need be."""
        if np.isnan(self.middle):
            return self.late
        return float(np.sqrt((self.middle**2 + self.late**2) / 2.0))


def spreads(curve: Sequence[float], *, first: int = 1) -> Spreads:
    """Spread of a curve, whole and by thirds of the run that it ends with.

    Thirds are those of the epochs 1 to the end of the curve, so that a curve that begins late
    (a tail average) is compared over the same epochs; a third it does not fill is NaN.
    """
    end = first + len(curve) - 1
    cuts = [0, round(end / 3), round(2 * end / 3), end]

    def piece(start: int, stop: int) -> Sequence[float]:
        return curve[start - first + 1 : stop - first + 1] if start + 1 >= first else ()

    return Spreads(
        whole=spread(curve) if first == 1 else float("nan"),
        settled=spread(piece(cuts[1], end)),
        early=spread(piece(cuts[0], cuts[1]), detrend=True),
        middle=spread(piece(cuts[1], cuts[2]), detrend=True),
        late=spread(piece(cuts[2], end), detrend=True),
        jumps=_jumps(piece(cuts[1], end)),
    )


def _jumps(curve: Sequence[float]) -> float:
    values = np.asarray(curve, dtype=np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        return float("nan")
    return float(np.sqrt((np.diff(values) ** 2).mean() / 2.0))
