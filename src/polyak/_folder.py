"""What is in a folder of snapshots: which averages, when, and how they came about."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, get_args

import torch

from ._errors import ArgumentError, AveragingError
from ._files import open_checkpoint, outline
from ._fit import Storage
from ._history import History
from ._identities import schedule_from_state
from ._schedules import Schedule

FORMAT = 1
_FILE, _SPREAD = ".safetensors", ".dcp"  # of an average in one process, and of one over many ranks
_NAME = re.compile(r".+-(-?\d{11,}|-?\d+\.\d+|-?\d(\.\d+)?e[+-]\d+)")  # as `snapshot_name` gives it
_PADDED = re.compile(r".+-\d{12}")

# The function that was an average's schedule, or such functions by average.
Opaque: TypeAlias = Schedule | Mapping[str, Schedule]


@dataclass(frozen=True)
class Snapshot:
    """One file of one average, or a folder of its pieces, and what it says of itself.

    Attributes:
        path: the file, or a folder of torch.distributed.checkpoint.
        average: the name of the average.
        now: the time at which it was taken, on the clock of the run.
        updates: how many updates had gone into it.
        shapes: of its averaged tensors.
        about: all of it, as it is in the file.
    """

    path: Path
    average: str
    now: float
    updates: int
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    about: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def of(
        cls, path: Path, about: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
    ) -> "Snapshot":
        """A snapshot from what its file says, and the shapes of all tensors in it."""
        live = set(about["live"])
        averaged = {name: tuple(shape) for name, shape in shapes.items() if name not in live}
        return cls(path, about["average"], about["now"], about["updates"], averaged, about)

    @property
    def history(self) -> History:
        """The updates that went into it."""
        return History.from_state(self.about["history"])

    def differing(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Names of averaged tensors that only one side has, or in another shape."""
        names = self.shapes.keys() | shapes.keys()
        return sorted(name for name in names if self.shapes.get(name) != shapes.get(name))

    def is_of_run(self, other: "Snapshot") -> bool:
        """Whether one of the two went on to become the other, or a sister average of it."""
        short, long = sorted((self.about, other.about), key=lambda about: about["updates"])
        if short["origin"] != long["origin"]:
            return False
        if self.average == other.average:
            before, after = [*short["past"], short["schedule"]], [*long["past"], long["schedule"]]
            if after[: len(before)] != before:
                return False
        return bool(_beginning(long["history"], short["updates"]) == short["history"])

    def schedules(self, opaque: Opaque | None = None) -> list[Schedule]:
        """The schedules of its updates, by the index that the history gives.

        Raises:
            ArgumentError: one of them was a function, and `opaque` does not hold it.
        """
        saved = [*self.about["past"], self.about["schedule"]]
        ours = opaque.get(self.average) if isinstance(opaque, Mapping) else opaque
        if ours is None and self.is_opaque():
            raise ArgumentError(
                f"opaque must hold the schedule of {self.average!r}, which was a function when "
                f"{self.path.name} was written: no file can hold that. Pass it again, as "
                f"opaque={{{self.average!r}: function}}."
            )
        return [schedule_from_state(state, opaque=ours) for state in saved]

    def is_opaque(self) -> bool:
        """Whether one of its schedules was a function."""
        return "'opaque'" in repr([*self.about["past"], self.about["schedule"]])


def storage_of(dtype: torch.dtype) -> Storage:
    """The name of a dtype whose rounding is known."""
    for storage in get_args(Storage):
        if dtype == getattr(torch, storage):
            found: Storage = storage
            return found
    raise ArgumentError(f"dtype must be one of {', '.join(get_args(Storage))}, got {dtype}.")


def read_folder(directory: Path) -> list[Snapshot]:
    """Every snapshot of a folder, by time and average; only headers are read.

    Raises:
        ArgumentError: no such folder, none in it, or a file with the name of one that is none.
    """
    if not directory.is_dir():
        raise ArgumentError(
            f"directory must be a folder of snapshots, got {str(directory)!r}, which is "
            + ("a file." if directory.exists() else "not there.")
        )
    found = snapshots_in(directory)
    if not found:
        raise ArgumentError(
            f"directory must hold snapshots, got {str(directory)!r} without one. "
            "Write some with polyak.Snapshots while training; plain checkpoints are for "
            "polyak.merge."
        )
    return found


class _NotOursError(ArgumentError):
    """A whole checkpoint of another kind."""


def snapshots_in(directory: Path) -> list[Snapshot]:
    """`read_folder` of a folder that may have none.

    People keep other weights there, too: what is neither a snapshot nor called like one is passed
    over.
    """
    found = []
    for path in [p for ending in (_FILE, _SPREAD) for p in directory.glob(f"*{ending}")]:
        try:
            found.append(read_snapshot(path))
        except (AveragingError, OSError) as error:
            # Numbers at the end are common: a whole file of another kind must be called just so.
            called_so = _PADDED if isinstance(error, _NotOursError) else _NAME
            if called_so.fullmatch(path.stem):
                raise
    return sorted(found, key=lambda file: (file.now, file.average))


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))


def read_snapshot(path: Path) -> Snapshot:
    """One snapshot, from the header of its file, or from what its folder says of itself."""
    if path.is_dir():
        metadata, tensors = outline(path)
    else:
        with open_checkpoint(path) as file:
            metadata, tensors = file.metadata, dict(file.tensors)
    shapes = {name: info.shape for name, info in tensors.items()}
    if "polyak" not in metadata:
        raise _NotOursError(_refusal(path, "its header does not name polyak"))
    try:
        about = json.loads(metadata["polyak"])
        _check(about)
    except (KeyError, TypeError, ValueError) as error:
        other = _NotOursError if isinstance(error, _NotOursError) else ArgumentError
        raise other(_refusal(path, error)) from error
    return Snapshot.of(path, about, shapes)


def _refusal(path: Path, why: object) -> str:
    return (
        f"{path.name} must be a snapshot written by polyak.Snapshots, got a file that is none "
        f"({why}). Move it out of the folder; plain checkpoints are for polyak.merge."
    )


def _check(about: Any) -> None:
    """Raise `ValueError` unless `about` is what a snapshot of this format says of itself."""
    if not isinstance(about, dict) or not isinstance(about.get("kind"), str):
        raise ValueError("it does not say that it is a snapshot")
    if about["kind"] != "snapshot":
        raise _NotOursError(f"it holds {about['kind']}")
    if about.get("format") != FORMAT:
        raise ValueError(f"its format is {about.get('format')!r}, this version reads {FORMAT}")
    kinds: dict[str, type | tuple[type, ...]] = {
        "average": str,
        "storage": str,
        "schedule": dict,
        "past": list,
        "origin": (int, float),
        "now": (int, float),
        "updates": int,
        "history": list,
    }
    for key, kind in kinds.items():
        if not isinstance(about.get(key), kind) or isinstance(about[key], bool):
            raise ValueError(f"its {key!r} is missing or damaged")
    for key in ("live", "buffers", "frozen"):
        if not (isinstance(about.get(key), list) and all(isinstance(n, str) for n in about[key])):
            raise ValueError(f"its {key!r} must be names")
    for key in ("dtypes", "ties"):
        words = about.get(key)
        if not (isinstance(words, dict) and all(isinstance(w, str) for w in words.values())):
            raise ValueError(f"its {key!r} must be words by name")
    if about["storage"] not in get_args(Storage):
        raise ValueError(f"its storage is {about['storage']!r}")
    _check_clock(about)


def _check_clock(about: Mapping[str, Any]) -> None:
    history = History.from_state(about["history"])
    end = about["origin"] + math.fsum(elapsed * count for elapsed, count, _ in history.runs)
    if len(history) != about["updates"] or not math.isclose(about["now"], end, rel_tol=1e-6):
        raise ValueError("its clock and its history do not agree")
    if any(index > len(about["past"]) for _, _, index in history.runs):
        raise ValueError("its history names a schedule that it does not have")


def snapshot_name(average: str, now: float, *, spread: bool = False) -> str:
    """The name of a snapshot's file, or of its folder if `spread`: sorts by time, ends in it."""
    time = f"{int(now):012d}" if float(now).is_integer() else repr(float(now))
    return f"{average}-{time}{_SPREAD if spread else _FILE}"


def _beginning(history: Sequence[Sequence[float]], updates: int) -> list[list[float]]:
    """The first `updates` updates of a run-length coded history."""
    runs: list[list[float]] = []
    left = updates
    for elapsed, count, index in history:
        if left <= 0:
            break
        runs.append([elapsed, min(count, left), index])
        left -= int(count)
    return runs


def thinned(moments: Sequence[float], keep: int, *, start: float = 0.0) -> list[float]:
    """At most `keep` of these moments, near to evenly spaced; the newest always stays.

    The reconstruction error falls with a power of the widest gap. So while there are too many, the
    one goes that leaves the smallest gap behind, the earlier of equals.

    Args:
        moments: rising.
        keep: how many may stay.
        start: of the run, a neighbour of the first moment.

    Returns:
        The moments that stay, rising.
    """
    left = list(moments)
    while len(left) > keep:
        around = [start, *left]
        gaps = [around[i + 2] - around[i] for i in range(len(left) - 1)]  # if the i-th went
        left.pop(gaps.index(min(gaps)))
    return left
