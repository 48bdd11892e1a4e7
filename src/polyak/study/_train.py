"""One seed: train once, follow every average in that same run, look at all of them each epoch."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.lr_scheduler import ReduceLROnPlateau

from polyak._average import Average, Averages, refresh_norms
from polyak._errors import ArgumentError
from polyak._window import Window

from ._curves import early_stop
from ._keep import Figures, Keeper, Lengths
from ._methods import (
    LIVE,
    Averaged,
    Method,
    Tail,
    Windowed,
    check_methods,
    has_length,
    usual_methods,
)
from ._task import Data, Pair, Task

REFRESHED = ", refreshed"
EVEN, ODD = "even rows", "odd rows"
_ORDER = 1_000_003  # the batches of a seed must not be drawn from the bits that drew its weights
_CHECKED = 64  # rows on which a model without noise must repeat itself
_CHUNK = 8192  # rows a forward pass when evaluating: bounds memory, not the result


@dataclass(frozen=True)
class Curve:
    """What one method did, evaluation by evaluation, in one run.

    Args:
        first: epoch of the first entry.
        validation: metric -> values.
        test: metric -> values; empty where the task has no test part.
        halves: the metric that judges, on the even and on the odd rows of the validation part, so
            that one half can pick an epoch and the other judge it; empty where there is a test
            part, which does that better.
    """

    first: int
    validation: dict[str, list[float]] = field(default_factory=dict)
    test: dict[str, list[float]] = field(default_factory=dict)
    halves: dict[str, list[float]] = field(default_factory=dict)

    def trimmed(self, *, stop: int, sign: float, judge: str, patience: int | None) -> "Curve":
        """Without what no rule looks at: after the stop of the run and the end of its patience."""
        ends = [early_stop([sign * v for v in self.validation[judge]], patience=patience).stop]
        ends += [
            early_stop([sign * v for v in values], patience=patience).stop
            for values in self.halves.values()
        ]
        last = max(stop - self.first + 1, *ends)
        parts = (self.validation, self.test, self.halves)
        return Curve(
            self.first, *({name: values[:last] for name, values in p.items()} for p in parts)
        )

    def part(self, name: str) -> dict[str, list[float]]:
        """The values on "validation" or "test"."""
        return self.test if name == "test" else self.validation


@dataclass(frozen=True)
class Run:
    """One training run and all its curves.

    Args:
        kind: "ordinary", "decayed" (the rival) or "control".
        seed: its random seed.
        steps_per_epoch: optimizer steps between evaluations.
        stop: epoch at which the watched curve stopped (or the last one).
        train_loss: mean over the batches of each epoch, as trained (with dropout).
        rates: learning rate at the end of each epoch.
        curves: method -> curve.
        bytes: size of one copy of the averaged tensors.
        seconds: how long it took, evaluation included.
        outputs: rule -> part -> outputs of the live model, for the ensemble.
        lengths: averages of other lengths, rebuilt at the stop; None where nothing was kept.
    """

    kind: str
    seed: int
    steps_per_epoch: int
    stop: int
    train_loss: list[float]
    rates: list[float]
    curves: dict[str, Curve]
    bytes: int
    seconds: float
    outputs: dict[str, dict[str, Tensor]]
    lengths: Lengths | None = None


@dataclass(frozen=True)
class Moment:
    """Where a run is: for a progress display.

    Args:
        seed: which seed.
        kind: which of its runs.
        epoch: evaluations done.
        epochs: at most so many.
        live: judged validation value of the live weights.
        average: the same of the headline average, or the first of its family.
    """

    seed: int
    kind: str
    epoch: int
    epochs: int
    live: float
    average: float


Tell = Callable[[Moment], None]


def steps_per_epoch(task: Task, data: Data) -> int:
    """Optimizer steps between evaluations."""
    return task.evaluate_every or -(-len(data.train[0]) // task.batch)


def planned(task: Task, per_epoch: int) -> tuple[Method, ...]:
    """The methods of a run with so many steps between evaluations.

    A tail average becomes an ordinary schedule where the length of the run is known.
    """
    steps = per_epoch * task.epochs
    methods = usual_methods(steps=steps) if task.methods is None else task.methods(steps)
    check_methods(methods)
    if task.patience is None:
        methods = tuple(m.within(steps) if isinstance(m, Tail) else m for m in methods)
    followed = {m.name for m in methods if isinstance(m, Averaged)}
    if task.watch not in followed | {LIVE}:
        raise ArgumentError(
            f"watch must be 'live' or one of the averages {sorted(followed)}, got {task.watch!r}."
        )
    known = {m.name for m in methods if not isinstance(m, Tail)} | {_family(m) for m in methods}
    if task.headline not in known - {""}:
        raise ArgumentError(
            f"headline must be an average or a family, one of {sorted(known - {''})}, "
            f"got {task.headline!r}."
        )
    return methods


def _family(method: Method) -> str:
    return "" if isinstance(method, Tail) else method.family


def train_seed(task: Task, seed: int, *, control: bool, tell: Tell) -> list[Run]:
    """Train one seed: the ordinary run, its rival with a decayed learning rate, the control.

    The rival and the control get as many epochs as the ordinary run took to stop, the same
    initial weights and, the control apart, the same batches in the same order.
    """
    data = task.data()
    per_epoch = steps_per_epoch(task, data)
    methods = planned(task, per_epoch)
    headline = [m for m in methods if task.headline in (m.name, _family(m))]
    run = partial(_run, data=data, seed=seed, per_epoch=per_epoch, tell=tell)
    ordinary = run(task, kind="ordinary", methods=methods)
    same = replace(task, epochs=ordinary.stop, patience=None)
    runs = [ordinary, run(same, kind="decayed", methods=headline)]
    if control:
        steps = ordinary.stop * per_epoch
        known = [m.within(steps) if isinstance(m, Tail) else m for m in methods]
        whole = replace(same, batch=len(data.train[0]))
        runs.append(run(whole, kind="control", methods=known))
    return runs


class _Looks:
    """The averages of one run, and what each of them scored so far."""

    def __init__(
        self,
        task: Task,
        data: Data,
        model: nn.Module,
        methods: Sequence[Method],
        keeper: Keeper | None = None,
    ) -> None:
        self.task, self.data, self.model, self.keeper = task, data, model, keeper
        self.methods = {m.name: m for m in methods if isinstance(m, Averaged)}
        schedules = {name: method.schedule for name, method in self.methods.items()}
        self.averages = Averages(model, schedules) if schedules else None
        self.windows = {
            m.name: Window(model, m.k, m.every) for m in methods if isinstance(m, Windowed)
        }
        self.curves: dict[str, Curve] = {}
        self.steps = 0
        self.stepping, self.updating = 0.0, 0.0  # seconds of all steps; of the updates in them
        self.lengths: Lengths | None = None

    def update(self) -> None:
        """Fold the live weights into every average: called after each optimizer step."""
        started = time.perf_counter()
        self.steps += 1
        if self.averages is not None:
            self.averages.update()
        for window in self.windows.values():
            window.update()
        if self.keeper is not None and self.lengths is None:
            self.keeper.update()
        self.updating += time.perf_counter() - started

    def rebuild(self) -> None:
        """Score averages of many lengths as of now."""
        if self.keeper is None:
            return

        def look() -> Figures:
            return {name: figures for name, (_, figures) in self.measured().items()}

        tracked = {name: m.schedule for name, m in self.methods.items() if has_length(m)}
        self.lengths = self.keeper.rebuild(tracked, look, training=self.stepping - self.updating)

    def bytes(self) -> int:
        """Size of one copy of what is averaged."""
        held = [*(self.averages or {}).values(), *self.windows.values()]
        return sum(t.numel() * t.element_size() for t in held[0].tensors.values()) if held else 0

    def look(self, epoch: int) -> dict[str, Tensor]:
        """Evaluate the live weights and every average; return the outputs of the live ones."""
        live = self.note(LIVE, epoch)
        for name, average in (self.averages or {}).items():
            method = self.methods[name]
            if self.steps < method.shown_from:
                continue
            with average.applied():
                self.note(name, epoch)
            if method.refresh:
                refresh_norms(average, self.data.train[0].split(256))
                with average.applied():
                    self.note(name + REFRESHED, epoch)
        for name, window in self.windows.items():
            if window.filled:
                with window.applied():
                    self.note(name, epoch)
        return live

    def judged(self, name: str) -> list[float]:
        """Validation values of the metric that judges, lower being better."""
        metric = self.task.metrics[self.task.judge]
        values = self.curves[name].validation[self.task.judge]
        return values if metric.better == "lower" else [-value for value in values]

    def last(self, name: str) -> float:
        """The newest validation value of the metric that judges."""
        return self.curves[name].validation[self.task.judge][-1]

    def note(self, name: str, epoch: int) -> dict[str, Tensor]:
        """Evaluate what the model holds now as an entry of curve `name`; return the outputs."""
        curve = self.curves.setdefault(name, Curve(first=epoch))
        outputs = {}
        for part, (outputs[part], figures) in self.measured().items():
            for metric, value in figures.items():
                curve.part(part).setdefault(metric, []).append(value)
        if self.data.test is None and len(self.data.validation[0]) > 1:
            measure = self.task.metrics[self.task.judge].measure
            for half, start in ((EVEN, 0), (ODD, 1)):
                targets = self.data.validation[1][start::2]
                value = float(measure(outputs["validation"][start::2], targets))
                curve.halves.setdefault(half, []).append(value)
        return outputs

    def measured(self) -> dict[str, tuple[Tensor, dict[str, float]]]:
        """Part -> outputs of what the model holds now, and every metric on them."""
        found = {}
        for part, pair in (("validation", self.data.validation), ("test", self.data.test)):
            if pair is not None:
                outputs = predict(self.model, pair[0])
                found[part] = outputs, scores(self.task, outputs, pair[1])
        return found


def trimmed(task: Task, curves: Mapping[str, Curve], *, stop: int, kind: str) -> dict[str, Curve]:
    """All curves of a run without what no rule looks at."""
    sign = 1.0 if task.metrics[task.judge].better == "lower" else -1.0
    patience = task.patience if kind == "ordinary" else None  # only these stop early
    found = {
        name: curve.trimmed(stop=stop, sign=sign, judge=task.judge, patience=patience)
        for name, curve in curves.items()
    }
    if kind == "control":  # no epoch is picked there
        found = {name: replace(curve, halves={}) for name, curve in found.items()}
    return found


def predict(model: nn.Module, inputs: Tensor) -> Tensor:
    """Outputs of the model in eval mode, for all rows; the mode is put back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return torch.cat([model(chunk) for chunk in inputs.split(_CHUNK)])
    finally:
        model.train(was_training)


def scores(task: Task, outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Every metric of the task on these outputs."""
    return {name: float(metric.measure(outputs, targets)) for name, metric in task.metrics.items()}


def batches(pair: Pair, *, size: int, seed: int) -> Iterator[Pair]:
    """Batches without end: a new order each pass; all rows at once when they fit in one."""
    inputs, targets = pair
    generator = torch.Generator().manual_seed(_ORDER + seed)
    while True:
        if size >= len(inputs):
            yield pair
            continue
        for rows in torch.randperm(len(inputs), generator=generator).split(size):
            yield inputs[rows], targets[rows]


def _build(
    task: Task, data: Data, seed: int, *, noise: bool = True
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)  # initial weights and dropout; batches have a generator of their own
    model = task.model()
    if not noise:
        _silence(model, data.train[0][:_CHECKED])
    return model, task.optimizer(model.parameters())


def _silence(model: nn.Module, inputs: Tensor) -> None:
    """Turn dropout off, and refuse a model that is random in training even so."""
    for module in model.modules():
        held: Any = module
        if isinstance(module, _DropoutNd):
            held.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # attention, LSTM, GRU
            held.dropout = 0.0
    outputs = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            outputs.append(copy.deepcopy(model).train()(inputs))  # a copy: BatchNorm would count it
    if not torch.equal(*outputs):
        raise ArgumentError(
            "control must be run on a model that is not random in training once its dropout "
            "modules are off, got one whose outputs change with the random seed. "
            "Pass control=False (--no-control), or make the noise a module of torch.nn."
        )


def _epoch(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Iterator[Pair],
    steps: int,
    rate: "_Rate",
    looks: "_Looks",
) -> float:
    """Train for `steps` steps and return the mean loss over their rows."""
    started = time.perf_counter()
    model.train()
    total, rows = 0.0, 0
    for _ in range(steps):
        inputs, targets = next(stream)
        rate.set()
        optimizer.zero_grad()
        loss = task.loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        looks.update()
        total, rows = total + loss.item() * len(inputs), rows + len(inputs)
    looks.stepping += time.perf_counter() - started
    return total / rows


class _Rate:
    """The learning rate of each step: warm-up, and for the rival a decay, over the base rates."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        warmup: int,
        decay: Callable[[float], float],
        budget: int | None,
    ) -> None:
        self.optimizer, self.warmup, self.decay, self.budget = optimizer, warmup, decay, budget
        self.base = [float(group["lr"]) for group in optimizer.param_groups]
        self.step = 0

    def set(self) -> None:
        """Set the rate of the coming step; leave it to the scheduler where there is no rule."""
        done, self.step = self.step, self.step + 1
        if self.budget is None and done >= self.warmup:
            return
        factor = min(1.0, self.step / self.warmup) if self.warmup else 1.0
        if self.budget is not None:
            factor *= self.decay(done / self.budget)  # done before the step: the last has a rate
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * factor

    @property
    def now(self) -> float:
        """Rate of the first group."""
        return float(self.optimizer.param_groups[0]["lr"])


def _run(
    task: Task,
    *,
    data: Data,
    seed: int,
    kind: str,
    methods: Sequence[Method],
    per_epoch: int,
    tell: Tell,
) -> Run:
    """Train until the watched curve stops, then on until every other curve has stopped too."""
    started = time.perf_counter()
    model, optimizer = _build(task, data, seed, noise=kind != "control")
    scheduler = task.scheduler(optimizer) if task.scheduler and kind != "decayed" else None
    budget = per_epoch * task.epochs if kind == "decayed" else None
    rate = _Rate(optimizer, warmup=task.warmup, decay=task.decay, budget=budget)
    # Only these are compared in all lengths; the control and the rival show what they show without.
    chosen = kind == "ordinary" and task.snapshots > 0
    keeper = Keeper(task, model, per_epoch=per_epoch) if chosen else None
    looks = _Looks(task, data, model, methods, keeper)
    stream = batches(data.train, size=task.batch, seed=seed)
    tails = [m for m in methods if isinstance(m, Tail)]
    kept: list[dict[str, Tensor]] = []
    named = [m.name for m in methods if task.headline in (m.name, _family(m))]
    losses, rates, stop = [], [], 0
    outputs: dict[str, dict[str, Tensor]] = {}
    with keeper or nullcontext():
        for epoch in range(1, task.epochs + 1):
            losses.append(_epoch(task, model, optimizer, stream, per_epoch, rate, looks))
            rates.append(rate.now)
            live = looks.look(epoch)
            stops = {c: early_stop(looks.judged(c), patience=task.patience) for c in looks.curves}
            if "best" not in outputs or stops[LIVE].best == epoch:
                outputs["best"] = live
            if not stop:
                outputs["stop"] = live
                if tails:
                    kept.append({name: t.clone() for name, t in model.state_dict().items()})
                if not stops[task.watch].ran_out:
                    stop = epoch
                if stop or epoch == task.epochs:
                    looks.rebuild()
            shown = next((name for name in named if name in looks.curves), LIVE)
            tell(Moment(seed, kind, epoch, task.epochs, looks.last(LIVE), looks.last(shown)))
            if not any(stopped.ran_out for stopped in stops.values()):
                break
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(looks.last(task.watch))
            elif scheduler is not None:
                scheduler.step()
    for tail in tails:
        looks.curves |= _replay(task, data, model, tail, kept)
    return Run(
        kind=kind,
        seed=seed,
        steps_per_epoch=per_epoch,
        stop=stop or len(losses),
        train_loss=losses,
        rates=rates,
        curves=trimmed(task, looks.curves, stop=stop or len(losses), kind=kind),
        bytes=looks.bytes(),
        seconds=time.perf_counter() - started,
        outputs=outputs if kind == "ordinary" else {},
        lengths=looks.lengths,
    )


def _replay(
    task: Task, data: Data, model: nn.Module, tail: Tail, kept: Sequence[Mapping[str, Tensor]]
) -> dict[str, Curve]:
    """Feed the kept weights of every epoch to a tail average, its start now being known."""
    model.load_state_dict(kept[0])
    method = tail.within(len(kept))
    average = Average(model, method.schedule)
    looks = _Looks(task, data, model, ())
    for epoch, weights in enumerate(kept, start=1):
        model.load_state_dict(weights)
        average.update(now=epoch)
        if epoch >= method.shown_from:
            with average.applied():
                looks.note(tail.name, epoch)
    return looks.curves
