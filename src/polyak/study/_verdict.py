"""What do the figures say, in sentences? Written from the numbers alone; it may well be "no"."""

import math
from dataclasses import dataclass
from typing import Literal

from ._methods import DECAYED, LIVE
from ._metrics import Metric
from ._results import Calm, Outcome, Rule
from ._statistics import Paired, detectable, gains, paired
from ._task import Task

Answer = Literal["yes", "no", "little", "not shown"]
ALIKE = 1.25  # spreads proved to differ by less than this factor are called alike
FEW = 5  # below this many seeds the verdict says how little they can show


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


def verdict(task: Task, ordinary: Outcome, control: Outcome | None) -> Verdict:
    """Say what was found."""
    name, metric = ordinary.headline, task.metrics[task.judge]
    row = ordinary.rows[name]
    gain = row.gains["stop"][task.judge]
    answer, calmer = answer_of(gain, metric), calm_of(row.calm)
    words = {"little": "hardly"}
    title = (
        f"A calmer curve: {words.get(calmer, calmer)}. "
        f"A better {task.judge} {when(task, 'stop')}: {words.get(answer, answer)}."
    )
    headline = (
        f"{name}: {calm_clause(row.calm)}; "
        f"{gain_clause(gain, metric, task.judge, when=when(task, 'stop'))}."
    )
    sentences = [
        *_few(gain),
        _at_best(task, ordinary),
        *_pick(task, ordinary),
        *_rival(task, ordinary),
        *_joined(task, ordinary),
        *([_control(task, control)] if control is not None else []),
    ]
    return Verdict(
        answer=answer, calmer=calmer, title=title, headline=headline, sentences=tuple(sentences)
    )


def answer_of(gain: Paired, metric: Metric) -> Answer:
    """Class of a gain: "little" goes before "yes" and "no", as the reader's own threshold does."""
    if metric.small > 0.0 and gain.within(metric.small):
        return "little"
    found: dict[str, Answer] = {"better": "yes", "worse": "no", "uncertain": "not shown"}
    return found[gain.finding]


def when(task: Task, rule: Rule) -> str:
    """The moment of a rule, in words."""
    if rule == "best":
        return "each at its own best epoch"
    return "at the stop" if task.patience is not None else "at the end"


def amount(value: float, metric: Metric, *, sign: bool = True) -> str:
    """A difference for people: "+5 %", "-0.041 nats".

    Example:
        >>> amount(0.0512, Metric(lambda a, b: a))
        '+5.1 %'
    """
    if not math.isfinite(value):
        return "no figure"
    relative = metric.compare == "relative"
    shown = value * (100.0 if relative else metric.scale)
    unit = "%" if relative else metric.unit
    two_figures = 1 - math.floor(math.log10(abs(shown))) if shown else 0
    digits = min(max(two_figures, 0), 1 if relative else 6)
    text = f"{shown:{'+' if sign else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")
    return f"{text} {unit}".strip()


def interval(gain: Paired, metric: Metric) -> str:
    """Mean, interval and count of a paired difference, for brackets."""
    mean = f"mean {amount(gain.mean, metric)}"
    if gain.seeds < 2:
        return f"{mean}, one seed: no interval"
    low, high = amount(gain.low, metric), amount(gain.high, metric)
    return (
        f"{mean}, 95 % interval {_bare(low)} to {high}, better in {gain.wins} of {gain.seeds} seeds"
    )


def _bare(text: str) -> str:
    """The number of "+5 %" alone: the unit is said once, at the end of an interval."""
    return text.split(" ")[0]


def gain_clause(gain: Paired, metric: Metric, name: str, *, when: str) -> str:
    """Whether the gain is real, as a clause."""
    lost = f"; {gain.left_out} more diverged" if gain.left_out else ""
    said = f"({interval(gain, metric)}{lost})"
    answer = answer_of(gain, metric)
    if answer == "little":
        size = amount(metric.small, metric, sign=False)
        return f"{name} {when} changes little {said}: less than {size} either way"
    if answer == "yes":
        least = min(gain.differences)
        each = f", by {amount(least, metric, sign=False)} or more in each" if least > 0 else ""
        return f"the gain in {name} {when} is real {said[:-1]}{each})"
    if answer == "no":
        return f"{name} {when} gets worse {said}"
    return f"the gain in {name} {when} is uncertain {said}"


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
    size = (
        f"{calm.median:.1f} times with its trend taken out, {calm.plain_median:.1f} times plainly"
    )
    if logs.seeds < 2:
        return f"the curve is calmer by {size} in the one seed there is"
    clause = {
        "yes": "the calmer curve is real",
        "no": "the curve is more restless",
        "little": "the curve is as restless as before",
        "not shown": "a calmer curve is not shown",
    }[calm_of(calm)]
    return f"{clause} ({logs.wins} of {logs.seeds} seeds, median {size})"


def _few(gain: Paired) -> list[str]:
    if gain.seeds >= FEW:
        return []
    if gain.seeds < 2:
        return ["One seed shows nothing about the next one: run at least five."]
    return [
        f"{gain.seeds} seeds are few: the interval reaches {detectable(gain.seeds):.1f} standard "
        "deviations to either side, so only large effects can show."
    ]


def _at_best(task: Task, outcome: Outcome) -> str:
    metric = task.metrics[task.judge]
    gain = outcome.rows[outcome.headline].gains["best"][task.judge]
    rule = (
        "With the same early stopping for both"
        if task.patience is not None
        else "With the epoch chosen on validation data for both"
    )
    clause = gain_clause(gain, metric, task.judge, when=when(task, "best"))
    rosy = " Each was picked and judged on the same rows." if outcome.part == "validation" else ""
    return f"{rule}, {clause}.{rosy}"


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
        "The rival, a learning rate decayed to zero over as many steps and no average: compared "
        f"with the live weights, {gain_clause(alone, metric, judge, when=end)}.",
        f"Compared with that rival {outcome.headline} is {standing[direct.finding]} "
        f"({interval(direct, metric)}). "
        f"Averaging on top of it: {gain_clause(on_top, metric, judge, when=end)}.",
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
    live = outcome.figures(LIVE, "stop", task.judge)
    own = outcome.figures(outcome.headline, "stop", task.judge)
    return [
        f"The ensemble of the {len(live)} live models reaches {task.judge} {value:.4g}, their mean "
        f"alone is {sum(live) / len(live):.4g} and that of {outcome.headline} "
        f"{sum(own) / len(own):.4g}; it costs {len(live)} trainings and {len(live)} predictions."
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
