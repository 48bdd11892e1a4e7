"""What is studied: a model, data, a loss and metrics, as one small value."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from polyak._errors import ArgumentError

from ._methods import LIVE, Method
from ._metrics import Metric, mean_outputs

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """Inputs and targets of each part; rows belong together.

    Args:
        train: what the model learns from.
        validation: what chooses epochs and lengths.
        test: what the choice is then judged on; None where the task has no such part, and the
            study then says that its figures are a little rosy.
    """

    train: Pair
    validation: Pair
    test: Pair | None = None

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test"):
            pair = getattr(self, name)
            if pair is not None and not 0 < len(pair[0]) == len(pair[1]):
                raise ArgumentError(
                    f"{name} must hold as many targets as inputs, and some, "
                    f"got {len(pair[0])} inputs and {len(pair[1])} targets."
                )


@dataclass(frozen=True)
class Published:
    """Figures that somebody reported for this task, shown beside ours.

    Args:
        source: who, in a few words.
        average: name of the method that they compared with the live weights.
        stop: epoch at which their run stopped.
        spread: standard deviation of both validation curves: live, average.
        values: metric -> (live, average).
        note: what to know when comparing.
    """

    source: str
    average: str
    stop: int
    spread: tuple[float, float]
    values: Mapping[str, tuple[float, float]]
    note: str = ""


def linear(done: float) -> float:
    """Learning rate falling straight to zero: 1 - done."""
    return 1.0 - done


@dataclass(frozen=True)
class Task:
    """A question for a study: would averaging help when *this* is trained?

    Functions must be importable (defined at the top of a module) when a study runs in several
    processes; with one job anything goes. All seeds share the data: a seed varies the initial
    weights, the order of the batches and the dropout.

    Args:
        name: one word.
        model: builds the model; called right after the random seed is set.
        data: loads the data.
        loss: (outputs, targets) -> scalar, for training.
        metrics: name -> `Metric`. The FIRST one judges: it picks epochs and lengths on the
            validation data and carries the verdict.
        optimizer: parameters -> optimizer.
        epochs: at most so many evaluations.
        batch: rows a step; the order is drawn anew for each pass over the data.
        evaluate_every: steps between evaluations; None is one pass over the data (an epoch).
        patience: evaluations without a better value after which a curve stops. Every curve gets
            it, the live one too. None: all epochs are run.
        watch: the curve that steers `scheduler` and whose stop is the stop of the run.
        scheduler: optimizer -> scheduler, stepped once an evaluation; one that waits for a plateau
            is given the watched value.
        warmup: steps over which the learning rate rises from 0.
        decay: shape of the rival's learning rate: share of its budget done -> factor.
        methods: steps of the planned run -> what is followed; None follows `usual_methods`.
        headline: the method that the verdict speaks of, or a family, of which validation picks.
        combine: how the ensemble joins outputs [models, rows, ...].
        control: whether to repeat the run without noise: full batches, dropout modules off.
        short_epochs: epochs of a short study.
        snapshots: at most so many moments of the run are kept on disk, from which averages of any
            length are rebuilt at its stop: 4 bytes a parameter and moment, in a temporary folder
            that is removed. At least 4; 0 keeps none and leaves that part out.
        title: one line for people.
        notes: what a reader of the report must know about the task.
        published: figures to show beside ours.
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], Data]
    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: Mapping[str, Metric]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    epochs: int
    batch: int = 32
    evaluate_every: int | None = None
    patience: int | None = None
    watch: str = LIVE
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None
    warmup: int = 0
    decay: Callable[[float], float] = linear
    methods: Callable[[int], tuple[Method, ...]] | None = None
    headline: str = "EMA"
    combine: Callable[[Tensor], Tensor] = mean_outputs
    control: bool = False
    short_epochs: int | None = None
    snapshots: int = 32
    title: str = ""
    notes: tuple[str, ...] = field(default=())
    published: Published | None = None

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch", 1), ("patience", 1), ("evaluate_every", 1)):
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise ArgumentError(f"{name} must be {low} or more, got {value!r}.")
        if self.snapshots and not self.snapshots >= 4:
            raise ArgumentError(f"snapshots must be 4 or more, or 0, got {self.snapshots!r}.")
        if not self.metrics:
            raise ArgumentError("metrics must hold at least one metric, got none.")

    @property
    def judge(self) -> str:
        """Name of the metric that picks epochs and carries the verdict."""
        return next(iter(self.metrics))

    @property
    def unit(self) -> str:
        """What one evaluation is called."""
        every = self.evaluate_every
        return self.unit_name if every is None else f"{self.unit_name} of {every} steps"

    @property
    def unit_name(self) -> str:
        """The same in one word."""
        return "epoch" if self.evaluate_every is None else "round"
