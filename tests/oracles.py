"""Slow and obvious: what the fast code must agree with, in float64 and in exact fractions."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Decay = Callable[..., float]


def weights_by_basis(schedule: Decay, times: Sequence[float]) -> tuple[float, FloatArray]:
    """Average basis vectors with `schedule`; what comes out are the weights of the moments.

    Returns the weight of the initial vector and that of every update [updates].
    """
    average = np.zeros(len(times) + 1)
    average[0] = 1.0
    before = 0.0
    for index, now in enumerate(times, start=1):
        live = np.zeros_like(average)
        live[index] = 1.0
        decay = schedule(now=now, elapsed=now - before)
        average = decay * average + (1.0 - decay) * live
        before = now
    return float(average[0]), average[1:]


def average_of(
    schedule: Decay, initial: FloatArray, trajectory: Sequence[FloatArray], times: Sequence[float]
) -> list[FloatArray]:
    """Return the average after every update of a trajectory [updates], one line of arithmetic."""
    average, before, seen = initial, 0.0, []
    for live, now in zip(trajectory, times, strict=True):
        decay = schedule(now=now, elapsed=now - before)
        average, before = decay * average + (1.0 - decay) * live, now
        seen.append(average)
    return seen


def product_of_steps(of_step: Callable[[int], float], first: int, last: int) -> float:
    """Return the product of the decays of the steps first..last, one at a time."""
    return math.exp(math.fsum(math.log(of_step(n)) for n in range(first, last + 1)))


def rising_ratio(start: int, end: int, factors: int) -> float:
    """Return start (start + 1) ... / (end (end + 1) ...), `factors` of each, rounded once."""
    ratio = Fraction(1)
    for k in range(factors):
        ratio *= Fraction(start + k, end + k)
    return float(ratio)


# The rules of DESIGN section 3 for step n, written down once more.


def count_ramp(n: int, decay: float) -> float:
    return min(decay, (1 + n) / (10 + n))


def exponential_ramp(n: int, decay: float, tau: float) -> float:
    return decay * (1 - math.exp(-n / tau))


def inverse_gamma(n: int, gain: float, power: float, low: float, high: float) -> float:
    return max(low, min(high, 1 - math.pow(1 + (n - 1) / gain, -power)))


def cosine(n: int, base: float, total: float) -> float:
    return 1 - (1 - base) * (math.cos(math.pi * n / total) + 1) / 2 if n < total else 1.0


def power_at(profile: Any, frequency: float) -> float:
    """Return |H|^2 of a profile at one frequency: what is left of a sinusoid's power."""
    real = profile.initial * math.cos(frequency * profile.end)
    imaginary = profile.initial * math.sin(frequency * profile.end)
    for time, weight in zip(profile.times, profile.weights, strict=True):
        real += weight * math.cos(frequency * (profile.end - time))
        imaginary += weight * math.sin(frequency * (profile.end - time))
    return float(real**2 + imaginary**2)
