"""An average without its lag: moved on by what the run has moved since its start."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ._average import Uses, check_is_average
from ._checks import kind
from ._engine import check_fits
from ._errors import ArgumentError, MatchError
from ._sharding import piece_for, plain


@torch.no_grad()
def bias_corrected(
    average: Uses,
    start: Mapping[str, Tensor],
    *,
    power: float = 0.2,
    offset: float = 10.0,
    unit: float = 1,
) -> dict[str, Tensor]:
    """Return the full set with the bias-corrected average of Block & Zhang 2025 (BEMA).

    average + alpha (live - start),  alpha = (offset + now / unit) ** -power

    An average trails behind weights that still move one way; this adds a share, falling with time,
    of all the way they have come (after the estimate of the mean of an Ornstein-Uhlenbeck process,
    https://arxiv.org/abs/2508.00180). It helps short fine-tuning. In a long run the share falls too
    slowly: on a noisy quadratic it was better than the average at step 50 and 12 times worse at
    step 5,000 (with a larger `power` it fades sooner). Compare before you ship it.

    Time counts from the start of the average, so after a burn-in `reset()` it and take `start`
    anew. `power=0` does not switch the correction off: it adds the whole way.

    Args:
        average: any average, whose live weights are the newest of the run.
        start: the live weights where the average started: `average.weights()` right after it was
            built or reset.
        power: how fast the share falls, above 0.
        offset: keeps the share small at first, above 0.
        unit: the time of one step, when the clock counts samples or tokens.

    Returns:
        Fresh copies, ready for `load_state_dict(strict=True)`; dtypes are those of the live model.

    Raises:
        ArgumentError: a value out of range, or one that the live dtype cannot hold.
        MatchError: a start of another model.

    Examples:
        >>> import polyak
        >>> live = {"w": torch.zeros(1)}
        >>> average = polyak.Average(live, polyak.Uniform())
        >>> start = average.weights()
        >>> for step in range(1, 7):
        ...     _ = live["w"].fill_(step)
        ...     _ = average.update()
        >>> average.weights()["w"].item()  # the mean lags behind the 6 of now
        3.5
        >>> round(bias_corrected(average, start, power=0.5)["w"].item(), 6)  # + 6 / sqrt(10 + 6)
        5.0
    """
    check_is_average(average)
    for name, value in (("power", power), ("offset", offset), ("unit", unit)):
        if not (isinstance(value, int | float) and 0.0 < value < math.inf):
            raise ArgumentError(
                f"{name} must be finite and above 0, got {value!r}."
                + (" For the plain average call weights()." if name == "power" else "")
            )
    result = average.weights()
    engine = average._engine
    missing = sorted(set(engine.slots) - set(start))
    if missing:
        raise MatchError(
            f"start must hold every averaged tensor, got none for {missing[:3]}. "
            "Take average.weights() right after the average was built or reset."
        )
    share = math.pow(offset + (average.now - engine.origin) / unit, -power)
    averages = engine.values(average._row)
    for entry, tensor in zip(engine.entries, averages, strict=True):
        if entry.kind == "buffer":
            continue  # a running variance that is moved on may fall below zero
        # While the average is lent, the trained values wait elsewhere.
        live = entry.live() if engine.loan is None else engine.loan.live[entry.name]
        before = start[entry.name]
        _check_like(before, live, entry.name)
        here, wide = piece_for(tensor, live), torch.promote_types(tensor.dtype, torch.float32)
        live_now, then = (t.to(here.device, wide) for t in (plain(live), piece_for(before, live)))
        moved = here.to(wide) + share * (live_now - then)
        if not bool((moved.isfinite() | ~here.isfinite()).all()):
            raise ArgumentError(
                f"start and live weights must be finite, got NaN or inf in {entry.name!r}. "
                "Use average.weights(), which keeps them out."
            )
        check_fits(moved, result[entry.name].dtype, entry.name)
        plain(result[entry.name]).copy_(moved)
    return result


def _check_like(before: object, live: Tensor, name: str) -> None:
    if not isinstance(before, Tensor) or before.shape != live.shape or kind(before) != kind(live):
        found = (
            f"{list(before.shape)} {before.dtype}"
            if isinstance(before, Tensor)
            else type(before).__name__
        )
        raise MatchError(
            f"start must be of this model, got {name!r} as {found} for {list(live.shape)} "
            f"{live.dtype}. Take average.weights() where the average starts."
        )
