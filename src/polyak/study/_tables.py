"""The tables of a report: titles, columns and cells as text, for the page and the terminal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ._findings import Findings
from ._methods import LIVE
from ._metrics import Metric
from ._results import RULES, Outcome, Row, Rule
from ._statistics import Paired
from ._verdict import amount, when

NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Table:
    """A table of text.

    Args:
        title: what it shows.
        columns: heads; the first names the rows.
        rows: cells.
        note: how to read it.
        strong: index of the row that the verdict speaks of; None when there is none.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    strong: int | None = None


def number(value: float, digits: int = 4) -> str:
    """A figure with `digits` significant digits, a dash where there is none.

    Example:
        >>> number(0.0054321), number(1234567.0), number(float("nan")) == NONE
        ('0.005432', '1.235e+06', True)
    """
    return f"{value:#.{digits}g}".removesuffix(".") if math.isfinite(value) else NONE


def tables(study: Findings) -> list[Table]:
    """Every table of the report, in order."""
    found = [final_table(study), epoch_table(study), methods_table(study)]
    found += [other_metrics(study)] if len(study.task.metrics) > 1 else []
    found += [spread_table(study), memory_table(study)]
    if study.control is not None:
        found.append(control_table(study, study.control))
    return found


def final_table(study: Findings) -> Table:
    """Live and averaged figures at the stop, mean and spread over seeds; published ones beside."""
    task, outcome = study.task, study.outcome
    live, average = outcome.live, outcome.rows[outcome.headline]
    published = task.published
    rows = []
    for name, metric in task.metrics.items():
        cells = [
            name,
            _over_seeds(outcome.figures(LIVE, "stop", name)),
            _over_seeds(outcome.figures(outcome.headline, "stop", name)),
            _gain(average.gains["stop"][name], metric),
        ]
        if published is not None and name in published.values:
            old, new = published.values[name]
            better = metric.better == "lower"
            change = (old - new if better else new - old) / (
                abs(old) if metric.compare == "relative" else 1.0
            )
            cells += [f"{old:g}", f"{new:g}", amount(change, metric)]
        elif published is not None:
            cells += [NONE] * 3
        rows.append(tuple(cells))
    rows.append(_spread_row(study, live, average, whole=True))
    rows.append(_spread_row(study, live, average, whole=False))
    stops = f"stopped at {task.unit_name} {_middle(outcome.stops)}"
    stop = ["run", stops, stops, NONE]
    if published is not None:
        stop += [f"stopped at {task.unit_name} {published.stop}"] * 2 + [NONE]
    rows.append(tuple(stop))
    columns: tuple[str, ...] = ("", "live", outcome.headline, "gain, mean [95 %] (better in)")
    if published is not None:
        columns += (f"live, {published.source}", "its average", "its gain")
    note = (
        f"Figures on {outcome.part} data {when(task, 'stop')}: mean over seeds \N{PLUS-MINUS SIGN} "
    )
    note += "standard deviation over seeds. Spread is that of the validation curve."
    if published is not None and published.note:
        note += f" {published.note}"
    return Table(f"{LIVE.capitalize()} and averaged", columns, tuple(rows), note)


def _spread_row(study: Findings, live: Row, average: Row, *, whole: bool) -> tuple[str, ...]:
    name = "spread, whole curve" if whole else "spread after the first third"
    pair = [[s.whole if whole else s.settled for s in row.spreads] for row in (live, average)]
    ratios = [a / b if b else math.nan for a, b in zip(*pair, strict=True)]
    cells = [name, _over_seeds(pair[0]), _over_seeds(pair[1])]
    cells.append(f"{number(_median(ratios), 2)} times calmer (median)")
    if study.task.published is not None:
        spread = study.task.published.spread
        cells += [f"{spread[0]:g}", f"{spread[1]:g}"] if whole else [NONE, NONE]
        cells.append(f"{spread[0] / spread[1]:.1f} times calmer" if whole else NONE)
    return tuple(cells)


def epoch_table(study: Findings) -> Table:
    """Every tenth epoch of the first seed: training loss, and both curves for two metrics."""
    task = study.task
    run = next(run for run in study.runs if run.kind == "ordinary")
    name = study.outcome.headline
    metrics = list(dict.fromkeys((task.judge, list(task.metrics)[-1])))
    gap = 10 if run.stop > 20 else max(1, run.stop // 10)
    epochs = [*range(gap, run.stop, gap), run.stop]
    live, average = run.curves[LIVE], run.curves[name]
    rows = []
    for epoch in epochs:
        cells = [str(epoch), number(run.train_loss[epoch - 1])]
        for metric in metrics:
            for curve in (live, average):
                there = epoch >= curve.first
                value = curve.validation[metric][epoch - curve.first] if there else math.nan
                cells.append(number(value))
        rows.append(tuple(cells))
    columns: tuple[str, ...] = (task.unit_name, "train loss")
    for metric in metrics:
        columns += (f"{metric}, live", f"{metric}, {name}")
    return Table(
        f"Seed {run.seed}, {task.unit_name} by {task.unit_name}",
        columns,
        tuple(rows),
        "Validation figures; the training loss is the mean over the batches as they were trained, "
        "dropout included.",
    )


def methods_table(study: Findings) -> Table:
    """Each method under both rules, when it is best, when it overtakes."""
    task, outcome = study.task, study.outcome
    metric = task.metrics[task.judge]
    rows, strong = [], None
    for place, (name, row) in enumerate(outcome.rows.items()):
        strong = place if name == outcome.headline else strong
        cells = [name]
        for rule in RULES:
            cells += _under(outcome, row, rule, task.judge, metric)
        cells += [_middle(row.best), _stopped(study, row), _overtaking(row)]
        rows.append(tuple(cells))
    if len(study.seeds) > 1 and outcome.ensemble:
        both = [number(outcome.ensemble[rule][task.judge]) for rule in RULES]
        title = f"ensemble of {len(study.seeds)} live models"
        rows.append((title, both[0], NONE, both[1], NONE, NONE, NONE, NONE))
    return Table(
        "Every method",
        (
            "",
            f"{task.judge} {when(task, 'stop')}",
            "gain over live, mean [95 %] (better in)",
            f"{task.judge} at its own best",
            "gain over live, mean [95 %] (better in)",
            f"best {task.unit_name}",
            "stopped at",
            "overtakes live",
        ),
        tuple(rows),
        f"Means over seeds on {outcome.part} data; epochs are medians, picked on validation data. "
        "Every curve has the same patience, the live one too; the rival runs its planned length. "
        "An average overtakes where it stays ahead five evaluations in a row. Intervals are one by "
        "one: among many methods, some exclude 0 by luck. Ensembles have one figure, no interval.",
        strong,
    )


def other_metrics(study: Findings) -> Table:
    """Gains at the stop under the metrics that do not judge."""
    others = {name: m for name, m in study.task.metrics.items() if name != study.task.judge}
    rows, strong = [], None
    for place, (name, row) in enumerate(study.outcome.rows.items()):
        strong = place if name == study.outcome.headline else strong
        cells = [name]
        for metric, spec in others.items():
            cells.append(_over_seeds(study.outcome.figures(name, "stop", metric)))
            cells.append(NONE if name == LIVE else _gain(row.gains["stop"][metric], spec))
        rows.append(tuple(cells))
    columns: tuple[str, ...] = ("",)
    for metric in others:
        columns += (metric, "gain, mean [95 %] (better in)")
    title = f"The other metrics {when(study.task, 'stop')}"
    return Table(title, columns, tuple(rows), strong=strong)


def spread_table(study: Findings) -> Table:
    """How restless each validation curve is, early, in the middle and late."""
    rows, strong = [], None
    for place, (name, row) in enumerate(study.outcome.rows.items()):
        strong = place if name == study.outcome.headline else strong
        parts = ("whole", "settled", "early", "middle", "late")
        cells = [name, *(number(_median([getattr(s, p) for s in row.spreads]), 3) for p in parts)]
        logs = row.calm.logs
        calmer = f"{number(row.calm.median, 2)} times ({logs.wins} of {logs.seeds})"
        rows.append((*cells, NONE if name == LIVE or not logs.seeds else calmer))
    return Table(
        f"Spread of the validation curves ({study.task.judge})",
        ("", "whole", "after first third", "early", "middle", "late", "calmer than live"),
        tuple(rows),
        "Medians over seeds of standard deviations. 'whole' and 'after first third' are plain; "
        "early, middle and late are thirds of the run with a straight line taken out, so that a "
        "curve that falls does not count as restless (a line does not follow the first descent). "
        "The last column joins middle and late; in brackets, the seeds in which it is calmer.",
        strong,
    )


def memory_table(study: Findings) -> Table:
    """What each average remembers and what it costs to keep."""
    run = study.runs[0]
    unit = study.task.unit_name
    rows = tuple(
        (
            memory.name,
            f"{number(memory.mean_age / run.steps_per_epoch, 3)} {unit}s",
            number(memory.noise_window, 4),
            f"{memory.initial:.2g}" if memory.initial > 0 else "0",
            f"{memory.copies}",
            _bytes(memory.bytes),
            memory.rule,
        )
        for memory in study.memories
    )
    return Table(
        "What each average remembers",
        ("", "mean age", "noise window", "weight of the start", "copies kept", "memory", "rule"),
        rows,
        f"At the stop of seed {run.seed}. The noise window is the number of equally weighted "
        "updates that would average as much noise away: 1 / sum of squared weights.",
    )


def control_table(study: Findings, control: Outcome) -> Table:
    """The same methods where there is no mini-batch noise to average away."""
    task = study.task
    metric = task.metrics[task.judge]
    rows, strong = [], None
    for place, (name, row) in enumerate(control.rows.items()):
        strong = place if name == control.headline else strong
        calm = f"{number(row.calm.median, 2)} times"
        rows.append(
            (
                name,
                _over_seeds(control.figures(name, "stop", task.judge)),
                NONE if name == LIVE else _gain(row.gains["stop"][task.judge], metric),
                NONE if name == LIVE else calm,
            )
        )
    return Table(
        "Control: full batch, no dropout",
        (
            "",
            f"{task.judge} at the end",
            "gain over live, mean [95 %] (better in)",
            "calmer than live",
        ),
        tuple(rows),
        "As many steps, the same start, each step on all training rows: without noise an average "
        "only lags behind the live weights.",
        strong,
    )


def _under(outcome: Outcome, row: Row, rule: Rule, judge: str, metric: Metric) -> tuple[str, str]:
    gain = NONE if row.name == LIVE else _gain(row.gains[rule][judge], metric)
    return number(_mean(row.values[rule][outcome.part][judge])), gain


def _gain(gain: Paired, metric: Metric) -> str:
    if gain.seeds < 2:
        return amount(gain.mean, metric)
    low, high = (amount(end, metric).split(" ")[0] for end in (gain.low, gain.high))
    return f"{amount(gain.mean, metric)} [{low}, {high}] ({gain.wins} of {gain.seeds})"


def _stopped(study: Findings, row: Row) -> str:
    return NONE if study.task.patience is None else _middle(row.stop)


def _overtaking(row: Row) -> str:
    if row.name == LIVE:
        return NONE
    some = [epoch for epoch in row.overtakes if epoch is not None]
    return f"{_middle(some)} ({len(some)} of {len(row.overtakes)})" if some else "never"


def _middle(epochs: Sequence[int | None]) -> str:
    some = [epoch for epoch in epochs if epoch is not None]
    return f"{float(np.median(some)):.0f}" if some else NONE


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(_finite(values))) if _finite(values) else math.nan


def _median(values: Sequence[float]) -> float:
    return float(np.median(_finite(values))) if _finite(values) else math.nan


def _over_seeds(values: Sequence[float]) -> str:
    some = _finite(values)
    if len(some) < 2:
        return number(_mean(values))
    return f"{number(_mean(some))} \N{PLUS-MINUS SIGN} {number(float(np.std(some, ddof=1)), 2)}"


def _bytes(size: int) -> str:
    if size < 1024**2:
        return f"{size / 1024:.0f} KiB"
    return f"{size / 1024**2:.1f} MiB"
