"""Is a run that was stopped and went on the run that was never stopped?"""

import hashlib
import io
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .._errors import ArgumentError, AveragingError

_Digests = dict[str, str]


class ResumeError(AveragingError, AssertionError):
    """A run that was stopped and went on is not the run that was never stopped."""


class ResumableRun(Protocol):
    """A training run as `check_resume` sees it."""

    def train(self, steps: int) -> object:
        """Go on for so many steps; the check calls it with 1."""

    def outcome(self) -> Mapping[str, Any]:
        """Return all that must be the same: tensors and numbers, nested as you like."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return what goes into a checkpoint."""

    def load_state_dict(self, state: Any) -> object:
        """Go on from a checkpoint."""


def check_resume(
    make_run: Callable[[], ResumableRun], *, steps: int = 20, stops: Iterable[int] | None = None
) -> None:
    """Train with and without stops, and compare everything at every step, bit for bit.

    The run that is never stopped is the reference. For each stop another run trains so far, its
    checkpoint goes through torch.save and torch.load(weights_only=True) in memory, and a run newly
    made loads it and trains to the end, with other random numbers in the generator of torch than
    it had, as in a new process. Cost: (2 + stops) times `steps` steps and a checkpoint in memory.

    What it finds: an average, counter, schedule, scaler, or random state that is not saved; a load
    that is not exact; what is saved but not loaded. It finds nothing in what `outcome` leaves out.

    Args:
        make_run: builds a run from nothing, always the same one: seed inside it.
        steps: length of the run, at least 1.
        stops: steps after which to stop, from 0 to `steps`; when left out, the start, the first
            step, the middle and the last step but one.

    Raises:
        ResumeError: (also an AssertionError) names the first tensor or number and step that differ.
        ArgumentError: a stop outside the run; runs that differ before any stop.

    Examples:
        >>> import polyak
        >>> class Loop:
        ...     def __init__(self):
        ...         torch.manual_seed(0)
        ...         self.model = torch.nn.Linear(2, 1)
        ...         self.optimizer = torch.optim.Adam(self.model.parameters())
        ...         self.average = polyak.Average(self.model)
        ...         self.average.follow(self.optimizer)
        ...         self.parts = [self.model, self.optimizer, self.average]
        ...
        ...     def train(self, steps):
        ...         for _ in range(steps):
        ...             self.optimizer.zero_grad()
        ...             self.model(torch.ones(4, 2)).square().sum().backward()
        ...             self.optimizer.step()
        ...
        ...     def outcome(self):
        ...         return self.model.state_dict() | self.average.state_dict()
        ...
        ...     def state_dict(self):
        ...         return {str(i): part.state_dict() for i, part in enumerate(self.parts)}
        ...
        ...     def load_state_dict(self, state):
        ...         for i, part in enumerate(self.parts):
        ...             part.load_state_dict(state[str(i)])
        >>> check_resume(Loop)

        Without the average in the checkpoint:

        >>> class Forgetful(Loop):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.parts = [self.model, self.optimizer]
        >>> check_resume(Forgetful, stops=[10])
        Traceback (most recent call last):
        ...
        polyak.testing._resume.ResumeError: ...
    """
    if not steps >= 1:
        raise ArgumentError(f"steps must be at least 1, got {steps}.")
    chosen = sorted({0, 1, steps // 2, steps - 1} if stops is None else set(stops))
    if outside := [stop for stop in chosen if not 0 <= stop <= steps]:
        raise ArgumentError(f"stops must be from 0 to {steps} (the steps), got {outside}.")
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        run = _new(make_run, 0)
        reference = [_digests(run.outcome())]
        for _ in range(steps):
            run.train(1)
            reference.append(_digests(run.outcome()))
        for stop in chosen:
            _check_stop(make_run, reference, stop)


def _check_stop(make_run: Callable[[], ResumableRun], reference: list[_Digests], stop: int) -> None:
    run = _new(make_run, 2 * stop + 1)
    for step in range(stop + 1):
        if step:
            run.train(1)
        if (name := _first_difference(reference[step], _digests(run.outcome()))) is not None:
            raise ArgumentError(
                f"make_run must make the same run each time, got another {name} after step {step}, "
                "before any stop. Seed all random numbers inside make_run."
            )
    saved = _saved(run.state_dict())
    run = _new(make_run, 2 * stop + 2)
    run.load_state_dict(saved)
    for step in range(stop, len(reference)):
        if step > stop:
            run.train(1)
        if (name := _first_difference(reference[step], _digests(run.outcome()))) is not None:
            when = "right after loading" if step == stop else f"after step {step}"
            raise ResumeError(
                f"a run stopped after step {stop} must go on as if it never stopped, got another "
                f"{name} {when}. Save and load what it depends on."
            )


def _new(make_run: Callable[[], ResumableRun], seed: int) -> ResumableRun:
    """Make a run as a new process would: with random numbers of its own."""
    torch.manual_seed(seed)
    return make_run()


def _saved(state: object) -> Any:
    """Return what is left of a checkpoint after a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        return torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ResumeError(
            "state_dict() must be readable by torch.load(weights_only=True): dicts, lists, "
            f"strings, numbers and tensors, got {str(error).splitlines()[0]}"
        ) from error


def _first_difference(reference: _Digests, found: _Digests) -> str | None:
    """Name the first leaf that is missing, new or other."""
    for name in [*reference, *found]:
        if reference.get(name) != found.get(name):
            return name
    return None


def _digests(outcome: object, path: str = "") -> _Digests:
    """Return a fingerprint of every leaf by path: the bits of tensors, the repr of the rest."""
    if isinstance(outcome, Tensor):
        return {path: _digest(outcome)}
    if isinstance(outcome, Mapping):
        items: Iterable[tuple[object, object]] = outcome.items()
    elif isinstance(outcome, list | tuple):
        items = enumerate(outcome)
    elif outcome is None or isinstance(outcome, bool | int | float | complex | str | bytes):
        return {path: repr(outcome)}
    else:
        raise ArgumentError(
            "outcome must be made of tensors, numbers, strings, dicts and lists, got "
            f"{type(outcome).__name__} at {path!r}. Turn arrays into tensors: torch.as_tensor."
        )
    found: _Digests = {path + "/": f"{type(outcome).__name__} of {len(outcome)}"}
    for key, value in items:
        found.update(_digests(value, f"{path}/{key}" if path else str(key)))
    return found


def _digest(tensor: Tensor) -> str:
    """Return dtype, shape and a hash of the bits, so that NaN equals itself and -0.0 is not 0.0."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return f"{tensor.dtype}{tuple(tensor.shape)}{hashlib.sha256(data).hexdigest()}"
