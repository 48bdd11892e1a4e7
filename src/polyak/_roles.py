"""Which tensors of a model are averaged, which stay live, and what each of them is called."""

import fnmatch
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from operator import is_, itemgetter
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from ._errors import ArgumentError, MatchError, OrderError
from ._sharding import check_can_be_cut, fsdp_parameters, is_gathered, is_gathered_somewhere, local

Role = Literal["average", "live"]
Kind = Literal["parameter", "buffer", "tensor"]
Selector = str | Sequence[str] | Callable[[str, Tensor], bool]
RoleOverride = Mapping[str, Role] | Callable[[str, Tensor], Role | None]

# Wrappers that put one module around another, and the attribute under which it sits. Looked up
# among the modules already imported: nothing can be wrapped by a class that nobody has loaded.
_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    (
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
        "_fsdp_wrapped_module",
    ),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
)


@dataclass(eq=False)
class Entry:
    """One live tensor: its canonical name, where it is looked up, its role and the reason.

    Only `owner` and `key` ever change, when the module around a parameter is exchanged.
    """

    name: str
    owner: MutableMapping[str, Any]
    key: str
    kind: Kind
    role: Role
    why: str
    persistent: bool = True
    aliases: tuple[str, ...] = ()
    pinned: Tensor | None = None  # a parameter must stay the same object: optimizers hold it
    record: Any = None  # FSDP2's, of a parameter that it shows whole for some of the time

    def is_gone(self) -> bool:
        """Whether it is a cache that was dropped: no checkpoint holds it, so it may be missing."""
        return not self.persistent and self.owner.get(self.key) is None

    def live(self) -> Tensor:
        """The live tensor as it is now; `MatchError` when it is gone or was replaced."""
        tensor = self.owner.get(self.key)
        if not isinstance(tensor, Tensor):
            raise MatchError(_replaced(self.name, "no such tensor"))
        if self.pinned is not None and tensor is not self.pinned:
            if is_gathered(self.record, tensor):
                return self.pinned  # the shard: optimizers write that, and the next pass reads it
            raise MatchError(_replaced(self.name, "another parameter object"))
        return tensor


@dataclass(frozen=True, eq=False)
class _Tree:
    """The modules of a model as they were at the last look, and what hung in them.

    Asked before every update: by maps over the modules' own dicts, a fifth of a microsecond a
    module. Most have no children: of these it only matters that it is still so.
    """

    modules: list[dict[str, Any]]  # their attributes
    childless: list[dict[str, Any]]
    parents: list[dict[str, Any]]
    children: list[dict[str, nn.Module | None]]  # of the parents
    owners: list[Mapping[str, Tensor | None]]  # the modules' own dicts of parameters, of buffers
    counts: list[int]

    @classmethod
    def of(cls, model: nn.Module) -> "_Tree | None":
        """The tree of `model` as it is now; None where a class keeps its own in another way."""
        modules = list({id(module): vars(module) for _, module in walk(model)}.values())
        if not all({"_modules", "_parameters", "_buffers"} <= module.keys() for module in modules):
            return None
        parents = [module for module in modules if _CHILDREN(module)]
        owners = _owners(modules)
        return cls(
            modules,
            [module for module in modules if not _CHILDREN(module)],
            parents,
            [dict(_CHILDREN(module)) for module in parents],
            owners,
            list(map(len, owners)),
        )

    def has_changed(self) -> bool:
        """Whether a module was exchanged, has grown, or was given other dicts."""
        if any(map(_CHILDREN, self.childless)):
            return True
        owners = _owners(self.modules)
        return (
            list(map(_CHILDREN, self.parents)) != self.children
            or list(map(len, owners)) != self.counts
            or not all(map(is_, owners, self.owners))
        )


_CHILDREN, _PARAMETERS, _BUFFERS = map(itemgetter, ("_modules", "_parameters", "_buffers"))


def _owners(modules: Sequence[dict[str, Any]]) -> list[Mapping[str, Tensor | None]]:
    """The dicts that tensors hang in, of buffers only those that have some."""
    return [*map(_PARAMETERS, modules), *filter(None, map(_BUFFERS, modules))]


@dataclass(eq=False)
class Inventory:
    """Every tensor of a model's full state, in the order of its state dict."""

    entries: tuple[Entry, ...]
    order: tuple[tuple[str, int], ...]  # (name, index of its entry), ties more than once
    model: nn.Module | None = None
    extras: tuple[tuple[str, nn.Module], ...] = ()  # (name, module) of `get_extra_state`
    tree: _Tree | None = None
    index: Mapping[str, int] = field(init=False)  # every name, aliases too -> entry

    def __post_init__(self) -> None:
        """Index the entries by each of their names."""
        self.index = {name: i for i, e in enumerate(self.entries) for name in (e.name, *e.aliases)}

    def averaged(self) -> list[Entry]:
        """The entries whose role is "average"."""
        return [entry for entry in self.entries if entry.role == "average"]

    def follow_modules(self) -> None:
        """Look again where a module was exchanged or has grown since the last look.

        A wrapper put around a layer, or batch norms converted, keep the parameters and their
        names: that is followed. Other parameters under a name are a `MatchError`.
        """
        if self.model is not None and (self.tree is None or self.tree.has_changed()):
            self.look_again()

    def __getstate__(self) -> dict[str, Any]:
        """All but the tree: a copied module keeps its attributes in a dict of its own."""
        return {**vars(self), "tree": None}

    def look_again(self) -> None:
        """Find every tensor by its name; `MatchError` for one that is gone, replaced or new."""
        if self.model is None:
            return
        found, _ = _of_module(self.model)
        places = {raw.name: raw for raw in found}
        for entry in self.entries:
            raw = places.get(entry.name)
            if raw is None and entry.is_gone():
                continue
            if raw is None or (entry.pinned is not None and raw.tensor is not entry.pinned):
                what = "no such tensor" if raw is None else "another parameter object"
                raise MatchError(_replaced(entry.name, what))
            entry.owner, entry.key, entry.record = raw.owner, raw.key, raw.record
        new = [raw.name for raw in found if raw.persistent and raw.name not in self.index]
        if new:
            raise MatchError(
                "the model must hold the tensors it had when the average was built, got "
                f"{len(new)} more: {new[:3]}. Build the average after the model has all its layers."
            )
        self.tree = _Tree.of(self.model)


def _replaced(name: str, found: str) -> str:
    return (
        f"{name!r} must be the tensor it was when the average was built, got {found}. Build the "
        "average after layers are replaced (an optimizer built before would miss them too)."
    )


def inner_name(module: nn.Module) -> str | None:
    """The attribute of the wrapped module when `module` is a known wrapper, else None."""
    for where, name, attribute in _WRAPPERS:
        wrapper = getattr(sys.modules.get(where), name, None)
        if wrapper is not None and isinstance(module, wrapper):
            return attribute
    return None


def bare(module: nn.Module) -> nn.Module:
    """The module inside the wrappers that are known."""
    while (inner := inner_name(module)) is not None:
        module = module.get_submodule(inner)
    return module


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Each module with its canonical prefix: wrappers recognised by type add nothing to a name.

    A module that is reachable by several paths comes once a path, as in a state dict.
    """
    yield prefix, module
    transparent = inner_name(module)
    for name, child in module._modules.items():
        if child is not None:
            yield from walk(child, prefix if name == transparent else f"{prefix}{name}.")


def take_inventory(
    source: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    roles: RoleOverride | None = None,
    may_be_meta: bool = False,
) -> Inventory:
    """List every tensor of `source` with its role; refuse what no average can be made of.

    Args:
        source: a module (wrapped or not), or named tensors.
        include: only these are averaged: a name pattern (`fnmatch`), several, or a function
            `(name, tensor) -> bool`.
        exclude: these stay live; the same forms.
        roles: the last word: patterns to "average" or "live", or a function that returns one of
            these, or None for the usual rule.
        may_be_meta: whether tensors without data are taken too.

    Raises:
        ArgumentError: a pattern that matches nothing; an integer or exotic tensor that is asked to
            be averaged.
        OrderError: a lazy parameter that has no shape yet, or a tensor without data.
    """
    if isinstance(source, nn.Module):
        _check_fsdp1(source)
        found, extras = _of_module(source)
    else:
        found, extras = _of_tensors(source), []
    tied: dict[object, list[_Raw]] = {}  # one tensor, all the places it was met at
    for raw in found:
        tied.setdefault(_identity(raw), []).append(raw)
    if not may_be_meta:
        for raw in found:
            _check_has_data(raw)
    assign = _assigner(include, exclude, roles, [raw.name for raw in found])
    entries = [assign(raws) for raws in tied.values()]
    position = {raw.name: i for i, raws in enumerate(tied.values()) for raw in raws}
    order = [(raw.name, position[raw.name]) for raw in found if raw.persistent]
    model = source if isinstance(source, nn.Module) else None
    tree = None if model is None else _Tree.of(model)
    return Inventory(tuple(entries), tuple(order), model, tuple(extras), tree)


def check_some_averaged(inventory: Inventory) -> None:
    """Raise `ArgumentError`, with the reasons, when every tensor stays live."""
    entries = inventory.entries
    if not entries:
        raise ArgumentError("the model must have something to average, got no tensors at all.")
    if not inventory.averaged():
        reasons = "; ".join(sorted({entry.why for entry in entries}))
        raise ArgumentError(
            f"the model must have something to average, got {len(entries)} tensors that all stay "
            f"live ({reasons}). Unfreeze what is trained, or name tensors with roles=."
        )


@dataclass(frozen=True, eq=False)
class _Raw:
    """A tensor met on the walk, before it has a role."""

    name: str
    tensor: Tensor
    owner: MutableMapping[str, Any]
    key: str
    kind: Kind
    persistent: bool = True
    unit_norm: bool = False
    record: Any = None


def _of_module(model: nn.Module) -> tuple[list[_Raw], list[tuple[str, nn.Module]]]:
    found: list[_Raw] = []
    extras: list[tuple[str, nn.Module]] = []
    records = fsdp_parameters(model)
    for prefix, module in walk(model):
        if isinstance(module, torch.jit.ScriptModule):
            raise ArgumentError(
                f"the model must be of Python modules, got the scripted {prefix or 'model'!r}, "
                "whose tensors have no identity. Average the module that was scripted."
            )
        units = _unit_norm_buffers(module)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owner = cast(MutableMapping[str, Any], module._parameters)
                record: Any = records.get((id(module), key))
                if is_gathered(record, parameter):
                    parameter = record.sharded_param
                found.append(_Raw(prefix + key, parameter, owner, key, "parameter", record=record))
        for key, buffer in module._buffers.items():
            if buffer is not None:
                owner = cast(MutableMapping[str, Any], module._buffers)
                kept = key not in module._non_persistent_buffers_set
                found.append(
                    _Raw(prefix + key, buffer, owner, key, "buffer", kept, unit_norm=key in units)
                )
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            extras.append((prefix + "_extra_state", module))
    return found, extras


def _of_tensors(source: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> list[_Raw]:
    # A mutable mapping is kept, not copied: what its owner puts there later is what we average.
    pairs = _pairs(source)
    for name, tensor in pairs:
        if is_gathered_somewhere(tensor):
            raise ArgumentError(
                f"named tensors must be the shards that are trained, got {name!r} as FSDP2 has "
                "gathered it for a forward pass. Pass the model instead."
            )
    owner = source if isinstance(source, MutableMapping) else dict(pairs)
    if len(owner) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ArgumentError(f"named tensors must have names of their own, got {twice[:3]} twice.")
    return [_Raw(name, tensor, owner, name, "tensor") for name, tensor in owner.items()]


def _pairs(source: object) -> list[tuple[str, Tensor]]:
    """Names and tensors of a mapping, or of an iterable of pairs; anything else is refused."""
    found: list[Any] = []
    if isinstance(source, Mapping):
        found = list(source.items())
    elif isinstance(source, Iterable) and not isinstance(source, Tensor):
        found = list(source)
    elif source is not None:
        found = [source]
    for pair in found:
        named = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)
        if not (named and isinstance(pair[1], Tensor)):
            raise ArgumentError(
                "the first argument must be a module or tensors by name, got "
                f"{_shown(pair, source)}. Pass the model."
            )
    return found


def _shown(pair: object, source: object) -> str:
    """What stands where a pair should, without its numbers."""
    if isinstance(pair, tuple) and len(pair) == 2:
        return f"{reprlib.repr(pair[0])} with {type(pair[1]).__name__} in {type(source).__name__}"
    bare = f"a bare {type(pair).__name__}"
    return bare if pair is source else f"{bare} in {type(source).__name__}"


def _unit_norm_buffers(module: nn.Module) -> set[str]:
    """Names of the singular vectors that spectral norm keeps at length one.

    The mean of two unit vectors is shorter than one, and the layer's scale is divided by it.
    """
    if isinstance(module, _SpectralNorm):
        return {"_u", "_v"}
    names: set[str] = set()
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            names |= {f"{hook.name}_u", f"{hook.name}_v"}
    return names


def _identity(raw: _Raw) -> object:
    """What two names must share to be one tensor: the object, or the very same memory."""
    tensor = raw.tensor
    if nn.parameter.is_lazy(tensor) or may_hold_anything(tensor):
        return id(tensor)
    tensor = local(tensor)
    if tensor.numel() == 0:
        return id(raw.tensor)
    if tensor.layout != torch.strided or tensor.data_ptr() == 0:  # empty, or on no real device
        return id(tensor)
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)


def _assigner(
    include: Selector | None,
    exclude: Selector | None,
    roles: RoleOverride | None,
    names: Sequence[str],
) -> Callable[[list[_Raw]], Entry]:
    """Return the rule that gives a tensor its role, with the caller's wishes built in.

    A tied tensor has several names; a wish that matches one of them counts for the tensor.
    """
    included = _selector(include, "include", names)
    excluded = _selector(exclude, "exclude", names)
    overridden = _override(roles, names)

    def assign(raws: list[_Raw]) -> Entry:
        raw, names = raws[0], [raw.name for raw in raws]
        role, why = _usual_role(raw)
        choice = role == "average" or why == "frozen parameter"  # which may be trained one day
        if choice and included and not any(included(n, raw.tensor) for n in names):
            role, why = "live", "not in include"
        elif choice and excluded and any(excluded(n, raw.tensor) for n in names):
            role, why = "live", "in exclude"
        wishes = [wish for name in names if (wish := overridden(name, raw.tensor)) is not None]
        if len(set(wishes)) > 1:
            raise ArgumentError(
                f"roles must agree for the tied names {names}, got {wishes}. Name one role."
            )
        if wishes:
            role, why = wishes[0], "in roles"
        if role == "average":
            _check_can_be_averaged(raw)
        return Entry(
            raw.name,
            raw.owner,
            raw.key,
            raw.kind,
            role,
            why,
            persistent=any(raw.persistent for raw in raws),
            aliases=tuple(names[1:]),
            pinned=raw.tensor if isinstance(raw.tensor, nn.Parameter) else None,
            record=raw.record,
        )

    return assign


def _usual_role(raw: _Raw) -> tuple[Role, str]:
    if not (raw.tensor.is_floating_point() or raw.tensor.is_complex()):
        return "live", f"{_dtype_name(raw.tensor)} values cannot be averaged"
    if raw.kind == "tensor":
        return "average", "named tensor"
    if raw.kind == "parameter":
        if raw.tensor.requires_grad:
            return "average", "trainable parameter"
        return "live", "frozen parameter"
    if not raw.persistent:
        return "live", "non-persistent buffer"
    if raw.unit_norm:
        return "live", "unit vector of spectral norm"
    return "average", "floating buffer"


def _check_is_here(raw: _Raw) -> None:
    """Refuse parameters whose values lie elsewhere while nobody computes with them."""
    empty = raw.kind == "parameter" and tuple(raw.tensor.shape) == (0,)
    if empty and hasattr(raw.tensor, "ds_id"):
        raise ArgumentError(
            f"{raw.name!r} must hold its values, got the empty placeholder of DeepSpeed ZeRO-3, "
            "which gathers them only around their use. Train with FSDP2 (fully_shard) or ZeRO-1/2, "
            "or average named tensors of your own that hold each rank's partition."
        )


def _check_fsdp1(model: nn.Module) -> None:
    """Refuse what the first FSDP has flattened and cut: no name says where its elements went."""
    fsdp = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    wrapped = getattr(fsdp, "FullyShardedDataParallel", None)
    if wrapped is None:
        return
    wrappers = [module for module in model.modules() if isinstance(module, wrapped)]
    cut = any(w._handle is not None and w._handle.uses_sharded_strategy for w in wrappers)
    inside = not wrappers and any(getattr(p, "_fsdp_flattened", False) for p in model.parameters())
    if cut or inside:
        raise ArgumentError(
            "the model must not be sharded by FullyShardedDataParallel (FSDP1), which keeps flat "
            "pieces of several parameters. Use torch.distributed.fsdp.fully_shard (FSDP2), or "
            "sharding_strategy=NO_SHARD and the wrapper itself as the model."
        )


def _check_has_data(raw: _Raw) -> None:
    if nn.parameter.is_lazy(raw.tensor):
        raise OrderError(
            f"{raw.name!r} must have a shape, got an uninitialised lazy parameter. "
            "Run one forward pass, then build the average."
        )
    _check_is_here(raw)
    if raw.tensor.device.type == "meta":
        raise OrderError(
            f"{raw.name!r} must hold data, got a tensor on the meta device. "
            "Materialise the model and load its weights, then build the average."
        )


def _check_can_be_averaged(raw: _Raw) -> None:
    tensor = raw.tensor
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise ArgumentError(
            f"roles must keep {raw.name!r} live, got 'average' for {_dtype_name(tensor)} values."
        )
    if may_hold_anything(tensor):
        raise ArgumentError(
            f"{raw.name!r} must be an ordinary tensor, got the subclass {type(tensor).__name__}. "
            f"Leave it live with exclude={raw.name!r}."
        )
    check_can_be_cut(tensor, raw.name)
    if tensor.layout != torch.strided:
        raise ArgumentError(
            f"{raw.name!r} must be a dense tensor, got layout {tensor.layout}. "
            f"Leave it live with exclude={raw.name!r}."
        )


def may_hold_anything(tensor: Tensor) -> bool:
    """A subclass that only tags ordinary memory is fine; one that dispatches may hold anything.

    `DTensor` is known, and what it holds is looked at in its place.
    """
    return type(local(tensor)).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _selector(
    selector: Selector | None, argument: str, names: Sequence[str]
) -> Callable[[str, Tensor], bool] | None:
    if selector is None or callable(selector):
        return selector
    if not isinstance(selector, Iterable) or not all(isinstance(p, str) for p in selector):
        raise ArgumentError(
            f"{argument} must be a pattern, several, or a function of name and tensor, "
            f"got {selector!r}."
        )
    patterns = [selector] if isinstance(selector, str) else list(selector)
    _check_patterns(patterns, argument, names)
    return lambda name, _: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _override(
    roles: RoleOverride | None, names: Sequence[str]
) -> Callable[[str, Tensor], Role | None]:
    table: Mapping[str, Role] = {} if roles is None or callable(roles) else roles
    _check_patterns(list(table), "roles", names)

    def from_table(name: str, _: Tensor) -> Role | None:
        return next((r for p, r in table.items() if fnmatch.fnmatchcase(name, p)), None)

    choose = roles if callable(roles) else from_table

    def checked(name: str, tensor: Tensor) -> Role | None:
        role = choose(name, tensor)
        if role not in ("average", "live", None):
            raise ArgumentError(f"roles must say 'average' or 'live', got {role!r} for {name!r}.")
        return role

    return checked


def _check_patterns(patterns: Sequence[str], argument: str, names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ArgumentError(
                f"{argument} must match a tensor of the model, got {pattern!r} which matches none "
                f"of {len(names)} names such as {list(names[:3])}."
            )


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
