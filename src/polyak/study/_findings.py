"""Everything that a study measured, as one value."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ._methods import Method
from ._results import Memory, Outcome, measure, memories
from ._task import Data, Task
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
        verdict: the answer, in sentences.
        seconds: wall-clock time.
        jobs: processes used.
    """

    task: Task
    seeds: tuple[int, ...]
    data: dict[str, int]
    methods: tuple[Method, ...]
    runs: tuple[Run, ...]
    outcome: Outcome
    control: Outcome | None
    memories: tuple[Memory, ...]
    verdict: Verdict
    seconds: float
    jobs: int


def assemble(
    task: Task,
    data: Data,
    methods: tuple[Method, ...],
    seeds: tuple[int, ...],
    runs: Sequence[Run],
    *,
    seconds: float,
    jobs: int,
) -> Findings:
    """Measure the runs and write the verdict."""
    outcome = measure(task, data, runs, methods, kind="ordinary")
    controlled = any(run.kind == "control" for run in runs)
    control = measure(task, data, runs, methods, kind="control") if controlled else None
    if control is not None:  # the average that the verdict speaks of, not a new pick
        control = replace(control, headline=outcome.headline)
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    return Findings(
        task=task,
        seeds=seeds,
        data={name: len(pair[0]) for name, pair in parts.items() if pair is not None},
        methods=methods,
        runs=tuple(runs),
        outcome=outcome,
        control=control,
        memories=tuple(memories(methods, runs[0])),
        verdict=verdict(task, outcome, control),
        seconds=seconds,
        jobs=jobs,
    )
