"""What does an average remember of updates that another class has made?"""

import numpy as np

from .._engine import Memory
from .._errors import ArgumentError
from .._schedules import Schedule

_ASKED = 2_000  # decays; a function of somebody's own may take a while to answer
_EXACT = 2**16  # first updates that are folded one by one, and groups that the others make


def memory_after(schedule: Schedule, updates: int, *, every: int = 1) -> Memory:
    """Return the memory of an average that was updated at the times 1, 1 + every, ...

    The weights are products of decays, as in `Memory.fold`, all at once. Of many updates the decay
    is asked at steps of less than half a per cent, and taken to be straight between them. Late ones
    are taken in groups of equal decay d, since a file may speak of any number of them: k of weights
    (1 - d) d**j, j = 0 ... k - 1, have sum 1 - d**k, sum of squares (1 - d) (1 - d**2k) / (1 + d)
    and, with j for their age, d (1 - d**k) / (1 - d) - k d**k.

    Raises:
        ArgumentError: fewer than no updates.
    """
    if not updates >= 0:
        raise ArgumentError(f"updates must be at least 0, got {updates!r}.")
    if not updates:
        return Memory()
    places = np.unique(np.geomspace(1, updates, _ASKED).round()) - 1.0
    asked = [schedule(now=1 + every * int(i), elapsed=every if i else 1) for i in places]
    ends = np.arange(1.0, min(updates, _EXACT) + 1.0)
    if updates > _EXACT:
        ends = np.append(ends, np.unique(np.geomspace(_EXACT, updates, _EXACT).round())[1:])
    size = np.diff(ends, prepend=0.0)
    decay = np.interp(ends - (size + 1.0) / 2.0, places, asked)  # in the middle of each group
    survive = decay**size  # of what was there before each group
    after = np.append(np.cumprod(survive[::-1])[::-1][1:], 1.0)  # of a group, at the end
    taken = 1.0 - survive
    inside = np.where(decay < 1.0, decay * taken / np.where(decay < 1.0, 1.0 - decay, 1.0), size)
    ages = every * (inside - size * survive + taken * (ends[-1] - ends))
    squares = (1.0 - decay) * (1.0 - survive**2) / (1.0 + decay)
    initial = float(after[0] * survive[0])
    age = float(after @ ages) + initial * (1 + every * (updates - 1))
    return Memory(initial, age, float(after**2 @ squares), 1.0 - float(decay[-1]))
