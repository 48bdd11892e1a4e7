"""Commands on a folder of snapshots: snapshots, reconstruct, sweep, plot."""

import hashlib
import math
from pathlib import Path
from typing import Annotated

import typer

import polyak
from polyak._errors import show_time
from polyak._files import written_whole
from polyak._fit import Target
from polyak._picture import check_picture
from polyak._posthoc import Run, open_run
from polyak._sweep import Sweep

from ._progress import bar
from ._ranks import launched
from ._tables import as_json
from ._words import (
    DtypeOption,
    Json,
    Quiet,
    ShardSize,
    dtype_of,
    one_line_errors,
    run_score,
    size_of,
)

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="A folder that polyak.Snapshots wrote.")
]
At = Annotated[
    float | None,
    typer.Option(help="The moment at which the average ends.", show_default="the newest snapshot"),
]
MaxError = Annotated[
    float,
    typer.Option(help="Largest relative squared profile error to accept; inf for any."),
]
SWEEP = "sweep.json"


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (snapshots, reconstruct, sweep, plot):
        app.command()(command)


def snapshots(
    directory: Folder,
    at: At = None,
    json: Json = False,
) -> None:
    """What is in a folder of snapshots, and which lengths it can serve.

    Example: polyak snapshots snapshots/
    """
    with one_line_errors():
        report = open_run(directory).report(at=at)
    typer.echo(as_json(report) if json else str(report))


def reconstruct(
    directory: Folder,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A .safetensors file, or a folder for shards.")
    ],
    sigma_rel: Annotated[
        str | None,
        typer.Option(help="Width of a power function as a share of the run: 0.12 or 12%."),
    ] = None,
    half_life: Annotated[
        str | None, typer.Option(help="Of an exponential average: 2000, or 5% of the run.")
    ] = None,
    window: Annotated[
        str | None, typer.Option(help="The plain mean of the last 5000, or of the last 5%.")
    ] = None,
    at: At = None,
    dtype: DtypeOption = None,
    max_error: MaxError = 0.01,
    max_shard_size: ShardSize = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how close it comes, and write nothing.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The average that another length would have given, from the snapshots of one run.

    Example: polyak reconstruct snapshots/ --sigma-rel 0.12 -o averaged.safetensors
    """
    given = {"--sigma-rel": sigma_rel, "--half-life": half_life, "--window": window}
    if sum(value is not None for value in given.values()) != 1:
        raise typer.BadParameter("give exactly one of --sigma-rel, --half-life and --window.")
    with (
        one_line_errors(),
        launched() as ranks,
        bar("reconstructing", quiet=quiet or not ranks.leads) as progress,
    ):
        with ranks.agreed():
            run = open_run(directory)
            (target,) = _targets(given, run, at)
            found = run.reconstruct(target, at=at, max_error=max_error)
        if not dry_run:
            found.save(
                out,
                dtype=dtype_of(dtype),
                max_shard_size=size_of(max_shard_size),
                progress=progress,
                group=ranks.group,
            )
    if not ranks.leads:
        return
    fit = found.fit
    if json:
        typer.echo(
            as_json({"target": repr(target), "written": not dry_run, "out": out, **vars(fit)})
        )
        return
    typer.echo(
        f"{target!r} at {show_time(fit.at)} from {len(fit.used)} of {len(found.files)} files: "
        f"relative squared profile error {fit.error:.1e}, rounding of the files {fit.noise:.1e} of "
        f"the weights, mean age {found.profile.mean_age:,.4g}"
    )
    typer.echo("nothing was written (--dry-run)" if dry_run else f"written: {out}")


def sweep(
    directory: Folder,
    score: Annotated[
        str,
        typer.Option(
            help="A command that scores a checkpoint: {} stands for its path, and the last number "
            'it prints is the score. Like "python eval.py {}".'
        ),
    ],
    lower_is_better: Annotated[
        bool, typer.Option("--lower-is-better", help="The score is a loss.")
    ] = False,
    sigma_rel: Annotated[
        str | None,
        typer.Option(
            help="Widths of power functions: 0.02,0.05,10%.",
            show_default="a dozen, from the shortest that is served",
        ),
    ] = None,
    half_life: Annotated[
        str | None, typer.Option(help="Of exponential averages: 500,1000 or 2%,5%.")
    ] = None,
    window: Annotated[
        str | None, typer.Option(help="Plain means of the last 1000,5000 or 2%,10%.")
    ] = None,
    at: At = None,
    max_error: MaxError = 0.01,
    out: Annotated[
        Path | None,
        typer.Option(
            "--plot", help="Draw the curve into this file too.", show_default="no picture"
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Score anew what an earlier sweep has scored.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score averages of many lengths, from the snapshots of one run, and find the best.

    Scores are kept in DIR by the words of the command, so that a sweep that was stopped goes on:
    when what the command reads has changed, ask for --fresh ones.

    Example: polyak sweep snapshots/ --score "python eval.py {}"
    """
    if "{}" not in score:
        raise typer.BadParameter("must have {} where the path goes.", param_hint="--score")
    given = {"--sigma-rel": sigma_rel, "--half-life": half_life, "--window": window}
    with one_line_errors():
        if out is not None:
            check_picture(out)  # before the scores, which cost
        lengths = _targets(given, open_run(directory), at) or None
        found = polyak.sweep(
            directory,
            lambda path: run_score(score, path),
            higher_is_better=not lower_is_better,
            score_of="file",
            lengths=lengths,
            at=at,
            max_error=max_error,
            cache=directory / f".scores-{_digest(score)}.json",
            fresh=fresh,
            progress=None if quiet else _say,
        )
        with written_whole(directory / SWEEP) as temporary:
            temporary.write_text(found.to_json())
        if out is not None:
            found.plot(out)
    if json:
        typer.echo(found.to_json())
        return
    typer.echo(str(found))
    typer.echo(f"best: {found.best.target!r} ({found.best.score:.6g}); {found.nearly_as_good()}")
    if out is not None:
        typer.echo(f"written: {out}")


def plot(
    directory: Folder,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A .png, .svg or .pdf.", show_default="DIR/lengths.png"),
    ] = None,
    name: Annotated[str, typer.Option(help="What the score is called.")] = "score",
) -> None:
    """Draw score against length, as the last sweep found it; without one, what is served.

    Example: polyak plot snapshots/ -o lengths.png
    """
    target = directory / "lengths.png" if out is None else out
    with one_line_errors():
        report = open_run(directory).report()
        if (directory / SWEEP).is_file():
            Sweep.from_json((directory / SWEEP).read_text()).plot(target, name=name)
        else:
            report.plot(target)
    typer.echo(f"written: {target}")


# ── words to values ──────────────────────────────────────────────────────────────────────────────


def _targets(given: dict[str, str | None], run: Run, at: float | None) -> list[Target]:
    """The averages that the options name, in their order."""
    span = (max(run.moments) if at is None else at) - run.start
    targets: list[Target] = []
    for option, text in given.items():
        for word in [] if text is None else text.split(","):
            if option == "--sigma-rel":
                targets.append(polyak.Power(sigma_rel=_number(option, word, 1.0)))
            elif option == "--half-life":
                targets.append(polyak.Exponential(half_life=_number(option, word, span)))
            else:
                targets.append(polyak.Tail(_number(option, word, span)))
    return targets


def _number(option: str, word: str, whole: float) -> float:
    """A number, or a share of `whole` such as 5%."""
    stripped = word.strip()
    try:
        value = float(stripped.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise typer.BadParameter(
            f"must be a number or a share such as 5%, got {word!r}.", param_hint=option
        )
    return value / 100.0 * whole if stripped.endswith("%") else value


def _digest(command: str) -> str:
    return hashlib.sha256(command.encode()).hexdigest()[:12]


def _say(done: int, total: int) -> None:
    if done < total:
        typer.echo(f"scoring {done + 1} of {total}", err=True)
