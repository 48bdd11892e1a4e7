"""One update after every step that the optimizers really take."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._checks import is_count
from ._engine import Engine
from ._errors import ArgumentError, OrderError
from ._plans import memory_of

Clock = Callable[[], float]


@final
class Follower:
    """Hooks on optimizers that update an average; `remove()` takes them off again.

    A step that a gradient scaler skips in Python never calls the hooks. A fused optimizer learns of
    the skip on the device: there the average keeps its values too, without waiting for this step,
    and the clock is set right at the next one, when the host looks at this one's flag. With
    `every=k` the average is updated at every k-th step, with the time of k steps: a coarser
    sampling of the same average.

    Made by `follow`; not by hand.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        engine: Engine,
        update: Callable[[float | None, Tensor | None], object],
        *,
        every: int = 1,
        now: Clock | None = None,
    ) -> None:
        if not optimizers:
            raise ArgumentError("follow must be given the optimizer, got none.")
        if not is_count(every):
            raise ArgumentError(
                f"every must be a whole number of steps, at least 1, got {every!r}."
            )
        if now is not None and not callable(now):
            raise ArgumentError(
                f"now must be a function that tells the time, got {now!r}. "
                "For example now=lambda: samples_seen."
            )
        bare = list({id(o): o for o in map(unwrapped, optimizers)}.values())
        _refuse_steps_inside_backward(engine)
        old = engine.follower
        if isinstance(old, Follower) and old.active:
            if {id(o) for o in old._optimizers} != {id(o) for o in bare}:
                raise OrderError(
                    "follow must name all optimizers of a loop at once, got another one while "
                    "following: each would move the clock. Call follow(a, b), or remove() first."
                )
            old.remove()  # registered twice: once is enough
        self.every = every
        self._optimizers: list[Optimizer] = bare
        self._engine, self._update, self._now = engine, update, now
        self._is_known = False  # whether the optimizers were seen to train what is averaged
        self._handles = [
            handle
            for optimizer in bare
            for handle in (
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            )
        ]
        engine.follower = self

    @property
    def active(self) -> bool:
        """Whether steps still update the average."""
        return bool(self._handles)

    def remove(self) -> None:
        """Stop following; harmless when called again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._engine.follower is self:
            self._engine.follower = None

    def time(self) -> float:
        """What time it is: the caller's clock, or one for each step since the last update."""
        return self._engine.now + self._engine.steps if self._now is None else self._now()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A step inside applied() would train the averaged weights, and break the way back.
        self._engine.check_not_lent("an optimizer step")
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise OrderError(
                "follow must not be captured in a CUDA graph: a replay calls no hooks. "
                "Remove the follower and call update() after each replay."
            )

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # The last one named closes a step of the loop. Waiting for all of them would go out of
        # phase for good when a scaler skips one of several.
        if optimizer is not self._optimizers[-1] or _only_makes_state(kwargs):
            return
        if not self._is_known:
            self._is_known = True
            self._warn_of_a_stranger()
        self._engine.settle()
        self._engine.steps += 1
        found = getattr(optimizer, "found_inf", None)  # set by a scaler, for a fused optimizer
        skip = found if isinstance(found, Tensor) else None
        if self._engine.steps >= self.every:
            self._update(self.time(), skip)
        elif skip is not None:
            self._engine.note_skip(skip)

    def _warn_of_a_stranger(self) -> None:
        """Say so when the first step has left all live weights as they were, being another's."""
        groups = (group for optimizer in self._optimizers for group in optimizer.param_groups)
        trained = memory_of(parameter for group in groups for parameter in group["params"])
        if not (trained & self._engine.live_memory() or self._engine.live_was_written()):
            self._engine.warn_once(
                "stranger",
                "follow: the optimizer trains none of the averaged parameters, but perhaps those "
                "of a copy of the model; follow the one that does. Where it trains master copies "
                "of them, call update() after these were written back.",
            )


def _only_makes_state(kwargs: Mapping[str, Any]) -> bool:
    """Whether torch.distributed.checkpoint takes this step, to fill an optimizer's empty state.

    It gives zero gradients and a learning rate of 0, so nothing is trained.
    """
    frame = sys._getframe() if kwargs.get("closure", kwargs) is None else None
    while frame is not None:
        inside = str(frame.f_globals.get("__name__")).startswith("torch.distributed.checkpoint")
        if inside and frame.f_code.co_name == "_init_optim_state":
            return True
        frame = frame.f_back
    return False


def unwrapped(optimizer: object) -> Optimizer:
    """The torch optimizer inside wrappers such as Accelerate's, which hold it as `.optimizer`."""
    seen = optimizer
    for _ in range(8):  # wrappers in wrappers, and no more than sense
        # An optimizer around another (Lookahead) does more than the inner one: its own step counts.
        # Accelerate's is an Optimizer by name only: it was never set up as one and has no hooks.
        if isinstance(seen, Optimizer) and hasattr(seen, "_optimizer_step_post_hooks"):
            break
        inner = getattr(seen, "optimizer", None)
        if not (isinstance(inner, Optimizer) or hasattr(inner, "optimizer")):
            break
        seen = inner
    if not isinstance(seen, Optimizer):
        raise ArgumentError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}. "
            "For anything else call update() after each step."
        )
    return seen


def _refuse_steps_inside_backward(engine: Engine) -> None:
    for entry in engine.entries:
        if getattr(entry.live(), "_in_backward_optimizers", None):
            raise ArgumentError(
                f"optimizer must step outside backward, got one that steps {entry.name!r} inside: "
                "its steps come one parameter at a time. Call update() after backward()."
            )
