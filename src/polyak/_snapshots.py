"""Averages written to disk as training goes, so that their length can be chosen afterwards."""

import json
import math
import re
import shutil
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

import torch
from torch import Tensor

from . import _kernels as kernels
from ._average import Average, Averages
from ._checks import check_dtype, is_count
from ._engine import Engine
from ._errors import (
    ArgumentError,
    AveragingWarning,
    MatchError,
    OrderError,
    frames_to_the_user,
    show_time,
)
from ._files import ALONE, Team, team_among, write_tensors
from ._fit import plan
from ._folder import (
    FORMAT,
    Snapshot,
    size_of,
    snapshot_name,
    snapshots_in,
    storage_of,
    thinned,
)
from ._identities import schedule_state
from ._ranks import mesh_of_average
from ._roles import Entry
from ._schedules import After, Schedule
from ._serving import SnapshotReport, serving
from ._sharding import Part, part_of, plain
from ._state import tensor_state

_WIDER = {4: torch.float32, 8: torch.float64}  # by bytes of an element


@dataclass(frozen=True)
class _Taken:
    """One average as it was at a moment.

    Args:
        path: where it goes.
        tensors: on the host; what this rank holds of them.
        parts: where that lies in the whole; None for all of it.
        shapes: of the whole averaged tensors.
        about: what is said of it.
    """

    path: Path
    tensors: dict[str, Tensor]
    parts: Mapping[str, Part | None]
    shapes: Mapping[str, tuple[int, ...]]
    about: Mapping[str, Any]


@final
class Snapshots:
    """Write averages to a folder as training goes: with them any length can be had afterwards.

    A snapshot is taken at the first update at or after each multiple of `every`, counted from the
    time at which the averages were built: they are copied at once, in half precision, and written
    by a thread while training goes on. Each file is an ordinary safetensors file of one average
    that says when and by which updates it came about; `polyak.reconstruct` combines them into the
    average that any other schedule would have given.

    Take two averages, `Power(sigma_rel=0.05)` and `Power(sigma_rel=0.10)`: the error of what is
    reconstructed falls with the fourth power of the number of snapshots, with one average alone
    with the second (Karras et al. 2024, section 3, https://arxiv.org/abs/2312.02696). Some 32 to
    64 in a run serve lengths from 3 to 25 % of it.

    Of averages that are spread over ranks (FSDP2, tensor parallel, `shard=`) every rank makes one
    of these, with the same arguments, and updates alike. A snapshot is then a folder of
    torch.distributed.checkpoint: each rank copies and writes what it holds, nothing is gathered.
    They talk over a gloo group of their own, from the thread; in a torch without gloo they write
    before training goes on. A run may go on with another number of ranks in the same folder.

    Args:
        averages: what to write, an `Average` or `Averages`.
        directory: where, for all ranks; made if need be. One folder holds one run: to go on with a
            run, load its averages first. Runs are told apart by names, shapes, schedules and the
            times of their updates; take a folder of its own for each seed. What the averages had
            not yet reached when they were saved moves to the subfolder `superseded`: training takes
            it again.
        every: time between snapshots, in the unit of the clock.
        dtype: of real floating tensors in the files. A tensor with values that float16 cannot hold
            is written in float32, on all ranks if it is so on one; complex ones are complex64, the
            widest of the format.
        keep: hold at most so many moments, at least 4: when there are more, those are removed that
            leave the rest nearest to evenly spaced. None keeps all.

    Raises:
        ArgumentError: a value out of range; a folder that cannot be made.
        MatchError: a folder of another run; ranks that ask for different things.
        OrderError: averages that never ran, and a folder that is not empty.

    Examples:
        >>> import tempfile
        >>> import polyak
        >>> model = torch.nn.Linear(2, 1)
        >>> averages = Averages(
        ...     model,
        ...     {"short": polyak.Power(sigma_rel=0.05), "long": polyak.Power(sigma_rel=0.10)},
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Snapshots(averages, folder, every=10) as snapshots:
        ...         for _ in range(40):
        ...             _ = averages.update()
        ...     snapshots.moments
        [10, 20, 30, 40]
    """

    def __init__(
        self,
        averages: Average | Averages,
        directory: str | PathLike[str],
        *,
        every: float,
        dtype: torch.dtype = torch.float16,
        keep: int | None = None,
    ) -> None:
        self._members = _members(averages)
        if isinstance(every, bool) or not (isinstance(every, int | float) and 0 < every < math.inf):
            raise ArgumentError(f"every must be above 0 and finite, got {every!r}.")
        check_dtype(dtype)
        storage_of(dtype)  # refuses what has no known rounding
        if keep is not None and not (is_count(keep) and keep >= 4):
            raise ArgumentError(
                f"keep must be a whole number of moments, at least 4, got {keep!r}."
            )
        self.directory = Path(directory)
        self.every, self.dtype, self.keep = every, dtype, keep
        self._engine = next(iter(self._members.values()))._engine
        self._writer: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []  # what is being written, at most one
        weakref.finalize(self, _tell_what_is_lost, self._pending)
        self._team, self._behind = _team(self._engine)
        try:
            self._check_ranks_agree()
            self._files = self._opened(updates=self._engine.updates)
        except BaseException:
            self._team.close()
            raise
        self._jumps = self._engine.jumps
        # A moment that was lost with the process is taken at the next update.
        self._taken_at = max(self._moments(), default=self._engine.now)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="polyak-snapshots")
        self._engine.watchers[id(self)] = self._after_update

    # ── what people call ─────────────────────────────────────────────────────────────────────────

    @property
    def moments(self) -> list[float]:
        """Times at which a snapshot in the folder was taken, rising."""
        self.flush()
        return self._moments()

    def _moments(self) -> list[float]:
        return sorted({file.now for file in self._files})

    @property
    def stored_bytes(self) -> int:
        """Size of all files, once they are written."""
        self.flush()
        return sum(size_of(file.path) for file in self._files)

    def plan(self, until: float) -> SnapshotReport:
        """What the folder will hold at time `until`: lengths, errors and disk, before it is spent.

        Args:
            until: the end of the run, on the clock of the averages.

        Raises:
            ArgumentError: an end before the first snapshot.
        """
        if isinstance(until, bool) or not isinstance(until, int | float) or not until < math.inf:
            raise ArgumentError(f"until must be a finite number, got {until!r}.")
        origin = self._engine.origin
        first = self._multiples_by(self._taken_at) + 1
        last = self._multiples_by(until)
        times = self._kept([origin + self.every * index for index in range(first, last + 1)])
        if not times:
            raise ArgumentError(
                f"until must be at or after {show_time(origin + self.every)}, the first snapshot, "
                f"got {until!r}."
            )
        schedules = {name: member.schedule for name, member in self._members.items()}
        overlaps = plan(
            list(schedules.values()),
            times=[time - origin for time in times],
            interval=_interval(schedules.values(), self.every),
            storage=storage_of(self.dtype),
        )
        size = len(times) * len(schedules) * self._bytes_each()
        return serving(overlaps, schedules, size, start=origin)

    def _kept(self, coming: Iterable[float]) -> list[float]:
        """The moments that stay when those to come have come, one after the other."""
        moments = self.moments
        for time in coming:
            moments.append(time)
            if self.keep is not None:
                moments = thinned(moments, self.keep, start=self._engine.origin)
        return moments

    def _bytes_each(self) -> int:
        """Size of one file, but for its header and tensors that need float32."""
        averaged = sum(
            entry.live().numel() * (8 if entry.live().is_complex() else self.dtype.itemsize)
            for entry in self._engine.entries
        )
        live = (entry.live() for entry in self._live_buffers())
        return averaged + sum(tensor.numel() * tensor.itemsize for tensor in live)

    def take(self) -> None:
        """Take a snapshot of the averages as they are, whatever the time; on all ranks.

        Raises:
            OrderError: before the first update; after `close`; ranks that are not at one moment.
            OSError: the snapshot before could not be written, by this rank or by another.
        """
        self.flush()
        if self._writer is None:
            raise OrderError("take must come before close, got it after. Open new Snapshots.")
        engine = self._engine
        engine.settle()
        if not engine.updates:
            raise OrderError("take must come after the first update, got it before.")
        taken = self._copied()
        self._taken_at = engine.now
        if self._behind:
            self._pending.append(self._writer.submit(self._write, taken))
        else:
            self._write(taken)

    def flush(self) -> None:
        """Wait until all that was taken is on disk; raise what went wrong there."""
        if self._pending:
            written = self._pending[0]
            try:
                written.result()
            finally:
                if written.done():  # else this was interrupted, and what comes of it is not known
                    self._pending.clear()

    def close(self) -> None:
        """Take no more; wait for what was taken. A `with` block does it at its end."""
        self._engine.watchers.pop(id(self), None)
        writer, self._writer = self._writer, None
        try:
            self.flush()
        finally:
            if writer is not None:
                writer.shutdown()
                self._team.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        """One line: the folder and what it holds."""
        return (
            f"<Snapshots {str(self.directory)!r} every={self.every} "
            f"averages={list(self._members)} moments={len(self.moments)}>"
        )

    # ── inside ───────────────────────────────────────────────────────────────────────────────────

    def _check_ranks_agree(self) -> None:
        """Raise unless all ranks will take the same snapshots at the same updates."""
        engine = self._engine
        told = self._team.gathered(
            {
                "averages": list(self._members),
                "(now, updates)": (engine.now, engine.updates),
                "every": self.every,
                "dtype": str(self.dtype),
                "keep": self.keep,
            }
        )
        for name, ours in told[0].items():
            if others := [theirs[name] for theirs in told if theirs[name] != ours]:
                raise MatchError(
                    f"{name} must be the same on every rank, got {ours} and {others[0]}. Build the "
                    "averages, load them and make Snapshots alike on all ranks."
                )

    def _opened(self, *, updates: int) -> list[Snapshot]:
        """The folder's files of this run, after all of it was checked.

        Args:
            updates: how many the averages had when they came to this folder.
        """
        return self._team.first(lambda: self._found(updates))

    def _found(self, updates: int) -> list[Snapshot]:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(
                f"directory must be a folder that can be made, got {str(self.directory)!r} "
                f"({error.strerror})."
            ) from error
        found = snapshots_in(self.directory)
        if not found:
            return []
        if not updates:
            raise OrderError(
                "directory must be empty for averages that never ran or were reset, got "
                f"{len(found)} snapshots in {str(self.directory)!r}. To go on with that run, load "
                "its averages first; for a new run take a new folder."
            )
        for file in found:
            self._check_same_run(file)
        ahead = [file for file in found if file.now > self._engine.now]
        for file in ahead:
            aside = self.directory / "superseded"
            aside.mkdir(exist_ok=True)
            _remove(aside / file.path.name)
            file.path.replace(aside / file.path.name)
        return [file for file in found if file not in ahead]

    def _check_same_run(self, file: Snapshot) -> None:
        if file.average not in self._members:
            found = f"an average {file.average!r}, which is not among {list(self._members)}"
        elif differing := file.differing(self._shapes()):
            found = f"other tensors or shapes, such as {differing[:3]}"
        elif not file.is_of_run(Snapshot.of(file.path, self._about(file.average), {})):
            found = f"another history or schedule than that of {file.average!r}"
        else:
            return
        raise MatchError(
            f"directory must be empty or of this run, got {file.path.name} with {found}. "
            "Take a new folder, or load the averages that the folder belongs to."
        )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {entry.name: tuple(entry.live().shape) for entry in self._engine.entries}

    def _after_update(self) -> None:
        """Take a snapshot when a multiple of `every` has been passed."""
        engine = self._engine
        if engine.jumps != self._jumps:  # a reset or a load: another way leads on from here
            self.flush()
            self._files = self._opened(updates=engine.updates - 1)
            self._jumps = engine.jumps
            self._taken_at = engine.now - engine.history.runs[-1][0]
        if self._multiples_by(engine.now) > self._multiples_by(self._taken_at):
            engine.settle()  # the step may turn out to have been skipped on the device
            if self._multiples_by(engine.now) > self._multiples_by(self._taken_at):
                self.take()

    def _multiples_by(self, time: float) -> int:
        """Multiples of `every` up to `time`; 0.3 is three times 0.1, whatever floats say."""
        return math.floor((time - self._engine.origin) / self.every * (1.0 + 1e-12) + 1e-12)

    @torch.no_grad()
    def _copied(self) -> list[_Taken]:
        """Copies on the host of what this rank holds of each average, and what to say of them."""
        with self._team.agreed():
            taken = [self._taken(name) for name in self._members]
        self._widen(taken)
        return taken

    def _taken(self, name: str) -> _Taken:
        engine = self._engine
        values = tensor_state(engine, engine.values(self._members[name]._row), copies=False)
        tensors = {n: kernels.narrowed(plain(value), self.dtype) for n, value in values.items()}
        for entry in self._live_buffers():
            lent = {} if engine.loan is None else engine.loan.live
            values[entry.name] = lent.get(entry.name, entry.live())
            tensors[entry.name] = plain(values[entry.name]).cpu().clone()
        return _Taken(
            self.directory / snapshot_name(name, engine.now, spread=self._team is not ALONE),
            tensors,
            {n: part_of(value) for n, value in values.items()},
            self._shapes(),
            self._about(name),
        )

    def _widen(self, taken: list[_Taken]) -> None:
        """Give each tensor one dtype on all ranks, the widest that any of its parts needs.

        Raises:
            OrderError: on all ranks, when they are not at the same update.
        """
        engine = self._engine
        ours = [bytes(tensor.itemsize for tensor in one.tensors.values()) for one in taken]
        told = self._team.gathered(((engine.now, engine.updates), ours))
        clocks = {clock for clock, _ in told}
        if len(clocks) > 1:
            raise OrderError(
                "snapshots must be taken of one moment on all ranks, got (now, updates) = "
                f"{sorted(clocks)}. Call update on every rank after every step."
            )
        for index, (one, member) in enumerate(zip(taken, self._members.values(), strict=True)):
            widest = [max(row) for row in zip(*(sizes[index] for _, sizes in told), strict=True)]
            values = engine.values(member._row)
            for (name, tensor), width in zip(list(one.tensors.items()), widest, strict=True):
                if tensor.itemsize < width:
                    source = plain(values[engine.slots[name]])
                    one.tensors[name] = source.to("cpu", _WIDER[width], copy=True)

    def _live_buffers(self) -> list[Entry]:
        """What a checkpoint needs beside the averages, and what is small."""
        return [entry for entry in self._engine.inventory.entries if _is_live_buffer(entry)]

    def _about(self, name: str) -> dict[str, Any]:
        """What a snapshot says of itself."""
        engine = self._engine
        row = engine.rows[self._members[name]._row]
        return {
            "kind": "snapshot",
            "format": FORMAT,
            "average": name,
            "storage": storage_of(self.dtype),
            "schedule": schedule_state(row.schedule),
            "past": list(row.past),
            "origin": engine.origin,
            "now": engine.now,
            "updates": engine.updates,
            "history": engine.history.state(),
            "dtypes": {
                entry.name: str(entry.live().dtype).removeprefix("torch.")
                for entry in engine.entries
            },
            "buffers": [entry.name for entry in engine.entries if entry.kind == "buffer"],
            "live": sorted(entry.name for entry in self._live_buffers()),
            "ties": {alias: e.name for e in engine.inventory.entries for alias in e.aliases},
            "frozen": [
                e.name
                for e in engine.inventory.entries
                if e.role == "live" and e.persistent and not _is_live_buffer(e)
            ],
        }

    def _write(self, taken: list[_Taken]) -> None:
        for one in taken:
            self._write_one(one)
            new = Snapshot.of(one.path, one.about, one.shapes)
            old = [f for f in self._files if (f.average, f.now) == (new.average, new.now)]
            self._drop([file for file in old if file.path != new.path])
            self._files = [file for file in self._files if file.path != new.path]
            self._files.append(new)
        if self.keep is not None:
            stay = set(thinned(self._moments(), self.keep, start=self._engine.origin))
            self._drop([file for file in self._files if file.now not in stay])

    def _write_one(self, one: _Taken) -> None:
        words = json.dumps(one.about)
        if self._team is ALONE:
            write_tensors(one.path, one.tensors, {"polyak": words})
            return
        from ._files._pieces import write_pieces  # it brings torch.distributed.checkpoint

        write_pieces(one.path, one.tensors, one.parts, words=words, team=self._team)

    def _drop(self, files: list[Snapshot]) -> None:
        """Remove snapshots from the folder."""

        def remove() -> None:
            for file in files:
                _remove(file.path)

        if files:
            self._team.first(remove)
        self._files = [file for file in self._files if file not in files]


def _tell_what_is_lost(pending: Sequence[Future[None]]) -> None:
    """Called when the `Snapshots` are gone, at the end of the process at the latest."""

    def tell(written: Future[None]) -> None:
        if error := written.exception():
            warnings.warn(
                f"Snapshots: the last one could not be written: {error}. Call close() at the end, "
                "or use them in a with block: either raises this.",
                AveragingWarning,
                stacklevel=frames_to_the_user(),
            )

    for future in pending:
        future.add_done_callback(tell)


def _team(engine: Engine) -> tuple[Team, bool]:
    """The ranks that write together, and whether they can while training goes on."""
    mesh = mesh_of_average(engine)
    return (ALONE, True) if mesh is None else team_among(mesh.mesh.flatten().tolist())


def _remove(path: Path) -> None:
    """Remove a snapshot, if it is there; a folder gives up its name before its contents."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    aside = path.with_name(f".{path.name}.gone")
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed here
    path.rename(aside)
    shutil.rmtree(aside)


def _members(averages: object) -> dict[str, Average]:
    if isinstance(averages, Average):
        if not averages._alone:
            raise ArgumentError(
                "averages must be the whole Averages, got one member. Pass the Averages."
            )
        return {"average": averages}
    if not isinstance(averages, Averages):
        raise ArgumentError(
            f"averages must be a polyak.Average or Averages, got {type(averages).__name__}."
        )
    name_rule = r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,99}"
    bad = [name for name in averages if not re.fullmatch(name_rule, name)]
    if bad:
        raise ArgumentError(
            f"averages must have names that can be file names, got {bad[:3]}. "
            "Use up to 100 letters, digits, '_', '-', '+' and '.'."
        )
    return dict(averages)


def _is_live_buffer(entry: Entry) -> bool:
    """Whether it is a live buffer, or an integer among named tensors: not a frozen weight."""
    if entry.role != "live" or not entry.persistent:
        return False
    return entry.kind == "buffer" or (
        entry.kind == "tensor" and not entry.live().is_floating_point()
    )


def _interval(schedules: Iterable[Schedule], every: float) -> float:
    """Time between two updates to plan with: coarse, but whole steps for what counts steps."""
    coarse, step = every / 256, 0.0
    for schedule in schedules:
        while isinstance(schedule, After):
            schedule = schedule.schedule
        step = max(step, getattr(schedule, "unit", 0.0))
    return step * max(1, math.floor(coarse / step)) if step else coarse
