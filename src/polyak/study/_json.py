"""A study for machines: one strict JSON document, no NaN, every figure and setting in it."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ._findings import Findings
from ._lengths import LengthFindings
from ._results import Outcome
from ._statistics import LEVEL
from ._task import Task

FORMAT = "polyak study"
FORMAT_NUMBER = 3
DIGITS = 8  # kept of every figure: fewer would show in the spread of a calm curve


def document(study: Findings) -> dict[str, Any]:
    """Everything measured as plain dicts, lists, strings and finite numbers; None for "none".

    Relative gains are logarithms of ratios; "shown" are mean and interval as shares, and
    "arithmetic_mean" is the mean of the seeds' shares, which articles usually give.
    """
    task = study.task
    found: dict[str, Any] = _plain(
        {
            "format": FORMAT,
            "format_number": FORMAT_NUMBER,
            "versions": study.versions,
            "command": study.command,
            "task": {
                "name": task.name,
                "title": task.title,
                "notes": task.notes,
                "judge": task.judge,
                "metrics": {
                    name: {
                        "better": metric.better,
                        "compare": metric.compare,
                        "small": metric.small,
                        "unit": metric.unit,
                    }
                    for name, metric in task.metrics.items()
                },
                "epochs": task.epochs,
                "batch": task.batch,
                "evaluate_every": task.evaluate_every,
                "patience": task.patience,
                "watch": task.watch,
                "warmup": task.warmup,
                "headline": task.headline,
            },
            "rows": study.data,
            "seeds": study.seeds,
            "jobs": study.jobs,
            "seconds": round(study.seconds, 1),
            "interval_level": LEVEL,
            "verdict": {
                "answer": study.verdict.answer,
                "calmer": study.verdict.calmer,
                "title": study.verdict.title,
                "headline": study.verdict.headline,
                "sentences": study.verdict.sentences,
            },
            "memories": [
                {
                    "method": memory.name,
                    "rule": memory.rule,
                    "mean_age_steps": memory.mean_age,
                    "noise_window": memory.noise_window,
                    "initial_weight": memory.initial,
                    "copies": memory.copies,
                    "bytes": memory.bytes,
                    "replayed": memory.replayed,
                }
                for memory in study.memories
            ],
            "ordinary": _outcome(study.outcome, task),
            "control": None if study.control is None else _outcome(study.control, task),
            "lengths": None if study.lengths is None else _lengths(study.lengths),
            "runs": [
                {
                    "kind": run.kind,
                    "seed": run.seed,
                    "steps_per_epoch": run.steps_per_epoch,
                    "stop": run.stop,
                    "seconds": round(run.seconds, 2),
                    "bytes": run.bytes,
                    "train_loss": run.train_loss,
                    "learning_rate": run.rates,
                    "curves": {name: dataclasses.asdict(c) for name, c in run.curves.items()},
                    "lengths": None if run.lengths is None else dataclasses.asdict(run.lengths),
                }
                for run in study.runs
            ],
        }
    )
    return found


def text(found: Mapping[str, Any]) -> str:
    """The document as JSON; a NaN that slipped through is an error, not an invalid file."""
    return _written(found, 0) + "\n"


def _written(value: Any, depth: int) -> str:
    """Indented, but a list of numbers or of strings on one line: half the size."""
    if isinstance(value, dict) and value:
        marks, items = (
            "{}",
            [f"{json.dumps(k)}: {_written(v, depth + 1)}" for k, v in value.items()],
        )
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        marks, items = "[]", [_written(item, depth + 1) for item in value]
    else:
        return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    inner = ",\n".join(" " * (depth + 1) + item for item in items)
    return f"{marks[0]}\n{inner}\n{' ' * depth}{marks[1]}"


def _outcome(outcome: Outcome, task: Task) -> dict[str, Any]:
    methods = {name: dataclasses.asdict(row) for name, row in outcome.rows.items()}
    for name, row in outcome.rows.items():
        for rule, gained in row.gains.items():
            for title, gain in gained.items():
                metric = task.metrics[title]
                held = methods[name]["gains"][rule][title]
                held["shown"] = [metric.shown(x) for x in (gain.mean, gain.low, gain.high)]
                if metric.compare == "relative":
                    shares = [metric.shown(x) for x in gain.differences]
                    held["arithmetic_mean"] = sum(shares) / len(shares) if shares else None
    return {
        "judge": outcome.judge,
        "part": outcome.part,
        "stops": outcome.stops,
        "headline": outcome.headline,
        "favourite": outcome.favourite,
        "ensemble": outcome.ensemble,
        "methods": methods,
    }


def _lengths(found: LengthFindings) -> dict[str, Any]:
    """Metric against length over the seeds; the figures of each seed are with its run."""
    first, last = found.plateau
    points = zip(found.names, found.sweep.points, found.values, found.gains, strict=True)
    return {
        "curve": [
            {
                "average": name,
                "share": point.share,
                "error": point.error,
                "validation": point.score,
                "values": values,
                "gain": dataclasses.asdict(gain),
            }
            for name, point, values, gain in points
        ],
        "rival": found.rival,
        "best": found.best,
        "plateau": [first.share, last.share],
        "picked_together": dataclasses.asdict(found.together),
        "picked_alone": dataclasses.asdict(found.alone),
        "tracked": [dataclasses.asdict(each) for each in found.tracked],
    }


def _plain(value: Any) -> Any:
    """Strip a value to what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
