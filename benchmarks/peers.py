"""Averages of polyak and of others as the speed benchmark sees them: one step, and what it holds.

Each is driven in the quickest way that its documentation offers: multi-tensor operations where
there is a switch for them, and for bfloat16 weights a float32 average where it can have one.
Warm-ups are off. Each imports its library when first asked, so that a missing one costs its rows.
"""

import runpy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import distribution
from math import exp
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import polyak

Block = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Running:
    """An average at work.

    Attributes:
        update: fold in the live weights as they are now.
        tensors: the averaged ones, of one average after the other, as `model.parameters()` goes.
        decay: the share of the old average that the n-th update keeps, n from 1; the first of all
            may copy.
        block: a context manager inside which the live model has the averaged weights, if any.
        live: the model.
    """

    update: Callable[[], object]
    tensors: Callable[[], list[Tensor]]
    decay: Callable[[int], float]
    live: nn.Module
    block: Block | None = None


@dataclass(frozen=True)
class Contestant:
    """A way of averaging.

    Attributes:
        name: in the tables.
        package: whose version is noted.
        how: how it is driven, in a sentence.
        make: builds it for a model and so many decays.
    """

    name: str
    package: str
    how: str
    make: Callable[[nn.Module, Sequence[float]], Running]

    @property
    def ours(self) -> bool:
        """Whether it is polyak."""
        return self.package == "polyak"


# ── polyak ───────────────────────────────────────────────────────────────────────────────────────


def _polyak(nonfinite: Any, model: nn.Module, decays: Sequence[float]) -> Running:
    schedules = {str(d): polyak.Exponential(decay=d, debias=False) for d in decays}
    if len(decays) == 1:
        (schedule,) = schedules.values()
        average = polyak.Average(model, schedule, nonfinite=nonfinite)
        members, update, block = [average], average.update, average.applied
    else:
        averages = polyak.Averages(model, schedules, nonfinite=nonfinite)
        members, update = list(averages.values()), averages.update  # type: ignore[assignment]
        block = members[0].applied
    names = [name for name, _ in model.named_parameters()]
    return Running(
        update,
        lambda: [member.tensors[name] for member in members for name in names],
        lambda n: decays[0],
        model,
        block,
    )


# ── others: one average each, several by several objects ─────────────────────────────────────────


def _shadow(model: nn.Module) -> nn.Module:
    """A copy that is float32 where the model is narrower."""
    return deepcopy(model).float()


def _is_narrow(model: nn.Module) -> bool:
    return next(model.parameters()).dtype == torch.bfloat16


def _torch(model: nn.Module, decay: float) -> Running:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    return Running(
        partial(average.update_parameters, model),
        lambda: list(average.module.parameters()),
        lambda n: decay,
        model,
        lambda: _backed_up(model, average.module),
    )


@contextmanager
def _backed_up(model: nn.Module, average: nn.Module) -> Iterator[None]:
    """What people write who have a second module and want to evaluate the first."""
    with torch.no_grad():
        backup = [parameter.clone() for parameter in model.parameters()]
        for parameter, averaged in zip(model.parameters(), average.parameters(), strict=True):
            parameter.copy_(averaged)
        try:
            yield
        finally:
            for parameter, kept in zip(model.parameters(), backup, strict=True):
                parameter.copy_(kept)


def _ema_pytorch(model: nn.Module, decay: float) -> Running:
    narrow: dict[str, Any] = (
        {"ema_model": _shadow(model), "coerce_dtype": True} if _is_narrow(model) else {}
    )
    average = import_module("ema_pytorch").EMA(
        model,
        beta=decay,
        min_value=decay,  # so no warm-up
        update_after_step=0,
        update_every=1,
        use_foreach=True,
        include_online_model=False,
        **narrow,
    )
    return Running(
        average.update, lambda: list(average.ema_model.parameters()), lambda n: decay, model
    )


def _torch_ema(model: nn.Module, decay: float) -> Running:
    average = import_module("torch_ema").ExponentialMovingAverage(
        model.parameters(), decay=decay, use_num_updates=False
    )
    if _is_narrow(model):
        average.to(dtype=torch.float32)
    return Running(
        average.update,
        lambda: list(average.shadow_params),
        lambda n: decay,
        model,
        average.average_parameters,
    )


def _timm(model: nn.Module, decay: float) -> Running:
    # `import timm` wants torchvision, whose binaries must match torch's; the class only torch.
    file = distribution("timm").locate_file("timm/utils/model_ema.py")
    average_class: Any = runpy.run_path(str(file))["ModelEmaV3"]
    average = average_class(model, decay=decay, dtype=torch.float32)
    return Running(
        partial(average.update, model),
        lambda: list(average.module.parameters()),
        lambda n: decay,
        model,
    )


def _diffusers(foreach: bool, model: nn.Module, decay: float) -> Running:
    average = import_module("diffusers.training_utils").EMAModel(
        model.parameters(), decay=decay, min_decay=decay, foreach=foreach
    )
    if _is_narrow(model):
        average.to(dtype=torch.float32)

    @contextmanager
    def block() -> Iterator[None]:
        average.store(model.parameters())
        average.copy_to(model.parameters())
        try:
            yield
        finally:
            average.restore(model.parameters())

    return Running(
        lambda: average.step(model.parameters()),
        lambda: list(average.shadow_params),
        lambda n: decay,
        model,
        block,
    )


def _yolo(model: nn.Module, decay: float, tau: float = 2000.0) -> Running:
    """v = d v + (1 - d) live for each floating entry of the state dict, d = decay (1 - e^(-n/tau)).

    The recurrence of YOLOv5's ModelEMA, in a loop of our own, without a temporary.
    """
    average, updates = _shadow(model).eval(), 0

    def decay_of(n: int) -> float:
        return decay * (1 - exp(-n / tau))

    @torch.no_grad()
    def update() -> None:
        nonlocal updates
        updates += 1
        d, live = decay_of(updates), model.state_dict()
        for name, value in average.state_dict().items():
            if value.dtype.is_floating_point:
                value.mul_(d).add_(live[name], alpha=1 - d)

    return Running(update, lambda: list(average.parameters()), decay_of, model)


def _each(one: Callable[[nn.Module, float], Running]) -> Callable[..., Running]:
    """As many objects as decays, updated one after the other."""

    def make(model: nn.Module, decays: Sequence[float]) -> Running:
        runs = [one(model, decay) for decay in decays]
        if len(runs) == 1:
            return runs[0]

        def update() -> None:
            for run in runs:
                run.update()

        def tensors() -> list[Tensor]:
            return [tensor for run in runs for tensor in run.tensors()]

        return Running(update, tensors, runs[0].decay, model, runs[0].block)

    return make


CONTESTANTS = (
    Contestant(
        "polyak",
        "polyak",
        "`Average(model, Exponential(decay=d, debias=False))`, so with the guard against NaN and "
        "inf; several by `Averages`.",
        partial(_polyak, "skip"),
    ),
    Contestant(
        "polyak, no guard",
        "polyak",
        'the same with `nonfinite="ignore"`, since the others have no guard.',
        partial(_polyak, "ignore"),
    ),
    Contestant(
        "torch AveragedModel",
        "torch",
        "`AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(d))`. Its average has the dtype "
        "of the model. It has no block: people copy the weights away, the average in, and back.",
        _each(_torch),
    ),
    Contestant(
        "ema-pytorch EMA",
        "ema-pytorch",
        "`EMA(model, beta=d, min_value=d, update_after_step=0, update_every=1, use_foreach=True)`; "
        "for bfloat16 weights with a float32 copy as `ema_model` and `coerce_dtype=True`.",
        _each(_ema_pytorch),
    ),
    Contestant(
        "torch-ema",
        "torch-ema",
        "`ExponentialMovingAverage(model.parameters(), decay=d, use_num_updates=False)`; for "
        "bfloat16 weights after `.to(dtype=torch.float32)`; `average_parameters()` for the block.",
        _each(_torch_ema),
    ),
    Contestant(
        "timm ModelEmaV3",
        "timm",
        "`ModelEmaV3(model, decay=d, dtype=torch.float32)`, which is multi-tensor by itself.",
        _each(_timm),
    ),
    Contestant(
        "diffusers EMAModel",
        "diffusers",
        "`EMAModel(model.parameters(), decay=d, min_decay=d)`; for bfloat16 weights after "
        "`.to(dtype=torch.float32)`; `store`, `copy_to` and `restore` for the block.",
        _each(partial(_diffusers, False)),
    ),
    Contestant(
        "diffusers, foreach",
        "diffusers",
        "the same with `foreach=True`.",
        _each(partial(_diffusers, True)),
    ),
    Contestant(
        "YOLOv5's recurrence",
        "torch",
        "`v.mul_(d).add_(live, alpha=1 - d)` over the state dict, in a loop of our own; v in "
        "float32.",
        _each(_yolo),
    ),
)
