"""Whose average a checkpoint holds: one function a library."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch

from ._checkpoint import Contents, Later, Unreadable
from ._stored import Source, Stored

_WRAPPERS = ("module.", "_orig_mod.")
_STRETCH = 2**18  # elements
_EXTRA = "_extra_state"  # torch's name for what a module saves that is no tensor
_DIFFUSERS = {"decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup"}

Tree = Mapping[str, object]


@dataclass(frozen=True)
class Place:
    """A mapping in a checkpoint, and the way to it.

    Args:
        path: names on the way, with dots.
        tree: the mapping.
        name: its own name.
        above: where it lies; None at the top.
    """

    path: str
    tree: Tree
    name: str = ""
    above: "Place | None" = None

    def child(self, name: str, tree: Tree) -> "Place":
        """A mapping in this one."""
        return Place(f"{self.path}.{name}" if self.path else name, tree, name, self)

    @property
    def around(self) -> Tree:
        """What lies beside it."""
        return {} if self.above is None else self.above.tree


@dataclass(frozen=True)
class Choice:
    """Weights of a checkpoint.

    Args:
        tensors: by name; among them `Unreadable` until that has been refused.
        origin: whose average they are; None for plain weights.
        step: training time, where the file says it.
        ties: names that share the bytes of another name, with that name.
        left_out: names beside them whose values are no tensors.
        prefix: what was stripped from all names.
    """

    tensors: Mapping[str, Any]
    origin: str | None = None
    step: float | None = None
    ties: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    prefix: str = ""


def recognised(place: Place, contents: Contents) -> Choice:
    """The weights at a place, and whose average they are."""
    for library in _LIBRARIES:
        choice = library(place, contents)
        if choice is not None:
            return choice
    return _plain(place.tree)


def is_tensor(value: object) -> TypeGuard[Source]:
    """Whether a value of a tree can be read as a tensor."""
    return hasattr(value, "read") and hasattr(value, "info")


def named(tree: Tree) -> dict[str, object]:
    """What has a name; other keys are those of optimizers."""
    return {name: value for name, value in tree.items() if type(name) is str}


def number(value: object) -> float | None:
    """A time that a checkpoint holds as a number or as a tensor of one element."""
    if isinstance(value, Later):
        value = value.value()
    if is_tensor(value) and value.info.numel == 1:
        value = value.read(0, 1).item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 2**1000 and math.isfinite(value) else None


def wrapper_prefix(names: Mapping[str, object]) -> str:
    """The prefix, of wrappers only, that all names share.

    Examples:
        >>> wrapper_prefix({"module._orig_mod.a": 0, "module._orig_mod.module.b": 0})
        'module._orig_mod.'
    """
    prefix = ""
    while names:
        more = [w for w in _WRAPPERS if all(name.startswith(prefix + w) for name in names)]
        if not more:
            break
        prefix += more[0]
    return prefix


def _plain(
    tree: Tree, prefix: str = "", origin: str | None = None, step: float | None = None
) -> Choice:
    """The tensors of a mapping whose names begin with `prefix`, without it."""
    values = {n.removeprefix(prefix): v for n, v in named(tree).items() if n.startswith(prefix)}
    tensors = {
        name: value
        for name, value in values.items()
        if is_tensor(value) or (isinstance(value, Unreadable) and not name.endswith(_EXTRA))
    }
    left_out = tuple(name for name in values if name not in tensors)
    return Choice(tensors, origin, step, left_out=left_out)


# ── polyak ───────────────────────────────────────────────────────────────────────────────────────


def is_polyak_state(tree: Tree) -> bool:
    """Whether it is a `state_dict()` of an average of ours."""
    return isinstance(tree.get("averages"), Mapping) and {"format", "kind", "clock"} <= tree.keys()


def is_polyak_row(tree: Tree) -> bool:
    """Whether it is one average of such a state."""
    return isinstance(tree.get("tensors"), Mapping) and {"schedule", "memory"} <= tree.keys()


def _polyak_file(place: Place, contents: Contents) -> Choice | None:
    """What `polyak.save` or `polyak.merge` wrote: the metadata says so."""
    try:
        about = json.loads(contents.metadata.get("polyak", "{}"))
        kind, now = about["kind"], about.get("now")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # no words of ours
    if not isinstance(kind, str):
        return None
    origin = "polyak average" if kind == "averaged weights" else f"polyak {kind}"
    return _plain(place.tree, origin=origin, step=number(now))


def _polyak_state(place: Place, contents: Contents) -> Choice | None:
    """One average of a saved state.

    A state holds what is averaged. The other tensors of the model (integer buffers, frozen weights)
    are in the model's state dict, which is saved beside it to resume: with exactly one such beside
    it that has all the names, the choice is the full set.
    """
    if not is_polyak_row(place.tree):
        return None
    norms = place.tree.get("norms")
    averaged = {**_mapping(place.tree["tensors"]), **_mapping(norms)}
    state = place.above.above if place.above else None
    now = number(_mapping(state.tree.get("clock")).get("now")) if state else None
    tensors = _full_set(averaged, state) if state else averaged
    return _plain(tensors, origin="polyak average", step=now)


def _full_set(averaged: Tree, state: Place) -> Tree:
    """The averaged tensors in the place of those of the model beside them, tied ones too."""
    beside = [
        _bare(named(value))
        for value in state.around.values()
        if isinstance(value, Mapping) and value is not state.tree
    ]
    models = [model for model in beside if averaged.keys() <= model.keys()]
    if len(models) != 1:
        return averaged
    model = models[0]
    lent = _mapping(state.tree.get("live"))  # of a state that was taken inside `applied()`
    rest = {**model, **{name: value for name, value in lent.items() if name in model}}
    twins = _twins(model, averaged)
    return {name: averaged.get(twins.get(name, name), value) for name, value in rest.items()}


def _twins(model: Tree, averaged: Tree) -> dict[str, str]:
    """Names of the model that share the bytes of a name that is averaged, with that name.

    A format that writes tied tensors twice (torch.distributed.checkpoint) has forgotten the tie:
    there they are twins when all their elements are equal, among tensors of one dtype and shape.
    """
    found: dict[str, str] = {}
    known: dict[object, list[str]] = {}
    for name in averaged:
        value = model[name]
        if is_tensor(value) and value.info.numel:
            known.setdefault(value, []).append(name)
            if not isinstance(value, Stored):
                known.setdefault(value.info, []).append(name)
    for name in model.keys() - averaged.keys():
        value = model[name]
        if is_tensor(value) and value.info.numel:
            twins = known.get(value, [])[:1] or [
                other for other in known.get(value.info, []) if _equal(value, model[other])
            ]
            if twins:
                found[name] = twins[0]
    return found


def _equal(a: Source, b: object) -> bool:
    """Whether all elements are equal, read by stretches up to the first difference."""
    assert is_tensor(b)
    stops = [*range(_STRETCH, a.info.numel, _STRETCH), a.info.numel]
    return all(
        torch.equal(a.read(max(0, stop - _STRETCH), stop), b.read(max(0, stop - _STRETCH), stop))
        for stop in stops
    )


def _bare(tree: Tree) -> Tree:
    prefix = wrapper_prefix(tree)
    return {name.removeprefix(prefix): value for name, value in tree.items()}


def _mapping(value: object) -> Tree:
    return named(value) if isinstance(value, Mapping) else {}


# ── others ───────────────────────────────────────────────────────────────────────────────────────


def _ema_pytorch(place: Place, contents: Contents) -> Choice | None:
    """`state_dict()` of an EMA or KarrasEMA of ema-pytorch."""
    if not {"initted", "step"} <= place.tree.keys():
        return None
    choice = _plain(place.tree, "ema_model.", "ema-pytorch EMA", number(place.tree["step"]))
    return choice if choice.tensors else None


def _averaged_model(place: Place, contents: Contents) -> Choice | None:
    """`state_dict()` of a torch.optim.swa_utils.AveragedModel."""
    names = named(place.tree).keys() - {"n_averaged"}
    if "n_averaged" not in place.tree or not all(name.startswith("module.") for name in names):
        return None
    return _plain(place.tree, "module.", "torch AveragedModel")


def _lightning(place: Place, contents: Contents) -> Choice | None:
    """A checkpoint of Lightning's WeightAveraging, which puts the average in the usual place."""
    if place.name != "state_dict" or not {"averaging_state", "current_model_state"} <= (
        place.around.keys()
    ):
        return None
    return _plain(place.tree, origin="Lightning averages")


def _timm(place: Place, contents: Contents) -> Choice | None:
    """A checkpoint of timm's training script."""
    if place.name != "state_dict_ema":
        return None
    return _plain(place.tree, origin="timm ModelEma (state_dict_ema)")


def _diffusers(place: Place, contents: Contents) -> Choice | None:
    """A folder that EMAModel.save_pretrained of diffusers wrote: its settings are in the config."""
    if not contents.hints.keys() >= _DIFFUSERS:
        return None
    step = number(contents.hints["optimization_step"])
    return _plain(place.tree, origin="diffusers EMAModel", step=step)


_LIBRARIES: tuple[Callable[[Place, Contents], Choice | None], ...] = (
    _polyak_file,
    _polyak_state,
    _ema_pytorch,
    _averaged_model,
    _lightning,
    _timm,
    _diffusers,
)
