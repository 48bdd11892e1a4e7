"""The pictures of a study, for light and for dark pages; colours that colour-blind readers tell."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
)
from numpy.typing import NDArray
from PIL import Image  # comes with matplotlib

from ._findings import Findings
from ._lengths import LengthFindings
from ._methods import DECAYED, LIVE
from ._metrics import Metric
from ._results import RULES, Memory, Outcome
from ._statistics import Paired, gains
from ._train import Run
from ._verdict import when


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

_DPI = 128
_COLOURS = 48
_SIZE = 10.0
_FAR = 3.0  # times the differences of most seeds: what lies beyond leaves the forest plot
_FITS = 15.0  # times the validation loss: up to here the training loss shares its panel
_SHARES = 200  # points of a curve over shares of a run
_TICKS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # shares of a run
_AGE = "mean age of the average, as a share of the run (logarithmic)"
_FEW_UPDATES = 40  # up to here a profile is drawn update by update

Picture = Callable[[Findings, Theme], Figure]


def png(picture: Picture, study: Findings, theme: Theme) -> bytes:
    """A picture as the bytes of a PNG file, the same bytes for the same study."""
    raw, small = io.BytesIO(), io.BytesIO()
    with mpl.rc_context(_style(theme)):
        picture(study, theme).savefig(raw, format="png", metadata={"Software": None})
    with Image.open(raw) as image:  # few colours: a third of the size, and nobody sees it
        image.convert("RGB").quantize(_COLOURS, method=Image.Quantize.MAXCOVERAGE).save(
            small, format="png", optimize=True
        )
    return small.getvalue()


def pictures(study: Findings) -> dict[str, tuple[Picture, str]]:
    """Name of each picture of this study, how it is drawn, and what it shows."""
    judge, last = study.task.judge, list(study.task.metrics)[-1]
    name = study.outcome.headline
    best = ", a dot at the best epoch of each" if study.task.patience is not None else ""
    says = f"of the live weights and of {name}, up to the stop{best}"
    _, note = _train_shown(study)
    found: dict[str, tuple[Picture, str]] = {
        "loss": (judged_curves, f"Validation {judge} {says}; {_overtaken(study)}{note}."),
        "methods": (
            small_multiples,
            "Each method (blue, the rival orange) against the live curve (grey): medians over the "
            "seeds. A curve far above the live one leaves its panel.",
        ),
        "weights": (
            weight_profiles,
            f"How much each moment of training counts in each average, seed {study.seeds[0]}.",
        ),
        "differences": (
            forest,
            f"Change of {judge} against the live weights of the same seed, to the right for the "
            "better. A triangle at the edge stands for what lies beyond it.",
        ),
    }
    if study.lengths is not None:
        found["lengths"] = (lengths_drawn, _lengths_say(study, study.lengths))
    if last != judge:
        found["metric"] = (last_curves, f"Validation {last} {says}.")
    return found


def _train_shown(study: Findings) -> tuple[list[float], str]:
    """The first seed's training loss where it fits beside its validation curve, and a remark."""
    run = _ordinary(study)[0]
    losses = run.train_loss[: run.stop]
    end = float(np.mean(losses[-(-len(losses) // 5) * -1 :]))
    held = run.curves[LIVE].validation[study.task.judge][: run.stop]
    level = float(np.median(held[len(held) // 2 :]))
    lower = study.task.metrics[study.task.judge].better == "lower"
    if lower and level > 0.0 and level / _FITS <= end <= level * _FITS:
        return losses, "; dashed, the training loss as trained (dropout included)"
    return [], f"; the training loss, {end:.2g} at the end, would lie far outside"


def _overtaken(study: Findings) -> str:
    epoch = study.outcome.rows[study.outcome.headline].overtakes[0]
    if epoch is None:
        return "the average does not overtake in this seed"
    return f"a dotted line where the average overtakes ({study.task.unit_name} {epoch})"


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
    count: int,
    *,
    columns: int,
    width: float,
    height: float,
    share: Literal["both", "y"] = "both",
) -> tuple[Figure, list[Axes]]:
    """A grid of `count` panels; one scale, labelled at the edges."""
    rows = -(-count // columns)
    figure = Figure(figsize=(width, height * rows), dpi=_DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share == "both", sharey=True)
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


def _scale(
    axis: Axes,
    curves: Sequence[NDArray[np.float64]],
    *,
    inside: Sequence[NDArray[np.float64]] = (),
) -> None:
    """Limits that show where the curves end; logarithmic where that spans more than four times.

    Args:
        axis: what is scaled.
        curves: these decide the upper limit, and the lower one together with
        inside: curves of which nothing lower may be cut off.
    """
    low, high = _range(curves)
    lows = [float(np.nanmin(curve)) for curve in inside if np.isfinite(curve).any()]
    low = min([low, *(value - 0.08 * (high - low) for value in lows)])
    finite = [curve[np.isfinite(curve)] for curve in (*curves, *inside)]
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
    figure, axes = _panels(2 if len(runs) > 1 else 1, columns=2, width=9.6, height=4.0, share="y")
    spec = study.task.metrics[metric]
    factor = spec.scale if spec.compare == "absolute" else 1.0
    everything: list[NDArray[np.float64]] = []
    for method, colour in shown:
        epochs, values = _epochs(runs[0], method, metric)
        everything.append(factor * values)
        axes[0].plot(epochs, factor * values, color=colour, linewidth=1.6, label=method)
        best = study.outcome.rows[method].best[0]
        if study.task.patience is not None and best is not None and best <= runs[0].stop:
            place = best - runs[0].curves[method].first
            axes[0].plot([best], [factor * values[place]], "o", color=colour, markersize=6)
        for axis in axes[1:]:
            everything += _band(axis, runs, method, metric, colour=colour, factor=factor)
    if metric == study.task.judge:
        everything += _train_and_overtaking(axes[0], study, theme)
    for axis in axes:
        axis.grid(axis="y")
    axes[0].set_xlabel(study.task.unit)
    axes[0].set_title(f"Seed {runs[0].seed}")
    for axis in axes[1:]:
        axis.set_title(f"{len(runs)} seeds: median and range")
        axis.set_xlabel(_time_label(study, runs))
    unit = f", {spec.unit}" if factor != 1.0 and spec.unit else ""
    axes[0].set_ylabel(f"validation {metric}{unit}")
    if spec.better == "lower":
        _scale(axes[0], everything)
    else:
        axes[0].set_ylim(*_range(everything))
    _key(axes[0])
    return figure


def _band(
    axis: Axes, runs: Sequence[Run], name: str, metric: str, *, colour: str, factor: float
) -> list[NDArray[np.float64]]:
    """Draw median and range over the seeds; return the edges of the range."""
    times, seeds = _over_seeds(runs, name, metric)
    low, high = factor * np.nanmin(seeds, axis=0), factor * np.nanmax(seeds, axis=0)
    axis.fill_between(times, low, high, color=colour, alpha=0.3, linewidth=0)
    axis.plot(times, factor * np.nanmedian(seeds, axis=0), color=colour, linewidth=1.6)
    return [low, high]


def _train_and_overtaking(axis: Axes, study: Findings, theme: Theme) -> list[NDArray[np.float64]]:
    """Mark where the average overtakes, and draw the training loss where it fits."""
    epoch = study.outcome.rows[study.outcome.headline].overtakes[0]
    if epoch is not None:
        axis.axvline(epoch, color=theme.average, linewidth=1.0, linestyle=":", zorder=1)
    losses, _ = _train_shown(study)
    if not losses:
        return []
    values = np.asarray(losses, dtype=np.float64)
    epochs = np.arange(1, len(values) + 1)
    axis.plot(epochs, values, color=theme.ink, linewidth=0.9, linestyle=(0, (4, 2)), label="train")
    return [values]


def _key(axis: Axes) -> None:
    """Names in the colour of their lines, above the panel, where no curve runs."""
    axis.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 0.99),
        ncols=3,
        columnspacing=1.2,
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
    panels = [(name, runs, name) for name in study.outcome.rows if name in runs[0].curves]
    panels = [panel for panel in panels if panel[0] != LIVE]
    panels += [(DECAYED, rivals, LIVE)] if rivals else []
    figure, axes = _panels(len(panels), columns=3, width=9.6, height=2.0)
    live_times, live = _over_seeds(runs, LIVE, judge)
    middle = np.nanmedian(live, axis=0)
    medians = []
    for axis, (title, chosen, name) in zip(axes, panels, strict=True):
        times, seeds = _over_seeds(chosen, name, judge)
        medians.append(np.nanmedian(seeds, axis=0))
        colour = theme.rival if title == DECAYED else theme.average
        axis.plot(live_times, middle, color=theme.live, linewidth=0.9)
        axis.plot(times, medians[-1], color=colour, linewidth=1.6)
        axis.set_title(title)
        axis.grid(axis="y")
    _scale(axes[0], [middle], inside=medians)
    figure.supxlabel(_time_label(study, runs), fontsize=_SIZE)
    figure.supylabel(f"validation {judge}, median of seeds; live in grey", fontsize=_SIZE)
    return figure


def _time_label(study: Findings, runs: Sequence[Run]) -> str:
    stops = [run.stop for run in runs]
    if min(stops) == max(stops):
        return study.task.unit
    return f"share of the run (stopped at {study.task.unit_name} {min(stops)} to {max(stops)}), %"


def _over_seeds(
    runs: Sequence[Run], name: str, metric: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Times up to the stop, and the values there: [seeds, times], NaN where a seed has none.

    Epochs where all runs are equally long; else shares of each run in %, between which values are
    interpolated: at one epoch a short run would be at its end and a long one half-way.
    """
    pairs = [_epochs(run, name, metric) for run in runs]
    stops = [run.stop for run in runs]
    if min(stops) == max(stops):
        times = np.arange(1, stops[0] + 1, dtype=np.float64)
        places = [times] * len(runs)
    else:
        times = np.linspace(100.0 / _SHARES, 100.0, _SHARES)
        places = [times / 100.0 * stop for stop in stops]
    table = np.full((len(runs), len(times)), np.nan)
    for row, (epochs, values), place in zip(table, pairs, places, strict=True):
        inside = place >= epochs[0] if len(epochs) else np.zeros(len(place), dtype=bool)
        if inside.any():
            row[inside] = np.interp(place[inside], epochs, values)
    # Where only some seeds have a value the median would jump as others join.
    full = np.isfinite(table).all(axis=0)
    some = full if full.any() else np.isfinite(table).any(axis=0)
    return times[some], table[:, some]


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
            # One bar a capture, as wide as the time to the one before.
            ends = memory.epochs
            widths = np.diff(ends, prepend=2.0 * ends[0] - ends[1]) if len(ends) > 1 else [1.0]
            axis.bar(ends, heights, -np.asarray(widths), align="edge", color=theme.average)
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
    height = 1.1 + 0.32 * len(names)
    figure, axes = _panels(2, columns=2, width=9.6, height=height, share="y")
    titles = {"stop": "All at the stop of the run" if task.patience else "All at the end"}
    titles["best"] = "Each at its own best epoch"
    factor = 1.0 if metric.compare == "relative" else metric.scale
    for axis, rule in zip(axes, RULES, strict=True):
        gains = [outcome.rows[name].gains[rule][task.judge] for name in reversed(names)]
        limits = _forest_limits(gains, factor)
        for place, (name, gain) in enumerate(zip(reversed(names), gains, strict=True)):
            colour = _colour(name, outcome, theme)
            _whisker(axis, gain, place, factor, limits, colour=colour, theme=theme)
        axis.axvline(0, color=theme.ink, linewidth=0.8, zorder=1)
        axis.grid(axis="x")
        axis.set_title(titles[rule])
        if metric.compare == "relative":
            _share_ticks(axis, metric, limits)
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.set_xlim(*limits)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        _sides(axis, len(names) - 0.15, limits, theme)
    axes[0].set_yticks(range(len(names)), list(reversed(names)))
    axes[0].set_ylim(-0.6, len(names) + 0.1)
    figure.supxlabel(_forest_label(study, metric), fontsize=_SIZE)
    return figure


def _sides(axis: Axes, height: float, limits: tuple[float, float], theme: Theme) -> None:
    """Which side of 0 is the better one, where there is room to say so."""
    width = limits[1] - limits[0]
    style: dict[str, Any] = {"va": "center", "fontsize": _SIZE - 1.5, "color": theme.ink}
    if -limits[0] > 0.2 * width:
        axis.text(-0.01 * width, height, "worse \N{LEFTWARDS ARROW} ", ha="right", **style)
    if limits[1] > 0.2 * width:
        axis.text(0.01 * width, height, " \N{RIGHTWARDS ARROW} better", ha="left", **style)


def _share_ticks(axis: Axes, metric: Metric, limits: tuple[float, float]) -> None:
    """Ticks at round ratios on an axis of logarithms: twice as good mirrors twice as bad."""
    ratios = (1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
    gap = (limits[1] - limits[0]) / 6.5
    ticks, last = [0.0], 0.0
    for ratio in ratios:
        if math.log(ratio) - last >= gap:
            last = math.log(ratio)
            ticks += [-last, last]
    inside = [tick for tick in ticks if limits[0] <= tick <= limits[1]]
    sign = -1.0 if metric.better == "lower" else 1.0
    axis.set_xticks(inside, [_ratio_text(sign * tick) for tick in inside])


def _ratio_text(log: float) -> str:
    value = math.exp(log)
    return f"{value:.2f}".rstrip("0").rstrip(".") if 0.1 < value < 10.0 else f"{value:.2g}"


def _forest_label(study: Findings, metric: Metric) -> str:
    judged = f"{study.outcome.part} {study.task.judge}"
    unit = f", {metric.unit}" if metric.unit else ""
    if metric.compare == "absolute":
        what = f"gain in {judged} over the live weights{unit}"
    else:
        what = f"{judged} as a multiple of that of the live weights (logarithmic)"
    mean = "geometric mean" if metric.compare == "relative" else "mean"
    return f"{what}\ndiamond and bar: {mean} over seeds and its 95 % interval; dot: a seed"


def _colour(name: str, outcome: Outcome, theme: Theme) -> str:
    if name.startswith(DECAYED):
        return theme.rival
    return theme.average if name == outcome.headline else theme.ink


def _whisker(
    axis: Axes,
    gain: Paired,
    place: int,
    factor: float,
    limits: tuple[float, float],
    *,
    colour: str,
    theme: Theme,
) -> None:
    """One row: dots, interval and mean, and a triangle at each edge that something lies beyond."""
    seeds = np.asarray(gain.differences) * factor
    below = np.full(len(seeds), place - 0.26)
    axis.scatter(seeds, below, s=11, color=theme.live, linewidth=0, zorder=2)
    if math.isfinite(gain.low):
        ends = [gain.low * factor, gain.high * factor]
        axis.plot(ends, [place, place], color=colour, linewidth=2.0, zorder=3)
        _edges(axis, np.asarray(ends), float(place), limits, colour)
    if math.isfinite(gain.mean):
        axis.scatter([gain.mean * factor], [place], s=34, color=colour, marker="D", zorder=4)
    _edges(axis, seeds, place - 0.26, limits, theme.live)


def _edges(
    axis: Axes,
    values: NDArray[np.float64],
    height: float,
    limits: tuple[float, float],
    colour: str,
) -> None:
    for edge, beyond, marker in (
        (limits[0], values < limits[0], "<"),
        (limits[1], values > limits[1], ">"),
    ):
        if beyond.any():
            axis.scatter(
                [edge], [height], s=22, color=colour, marker=marker, clip_on=False, zorder=5
            )


def _forest_limits(gains: Sequence[Paired], factor: float) -> tuple[float, float]:
    """0 and all seeds inside, but for a method or an interval that would squeeze all others."""
    seeds = np.asarray([value for gain in gains for value in gain.differences] or [0.0]) * factor
    usual = _FAR * max(float(np.quantile(np.abs(seeds), 0.75)), 1e-12)
    ends = [end * factor for gain in gains for end in (gain.low, gain.high) if math.isfinite(end)]
    low = max(min([0.0, *seeds, *ends]), -usual)
    high = min(max([0.0, *seeds, *ends]), usual)
    pad = 0.05 * max(high - low, 1e-12)
    return low - pad, high + pad


def _lengths_say(study: Findings, lengths: LengthFindings) -> str:
    where = f"{study.outcome.part} {study.task.judge} {when(study.task, 'stop')}"
    said = (
        f"{where[0].upper()}{where[1:]} of power functions of many lengths, each seed's rebuilt "
        "from the snapshots of its one run. Shaded: lengths that validation finds nearly as good "
        "as the best, the diamond."
    )
    if len(study.seeds) < 2:
        return said
    return (
        f"{said} Means over seeds; band: 95 % interval of the paired difference to "
        f"{lengths.rival}, the dashed line: where the line lies in the band, the two differ within "
        "noise. Right: each seed's difference, above 0 for the better."
    )


def lengths_drawn(study: Findings, theme: Theme) -> Figure:
    """Left: metric against length over all seeds. Right: each seed against the best EMA."""
    lengths = study.lengths
    assert lengths is not None
    several = len(lengths.level) > 1
    figure = Figure(figsize=(9.6, 4.6), dpi=_DPI, layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, 2 if several else 1, squeeze=False).flat)
    _against_length(axes[0], study, lengths, theme)
    axes[0].set_title(f"{len(lengths.level)} seeds, one run each" if several else "one run")
    for axis in axes[1:]:
        _seeds_against(axis, study, lengths, theme)
    figure.supxlabel(_AGE, fontsize=_SIZE)
    _legend_above(figure, axes[0])
    return figure


def lengths_alone(study: Findings, theme: Theme) -> Figure:
    """Metric against length over all seeds, as a picture of its own."""
    lengths = study.lengths
    assert lengths is not None
    figure = Figure(figsize=(8.0, 4.4), dpi=_DPI, layout="constrained")
    axis: Axes = figure.subplots()
    _against_length(axis, study, lengths, theme)
    runs = len(lengths.level)
    axis.set_title(
        f"{study.task.name}: every length from one run"
        + (f" a seed; mean of {runs} seeds, 95 % paired interval" if runs > 1 else "")
    )
    axis.set_xlabel(_AGE)
    _legend_above(figure, axis)
    return figure


def _legend_above(figure: Figure, axis: Axes) -> None:
    """What the marks of a panel mean, where no mark can be."""
    marks, names = axis.get_legend_handles_labels()
    figure.legend(
        marks, names, loc="outside upper center", ncols=3, frameon=False, fontsize=_SIZE - 1
    )


def _against_length(axis: Axes, study: Findings, lengths: LengthFindings, theme: Theme) -> None:
    """The curve with its band, what was tracked online as dots, the best EMA as a line."""
    metric = study.task.metrics[study.task.judge]
    shares = [point.share for point in lengths.sweep.points]
    level = _centre(lengths.level, metric)
    middle = [_centre(values, metric) for values in lengths.values]
    first, last = lengths.plateau
    axis.axvspan(
        first.share,
        last.share,
        color=theme.faint,
        alpha=0.55,
        linewidth=0,
        zorder=0,
        label="nearly as good on validation",
    )
    axis.axhline(
        level,
        color=theme.rival,
        linewidth=1.0,
        linestyle=(0, (5, 3)),
        zorder=2,
        label=f"{lengths.rival}, picked on validation",
    )
    if len(lengths.level) > 1:
        ends = [[_moved(level, end, metric) for end in (g.low, g.high)] for g in lengths.gains]
        low, high = np.sort(np.asarray(ends), axis=1).T
        axis.fill_between(shares, low, high, color=theme.average, alpha=0.28, linewidth=0, zorder=1)
    axis.plot(
        shares,
        middle,
        "-",
        color=theme.average,
        linewidth=1.8,
        zorder=3,
        label="rebuilt afterwards",
    )
    best = lengths.names.index(lengths.best)
    axis.plot(
        [shares[best]],
        [middle[best]],
        "D",
        color=theme.average,
        markersize=7,
        zorder=5,
        label=f"{lengths.best}, picked on validation",
    )
    for is_power, colour in ((False, theme.rival), (True, theme.average)):
        dots = [each for each in lengths.tracked if each.name.startswith("power") == is_power]
        axis.plot(
            [each.share for each in dots],
            [_centre(each.online, metric) for each in dots],
            "o",
            color=theme.paper if is_power else colour,
            markeredgecolor=colour,
            markeredgewidth=1.4,
            markersize=7,
            zorder=4,
            label=f"{'power functions' if is_power else 'EMAs'} tracked online" if dots else None,
        )
    _shares_along(axis, [*shares, *(each.share for each in lengths.tracked)])
    axis.grid(axis="y")
    if metric.compare == "absolute" and metric.scale != 1.0:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y * metric.scale:g}"))
    unit = f", {metric.unit}" if metric.unit else ""
    axis.set_ylabel(f"{study.outcome.part} {study.task.judge}{unit} ({metric.better} is better)")


def _seeds_against(axis: Axes, study: Findings, lengths: LengthFindings, theme: Theme) -> None:
    """One thin line a seed: its difference to the best EMA, above 0 where it is better."""
    metric = study.task.metrics[study.task.judge]
    relative = metric.compare == "relative"
    shares = [point.share for point in lengths.sweep.points]
    table = np.asarray(
        [
            gains(lengths.level, values, better=metric.better, compare=metric.compare)
            for values in lengths.values
        ]
    )
    axis.axhline(0.0, color=theme.rival, linewidth=1.0, linestyle=(0, (5, 3)), zorder=2)
    table = 100.0 * np.vectorize(metric.shown)(table) if relative else metric.scale * table
    axis.plot(shares, table, color=theme.average, linewidth=0.9, alpha=0.8, zorder=3)
    _shares_along(axis, shares)
    axis.grid(axis="y")
    unit = "%" if relative else metric.unit
    axis.set_ylabel(f"gain over {lengths.rival}" + (f", {unit}" if unit else ""))
    axis.set_title("each seed by itself")


def _shares_along(axis: Axes, shares: Sequence[float]) -> None:
    axis.set_xscale("log")
    axis.set_xlim(min(shares) / 1.15, max(shares) * 1.15)
    inside = [tick for tick in _TICKS if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]]
    axis.set_xticks(inside, [f"{100 * tick:g} %" for tick in inside])
    axis.xaxis.set_minor_locator(NullLocator())


def _centre(values: Sequence[float], metric: Metric) -> float:
    """Mean over seeds as differences are taken: the geometric one where they are ratios."""
    found = np.asarray(values, dtype=np.float64)
    if metric.compare == "relative" and (found > 0.0).all():
        return float(np.exp(np.log(found).mean()))
    return float(found.mean())


def _moved(level: float, gain: float, metric: Metric) -> float:
    """The value that is better than `level` by `gain`."""
    sign = -1.0 if metric.better == "lower" else 1.0
    return level * math.exp(sign * gain) if metric.compare == "relative" else level + sign * gain
