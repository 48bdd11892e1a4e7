"""Which length is best? One score for each, from one run."""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias, final, get_args

import numpy as np
import torch
from torch import nn

from ._engine import check_memory_not_lent
from ._errors import ArgumentError, show_time
from ._files import written_whole
from ._fit import MAX_ERROR, Tail, Target
from ._folder import Opaque
from ._identities import schedule_from_state, schedule_state
from ._kernels import write_
from ._picture import BAND, LINE, MARK, picture, shares_along_x
from ._posthoc import Reconstruction, Run, open_run
from ._roles import take_inventory
from ._schedules import Power
from ._serving import served
from ._weights import load_into

# Of the full set of weights, the model with them in it, or the path of a file: see `score_of`.
Score: TypeAlias = Callable[[Any], float]
ScoreOf: TypeAlias = Literal["weights", "file"]
Told: TypeAlias = Callable[[int, int], None]

_POINTS = 12


@final
@dataclass(frozen=True)
class Point:
    """One length and its score.

    Attributes:
        target: the average.
        mean_age: how old what it averages is in the mean, in units of time.
        share: the same as a share of the run up to the moment it ends.
        error: relative squared profile error of the reconstruction.
        score: what the score function said.
    """

    target: Target
    mean_age: float
    share: float
    error: float
    score: float


@final
@dataclass(frozen=True)
class Sweep:
    """Scores of averages of many lengths; `print` it, or `plot` it.

    Attributes:
        points: from short to long.
        at: the moment at which all of them end.
        higher_is_better: which way the scores go.
        tolerance: see `plateau`.
    """

    points: tuple[Point, ...]
    at: float
    higher_is_better: bool
    tolerance: float = field(default=0.05, repr=False)

    @property
    def best(self) -> Point:
        """The point with the best score; the shorter one of equals."""
        return max(self.points, key=self._merit)

    @property
    def plateau(self) -> tuple[Point, Point]:
        """The shortest and the longest average around the best that are nearly as good.

        Nearly: within `tolerance` of the distance from the best score to the median, which one
        absurd length does not move. A length from the middle of the plateau is safer than the best
        of a dozen scores that are noisy.
        """
        merits = [self._merit(point) for point in self.points]
        top = max(range(len(merits)), key=merits.__getitem__)
        lowest = max(merits) - self.tolerance * (max(merits) - float(np.median(merits)))
        first = last = top
        while first > 0 and merits[first - 1] >= lowest:
            first -= 1
        while last + 1 < len(merits) and merits[last + 1] >= lowest:
            last += 1
        return self.points[first], self.points[last]

    def nearly_as_good(self) -> str:
        """The plateau in words."""
        first, last = self.plateau
        if first is last:
            return "no other is nearly as good"
        return f"nearly as good from {first.share:.2%} to {last.share:.2%} of the run"

    def _merit(self, point: Point) -> float:
        return point.score if self.higher_is_better else -point.score

    def __str__(self) -> str:
        """A table, the best marked with * and the plateau with -."""
        first, last = self.plateau
        inside = self.points[self.points.index(first) : self.points.index(last) + 1]
        lines = [
            f"{'':2}{'mean age':>10}  {'of the run':>10}  {'score':>12}  {'error':>8}  average"
        ]
        for point in self.points:
            mark = "*" if point == self.best else "-" if point in inside else " "
            lines.append(
                f"{mark:2}{point.mean_age:>10.4g}  {point.share:>10.2%}  {point.score:>12.6g}  "
                f"{point.error:>8.1e}  {point.target!r}"
            )
        return "\n".join(lines)

    def to_json(self) -> str:
        """All of it as JSON, for `Sweep.from_json`."""
        points = [{**vars(point), "target": target_state(point.target)} for point in self.points]
        return json.dumps({**vars(self), "points": points}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Sweep":
        """The sweep that `to_json` wrote.

        Raises:
            ArgumentError: text that it did not write.
        """
        try:
            saved = json.loads(text)
            points = [
                Point(**{**point, "target": target_from_state(point["target"])})
                for point in saved["points"]
            ]
            if not points:
                raise ValueError("no points")
            return cls(**{**saved, "points": tuple(points)})
        except (ValueError, TypeError, KeyError) as error:
            raise ArgumentError(f"the sweep must be as to_json wrote it, got {error}.") from error

    def plot(self, path: str | PathLike[str], *, name: str = "score") -> None:
        """Draw score against length, the best and the plateau marked, into a picture file.

        Args:
            path: ends in .png, .svg or .pdf.
            name: what the score is called.

        Raises:
            ImportError: matplotlib is missing; it comes with `pip install "polyak[study]"`.
        """
        first, last = self.plateau
        shares, scores = [p.share for p in self.points], [p.score for p in self.points]
        with picture(path) as axes:
            axes.axvspan(first.share, last.share, color=BAND, lw=0)
            axes.plot(shares, scores, "o-", color=LINE, ms=4, lw=1.4)
            axes.plot([self.best.share], [self.best.score], "o", color=MARK, ms=9, zorder=3)
            shares_along_x(axes)
            axes.set_xlabel(
                f"mean age of the average, as a share of the run up to {show_time(self.at)}"
            )
            axes.set_ylabel(f"{name} ({'higher' if self.higher_is_better else 'lower'} is better)")
            axes.set_title(
                f"best {self.best.score:.5g} at {self.best.share:.2%}; {self.nearly_as_good()}",
                fontsize=10,
            )


def sweep(
    directory: str | PathLike[str],
    score: Score,
    *,
    higher_is_better: bool = True,
    score_of: ScoreOf = "weights",
    model: nn.Module | None = None,
    lengths: Sequence[Target] | None = None,
    at: float | None = None,
    max_error: float = MAX_ERROR,
    cache: str | PathLike[str] | None = None,
    fresh: bool = False,
    opaque: Opaque | None = None,
    progress: Told | None = None,
) -> Sweep:
    """Score averages of many lengths from the snapshots of one run, and return the curve.

    One evaluation a length, no training. Scores are noisy: choose on data that you do not report,
    and prefer the middle of the plateau to the best of a dozen points.

    Args:
        directory: a folder that `Snapshots` wrote.
        score: given the weights, by name and ready for `load_state_dict`, returns a number; given
            `model` with the weights in it, when there is one.
        higher_is_better: False for a loss.
        score_of: what `score` is given: "weights", or the path of a "file" with them.
        model: put to evaluation mode and given each set of weights; its own weights and modes are
            back afterwards, also on an error.
        lengths: the averages to try. By default a dozen power functions, from the shortest that
            the snapshots resolve to one a quarter of the run wide.
        at: the moment at which all of them end, that of a snapshot; the newest unless given.
        max_error: as for `reconstruct`.
        cache: a file in which scores are kept as they come, so that a sweep that was stopped goes
            on. It belongs to one score function: take another file when that changes, or `fresh`.
        fresh: score anew what the cache holds; it is replaced when the first score is there.
        opaque: as for `reconstruct`.
        progress: called with lengths done and in all.

    Raises:
        ArgumentError: as for `reconstruct`; a score that is no finite number.
    """
    if score_of not in get_args(ScoreOf) or (score_of == "file" and model is not None):
        raise ArgumentError(
            f"score_of must be 'weights', or 'file' without a model, got {score_of!r}."
        )
    run = open_run(directory, opaque=opaque)
    targets = servable(run, at=at, max_error=max_error) if lengths is None else list(lengths)
    if not targets:
        raise ArgumentError("lengths must be at least one schedule, got none.")
    found = [run.reconstruct(target, at=at, max_error=max_error) for target in targets]
    scores = _Cache(None if cache is None else Path(cache), run, fresh=fresh)
    points = []
    for done, one in enumerate(found):
        if progress is not None:
            progress(done, len(found))
        value = scores.get(one)
        if value is None:
            value = scores.put(one, _checked(_scored(score, score_of, one, model), one))
        age = one.profile.mean_age
        points.append(
            Point(one.fit.target, age, age / (one.fit.at - run.start), one.fit.error, value)
        )
    if progress is not None:
        progress(len(found), len(found))
    points.sort(key=lambda point: point.mean_age)
    return Sweep(tuple(points), found[0].fit.at, higher_is_better)


def target_state(target: Target) -> dict[str, Any]:
    """A target as plain values."""
    if isinstance(target, Tail):
        return {"name": "Tail", "length": target.length, "curve": target.curve}
    return schedule_state(target)


def target_from_state(state: Mapping[str, Any]) -> Target:
    """The target that `target_state` described."""
    if state.get("name") == "Tail":
        return Tail(state["length"], curve=state["curve"])
    return schedule_from_state(state)


def servable(
    run: Run, *, at: float | None = None, max_error: float = MAX_ERROR, points: int = _POINTS
) -> list[Target]:
    """Power functions evenly spaced in log width, from the shortest that is served on.

    Raises:
        ArgumentError: when none is.
    """
    ends = served(run.overlaps, at=at, max_error=max_error)
    if ends is None:
        raise ArgumentError(
            f"directory must hold snapshots that serve some length, got {len(run.moments)} moments "
            f"of {list(run.averages)}, which serve none. Take more of them, or of two averages."
        )
    return [Power(sigma_rel=float(f"{s:.3g}")) for s in np.geomspace(*ends, points)]


def _scored(score: Score, score_of: ScoreOf, one: Reconstruction, model: nn.Module | None) -> float:
    if score_of == "file":
        with tempfile.TemporaryDirectory(prefix="polyak-") as folder:
            path = f"{folder}/average.safetensors"
            one._write(Path(path))  # by this rank, which scores it, whatever the others do
            return score(path)
    weights = one.weights()
    if model is None:
        return score(weights)
    live = [entry.live() for entry in take_inventory(model).entries]
    check_memory_not_lent(live, "sweep with this model")
    kept = [tensor.detach().clone() for tensor in live]
    modes = [(part, part.training) for part in model.modules()]
    try:
        load_into(model, weights, "the reconstruction", may_lack=one.frozen)
        model.eval()
        return score(model)
    finally:
        with torch.no_grad():
            for tensor, value in zip(live, kept, strict=True):
                write_(tensor, value)
        for part, mode in modes:
            part.training = mode


def _checked(value: object, one: Reconstruction) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]  # that is the question
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ArgumentError(
            f"score must return a finite number, got {value!r} for {one.fit.target!r}."
        )
    return number


class _Cache:
    """Scores by what was scored, in a file that is written whole after each of them."""

    def __init__(self, path: Path | None, run: Run, *, fresh: bool) -> None:
        self._path = path
        self._stamp = _stamp(run)
        self._scores: dict[str, float] = {}
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ArgumentError(f"cache must be a file in a folder that exists, got {str(path)!r}.")
        if path is not None and path.exists():
            try:
                self._scores = {str(k): float(v) for k, v in json.loads(path.read_text()).items()}
                if not all(map(math.isfinite, self._scores.values())):
                    raise ValueError("a score that is not finite")
            except (ValueError, AttributeError, TypeError) as error:
                raise ArgumentError(
                    f"cache must be a file that sweep wrote, got {str(path)!r} ({error}). "
                    "Remove it, or name another."
                ) from error
        if fresh:
            self._scores = {}

    def get(self, one: Reconstruction) -> float | None:
        return self._scores.get(self._key(one))

    def put(self, one: Reconstruction, value: float) -> float:
        self._scores[self._key(one)] = value
        if self._path is not None:
            with written_whole(self._path) as temporary:
                temporary.write_text(json.dumps(self._scores, indent=1, sort_keys=True))
        return value

    def _key(self, one: Reconstruction) -> str:
        """What was scored, for people to read, and a digest of what it was made of."""
        sums = hashlib.sha256(one.fit.coefficients.tobytes()).hexdigest()[:12]
        return f"{one.fit.target!r} ({sums}) at {show_time(one.fit.at)} of {self._stamp}"


def _stamp(run: Run) -> str:
    parts: list[Mapping[str, Any] | list[Any]] = []
    for path in run.files:
        stat = path.stat()
        parts.append([path.name, stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
