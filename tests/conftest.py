"""What holds for every test: one thread, one seed, and nothing left lent behind a test."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

from polyak import _engine

# The same examples everywhere, and no test fails because a machine is busy.
settings.register_profile("polyak", deadline=None, derandomize=True)
settings.load_profile("polyak")
torch.set_num_threads(1)  # tests run side by side, and sums must not depend on the machine


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give all tests on ranks to one worker: each has processes of its own to run them on.

    By their folder: what `--dist loadgroup` goes by, a suffix that pytest-xdist 3.8 adds to the
    ids of tests, does not get through in pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class RanksTogether(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "ranks" if nodeid.startswith("tests/distributed/") else nodeid

    return RanksTogether(config, log)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_stays_lent() -> Iterator[None]:
    """Fail a test that leaves live weights lent: no later test could use that memory."""
    yield
    lent = set(_engine._lent_memory)
    _engine._lent_memory.clear()
    assert not lent
