"""Metric against length, from one run a seed: which is best, and is it as good as one tracked?"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from polyak._schedules import Power
from polyak._sweep import Point, Sweep

from ._keep import WIDTHS, Lengths, Rebuilt
from ._methods import LIVE, Averaged, Method, has_length
from ._results import Outcome, Row, picked
from ._statistics import Paired, gains, paired
from ._task import Task
from ._train import Run


@dataclass(frozen=True)
class Standing:
    """A rebuilt length against an EMA that was tracked online, both picked on validation data.

    Args:
        lengths: name of the picked length, one a seed.
        rivals: name of the picked EMA, one a seed.
        gain: paired differences on the judged part, above 0 where the rebuilt one is better.
    """

    lengths: tuple[str, ...]
    rivals: tuple[str, ...]
    gain: Paired


@dataclass(frozen=True)
class Tracked:
    """An average that was tracked online, and the same one rebuilt from the snapshots.

    Args:
        name: the method.
        share: its mean age as a share of the run, mean over seeds.
        error: largest relative squared profile error of its reconstructions.
        online: judged metric on the judged part at the stop, a figure a seed.
        rebuilt: the same of the reconstruction; NaN where the snapshots do not resolve it.
        gain: paired differences, above 0 where the rebuilt one is better.
    """

    name: str
    share: float
    error: float
    online: list[float]
    rebuilt: list[float]
    gain: Paired


@dataclass(frozen=True)
class LengthFindings:
    """Averages of many lengths at the stop, each seed's from the snapshots of its one run.

    Args:
        names: the lengths that every seed's snapshots resolve, from short to long.
        sweep: their validation values, mean over seeds; the unit of time is the run.
        values: judged metric on the judged part [lengths][seeds].
        rival: the best EMA tracked online, picked on validation data over all seeds; the best
            power function where there is no EMA, the live weights where there is neither.
        level: its values on the judged part, a figure a seed.
        gains: paired differences of each length to the rival, above 0 where it is better.
        together: length and EMA picked once, over all seeds.
        alone: length and EMA picked in each run from that run: what one run lets one do.
        tracked: averages tracked online beside their reconstructions.
        kept: what each run kept, and what it took.
    """

    names: tuple[str, ...]
    sweep: Sweep
    values: tuple[list[float], ...]
    rival: str
    level: list[float]
    gains: tuple[Paired, ...]
    together: Standing
    alone: Standing
    tracked: tuple[Tracked, ...]
    kept: tuple[Lengths, ...]

    @property
    def best(self) -> str:
        """The length with the best validation value, mean over seeds."""
        return self.names[self.sweep.points.index(self.sweep.best)]

    @property
    def plateau(self) -> tuple[Point, Point]:
        """The shortest and the longest that are nearly as good on validation: `Sweep.plateau`."""
        return self.sweep.plateau


def length_findings(
    task: Task, runs: Sequence[Run], methods: Sequence[Method], outcome: Outcome
) -> LengthFindings | None:
    """Compare the rebuilt lengths of all seeds; None where no length was served in all of them."""
    kept = [run.lengths for run in runs if run.kind == "ordinary" and run.lengths is not None]
    if len(kept) < len(outcome.stops):
        return None
    read = _Reader(task, outcome.part)
    points = _points(read, kept)
    if not points:
        return None
    rivals = _rivals(methods, outcome)
    rival = picked(task, outcome.rows, rivals)
    level = outcome.figures(rival, "stop", task.judge)
    values = {name: [read.judged(one) for one in line] for name, (line, _) in points.items()}
    sweep = Sweep(
        tuple(point for _, point in points.values()),
        at=1.0,
        higher_is_better=task.metrics[task.judge].better == "higher",
    )
    best = list(points)[sweep.points.index(sweep.best)]
    once = Standing((best,) * len(kept), (rival,) * len(kept), read.gain(level, values[best]))
    lines = {name: line for name, (line, _) in points.items()}
    return LengthFindings(
        names=tuple(points),
        sweep=sweep,
        values=tuple(values.values()),
        rival=rival,
        level=level,
        gains=tuple(read.gain(level, line) for line in values.values()),
        together=once,
        alone=_picked_alone(read, lines, {name: outcome.rows[name] for name in rivals}),
        tracked=_tracked(read, kept, outcome),
        kept=tuple(kept),
    )


def _picked_alone(
    read: "_Reader", lines: Mapping[str, Sequence[Rebuilt]], rivals: Mapping[str, Row]
) -> Standing:
    """Length and EMA picked in each run by its own validation data."""
    lengths, emas, before, after = [], [], [], []
    for seed in range(len(next(iter(lines.values())))):
        mine = read.best({n: read.validation(line[seed]) for n, line in lines.items()})
        held = {n: row.values["stop"] for n, row in rivals.items()}
        theirs = read.best({n: v["validation"][read.judge][seed] for n, v in held.items()})
        lengths.append(mine)
        emas.append(theirs)
        before.append(held[theirs][read.part][read.judge][seed])
        after.append(read.judged(lines[mine][seed]))
    return Standing(tuple(lengths), tuple(emas), read.gain(before, after))


class _Reader:
    """The metric that judges: where to read it, and which of two values is better."""

    def __init__(self, task: Task, part: str) -> None:
        self.judge, self.part = task.judge, part
        self.metric = task.metrics[task.judge]

    def validation(self, one: Rebuilt) -> float:
        return one.figures["validation"][self.judge] if one.figures else math.nan

    def judged(self, one: Rebuilt) -> float:
        return one.figures[self.part][self.judge] if one.figures else math.nan

    def gain(self, before: Sequence[float], after: Sequence[float]) -> Paired:
        metric = self.metric
        return paired(gains(before, after, better=metric.better, compare=metric.compare))

    def best(self, values: Mapping[str, float]) -> str:
        """The name of the best value; one that is not finite is worst."""
        sign = 1.0 if self.metric.better == "lower" else -1.0
        return min(values, key=lambda n: sign * values[n] if math.isfinite(values[n]) else math.inf)


def _by_name(lines: Iterable[tuple[Rebuilt, ...]]) -> dict[str, tuple[Rebuilt, ...]]:
    """What was rebuilt in every run, by name: one entry a seed."""
    return {line[0].name: line for line in zip(*lines, strict=True)}


def _points(read: _Reader, kept: Sequence[Lengths]) -> dict[str, tuple[tuple[Rebuilt, ...], Point]]:
    """Each length that all seeds have a figure of, and what it is in the mean."""
    targets = {f"power {width:g}": Power(sigma_rel=width) for width in WIDTHS}
    found = {}
    for name, line in _by_name(each.curve for each in kept).items():
        score = _mean([read.validation(one) for one in line])
        share = _mean([one.share for one in line])
        if math.isfinite(score):  # else some seed does not serve this length, or diverged
            error = max(one.error for one in line)
            found[name] = line, Point(targets[name], share, share, error, score)
    return found


def _rivals(methods: Sequence[Method], outcome: Outcome) -> list[str]:
    """The EMAs that were tracked, else the power functions, else the live weights."""
    tracked = [m for m in methods if isinstance(m, Averaged) and m.name in outcome.rows]
    lengths = [m for m in tracked if has_length(m)]
    emas = [m.name for m in lengths if not isinstance(m.schedule, Power)]
    return emas or [m.name for m in lengths] or [LIVE]


def _tracked(read: _Reader, kept: Sequence[Lengths], outcome: Outcome) -> tuple[Tracked, ...]:
    found = []
    for name, line in _by_name(each.tracked for each in kept).items():
        online = outcome.figures(name, "stop", read.judge)
        rebuilt = [read.judged(one) for one in line]
        found.append(
            Tracked(
                name=name,
                share=_mean([one.share for one in line]),
                error=max(one.error for one in line),
                online=online,
                rebuilt=rebuilt,
                gain=read.gain(online, rebuilt),
            )
        )
    return tuple(sorted(found, key=lambda each: each.share))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
