"""Everything that a study measured, as one value."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ._lengths import LengthFindings, length_findings
from ._methods import Method, Tail
from ._results import Memory, Outcome, Rule, measure, memories
from ._task import Task
from ._train import Run
from ._verdict import Verdict, verdict


@dataclass(frozen=True)
class Findings:
    """What a study measured: everything that its report shows.

    Args:
        task: what was studied, with the epochs it really had.
        seeds: the random seeds, in order.
        data: sizes of the parts: rows of train, validation, test.
        methods: what was followed.
        runs: every training run with its curves.
        outcome: the figures of the ordinary runs and of their rivals.
        control: the same without mini-batch noise, where the study has one.
        memories: what each average remembers, from the first seed's run.
        lengths: averages of many lengths, rebuilt from the snapshots of each run; None where none
            were kept.
        verdict: the answer, in sentences.
        seconds: wall-clock time.
        jobs: processes used.
        versions: what ran: Python, the machine, the libraries that decide the figures.
        command: the command line, where there was one.
    """

    task: Task
    seeds: tuple[int, ...]
    data: dict[str, int]
    methods: tuple[Method, ...]
    runs: tuple[Run, ...]
    outcome: Outcome
    control: Outcome | None
    memories: tuple[Memory, ...]
    lengths: LengthFindings | None
    verdict: Verdict
    seconds: float
    jobs: int
    versions: dict[str, str]
    command: str | None = None


def assemble(
    task: Task,
    methods: tuple[Method, ...],
    seeds: tuple[int, ...],
    runs: Sequence[Run],
    *,
    data: dict[str, int],
    ensemble: dict[Rule, dict[str, float]],
    seconds: float,
    jobs: int,
    versions: dict[str, str],
    command: str | None = None,
) -> Findings:
    """Measure the runs and write the verdict."""
    outcome = measure(task, runs, methods, kind="ordinary", ensemble=ensemble)
    controlled = any(run.kind == "control" for run in runs)
    control = measure(task, runs, methods, kind="control", ensemble={}) if controlled else None
    if control is not None:  # the average that the verdict speaks of, not a new pick
        control = replace(control, headline=outcome.headline)
    lengths = length_findings(task, runs, methods, outcome)
    order = list(outcome.rows)
    kept = [m for m in memories(methods, runs[0]) if m.name in order]
    kept.sort(key=lambda memory: order.index(memory.name))
    return Findings(
        task=task,
        seeds=seeds,
        data=data,
        methods=methods,
        runs=tuple(runs),
        outcome=outcome,
        control=control,
        memories=tuple(kept),
        lengths=lengths,
        verdict=verdict(
            task, outcome, control, edge=_edge(task, methods, outcome, kept), lengths=lengths
        ),
        seconds=seconds,
        jobs=jobs,
        versions=versions,
        command=command,
    )


def _edge(
    task: Task, methods: Sequence[Method], outcome: Outcome, kept: Sequence[Memory]
) -> Literal["shortest", "longest", ""]:
    """Whether the picked length lies at an end of the lengths that were tried."""
    family = {m.name for m in methods if not isinstance(m, Tail) and m.family == task.headline}
    ages = {memory.name: memory.mean_age for memory in kept if memory.name in family}
    if len(ages) < 2 or outcome.headline not in ages:
        return ""
    if outcome.headline == max(ages, key=ages.__getitem__):
        return "longest"
    return "shortest" if outcome.headline == min(ages, key=ages.__getitem__) else ""
