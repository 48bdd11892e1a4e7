"""What does one run keep, so that the length of its average can be chosen afterwards?"""

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from torch import nn

from polyak._average import Averages
from polyak._fit import MAX_ERROR
from polyak._posthoc import Run, open_run
from polyak._profiles import profile
from polyak._schedules import Power, Schedule
from polyak._snapshots import Snapshots
from polyak._weights import load_into

from ._task import Task

WIDTHS = (0.01, 0.014, 0.02, 0.028, 0.04, 0.05, 0.07, 0.1, 0.13, 0.16, 0.2, 0.25)
"""Widths of the power functions that are rebuilt: mean ages from 1 to 36 % of the run."""

_PAIR = {"short": Power(sigma_rel=0.05), "long": Power(sigma_rel=0.10)}

Figures = dict[str, dict[str, float]]
"""Part ("validation", "test") -> metric -> value."""


@dataclass(frozen=True)
class Rebuilt:
    """An average that was put together from snapshots, at the stop of a run.

    Args:
        name: the average.
        share: the mean age of what it averages, as a share of the run.
        error: relative squared profile error of the reconstruction.
        figures: part -> metric -> value; empty where the snapshots do not resolve the average.
    """

    name: str
    share: float
    error: float
    figures: Figures


@dataclass(frozen=True)
class Lengths:
    """Many lengths from one run.

    Args:
        curve: power functions of the widths `WIDTHS`, short to long.
        tracked: averages that were also tracked online, rebuilt.
        moments: how many moments were on disk.
        bytes: what they took there.
        training: seconds that the optimizer steps took, averages and evaluations left out.
        keeping: seconds more for updating the two averages that were kept, and for waiting until
            they were on disk.
        rebuilding: seconds that it took to rebuild and to score all of `curve` and `tracked`.
    """

    curve: tuple[Rebuilt, ...]
    tracked: tuple[Rebuilt, ...]
    moments: int
    bytes: int
    training: float
    keeping: float
    rebuilding: float


class Keeper:
    """Two averages of a run, written now and then to a folder that goes with the `with` block.

    In float16, as `Snapshots` writes unless told otherwise: the study is to show what a reader
    would get. Where the run may stop early a moment is taken at every evaluation and they are
    thinned as they grow too many; else they are spread evenly over the steps that are planned.
    """

    def __init__(self, task: Task, model: nn.Module, *, per_epoch: int) -> None:
        self._model = model
        self._averages = Averages(model, _PAIR)
        even = per_epoch * task.epochs / task.snapshots
        self._every = even if task.patience is None else float(per_epoch)
        self._keep = task.snapshots
        self._stack = ExitStack()
        self.seconds = 0.0

    def __enter__(self) -> Self:
        folder = tempfile.TemporaryDirectory(prefix="polyak-study-", ignore_cleanup_errors=True)
        with ExitStack() as stack:
            self._folder = stack.enter_context(folder)
            self._snapshots = stack.enter_context(
                Snapshots(self._averages, self._folder, every=self._every, keep=self._keep)
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def update(self) -> None:
        """Fold the live weights in: called after each optimizer step."""
        started = time.perf_counter()
        self._averages.update()
        self.seconds += time.perf_counter() - started

    def rebuild(
        self, tracked: Mapping[str, Schedule], look: Callable[[], Figures], *, training: float
    ) -> Lengths:
        """Score averages of every length as of now; the model has its weights back afterwards.

        What `polyak.sweep` does, for all metrics and parts at once; a figure that is not finite
        is kept, and what the snapshots do not resolve has none.

        Args:
            tracked: name -> schedule of averages that were tracked online.
            look: scores what the model holds.
            training: seconds that the steps took.
        """
        started = time.perf_counter()
        if self._snapshots.moments[-1:] != [self._averages["short"].now]:
            self._snapshots.take()
        self._snapshots.close()
        self.seconds += time.perf_counter() - started
        started = time.perf_counter()
        held = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        run = open_run(self._folder)
        try:
            widths = {f"power {width:g}": Power(sigma_rel=width) for width in WIDTHS}
            curve = self._scored(run, widths, look)
            others = self._scored(run, tracked, look)
        finally:
            self._model.load_state_dict(held)
        return Lengths(
            curve=curve,
            tracked=others,
            moments=len(run.moments),
            bytes=self._snapshots.stored_bytes,
            training=training,
            keeping=self.seconds,
            rebuilding=time.perf_counter() - started,
        )

    def _scored(
        self, run: Run, targets: Mapping[str, Schedule], look: Callable[[], Figures]
    ) -> tuple[Rebuilt, ...]:
        steps = self._averages["short"].updates
        points = []
        for name, target in targets.items():
            found = run.reconstruct(target, max_error=math.inf)
            figures: Figures = {}
            if found.fit.error <= MAX_ERROR:
                weights = found.weights()
                load_into(self._model, weights, "the reconstruction", may_lack=found.frozen)
                figures = look()
            age = profile(target, np.arange(1, steps + 1)).mean_age
            points.append(Rebuilt(name, age / steps, found.fit.error, figures))
        return tuple(points)
