"""What can go wrong, as one tree.

AveragingError
├── ArgumentError   a value from which no average can be made   (also a ValueError)
├── MatchError      tensors that do not belong together         (also a ValueError)
├── OrderError      a call made at the wrong moment             (also a RuntimeError)
└── ResumeError     a run that does not go on bit for bit       (also an AssertionError;
                    raised and defined in `polyak.testing`)

AveragingWarning    said once, where silence would cost a run   (a UserWarning)
"""

import sys
from types import FrameType


class AveragingError(Exception):
    """Base of every error that polyak raises on purpose."""


class ArgumentError(AveragingError, ValueError):
    """A value from which no average can be made."""


class MatchError(AveragingError, ValueError):
    """Tensors that do not belong together: other names, shapes, dtypes or objects."""


class OrderError(AveragingError, RuntimeError):
    """A call made at the wrong moment: time that stands still, an update while applied."""


class AveragingWarning(UserWarning):
    """Said once where silence would cost a run; `Average.report` says it too."""


def show_time(now: float) -> str:
    """A time as people write it: 1200, not 1200.0."""
    return str(int(now)) if float(now).is_integer() else repr(float(now))


def frames_to_the_user() -> int:
    """The stack level, for `warnings.warn` in our caller, of the first frame that is not ours."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _is_ours(frame):
        frame, level = frame.f_back, level + 1
    return level


def _is_ours(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__", ""))
    return module.startswith("polyak.") or module == "contextlib"
