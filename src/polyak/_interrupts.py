"""Ctrl-C, heard where no lock is held."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def interrupts_held() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back until the function that is yielded is called, or until the end.

    `KeyboardInterrupt` may come between any two instructions of Python: also in the midst of
    `concurrent.futures.wait`, which holds the lock of each future then and does not give it back.
    The thread that has the future's result waits for that lock, and whoever ends the pool waits
    for the thread: forever.

    Only the first Ctrl-C is held: a second one that comes before the first was let through means
    now. Elsewhere than on the main thread, where no interrupt comes, it does nothing.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: None
        return
    held = False

    def hold(*_: object) -> None:
        nonlocal held
        held = True
        signal.signal(signal.SIGINT, before)

    def let_through() -> None:
        nonlocal held
        if held:
            held = False
            signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, hold)
    try:
        yield let_through
    finally:
        signal.signal(signal.SIGINT, before)
        let_through()
