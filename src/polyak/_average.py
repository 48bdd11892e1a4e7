"""Average, Averages and what they share: methods that make one call each into the rooms below."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ._applied import Unentered, applied
from ._engine import Engine, NonFinite, Rounding, check_memory_not_lent
from ._errors import ArgumentError, OrderError
from ._follow import Clock, Follower
from ._module import averaged_module
from ._norms import Forward, recompute
from ._pairing import Coverage, Names
from ._report import Report, report, thawed, unreached_caps, unseen
from ._roles import (
    RoleOverride,
    Selector,
    take_inventory,
)
from ._schedules import Power, Schedule
from ._state import (
    OnLive,
    OnMismatch,
    OnSchedule,
    engine_state,
    load_engine_state,
    tensor_state,
)
from ._weights import copy_to, full_set

if TYPE_CHECKING:  # a build of torch may be without the second
    from contextlib import _GeneratorContextManager

    from torch.distributed import ProcessGroup

Source = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


class Uses:
    """What every average can be used for, whatever rule made it.

    Not meant to be built or subclassed outside polyak.
    """

    def __init__(self, source: Source, engine: Engine, row: int) -> None:
        self._source, self._engine, self._row = source, engine, row

    def applied(self) -> "_GeneratorContextManager[None]":
        """Lend the averaged weights to the live model for the length of a `with` block.

        Values change in place, storages stay, so optimizers, hooks, compiled code and CUDA graphs
        keep pointing at the same tensors. The trained weights and buffers come back bit for bit,
        also on an exception or a KeyboardInterrupt. Cost: 16 MiB of scratch; one copy of the live
        weights where dtypes differ, and while somebody holds `tensors` or `state_dict()`.

        A graph built before the block is valid after it. One built inside must be differentiated
        inside: after the block its backward pass would read the trained weights.

        Without `with` nothing is lent, and an `AveragingWarning` says so.

        Raises:
            OrderError: inside another `applied()` over the same weights; for a lost average; on
                exit, when a parameter was changed inside the block.

        Examples:
            >>> model = torch.nn.Linear(2, 1)
            >>> average = Average(model)
            >>> with average.applied():
            ...     y = model(torch.ones(1, 2))
        """
        return self._lent(Unentered())

    @contextmanager
    def _lent(self, block: Unentered) -> Iterator[None]:
        block.entered = True
        self._ready("applied")
        row = self._engine.rows[self._row]
        norms = row.norms
        try:
            with applied(self._engine, self._row):
                yield
        finally:
            if row.norms is not norms:  # recomputed inside
                self._engine.show()

    def weights(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Fresh copies of the full set, ready for `load_state_dict(strict=True)`.

        Averaged tensors come from the average, integer buffers, frozen parameters and the like from
        the live model as it is now. Dtypes are those of the live model, and so is how each tensor
        is spread over ranks: those of FSDP2 or tensor parallelism load into such a model.

        Args:
            dtype: for the real floating tensors, instead of the live dtype.

        Raises:
            ArgumentError: a value that `dtype` cannot hold.
        """
        self._ready("weights")
        return full_set(self._engine, self._row, dtype)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The averaged tensors by canonical name, in storage dtype: views, for reading only.

        Views show the average at all times, also inside `applied()`. Taken there they are copies.
        `DTensor`s where the average is spread over ranks.
        """
        self._refresh()
        values = self._engine.values(self._row)
        copies = self._engine.loan is not None
        return MappingProxyType(tensor_state(self._engine, values, copies=copies))

    def module(
        self,
        *,
        factory: Callable[[], nn.Module] | None = None,
        names: Names | None = None,
        partial: bool = False,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """A second module beside the live one whose weights are the average.

        For teachers, target networks, evaluation beside training, export. Of the same class as the
        (unwrapped) model, in evaluation mode also when a parent calls `train()`, without gradients.
        It follows: after each update, load, reset or `refresh_norms` it shows the average as it is
        then, and inside `applied()` it goes on showing the average.

        Averaged parameters share the average's memory where dtype and device are those of the live
        model: they cost nothing, and writing into them writes into the average. Elsewhere (bf16
        weights with a float32 average, an average on another device) they are copies, made again
        after each update; `dtype=torch.float32` makes a bf16 model's share. Buffers are always
        such copies, since a forward pass may write them. Frozen parameters share the live model's
        memory: writing into those writes into the live model. What is no tensor is as it was at
        the call. What `load_state_dict` loads into the module is in the average. While such a
        module is alive, `applied()` needs a copy of what it shares.

        A `copy.deepcopy` of it stands still, and is an ordinary module that `train()` wakes.

        Args:
            factory: a function that returns a module with the same names, for models that cannot
                be deep-copied, another class, or an average of named tensors.
            names: how the names of the factory's module differ; see `copy_to`.
            partial: leave what the factory's module has beside them as it is; see `copy_to`.
            dtype: of the real floating tensors, instead of the live dtype; what it can hold is
                checked now, not at each update.

        Raises:
            ArgumentError: a model that cannot be copied, named tensors without a factory, a value
                that the dtype cannot hold.
            MatchError: names, shapes or kinds that do not belong together.
            OrderError: inside `applied()`.

        Examples:
            >>> model = torch.nn.Linear(2, 1)
            >>> average = Average(model)
            >>> teacher = average.module()
            >>> type(teacher).__name__, teacher.training, teacher.weight.requires_grad
            ('Linear', False, False)
        """
        self._ready("module")
        return averaged_module(
            self._engine,
            self._row,
            self._source if isinstance(self._source, nn.Module) else None,
            factory=factory,
            names=names,
            partial=partial,
            dtype=dtype,
            before=self._refresh,
        )

    def copy_to(
        self,
        module: nn.Module,
        *,
        share: float = 1.0,
        names: Names | None = None,
        partial: bool = False,
    ) -> Coverage:
        """Write the average into `module`: module += share * (average - module).

        With the default share the module gets the full set, integer buffers included; with less
        (Switch EMA, Lookahead) only averaged tensors move. The clock of the average and the state
        of an optimizer stay as they are.

        Tensors are paired by name, all of them: what one side has and the other lacks is refused,
        since a target network of which a part is never written goes stale unnoticed.

        Args:
            module: any module with the same names and shapes, also the live one.
            share: above 0, at most 1.
            names: name here -> name in `module`, where they differ: a mapping (what it does not
                list keeps its name) or a function; None as the new name leaves the tensor out.
            partial: leave tensors without a partner as they are, on either side.

        Returns:
            Which names were paired, and which have no partner.

        Raises:
            ArgumentError: a share out of range, a value that the module's dtype cannot hold.
            MatchError: unpaired names (unless `partial`), other shapes or kinds.

        Examples:
            >>> online, target = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
            >>> print(Average(online).copy_to(target))
            2 tensors paired by name
        """
        self._ready("copy_to")
        return copy_to(self._engine, self._row, module, share=share, names=names, partial=partial)

    def report(self) -> Report:
        """Whether it works, and what it remembers: roles, memory, incidents, notes.

        Of an average that is spread over ranks, distance, bytes and incidents are this rank's.
        """
        self._engine.settle()
        self._refresh()
        return report(self._engine, self._row, rule=self._rule(), stored=self._stored())

    @property
    def updates(self) -> int:
        """Updates since construction or reset."""
        self._engine.settle()
        return self._engine.updates

    @property
    def now(self) -> float:
        """Time of the last update, in the caller's unit."""
        self._engine.settle()
        return self._engine.now

    def __repr__(self) -> str:
        """One line: the rule, updates and clock."""
        return f"<{type(self).__name__} {self._rule()} updates={self.updates} now={self.now}>"

    def _refresh_norms(
        self, batches: Iterable[Any], forward: Forward | None, limit: int | None
    ) -> int:
        if not isinstance(self._source, nn.Module):
            raise ArgumentError(
                "refresh_norms must be given an average of a module, got one of named tensors. "
                "Copy the weights into a module and pass that."
            )
        loan = self._engine.loan
        inside = loan is not None and loan.row == self._row
        with nullcontext() if inside else self.applied():
            used, norms = recompute(self._source, batches, forward=forward, limit=limit)
        self._engine.rows[self._row].norms = norms
        self._engine.show()
        return used

    def _rule(self) -> str:
        return repr(self._engine.rows[self._row].schedule)

    def _warn_of_unreached_cap(self) -> None:
        for note in unreached_caps(self._engine, self._row):
            self._engine.warn_once("cap", f"save: {note}.")

    def _provenance(self) -> dict[str, Any]:
        """What a file of these weights says about them: the rule, clock and memory."""
        self._refresh()
        memory = self._engine.rows[self._row].memory
        return {
            "rule": self._rule(),
            "now": self.now,
            "updates": self.updates,
            "initial_weight": memory.initial,
            "mean_age": memory.age,
        }

    def _stored(self) -> list[Tensor]:
        """All memory that this average holds."""
        return self._engine.rows[self._row].tensors

    def _refresh(self) -> None:
        """Bring the stored average up to date where it is computed on demand."""

    def _ready(self, action: str) -> None:
        """Check what every use relies on, and warn of an average that was never updated."""
        self._refresh()
        self._engine.inventory.look_again()
        self._engine.check_live()
        if self._engine.live_changed_unseen():
            self._engine.warn_once("unseen", f"{action}: {unseen(self._engine)}.")
        for note in thawed(self._engine):
            self._engine.warn_once("thawed", f"{action}: {note}.")


@final
class Average(Uses):
    """A running average of the weights of a model.

    Each update at time `now` does average += (1 - decay) * (live - average) with
    decay = schedule(now, elapsed). Update after every optimizer step, or more rarely: the average
    is the same, only sampled more coarsely.

    It keeps tensors only: float32 for anything narrower, one for tied weights, none for frozen
    ones. NaN and inf do not get in.

    Args:
        model_or_tensors: a module, wrapped or not, or tensors by name (which must stay the same
            objects, or be replaced in the same mapping: prefer the module, which is looked up).
        schedule: how fast it forgets; the default is on average a twentieth of the run old, and as
            calm as the mean of its last tenth.
        now: the clock at construction, in steps, samples or tokens.
        dtype: storage of real averages; by default float32 for anything narrower, else the
            tensor's own.
        device: where the average lives; by default beside each live tensor, also when that moves.
        include: only these are averaged: a name pattern (`fnmatch`), several, or a function
            `(name, tensor) -> bool`.
        exclude: these stay live; the same forms.
        roles: the last word: patterns to "average" or "live", or a function that returns one of
            these, or None for the usual rule.
        nonfinite: live elements that are NaN or inf: "skip" keeps the average's value there,
            "raise" refuses the update, "ignore" lets them in. Of a spread average a rank looks at
            its own part, so "raise" stops that rank alone and its clock falls behind the others'.
        rounding: "nearest", or "stochastic": up or down with the probability that keeps the mean.
            With dtype=torch.bfloat16 an unbiased average in 2 bytes, with float32 one that does
            not stall at decays of 0.9999 and above. The random bits are a hash of seed, name,
            element and update number: nothing to save, the same on every device.
        seed: of stochastic rounding.
        shard: for models that every rank of a process group holds whole (DDP): each keeps and
            updates its share of the average only. `applied`, `weights`, `copy_to`, `save` and
            loading gather, so all ranks must call them. Parameters that are sharded already stay as
            they are: their average always is.

    Raises:
        ArgumentError: nothing to average, a pattern without a match, a value out of range.
        OrderError: an uninitialised lazy parameter, or a tensor on the meta device.

    Examples:
        >>> model = torch.nn.Linear(2, 1)
        >>> average = Average(model, Power(sigma_rel=0.05))
        >>> average.update()  # the first update of a power function copies the live weights
        0.0
    """

    def __init__(
        self,
        model_or_tensors: Source,
        schedule: Schedule = Power(sigma_rel=0.05),
        *,
        now: float = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        include: Selector | None = None,
        exclude: Selector | None = None,
        roles: RoleOverride | None = None,
        nonfinite: NonFinite = "skip",
        rounding: Rounding = "nearest",
        seed: int = 0,
        shard: "ProcessGroup | None" = None,
    ) -> None:
        inventory = take_inventory(model_or_tensors, include=include, exclude=exclude, roles=roles)
        engine = Engine(
            inventory,
            [schedule],
            now=now,
            dtype=dtype,
            device=device,
            nonfinite=nonfinite,
            rounding=rounding,
            seed=seed,
            shard=shard,
        )
        super().__init__(model_or_tensors, engine, 0)
        self._alone = True

    @classmethod
    def _member(cls, source: Source, engine: Engine, row: int) -> "Average":
        """One of several averages that share an engine, and so a clock."""
        member = cls.__new__(cls)
        Uses.__init__(member, source, engine, row)
        member._alone = False
        return member

    @property
    def schedule(self) -> Schedule:
        """The rule of forgetting."""
        return self._engine.rows[self._row].schedule

    def update(self, now: float | None = None) -> float:
        """Fold in the live weights as they are at `now` (None: one more); return the decay.

        Raises:
            OrderError: time that does not move forward; inside `applied()`; a lost average.
            MatchError: a parameter that was replaced, resized or removed.
            ArgumentError: a decay outside [0, 1], or one that the storage dtype cannot express;
                NaN or inf with nonfinite="raise".
        """
        self._check_alone("update")
        return self._engine.update(now)[0]

    def follow(self, *optimizers: Optimizer, every: int = 1, now: Clock | None = None) -> Follower:
        """Update after each step that the optimizers really take (or every so many).

        A step that a gradient scaler skips does not count, also where a fused optimizer learns of
        it on the device only. With gradient accumulation nothing changes: what counts is the step.
        A step inside `applied()` raises. Wrappers such as Accelerate's are looked into. While
        following, `update()` without a time takes the steps since the last update.

        Args:
            optimizers: all that train the model, in the order in which they step: the last one
                named closes a step of the loop and brings the update.
            every: steps from one update to the next; the phase survives a resume.
            now: a function that tells the time, when it is counted in samples or tokens.

        Returns:
            The follower; its `remove()` ends it. Following the same optimizers again replaces it.

        Raises:
            ArgumentError: no optimizer, or one that steps inside backward: call `update` there.
            OrderError: other optimizers are followed already.
        """
        self._check_alone("follow")
        return Follower(optimizers, self._engine, self._engine.update, every=every, now=now)

    def reset(self, *, now: float | None = None) -> None:
        """Start again from the live weights, at time `now` (None: where the clock stands)."""
        self._check_alone("reset")
        self._engine.reset(now)
        self._engine.show()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: tensors (references), clock, schedule, counters, history.

        Readable by `torch.load(weights_only=True)`. Taken inside `applied()` it holds copies, and
        the trained weights as well.
        """
        return engine_state(self._engine, "Average", {"average": self._row})

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        *,
        schedule: OnSchedule = "same",
        live: OnLive = "restore",
        on_mismatch: OnMismatch = "error",
    ) -> None:
        """Go on from a saved state. Everything is checked before anything is written.

        Nothing is sent, unless the state is spread over ranks otherwise than this average: then
        the ranks put it together, and all of them must call this.

        Args:
            state: what `state_dict` returned.
            schedule: "same" refuses a state with another schedule; "replace" goes on with the one
                this average was built with.
            live: what to do with trained weights that a state taken inside `applied()` carries:
                "restore" writes them into the live model.
            on_mismatch: "error" refuses a state with other names or shapes; "reinit" starts the
                averages that do not fit (a new head) from the live weights, on the clock of the
                others, and warns by name; a state of which nothing fits is refused.

        Raises:
            ArgumentError: not a state of an average, or of an unknown format.
            MatchError: other names, shapes, dtypes or schedule.
        """
        self._load(state, schedule=schedule, live=live, on_mismatch=on_mismatch)

    def _load(self, state: Mapping[str, Any], **options: Any) -> None:
        """`load_state_dict`, also with the `fetch` of `load_engine_state`."""
        self._check_alone("load_state_dict")
        load_engine_state(self._engine, state, "Average", ["average"], **options)
        self._engine.show()

    def _check_alone(self, action: str) -> None:
        if not self._alone:
            raise OrderError(
                f"{action} must be called on the Averages that this average belongs to: "
                "they share one clock and one read of the live weights."
            )


@final
class Averages(Mapping[str, Average]):
    """Several averages of one model from one read of its weights: a mapping of `Average`s.

    Args:
        model_or_tensors: a module, wrapped or not, or tensors by name.
        schedules: name to schedule, at least one.

    All that is named after them is as for `Average`.

    Examples:
        >>> from polyak import Exponential
        >>> model = torch.nn.Linear(2, 1)
        >>> averages = Averages(
        ...     model, {"short": Exponential(half_life=100), "long": Exponential(half_life=1_000)}
        ... )
        >>> averages.update()
        {'short': 0.0, 'long': 0.0}
        >>> with averages["short"].applied():
        ...     y = model(torch.ones(1, 2))
    """

    def __init__(
        self,
        model_or_tensors: Source,
        schedules: Mapping[str, Schedule],
        *,
        now: float = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        include: Selector | None = None,
        exclude: Selector | None = None,
        roles: RoleOverride | None = None,
        nonfinite: NonFinite = "skip",
        rounding: Rounding = "nearest",
        seed: int = 0,
        shard: "ProcessGroup | None" = None,
    ) -> None:
        named = isinstance(schedules, Mapping) and all(isinstance(n, str) for n in schedules)
        if not (named and schedules):
            raise ArgumentError(
                "schedules must be at least one schedule by name, such as "
                f'{{"short": polyak.Exponential(half_life=100)}}, got {schedules!r}.'
            )
        inventory = take_inventory(model_or_tensors, include=include, exclude=exclude, roles=roles)
        self._engine = Engine(
            inventory,
            list(schedules.values()),
            now=now,
            dtype=dtype,
            device=device,
            nonfinite=nonfinite,
            rounding=rounding,
            seed=seed,
            shard=shard,
        )
        self._members: dict[str, Average] = {}
        for row, name in enumerate(schedules):
            self._members[name] = Average._member(model_or_tensors, self._engine, row)

    def __getitem__(self, name: str) -> Average:
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        """One line a member."""
        return "\n".join(f"{name}: {member!r}" for name, member in self._members.items())

    @property
    def updates(self) -> int:
        """Updates since construction or reset."""
        self._engine.settle()
        return self._engine.updates

    @property
    def now(self) -> float:
        """Time of the last update, in the caller's unit."""
        self._engine.settle()
        return self._engine.now

    def update(self, now: float | None = None) -> dict[str, float]:
        """Fold in the live weights as they are at `now`; return the decay of each average.

        See `Average.update` for what is refused.
        """
        return dict(zip(self._members, self._engine.update(now), strict=True))

    def follow(self, *optimizers: Optimizer, every: int = 1, now: Clock | None = None) -> Follower:
        """Update after each step that the optimizers really take; see `Average.follow`."""
        return Follower(optimizers, self._engine, self._engine.update, every=every, now=now)

    def report(self) -> dict[str, Report]:
        """The report of each average; see `Average.report`."""
        return {name: member.report() for name, member in self._members.items()}

    def reset(self, *, now: float | None = None) -> None:
        """Start all of them again from the live weights."""
        self._engine.reset(now)
        self._engine.show()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on with all of them; see `Average.state_dict`."""
        return engine_state(
            self._engine, "Averages", {name: row for row, name in enumerate(self._members)}
        )

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        *,
        schedule: OnSchedule = "same",
        live: OnLive = "restore",
        on_mismatch: OnMismatch = "error",
    ) -> None:
        """Go on from a saved state; see `Average.load_state_dict`."""
        self._load(state, schedule=schedule, live=live, on_mismatch=on_mismatch)

    def _load(self, state: Mapping[str, Any], **options: Any) -> None:
        """`load_state_dict`, also with the `fetch` of `load_engine_state`."""
        load_engine_state(self._engine, state, "Averages", list(self._members), **options)
        self._engine.show()


def refresh_norms(
    average_or_model: Uses | nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    limit: int | None = None,
) -> int:
    """Recompute batch-norm statistics on data: the mean and variance of all values seen.

    Statistics that were averaged along with the weights belong to no network in particular. Given
    an average, they are recomputed for the averaged weights and kept with it: `applied`,
    `weights`, `copy_to` and `save` use them until its next update; the live model is as before.
    Given a model, they are written into it.

    Layers in evaluation mode in a model that trains are taken to be frozen on purpose. Dropout is
    off. Nothing changes when the data raises or there is none.

    Args:
        average_or_model: an average of a module, or a module.
        batches: what the model is called with: tensors, or tuples that start with one.
        forward: `(model, batch) -> anything`, for every other kind of batch.
        limit: use at most so many batches.

    Returns:
        The number of batches used.

    Raises:
        ArgumentError: no batches, no batch norm, a batch that needs `forward`.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> average = Average(model)
        >>> refresh_norms(average, [torch.randn(8, 2), torch.randn(8, 2)])
        2
    """
    if isinstance(average_or_model, nn.Module):
        memory = (
            t for m in average_or_model.modules() for t in m._parameters.values() if t is not None
        )
        check_memory_not_lent(memory, "refresh_norms of the model")
        return recompute(average_or_model, batches, forward=forward, limit=limit)[0]
    check_is_average(average_or_model)
    return average_or_model._refresh_norms(batches, forward, limit)


def check_is_average(average: object) -> None:
    """Refuse what is not one average, and say how to get at one."""
    if isinstance(average, Averages):
        raise ArgumentError(
            f"average must be one average, got Averages of {list(average)}. "
            f"Pass a member: averages[{next(iter(average))!r}]."
        )
    if not isinstance(average, Uses):
        raise ArgumentError(
            f"average must be a polyak.Average or Window, got {type(average).__name__}."
        )
