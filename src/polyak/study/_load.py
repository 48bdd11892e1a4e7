"""A study read back from its results: to draw its page anew, or to read its figures in Python."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from polyak._errors import ArgumentError

from ._findings import Findings, assemble
from ._json import FORMAT_NUMBER
from ._keep import Lengths, Rebuilt
from ._methods import LIVE
from ._task import Task
from ._tasks import TASKS
from ._train import REFRESHED, Curve, Run, planned, trimmed


def loaded(found: Mapping[str, Any], *, task: Task | None) -> Findings:
    """The findings that a document of `_json.document` was made of, measured anew.

    What was measured comes from the document; how it is named, judged and explained comes from
    the task, which JSON cannot hold. The outputs of the models are not kept: the ensemble's
    figures are those of the document.
    """
    if found["format_number"] > FORMAT_NUMBER:
        raise ArgumentError(
            f"folder must hold results of format {FORMAT_NUMBER} or before, got "
            f"{found['format_number']}. Read it with the polyak that wrote it, or a newer one."
        )
    settings = found["task"]
    name = settings["name"]
    if task is None and name not in TASKS:
        raise ArgumentError(
            f"task must be given for a study of a task of your own, got none for {name!r}. "
            "Pass task=... as it was studied."
        )
    task = replace(TASKS[name]() if task is None else task, epochs=settings["epochs"])
    held = {key: settings[key] for key in ("name", "judge", "batch", "evaluate_every", "patience")}
    given = {key: getattr(task, key) for key in held}
    if held != given or set(settings["metrics"]) != set(task.metrics):
        raise ArgumentError(
            f"task must be the one that was studied, {held} with {sorted(settings['metrics'])}, "
            f"got {given} with {sorted(task.metrics)}."
        )
    runs = [_run(task, run) for run in found["runs"]]
    methods = planned(task, runs[0].steps_per_epoch)
    known = {LIVE} | {m.name + more for m in methods for more in ("", REFRESHED)}
    strange = sorted(set(runs[0].curves) - known)
    if strange:
        raise ArgumentError(
            f"task must name the averages that were followed, got a study that holds {strange} "
            "too. Pass the task as it was studied."
        )
    return assemble(
        task,
        methods,
        tuple(found["seeds"]),
        runs,
        data=dict(found["rows"]),
        ensemble=found["ordinary"]["ensemble"],
        seconds=found["seconds"],
        jobs=found["jobs"],
        versions=found["versions"],
        command=found["command"],
    )


def _run(task: Task, found: Mapping[str, Any]) -> Run:
    curves = {name: _curve(curve) for name, curve in found["curves"].items()}
    kind, stop = found["kind"], found["stop"]
    return Run(
        kind=kind,
        seed=found["seed"],
        steps_per_epoch=found["steps_per_epoch"],
        stop=stop,
        train_loss=_numbers(found["train_loss"]),
        rates=_numbers(found["learning_rate"]),
        curves=trimmed(task, curves, stop=stop, kind=kind),
        bytes=found["bytes"],
        seconds=found["seconds"],
        outputs={},
        lengths=None if found.get("lengths") is None else _lengths(found["lengths"]),
    )


def _lengths(found: Mapping[str, Any]) -> Lengths:
    return Lengths(
        curve=tuple(_rebuilt(one) for one in found["curve"]),
        tracked=tuple(_rebuilt(one) for one in found["tracked"]),
        moments=found["moments"],
        bytes=found["bytes"],
        training=found["training"],
        keeping=found["keeping"],
        rebuilding=found["rebuilding"],
    )


def _rebuilt(found: Mapping[str, Any]) -> Rebuilt:
    figures = {
        part: {name: math.nan if value is None else float(value) for name, value in held.items()}
        for part, held in found["figures"].items()
    }
    return Rebuilt(found["name"], found["share"], found["error"], figures)


def _curve(found: Mapping[str, Any]) -> Curve:
    parts = {
        part: {name: _numbers(values) for name, values in found[part].items()}
        for part in ("validation", "test", "halves")
    }
    return Curve(first=found["first"], **parts)


def _numbers(values: list[float | None]) -> list[float]:
    """JSON has no NaN: a figure that is none was written as null."""
    return [math.nan if value is None else float(value) for value in values]
