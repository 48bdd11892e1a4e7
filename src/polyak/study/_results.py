"""From curves to figures: values under equal rules, differences over seeds, spreads, profiles."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from polyak._profiles import profile

from ._curves import Spreads, early_stop, overtakes, spreads
from ._methods import DECAYED, LIVE, Averaged, Method, Tail, Windowed
from ._metrics import Metric
from ._statistics import Paired, gains, paired
from ._task import Data, Task
from ._train import EVEN, ODD, Run, scores

Rule = Literal["stop", "best"]
RULES: tuple[Rule, ...] = ("stop", "best")
"""Two moments at which curves are compared: all at the stop of the run; each at its own best
epoch, found on validation data with the same patience."""

_NAN = float("nan")


@dataclass(frozen=True)
class Calm:
    """How many times calmer than the live curve, a figure a seed, and what that shows.

    Args:
        ratios: spread of the live curve over spread of this one after the first third of the run,
            a straight line taken out of the middle and of the last third of both.
        logs: their logarithms as paired differences: what the verdict judges.
        plain: logarithms of the ratio of plain standard deviations after the first third, where a
            curve that still falls counts as restless.
        jumps: logarithms of the ratio of the changes from one evaluation to the next.
    """

    ratios: tuple[float, ...]
    logs: Paired
    plain: Paired
    jumps: Paired

    @property
    def median(self) -> float:
        """Median ratio: 2.4 means 2.4 times calmer."""
        return _median(self.ratios)


@dataclass(frozen=True)
class Row:
    """One method over all seeds.

    Args:
        name: the method.
        values: rule -> part -> metric -> a figure a seed; NaN where there is none.
        best: epoch of the best judged validation value under the task's patience; None for an
            average of the tail of the run, whose first values are those of single captures.
        stop: epoch at which that patience ended the curve.
        overtakes: epoch from which it stays ahead of the live curve; None when it never does.
        spreads: of the judged validation curve, up to the stop of the run.
        gains: rule -> metric -> paired differences to the live weights, above 0 where better;
            of a metric that compares relatively, logarithms of ratios.
        crossed: the judged metric at an epoch picked on half of the validation rows, measured on
            the other half, mean of both ways, a figure a seed; empty where a test part judges.
        crossed_gain: its paired differences to the live weights.
        calm: against the live curve.
    """

    name: str
    values: dict[Rule, dict[str, dict[str, list[float]]]]
    best: list[int | None]
    stop: list[int]
    overtakes: list[int | None]
    spreads: list[Spreads]
    gains: dict[Rule, dict[str, Paired]]
    crossed: list[float]
    crossed_gain: Paired
    calm: Calm


@dataclass(frozen=True)
class Memory:
    """What a method remembers at the stop, and what it costs to keep.

    Args:
        name: the method.
        rule: its schedule, printed.
        epochs: moments of training, in epochs.
        weights: how much each counts.
        initial: weight of the initial weights.
        mean_age: in steps.
        noise_window: 1 / sum w^2, updates that count alike.
        copies: copies of the averaged tensors kept beside the live ones.
        bytes: what these take.
        replayed: copies that the study kept, because it learned only afterwards where the average
            had to begin; 0 where it did not have to.
    """

    name: str
    rule: str
    epochs: NDArray[np.float64]
    weights: NDArray[np.float64]
    initial: float
    mean_age: float
    noise_window: float
    copies: int
    bytes: int
    replayed: int = 0


@dataclass(frozen=True)
class Outcome:
    """Everything measured in the runs of one kind.

    Args:
        kind: "ordinary" (with its rival) or "control".
        judge: the metric that picks and judges.
        part: the part of the data that it is judged on: "test" where there is one.
        stops: epoch at which each seed's run stopped.
        rows: the live weights first, then every average, then the rival.
        headline: the average that the verdict speaks of.
        favourite: the average that validation would pick among all.
        ensemble: rule -> metric -> figure of the ensemble of the live models of all seeds.
    """

    kind: str
    judge: str
    part: str
    stops: tuple[int, ...]
    rows: dict[str, Row]
    headline: str
    favourite: str
    ensemble: dict[Rule, dict[str, float]]

    @property
    def live(self) -> Row:
        """The live weights."""
        return self.rows[LIVE]

    def figures(self, name: str, rule: Rule, metric: str) -> list[float]:
        """Values of a method on the judged part, a figure a seed."""
        return self.rows[name].values[rule][self.part][metric]


def measure(
    task: Task,
    runs: Sequence[Run],
    methods: Sequence[Method],
    *,
    kind: str,
    ensemble: dict[Rule, dict[str, float]],
) -> Outcome:
    """Compare the curves of all seeds of one kind of run under the two rules."""
    chosen = [run for run in runs if run.kind == kind]
    rivals = [run for run in runs if run.kind == "decayed"] if kind == "ordinary" else []
    patience = task.patience if kind == "ordinary" else None
    late = {
        m.name for m in methods if isinstance(m, Tail) or (isinstance(m, Averaged) and m.shown_from)
    }
    live = _Traces(task, LIVE, chosen, patience)
    rows = {
        name: _row(name, _Traces(task, name, chosen, patience, late=name in late), live)
        for name in chosen[0].curves
        if all(name in run.curves for run in chosen)  # a short run may never fill a window
    }
    averages = [name for name in rows if name != LIVE]
    family = {
        m.name for m in methods if not isinstance(m, Tail) and task.headline in (m.name, m.family)
    }
    headline = picked(task, rows, [name for name in averages if name in family])
    favourite = picked(task, rows, averages)
    for name in (LIVE, headline) if rivals else ():
        title = DECAYED if name == LIVE else f"{DECAYED} + {name}"
        # A rate planned to its end is run to its end: stopping early would cut the decay off.
        rows[title] = _row(title, _Traces(task, name, rivals, None), live)
    return Outcome(
        kind=kind,
        judge=task.judge,
        part=live.part,
        stops=tuple(run.stop for run in chosen),
        rows=rows,
        headline=headline,
        favourite=favourite,
        ensemble=ensemble,
    )


class _Traces:
    """The curves of one method, a curve a seed, and where each of them stands under a rule."""

    def __init__(
        self,
        task: Task,
        name: str,
        runs: Sequence[Run],
        patience: int | None,
        *,
        late: bool = False,
    ) -> None:
        self.task, self.patience, self.late = task, patience, late
        self.curves = [run.curves[name] for run in runs]
        self.ends = [run.stop for run in runs]
        # The first value of a tail is one capture, the live weights themselves: nothing to pick.
        patience = None if late else patience
        self.stopped = [early_stop(values, patience=patience) for values in self.judged()]
        self.part = "test" if self.curves[0].test else "validation"

    @property
    def sign(self) -> float:
        """-1 where a higher value of the metric that judges is better."""
        return 1.0 if self.task.metrics[self.task.judge].better == "lower" else -1.0

    def judged(self) -> list[list[float]]:
        """Validation values of the metric that judges, lower being better."""
        judge = self.task.judge
        return [[self.sign * value for value in curve.validation[judge]] for curve in self.curves]

    def crossed(self) -> list[float]:
        """Picked on half of the validation rows, judged on the other half: mean of both ways."""
        if not self.curves[0].halves:
            return []
        found = []
        for curve in self.curves:
            even, odd = curve.halves[EVEN], curve.halves[ODD]
            picks = [
                (early_stop([self.sign * v for v in one], patience=self.patience).best, other)
                for one, other in ((even, odd), (odd, even))
            ]
            values = [_NAN if best is None or self.late else v[best - 1] for best, v in picks]
            found.append(sum(values) / 2.0)
        return found

    def best(self) -> list[int | None]:
        """Epoch of each curve's best value."""
        if self.late:
            return [None for _ in self.curves]
        pairs = zip(self.stopped, self.curves, strict=True)
        return [None if s.best is None else s.best + curve.first - 1 for s, curve in pairs]

    def figures(self, rule: Rule, part: str, metric: str) -> list[float]:
        """Values under a rule; NaN where a curve has none there."""
        found = []
        epochs = self.ends if rule == "stop" else self.best()
        for curve, epoch in zip(self.curves, epochs, strict=True):
            values = curve.part(part)[metric]
            place = -1 if epoch is None else epoch - curve.first
            found.append(values[place] if 0 <= place < len(values) else _NAN)
        return found

    def spreads(self) -> list[Spreads]:
        """Spread of each judged curve up to the stop of its run."""
        pairs = zip(self.judged(), self.curves, self.ends, strict=True)
        return [spreads(v[: max(0, end - c.first + 1)], first=c.first) for v, c, end in pairs]


def _row(name: str, own: _Traces, live: _Traces) -> Row:
    """Figures of one method, and its differences to the live weights of the same seeds."""
    metrics = own.task.metrics
    parts = ("validation", "test") if own.part == "test" else ("validation",)
    pairs = zip(own.judged(), live.judged(), own.curves, strict=True)
    return Row(
        name=name,
        values={
            rule: {part: {m: own.figures(rule, part, m) for m in metrics} for part in parts}
            for rule in RULES
        },
        best=own.best(),
        stop=[s.stop + c.first - 1 for s, c in zip(own.stopped, own.curves, strict=True)],
        overtakes=[overtakes(mine, theirs, first=c.first) for mine, theirs, c in pairs],
        spreads=own.spreads(),
        gains={
            rule: {m: _gain(own, live, rule, m, metric) for m, metric in metrics.items()}
            for rule in RULES
        },
        crossed=own.crossed(),
        crossed_gain=_paired_gain(live.crossed(), own.crossed(), metrics[own.task.judge]),
        calm=_calm(own.spreads(), live.spreads()),
    )


def _gain(own: _Traces, live: _Traces, rule: Rule, name: str, metric: Metric) -> Paired:
    before, after = (traces.figures(rule, live.part, name) for traces in (live, own))
    return _paired_gain(before, after, metric)


def _paired_gain(before: Sequence[float], after: Sequence[float], metric: Metric) -> Paired:
    return paired(gains(before, after, better=metric.better, compare=metric.compare))


def _calm(own: Sequence[Spreads], live: Sequence[Spreads]) -> Calm:
    pairs = list(zip(live, own, strict=True))
    ratios = tuple(_ratio(theirs.noise, mine.noise) for theirs, mine in pairs)
    return Calm(
        ratios=ratios,
        logs=paired([_log(ratio) for ratio in ratios]),
        plain=paired([_log(_ratio(theirs.settled, mine.settled)) for theirs, mine in pairs]),
        jumps=paired([_log(_ratio(theirs.jumps, mine.jumps)) for theirs, mine in pairs]),
    )


def _log(ratio: float) -> float:
    return math.log(ratio) if ratio > 0.0 else _NAN


def picked(task: Task, rows: dict[str, Row], names: Sequence[str]) -> str:
    """The method whose validation value at the stop is best on average over the seeds."""
    sign = 1.0 if task.metrics[task.judge].better == "lower" else -1.0

    def mean(name: str) -> float:
        value = sign * float(np.mean(rows[name].values["stop"]["validation"][task.judge]))
        return value if math.isfinite(value) else math.inf

    return min(names, key=mean)


def _ratio(one: float, other: float) -> float:
    return one / other if other > 0.0 else _NAN


def _median(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.median(finite)) if finite else _NAN


def joined_scores(task: Task, data: Data, runs: Sequence[Run]) -> dict[Rule, dict[str, float]]:
    """Scores of the joined outputs of the live models of all seeds: rule -> metric -> figure."""
    part, pair = ("test", data.test) if data.test is not None else ("validation", data.validation)
    runs = [run for run in runs if run.kind == "ordinary"]
    joined = {
        rule: task.combine(torch.stack([run.outputs[rule][part] for run in runs])) for rule in RULES
    }
    return {rule: scores(task, outputs, pair[1]) for rule, outputs in joined.items()}


def memories(methods: Sequence[Method], run: Run) -> list[Memory]:
    """The weight profile of every average at the stop of one run."""
    steps = run.stop * run.steps_per_epoch
    found = []
    for method in methods:
        if isinstance(method, Windowed):
            captures = np.arange(method.every, steps + 1, method.every, dtype=np.float64)
            times = captures[-method.k :]
            weights = np.full(len(times), 1.0 / max(1, len(times)))
            rule, copies = f"last {method.k} captures, every {method.every} steps", method.k
            initial, window = 0.0 if len(times) else 1.0, float(max(1, len(times)))
        else:
            unit = run.steps_per_epoch if isinstance(method, Tail) else 1
            known = method.within(run.stop) if isinstance(method, Tail) else method
            schedule = known.schedule
            kept = profile(schedule, np.arange(1, steps // unit + 1))
            times, weights = kept.times * unit, kept.weights
            rule = str(schedule) + (", one update an epoch" if unit > 1 else "")
            initial, window = float(kept.initial), float(kept.noise_window)
            copies = 1
        found.append(
            Memory(
                name=method.name,
                rule=rule,
                epochs=times / run.steps_per_epoch,
                weights=weights,
                initial=initial,
                mean_age=float((weights * (steps - times)).sum() + initial * steps),
                noise_window=window,
                copies=copies,
                bytes=copies * run.bytes,
                replayed=run.stop if isinstance(method, Tail) else 0,
            )
        )
    return found
