"""One update after every step that the optimizer really takes."""

from collections.abc import Callable
from typing import Any, final

from torch.optim import Optimizer

from ._engine import Engine, is_count
from ._errors import ArgumentError


@final
class Follower:
    """Hooks on an optimizer that update an average; `remove()` takes them off again.

    A step that a gradient scaler skips in Python never calls the hooks. With `every=k` the average
    is updated at every k-th step with the time of k steps: a coarser sampling of the same average.

    Args:
        optimizer: the optimizer to watch.
        engine: counts the steps since its last update (saved, so the phase of `every` survives).
        update: called with the new time.
        every: steps between two updates.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        engine: Engine,
        update: Callable[[float], object],
        *,
        every: int = 1,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise ArgumentError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}. "
                "For anything else call update() after each step."
            )
        if not is_count(every):
            raise ArgumentError(
                f"every must be a whole number of steps, at least 1, got {every!r}."
            )
        self.every = every
        self._update, self._engine = update, engine
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Stop following; harmless when called again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A step inside applied() would train the averaged weights, and break the way back.
        self._engine.check_not_lent("an optimizer step")

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._engine.steps += 1
        if self._engine.steps >= self.every:
            self._update(self._engine.now + self._engine.steps)
