"""What the speed benchmarks measure with: clocks, memory, and the middle of many numbers."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


def seconds_of(action: Callable[[], object], device: str) -> float:
    """How long one call takes; on a GPU by its own clock, from the first launch to the end."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        action()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def quartiles(numbers: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median, and the upper quartile."""
    if len(numbers) == 1:
        return numbers[0], numbers[0], numbers[0]
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, middle, high


def storages() -> dict[int, int]:
    """Bytes of every piece of memory that some tensor in this process has, by address.

    Found among the objects that the garbage collector knows, so that also what a class keeps for
    itself is counted: scratch, counters, second copies.
    """
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        # isinstance would wake lazy modules; subclasses, such as fake tensors, have no memory
        if type(thing) in (Tensor, torch.nn.Parameter):
            memory = thing.untyped_storage()
            found[memory.data_ptr()] = memory.nbytes()
    return found


class Peak:
    """The most memory used inside a block, beyond what was used at its begin.

    Attributes:
        bytes: after the block; None where the system does not tell.
    """

    bytes: int | None = None


@contextmanager
def peak_memory(device: str) -> Iterator[Peak]:
    """On a GPU what torch allocates; on the CPU what the process has resident (Linux)."""
    peak = Peak()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        torch.cuda.synchronize()
        peak.bytes = torch.cuda.max_memory_allocated() - before
        return
    try:
        # What was freed must go back first, or it would be used again without being seen. Writing
        # 5 sets the peak to what is resident now: https://docs.kernel.org/filesystems/proc.html
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # another system or C library
        yield peak
        return
    before = _resident("VmRSS")
    yield peak
    peak.bytes = _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
