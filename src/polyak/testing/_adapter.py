"""How a check talks to an averaging class it has never seen."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from .._average import Average
from .._schedules import Exponential


class Averager(Protocol):
    """An averaging class behind two methods, and up to four more if it has them.

    Left out, an optional method makes the cases that need it answer "—":

    - `applied(model)`: a `with` block in which the model holds the averaged weights.
    - `state_dict()` and `load_state_dict(state)`: what goes into a checkpoint, and back.
    - `every(interval)`: called once after construction; from then on `update` is still called
      after every step, and only each `interval`-th is to count, with the same memory in steps.
    """

    def update(self, model: nn.Module) -> object:
        """Fold in the weights of `model`, called after every optimizer step."""

    def averaged(self) -> Mapping[str, Tensor] | nn.Module:
        """Return the averaged tensors, by the names of the model's state dict, or a module."""


Factory = Callable[[nn.Module, float], Averager]
"""`factory(model, decay)`: an average with a constant decay, no warm-up, all else as documented.

Its first update may copy the weights; the cases do one at the start, before anything moves.
"""


@final
class PolyakAdapter:
    """polyak's own `Average` as the checks see it.

    Args:
        model: what is averaged.
        decay: constant, without bias correction.

    Examples:
        >>> from polyak.testing import CASES, conformance
        >>> conformance(PolyakAdapter, cases=CASES[:1]).wrong
        ()
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._average = Average(model, Exponential(decay=decay, debias=False))
        self._interval = 1
        self._step = 0

    def every(self, interval: int) -> None:
        """Update at each `interval`-th step only."""
        self._interval = interval

    def update(self, model: nn.Module) -> None:
        """Fold in the weights of the model that the average was built on."""
        self._step += 1
        if self._step % self._interval == 0:
            self._average.update(now=self._step)

    def averaged(self) -> Mapping[str, Tensor]:
        """The full set, in float32 as it is stored, also where the model has less."""
        return self._average.weights(dtype=torch.float32)

    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        """Lend the averaged weights to the model."""
        return self._average.applied()

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        return self._average.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._average.load_state_dict(state)
        self._step = int(self._average.now)
