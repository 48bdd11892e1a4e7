"""YOLOv5's `ModelEMA` on polyak's engine: change the import, keep the loop."""

from collections.abc import Callable, Collection
from typing import final

import torch
from torch import Tensor, nn

from .._average import Average
from .._errors import ArgumentError, MatchError, OrderError
from .._module import averaged_module
from .._roles import inner_name
from .._schedules import ExponentialRamp
from ._past import take_up
from ._roles import frozen_too


@final
class ModelEMA:
    """The exponential moving average of a model as YOLOv5 keeps it, beside the live model.

    v = d v + (1 - d) live,  d = decay (1 - exp(-updates / tau)), for every floating entry of the
    state dict, parameters (frozen ones too) and buffers; https://github.com/ultralytics/yolov5

    Names, arguments and numbers are the original's, and so are the lines that resume:

        ema.ema.load_state_dict(checkpoint["ema"].float().state_dict())
        ema.updates = checkpoint["updates"]

    What is better:

    - Integer buffers (BatchNorm's counter) follow the live model; the original keeps the first.
    - Tied weights are averaged once an update, not once a name.
    - NaN and inf stay out; the singular vectors of spectral norm stay of length one.
    - float32 averages of half-precision weights, which would stand still in their own dtype. `ema`
      is float32 then: call it under autocast.
    - Validation that turns `ema` into half precision and back leaves the average as it was.
    - An update from another model than the one it was built from is an error, and so is a layer
      that was replaced.
    - Models that were compiled or have been through a forward pass with weight norm are copied too.
    - Exact resume: `ema.average.state_dict()`, where the files of the original hold half precision.

    The same without this class:

        average = polyak.Average(model, polyak.ExponentialRamp(0.9999, tau=2000))
        average.follow(optimizer)  # only steps really taken, in place of update()
        ema = average.module()

    Args:
        model: the model that trains, wrapped or not.
        decay: final decay per update, in [0, 1].
        tau: time constant of the ramp, in updates, above 0.
        updates: updates that the weights have behind them.

    Raises:
        ArgumentError: a value out of range, a model without a floating tensor.
        OrderError: lazy parameters without a shape.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> ema = ModelEMA(model)
        >>> ema.update(model)
        >>> ema.updates, ema.ema.training
        (1, False)
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.9999, tau: float = 2000, updates: int = 0
    ) -> None:
        _check_count(updates)
        schedule = ExponentialRamp(decay, tau=tau)
        self._model = _layers(model)[-1]
        # `ema` shares all memory of the average, so that what is loaded into it is in the average:
        # hence one dtype for all where some are narrower than float32, and buffers too.
        narrow = any(_is_narrow(tensor) for tensor in self._model.state_dict().values())
        dtype = torch.float32 if narrow else None
        self._average = Average(model, schedule, dtype=dtype, roles=frozen_too)
        self._ema = averaged_module(
            self._average._engine,
            self._average._row,
            model,
            dtype=dtype,
            share_buffers=True,
            before=self._average._refresh,
        )
        if updates:
            take_up(self._average, updates=updates)

    @property
    def average(self) -> Average:
        """The `polyak.Average` behind it: `report()`, `applied()`, `follow()`, `state_dict()`."""
        return self._average

    @property
    def ema(self) -> nn.Module:
        """The averaged model, in evaluation mode, without gradients. Its tensors are the average.

        It cannot be assigned: load into it.
        """
        self._average._engine.show()  # a cast there and back gave it memory of its own
        return self._ema

    @ema.setter
    def ema(self, model: nn.Module) -> None:
        raise OrderError(
            "ema must stay the module that shows the average, got another one. "
            "Load into it: ema.ema.load_state_dict(model.float().state_dict())."
        )

    @property
    def updates(self) -> int:
        """Updates so far, on which the decay depends.

        Assigned after a load into `ema`, it says how many updates made what was loaded.
        """
        return int(self._average.now)

    @updates.setter
    def updates(self, updates: int) -> None:
        _check_count(updates)
        if updates != self.updates:
            take_up(self._average, updates=updates)

    @property
    def decay(self) -> Callable[[float], float]:
        """The decay of update number n, as a function of n; 0 at 0. It cannot be assigned."""
        return self._decay_at

    @decay.setter
    def decay(self, decay: object) -> None:
        raise OrderError(
            f"decay must stay {self._average.schedule}, got {decay!r}. Build a new ModelEMA, or "
            "use polyak.Average(model, schedule) with a schedule of your own."
        )

    def _decay_at(self, updates: float) -> float:
        return self._average.schedule(now=updates, elapsed=1) if updates else 0.0

    def update(self, model: nn.Module) -> None:
        """Fold in the weights of `model` as they are now: after each step of the optimizer.

        Raises:
            MatchError: another model than the one this was built from, or a replaced parameter.
            OrderError: inside `average.applied()`.
        """
        self._check_is_ours(model)
        self._average.update()

    def update_attr(
        self,
        model: nn.Module,
        include: Collection[str] = (),
        exclude: Collection[str] = ("process_group", "reducer"),
    ) -> None:
        """Copy plain attributes (class names, strides, class weights, …) from `model` to `ema`.

        Those of the bare model; of what was put on a wrapper around it, what `include` names.
        Never `training`, names that begin with an underscore, or what replaces a method: that
        would run the live model.

        Args:
            model: the model this was built from, wrapped or not.
            include: only these names; all when empty.
            exclude: never these.

        Raises:
            MatchError: another model than the one this was built from.
        """
        self._check_is_ours(model)
        for layer in reversed(_layers(model)):  # what is put on a wrapper is the newer
            for name, value in vars(layer).items():
                wanted = name in include if include else layer is self._model
                barred = name.startswith("_") or name == "training" or name in exclude
                if wanted and not barred and not callable(getattr(type(self._ema), name, None)):
                    setattr(self._ema, name, value)

    def _check_is_ours(self, model: nn.Module) -> None:
        if _layers(model)[-1] is not self._model:
            raise MatchError(
                "model must be the one that this ModelEMA was built from, wrapped or not, got "
                f"another {type(model).__name__}. Build a ModelEMA of the model that trains."
            )


def _layers(model: nn.Module) -> list[nn.Module]:
    """The wrappers around a model, the outermost first, and the bare model last."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    layers = [model]
    while (inner := inner_name(layers[-1])) is not None:
        layers.append(layers[-1].get_submodule(inner))
    return layers


def _is_narrow(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.element_size() < 4


def _check_count(updates: object) -> None:
    if not isinstance(updates, int) or isinstance(updates, bool) or updates < 0:
        raise ArgumentError(f"updates must be a whole number, at least 0, got {updates!r}.")
