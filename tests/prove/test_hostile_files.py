"""20,000 damaged checkpoints do no harm, and 50 killed writers leave nothing half-written."""

import itertools
import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import polyak
from files.hostile import (
    Case,
    check,
    colliding,
    dcp_cases,
    index_cases,
    limited_memory,
    repeated_call,
    safetensors_cases,
    torch_cases,
    wide_views,
    with_program,
)
from polyak._files import TensorInfo, checkpoint_writer, open_checkpoint

EACH = 1_250  # cases of one of four formats and one of four seeds


def cases(format: str, folder: Path, seed: int, count: int) -> tuple[Iterator[Case], Path]:
    """Cases of a format in a folder of their own, and what none of them may create."""
    canary, inner = folder / "canary", folder / "inner"
    inner.mkdir()
    if format == "safetensors":
        return safetensors_cases(inner, seed, count), canary
    if format == "index":
        return index_cases(inner, seed, count), canary
    if format == "torch":
        return torch_cases(inner, seed, count, canary), canary
    return dcp_cases(inner, seed, count, canary), canary


@pytest.mark.prove
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
@pytest.mark.parametrize("format", ["safetensors", "index", "torch", "dcp"])
def test_no_damaged_file_does_harm(format: str, seed: int, tmp_path: Path) -> None:
    """No crash, no hang, no memory, no executed pickle, no other file, no wrong tensor."""
    damaged, canary = cases(format, tmp_path, seed, EACH)
    refused = sum(check(case, canary) for case in damaged)
    print(f"{format}: {EACH} cases, {refused} refused, {EACH - refused} read and right")
    assert EACH // 4 < refused < EACH


@pytest.mark.prove
@pytest.mark.parametrize(
    "make",
    [
        lambda: wide_views(100_000),
        lambda: with_program(repeated_call(b"collections\nOrderedDict", b"l", 100_000)),
        lambda: with_program(repeated_call(b"torch\nSize", b"t", 100_000)),
        lambda: with_program(colliding(100_000)),
    ],
)
def test_a_file_that_asks_for_much_is_refused(make: Callable[[], bytes], tmp_path: Path) -> None:
    """Linear in its own bytes: a second for a megabyte, and memory of a small multiple."""
    path = tmp_path / "a.pt"
    path.write_bytes(make())
    size = path.stat().st_size
    begin = time.process_time()
    with limited_memory(2**26 + 64 * size), pytest.raises(polyak.ArgumentError):
        open_checkpoint(path)
    seconds = time.process_time() - begin
    print(f"{size / 2**20:.1f} MiB refused in {seconds:.2f} s")
    assert seconds < 1 + size / 2**20


# ── killed while writing ─────────────────────────────────────────────────────────────────────────

KILLS = 50
LONGEST = 0.3  # seconds of writing before a kill: several rounds of the two writes
SHAPES = {"a": (400_000,), "b": (300, 1_000), "c": ()}


def write_for_ever(folder: Path) -> None:
    """Write one file and one sharded folder again and again, each time all of one number."""
    tensors = {name: TensorInfo(torch.float32, shape) for name, shape in SHAPES.items()}
    for round in itertools.count():
        for path, limit in ((folder / "one.safetensors", None), (folder / "many", 1_300_000)):
            with checkpoint_writer(
                path, tensors, metadata={}, max_shard_size=limit, force=True
            ) as writer:
                for name, info in tensors.items():
                    for start in range(0, info.numel, 50_000):
                        stop = min(start + 50_000, info.numel)
                        writer.write(name, start, torch.full((stop - start,), float(round)))


def fork_writer(folder: Path) -> int:
    """A process that writes until it is killed; a fork, for its torch is imported already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that this fork has not
        pid = os.fork()
    if pid == 0:
        try:
            write_for_ever(folder)
        finally:
            os._exit(1)
    return pid


def check_whole(path: Path) -> bool:
    """Whether the checkpoint is there; if so, it has every element of one round."""
    if not path.exists():
        return False
    with open_checkpoint(path) as checkpoint:
        assert {n: info.shape for n, info in checkpoint.tensors.items()} == SHAPES
        values = torch.cat([checkpoint.read(name) for name in SHAPES])
    assert (values == values[0]).all()
    return True


@pytest.mark.prove
def test_a_killed_writer_leaves_nothing_half_written(tmp_path: Path) -> None:
    """SIGKILL at random moments: under the final names all of a round, or nothing."""
    pick = random.Random(7)
    unfinished = there = 0
    for _ in range(KILLS):
        pid = fork_writer(tmp_path)
        time.sleep(pick.uniform(0, LONGEST))  # the moment is random; nothing is waited for
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "the writer ended by itself"
        there += check_whole(tmp_path / "one.safetensors") + check_whole(tmp_path / "many")
        unfinished += any(path.name.startswith(".") for path in tmp_path.iterdir())
    print(f"{KILLS} kills, {unfinished} left temporary files, {there} whole checkpoints checked")
    assert unfinished >= KILLS // 5
    assert there >= KILLS
