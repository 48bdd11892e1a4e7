"""`torch.optim.swa_utils` on polyak's engine: `AveragedModel`, `update_bn`, and torch's rest."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR as SWALR
from torch.optim.swa_utils import get_ema_avg_fn as get_ema_avg_fn
from torch.optim.swa_utils import get_ema_multi_avg_fn as get_ema_multi_avg_fn
from torch.optim.swa_utils import get_swa_avg_fn as get_swa_avg_fn
from torch.optim.swa_utils import get_swa_multi_avg_fn as get_swa_multi_avg_fn
from torch.optim.swa_utils import update_bn as _update_bn

from .._average import Average
from .._checks import check_device
from .._errors import ArgumentError, OrderError
from .._roles import Role, bare
from .._schedules import After, Exponential, Schedule, Uniform
from ._wrapper import AverageModule

AvgFn = Callable[[Tensor, Tensor, Tensor | int], Tensor]
MultiAvgFn = Callable[[list[Tensor], list[Tensor], Tensor | int], None]


@final
class AveragedModel(AverageModule):
    """`torch.optim.swa_utils.AveragedModel`: same arguments, names, files and numbers.

    The first `update_parameters` copies; from then on the mean of all models seen, or what the
    averaging function says. In polyak's own words:

        average = polyak.Average(model, polyak.Uniform())              # AveragedModel(model)
        ema = polyak.Exponential(decay=0.999, debias=False)
        average = polyak.Average(model, polyak.After(1, ema))          # with get_ema_avg_fn(0.999)
        average.update()                                               # update_parameters(model)
        polyak.refresh_norms(average, batches)                         # update_bn(loader, averaged)

    Deliberately better:

    - integer and boolean buffers follow the live model, where torch averages counters and flags as
      if they were weights (`use_buffers=True`) and so stops them;
    - bf16 and fp16 weights are averaged in float32; `module` shows them in their own dtype, files
      hold all digits;
    - tensors meet by name, not by position; DDP and compile around the model do not matter, and
      another model of the same class may be passed to any update;
    - NaN and inf do not get into an average; tied weights are one;
    - what `update_bn` computed is also what `average.applied()` and `polyak.save` use;
    - a load checks everything before it writes; a function that is no mix of the two is refused.

    Differences to know: `module` wants no gradient, its memory is the average's. Buffers outside
    the state dict and the unit vectors of spectral norm are those of the live model.

    Args:
        model: the model to be averaged, wrapped or not.
        device: where the average lives; None for beside the model.
        avg_fn: `(averaged, live, n) -> averaged`, any fixed share of the two for a given count n of
            models so far. It is asked on a few numbers, once an update.
        multi_avg_fn: the same in place on lists of tensors; give one of the two or none.
        use_buffers: average floating buffers too, instead of copying them.

    Raises:
        ArgumentError: both functions; one that is no mix; a model with nothing to average.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        >>> averaged.update_parameters(model)
        >>> int(averaged.n_averaged), averaged.average.schedule
        (1, After(start=1, schedule=Exponential(decay=0.99, debias=False)))
    """

    _child, _counter = "module", "n_averaged"
    module: nn.Module
    n_averaged: Tensor

    def __init__(
        self,
        model: nn.Module,
        device: int | torch.device | str | None = None,
        avg_fn: AvgFn | None = None,
        multi_avg_fn: MultiAvgFn | None = None,
        use_buffers: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model must be a module, got {type(model).__name__}.")
        self.avg_fn, self.multi_avg_fn, self.use_buffers = avg_fn, multi_avg_fn, use_buffers
        self._built_with = self._settings()
        self._schedule = _schedule(avg_fn, multi_avg_fn)
        if isinstance(device, int):  # the index of an accelerator
            device = torch.device(device)
        self._device = None if device is None else check_device(device)
        self._average = self._build(model)
        self._adopt_child(self._show(self._average))
        for part, live in zip(self.module.modules(), bare(model).modules(), strict=True):
            part.training = live.training
        with torch.inference_mode(False):
            self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long))
        if self._device is not None:
            self.to(self._device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the averaged model."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Fold in the weights of `model` as they are now.

        Raises:
            MatchError: a model with other tensors than the first one.
            ArgumentError: `n_averaged` below 0.
            OrderError: inside `average.applied()`; a setting that was changed; `n_averaged` and
                the average both set from outside, to different counts.
        """
        if self._settings() != self._built_with:
            raise OrderError(
                "avg_fn, multi_avg_fn and use_buffers must stay as they were at construction, got "
                "others. Build another AveragedModel and load the state_dict() of this one."
            )
        self._reconcile()
        self._follow(model)
        # The time is said, since an optimizer may be followed as well.
        self.average.update(now=self.average.now + 1)
        self.n_averaged += 1
        self._note()

    def _settings(self) -> tuple[Any, ...]:
        return self.avg_fn, self.multi_avg_fn, self.use_buffers

    def _build(self, model: nn.Module) -> Average:
        return Average(model, self._schedule, device=self._device, roles=self._role)

    def _role(self, name: str, tensor: Tensor) -> Role | None:
        """Frozen parameters are averaged too: torch goes on when they are unfrozen."""
        if type(tensor) is nn.Parameter:
            return "average" if tensor.is_floating_point() or tensor.is_complex() else "live"
        return None if self.use_buffers or isinstance(tensor, nn.Parameter) else "live"

    def _restore_clock(self) -> None:
        self._go_on_after(self._count())

    def _accept_average(self, *, counted: bool) -> None:
        updates = self.average.updates
        if counted and self._count() != updates:
            raise OrderError(
                f"n_averaged must be {updates}, as the average says that was updated, loaded or "
                f"reset by itself, got {self._count()}. Set one of the two only."
            )
        self.n_averaged.fill_(updates)

    def _keep_statistics(self) -> None:
        """Make the running statistics that `module` holds now those of the average."""
        kept = ("running_mean", "running_var")
        self._write({n: b for n, b in self.module.named_buffers() if n.endswith(kept)}, "")


def update_bn(
    loader: Iterable[Any],
    model: nn.Module,
    device: int | torch.device | None = None,
) -> None:
    """Recompute batch-norm statistics by one pass over `loader`, as torch's function does.

    On an `AveragedModel` of polyak the result also becomes part of its average, until the next
    update. `polyak.refresh_norms` does better: it pools the batches exactly, leaves dropout off and
    undoes everything when the data raises.

    Args:
        loader: batches, or tuples that start with one.
        model: an `AveragedModel`, or any module.
        device: where the batches go first.
    """
    if isinstance(model, AveragedModel):
        model.average._engine.check_not_lent("update_bn")
    _update_bn(loader, model, device)
    if isinstance(model, AveragedModel):
        model._keep_statistics()


# ── which schedule a function of torch's kind is ─────────────────────────────────────────────────


def _schedule(avg_fn: AvgFn | None, multi_avg_fn: MultiAvgFn | None) -> Schedule:
    """The rule that the functions stand for, in polyak's words where they are torch's own."""
    if avg_fn is not None and multi_avg_fn is not None:
        raise ArgumentError("avg_fn or multi_avg_fn must be given, not both, got both.")
    function = avg_fn if avg_fn is not None else multi_avg_fn
    if function is None:
        return Uniform()
    if not callable(function):
        raise ArgumentError(
            f"avg_fn and multi_avg_fn must be functions of averaged, live and count, "
            f"got {function!r}. For example get_ema_multi_avg_fn(0.999)."
        )
    asked = Asked(function, in_place=avg_fn is None)
    first, later = asked(now=2, elapsed=1), asked(now=4, elapsed=1)
    if getattr(function, "__module__", "") != "torch.optim.swa_utils":
        return asked
    # torch's own depend on nothing else, so two answers tell which one it is.
    return After(1, Exponential(decay=first, debias=False)) if first == later else Uniform()


@dataclass(frozen=True)
class Asked:
    """The decay that an averaging function of torch's kind applies after n models, n = now - 1.

    f(a, w, n) = decay a + (1 - decay) w, so decay = f(1, 0, n); f(0, 1, n) and one point more must
    agree. The first model is copied, whatever the function says.

    Args:
        function: `(averaged, live, n)`, on tensors or in place on lists of them.
        in_place: which of the two.
    """

    function: Callable[..., Any]
    in_place: bool

    def __call__(self, *, now: float, elapsed: float) -> float:
        """Return the decay, asked anew: the function may depend on anything."""
        count = round(now) - 1
        if count == 0:
            return 0.0
        # A vector and a matrix, for a rule that treats biases in another way than weights.
        answers = [self._answer(count, shape) for shape in ([3], [3, 1])]
        decay = float(answers[0][0])
        for kept, taken, mixed in (answer.tolist() for answer in answers):
            right = (decay, 1.0 - decay, decay * -2.5 + (1.0 - decay) * 0.75)
            found = (kept, taken, mixed)
            agree = all(abs(a - b) <= 1e-6 for a, b in zip(found, right, strict=True))
            if not (agree and 0.0 <= decay <= 1.0):
                raise ArgumentError(
                    "avg_fn must return decay * averaged + (1 - decay) * live, with one decay in "
                    f"[0, 1] for all tensors, got {kept:.6g} for (1, 0), {taken:.6g} for (0, 1) "
                    f"and {mixed:.6g} for (-2.5, 0.75) at n={count}. Write it as a schedule: "
                    "polyak.Average(model, lambda *, now, elapsed: ...)."
                )
        return decay

    def _answer(self, count: int, shape: list[int]) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            averaged = torch.tensor([1.0, 0.0, -2.5], dtype=torch.float64).reshape(shape)
            live = torch.tensor([0.0, 1.0, 0.75], dtype=torch.float64).reshape(shape)
            if self.in_place:
                self.function([averaged], [live], torch.tensor(count))
                return averaged.reshape(-1)
            answer = self.function(averaged, live, torch.tensor(count))
        if not isinstance(answer, Tensor) or answer.shape != averaged.shape:
            raise ArgumentError(
                f"avg_fn must return a tensor like the averaged one, got {answer!r:.60}."
            )
        return answer.reshape(-1)
