"""The decay of ema-pytorch at each of its calls."""

import math
from dataclasses import dataclass

import numpy as np

from .._errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """ema-pytorch's decay at a call, whatever the calls in between were.

    clamp(1 - (1 + e / inv_gamma) ** -power, min_value, beta), e = now - 1 - update_after_step; 0
    while e <= 0 and at the first call; 1 with beta = 1. Rounded to float32, like the tensor
    that the original computes it in.
    """

    beta: float
    update_after_step: int
    inv_gamma: float
    power: float
    min_value: float

    def __post_init__(self) -> None:
        """Refuse what gives no decay."""
        check_share("beta", self.beta)
        check_share("min_value", self.min_value)
        for name in ("inv_gamma", "power"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0.0 <= value < math.inf):
                raise ArgumentError(f"{name} must be finite and at least 0, got {value!r}.")
        after = self.update_after_step
        if not (isinstance(after, int | float) and math.isfinite(after)):
            raise ArgumentError(f"update_after_step must be a finite number, got {after!r}.")

    def __call__(self, *, now: float, elapsed: float) -> float:
        """Return the decay; `elapsed` does not matter."""
        if now <= 1.0 or now - 1 <= self.update_after_step:
            return 0.0
        return 1.0 if self.beta == 1.0 else self.of_call(now)

    def of_call(self, now: float) -> float:
        """Return the decay without the two exceptions."""
        e = now - 1 - self.update_after_step
        if e <= 0.0:
            return 0.0
        depth = math.log1p(e / self.inv_gamma) if self.inv_gamma else math.inf
        value = -math.expm1(-self.power * depth) if self.power else 0.0
        return float(np.float32(min(max(value, self.min_value), self.beta)))


def check_share(name: str, value: object) -> None:
    """Refuse what is no share of a whole."""
    if not (isinstance(value, int | float) and 0.0 <= value <= 1.0):
        raise ArgumentError(f"{name} must be between 0 and 1, got {value!r}.")
