"""How does an average take up what another class has made before it?"""

from collections.abc import Mapping
from dataclasses import asdict

from torch import Tensor

from .._average import Average
from ._memory import memory_after


def take_up(
    average: Average, *, updates: int = 0, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Put an average where `updates` updates, one a unit of time, have brought its like elsewhere.

    Clock, history and memory become those that the schedule gives to these updates, so that the
    next decay is right and the report true.

    Args:
        average: an average of its own, not one of `Averages`.
        updates: how many there were; with 0 the tensors count as the initial weights.
        tensors: the averages by canonical name, in any floating dtype; None: as they are.

    Raises:
        MatchError: other names or shapes. Nothing is changed then.
        ArgumentError: fewer than no updates.
        OrderError: inside `applied()`.
    """
    state = average.state_dict()
    saved = state["averages"]["average"]
    if tensors is not None:
        ours = saved["tensors"]
        saved["tensors"] = {
            name: value.detach().to(ours[name]) if name in ours else value
            for name, value in tensors.items()
        }
        saved["norms"] = {}  # statistics that were recomputed for other weights
    state["clock"] = {
        "origin": 0,
        "now": updates,
        "updates": updates,
        "steps": 0,
        "history": [[1, updates, 0]] if updates else [],
    }
    saved["memory"] = asdict(memory_after(average.schedule, updates))
    saved["past"] = []
    average.load_state_dict(state)
