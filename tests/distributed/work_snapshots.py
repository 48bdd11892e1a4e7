"""What the tests of snapshots of sharded averages run on ranks."""

import errno
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spread import LAYOUTS, tensors_of, train
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import polyak
from polyak._files import _pieces
from ranks import count_collectives

SCHEDULES = {"short": polyak.Power(sigma_rel=0.1), "long": polyak.Power(sigma_rel=0.2)}


def averages_of(layout: str) -> tuple[nn.Module, polyak.Averages]:
    """A model laid out that way and its averages; those of replicas are cut among the ranks."""
    model = LAYOUTS[layout].net()
    train(tensors_of(model), 0)
    cut = dist.group.WORLD if layout.startswith("replicas") else None
    return model, polyak.Averages(model, SCHEDULES, shard=cut)


def train_on(model: nn.Module, averages: polyak.Averages, first: int, last: int) -> None:
    for step in range(first, last + 1):
        train(tensors_of(model), step)
        averages.update()


def writes(layout: str, folder: Path) -> list[float]:
    """A run of 40 updates with a snapshot after every ten; the moments that are left."""
    model, averages = averages_of(layout)
    with polyak.Snapshots(averages, folder, every=10) as snapshots:
        train_on(model, averages, 1, 40)
        return snapshots.moments


def writes_often(folder: Path) -> list[float]:
    """40 updates, a snapshot after every five, four of which may stay."""
    model, averages = averages_of("fsdp-2")
    with polyak.Snapshots(averages, folder, every=5, keep=4) as snapshots:
        train_on(model, averages, 1, 40)
        return snapshots.moments


def goes_on(layout: str, folder: Path, state: Path, first: int, last: int) -> list[float]:
    """Part of a run: from the state of the part before, if there is one, to a state of its own."""
    model, averages = averages_of(layout)
    if state.exists():
        polyak.load_checkpoint(averages, state)
    with polyak.Snapshots(averages, folder, every=10) as snapshots:
        train_on(model, averages, first, last)
        moments = snapshots.moments
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the state of the part before is written over
        save(averages.state_dict(), checkpoint_id=state)
    return moments


def goes_on_after_more(folder: Path, state: Path) -> tuple[list[float], list[float]]:
    """A state of step 20, training until 40, and again from 20; the moments each time."""
    model, averages = averages_of("fsdp-2")
    with polyak.Snapshots(averages, folder, every=10) as snapshots:
        train_on(model, averages, 1, 20)
        save(averages.state_dict(), checkpoint_id=state)
        train_on(model, averages, 21, 40)
        before = snapshots.moments
    polyak.load_checkpoint(averages, state)
    with polyak.Snapshots(averages, folder, every=10) as snapshots:
        return before, snapshots.moments


def large_on_one_rank(folder: Path) -> None:
    """A value that float16 cannot hold, in the last row: on the last rank only."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.ones(5, 3)
    whole[-1, -1] = 1e6
    live = {"large": distribute_tensor(whole, mesh, [Shard(0)]), "small": torch.ones(3)}
    average = polyak.Average(live)
    with polyak.Snapshots(average, folder, every=1):
        average.update()


def sends_only_at_snapshots(folder: Path) -> tuple[int, int]:
    """Collectives of nine updates without a snapshot, and of the one with it."""
    model, averages = averages_of("fsdp-2")
    with polyak.Snapshots(averages, folder, every=10):
        with count_collectives() as before:
            train_on(model, averages, 1, 9)
        with count_collectives() as at:
            averages.update()
    return before.total, at.total


def copies_at_once(folder: Path) -> None:
    """What is written is what the average was when it was taken, though it goes on meanwhile."""
    model, averages = averages_of("fsdp-2")
    written, went_on = [], Event()

    def slow(*args: Any, **options: Any) -> Any:
        assert went_on.wait(30.0), "training must not wait for the disk"
        written.append(averages.updates)
        return save(*args, **options)

    pytest.MonkeyPatch().setattr(_pieces, "save", slow)
    with polyak.Snapshots(averages, folder, every=10):
        train_on(model, averages, 1, 19)
        went_on.set()
    assert written == [19, 19]


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────


def disk_is_full_on_one_rank(folder: Path) -> tuple[str, list[float], list[float]]:
    """Rank 1 cannot write at 20: the error, the time it came, and the moments at the end."""
    model, averages = averages_of("fsdp-2")
    patch, original = pytest.MonkeyPatch(), FileSystemWriter.write_data

    def full(self: Any, *args: Any) -> Any:
        patch.undo()
        if dist.get_rank() == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *args)

    with polyak.Snapshots(averages, folder, every=10) as snapshots:
        train_on(model, averages, 1, 10)
        snapshots.flush()
        patch.setattr(FileSystemWriter, "write_data", full)
        with pytest.raises(OSError, match="No space left") as raised:
            train_on(model, averages, 11, 40)
        at = averages.now
        snapshots.take()
        train_on(model, averages, 31, 40)
        return str(raised.value), [at], snapshots.moments


def killed(rank: int, when: str, folder: Path) -> str:
    """One rank is killed while the snapshot of 20 is written; what the others are told."""
    model, averages = averages_of("fsdp-3")

    def dies(*args: Any, **options: Any) -> Any:
        if dist.get_rank() == rank and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        done = save(*args, **options)
        if dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    snapshots = polyak.Snapshots(averages, folder, every=10)
    train_on(model, averages, 1, 11)
    snapshots.flush()
    pytest.MonkeyPatch().setattr(_pieces, "save", dies)
    train_on(model, averages, 12, 20)
    with pytest.raises(polyak.OrderError, match="one that is gone") as raised:
        snapshots.flush()
    return str(raised.value)


def refused(case: str, folder: Path) -> str:
    """What every rank is told."""
    model, averages = averages_of("fsdp-2")
    odd = dist.get_rank() == 1

    def other_interval() -> None:
        polyak.Snapshots(averages, folder, every=11 if odd else 10)

    def other_moment() -> None:
        snapshots = polyak.Snapshots(averages, folder, every=10)
        train_on(model, averages, 1, 3 if odd else 2)
        snapshots.take()

    def folder_of_another_run() -> None:
        writes("fsdp-2", folder)
        polyak.Snapshots(averages, folder, every=10)

    def damaged_average() -> None:
        snapshots = polyak.Snapshots(averages, folder, every=10)
        averages.update()
        if odd:
            averages["long"]._engine.rows[1].damage = "a test broke it"
        snapshots.take()

    cases: dict[str, Callable[[], None]] = {
        "other interval": other_interval,
        "other moment": other_moment,
        "folder of another run": folder_of_another_run,
        "damaged average": damaged_average,
    }
    with pytest.raises(polyak.AveragingError) as raised:
        cases[case]()
    return f"{type(raised.value).__name__}: {raised.value}"
