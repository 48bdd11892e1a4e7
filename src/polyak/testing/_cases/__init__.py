"""The questions, in the order of their letters."""

from . import buffers, construction, incidents, names, numbers, resume, swap

CASES = (
    *numbers.CASES,
    *buffers.CASES,
    *construction.CASES,
    *names.CASES,
    *swap.CASES,
    *resume.CASES,
    *incidents.CASES,
)
"""Every case that `conformance` asks by default."""
