"""Which of the things in a checkpoint are the weights."""

import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace

from .._errors import ArgumentError
from ._checkpoint import Contents, Unreadable
from ._origins import (
    Choice,
    Place,
    flat_averages,
    is_polyak_row,
    is_polyak_state,
    is_tensor,
    named,
    number,
    recognised,
    wrapper_prefix,
)
from ._stored import Source

_USUAL = ("state_dict", "model", "model_state_dict", "module")
_STEPS = ("step", "global_step", "iteration")
_NOT_WEIGHTS = {  # words of names; as parts of words they also occur in those of models
    *("optim", "optimizer", "optimizers", "sched", "scheduler", "schedulers", "scaler", "scalers"),
    *("rng", "loops", "callbacks"),
}
_DEEPEST = 8


def choose(contents: Contents, key: str | None, where: str) -> Choice:
    """The weights under `key`, or those in the one sensible place.

    In this order: the very place that `key` names; the average, when exactly one is recognised;
    the place with a usual name (`state_dict`, `model`, `model_state_dict`, `module`); the only
    place with weights.

    Raises:
        ArgumentError: no weights there, or several places that could be meant.
    """
    top = Place("", contents.tree)
    start = _under(top, key, where) if key else top
    found: dict[str, Choice] = {}
    for place in _places(start):
        found[place.path] = recognised(place, contents)
        if found[place.path].origin is None:
            found |= {part.path: recognised(part, contents) for part in flat_averages(place)}
    if isinstance(start.tree.get("shadow_params"), list) and not found:
        raise ArgumentError(
            f"{where} must hold tensors by name, got shadow_params without names. Load them into "
            "the average that wrote them, copy it to the model, and save the model's state dict."
        )
    if not found:
        raise _nothing(start, key, where)
    named_by_key = key is not None and start.path in found
    choice = found[start.path if named_by_key else _the_one(found, where)]
    refused = [(n, value) for n, value in choice.tensors.items() if isinstance(value, Unreadable)]
    if refused:
        name, value = refused[0]
        raise ArgumentError(
            f"{where} must hold tensors only, got {value.what} as {name!r}. {value.remedy}"
        )
    if choice.step is None:
        steps = (number(contents.tree.get(name)) for name in _STEPS)
        choice = replace(choice, step=next((step for step in steps if step is not None), None))
    noted = {name: kept for name, kept in contents.ties.items() if kept in choice.tensors}
    tensors = {**choice.tensors, **{name: choice.tensors[kept] for name, kept in noted.items()}}
    return _stripped(replace(choice, tensors=tensors, ties={**_shared(tensors), **noted}))


def _the_one(found: Mapping[str, Choice], where: str) -> str:
    """The path of the weights that are meant."""
    averages = [path for path, choice in found.items() if choice.origin is not None]
    usual = [path for path in _USUAL if path in found][:1]
    several = averages or usual or list(found)
    if len(several) == 1:
        return several[0]
    listed = ", ".join(f"{path!r} ({len(found[path].tensors)} tensors)" for path in several[:8])
    raise ArgumentError(f"key must say which weights of {where} are meant, one of {listed}.")


def _nothing(start: Place, key: str | None, where: str) -> ArgumentError:
    """What to say of a place without weights: what is there instead, where that is known."""
    under = f" under {key!r}" if key else ""
    for place in _all_places(start):
        for name, value in named(place.tree).items():
            if isinstance(value, Unreadable):
                path = f"{place.path}.{name}" if place.path else name
                return ArgumentError(
                    f"{where} must hold tensors by name{under}, got {value.what} as {path!r}. "
                    f"{value.remedy}"
                )
    return ArgumentError(f"{where} must hold tensors by name{under}, got none. Save a state dict.")


def _under(top: Place, key: str, where: str) -> Place:
    """The place at a dotted path; names may hold dots, and flat names may begin with the path."""
    found = _walk(top, key)
    if found is None:
        listed = ", ".join(repr(name) for name in list(named(top.tree))[:8])
        raise ArgumentError(
            f"key must be a place with tensors in {where}, got {key!r}; there are {listed}."
        )
    return found


def _walk(place: Place, path: str) -> Place | None:
    cuts = [at for at, letter in enumerate(path) if letter == "."]
    for at in [len(path), *reversed(cuts)]:
        inner = place.tree.get(path[:at])
        if isinstance(inner, Mapping):
            child = place.child(path[:at], inner)
            found = child if at == len(path) else _walk(child, path[at + 1 :])
            if found is not None:
                return found
    start = f"{path}."
    flat = {n.removeprefix(start): v for n, v in named(place.tree).items() if n.startswith(start)}
    return place.child(path, flat) if any(is_tensor(value) for value in flat.values()) else None


def _places(start: Place) -> Iterator[Place]:
    """Places with weights, from the outside in, each once."""
    for place in _all_places(start):
        weights = any(_is_weight(value) for value in named(place.tree).values())
        if weights or is_polyak_row(place.tree):
            yield place


def _all_places(start: Place) -> Iterator[Place]:
    """Mappings where weights could be, from the outside in, each once."""
    seen: set[int] = set()
    waiting = deque([(start, 0)])
    while waiting:
        place, depth = waiting.popleft()
        if id(place.tree) in seen:
            continue
        seen.add(id(place.tree))
        yield place
        if depth < _DEEPEST and not is_polyak_row(place.tree):
            waiting += [
                (place.child(name, value), depth + 1)
                for name, value in named(place.tree).items()
                if isinstance(value, Mapping) and not _is_apart(name, value)
                # beside its averages a state of ours holds live weights and a window's ring
                if name == "averages" or not is_polyak_state(place.tree)
            ]


def _is_apart(name: str, tree: Mapping[object, object]) -> bool:
    """Whether it is the state of an optimizer or of something else beside the model."""
    words = set(re.split(r"[_.]", name.lower()))
    return bool(words & _NOT_WEIGHTS) or "param_groups" in tree


def _is_weight(value: object) -> bool:
    """Whether it is a floating or complex tensor; the state of a random generator is not."""
    if not is_tensor(value):
        return False
    dtype = value.info.dtype
    return bool(dtype.is_floating_point or dtype.is_complex)


def _shared(tensors: Mapping[str, Source]) -> dict[str, str]:
    """Names of bytes that an earlier name has too."""
    first: dict[Source, str] = {}
    for name, source in tensors.items():
        if source.info.numel:
            first.setdefault(source, name)
    return {
        name: first[source] for name, source in tensors.items() if first.get(source, name) != name
    }


def _stripped(choice: Choice) -> Choice:
    """Without the prefixes that wrappers gave to all names; our own files have none."""
    if choice.origin is not None and choice.origin.startswith("polyak"):
        return choice
    prefix = wrapper_prefix(choice.tensors)
    if not prefix:
        return choice
    return replace(
        choice,
        tensors={name.removeprefix(prefix): v for name, v in choice.tensors.items()},
        ties={n.removeprefix(prefix): k.removeprefix(prefix) for n, k in choice.ties.items()},
        left_out=tuple(name.removeprefix(prefix) for name in choice.left_out),
        prefix=prefix,
    )
