"""A study for machines: one strict JSON document, no NaN, every figure and setting in it."""

import dataclasses
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from ._findings import Findings
from ._results import Outcome
from ._statistics import LEVEL

FORMAT = "polyak study"
FORMAT_NUMBER = 1


def document(study: Findings, *, command: str | None = None) -> dict[str, Any]:
    """Everything measured as plain dicts, lists, strings and finite numbers; None for "none"."""
    task = study.task
    found: dict[str, Any] = _plain(
        {
            "format": FORMAT,
            "format_number": FORMAT_NUMBER,
            "versions": versions(),
            "command": command,
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
                }
                for memory in study.memories
            ],
            "ordinary": _outcome(study.outcome),
            "control": None if study.control is None else _outcome(study.control),
            "runs": [
                {
                    "kind": run.kind,
                    "seed": run.seed,
                    "steps_per_epoch": run.steps_per_epoch,
                    "stop": run.stop,
                    "seconds": round(run.seconds, 2),
                    "train_loss": run.train_loss,
                    "learning_rate": run.rates,
                    "curves": {name: dataclasses.asdict(c) for name, c in run.curves.items()},
                }
                for run in study.runs
            ],
        }
    )
    return found


def text(found: Mapping[str, Any]) -> str:
    """The document as JSON; a NaN that slipped through is an error, not an invalid file."""
    return json.dumps(found, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def versions() -> dict[str, str]:
    """What ran: Python, the machine, and the libraries that decide the figures."""
    found = {"python": platform.python_version(), "machine": platform.platform()}
    for name in ("polyak", "torch", "numpy", "scipy", "scikit-learn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {
        "judge": outcome.judge,
        "part": outcome.part,
        "stops": outcome.stops,
        "headline": outcome.headline,
        "favourite": outcome.favourite,
        "ensemble": outcome.ensemble,
        "methods": {name: dataclasses.asdict(row) for name, row in outcome.rows.items()},
    }


def _plain(value: Any) -> Any:
    """Strip a value to what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
