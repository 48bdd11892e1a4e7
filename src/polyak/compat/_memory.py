"""What does an average remember of updates that another class has made?"""

import numpy as np
import numpy.typing as npt

from .._engine import Memory
from .._schedules import Schedule

_ASKED = 2_000  # decays; a function of somebody's own may take a while to answer


def memory_after(schedule: Schedule, times: npt.NDArray[np.int64]) -> Memory:
    """Return the memory of an average that was updated at these times, [updates], from 0 on.

    The weights are products of decays, as in `Memory.fold`, all at once. Of many updates the decay
    is asked at steps of less than half a per cent, and taken to be straight between them.
    """
    if not times.size:
        return Memory()
    places = np.unique(np.geomspace(1, times.size, _ASKED).round().astype(np.int64)) - 1
    elapsed = np.diff(times, prepend=0)
    asked = [schedule(now=int(times[i]), elapsed=int(elapsed[i])) for i in places]
    decays = np.interp(np.arange(times.size), places, asked)
    survive = np.cumprod(decays[::-1])[::-1]  # of what was there before each update
    weights = (1.0 - decays) * np.append(survive[1:], 1.0)
    initial, now = float(survive[0]), int(times[-1])
    age = float(weights @ (now - times)) + initial * now
    return Memory(initial, age, float(weights @ weights), 1.0 - float(decays[-1]))
