"""Which checkpoints should be averaged? Those that a score on held-out data says."""

import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ._combine import Combination, NonFinite
from ._errors import ArgumentError, AveragingWarning, frames_to_the_user
from ._files import folder_for_a_while
from ._inputs import Inputs, Named, PathLikes, known_steps, open_inputs
from ._merge import Counted, Merge, check_target, prepare, write

# A function of the weights by name, or of the path of a file that holds them: see `score_of`.
Score: TypeAlias = Callable[[Any], float]
ScoreOf: TypeAlias = Literal["weights", "file"]
Method: TypeAlias = Literal["greedy", "uniform"]

_APART = (
    "They were not trained from one start, or went too far apart: their average is worth little."
)


@dataclass(frozen=True)
class Tried:
    """One call of the score.

    Args:
        labels: the checkpoints whose mean was scored.
        score: what it got.
        kept: whether the soup became this mean; False for a checkpoint alone.
    """

    labels: tuple[str, ...]
    score: float
    kept: bool


@dataclass(frozen=True)
class Soup:
    """What went into a soup, and what everything scored.

    Args:
        score: of the result.
        best: of the best single checkpoint.
        kept: the checkpoints whose mean the result is.
        tried: every call of the score, in order: first each checkpoint alone.
        notes: what one should know, in sentences.
        merge: the result as a merge.
    """

    score: float
    best: float
    kept: tuple[str, ...]
    tried: tuple[Tried, ...]
    notes: tuple[str, ...]
    merge: Merge


@dataclass(frozen=True)
class Line:
    """Scores on the straight line between two checkpoints.

    Args:
        shares: of the second checkpoint, from 0 to 1.
        scores: at these shares.
        barrier: how much worse than the straight line between the scores of the ends the worst
            point is, in units of the score; 0 when none is worse.
        connected: whether no point is worse than the worse end, by more than the tolerance.
        verdict: the same in a sentence.
    """

    shares: tuple[float, ...]
    scores: tuple[float, ...]
    barrier: float
    connected: bool
    verdict: str


def soup(
    checkpoints: PathLikes,
    score: Score,
    *,
    out: str | PathLike[str],
    method: Method = "greedy",
    higher_is_better: bool = True,
    budget: int | None = None,
    score_of: ScoreOf = "weights",
    tolerance: float = 0.01,
    dtype: torch.dtype | None = None,
    key: str | None = None,
    integers: Named | None = None,
    nonfinite: NonFinite = "raise",
    max_shard_size: int | None = None,
    force: bool = False,
    tell: Callable[[Tried], None] | None = None,
) -> Soup:
    """Average those of several fine-tuned checkpoints that do better together than alone.

    Greedy: sorted by their own scores, each is kept if the mean with it scores no worse than
    without; so the result scores at least as well as the best of them, on the data of the score.
    Uniform: the mean of all.        Wortsman et al. 2022, https://arxiv.org/abs/2203.05482

    The checkpoints must come from one start: fine-tunes of one model, or one run. A mean that
    scores worse than each of its parts says that they do not; the result reports it. The score
    should be on data that neither trained the models nor judges the result. An ensemble's
    calibration is not inherited; where the model has BatchNorm, refresh its statistics in the
    score and after (`refresh_norms`).

    Cost: n calls of the score for the single checkpoints, then at most n - 1 (greedy) or 1. Every
    mean is computed anew from the files, n (n + 1) / 2 reads of a checkpoint at worst, so that what
    was scored is bit for bit what is written. In memory: one model (score_of="weights"), or on disk
    beside `out` ("file").

    Args:
        checkpoints: as for `merge`, at least two.
        score: of the weights by name, for `load_state_dict`; or of the path of a file.
        out: a `.safetensors` file, or a folder.
        method: "greedy" or "uniform".
        higher_is_better: False for a loss.
        budget: most calls of the score; the soup is what was found by then.
        score_of: what `score` is given: "weights", or the path of a "file" written like `out`.
        tolerance: how much worse than its parts, as a share of their score, a mean must be to be
            reported as one across a barrier.
        dtype: as for `merge`.
        key: as for `merge`.
        integers: as for `merge`.
        nonfinite: as for `merge`.
        max_shard_size: as for `merge`.
        force: as for `merge`.
        tell: called after every call of the score.

    Raises:
        ArgumentError: a value out of range, a score that is no number; and as for `merge`.
        MatchError: as for `merge`.

    Examples:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> folder = tempfile.mkdtemp()
        >>> for name, value in (("a", 1.0), ("b", -2.0), ("c", 9.0)):
        ...     save_file({"w": torch.tensor([value])}, f"{folder}/{name}.safetensors")
        >>> files = [f"{folder}/{name}.safetensors" for name in "abc"]
        >>> loss = lambda weights: weights["w"].item() ** 2
        >>> found = soup(files, loss, out=f"{folder}/soup.safetensors", higher_is_better=False)
        >>> found.kept, found.best, found.score
        (('a.safetensors', 'b.safetensors'), 1.0, 0.25)
    """
    target = Path(out)
    if method not in ("greedy", "uniform"):
        raise ArgumentError(f"method must be 'greedy' or 'uniform', got {method!r}.")
    _check_score(score_of, tolerance)
    with open_inputs(checkpoints, key=key, dtype=dtype) as inputs:
        check_target(inputs, target, force=force)
        count = len(inputs.labels)
        _check_budget(method, count, budget)
        cook = _Cook(
            inputs,
            score,
            score_of=score_of,
            sign=1.0 if higher_is_better else -1.0,
            exact=inputs.exact(integers),
            nonfinite=nonfinite,
            like=target,
            tell=tell,
        )
        find = _greedy if method == "greedy" else _all
        kept, reached = find(cook, budget=budget, tolerance=tolerance)
        plan, combination = cook.recipe(cook.mean(kept), f"{method} soup", target)
        merged = write(plan, inputs, combination, max_shard_size=max_shard_size, force=force)
    singles = [tried.score for tried in cook.tried[:count]]
    return Soup(
        score=reached,
        best=max(singles, key=cook.goodness),
        kept=tuple(inputs.labels[index] for index in kept),
        tried=tuple(cook.tried),
        notes=(*cook.notes, *merged.notes),
        merge=merged,
    )


def line(
    checkpoints: PathLikes,
    score: Score,
    *,
    points: int = 5,
    higher_is_better: bool = True,
    score_of: ScoreOf = "weights",
    tolerance: float = 0.01,
    dtype: torch.dtype | None = None,
    key: str | None = None,
    integers: Named | None = None,
    nonfinite: NonFinite = "raise",
) -> Line:
    """Score the straight line between two checkpoints: were they trained from one start?

    The score of (1 - a) first + a second, for a from 0 to 1. Models trained apart are separated by
    a barrier, on which the score is worse than at both ends; an average of them is worth nothing.
    Frankle et al. 2020, https://arxiv.org/abs/1912.05671

    Args:
        checkpoints: two, as for `merge`.
        score: as for `soup`.
        points: how many, the ends included.
        higher_is_better: False for a loss.
        score_of: as for `soup`; files are written where temporary files go.
        tolerance: how much worse than the worse end, as a share of its score, still is no barrier.
        dtype: as for `merge`.
        key: as for `merge`.
        integers: as for `merge`.
        nonfinite: as for `merge`.

    Examples:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> folder = tempfile.mkdtemp()
        >>> for name, value in (("a", 1.0), ("b", -1.0)):
        ...     save_file({"w": torch.tensor([value])}, f"{folder}/{name}.safetensors")
        >>> far_from_zero = lambda weights: abs(weights["w"].item())
        >>> found = line([f"{folder}/{name}.safetensors" for name in "ab"], far_from_zero)
        >>> found.scores, found.connected
        ((1.0, 0.5, 0.0, 0.5, 1.0), False)
    """
    if not (isinstance(points, int) and points >= 3):
        raise ArgumentError(f"points must be a whole number, at least 3, got {points!r}.")
    _check_score(score_of, tolerance)
    if len(checkpoints) != 2:
        raise ArgumentError(f"checkpoints must be two for a line, got {len(checkpoints)}.")
    with (
        open_inputs(checkpoints, key=key, dtype=dtype) as inputs,
        tempfile.TemporaryDirectory(prefix="polyak-") as folder,
    ):
        cook = _Cook(
            inputs,
            score,
            score_of=score_of,
            sign=1.0 if higher_is_better else -1.0,
            exact=inputs.exact(integers),
            nonfinite=nonfinite,
            like=Path(folder) / "mix.safetensors",
            tell=None,
        )
        shares = [point / (points - 1) for point in range(points)]
        scores = [cook.taste([1.0 - share, share]) for share in shares]
    return _judge(inputs.labels, shares, scores, cook, tolerance)


class _Cook:
    """Mixes checkpoints and asks the score, and writes down every answer."""

    def __init__(
        self,
        inputs: Inputs,
        score: Score,
        *,
        score_of: ScoreOf,
        sign: float,
        exact: int,
        nonfinite: NonFinite,
        like: Path,
        tell: Callable[[Tried], None] | None,
    ) -> None:
        self.inputs, self.score, self.score_of, self.sign = inputs, score, score_of, sign
        self.exact, self.nonfinite, self.like, self.tell = exact, nonfinite, like, tell
        self.steps = known_steps(inputs, None)
        self.tried: list[Tried] = []
        self.notes: list[str] = []

    def goodness(self, score: float) -> float:
        """The score as something to be high; a NaN is as bad as can be."""
        return -math.inf if math.isnan(score) else self.sign * score

    def mean(self, kept: Sequence[int]) -> list[float]:
        """The coefficients of the mean of some inputs."""
        return [1.0 / len(kept) if index in kept else 0.0 for index in range(len(self.steps))]

    def recipe(self, coefficients: list[float], how: str, out: Path) -> tuple[Merge, Combination]:
        """The plan and the work of a mix."""
        counted = Counted(how, coefficients, self.steps)
        return prepare(self.inputs, counted, out, exact=self.exact, nonfinite=self.nonfinite)

    def taste(self, coefficients: list[float]) -> float:
        """Mix, and ask the score."""
        if self.score_of == "file":
            found = self._score_file(coefficients)
        else:
            found = self.score(self._weights(coefficients))
        try:
            return float(found)
        except (TypeError, ValueError):
            raise ArgumentError(f"score must return a number, got {found!r}.") from None

    def try_alone(self, index: int) -> float:
        """Score one input."""
        score = self.taste(self.mean([index]))
        self._note(Tried((self.inputs.labels[index],), score, kept=False))
        return score

    def try_mean(self, kept: Sequence[int], *, least: float) -> Tried:
        """Score a mean, and keep it when its goodness is `least` or more."""
        score = self.taste(self.mean(kept))
        labels = tuple(self.inputs.labels[index] for index in kept)
        found = Tried(labels, score, kept=self.goodness(score) >= least)
        self._note(found)
        return found

    def _note(self, found: Tried) -> None:
        self.tried.append(found)
        if self.tell is not None:
            self.tell(found)

    def _weights(self, coefficients: list[float]) -> dict[str, Tensor]:
        """The mix in memory, tied tensors as one."""
        _, combination = self.recipe(coefficients, "", self.like)
        with torch.inference_mode(False):  # other threads could not write into inference tensors
            flat = {
                name: torch.empty(info.numel, dtype=info.dtype, device="cpu")
                for name, info in self.inputs.written.items()
            }

        def keep(name: str, start: int, values: Tensor) -> None:
            flat[name][start : start + len(values)] = values

        combination.compute(keep)
        shaped = {name: flat[name].view(info.shape) for name, info in self.inputs.written.items()}
        return {name: shaped[self.inputs.aliases.get(name, name)] for name in self.inputs.tensors}

    def _score_file(self, coefficients: list[float]) -> float:
        """The score of the mix on disk, gone afterwards."""
        with folder_for_a_while(self.like.absolute()) as folder:
            candidate = folder / self.like.name
            plan, combination = self.recipe(coefficients, "candidate of a soup", candidate)
            write(plan, self.inputs, combination)
            return self.score(str(candidate))


def _greedy(cook: _Cook, *, budget: int | None, tolerance: float) -> tuple[list[int], float]:
    """The inputs whose mean scored best, found one by one from the best on, and its score."""
    labels = cook.inputs.labels
    alone = [cook.try_alone(index) for index in range(len(labels))]
    order = sorted(range(len(labels)), key=lambda index: -cook.goodness(alone[index]))
    kept, best = [order[0]], alone[order[0]]
    if cook.goodness(best) == -math.inf:
        raise ArgumentError(f"score must be a number for some checkpoint, got {alone}.")
    for place, index in enumerate(order[1:], start=1):
        if budget is not None and len(cook.tried) >= budget:
            left = ", ".join(labels[other] for other in order[place:])
            cook.notes.append(f"the budget of {budget} scores was spent before {left}.")
            break
        # In the order of the inputs: the same mean has the same bits whatever was tried first.
        found = cook.try_mean(sorted([*kept, index]), least=cook.goodness(best))
        if _is_dip(cook, found.score, (best, alone[index]), tolerance):
            cook.notes.append(
                f"{labels[index]} is behind a barrier: with it the mean scores {found.score:.6g}, "
                f"worse than the soup ({best:.6g}) and than it alone ({alone[index]:.6g}). "
                f"{_APART}"
            )
        if found.kept:
            kept, best = sorted([*kept, index]), found.score
    return kept, best


def _all(cook: _Cook, *, budget: int | None, tolerance: float) -> tuple[list[int], float]:
    """All inputs and the score of their mean; warn where it is worse than each of them."""
    del budget  # it has been checked: the number of calls is fixed
    count = len(cook.inputs.labels)
    alone = [cook.try_alone(index) for index in range(count)]
    found = cook.try_mean(range(count), least=-math.inf)
    if _is_dip(cook, found.score, alone, tolerance):
        cook.notes.append(
            f"the mean scores {found.score:.6g}, worse than every checkpoint alone "
            f"(worst {min(alone, key=cook.goodness):.6g}). {_APART}"
        )
        warnings.warn(f"soup: {cook.notes[-1]}", AveragingWarning, stacklevel=frames_to_the_user())
    return list(range(count)), found.score


def _is_dip(cook: _Cook, score: float, parts: Sequence[float], tolerance: float) -> bool:
    """Whether a mean scores worse than the worst of its parts, by more than the tolerance."""
    worst = min(map(cook.goodness, parts))
    if worst == -math.inf:
        return False  # a part of which nothing is known
    return not cook.goodness(score) >= worst - tolerance * abs(worst)


def _judge(
    labels: Sequence[str],
    shares: Sequence[float],
    scores: Sequence[float],
    cook: _Cook,
    tolerance: float,
) -> Line:
    """What the scores along a line say."""
    goodness = [cook.goodness(score) for score in scores]
    straight = [(1.0 - a) * goodness[0] + a * goodness[-1] for a in shares]
    barrier = max(level - good for level, good in zip(straight, goodness, strict=True))
    worst = min(range(1, len(shares) - 1), key=goodness.__getitem__)
    connected = not _is_dip(cook, scores[worst], (scores[0], scores[-1]), tolerance)
    where = (
        f"at {shares[worst]:.0%} of {labels[1]} the score is {scores[worst]:.6g}, "
        f"at the ends {scores[0]:.6g} ({labels[0]}) and {scores[-1]:.6g} ({labels[1]})"
    )
    verdict = (
        f"No barrier: {where}. Their average makes sense."
        if connected
        else f"A barrier: {where}. {_APART}"
    )
    return Line(tuple(shares), tuple(scores), max(0.0, barrier), connected, verdict)


def _check_score(score_of: ScoreOf, tolerance: float) -> None:
    if score_of not in ("weights", "file"):
        raise ArgumentError(f"score_of must be 'weights' or 'file', got {score_of!r}.")
    if not 0.0 <= tolerance < math.inf:
        raise ArgumentError(f"tolerance must be a share of 0 or more, got {tolerance!r}.")


def _check_budget(method: Method, count: int, budget: int | None) -> None:
    least = count if method == "greedy" else count + 1
    if count < 2:
        raise ArgumentError(f"checkpoints must be at least two for a soup, got {count}.")
    if budget is not None and not budget >= least:
        raise ArgumentError(
            f"budget must be at least {least} calls of the score for {count} checkpoints, "
            f"got {budget}."
        )
