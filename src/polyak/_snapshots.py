"""Averages written to disk as training goes, so that their length can be chosen afterwards."""

import json
import math
import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

import torch
from torch import Tensor

from . import _kernels as kernels
from ._average import Average, Averages
from ._engine import check_dtype, is_count
from ._errors import ArgumentError, MatchError, OrderError, show_time
from ._files import write_tensors
from ._fit import plan
from ._folder import FORMAT, Snapshot, read_folder, snapshot_name, storage_of, thinned
from ._identities import schedule_state
from ._roles import Entry
from ._schedules import After, Schedule
from ._serving import SnapshotReport, serving
from ._state import tensor_state


@final
class Snapshots:
    """Write averages to a folder as training goes: with them any length can be had afterwards.

    A snapshot is taken at the first update at or after each multiple of `every`: the averages are
    copied at once, in half precision, and written by a thread while training goes on. Each file is
    an ordinary safetensors file of one average that says when and by which updates it came about;
    `polyak.reconstruct` combines them into the average that any other schedule would have given.

    Take two averages, `Power(sigma_rel=0.05)` and `Power(sigma_rel=0.10)`: the error of what is
    reconstructed falls with the fourth power of the number of snapshots, with one average alone
    with the second (Karras et al. 2024, section 3, https://arxiv.org/abs/2312.02696). Some 32 to
    64 in a run serve lengths from 3 to 25 % of it.

    Args:
        averages: what to write, an `Average` or `Averages`.
        directory: where; made if need be. One folder holds one run: to go on with a run, load its
            averages first. Runs are told apart by names, shapes, schedules and the times of their
            updates; take a folder of its own for each seed. What the averages had not yet reached
            when they were saved moves to the subfolder `superseded`: training takes it again.
        every: time between snapshots, in the unit of the clock.
        dtype: of real floating tensors in the files. A tensor with values that float16 cannot hold
            is written in float32; complex ones are complex64, the widest of the format.
        keep: hold at most so many moments, at least 4: when there are more, those are removed that
            leave the rest nearest to evenly spaced. None keeps all.

    Raises:
        ArgumentError: a value out of range; a folder that cannot be made.
        MatchError: a folder of another run.
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
        self._pending: Future[None] | None = None
        self._files = self._opened(updates=self._engine.updates)
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
        return sum(file.path.stat().st_size for file in self._files)

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
        """Take a snapshot of the averages as they are, whatever the time.

        Raises:
            OrderError: before the first update; after `close`.
            OSError: the snapshot before could not be written.
        """
        self.flush()
        if self._writer is None:
            raise OrderError("take must come before close, got it after. Open new Snapshots.")
        engine = self._engine
        engine.settle()
        if not engine.updates:
            raise OrderError("take must come after the first update, got it before.")
        taken = [
            (self.directory / snapshot_name(name, engine.now), *self._copied(name))
            for name in self._members
        ]
        self._taken_at = engine.now
        self._pending = self._writer.submit(self._write, taken)

    def flush(self) -> None:
        """Wait until all that was taken is on disk; raise what went wrong there."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Take no more; wait for what was taken. A `with` block does it at its end."""
        self._engine.watchers.pop(id(self), None)
        writer, self._writer = self._writer, None
        try:
            self.flush()
        finally:
            if writer is not None:
                writer.shutdown()

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

    def _opened(self, *, updates: int) -> list[Snapshot]:
        """The folder's files of this run, after all of it was checked.

        Args:
            updates: how many the averages had when they came to this folder.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(
                f"directory must be a folder that can be made, got {str(self.directory)!r} "
                f"({error.strerror})."
            ) from error
        found = read_folder(self.directory) if any(self.directory.glob("*.safetensors")) else []
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
    def _copied(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies on the host of one average and of the live buffers, and what to say of them."""
        engine = self._engine
        values = tensor_state(engine, engine.values(self._members[name]._row), copies=False)
        tensors = {name: kernels.narrowed(value, self.dtype) for name, value in values.items()}
        for entry in self._live_buffers():
            lent = {} if engine.loan is None else engine.loan.live
            tensors[entry.name] = lent.get(entry.name, entry.live()).detach().cpu().clone()
        return tensors, self._about(name)

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

    def _write(self, taken: list[tuple[Path, dict[str, Tensor], dict[str, Any]]]) -> None:
        for path, tensors, about in taken:
            write_tensors(path, tensors, {"polyak": json.dumps(about)})
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            self._files = [file for file in self._files if file.path != path]
            self._files.append(Snapshot.of(path, about, shapes))
        if self.keep is not None:
            stay = set(thinned(self._moments(), self.keep, start=self._engine.origin))
            for file in [file for file in self._files if file.now not in stay]:
                with suppress(FileNotFoundError):
                    file.path.unlink()
                self._files.remove(file)


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
