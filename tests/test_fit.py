"""Fit: a sum of stored averages is the average that was not kept, as nearly as it says."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.datasets import load_digits

from polyak import (
    After,
    ArgumentError,
    CountRamp,
    Exponential,
    HalfLifeRamp,
    InverseGamma,
    Power,
    Schedule,
    Uniform,
    gamma_from_sigma_rel,
    profile,
)
from polyak._fit import (
    MAX_ERROR,
    Fit,
    Overlaps,
    Storage,
    Stored,
    Tail,
    Target,
    Track,
    decays_at,
    plan,
)
from polyak._history import History

FloatArray = npt.NDArray[np.float64]

PAIR = [Power(sigma_rel=0.05), Power(sigma_rel=0.10)]


def history(*runs: tuple[float, int, int]) -> History:
    return History.from_state([list(run) for run in runs])


def half(*, now: float, elapsed: float) -> float:
    """A schedule of the caller's own, which copies the live weights every 60 units of time."""
    return 0.0 if now % 60 == 0 else 0.5 ** (elapsed / 15)


# ── slow and obvious: every profile in full, solved by SVD without normal equations ──────────────


@dataclass
class Dense:
    """The profiles of all snapshots on the union of the updates [moments, snapshots]."""

    times: FloatArray
    profiles: FloatArray

    @classmethod
    def of(cls, tracks: Sequence[Track], stored: Sequence[Stored], start: float) -> "Dense":
        end = max(each.time for each in stored)
        updates = [np.append(t.start, t.history.times(start=t.start)) for t in tracks]
        plain = [each.time for each in stored if each.track is None]
        times = np.unique(np.concatenate([[start], plain, *updates]))
        times = times[times <= end]
        columns = []
        for each in stored:
            seen = [each.time] if each.track is None else list(updates[each.track])
            column = (times == seen[0]).astype(np.float64)
            for index, now in enumerate(seen[1:]):
                if now <= each.time:
                    assert each.track is not None
                    track = tracks[each.track]
                    schedule = track.schedules[track.history.schedule_indices()[index]]
                    decay = schedule(now=now - track.start, elapsed=now - seen[index])
                    inside = (times > seen[index]) & (times <= now)  # these it speaks for
                    shares = np.where(inside, np.diff(times, prepend=0.0), 0.0)
                    column = decay * column + (1.0 - decay) * shares / shares.sum()
            columns.append(column)
        return cls(times, np.stack(columns, axis=1))

    @property
    def roots(self) -> FloatArray:
        """1 / sqrt(interval), the initial weights speaking for as long as the first update."""
        gaps = np.diff(self.times)
        roots: FloatArray = 1.0 / np.sqrt(np.append(gaps[0], gaps))[:, None]
        return roots

    def goal(self, schedule: Schedule) -> FloatArray:
        basis = np.zeros(len(self.times))
        basis[0] = 1.0
        for index in range(1, len(self.times)):
            now, elapsed = (
                self.times[index] - self.times[0],
                self.times[index] - self.times[index - 1],
            )
            decay = schedule(now=now, elapsed=elapsed)
            basis *= decay
            basis[index] += 1.0 - decay
        return basis

    def solve(
        self, goal: FloatArray, ridge: float, averages: npt.NDArray[np.bool_]
    ) -> tuple[FloatArray, float]:
        """Coefficients and relative squared error: least squares over all x that sum to 1."""
        profiles, goal = self.profiles * self.roots, goal[:, None] * self.roots
        squares = (profiles**2).sum(axis=0)
        size = 1.0 / np.mean(1.0 / squares[averages])
        # x = e_n + N y with the columns of N summing to 0; the ridge as rows of its own.
        n = profiles.shape[1]
        null = np.vstack([np.eye(n - 1), -np.ones(n - 1)])
        rows = np.vstack([profiles, math.sqrt(ridge * size) * np.diag(averages)])
        rest = np.vstack([goal, np.zeros((n, 1))]) - rows[:, -1:]
        free = np.linalg.lstsq(rows @ null, rest, rcond=1e-14)[0]
        x = (null @ free)[:, 0]
        x[-1] += 1.0
        return x, float(((profiles @ x - goal[:, 0]) ** 2).sum() / (goal**2).sum())


RUN = history((5, 40, 0))
UNEVEN = history((5, 9, 0), (7, 1, 0), (1, 30, 0), (50, 1, 1), (3, 41, 1))

RUNS: dict[str, tuple[list[Track], list[float]]] = {
    "power": ([Track(RUN, [s]) for s in PAIR], [50, 100, 150, 200]),
    "debiased": (
        [Track(RUN, [Exponential(half_life=h)]) for h in (20, 80)],
        [40, 80, 120, 160, 200],
    ),
    "initial weights left": (
        [Track(RUN, [Exponential(half_life=h, debias=False)]) for h in (40, 90)],
        [50, 100, 200],
    ),
    "late start": (
        [Track(UNEVEN, [After(52, Uniform())] * 2), Track(UNEVEN, [CountRamp(0.98)] * 2)],
        [10, 52, 60, 82, 132, 255],
    ),
    "other schedule, function": (
        [Track(UNEVEN, [PAIR[0], Uniform()]), Track(UNEVEN, [half, HalfLifeRamp(0.1)])],
        [45, 60, 82, 135, 180, 255],
    ),
    "own updates, later start": (
        [
            Track(history((2, 100, 0)), [PAIR[0]]),
            Track(history((10, 16, 0)), [HalfLifeRamp(0.05)], start=40),
            Track(history((3, 40, 0)), [Exponential(half_life=40, debias=False)], start=41),
        ],
        [40 + 10 * k for k in (4, 8, 12, 16)],
    ),
}


def stored_of(tracks: Sequence[Track], times: Sequence[float]) -> list[Stored]:
    """A snapshot of each track at each time at which it was updated, in no order."""
    found = []
    for index, track in enumerate(tracks):
        updates = set(track.history.times(start=track.start).tolist()) | {track.start}
        found += [Stored(t, track=index, storage="float64") for t in times if t in updates]
    return found[::-1]


@pytest.mark.parametrize("plain", [False, True], ids=["averages", "and plain checkpoints"])
@pytest.mark.parametrize("name", RUNS)
def test_fit_is_the_least_squares_over_every_profile_in_full(name: str, plain: bool) -> None:
    """Coefficients, error and what is left of the initial weights, with and without a ridge."""
    tracks, times = RUNS[name]
    stored = stored_of(tracks, times)
    if plain:
        middle, end = times[len(times) // 2], max(each.time for each in stored)
        stored += [Stored(t, track=None, storage="float64") for t in (middle, 33.5, end)]
    overlaps = Overlaps(tracks, stored)
    dense = Dense.of(tracks, stored, 0.0)
    averages = np.array([each.track is not None for each in stored])

    targets: list[Schedule] = [Power(sigma_rel=0.08), Exponential(half_life=30), Uniform()]
    for target in [*targets, Exponential(half_life=60, debias=False), half]:
        for ridge in (0.0, 1e-3, 1.0):
            fit = overlaps.fit(target, max_error=math.inf, ridge=ridge)
            x, error = dense.solve(dense.goal(target), ridge, averages)
            np.testing.assert_allclose(
                dense.profiles @ fit.coefficients, dense.profiles @ x, atol=1e-9
            )
            assert fit.error == pytest.approx(error, rel=1e-6, abs=1e-13)
            assert fit.initial == pytest.approx(float(dense.profiles[0] @ x), abs=1e-9)
            assert fit.coefficients.sum() == pytest.approx(1.0, abs=1e-12)
            realised = overlaps.profile(fit)
            np.testing.assert_allclose(realised.weights, (dense.profiles @ x)[1:], atol=1e-9)


def test_averages_that_still_copy_are_one_snapshot_and_share_its_coefficient() -> None:
    """Both are the live weights until their start at 100: the system is singular."""
    tracks = [Track(RUN, [After(100, s)]) for s in PAIR]
    stored = stored_of(tracks, [50, 100, 150, 200])
    dense = Dense.of(tracks, stored, 0.0)
    target = Power(sigma_rel=0.2)
    for ridge in (0.0, 1e-2):
        fit = Overlaps(tracks, stored).fit(target, max_error=math.inf, ridge=ridge)
        x, error = dense.solve(dense.goal(target), ridge, np.full(8, True))
        np.testing.assert_allclose(dense.profiles @ fit.coefficients, dense.profiles @ x, atol=1e-9)
        assert fit.error == pytest.approx(error, rel=1e-9)
        by_file = {(e.time, e.track): c for e, c in zip(stored, fit.coefficients, strict=True)}
        for time in (50, 100):
            assert by_file[time, 0] == pytest.approx(by_file[time, 1], abs=1e-9)


# ── the table of SCIENCE 4 ───────────────────────────────────────────────────────────────────────

SIGMAS = (0.02, 0.03, 0.07, 0.15, 0.20, 0.25)
COUNTS = (8, 16, 32, 64, 128, 256)
PRINTED = {  # sigma_rel: relative squared profile error of the pair at each count
    0.02: (6.1e-2, 1.4e-2, 1.6e-3, 1.2e-4, 7.7e-6, 4.9e-7),
    0.03: (1.0e-2, 1.5e-3, 1.2e-4, 8.4e-6, 5.4e-7, 3.4e-8),
    0.07: (1.8e-4, 1.4e-5, 9.5e-7, 6.0e-8, 3.8e-9, 2.4e-10),
    0.15: (1.1e-3, 8.1e-5, 5.3e-6, 3.3e-7, 2.1e-8, 1.3e-9),
    0.20: (6.1e-3, 5.4e-4, 4.2e-5, 2.9e-6, 2.0e-7, 1.3e-8),
    0.25: (3.3e-2, 6.3e-3, 1.2e-3, 2.1e-4, 3.9e-5, 7.2e-6),
}
ALONE_AT_64 = (1.8e-2, 3.7e-3, 7.3e-4, 4.9e-3, 8.2e-3, 2.0e-2)


def ideal_error(sigma_rel: float, count: int, kept: Sequence[float]) -> float:
    """The formula for ideal power functions, by the inner products of Karras et al. 2024."""

    def inner(ga: Any, ta: Any, gb: Any, tb: Any) -> Any:
        ratio = np.where(ta < tb, (ta / tb) ** gb, (ta / tb) ** -ga)
        return (ga + 1) * (gb + 1) * ratio / ((ga + gb + 1) * np.maximum(ta, tb))

    times = np.repeat(np.arange(1, count + 1) / count, len(kept))
    gammas = np.tile([gamma_from_sigma_rel(sigma) for sigma in kept], count)
    matrix = inner(gammas[:, None], times[:, None], gammas, times)
    wanted = gamma_from_sigma_rel(sigma_rel)
    b, square = inner(gammas, times, wanted, 1.0), inner(wanted, 1.0, wanted, 1.0)
    scale = 1.0 / np.sqrt(np.diag(matrix))
    bordered = np.zeros((len(b) + 1, len(b) + 1))
    bordered[:-1, :-1] = matrix * np.outer(scale, scale)
    bordered[-1, :-1] = bordered[:-1, -1] = scale
    x = np.linalg.solve(bordered, np.append(b * scale, 1.0))[:-1] * scale
    return float((x @ matrix @ x - 2 * x @ b + square) / square)


@pytest.fixture(scope="module")
def table() -> FloatArray:
    """Error of the pair, realised over 2^16 updates [counts, sigmas]."""
    targets = [Power(sigma_rel=sigma) for sigma in SIGMAS]
    return np.stack([served(PAIR, count).errors(targets) for count in COUNTS])


def served(kept: Sequence[Schedule], count: int, updates: int = 2**16) -> Overlaps:
    times = [updates // count * k for k in range(1, count + 1)]
    return plan(kept, times=times, storage="float64")


def test_profile_errors_are_those_of_the_formula(table: FloatArray) -> None:
    """Within 1 % in float64, and within the rounding of the printed table."""
    exact = [[ideal_error(sigma, count, (0.05, 0.10)) for sigma in SIGMAS] for count in COUNTS]
    np.testing.assert_allclose(table, exact, rtol=1e-2)
    np.testing.assert_allclose(table, np.transpose([PRINTED[s] for s in SIGMAS]), rtol=4e-2)


def test_profile_errors_fall_as_predicted(table: FloatArray) -> None:
    """n^-4 with two averages, n^-(2 gamma + 1) for a target with a kink at 0."""
    slopes = np.log2(table[-1] / table[-3]) / 2
    by_sigma = dict(zip(SIGMAS, slopes, strict=True))
    assert by_sigma[0.07] == pytest.approx(-4.0, abs=0.1)
    assert by_sigma[0.15] == pytest.approx(-4.0, abs=0.1)
    assert by_sigma[0.25] == pytest.approx(-2.44, abs=0.1)
    assert by_sigma[0.25] == pytest.approx(-(2 * gamma_from_sigma_rel(0.25) + 1), abs=0.1)


def test_one_average_alone_is_two_orders_of_n_worse() -> None:
    targets = [Power(sigma_rel=sigma) for sigma in SIGMAS]
    alone = [served(PAIR[:1], count).errors(targets) for count in (64, 256)]
    np.testing.assert_allclose(alone[0], ALONE_AT_64, rtol=4e-2)
    np.testing.assert_allclose(
        alone[0], [ideal_error(sigma, 64, (0.05,)) for sigma in SIGMAS], rtol=1e-2
    )
    slopes = np.log2(alone[1] / alone[0]) / 2
    np.testing.assert_allclose(slopes[[2, 3]], -2.0, atol=0.1)  # 0.07 and 0.15


def test_realised_errors_tend_to_the_ideal_ones_from_below() -> None:
    """Held still between updates, a trajectory can only hide a part of the distance.

    What is hidden is of the order of (updates between two snapshots)^-2.
    """
    target = Power(sigma_rel=0.07)
    exact = ideal_error(0.07, 64, (0.05, 0.10))
    short = [1 - served(PAIR, 64, 64 * k).fit(target).error / exact for k in (8, 32, 128)]
    assert 0.0 < short[2] < short[1] < short[0] < 0.1
    assert short[0] / short[1] == pytest.approx(16, rel=0.1)


@pytest.mark.parametrize("storage", ["float64", "float16", "bfloat16"])
def test_a_stored_target_is_its_file(storage: Storage) -> None:
    """One-hot, also where rounding would be less with a mixture."""
    schedules: list[Schedule] = [*PAIR, Exponential(half_life=40)]
    tracks = [Track(UNEVEN, [schedule] * 2) for schedule in schedules]
    stored = [Stored(t, track=k, storage=storage) for t in (45, 82, 132, 255) for k in range(3)]
    overlaps = Overlaps(tracks, stored)
    for k, track in enumerate(tracks):
        for place, at in enumerate((45, 82, 132, 255)):
            fit = overlaps.fit(track.schedules[0], at=at)
            expected = np.zeros(12)
            expected[3 * place + k] = 1.0
            np.testing.assert_allclose(fit.coefficients, expected, atol=1e-10)
            assert (fit.at, fit.used) == (at, [3 * place + k])
            assert fit.error < 1e-20


def test_the_plain_solve_finds_a_stored_target_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at 256 snapshots, where the condition number is 5e7."""
    monkeypatch.setattr("polyak._fit._SAME", -1.0)
    overlaps = served(PAIR, 256, 4_096)
    fit = overlaps.fit(PAIR[1], ridge=0.0)
    np.testing.assert_allclose(fit.coefficients, np.eye(512)[-1], atol=1e-10)
    assert 1e7 < fit.condition < 1e8


@pytest.mark.parametrize("ridge", [None, 0.0, 1e-3])
def test_coefficients_sum_to_one(ridge: float | None) -> None:
    """Also where they are large and of both signs, and at every time."""
    overlaps = served(PAIR, 256, 4_096)
    for at in (16, 160, 1_600, 4_096):
        for target in (Power(sigma_rel=0.02), Power(sigma_rel=0.25), Tail(at / 3)):
            fit = overlaps.fit(target, at=at, ridge=ridge, max_error=math.inf)
            assert math.fsum(fit.coefficients) == pytest.approx(1.0, abs=1e-12)


# ── the run that really happened ─────────────────────────────────────────────────────────────────


def relative_width(overlaps: Overlaps, fit: Fit) -> float:
    """Standard deviation of a profile as a share of the run, each weight spread evenly."""
    found = overlaps.profile(fit)
    edges = np.append(0.0, found.times)
    middles, gaps = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    assert abs(found.initial) < 1e-6
    mean = found.weights @ middles
    return math.sqrt(found.weights @ ((middles - mean) ** 2 + gaps**2 / 12)) / found.end


@pytest.mark.parametrize("late", [None, "After", "built later"])
@pytest.mark.parametrize("interval", [1, 10, 100])
def test_length_does_not_depend_on_interval_resume_or_start(
    interval: int, late: str | None
) -> None:
    """sigma_rel 0.15 within 1e-3: a resume out of step in the middle, a start at 5 % of the run."""
    begin = 1_000 if late == "built later" else 0
    before = (10_000 - begin) // interval
    run = history((interval, before, 0), (1.37 * interval, 1, 0), (interval, 9_000 // interval, 0))
    kept = [After(1_000, s) for s in PAIR] if late == "After" else PAIR
    tracks = [Track(run, [schedule], start=begin) for schedule in kept]
    updates = tracks[0].times()
    times = updates[np.searchsorted(updates, np.linspace(begin, updates[-1], 65)[1:] - 1e-9)]
    stored = [Stored(t, track=k, storage="float32") for t in times for k in range(2)]

    overlaps = Overlaps(tracks, stored, start=0.0)
    fit = overlaps.fit(Power(sigma_rel=0.15))
    assert relative_width(overlaps, fit) == pytest.approx(0.15, abs=1e-3)


def test_ideal_profiles_would_be_wrong_after_a_late_start() -> None:
    """What EDM2's solve does with these files: its coefficients do not give the length asked."""
    run = history((10, 1_900, 0))
    tracks = [Track(run, [schedule], start=1_000) for schedule in PAIR]
    times = [1_000 + 500 * k for k in range(1, 39)]
    stored = [Stored(t, track=k, storage="float64") for t in times for k in range(2)]
    overlaps = Overlaps(tracks, stored, start=0.0)
    pretend = Overlaps([Track(history((10, 2_000, 0)), [s]) for s in PAIR], stored)
    right, wrong = (o.fit(Power(sigma_rel=0.15), ridge=0.0) for o in (overlaps, pretend))
    assert relative_width(overlaps, right) == pytest.approx(0.15, abs=1e-3)
    assert abs(relative_width(overlaps, wrong) - 0.15) > 2e-3


def test_error_is_the_measured_one_on_independent_noise() -> None:
    """A pair of debiased EMAs rebuilds a third between them: 5 000 zero-mean iid trajectories."""
    every, updates, dim = 4, 600, 5_000
    lengths = [60.0, 400.0, 150.0]
    schedules = [Exponential(half_life=length) for length in lengths]
    rng = np.random.default_rng(0)
    averages = [rng.standard_normal(dim)] * 3
    files = []
    for step in range(1, updates + 1):
        live = rng.standard_normal(dim)
        decays = [s(now=every * step, elapsed=every) for s in schedules]
        averages = [d * a + (1 - d) * live for d, a in zip(decays, averages, strict=True)]
        if step % 20 == 0:
            files += averages[:2]
    tracks = [Track(history((every, updates, 0)), [schedule]) for schedule in schedules[:2]]
    stored = [
        Stored(20 * every * (1 + i // 2), track=i % 2, storage="float64") for i in range(len(files))
    ]
    for at_least in (8, len(stored)):  # the last files only, and all of them
        overlaps = Overlaps(tracks, stored[-at_least:])
        fit = overlaps.fit(schedules[2], max_error=math.inf)
        rebuilt = fit.coefficients @ np.stack(files[-at_least:])
        measured = ((rebuilt - averages[2]) ** 2).sum() / (averages[2] ** 2).sum()
        assert fit.error == pytest.approx(measured, rel=0.1)
        assert fit.error > 1e-9


def test_initial_weights_are_counted() -> None:
    """One plain EMA: decay^updates is left. Two of them at the end can take it out again."""
    ema = [Exponential(decay=d, debias=False) for d in (0.9, 0.95)]
    tracks = [Track(history((1, 20, 0)), [schedule]) for schedule in ema]
    alone = Overlaps(tracks[:1], [Stored(20)]).fit(Exponential(decay=0.9), max_error=math.inf)
    assert alone.initial == pytest.approx(0.9**20, rel=1e-12)
    stored = [Stored(t, track=k, storage="float64") for t in (5, 10, 15, 20) for k in range(2)]
    both = Overlaps(tracks, stored).fit(Exponential(decay=0.9), max_error=math.inf)
    assert abs(both.initial) < 0.02 * alone.initial
    assert both.error < 1e-3 * alone.error


# ── targets over plain checkpoints ───────────────────────────────────────────────────────────────


def checkpoints(*times: float) -> Overlaps:
    return Overlaps([], [Stored(time, track=None) for time in times])


def test_plain_checkpoints_are_merged_with_the_coefficients_of_the_target() -> None:
    """A window is LAWA's mean of the last k; an EMA over checkpoints is its own weights."""
    overlaps = checkpoints(*range(100, 1_001, 100))
    window = overlaps.fit(Tail(400))
    np.testing.assert_allclose(window.coefficients, [0] * 6 + [0.25] * 4, atol=1e-9)
    ema = Exponential(half_life=150)
    np.testing.assert_allclose(
        overlaps.fit(ema, ridge=0.0).coefficients, profile(ema, range(100, 1_001, 100)).weights
    )
    np.testing.assert_allclose(overlaps.fit(ema).coefficients[-1], 0.373, atol=1e-3)


@pytest.mark.parametrize("curve", ["linear", "cosine", "1-sqrt"])
def test_tails_are_decays_of_the_learning_rate(curve: Any) -> None:
    """WSM: the gradient of step i counts with the sum of the coefficients from i on."""
    count = 8
    fit = checkpoints(*range(1, 21)).fit(Tail(count, curve=curve), ridge=0.0)
    share = np.cumsum(fit.coefficients[::-1])[::-1][-count:]
    x = np.arange(count) / count
    rates = {"linear": 1 - x, "cosine": (1 + np.cos(np.pi * x)) / 2, "1-sqrt": 1 - np.sqrt(x)}
    np.testing.assert_allclose(share, rates[curve], atol=1e-12)
    assert fit.coefficients.min() > -1e-15


def test_a_window_between_averages_is_the_uniform_schedule_from_there() -> None:
    """Tail(w) at T is After(T - w, Uniform()), also where w ends within an interval."""
    overlaps = served(PAIR, 64, 4_096)
    for length in (700, 1_234.5, 4_096):
        tail = overlaps.fit(Tail(length), max_error=math.inf)
        same = overlaps.fit(After(4_096 - length, Uniform()), max_error=math.inf)
        np.testing.assert_allclose(tail.coefficients, same.coefficients, atol=1e-9)
        assert tail.error == pytest.approx(same.error, rel=1e-6)


def test_only_snapshots_up_to_at_are_used() -> None:
    """At an earlier time the answer is that of the shorter run."""
    full, shorter = served(PAIR, 64, 4_096), served(PAIR, 32, 2_048)
    early, alone = full.fit(Power(sigma_rel=0.15), at=2_048), shorter.fit(Power(sigma_rel=0.15))
    assert early.used == list(range(64))
    np.testing.assert_allclose(early.coefficients[:64], alone.coefficients, atol=1e-9)
    assert early.error == pytest.approx(alone.error, rel=1e-6)
    assert full.profile(early).end == 2_048


def test_averages_of_others_are_tracks_of_their_own() -> None:
    """torchtitan's half-life fraction every 50 steps from 500 on, TensorFlow's ramp every step.

    SCIENCE 3.3: power functions of relative width 0.063 and 0.090, so what lies between is served;
    on a trajectory that wanders, the weights are those that were tracked.
    """
    begin, every, steps = 500, 50, 4_000
    titan, ramp, wanted = HalfLifeRamp(0.05), CountRamp(0.9999), Power(sigma_rel=0.075)
    rng = np.random.default_rng(0)
    live = np.zeros(300)
    averages, files = [live, live, live], []
    for step in range(1, steps + 1):
        live = live + rng.standard_normal(300)
        if step == begin:
            averages[0] = live
        clocks: dict[int, tuple[Schedule, int, int]] = {1: (ramp, step, 1), 2: (wanted, step, 1)}
        if step > begin and step % every == 0:
            clocks[0] = (titan, step - begin, every)
        for index, (schedule, now, elapsed) in clocks.items():
            decay = schedule(now=now, elapsed=elapsed)
            averages[index] = decay * averages[index] + (1 - decay) * live
        if step >= 1_000 and step % 250 == 0:
            files += averages[:2]
    tracks = [
        Track(history((every, (steps - begin) // every, 0)), [titan], start=begin),
        Track(history((1, steps, 0)), [ramp]),
    ]
    stored = [
        Stored(1_000 + 250 * k, track=t, storage="float64") for k in range(13) for t in range(2)
    ]
    fit = Overlaps(tracks, stored).fit(wanted)
    rebuilt = fit.coefficients @ np.stack(files)
    assert np.linalg.norm(rebuilt - averages[2]) < 0.01 * np.linalg.norm(live)
    for track in range(2):
        alone = Overlaps(tracks, stored[track::2])
        assert alone.fit(wanted, max_error=math.inf).error > 5 * fit.error


def test_an_average_updated_less_often_is_the_same_average_beside_others() -> None:
    """Every 10 steps beside one every step: a staircase, off by the square of its steps.

    A checkpoint that falls between updates changes nothing for the others.
    """
    times = range(100, 2_001, 100)

    def error(interval: int, *, plain: bool = False) -> float:
        runs = history((1, 2_000, 0)), history((interval, 2_000 // interval, 0))
        tracks = [Track(run, [schedule]) for run, schedule in zip(runs, PAIR, strict=True)]
        stored = [Stored(t, track=k, storage="float64") for t in times for k in range(2)]
        stored += [Stored(333.3, track=None)] * plain
        return Overlaps(tracks, stored).fit(Power(sigma_rel=0.15)).error

    excess = [error(interval) - error(1) for interval in (2, 5, 10)]
    # Density ~ t^gamma in steps of h / T: a relative square of about (gamma h / T)^2 / 12.
    assert excess[2] == pytest.approx((6.94 * 10 / 2_000) ** 2 / 12, rel=2.0)
    assert excess[2] / excess[1] == pytest.approx(4.0, rel=0.1)
    assert error(10, plain=True) == pytest.approx(error(10), rel=1e-3)


# ── storage ──────────────────────────────────────────────────────────────────────────────────────

TRACKED = (0.05, 0.10, 0.02, 0.03, 0.07, 0.15)
DTYPES: dict[Storage, torch.dtype] = {
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass
class Training:
    """A pair of averages at 128 times of a run, and the others tracked online to its end."""

    exact: FloatArray  # [snapshots, weights]
    tracked: dict[float, FloatArray]

    def overlaps(self, count: int, storage: Storage) -> Overlaps:
        return plan(PAIR, times=range(4_096 // count, 4_097, 4_096 // count), storage=storage)

    def files(self, count: int, storage: Storage) -> FloatArray:
        """What is read back: exact in float64, rounded to nearest in 16 bits."""
        kept = self.exact.reshape(128, 2, -1)[128 // count - 1 :: 128 // count]
        rounded = torch.tensor(kept.reshape(2 * count, -1)).to(DTYPES[storage])
        read: FloatArray = rounded.double().numpy()
        return read

    def error(self, fit: Fit, sigma_rel: float, storage: Storage) -> float:
        """Relative error of the weights that `fit` rebuilds from files."""
        rebuilt = fit.coefficients @ self.files(len(fit.coefficients) // 2, storage)
        online = self.tracked[sigma_rel]
        return float(np.linalg.norm(rebuilt - online) / np.linalg.norm(online))


@pytest.fixture(scope="module")
def training() -> Training:
    """4 096 steps of a small network on real digits, constant rate with momentum."""
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(pixels / 16 - 0.3, dtype=torch.float32), torch.tensor(digits)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    schedules = [Power(sigma_rel=sigma) for sigma in TRACKED]
    averages, snapshots = np.zeros((len(TRACKED), 4_810)), []
    for step in range(1, 4_097):
        batch = torch.randint(0, len(inputs), (16,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(inputs[batch]), labels[batch]).backward()
        optimizer.step()
        live = torch.nn.utils.parameters_to_vector(net.parameters()).detach().double().numpy()
        decays = np.array([s(now=step, elapsed=1) for s in schedules])[:, None]
        averages = decays * averages + (1.0 - decays) * live
        if step % 32 == 0:
            snapshots += list(averages[:2])
    return Training(np.stack(snapshots), dict(zip(TRACKED, averages, strict=True)))


def test_weights_of_a_real_run_are_rebuilt(training: Training) -> None:
    """Relative error of the weights: 2e-4 from 32 snapshots, 2e-6 from 128 (SCIENCE test 4)."""
    for count, bound in ((32, 2e-4), (128, 2e-6)):
        overlaps = training.overlaps(count, "float64")
        for sigma in (0.03, 0.07, 0.15):
            fit = overlaps.fit(Power(sigma_rel=sigma))
            assert training.error(fit, sigma, "float64") <= bound


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_the_ridge_at_least_halves_the_error_of_short_averages(
    training: Training, storage: Storage
) -> None:
    """sigma_rel 0.02 from 128 snapshots in 16 bits; long ones lose nothing."""
    overlaps = training.overlaps(128, storage)
    for sigma, gain in ((0.02, 2.0), (0.07, 1.0), (0.15, 1.0)):
        default, plain = (overlaps.fit(Power(sigma_rel=sigma), ridge=r) for r in (None, 0.0))
        errors = training.error(default, sigma, storage), training.error(plain, sigma, storage)
        assert errors[0] <= errors[1] / gain


@pytest.mark.parametrize("ridge", [None, 0.0])
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_noise_is_what_rounding_does_to_the_sum(
    training: Training, storage: Storage, ridge: float | None
) -> None:
    """Relative to the weights, within 10 %: the files against what they were rounded from."""
    overlaps = training.overlaps(128, storage)
    for sigma in (0.02, 0.07):
        fit = overlaps.fit(Power(sigma_rel=sigma), ridge=ridge)
        rounding = training.files(128, storage) - training.files(128, "float64")
        measured = np.linalg.norm(fit.coefficients @ rounding)
        measured /= np.linalg.norm(training.tracked[sigma])
        assert fit.noise == pytest.approx(float(measured), rel=0.1)


def test_the_ridge_is_the_larger_the_coarser_the_file() -> None:
    """A snapshot in bfloat16 among others in float32 takes part less."""
    times = range(64, 2_049, 64)
    tracks = [Track(history((1, 2_048, 0)), [schedule]) for schedule in PAIR]

    def fit(coarse: Storage) -> FloatArray:
        stored = [
            Stored(t, track=k, storage=coarse if t == 1_984 else "float32")
            for t in times
            for k in range(2)
        ]
        return Overlaps(tracks, stored).fit(Power(sigma_rel=0.03), max_error=1.0).coefficients

    fine, mixed = fit("float32"), fit("bfloat16")
    assert np.abs(mixed[60:62]).sum() < 0.5 * np.abs(fine[60:62]).sum()
    assert mixed.sum() == pytest.approx(1.0, abs=1e-12)


# ── what can be served ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("target", "nearest"),
    [
        (Power(sigma_rel=0.005), "Power(sigma_rel="),
        (Power(gamma=400), "Power(gamma="),
        (Exponential(half_life=3), "Exponential(half_life="),
        (Tail(50), "Tail(length="),
        (Power(sigma_rel=0.287), "Power(sigma_rel="),
    ],
)
def test_a_length_that_cannot_be_served_is_refused_with_the_nearest(
    target: Target, nearest: str
) -> None:
    """The one named is served, only just (a window may fall on snapshots, and be served well)."""
    overlaps = served(PAIR, 16, 4_096)
    with pytest.raises(ArgumentError, match="resolved by the snapshots") as caught:
        overlaps.fit(target)
    assert overlaps.fit(target, max_error=math.inf).error > MAX_ERROR
    named = str(caught.value).split("The nearest length that they serve is ")[1].split(". Take")[0]
    assert named.startswith(nearest)
    other = eval(named)
    assert (0.5 if "Tail" in nearest else 0.75) * MAX_ERROR < overlaps.fit(other).error <= MAX_ERROR


def test_a_target_without_a_length_is_refused_without_a_nearest() -> None:
    with pytest.raises(ArgumentError, match=r"at 4096\. Take snapshots more often") as caught:
        served(PAIR, 8, 4_096).fit(InverseGamma(power=0.1))
    assert "nearest" not in str(caught.value)


def test_a_plan_is_the_run_that_follows_it() -> None:
    """Before the run: its errors are those of the folder, and a coarser plan is close."""
    run = history((1, 4_096, 0))
    stored = [Stored(t, track=k) for t in range(64, 4_097, 64) for k in range(2)]
    targets: list[Target] = [Power(sigma_rel=0.04), Exponential(half_life=300), Tail(900)]
    real = Overlaps([Track(run, [schedule]) for schedule in PAIR], stored).errors(targets)
    times = [*range(64, 4_097, 64)]
    assert plan(PAIR, times=times).errors(targets).tolist() == real.tolist()
    coarse = plan(PAIR, times=times, interval=8).errors(targets[:2])
    np.testing.assert_allclose(coarse, real[:2], rtol=0.05)
    rounded_up = plan(PAIR, times=[t - 3 for t in times], interval=8)
    assert [each.time for each in rounded_up.stored[::2]] == times


@pytest.mark.parametrize(
    "schedule",
    [
        *PAIR,
        Power(gamma=-0.5),
        Uniform(),
        Exponential(half_life=300),
        Exponential(half_life=0.01),
        Exponential(decay=0.999, debias=False),
        Exponential(decay=0.0),
        Exponential(decay=0.0, debias=False),
        Exponential(decay=1.0, debias=False),
        HalfLifeRamp(0.05),
        HalfLifeRamp(0.05, half_life=20),
        CountRamp(0.99),
        After(100, Exponential(half_life=30)),
        After(70, InverseGamma(unit=7)),
        half,
    ],
    ids=lambda schedule: getattr(schedule, "__name__", repr(schedule)),
)
def test_decays_by_array_are_those_by_call(schedule: Schedule) -> None:
    elapsed = np.array([7.0] * 50 + [350.0] + [14.0] * 20)
    now = np.cumsum(elapsed)
    calls = zip(now.tolist(), elapsed.tolist(), strict=True)
    expected = [schedule(now=n, elapsed=e) for n, e in calls]
    found = decays_at(schedule, now=now, elapsed=elapsed)
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-16)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────


def not_a_decay(*, now: float, elapsed: float) -> float:
    return math.nan if now > 100 else 0.5


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Track(RUN, []), "schedules must be the 1 that the history notes, got 0"),
        (lambda: Track(UNEVEN, [PAIR[0]]), "schedules must be the 2"),
        (lambda: Track(RUN, PAIR, start=math.nan), "start must be finite, got nan"),
        (lambda: Stored(math.nan), "time must be finite, got nan"),
        (lambda: Stored(math.inf), "time must be finite, got inf"),
        (lambda: Stored(50, storage="fp16"), "storage must be one of float64, .*got 'fp16'"),  # type: ignore[arg-type]
        (lambda: Stored(50, track=1.0), "track must be None or an index, got 1.0"),  # type: ignore[arg-type]
        (lambda: Tail(0), "length must be finite and above 0, got 0"),
        (lambda: Tail(math.nan), "length must be finite and above 0, got nan"),
        (lambda: Tail(5, curve="square"), "curve must be one of linear, .*got 'square'"),  # type: ignore[arg-type]
        (lambda: Overlaps([], []), "stored must hold at least one"),
        (lambda: small([Stored(50, track=2)]), "index of one of 2 tracks, got 2"),
        (lambda: small([Stored(50, track=-1)]), "index of one of 2 tracks, got -1"),
        (lambda: small([Stored(-5)]), r"time must be at least 0 \(its start\), got -5"),
        (
            lambda: small([Stored(52)]),
            "that of an update of its average, got 52. The nearest one is at 50",
        ),
        (
            lambda: small([Stored(500)]),
            "that of an update of its average, got 500. The nearest one is at 200",
        ),
        (lambda: small([Stored(50)], start=7.0), r"at most that of every track \(0\), got 7"),
        (lambda: small([Stored(50)], start=math.nan), "start must be finite"),
        (
            lambda: Overlaps([Track(RUN, [not_a_decay])], [Stored(200)]),
            r"decay must be between 0 and 1, got .*nan.* at now=105, elapsed=5",
        ),
        (lambda: small().fit(not_a_decay), "decay must be between 0 and 1, got .*nan"),
        (lambda: small().fit(Power), "target must be a schedule or a Tail"),  # type: ignore[arg-type]
        (lambda: small().fit(0.15), "target must be a schedule or a Tail, got 0.15"),  # type: ignore[arg-type]
        (lambda: small().fit(Power(sigma_rel=0.3)), "sigma_rel must be above 0 and below"),
        (lambda: small().fit(Tail(201)), r"length must be at most 200 \(the time since"),
        (lambda: small().fit(PAIR[0], at=155), "time of a snapshot, got 155. The nearest.* 150"),
        (lambda: small().fit(PAIR[0], at=math.nan), "at must be the time of a snapshot, got nan"),
        (lambda: small().fit(PAIR[0], max_error=math.nan), "max_error must be above 0, got nan"),
        (lambda: small().fit(PAIR[0], ridge=-1.0), "ridge must be finite and at least 0, got -1"),
        (lambda: small().fit(PAIR[0], ridge=math.nan), "ridge must be finite and at least 0"),
        (lambda: plan([], times=[1]), "schedules must hold at least one"),
        (lambda: plan(PAIR, times=[]), "times must be finite and above 0, at least one"),
        (lambda: plan(PAIR, times=[5, math.nan]), "times must be finite and above 0, .* got nan"),
        (lambda: plan(PAIR, times=[5], interval=0), "interval must be finite and above 0, got 0"),
    ],
)
def test_bad_input_is_refused_with_the_rule(call: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        call()


def small(stored: Sequence[Stored] = (), start: float | None = None) -> Overlaps:
    tracks = [Track(RUN, [schedule]) for schedule in PAIR]
    ours = stored or [Stored(t, track=k) for t in (50, 100, 150, 200) for k in range(2)]
    return Overlaps(tracks, ours, start=start)


def test_a_snapshot_at_the_start_is_the_initial_weights() -> None:
    """The only file of a run that has not begun serves every target."""
    fit = Overlaps([Track(History(), [Uniform()], start=30)], [Stored(30)]).fit(Power(gamma=3))
    assert (fit.coefficients.tolist(), fit.initial, fit.error) == ([1.0], 1.0, 0.0)


def test_an_average_without_files_changes_nothing() -> None:
    """One that began after the last snapshot, and one that was never written."""
    tracks = [Track(RUN, [schedule]) for schedule in PAIR]
    stored = [Stored(t, track=k) for t in (50, 100, 150, 200) for k in range(2)]
    others = [Track(RUN, [Uniform()], start=205), Track(RUN, [Uniform()], start=5)]
    few, many = (
        Overlaps(each, stored).fit(Power(sigma_rel=0.08)) for each in (tracks, tracks + others)
    )
    np.testing.assert_allclose(few.coefficients, many.coefficients, atol=1e-12)


def test_two_files_of_one_snapshot_share_its_coefficient() -> None:
    stored = [Stored(t, track=k) for t in (50, 100, 150, 200) for k in range(2)]
    once, twice = small(stored), small([*stored, stored[6]])
    one, two = (each.fit(Power(sigma_rel=0.08), ridge=0.0) for each in (once, twice))
    assert two.coefficients[[6, 8]] == pytest.approx(one.coefficients[6] / 2, abs=1e-9)
    assert two.error == pytest.approx(one.error, rel=1e-9)


def test_clocks_of_floats_may_jitter() -> None:
    """The running sum of 0.1 is not i * 0.1, and is the same moment."""
    run = history((0.1, 1_000, 0))
    clock = np.cumsum(np.full(1_000, 0.1))[99::100]
    assert np.abs(clock - run.times()[99::100]).max() > 1e-13
    stored = [Stored(t, track=k) for t in clock.tolist() for k in (0, None)]
    fit = Overlaps([Track(run, [PAIR[1]])], stored).fit(Power(sigma_rel=0.12), max_error=math.inf)
    same = Overlaps(
        [Track(history((1, 1_000, 0)), [PAIR[1]])],
        [Stored(i, track=k) for i in range(100, 1_001, 100) for k in (0, None)],
    ).fit(Power(sigma_rel=0.12), max_error=math.inf)
    np.testing.assert_allclose(fit.coefficients, same.coefficients, atol=1e-9)
    assert fit.error == pytest.approx(same.error, rel=1e-9)
