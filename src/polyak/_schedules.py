"""How much of the old average survives an update: decay as a function of time.

Every schedule is a value `(now, elapsed) -> decay`: `now` is the time since the average started,
`elapsed` the time since its last update, 0 < elapsed <= now, both in the caller's one unit (steps,
samples or tokens). A plain function with these two keywords is a schedule too.

Two families. `Power`, `Exponential`, `Uniform` and `HalfLifeRamp` are laws in continuous time: one
update over a long interval is exactly the product of many over its parts. The ramps that other
libraries define by counting steps (`Polynomial`, `CountRamp`, `ExponentialRamp`, `InverseGamma`,
`Cosine`) keep that promise by multiplying the decays of the steps an interval covers, in a time
that does not grow with their number.
"""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Protocol, Self, final

import numpy as np

from ._errors import ArgumentError
from ._steps import FloatArray, check_times, product, steps_between

_LN2 = math.log(2.0)
_SIGMA_REL_LIMIT = 1.0 / math.sqrt(12.0)  # relative width of the plain mean


class Schedule(Protocol):
    """A rule that says which share of the old average survives an update."""

    def __call__(self, *, now: float, elapsed: float) -> float:
        """Return the decay, in [0, 1], of an update at `now`, `elapsed` after the last one."""
        ...


# ── laws in continuous time ──────────────────────────────────────────────────────────────────────


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Power:
    """Memory that grows with the run: at time `now`, time s weighs (s / now) ** gamma.

    decay = (1 - elapsed / now) ** (gamma + 1)     Karras et al. 2024, eq. 127
                                                   https://arxiv.org/abs/2312.02696

    The first update leaves nothing of the initial weights, and no run length has to be guessed:
    the average is always as long as the same share of the run so far. Not for a target that should
    follow the live weights at one constant distance: use `Exponential` there.

    Args:
        sigma_rel: standard deviation of the profile as a share of the run, in (0, 0.2887).
            0.05 suits most runs, 0.10 noisy ones.
        gamma: exponent of the profile, above -1; give this or `sigma_rel`. 0 is the plain mean.

    Raises:
        ArgumentError: when a value is out of range, or not exactly one of the two is given.

    Examples:
        >>> Power(gamma=0.0)(now=4, elapsed=1)
        0.75
        >>> Power(sigma_rel=0.05)
        Power(sigma_rel=0.05)
    """

    sigma_rel: float | None = None
    gamma: float | None = None

    def __post_init__(self) -> None:
        _require_one(self, "sigma_rel", "gamma", hint="Power(sigma_rel=0.05) is a good start")
        if self.sigma_rel is not None:
            _settle(self, "sigma_rel", _SIGMA_RULE, _is_sigma_rel, _SIGMA_ADVICE)
        else:
            _settle(self, "gamma", _GAMMA_RULE, _is_above_minus_one)

    @cached_property
    def exponent(self) -> float:
        """Return gamma + 1, whichever way the profile was given."""
        if self.gamma is not None:
            return self.gamma + 1.0
        assert self.sigma_rel is not None
        return gamma_from_sigma_rel(self.sigma_rel) + 1.0

    def __call__(self, *, now: float, elapsed: float) -> float:
        """Return (1 - elapsed / now) ** (gamma + 1)."""
        check_times(now, elapsed)
        # now - elapsed is exact for whole times, 1 - elapsed / now is not.
        return math.pow((now - elapsed) / now, self.exponent)

    def __repr__(self) -> str:
        return _spelled(self)


@final
@dataclass(frozen=True, kw_only=True, repr=False)
class Exponential:
    """The exponential moving average: a moment of age a weighs decay ** a.

    decay ** elapsed                                                     with debias=False
    decay ** elapsed (1 - decay ** (now - elapsed)) / (1 - decay ** now) with debias=True

    The second is Adam's bias correction (https://arxiv.org/abs/1412.6980, section 3) done in
    place: the same average as one that starts at zero and is divided by 1 - decay ** now, without
    the division. Its first update leaves nothing of the initial weights, where the plain form
    keeps decay ** now of them. From a noisy start debias; a teacher that must start as a copy of
    its student should not. Too long for the run, an average lags; `Power` sets its own length.

    Args:
        decay: share that survives one unit of time, in [0, 1]; 1 only with debias=False.
        half_life: time after which a weight counts half, above 0; give this or `decay`.
        debias: whether the weights are divided by their sum so far.

    Raises:
        ArgumentError: when a value is out of range, or not exactly one of the two is given.

    Examples:
        >>> Exponential(decay=0.5, debias=False)(now=10, elapsed=2)
        0.25
        >>> Exponential(half_life=1_000)(now=1, elapsed=1)
        0.0
    """

    decay: float | None = None
    half_life: float | None = None
    debias: bool = True

    def __post_init__(self) -> None:
        _require_one(self, "decay", "half_life", hint="Exponential(half_life=1_000), for example")
        if not isinstance(self.debias, bool):
            raise ArgumentError(f"debias must be True or False, got {self.debias!r}.")
        if self.half_life is not None:
            _settle(self, "half_life", "finite and above 0", _is_positive)
            return
        _settle(self, "decay", "between 0 and 1", _is_share)
        if self.debias and self.decay == 1.0:
            raise ArgumentError(
                f"decay must be below 1 with debias=True, got {self.decay!r}. "
                "Use Uniform() for the mean of the whole run, "
                "or debias=False to keep the initial weights for ever."
            )

    @classmethod
    def from_noise_window(cls, samples: float, *, debias: bool = True) -> Self:
        """Return the average as quiet as a plain mean of `samples` weights.

        decay = (samples - 1) / (samples + 1), from 1 / sum w^2 = (1 + decay) / (1 - decay). It
        also has the mean age of that plain mean, (samples - 1) / 2.

        Args:
            samples: number of equal, independent weights that average as well; at least 1.
            debias: as in the class.

        Examples:
            >>> Exponential.from_noise_window(3)
            Exponential(decay=0.5)
        """
        _check("samples", samples, "finite and at least 1", lambda n: 1.0 <= n < math.inf)
        return cls(decay=(samples - 1.0) / (samples + 1.0), debias=debias)

    @classmethod
    def from_mean_age(cls, age: float, *, debias: bool = True) -> Self:
        """Return the average whose weights are `age` old in the mean, once it has settled.

        decay = age / (1 + age), from sum of a (1 - decay) decay ** a over the ages a = 0, 1, ...

        Args:
            age: mean age in units of time, when updated once per unit; at least 0.
            debias: as in the class.

        Examples:
            >>> Exponential.from_mean_age(999)
            Exponential(decay=0.999)
        """
        _check("age", age, "finite and at least 0", lambda a: 0.0 <= a < math.inf)
        return cls(decay=age / (1.0 + age), debias=debias)

    @classmethod
    def from_cutoff(cls, radians_per_step: float, *, debias: bool = True) -> Self:
        """Return the low-pass filter that halves the power of a sinusoid of this frequency.

        decay = 1 / (1 + c + sqrt(c (2 + c))) with c = 1 - cos(frequency): the root below 1 of
        (1 - decay)^2 / (1 - 2 decay cos(frequency) + decay^2) = 1 / 2.

        Args:
            radians_per_step: cutoff in radians per unit of time, in (0, pi], for one update per
                unit. pi gives 3 - 2 sqrt(2) = 0.1716, the smallest decay that has a cutoff.
            debias: as in the class.

        Examples:
            >>> round(Exponential.from_cutoff(0.0010005001).decay, 6)
            0.999
        """
        _check(
            "radians_per_step",
            radians_per_step,
            "above 0 and at most pi (the fastest signal that steps can carry)",
            lambda w: 0.0 < w <= math.pi,
        )
        c = 2.0 * math.sin(radians_per_step / 2.0) ** 2  # 1 - cos, without its cancellation
        return cls(decay=1.0 / (1.0 + c + math.sqrt(c * (2.0 + c))), debias=debias)

    @cached_property
    def rate(self) -> float:
        """Return -ln(decay) per unit of time; infinite for decay 0."""
        if self.half_life is not None:
            return _LN2 / self.half_life
        assert self.decay is not None
        return -math.log(self.decay) if self.decay > 0.0 else math.inf

    def in_decay(self) -> "Exponential":
        """Return the same schedule, spelled with `decay`.

        Examples:
            >>> Exponential(half_life=1.0).in_decay()
            Exponential(decay=0.5)
        """
        if self.half_life is None:
            return self
        return Exponential(decay=math.exp2(-1.0 / self.half_life), debias=self.debias)

    def in_half_life(self) -> "Exponential":
        """Return the same schedule, spelled with `half_life`; decays 0 and 1 have none.

        Examples:
            >>> Exponential(decay=0.5).in_half_life()
            Exponential(half_life=1.0)
        """
        if self.half_life is not None:
            return self
        if not 0.0 < self.rate < math.inf:
            raise ArgumentError(
                f"decay must be above 0 and below 1 to have a half-life, got {self.decay!r}."
            )
        return Exponential(half_life=_LN2 / self.rate, debias=self.debias)

    def __call__(self, *, now: float, elapsed: float) -> float:
        """Return decay ** elapsed, bias-corrected unless debias=False."""
        check_times(now, elapsed)
        if not self.debias:
            if self.half_life is not None:
                return math.exp2(-elapsed / self.half_life)
            assert self.decay is not None
            return math.pow(self.decay, elapsed)
        if elapsed == now:
            return 0.0
        # expm1: near decay 1 the brackets are small differences of nearly equal numbers. Taken
        # from 1, the weight of the live weights leaves all digits that a decay near 1 can have.
        weight = math.expm1(-self.rate * elapsed) / math.expm1(-self.rate * now)
        if weight < 0.5:
            return 1.0 - weight
        kept = math.exp(-self.rate * elapsed)
        return kept * math.expm1(self.rate * (elapsed - now)) / math.expm1(-self.rate * now)

    def __repr__(self) -> str:
        return _spelled(self)


@final
@dataclass(frozen=True)
class Uniform:
    """The plain mean of the whole run: every moment weighs the same.

    decay = 1 - elapsed / now     Polyak & Juditsky 1992, https://doi.org/10.1137/0330046

    Optimal for a converged, noisy optimizer; far from convergence the early weights hurt, so use
    it for a tail: `After(start, Uniform())` is stochastic weight averaging
    (Izmailov et al. 2018, https://arxiv.org/abs/1803.05407).

    Examples:
        >>> Uniform()(now=4, elapsed=1)
        0.75
    """

    def __call__(self, *, now: float, elapsed: float) -> float:
        """Return 1 - elapsed / now."""
        check_times(now, elapsed)
        return (now - elapsed) / now


@final
@dataclass(frozen=True, repr=False)
class HalfLifeRamp:
    """A half-life that grows with the run, up to a limit: min(half_life, ratio * time).

    decay = 2 ** -(integral of dt / min(half_life, ratio t) from now - elapsed to now)
                                                   Karras et al. 2020 (StyleGAN2-ADA, code)
                                                   https://arxiv.org/abs/2006.06676

    While it ramps it is `Power(gamma=ln 2 / ratio - 1)`; afterwards an `Exponential`. The code of
    the paper holds the half-life still during each update instead of integrating, so its decays
    differ by O((elapsed / now) ** 2) and depend on the update interval; these do not.

    Args:
        ratio: half-life as a share of the run so far, above 0. 0.05 is the classic choice.
        half_life: upper limit, in units of time, above 0; None for none.

    Examples:
        >>> HalfLifeRamp(0.05, half_life=100)(now=5_000, elapsed=100)
        0.5
        >>> HalfLifeRamp(0.05)
        HalfLifeRamp(ratio=0.05)
    """

    ratio: float
    half_life: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _settle(self, "ratio", "finite and above 0", _is_positive)
        if self.half_life is not None:
            _settle(self, "half_life", "finite and above 0, or None", _is_positive)

    def __call__(self, *, now: float, elapsed: float) -> float:
        """Return the decay integrated over the interval, exactly also across the limit."""
        check_times(now, elapsed)
        before = now - elapsed
        if self.half_life is None:
            return math.pow(before / now, _LN2 / self.ratio)
        ramped = self.half_life / self.ratio  # the time at which the limit is reached
        if before >= ramped:
            return math.exp2(-elapsed / self.half_life)
        ramp = math.pow(before / min(now, ramped), _LN2 / self.ratio)
        return ramp * math.exp2(-max(0.0, now - ramped) / self.half_life)

    def __repr__(self) -> str:
        return _spelled(self)


# ── ramps that count steps ───────────────────────────────────────────────────────────────────────


@final
@dataclass(frozen=True, repr=False)
class Polynomial:
    """Polynomial-decay averaging: step s weighs about s ** eta.

    decay = (t - 1) / (t + eta), t = now / unit     Shamir & Zhang 2013, section 4
                                                    https://arxiv.org/abs/1212.1824

    Step s weighs in proportion to Gamma(s + eta) / Gamma(s); the first update copies. `Power` with
    gamma = eta is its limit in continuous time and needs no `unit`.

    Args:
        eta: exponent, above -1. 0 is the plain mean, 3 the customary choice.
        unit: time of one step; `now` must be a whole number of them.

    Examples:
        >>> Polynomial(3.0)(now=5, elapsed=1)
        0.5
        >>> round(Polynomial(0.0)(now=8, elapsed=4), 12)  # four steps at once
        0.5
    """

    eta: float
    unit: float = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        _settle(self, "eta", _GAMMA_RULE, _is_above_minus_one)
        _settle(self, "unit", _UNIT_RULE, _is_positive)

    def __call__(self, *, now: float, elapsed: float) -> float:
        """Return the product of (t - 1) / (t + eta) over the steps of the interval."""
        first, last = steps_between(now, elapsed, self.unit)
        return self._of_step(last) if first == last else product(self, first, last)

    def _of_step(self, t: int) -> float:
        return (t - 1) / (t + self.eta)

    def _parts(self, t: FloatArray) -> tuple[FloatArray, FloatArray]:
        return (t - 1.0) / (t + self.eta), (self.eta + 1.0) / (t + self.eta)

    def __repr__(self) -> str:
        return _spelled(self)


@final
@dataclass(frozen=True, repr=False)
class CountRamp:
    """TensorFlow's warm-up by the number of updates.

    decay = min(decay, (1 + n) / (10 + n)), n = now / unit
            https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage

    The first update has decay 2 / 11: TensorFlow starts an average at its first call, which it
    counts as 0, polyak when the average is built. Before the cap holds this is `Polynomial(8)` two
    steps later, whatever `decay` says; `saturation` tells when that ends. 2 / 11 of the initial
    weights are left after one update, so give it initial weights worth averaging.

    Args:
        decay: cap, in [0, 1].
        unit: time of one step; `now` must be a whole number of them.

    Examples:
        >>> CountRamp(0.999)(now=8, elapsed=1)
        0.5
    """

    decay: float
    unit: float = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        _settle(self, "decay", "between 0 and 1", _is_share)
        _settle(self, "unit", _UNIT_RULE, _is_positive)

    @property
    def saturation(self) -> float:
        """Return the time from which the cap holds: unit (10 decay - 1) / (1 - decay).

        A run that ends before it never uses `decay`.

        Examples:
            >>> round(CountRamp(0.999).saturation)
            8990
        """
        if self.decay == 1.0:
            return math.inf
        return self.unit * max(0.0, (10.0 * self.decay - 1.0) / (1.0 - self.decay))

    def __call__(self, *, now: float, elapsed: float) -> float:
        """Return the product of min(decay, (1 + n) / (10 + n)) over the steps of the interval."""
        first, last = steps_between(now, elapsed, self.unit)
        if first == last:
            return min(self.decay, self._of_step(last))
        return product(self, first, last, high=self.decay)

    def _of_step(self, n: int) -> float:
        return (1 + n) / (10 + n)

    def _parts(self, n: FloatArray) -> tuple[FloatArray, FloatArray]:
        return (1.0 + n) / (10.0 + n), 9.0 / (10.0 + n)

    def __repr__(self) -> str:
        return _spelled(self)


@final
@dataclass(frozen=True, repr=False)
class ExponentialRamp:
    """YOLOv5's warm-up: the decay itself approaches its final value exponentially.

    decay = decay (1 - exp(-n / tau)), n = now / unit     YOLOv5, class ModelEMA
                                                          https://github.com/ultralytics/yolov5

    It follows the live weights closely for about tau steps (mean age 0.6 steps at n = 1000 with
    the usual settings) and forgets the initial weights altogether.

    Args:
        decay: final decay per step, in [0, 1]; 0.9999 in YOLOv5.
        tau: time constant of the ramp, in steps, above 0.
        unit: time of one step; `now` must be a whole number of them.

    Examples:
        >>> round(ExponentialRamp(0.9999)(now=2_000, elapsed=1), 4)
        0.6321
    """

    decay: float
    tau: float = field(default=2_000, kw_only=True)
    unit: float = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        _settle(self, "decay", "between 0 and 1", _is_share)
        _settle(self, "tau", "finite and above 0 steps", _is_positive)
        _settle(self, "unit", _UNIT_RULE, _is_positive)

    def __call__(self, *, now: float, elapsed: float) -> float:
        """Return the product of decay (1 - exp(-n / tau)) over the steps of the interval."""
        first, last = steps_between(now, elapsed, self.unit)
        return self._of_step(last) if first == last else product(self, first, last)

    def _of_step(self, n: int) -> float:
        return -self.decay * math.expm1(-n / self.tau)

    def _parts(self, n: FloatArray) -> tuple[FloatArray, FloatArray]:
        left = np.exp(-n / self.tau)
        return -self.decay * np.expm1(-n / self.tau), (1.0 - self.decay) + self.decay * left

    def __repr__(self) -> str:
        return _spelled(self)


@final
@dataclass(frozen=True, repr=False)
class InverseGamma:
    """The warm-up of k-diffusion, ema-pytorch, timm and diffusers.

    decay = clamp(1 - (1 + n / inv_gamma) ** -power, min_decay, max_decay), n = now / unit - 1
                                        https://github.com/crowsonkb/k-diffusion, class EMAWarmup

    The first update copies the live weights (unless `min_decay` says otherwise). power = 1 is
    `Polynomial(inv_gamma - 1)`, so inv_gamma = power = 1 is the plain mean; power = 2/3 reaches
    0.999 at n = 31.6 k and 0.9999 at 1 M, power = 3/4 at 10 k and 215 k.

    ema-pytorch's `update_after_step=s`, updated every step, is `After(s, InverseGamma(...))` with
    `beta` as `max_decay`: both copy up to and including update s + 1, and its update s + 1 + e
    has the decay of n = e.

    Args:
        inv_gamma: inverse gain, in steps, above 0.
        power: exponent, above 0.
        min_decay: lower limit, in [0, 1].
        max_decay: upper limit, in [min_decay, 1].
        unit: time of one step; `now` must be a whole number of them.

    Examples:
        >>> InverseGamma(power=1.0)(now=4, elapsed=1)
        0.75
    """

    inv_gamma: float = 1.0
    power: float = field(default=2.0 / 3.0, kw_only=True)
    min_decay: float = field(default=0.0, kw_only=True)
    max_decay: float = field(default=0.9999, kw_only=True)
    unit: float = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        _settle(self, "inv_gamma", "finite and above 0 steps", _is_positive)
        _settle(self, "power", "finite and above 0", _is_positive)
        _settle(self, "min_decay", "between 0 and 1", _is_share)
        _settle(
            self,
            "max_decay",
            f"between min_decay ({self.min_decay!r}) and 1",
            lambda high: self.min_decay <= high <= 1.0,
        )
        _settle(self, "unit", _UNIT_RULE, _is_positive)

    def __call__(self, *, now: float, elapsed: float) -> float:
        """Return the product of the clamped decays over the steps of the interval."""
        first, last = steps_between(now, elapsed, self.unit)
        if first == last:
            return min(self.max_decay, max(self.min_decay, self._of_step(last)))
        return product(self, first, last, low=self.min_decay, high=self.max_decay)

    def _of_step(self, t: int) -> float:
        return -math.expm1(-self.power * math.log1p((t - 1) / self.inv_gamma))

    def _parts(self, t: FloatArray) -> tuple[FloatArray, FloatArray]:
        depth = -self.power * np.log1p((t - 1.0) / self.inv_gamma)
        return -np.expm1(depth), np.exp(depth)

    def __repr__(self) -> str:
        return _spelled(self)


@final
@dataclass(frozen=True, repr=False)
class Cosine:
    """The momentum of a self-supervised teacher: from `base` to 1 along half a cosine.

    decay = 1 - (1 - base) (cos(pi now / total) + 1) / 2, and 1 after `total`
                                        Grill et al. 2020 (BYOL), https://arxiv.org/abs/2006.07733

    After `total` the average stands still. Made for teachers; an average to evaluate with should
    not fix the length of the run in advance.

    Args:
        base: decay per step at time 0, in [0, 1]; 0.996 in BYOL.
        total: time at which the decay reaches 1, above 0, in the unit of `now`.
        unit: time of one step; `now` must be a whole number of them.

    Examples:
        >>> round(Cosine(0.996, total=100)(now=50, elapsed=1), 12)
        0.998
        >>> Cosine(0.996, total=100)(now=200, elapsed=1)
        1.0
    """

    base: float
    total: float = field(kw_only=True)
    unit: float = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        _settle(self, "base", "between 0 and 1", _is_share)
        _settle(self, "total", "finite and above 0", _is_positive)
        _settle(self, "unit", _UNIT_RULE, _is_positive)

    def __call__(self, *, now: float, elapsed: float) -> float:
        """Return the product of the steps' decays, 1 for those after `total`."""
        first, last = steps_between(now, elapsed, self.unit)
        return self._of_step(last) if first == last else product(self, first, last)

    # (1 + cos x) / 2 = cos(x / 2)^2, which keeps its digits where the decay is near 1.

    def _of_step(self, n: int) -> float:
        if n * self.unit >= self.total:
            return 1.0
        return 1.0 - (1.0 - self.base) * math.cos(0.5 * math.pi * n * self.unit / self.total) ** 2

    def _parts(self, n: FloatArray) -> tuple[FloatArray, FloatArray]:
        angle = 0.5 * math.pi * n * self.unit / self.total
        dropped = (1.0 - self.base) * np.cos(angle) ** 2
        return self.base + (1.0 - self.base) * np.sin(angle) ** 2, dropped

    def __repr__(self) -> str:
        return _spelled(self)


@final
@dataclass(frozen=True, repr=False)
class After:
    """Follow the live weights until `start`, then average by `schedule` from there.

    decay = 0 while now <= start, else schedule(now - start, min(elapsed, now - start))

    The inner schedule starts its own clock at `start`, so a `Uniform`, `Power`, `Polynomial` or
    debiased `Exponential` forgets everything before. The others begin from the live weights last
    seen, as if the average had been built then. `After(start, Uniform())` is the start of SWA.

    Args:
        start: time up to which the average is a copy, at least 0.
        schedule: any schedule, plain functions too.

    Examples:
        >>> tail = After(100, Uniform())
        >>> tail(now=100, elapsed=1), tail(now=101, elapsed=1), tail(now=102, elapsed=1)
        (0.0, 0.0, 0.5)
    """

    start: float
    schedule: Schedule

    def __post_init__(self) -> None:
        _settle(self, "start", "finite and at least 0", lambda time: 0.0 <= time < math.inf)
        if isinstance(self.schedule, type) or not callable(self.schedule):
            raise ArgumentError(
                f"schedule must be a schedule or a function of now and elapsed, "
                f"got {self.schedule!r}. For example After(1_000, Uniform())."
            )

    def __call__(self, *, now: float, elapsed: float) -> float:
        """Return 0 up to `start`, afterwards the decay of `schedule` on its own clock."""
        check_times(now, elapsed)
        if now <= self.start:
            return 0.0
        since = now - self.start
        return self.schedule(now=since, elapsed=min(elapsed, since))

    def __repr__(self) -> str:
        return _spelled(self)


# ── the two names of a power profile ─────────────────────────────────────────────────────────────


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """Return the exponent of the power profile of relative width `sigma_rel`.

    The largest root of g^3 + 7 g^2 + (16 - sigma_rel^-2) g + (12 - sigma_rel^-2) = 0; Karras et
    al. 2024, https://arxiv.org/abs/2312.02696. In (0, 0.2887) that root is the only one above 0;
    beyond, there are two or none above -1, and no answer would be the answer.

    Args:
        sigma_rel: standard deviation of the profile as a share of the run, in (0, 0.2887).

    Examples:
        >>> round(gamma_from_sigma_rel(0.05), 4)
        16.9722
    """
    _check("sigma_rel", sigma_rel, _SIGMA_RULE, _is_sigma_rel, _SIGMA_ADVICE)
    sigma = float(sigma_rel)
    # In u = sigma g the coefficients stay finite for every sigma, and the cubic is positive and
    # increasing from u = 1 on: Newton's steps from there only go down, until rounding stops them.
    square, linear, constant = 7.0 * sigma, 16.0 * sigma**2 - 1.0, (12.0 * sigma**2 - 1.0) * sigma
    u = 1.0
    while True:
        value = ((u + square) * u + linear) * u + constant
        slope = (3.0 * u + 2.0 * square) * u + linear
        if not u - value / slope < u:
            return u / sigma
        u -= value / slope


def sigma_rel_from_gamma(gamma: float) -> float:
    """Return the relative width of the power profile of exponent `gamma`.

    sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)); Karras et al. 2024,
    https://arxiv.org/abs/2312.02696. Largest (0.3003) at gamma = -0.382.

    Args:
        gamma: exponent of the profile, above -1.

    Examples:
        >>> round(sigma_rel_from_gamma(6.9372), 5)
        0.1
    """
    _check("gamma", gamma, _GAMMA_RULE, _is_above_minus_one)
    return math.sqrt(gamma + 1.0) / ((gamma + 2.0) * math.sqrt(gamma + 3.0))


# ── spelling ─────────────────────────────────────────────────────────────────────────────────────


def given_fields(schedule: Any) -> dict[str, Any]:
    """Return the fields of a schedule that hold something: None means the other spelling."""
    values = {item.name: getattr(schedule, item.name) for item in fields(schedule)}
    return {name: value for name, value in values.items() if value is not None}


def _spelled(schedule: Any) -> str:
    """Return the call that makes `schedule`, without what is at its default anyway."""
    defaults = {item.name: item.default for item in fields(schedule)}
    shown = [f"{k}={v!r}" for k, v in given_fields(schedule).items() if v != defaults[k]]
    return f"{type(schedule).__name__}({', '.join(shown)})"


# ── checks ───────────────────────────────────────────────────────────────────────────────────────

_GAMMA_RULE = "finite and above -1"
_UNIT_RULE = "finite and above 0, the time of one step"
_SIGMA_RULE = f"above 0 and below {_SIGMA_REL_LIMIT:.4f} (1 / sqrt(12), the plain mean)"
_SIGMA_ADVICE = "Use Uniform() for the plain mean, or gamma between -1 and 0 to favour the past."


def _is_positive(value: float) -> bool:
    return 0.0 < value < math.inf


def _is_share(value: float) -> bool:
    return 0.0 <= value <= 1.0


def _is_above_minus_one(value: float) -> bool:
    return -1.0 < value < math.inf


def _is_sigma_rel(value: float) -> bool:
    return 0.0 < value < _SIGMA_REL_LIMIT


def _check(
    name: str, value: object, rule: str, holds: Callable[[float], bool], advice: str = ""
) -> None:
    """Raise `ArgumentError` unless `value` is a number for which `holds` is true."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (real and holds(float(value))):  # type: ignore[arg-type]  # it is Real here
        raise ArgumentError(f"{name} must be {rule}, got {value!r}. {advice}".rstrip())


def _settle(
    schedule: object, name: str, rule: str, holds: Callable[[float], bool], advice: str = ""
) -> None:
    """Check a field and store it as a plain number, so that it prints, compares and saves."""
    value = getattr(schedule, name)
    _check(name, value, rule, holds, advice)
    if type(value) not in (int, float):  # NumPy's scalars, fractions
        plain = int(value) if isinstance(value, numbers.Integral) else float(value)
        object.__setattr__(schedule, name, plain)


def _require_one(schedule: object, one: str, other: str, *, hint: str) -> None:
    values = getattr(schedule, one), getattr(schedule, other)
    if (values[0] is None) == (values[1] is None):
        raise ArgumentError(
            f"{one} or {other} must be given, one of them and not both, "
            f"got {one}={values[0]!r} and {other}={values[1]!r}. {hint}."
        )
