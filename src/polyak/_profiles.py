"""What an average remembers: the weight of every moment of training, and what follows from it."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ._errors import ArgumentError
from ._schedules import Schedule

_FloatArray: TypeAlias = npt.NDArray[np.float64]

_CELLS = 2**22  # longest grid of update times that is searched by one Fourier transform
_STEPS_BEFORE_TRANSFORM = 64  # a smooth profile needs about ten


@dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """An average as what it is, a weighted sum of the live weights seen during training.

    average at times[-1] = initial * (initial weights) + sum of weights[i] * (live at times[i])

    Args:
        times: update times since the start, increasing [updates].
        weights: weight of the live weights of each update [updates].
        initial: weight that the initial weights still have; weights and it sum to 1.

    Examples:
        >>> from polyak._schedules import Uniform
        >>> profile(Uniform(), [1, 2, 3, 4]).weights.tolist()
        [0.25, 0.25, 0.25, 0.25]
    """

    times: _FloatArray
    weights: _FloatArray
    initial: float

    @property
    def end(self) -> float:
        """Return the time of the last update, at which the average is looked at."""
        return float(self.times[-1])

    @cached_property
    def mean_age(self) -> float:
        """Return the mean age of the weights averaged: sum of w (end - time).

        The initial weights count with the age `end`. decay / (1 - decay) for a settled EMA.
        """
        return float(self.weights @ (self.end - self.times)) + self.initial * self.end

    @cached_property
    def noise_window(self) -> float:
        """Return how many equal, independent weights would average as well: 1 / sum of w^2.

        The initial weights count as one more. (1 + decay) / (1 - decay) for a settled EMA. Noise
        that is correlated from step to step is averaged less than this says.
        """
        return 1.0 / (float(self.weights @ self.weights) + self.initial**2)

    @cached_property
    def half_life(self) -> float:
        """Return the age by which half of the weight is younger.

        The weight of an update is spread evenly over the time since the one before it; that of
        the initial weights sits at the start. ln 2 / -ln(decay) for a settled EMA.
        """
        younger = np.concatenate(([0.0], np.cumsum(self.weights[::-1])))
        if younger[-1] < 0.5:  # the initial weights hold the middle
            return self.end
        ages = self.end - np.concatenate((self.times[::-1], [0.0]))
        ages[0] = 0.0
        first = int(np.searchsorted(younger, 0.5))  # the first age with half of the weight
        share = (0.5 - younger[first - 1]) / (younger[first] - younger[first - 1])
        return float(ages[first - 1] + share * (ages[first] - ages[first - 1]))

    @cached_property
    def cutoff(self) -> float | None:
        """Return the frequency, in radians per unit of time, that is damped to half its power.

        The first one with |H|^2 = 1/2, where H(f) = sum of w exp(-i f age), the initial weights
        being the signal's value at the start. arccos(1 - (1 - decay)^2 / (2 decay)) for a settled
        EMA updated once per unit. None when no frequency that the update times can carry is
        damped that far: a settled EMA of decay below 3 - 2 sqrt(2) = 0.1716.

        Found without stepping over a narrow dip. Costs about ten passes over the weights.
        """
        ages = np.concatenate((self.end - self.times, [self.end]))
        weights = np.concatenate((self.weights, [self.initial]))
        seen = weights > 0.0
        return _first_half_power(ages[seen], weights[seen])

    def __repr__(self) -> str:
        return (
            f"Profile({len(self.times)} updates to {self.end:g}, initial={self.initial:.3g}, "
            f"mean_age={self.mean_age:.6g}, noise_window={self.noise_window:.6g})"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Profile) and (
            self.initial == other.initial
            and np.array_equal(self.times, other.times)
            and np.array_equal(self.weights, other.weights)
        )

    __hash__ = None  # type: ignore[assignment]  # its arrays can change


def profile(schedule: Schedule, times: npt.ArrayLike) -> Profile:
    """Return the weight of every update in the average that `schedule` makes of updates at `times`.

    weights[i] = (1 - d_i) * d_(i+1) * ... * d_n,  initial = d_1 * ... * d_n,  where d_i is
    schedule(now=times[i], elapsed=times[i] - times[i-1]). Any schedule, plain functions too.

    Args:
        schedule: the rule; it is called once for each of `times`.
        times: update times since the start of the average, above 0 and increasing [updates].

    Returns:
        A `Profile`. A million times take a few seconds. A decay is a float64, so 1 - decay and
        with it a weight is known to 1e-16 / (1 - decay) of itself and no better.

    Raises:
        ArgumentError: when the times do not increase from above 0, or a decay is not in [0, 1].

    Examples:
        >>> from polyak._schedules import Exponential
        >>> plain = profile(Exponential(decay=0.5, debias=False), [1, 2, 3])
        >>> plain.weights.tolist(), plain.initial
        ([0.125, 0.25, 0.5], 0.125)
    """
    array = np.array(times, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ArgumentError(
            f"times must be a list of update times, at least one, got shape {array.shape}."
        )
    gaps = np.diff(array, prepend=0.0)
    wrong = np.flatnonzero(~((gaps > 0.0) & (array < math.inf)))
    if wrong.size:
        at = int(wrong[0])
        before = array[at - 1] if at else 0.0
        raise ArgumentError(
            f"times must increase from above 0 and be finite, got {array[at]:g} after {before:g} "
            f"at index {at}. Count from the start of the average, which is not an update."
        )
    decays = np.array(
        [
            schedule(now=now, elapsed=elapsed)
            for now, elapsed in zip(array.tolist(), gaps.tolist(), strict=True)
        ],
        dtype=np.float64,
    )
    wrong = np.flatnonzero(~((decays >= 0.0) & (decays <= 1.0)))
    if wrong.size:
        at = int(wrong[0])
        raise ArgumentError(
            f"the decay must be between 0 and 1, got {decays[at]!r} from "
            f"{schedule!r} at now={array[at]:g}, elapsed={gaps[at]:g}."
        )
    # left[i]: what survives of update i until the end. A product of ratios near 1 keeps every
    # weight to full relative precision, which differences of the cumulated weights would not.
    left = np.append(np.cumprod(decays[:0:-1])[::-1], 1.0)
    weights = (1.0 - decays) * left
    initial = float(decays[0] * left[0])
    for fixed in (array, weights):
        fixed.flags.writeable = False
    return Profile(times=array, weights=weights, initial=initial)


def _first_half_power(ages: _FloatArray, weights: _FloatArray) -> float | None:
    """Return the first frequency at which |sum of w exp(i f age)|^2 is half of its value at 0.

    The power p(f) = sum over pairs of w w' cos(f (age - age')) has |p''| <= 2 v, v the variance of
    the ages. So from f, where it is p, it stays above p + p' h - v h^2: a step to the zero of that
    parabola never passes the crossing, and close to it, it is Newton's step.
    """
    if 2.0 * float(weights.max()) - float(weights.sum()) > math.sqrt(0.5):
        return None  # one moment outweighs all others together at every frequency
    ages = ages - float(weights @ ages)
    variance = float(weights @ ages**2)
    spacing, cells = _grid(ages)
    fastest = math.pi / spacing  # the power is mirrored there if the times are on a grid

    def margin(frequency: float) -> tuple[float, float]:
        """Return p - 1/2 and p' at `frequency`."""
        waves = weights * np.exp(1j * frequency * ages)
        total, slope = complex(waves.sum()), complex(1j * (waves @ ages))
        power_slope = 2.0 * (total.real * slope.real + total.imag * slope.imag)
        return total.real**2 + total.imag**2 - 0.5, power_slope

    skip: _FloatArray | None = None
    frequency, taken = 0.0, 0
    while True:
        above, slope = margin(frequency)
        if above <= 0.0:
            return frequency
        step = (slope + math.sqrt(slope**2 + 4.0 * variance * above)) / (2.0 * variance)
        if step <= 4e-16 * frequency:
            return frequency
        frequency += step
        taken += 1
        if taken >= _STEPS_BEFORE_TRANSFORM and cells is not None:
            # A sharp memory with a long faint tail has a power that ripples for long just above
            # one half. One transform shows where it can cross at all.
            if skip is None:
                skip = _candidates(ages, weights, spacing, cells, variance)
            ahead = int(np.searchsorted(skip[:, 1], frequency))
            if ahead == len(skip):
                return None
            frequency = max(frequency, float(skip[ahead, 0]))
        if frequency > fastest * (1.0 + 1e-12):
            return None


def _grid(ages: _FloatArray) -> tuple[float, int | None]:
    """Return the smallest spacing of the ages, and their number of grid cells if on one grid."""
    ordered = np.sort(ages)
    gaps = np.diff(ordered)
    spacing = float(gaps.min())
    cells = gaps / spacing
    span = float((ordered[-1] - ordered[0]) / spacing)
    on_grid = span < _CELLS / 4 and bool(np.all(np.abs(cells - np.rint(cells)) < 1e-6 / span))
    return spacing, round(span) + 1 if on_grid else None


def _candidates(
    ages: _FloatArray, weights: _FloatArray, spacing: float, cells: int, variance: float
) -> _FloatArray:
    """Return the intervals of frequency in which the power can fall to one half [intervals, 2]."""
    bins = np.zeros(2 ** (2 + math.ceil(math.log2(cells))))
    bins[np.rint((ages - ages.min()) / spacing).astype(np.int64)] = weights
    margin = np.abs(np.fft.rfft(bins)) ** 2 - 0.5
    width = 2.0 * math.pi / (spacing * len(bins))
    # Between two samples a function with |p''| <= 2 v sags below its chord by v width^2 / 4.
    possible = np.minimum(margin[:-1], margin[1:]) <= 0.25 * variance * width**2
    left = np.flatnonzero(possible) * width
    return np.stack((left, left + width), axis=1)
