"""What do the figures say, in sentences? Written from the numbers alone; it may well be "no"."""

import math
from dataclasses import dataclass
from typing import Literal

from ._lengths import LengthFindings, Standing
from ._methods import DECAYED, LIVE
from ._metrics import Metric
from ._results import Calm, Outcome, Row, Rule
from ._statistics import Paired, detectable, gains, paired
from ._task import Task

Answer = Literal["yes", "no", "little", "not shown"]
ALIKE = 1.25  # spreads proved to differ by less than this factor are called alike
FEW = 5  # below this many seeds the verdict says how little they can show
FEW_EVALUATIONS = 6  # below this many a curve has no thirds, and a picked epoch means nothing


@dataclass(frozen=True)
class Verdict:
    """The answer and its reasons.

    Args:
        answer: whether the headline average makes the judged metric better at the stop of the
            run: "yes" (the interval lies above 0), "no" (below), "little" (inside what is not
            worth having), "not shown" (none of these).
        calmer: the same about the spread of the validation curve.
        title: both in a few words.
        headline: one sentence.
        sentences: the rest, each readable alone.
    """

    answer: Answer
    calmer: Answer
    title: str
    headline: str
    sentences: tuple[str, ...]

    def __str__(self) -> str:
        """All of it as one paragraph."""
        return " ".join((self.title, self.headline, *self.sentences))


def verdict(
    task: Task,
    ordinary: Outcome,
    control: Outcome | None,
    *,
    edge: Literal["shortest", "longest", ""] = "",
    lengths: LengthFindings | None = None,
) -> Verdict:
    """Say what was found.

    Args:
        task: what was studied.
        ordinary: the figures.
        control: those without mini-batch noise.
        edge: whether the picked length is the shortest or the longest that was tried.
        lengths: averages of other lengths, rebuilt afterwards.
    """
    name, metric = ordinary.headline, task.metrics[task.judge]
    row = ordinary.rows[name]
    gain = row.gains["stop"][task.judge]
    answer, calmer = answer_of(gain, metric), calm_of(row.calm)
    words = {"little": "hardly"}
    title = (
        f"A calmer curve: {words.get(calmer, calmer)}. "
        f"A better {task.judge} {when(task, 'stop')}: {words.get(answer, answer)}."
    )
    if min(ordinary.stops) < FEW_EVALUATIONS:
        answer = calmer = "not shown"
        title = f"Too few {task.unit_name}s to say anything."
    headline = (
        f"{name}: {calm_clause(row.calm)}; "
        f"{gain_clause(gain, metric, task.judge, when=when(task, 'stop'))}."
    )
    sentences = [
        *_few(gain),
        *_lost(task, ordinary),
        *_at_best(task, ordinary),
        *_edge(name, edge),
        *_pick(task, ordinary),
        *([] if lengths is None else _afterwards(task, ordinary, lengths)),
        *_rival(task, ordinary),
        *_joined(task, ordinary),
        *([_control(task, control)] if control is not None else []),
    ]
    return Verdict(
        answer=answer, calmer=calmer, title=title, headline=headline, sentences=tuple(sentences)
    )


def answer_of(gain: Paired, metric: Metric) -> Answer:
    """Class of a gain: "little" goes before "yes" and "no", as the reader's own threshold does."""
    low, high = metric.shown(gain.low), metric.shown(gain.high)
    if metric.small > 0.0 and -metric.small <= low and high <= metric.small:
        return "little"
    found: dict[str, Answer] = {"better": "yes", "worse": "no", "uncertain": "not shown"}
    return found[gain.finding]


def when(task: Task, rule: Rule) -> str:
    """The moment of a rule, in words."""
    if rule == "best":
        return "each at its own best epoch"
    return "at the stop" if task.patience is not None else "at the end"


def digits_of(*values: float, relative: bool) -> int:
    """Decimals that show two figures of the largest of these and one of the smallest."""
    sizes = [abs(value) for value in values if math.isfinite(value) and value != 0.0]
    if not sizes:
        return 0
    needed = (1 - math.floor(math.log10(max(sizes))), -math.floor(math.log10(min(sizes))))
    return min(max(0, *needed), 1 if relative else 6)


def amount(gain: float, metric: Metric, *, sign: bool = True, digits: int | None = None) -> str:
    """A gain for people: "+5 %", "-0.041 nats"; a relative one is given as a log ratio.

    Examples:
        >>> amount(0.0512, Metric(lambda a, b: a, compare="absolute", unit="nats"))
        '+0.051 nats'
        >>> amount(math.log(2.0), Metric(lambda a, b: a))
        '+50 %'
    """
    value = _scaled(gain, metric)
    if not math.isfinite(value):
        return "no figure"
    relative = metric.compare == "relative"
    digits = digits_of(value, relative=relative) if digits is None else digits
    value = round(value, digits)
    text = f"{value:{'+' if sign and value else ''}.{digits}f}" if value else "0"
    return f"{text} {'%' if relative else metric.unit}".strip().replace("-", "\N{MINUS SIGN}")


def at_least(gain: float, metric: Metric) -> str:
    """A gain above 0 as a lower bound: rounded down, so that the claim stays true."""
    value = _scaled(gain, metric)
    digits = digits_of(value, relative=metric.compare == "relative")
    # A hair is allowed for: 0.18 held as 0.17999999999 is 18 %.
    text = f"{math.floor(value * 10**digits + 1e-6) / 10**digits:.{digits}f}"
    return f"{text} {'%' if metric.compare == 'relative' else metric.unit}".strip()


def _scaled(gain: float, metric: Metric) -> float:
    return metric.shown(gain) * (100.0 if metric.compare == "relative" else metric.scale)


def three(gain: Paired, metric: Metric) -> tuple[str, str, str]:
    """Mean and both ends of its interval, with the same decimals."""
    ends = [_scaled(end, metric) for end in (gain.low, gain.high)]
    digits = digits_of(*ends, relative=metric.compare == "relative")
    low, mean, high = (
        amount(value, metric, digits=digits) for value in (gain.low, gain.mean, gain.high)
    )
    return mean, low, high


def percent(share: float) -> str:
    """A share with two figures.

    Examples:
        >>> percent(0.151), percent(0.0084)
        ('15 %', '0.84 %')
    """
    return f"{100.0 * share:.2g} %"


def mean_name(metric: Metric) -> str:
    """Which mean it is: that of log ratios is the geometric mean of the ratios."""
    return "geometric mean" if metric.compare == "relative" else "mean"


def count(gain: Paired) -> str:
    """In how many seeds it is better, and the sign test of that."""
    return f"better in {gain.wins} of {gain.seeds} seeds, sign test {gain.sign_p:.2g}"


def interval(gain: Paired, metric: Metric) -> str:
    """Mean, interval and count of a paired difference, for brackets."""
    if gain.seeds < 2:
        return f"{amount(gain.mean, metric)}, one seed: no interval"
    mean, low, high = three(gain, metric)
    return f"{mean_name(metric)} {mean}, 95 % interval {low.split(' ')[0]} to {high}, {count(gain)}"


def times(gain: Paired) -> str:
    """A mean log ratio as "2.1 times ..., 95 % interval 1.4 to 3.2", the old value being 1."""
    mean = _factor(-gain.mean)
    if gain.seeds < 2:
        return f"{mean} times"
    return f"{mean} times (95 % interval {_factor(-gain.high)} to {_factor(-gain.low)})"


def _factor(log: float) -> str:
    try:
        value = math.exp(log)
    except OverflowError:
        return "endlessly many"
    if 0.5 <= value < 1.995:
        return f"{value:.2f}"
    rounded = float(f"{value:.2g}")
    return f"{rounded:.1f}" if 1.0 < rounded < 10.0 else f"{rounded:g}"


def gain_clause(gain: Paired, metric: Metric, name: str, *, when: str) -> str:
    """Whether the gain is real, as a clause."""
    lost = f"; {gain.left_out} more without a figure" if gain.left_out else ""
    said = f"({interval(gain, metric)}{lost})"
    answer = answer_of(gain, metric)
    if answer == "little":
        return f"{name} {when} changes little {said}: less than {_small(metric)} either way"
    if answer == "yes":
        least = min(gain.differences)
        each = f", by {at_least(least, metric)} or more in each" if least > 0 else ""
        return f"the gain in {name} {when} is real {said[:-1]}{each})"
    if answer == "no":
        return f"{name} {when} gets worse {said}"
    return f"the gain in {name} {when} is uncertain {said}"


def _small(metric: Metric) -> str:
    """The smallest change worth having, for people."""
    relative = metric.compare == "relative"
    size = metric.small * (100.0 if relative else metric.scale)
    return f"{size:g} {'%' if relative else metric.unit}".strip()


def calm_of(calm: Calm) -> Answer:
    """Class of a change of spread, from the interval of the mean log ratio."""
    if calm.logs.within(math.log(ALIKE)):
        return "little"
    found: dict[str, Answer] = {"better": "yes", "worse": "no", "uncertain": "not shown"}
    return found[calm.logs.finding]


def calm_clause(calm: Calm) -> str:
    """Whether the calmer curve is real, as a clause."""
    logs = calm.logs
    if not logs.seeds:
        return "the spread of the curve cannot be compared"
    if logs.seeds < 2:
        return f"the spread of the curve {smaller(logs)} in the one seed there is"
    clause = {
        "yes": "the calmer curve is real",
        "no": "the curve is more restless",
        "little": "the curve is as restless as before",
        "not shown": "a calmer curve is not shown",
    }[calm_of(calm)]
    median = _factor(math.log(calm.median))
    size = f"{logs.wins} of {logs.seeds} seeds, median {median} times with its trend out"
    ends = f"mean {_factor(logs.mean)}, 95 % interval {_factor(logs.low)} to {_factor(logs.high)}"
    plain = calm.plain
    if not plain.seeds:
        return f"{clause} ({size}, {ends})"
    moving = ", since it is still moving" if plain.mean < 0.0 < logs.mean else ""
    return f"{clause} ({size}, {ends}; plainly its spread {smaller(plain)}{moving})"


def smaller(logs: Paired) -> str:
    """A mean log ratio of spreads in words: "is 2.4 times smaller"."""
    side = "smaller" if logs.mean >= 0.0 else "larger"
    return f"is {_factor(abs(logs.mean))} times {side}"


def _few(gain: Paired) -> list[str]:
    if gain.seeds >= FEW:
        return []
    if gain.seeds < 2:
        return ["One seed shows nothing about the next one: run at least five."]
    return [
        f"{gain.seeds} seeds are few: the interval reaches {detectable(gain.seeds):.1f} standard "
        "deviations to either side, so only large effects can show."
    ]


def _lost(task: Task, outcome: Outcome) -> list[str]:
    """Who diverged: a seed without a figure is left out of every mean, which favours that side."""
    found = []
    for name in (LIVE, outcome.headline):
        values = outcome.figures(name, "stop", task.judge)
        lost = sum(not math.isfinite(value) for value in values)
        if lost:
            found.append(
                f"{lost} of {len(values)} seeds of {name} ended without a finite {task.judge}; "
                "they are left out of the means, which flatters it."
            )
    return found


def _at_best(task: Task, outcome: Outcome) -> list[str]:
    """Both curves at an epoch picked for each, and whether picking flattered."""
    metric = task.metrics[task.judge]
    row = outcome.rows[outcome.headline]
    gain = row.gains["best"][task.judge]
    if not gain.seeds:
        return []
    rule = "with the same patience for both" if task.patience else "picked on validation data"
    found = [f"Each at its own best epoch, {rule}, {_standing(task, outcome.headline, gain)}."]
    crossed = row.crossed_gain
    if crossed.seeds:
        found.append(
            "Those epochs were picked and judged on the same rows. Picked on half of the rows and "
            f"judged on the other half, {_standing(task, outcome.headline, crossed)}; "
            f"{_flattery(outcome.live, row, metric)}."
        )
    return found


def _standing(task: Task, name: str, gain: Paired) -> str:
    metric = task.metrics[task.judge]
    said = {"better": "is better", "worse": "is worse", "uncertain": "is neither better nor worse"}
    if metric.compare == "relative" and metric.better == "lower":
        return (
            f"{name} {said[gain.finding]}: its {task.judge} is {times(gain)} that of the live "
            f"weights, {count(gain)}"
        )
    return f"{name} {said[gain.finding]} than the live weights ({interval(gain, metric)})"


def _flattery(live: Row, average: Row, metric: Metric) -> str:
    """How much rosier a picked figure is than a crossed one, mean over the seeds of each curve."""
    judge = next(iter(live.gains["best"]))
    sizes = []
    for row in (live, average):
        picked = row.values["best"]["validation"][judge]
        optimism = paired(gains(row.crossed, picked, better=metric.better, compare=metric.compare))
        flattered = optimism.mean > 0.0
        sizes.append(
            f"by {amount(optimism.mean, metric, sign=False)}" if flattered else "not at all"
        )
    return (
        "picking and judging on the same rows had flattered the live curve "
        f"{sizes[0]} and the average {sizes[1]}"
    )


def _edge(name: str, edge: str) -> list[str]:
    if not edge:
        return []
    comparative = "longer" if edge == "longest" else "shorter"
    return [f"{name} is the {edge} that was tried: a {comparative} one may be better."]


def _pick(task: Task, outcome: Outcome) -> list[str]:
    if outcome.favourite == outcome.headline:
        return []
    metric = task.metrics[task.judge]
    gain = outcome.rows[outcome.favourite].gains["stop"][task.judge]
    judged = "on test data" if outcome.part == "test" else "judged on the rows that picked it"
    return [
        f"Of all averages validation picks {outcome.favourite} ({judged}: "
        f"{interval(gain, metric)})."
    ]


def _afterwards(task: Task, outcome: Outcome, lengths: LengthFindings) -> list[str]:
    """The best length that was chosen after training, and the best that was tracked in it."""
    judged = "judged on test data" if outcome.part == "test" else "judged on the rows that picked"
    rival = "the live weights" if lengths.rival == LIVE else f"{lengths.rival}, tracked online"
    chosen = (
        f"Any length afterwards: of {len(lengths.names)}, all rebuilt from snapshots of the same "
        f"run, validation picks {lengths.best} (mean age {percent(lengths.sweep.best.share)} of "
        f"the run; {plateau(lengths)}); {judged}, it {_beside(task, lengths.together, rival)}."
    )
    ends = {lengths.names[0]: "shortest", lengths.names[-1]: "longest"}
    edge = _edge(lengths.best, ends.get(lengths.best, ""))
    if len(lengths.level) < 2:
        return [chosen, *edge]
    other = "the live weights" if lengths.rival == LIVE else "the best that was tracked online"
    return [
        chosen,
        *edge,
        "Where both are picked in each run by itself, as with one run one must, the rebuilt length "
        f"{_beside(task, lengths.alone, other)}.",
    ]


def plateau(lengths: LengthFindings) -> str:
    """The lengths around the best that validation finds nearly as good."""
    first, last = lengths.plateau
    if first == last:
        return "no other is nearly as good"
    return f"nearly as good from {percent(first.share)} to {percent(last.share)}"


def _beside(task: Task, standing: Standing, other: str) -> str:
    """How a rebuilt length stands to one tracked online: "is within noise of ..."."""
    metric, gain = task.metrics[task.judge], standing.gain
    said = {"better": "is better than", "worse": "is worse than", "uncertain": "is within noise of"}
    is_little = answer_of(gain, metric) == "little"
    close = f": less than {_small(metric)} either way" if is_little else ""
    return f"{said[gain.finding]} {other} ({interval(gain, metric)}){close}"


def _rival(task: Task, outcome: Outcome) -> list[str]:
    if DECAYED not in outcome.rows:
        return []
    metric, judge = task.metrics[task.judge], task.judge
    end = when(task, "stop")
    alone = outcome.rows[DECAYED].gains["stop"][judge]
    direct = difference(task, outcome, DECAYED, outcome.headline)
    on_top = difference(task, outcome, DECAYED, f"{DECAYED} + {outcome.headline}")
    standing = {"better": "better", "worse": "worse", "uncertain": "neither better nor worse"}
    return [
        "The rival decays its learning rate to zero over as many steps and keeps no average: "
        f"against the live weights, {gain_clause(alone, metric, judge, when=end)}.",
        f"Against that rival {outcome.headline} is {standing[direct.finding]} "
        f"({interval(direct, metric)}).",
        f"Averaging on top of the rival: {gain_clause(on_top, metric, judge, when=end)}.",
    ]


def difference(task: Task, outcome: Outcome, one: str, other: str) -> Paired:
    """Paired gain from method `one` to method `other` at the stop, on the judged metric."""
    metric = task.metrics[task.judge]
    return paired(
        gains(
            outcome.figures(one, "stop", task.judge),
            outcome.figures(other, "stop", task.judge),
            better=metric.better,
            compare=metric.compare,
        )
    )


def _joined(task: Task, outcome: Outcome) -> list[str]:
    if not outcome.ensemble or len(outcome.stops) < 2:
        return []
    value = outcome.ensemble["stop"][task.judge]
    count = len(outcome.stops)
    alone, own = (
        [v for v in outcome.figures(name, "stop", task.judge) if math.isfinite(v)]
        for name in (LIVE, outcome.headline)
    )
    if not (alone and own and math.isfinite(value)):
        return []
    return [
        f"The ensemble of the {count} live models reaches {task.judge} {value:.4g}, their mean "
        f"alone is {sum(alone) / len(alone):.4g} and that of {outcome.headline} "
        f"{sum(own) / len(own):.4g}; it costs {count} trainings and {count} predictions."
    ]


def _control(task: Task, control: Outcome) -> str:
    metric = task.metrics[task.judge]
    row = control.rows[control.headline]
    gain = row.gains["stop"][task.judge]
    return (
        "Control without mini-batch noise (full batch, dropout off): "
        f"{gain_clause(gain, metric, task.judge, when='at the end')}, and "
        f"{calm_clause(row.calm)}."
    )
