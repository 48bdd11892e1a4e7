"""Schedules: the weights they give, the identities between them, what is refused, saving."""

import copy
import math
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracles
from polyak import (
    After,
    ArgumentError,
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
    _schedules,
    convert,
    gamma_from_sigma_rel,
    sigma_rel_from_gamma,
)
from polyak._identities import constant_decay, schedule_from_state, schedule_state

LAST = 500
RANDOM = np.cumsum(np.random.default_rng(0).integers(1, 13, size=LAST))
INTERVALS = {
    "every step": list(range(1, LAST + 1)),
    "every 7th": list(range(7, LAST + 1, 7)),
    "random": [int(time) for time in RANDOM if time <= LAST],
}


def short(value: object) -> str:
    """A name for a test that is the same in every process: a function's address is not."""
    return "rule" if type(value) is type(short) else repr(value)[:60]


intervals = pytest.mark.parametrize("times", INTERVALS.values(), ids=INTERVALS)

LN2 = math.log(2.0)
# Largest root of the cubic of SCIENCE 4 at sigma_rel = 0.1, by NumPy's eigenvalues.
GAMMA_OF_A_TENTH = float(np.roots([1, 7, 16 - 100, 12 - 100]).real.max())


def by_steps(of_step: Callable[[int], float]) -> Callable[[int, int], float]:
    """Return what survives from t to end, for a rule that has no closed form: the plain product."""
    return lambda t, end: math.prod(of_step(n) for n in range(t + 1, end + 1))


def capped_count_ramp(t: int, end: int) -> float:
    """CountRamp(0.9): a ratio of factorials up to its saturation at 80, then powers."""
    return oracles.rising_ratio(min(t, 80) + 2, min(end, 80) + 2, 9) * 0.9 ** (
        max(end, 80) - max(t, 80)
    )


def capped_half_life(t: int, end: int) -> float:
    """HalfLifeRamp(0.1, half_life=20): a power up to 200, then an exponential."""
    ramp = (min(t, 200) / min(end, 200)) ** (LN2 / 0.1)
    return float(ramp * 0.5 ** ((max(end, 200) - max(t, 200)) / 20))


# For each schedule, the share of the average at `end` that is not younger than t (SCIENCE 3.1-3.3).
CLOSED_FORMS: list[tuple[Schedule, Callable[[int, int], float]]] = [
    (Uniform(), lambda t, end: t / end),
    (Power(gamma=0.0), lambda t, end: t / end),
    (Power(gamma=6.94), lambda t, end: (t / end) ** 7.94),
    (Power(gamma=-0.5), lambda t, end: (t / end) ** 0.5),
    (Power(sigma_rel=0.1), lambda t, end: (t / end) ** (GAMMA_OF_A_TENTH + 1)),
    (Exponential(decay=0.99, debias=False), lambda t, end: 0.99 ** (end - t)),
    (Exponential(half_life=40, debias=False), lambda t, end: 0.5 ** ((end - t) / 40)),
    (Exponential(decay=1, debias=False), lambda t, end: 1.0),
    (
        Exponential(decay=0.99),
        lambda t, end: (0.99 ** (end - t) - 0.99**end) / (1 - 0.99**end),
    ),
    (
        Exponential(half_life=40),
        lambda t, end: (0.5 ** ((end - t) / 40) - 0.5 ** (end / 40)) / (1 - 0.5 ** (end / 40)),
    ),
    (Exponential(decay=0), lambda t, end: float(t == end)),
    (Polynomial(0.0), lambda t, end: t / end),
    (Polynomial(3.0), lambda t, end: oracles.rising_ratio(t, end, 4)),
    (Polynomial(8), lambda t, end: oracles.rising_ratio(t, end, 9)),
    (Polynomial(-0.5), by_steps(lambda n: (n - 1) / (n - 0.5))),
    (Polynomial(2.5), by_steps(lambda n: (n - 1) / (n + 2.5))),
    (CountRamp(1.0), lambda t, end: oracles.rising_ratio(t + 2, end + 2, 9)),
    (CountRamp(0.9), capped_count_ramp),
    (InverseGamma(1.0, power=1.0, max_decay=1.0), lambda t, end: t / end),
    (
        InverseGamma(4.0, power=1.0, max_decay=1.0),
        lambda t, end: oracles.rising_ratio(t, end, 4),
    ),
    (InverseGamma(), by_steps(lambda n: oracles.inverse_gamma(n, 1, 2 / 3, 0, 0.9999))),
    (
        InverseGamma(20, power=0.75, min_decay=0.3, max_decay=0.85),
        by_steps(lambda n: oracles.inverse_gamma(n, 20, 0.75, 0.3, 0.85)),
    ),
    (
        ExponentialRamp(0.999, tau=50),
        by_steps(lambda n: oracles.exponential_ramp(n, 0.999, 50)),
    ),
    (HalfLifeRamp(0.05), lambda t, end: (t / end) ** (LN2 / 0.05)),
    (HalfLifeRamp(0.1, half_life=20), capped_half_life),
    (Cosine(0.9, total=300), by_steps(lambda n: oracles.cosine(n, 0.9, 300))),
    (Cosine(0.0, total=900.5), by_steps(lambda n: oracles.cosine(n, 0.0, 900.5))),
    (After(0, Uniform()), lambda t, end: t / end),
]
SCHEDULES = [schedule for schedule, _ in CLOSED_FORMS]


@intervals
@pytest.mark.parametrize(("schedule", "survives"), CLOSED_FORMS, ids=short)
def test_weights_equal_the_closed_form(
    schedule: Schedule, survives: Callable[[int, int], float], times: list[int]
) -> None:
    """The weights read off basis vectors are the closed form's, however often we update."""
    initial, weights = oracles.weights_by_basis(schedule, times)

    shares = [survives(t, times[-1]) for t in [0, *times]]
    np.testing.assert_allclose(weights, np.diff(shares), rtol=0, atol=1e-12)
    assert initial == pytest.approx(shares[0], abs=1e-12)
    assert initial + weights.sum() == pytest.approx(1.0, abs=1e-12)


@intervals
@pytest.mark.parametrize(
    "schedule",
    [
        Uniform(),
        Power(sigma_rel=0.05),
        Power(gamma=-0.9),
        Polynomial(3.0),
        Polynomial(-0.5),
        Exponential(decay=0.999),
        Exponential(half_life=1e9),
        InverseGamma(),
        HalfLifeRamp(0.05),
        HalfLifeRamp(0.05, half_life=10),
        After(3, Uniform()),
    ],
    ids=repr,
)
def test_initial_weights_are_forgotten_exactly(schedule: Schedule, times: list[int]) -> None:
    """Not nearly: the weight of the initial values is the number 0."""
    assert oracles.weights_by_basis(schedule, times)[0] == 0.0


@pytest.mark.parametrize("debias", [True, False])
def test_debiased_ema_is_the_average_that_starts_at_zero_and_is_divided(debias: bool) -> None:
    """Adam's m / (1 - decay ** t), step by step; without the division, the plain form from 0."""
    values = np.random.default_rng(1).normal(size=200)
    start = np.array(7.0 if debias else 0.0)  # a debiased average forgets where it starts
    ours = oracles.average_of(
        Exponential(decay=0.97, debias=debias), start, list(values), range(1, 201)
    )

    moment = 0.0
    for t, (value, average) in enumerate(zip(values, ours, strict=True), start=1):
        moment = 0.97 * moment + 0.03 * value
        assert average == pytest.approx(moment / (1 - 0.97**t) if debias else moment, abs=1e-13)


def test_debias_keeps_its_digits_near_decay_one() -> None:
    """A half-life far longer than the run is the plain mean; naive brackets would be 0 / 0."""
    for now, elapsed in [(2, 1), (1000, 1), (1000, 999)]:
        expected = 1 - elapsed / now
        assert Exponential(half_life=1e17)(now=now, elapsed=elapsed) == pytest.approx(
            expected, rel=1e-13, abs=0
        )


def test_debias_keeps_its_digits_over_a_long_interval() -> None:
    """What survives 100 half-lives is 2 ** -100 of it, not the rounding of 1 - 1."""
    assert Exponential(decay=0.5)(now=200, elapsed=100) == pytest.approx(
        2.0**-100, rel=1e-13, abs=0
    )


@pytest.mark.parametrize("unit", [1, 256, 0.1])
@pytest.mark.parametrize("count", [1, 9, 400])
def test_unit_only_renames_time(unit: float, count: int) -> None:
    """Counting samples or tenths gives the decays that counting steps gives."""
    pairs: list[tuple[Schedule, Schedule]] = [
        (Polynomial(3.0, unit=unit), Polynomial(3.0)),
        (CountRamp(0.9, unit=unit), CountRamp(0.9)),
        (ExponentialRamp(0.99, tau=30, unit=unit), ExponentialRamp(0.99, tau=30)),
        (InverseGamma(unit=unit), InverseGamma()),
        (Cosine(0.9, total=300 * unit, unit=unit), Cosine(0.9, total=300)),
    ]
    for scaled, plain in pairs:
        for now in (count, count + 1, 500):
            assert scaled(now=now * unit, elapsed=count * unit) == pytest.approx(
                plain(now=now, elapsed=count), rel=1e-13, abs=0
            )


# ── many steps at once ───────────────────────────────────────────────────────────────────────────

RAMPS: list[tuple[Schedule, Callable[[int], float]]] = [
    (Polynomial(0.0), lambda n: (n - 1) / n),
    (Polynomial(2.5), lambda n: (n - 1) / (n + 2.5)),
    (Polynomial(30.0), lambda n: (n - 1) / (n + 30)),
    (CountRamp(0.9), lambda n: oracles.count_ramp(n, 0.9)),
    (CountRamp(0.99999), lambda n: oracles.count_ramp(n, 0.99999)),
    (
        ExponentialRamp(0.99999, tau=2_000),
        lambda n: -0.99999 * math.expm1(-n / 2_000),
    ),
    (ExponentialRamp(1.0, tau=3), lambda n: -math.expm1(-n / 3)),
    (
        InverseGamma(1.0, power=0.9, max_decay=0.9999),
        lambda n: min(0.9999, -math.expm1(-0.9 * math.log1p(n - 1))),
    ),
    (
        InverseGamma(5e4, power=2.5, min_decay=0.5, max_decay=1.0),
        lambda n: max(0.5, -math.expm1(-2.5 * math.log1p((n - 1) / 5e4))),
    ),
    (InverseGamma(1e6, power=1.0, max_decay=1.0), lambda n: (n - 1) / (n - 1 + 1e6)),
    (
        Cosine(0.999, total=60_000),
        lambda n: 1 - 0.001 * math.cos(math.pi * n / 120_000) ** 2 if n < 60_000 else 1.0,
    ),
]
RANGES = [(2, 33), (2, 34), (3, 1_023), (3, 1_024), (900, 2_500), (1_024, 100_000), (9, 100_000)]


@pytest.mark.parametrize(("first", "last"), RANGES)
@pytest.mark.parametrize(("schedule", "of_step"), RAMPS, ids=short)
def test_many_steps_at_once_are_the_product_of_single_steps(
    schedule: Schedule, of_step: Callable[[int], float], first: int, last: int
) -> None:
    """One update over an interval equals its steps one by one, to 1e-13 of the result."""
    log = math.fsum(math.log(of_step(n)) for n in range(first, last + 1))

    decay = schedule(now=last, elapsed=last - first + 1)

    if log < -690:  # below what float64 can hold with all its digits
        assert decay < 1e-299
    else:
        assert decay == pytest.approx(math.exp(log), rel=1e-13, abs=0)


def test_a_million_steps_at_once_are_still_the_product() -> None:
    """The integral and the sum agree when there really are a million terms."""
    log = math.fsum(math.log1p(-(n ** (-2 / 3))) for n in range(500_000, 1_500_000))
    assert InverseGamma(max_decay=1.0)(now=1_499_999, elapsed=1_000_000) == pytest.approx(
        math.exp(log), rel=1e-13, abs=0
    )
    log = math.fsum(math.log((1 + n) / (10 + n)) for n in range(1, 1_000_001))
    assert CountRamp(1.0)(now=1_000_000, elapsed=1_000_000) == pytest.approx(
        math.exp(log), rel=1e-13, abs=0
    )


@pytest.mark.parametrize("eta", [0, 1, 3, 8])
@pytest.mark.parametrize(
    ("before", "now"), [(1, 10**9), (5_000, 10**9), (10**9 - 7, 10**9), (10**8, 10**9), (2, 3_000)]
)
def test_a_billion_steps_telescope(eta: int, before: int, now: int) -> None:
    """Polynomial decay is a ratio of factorials, known exactly at any length; so is CountRamp's."""
    assert Polynomial(eta)(now=now, elapsed=now - before) == pytest.approx(
        oracles.rising_ratio(before, now, eta + 1), rel=1e-13, abs=0
    )
    assert CountRamp(1.0)(now=now - 2, elapsed=now - before - 1) == pytest.approx(
        oracles.rising_ratio(before + 1, now, 9), rel=1e-13, abs=0
    )


def test_a_zero_step_makes_the_product_exactly_zero() -> None:
    """An interval that holds the copying first step copies, however long it is."""
    for schedule in (Polynomial(3.0), InverseGamma(), CountRamp(0.0), ExponentialRamp(0.0)):
        for now in (1, 10, 40, 5_000, 10**9):
            assert schedule(now=now, elapsed=now) == 0.0


def test_work_does_not_grow_with_the_number_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A billion steps cost a few thousand evaluations of the formula."""
    evaluated = 0
    for kind in (CountRamp, InverseGamma):
        parts = kind._parts

        def counted(self: Any, n: Any, parts: Any = parts) -> Any:
            nonlocal evaluated
            evaluated += n.size
            return parts(self, n)

        monkeypatch.setattr(kind, "_parts", counted)
    CountRamp(1.0)(now=10**9, elapsed=10**9)
    InverseGamma(max_decay=1.0)(now=10**9, elapsed=10**9 - 1)
    assert 0 < evaluated < 10_000


def test_fast_single_step_equals_its_vector_twin() -> None:
    """Each ramp is written twice, for one step and for arrays; both say the same."""
    n = np.arange(1.0, 3_000.0)
    for schedule, _ in RAMPS:
        kept, dropped = schedule._parts(n)  # type: ignore[attr-defined]
        single = [schedule._of_step(int(step)) for step in n]  # type: ignore[attr-defined]
        np.testing.assert_allclose(kept, single, rtol=1e-14, atol=1e-16)
        np.testing.assert_allclose(kept + dropped, 1.0, rtol=1e-15)


# ── identities (SCIENCE 3.3 and test 1) ──────────────────────────────────────────────────────────


@pytest.mark.parametrize("gain", [0.5, 1.0, 4.0, 17.0])
def test_inverse_gamma_of_power_one_is_polynomial_decay(gain: float) -> None:
    one = InverseGamma(gain, power=1.0, max_decay=1.0)
    other = Polynomial(gain - 1.0)
    for now in range(1, 2_000):
        assert one(now=now, elapsed=1) == pytest.approx(other(now=now, elapsed=1), abs=1e-15)


def test_count_ramp_is_polynomial_8_two_steps_later() -> None:
    """Before its cap; the initial weights play the samples 1 and 2 of the polynomial."""
    initial, ramp = oracles.weights_by_basis(CountRamp(0.999), range(1, LAST + 1))
    _, polynomial = oracles.weights_by_basis(Polynomial(8), range(1, LAST + 3))

    np.testing.assert_allclose(ramp, polynomial[2:], rtol=0, atol=1e-12)
    assert initial == pytest.approx(polynomial[:2].sum(), abs=1e-12)


@pytest.mark.parametrize(("ratio", "sigma_rel"), [(0.05, 0.0629), (0.09, 0.1024)])
def test_half_life_ramp_is_a_power_function(ratio: float, sigma_rel: float) -> None:
    """Against the published width, from the weights at 20 000 steps (SCIENCE test 1)."""
    times = np.arange(1, 20_001)
    shares = (times / 20_000) ** (LN2 / ratio)
    schedule = HalfLifeRamp(ratio)
    weights = np.diff(shares, prepend=0.0)
    decays = np.array([schedule(now=int(t), elapsed=1) for t in times[1:]])
    np.testing.assert_allclose(decays, shares[:-1] / shares[1:], rtol=1e-12)

    mean = weights @ times
    spread = math.sqrt(weights @ (times - mean) ** 2) / 20_000
    assert spread == pytest.approx(sigma_rel, abs=1e-4)
    assert sigma_rel_from_gamma(LN2 / ratio - 1) == pytest.approx(sigma_rel, abs=1e-4)


def test_half_life_halves() -> None:
    """After its limit a ramp halves a weight in one half-life, and so does an exponential."""
    assert HalfLifeRamp(0.05, half_life=100)(now=5_000, elapsed=100) == 0.5
    assert Exponential(half_life=100, debias=False)(now=5_000, elapsed=100) == 0.5


@pytest.mark.parametrize(
    ("power", "decay", "step"), [(2 / 3, 0.999, 31_622), (0.75, 0.999, 9_999), (2 / 3, 0.9999, 1e6)]
)
def test_inverse_gamma_reaches_the_published_decays(power: float, decay: float, step: int) -> None:
    schedule = InverseGamma(power=power, max_decay=1.0)
    assert schedule(now=step, elapsed=1) == pytest.approx(decay, abs=1e-7)


@pytest.mark.parametrize(("decay", "step"), [(0.99, 890), (0.999, 8_990), (0.9999, 89_990)])
def test_count_ramp_saturates_where_its_formula_says(decay: float, step: int) -> None:
    """The cap holds from there on and not one step sooner."""
    ramp = CountRamp(decay)
    assert ramp.saturation == pytest.approx(step, rel=1e-9, abs=0)
    assert ramp(now=step - 1, elapsed=1) < decay
    assert ramp(now=step, elapsed=1) == pytest.approx(decay, rel=1e-15, abs=0)
    assert ramp(now=step + 1, elapsed=1) == decay
    assert CountRamp(decay, unit=256).saturation == pytest.approx(256 * step, rel=1e-9, abs=0)


def test_count_ramp_without_cap_never_saturates() -> None:
    assert CountRamp(1.0).saturation == math.inf
    assert CountRamp(0.05).saturation == 0.0


# ── the two names of a power profile ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("sigma_rel", "gamma"),
    [
        (0.01, 96.995),
        (0.05, 16.9722),
        (0.10, 6.93720),
        (0.15, 3.55787),
        (0.25, 0.719824),
        (0.28, 0.169344),
    ],
)
def test_sigma_rel_gives_the_published_gamma(sigma_rel: float, gamma: float) -> None:
    assert gamma_from_sigma_rel(sigma_rel) == pytest.approx(gamma, rel=5e-6)
    assert Power(sigma_rel=sigma_rel).exponent == gamma_from_sigma_rel(sigma_rel) + 1


@given(st.floats(min_value=1e-6, max_value=0.28867))
def test_sigma_rel_and_gamma_are_inverse(sigma_rel: float) -> None:
    gamma = gamma_from_sigma_rel(sigma_rel)
    assert gamma > 0
    assert sigma_rel_from_gamma(gamma) == pytest.approx(sigma_rel, rel=1e-13, abs=0)


def test_sigma_rel_is_the_width_of_the_profile() -> None:
    """Standard deviation of a time drawn with density (g + 1) t^g on [0, 1], by quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    t = 0.5 * (nodes + 1.0)
    for gamma in (0.0, 2.0, 16.97):
        density = 0.5 * weights * (gamma + 1.0) * t**gamma
        mean = density @ t
        assert sigma_rel_from_gamma(gamma) == pytest.approx(
            math.sqrt(density @ (t - mean) ** 2), rel=1e-10, abs=0
        )


# ── lengths of an exponential ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("decay", [0.1716, 0.5, 0.9, 0.999, 0.99999])
def test_exponential_from_each_of_its_lengths(decay: float) -> None:
    """SCIENCE 3.1, read from right to left."""
    cutoff = 2 * math.asin((1 - decay) / (2 * math.sqrt(decay)))  # 1 - cos w = (1 - d)^2 / 2d

    for same in (
        Exponential.from_noise_window((1 + decay) / (1 - decay)),
        Exponential.from_mean_age(decay / (1 - decay)),
        Exponential.from_cutoff(cutoff),
    ):
        assert same.decay == pytest.approx(decay, rel=1e-11, abs=0)
        assert same.debias
    assert not Exponential.from_mean_age(10, debias=False).debias


def test_slowest_filter_with_a_cutoff() -> None:
    """At pi, decay is 3 - 2 sqrt(2); a noise window or mean age of nothing is no average at all."""
    assert Exponential.from_cutoff(math.pi).decay == pytest.approx(
        3 - 2 * math.sqrt(2), rel=1e-14, abs=0
    )
    assert Exponential.from_noise_window(1).decay == 0.0
    assert Exponential.from_mean_age(0).decay == 0.0


def test_decay_and_half_life_spell_the_same_exponential() -> None:
    """0.999 has a half-life of 692.8 steps (SCIENCE 3.1), and back."""
    in_half_life = Exponential(decay=0.999, debias=False).in_half_life()
    assert in_half_life.half_life == pytest.approx(692.8005, rel=1e-6)
    assert in_half_life.in_decay().decay == pytest.approx(0.999, rel=1e-15, abs=0)
    assert in_half_life.debias is False
    assert in_half_life.rate == pytest.approx(-math.log(0.999), rel=1e-15, abs=0)
    assert in_half_life.in_half_life() is in_half_life


def test_constant_decay_is_the_exponentials_only() -> None:
    assert constant_decay(Exponential(decay=0.99)) == 0.99
    assert constant_decay(After(3, Exponential(half_life=1))) == 0.5
    for schedule in (Power(gamma=1), CountRamp(0.9), Uniform(), After(3, Uniform())):
        assert constant_decay(schedule) is None
    assert constant_decay(lambda *, now, elapsed: 0.9**elapsed) is None


# ── starting later ───────────────────────────────────────────────────────────────────────────────


def test_after_copies_until_start_and_then_forgets_everything_before() -> None:
    """The plain mean of a tail: 0 on all before, also when an update steps over the start."""
    for times in ([*range(1, 21)], [3, 6, 9, 12, 15, 18, 20]):
        initial, weights = oracles.weights_by_basis(After(10, Uniform()), times)
        gaps = [now - max(before, 10) for before, now in pairwise([0, *times])]
        assert initial == 0.0
        np.testing.assert_allclose(weights, [max(0, gap) / 10 for gap in gaps], atol=1e-15)
    for now in (1, 5, 10):
        assert After(10, Exponential(decay=1, debias=False))(now=now, elapsed=1) == 0.0


def test_after_starts_a_plain_ema_from_the_weights_last_seen() -> None:
    """It fades from `start`, not from the update before it."""
    times = [4, 8, 12, 16]
    initial, weights = oracles.weights_by_basis(
        After(10, Exponential(decay=0.9, debias=False)), times
    )
    expected = [0.0, 0.9**6, 0.9**4 - 0.9**6, 1 - 0.9**4]
    assert initial == 0.0
    np.testing.assert_allclose(weights, expected, atol=1e-15)


def test_after_gives_the_inner_schedule_its_own_clock() -> None:
    calls = []

    def spy(*, now: float, elapsed: float) -> float:
        calls.append((now, elapsed))
        return 0.5

    delayed = After(10, spy)
    for now, elapsed in [(4, 4), (10, 6), (11, 1), (17, 6), (13, 5)]:
        delayed(now=now, elapsed=elapsed)
    assert calls == [(1, 1), (7, 6), (3, 3)]


def test_after_with_inverse_gamma_is_the_update_after_step_of_others() -> None:
    """SYSTEMS S4: copies, then 1 - (1 + e) ** (-2/3) with e = step - 100 - 1, capped."""
    schedule = After(100, InverseGamma(power=2 / 3, max_decay=0.999))
    for step in range(1, 40_000, 7):
        e = max(0, step - 100 - 1)
        expected = 0.0 if e == 0 else min(0.999, max(0.0, 1 - (1 + e / 1.0) ** (-2 / 3)))
        assert schedule(now=step, elapsed=1) == pytest.approx(expected, abs=1e-15)
    assert schedule(now=101, elapsed=1) == 0.0
    assert schedule(now=102, elapsed=1) == pytest.approx(1 - 2 ** (-2 / 3), abs=1e-15)


def test_tensorflow_reference_values() -> None:
    """SYSTEMS S3, measured in TensorFlow 2.21: starts at its first value, then +[1, 2] a step.

    TensorFlow's first `apply` with num_updates=0 only copies; that is building the average, at
    now = 0. Its num_updates=n is the update at now = n.
    """
    step = np.array([1.0, 2.0])
    moved = [n * step for n in range(1, 6)]
    plain = Exponential(decay=0.99, debias=False)

    ours = oracles.average_of(plain, moved[0], moved[1:], range(1, 5))
    expected = [[1.01, 2.02], [1.0299, 2.0598], [1.0596010, 2.1192019], [1.0990049, 2.1980097]]
    np.testing.assert_allclose(ours, expected, atol=1e-6)

    ours = oracles.average_of(CountRamp(0.99), moved[0], moved[1:], range(1, 5))
    expected = [
        [1.8181818, 3.6363635],
        [2.7045455, 5.4090910],
        [3.6013987, 7.2027974],
        [4.5004997, 9.0009994],
    ]
    np.testing.assert_allclose(ours, expected, atol=1e-6)

    ours = oracles.average_of(plain, 0.0 * step, moved[:3], range(1, 4))
    np.testing.assert_allclose(
        ours, [[0.01, 0.02], [0.0299, 0.0598], [0.0596010, 0.1192019]], atol=1e-6
    )


# ── one law, several names ───────────────────────────────────────────────────────────────────────


@intervals
@pytest.mark.parametrize(
    ("schedule", "to"),
    [
        (InverseGamma(4.0, power=1.0, max_decay=1.0), Polynomial),
        (InverseGamma(1.0, power=1, max_decay=1), Uniform),
        (InverseGamma(1.0, power=1, max_decay=1), Power),
        (Polynomial(3.0), InverseGamma),
        (Polynomial(0.0), Uniform),
        (Polynomial(0.0), Power),
        (Polynomial(0), HalfLifeRamp),
        (Uniform(), Polynomial),
        (Uniform(), Power),
        (Uniform(), InverseGamma),
        (Uniform(), HalfLifeRamp),
        (Power(gamma=0.0), Uniform),
        (Power(gamma=0.0), Polynomial),
        (Power(sigma_rel=0.1), HalfLifeRamp),
        (HalfLifeRamp(0.05), Power),
        (HalfLifeRamp(LN2), Uniform),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_conversion_is_the_same_average(
    schedule: Schedule, to: type[Schedule], times: list[int]
) -> None:
    """Another class, the same weights at any interval, and back again."""
    same = convert(schedule, to)
    assert type(same) is to
    ours, theirs = (oracles.weights_by_basis(s, times)[1] for s in (schedule, same))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)
    back = convert(same, type(schedule))
    np.testing.assert_allclose(oracles.weights_by_basis(back, times)[1], ours, rtol=0, atol=1e-13)


def test_conversion_keeps_unit_and_identity() -> None:
    assert convert(Polynomial(3.0, unit=256), InverseGamma) == InverseGamma(
        4.0, power=1.0, max_decay=1.0, unit=256
    )
    power = Power(sigma_rel=0.05)
    assert convert(power, Power) is power


@pytest.mark.parametrize(
    ("schedule", "to", "expected", "distance"),
    [
        # L1 distance of the weights at 500 steps; 0.005 is measured in SCIENCE 3.3.
        (Polynomial(6.94), Power, Power(gamma=6.94), 0.006),
        (Power(gamma=6.94), Polynomial, Polynomial(6.94), 0.006),
        (Power(gamma=1), InverseGamma, InverseGamma(2.0, power=1, max_decay=1), 0.0015),
        (CountRamp(0.999, unit=1), Polynomial, Polynomial(8.0), 0.02),
        (CountRamp(0.999), Power, Power(gamma=8.0), 0.04),
        (Polynomial(8), CountRamp, CountRamp(1.0), 0.04),
    ],
    ids=repr,
)
def test_conversion_in_the_limit_only_when_asked(
    schedule: Schedule, to: type[Schedule], expected: Schedule, distance: float
) -> None:
    with pytest.raises(ArgumentError, match=r"express exactly.*exact=False"):
        convert(schedule, to)
    close = convert(schedule, to, exact=False)
    assert close == expected
    ours, theirs = (oracles.weights_by_basis(s, range(1, LAST + 1))[1] for s in (schedule, close))
    assert 1e-6 < np.abs(ours - theirs).sum() < distance


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("schedule", "to"),
    [
        (Exponential(decay=0.9), Power),
        (HalfLifeRamp(0.05, half_life=100), Power),
        (InverseGamma(), Polynomial),
        (InverseGamma(power=1), Polynomial),  # its cap of 0.9999
        (Uniform(), Exponential),
        (Power(gamma=1), Uniform),
        (Uniform(), After),
        (After(3, Uniform()), Uniform),
        (lambda *, now, elapsed: 0.9, Power),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_conversion_without_an_identity_is_refused(
    schedule: Schedule, to: type[Schedule], exact: bool
) -> None:
    with pytest.raises(ArgumentError, match=r"schedule must be one that \w+ can express"):
        convert(schedule, to, exact=exact)


def test_conversion_to_something_else_is_refused() -> None:
    with pytest.raises(ArgumentError, match="to must be a schedule class"):
        convert(Uniform(), float)


# ── values: print, compare, save ─────────────────────────────────────────────────────────────────

positive = st.floats(min_value=1e-6, max_value=1e12)
share = st.floats(min_value=0.0, max_value=1.0)
gammas = st.floats(min_value=-0.99, max_value=200.0)
units = st.one_of(st.integers(1, 10**6), positive)
named = st.one_of(
    st.builds(Power, sigma_rel=st.floats(min_value=1e-3, max_value=0.288)),
    st.builds(Power, gamma=gammas),
    st.builds(Exponential, decay=st.floats(0.0, 0.9999999), debias=st.booleans()),
    st.builds(Exponential, half_life=positive, debias=st.booleans()),
    st.just(Exponential(decay=1.0, debias=False)),
    st.just(Uniform()),
    st.builds(Polynomial, gammas, unit=units),
    st.builds(CountRamp, share, unit=units),
    st.builds(ExponentialRamp, share, tau=positive, unit=units),
    st.builds(
        InverseGamma,
        positive,
        power=positive,
        min_decay=st.floats(0.0, 0.4),
        max_decay=st.floats(0.4, 1.0),
        unit=units,
    ),
    st.builds(HalfLifeRamp, positive, half_life=st.none() | positive),
    st.builds(Cosine, share, total=positive, unit=units),
)
schedules = st.recursive(named, lambda inner: st.builds(After, positive, inner), max_leaves=3)


@given(schedules)
def test_a_schedule_survives_saving_printing_copying_and_pickling(schedule: Schedule) -> None:
    state = schedule_state(schedule)
    assert schedule_from_state(state) == schedule
    assert eval(repr(schedule), vars(_schedules)) == schedule
    assert copy.deepcopy(schedule) == schedule == pickle.loads(pickle.dumps(schedule))
    assert hash(copy.deepcopy(schedule)) == hash(schedule)
    assert plain(state)


def plain(value: object) -> bool:
    """Whether a state holds nothing but what `weights_only` loading allows."""
    if type(value) is dict:
        return all(type(key) is str and plain(item) for key, item in value.items())
    return type(value) in (str, int, float, bool)


@given(named, st.integers(1, 10**6), st.integers(1, 10**6))
def test_every_decay_is_a_share(schedule: Schedule, before: int, steps: int) -> None:
    """Between 0 and 1 at any interval, from the start and from later."""
    unit = getattr(schedule, "unit", 1)
    for now in (steps, before + steps):
        assert 0.0 <= schedule(now=now * unit, elapsed=steps * unit) <= 1.0
        assert 0.0 <= After(unit, schedule)(now=now * unit, elapsed=steps * unit) <= 1.0


@given(named, st.integers(1, 3_000), st.integers(1, 3_000), st.integers(1, 3_000))
def test_two_updates_forget_as_much_as_one_over_both(
    schedule: Schedule, start: int, one: int, two: int
) -> None:
    """Time composes: decay(a -> c) = decay(a -> b) decay(b -> c), for every schedule."""
    unit = getattr(schedule, "unit", 1)
    middle, end = (start + one) * unit, (start + one + two) * unit
    whole = schedule(now=end, elapsed=(one + two) * unit)
    first = schedule(now=middle, elapsed=one * unit)
    second = schedule(now=end, elapsed=two * unit)
    # The tolerance is for exponents of up to ln 2 / 1e-6, which magnify the rounding of a ratio.
    assert whole == pytest.approx(first * second, rel=1e-9, abs=1e-250)


def test_prints_what_was_given() -> None:
    assert repr(Power(sigma_rel=0.05)) == "Power(sigma_rel=0.05)"
    assert repr(Power(gamma=2)) == "Power(gamma=2)"
    assert repr(Exponential(half_life=100)) == "Exponential(half_life=100)"
    assert repr(Exponential(decay=0.9, debias=False)) == "Exponential(decay=0.9, debias=False)"
    assert repr(After(5, Uniform())) == "After(start=5, schedule=Uniform())"
    assert repr(InverseGamma(power=0.75)) == "InverseGamma(power=0.75)"


def test_numpy_numbers_are_stored_as_plain_ones() -> None:
    eta: Any = np.float32(0.5)
    unit: Any = np.int64(4)
    schedule = Polynomial(eta, unit=unit)
    assert schedule_state(schedule) == {"name": "Polynomial", "eta": 0.5, "unit": 4}
    assert plain(schedule_state(schedule))


def test_a_schedule_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Power(gamma=1).gamma = 2  # type: ignore[misc]


def test_functions_and_own_classes_are_opaque() -> None:
    """Their code is not saved; loading asks for the same one, also behind an After."""

    def own(*, now: float, elapsed: float) -> float:
        return math.pow(0.9, elapsed)

    assert schedule_state(own) == {"name": "opaque"}
    assert schedule_from_state({"name": "opaque"}, opaque=own) is own
    nested = After(3, After(4, own))
    assert schedule_from_state(schedule_state(nested), opaque=own) == nested
    for state in (schedule_state(own), schedule_state(nested)):
        with pytest.raises(ArgumentError, match="Pass the same one"):
            schedule_from_state(state)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"name": "Nosuch"}, "one of After.*'Nosuch'"),
        ({}, "one of After"),
        ({"name": None}, "one of After"),
        ({"name": ["Power"]}, "one of After"),
        ("Power", "one of After.*'Power'"),
        ({"name": "Power", "sigma": 0.05}, r"unknown \['sigma'\]"),
        ({"name": "Power"}, "one of them and not both"),
        ({"name": "Power", "sigma_rel": "0.05"}, "sigma_rel must be"),
        ({"name": "Power", "gamma": math.nan}, "gamma must be"),
        ({"name": "Cosine", "base": 0.9}, r"missing \['total'\]"),
        ({"name": "Uniform", 3: 4}, r"unknown \['3'\]"),
        ({"name": "After", "start": 3, "schedule": {"name": "x"}}, "one of After"),
        ({"name": "After", "start": 3, "schedule": None}, "one of After"),
        ({"name": "Exponential", "decay": 0.9, "debias": 1}, "debias must be True or False"),
    ],
)
def test_a_bad_state_is_refused(state: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        schedule_from_state(state)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────

NAN, INF = math.nan, math.inf
BAD: list[tuple[Callable[..., object], dict[str, Any], str]] = [
    (Power, {}, "sigma_rel or gamma must be given"),
    (Power, {"sigma_rel": 0.05, "gamma": 16.97}, "sigma_rel or gamma must be given"),
    *((Power, {"sigma_rel": bad}, "sigma_rel must be") for bad in (0, -0.1, 0.2887, 0.3, 1, NAN)),
    *((Power, {"gamma": bad}, "gamma must be") for bad in (-1, -2, INF, NAN, "1", True, 1j)),
    (Exponential, {}, "decay or half_life must be given"),
    (Exponential, {"decay": 0.9, "half_life": 3}, "decay or half_life must be given"),
    *((Exponential, {"decay": bad}, "decay must be") for bad in (-0.1, 1.1, NAN, INF, "x")),
    (Exponential, {"decay": 1}, r"decay must be below 1.*Use Uniform\(\).*debias=False"),
    *((Exponential, {"half_life": bad}, "half_life must be") for bad in (0, -3, INF, NAN)),
    (Exponential, {"decay": 0.9, "debias": None}, "debias must be True or False"),
    *((Exponential.from_noise_window, {"samples": n}, "samples must") for n in (0.5, NAN, INF)),
    *((Exponential.from_mean_age, {"age": age}, "age must be") for age in (-1, NAN, INF)),
    *(
        (Exponential.from_cutoff, {"radians_per_step": w}, "radians_per_step must be above 0")
        for w in (0, -1, 3.15, NAN)
    ),
    *((Polynomial, {"eta": bad}, "eta must be") for bad in (-1, NAN, INF)),
    *((CountRamp, {"decay": bad}, "decay must be") for bad in (-0.1, 1.1, NAN)),
    *((ExponentialRamp, {"decay": bad}, "decay must be") for bad in (-0.1, 1.1, NAN)),
    *((ExponentialRamp, {"decay": 0.9, "tau": bad}, "tau must be") for bad in (0, -1, NAN, INF)),
    *((InverseGamma, {"inv_gamma": bad}, "inv_gamma must be") for bad in (0, -1, NAN, INF)),
    *((InverseGamma, {"power": bad}, "power must be") for bad in (0, -1, NAN, INF)),
    *((InverseGamma, {"min_decay": bad}, "min_decay must be") for bad in (-0.1, 1.1, NAN)),
    *((InverseGamma, {"max_decay": bad}, "max_decay must be") for bad in (-0.1, 1.1, NAN)),
    (InverseGamma, {"min_decay": 0.5, "max_decay": 0.4}, r"max_decay must.*min_decay \(0.5\)"),
    *((HalfLifeRamp, {"ratio": bad}, "ratio must be") for bad in (0, -1, NAN, INF)),
    *((HalfLifeRamp, {"ratio": 1, "half_life": bad}, "half_life must") for bad in (0, -1, NAN)),
    *((Cosine, {"base": bad, "total": 9}, "base must be") for bad in (-0.1, 1.1, NAN)),
    *((Cosine, {"base": 0.9, "total": bad}, "total must be") for bad in (0, -1, NAN, INF)),
    *(
        (kind, {**needed, "unit": bad}, "unit must be")
        for kind, needed in (
            (Polynomial, {"eta": 1}),
            (CountRamp, {"decay": 0.9}),
            (ExponentialRamp, {"decay": 0.9}),
            (InverseGamma, {}),
            (Cosine, {"base": 0.9, "total": 9}),
        )
        for bad in (0, -1, NAN, INF)
    ),
    *((After, {"start": bad, "schedule": Uniform()}, "start must") for bad in (-1, NAN, INF)),
    *((After, {"start": 1, "schedule": s}, "schedule must be") for s in (None, 0.9, Uniform)),
    *((gamma_from_sigma_rel, {"sigma_rel": s}, "sigma_rel must") for s in (0, -1, 0.2887, NAN)),
    *((sigma_rel_from_gamma, {"gamma": gamma}, "gamma must be") for gamma in (-1, -2, NAN, INF)),
]


@pytest.mark.parametrize(("call", "arguments", "says"), BAD)
def test_a_value_from_which_no_average_can_be_made_is_refused(
    call: Callable[..., object], arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(ArgumentError, match=says) as caught:
        call(**arguments)
    assert ", got " in str(caught.value)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_decay_without_half_life_is_refused(decay: float) -> None:
    with pytest.raises(ArgumentError, match=r"decay must be above 0 and below 1.*got"):
        Exponential(decay=decay, debias=False).in_half_life()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize(
    ("now", "elapsed"), [(0, 0), (3, 0), (3, -1), (3, 4), (NAN, 1), (3, NAN), (INF, 1), (-1, -1)]
)
def test_times_that_cannot_be_are_refused(schedule: Schedule, now: float, elapsed: float) -> None:
    with pytest.raises(ArgumentError, match=r"elapsed must be above 0 and at most now"):
        schedule(now=now, elapsed=elapsed)


@pytest.mark.parametrize(
    "schedule",
    [Polynomial(1), CountRamp(0.9), ExponentialRamp(0.9), InverseGamma(), Cosine(0.9, total=9)],
    ids=repr,
)
@pytest.mark.parametrize(("now", "elapsed"), [(2.5, 1), (3, 0.5), (512.5, 512.5), (3, 1e-12)])
def test_a_ramp_refuses_parts_of_a_step(schedule: Schedule, now: float, elapsed: float) -> None:
    """And says which `unit` would make them whole."""
    with pytest.raises(ArgumentError, match=rf"whole number of steps.*unit={elapsed!r}"):
        schedule(now=now, elapsed=elapsed)
