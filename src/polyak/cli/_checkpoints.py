"""Commands on checkpoint files: merge, soup, inspect, diff."""

import ast
import re
from inspect import signature
from pathlib import Path
from typing import Annotated, Literal

import typer

import polyak
from polyak._diff import diff as difference
from polyak._errors import AveragingError
from polyak._files import open_checkpoint
from polyak._schedules import Schedule

from ._progress import bar, each
from ._ranks import launched
from ._tables import as_json, show_checkpoint, show_diff, show_merge, show_soup
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

_SCHEDULES = {
    name: getattr(polyak, name)
    for name in (
        "After",
        "Cosine",
        "CountRamp",
        "Exponential",
        "ExponentialRamp",
        "HalfLifeRamp",
        "InverseGamma",
        "Polynomial",
        "Power",
        "Uniform",
    )
}

# ── options that several commands have ───────────────────────────────────────────────────────────

Checkpoints = Annotated[
    list[str],
    typer.Argument(
        metavar="CHECKPOINT...",
        help="Safetensors files, Hugging Face folders, torch files, torch.distributed.checkpoint "
        "folders; also mixed.",
    ),
]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="A .safetensors file, or a folder for shards.")
]
Key = Annotated[
    str | None,
    typer.Option("--key", help="Where in a torch file the weights are: model, state_dict_ema, …"),
]
Integers = Annotated[
    str | None,
    typer.Option(
        "--integers",
        help="The checkpoint that gives integers and booleans: its path or number, from 0.",
        show_default="they must agree",
    ),
]
IgnoreNonFinite = Annotated[
    bool, typer.Option("--ignore-nonfinite", help="Let NaN and inf into the result.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace a folder that exists.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (merge, soup, inspect, diff):
        app.command()(command)


# ── the commands ─────────────────────────────────────────────────────────────────────────────────


def merge(
    checkpoints: Checkpoints,
    out: Out,
    coefficients: Annotated[
        str | None,
        typer.Option(help="How much each counts: 0.5,0.3,0.2.", show_default="all the same"),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Rescale the coefficients to sum to 1.")
    ] = False,
    schedule: Annotated[
        str | None,
        typer.Option(help='Weights over the steps, like "Exponential(half_life=1000)".'),
    ] = None,
    curve: Annotated[
        str | None,
        typer.Option(help="Imitate a decay of the learning rate: linear, cosine or 1-sqrt."),
    ] = None,
    window: Annotated[
        float | None,
        typer.Option(help="Only checkpoints of so many steps up to the last."),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(help="Training times: 100,200,300.", show_default="from files or names"),
    ] = None,
    dtype: DtypeOption = None,
    key: Key = None,
    integers: Integers = None,
    ignore_nonfinite: IgnoreNonFinite = False,
    max_shard_size: ShardSize = None,
    force: Force = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Average checkpoint files, in a few megabytes of memory.

    Example: polyak merge step-*.safetensors --window 5000 -o merged.safetensors

    Ranks share the work: torchrun --no-python --nproc-per-node 8 polyak merge …
    """
    with (
        one_line_errors(),
        launched() as ranks,
        bar("merging", quiet=quiet or not ranks.leads) as progress,
    ):
        done = polyak.merge(
            checkpoints,
            out=out,
            coefficients=_numbers("--coefficients", coefficients),
            normalize=normalize,
            schedule=None if schedule is None else _schedule(schedule),
            curve=curve,  # type: ignore[arg-type]  # the library says which there are
            window=window,
            steps=_numbers("--steps", steps),
            dtype=dtype_of(dtype),
            key=key,
            integers=_named(integers),
            nonfinite="ignore" if ignore_nonfinite else "raise",
            max_shard_size=size_of(max_shard_size),
            force=force,
            dry_run=dry_run,
            progress=progress,
            group=ranks.group,
        )
    if not ranks.leads:
        return
    if json:
        typer.echo(as_json(done))
    else:
        show_merge(done)


def soup(
    checkpoints: Checkpoints,
    out: Out,
    score: Annotated[
        str,
        typer.Option(
            help="A command that scores a checkpoint: {} stands for its path, and the last number "
            'it prints is the score. Like "python eval.py {}".'
        ),
    ],
    method: Annotated[
        Literal["greedy", "uniform"],
        typer.Option(help="Keep those that help, or average all."),
    ] = "greedy",
    lower_is_better: Annotated[
        bool, typer.Option("--lower-is-better", help="The score is a loss.")
    ] = False,
    budget: Annotated[
        int | None, typer.Option(help="Most calls of the score.", show_default="as many as needed")
    ] = None,
    dtype: DtypeOption = None,
    key: Key = None,
    integers: Integers = None,
    ignore_nonfinite: IgnoreNonFinite = False,
    max_shard_size: ShardSize = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Average those of several fine-tuned checkpoints that score better together than alone.

    Example: polyak soup run-*/model.safetensors --score "python eval.py {}" -o soup.safetensors
    """
    if "{}" not in score:
        raise typer.BadParameter("must have {} where the path goes.", param_hint="--score")
    with one_line_errors():
        done = polyak.soup(
            checkpoints,
            lambda path: run_score(score, path),
            out=out,
            method=method,
            higher_is_better=not lower_is_better,
            budget=budget,
            score_of="file",
            dtype=dtype_of(dtype),
            key=key,
            integers=_named(integers),
            nonfinite="ignore" if ignore_nonfinite else "raise",
            max_shard_size=size_of(max_shard_size),
            force=force,
            tell=None if quiet else each,
        )
    if json:
        typer.echo(as_json(done))
    else:
        show_soup(done)


def inspect(
    file: Annotated[Path, typer.Argument(help="Any checkpoint.")],
    key: Key = None,
    json: Json = False,
    every: Annotated[
        bool, typer.Option("--all", help="Every tensor, however many there are.")
    ] = False,
) -> None:
    """What is in a checkpoint: tensors, metadata, live or averaged and by whom.

    Example: polyak inspect averaged.safetensors
    """
    with one_line_errors(), open_checkpoint(file, key=key) as checkpoint:
        show_checkpoint(checkpoint, as_data=json, every=every)


def diff(
    first: Annotated[Path, typer.Argument(help="Any checkpoint.")],
    second: Annotated[Path, typer.Argument(help="Another.")],
    key: Key = None,
    json: Json = False,
    every: Annotated[
        bool, typer.Option("--all", help="Every tensor, however many there are.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """How two checkpoints differ: names, shapes, and the relative distance of each tensor.

    Example: polyak diff live.safetensors averaged.safetensors
    """
    with one_line_errors(), bar("comparing", quiet=quiet) as progress:
        found = difference(first, second, key=key, progress=progress)
    if json:
        typer.echo(as_json(found))
    else:
        show_diff(found, every=every)


# ── words to values ──────────────────────────────────────────────────────────────────────────────


def _numbers(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"must be numbers like 1,2,3, got {text!r}.", param_hint=option
        ) from None


def _named(text: str | None) -> str | int | None:
    """A checkpoint by its place in the list, unless a file has that name."""
    if text is not None and re.fullmatch(r"-?\d+", text) and not Path(text).exists():
        return int(text)
    return text


def _schedule(text: str) -> Schedule:
    """A schedule from the way it prints; only such calls are understood, nothing is evaluated."""
    try:
        return _built(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ValueError) as error:
        if isinstance(error, AveragingError):
            raise
        if isinstance(error, _UnknownSettingError):
            raise typer.BadParameter(f"{error}, got {text!r}.", param_hint="--schedule") from None
        raise typer.BadParameter(
            f"must be one of {', '.join(_SCHEDULES)} with its settings, like "
            f'"Power(sigma_rel=0.05)", got {text!r}.',
            param_hint="--schedule",
        ) from None


class _UnknownSettingError(ValueError):
    """A schedule that is known, with settings that it does not take."""


def _built(node: ast.expr) -> Schedule:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise ValueError("no call")
    if node.func.id not in _SCHEDULES:
        raise ValueError(f"no schedule {node.func.id}")
    settings = [_setting(value) for value in node.args]
    named = {word.arg: _setting(word.value) for word in node.keywords if word.arg}
    if len(named) < len(node.keywords):
        raise ValueError("no ** here")
    make = _SCHEDULES[node.func.id]
    try:
        signature(make).bind(*settings, **named)
    except TypeError:
        known = ", ".join(signature(make).parameters)
        raise _UnknownSettingError(f"{node.func.id} takes {known}") from None
    built: Schedule = make(*settings, **named)
    return built


def _setting(node: ast.expr) -> object:
    return _built(node) if isinstance(node, ast.Call) else ast.literal_eval(node)
