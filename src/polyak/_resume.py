"""An average back from a checkpoint on disk: all of it checked before a tensor is overwritten."""

from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor

from ._average import Average, Averages
from ._errors import ArgumentError, MatchError
from ._files import Boxed, Later, Unreadable, open_contents
from ._sharding import part_of, piece_for
from ._state import OnLive, OnMismatch, OnSchedule
from ._window import Window


def load_checkpoint(
    average: Average | Averages | Window,
    path: str | PathLike[str],
    *,
    key: str | None = None,
    schedule: OnSchedule = "same",
    live: OnLive = "restore",
    on_mismatch: OnMismatch = "error",
) -> None:
    """Go on from the state of an average in a checkpoint, on any number of ranks.

    Names, shapes, dtypes, schedule and clock are compared with what the files say of themselves;
    only then is anything read into the average. Each rank reads the elements that it holds and no
    others, without talking to the rest, so world size and mesh may differ from those that saved
    it. No pickled code is run. (A plain `torch.distributed.checkpoint.load` writes into the tensors
    first, and leaves the checks to `load_state_dict`.)

    Args:
        average: built as the one that was saved.
        path: a folder of torch.distributed.checkpoint, or a file of `torch.save`, on a disk that
            this rank can read.
        key: the way to the state, such as "average" or "trainer.average"; None finds the only one.
        schedule: as for `Average.load_state_dict`.
        live: likewise.
        on_mismatch: likewise.

    Raises:
        FileNotFoundError: no such file.
        ArgumentError: not a whole checkpoint, no state of an average in it, or several.
        MatchError: another kind of average, other names, shapes, dtypes or schedule.

    Examples:
        >>> import polyak, tempfile
        >>> average = polyak.Average(torch.nn.Linear(2, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"average": average.state_dict()}, f"{folder}/last.pt")
        ...     polyak.load_checkpoint(average, f"{folder}/last.pt")
    """
    if not isinstance(average, Average | Averages | Window):
        raise ArgumentError(
            f"average must be a polyak.Average, Averages or Window, got {type(average).__name__}."
        )
    with open_contents(path) as contents:
        saved = _find(contents.tree, key, str(path))
        sources: dict[int, Boxed] = {}
        state = _with_places(saved, sources)

        def fetch(value: Tensor, target: Tensor) -> Tensor:
            """The elements on disk of a stand-in, and of any other tensor its own."""
            source = sources.get(id(value))
            return piece_for(value, target) if source is None else _read(source, target)

        for row in state["averages"].values():
            row.setdefault("norms", {})  # empty mappings leave no trace in a folder of pieces
        state.setdefault("nonfinite", {})
        average._load(state, schedule=schedule, live=live, on_mismatch=on_mismatch, fetch=fetch)


def _read(source: Boxed, target: Tensor) -> Tensor:
    """The elements that `target` holds on this rank."""
    part = part_of(target)
    shape = source.info.shape
    low, high = ((0,) * len(shape), shape) if part is None else (part.offsets, part.high)
    if any(below == above for below, above in zip(low, high, strict=True)):
        sizes = shape if part is None else part.sizes
        return torch.empty(sizes, dtype=source.info.dtype)
    return source.box(low, high)


def _find(tree: Mapping[Any, object], key: str | None, where: str) -> Mapping[str, object]:
    """The state of an average under `key`, or the only one there is."""
    found = dict(_states(tree, ()))
    if key is not None:
        if key in found:
            return found[key]
    elif len(found) == 1:
        return next(iter(found.values()))
    some = ", ".join(map(repr, found)) or "none"
    asked = "the state of one average" if key is None else f"the state of an average under {key!r}"
    raise ArgumentError(
        f"path must be a checkpoint with {asked}, got {where!r} with {some}. "
        + ("Name it with key=." if found else 'Save it with {"average": average.state_dict()}.')
    )


def _states(tree: object, path: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, object]]]:
    if not isinstance(tree, Mapping):
        return
    if {"format", "kind", "averages", "clock"} <= tree.keys():
        yield ".".join(path), cast(Mapping[str, object], tree)
        return
    for name, inner in tree.items():
        yield from _states(inner, (*path, str(name)))


def _with_places(value: Any, sources: dict[int, Boxed]) -> Any:
    """The same nested values, with an empty stand-in for each tensor that lies on disk."""
    if isinstance(value, Later):
        return value.value()
    if isinstance(value, Mapping):
        inner = {name: _with_places(item, sources) for name, item in value.items()}
        if inner and all(isinstance(name, int) for name in inner):  # a list, in a folder of pieces
            if sorted(inner) != list(range(len(inner))):
                raise MatchError("the state must have its lists whole, got some with gaps.")
            return [inner[place] for place in range(len(inner))]
        return inner
    if isinstance(value, list):
        return [_with_places(item, sources) for item in value]
    if isinstance(value, Unreadable):
        raise ArgumentError(
            f"the state must be of tensors and plain values, got {value.what}. {value.remedy} (A "
            "DTensor in a file of torch.save is one rank's part: save sharded states with "
            "torch.distributed.checkpoint.)"
        )
    if hasattr(value, "info") and hasattr(value, "box"):
        stand_in = torch.empty(value.info.shape, dtype=value.info.dtype, device="meta")
        sources[id(stand_in)] = value
        return stand_in
    return value
