"""How far is it? On stderr, for whatever takes longer than a second."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from polyak._slices import Progress as Tell

if TYPE_CHECKING:
    from polyak import Tried

_QUICK = 1.0  # seconds that nobody wants to hear about
_BETWEEN_LINES = 10.0  # seconds, in a log


@contextmanager
def bar(verb: str, *, quiet: bool) -> "Iterator[Tell | None]":
    """Yield what to call with the elements done and in all: a bar, or lines in a log."""
    console = Console(stderr=True)
    if quiet:
        yield None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as shown:
            task = shown.add_task(verb, total=None, visible=False)
            begin = time.monotonic()

            def tell(done: int, total: int) -> None:
                late = time.monotonic() - begin > _QUICK
                shown.update(task, completed=done, total=total, visible=late)

            yield tell
    else:
        yield _Lines(verb).tell


class _Lines:
    """A line after a second and then every ten: for logs."""

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self.next = time.monotonic() + _QUICK

    def tell(self, done: int, total: int) -> None:
        """Print a line when it is time."""
        if time.monotonic() >= self.next and total:
            print(f"{self.verb}: {done / total:.0%}", file=sys.stderr, flush=True)
            self.next += _BETWEEN_LINES


def each(tried: "Tried") -> None:
    """Print a line for a call of the score, which is never quick."""
    kept = " (kept)" if tried.kept else ""
    print(f"{tried.score:.6g}: {' + '.join(tried.labels)}{kept}", file=sys.stderr, flush=True)
