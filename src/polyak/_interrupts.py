"""Ctrl-C, heard where no lock is held and nothing is half done."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def interrupts_held(again: Callable[[], None] | None = None) -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back until the function that is yielded is called, or until the end.

    `KeyboardInterrupt` may come between any two instructions of Python: also in the midst of
    `concurrent.futures.wait`, which holds the lock of each future then and does not give it back.
    The thread that has the future's result waits for that lock, and whoever ends the pool waits
    for the thread: forever. So one press is let through where that does no harm, and those that
    follow while the pool is ended are taken for the same.

    Elsewhere than on the main thread, where no interrupt comes, it does nothing.

    Args:
        again: called at each press but the first, wherever the main thread is: to hurry up
            whatever is waited for, without taking a lock.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: None
        return
    presses, held = 0, False

    def hold(*_: object) -> None:
        nonlocal presses, held
        presses, held = presses + 1, True
        if presses > 1 and again is not None:
            again()

    def let_through() -> None:
        nonlocal held
        if held:
            held = False
            before(signal.SIGINT, sys._getframe())

    signal.signal(signal.SIGINT, hold)
    try:
        yield let_through
    except KeyboardInterrupt:
        held = False  # pressed once more on the way out: it was heard
        raise
    finally:
        signal.signal(signal.SIGINT, before)
        let_through()
