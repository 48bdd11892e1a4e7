"""Whose average a checkpoint holds: one function a library."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from ._checkpoint import Contents, Later, Unreadable
from ._stored import Source

_WRAPPERS = ("module.", "_orig_mod.")
_EXTRA = "_extra_state"  # torch's name for what a module saves that is no tensor
_EMA = re.compile(r"(?:^|[_.])ema(?:[_.]|$)", re.IGNORECASE)
_OF_MANY = re.compile(r"ema_models\.\d+")  # in a PostHocEMA of ema-pytorch
_OF_LITEMA = {"decay", "num_updates"}
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
        if is_tensor(value) or (_may_be_tensor(value) and not name.endswith(_EXTRA))
    }
    left_out = tuple(name for name in values if name not in tensors)
    return Choice(tensors, origin, step, left_out=left_out)


def _may_be_tensor(value: object) -> bool:
    """Whether something unreadable could be a weight, which must not get lost without a word.

    An object of a class that is none of torch's and not called a tensor is none: the settings of a
    program, a path. What a function would make may be anything, but for a single number of NumPy.
    """
    if not isinstance(value, Unreadable):
        return False
    module, _, name = value.what.rpartition(".")
    is_object = name[:1].isupper() and not module.startswith("torch")
    is_weight = name.endswith(("Tensor", "Parameter", "Storage"))
    return (not is_object or is_weight) and not value.what.endswith(".multiarray.scalar")


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
    """The averaged tensors in the place of those of the model beside them.

    Under all names of a tied tensor, which the state lists: equal values say nothing, since two
    weights may be equal by chance or by their initialization, one of them frozen.
    """
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
    kept = {name: _word(target) for name, target in _mapping(state.tree.get("ties")).items()}
    return {name: averaged.get(kept.get(name, name), value) for name, value in rest.items()}


def _word(value: object) -> str:
    """A name that a checkpoint holds; empty when it is none."""
    value = value.value() if isinstance(value, Later) else value
    return value if isinstance(value, str) else ""


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


def _called_ema(place: Place, contents: Contents) -> Choice | None:
    """A place that is called an EMA, or lies in one: `model_ema`, `ema_state_dict`, `ema.shadow`.

    The model that an EMA follows may be kept in it too; numbers alone are its settings, and several
    averages in one place are none.
    """
    if not _EMA.search(place.path) or "online" in place.name:
        return None
    if any(_OF_MANY.match(name) for name in named(place.tree)):
        return None
    choice = _plain(place.tree, origin=f"EMA under {place.path!r}")
    weights = [value for value in choice.tensors.values() if is_tensor(value)]
    return choice if any(value.info.shape for value in weights) else None


def flat_averages(place: Place) -> Iterator[Place]:
    """Averages among the names of a model that was saved together with its EMA.

    `model_ema.w` beside `model.w`, or beside `w`: every name after the prefix is one of the live
    model. LitEma drops the dots of names, which are put back:
    https://github.com/CompVis/latent-diffusion/blob/main/ldm/modules/ema.py
    """
    groups: dict[str, dict[str, object]] = {}
    for name, value in named(place.tree).items():
        many = _OF_MANY.match(name)
        prefix = many[0] if many else name.partition(".")[0]
        rest = name.removeprefix(prefix)
        groups.setdefault(prefix if rest else "", {})[rest.removeprefix(".") or name] = value
    for prefix, tree in groups.items():
        if _OF_MANY.fullmatch(prefix):
            yield place.child(prefix, tree)
        elif _EMA.search(prefix):
            bare = {n: v for n, v in named(place.tree).items() if not n.startswith(f"{prefix}.")}
            others = [part for other, part in groups.items() if not _EMA.search(other)]
            fitting = [found for live in (*others, bare) if (found := _as_in(live, tree))]
            if fitting:
                yield place.child(prefix, fitting[0])


def _as_in(live: Tree, average: Tree) -> Tree | None:
    """The average under the names of the live model; None when it is of another one."""
    if average.keys() <= live.keys():
        return average
    average = {name: value for name, value in average.items() if name not in _OF_LITEMA}
    dotted = {name.replace(".", ""): name for name in live}
    if len(dotted) < len(live) or not average.keys() <= dotted.keys():
        return None
    return {dotted[name]: value for name, value in average.items()}


_LIBRARIES: tuple[Callable[[Place, Contents], Choice | None], ...] = (
    _polyak_file,
    _polyak_state,
    _ema_pytorch,
    _averaged_model,
    _lightning,
    _timm,
    _diffusers,
    _called_ema,
)
