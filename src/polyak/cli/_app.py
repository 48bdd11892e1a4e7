"""What commands are there? Their arguments, the one call each makes, and their exit codes."""

import importlib.metadata
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import _checkpoints, _lengths
from ._display import display, show_study
from ._words import one_line_errors

if TYPE_CHECKING:
    from polyak.study import Study, Task

app = typer.Typer(
    name="polyak",
    help="Averages of the weights of neural networks.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # else a line of a docstring breaks where the source does
    pretty_exceptions_enable=False,  # a bug shows Python's own traceback
)


def run(arguments: list[str]) -> int:
    """Run the command line on these words; return the exit code."""
    try:
        app(args=arguments, prog_name="polyak", obj=arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def _version(asked: bool) -> None:
    if asked:
        try:
            typer.echo(f"polyak {importlib.metadata.version('polyak')}")
        except importlib.metadata.PackageNotFoundError:
            typer.echo("polyak, not installed as a package")
        raise typer.Exit


_checkpoints.register(app)
_lengths.register(app)


@app.callback()
def _polyak(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Averages of the weights of neural networks."""


@app.command()
def study(
    context: typer.Context,
    task: Annotated[
        str, typer.Argument(help="What to train: regression, digits or text.")
    ] = "regression",
    seeds: Annotated[
        int, typer.Option(min=1, help="How many seeds; ten or more for a figure to trust.")
    ] = 5,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes at once.", show_default="all processors"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report.", show_default="study-TASK")
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many epochs.", show_default="the task's own"),
    ] = None,
    short: Annotated[bool, typer.Option("--short", help="Few epochs and no control.")] = False,
    control: Annotated[
        bool | None,
        typer.Option(
            "--control/--no-control",
            help="Repeat the runs without mini-batch noise: all rows in each step, so that it is "
            "slow where there are many.",
            show_default="as the task does; not with --short",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier study.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the verdict only.")] = False,
) -> None:
    """Does averaging help here, which kind, how long?

    Trains TASK with several seeds, follows every average in the same runs, compares all of them
    under equal rules and writes one page with figures, pictures and a verdict.

    Example: polyak study regression --seeds 10 --out study-regression
    """
    with one_line_errors():
        _study(
            task,
            seeds=seeds,
            jobs=jobs,
            out=out,
            epochs=epochs,
            short=short,
            control=control,
            force=force,
            quiet=quiet,
            command=shlex.join(["polyak", *context.obj]),
        )


def _study(
    name: str,
    *,
    seeds: int,
    jobs: int | None,
    out: Path | None,
    epochs: int | None,
    short: bool,
    control: bool | None,
    force: bool,
    quiet: bool,
    command: str,
) -> None:
    # Here, not above: `polyak --help` must not wait for matplotlib, nor need it installed.
    from polyak.study import TASKS, check_folder, processors, run_study

    if name not in TASKS:
        known = {title: build().title for title, build in TASKS.items()}
        _unknown_task(name, known)
    folder = check_folder(out or Path(f"study-{name}"), force=force)
    task: Task = TASKS[name]()
    with display(task, quiet=quiet) as tell:
        found = run_study(
            task,
            seeds=seeds,
            jobs=jobs or processors(),
            epochs=epochs,
            short=short,
            control=control,
            tell=tell,
        )
    try:
        written = found.save(folder, force=force, command=command)
    except OSError as error:  # the disk is full, or the folder went away meanwhile
        written = _rescue(found, folder, error, command=command)
        show_study(found, written, quiet=quiet)
        raise typer.Exit(1) from None
    show_study(found, written, quiet=quiet)


def _rescue(found: "Study", folder: Path, error: OSError, *, command: str) -> Path:
    """Keep what training cost minutes for where temporary files go; say so in one line."""
    held = Path(tempfile.mkdtemp(prefix="polyak-"))
    written = found.save(held / folder.name, command=command)
    typer.echo(
        f"polyak: out must be a folder that can be written, got {str(folder)!r} with: "
        f"{error.strerror or error}. The study is kept in {str(written)!r}: move it.",
        err=True,
    )
    return written


def _unknown_task(name: str, known: dict[str, str]) -> None:
    typer.echo(f"polyak: task must be one of {', '.join(known)}, got {name!r}.", err=True)
    width = max(map(len, known))
    for title, says in known.items():
        typer.echo(f"  {title:{width}}  {says}", err=True)
    raise typer.Exit(2)
