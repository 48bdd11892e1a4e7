"""Profiles: the weights of a long run to full precision, and the lengths read off them."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import oracles
from polyak import (
    ArgumentError,
    CountRamp,
    Exponential,
    ExponentialRamp,
    InverseGamma,
    Polynomial,
    Power,
    Profile,
    Schedule,
    Uniform,
    _profiles,
    profile,
)

DECAY = 0.999
SETTLED = range(1, 40_001)  # 0.999 ** 40 000 = 4e-18


@pytest.fixture(scope="module")
def ema() -> Profile:
    return profile(Exponential(decay=DECAY, debias=False), SETTLED)


@pytest.mark.parametrize(
    "times", [[1], [1, 2, 3, 4], [3, 7, 8, 20, 21, 40]], ids=["one", "steps", "uneven"]
)
@pytest.mark.parametrize(
    "schedule",
    [
        Power(gamma=2.0),
        Exponential(decay=0.9, debias=False),
        CountRamp(0.5),
        InverseGamma(),
        lambda *, now, elapsed: 0.7**elapsed if now < 10 else 1.0,
    ],
    ids=["power", "ema", "count ramp", "inverse gamma", "function"],
)
def test_profile_is_what_basis_vectors_say(schedule: Schedule, times: list[float]) -> None:
    """For plain functions too."""
    found = profile(schedule, times)
    initial, weights = oracles.weights_by_basis(schedule, times)

    np.testing.assert_array_equal(found.times, times)
    np.testing.assert_allclose(found.weights, weights, rtol=1e-12, atol=1e-16)
    assert found.initial == pytest.approx(initial, rel=1e-12, abs=1e-16)


def test_every_weight_of_a_long_run_is_right_to_twelve_digits() -> None:
    """At 200 000 updates, against closed forms; 3e-16 is the rounding of its decays."""
    n = 200_000
    t = np.arange(1, n + 1, dtype=np.float64)
    closed: dict[Schedule, npt.NDArray[np.float64]] = {
        Uniform(): np.full(n, 1 / n),
        Power(gamma=1.0): (2 * t - 1) / n**2,
        Power(gamma=2.0): (3 * t**2 - 3 * t + 1) / n**3,
        Polynomial(1.0): 2 * t / (n * (n + 1)),
        Exponential(decay=0.9999, debias=False): -math.expm1(math.log(0.9999))
        * np.exp((n - t) * math.log(0.9999)),
        Exponential(half_life=1e5): -math.expm1(-math.log(2) / 1e5)
        * np.exp2((t - n) / 1e5)
        / -math.expm1(-2 * math.log(2)),
    }
    for schedule, expected in closed.items():
        found = profile(schedule, t)
        np.testing.assert_allclose(
            found.weights, expected, rtol=1e-12, atol=3e-16, err_msg=repr(schedule)
        )
        np.testing.assert_allclose(np.cumsum(found.weights), np.cumsum(expected), atol=1e-12)
        assert found.weights.sum() + found.initial == pytest.approx(1.0, abs=1e-12)


def test_a_million_times_sum_to_one() -> None:
    found = profile(Power(sigma_rel=0.05), np.arange(1, 1_000_001))
    assert found.weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert found.initial == 0.0
    # Karras et al. 2024: the mean age of the continuous profile is t / (gamma + 2); the tracker
    # holds the weights still for a step, which makes it younger by half a step.
    assert found.mean_age == pytest.approx(1e6 / 18.9722 - 0.5, rel=1e-5)


def test_lengths_of_a_settled_ema(ema: Profile) -> None:
    """The table of SCIENCE 3.1 at 0.999: 999, 1999, 692.8, 1.0005e-3."""
    assert ema.mean_age == pytest.approx(DECAY / (1 - DECAY), rel=1e-12, abs=0)
    assert ema.noise_window == pytest.approx((1 + DECAY) / (1 - DECAY), rel=1e-12, abs=0)
    assert ema.half_life == pytest.approx(math.log(2) / -math.log(DECAY), abs=2e-4)
    cutoff = 2 * math.asin((1 - DECAY) / (2 * math.sqrt(DECAY)))
    assert ema.cutoff == pytest.approx(cutoff, rel=1e-12, abs=0)
    assert cutoff == pytest.approx(1.0005e-3, rel=1e-6)


def test_lengths_of_a_plain_mean() -> None:
    """Of n steps: mean age (n - 1) / 2, window n, half of the weight in the younger half."""
    mean = profile(Uniform(), range(1, 1_001))
    assert mean.mean_age == pytest.approx(499.5, rel=1e-12, abs=0)
    assert mean.noise_window == pytest.approx(1_000, rel=1e-12, abs=0)
    assert mean.half_life == pytest.approx(500, rel=1e-12, abs=0)
    # |sin(n w / 2) / (n sin(w / 2))|^2 = 1 / 2 at n w / 2 = 1.3915574, but for O(1 / n^2).
    assert mean.cutoff == pytest.approx(2 * 1.3915573782515103 / 1_000, rel=1e-6)


def test_lengths_of_a_power_function() -> None:
    """Half-life: half of the weight lies before end * 2 ** (-1 / (gamma + 1))."""
    found = profile(Power(gamma=3.0), range(1, 100_001))
    assert found.half_life == pytest.approx(1e5 * (1 - 2 ** (-1 / 4)), rel=1e-9, abs=0)
    assert found.mean_age == pytest.approx(1e5 / 5 - 0.5, rel=1e-6)


def test_updating_less_often_makes_the_average_younger() -> None:
    """SCIENCE test 3c: by decay/(1-decay) - k decay^k/(1-decay^k), about (k - 1) / 2 steps."""
    for every, younger in [(4, 1.499), (16, 7.479), (64, 31.16)]:
        found = profile(Exponential(decay=DECAY), range(every, 64_000 + 1, every))
        assert 999 - found.mean_age == pytest.approx(younger, rel=1e-3)


def test_initial_weights_count_with_the_age_of_the_run() -> None:
    """decay 1 only ever holds them."""
    found = profile(Exponential(decay=1, debias=False), [2, 4, 10])
    assert (found.initial, found.mean_age, found.noise_window) == (1.0, 10.0, 1.0)
    assert found.half_life == 10.0
    assert found.cutoff is None
    half = profile(lambda *, now, elapsed: 0.5, [4])
    assert (half.mean_age, half.noise_window, half.half_life) == (2.0, 2.0, 4.0)


def test_half_life_interpolates_within_an_interval() -> None:
    """Weights 1/4, 3/4 over (0, 4] and (4, 10]: half is younger at 2/3 of the last interval."""
    found = profile(lambda *, now, elapsed: 0.0 if now == 4 else 0.25, [4, 10])
    assert found.half_life == pytest.approx(4.0, rel=1e-14, abs=0)


@pytest.mark.parametrize("decay", [0.1716, 0.2, 0.5, 0.9, 0.99])
def test_cutoff_of_a_short_ema(decay: float) -> None:
    """Also next to pi, where the decay is barely enough to have one."""
    found = profile(Exponential(decay=decay, debias=False), range(1, 5_001)).cutoff
    assert found == pytest.approx(
        2 * math.asin((1 - decay) / (2 * math.sqrt(decay))), rel=1e-9, abs=0
    )


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.15, 0.1715])
def test_too_short_an_ema_has_no_cutoff(decay: float) -> None:
    """Below 3 - 2 sqrt(2) even the fastest signal keeps more than half its power."""
    assert profile(Exponential(decay=decay, debias=False), range(1, 301)).cutoff is None


def test_cutoff_scales_with_the_unit_of_time() -> None:
    """Counting samples, 256 a step, divides the frequency by 256."""
    found = profile(Exponential(decay=DECAY ** (1 / 256)), range(256, 256 * 20_001, 256))
    cutoff = 2 * math.asin((1 - DECAY) / (2 * math.sqrt(DECAY))) / 256
    assert found.cutoff == pytest.approx(cutoff, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_cutoff_is_the_first_crossing(seed: int) -> None:
    """No frequency below it is damped to half its power, on uneven times and any weights."""
    random = np.random.default_rng(seed)
    times = np.cumsum(random.choice([0.5, 1.0, 2.7], size=60))
    decays = iter(random.uniform(0.3, 1.0, size=60).tolist())
    found = profile(lambda *, now, elapsed: next(decays), times)

    assert found.cutoff is not None
    assert oracles.power_at(found, found.cutoff) == pytest.approx(0.5, abs=1e-12)
    for share in np.linspace(0.0, 0.999, 200):
        assert oracles.power_at(found, float(share) * found.cutoff) > 0.5


def sharp_with_long_tail(share: float, length: int) -> Profile:
    """Most weight on the last step, the rest spread over the whole run."""
    mean = Uniform()
    return profile(
        lambda *, now, elapsed: 1 - share if now == length else mean(now=now, elapsed=elapsed),
        range(1, length + 1),
    )


def test_long_search_by_transform_agrees_with_the_search_by_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ripples just above one half: the shortcut skips them, and finds the same answer."""
    # |H| >= share - (1 - share) * 0.2172, the deepest lobe of sin(x) / x: 0.7071 at 0.7594.
    dips, stays = sharp_with_long_tail(0.757, 800), sharp_with_long_tail(0.79, 800)
    monkeypatch.setattr(_profiles, "_STEPS_BEFORE_TRANSFORM", 10**9)
    slow = _first_half_power(dips), _first_half_power(stays)
    monkeypatch.setattr(_profiles, "_STEPS_BEFORE_TRANSFORM", 1)
    fast = _first_half_power(dips), _first_half_power(stays)

    assert slow[0] == pytest.approx(fast[0], rel=1e-12, abs=0)
    assert slow[0] is not None
    assert slow[1] is fast[1] is None
    assert oracles.power_at(dips, slow[0]) == pytest.approx(0.5, abs=1e-12)


def _first_half_power(found: Profile) -> float | None:
    """Search again, whatever has been found before."""
    return Profile(found.times, found.weights, found.initial).cutoff


def test_search_for_a_cutoff_that_is_not_there_ends() -> None:
    """A sharp memory with a faint tail of 100 000 steps: one transform instead of a long walk."""
    assert sharp_with_long_tail(0.8, 100_000).cutoff is None


def test_sinusoid_at_the_cutoff_is_damped_to_half_its_power() -> None:
    """SCIENCE test 2: drive the average with it and look at the amplitude, within 1 %."""
    for decay in (0.9, 0.99):
        schedule = Exponential(decay=decay)
        cutoff = profile(schedule, range(1, 3_001)).cutoff
        assert cutoff is not None
        times = range(1, 6_001)
        waves = [np.array([math.cos(cutoff * t), math.sin(cutoff * t)]) for t in times]
        settled = oracles.average_of(schedule, np.zeros(2), waves, times)[3_000:]
        assert np.mean(np.sum(np.square(settled), axis=1)) == pytest.approx(0.5, rel=0.01)


def test_noise_window_is_the_variance_of_white_noise() -> None:
    """SCIENCE test 2: Var(average) / Var(live) is 0.05263 and 0.005025, within 6 %."""
    random = np.random.default_rng(0)
    for decay, ratio in [(0.9, 0.05263), (0.99, 0.005025)]:
        schedule = Exponential(decay=decay)
        noise = list(random.normal(size=(1_000, 4_000)))
        average = oracles.average_of(schedule, np.zeros(4_000), noise, range(1, 1_001))[-1]
        assert float(np.var(average)) == pytest.approx(ratio, rel=0.06)
        window = profile(schedule, range(1, 1_001)).noise_window
        assert 1 / window == pytest.approx(ratio, rel=1e-3)


def test_mean_age_of_the_exponential_ramp() -> None:
    """SCIENCE 3.3: it tracks the live model at first, 0.6 steps at n = 1000, 11 at 5000."""
    schedule = ExponentialRamp(0.9999)
    for n, age, digits in [(1_000, 0.6, 0.05), (5_000, 11, 0.5), (20_000, 3_300, 50)]:
        assert profile(schedule, range(1, n + 1)).mean_age == pytest.approx(age, abs=digits)


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ([], "at least one, got shape"),
        ([[1, 2]], "at least one, got shape"),
        (3.0, "at least one, got shape"),
        ([0, 1], "got 0 after 0 at index 0"),
        ([-1.0, 1], "got -1 after 0 at index 0"),
        ([1, 3, 3], "got 3 after 3 at index 2"),
        ([1, 3, 2], "got 2 after 3 at index 2"),
        ([1, math.nan, 2], "got nan after 1 at index 1"),
        ([1, math.inf], "got inf after 1 at index 1"),
    ],
)
def test_times_that_do_not_increase_are_refused(times: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        profile(Uniform(), times)


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan, math.inf])
def test_a_function_that_leaves_the_unit_interval_is_refused(bad: float) -> None:
    """With the value and the moment."""

    def schedule(*, now: float, elapsed: float) -> float:
        return bad if now == 5 else 0.5

    with pytest.raises(ArgumentError, match=r"decay must be between 0 and 1.*now=5, elapsed=2"):
        profile(schedule, [1, 3, 5, 6])


def test_a_profile_prints_short_compares_by_value_and_cannot_be_changed(ema: Profile) -> None:
    assert repr(ema) == (
        "Profile(40000 updates to 40000, initial=4.16e-18, mean_age=999, noise_window=1999)"
    )
    assert profile(Uniform(), [1, 2]) == profile(Polynomial(0.0), [1, 2])
    assert profile(Uniform(), [1, 2]) != profile(Uniform(), [1, 3])
    assert profile(Uniform(), [1, 2]) != "profile"
    with pytest.raises(ValueError, match="read-only"):
        ema.weights[0] = 1.0
    with pytest.raises(AttributeError):
        ema.initial = 1.0  # type: ignore[misc]
