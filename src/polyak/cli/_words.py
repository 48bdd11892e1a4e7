"""What do the words on the command line mean? Options that several commands share."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
import typer

from polyak._errors import ArgumentError, AveragingError

Dtype = Literal["float16", "bfloat16", "float32", "float64"]
DtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", help="Of the result.", show_default="the inputs' dtype")
]
ShardSize = Annotated[
    str | None,
    typer.Option("--max-shard-size", help="Of one file of the result, like 5GB or 500MB."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]

_NUMBER_LAST = re.compile(
    r"([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+(?:e[-+]?\d+)?|nan|inf))\W*$", re.I
)
_SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what the library refuses into one line on stderr and exit code 1."""
    try:
        yield
    except (AveragingError, OSError, ImportError) as error:
        typer.echo(f"polyak: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


def dtype_of(name: Dtype | None) -> torch.dtype | None:
    """The dtype of that name."""
    return None if name is None else getattr(torch, name)


def size_of(text: str | None) -> int | None:
    """Bytes from words such as 5GB."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if not found:
        raise typer.BadParameter(
            f"must be a size like 5GB, got {text!r}.", param_hint="--max-shard-size"
        )
    return int(float(found[1]) * _SIZES[found[2]])


def run_score(command: str, path: str) -> float:
    """Run the command on a checkpoint; the number that it prints last is the score."""
    try:
        words = [word.replace("{}", path) for word in shlex.split(command)]
    except ValueError as error:
        raise ArgumentError(f"score must be a command, got {command!r} ({error}).") from None
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ArgumentError(
            f"score must end with exit code 0, got {done.returncode} from {command!r}: {last}"
        )
    # At the very end, else a step or a date printed before would be taken for the score.
    found = _NUMBER_LAST.search(done.stdout)
    if found is None:
        raise ArgumentError(f"score must print a number last, got {done.stdout.strip()[-200:]!r}.")
    return float(found[1])
