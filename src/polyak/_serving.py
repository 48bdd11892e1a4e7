"""Which lengths do these snapshots serve, and how well?"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import final

from ._errors import show_time
from ._fit import MAX_ERROR, Overlaps
from ._picture import LINE, MARK, picture, shares_along_x
from ._schedules import Power, Schedule

# Widths of power functions as a share of the run; near 0.2887, the plain mean, they hardly differ.
_SHOWN = (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.25)
_LADDER = (0.002, 0.003, 0.005, 0.008, 0.013, 0.02, 0.03, 0.05, 0.08, 0.13, 0.2, 0.25)
_EXACT = 1e-20  # below it the target is itself stored
_FLOOR = 1e-9  # of the picture: nobody asks which of two such errors is smaller


@final
@dataclass(frozen=True)
class SnapshotReport:
    """What a folder of snapshots holds, or will hold, and which lengths it serves; `print` it.

    Attributes:
        averages: the rule of each average.
        moments: times of the snapshots, rising.
        at: the moment for which the lengths are asked.
        stored_bytes: of all files.
        errors: sigma_rel of a power function, and the relative squared profile error with which it
            is reconstructed at that moment.
        shortest: smallest sigma_rel whose error is at most `max_error`; None when there is none.
        longest: largest such sigma_rel.
        max_error: above it a reconstruction is refused unless told otherwise.
    """

    averages: dict[str, str]
    moments: tuple[float, ...]
    at: float
    stored_bytes: int
    errors: tuple[tuple[float, float], ...]
    shortest: float | None
    longest: float | None
    max_error: float

    def __str__(self) -> str:
        """The report as a page of text."""
        many = len(self.moments)
        lines = [f"{name}: {rule}" for name, rule in self.averages.items()]
        lines.append(
            f"{many} moment{'s' if many > 1 else ''} from {show_time(self.moments[0])} to "
            f"{show_time(self.moments[-1])}, {_size(self.stored_bytes)}"
        )
        lines.append(
            "serves no length"
            if self.shortest is None
            else f"serves sigma_rel {self.shortest:.3g} to {self.longest:.3g} at "
            f"{show_time(self.at)}: averages of a mean age of {_age(self.shortest):.2%} to "
            f"{_age(self.longest or self.shortest):.2%} of the run"
        )
        lines.append(f"{'sigma_rel':>10}  {'mean age':>9}  {'error':>8}")
        for sigma_rel, error in self.errors:
            mark = "" if error <= self.max_error else "  refused"
            shown = "stored" if error < _EXACT else f"{error:.1e}"
            lines.append(f"{sigma_rel:>10g}  {_age(sigma_rel):>9.2%}  {shown:>8}{mark}")
        return "\n".join(lines)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw error against length, with the line above which it is refused.

        Args:
            path: ends in .png, .svg or .pdf.

        Raises:
            ImportError: matplotlib is missing; it comes with `pip install "polyak[study]"`.
        """
        with picture(path) as axes:
            shares = [_age(sigma_rel) for sigma_rel, _ in self.errors]
            errors = [max(error, _FLOOR) for _, error in self.errors]
            axes.loglog(shares, errors, "o-", color=LINE, ms=4, lw=1.4)
            axes.axhline(self.max_error, color=MARK, lw=1.0, ls="--")
            axes.annotate(
                "refused above, unless told otherwise",
                (shares[-1], self.max_error),
                ha="right",
                va="bottom",
                color=MARK,
                fontsize=9,
            )
            shares_along_x(axes)
            axes.set_xlabel(
                f"mean age of the average, as a share of the run up to {show_time(self.at)}"
            )
            axes.set_ylabel(f"relative squared profile error (from {_FLOOR:g} up)")
            axes.set_title(f"What {len(self.moments)} moments can rebuild", fontsize=10)


def serving(
    overlaps: Overlaps,
    averages: Mapping[str, Schedule],
    stored_bytes: int,
    *,
    at: float | None = None,
    start: float = 0.0,
) -> SnapshotReport:
    """Ask stored profiles what they can do at one moment; at their last unless given.

    Args:
        overlaps: the profiles.
        averages: which there are.
        stored_bytes: what they cost.
        at: the moment, on the clock of `overlaps`.
        start: what to add to that clock, where it began at 0 and the run did not.
    """
    ends = served(overlaps, at=at)
    errors = overlaps.errors([Power(sigma_rel=s) for s in _SHOWN], at=at)
    moments = tuple(sorted({start + stored.time for stored in overlaps.stored}))
    return SnapshotReport(
        averages={name: repr(schedule) for name, schedule in averages.items()},
        moments=moments,
        at=moments[-1] if at is None else start + at,
        stored_bytes=stored_bytes,
        errors=tuple(zip(_SHOWN, errors.tolist(), strict=True)),
        shortest=None if ends is None else ends[0],
        longest=None if ends is None else ends[1],
        max_error=MAX_ERROR,
    )


def served(
    overlaps: Overlaps, *, at: float | None = None, max_error: float = MAX_ERROR
) -> tuple[float, float] | None:
    """The smallest and the largest sigma_rel that are resolved to `max_error`; None if none is."""

    def is_good(sigma_rel: float) -> bool:
        return float(overlaps.errors([Power(sigma_rel=sigma_rel)], at=at)[0]) <= max_error

    good = [sigma_rel for sigma_rel in _LADDER if is_good(sigma_rel)]
    if not good:
        return None
    shortest, longest = _LADDER.index(good[0]), _LADDER.index(good[-1])
    first, last = good[0], good[-1]
    if shortest > 0:
        first = _border(_LADDER[shortest - 1], first, is_good)
    if longest + 1 < len(_LADDER):
        last = _border(_LADDER[longest + 1], last, is_good)
    return first, last


def _border(bad: float, good: float, is_good: Callable[[float], bool]) -> float:
    """The good end of what is left of the way from `bad` to `good` after halving it a few times."""
    for _ in range(4):
        middle = math.sqrt(bad * good)
        if is_good(middle):
            good = middle
        else:
            bad = middle
    return good


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def _age(sigma_rel: float) -> float:
    """Mean age of a power function as a share of the run: 1 / (gamma + 2)."""
    return 1.0 / (Power(sigma_rel=sigma_rel).exponent + 1.0)
