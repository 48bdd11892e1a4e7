"""Checks that people run on their own averages and their own loops.

`conformance` asks any averaging class the questions that cost other people their runs;
`check_resume` trains a loop with and without stops and compares the bits.
"""

from ._adapter import Averager as Averager
from ._adapter import Factory as Factory
from ._adapter import PolyakAdapter as PolyakAdapter
from ._case import Answer as Answer
from ._case import Case as Case
from ._cases import CASES as CASES
from ._conformance import Conformance as Conformance
from ._conformance import conformance as conformance
from ._resume import ResumableRun as ResumableRun
from ._resume import ResumeError as ResumeError
from ._resume import check_resume as check_resume

__all__ = [
    "CASES",
    "Answer",
    "Averager",
    "Case",
    "Conformance",
    "Factory",
    "PolyakAdapter",
    "ResumableRun",
    "ResumeError",
    "check_resume",
    "conformance",
]
