"""Which tensors of an average and of a module belong together? By name, and all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ._checks import kind
from ._errors import ArgumentError, MatchError
from ._roles import Entry, Inventory

Names = Mapping[str, str | None] | Callable[[str], str | None]


@dataclass(frozen=True)
class Coverage:
    """How far the names of an average and of a module cover each other.

    Attributes:
        pairs: (name in the average, name in the module), as they belong together.
        only_in_average: names without a partner in the module.
        only_in_module: names that nothing in the average is written to: a target network whose
            encoder stands here would go stale.
    """

    pairs: tuple[tuple[str, str], ...]
    only_in_average: tuple[str, ...]
    only_in_module: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether each tensor has its partner."""
        return not (self.only_in_average or self.only_in_module)

    def __str__(self) -> str:
        """One line, and one for each name that has no partner."""
        lines = [f"{len(self.pairs)} tensors paired by name"]
        lines += [f"only in the average: {name}" for name in self.only_in_average]
        lines += [f"only in the module: {name}" for name in self.only_in_module]
        return "\n".join(lines)


def pair(
    ours: Inventory, theirs: Inventory, *, names: Names | None = None, partial: bool = False
) -> tuple[Coverage, list[tuple[Entry, Entry]]]:
    """Pair each tensor of an average with the one of the same name in a module.

    Args:
        ours: what the average was built over.
        theirs: the module.
        names: name in the average -> name in the module, where they differ: a mapping (what it does
            not list keeps its name) or a function; None leaves the tensor out.
        partial: whether either side may hold tensors that the other does not.

    Returns:
        The coverage by name, and the tensors, each once.

    Raises:
        MatchError: unpaired tensors, unless `partial`; other shapes or kinds; nothing paired; two
            tensors of the average for one of the module.
    """
    rename = _renaming(names, ours)
    pairs: list[tuple[str, str]] = []
    tensors: dict[tuple[int, int], tuple[Entry, Entry]] = {}
    taken: dict[int, int] = {}
    left_out: set[int] = set()
    for name, index in ours.index.items():
        there = rename(name)
        if not isinstance(there, str | None):
            raise ArgumentError(
                f"names must lead to a name, or to None to leave {name!r} out, got {there!r}."
            )
        target = None if there is None else theirs.index.get(there)
        if there is None:
            left_out.add(index)
        if there is None or target is None:
            continue
        mine, other = ours.entries[index], theirs.entries[target]
        if not (mine.persistent and other.persistent) and not _are_alike(mine, other):
            continue
        if taken.setdefault(target, index) != index:
            raise MatchError(
                f"{there!r} must have one partner in the average, got "
                f"{ours.entries[taken[target]].name!r} and {name!r}. "
                "Tie the tensors of the average too, or untie those of the module."
            )
        pairs.append((name, there))
        tensors[index, target] = mine, other
    # A tied tensor that found its partner under one of its names is not alone under the others.
    # Nor is a non-persistent buffer missed, which no checkpoint holds.
    found = {index for index, _ in tensors} | left_out
    coverage = Coverage(
        tuple(pairs), _alone(ours, found), _alone(theirs, {target for _, target in tensors})
    )
    _check(coverage, partial=partial)
    for mine, other in tensors.values():
        _check_alike(mine, other)
    return coverage, list(tensors.values())


def _alone(inventory: Inventory, paired: set[int]) -> tuple[str, ...]:
    names = inventory.index.items()
    entries = inventory.entries
    return tuple(sorted(n for n, i in names if i not in paired and entries[i].persistent))


def _renaming(names: Names | None, ours: Inventory) -> Callable[[str], str | None]:
    if names is None:
        return lambda name: name
    if isinstance(names, Mapping):
        unknown = sorted(set(names) - set(ours.index))
        if unknown:
            raise ArgumentError(
                f"names must rename tensors of the average, got {unknown[:3]}, which it has not. "
                f"It has {list(ours.index)[:3]} and {max(0, len(ours.index) - 3)} more."
            )
        return lambda name: names.get(name, name)
    if not callable(names):
        raise ArgumentError(
            f"names must be a mapping or a function from name to name, got {names!r}."
        )
    return names


def _check(coverage: Coverage, *, partial: bool) -> None:
    missing, extra = coverage.only_in_average, coverage.only_in_module
    found = (
        f"got {len(missing)} only in the average {list(missing[:3])} "
        f"and {len(extra)} only in the module {list(extra[:3])}"
    )
    if not coverage.pairs:
        raise MatchError(
            f"the average and the module must share names, {found}. "
            "Say with names= how those of the module are called."
        )
    if not (coverage.complete or partial):
        raise MatchError(
            f"the average and the module must hold the same tensors, {found}. Pass a module of the "
            "same class, or partial=True to leave these as they are."
        )


def _are_alike(entry: Entry, other: Entry) -> bool:
    if entry.is_gone() or other.is_gone():
        return False
    mine, there = entry.live(), other.live()
    return mine.shape == there.shape and kind(mine) == kind(there)


def _check_alike(entry: Entry, other: Entry) -> None:
    if not _are_alike(entry, other):
        mine, there = entry.live(), other.live()
        raise MatchError(
            f"{entry.name!r} must have one shape and kind, got {list(mine.shape)} {mine.dtype} in "
            f"the average and {list(there.shape)} {there.dtype} in the module ({other.name!r})."
        )
