"""The simple moving average: the exact mean of the last k weight vectors."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _kernels as kernels
from ._average import Source, Uses
from ._checks import is_count
from ._engine import Engine, Memory, NonFinite, Row
from ._errors import ArgumentError, MatchError
from ._follow import Clock, Follower
from ._roles import RoleOverride, Selector, take_inventory
from ._schedules import Uniform
from ._sharding import agreed, piece_for, plain, spread_like
from ._state import (
    LOADING,
    Fetch,
    OnLive,
    OnMismatch,
    OnSchedule,
    check_header,
    check_tensors,
    engine_state,
    fitted,
    load_engine_state,
    part,
    tensor_state,
    to_gather,
)

if TYPE_CHECKING:  # a build of torch may be without it
    from torch.distributed import ProcessGroup


@final
class Window(Uses):
    """The mean of the last `k` captures of the live weights (LAWA, Kaddour 2022, arXiv 2209.14981).

    mean of w(t) over the last k captures t, one at the first update at or after each multiple of
    `every` since construction. Equal weights and a hard edge, for the memory of k + 1 models; an
    `Exponential` with decay (k - 1) / (k + 1) has the same noise window and the same mean age for
    the memory of one.

    Until the first capture the average is the weights at construction; before `k` captures it is
    the mean of those there are. Used like an `Average`. Where a live element is NaN or inf at a
    capture, the value of the capture before stands in for it.

    Args:
        model_or_tensors: a module, wrapped or not, or tensors by name.
        k: captures to keep, at least 1.
        every: units of time between captures.

    All that is named after them is as for `Average`.

    Examples:
        >>> live = {"w": torch.zeros(1)}
        >>> window = Window(live, k=2)
        >>> for step in range(1, 5):
        ...     _ = live["w"].fill_(step)
        ...     captured = window.update()
        >>> window.weights()["w"].item()  # mean of 3 and 4
        3.5
    """

    def __init__(
        self,
        model_or_tensors: Source,
        k: int,
        every: float = 1,
        *,
        now: float = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        include: Selector | None = None,
        exclude: Selector | None = None,
        roles: RoleOverride | None = None,
        nonfinite: NonFinite = "skip",
        shard: "ProcessGroup | None" = None,
    ) -> None:
        if not is_count(k):
            raise ArgumentError(f"k must be a whole number of captures, at least 1, got {k!r}.")
        if not (isinstance(every, int | float) and 0 < every < math.inf):
            raise ArgumentError(f"every must be above 0, got {every!r}.")
        inventory = take_inventory(model_or_tensors, include=include, exclude=exclude, roles=roles)
        # The engine's one row is the mean, computed when it is asked for; its schedule is not used.
        engine = Engine(
            inventory,
            [Uniform()],
            now=now,
            dtype=dtype,
            device=device,
            nonfinite=nonfinite,
            shard=shard,
        )
        super().__init__(model_or_tensors, engine, 0)
        self.k, self.every = k, every
        self._ring: list[Row] = []  # oldest first
        self._times: list[float] = []  # when each was captured
        self._stale = False

    @property
    def filled(self) -> int:
        """Captures held, at most `k`."""
        return len(self._ring)

    def update(self, now: float | None = None) -> bool:
        """Move the clock to `now` (None: one more) and capture when it is time.

        Returns:
            Whether the live weights were captured.

        Raises:
            OrderError: time that does not move forward; inside `applied()`.
            MatchError: a parameter that was replaced, resized or removed.
        """
        engine = self._engine
        time, _ = engine.next_time(now)
        engine.check_may_update()
        due = self._captures_by(time) > self._captures_by(engine.now)
        if due:
            self._capture(time)
        engine.commit(time)
        if due:
            engine.show()
        return due

    def follow(self, *optimizers: Optimizer, every: int = 1, now: Clock | None = None) -> Follower:
        """Call `update` after each step that the optimizers really take; see `Average.follow`.

        A skip that is known on the device only is waited for: a capture cannot be taken back.
        """
        return Follower(optimizers, self._engine, self._update_unless, every=every, now=now)

    def _update_unless(self, now: float | None, skip: Tensor | None) -> None:
        if skip is not None and bool(skip != 0):
            self._engine.steps -= 1
        else:
            self.update(now)

    def reset(self, *, now: float | None = None) -> None:
        """Forget all captures; start again from the live weights."""
        self._engine.reset(now)
        self._ring, self._times, self._stale = [], [], False
        self._engine.show()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, all captures included; see `Average.state_dict`."""
        self._refresh()
        state = engine_state(self._engine, "Window", {"mean": 0})
        state["window"] = {
            "k": self.k,
            "every": self.every,
            "times": list(self._times),
            "ring": [tensor_state(self._engine, row.tensors, copies=False) for row in self._ring],
        }
        return state

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        *,
        live: OnLive = "restore",
        on_mismatch: OnMismatch = "error",
    ) -> None:
        """Go on from a saved state; see `Average.load_state_dict`."""
        self._load(state, live=live, on_mismatch=on_mismatch)

    def _load(
        self,
        state: Mapping[str, Any],
        *,
        schedule: OnSchedule = "same",
        live: OnLive,
        on_mismatch: OnMismatch,
        fetch: Fetch = piece_for,
    ) -> None:
        """`load_state_dict`, also with the `fetch` of `load_engine_state`."""
        with agreed(to_gather(self._engine, state), "load_state_dict"):
            check_header(state, "Window")
            ring, times = self._checked(fitted(self._engine, state, on_mismatch)[0])
        load_engine_state(
            self._engine,
            state,
            "Window",
            ["mean"],
            schedule=schedule,
            live=live,
            on_mismatch=on_mismatch,
            fetch=fetch,
        )
        self._engine.rows[0].damage = LOADING
        self._ring = [self._row_like_mean() for _ in ring]
        with torch.no_grad():
            for row, captured in zip(self._ring, ring, strict=True):
                for entry, target in zip(self._engine.entries, row.tensors, strict=True):
                    plain(target).copy_(fetch(captured[entry.name], target))
        self._times, self._stale = times, bool(ring)
        self._engine.rows[0].damage = ""
        self._engine.show()

    def _checked(self, state: Mapping[str, Any]) -> tuple[list[Mapping[str, Tensor]], list[float]]:
        """Captures and their times from a state that fits this window."""
        saved = part(state, "window", Mapping)
        k, every = part(saved, "k", int), part(saved, "every", int, float)
        if (k, every) != (self.k, self.every):
            raise MatchError(
                f"the state must be of a window with k={self.k} and every={self.every}, got "
                f"k={k} and every={every}. Build the window as it was saved."
            )
        ring, times = list(part(saved, "ring", list)), list(part(saved, "times", list))
        clock = part(state, "clock", Mapping)
        start, end = part(clock, "origin", int, float), part(clock, "now", int, float)
        ordered = all(
            isinstance(t, int | float) and start < t <= end for t in times
        ) and times == sorted(set(times))
        if not (len(ring) == len(times) <= k and ordered):
            raise ArgumentError(
                f"the state's window must hold at most {k} captures with one time each, rising, "
                f"got {len(ring)} captures at {times[:4]}. The file is damaged; take an older one."
            )
        for captured in ring:
            check_tensors(self._engine, captured)
        return ring, times

    def _captures_by(self, time: float) -> int:
        """Multiples of `every` up to `time`; 0.3 is three times 0.1, whatever floats say."""
        return math.floor((time - self._engine.origin) / self.every * (1.0 + 1e-12) + 1e-12)

    def _capture(self, time: float) -> None:
        """Take the live weights into the oldest place of the ring."""
        newest = self._ring[-1] if self._ring else self._engine.rows[0]
        self._engine.check_finite([newest])  # may refuse, so before anything moves
        row = self._ring[0] if len(self._ring) == self.k else self._row_like_mean()
        if row is not newest:
            with torch.no_grad():
                for target, value in zip(row.tensors, newest.tensors, strict=True):
                    plain(target).copy_(
                        plain(value)
                    )  # stands in where the live weights are not finite
        self._engine.fold([1.0], [row])
        self._ring = [*(kept for kept in self._ring if kept is not row), row]
        self._times = [*self._times, time][-self.k :]
        self._stale = True
        self._engine.rows[0].norms = {}

    def _refresh(self) -> None:
        """Bring the mean up to date, as long as nobody is reading it."""
        if self._stale and self._engine.loan is None:
            mean = self._engine.rows[0]
            for slot, target in enumerate(mean.tensors):
                kernels.mean_(plain(target), [plain(row.tensors[slot]) for row in self._ring])
            self._stale = False
        self._engine.rows[0].memory = self._memory()

    def _memory(self) -> Memory:
        if not self._ring:
            return Memory(age=self._engine.now - self._engine.origin)
        mean_time = sum(self._times) / self.filled
        return Memory(0.0, self._engine.now - mean_time, 1.0 / self.filled)

    def _stored(self) -> list[Tensor]:
        return [tensor for row in (*self._engine.rows, *self._ring) for tensor in row.tensors]

    def _row_like_mean(self) -> Row:
        mean = self._engine.rows[0]
        with torch.inference_mode(False):
            tensors = [
                spread_like(torch.empty_like(plain(tensor)), tensor) for tensor in mean.tensors
            ]
        return Row(mean.schedule, tensors, [], Memory(), {})

    def _rule(self) -> str:
        return f"Window(k={self.k}, every={self.every}) holding {self.filled}"
