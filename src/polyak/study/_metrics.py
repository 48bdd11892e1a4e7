"""What is a good output? Figures of merit, and how the outputs of several models are joined."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """One figure of merit, from the outputs of the whole part and its targets.

    Args:
        measure: (outputs, targets) -> number.
        better: which direction is better.
        compare: how two values are compared: "relative" (20 % lower; for values above 0) or
            "absolute" (0.04 less).
        small: the smallest change worth having, as a share or in the metric's own units;
            differences proved to lie inside plus or minus this are called little. 0 makes no such
            claim.
        unit: what an absolute difference is counted in, such as "nats".
        scale: what an absolute difference is multiplied by for show: 100 for points of accuracy.
    """

    measure: Callable[[Tensor, Tensor], Tensor]
    better: Literal["lower", "higher"] = "lower"
    compare: Literal["relative", "absolute"] = "relative"
    small: float = 0.05
    unit: str = ""
    scale: float = 1.0

    def shown(self, gain: float) -> float:
        """A gain as people read it: a relative one, kept as a log ratio, as a share.

        1 - exp(-gain) where lower is better, exp(gain) - 1 where higher is.

        Examples:
            >>> Metric(lambda a, b: a).shown(math.log(2.0))  # half the loss: 50 % better
            0.5
        """
        if self.compare == "absolute":
            return gain
        try:
            return -math.expm1(-gain) if self.better == "lower" else math.expm1(gain)
        except OverflowError:  # a run that diverged without becoming infinite
            return -math.inf if self.better == "lower" else math.inf


def r2(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of the variance explained: 1 - sum (y - f)^2 / sum (y - mean y)^2."""
    return 1.0 - ((targets - outputs) ** 2).sum() / ((targets - targets.mean()) ** 2).sum()


def refitted(outputs: Tensor, targets: Tensor) -> Tensor:
    """MSE once a straight line from the outputs to the targets is taken out.

    mean (y - a - b f)^2 with the least-squares a and b: what no rescaling of the outputs cures.
    """
    f, y = (values.double() - values.double().mean() for values in (outputs, targets))
    slope = (f * y).sum() / (f * f).sum()
    return ((y - slope * f) ** 2).mean()


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of rows whose largest output is the right one."""
    return (outputs.argmax(dim=-1) == targets).double().mean()


def mean_outputs(outputs: Tensor) -> Tensor:
    """Mean of the models' outputs. Shape of the argument: [models, rows, ...]."""
    return outputs.mean(dim=0)


def mean_probabilities(outputs: Tensor) -> Tensor:
    """Logits whose softmax is the mean of the models' softmaxes: [models, rows, classes]."""
    # Their sum rather than their mean: a softmax does not see the constant.
    return outputs.log_softmax(dim=-1).logsumexp(dim=0)
