"""The tables of a report: titles, columns and cells as text, for the page and the terminal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ._findings import Findings
from ._lengths import LengthFindings
from ._methods import DECAYED, LIVE
from ._metrics import Metric
from ._results import RULES, Outcome, Row, Rule
from ._statistics import Paired, gains, paired
from ._verdict import amount, percent, plateau, smaller, three, when

NONE = "\N{EN DASH}"
GAIN = "gain [95 %], better in (sign test)"
HOW = (
    "A gain in % is the mean of log ratios turned into a share (the geometric mean), any other a "
    "plain mean; in brackets its Student-t interval, then in how many seeds it is better and how "
    "often a fair coin would be as one-sided."
)


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

    Examples:
        >>> number(0.0054321), number(1234567.0), number(float("nan")) == NONE
        ('0.005432', '1.235e+06', True)
    """
    return f"{value:#.{digits}g}".removesuffix(".") if math.isfinite(value) else NONE


def tables(study: Findings) -> list[Table]:
    """Every table of the report, in order."""
    found = [final_table(study), epoch_table(study), methods_table(study)]
    found += [other_metrics(study)] if len(study.task.metrics) > 1 else []
    if study.lengths is not None:
        found += [lengths_table(study, study.lengths), rebuilt_table(study, study.lengths)]
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
            change = gains([old], [new], better=metric.better, compare=metric.compare)
            cells += [f"{old:g}", f"{new:g}", amount(change[0], metric)]
        elif published is not None:
            cells += [NONE] * 3
        rows.append(tuple(cells))
    rows.append(_spread_row(study, live, average, whole=True))
    rows.append(_spread_row(study, live, average, whole=False))
    ended = "ended" if task.patience is None else "stopped"
    stops = f"{ended} at {task.unit_name} {_middle(outcome.stops)}"
    stop = ["run", stops, stops, NONE]
    if published is not None:
        stop += [f"stopped at {task.unit_name} {published.stop}"] * 2 + [NONE]
    rows.append(tuple(stop))
    columns: tuple[str, ...] = ("", "live", outcome.headline, GAIN)
    if published is not None:
        columns += (f"live, {published.source}", "its average", "its gain")
    note = (
        f"Figures on {outcome.part} data {when(task, 'stop')}: mean over seeds \N{PLUS-MINUS SIGN} "
        f"standard deviation over seeds. {HOW} Spread is the plain standard deviation of the "
        "validation curve."
    )
    if published is not None and published.note:
        note += f" {published.note}"
    return Table(f"{LIVE.capitalize()} and averaged", columns, tuple(rows), note)


def _spread_row(study: Findings, live: Row, average: Row, *, whole: bool) -> tuple[str, ...]:
    name = "spread, whole curve" if whole else "spread after the first third"
    pair = [[s.whole if whole else s.settled for s in row.spreads] for row in (live, average)]
    ratios = paired(gains(*pair, better="lower", compare="relative"))
    cells = [name, _over_seeds(pair[0]), _over_seeds(pair[1])]
    cells.append(_spread_cell(ratios) if ratios.seeds else NONE)
    if study.task.published is not None:
        spread = study.task.published.spread
        # Their figures are of the size of the settled curve's; the first descent is 20 times that.
        cells += [NONE, NONE] if whole else [f"{spread[0]:g}", f"{spread[1]:g}"]
        cells.append(NONE if whole else f"{spread[0] / spread[1]:.1f} times smaller")
    return tuple(cells)


def _spread_cell(logs: Paired) -> str:
    said = smaller(logs).removeprefix("is ")
    if logs.seeds < 2:
        return said
    ends = [math.exp(math.copysign(1.0, logs.mean) * end) for end in (logs.low, logs.high)]
    low, high = (number(end, 2) for end in sorted(ends))
    return f"{said}\n[{low}, {high}], {_count(logs)}"


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
            GAIN,
            f"{task.judge} at its own best",
            GAIN,
            f"best {task.unit_name}",
            "its patience ends",
            "overtakes live",
        ),
        tuple(rows),
        f"Gains are over the live weights. {HOW} Other figures are means over seeds on "
        f"{outcome.part} data; epochs are medians, picked on validation data. {_patience(study)} "
        "The mean of the tail has no best epoch: its first value is that of a single capture. "
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
        columns += (metric, GAIN)
    title = f"The other metrics {when(study.task, 'stop')}"
    return Table(title, columns, tuple(rows), strong=strong)


def lengths_table(study: Findings, lengths: LengthFindings) -> Table:
    """Every length that was rebuilt from the snapshots, against the best EMA tracked online."""
    task, metric = study.task, study.task.metrics[study.task.judge]
    rows = [
        (
            name,
            percent(point.share),
            f"{point.error:.0e}",
            number(point.score),
            _over_seeds(values),
            _gain(gain, metric),
        )
        for name, point, values, gain in zip(
            lengths.names, lengths.sweep.points, lengths.values, lengths.gains, strict=True
        )
    ]
    alone = (
        "picked in each run",
        NONE,
        NONE,
        NONE,
        NONE,
        _gain(lengths.alone.gain, metric),
    )
    moments = _mean([each.moments for each in lengths.kept])
    return Table(
        "Many lengths from one run",
        (
            "",
            "mean age, of the run",
            "profile error",
            f"validation {task.judge}",
            f"{task.judge} {when(task, 'stop')}",
            f"against {lengths.rival} {GAIN}",
        ),
        (*rows, *([alone] if len(study.seeds) > 1 else [])),
        f"Power functions rebuilt from {moments:.0f} snapshots of two averages, 0.05 and "
        f"0.10, a run; figures on {study.outcome.part} data, means over seeds. {HOW} "
        f"{_rival_clause(study, lengths)}; marked, the length that validation picks by the same "
        f"rule ({plateau(lengths)}); last row: length and EMA both picked anew in each run. "
        + _cost(lengths),
        lengths.names.index(lengths.best),
    )


def _rival_clause(study: Findings, lengths: LengthFindings) -> str:
    if lengths.rival == LIVE:
        return "Compared with the live weights, no average of another length having been tracked"
    return (
        f"{lengths.rival} is the best of those tracked online, as validation picks over all seeds"
    )


def _cost(lengths: LengthFindings) -> str:
    """What the curve cost beside the training that it came from."""
    kept = lengths.kept
    training, keeping, rebuilding = (
        number(_mean(values), 2)
        for values in (
            [each.training for each in kept],
            [each.keeping for each in kept],
            [each.rebuilding for each in kept],
        )
    )
    disk = _bytes(round(_mean([each.bytes for each in kept])))
    many = sum(bool(one.figures) for one in (*kept[0].curve, *kept[0].tracked))
    return (
        f"All of it costs one training a seed: {training} s for the optimizer steps, {keeping} s "
        f"more for keeping the two averages and writing them ({disk} on disk), and afterwards "
        f"{rebuilding} s for rebuilding and scoring {many} averages."
    )


def rebuilt_table(study: Findings, lengths: LengthFindings) -> Table:
    """Averages that were tracked online beside the same ones from the snapshots: are they alike?"""
    metric = study.task.metrics[study.task.judge]
    rows = tuple(
        (
            each.name,
            percent(each.share),
            f"{each.error:.0e}",
            _over_seeds(each.online),
            _over_seeds(each.rebuilt),
            _gain(each.gain, metric),
        )
        for each in lengths.tracked
    )
    return Table(
        "Tracked online and rebuilt",
        (
            "",
            "mean age, of the run",
            "profile error",
            "tracked online",
            "rebuilt afterwards",
            f"difference {GAIN.removeprefix('gain ')}",
        ),
        rows,
        f"{study.task.judge} {when(study.task, 'stop')} of averages that the run tracked step by "
        "step, and of the same schedules put together from its snapshots. The two power functions "
        "are those that were written, so that theirs is the rounding to float16. A dash: shorter "
        "or longer than the snapshots resolve.",
    )


def spread_table(study: Findings) -> Table:
    """How restless each validation curve is, early, in the middle and late."""
    rows, strong = [], None
    for place, (name, row) in enumerate(study.outcome.rows.items()):
        strong = place if name == study.outcome.headline else strong
        parts = ("whole", "settled", "early", "middle", "late", "jumps")
        cells = [name, *(number(_median([getattr(s, p) for s in row.spreads]), 3) for p in parts)]
        for logs in (row.calm.logs, row.calm.jumps):
            cells.append(NONE if name == LIVE or not logs.seeds else _spread_cell(logs))
        rows.append(tuple(cells))
    return Table(
        f"Spread of the validation curves ({study.task.judge})",
        (
            "",
            "whole",
            "after first third",
            "early",
            "middle",
            "late",
            "jumps",
            "spread, trend out, against live",
            "jumps against live",
        ),
        tuple(rows),
        "Medians over seeds of standard deviations. 'whole' and 'after first third' are plain; "
        "early, middle and late are thirds of the run with a straight line taken out, so that a "
        "curve that falls does not count as restless (a line does not follow the first descent). "
        "'jumps' is the change from one evaluation to the next over the square root of 2: no trend "
        "to take out. The last columns are geometric means over seeds with 95 % intervals, the "
        "first of them of middle and late together.",
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
            f"{memory.copies} ({memory.replayed} here)" if memory.replayed else f"{memory.copies}",
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
        "updates that would average as much noise away: 1 / sum of squared weights."
        + (
            " The mean of the tail needs one copy where its start is planned; the study learned of "
            "the stop only afterwards and kept the weights of every epoch."
            if any(memory.replayed for memory in study.memories)
            else ""
        ),
    )


def control_table(study: Findings, control: Outcome) -> Table:
    """The same methods where there is no mini-batch noise to average away."""
    task = study.task
    metric = task.metrics[task.judge]
    rows, strong = [], None
    for place, (name, row) in enumerate(control.rows.items()):
        strong = place if name == control.headline else strong
        calm = _spread_cell(row.calm.logs) if row.calm.logs.seeds else NONE
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
            GAIN,
            "spread, trend out, against live",
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
    if not gain.seeds:
        return NONE
    if gain.seeds < 2:
        return amount(gain.mean, metric)
    mean, low, high = three(gain, metric)
    return f"{mean}\n[{low.split(' ')[0]}, {high.split(' ')[0]}], {_count(gain)}"


def _count(gain: Paired) -> str:
    return f"{gain.wins} of {gain.seeds} ({gain.sign_p:.2g})"


def _patience(study: Findings) -> str:
    """Who trained for how long when each is taken at its own best."""
    if study.task.patience is None:
        return "All runs are equally long."
    stops = study.outcome.stops
    latest = {name: max((e for e in row.best if e), default=0) for name, row in _averages(study)}
    slow = max(latest, key=latest.__getitem__)
    said = (
        f"Every curve has the same patience, the live one too, and trains until it is used up; the "
        f"rival and the mean of the tail end with the run, at {min(stops)} to {max(stops)}."
    )
    if latest[slow] <= max(stops):
        return said
    return (
        f"{said} So a slow average at its own best had more training: {slow} up to {latest[slow]}."
    )


def _averages(study: Findings) -> list[tuple[str, Row]]:
    return [(n, row) for n, row in study.outcome.rows.items() if not n.startswith(DECAYED)]


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
