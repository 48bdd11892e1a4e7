"""A study: its statistics, its rules, its sentences, and one small study from end to end."""

import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent import futures
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import PolyCollection
from scipy import stats
from torch import Tensor, nn

from polyak import (
    After,
    ArgumentError,
    Averages,
    AveragingError,
    InverseGamma,
    Power,
    Snapshots,
    Uniform,
    gamma_from_sigma_rel,
    sweep,
)
from polyak.study import (
    TASKS,
    Averaged,
    Data,
    Metric,
    RunError,
    Study,
    Tail,
    Task,
    Windowed,
    _extra,
    _folder,
    check_folder,
    ema,
    mean_probabilities,
    r2,
    run_study,
    usual_methods,
)
from polyak.study._curves import early_stop, overtakes, spread, spreads
from polyak.study._findings import Findings, assemble
from polyak.study._keep import Lengths, Rebuilt
from polyak.study._methods import ARTICLE, LIVE, article_ema, check_methods
from polyak.study._plots import LIGHT, _over_seeds, lengths_drawn, pictures, small_multiples
from polyak.study._results import measure
from polyak.study._statistics import detectable, gains, paired
from polyak.study._train import EVEN, ODD, Curve, Moment, Run, batches
from polyak.study._verdict import amount, at_least, three

# ---------------------------------------------------------------- a small task, importable

ROWS, FEATURES, BATCH = 96, 4, 16
STEPS = 4  # an epoch: 64 training rows in batches of 16


def small_data() -> Data:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(ROWS, FEATURES, generator=generator)
    targets = inputs @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]])
    targets += 0.3 * torch.randn(ROWS, 1, generator=generator)
    return Data(
        train=(inputs[:64], targets[:64]),
        validation=(inputs[64:80], targets[64:80]),
        test=(inputs[80:], targets[80:]),
    )


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def small_methods(steps: int) -> tuple[Averaged | Windowed | Tail, ...]:
    return (
        ema(0.8),
        ema(0.9),
        ema(0.9, debias=False),
        Windowed("window", k=3, every=2),
        Tail(),
    )


SMALL = Task(
    name="small",
    model=small_model,
    data=small_data,
    loss=nn.functional.mse_loss,
    metrics={
        "MSE": Metric(nn.functional.mse_loss),
        "R2": Metric(r2, better="higher", compare="absolute", small=0.0),
    },
    optimizer=sgd,
    epochs=8,
    batch=BATCH,
    methods=small_methods,
    control=True,
    title="<b>a small task</b>",
    snapshots=0,  # each of them costs milliseconds of disk, which few tests need
)
KEPT = replace(SMALL, snapshots=32)  # one a step


def broken_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    raise ValueError("boom: the targets are upside down")


HANGS = 200.0  # seconds
_calls: list[None] = []


def loss_that_hangs(outputs: Tensor, targets: Tensor) -> Tensor:
    """After the first epoch, for longer than anybody waits."""
    _calls.append(None)
    if len(_calls) == 30:
        time.sleep(HANGS)
    return nn.functional.mse_loss(outputs, targets)


# ---------------------------------------------------------------- statistics


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12, unique=True))
def test_interval_is_the_one_that_scipy_computes(differences: list[float]) -> None:
    """The mean and its 95 % interval equal those of scipy's one-sample t test."""
    found = paired(differences)
    expected = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(differences), abs=1e-9)
    assert found.low == pytest.approx(expected.low, rel=1e-9, abs=1e-9)
    assert found.high == pytest.approx(expected.high, rel=1e-9, abs=1e-9)


def test_sign_test_counts_coins() -> None:
    """Five of five heads have the chance 2 / 2^5; ties are no coins."""
    assert paired([1.0, 2.0, 3.0, 4.0, 5.0]).sign_p == pytest.approx(2 / 2**5)
    assert paired([1.0, 2.0, 0.0, 3.0]).sign_p == pytest.approx(2 / 2**3)
    assert paired([0.0, 0.0]).sign_p == 1.0


def test_one_seed_has_no_interval_and_shows_nothing() -> None:
    """With one difference the interval is NaN and the finding uncertain."""
    found = paired([5.0])
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.finding == "uncertain"
    assert not found.within(100.0)


def test_seeds_without_a_figure_are_left_out_and_counted() -> None:
    """A diverged seed takes no part in the mean, and is not forgotten."""
    found = paired([1.0, math.nan, 3.0, math.inf])
    assert (found.seeds, found.left_out, found.mean) == (2, 2, 2.0)
    assert paired([math.nan]).finding == "uncertain"


@pytest.mark.parametrize(
    ("differences", "finding"),
    [([1.0, 1.1, 0.9], "better"), ([-1.0, -1.1, -0.9], "worse"), ([1.0, -1.0], "uncertain")],
)
def test_finding_is_where_the_interval_lies(differences: list[float], finding: str) -> None:
    """Above 0, below 0, or around it."""
    assert paired(differences).finding == finding


def test_gain_is_above_zero_where_it_is_for_the_better() -> None:
    """A loss 20 % lower is shown as +0.2, half as much again as +0.5; a loss of 0 has no ratio."""
    lower, higher = Metric(r2), Metric(r2, better="higher")
    fallen = gains([0.5], [0.4], better="lower", compare="relative")
    assert fallen == pytest.approx([math.log(0.5 / 0.4)])
    assert lower.shown(fallen[0]) == pytest.approx(0.2)
    risen = gains([2.0], [3.0], better="higher", compare="relative")
    assert higher.shown(risen[0]) == pytest.approx(0.5)
    assert gains([0.5], [0.6], better="higher", compare="absolute") == pytest.approx([0.1])
    for nothing in (0.0, -1.0, math.nan):
        assert math.isnan(gains([nothing], [1.0], better="lower", compare="relative")[0])
        assert math.isnan(gains([1.0], [nothing], better="higher", compare="relative")[0])
    with pytest.raises(ArgumentError, match=r"one entry a seed \(2\), got 1"):
        gains([1.0, 2.0], [1.0], better="lower", compare="absolute")


@given(st.lists(st.tuples(*[st.floats(1e-3, 1e3)] * 3), min_size=2, max_size=8))
def test_relative_gains_mirror_and_chain(seeds: list[tuple[float, float, float]]) -> None:
    """Sides exchanged, the mean changes its sign; from a to b and from b to c make a to c."""

    def mean(old: int, new: int) -> float:
        columns = [[row[place] for row in seeds] for place in (old, new)]
        return paired(gains(*columns, better="lower", compare="relative")).mean

    assert mean(0, 1) == pytest.approx(-mean(1, 0), abs=1e-9)
    assert mean(0, 1) + mean(1, 2) == pytest.approx(mean(0, 2), abs=1e-9)


@pytest.mark.parametrize(
    ("gain", "metric", "text"),
    [
        (0.0687, Metric(r2, compare="absolute", unit="nats"), "0.068 nats"),
        (0.0041999, Metric(r2, compare="absolute", unit="points", scale=100), "0.41 points"),
        (-math.log(1 - 0.1899), Metric(r2), "18 %"),
    ],
)
def test_a_claimed_lower_bound_is_rounded_down(gain: float, metric: Metric, text: str) -> None:
    """What is said to be reached "or more in each" seed is reached in each."""
    assert at_least(gain, metric) == text


def test_an_interval_has_one_number_of_decimals_and_zero_no_sign() -> None:
    """-0.1 to +33 is written -0.1 to +33.0; nothing at all is "0"."""
    metric = Metric(r2)

    def log(share: float) -> float:
        return -math.log1p(-share)

    gain = replace(paired([0.1, 0.2]), mean=log(0.17), low=log(-0.001), high=log(0.33))
    minus = "\N{MINUS SIGN}"
    assert three(gain, metric) == ("+17.0 %", f"{minus}0.1 %", "+33.0 %")
    assert amount(0.0, metric) == "0 %"
    flat = replace(gain, mean=0.0, low=0.0, high=0.0)
    assert three(flat, metric) == ("0 %", "0 %", "0 %")


def test_few_seeds_show_only_large_effects() -> None:
    """t(0.975, 2) = 4.3027 and t(0.975, 9) = 2.2622 (any printed table) over sqrt(n)."""
    assert detectable(3) == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert detectable(10) == pytest.approx(2.2622 / math.sqrt(10), rel=1e-4)
    assert detectable(1) == math.inf


# ---------------------------------------------------------------- rules on curves


@given(
    st.lists(st.sampled_from([1.0, 2.0, 3.0, math.nan]), min_size=1, max_size=12),
    st.integers(1, 4),
)
def test_early_stop_obeys_its_definition(curve: list[float], patience: int) -> None:
    """It stops at the first epoch whose last `patience` values are none below all before them."""
    stop = next(
        (
            epoch
            for epoch in range(patience, len(curve) + 1)
            if not any(
                curve[e] < min((v for v in curve[:e] if v == v), default=math.inf)
                for e in range(epoch - patience, epoch)
            )
        ),
        len(curve),
    )
    seen = [value if value == value else math.inf for value in curve[:stop]]
    best = seen.index(min(seen)) + 1 if min(seen) < math.inf else None
    found = early_stop(curve, patience=patience)
    assert (found.stop, found.best) == (stop, best)


def test_without_patience_the_whole_curve_counts() -> None:
    """The best of all, and it ran out."""
    found = early_stop([3.0, 2.0, 9.0, 9.0, 9.0, 1.0], patience=None)
    assert (found.best, found.stop, found.ran_out) == (6, 6, True)


def test_one_lucky_epoch_does_not_overtake() -> None:
    """The average must stay ahead as long as asked; the epoch is that of its first lead."""
    live = [5.0] * 10
    average = [6.0, 4.0, 6.0, 4.0, 4.0, 4.0, 4.0, 4.0, 6.0, 4.0]
    assert overtakes(average, live) == 4
    assert overtakes(average, live, hold=6) is None
    assert overtakes(average[2:], live, hold=5, first=3) == 4
    assert overtakes([5.0] * 10, live) is None  # equal is not ahead


def test_a_straight_fall_is_not_restless() -> None:
    """A line has a spread, and none once its trend is out; noise keeps its own."""
    line = [10.0 - 0.5 * epoch for epoch in range(40)]
    assert spread(line) > 5.0
    assert spread(line, detrend=True) == pytest.approx(0.0, abs=1e-12)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(40)
    design = np.stack([np.ones(40), np.arange(40)], axis=1)
    residual = noise - design @ np.linalg.lstsq(design, noise, rcond=None)[0]
    expected = math.sqrt(float(residual @ residual) / 38)
    assert spread([*(noise + line)], detrend=True) == pytest.approx(expected, rel=1e-9)


def test_spread_is_the_one_that_numpy_computes() -> None:
    """Plainly it is the population standard deviation, the article's figure."""
    curve = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]
    assert spread(curve) == pytest.approx(np.std(curve))
    assert math.isnan(spread([1.0]))
    assert math.isnan(spread([1.0, 2.0], detrend=True))
    assert math.isnan(spread([1.0, math.nan, 2.0]))


def test_jumps_know_no_trend() -> None:
    """White noise on a line: sqrt(mean d^2 / 2) is its standard deviation, by algebra sqrt(1)."""
    rng = np.random.default_rng(1)
    noise = rng.standard_normal(30_000)
    assert spreads([*noise]).jumps == pytest.approx(1.0, rel=0.02)  # error about 1 / sqrt(2 n)
    assert spreads([0.0, 2.0] * 15).jumps == pytest.approx(math.sqrt(2.0))
    assert spreads([0.5 * epoch for epoch in range(30)]).jumps == pytest.approx(0.5 / math.sqrt(2))


def test_thirds_are_thirds_of_the_run() -> None:
    """Each third sees its own epochs, also on a curve that begins late."""
    curve = [0.0] * 10 + [0.0, 1.0] * 5 + [0.0, 3.0] * 5
    whole = spreads(curve)
    assert whole.early == pytest.approx(0.0, abs=1e-12)
    assert whole.middle == pytest.approx(spread([0.0, 1.0] * 5, detrend=True))
    assert whole.late == pytest.approx(spread([0.0, 3.0] * 5, detrend=True))
    assert whole.settled == pytest.approx(np.std(curve[10:]))
    tail = spreads(curve[20:], first=21)
    assert tail.late == pytest.approx(whole.late)
    assert math.isnan(tail.middle)
    assert tail.noise == tail.late
    assert whole.noise == pytest.approx(math.hypot(whole.middle, whole.late) / math.sqrt(2))


# ---------------------------------------------------------------- methods


def test_the_article_s_average_follows_its_published_law() -> None:
    """It copies at 101 calls; then decay 1 - (1 + e)^(-2/3), e = calls - 101, up to 0.999."""
    schedule = article_ema().schedule
    for call in (1, 50, 100, 101):
        assert schedule(now=call, elapsed=1) == 0.0
    for call in (102, 103, 500, 5_000):
        expected = 1.0 - (1.0 + (call - 101)) ** (-2.0 / 3.0)
        assert schedule(now=call, elapsed=1) == pytest.approx(expected, rel=1e-12)
    assert schedule(now=100_000, elapsed=1) == 0.999
    assert schedule == After(100, InverseGamma(power=2 / 3, max_decay=0.999))


def test_a_tail_of_known_length_is_a_schedule() -> None:
    """The last quarter of 80 steps; the last moment counts however short the run."""
    assert Tail().within(80) == Averaged("SWA from 75 %", After(60, Uniform()), shown_from=61)
    assert Tail().within(1).schedule == After(0, Uniform())
    with pytest.raises(ArgumentError, match="start must be a share"):
        Tail(start=1.0)


def test_methods_have_names_of_their_own() -> None:
    """Two of one name, a reserved name, and none are refused."""
    with pytest.raises(ArgumentError, match=r"\['EMA 0.9'\] twice"):
        check_methods([ema(0.9), ema(0.9)])
    with pytest.raises(ArgumentError, match="reserved"):
        check_methods([Averaged("live", Uniform())])
    with pytest.raises(ArgumentError, match="got none"):
        check_methods([])
    check_methods(usual_methods(steps=1_000))
    with pytest.raises(ArgumentError, match="steps must be 20 or more"):
        usual_methods(steps=19)


def test_joined_probabilities_are_the_mean_of_the_models() -> None:
    """Two models, 0.9 and 0.5 for the first class: 0.7."""
    logits = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]]).log()
    joined = mean_probabilities(logits).softmax(dim=-1)
    assert torch.allclose(joined, torch.tensor([[0.7, 0.3]]))


# ---------------------------------------------------------------- the verdict, on made results


def made(
    live: Sequence[Sequence[float]],
    average: Sequence[Sequence[float]],
    *,
    rival: Sequence[Sequence[float]] | None = None,
    control: tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]] | None = None,
    small: float = 0.05,
    patience: int | None = None,
) -> Findings:
    """A study with these validation curves, a curve a seed, as if it had been trained."""
    seeds = tuple(range(len(live)))
    name = "EMA 0.9"
    task = replace(
        SMALL,
        metrics={"MSE": Metric(nn.functional.mse_loss, small=small)},
        epochs=max(map(len, live)),
        patience=patience,
        methods=lambda steps: (ema(0.9),),
    )
    kinds: list[tuple[str, Sequence[Sequence[float]], Sequence[Sequence[float]]]] = [
        ("ordinary", live, average),
        ("decayed", rival or live, rival or live),
    ]
    if control is not None:
        kinds.append(("control", *control))
    runs = [
        Run(
            kind=kind,
            seed=seed,
            steps_per_epoch=STEPS,
            stop=len(lives[seed]),
            train_loss=[1.0] * len(lives[seed]),
            rates=[0.1] * len(lives[seed]),
            curves={
                LIVE: Curve(1, {"MSE": list(lives[seed])}),
                name: Curve(1, {"MSE": list(averages[seed])}),
            },
            bytes=4,
            seconds=0.0,
            outputs={},
        )
        for seed in seeds
        for kind, lives, averages in kinds
    ]
    return assemble(
        task,
        (ema(0.9),),
        seeds,
        runs,
        data={"train": 64, "validation": 16},
        ensemble={"stop": {"MSE": 1.0}, "best": {"MSE": 1.0}},
        seconds=0.0,
        jobs=1,
        versions={},
    )


def curve(end: float, noise: float, seed: int) -> list[float]:
    """30 evaluations around `end`, the last exactly there."""
    values = end + noise * np.random.default_rng(seed).standard_normal(30)
    return [*values[:-1].tolist(), end]


def test_verdict_says_yes_when_the_gain_is_real() -> None:
    """Ten seeds, each about 20 % better and ten times calmer."""
    live = [curve(1.0, 0.1, seed) for seed in range(10)]
    average = [curve(0.8 + 0.01 * (seed % 3), 0.01, seed) for seed in range(10)]
    verdict = made(live, average).verdict
    assert (verdict.answer, verdict.calmer) == ("yes", "yes")
    assert "the calmer curve is real (10 of 10 seeds, median 10 times" in verdict.headline
    assert "the gain in MSE at the end is real (geometric mean +19 %" in verdict.headline
    assert "better in 10 of 10 seeds, sign test 0.002, by 18 % or more in each" in verdict.headline


def test_verdict_says_no_when_the_average_is_worse() -> None:
    """Ten seeds, each 20 % worse."""
    live = [curve(1.0, 0.1, seed) for seed in range(10)]
    average = [curve(1.2 + 0.01 * (seed % 3), 1.0, seed) for seed in range(10)]
    verdict = made(live, average).verdict
    assert (verdict.answer, verdict.calmer) == ("no", "no")
    assert "MSE at the end gets worse (geometric mean \N{MINUS SIGN}21 %" in verdict.headline
    assert "the curve is more restless (0 of 10 seeds" in verdict.headline


def test_verdict_says_calmer_but_uncertain() -> None:
    """The article's case: the curve calmer in each seed, the gain now up and now down.

    The ten changes are those that ten seeds of the article's experiment gave; their mean and
    interval are scipy's.
    """
    changes = [0.39, 0.33, 0.22, 0.17, -0.002, -0.03, -0.05, -0.10, -0.18, -0.20]
    live = [curve(1.0, 0.1, seed) for seed in range(10)]
    average = [curve(1.0 - change, 0.04, seed) for seed, change in enumerate(changes)]
    verdict = made(live, average).verdict
    logs = np.log1p(-np.asarray(changes))  # of new over old
    interval = stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
    mean, low, high = (
        f"{-100 * math.expm1(log):+.0f}".replace("-", "\N{MINUS SIGN}")
        for log in (logs.mean(), interval.high, interval.low)
    )
    assert (verdict.answer, verdict.calmer) == ("not shown", "yes")
    assert "the calmer curve is real (10 of 10 seeds, median 2.5 times" in verdict.headline
    assert (
        f"the gain in MSE at the end is uncertain (geometric mean {mean} %, 95 % interval {low} to "
        f"{high} %, better in 4 of 10 seeds, sign test 0.75)" in verdict.headline
    )
    assert verdict.title == "A calmer curve: yes. A better MSE at the end: not shown."


def test_verdict_calls_a_proved_small_change_little() -> None:
    """1 % better in every seed is better, and less than the 5 % that the task asks for."""
    live = [curve(1.0, 0.1, seed) for seed in range(6)]
    average = [curve(0.99 + 0.001 * (seed % 3), 0.1, seed) for seed in range(6)]
    verdict = made(live, average).verdict
    assert (verdict.answer, verdict.calmer) == ("little", "little")
    assert "MSE at the end changes little" in verdict.headline
    assert "less than 5 % either way" in verdict.headline
    assert made(live, average, small=0.0).verdict.answer == "yes"


def test_verdict_admits_that_few_seeds_show_little() -> None:
    """Three seeds get a warning with the t value; one seed gets no interval at all."""
    live = [curve(1.0, 0.1, seed) for seed in range(3)]
    average = [curve(0.9 - 0.01 * seed, 0.01, seed) for seed in range(3)]
    assert "3 seeds are few: the interval reaches 2.5 standard" in str(made(live, average).verdict)
    alone = made(live[:1], average[:1]).verdict
    assert (alone.answer, alone.calmer) == ("not shown", "not shown")
    assert "one seed: no interval" in alone.headline
    assert "One seed shows nothing about the next one" in str(alone)


def test_verdict_counts_seeds_that_diverged() -> None:
    """A seed whose average is NaN at the end is named, not averaged."""
    live = [curve(1.0, 0.1, seed) for seed in range(4)]
    average = [curve(0.8 + 0.01 * seed, 0.01, seed) for seed in range(4)]
    average[2] = [math.nan] * 30
    findings = made(live, average)
    assert "better in 3 of 3 seeds, sign test 0.25; 1 more without a figure" in str(
        findings.verdict
    )
    assert "1 of 4 seeds of EMA 0.9 ended without a finite MSE" in str(findings.verdict)
    swapped = made(average, live).verdict
    assert "1 of 4 seeds of live ended without a finite MSE" in str(swapped)
    assert json.loads(json.dumps(Study(findings).results, allow_nan=False))["ordinary"]


def test_verdict_says_that_the_control_changes_little() -> None:
    """On the control the average is as calm as the live curve and 2 % off."""
    live = [curve(1.0, 0.1, seed) for seed in range(5)]
    average = [curve(0.8, 0.01, seed) for seed in range(5)]
    quiet = [curve(0.5, 0.001, seed) for seed in range(5)]
    lagging = [[1.02 * value + 1e-5 * seed for value in c] for seed, c in enumerate(quiet)]
    said = made(live, average, control=(quiet, lagging)).verdict.sentences[-1]
    assert said.startswith("Control without mini-batch noise (full batch, dropout off): MSE at the")
    assert "changes little (geometric mean \N{MINUS SIGN}2.0 %" in said
    assert "the curve is as restless as before" in said


def test_verdict_weighs_the_rival() -> None:
    """A decayed learning rate that beats both is said to."""
    live = [curve(1.0, 0.1, seed) for seed in range(5)]
    average = [curve(0.8 + 0.01 * (seed % 2), 0.01, seed) for seed in range(5)]
    rival = [curve(0.5 + 0.01 * (seed % 2), 0.01, seed) for seed in range(5)]
    verdict = str(made(live, average, rival=rival).verdict)
    assert (
        "against the live weights, the gain in MSE at the end is real (geometric mean +50 %"
        in verdict
    )
    assert "Against that rival EMA 0.9 is worse" in verdict


def test_the_live_curve_is_early_stopped_like_the_average() -> None:
    """Both get the patience: the live curve's later, lower value is out of its reach."""
    live = [[3.0, 1.0, 2.0, 2.0, 2.0, 0.5]]
    average = [[3.0, 2.0, 1.5, 1.2, 1.1, 1.0]]
    outcome = made(live, average, patience=3).outcome
    assert (outcome.live.best, outcome.live.stop) == ([2], [5])
    assert outcome.live.values["best"]["validation"]["MSE"] == [1.0]
    assert outcome.live.values["stop"]["validation"]["MSE"] == [0.5]
    gained = outcome.rows["EMA 0.9"].gains
    assert gained["best"]["MSE"].differences == (0.0,)  # 1.0 at both best epochs
    assert gained["stop"]["MSE"].differences == (-math.log(2.0),)  # twice the live 0.5


# ---------------------------------------------------------------- training, against a plain loop


def plain_loop(seed: int, *, epochs: int) -> list[dict[str, Tensor]]:
    """Train the small task without polyak.study: the weights after every step."""
    data = small_data()
    torch.manual_seed(seed)
    model = small_model()
    optimizer = sgd(model.parameters())
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    seen = []
    for _ in range(epochs):
        for rows in torch.randperm(64, generator=generator).split(BATCH):
            optimizer.zero_grad()
            inputs, targets = data.train[0][rows], data.train[1][rows]
            nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
            seen.append({name: t.detach().clone() for name, t in model.state_dict().items()})
    return seen


def validation_mse(weights: dict[str, Tensor]) -> float:
    model = small_model().eval()
    model.load_state_dict(weights)
    inputs, targets = small_data().validation
    with torch.no_grad():
        return float(nn.functional.mse_loss(model(inputs), targets))


def mean_of(weights: Sequence[dict[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """The slow weighted sum, in float64."""
    return {
        name: torch.stack(
            [share * held[name].double() for share, held in zip(shares, weights, strict=True)]
        )
        .sum(0)
        .float()
        for name in weights[0]
    }


@pytest.fixture(scope="module")
def small_study() -> Study:
    return run_study(KEPT, seeds=2, jobs=1)


def _run_of(study: Study, kind: str, seed: int) -> Run:
    return next(r for r in study.findings.runs if (r.kind, r.seed) == (kind, seed))


def test_following_averages_leaves_training_alone(small_study: Study) -> None:
    """The live curve equals that of a loop that has never heard of averages, bit for bit."""
    seen = plain_loop(1, epochs=8)
    expected = [validation_mse(seen[STEPS * (epoch + 1) - 1]) for epoch in range(8)]
    assert _run_of(small_study, "ordinary", 1).curves[LIVE].validation["MSE"] == expected


@pytest.mark.parametrize("name", ["EMA 0.9", "EMA 0.9, plain", "SWA from 75 %", "window"])
def test_averages_in_the_study_are_the_weighted_sums(small_study: Study, name: str) -> None:
    """At the last epoch each average scores as the weighted sum of the plain loop's weights."""
    seen = plain_loop(0, epochs=8)
    torch.manual_seed(0)
    start = {name: t.clone() for name, t in small_model().state_dict().items()}
    steps = len(seen)
    powers = [0.1 * 0.9 ** (steps - s) for s in range(1, steps + 1)]
    if name == "EMA 0.9":
        weights, shares = seen, [p / sum(powers) for p in powers]
    elif name == "EMA 0.9, plain":
        weights, shares = [start, *seen], [0.9**steps, *powers]
    elif name == "SWA from 75 %":
        weights, shares = seen[24:], [1 / 8] * 8
    else:  # captures every 2 steps, the last three: 28, 30, 32
        weights, shares = [seen[27], seen[29], seen[31]], [1 / 3] * 3
    expected = validation_mse(mean_of(weights, shares))
    found = _run_of(small_study, "ordinary", 0).curves[name].validation["MSE"][-1]
    assert found == pytest.approx(expected, rel=1e-5)  # float32 averages against float64 sums


def test_a_tail_under_early_stopping_begins_where_the_run_stopped() -> None:
    """Its start is known afterwards: the mean of the weights at the ends of the last epochs."""
    task = replace(SMALL, epochs=40, patience=3, control=False)
    study = run_study(task, seeds=[3])
    run = _run_of(study, "ordinary", 3)
    seen = plain_loop(3, epochs=run.stop)
    first = round(0.75 * run.stop) + 1
    ends = [seen[STEPS * epoch - 1] for epoch in range(first, run.stop + 1)]
    expected = validation_mse(mean_of(ends, [1 / len(ends)] * len(ends)))
    tail = run.curves["SWA from 75 %"]
    assert tail.first == first
    assert tail.validation["MSE"][-1] == pytest.approx(expected, rel=1e-5)


def test_the_run_goes_on_until_every_curve_has_stopped() -> None:
    """No average is cut off by the stop of the live curve, and none is waited for in vain."""
    task = replace(SMALL, epochs=60, patience=2, control=False)
    run = _run_of(run_study(task, seeds=[0]), "ordinary", 0)
    stops = {
        name: early_stop(c.validation["MSE"], patience=2)
        for name, c in run.curves.items()
        if name != "SWA from 75 %"
    }
    assert run.stop == stops[LIVE].stop < len(run.train_loss)
    assert not any(stop.ran_out for stop in stops.values())
    assert len(run.train_loss) == max(stop.stop for stop in stops.values())


def test_the_rival_spends_the_same_steps_on_a_decayed_rate(small_study: Study) -> None:
    """As many epochs; the rate falls in a straight line; the first epoch sees the same batches."""
    rival, run = (_run_of(small_study, kind, 0) for kind in ("decayed", "ordinary"))
    steps = STEPS * run.stop
    expected = [0.1 * (1 - (STEPS * epoch - 1) / steps) for epoch in range(1, run.stop + 1)]
    assert rival.rates == pytest.approx(expected)
    assert run.rates == [0.1] * run.stop


def test_the_control_has_no_noise(small_study: Study) -> None:
    """Full batch and no dropout: its first training losses follow from plain gradient descent."""
    data = small_data()
    torch.manual_seed(0)
    model = small_model().eval()  # no dropout
    optimizer = sgd(model.parameters())
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(data.train[0]), data.train[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found = _run_of(small_study, "control", 0).train_loss[0]
    assert found == pytest.approx(sum(losses) / STEPS, rel=1e-6)


def test_warm_up_rises_in_a_line_and_then_leaves_the_rate_alone() -> None:
    """6 steps of warm-up at 4 steps an epoch: 4/6 of the rate after one epoch, all after two."""
    task = replace(SMALL, warmup=6, epochs=5)
    run = _run_of(run_study(task, seeds=[0], control=False), "ordinary", 0)
    assert run.rates == pytest.approx([0.1 * 4 / 6, 0.1, 0.1, 0.1, 0.1])


def test_every_row_is_seen_once_a_pass() -> None:
    """Ragged last batches included; all rows at once keep their order."""
    pair = (torch.arange(10), torch.arange(10))
    stream = batches(pair, size=4, seed=0)
    seen = torch.cat([next(stream)[0] for _ in range(3)])
    assert sorted(seen.tolist()) == list(range(10))
    again = torch.cat([next(stream)[0] for _ in range(3)])
    assert sorted(again.tolist()) == list(range(10))
    assert again.tolist() != seen.tolist()
    assert next(batches(pair, size=10, seed=0))[0] is pair[0]


# ---------------------------------------------------------------- many lengths from one run


def power_shares(sigma_rel: float, steps: int) -> list[float]:
    """Weights of a power function, updated at every step: the integral of its density there."""
    ends = (np.arange(steps + 1) / steps) ** (gamma_from_sigma_rel(sigma_rel) + 1.0)
    return [float(share) for share in np.diff(ends)]


def rebuilt_of(study: Study, seed: int) -> Lengths:
    found = _run_of(study, "ordinary", seed).lengths
    assert found is not None
    return found


def test_rebuilt_lengths_are_the_weighted_sums(small_study: Study) -> None:
    """Every length scores as the slow sum of the plain loop's weights, on both parts."""
    seen = plain_loop(0, epochs=8)
    lengths = rebuilt_of(small_study, 0)
    served = [one for one in lengths.curve if one.figures]
    assert [one.name for one in served][-3:] == ["power 0.16", "power 0.2", "power 0.25"]
    assert len(served) >= 6
    for one in served:
        shares = power_shares(float(one.name.split()[1]), len(seen))
        expected = validation_mse(mean_of(seen, shares))
        # float16 rounds each weight by up to 5e-4 of its size; the profile is within 1 %.
        assert one.figures["validation"]["MSE"] == pytest.approx(expected, rel=5e-3)
        ages = len(seen) - np.arange(1, len(seen) + 1)
        assert one.share == pytest.approx(float(ages @ np.asarray(shares)) / len(seen))
    for one in lengths.tracked:
        online = _run_of(small_study, "ordinary", 0).curves[one.name]
        assert one.figures["validation"]["MSE"] == pytest.approx(
            online.validation["MSE"][-1], rel=5e-3
        )
        assert one.figures["test"]["R2"] == pytest.approx(online.test["R2"][-1], abs=1e-3)
    assert [one.name for one in lengths.tracked] == ["EMA 0.8", "EMA 0.9"]  # not the plain one
    assert lengths.moments == 32


def test_the_curve_is_that_of_polyak_sweep(tmp_path: Path, small_study: Study) -> None:
    """A person's own loop, with Snapshots and sweep on the same data: the same scores and best."""
    torch.manual_seed(0)
    model = small_model()
    averages = Averages(model, {"short": Power(sigma_rel=0.05), "long": Power(sigma_rel=0.10)})
    with Snapshots(averages, tmp_path, every=1):
        for weights in plain_loop(0, epochs=8):
            model.load_state_dict(weights)
            averages.update()
    inputs, targets = small_data().validation

    def score(net: nn.Module) -> float:
        with torch.no_grad():
            return float(nn.functional.mse_loss(net(inputs), targets))

    served = [one for one in rebuilt_of(small_study, 0).curve if one.figures]
    widths = [Power(sigma_rel=float(one.name.split()[1])) for one in served]
    found = sweep(tmp_path, score, model=model, lengths=widths, higher_is_better=False)
    assert [point.score for point in found.points] == [
        one.figures["validation"]["MSE"] for one in served
    ]
    lengths = run_study(replace(KEPT, control=False), seeds=[0]).findings.lengths
    assert lengths is not None
    assert lengths.sweep.best.target == found.best.target
    assert [p.target for p in lengths.plateau] == [p.target for p in found.plateau]


def test_keeping_snapshots_leaves_training_alone() -> None:
    """Lengths are scored when the run stops and training goes on after that: the same bits."""
    task = replace(SMALL, epochs=60, patience=2, control=False)
    without, kept = (
        _run_of(run_study(replace(task, snapshots=count), seeds=[0]), "ordinary", 0)
        for count in (0, 8)
    )
    assert len(kept.train_loss) > kept.stop  # it did go on
    assert kept.curves == without.curves
    assert kept.train_loss == without.train_loss
    assert without.lengths is None
    assert kept.lengths is not None
    # At most 8 while it went, and the moment of the stop.
    assert 4 <= kept.lengths.moments <= 8
    assert kept.lengths.curve[0].error > 0.01
    assert kept.lengths.curve[0].figures == {}  # so few do not resolve the shortest
    seen = plain_loop(0, epochs=kept.stop)
    one = next(one for one in kept.lengths.curve if one.name == "power 0.1")
    expected = validation_mse(mean_of(seen, power_shares(0.1, len(seen))))
    assert one.figures["validation"]["MSE"] == pytest.approx(expected, rel=5e-3)


def test_the_folder_of_snapshots_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a run, and after one that broke with snapshots on disk."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    task = replace(KEPT, snapshots=4, epochs=2, control=False)
    run_study(task, seeds=1)
    assert list(tmp_path.iterdir()) == []
    held: list[int] = []

    def measure(outputs: Tensor, targets: Tensor) -> Tensor:
        held.append(len(list(tmp_path.rglob("*.safetensors"))))
        raise ValueError("boom")

    with pytest.raises(RunError, match="boom"):
        run_study(replace(task, metrics={"MSE": Metric(measure)}), seeds=1)
    assert held[-1] >= 2  # there was something to remove
    assert list(tmp_path.iterdir()) == []


def lengths_with(validation: Sequence[float], test: Sequence[float]) -> Lengths:
    """Three lengths with these figures, and none for the shortest, which is not resolved."""
    figures = [
        {"validation": {"MSE": v}, "test": {"MSE": t}}
        for v, t in zip(validation, test, strict=True)
    ]
    curve = [
        Rebuilt(f"power {width}", share, 1e-4, found)
        for width, share, found in zip((0.05, 0.1, 0.2), (0.05, 0.11, 0.26), figures, strict=True)
    ]
    first = Rebuilt("power 0.01", 0.01, 0.5, {})
    return Lengths((first, *curve), (), 64, 1_000, training=10.0, keeping=1.0, rebuilding=2.0)


def chosen() -> Findings:
    """Four seeds: of the lengths validation picks the middle one, of two EMAs the first.

    Seed 3 by itself would pick the longest and the second EMA. Test data like the longest best.
    """
    test = [[1.0, 0.80, 0.78], [1.0, 0.81, 0.78], [1.0, 0.79, 0.78], [1.0, 0.90, 0.7]]
    validation = [[1.0, 0.5, 0.6], [1.0, 0.5, 0.6], [1.0, 0.5, 0.6], [1.0, 0.6, 0.5]]
    emas = {  # name -> a pair of validation and test a seed
        "EMA 0.8": [(0.5, 0.82), (0.5, 0.80), (0.5, 0.80), (0.6, 0.85)],
        "EMA 0.9": [(0.6, 0.90), (0.6, 0.90), (0.6, 0.90), (0.5, 0.75)],
    }
    runs = []
    for seed in range(4):
        curves = {LIVE: Curve(1, {"MSE": [2.0]}, {"MSE": [2.0]})}
        for name, pairs in emas.items():
            curves[name] = Curve(1, {"MSE": [pairs[seed][0]]}, {"MSE": [pairs[seed][1]]})
        lengths = lengths_with(validation[seed], test[seed])
        runs.append(replace(run_with(curves, stop=1, seed=seed), lengths=lengths))
        runs.append(replace(runs[-1], kind="decayed", lengths=None))
    return assemble(
        replace(SMALL, metrics={"MSE": Metric(nn.functional.mse_loss)}, epochs=1),
        (ema(0.8), ema(0.9)),
        (0, 1, 2, 3),
        runs,
        data={"train": 64, "validation": 16, "test": 16},
        ensemble={},
        seconds=0.0,
        jobs=1,
        versions={},
    )


def test_lengths_are_picked_on_validation_and_judged_on_test() -> None:
    """Once over all seeds, and once in each run; against EMAs that were picked the same way."""
    findings = chosen()
    lengths = findings.lengths
    assert lengths is not None
    assert lengths.names == ("power 0.05", "power 0.1", "power 0.2")  # 0.01 is not resolved
    assert (lengths.best, lengths.rival) == ("power 0.1", "EMA 0.8")
    together = np.log([0.82 / 0.80, 0.80 / 0.81, 0.80 / 0.79, 0.85 / 0.90])
    assert lengths.together.gain.differences == pytest.approx(together)
    interval = stats.ttest_1samp(together, 0.0).confidence_interval(0.95)
    assert lengths.together.gain.low == pytest.approx(interval.low)
    assert lengths.alone.lengths == ("power 0.1",) * 3 + ("power 0.2",)
    assert lengths.alone.rivals == ("EMA 0.8",) * 3 + ("EMA 0.9",)
    alone = np.log([0.82 / 0.80, 0.80 / 0.81, 0.80 / 0.79, 0.75 / 0.70])
    assert lengths.alone.gain.differences == pytest.approx(alone)
    said = " ".join(findings.verdict.sentences)
    assert "validation picks power 0.1 (mean age 11 % of the run" in said
    assert "judged on test data, it is within noise of EMA 0.8, tracked online (geometric" in said


def test_the_band_holds_the_line_where_the_two_differ_within_noise() -> None:
    """By geometry: an interval around 0 is a band around the level of the best EMA."""
    findings = chosen()
    lengths = findings.lengths
    assert lengths is not None
    axis = lengths_drawn(findings, LIGHT).axes[0]
    (band,) = [shape for shape in axis.collections if isinstance(shape, PolyCollection)]
    corners = np.asarray(band.get_paths()[0].vertices)
    level = float(np.exp(np.log([0.82, 0.80, 0.80, 0.85]).mean()))
    for point, gain in zip(lengths.sweep.points, lengths.gains, strict=True):
        heights = corners[np.isclose(corners[:, 0], point.share), 1]
        inside = bool(heights.min() <= level <= heights.max())
        assert inside == (gain.low <= 0.0 <= gain.high)
        assert heights.min() == pytest.approx(level * math.exp(-gain.high))
    assert any(gain.finding != "uncertain" for gain in lengths.gains)  # both cases were seen


def test_no_lengths_are_claimed_where_a_seed_has_none(small_study: Study) -> None:
    """Without snapshots there is no table, no picture and no sentence of them."""
    bare = run_study(replace(SMALL, epochs=2, control=False), seeds=1)
    assert bare.findings.lengths is None
    assert "lengths" not in pictures(bare.findings)
    assert not any(table.title.startswith("Many lengths") for table in bare.tables)
    assert "afterwards" not in str(bare.verdict)
    assert "afterwards" in str(small_study.verdict)


# ---------------------------------------------------------------- a study from end to end


def test_a_study_from_end_to_end(tmp_path: Path, small_study: Study) -> None:
    """Two processes, the same figures as one; a page that needs nothing else; strict JSON."""
    moments: list[Moment] = []
    study = run_study(KEPT, seeds=2, jobs=2, tell=moments.append)
    for one, other in zip(study.findings.runs, small_study.findings.runs, strict=True):
        assert (one.kind, one.seed) == (other.kind, other.seed)
        assert (one.lengths is None) == (other.lengths is None) == (one.kind != "ordinary")
        if one.lengths is not None and other.lengths is not None:
            assert one.lengths.curve == other.lengths.curve
            assert one.lengths.tracked == other.lengths.tracked
        assert one.curves == other.curves  # every figure of every curve, bit for bit
        assert one.train_loss == other.train_loss
    assert {(m.seed, m.kind) for m in moments} == {
        (seed, kind) for seed in (0, 1) for kind in ("ordinary", "decayed", "control")
    }
    out = study.save(tmp_path / "out")
    names = ("loss", "metric", "methods", "weights", "differences", "lengths")
    pictures = {f"{name}.png" for name in names}
    assert {p.name for p in out.iterdir()} == pictures | {"report.html", "results.json"}
    for name in pictures:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    _check_page((out / "report.html").read_text(encoding="utf-8"), study)
    _check_results((out / "results.json").read_text(encoding="utf-8"), study)


def _check_page(page: str, study: Study) -> None:
    links = re.findall(r'(?:src|href|srcset)="([^"]*)"', page)
    assert len(links) == 12  # six pictures, light and dark
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert "<script" not in page
    assert "<b>a small task" not in page  # what a task says is text, not markup
    assert "&lt;b&gt;a small task" in page
    for table in study.tables:
        assert f"<h2>{table.title}</h2>" in page
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert study.verdict.title in page


def _check_results(text: str, study: Study) -> None:
    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(text, parse_constant=refuse)
    assert found["format"] == "polyak study"
    assert found["seeds"] == [0, 1]
    assert found["verdict"]["answer"] == study.verdict.answer
    assert found["versions"]["torch"] == torch.__version__
    live = found["runs"][0]["curves"][LIVE]["validation"]["MSE"]
    curve = study.findings.runs[0].curves[LIVE].validation["MSE"]
    assert live == pytest.approx(curve, rel=1e-5)  # six digits are kept
    gained = found["ordinary"]["methods"]["EMA 0.9"]["gains"]["stop"]["MSE"]
    test = [run.curves for run in study.findings.runs if run.kind == "ordinary"]
    ratios = [c[LIVE].test["MSE"][-1] / c["EMA 0.9"].test["MSE"][-1] for c in test]
    assert gained["differences"] == pytest.approx([math.log(ratio) for ratio in ratios], abs=1e-5)
    assert gained["shown"][0] == pytest.approx(1 - math.prod(ratios) ** (-1 / 2), rel=1e-4)
    arithmetic = sum(1 - 1 / ratio for ratio in ratios) / 2
    assert gained["arithmetic_mean"] == pytest.approx(arithmetic, rel=1e-4)


def test_a_study_leaves_the_caller_s_random_state_and_threads_alone() -> None:
    """A study inside somebody's script changes nothing of theirs."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    run_study(replace(SMALL, epochs=1, control=False), seeds=1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def exploding(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e30)


@pytest.mark.parametrize("changes", [{"epochs": 1}, {"epochs": 3, "optimizer": exploding}])
def test_poor_runs_get_a_page_too(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Curves of one point have no spread; a diverged run has no figures; both have a report."""
    study = run_study(replace(KEPT, control=False, **changes), seeds=1)
    assert (study.save(tmp_path / "out") / "report.html").exists()
    assert study.verdict.answer == "not shown"


def test_the_ensemble_joins_the_live_models() -> None:
    """Its figure is that of the mean of the outputs of the plain loops' models."""
    study = run_study(replace(SMALL, control=False), seeds=2)
    inputs, targets = small_data().validation
    inputs, targets = small_data().test or (inputs, targets)
    outputs = []
    for seed in (0, 1):
        model = small_model().eval()
        model.load_state_dict(plain_loop(seed, epochs=8)[-1])
        with torch.no_grad():
            outputs.append(model(inputs))
    expected = float(nn.functional.mse_loss(sum(outputs) / 2, targets))
    assert study.findings.outcome.ensemble["stop"]["MSE"] == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------- refusals


def test_an_error_in_a_worker_says_which_seed_and_why() -> None:
    """The message of the task's own error, its place and the seed come back in one line."""
    task = replace(SMALL, loss=broken_loss)
    with pytest.raises(RunError, match=r"ValueError with seed \d at .*boom: the targets"):
        run_study(task, seeds=2, jobs=2)
    with pytest.raises(RunError, match="with seed 0 at"):
        run_study(task, seeds=1)
    assert issubclass(RunError, AveragingError)


def test_ctrl_c_that_finds_the_pool_s_locks_taken_still_ends_the_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It comes while `wait` holds the lock of each future, which the pool's own thread needs."""
    take_locks = futures._base._AcquireFutures.__enter__

    def interrupted(self: Any) -> None:
        take_locks(self)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(futures._base._AcquireFutures, "__enter__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(replace(SMALL, epochs=1_000_000), seeds=4, jobs=2)  # they stop in the midst of it
    assert not multiprocessing.active_children()


def test_a_second_ctrl_c_ends_workers_that_take_long() -> None:
    """Who presses twice waits for no evaluation; the first press alone would wait for minutes."""
    presses = [Timer(wait, os.kill, (os.getpid(), signal.SIGINT)) for wait in (0.5, 1.5)]

    def press(moment: Moment) -> None:
        while presses:
            presses.pop().start()

    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run_study(replace(SMALL, loss=loss_that_hangs), seeds=2, jobs=2, tell=press)
    assert time.perf_counter() - began < HANGS
    assert not multiprocessing.active_children()


def test_workers_end_with_a_parent_that_was_killed() -> None:
    """Also one that waits for its next seed, from a parent that had no time to say a word."""
    code = (
        "import os, signal\n"
        "from polyak.study._run import _pool\n"
        "with _pool(1) as (pool, moments):\n"
        "    assert pool.submit(abs, -1).result() == 1\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as killed:
        try:
            _, said = killed.communicate(timeout=60)  # ends with the last process that can write
        except subprocess.TimeoutExpired:
            os.killpg(killed.pid, signal.SIGKILL)
            raise
    assert killed.returncode == -signal.SIGKILL, said


def test_a_task_of_lambdas_needs_one_process() -> None:
    """It cannot be sent elsewhere; the error says what to do, before anything is trained."""
    task = replace(SMALL, model=lambda: small_model())
    with pytest.raises(ArgumentError, match="or pass jobs=1"):
        run_study(task, seeds=2, jobs=2)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"headline": "EMA of Mars"}, "headline must be an average or a family"),
        ({"watch": "window"}, "watch must be 'live' or one of the averages"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    """Before any training."""
    with pytest.raises(ArgumentError, match=said):
        run_study(replace(SMALL, **changes), seeds=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
        ({"batch": -1}, "batch must be 1 or more"),
        ({"patience": 0}, "patience must be 1 or more"),
        ({"snapshots": 3}, "snapshots must be 4 or more, or 0, got 3"),
        ({"metrics": {}}, "metrics must hold at least one"),
    ],
)
def test_impossible_tasks_are_refused(changes: dict[str, Any], said: str) -> None:
    """When they are built."""
    with pytest.raises(ArgumentError, match=said):
        replace(SMALL, **changes)


def test_impossible_studies_are_refused() -> None:
    """No seeds, one seed twice, no process, data that does not pair up."""
    with pytest.raises(ArgumentError, match="seeds must be one or more"):
        run_study(SMALL, seeds=0)
    with pytest.raises(ArgumentError, match="all different"):
        run_study(SMALL, seeds=[1, 1])
    with pytest.raises(ArgumentError, match="jobs must be 1 or more"):
        run_study(SMALL, jobs=0)
    with pytest.raises(ArgumentError, match="got 3 inputs and 2 targets"):
        Data(train=(torch.zeros(3), torch.zeros(2)), validation=(torch.zeros(1), torch.zeros(1)))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds, and the study from end to end draws."""
    monkeypatch.setattr(_folder, "pictures", lambda study: {})
    monkeypatch.setattr(_folder, "page", lambda *_, **__: "<!doctype html>")


@pytest.mark.usefixtures("no_pictures")
def test_only_an_earlier_study_is_ever_replaced(tmp_path: Path, small_study: Study) -> None:
    """A file, somebody's folder and an earlier study are refused; --force replaces the last."""
    somebody = tmp_path / "thesis"
    somebody.mkdir()
    (somebody / "chapter.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(ArgumentError, match=r"an earlier study, got .*chapter\.tex"):
            check_folder(somebody, force=force)
    lookalike = tmp_path / "lookalike"
    lookalike.mkdir()
    (lookalike / "results.json").write_text('{"format": "another program"}')
    with pytest.raises(ArgumentError, match=r"results\.json"):
        check_folder(lookalike, force=True)
    with pytest.raises(ArgumentError, match="must be a folder"):
        check_folder(somebody / "chapter.tex")
    out = tmp_path / "out"
    small_study.save(out)
    (out / "report.html").write_text("old")
    with pytest.raises(ArgumentError, match="--force"):
        small_study.save(out)
    assert (out / "report.html").read_text() == "old"
    small_study.save(out, force=True)
    assert (out / "report.html").read_text() != "old"
    (out / "notes.txt").write_text("what I learned")  # now it holds more than a study
    with pytest.raises(ArgumentError, match=r"notes\.txt"):
        small_study.save(out, force=True)
    assert (out / "notes.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lookalike", "out", "thesis"]


@pytest.mark.usefixtures("no_pictures")
def test_nothing_is_left_half_written(
    tmp_path: Path, small_study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When writing breaks half-way the old study stands and no temporary folder stays."""
    out = tmp_path / "out"
    small_study.save(out)
    before = (out / "results.json").read_bytes()

    def stop(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(_folder, "page", stop)
    with pytest.raises(KeyboardInterrupt):
        small_study.save(out, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "results.json").read_bytes() == before


def test_a_missing_library_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib the message holds the line to type."""
    monkeypatch.setattr(_extra, "find_spec", lambda name: None if name == "matplotlib" else name)
    with pytest.raises(ImportError, match=r'no matplotlib\. Run: pip install "polyak\[study\]"'):
        _extra.check_libraries()


# ---------------------------------------------------------------- the tasks that come with it


def test_regression_is_the_article_s_task() -> None:
    """Sizes, scaling, parameters and optimizer as published."""
    task = TASKS["regression"]()
    data = task.data()
    assert data.test is None
    assert data.train[0].shape == (1600, 20)
    assert data.validation[1].shape == (400, 1)
    inputs = torch.cat([data.train[0], data.validation[0]]).double()
    targets = torch.cat([data.train[1], data.validation[1]]).double()
    for values in (inputs, targets):
        assert torch.allclose(values.mean(0), torch.zeros(values.shape[1]).double(), atol=1e-6)
        assert torch.allclose(values.var(0, correction=0), torch.ones(1).double(), atol=1e-5)
    model = task.model()
    assert sum(p.numel() for p in model.parameters()) == (20 * 64 + 64) + (64 * 32 + 32) + 33
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.2, 0.2]
    assert all(float(p.abs().sum().detach()) == 0.0 for p in model.parameters() if p.ndim == 1)
    optimizer = task.optimizer(model.parameters())
    assert isinstance(optimizer, torch.optim.Adam)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-3, 1e-5)
    assert (task.epochs, task.batch, task.patience, task.watch) == (500, 32, 20, ARTICLE)
    assert task.scheduler is not None
    plateau = task.scheduler(optimizer)
    assert isinstance(plateau, torch.optim.lr_scheduler.ReduceLROnPlateau)
    assert (plateau.factor, plateau.patience) == (0.5, 10)


def test_text_predicts_the_character_that_follows() -> None:
    """Contexts and targets line up, and no held-out character is trained on."""
    data = TASKS["text"]().data()
    assert data.test is not None
    contexts, following = data.train
    assert contexts.shape[1] == 8
    assert torch.equal(contexts[1:, -1], following[:-1])
    assert len(data.validation[0]) == len(data.test[0]) == 4000
    held = torch.cat([data.validation[0], data.test[0]])
    assert held.max() < 110  # letters are codes of an alphabet


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_runs(name: str) -> None:
    """One evaluation of each task that comes with the library, with all its methods."""
    task = replace(TASKS[name](), snapshots=8)
    found = run_study(task, seeds=1, epochs=1, control=False).findings
    assert all(
        math.isfinite(row.values["stop"]["validation"][task.judge][0])
        for row in found.outcome.rows.values()
    )
    assert found.runs[0].lengths is not None


# ---------------------------------------------------------------- the results kept in docs/studies

STUDIES = Path(__file__).parents[1] / "docs" / "studies"


def test_picked_on_one_half_and_judged_on_the_other() -> None:
    """Even rows pick the second epoch and odd rows the third: the mean of what the others say."""
    live = Curve(1, {"MSE": [3.0, 2.0, 2.0]}, {}, {EVEN: [3.0, 1.0, 2.0], ODD: [3.0, 5.0, 2.0]})
    average = Curve(1, {"MSE": [3.0, 2.0, 1.0]}, {}, {EVEN: [3.0, 2.0, 1.0], ODD: [4.0, 3.0, 1.0]})
    outcome = measure(
        replace(SMALL, metrics={"MSE": Metric(nn.functional.mse_loss)}),
        [run_with({LIVE: live, "EMA 0.9": average}, stop=3)],
        (ema(0.9),),
        kind="ordinary",
        ensemble={},
    )
    assert outcome.live.crossed == [(5.0 + 2.0) / 2]  # odd at epoch 2, even at epoch 3
    assert outcome.rows["EMA 0.9"].crossed == [1.0]
    assert outcome.rows["EMA 0.9"].crossed_gain.differences == pytest.approx((math.log(3.5),))


def run_with(curves: dict[str, Curve], *, stop: int, seed: int = 0) -> Run:
    return Run(
        kind="ordinary",
        seed=seed,
        steps_per_epoch=STEPS,
        stop=stop,
        train_loss=[1.0] * stop,
        rates=[0.1] * stop,
        curves=curves,
        bytes=4,
        seconds=0.0,
        outputs={},
    )


def test_the_halves_are_the_halves_of_the_validation_rows() -> None:
    """Recorded where there is no test part: two halves of one size whose mean is the whole."""
    whole = small_data()

    def data() -> Data:
        return Data(train=whole.train, validation=whole.validation)

    task = replace(SMALL, data=data, epochs=2, control=False)
    curve = _run_of(run_study(task, seeds=1), "ordinary", 0).curves[LIVE]
    means = [(e + o) / 2 for e, o in zip(curve.halves[EVEN], curve.halves[ODD], strict=True)]
    assert means == pytest.approx(curve.validation["MSE"], rel=1e-5)
    assert curve.halves[EVEN] != curve.halves[ODD]


def test_the_mean_of_the_tail_has_no_best_epoch(small_study: Study) -> None:
    """Its first value is one capture, the live weights: its best epoch would be luck of theirs."""
    early = run_study(replace(SMALL, epochs=30, patience=3, control=False), seeds=1)
    for study in (small_study, early):
        row = study.findings.outcome.rows["SWA from 75 %"]
        assert set(row.best) == {None}
        assert row.gains["best"]["MSE"].seeds == 0
        assert row.gains["stop"]["MSE"].seeds == len(study.findings.seeds)


def test_a_control_that_stays_random_is_refused() -> None:
    """Dropout modules are turned off; noise of any other kind is refused, not called none."""
    assert run_study(replace(SMALL, model=odd_dropouts, epochs=1), seeds=1).findings.control
    with pytest.raises(ArgumentError, match="not random in training"):
        run_study(replace(SMALL, model=noisy_model, epochs=1), seeds=1)


class Noise(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + 0.1 * torch.randn_like(inputs) if self.training else inputs


def noisy_model() -> nn.Module:
    return nn.Sequential(small_model(), Noise())


def odd_dropouts() -> nn.Module:
    return nn.Sequential(nn.FeatureAlphaDropout(0.3), small_model())


def test_no_average_below_the_live_curve_leaves_its_panel(small_study: Study) -> None:
    """Every panel shows where its curve ends, unless that is far above the live one."""
    for findings in (small_study.findings, made([[4.0] * 30] * 3, [[0.2] * 30] * 3)):
        figure = small_multiples(findings, LIGHT)
        for axis in (axis for axis in figure.axes if axis.lines):
            live, own = (np.asarray(line.get_ydata(), dtype=np.float64) for line in axis.lines)
            low, high = axis.get_ylim()
            assert low < own[-1]
            assert own[-1] < high or own[-1] > live[-1]


def test_curves_that_stop_at_different_epochs_meet_at_shares_of_their_runs() -> None:
    """Two falling lines of 20 and of 40 epochs are one line over the share of the run."""
    runs = [
        run_with({LIVE: Curve(1, {"MSE": [1.0 - e / n for e in range(1, n + 1)]})}, stop=n, seed=n)
        for n in (20, 40)
    ]
    times, seeds = _over_seeds(runs, LIVE, "MSE")
    assert (times[0], times[-1]) == (pytest.approx(5.0, abs=0.5), 100.0)
    assert np.allclose(seeds, 1.0 - times / 100.0, atol=1e-12)


def test_a_study_read_back_is_the_study(tmp_path: Path, small_study: Study) -> None:
    """Verdict and tables are the same words; a task of one's own must be given, and be the one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_folder, "pictures", lambda study: {})
        patched.setattr(_folder, "page", lambda *_, **__: "<!doctype html>")
        out = small_study.save(tmp_path / "out", command="polyak study small")
        again = Study.load(out, task=KEPT)
        assert again.verdict == small_study.verdict
        assert again.tables == small_study.tables
        assert again.findings.command == "polyak study small"
        again.save(out, force=True)
        before = json.loads((out / "results.json").read_text())
        assert before["runs"] == Study.load(out, task=KEPT).results["runs"]
        older = {**before, "format_number": 2}  # written before a run kept snapshots
        older["runs"] = [{k: v for k, v in r.items() if k != "lengths"} for r in before["runs"]]
        (out / "results.json").write_text(json.dumps(older))
        assert Study.load(out, task=KEPT).findings.lengths is None
        assert Study.load(out, task=KEPT).verdict.headline == small_study.verdict.headline
    with pytest.raises(ArgumentError, match="task must be given"):
        Study.load(out)
    with pytest.raises(ArgumentError, match="task must be the one that was studied"):
        Study.load(out, task=replace(KEPT, batch=8))
    with pytest.raises(ArgumentError, match=r"got a study that holds \['EMA 0.9', "):
        Study.load(out, task=replace(KEPT, methods=lambda steps: (ema(0.8),)))
    with pytest.raises(ArgumentError, match=r"folder must hold the results\.json of a study"):
        Study.load(tmp_path)


def test_a_name_that_leaves_no_room_beside_it_is_refused_before_training(tmp_path: Path) -> None:
    """The folder is written under a longer name first; after training it would be too late."""
    with pytest.raises(ArgumentError, match="Choose a shorter name"):
        check_folder(tmp_path / ("n" * 240))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path: Path) -> None:
    """Below a file, and where the system makes no folders, asked of the system itself."""
    (tmp_path / "file").write_text("")
    for impossible in (tmp_path / "file" / "out", Path("/proc/nope/out")):
        with pytest.raises(ArgumentError, match="out must lie where a folder can be made"):
            check_folder(impossible)
    assert check_folder(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]  # nothing is left of the question


def test_the_longest_length_tried_is_said_to_be(small_study: Study) -> None:
    """A pick at an end of its family is no proof that the length was tuned."""
    longest = "is the longest that was tried: a longer one may be better."
    shortest = "is the shortest that was tried: a shorter one may be better."
    said = str(small_study.verdict)
    headline = small_study.findings.outcome.headline
    assert headline in ("EMA 0.8", "EMA 0.9")
    assert (longest if headline == "EMA 0.9" else shortest) in said


@pytest.mark.parametrize("name", sorted(TASKS))
def test_docs_quote_the_kept_results(name: str) -> None:
    """docs/study.md, the README and the verdict that code draws from the kept figures agree."""
    kept = Study.load(STUDIES / name)
    found = json.loads((STUDIES / name / "results.json").read_text())
    assert found["verdict"]["headline"] == kept.verdict.headline
    root = Path(__file__).parents[1]
    page = " ".join((root / "docs" / "study.md").read_text().replace("\n>", "\n").split())
    assert kept.verdict.headline in page
    assert f"`{found['command']}`" in page
    assert kept.verdict.title in " ".join((root / "README.md").read_text().split())


@pytest.mark.parametrize("name", ["digits", "text"])
def test_docs_quote_the_lengths_of_the_kept_results(name: str) -> None:
    """docs/lengths.md says of length against EMA, and of the cost, what the kept figures say."""
    kept = Study.load(STUDIES / name)
    text = (Path(__file__).parents[1] / "docs" / "lengths.md").read_text()
    page = " ".join(text.replace("\n>", "\n").split())
    said = [s for s in kept.verdict.sentences if s.startswith(("Any length", "Where both"))]
    assert len(said) == 2
    (note,) = [table.note for table in kept.tables if table.title.startswith("Many lengths")]
    for sentence in (*said, note[note.index("All of it costs") :]):
        assert sentence in page
