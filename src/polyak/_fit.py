"""Which sum of stored averages is closest to the average that nobody kept?

Every average is a profile, a weight for each moment of the run, and so is every sum of averages.
A stored average that was updated at the times t_s weighs w_s there, which is a density of w_s / e_s
over the interval e_s = t_s - t_(s-1) that the update speaks for. Two profiles overlap by

    <w, v> = sum over moments of w_s v_s / e_s                                         (float64)

the integral of the product of the densities, which does not depend on how often one looked. The
coefficients x of a target q, sum 1, are those with the smallest ||sum of x_i p_i - q||^2: the
squared distance of the two averages for a live trajectory that is white noise, whatever its size.
After Karras et al. 2024, section 3, https://arxiv.org/abs/2312.02696, which takes the ideal power
functions (t / T) ** gamma for p and q. Here they are those that really happened: any schedule, any
intervals, starts and changes. For power functions updated at regular times from 0 on, w_s / e_s is
the mean of the ideal density over the interval, so nothing is lost: no trajectory held still
between the updates can tell the two apart, and distances here are at most the ideal ones.

Averages of one run may differ in their updates. The moments are then those of all of them, and an
average that was updated less often weighs those of its interval evenly: an interval is a coarser
sampling of the same average, never a different average. A plain checkpoint is one moment.

The initial weights are one more moment, the first, and speak for an interval as long as the next
one. So weight left on them costs as much as weight on any one update.

No profile of a run is formed for each snapshot. Between two snapshots an average keeps the product
of its decays and adds new moments, so two profiles overlap by what they did at the earlier of the
two snapshots, times the decays since then of the later one:

    <p_k(i), p_l(j)> = <p_k(i), p_l(i)> d_l(i+1) ... d_l(j),  i <= j
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Literal, Self, TypeAlias, final

import numpy as np
import numpy.typing as npt

from ._errors import ArgumentError, show_time
from ._history import History
from ._profiles import Profile
from ._schedules import After, Exponential, HalfLifeRamp, Power, Schedule, Uniform
from ._steps import FloatArray

Indices: TypeAlias = npt.NDArray[np.intp]
Curve: TypeAlias = Literal["linear", "cosine", "1-sqrt"]
Storage: TypeAlias = Literal["float64", "float32", "float16", "bfloat16"]

MAX_ERROR = 1e-2
"""Largest relative squared profile error that `fit` accepts unless told otherwise.

What is rebuilt is the projection of the target on the stored profiles (up to the ridge and the sum
of 1): its own square is the target's times (1 - error). At 1e-2 the noise left in the rebuilt
average is within 1 % of that in the one asked for, and the two are apart by a tenth of it. Of the
pair 0.05 and 0.10, 16 exact snapshots serve sigma_rel 0.03 to 0.25 and 32 also 0.02; of 0.05 alone,
not even 64 serve either end.
"""

# Half of the distance between neighbours near 1: the largest relative error of one rounding.
_ROUNDOFF: dict[str, float] = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}

# Rounding x = m 2**k, 1 <= m < 2, is off by a uniform share of +-u 2**k: relative variance
# u^2 / (3 m^2). With log m uniform, as for numbers of many sizes, 1 / m^2 is 3 / (8 ln 2) in the
# mean: u^2 / (8 ln 2).
_ROUNDING = 1.0 / (8.0 * math.log(2.0))

# The ridge. Each snapshot is theta_i (1 + u_i r_i) with rounding r_i of variance _ROUNDING, so the
# sum is off by two independent parts. Storage: |theta|^2 _ROUNDING sum of x_i^2 u_i^2. Profile:
# S ||sum of x_i p_i - q||^2 for a trajectory with noise of power S in a unit of time. The sum of
# both is least with the ridge
#
#     R_i = _ROUNDING u_i^2 |theta|^2 / S
#
# S is not known before the files are read, but what it does is: it makes a stored average wobble
# by a share rho of its own size, rho^2 |theta|^2 = S ||p||^2, so R_i = _ROUNDING (u_i / rho)^2
# ||p||^2. Averages of a small classifier are apart by 0.6 % (sigma_rel 0.05 and 0.07) to 3 %
# (0.15). With rho = 2 % the ridge is 1.1e-4 ||p||^2 for float16 and 6.9e-3 for bfloat16. There,
# with 128 snapshots and sigma_rel 0.02, it brings the error of the weights from 4.0e-3 to 1.0e-3
# and from 3.1e-2 to 3.7e-3; the best of all ridges, known afterwards, gives 5.1e-4 and 3.7e-3.
_WOBBLE = 0.02

_SAME = 1e-12  # relative squared distance below which a target is a stored average
_SLACK = 1e-2  # share of the shortest interval within which two moments are the same one


# ── what was stored, and what is wanted ──────────────────────────────────────────────────────────


@final
@dataclass(frozen=True)
class Track:
    """One average as it really happened: when it was updated, and by which schedule.

    Args:
        history: its updates, counted from `start`.
        schedules: its schedules by the index that the history notes; one, unless it was changed.
        start: time on the run's clock at which it was a copy of the live weights. Its schedules
            count from there.
    """

    history: History
    schedules: Sequence[Schedule]
    start: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        if not math.isfinite(self.start):
            raise ArgumentError(f"start must be finite, got {self.start!r}.")
        used = 1 + max((index for _, _, index in self.history.runs), default=0)
        if len(self.schedules) < used:
            raise ArgumentError(
                f"schedules must be the {used} that the history notes, got {len(self.schedules)}."
            )

    def times(self) -> FloatArray:
        """Return the start and the time of every update, on the run's clock [1 + updates]."""
        return np.append(self.start, self.history.times(start=self.start))

    def decays(self) -> FloatArray:
        """Return 0 for the copy at the start, then the decay of every update [1 + updates]."""
        runs = self.history.runs
        now = self.history.times()
        elapsed = np.repeat([float(run[0]) for run in runs], [run[1] for run in runs])
        indices = self.history.schedule_indices()
        decays = np.zeros(1 + len(now))
        for index in np.unique(indices):
            ours = np.flatnonzero(indices == index)
            decays[1 + ours] = decays_at(
                self.schedules[index], now=now[ours], elapsed=elapsed[ours]
            )
        return decays


@final
@dataclass(frozen=True)
class Stored:
    """One file: an average, or the live weights themselves, as of one time.

    Args:
        time: time on the run's clock, that of an update.
        track: which of the tracks it is of; None for a plain checkpoint of the live weights, whose
            profile is that one moment.
        storage: dtype of the file, which decides how much of it is rounding.
    """

    time: float
    track: int | None = field(default=0, kw_only=True)
    storage: Storage = field(default="float16", kw_only=True)

    def __post_init__(self) -> None:
        if not math.isfinite(self.time):
            raise ArgumentError(f"time must be finite, got {self.time!r}.")
        if self.track is not None and not isinstance(self.track, int):
            raise ArgumentError(f"track must be None or an index, got {self.track!r}.")
        if self.storage not in _ROUNDOFF:
            raise ArgumentError(
                f"storage must be one of {', '.join(_ROUNDOFF)}, got {self.storage!r}."
            )


_CURVES: dict[str, Callable[[FloatArray], FloatArray]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 + 0.5 * np.cos(np.pi * x),
    "1-sqrt": lambda x: 1.0 - np.sqrt(x),
}


@final
@dataclass(frozen=True)
class Tail:
    """A target that is all in the last `length` of time: the plain mean, or a decayed rate.

    weight since the time t = curve((t - (at - length)) / length), 1 at its start and 0 at `at`

    The gradients of a run count in an average by the weight that comes after them, as if the
    learning rate had been multiplied by it: `curve` is that decay of the learning rate. "linear" is
    the plain mean of the window (LAWA, https://arxiv.org/abs/2209.14981); the others are the merges
    of WSM (https://arxiv.org/abs/2507.17634). Of plain checkpoints these are the coefficients.

    Args:
        length: length of the window, above 0, in the unit of the run's clock.
        curve: "linear" 1 - x, "cosine" (1 + cos(pi x)) / 2, or "1-sqrt" 1 - sqrt(x).

    Examples:
        >>> Tail(5_000)
        Tail(length=5000, curve='linear')
    """

    length: float
    curve: Curve = field(default="linear", kw_only=True)

    def __post_init__(self) -> None:
        if not 0.0 < self.length < math.inf:
            raise ArgumentError(f"length must be finite and above 0, got {self.length!r}.")
        if self.curve not in _CURVES:
            raise ArgumentError(f"curve must be one of {', '.join(_CURVES)}, got {self.curve!r}.")

    def weights(self, times: FloatArray) -> FloatArray:
        """Return the weight of each of `times`, the first being the start of the run."""
        span = float(times[-1] - times[0])
        if self.length > span * (1.0 + 1e-9):
            raise ArgumentError(
                f"length must be at most {show_time(span)} (the time since the start), got "
                f"{show_time(self.length)}."
            )
        since = (times - (times[-1] - self.length)) / self.length
        after = _CURVES[self.curve](np.clip(since, 0.0, 1.0))
        return -np.diff(after, prepend=1.0)


Target: TypeAlias = Schedule | Tail


@final
@dataclass(frozen=True, eq=False)
class Fit:
    """The sum of stored averages that is closest to a target, and how close that is.

    Args:
        target: the average that was asked for.
        at: time on the run's clock at which it ends.
        coefficients: factor of each snapshot, in the order in which they were given; they sum
            to 1. 0 for those that are not used, such as all after `at` [snapshots].
        error: relative squared profile error, ||sum of x_i p_i - q||^2 / ||q||^2. For a live
            trajectory that is white noise it is the squared distance to the true average as a
            share of the noise in that; where the trajectory is smoother, as in training, the
            weights are closer.
        noise: expected distance from what exact files would give, caused by their rounding, as a
            share of the size of the weights: sqrt(sum of x_i^2 u_i^2 / (8 ln 2)).
        initial: weight that the initial weights have in the sum.
        condition: condition number of the system that was solved, scaled to a diagonal of 1.
    """

    target: Target
    at: float
    coefficients: FloatArray
    error: float
    noise: float
    initial: float
    condition: float

    @cached_property
    def used(self) -> list[int]:
        """Return the indices of the snapshots that take part."""
        return [int(index) for index in np.flatnonzero(self.coefficients)]


# ── the solve ────────────────────────────────────────────────────────────────────────────────────


@final
class Overlaps:
    """The stored averages of one run, and the overlap of every two of their profiles.

    Built once for a folder; each target then costs a few passes over the updates. One pass for
    each average when built, and the memory of (tracks + 4) numbers for each update and of
    (snapshots)^2: a million updates and 512 snapshots of 2 averages take a second or two.

    Args:
        tracks: the averages as they happened, all on the clock of one run. They may differ in
            their starts and updates.
        stored: what is on disk; the coefficients of a `Fit` have the same order.
        start: start of the run on that clock, from which target schedules count; the earliest
            start of a track unless given, or 0 without tracks.

    Raises:
        ArgumentError: when a snapshot is not of an update, or a decay is not in [0, 1].

    Examples:
        >>> pair = [Power(sigma_rel=0.05), Power(sigma_rel=0.10)]
        >>> run = History.from_state([[1, 4_096, 0]])
        >>> tracks = [Track(run, [schedule]) for schedule in pair]
        >>> times = range(128, 4_097, 128)
        >>> overlaps = Overlaps(tracks, [Stored(t, track=k) for t in times for k in range(2)])
        >>> fit = overlaps.fit(Power(sigma_rel=0.15))
        >>> f"{fit.error:.0e}", round(float(fit.coefficients.sum()), 12)
        ('3e-05', 1.0)
    """

    def __init__(
        self, tracks: Sequence[Track], stored: Sequence[Stored], *, start: float | None = None
    ) -> None:
        self.stored = tuple(stored)
        self.start = min((t.start for t in tracks), default=0.0) if start is None else start
        _check(tracks, self.stored, self.start)
        self._slack = _slack(tracks)
        self._times = _moments(tracks, self.stored, self.start, self._slack)
        ends, segment = np.unique(self._places(tracks), return_inverse=True)
        self._times = self._times[: ends[-1] + 1]
        gaps = np.diff(self._times)
        self._per_time = 1.0 / np.concatenate((gaps[:1] if gaps.size else [1.0], gaps))
        # Plain checkpoints are all of one average more, which copies at every moment.
        row = [len(tracks) if each.track is None else each.track for each in self.stored]
        decays = np.ones((max([len(tracks) - 1, *row]) + 1, len(self._times)))
        for ours, track in zip(decays, tracks, strict=False):
            if track.start <= self._times[-1]:  # else nothing of it is on disk
                self._enter(ours, track)
        decays[len(tracks) :] = 0.0
        self._pieces = _Pieces.cut(decays, ends + 1, segment, np.array(row))
        self._matrix = self._pieces.overlaps(self._per_time)
        self._solved: tuple[tuple[int, float | None], _System] | None = None

    def fit(
        self,
        target: Target,
        *,
        at: float | None = None,
        max_error: float = MAX_ERROR,
        ridge: float | None = None,
    ) -> Fit:
        """Return the coefficients, sum 1, that bring the snapshots closest to `target`.

        min over x of ||sum of x_i p_i - q||^2 + sum of R_i x_i^2,  sum of x_i = 1

        A target that is itself stored is that one snapshot.

        Args:
            target: any schedule, as if it had been one of the averages from the start of the run
                on, updated whenever one of them was; or a `Tail`.
            at: time of a snapshot, on the run's clock; later ones are not used. The newest unless
                given.
            max_error: largest relative squared profile error to accept; `math.inf` to go on
                whatever it is.
            ridge: R_i as a share of the size ||p||^2 of a stored average (the harmonic mean over
                them), the same for all; 0 for the plain least squares of EDM2. By default from
                the dtype of each file, such that rounding and profile error together are least
                where the averages wobble by about 2 % of their size: 1e-4 for float16, 7e-3 for
                bfloat16, nothing to speak of for float32. Plain checkpoints have none.

        Raises:
            ArgumentError: when the snapshots do not resolve the target to `max_error`. The message
                names the nearest length that they do.
        """
        if not max_error > 0.0:
            raise ArgumentError(f"max_error must be above 0, got {max_error!r}.")
        if ridge is not None and not 0.0 <= ridge < math.inf:
            raise ArgumentError(f"ridge must be finite and at least 0, got {ridge!r}.")
        count = self._count_until(at)
        found = self._closest(target, count, ridge)
        if not found.error <= max_error:
            nearest = self._nearest_served(target, count, ridge, max_error)
            advice = f"The nearest length that they serve is {nearest}. " if nearest else ""
            raise ArgumentError(
                f"target must be resolved by the snapshots to a relative squared profile error of "
                f"{max_error:g}, got {found.error:.2g} for {target!r} at {show_time(found.at)}. "
                f"{advice}Take snapshots more often or of another average, or pass a larger "
                "max_error (--max-error)."
            )
        return found

    def errors(
        self, targets: Iterable[Target], *, at: float | None = None, ridge: float | None = None
    ) -> FloatArray:
        """Return the relative squared profile error of each target, however large [targets]."""
        found = (self.fit(each, at=at, max_error=math.inf, ridge=ridge) for each in targets)
        return np.array([fit.error for fit in found], dtype=np.float64)

    def profile(self, fit: Fit) -> Profile:
        """Return what the sum of `fit` remembers: the weight of every moment of the run.

        Its times count from the start of the run, like those of `polyak.profile`.
        """
        # Also where the newest file used is older: a stored average may have stood still since.
        end = int(np.searchsorted(self._times, fit.at, side="right"))
        weights = self._pieces.sum_of(fit.coefficients)[:end]
        return Profile(
            times=self._times[1:end] - self.start, weights=weights[1:], initial=float(weights[0])
        )

    def _closest(self, target: Target, count: int, ridge: float | None) -> Fit:
        """Return the fit of one target at the end of the first `count` segments."""
        ours = np.flatnonzero(self._pieces.segment < count)
        end = self._pieces.parts[count - 1].stop
        goal = np.zeros(len(self._times))
        goal[:end] = _goal(target, self._times[:end])
        square = self._square(goal)
        system = self._system(count, ridge)

        x = np.zeros(len(self.stored))
        apart = system.diagonal - 2.0 * self._overlaps_with(goal)[ours] + square
        if apart.min() <= _SAME * square:
            x[ours[apart.argmin()]] = 1.0
        else:
            # A step of Newton on a quadratic ends at its least value. The second takes back what
            # rounding did to the first, since it starts from distances, not from their squares.
            for _ in range(2):
                left = self._overlaps_with(goal - self._pieces.sum_of(x))[ours]
                x[ours] += system.step(left, x[ours])
        x.flags.writeable = False
        weights = self._pieces.sum_of(x)
        return Fit(
            target=target,
            at=float(self._times[end - 1]),
            coefficients=x,
            error=self._square(weights - goal) / square,
            noise=math.sqrt(_ROUNDING) * float(np.linalg.norm(x * _roundoff(self.stored))),
            initial=float(weights[0]),
            condition=system.condition,
        )

    def _square(self, weights: FloatArray) -> float:
        return float(weights @ (weights * self._per_time))

    def _overlaps_with(self, weights: FloatArray) -> FloatArray:
        return self._pieces.overlaps_with(weights * self._per_time)

    def _system(self, count: int, ridge: float | None) -> "_System":
        """Return the system of the first segments, factored once for a sweep of targets."""
        key = (count, ridge)
        if self._solved is None or self._solved[0] != key:
            ours = np.flatnonzero(self._pieces.segment < count)
            matrix = self._matrix[np.ix_(ours, ours)]
            shares = _ROUNDING * (_roundoff(self.stored)[ours] / _WOBBLE) ** 2
            if ridge is not None:
                shares = np.full(len(ours), float(ridge))
            # Plain checkpoints do not overlap, so there is nothing large for them to take back.
            average = np.array([self.stored[index].track is not None for index in ours])
            if average.any():
                # The harmonic mean: the first averages are short and large, the later ones alike.
                shares = shares / float(np.mean(1.0 / matrix.diagonal()[average]))
            self._solved = key, _System(matrix, np.where(average, shares, 0.0))
        return self._solved[1]

    def _nearest_served(
        self, target: Target, count: int, ridge: float | None, max_error: float
    ) -> Target | None:
        """Return the target of the nearest length with at most `max_error`, if there is one."""

        def served(factor: float) -> Target | None:
            try:
                other = _lengthened(target, factor)
                if other is not None and self._closest(other, count, ridge).error <= max_error:
                    return other
            except ArgumentError:  # no such length, as a window longer than the run
                pass
            return None

        for step in range(1, 13):
            for side in (1.5, 1.0 / 1.5):
                if served(side**step) is None:
                    continue
                refused, taken = side ** (step - 1), side**step
                for _ in range(6):
                    middle = math.sqrt(refused * taken)
                    if served(middle) is None:
                        refused = middle
                    else:
                        taken = middle
                return served(taken)
        return None

    def _places(self, tracks: Sequence[Track]) -> Indices:
        """Return the index of each snapshot's moment [snapshots]."""
        times = np.array([each.time for each in self.stored], dtype=np.float64)
        rows = np.array([-1 if each.track is None else each.track for each in self.stored])
        for index in np.unique(rows[rows >= 0]):
            updates, ours = tracks[index].times(), times[rows == index]
            nearest = updates[_nearest(updates, ours)]
            wrong = np.flatnonzero(~(np.abs(nearest - ours) <= self._slack))
            if wrong.size:
                raise ArgumentError(
                    "time must be that of an update of its average, got "
                    f"{show_time(ours[wrong[0]])}. "
                    f"The nearest one is at {show_time(nearest[wrong[0]])}."
                )
        return _nearest(self._times, times)

    def _enter(self, decays: FloatArray, track: Track) -> None:
        """Write what `track` did at each moment from its start to its last update.

        An update of decay d over the moments with the shares f_1, f_2, ... of its interval is to
        leave d of what was before and to weigh them (1 - d) f_c. So after moment c it has done
        d + (1 - d) (f_1 + ... + f_c), and its decay there is the ratio of two of these. An interval
        of one moment has decay d.
        """
        times, values = track.times(), track.decays()
        seen = times <= self._times[-1] + self._slack
        places, values = _nearest(self._times, times[seen]), values[seen]
        cells = np.arange(places[0] + 1, places[-1] + 1)
        update = np.searchsorted(places, cells)  # the one that ends at or after this moment
        begin, end = self._times[places[update - 1]], self._times[places[update]]
        until, before = (
            np.where(at == end, 1.0, (at - begin) / (end - begin))
            for at in (self._times[cells], self._times[cells - 1])
        )
        kept = values[update]
        decays[cells] = (kept + (1.0 - kept) * before) / (kept + (1.0 - kept) * until)
        decays[places[0]] = 0.0  # a copy

    def _count_until(self, at: float | None) -> int:
        """Return how many segments end at or before `at`."""
        ends = self._times[[part.stop - 1 for part in self._pieces.parts]]
        if at is None:
            return len(ends)
        nearest = int(np.abs(ends - at).argmin())
        if not abs(ends[nearest] - at) <= self._slack:
            raise ArgumentError(
                f"at must be the time of a snapshot, got {at!r}. "
                f"The nearest one is at {show_time(ends[nearest])}."
            )
        return nearest + 1


@dataclass(frozen=True, eq=False)
class _Pieces:
    """The profiles of all snapshots, in pieces that take the memory of one profile for each row.

    A row is an average, a segment the moments after one snapshot up to and with the next.

    Args:
        weights: weight of each moment in its average at the end of its segment [rows, moments].
        kept: product of the decays of each segment [rows, segments].
        parts: where each segment lies among the moments [segments].
        segment: the segment that each snapshot ends [snapshots].
        row: the row of each snapshot [snapshots].
    """

    weights: FloatArray
    kept: FloatArray
    parts: list[slice]
    segment: Indices
    row: Indices

    @classmethod
    def cut(cls, decays: FloatArray, ends: Indices, segment: Indices, row: Indices) -> Self:
        """Return the pieces that `decays` make, whose memory they take [rows, moments].

        Products of decays only: a decay of 0 makes zeros of what was before it and harms nothing
        else, as it would a quotient or a logarithm.
        """
        parts = [slice(*bounds) for bounds in pairwise([0, *ends.tolist()])]
        kept = np.empty((len(decays), len(parts)))
        for i, part in enumerate(parts):
            of_part = decays[:, part]
            left = np.ones_like(of_part)
            np.cumprod(of_part[:, :0:-1], axis=1, out=left[:, -2::-1])
            kept[:, i] = of_part[:, 0] * left[:, 0]
            np.multiply(1.0 - of_part, left, out=of_part)
        return cls(weights=decays, kept=kept, parts=parts, segment=segment, row=row)

    def overlaps(self, per_time: FloatArray) -> FloatArray:
        """Return the overlap of every two snapshots [snapshots, snapshots]."""
        matrix = np.empty((len(self.row), len(self.row)))
        now = np.zeros((len(self.kept), len(self.kept)))  # of every two rows, at this segment's end
        for i, part in enumerate(self.parts):
            now = now * np.outer(self.kept[:, i], self.kept[:, i])
            now += (self.weights[:, part] * per_time[part]) @ self.weights[:, part].T
            left = np.ones((len(self.kept), len(self.parts) - i))
            np.cumprod(self.kept[:, i + 1 :], axis=1, out=left[:, 1:])
            here = np.flatnonzero(self.segment == i)
            after = np.flatnonzero(self.segment >= i)
            block = now[np.ix_(self.row[here], self.row[after])]
            block *= left[self.row[after], self.segment[after] - i]
            matrix[np.ix_(here, after)] = block
            matrix[np.ix_(after, here)] = block.T
        return matrix

    def overlaps_with(self, density: FloatArray) -> FloatArray:
        """Return the overlap of each snapshot with a density over the moments [snapshots]."""
        found = np.zeros((len(self.parts), len(self.kept)))
        now = np.zeros(len(self.kept))
        for i, part in enumerate(self.parts):
            now = found[i] = self.kept[:, i] * now + self.weights[:, part] @ density[part]
        return found[self.segment, self.row]

    def sum_of(self, x: FloatArray) -> FloatArray:
        """Return the profile of the sum of x_i times snapshot i [moments]."""
        factors = np.zeros((len(self.parts), len(self.kept)))
        np.add.at(factors, (self.segment, self.row), x)
        for i in range(len(factors) - 2, -1, -1):  # a snapshot holds what is left of those before
            factors[i] += self.kept[:, i + 1] * factors[i + 1]
        return np.concatenate(
            [each @ self.weights[:, part] for each, part in zip(factors, self.parts, strict=True)]
        )


class _System:
    """min x' A x / 2 + sum of R_i x_i^2 / 2 - b' x, sum of x_i = 1: factored for many b."""

    def __init__(self, matrix: FloatArray, ridge: FloatArray) -> None:
        self.diagonal, self.ridge = matrix.diagonal(), ridge
        # Scaled to a diagonal of 1: early averages are thousands of times larger than late ones.
        self.scale = 1.0 / np.sqrt(self.diagonal)
        scaled = matrix * np.outer(self.scale, self.scale)
        scaled[np.diag_indices_from(scaled)] += ridge * self.scale**2
        values, vectors = np.linalg.eigh(scaled)
        # Two snapshots may hold the same (averages that still copy): of those, take the mean.
        kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
        self.values, self.vectors = values[kept], vectors[:, kept]
        self.condition = float(self.values[-1] / self.values[0])
        self.level = self._solve(np.ones(len(ridge)))

    def _solve(self, b: FloatArray) -> FloatArray:
        weights = self.vectors.T @ (b * self.scale)
        solved: FloatArray = self.scale * (self.vectors @ (weights / self.values))
        return solved

    def step(self, left: FloatArray, x: FloatArray) -> FloatArray:
        """Return what to add to `x` to be at the least value, `left` being b - A x."""
        free = self._solve(left - self.ridge * x)
        missing = 1.0 - float(x.sum()) - float(free.sum())
        return free + missing / float(self.level.sum()) * self.level


def plan(
    schedules: Sequence[Schedule],
    *,
    times: Iterable[float],
    interval: float = 1,
    storage: Storage = "float16",
) -> Overlaps:
    """Return the overlaps of a run that has not begun, to ask what it will be able to serve.

    Args:
        schedules: the averages that will be kept.
        times: times since the start at which each of them will be written, rounded up to the
            next update.
        interval: time between two updates. A coarser one, of a tenth of the time between
            snapshots, is faster and for smooth targets within a few percent.
        storage: dtype of the files.

    Examples:
        >>> pair = [Power(sigma_rel=0.05), Power(sigma_rel=0.10)]
        >>> planned = plan(pair, times=range(64, 4_097, 64), interval=8)
        >>> errors = planned.errors([Power(sigma_rel=s) for s in (0.005, 0.02, 0.1, 0.2)])
        >>> (errors < MAX_ERROR).tolist()
        [False, True, True, True]
    """
    if not 0.0 < interval < math.inf:
        raise ArgumentError(f"interval must be finite and above 0, got {interval!r}.")
    if not schedules:
        raise ArgumentError("schedules must hold at least one, got none.")
    asked = list(times)
    wrong = [time for time in asked if not 0.0 < time < math.inf]
    if wrong or not asked:
        raise ArgumentError(
            f"times must be finite and above 0, at least one, got {wrong[0] if wrong else asked!r}."
        )
    updates = sorted({math.ceil(time / interval * (1.0 - 1e-12)) for time in asked})
    history = History.from_state([[interval, updates[-1], 0]])
    tracks = [Track(history, [schedule]) for schedule in schedules]
    stored = [
        Stored(interval * update, track=index, storage=storage)
        for update in updates
        for index in range(len(tracks))
    ]
    return Overlaps(tracks, stored)


# ── moments and weights ──────────────────────────────────────────────────────────────────────────


def decays_at(schedule: Schedule, *, now: FloatArray, elapsed: FloatArray) -> FloatArray:
    """Return schedule(now, elapsed) for arrays of both; raise unless all are in [0, 1].

    The laws in continuous time by NumPy, a hundred times faster than calls; others one by one.
    """
    decays = _law(schedule, now, elapsed)
    wrong = np.flatnonzero(~((decays >= 0.0) & (decays <= 1.0)))
    if wrong.size:
        at = int(wrong[0])
        raise ArgumentError(
            f"the decay must be between 0 and 1, got {decays[at]!r} from {schedule!r} "
            f"at now={now[at]:g}, elapsed={elapsed[at]:g}."
        )
    return decays


def _law(schedule: Schedule, now: FloatArray, elapsed: FloatArray) -> FloatArray:
    before = now - elapsed
    match schedule:
        case Power():
            return np.power(before / now, schedule.exponent)
        case Uniform():
            return before / now
        case HalfLifeRamp(half_life=None):
            return np.power(before / now, math.log(2.0) / schedule.ratio)
        case Exponential(debias=False):
            return np.exp(-schedule.rate * elapsed)
        case Exponential() if schedule.rate < math.inf:
            end = np.expm1(-schedule.rate * now)
            weight = np.expm1(-schedule.rate * elapsed) / end
            left = np.exp(-schedule.rate * elapsed) * np.expm1(-schedule.rate * before) / end
            return np.where(weight < 0.5, 1.0 - weight, left)
        case After():
            decays = np.zeros(len(now))
            inside = now > schedule.start
            since = now[inside] - schedule.start
            decays[inside] = _law(schedule.schedule, since, np.minimum(elapsed[inside], since))
            return decays
    calls = zip(now.tolist(), elapsed.tolist(), strict=True)
    return np.array([schedule(now=n, elapsed=e) for n, e in calls], dtype=np.float64)


def _check(tracks: Sequence[Track], stored: Sequence[Stored], start: float) -> None:
    """Raise unless the snapshots are of these tracks, and nothing was before the start."""
    if not stored:
        raise ArgumentError("stored must hold at least one snapshot, got none.")
    first = min((track.start for track in tracks), default=math.inf)
    if not -math.inf < start <= first:
        raise ArgumentError(
            f"start must be finite and at most that of every track ({show_time(first)}), "
            f"got {start!r}."
        )
    for each in stored:
        if each.track is not None and not 0 <= each.track < len(tracks):
            raise ArgumentError(
                f"track must be None or the index of one of {len(tracks)} tracks, "
                f"got {each.track!r}."
            )
        begin = start if each.track is None else tracks[each.track].start
        if each.time < begin:
            raise ArgumentError(
                f"time must be at least {show_time(begin)} (its start), got {show_time(each.time)}."
            )


def _moments(
    tracks: Sequence[Track], stored: Sequence[Stored], start: float, slack: float
) -> FloatArray:
    """Return the times, from the start to the last snapshot, at which any of them saw weights."""
    different: list[Track] = []
    for track in tracks:  # as a rule all have the updates of one engine
        if not any(t.start == track.start and t.history == track.history for t in different):
            different.append(track)
    plain = [each.time for each in stored if each.track is None]
    times = np.unique(np.concatenate([[start], plain, *(track.times() for track in different)]))
    end = max(each.time for each in stored)
    moments: FloatArray = times[
        (np.diff(times, prepend=-math.inf) > slack) & (times <= end + slack)
    ]
    return moments


def _slack(tracks: Sequence[Track]) -> float:
    """Return how far two times of the same moment may be apart: clocks of floats jitter."""
    shortest = min((run[0] for track in tracks for run in track.history.runs), default=0.0)
    return _SLACK * shortest


def _nearest(times: FloatArray, wanted: FloatArray) -> Indices:
    """Return the index of the nearest of `times`, which increase."""
    right = np.clip(np.searchsorted(times, wanted), 0, len(times) - 1)
    left = np.maximum(right - 1, 0)
    return np.where(wanted - times[left] < times[right] - wanted, left, right)


def _goal(target: Target, times: FloatArray) -> FloatArray:
    """Return the weight of every moment in the target; the first is the start of the run."""
    if isinstance(target, Tail):
        return target.weights(times)
    if isinstance(target, type) or not callable(target):
        raise ArgumentError(
            f"target must be a schedule or a Tail, got {target!r}. "
            "For example Power(sigma_rel=0.1)."
        )
    decays = np.zeros(len(times))
    decays[1:] = decays_at(target, now=times[1:] - times[0], elapsed=np.diff(times))
    left = np.ones_like(decays)  # what survives of each moment until the end
    np.cumprod(decays[:0:-1], out=left[-2::-1])
    weights: FloatArray = (1.0 - decays) * left
    return weights


def _roundoff(stored: Sequence[Stored]) -> FloatArray:
    return np.array([_ROUNDOFF[each.storage] for each in stored])


def _lengthened(target: Target, factor: float) -> Target | None:
    """Return the same kind of average, `factor` times as long; None for one without a length."""

    def times(length: float) -> float:
        return float(f"{factor * length:.3g}")

    match target:
        case Power(sigma_rel=float() | int() as sigma_rel):
            return Power(sigma_rel=times(sigma_rel))
        case Power():  # its mean age is that share of the run
            return Power(gamma=1.0 / times(1.0 / (target.exponent + 1.0)) - 2.0)
        case Exponential() if 0.0 < target.rate < math.inf:
            return Exponential(half_life=times(math.log(2.0) / target.rate), debias=target.debias)
        case Tail():
            return Tail(times(target.length), curve=target.curve)
    return None
