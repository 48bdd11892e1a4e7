"""The shadow dictionary: `register`, `update`, `apply_shadow`, `restore` on polyak's engine."""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, final

import torch
from torch import Tensor, nn

from .._average import Average
from .._errors import ArgumentError, MatchError, OrderError
from .._schedules import Exponential
from ._past import take_up
from ._prefix import bare_names


@final
class EMA:
    """The exponential moving average of a model's trainable parameters, kept in a dictionary.

    shadow = decay * shadow + (1 - decay) * live, from the live parameters at `register()`

    The loop is: `register()` once, `update()` after each step of the optimizer, `apply_shadow()`
    before evaluation, `restore()` after it. A shadow that was saved with `torch.save(ema.shadow)`,
    here or by the class this replaces, is taken up by assignment, `ema.shadow = torch.load(…)`;
    a file of a wrapped or compiled model too.

    What is better:

    - The trained weights come back bit for bit, and the parameters stay the same memory: compiled
      code and CUDA graphs see the change. Buffers that move during evaluation come back too.
    - A second `apply_shadow()`, which would lose the trained weights, is an error; so are an
      `update()` of an applied average, and training in between, which `restore()` reports.
    - Every call at the wrong moment, a parameter that was replaced and one that was unfrozen after
      `register()` is an error that says what to do, not a failed assertion.
    - float32 averages of half-precision weights; NaN and inf stay out.
    - Names are those of the bare model, wrapped or not.

    The same without this class, and without a `restore` to forget:

        average = polyak.Average(model, polyak.Exponential(decay=decay, debias=False))
        average.follow(optimizer)
        with average.applied():
            evaluate(model)

    (which averages floating buffers as well).

    Args:
        model: the model that trains, wrapped or not.
        decay: share of the shadow that survives an update, in [0, 1]; fixed. For one that changes
            use a schedule, such as `polyak.CountRamp`.

    Raises:
        ArgumentError: a decay out of range.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> ema = EMA(model, 0.999)
        >>> ema.register()
        >>> ema.update()
        >>> ema.apply_shadow()
        >>> y = model(torch.ones(1, 2))
        >>> ema.restore()
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        self._schedule = Exponential(decay=decay, debias=False)
        self._model = model
        self._average: Average | None = None
        self._lent: Callable[[], object] | None = None

    @property
    def model(self) -> nn.Module:
        """The model that trains."""
        return self._model

    @property
    def decay(self) -> float:
        """Share of the shadow that survives an update."""
        assert self._schedule.decay is not None
        return self._schedule.decay

    @decay.setter
    def decay(self, decay: float) -> None:
        raise OrderError(
            f"decay must stay {self.decay}, got {decay!r}. For a decay that changes use a "
            "schedule, such as polyak.Average(model, polyak.CountRamp(0.999))."
        )

    @property
    def average(self) -> Average:
        """The `polyak.Average` behind it: `report()`, `follow()`, `state_dict()` and the rest."""
        if self._average is None:
            raise OrderError(
                "register() must come first, got no shadow yet. Call it once, before training."
            )
        return self._average

    @property
    def shadow(self) -> MutableMapping[str, Tensor]:
        """The averages by name, empty before `register()`.

        Tensors are the memory of the average: what is written into them, or assigned to a name, is
        in the average. Saved with torch.save it is a plain dictionary. Inside `apply_shadow()` it
        shows copies.

        Assigned as a whole, it is checked, then taken for the initial weights of the average.
        """
        return {} if self._average is None else _Shadow(self._average)

    @shadow.setter
    def shadow(self, shadow: Mapping[str, Tensor]) -> None:
        average = self._average or self._build()
        take_up(average, tensors=_bare_names(shadow, average.tensors))
        self._average = average

    @property
    def backup(self) -> dict[str, Tensor]:
        """The trained parameters while the averages are applied (copies); else empty."""
        if self._lent is None:
            return {}
        live: Mapping[str, Tensor] = self.average.state_dict()["live"]
        return {name: live[name] for name in self.average.tensors}

    def register(self) -> None:
        """Copy every trainable parameter: the average starts here. Again: it starts again.

        Raises:
            ArgumentError: no parameter is trainable.
            OrderError: between `apply_shadow()` and `restore()`.
        """
        if self._average is None:
            self._average = self._build()
        else:
            self._check_trainable_as_registered(self._average)
            self._average.reset(now=0)

    def update(self) -> None:
        """Fold in the live parameters as they are now: after each step of the optimizer.

        Raises:
            MatchError: a parameter that was replaced, resized, or unfrozen since `register()`.
            OrderError: before `register()`; between `apply_shadow()` and `restore()`.
        """
        average = self.average
        self._check_trainable_as_registered(average)
        average.update()

    def apply_shadow(self) -> None:
        """Put the averages into the model; the trained weights are kept for `restore()`.

        An EMA that is deleted before that gives them back, and so does the end of the process.

        Raises:
            OrderError: before `register()`; when they are applied already.
        """
        if self._lent is not None:
            raise OrderError(
                "apply_shadow must come after restore, got it twice in a row. "
                "Call restore() to have the trained weights back first."
            )
        lent = self.average.applied()
        lent.__enter__()
        # Also when this object goes, and before the interpreter does: torch is half gone by the
        # time that a generator left open is closed.
        self._lent = weakref.finalize(self, lent.__exit__, None, None, None)

    def restore(self) -> None:
        """Bring the trained weights back.

        Raises:
            OrderError: without `apply_shadow()`; or, after they are back, when parameters were
                changed in between.
        """
        if self._lent is None:
            raise OrderError(
                "restore must come after apply_shadow, got it without. "
                "The model holds the trained weights."
            )
        give_back, self._lent = self._lent, None
        give_back()

    def _build(self) -> Average:
        return Average(
            self._model, self._schedule, include=lambda _, tensor: isinstance(tensor, nn.Parameter)
        )

    @staticmethod
    def _check_trainable_as_registered(average: Average) -> None:
        for entry in average._engine.inventory.entries:
            if entry.why == "frozen parameter" and entry.live().requires_grad:
                raise MatchError(
                    f"{entry.name!r} must stay frozen, as it was at register(), got it trainable. "
                    "Unfreeze first, then build an EMA and register()."
                )


class _Shadow(MutableMapping[str, Tensor]):
    """The averages by name, written through; the names are fixed."""

    def __init__(self, average: Average) -> None:
        self._average, self._tensors = average, average.tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._average._engine.check_not_lent("an assignment to shadow")
        if not isinstance(value, Tensor):
            raise ArgumentError(
                f"shadow must hold tensors, got {type(value).__name__} for {name!r}. "
                "Pass torch.as_tensor(value)."
            )
        ours = self._tensors.get(name)
        if ours is None or ours.shape != value.shape:
            raise MatchError(
                f"shadow must keep its names and shapes, got {name!r} {list(value.shape)}. "
                "Build the model as it was saved."
            )
        with torch.no_grad():
            ours.copy_(value)

    def __delitem__(self, name: str) -> None:
        raise MatchError(f"shadow must keep its names, got {name!r} to delete.")

    def __repr__(self) -> str:
        return repr(dict(self._tensors))

    def __reduce__(self) -> tuple[Any, ...]:
        # A file must load where polyak is not installed, and with weights_only=True.
        return OrderedDict, (), None, None, iter(self._tensors.items())


def _bare_names(shadow: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by canonical name: the prefixes of a wrapped model are stripped."""
    wrong = [name for name, value in shadow.items() if not isinstance(value, Tensor)]
    if wrong:
        raise ArgumentError(f"shadow must hold tensors by name, got something else in {wrong[:3]}.")
    names = bare_names(shadow, ours)
    return {names[name]: value for name, value in shadow.items()}
