"""TensorFlow's `tf.train.ExponentialMovingAverage` over torch tensors, on polyak's engine."""

import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from .._average import Average
from .._errors import ArgumentError, MatchError, OrderError
from .._roles import take_inventory
from .._schedules import Exponential, Schedule
from ._past import take_up

Variables: TypeAlias = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]
Count: TypeAlias = float | Tensor | Callable[[], float]


@final
class ExponentialMovingAverage:
    """Averages of variables as `tf.train.ExponentialMovingAverage` keeps them.

    average -= (1 - d) (average - variable),  d = decay or min(decay, (1 + n) / (10 + n)), n =
    `num_updates`; https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage

    Torch tensors have no names, so give them: `apply({"v": v})`, or `apply(model)` for the
    trainable parameters of a module. A bare list works too; its tensors are told apart as objects
    and named Variable, Variable_1, …, as TensorFlow does.

    A variable's average starts at its value at the first `apply`. A computed tensor, which is
    another object each time, starts at zero and is corrected as in Adam: that is what
    `zero_debias=True` says of every tensor that is no parameter. It must come by name.

    What is better:

    - float32 averages of half-precision variables; NaN and inf stay out; tied weights once.
    - A computed tensor without `zero_debias`, whose average TensorFlow leaves too small by
      decay ** updates, is an error. So is one with `num_updates`: the correction assumes that the
      decay is constant.
    - A decay outside [0, 1] and a variable of another shape are errors.

    What is refused: `apply()` without variables, since torch keeps no list of them, and `apply` of
    a part of what came in together, for which there are two objects.

    The same without this class:

        average = polyak.Average(model, polyak.Exponential(decay=0.99, debias=False))
        average.follow(optimizer)
        polyak.Average(model, polyak.CountRamp(0.99))  # num_updates counted by itself, from 1

    and `with average.applied():` in place of `variables_to_restore`.

    Args:
        decay: share of the average that survives an update, in [0, 1].
        num_updates: count for the warm-up, at least 0: a number, a tensor or a function, read at
            each `apply`.
        zero_debias: whether tensors that are no parameters are computed ones.
        name: ending of the averages' names.

    Raises:
        ArgumentError: a value out of range.

    Examples:
        >>> v = nn.Parameter(torch.zeros(2))
        >>> ema = ExponentialMovingAverage(0.5)
        >>> ema.apply({"v": v})
        >>> _ = v.data.add_(1.0)
        >>> ema.apply({"v": v})
        >>> ema.average(v), ema.average_name(v)
        (tensor([0.5000, 0.5000]), 'v/ExponentialMovingAverage')
    """

    def __init__(
        self,
        decay: float,
        num_updates: Count | None = None,
        zero_debias: bool = False,
        name: str = "ExponentialMovingAverage",
    ) -> None:
        # Checks the decay; that of the computed tensors is checked when some come.
        self._constant = Exponential(decay=decay, debias=False)
        self._num_updates = num_updates
        self._zero_debias = zero_debias
        self._name = name
        self._warm = _Warm(float(decay))
        self._groups: list[_Group] = []
        if num_updates is not None and not callable(num_updates):  # which may not know it yet
            _count(num_updates)

    @property
    def name(self) -> str:
        """Ending of the averages' names."""
        return self._name

    @property
    def averages(self) -> tuple[Average, ...]:
        """The `polyak.Average`s behind it, one for each list of variables that came in together."""
        return tuple(group.average for group in self._groups)

    def apply(self, var_list: Variables | None = None) -> None:
        """Create the averages of the variables that are new, then update all that are given.

        Args:
            var_list: a module (its trainable parameters), tensors by name, or a list of tensors.

        Raises:
            ArgumentError: not floating tensors; computed ones without a name or `zero_debias`.
            MatchError: a part of the variables that came in together; another shape, or another
                parameter object, under a known name; a known variable under another name.
        """
        if var_list is None:
            raise ArgumentError(
                "var_list must be given, got None: torch keeps no list of the variables. "
                "Pass the model, or tensors by name."
            )
        given = self._named(var_list)
        if not given:
            raise ArgumentError("var_list must have something to average, got no variables at all.")
        known = [group for group in self._groups if not given.keys().isdisjoint(group.live)]
        for group in known:
            _check_goes_on(group, given)
        old = {name for group in known for name in group.live}
        new = {name: tensor for name, tensor in given.items() if name not in old}
        for name, tensor in new.items():
            if (known_as := self._name_of(tensor)) is not None:
                raise MatchError(
                    f"{name!r} must have the name it had, {known_as!r}, at its first apply: it has "
                    "an average already. Give the same names, or the same list, each time."
                )
        if self._num_updates is not None:
            self._warm.count = _count(self._num_updates)
        fresh = [
            self._group(
                {n: t for n, t in new.items() if self._is_computed(t) is computed}, computed
            )
            for computed in {self._is_computed(tensor) for tensor in new.values()}
        ]
        self._groups += fresh
        for group in (*known, *fresh):
            group.live.update((name, given[name]) for name in group.live)
            group.average.update()

    def average(self, var: Tensor | str) -> Tensor | None:
        """Return the average of a variable (or of the one of that name); None if it has none.

        It is the memory of the average, in float32 for anything narrower: for reading; what is
        written into it is in the average.
        """
        name = var if isinstance(var, str) else self._name_of(var)
        for group in self._groups:
            if name in group.live:
                return group.average.tensors[group.canonical(name)]
        return None

    def average_name(self, var: Tensor | str) -> str:
        """Return the name of the average of a variable, such as v/ExponentialMovingAverage.

        Raises:
            ArgumentError: a tensor that was never given to `apply`.
        """
        name = var if isinstance(var, str) else self._name_of(var)
        if name is None:
            raise ArgumentError(
                f"var must be a name, or a variable that was given to apply, got a tensor of shape "
                f"{list(var.shape) if isinstance(var, Tensor) else var}. Pass its name."
            )
        return f"{name}/{self._name}"

    def variables_to_restore(
        self, moving_avg_variables: Variables | None = None
    ) -> dict[str, Tensor]:
        """Return the names in a checkpoint and the variables to load from there.

        So a model is loaded with its averages:

            for name, variable in ema.variables_to_restore(model).items():
                variable.data.copy_(checkpoint[name])

        Args:
            moving_avg_variables: a module, whose trainable parameters are to come from their
                averages and all else from its own name; or the variables that have averages, by
                name. None: those that were given to `apply`.

        Raises:
            OrderError: neither variables nor an earlier `apply`.
        """
        if moving_avg_variables is None:
            if not self._groups:
                raise OrderError(
                    "variables_to_restore must come after apply, or be given the model, got "
                    "neither. Pass the model that is to be loaded."
                )
            groups = [group for group in self._groups if not group.computed]
            averaged = {name: tensor for group in groups for name, tensor in group.live.items()}
            return {self.average_name(name): tensor for name, tensor in averaged.items()}
        averaged = self._named(moving_avg_variables)
        result = {self.average_name(name): tensor for name, tensor in averaged.items()}
        if isinstance(moving_avg_variables, nn.Module):
            inventory = take_inventory(moving_avg_variables)
            for name, index in inventory.order:
                if name not in averaged and inventory.entries[index].name not in averaged:
                    result[name] = inventory.entries[index].live()
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """The averages (references) by their names in a TensorFlow checkpoint.

        Of computed tensors also `…/biased` and `…/local_step`, as there. For a resume that goes on
        with polyak's own counters save the `state_dict` of the `averages`.
        """
        state = {}
        for group in self._groups:
            tensors = group.average.tensors
            for name in group.live:
                value = tensors[group.canonical(name)]
                key = self.average_name(name)
                state[key] = value
                if group.computed:
                    steps = group.average.updates
                    weight = 1.0 - float(self._constant(now=steps, elapsed=steps)) if steps else 0.0
                    state[f"{key}/biased"] = value * weight
                    state[f"{key}/local_step"] = torch.tensor(float(steps))
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from averages saved by their names, here or (as arrays) by TensorFlow.

        Other names in `state` are left alone.

        Raises:
            OrderError: before the first `apply`, which says what there is.
            MatchError: a name that is missing, or another shape. Nothing is changed then.
        """
        if not self._groups:
            raise OrderError(
                "load_state_dict must come after the first apply, got it before. "
                "Call apply(variables) once, then load."
            )
        found = [self._saved(group, state) for group in self._groups]
        for group, (tensors, steps) in zip(self._groups, found, strict=True):
            take_up(group.average, tensors=tensors, updates=steps)

    def _saved(self, group: "_Group", state: Mapping[str, Any]) -> tuple[dict[str, Tensor], int]:
        """The tensors of a group in a state, and how many updates made them where that counts."""
        tensors, steps = {}, set()
        for name, ours in group.average.tensors.items():
            key = self.average_name(name)
            wanted = [key, f"{key}/local_step"] if group.computed else [key]
            missing = [name for name in wanted if name not in state]
            if missing:
                raise MatchError(
                    f"the state must hold {missing[0]!r}, got {sorted(map(str, state))[:3]}. "
                    "Name the variables as they were when it was saved."
                )
            tensors[name] = torch.as_tensor(state[key])
            if tensors[name].shape != ours.shape:
                raise MatchError(
                    f"{key!r} must have shape {list(ours.shape)}, got {list(tensors[name].shape)}."
                )
            if group.computed:
                steps.add(int(state[f"{key}/local_step"]))
        if len(steps) > 1:
            raise MatchError(
                f"computed tensors must have been averaged together, got {sorted(steps)} updates. "
                "Load each into an object of its own."
            )
        return tensors, max(steps, default=0)

    def _group(self, live: dict[str, Tensor], computed: bool) -> "_Group":
        schedule: Schedule = self._constant if self._num_updates is None else self._warm
        if computed:
            if self._num_updates is not None:
                raise ArgumentError(
                    f"num_updates must be None for computed tensors, got it with {sorted(live)[:3]}"
                    ": the correction assumes a constant decay. Use two objects."
                )
            schedule = Exponential(decay=self._constant.decay, debias=True)
        return _Group(live, Average(live, schedule), computed)

    def _is_computed(self, tensor: Tensor) -> bool:
        return self._zero_debias and not isinstance(tensor, nn.Parameter)

    def _named(self, variables: Variables) -> dict[str, Tensor]:
        """The tensors that are given, each under its name; refuse what cannot be averaged."""
        if isinstance(variables, nn.Module):
            entries = take_inventory(variables).entries
            named = {e.name: e.live() for e in entries if e.why == "trainable parameter"}
        elif isinstance(variables, Mapping):
            named = dict(variables)
        elif isinstance(variables, Tensor) or not isinstance(variables, Iterable):
            raise ArgumentError(
                "variables must be a module, tensors by name or a list of tensors, got "
                f"{type(variables).__name__}. Pass the model."
            )
        else:
            named = self._with_names(variables)
        for name, tensor in named.items():
            if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
                what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ArgumentError(f"variables must be floating tensors, got {what} in {name!r}.")
            if not (tensor.is_leaf or self._zero_debias):
                raise ArgumentError(
                    f"{name!r} must be a variable, got a computed tensor: from zero, its average "
                    "would be too small. Build with zero_debias=True, or detach it."
                )
        return named

    def _with_names(self, variables: Iterable[Tensor]) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        taken = {name for group in self._groups for name in group.live}
        for tensor in {id(tensor): tensor for tensor in variables}.values():
            if isinstance(tensor, Tensor) and (self._is_computed(tensor) or not tensor.is_leaf):
                raise ArgumentError(
                    "computed tensors must come by name, since each is another object, got a list. "
                    'Pass {"loss": loss}.'
                )
            name, number = self._name_of(tensor) or "Variable", 0
            while name in named or (name in taken and self._name_of(tensor) != name):
                number += 1
                name = f"Variable_{number}"
            named[name] = tensor
        return named

    def _name_of(self, tensor: Tensor) -> str | None:
        for group in self._groups:
            for name, live in group.live.items():
                if live is tensor:
                    return name
        return None


@dataclass(eq=False)
class _Warm:
    """min(decay, (1 + n) / (10 + n)) for the count n of this `apply`, whatever the clock says."""

    decay: float
    count: float = 0.0

    def __call__(self, *, now: float, elapsed: float) -> float:
        return min(self.decay, (1.0 + self.count) / (10.0 + self.count))

    def __repr__(self) -> str:
        return f"min({self.decay}, (1 + num_updates) / (10 + num_updates))"


@dataclass(frozen=True, eq=False)
class _Group:
    """Variables that came in together, and their average."""

    live: dict[str, Tensor]  # the average's own mapping: what is put here is what it averages
    average: Average
    computed: bool

    def canonical(self, name: str) -> str:
        """The one name that a tied tensor has in the average."""
        inventory = self.average._engine.inventory
        return inventory.entries[inventory.index[name]].name


def _check_goes_on(group: _Group, given: Mapping[str, Tensor]) -> None:
    """Raise `MatchError` unless all of a group are given, and are what they were."""
    missing = sorted(set(group.live) - set(given))
    if missing:
        raise MatchError(
            f"variables that came in together must be applied together, got none for {missing[:3]}."
            " Use one ExponentialMovingAverage for each list."
        )
    for name, live in group.live.items():
        now = given[name]
        if now.shape != live.shape or (isinstance(live, nn.Parameter) and now is not live):
            found = "another parameter" if now.shape == live.shape else f"{list(now.shape)}"
            raise MatchError(
                f"{name!r} must be the variable it was, of shape {list(live.shape)}, got {found}. "
                "Build a new ExponentialMovingAverage after layers are replaced."
            )


def _count(source: Count) -> float:
    """What `num_updates` says now."""
    count: object = source() if callable(source) else source
    if isinstance(count, Tensor) and count.numel() == 1:
        count = count.item()
    real = isinstance(count, numbers.Real) and not isinstance(count, bool)
    if not (real and float(count) >= 0.0):  # type: ignore[arg-type]  # it is Real here
        raise ArgumentError(f"num_updates must be a number, at least 0, got {count!r}.")
    return float(count)  # type: ignore[arg-type]
