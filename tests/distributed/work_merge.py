"""What the tests of merging on several ranks run on them."""

import os
import signal
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import polyak
from polyak import cli
from polyak._files._checkpoint import Checkpoint
from polyak._files._writer import Writer


def merges(paths: Sequence[Path], out: Path, options: dict[str, Any]) -> tuple[int, int]:
    """Merge; the elements that this rank has read of averaged tensors, and has written."""
    read, wrote = list[int](), list[int]()  # appended to: threads would lose some of a sum
    original, writes = Checkpoint.read, Writer.write

    def counted_read(
        self: Checkpoint, name: str, start: int = 0, stop: int | None = None
    ) -> Tensor:
        values = original(self, name, start, stop)
        read.append(values.numel() if values.dtype.is_floating_point else 0)
        return values

    def counted_write(self: Writer, name: str, start: int, values: Tensor) -> None:
        writes(self, name, start, values)
        wrote.append(values.numel())

    Checkpoint.read = counted_read  # type: ignore[method-assign]
    Writer.write = counted_write  # type: ignore[method-assign]
    done = polyak.merge(paths, out=out, **options)
    assert done.written
    assert out.exists(), "it must be there for every rank when the call returns"
    return sum(read), sum(wrote)


def refuses(paths: Sequence[Path], out: Path) -> str:
    """What every rank is told."""
    with pytest.raises((polyak.AveragingError, OSError)) as raised:
        polyak.merge(paths, out=out)
    return f"{type(raised.value).__name__}: {raised.value}"


def lacks_an_input(paths: Sequence[Path], out: Path) -> str:
    """The second rank does not see the last file."""
    mine = list(paths)
    if dist.get_rank() == 1:
        mine[-1] = mine[-1].with_name("not-there.safetensors")
    return refuses(mine, out)


def disk_is_full_on_one_rank(paths: Sequence[Path], out: Path) -> str:
    def full(self: Writer, name: str, start: int, values: Tensor) -> None:
        raise OSError("No space left on device")

    if dist.get_rank() == 1:
        Writer.write = full  # type: ignore[method-assign]
    return refuses(paths, out)


def forgets_a_slice(paths: Sequence[Path], out: Path) -> str:
    """Rank 1 writes all of its share but the first stretch."""
    original = Writer.write

    def forgets(self: Writer, name: str, start: int, values: Tensor) -> None:
        if name != "z":
            original(self, name, start, values)

    if dist.get_rank() == 1:
        Writer.write = forgets  # type: ignore[method-assign]
    return refuses(paths, out)


def killed(rank: int, paths: Sequence[Path], out: Path) -> str:
    """One rank is killed at its first write."""

    def dies(self: Writer, name: str, start: int, values: Tensor) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == rank:
        Writer.write = dies  # type: ignore[method-assign]
    return refuses(paths, out)


def on_one_rank(paths: Sequence[Path], out: Path) -> bool:
    """The first rank merges in a group of its own, while the other does something else."""
    group = dist.new_group([0])
    if dist.get_rank() == 0:
        polyak.merge(paths, out=out, group=group)
    return out.exists()


def reconstructs(folder: Path, out: Path) -> None:
    """Both ways to save, and a sweep, which each rank does for itself."""
    target = polyak.Power(sigma_rel=0.15)
    polyak.reconstruct(folder, target, max_error=1.0, out=out)
    found = polyak.reconstruct(folder, target, max_error=1.0)
    found.save(out.with_name(f"second-{out.name}"))

    def score(path: str) -> float:
        return float(polyak.load_weights(path)["gain"])

    if dist.get_rank() == 1:
        polyak.sweep(folder, score, score_of="file", lengths=[target], max_error=1.0)


def command(words: list[str], meet: int) -> tuple[int, str, str]:
    """The command line on ranks that torchrun has started, which nobody has joined yet."""
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(meet))
    answer = said(words)
    assert not dist.is_initialized()
    return answer


def said(words: list[str]) -> tuple[int, str, str]:
    """The exit code of a command, and what it prints: the answer, and errors."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = cli.main(words)
    return code, out.getvalue(), err.getvalue()


def tensors(step: int) -> dict[str, Tensor]:
    """What the checkpoints hold: one of several slices, an uneven one, ties in dtype, a count."""
    generator = torch.Generator().manual_seed(step)
    return {
        "a": torch.randn(1100, 1000, generator=generator),
        "b": torch.randn(7, 5, generator=generator).to(torch.bfloat16),
        "c": torch.tensor([3, 5]),
        "d": torch.randn(300_001, generator=generator).half(),
        "z": torch.randn(600, 700, generator=generator),
    }
