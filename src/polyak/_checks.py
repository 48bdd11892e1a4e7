"""What users hand in, made plain or refused in a sentence that says what to write instead.

And the two facts about dtypes that the checks go by.
"""

import inspect
import math
import numbers
import reprlib

import torch
from torch import Tensor

from ._errors import ArgumentError
from ._schedules import Schedule

_LATEST = 10**300  # whole numbers know no end, the floats that schedules compute with do


def check_time(now: object, name: str = "now") -> float:
    """`now` as a plain finite number, whole ones kept whole."""
    if type(now) is int and -_LATEST <= now <= _LATEST:
        return now
    try:
        is_number = isinstance(now, numbers.Real) and not isinstance(now, bool)
        value = float(now) if is_number else math.nan  # type: ignore[arg-type]
    except OverflowError:
        value = math.inf
    if not abs(value) <= _LATEST:
        limit = " Times go up to 1e300." if abs(value) > _LATEST else ""
        raise ArgumentError(f"{name} must be a finite number, got {reprlib.repr(now)}.{limit}")
    return int(now) if isinstance(now, numbers.Integral) else value


def check_decay(decay: object, schedule: Schedule) -> float:
    """The share of the old average that survives, in [0, 1]."""
    if type(decay) is float and 0.0 <= decay <= 1.0:
        return decay
    value = float(decay) if isinstance(decay, numbers.Real) else math.nan
    if not 0.0 <= value <= 1.0:
        raise ArgumentError(f"decay must be in [0, 1], got {decay!r} from {schedule!r}.")
    return value


def check_schedule(schedule: object) -> None:
    """Refuse what cannot be called as `schedule(now=…, elapsed=…)`."""
    if isinstance(schedule, type) or not callable(schedule):
        raise ArgumentError(
            "schedule must be a schedule such as polyak.Exponential(half_life=1_000), or a "
            f"function of the keywords now and elapsed, got {schedule!r}."
        )
    try:
        inspect.signature(schedule).bind(now=1, elapsed=1)
    except TypeError as error:
        raise ArgumentError(
            f"schedule must take the keywords now and elapsed, got {schedule!r} ({error}). "
            "Write it as: lambda *, now, elapsed: 0.999**elapsed"
        ) from None
    except ValueError:
        pass  # a builtin that does not say what it takes


def check_dtype(dtype: object) -> None:
    """Refuse what is not a real floating point dtype."""
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ArgumentError(f"dtype must be a floating point torch.dtype, got {dtype!r}.")


def check_device(device: torch.device | str) -> torch.device:
    """The device of that name."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ArgumentError(
            f"device must be a torch device such as 'cpu' or 'cuda', got {device!r}."
        ) from None


def is_count(value: object) -> bool:
    """Whether `value` is a whole number of things, at least one; True is not a number."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def kind(tensor: Tensor) -> str:
    """What its values are: casts within a kind keep their meaning."""
    if tensor.is_complex():
        return "complex"
    if tensor.is_floating_point():
        return "floating point"
    return "boolean" if tensor.dtype == torch.bool else "integer"


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: 2**-8 for bfloat16, 2**-24 for float32."""
    return float(torch.finfo(dtype).eps) / 2.0
