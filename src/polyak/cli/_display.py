"""What is printed while a study runs, and when it is done; plain lines when nobody watches."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

if TYPE_CHECKING:
    from polyak.study import Moment, Study, Task

_WIDTH_OF_A_PIPE = 180
_WIDE, _NARROW_COLUMNS = 140, 3  # a narrow terminal shows the first columns, the page all
_PRINTED = ("Live and averaged", "Every method")
_STAGES = {"ordinary": "training", "decayed": "rival", "control": "control"}


@contextmanager
def display(task: "Task", *, quiet: bool) -> "Iterator[Callable[[Moment], None]]":
    """Show where each seed is for the length of a `with` block: a live table, or lines."""
    console = Console(stderr=True)
    if quiet:
        yield lambda moment: None
    elif console.is_terminal:
        board = _Board(task)
        with Live(board.table(), console=console, transient=True, refresh_per_second=4) as live:

            def tell(moment: "Moment") -> None:
                board.moments[moment.seed] = moment
                live.update(board.table())

            yield tell
    else:
        yield _Lines(task).tell


class _Board:
    """The newest moment of every seed, as a table."""

    def __init__(self, task: "Task") -> None:
        self.task = task
        self.moments: dict[int, Moment] = {}

    def table(self) -> RichTable:
        """The table as it is now."""
        found = RichTable(title=f"polyak study {self.task.name}", title_justify="left")
        for column in ("seed", "run", self.task.unit_name, "live", "average"):
            found.add_column(column, justify="right")
        for seed, moment in sorted(self.moments.items()):
            found.add_row(
                str(seed),
                _STAGES[moment.kind],
                f"{moment.epoch} of at most {moment.epochs}",
                f"{moment.live:.4g}",
                f"{moment.average:.4g}",
            )
        return found


class _Lines:
    """A line for every tenth of a run: for logs."""

    def __init__(self, task: "Task") -> None:
        self.task = task

    def tell(self, moment: "Moment") -> None:
        """Print a line when a tenth is full."""
        if moment.epoch % max(1, moment.epochs // 10) == 0:
            print(
                f"seed {moment.seed}, {_STAGES[moment.kind]}, {self.task.unit_name} "
                f"{moment.epoch} of at most {moment.epochs}: {self.task.judge} "
                f"{moment.live:.4g} live, {moment.average:.4g} averaged",
                file=sys.stderr,
                flush=True,
            )


def show_study(found: "Study", folder: Path, *, quiet: bool) -> None:
    """Print the verdict, the first table, and where the report is."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_OF_A_PIPE)
    console.print(Text(found.verdict.title, style="bold"))
    console.print(Text(found.verdict.headline))
    if quiet:
        return
    for sentence in found.verdict.sentences:
        console.print(Text(f"- {sentence}"))
    for table in found.tables:
        if table.title in _PRINTED:
            wide = console.width >= _WIDE
            columns = len(table.columns) if wide else min(len(table.columns), _NARROW_COLUMNS)
            shown = RichTable(title=table.title, title_justify="left")
            for place, column in enumerate(table.columns[:columns]):
                shown.add_column(column, justify="right" if place else "left")
            for place, row in enumerate(table.rows):
                cells = [Text(cell) for cell in row[:columns]]
                shown.add_row(*cells, style="bold" if place == table.strong else None)
            console.print(shown)
    minutes = found.findings.seconds / 60.0
    print(f"{minutes:.1f} minutes. The report: {folder / 'report.html'}")  # unwrapped, for copying
