"""Snapshots in, the average of any other length out."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from ._checks import check_dtype, check_time
from ._combine import Combination
from ._errors import ArgumentError, MatchError
from ._files import (
    ALONE,
    Checkpoint,
    Team,
    TensorInfo,
    checkpoint_writer,
    open_checkpoint,
    team_of,
)
from ._fit import MAX_ERROR, Fit, Overlaps, Storage, Stored, Target, Track
from ._folder import Opaque, Snapshot, read_folder, size_of
from ._history import History
from ._inputs import PathLikes, open_inputs, steps_of
from ._profiles import Profile
from ._schedules import Schedule
from ._serving import SnapshotReport, serving
from ._slices import Progress

if TYPE_CHECKING:  # a build of torch may be without it
    from torch.distributed import ProcessGroup

Source = str | PathLike[str]


@final
@dataclass(frozen=True, eq=False)
class Reconstruction:
    """The average that a schedule would have given, as a sum of snapshots on disk.

    Nothing is read but headers until `weights` or `save` is called.

    Attributes:
        fit: the coefficients, and how close the sum comes to what was asked for.
        files: the snapshots, in the order of the coefficients.
        profile: what the sum remembers: the weight of every moment of the run.
    """

    fit: Fit
    files: tuple[Path, ...]
    profile: Profile = field(repr=False)
    _about: Mapping[str, Any] = field(repr=False)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Parameters that were not trained, and so are not in snapshots."""
        return tuple(self._about["frozen"])

    def weights(
        self, dtype: torch.dtype | None = None, *, progress: Progress | None = None
    ) -> dict[str, Tensor]:
        """The full set, ready for `load_state_dict`: averages and the buffers of that time.

        Parameters that were frozen are not in snapshots, so not here either (`frozen` names them):
        load with `strict=False` into the model that has them.

        Args:
            dtype: of the real averaged tensors, instead of the dtype they were trained in.
            progress: called now and then with elements done and in all.

        Raises:
            ArgumentError: a file that is damaged; a value that the dtype cannot hold.
            FileNotFoundError: a file that is gone by now.
        """
        with self._opened(dtype) as (combination, others):
            tensors = combination.tensors
            made = {n: torch.empty(info.numel, dtype=info.dtype) for n, info in tensors.items()}

            def sink(name: str, start: int, values: Tensor) -> None:
                made[name][start : start + values.numel()] = values

            combination.compute(sink, progress=progress)
        result = {name: tensor.view(tensors[name].shape) for name, tensor in made.items()}
        result |= others
        ties: Mapping[str, str] = self._about["ties"]
        result |= {alias: result[name] for alias, name in ties.items() if name in result}
        return result

    def save(
        self,
        path: Source,
        *,
        dtype: torch.dtype | None = None,
        max_shard_size: int | None = None,
        progress: Progress | None = None,
        group: "ProcessGroup | None" = None,
    ) -> None:
        """Write the full set to a safetensors file, tensor by tensor, whole or not at all.

        Its metadata says which schedule it stands for, how close it is, and from which snapshots.
        Where torch.distributed is initialised all ranks must call this, on a disk that all see:
        each reads and writes its share of the bytes, and the file is the same.

        Args:
            path: a `.safetensors` file, or a folder for shards.
            dtype: of the real averaged tensors, instead of the dtype they were trained in.
            max_shard_size: bytes; more than that is written as several files.
            progress: called now and then with elements done and in all, of this rank.
            group: the ranks that share the work; None for all there are.

        Raises:
            ArgumentError: as for `weights`; a folder that does not exist.
            FileNotFoundError: a snapshot that is gone by now.
            OrderError: a rank is gone.
        """
        self._write(Path(path), dtype, max_shard_size, progress, team_of(group))

    def _write(
        self,
        path: Path,
        dtype: torch.dtype | None = None,
        max_shard_size: int | None = None,
        progress: Progress | None = None,
        team: Team = ALONE,
    ) -> None:
        """`save`, by this process alone unless there is a team."""
        with ExitStack() as stack:
            with team.agreed():
                combination, others = stack.enter_context(self._opened(dtype))
            infos = {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in others.items()}
            tensors = {**combination.tensors, **infos}
            ties = {alias: n for alias, n in self._about["ties"].items() if n in tensors}
            with checkpoint_writer(
                path,
                tensors,
                metadata={"polyak": json.dumps(self._provenance())},
                max_shard_size=max_shard_size,
                aliases=ties,
                team=team,
            ) as writer:
                combination.compute(writer.write, progress=progress, team=team)
                for name, tensor in others.items() if team.leads else ():
                    writer.write(name, 0, tensor.flatten())

    @contextmanager
    def _opened(self, dtype: torch.dtype | None) -> Iterator[tuple[Combination, dict[str, Tensor]]]:
        """The sum of the files that take part, and the buffers, which are small."""
        if dtype is not None:
            check_dtype(dtype)
        with ExitStack() as stack:
            used = self.fit.used
            files = [stack.enter_context(open_checkpoint(self.files[i])) for i in used]
            coefficients = [float(self.fit.coefficients[i]) for i in used]
            newest = files[-1]
            self._check_alike(files)
            live, buffers = set(self._about["live"]), set(self._about["buffers"])
            averaged, others = {}, {}
            for name, info in newest.tensors.items():
                made = TensorInfo(self._dtype_of(name, info, dtype), info.shape)
                if name in live:
                    others[name] = newest.read(name).view(info.shape)
                elif name in buffers:
                    others[name] = _buffer(name, made, files, coefficients)
                elif name not in newest.aliases:
                    averaged[name] = made
            yield (
                Combination(
                    checkpoints=files,
                    labels=[self.files[i].name for i in used],
                    coefficients=coefficients,
                    tensors=averaged,
                    exact=newest,
                ),
                others,
            )

    def _dtype_of(self, name: str, info: TensorInfo, asked: torch.dtype | None) -> torch.dtype:
        trained = getattr(torch, str(self._about["dtypes"].get(name)), None)
        found: torch.dtype = trained if isinstance(trained, torch.dtype) else info.dtype
        return asked if asked is not None and info.dtype.is_floating_point else found

    def _check_alike(self, files: Sequence[Checkpoint]) -> None:
        shapes = {name: info.shape for name, info in files[-1].tensors.items()}
        for file in files:
            theirs = {name: info.shape for name, info in file.tensors.items()}
            if theirs != shapes:
                differing = sorted({n for n, _ in shapes.items() ^ theirs.items()})
                raise MatchError(
                    f"snapshots must be of one model, got {file.path.name} and "
                    f"{files[-1].path.name} that differ in {differing[:3]}. "
                    "Keep one run in a folder."
                )

    def _provenance(self) -> dict[str, Any]:
        fit = self.fit
        return {
            "kind": "reconstructed average",
            "rule": repr(fit.target),
            "now": fit.at,
            "profile_error": fit.error,
            "initial_weight": fit.initial,
            "mean_age": self.profile.mean_age,
            "ties": self._about["ties"],
            "frozen": self._about["frozen"],
            "snapshots": {self.files[i].name: float(fit.coefficients[i]) for i in fit.used},
        }


def _buffer(
    name: str, made: TensorInfo, files: Sequence[Checkpoint], coefficients: Sequence[float]
) -> Tensor:
    """The same sum for a buffer; what was never negative stays above the least it ever was.

    Coefficients have both signs: of a variance that fell a hundredfold the sum can be below zero,
    and its square root is no number.
    """
    wide = torch.promote_types(made.dtype, torch.float64)
    seen = torch.stack([file.read(name).to(wide) for file in files])
    total = torch.tensor(coefficients, dtype=wide) @ seen
    if not wide.is_complex and bool((seen >= 0.0).all()):
        total = torch.maximum(total, seen.amin(dim=0))
    return total.to(made.dtype).view(made.shape)


def reconstruct(
    source: Source | PathLikes,
    schedule: Target,
    *,
    at: float | None = None,
    out: Source | None = None,
    dtype: torch.dtype | None = None,
    max_error: float = MAX_ERROR,
    law: Schedule | None = None,
    steps: Sequence[float] | None = None,
    opaque: Opaque | None = None,
    progress: Progress | None = None,
    group: "ProcessGroup | None" = None,
) -> Reconstruction:
    """Return the average that `schedule` would have given, from averages that were stored.

    The sum of snapshots whose profile, the weight of every moment of the run, is closest to the
    one asked for: least squares over the profiles that really happened, intervals, late starts and
    resumes included (after Karras et al. 2024, section 3, https://arxiv.org/abs/2312.02696).

    Args:
        source: a folder that `Snapshots` wrote; or averages that something else wrote, as a list
            of checkpoint files in any format, with `law`.
        schedule: the average wanted: any schedule, counted from the start of the run, or
            `Tail(length)`, the plain mean of the last `length` of time.
        at: the moment at which it ends, that of a snapshot; the newest unless given. Later
            snapshots are not used.
        out: a file to save the result to.
        dtype: of the saved averaged tensors, instead of the dtype they were trained in.
        max_error: largest relative squared profile error to accept; `math.inf` for any. What the
            snapshots do not resolve is refused, with the nearest length that they do.
        law: the schedule by which the averages in a list of files came about, one update a step
            from step 0, such as `HalfLifeRamp(0.05)`. Plain checkpoints need none of this:
            `polyak.merge` takes any schedule over them.
        steps: training times of a list of files. By default what the files say, else the last
            whole number in each name.
        opaque: the schedule of the snapshots where it was a function, which no file can hold; by
            average where several were.
        progress: called now and then with elements done and in all, while `out` is written.
        group: the ranks that share the work of `out`, as for `Reconstruction.save`.

    Returns:
        The sum, not yet computed: its `fit` says how close it is, `weights()` and `save()` make it.

    Raises:
        ArgumentError: no snapshots, a damaged or foreign file, a moment without a snapshot, a
            length that the snapshots do not resolve.
        MatchError: snapshots of different runs.

    Examples:
        >>> import tempfile, polyak
        >>> model = torch.nn.Linear(2, 1)
        >>> averages = polyak.Averages(
        ...     model,
        ...     {"short": polyak.Power(sigma_rel=0.05), "long": polyak.Power(sigma_rel=0.10)},
        ... )
        >>> folder = tempfile.mkdtemp()
        >>> with polyak.Snapshots(averages, folder, every=10):
        ...     for _ in range(320):
        ...         _ = averages.update()
        >>> found = reconstruct(folder, polyak.Power(sigma_rel=0.15))
        >>> found.fit.error < 1e-4, sorted(found.weights())
        (True, ['bias', 'weight'])
    """
    team = ALONE if out is None else team_of(group)
    with team.agreed():
        run = (
            open_run(source, opaque=opaque)
            if isinstance(source, str | PathLike)
            else _foreign_run(source, law=law, steps=steps)
        )
        if isinstance(source, str | PathLike) and (law is not None or steps is not None):
            raise ArgumentError(
                "law and steps must be left out for a folder of snapshots, which say themselves "
                "how they came about. For files of something else pass them as a list."
            )
        result = run.reconstruct(schedule, at=at, max_error=max_error)
    if out is not None:
        result._write(Path(out), dtype, None, progress, team)
    return result


@final
@dataclass(frozen=True, eq=False)
class Run:
    """Stored averages of one run, ready to answer for any target."""

    files: tuple[Path, ...]
    overlaps: Overlaps
    averages: Mapping[str, Schedule]
    about: Mapping[str, Any]

    @property
    def moments(self) -> list[float]:
        """Times of the snapshots, rising."""
        return sorted({stored.time for stored in self.overlaps.stored})

    @property
    def start(self) -> float:
        """Time at which the run began, on its clock."""
        return self.overlaps.start

    def reconstruct(
        self, schedule: Target, *, at: float | None = None, max_error: float = MAX_ERROR
    ) -> Reconstruction:
        """See `polyak.reconstruct`."""
        at = None if at is None else check_time(at, "at")
        fit = self.overlaps.fit(schedule, at=at, max_error=max_error)
        return Reconstruction(fit, self.files, self.overlaps.profile(fit), self.about)

    def report(self, *, at: float | None = None) -> SnapshotReport:
        """What is there, and which lengths it serves at one of its moments (None: the newest)."""
        size = sum(size_of(path) for path in self.files)
        return serving(self.overlaps, self.averages, size, at=at)


def open_run(directory: Source, *, opaque: Opaque | None = None) -> Run:
    """The run that a folder of snapshots is of; only headers are read.

    Raises:
        ArgumentError: no folder, nothing in it, a file that is no snapshot.
        MatchError: snapshots that are not of one run.
    """
    found = read_folder(Path(directory))
    newest = {file.average: file for file in found}  # they come in the order of time
    for file in found:
        _check_one_run(file, newest[file.average])
        _check_one_run(file, found[-1])
    names = list(newest)
    functions = [name for name, file in newest.items() if file.is_opaque()]
    if len(functions) > 1 and opaque is not None and not isinstance(opaque, Mapping):
        raise ArgumentError(
            f"opaque must be by average, since the schedules of {functions} were functions, got "
            "one. Pass opaque={name: function, …}."
        )
    tracks = [
        Track(newest[n].history, newest[n].schedules(opaque), start=newest[n].about["origin"])
        for n in names
    ]
    stored = [
        Stored(file.now, track=names.index(file.average), storage=file.about["storage"])
        for file in found
    ]
    schedules = {name: newest[name].schedules(opaque)[-1] for name in names}
    files = tuple(file.path for file in found)
    return Run(files, Overlaps(tracks, stored), schedules, found[-1].about)


def _check_one_run(file: Snapshot, newest: Snapshot) -> None:
    """Raise `MatchError` unless the one went on to become the other."""
    if differing := file.differing(newest.shapes):
        found = f"other tensors or shapes, such as {differing[:3]},"
    elif not file.is_of_run(newest):
        found = "another history or schedule"
    else:
        return
    raise MatchError(
        f"snapshots must be of one run, got {file.path.name} with {found} than "
        f"{newest.path.name}. Keep one run in a folder."
    )


def _foreign_run(paths: PathLikes, *, law: Schedule | None, steps: Sequence[float] | None) -> Run:
    """Averages that something else wrote, whose law is known."""
    if law is None:
        raise ArgumentError(
            "law must be the schedule by which the averages in the files came about, got none. "
            "Plain checkpoints are averaged by polyak.merge."
        )
    with open_inputs(paths) as inputs:
        times = steps_of(inputs, steps)
        ties = dict(inputs.aliases)
        storages = [_storage(file) for file in inputs.checkpoints]
    if not all(time.is_integer() and time >= 1.0 for time in times):
        raise ArgumentError(f"steps must be whole numbers from 1 on with law, got {times}.")
    order = sorted(range(len(times)), key=times.__getitem__)
    track = Track(History.from_state([[1, int(max(times)), 0]]), [law])
    stored = [Stored(times[i], storage=storages[i]) for i in order]
    about = {"live": [], "buffers": [], "dtypes": {}, "ties": ties, "frozen": []}
    files = tuple(Path(paths[i]) for i in order)
    return Run(files, Overlaps([track], stored), {"average": law}, about)


def _storage(file: Checkpoint) -> Storage:
    """The narrowest dtype in a file: its rounding is what limits the fit."""
    names = {str(info.dtype).removeprefix("torch.") for info in file.tensors.values()}
    narrowest: tuple[Storage, ...] = ("bfloat16", "float16", "float32")
    return next((name for name in narrowest if name in names), "float64")
