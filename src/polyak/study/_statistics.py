"""Is a difference between two methods more than luck? Paired over seeds, with intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from polyak._errors import ArgumentError

LEVEL = 0.95


@dataclass(frozen=True)
class Paired:
    """Differences of the same seeds under two methods, above 0 where the second is better.

    Args:
        differences: one a seed, in the order of the seeds, those without a finite value left out.
        mean: their mean; NaN without any.
        low: lower end of the 95 % interval of the mean; NaN with fewer than two seeds.
        high: its upper end.
        median: their median.
        wins: how many are above 0.
        sign_p: two-sided sign test, ties left out: chance of so one-sided a count from a fair
            coin; 1 without any.
        left_out: seeds without a finite value.
    """

    differences: tuple[float, ...]
    mean: float
    low: float
    high: float
    median: float
    wins: int
    sign_p: float
    left_out: int

    @property
    def seeds(self) -> int:
        """How many seeds were compared."""
        return len(self.differences)

    @property
    def finding(self) -> Literal["better", "worse", "uncertain"]:
        """Where the interval lies: above 0, below 0, or around it (always so with one seed)."""
        if self.low > 0.0:
            return "better"
        return "worse" if self.high < 0.0 else "uncertain"

    def within(self, size: float) -> bool:
        """Whether the whole interval lies inside -size to +size: shown to be small."""
        return -size <= self.low and self.high <= size


def paired(differences: Sequence[float]) -> Paired:
    """Mean, Student-t interval, median and sign test of paired differences.

    mean +- t(0.975, n - 1) s / sqrt(n), s with n - 1: Student 1908. It supposes that the
    differences are roughly normal, which a handful of seeds cannot show; the sign test does not.

    Examples:
        >>> paired([1.0, 2.0, 3.0]).mean
        2.0
    """
    kept = np.asarray([d for d in differences if math.isfinite(d)], dtype=np.float64)
    count = len(kept)
    nan = float("nan")
    low, high = (nan, nan) if count < 2 else _interval(kept)
    above, below = int((kept > 0).sum()), int((kept < 0).sum())
    return Paired(
        differences=tuple(float(d) for d in kept),
        mean=float(kept.mean()) if count else nan,
        low=low,
        high=high,
        median=float(np.median(kept)) if count else nan,
        wins=above,
        sign_p=float(stats.binomtest(above, above + below).pvalue) if above + below else 1.0,
        left_out=len(differences) - count,
    )


def _interval(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, float]:
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf(0.5 + LEVEL / 2.0, len(values) - 1)) * error
    return float(values.mean()) - half, float(values.mean()) + half


def gains(
    baseline: Sequence[float],
    values: Sequence[float],
    *,
    better: Literal["lower", "higher"],
    compare: Literal["relative", "absolute"],
) -> list[float]:
    """Change from `baseline` to `values` seed by seed, above 0 where it is for the better.

    "relative" is the logarithm of the ratio: ln(old / new) where lower is better. A share of the
    baseline has a ceiling at 100 % and no floor, so that mere noise in the baseline makes its mean
    negative; logarithms change sign when the two sides change places, and add up along a chain.
    Their mean is the geometric mean of the ratios; `Metric.shown` turns it into a share. NaN
    where a value is not above 0.

    Examples:
        >>> gains([0.5], [0.4], better="lower", compare="absolute")
        [0.09999999999999998]
        >>> gains([0.5], [0.5], better="lower", compare="relative")
        [0.0]
    """
    if len(baseline) != len(values):
        raise ArgumentError(
            f"values must have one entry a seed ({len(baseline)}), got {len(values)}."
        )
    ends = [
        (old, new) if better == "higher" else (new, old)
        for old, new in zip(baseline, values, strict=True)
    ]
    if compare == "absolute":
        return [after - before for before, after in ends]
    return [
        math.log(after) - math.log(before) if before > 0.0 and after > 0.0 else float("nan")
        for before, after in ends
    ]


def detectable(seeds: int) -> float:
    """Half-width of the interval of the mean, in standard deviations of the differences.

    t(0.975, n - 1) / sqrt(n): a mean smaller than this cannot be told from 0. 2.5 with three
    seeds, 0.72 with ten; infinite with one.
    """
    if seeds < 2:
        return float("inf")
    return float(stats.t.ppf(0.5 + LEVEL / 2.0, seeds - 1)) / math.sqrt(seeds)
