"""Several processes that do one job: what one knows all get to know, and where one fails all do."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from .._errors import ArgumentError, OrderError

if TYPE_CHECKING:  # a build of torch may be without it
    from torch.distributed import ProcessGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes of a group, or this one alone.

    All of them must call the same methods in the same order. Each method ends the same way on all:
    with an answer, or with the error of one of them.

    Args:
        group: None for this process alone.
        rank: the place of this process.
        size: how many there are.
    """

    group: "ProcessGroup | None" = None
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that does what only one may do."""
        return self.rank == 0

    def gathered(self, value: T) -> list[T]:
        """What each of them has, by rank.

        Raises:
            OrderError: one of them is gone, or does something else.
        """
        if self.group is None:
            return [value]
        found = [value] * self.size
        try:
            dist.all_gather_object(found, value, group=self.group)
        except RuntimeError as error:
            first = str(error).partition("\n")[0]
            raise OrderError(
                f"all {self.size} ranks must take part until the end, got one that is gone or does "
                f"something else ({first:.200}). Look at its messages, and start again."
            ) from error
        return found

    def settle(self, error: Exception | None) -> None:
        """End a part of the job: raise on all of them when one has an error."""
        if self.group is None:
            if error is not None:
                raise error
            return
        told = self.gathered(None if error is None else _portable(error, self.rank))
        if error is not None:
            raise error
        if found := next((other for other in told if other is not None), None):
            raise found

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A part of the job in which any of them may fail."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        self.settle(error)

    def first(self, function: Callable[[], T]) -> T:
        """What `function` gives on the first of them, which alone calls it."""
        if self.group is None:
            return function()
        found: list[T] = []
        with self.agreed():
            if self.leads:
                found.append(function())
        return self.gathered(found)[0][0]

    def close(self) -> None:
        """Give up a group that was made by `team_among`."""
        # One of some ranks is kept: torch names it by these, and a second one of that name would
        # meet the addresses of the first.
        if self.group is not None and dist.is_initialized() and _is_everyone(self.size):
            dist.destroy_process_group(self.group)


ALONE = Team()


def team_of(group: "ProcessGroup | None" = None) -> Team:
    """The ranks of a group, by default all there are; alone where nobody has started several.

    Raises:
        ArgumentError: not a group that this rank is in.
    """
    running = dist.is_available() and dist.is_initialized()
    if group is None:
        return _team(dist.group.WORLD) if running else ALONE
    if not (running and isinstance(group, dist.ProcessGroup)):
        raise ArgumentError(
            f"group must be a torch.distributed.ProcessGroup that this rank is in, got {group!r}. "
            "Leave it out for all ranks."
        )
    return _team(group)


def team_among(ranks: Sequence[int]) -> tuple[Team, bool]:
    """A new group of these ranks, all of which must ask; and whether a thread may use it.

    Gloo sends from a thread what the host holds, while training sends over its own groups. Without
    it the group is of the default backend, which must not work on two things at a time.
    """
    apart = dist.is_gloo_available()
    group = dist.new_group(
        list(ranks),
        backend="gloo" if apart else None,
        use_local_synchronization=not _is_everyone(len(ranks)),
    )
    return _team(group), apart


def _team(group: "ProcessGroup | None") -> Team:
    return Team(group, dist.get_rank(group), dist.get_world_size(group))


def _is_everyone(count: int) -> bool:
    return count == dist.get_world_size()


def _portable(error: Exception, rank: int) -> Exception:
    """The error as the other ranks can raise it."""
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
    except Exception:  # some cannot be written, some not be read
        copy = OrderError(f"every rank must succeed, got {type(error).__name__}: {error}")
    copy.add_note(f"polyak: raised on rank {rank}")
    return copy
