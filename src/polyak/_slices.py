"""Tensors of any size in slices, worked on by a few threads: memory that no file can raise."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from threading import Event, Lock
from typing import NamedTuple, TypeAlias

from ._files import TensorInfo
from ._interrupts import interrupts_held

# Called with the elements done and the elements in all.
Progress: TypeAlias = Callable[[int, int], None]

# Elements worked on at a time: fewer than the 2**15 from which torch splits an operation over
# threads of its own, which would fight with ours, and few enough for the cache of one core.
BLOCK = 31 * 2**10

SLICE = 16 * BLOCK  # elements read at a time: long enough for a disk, small enough for memory
THREADS = 2
_TELL_EVERY = 0.1  # seconds


class Slice(NamedTuple):
    """The elements [start, stop) of a flattened tensor."""

    name: str
    start: int
    stop: int


def slices(tensors: Mapping[str, TensorInfo]) -> Iterator[Slice]:
    """Cut every tensor, in order."""
    for name, info in tensors.items():
        for start in range(0, info.numel, SLICE):
            yield Slice(name, start, min(start + SLICE, info.numel))


def share(tensors: Mapping[str, TensorInfo], *, rank: int, size: int) -> Iterator[Slice]:
    """The slices of one rank out of `size`: a stretch of about as many bytes as the others'."""
    total = sum(info.nbytes for info in tensors.values())
    begin = 0
    for piece in slices(tensors):
        count = (piece.stop - piece.start) * tensors[piece.name].dtype.itemsize
        if (2 * begin + count) * size // (2 * total) == rank:  # where its middle lies
            yield piece
        begin += count


def on_threads(
    jobs: Iterable[Slice],
    work: Callable[[Slice], None],
    *,
    total: int,
    progress: Progress | None = None,
) -> None:
    """Do `work` on every slice; the first error stops all threads and is raised here.

    `progress` is called on the caller's thread; what it raises stops the work too.
    """
    source, lock, stop = iter(jobs), Lock(), Event()
    done = 0

    def worker() -> None:
        nonlocal done
        while not stop.is_set():
            with lock:
                job = next(source, None)
            if job is None:
                return
            work(job)
            with lock:
                done += job.stop - job.start

    with (
        interrupts_held() as let_interrupt_through,
        ThreadPoolExecutor(THREADS, thread_name_prefix="polyak") as pool,
    ):
        try:
            waiting = {pool.submit(worker) for _ in range(THREADS)}
            while waiting:
                ended, waiting = wait(waiting, timeout=_TELL_EVERY, return_when=FIRST_EXCEPTION)
                let_interrupt_through()
                _raise_first(ended)
                if progress is not None:
                    progress(done, total)
        finally:
            stop.set()  # also on a KeyboardInterrupt: the pool waits for its threads


def _raise_first(ended: set[Future[None]]) -> None:
    for future in ended:
        future.result()
