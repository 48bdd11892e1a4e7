"""When an average was really updated: run-length coded, a year of steps in a few numbers."""

import math
import numbers
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from ._errors import ArgumentError, OrderError

Run: TypeAlias = tuple[float, int, int]


class History:
    """The intervals between the updates of an average, in the order in which they happened.

    Equal intervals under the same schedule that follow each other are one run, (elapsed, count,
    schedule_index): a regular run of any length takes the memory of three numbers. Together with
    the schedules it is all that a profile needs to be the one that really happened, whatever the
    intervals, changes of schedule and resumes were.

    Examples:
        >>> history = History()
        >>> for elapsed in (1, 1, 1, 5):
        ...     history.append(elapsed)
        >>> history.runs, len(history), history.times().tolist()
        ([(1, 3, 0), (5, 1, 0)], 4, [1.0, 2.0, 3.0, 8.0])
    """

    __slots__ = ("_runs",)

    def __init__(self) -> None:
        # Lists, because the count of the last one changes at every update.
        self._runs: list[list[Any]] = []

    def append(self, elapsed: float, schedule_index: int = 0) -> None:
        """Note one more update, `elapsed` after the last one.

        Args:
            elapsed: time since the last update (since the start for the first), above 0.
            schedule_index: which of the caller's schedules gave the decay, from 0.
        """
        if self._runs:
            last = self._runs[-1]
            # A clock of floats jitters in its last digits: i * 0.1 has as many intervals as steps.
            same = last[0] == elapsed or (
                isinstance(elapsed, float) and math.isclose(last[0], elapsed, rel_tol=1e-9)
            )
            if same and last[2] == schedule_index:
                last[1] += 1
                return
        self._runs.append(_checked_run([elapsed, 1, schedule_index]))

    def take_back(self) -> None:
        """Forget the last update, which turned out not to have happened."""
        if not self._runs:
            raise OrderError("take_back must follow an append, got an empty history.")
        self._runs[-1][1] -= 1
        if self._runs[-1][1] == 0:
            self._runs.pop()

    @property
    def runs(self) -> list[Run]:
        """Return the runs, as (elapsed, count, schedule_index)."""
        return [(elapsed, count, index) for elapsed, count, index in self._runs]

    def times(self, start: float = 0.0) -> npt.NDArray[np.float64]:
        """Return the time of every update [updates], for an average that began at `start`."""
        spans = (elapsed * count for elapsed, count, _ in self._runs)
        begins = accumulate(spans, initial=start)
        # A product for each run: adding up a million steps of 0.1 would drift.
        parts = [
            begin + elapsed * np.arange(1, count + 1, dtype=np.float64)
            for begin, (elapsed, count, _) in zip(begins, self._runs, strict=False)
        ]
        return np.concatenate(parts) if parts else np.empty(0)

    def schedule_indices(self) -> npt.NDArray[np.int64]:
        """Return the schedule index of every update [updates]."""
        counts = [count for _, count, _ in self._runs]
        return np.repeat(np.array([run[2] for run in self._runs], dtype=np.int64), counts)

    def state(self) -> list[list[float]]:
        """Return the runs as plain lists of numbers, for a file."""
        return [list(run) for run in self._runs]

    @classmethod
    def from_state(cls, state: object) -> Self:
        """Return the history that `state` described.

        Raises:
            ArgumentError: when a run is not an interval above 0, a count above 0 and an index.
        """
        if isinstance(state, str) or not isinstance(state, Sequence):
            raise ArgumentError(
                f"the saved history must be a list of runs, got {state!r}. "
                "Load what History.state returned."
            )
        history = cls()
        history._runs = [_checked_run(run) for run in state]
        return history

    def __len__(self) -> int:
        return sum(run[1] for run in self._runs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, History) and self._runs == other._runs

    __hash__ = None  # type: ignore[assignment]  # it grows

    def __repr__(self) -> str:
        return f"History({len(self)} updates in {len(self._runs)} runs)"


def _checked_run(run: object) -> list[Any]:
    """Return `run` as plain numbers; raise unless each is what it must be."""
    if isinstance(run, str) or not isinstance(run, Sequence) or len(run) != 3:
        raise ArgumentError(
            f"a run of the history must be elapsed, count and schedule index, got {run!r}."
        )
    elapsed, count, index = run
    if not (_is_number(elapsed) and 0.0 < elapsed < math.inf):
        raise ArgumentError(f"elapsed must be finite and above 0, got {elapsed!r}.")
    if not (_is_number(count) and count == int(count) and count >= 1):
        raise ArgumentError(f"the count of a run must be a whole number above 0, got {count!r}.")
    if not (_is_number(index) and index == int(index) and index >= 0):
        raise ArgumentError(f"schedule_index must be a whole number from 0 on, got {index!r}.")
    plain = int(elapsed) if isinstance(elapsed, numbers.Integral) else float(elapsed)
    return [plain, int(count), int(index)]


def _is_number(value: object) -> bool:
    return (
        not isinstance(value, bool)
        and isinstance(value, numbers.Real)
        and math.isfinite(float(value))
    )
