"""ema-pytorch's `EMA` on polyak's engine: change the import, keep the loop."""

import warnings
from collections.abc import Callable, Collection, Set
from typing import Any, Self, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .._average import Average
from .._checks import is_count
from .._errors import ArgumentError, AveragingWarning, OrderError, frames_to_the_user, show_time
from .._history import History
from .._roles import bare
from ._roles import frozen_too
from ._warm_up import WarmUp, check_share
from ._wrapper import AverageModule


@final
class EMA(AverageModule):
    """The EMA with a warm-up of ema-pytorch 0.8.3: same arguments, names, files and numbers.

    decay = clamp(1 - (1 + e / inv_gamma) ** -power, min_value, beta), e = calls - 1 -
    update_after_step, at each `update_every`-th call; 0, that is a copy, while e <= 0.
                                                  https://github.com/lucidrains/ema-pytorch

    The decay is not rescaled for `update_every`: with 10 (the default) the average is ten times
    as long, in steps, as with 1. In polyak's own words, where an interval only samples more
    coarsely:

        rule = polyak.InverseGamma(1.0, power=2 / 3, max_decay=0.9999)
        average = polyak.Average(model, polyak.After(100, rule))       # EMA(model, update_every=1)
        average.follow(optimizer)                                      # ema.update()
        with average.applied(): ...                                    # ema.ema_model(...)
        average.copy_to(model, share=1 - beta)                         # update_model_with_ema(beta)

    Deliberately better:

    - integer and boolean buffers follow the live model at each update; the original keeps those of
      its birth;
    - bf16 and fp16 weights are averaged in float32; `ema_model` shows them in its own dtype, files
      hold all digits;
    - `ema_model` is in evaluation mode from the start, and a parent's `train()` leaves it there
      (its own `train()` works); `forward_eval` does evaluate;
    - tensors meet by name, not by position; DDP and compile around the model do not matter; tied
      weights are one; NaN and inf do not get into an average (names that are copied are copied);
    - dtypes may always differ, and foreach kernels are always used; where devices must not differ,
      `ema_model` goes to the live model;
    - a model that cannot be copied is an error, not the end of the program; a name to be ignored
      that the model does not have is a warning; a load checks everything before it writes, and
      makes an `ema_model` that was to come with the first update.

    Differences to know: `ema_model` wants no gradient, its memory is the average's. Buffers outside
    the state dict and the unit vectors of spectral norm are those of the live model. Decays are
    rounded to float32, as the original's are: of 1 - 0.9999 that is 1.7e-4. For tensors without a
    module use `polyak.Average(tensors)`. Internals of the original (`update_moving_average`,
    `get_params_iter`, `inplace_lerp`, ...) are not there.

    Args:
        model: the live model.
        ema_model: a module of the same names to show the average, or a function that returns one;
            None for a copy.
        beta: largest decay, in [0, 1]; with 1 the average stands still after `update_after_step`.
        update_after_step: calls up to which the average is a copy.
        update_every: calls from one update to the next.
        inv_gamma: inverse gain of the warm-up, at least 0; 0 for no warm-up.
        power: exponent of the warm-up, at least 0.
        min_value: smallest decay once it averages, in [0, 1]; `beta` limits it.
        param_or_buffer_names_no_ema: names that are copied at each update, a set or a list.
        ignore_names: names that are left alone once it averages.
        ignore_startswith_names: the same by the beginnings of names.
        include_online_model: whether the live model is a child of this module too, and so in its
            files: a load then writes it as well.
        allow_different_devices: whether the average stays where it was put, whatever the live model
            does.
        use_foreach: accepted; always done.
        update_model_with_ema_every: calls from one return of the average into the live model to the
            next, None for never.
        update_model_with_ema_beta: share of the live weights that survives it, in [0, 1].
        forward_method_names: methods of `ema_model` that this object should have as well.
        move_ema_to_online_device: whether it goes where the live model is all the same.
        coerce_dtype: accepted; always done.
        lazy_init_ema: make `ema_model` at the first update (or load) only.

    Raises:
        ArgumentError: a value out of range, a model that cannot be copied, nothing to average.
        OrderError: lazy parameters without a shape: run the model once first, or `lazy_init_ema`.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> ema = EMA(model, beta=0.99, update_after_step=0, update_every=1)
        >>> ema.update()
        >>> ema(torch.ones(1, 2)).shape, int(ema.step), bool(ema.initted)
        (torch.Size([1, 1]), 1, True)
    """

    _child, _counter = "ema_model", "step"
    initted: Tensor
    step: Tensor
    online_model: nn.Module | list[nn.Module]
    ema_model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        ema_model: nn.Module | Callable[[], nn.Module] | None = None,
        beta: float = 0.9999,
        update_after_step: int = 100,
        update_every: int = 10,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        min_value: float = 0.0,
        param_or_buffer_names_no_ema: Set[str] | list[str] = frozenset(),
        ignore_names: Collection[str] = frozenset(),
        ignore_startswith_names: Collection[str] = frozenset(),
        include_online_model: bool = True,
        allow_different_devices: bool = False,
        use_foreach: bool = False,
        update_model_with_ema_every: int | None = None,
        update_model_with_ema_beta: float = 0.0,
        forward_method_names: tuple[str, ...] = (),
        move_ema_to_online_device: bool = False,
        coerce_dtype: bool = False,
        lazy_init_ema: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ArgumentError(
                f"model must be a module, got {type(model).__name__}. "
                "For tensors by name use polyak.Average(tensors)."
            )
        if lazy_init_ema and ema_model is not None:
            raise ArgumentError("ema_model must be None with lazy_init_ema=True, got one.")
        self.beta, self.min_value = beta, min_value
        self.inv_gamma, self.power = inv_gamma, power
        self.update_every, self.update_after_step = update_every, update_after_step
        self.update_model_with_ema_every = update_model_with_ema_every
        self.update_model_with_ema_beta = update_model_with_ema_beta
        self.param_or_buffer_names_no_ema: Collection[str] = param_or_buffer_names_no_ema
        self.ignore_names, self.ignore_startswith_names = ignore_names, ignore_startswith_names
        self.include_online_model = include_online_model
        self.allow_different_devices, self.use_foreach = allow_different_devices, use_foreach
        self.move_ema_to_online_device, self.coerce_dtype = move_ema_to_online_device, coerce_dtype
        self.forward_method_names = forward_method_names
        self._check_settings()
        self.online_model = model if include_online_model else [model]
        with torch.inference_mode(False):
            self.register_buffer("initted", torch.tensor(False))
            self.register_buffer("step", torch.tensor(0))
        if lazy_init_ema:
            self.__dict__["ema_model"] = None
        else:
            self.init_ema(ema_model)

    def init_ema(self, ema_model: nn.Module | Callable[[], nn.Module] | None = None) -> None:
        """Make the average and the module that shows it, from the live weights as they are.

        Raises:
            OrderError: when it was made already.
        """
        if self._average is not None:
            raise OrderError("init_ema must be called once, got a second call. Build a new EMA.")
        average = self._build(self.model)
        self._warn_of_strangers(average)
        if ema_model is None:
            try:
                shown = self._show(average)
            except ArgumentError as error:
                error.add_note("Here that function is the argument ema_model of EMA.")
                raise
            self._adopt(average, shown)
            return
        shown = ema_model if isinstance(ema_model, nn.Module) else ema_model()
        if not isinstance(shown, nn.Module):
            raise ArgumentError(
                "ema_model must be a module, or a function that returns one, got one that returns "
                f"{type(shown).__name__}."
            )
        start = {name: tensor.detach().clone() for name, tensor in shown.state_dict().items()}
        self._fill(average, shown)
        self._adopt(average, shown.eval())
        named = {f"ema_model.{name}": value for name, value in start.items()}
        self._write(self._adapted(named, ""), "ema_model.")

    def _adopt(self, average: Average, shown: nn.Module) -> None:
        methods = {name: getattr(shown, name) for name in self.forward_method_names}
        self._average = average
        self._adopt_child(shown)
        for name, method in methods.items():
            setattr(self, name, method)
        self._stay_with_child()
        self._note()

    def _made(self) -> nn.Module:
        """The averaged model; `OrderError` where there is none yet."""
        self._check_made()
        return self.ema_model

    @property
    def model(self) -> nn.Module:
        """The live model."""
        return self.online_model[0] if isinstance(self.online_model, list) else self.online_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the averaged model."""
        return self._made()(*args, **kwargs)

    @torch.no_grad()
    def forward_eval(self, *args: Any, **kwargs: Any) -> Any:
        """Run the averaged model in evaluation mode and without gradient."""
        modes = [(part, part.training) for part in self._made().modules()]
        try:
            return self.ema_model.eval()(*args, **kwargs)
        finally:
            for part, training in modes:
                part.training = training

    def eval(self) -> nn.Module:  # type: ignore[override]  # as in the original
        """Put the averaged model in evaluation mode, and return it."""
        return self._made().eval()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the live model; the averaged one keeps its own."""
        self.training = mode
        if isinstance(self.online_model, nn.Module):
            self.online_model.train(mode)
        return self

    # ── updates ──────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def update(self) -> None:
        """Count one call, and fold in the live weights where it is the turn of this one.

        Raises:
            ArgumentError: `step` below 0.
            OrderError: inside `average.applied()`; an average that was updated, loaded or reset by
                itself, of which `step` and `initted` cannot tell.
            MatchError: a layer that was replaced or resized.
        """
        if self._average is None:
            self.init_ema()
        self._reconcile()
        self._follow(self.model)
        before, starts = self._count(), not bool(self.initted)
        if starts or before % self.update_every == 0:
            self._act(before + 1, starts)
        every = self.update_model_with_ema_every
        if every is not None and before % every == 0:  # nothing moves where all was just copied
            self.update_model_with_ema()
        self.step += 1
        self.initted.fill_(True)
        self._note()

    def _act(self, call: int, starts: bool) -> None:
        """Update the average at this call; on `starts` all of it is copied."""
        average = self.average
        self._check_settings()
        self._use(self._warm_up())
        self._place()
        if starts and call > 1:  # somebody asked for a new start
            average.reset(now=0)
            average._engine.set_clock(0, call, 0, 0, History())
            return
        ignored, copied = self._special()
        if self.is_frozen or call <= self.update_after_step + 1 or call == 1:
            ignored = copied = set()  # the rule is one for all: nothing moves, or all is copied
        tensors = average.tensors
        kept = {name: tensors[name].clone() for name in ignored}
        average.update(now=call)
        self._overwrite(kept | self._live(copied))

    def get_current_decay(self) -> float:
        """The decay that the last call had, if it was one to update at."""
        return self._warm_up().of_call(int(self.step))

    def add_to_optimizer_post_step_hook(self, optimizer: Optimizer) -> RemovableHandle:
        """Call `update` after each step of `optimizer`; the handle's `remove` ends it."""
        if not hasattr(optimizer, "register_step_post_hook"):
            raise ArgumentError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}. "
                "Call update() after each step."
            )
        return optimizer.register_step_post_hook(lambda *_: self.update())

    # ── copies ───────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def copy_params_from_model_to_ema(self) -> None:
        """Make the average a copy of the live weights."""
        self._follow(self.model)
        engine = self.average._engine
        engine.check_may_update()
        engine.rows[0].memory.fold(0.0, 0.0)
        engine.rows[0].norms = {}
        self._overwrite(self._live(engine.slots))

    def copy_params_from_ema_to_model(self) -> None:
        """Make the live weights a copy of the average."""
        self.average.copy_to(self.model)

    @torch.no_grad()
    def update_model_with_ema(self, decay: float | None = None) -> None:
        """Move the live weights to the average; ignored names stay, unless `decay` is 0.

        Args:
            decay: share of the live weights that survives; None: `update_model_with_ema_beta`.
        """
        decay = self.update_model_with_ema_beta if decay is None else decay
        check_share("decay", decay)
        if decay == 0.0:
            return self.copy_params_from_ema_to_model()
        if self.beta == 1.0:  # the original calls this frozen, in both directions
            return None
        ignored, copied = self._special()
        for names, share in (
            (copied, 1.0),
            (set(self.average.tensors) - ignored - copied, 1.0 - decay),
        ):
            if names and share > 0.0:
                self._hand_back(names, share)
        return None

    def _hand_back(self, names: Collection[str], share: float) -> None:
        inventory = self.average._engine.inventory
        first = {name: inventory.entries[index].name for name, index in inventory.index.items()}
        self.average.copy_to(
            self.model,
            share=share,
            names=lambda name: name if first[name] in names else None,
            partial=True,
        )

    @torch.no_grad()
    def _overwrite(self, values: dict[str, Tensor]) -> None:
        engine = self.average._engine
        for name, value in values.items():
            engine.rows[0].tensors[engine.slots[name]].copy_(value)
        if values:
            engine.show()

    def _live(self, names: Collection[str]) -> dict[str, Tensor]:
        return {e.name: e.live().detach() for e in self.average._engine.entries if e.name in names}

    # ── where it lives ───────────────────────────────────────────────────────────────────────────

    def restore_ema_model_device(self) -> None:
        """Move the averaged model to where this object's own buffers are."""
        self._made().to(self.initted.device)
        self._stay_with_child()

    def _place(self) -> None:
        """Let `ema_model` be where it was put, if that is allowed, else where the live model is."""
        engine = self.average._engine
        slots, live = engine.rows[0].tensors, engine.entries[0].live().device
        shown = next((p.device for p in self.ema_model.parameters()), slots[0].device)
        if self.move_ema_to_online_device or not self.allow_different_devices:
            engine._device = None
            if shown != live:
                self.ema_model.to(live)
                self._stay_with_child()
        elif shown != slots[0].device:
            self._stay_with_child()

    # ── settings ─────────────────────────────────────────────────────────────────────────────────

    @property
    def is_frozen(self) -> bool:
        """Whether the average stands still once it no longer copies."""
        return self.beta == 1.0

    def _warm_up(self) -> WarmUp:
        return WarmUp(
            beta=self.beta,
            update_after_step=self.update_after_step,
            inv_gamma=self.inv_gamma,
            power=self.power,
            min_value=self.min_value,
        )

    def _check_settings(self) -> None:
        """Check what people may also set later, as attributes."""
        self._warm_up()
        every, back = self.update_every, self.update_model_with_ema_every
        if not is_count(every):
            raise ArgumentError(f"update_every must be at least 1, a whole number, got {every!r}.")
        if not (back is None or is_count(back)):
            raise ArgumentError(
                "update_model_with_ema_every must be at least 1, a whole number, or None, "
                f"got {back!r}."
            )
        check_share("update_model_with_ema_beta", self.update_model_with_ema_beta)
        if not isinstance(self.param_or_buffer_names_no_ema, Set | list):
            raise ArgumentError(
                "param_or_buffer_names_no_ema must be a set or a list of names, "
                f"got {self.param_or_buffer_names_no_ema!r}."
            )
        for argument in ("ignore_names", "ignore_startswith_names", "forward_method_names"):
            names = getattr(self, argument)
            if isinstance(names, str) or not isinstance(names, Collection):
                raise ArgumentError(f"{argument} must be a collection of names, got {names!r}.")

    def _special(self) -> tuple[set[str], set[str]]:
        """Names of averages that are left alone, and of those that are copied."""
        if not (
            self.ignore_names or self.ignore_startswith_names or self.param_or_buffer_names_no_ema
        ):
            return set(), set()
        own = set(self.average._engine.slots)
        starts = tuple(self._plain(self.ignore_startswith_names))
        ignored = own & self._plain(self.ignore_names) | {n for n in own if n.startswith(starts)}
        return ignored, (own & self._plain(self.param_or_buffer_names_no_ema)) - ignored

    def _plain(self, names: Collection[str]) -> set[str]:
        """Names without what a wrapper around the live model puts before them."""
        around = self._around()
        return {name.removeprefix(around) for name in names}

    def _around(self) -> str:
        inner = bare(self.model)
        if inner is self.model:
            return ""
        return next(f"{name}." for name, part in self.model.named_modules() if part is inner)

    def _warn_of_strangers(self, average: Average) -> None:
        known = average._engine.inventory.index
        named = {*self.param_or_buffer_names_no_ema, *self.ignore_names}
        strangers = {name for name in named if name.removeprefix(self._around()) not in known}
        strangers |= {
            start
            for start in self.ignore_startswith_names
            if not any(name.startswith(start.removeprefix(self._around())) for name in known)
        }
        if strangers:
            warnings.warn(
                f"EMA: the model has no tensors called {sorted(strangers)[:3]}, which are to be "
                "copied or ignored: nothing will be, under these names.",
                AveragingWarning,
                stacklevel=frames_to_the_user(),
            )

    # ── the average ──────────────────────────────────────────────────────────────────────────────

    def _build(self, model: nn.Module) -> Average:
        average = Average(model, self._warm_up(), roles=frozen_too)
        devices = {tensor.device for tensor in average.tensors.values()}
        if self.allow_different_devices and len(devices) == 1:
            average._engine._device = devices.pop()  # stay, whatever the live model does
        return average

    def _restore_clock(self) -> None:
        every = self.update_every
        self._use(self._warm_up())
        self._go_on_after((self._count() + every - 1) // every, every)

    def _accept_average(self, *, counted: bool) -> None:
        updates, now = self._seen[1]
        raise OrderError(
            "average must be updated, loaded and reset by its EMA only, got it at "
            f"{self.average.updates} updates, time {show_time(self.average.now)}, where the EMA "
            f"left it at {updates}, time {show_time(now)}. Load with load_state_dict of the EMA, "
            "which mends this too; to update by hand use polyak.Average without an EMA."
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self._average is None and any(
            key.startswith(f"{prefix}ema_model.") for key in state_dict
        ):
            self.init_ema()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Go on from a state of ema-pytorch or of this class; see `AverageModule`."""
        if self._average is None and any(key.startswith("ema_model.") for key in state_dict):
            self.init_ema()
        return super().load_state_dict(state_dict, strict, assign)
