"""The pictures of a study, for light and for dark pages; colours that colour-blind readers tell."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)
from numpy.typing import NDArray

from ._findings import Findings
from ._methods import DECAYED, LIVE
from ._metrics import Metric
from ._results import RULES, Memory, Outcome
from ._statistics import Paired
from ._train import Run


@dataclass(frozen=True)
class Theme:
    """Colours of a page. Blue, orange and green are those of Okabe and Ito (2008)."""

    paper: str
    ink: str
    faint: str
    live: str
    average: str
    rival: str


LIGHT = Theme("#ffffff", "#1d2530", "#d9dee5", "#6b7684", "#0072b2", "#d55e00")
DARK = Theme("#14181d", "#e6e9ed", "#343b45", "#98a2af", "#56b4e9", "#f0904a")

_DPI = 160
_SIZE = 10.0
_FAR = 3.0  # times the differences of most seeds: what lies beyond leaves the forest plot
_FEW_UPDATES = 40  # up to here a profile is drawn update by update

Picture = Callable[[Findings, Theme], Figure]


def png(picture: Picture, study: Findings, theme: Theme) -> bytes:
    """A picture as the bytes of a PNG file, the same bytes for the same study."""
    buffer = io.BytesIO()
    with mpl.rc_context(_style(theme)):
        picture(study, theme).savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def pictures(study: Findings) -> dict[str, tuple[Picture, str]]:
    """Name of each picture of this study, how it is drawn, and what it shows."""
    judge, last = study.task.judge, list(study.task.metrics)[-1]
    name = study.outcome.headline
    says = f"of the live weights and of {name}, up to the stop."
    found: dict[str, tuple[Picture, str]] = {
        "loss": (judged_curves, f"Validation {judge} {says}"),
        "methods": (
            small_multiples,
            "Each method against the live curve (grey); a curve far above leaves its panel.",
        ),
        "weights": (
            weight_profiles,
            f"How much each moment of training counts in each average, seed {study.seeds[0]}.",
        ),
        "differences": (
            forest,
            f"Change of {judge} against the live weights of the same seed, above 0 for the "
            "better. What lies far beyond most of the seeds leaves the picture.",
        ),
    }
    if last != judge:
        found["metric"] = (last_curves, f"Validation {last} {says}")
    return found


def _style(theme: Theme) -> dict[Any, Any]:
    return {
        "font.size": _SIZE,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": _SIZE + 0.5,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "text.color": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "grid.color": theme.faint,
        "grid.linewidth": 0.6,
    }


def _panels(
    count: int, *, columns: int, width: float, height: float, share: bool = True
) -> tuple[Figure, list[Axes]]:
    """A grid of `count` panels; with `share` they have one scale, labelled at the edges."""
    rows = -(-count // columns)
    figure = Figure(figsize=(width, height * rows), dpi=_DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=True)
    axes: list[Axes] = list(grid.flat)
    for spare in axes[count:]:
        spare.set_axis_off()
    for axis in axes[max(0, count - columns) : count]:  # also those above a spare place
        axis.tick_params(labelbottom=True)
    return figure, axes[:count]


def _ordinary(study: Findings) -> list[Run]:
    return [run for run in study.runs if run.kind == "ordinary"]


def _epochs(run: Run, name: str, metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    curve = run.curves[name]
    last = max(0, run.stop - curve.first + 1)
    values = np.asarray(curve.validation[metric][:last], dtype=np.float64)
    return np.arange(curve.first, curve.first + len(values), dtype=np.float64), values


def _range(studied: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """Limits that show where curves end, not the first steep epochs."""
    settled = np.concatenate([np.zeros(0), *(curve[len(curve) // 4 :] for curve in studied)])
    settled = settled[np.isfinite(settled)]
    if not len(settled):
        return 0.0, 1.0
    low, high = float(settled.min()), float(np.quantile(settled, 0.995))
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


def _scale(axis: Axes, curves: Sequence[NDArray[np.float64]]) -> None:
    """Limits that show where the curves end; logarithmic where that spans more than four times."""
    low, high = _range(curves)
    finite = [curve[np.isfinite(curve)] for curve in curves]
    floor = min((float(curve.min()) for curve in finite if len(curve)), default=0.0)
    if floor > 0.0 and high / floor > 4.0:
        axis.set_yscale("log")
        axis.set_ylim(floor * 0.85, high * 1.5)
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        axis.set_ylim(low, high)


def _curves(study: Findings, metric: str, theme: Theme) -> Figure:
    """Left: the first seed, live and averaged. Right: median and range of all seeds."""
    name = study.outcome.headline
    shown = ((LIVE, theme.live), (name, theme.average))
    runs = _ordinary(study)
    figure, axes = _panels(2 if len(runs) > 1 else 1, columns=2, width=9.6, height=4.0)
    everything: list[NDArray[np.float64]] = []
    for method, colour in shown:
        epochs, values = _epochs(runs[0], method, metric)
        everything.append(values)
        axes[0].plot(epochs, values, color=colour, linewidth=1.6, label=method)
        for axis in axes[1:]:
            epochs, seeds = _over_seeds(runs, method, metric)
            everything += [np.nanmin(seeds, axis=0), np.nanmax(seeds, axis=0)]
            axis.fill_between(
                epochs,
                np.nanmin(seeds, axis=0),
                np.nanmax(seeds, axis=0),
                color=colour,
                alpha=0.3,
                linewidth=0,
            )
            axis.plot(epochs, np.nanmedian(seeds, axis=0), color=colour, linewidth=1.6)
    for axis in axes:
        axis.grid(axis="y")
        axis.set_xlabel(study.task.unit)
    axes[0].set_title(f"Seed {runs[0].seed}")
    for axis in axes[1:]:
        axis.set_title(f"{len(runs)} seeds: median and range")
    axes[0].set_ylabel(f"validation {metric}")
    if study.task.metrics[metric].better == "lower":
        _scale(axes[0], everything)
    else:
        axes[0].set_ylim(*_range(everything))
    _key(axes[0])
    return figure


def _key(axis: Axes) -> None:
    """Names in the colour of their lines, above the panel, where no curve runs."""
    axis.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 0.99),
        ncols=2,
        frameon=False,
        handlelength=0.0,
        labelcolor="linecolor",
        prop={"weight": "bold", "size": _SIZE},
    )


def judged_curves(study: Findings, theme: Theme) -> Figure:
    """Validation curves of the metric that judges."""
    return _curves(study, study.task.judge, theme)


def last_curves(study: Findings, theme: Theme) -> Figure:
    """Validation curves of the last metric of the task."""
    return _curves(study, list(study.task.metrics)[-1], theme)


def small_multiples(study: Findings, theme: Theme) -> Figure:
    """One panel a method: its median curve over seeds, the live one in grey behind it."""
    judge = study.task.judge
    runs = _ordinary(study)
    rivals = [run for run in study.runs if run.kind == "decayed"]
    panels = [(name, runs, name) for name in runs[0].curves if name != LIVE]
    panels += [(DECAYED, rivals, LIVE)] if rivals else []
    figure, axes = _panels(len(panels), columns=3, width=9.6, height=2.0)
    live_epochs, live = _over_seeds(runs, LIVE, judge)
    middle = np.nanmedian(live, axis=0)
    for axis, (title, chosen, name) in zip(axes, panels, strict=True):
        epochs, seeds = _over_seeds(chosen, name, judge)
        colour = theme.rival if title == DECAYED else theme.average
        axis.plot(live_epochs, middle, color=theme.live, linewidth=0.9)
        axis.plot(epochs, np.nanmedian(seeds, axis=0), color=colour, linewidth=1.6)
        axis.set_title(title)
        axis.grid(axis="y")
    _scale(axes[0], [middle])  # by the live curve: a method far off leaves the panel
    figure.supxlabel(study.task.unit, fontsize=_SIZE)
    figure.supylabel(f"validation {judge}, median of seeds; live in grey", fontsize=_SIZE)
    return figure


def _over_seeds(
    runs: Sequence[Run], name: str, metric: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Epochs up to the first stop, and the values there: [seeds, epochs], NaN where none."""
    last = min(run.stop for run in runs)
    table = np.full((len(runs), last), np.nan)
    for row, run in zip(table, runs, strict=True):
        epochs, values = _epochs(run, name, metric)
        inside = epochs <= last
        row[epochs[inside].astype(int) - 1] = values[inside]
    some = np.isfinite(table).any(axis=0)
    return np.arange(1, last + 1, dtype=np.float64)[some], table[:, some]


def weight_profiles(study: Findings, theme: Theme) -> Figure:
    """The share of the average that each moment of training has, a panel an average."""
    figure, axes = _panels(len(study.memories), columns=3, width=9.6, height=1.7)
    run = study.runs[0]
    for axis, memory in zip(axes, study.memories, strict=True):
        _weights(axis, memory, run, study.task.unit_name, theme)
    axes[0].set_xlim(0, run.stop)
    axes[0].set_ylim(0, 1.06)
    axes[0].set_yticks([])
    figure.supxlabel(f"{study.task.unit} (training stopped at {run.stop})", fontsize=_SIZE)
    figure.supylabel("weight in the average, its largest = 1", fontsize=_SIZE)
    return figure


def _weights(axis: Axes, memory: Memory, run: Run, unit: str, theme: Theme) -> None:
    peak = float(memory.weights.max()) if len(memory.weights) else 0.0
    if peak > 0.0:
        heights = memory.weights / peak
        if len(heights) > _FEW_UPDATES:
            axis.fill_between(memory.epochs, heights, color=theme.average, linewidth=0)
        else:
            axis.vlines(memory.epochs, 0, heights, color=theme.average, linewidth=1.2)
    note = f"mean age {memory.mean_age / run.steps_per_epoch:.2g} {unit}s"
    if memory.initial > 1e-3:
        note += f"\nstart weighs {memory.initial:.2%}"
    if memory.copies > 1:
        note += f"\nholds {memory.copies} copies"
    axis.text(0.03, 0.92, note, transform=axis.transAxes, va="top", fontsize=_SIZE - 1.5)
    axis.set_title(memory.name)


def forest(study: Findings, theme: Theme) -> Figure:
    """Mean difference to the live weights with its interval, every seed as a dot; two rules."""
    outcome, task = study.outcome, study.task
    metric = task.metrics[task.judge]
    names = [name for name in outcome.rows if name != LIVE]
    height = 1.0 + 0.32 * len(names)
    figure, axes = _panels(2, columns=2, width=9.6, height=height, share=False)
    titles = {"stop": "All at the stop of the run" if task.patience else "All at the end"}
    titles["best"] = "Each at its own best epoch"
    factor = 1.0 if metric.compare == "relative" else metric.scale
    for axis, rule in zip(axes, RULES, strict=True):
        gains = [outcome.rows[name].gains[rule][task.judge] for name in reversed(names)]
        for place, (name, gain) in enumerate(zip(reversed(names), gains, strict=True)):
            _whisker(axis, gain, place, factor, _colour(name, outcome, theme), theme)
        axis.axvline(0, color=theme.ink, linewidth=0.8, zorder=1)
        axis.grid(axis="x")
        axis.set_title(titles[rule])
        axis.xaxis.set_major_locator(MaxNLocator(5))
        if metric.compare == "relative":
            axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_xlim(*_forest_limits(gains, factor))
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
    axes[0].set_yticks(range(len(names)), list(reversed(names)))
    axes[0].set_ylim(-0.6, len(names) - 0.4)
    figure.supxlabel(_forest_label(study, metric), fontsize=_SIZE)
    return figure


def _forest_label(study: Findings, metric: Metric) -> str:
    change = "relative change" if metric.compare == "relative" else "change"
    unit = f" in {metric.unit}" if metric.unit and metric.compare == "absolute" else ""
    return (
        f"worse than live  \N{LEFTWARDS ARROW}  {change} of {study.outcome.part} "
        f"{study.task.judge}{unit}  \N{RIGHTWARDS ARROW}  better than live\n"
        "diamond and bar: mean over seeds and its 95 % interval; dot: a seed"
    )


def _colour(name: str, outcome: Outcome, theme: Theme) -> str:
    if name.startswith(DECAYED):
        return theme.rival
    return theme.average if name == outcome.headline else theme.ink


def _whisker(
    axis: Axes, gain: Paired, place: int, factor: float, colour: str, theme: Theme
) -> None:
    seeds = np.asarray(gain.differences) * factor
    below = np.full(len(seeds), place - 0.26)
    axis.scatter(seeds, below, s=11, color=theme.live, linewidth=0, zorder=2)
    if math.isfinite(gain.low):
        ends = [gain.low * factor, gain.high * factor]
        axis.plot(ends, [place, place], color=colour, linewidth=2.0, zorder=3)
    if math.isfinite(gain.mean):
        axis.scatter([gain.mean * factor], [place], s=34, color=colour, marker="D", zorder=4)


def _forest_limits(gains: Sequence[Paired], factor: float) -> tuple[float, float]:
    """0 and all seeds inside, but for a method or an interval that would squeeze all others."""
    seeds = np.asarray([value for gain in gains for value in gain.differences] or [0.0]) * factor
    usual = _FAR * max(float(np.quantile(np.abs(seeds), 0.75)), 1e-12)
    ends = [end * factor for gain in gains for end in (gain.low, gain.high) if math.isfinite(end)]
    low = max(min([0.0, *seeds, *ends]), -usual)
    high = min(max([0.0, *seeds, *ends]), usual)
    pad = 0.05 * max(high - low, 1e-12)
    return low - pad, high + pad
