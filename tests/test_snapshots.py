"""Snapshots: the averages of a moment on disk, at the moments that were promised, and no others."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

import polyak
from polyak import _snapshots
from polyak._files import write_tensors
from polyak._folder import thinned
from polyak._posthoc import open_run
from zoo import ZOO, Animal, train_step

PAIR = {"short": polyak.Power(sigma_rel=0.05), "long": polyak.Power(sigma_rel=0.10)}


def walk(size: int = 8) -> dict[str, Tensor]:
    return {"w": torch.zeros(size, dtype=torch.float64)}


def train(
    averages: polyak.Averages | polyak.Average, live: Mapping[str, Tensor], times: Sequence[float]
) -> None:
    """One update at each time, of weights that are a function of it and of nothing else."""
    for now in times:
        for tensor in live.values():
            tensor.copy_(torch.sin(now * torch.arange(1.0, 1.0 + tensor.numel())))
        averages.update(now=now)


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and what the file says of itself, read by the library of the format."""
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["polyak"])


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def moments_on_disk(folder: Path) -> list[float]:
    return sorted({contents(path)[1]["now"] for path in folder.glob("*.safetensors")})


# ── when ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("origin", [0, 3, 1_000_000, -7])
@pytest.mark.parametrize(
    ("every", "times", "taken"),
    [
        (1, [1, 2, 3], [1, 2, 3]),
        (4, [1, 2, 3, 4, 5, 7, 8, 9, 12], [4, 8, 12]),
        (4, [3, 6, 7, 9, 17, 18, 19, 20], [6, 9, 17, 20]),
        (10, [9.5, 10.5, 19.0, 40.0, 49.0, 50.0], [10.5, 40.0, 50.0]),
        (0.5, [0.25, 0.5, 0.75, 1.25], [0.5, 1.25]),
        (2_048, [512 * i for i in range(1, 13)], [2_048, 4_096, 6_144]),
    ],
)
def test_taken_at_the_first_update_at_or_after_each_multiple(
    every: float, times: list[float], taken: list[float], origin: int, tmp_path: Path
) -> None:
    """Of the time since construction; several multiples at once give one snapshot."""
    live = walk()
    average = polyak.Average(live, polyak.Uniform(), now=origin)
    with polyak.Snapshots(average, tmp_path, every=every) as snapshots:
        train(average, live, [origin + time for time in times])
        assert snapshots.moments == [origin + time for time in taken]
    assert moments_on_disk(tmp_path) == [origin + time for time in taken]
    assert open_run(tmp_path).moments == [origin + time for time in taken]


@pytest.mark.parametrize("origin", [0, 7])
def test_tenths_are_counted_as_people_count_them(origin: int, tmp_path: Path) -> None:
    """0.1 is no binary fraction: 0.3 is three tenths all the same, and so is a sum of tenths."""
    live = walk()
    average = polyak.Average(live, polyak.Uniform(), now=origin)
    with polyak.Snapshots(average, tmp_path, every=0.1) as snapshots:
        now: float = origin
        times = []
        for _ in range(60):  # every other update is at a multiple
            now += 0.05
            times.append(now)
        train(average, live, times)
        assert snapshots.moments == times[1::2]


def test_an_update_while_following_counts_and_takes(tmp_path: Path) -> None:
    """Samples as the clock, an update every third step: the first one at or after each 100."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averages = polyak.Averages(model, PAIR)
    seen = 0
    averages.follow(optimizer, every=3, now=lambda: seen)
    with polyak.Snapshots(averages, tmp_path, every=100) as snapshots:
        for _ in range(30):  # updates at 48, 96, 144, ..., 480
            seen += 16
            optimizer.zero_grad()
            model(torch.ones(4, 2)).sum().backward()
            optimizer.step()
        assert snapshots.moments == [144, 240, 336, 432]


def test_a_step_that_was_skipped_on_the_device_takes_no_snapshot(tmp_path: Path) -> None:
    """The files are those of a run without the skipped steps, bit for bit, and so are the times."""
    skips = [0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    for name, steps in (("with", skips), ("without", [0.0] * skips.count(0.0))):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        average = polyak.Average(model, polyak.Power(sigma_rel=0.1))
        average.follow(optimizer)
        with polyak.Snapshots(average, tmp_path / name, every=4) as snapshots:
            for skip in steps:
                optimizer.zero_grad()
                model(torch.ones(1, 3)).sum().backward()
                optimizer.found_inf = torch.tensor(skip)  # type: ignore[attr-defined]
                optimizer.grad_scale = None  # type: ignore[attr-defined]
                optimizer.step()
                del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
            assert snapshots.moments == [4, 8]
    assert listing(tmp_path / "with") == listing(tmp_path / "without")


def test_a_second_folder_and_closing_one_do_not_disturb_each_other(tmp_path: Path) -> None:
    live = walk()
    averages = polyak.Averages(live, PAIR)
    with polyak.Snapshots(averages, tmp_path / "often", every=10) as often:
        with polyak.Snapshots(averages, tmp_path / "rarely", every=25) as rarely:
            train(averages, live, range(1, 61))
        train(averages, live, range(61, 81))
        assert rarely.moments == [25, 50]
        assert often.moments == list(range(10, 81, 10))


def test_take_writes_at_once_and_the_next_multiple_still_comes(tmp_path: Path) -> None:
    live = walk()
    averages = polyak.Averages(live, PAIR)
    with polyak.Snapshots(averages, tmp_path, every=10) as snapshots:
        with pytest.raises(polyak.OrderError, match="after the first update"):
            snapshots.take()
        train(averages, live, range(1, 14))
        snapshots.take()
        snapshots.take()  # the same moment again is the same files
        assert snapshots.moments == [10, 13]
        train(averages, live, range(14, 21))
        assert snapshots.moments == [10, 13, 20]
        assert len(list(tmp_path.iterdir())) == 6


# ── what ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("animal", ZOO, ids=lambda animal: animal.name)
def test_files_hold_the_averages_rounded_once_and_the_buffers(
    animal: Animal, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Averages in `dtype`; integer buffers as they are; frozen and spare tensors not at all."""
    model, generator = animal.build(), torch.Generator().manual_seed(0)
    averages = polyak.Averages(model, PAIR)
    with polyak.Snapshots(averages, tmp_path, every=2, dtype=dtype):
        for _ in range(2):
            train_step(model, animal.inputs(), generator)
            averages.update()
    buffers = dict(model.named_buffers(remove_duplicate=False))
    kept = {name for name in animal.live if name in buffers and name not in animal.spare}
    for name, member in averages.items():
        tensors, about = contents(tmp_path / f"{name}-000000000002.safetensors")
        assert set(tensors) == animal.averaged | kept
        for key in animal.averaged:
            stored = member.tensors[key]
            if stored.is_complex():
                assert tensors[key].dtype == torch.complex64  # the widest of safetensors
                assert torch.equal(tensors[key], stored.to(tensors[key].dtype))
            else:
                assert torch.equal(tensors[key], stored.to(dtype))
                assert tensors[key].dtype == dtype
        for key in kept:
            assert torch.equal(tensors[key], buffers[key])
        assert (about["average"], about["now"], about["updates"]) == (name, 2, 2)


def test_named_tensors_bring_their_integers(tmp_path: Path) -> None:
    """The full set is what `weights()` gives: a counter beside the weights belongs to it."""
    live = {"w": torch.zeros(3), "seen": torch.tensor(7)}
    average = polyak.Average(live)
    with polyak.Snapshots(average, tmp_path, every=1):
        average.update()
    tensors, _ = contents(tmp_path / "average-000000000001.safetensors")
    assert set(tensors) == set(average.weights()) == {"w", "seen"}
    assert tensors["seen"].item() == 7


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (1.0, torch.float16),
        (60_000.0, torch.float16),
        (70_000.0, torch.float32),
        (-1e30, torch.float32),
        (1e-3, torch.float16),
        (1e-7, torch.float32),
        (1e-30, torch.float32),
        (1e39, torch.float64),
    ],
)
def test_what_float16_cannot_hold_is_stored_wider_by_tensor(
    value: float, stored: torch.dtype, tmp_path: Path
) -> None:
    """Large values and small ones alike, without making the other tensors larger."""
    live = {"odd": torch.full((5,), value, dtype=torch.float64), "plain": torch.full((5,), 0.3)}
    average = polyak.Average(live, polyak.Uniform())
    with polyak.Snapshots(average, tmp_path, every=1):
        average.update()
    tensors, _ = contents(tmp_path / "average-000000000001.safetensors")
    assert tensors["odd"].dtype == stored
    assert tensors["plain"].dtype == torch.float16
    error = (tensors["odd"].double() - average.tensors["odd"].double()).norm()
    assert float(error / average.tensors["odd"].double().norm()) < 2.0**-11


def test_averages_are_copied_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while the disk is slow; what is written is what was there at the time."""
    slow, write = threading.Event(), write_tensors

    def waits(*args: Any) -> None:
        assert slow.wait(60)
        write(*args)

    monkeypatch.setattr(_snapshots, "write_tensors", waits)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    averages = polyak.Averages(model, PAIR)
    for dtype in (torch.float16, torch.float32):
        folder = tmp_path / str(dtype)
        slow.clear()
        with polyak.Snapshots(averages, folder, every=1_000, dtype=dtype) as snapshots:
            model(torch.randn(8, 3))
            averages.update()
            expected = {name: dict(member.weights()) for name, member in averages.items()}
            now = averages.now
            snapshots.take()
            assert not list(folder.glob("*.safetensors"))
            for _ in range(5):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.normal_()
                model(torch.randn(8, 3))
                averages.update()
            slow.set()
        for name, weights in expected.items():
            tensors, _ = contents(folder / f"{name}-{now:012d}.safetensors")
            for key, value in weights.items():
                kept = value.to(dtype) if value.is_floating_point() else value
                assert torch.equal(tensors[key], kept), key


def test_inside_applied_the_files_are_those_of_outside(tmp_path: Path) -> None:
    """Lent or not, and whichever of them is lent: the average's values, the trained buffers."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    averages = polyak.Averages(model, PAIR)
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        model(torch.randn(8, 3))
        averages.update()
    with polyak.Snapshots(averages, tmp_path / "outside", every=100) as snapshots:
        snapshots.take()
    for name in PAIR:
        with (
            averages[name].applied(),
            polyak.Snapshots(averages, tmp_path / name, every=100) as snapshots,
        ):
            model.train()
            model(torch.randn(8, 3))  # moves the buffers of the lent model
            snapshots.take()
        assert listing(tmp_path / name) == listing(tmp_path / "outside")


# ── when the disk will not ───────────────────────────────────────────────────────────────────────


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, *, after: int) -> Iterator[None]:
    """Writing of the file number `after` breaks off, and of all later ones."""
    write, done = write_tensors, iter(range(1_000))

    def fails(path: Path, *args: Any) -> None:
        if next(done) < after:
            return write(path, *args)
        monkeypatch.setattr("polyak._files._atomic._sync", raises)
        try:
            write(path, *args)
        finally:
            monkeypatch.undo()
            monkeypatch.setattr(_snapshots, "write_tensors", fails)

    def raises(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_snapshots, "write_tensors", fails)
    yield
    monkeypatch.undo()


def test_a_wait_that_is_interrupted_forgets_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a snapshot is being written: what comes of it is raised at the next wait."""
    live = walk()
    averages = polyak.Averages(live, PAIR)
    snapshots = polyak.Snapshots(averages, tmp_path, every=10)
    interrupted = threading.Event()

    def full(*_: object) -> None:
        assert interrupted.wait(60)
        raise OSError("No space left on device")

    monkeypatch.setattr("polyak._snapshots.write_tensors", full)
    train(averages, live, range(1, 11))
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        snapshots.flush()
    interrupted.set()
    with pytest.raises(OSError, match="No space left"):
        snapshots.close()


def test_a_last_snapshot_that_is_lost_is_told_at_the_end_of_the_process(tmp_path: Path) -> None:
    """Nobody called close, so no call could raise it; the exit code is the script's."""
    code = (
        "import sys, torch, polyak\n"
        "averages = polyak.Averages({'w': torch.zeros(3)}, {'a': polyak.Uniform()})\n"
        "snapshots = polyak.Snapshots(averages, sys.argv[1], every=1)\n"
        "def full(*_): raise OSError(28, 'No space left on device')\n"
        "polyak._snapshots.write_tensors = full\n"
        "averages.update()\n"
        "print('trained')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.returncode) == ("trained\n", 0)
    assert "AveragingWarning: Snapshots: the last one could not be written" in done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("call", ["update", "take", "flush", "moments", "close"])
def test_an_error_of_the_writer_is_raised_at_the_next_call(
    call: str, first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once; nothing is half-written, and snapshots go on when there is room again."""
    live = walk()
    averages = polyak.Averages(live, PAIR)
    snapshots = polyak.Snapshots(averages, tmp_path, every=10)
    calls: dict[str, Callable[[], object]] = {
        "update": lambda: train(averages, live, range(13, 21)),  # none is taken before 20
        "take": snapshots.take,
        "flush": snapshots.flush,
        "moments": lambda: snapshots.moments,
        "close": snapshots.close,
    }
    with full_disk(monkeypatch, after=first):
        train(averages, live, range(1, 13))
        while not snapshots._pending[0].done():
            pass
    with pytest.raises(OSError, match="No space left"):
        calls[call]()
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith("ensors")] == []
    for path in tmp_path.iterdir():
        contents(path)
    if call == "close":
        return
    train(averages, live, range(int(averages.now) + 1, 41))
    assert 40 in snapshots.moments
    assert snapshots.moments == moments_on_disk(tmp_path)
    snapshots.close()


def test_an_update_that_reports_a_failed_write_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is the disk's: the average is the one of a run without snapshots."""
    results: list[tuple[float, Tensor]] = []
    for broken in (True, False):
        live = walk()
        averages = polyak.Averages(live, PAIR)
        snapshots = polyak.Snapshots(averages, tmp_path / str(broken), every=10)
        if broken:
            with full_disk(monkeypatch, after=0):
                train(averages, live, range(1, 13))
                with pytest.raises(OSError, match="No space"):
                    train(averages, live, range(13, 25))
        else:
            train(averages, live, range(1, int(results[0][0]) + 1))
        snapshots.close()
        results.append((averages.now, averages["short"].tensors["w"].clone()))
    assert results[0][0] == results[1][0] == 20
    assert torch.equal(results[0][1], results[1][1])


def test_a_folder_that_was_removed_is_an_error_at_the_next_call(tmp_path: Path) -> None:
    live = walk()
    averages = polyak.Averages(live, PAIR)
    snapshots = polyak.Snapshots(averages, tmp_path / "run", every=10)
    train(averages, live, range(1, 11))
    snapshots.flush()
    shutil.rmtree(tmp_path / "run")
    train(averages, live, range(11, 21))
    with pytest.raises((polyak.AveragingError, OSError), match="run"):
        snapshots.flush()
    assert not (tmp_path / "run").exists()
    snapshots.close()


def test_a_block_that_raises_writes_what_was_taken_and_raises_its_own(tmp_path: Path) -> None:
    live = walk()
    averages = polyak.Averages(live, PAIR)
    snapshots = polyak.Snapshots(averages, tmp_path, every=10)

    def breaks_off() -> None:
        with snapshots:
            train(averages, live, range(1, 21))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks_off()
    assert snapshots.moments == moments_on_disk(tmp_path) == [10, 20]
    train(averages, live, range(21, 31))  # closed: nothing more
    assert moments_on_disk(tmp_path) == [10, 20]


def test_close_is_harmless_twice_and_take_after_it_is_refused(tmp_path: Path) -> None:
    live = walk()
    average = polyak.Average(live)
    snapshots = polyak.Snapshots(average, tmp_path, every=10)
    train(average, live, range(1, 11))
    snapshots.close()
    snapshots.close()
    with pytest.raises(polyak.OrderError, match="before close"):
        snapshots.take()
    assert snapshots.moments == [10]
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert snapshots.stored_bytes == size > 0


def test_an_interpreter_that_ends_writes_what_was_taken(tmp_path: Path) -> None:
    """Without close, by the end of the script or by an exception; the last one included."""
    code = (
        "import sys, torch, polyak\n"
        "live = {'w': torch.zeros(200_000)}\n"
        "averages = polyak.Averages(live, {'a': polyak.Uniform(), 'b': polyak.Power(gamma=1)})\n"
        "snapshots = polyak.Snapshots(averages, sys.argv[1], every=1)\n"
        "for _ in range(5):\n"
        "    averages.update()\n"
        "raise SystemExit(7)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (7, "")
    assert moments_on_disk(tmp_path / "run") == [1, 2, 3, 4, 5]
    assert len(list((tmp_path / "run").iterdir())) == 10


@pytest.mark.prove
def test_a_process_killed_while_it_writes_leaves_whole_files_only(tmp_path: Path) -> None:
    """SIGKILL at ten moments; every file under a final name is whole and right."""
    code = (
        "import sys, torch, polyak\n"
        "live = {'w': torch.zeros(2_000_000)}\n"
        "averages = polyak.Averages(live, {'a': polyak.Uniform(), 'b': polyak.Power(gamma=1)})\n"
        "snapshots = polyak.Snapshots(averages, sys.argv[1], every=1)\n"
        "for step in range(1, 100_000):\n"
        "    live['w'].fill_(step / 64)\n"
        "    averages.update()\n"
        "    print(step, flush=True)\n"
    )
    unfinished = 0
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        with subprocess.Popen(
            [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) == 5 + attempt:
                    break
            threading.Event().wait(0.003 * attempt)  # the moment is to be anywhere
            os.kill(process.pid, signal.SIGKILL)
        unfinished += any(".partial" in path.name for path in folder.iterdir())
        assert len(open_run(folder).files) >= 2 * (3 + attempt)
        for path in folder.glob("a-*.safetensors"):
            tensors, about = contents(path)
            mean = sum(range(1, about["updates"] + 1)) / about["updates"] / 64
            assert torch.equal(tensors["w"], torch.full((2_000_000,), mean).half())
    assert unfinished  # the kills did fall into the writing of a file


# ── to go on with a run ──────────────────────────────────────────────────────────────────────────


def test_a_resumed_run_has_the_files_of_one_that_never_stopped(tmp_path: Path) -> None:
    """Saved at 25, stopped at 47: the moments after 25 are set aside and taken again."""
    live = walk()
    averages = polyak.Averages(live, PAIR)
    with polyak.Snapshots(averages, tmp_path / "straight", every=10):
        train(averages, live, range(1, 81))

    averages = polyak.Averages(live, PAIR)
    with polyak.Snapshots(averages, tmp_path / "resumed", every=10):
        train(averages, live, range(1, 26))
        state = {"state": averages.state_dict()}
        torch.save(state, tmp_path / "last.pt")
        train(averages, live, range(26, 48))
    ahead = {name: bits for name, bits in listing(tmp_path / "resumed").items() if "30" in name}

    averages = polyak.Averages(live, PAIR)
    averages.load_state_dict(torch.load(tmp_path / "last.pt", weights_only=True)["state"])
    with polyak.Snapshots(averages, tmp_path / "resumed", every=10) as snapshots:
        assert snapshots.moments == [10, 20]
        aside = listing(tmp_path / "resumed" / "superseded")
        assert len(aside) == 4
        assert {name: aside[name] for name in ahead} == ahead
        train(averages, live, range(26, 81))
        assert snapshots.moments == list(range(10, 81, 10))
    shutil.rmtree(tmp_path / "resumed" / "superseded")
    for ours, theirs in zip(
        sorted((tmp_path / "resumed").iterdir()),
        sorted((tmp_path / "straight").iterdir()),
        strict=True,
    ):
        assert ours.name == theirs.name
        (a, about), (b, wanted) = contents(ours), contents(theirs)
        assert torch.equal(a["w"], b["w"])
        assert about == wanted


def test_a_resume_at_a_snapshot_takes_it_no_second_time_and_loses_none(tmp_path: Path) -> None:
    live = walk()
    averages = polyak.Averages(live, PAIR)
    with polyak.Snapshots(averages, tmp_path, every=10):
        train(averages, live, range(1, 31))
    state = averages.state_dict()
    again = polyak.Averages(live, PAIR)
    again.load_state_dict(state)
    before = listing(tmp_path)
    with polyak.Snapshots(again, tmp_path, every=10) as snapshots:
        assert listing(tmp_path) == before
        train(again, live, range(31, 41))
        assert snapshots.moments == [10, 20, 30, 40]


def test_a_moment_that_was_lost_is_taken_at_the_next_update(tmp_path: Path) -> None:
    """Saved at 30, killed before the files of 30 were written: 31 stands in for it."""
    live = walk()
    averages = polyak.Averages(live, PAIR)
    with polyak.Snapshots(averages, tmp_path, every=10):
        train(averages, live, range(1, 31))
    for path in tmp_path.glob("*30.safetensors"):
        path.unlink()
    again = polyak.Averages(live, PAIR)
    again.load_state_dict(averages.state_dict())
    with polyak.Snapshots(again, tmp_path, every=10) as snapshots:
        train(again, live, range(31, 46))
        assert snapshots.moments == [10, 20, 31, 40]


def other_names() -> polyak.Averages:
    live = {"v": torch.zeros(8, dtype=torch.float64)}
    averages = polyak.Averages(live, PAIR)
    train(averages, live, range(1, 31))
    return averages


def more_names() -> polyak.Averages:
    live = walk() | {"v": torch.zeros(8)}
    averages = polyak.Averages(live, PAIR)
    train(averages, live, range(1, 31))
    return averages


def other_schedule() -> polyak.Averages:
    live = walk()
    averages = polyak.Averages(live, {**PAIR, "short": polyak.Power(sigma_rel=0.06)})
    train(averages, live, range(1, 31))
    return averages


def other_history() -> polyak.Averages:
    live = walk()
    averages = polyak.Averages(live, PAIR)
    train(averages, live, [*range(1, 7), *range(8, 31)])
    return averages


def other_origin() -> polyak.Averages:
    live = walk()
    averages = polyak.Averages(live, PAIR, now=1)
    train(averages, live, range(2, 32))
    return averages


def other_averages() -> polyak.Averages:
    live = walk()
    averages = polyak.Averages(live, {"brief": PAIR["short"], "long": PAIR["long"]})
    train(averages, live, range(1, 31))
    return averages


def one_average() -> polyak.Average:
    live = walk()
    average = polyak.Average(live, PAIR["short"])
    train(average, live, range(1, 31))
    return average


def never_ran() -> polyak.Averages:
    return polyak.Averages(walk(), PAIR)


def other_shape() -> polyak.Averages:
    live = walk(9)
    averages = polyak.Averages(live, PAIR)
    train(averages, live, range(1, 31))
    return averages


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (other_names, "other tensors"),
        (more_names, "other tensors"),
        (other_shape, "w"),
        (other_schedule, "another history or schedule"),
        (other_history, "another history or schedule"),
        (other_origin, "another history or schedule"),
        (other_averages, "'long', which is not among|'short', which is not among"),
        (one_average, "which is not among"),
        (never_ran, "must be empty for averages that never ran"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_untouched(
    build: Callable[[], Any], says: str, tmp_path: Path
) -> None:
    live = walk()
    averages = polyak.Averages(live, PAIR)
    with polyak.Snapshots(averages, tmp_path, every=10):
        train(averages, live, range(1, 51))
    before = listing(tmp_path)
    others = build()
    with pytest.raises(polyak.AveragingError, match=says):
        polyak.Snapshots(others, tmp_path, every=10)
    assert listing(tmp_path) == before
    assert not (tmp_path / "superseded").exists()
    others.update()  # and nobody watches
    assert listing(tmp_path) == before


@pytest.mark.parametrize("damage", ["text", "truncated", "plain", "pickled"])
def test_a_folder_with_a_file_that_is_no_snapshot_is_refused(damage: str, tmp_path: Path) -> None:
    live = walk()
    averages = polyak.Averages(live, PAIR)
    with polyak.Snapshots(averages, tmp_path, every=10):
        train(averages, live, range(1, 31))
    path = tmp_path / "long-000000000020.safetensors"
    if damage == "text":
        path.write_text("a note")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "plain":
        polyak.save(averages["long"], path)
    else:
        torch.save({"w": torch.zeros(8)}, path)
    before = listing(tmp_path)
    with pytest.raises(polyak.AveragingError, match=path.name):
        polyak.Snapshots(averages, tmp_path, every=10)
    assert listing(tmp_path) == before


def test_going_back_to_an_earlier_state_while_open_sets_the_later_moments_aside(
    tmp_path: Path,
) -> None:
    """A spike at 35, so back to 20 and on with other data: no file of the abandoned way stays."""
    live = walk()
    averages = polyak.Averages(live, PAIR)
    with polyak.Snapshots(averages, tmp_path, every=10, dtype=torch.float64) as snapshots:
        train(averages, live, range(1, 21))
        torch.save(averages.state_dict(), tmp_path / "last.pt")
        for now in range(21, 46):  # the same times, other weights
            live["w"].fill_(1e6)
            averages.update(now=now)
        averages.load_state_dict(torch.load(tmp_path / "last.pt", weights_only=True))
        train(averages, live, range(21, 66))
        assert snapshots.moments == [10, 20, 30, 40, 50, 60]
    for path in tmp_path.glob("*.safetensors"):
        tensors, _ = contents(path)
        assert float(tensors["w"].abs().max()) < 2.0, path.name


def test_a_state_loaded_while_open_that_is_of_another_run_spoils_no_folder(tmp_path: Path) -> None:
    """What is in the folder afterwards is of one run; the call that would mix two is refused."""
    live = walk()
    averages, others = polyak.Averages(live, PAIR), polyak.Averages(live, PAIR)
    train(others, live, range(2, 51, 2))
    snapshots = polyak.Snapshots(averages, tmp_path, every=10)
    train(averages, live, range(1, 31))
    snapshots.flush()
    before = listing(tmp_path)
    averages.load_state_dict(others.state_dict())
    with pytest.raises(polyak.AveragingError, match="run"):
        train(averages, live, range(51, 71))
    assert listing(tmp_path) == before
    snapshots.close()


def test_a_reset_while_open_spoils_no_folder(tmp_path: Path) -> None:
    """A reset begins another run, which needs another folder; this one can still be read."""
    live = walk()
    averages = polyak.Averages(live, PAIR)
    snapshots = polyak.Snapshots(averages, tmp_path, every=10)
    train(averages, live, range(1, 31))
    snapshots.flush()
    before = listing(tmp_path)
    averages.reset()
    with pytest.raises(polyak.AveragingError):
        train(averages, live, range(31, 51))
    assert listing(tmp_path) == before
    snapshots.close()
    assert open_run(tmp_path).moments == [10, 20, 30]


@pytest.mark.parametrize("changed", [("short", "long"), ("short",), ("long",)])
def test_a_schedule_changed_on_the_way_is_in_the_files(
    changed: tuple[str, ...], tmp_path: Path
) -> None:
    """Files from before and after the change are of one run, and each profile is what happened."""
    live = walk(40)
    new = {"short": polyak.Exponential(half_life=8), "long": polyak.Exponential(half_life=25)}
    later = {name: new[name] if name in changed else PAIR[name] for name in PAIR}
    averages = polyak.Averages(live, PAIR)
    with polyak.Snapshots(averages, tmp_path, every=10, dtype=torch.float64):
        train(averages, live, range(1, 46))
        state = averages.state_dict()
    averages = polyak.Averages(live, later)
    averages.load_state_dict(state, schedule="replace")
    with polyak.Snapshots(averages, tmp_path, every=10, dtype=torch.float64) as snapshots:
        assert snapshots.moments == [10, 20, 30, 40]
        train(averages, live, range(46, 101))

    run = open_run(tmp_path)
    moments = torch.stack([torch.sin(t * torch.arange(1.0, 41.0)) for t in range(1, 101)]).double()
    for index, path in enumerate(run.files):
        tensors, about = contents(path)
        fit = run.overlaps.fit(PAIR["short"], max_error=math.inf, at=about["now"])
        one = torch.zeros(len(run.files), dtype=torch.float64).numpy()
        one[index] = 1.0
        weights = torch.from_numpy(run.overlaps._pieces.sum_of(one))
        rebuilt = weights[1:] @ moments[: len(weights) - 1]
        torch.testing.assert_close(rebuilt, tensors["w"], rtol=0, atol=1e-12)
        assert fit.at == about["now"]


# ── not more than `keep` of them ─────────────────────────────────────────────────────────────────


def gaps(moments: Sequence[float]) -> list[float]:
    return [late - early for early, late in pairwise(moments)]


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=80),
    st.integers(4, 20),
    st.sampled_from([1, 0.1, 1e6]),
    st.sampled_from([0.0, 1e5]),
)
def test_thinning_keeps_the_newest_and_never_more_than_it_may(
    steps: list[int], keep: int, unit: float, start: float
) -> None:
    """Of any moments: a part of them in order, the newest among them, and not fewer than needed."""
    moments, now = [], start
    for step in steps:
        now += step * unit
        moments.append(now)
    left = thinned(moments, keep)
    assert left == sorted(set(left) & set(moments))
    assert left[-1] == moments[-1]
    assert len(left) <= keep
    if len(moments) <= keep:
        assert left == moments


@pytest.mark.parametrize("origin", [0, 37, 10_000])
@pytest.mark.parametrize("keep", [4, 7, 16, 33])
@pytest.mark.parametrize("step", [1, 7, 13, 60, 99])
def test_what_stays_is_near_to_evenly_spaced(keep: int, step: int, origin: int) -> None:
    """At all times of a run of 300 snapshots, thinned as they come, however the clock ticks.

    No gap, that to the start included, is wider than three times the even spacing of `keep`.
    """
    every, held = 100, list[float]()
    for multiple in range(1, 301):
        moment = origin + math.ceil(multiple * every / step) * step
        held = thinned([*held, moment], keep)
        assert held[-1] == moment
        assert len(held) <= keep
        widest = max(gaps([origin, *held]))
        assert widest <= 3.0 * max(moment - origin, keep * every) / keep, (multiple, held)


def test_a_moment_taken_by_hand_does_not_undo_the_spacing() -> None:
    """`take()` a little after a regular moment, over and over: still no wide gap."""
    held = list[float]()
    for multiple in range(1, 201):
        for moment in (100.0 * multiple, 100.0 * multiple + 1 + multiple % 7):
            held = thinned([*held, moment], 16)
            assert len(held) <= 16
            widest = max(gaps([0.0, *held]))
            assert widest <= 3.0 * max(moment, 1_600.0) / 16, held


def test_thinning_takes_no_time_where_two_moments_are_close() -> None:
    """A clock of tokens and a snapshot by hand one token after another: no walk over the gap."""

    def too_long(signum: int, frame: object) -> None:
        raise AssertionError("thinning walks over the whole run in steps of the closest two")

    moments = [1e12 * k / 64 for k in range(1, 65)]
    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, 5.0)
    try:
        left = thinned([*moments, moments[-1] + 1], 32)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert len(left) <= 32
    assert max(gaps(left)) <= 3e12 / 32


@pytest.mark.parametrize("keep", [8, 20, 40])
def test_a_thinned_folder_serves_what_was_planned(keep: int, tmp_path: Path) -> None:
    """The moments that were foreseen, their files and no others, and the errors within 1 %."""
    live = walk()
    averages = polyak.Averages(live, PAIR)
    with polyak.Snapshots(averages, tmp_path, every=10, keep=keep) as snapshots:
        planned = snapshots.plan(960)
        for last in range(100, 961, 86):
            train(averages, live, range(int(averages.now) + 1, last + 1))
            assert snapshots.moments[-1] == last // 10 * 10
            assert len(snapshots.moments) <= keep
            assert moments_on_disk(tmp_path) == snapshots.moments
        assert tuple(snapshots.moments) == planned.moments
    assert len(list(tmp_path.iterdir())) == 2 * len(planned.moments)
    real = open_run(tmp_path).report()
    assert real.moments == planned.moments
    for (sigma, wanted), (_, found) in zip(planned.errors, real.errors, strict=True):
        assert found == pytest.approx(wanted, rel=1e-2), sigma
    assert tuple(snapshots.plan(960).moments) == planned.moments  # nothing more will be taken


# ── before it is spent ───────────────────────────────────────────────────────────────────────────


def slow_power(*, now: float, elapsed: float) -> float:
    return (1.0 - elapsed / now) ** 9


SCHEDULES: dict[str, dict[str, polyak.Schedule]] = {
    "power": dict(PAIR),
    "exponential": {n: polyak.Exponential(half_life=h) for n, h in (("a", 60), ("b", 200))},
    "late": {n: polyak.After(75, s) for n, s in PAIR.items()},
    "counted": {"a": polyak.CountRamp(0.99), "b": polyak.InverseGamma(power=2 / 3)},
    "ramps": {"a": polyak.ExponentialRamp(0.995, tau=300), "b": polyak.Polynomial(8)},
    "half-life": {"a": polyak.HalfLifeRamp(0.05), "b": polyak.HalfLifeRamp(0.1, half_life=90)},
    "function": {"a": slow_power, "b": polyak.Power(sigma_rel=0.05)},
    "one": {"a": polyak.Power(sigma_rel=0.05)},
}


@pytest.mark.parametrize("origin", [0, 500])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_plan_is_the_report_of_the_run_that_follows(
    name: str, origin: int, tmp_path: Path
) -> None:
    """Moments, errors within 1 %, bytes within 5 % but for headers; also from half-way on."""
    live = {"w": torch.zeros(20_000), "b": torch.zeros(7)}
    averages = polyak.Averages(live, SCHEDULES[name], now=origin)
    opaque = slow_power if name == "function" else None
    with polyak.Snapshots(averages, tmp_path, every=50) as snapshots:
        plans = [snapshots.plan(origin + 1_640)]
        train(averages, live, range(origin + 1, origin + 825))
        plans.append(snapshots.plan(origin + 1_640))
        train(averages, live, range(origin + 825, origin + 1_641))
        plans.append(snapshots.plan(origin + 1_640))
        stored = snapshots.stored_bytes
    real = open_run(tmp_path, opaque=opaque).report()
    assert real.stored_bytes == stored == sum(p.stat().st_size for p in tmp_path.iterdir())
    for planned in plans:
        assert planned.moments == real.moments == tuple(snapshots.moments)
        assert planned.averages == real.averages
        assert planned.stored_bytes == pytest.approx(real.stored_bytes, rel=0.05)
        for (sigma, wanted), (_, found) in zip(planned.errors, real.errors, strict=True):
            assert wanted == pytest.approx(found, rel=1e-2, abs=1e-9), sigma
        ends = (planned.shortest, real.shortest), (planned.longest, real.longest)
        for ours, theirs in ends:
            assert ours == (None if theirs is None else pytest.approx(theirs, rel=0.05))


def test_a_plan_counts_wide_tensors_and_buffers(tmp_path: Path) -> None:
    """Disk for complex numbers, double precision, integers and a dtype of one's own."""
    for animal in ZOO:
        model, generator = animal.build(), torch.Generator().manual_seed(0)
        average = polyak.Average(model, polyak.Uniform())
        for dtype in (torch.float16, torch.float32, torch.float64):
            folder = tmp_path / animal.name / str(dtype)
            with polyak.Snapshots(average, folder, every=1, dtype=dtype) as snapshots:
                planned = snapshots.plan(average.now + 1)
                train_step(model, animal.inputs(), generator)
                average.update()
                path = next(iter(folder.parent.glob("*/*.safetensors")), None)
                snapshots.flush()
                path = next(folder.glob("*.safetensors"))
            header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
            assert path.stat().st_size - header == planned.stored_bytes, (animal.name, dtype)


@pytest.mark.parametrize("until", [0, 9.9, -5, math.nan, math.inf, "100"])
def test_a_plan_without_an_end_is_refused(until: Any, tmp_path: Path) -> None:
    with polyak.Snapshots(polyak.Average(walk()), tmp_path, every=10) as snapshots:
        with pytest.raises(polyak.ArgumentError, match="until must be"):
            snapshots.plan(until)
        assert snapshots.plan(10).moments == (10,)


# ── values that make no sense ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"every": 0}, "every must be above 0"),
        ({"every": -1}, "every must be above 0"),
        ({"every": math.nan}, "every must be above 0"),
        ({"every": math.inf}, "every must be above 0"),
        ({"every": True}, "every must be above 0"),
        ({"every": "10"}, "every must be above 0"),
        ({"dtype": torch.int32}, "dtype must be"),
        ({"dtype": torch.float8_e4m3fn}, "dtype must be"),
        ({"dtype": "float16"}, "dtype must be"),
        ({"keep": 3}, "keep must be"),
        ({"keep": 0}, "keep must be"),
        ({"keep": 8.0}, "keep must be"),
        ({"keep": True}, "keep must be"),
    ],
)
def test_values_out_of_range_are_refused_and_no_folder_is_made(
    changed: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(polyak.ArgumentError, match=says):
        polyak.Snapshots(polyak.Average(walk()), tmp_path / "run", **{"every": 10, **changed})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "build",
    [
        lambda: polyak.Window(walk(), 4),
        lambda: polyak.Averages(walk(), PAIR)["short"],
        lambda: nn.Linear(2, 1),
        lambda: polyak.Averages(walk(), {"a/b": polyak.Uniform()}),
        lambda: polyak.Averages(walk(), {"..": polyak.Uniform()}),
        lambda: polyak.Averages(walk(), {"": polyak.Uniform()}),
        lambda: polyak.Averages(walk(), {"a\n": polyak.Uniform()}),
        lambda: polyak.Averages(walk(), {"a" * 300: polyak.Uniform()}),
    ],
    ids=["window", "member", "model", "slash", "dots", "empty", "newline", "long"],
)
def test_what_is_no_average_with_a_name_for_a_file_is_refused(
    build: Callable[[], Any], tmp_path: Path
) -> None:
    with pytest.raises(polyak.ArgumentError, match="averages must"):
        polyak.Snapshots(build(), tmp_path / "run", every=10)
    assert not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(polyak.ArgumentError, match="directory must be"):
            polyak.Snapshots(polyak.Average(walk()), path, every=10)


def test_the_folder_may_hold_other_things(tmp_path: Path) -> None:
    """Logs and checkpoints in other formats are nobody's business."""
    (tmp_path / "log.txt").write_text("hello")
    (tmp_path / "last.pt").write_bytes(b"0")
    live = walk()
    averages = polyak.Averages(live, PAIR)
    with polyak.Snapshots(averages, tmp_path, every=10) as snapshots:
        train(averages, live, range(1, 21))
        assert "moments=2" in repr(snapshots)
        assert str(tmp_path) in repr(snapshots)
    assert (tmp_path / "log.txt").read_text() == "hello"
    assert open_run(tmp_path).moments == [10, 20]
