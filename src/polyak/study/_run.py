"""All seeds of a study, in parallel processes, to one value."""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import platform
import queue
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.context import SpawnContext
from typing import Any

import torch

from polyak._errors import ArgumentError, AveragingError
from polyak._interrupts import interrupts_held

from ._findings import Findings, assemble
from ._results import joined_scores
from ._task import Task
from ._train import Moment, Run, Tell, planned, steps_per_epoch, train_seed

_LOOK_SECONDS = 0.2  # how often the progress of the workers is read


class RunError(AveragingError, RuntimeError):
    """A training run of the study broke: the message names the seed and the cause."""


class _Cancelled(BaseException):
    """Raised in a worker that was asked to stop. No `Exception`: a task must not swallow it."""


def find(
    task: Task,
    *,
    seeds: int | Sequence[int],
    jobs: int,
    epochs: int | None,
    short: bool,
    control: bool | None,
    tell: Tell | None,
) -> Findings:
    """Train every seed, here or in `jobs` processes; `polyak.study.run_study` says the rest."""
    started = time.perf_counter()
    chosen = _seeds(seeds)
    if not jobs >= 1:
        raise ArgumentError(f"jobs must be 1 or more, got {jobs!r}.")
    if short and epochs is None:
        epochs = task.short_epochs or max(1, task.epochs // 4)
    if epochs is not None:
        task = replace(task, epochs=epochs)
    with_control = (task.control and not short) if control is None else control
    jobs = min(jobs, len(chosen))
    data = task.data()
    methods = planned(task, steps_per_epoch(task, data))
    if jobs == 1:
        runs = _here(task, chosen, with_control, tell or _silent)
    else:
        runs = _in_processes(task, chosen, with_control, jobs, tell or _silent)
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    return assemble(
        task,
        methods,
        chosen,
        runs,
        data={name: len(pair[0]) for name, pair in parts.items() if pair is not None},
        ensemble=joined_scores(task, data, runs),
        seconds=time.perf_counter() - started,
        jobs=jobs,
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """What runs: Python, the machine, and the libraries that decide the figures."""
    found = {"python": platform.python_version(), "machine": platform.platform()}
    for name in ("polyak", "torch", "numpy", "scipy", "scikit-learn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen or len(set(chosen)) != len(chosen):
        raise ArgumentError(f"seeds must be one or more, all different, got {seeds!r}.")
    return chosen


def _silent(moment: Moment) -> None:
    """Tell nobody."""


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread, and the caller's random state as it was: figures do not depend on `jobs`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


def _train(task: Task, seed: int, control: bool, tell: Tell) -> list[Run]:
    """Train one seed; an error says which seed it was."""
    try:
        return train_seed(task, seed, control=control, tell=tell)
    except AveragingError:
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise RunError(
            f"task {task.name!r} must train without an error, got {type(error).__name__} with "
            f"seed {seed} at {where.filename}:{where.lineno}: {error}"
        ) from error


def _here(task: Task, seeds: Sequence[int], control: bool, tell: Tell) -> list[Run]:
    with _one_thread():
        return [run for seed in seeds for run in _train(task, seed, control, tell)]


# What a worker was given when it started: where to report, and when to stop.
_worker: dict[str, Any] = {}


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back in this thread; a process started meanwhile never hears it.

    Else an interrupt while a worker still imports would print its traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(moments: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and sets `stop`
    torch.set_num_threads(1)
    moments.cancel_join_thread()  # a last word unread must not hold the worker back
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(moments=moments, stop=stop)


def _end_with_parent() -> None:
    """Nobody else would end this process where its parent was killed without a word."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(pickled: bytes, seed: int, control: bool) -> list[Run]:
    def tell(moment: Moment) -> None:
        if _worker["stop"].value:
            raise _Cancelled
        _worker["moments"].put(moment)

    return _train(pickle.loads(pickled), seed, control, tell)


def _in_processes(
    task: Task, seeds: Sequence[int], control: bool, jobs: int, tell: Tell
) -> list[Run]:
    try:
        pickled = pickle.dumps(task)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ArgumentError(
            f"task must be made of functions that can be imported when jobs is above 1, got "
            f"{error}. Define them with def at the top of a module, or pass jobs=1."
        ) from error
    workers: dict[int, Any] = {}  # those of the pool, by process
    killed = False

    def kill() -> None:
        nonlocal killed
        killed = True
        for worker in list(workers.values()):
            worker.kill()

    try:
        with (
            interrupts_held(again=kill) as let_interrupt_through,
            _pool(jobs) as (pool, moments),
        ):
            with _deaf_to_interrupts():
                futures = [pool.submit(_work, pickled, seed, control) for seed in seeds]
            workers.update(pool._processes)
            for ended in _ended(futures):
                let_interrupt_through()
                _drain(moments, tell)
                for future in ended:
                    future.result()  # the first error at once
            return [run for future in futures for run in future.result()]
    except BrokenProcessPool as error:
        if killed:  # by a user whose own handler of Ctrl-C raises nothing
            raise KeyboardInterrupt from None
        raise RunError(
            "a worker process must live until its seed is done, got one that died without a word. "
            "Memory may have run out: pass a smaller --jobs. A script that calls run_study needs "
            'its `if __name__ == "__main__":`.'
        ) from error


@contextlib.contextmanager
def _pool(jobs: int) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    """Worker processes, and the queue of what they report; at the end they are asked to stop."""
    # Spawned, not forked: torch's thread pools do not survive a fork.
    context: SpawnContext = multiprocessing.get_context("spawn")
    # No event: a worker killed while it asks would leave the event's lock taken.
    moments, stop = context.Queue(), context.RawValue(ctypes.c_bool, False)
    pool = ProcessPoolExecutor(
        max_workers=jobs, mp_context=context, initializer=_begin_worker, initargs=(moments, stop)
    )
    try:
        yield pool, moments
    finally:
        stop.value = True  # each worker leaves at its next evaluation
        pool.shutdown(wait=True, cancel_futures=True)
        moments.close()
        moments.cancel_join_thread()


def _ended(futures: Sequence[Future[list[Run]]]) -> Iterator[set[Future[list[Run]]]]:
    """Wait for all, and give each time it looks those that have ended since."""
    waiting = set(futures)
    while waiting:
        ended, waiting = wait(waiting, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
        yield ended


def _drain(moments: Any, tell: Tell) -> None:
    while True:
        try:
            tell(moments.get_nowait())
        except queue.Empty:
            return
