"""Was this command started by `torchrun`? Then its ranks do it together, and one of them speaks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
import typer

from polyak._errors import AveragingError, OrderError
from polyak._files import Team, team_of

_VARIABLES = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_MEET = timedelta(minutes=2)  # all ranks are started at once
_WORK = timedelta(minutes=30)  # for which one may wait for the slowest


@contextmanager
def launched() -> Iterator[Team]:
    """Join the ranks of `torchrun` for the length of a block; alone, where there are none.

    What the library refuses is refused on all of them, and told by the first.
    """
    joined = _join()
    try:
        # Of those who joined here a second group, for only a new one can have another timeout.
        team = team_of(dist.new_group(timeout=_WORK) if joined else None)
        try:
            yield team
        except (AveragingError, OSError):
            if team.leads:
                raise
            raise typer.Exit(1) from None
    finally:
        if joined:
            dist.destroy_process_group()


def _join() -> bool:
    """Join the others, where there are any and nobody has done it."""
    here = dist.is_available() and not dist.is_initialized() and os.environ.keys() >= _VARIABLES
    if not here or os.environ["WORLD_SIZE"] == "1":
        return False
    try:
        dist.init_process_group("gloo", timeout=_MEET)
    except (RuntimeError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise OrderError(
            f"all {os.environ['WORLD_SIZE']} ranks of torchrun must run this command, got no "
            f"answer from them ({first:.200}). To run it on one rank alone, take RANK out of its "
            "environment."
        ) from error
    return True
