"""The front door of a study: run it, read it, keep it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from . import _folder, _json
from ._findings import Findings
from ._run import find
from ._tables import Table, tables
from ._task import Task
from ._train import Tell
from ._verdict import Verdict


@dataclass(frozen=True)
class Study:
    """A finished study.

    Args:
        findings: the runs with all their curves, and every figure drawn from them.
    """

    findings: Findings

    @property
    def verdict(self) -> Verdict:
        """The answer, in sentences."""
        return self.findings.verdict

    @cached_property
    def results(self) -> dict[str, Any]:
        """Every figure as plain values: what `results.json` holds."""
        return _json.document(self.findings)

    @property
    def tables(self) -> list[Table]:
        """The tables of the report, as text."""
        return tables(self.findings)

    def save(self, out: str | Path, *, force: bool = False, command: str | None = None) -> Path:
        """Write `report.html`, `results.json` and the pictures to the folder `out`.

        Written whole or not at all. An earlier study there is only replaced with `force`, a folder
        that holds anything else never. `command` is the command line that the page names.

        Raises:
            ArgumentError: a folder that may not be written to.
        """
        named = self.findings if command is None else replace(self.findings, command=command)
        return _folder.save(named, out, force=force)

    @staticmethod
    def load(folder: str | Path, *, task: Task | None = None) -> "Study":
        """Read a study back from its folder, to draw its page anew or to go on from its figures.

        Nothing is trained. `save(folder, force=True)` then writes the page as this version of
        polyak draws it.

        Args:
            folder: what `save` wrote.
            task: the task that was studied; None where it is one that comes with the library.

        Raises:
            ArgumentError: no study there, a task that is not the one that was studied.
        """
        return Study(_folder.load(folder, task=task))


def run_study(
    task: Task,
    *,
    seeds: int | Sequence[int] = 5,
    jobs: int = 1,
    epochs: int | None = None,
    short: bool = False,
    control: bool | None = None,
    tell: Tell | None = None,
) -> Study:
    """Train a task with several seeds, follow every average, compare under equal rules.

    Deterministic: a seed gives the same figures in any process and at any number of jobs (each
    trains on one thread), on one machine with one version of torch.

    Args:
        task: what to study.
        seeds: how many (0, 1, ...), or which.
        jobs: processes. With 1 everything runs here and `task` may hold lambdas; with more, its
            functions must be importable, and a script needs its `if __name__ == "__main__":`.
        epochs: at most so many, instead of the task's.
        short: use the task's `short_epochs`, and no control.
        control: whether to run the control; None leaves it to the task.
        tell: called with a `Moment` after every evaluation, in this process.

    Raises:
        ArgumentError: no seeds, a task that cannot be sent to another process, settings of the
            task that do not fit each other.
        RunError: a run broke.
    """
    return Study(
        find(task, seeds=seeds, jobs=jobs, epochs=epochs, short=short, control=control, tell=tell)
    )
