"""History: the updates that really happened, in few numbers, without losing one."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak import ArgumentError
from polyak._history import History

gaps = st.one_of(st.integers(1, 10**9), st.floats(min_value=1e-6, max_value=1e9))
events = st.lists(
    st.tuples(st.sampled_from([1, 1.0, 2, 0.1, 256]) | gaps, st.integers(0, 2)), max_size=50
)


def recorded(updates: list[tuple[float, int]]) -> History:
    history = History()
    for elapsed, index in updates:
        history.append(elapsed, index)
    return history


@given(events)
def test_every_update_is_kept_in_order(updates: list[tuple[float, int]]) -> None:
    """Expanding the runs gives back the list that was appended.

    Intervals of floats may come back as their neighbour of the run, 1e-9 away at most.
    """
    history = recorded(updates)

    assert len(history) == len(updates)
    expanded = [(e, i) for e, count, i in history.runs for _ in range(count)]
    assert [i for _, i in expanded] == [i for _, i in updates]
    intervals = [e for e, _ in expanded], [e for e, _ in updates]
    np.testing.assert_allclose(*intervals, rtol=1.01e-9)
    np.testing.assert_array_equal(history.schedule_indices(), [index for _, index in updates])
    expected = [math.fsum([5.0, *(e for e, _ in updates[: n + 1])]) for n in range(len(updates))]
    np.testing.assert_allclose(history.times(start=5.0), expected, rtol=2e-9)


@given(events)
def test_state_round_trip(updates: list[tuple[float, int]]) -> None:
    """Also in the middle of a run: what is appended after loading extends it."""
    history = recorded(updates)
    loaded = History.from_state(history.state())
    assert loaded == history
    assert all(type(value) in (int, float) for run in history.state() for value in run)

    for either in (history, loaded):
        either.append(1)
        either.append(1)
    assert loaded == history
    assert loaded.runs[-1][1] >= 2


def test_a_regular_run_takes_three_numbers_whatever_its_length() -> None:
    history = History()
    for _ in range(10_000):
        history.append(16)
    assert history.state() == [[16, 10_000, 0]]
    assert history.times()[[0, -1]].tolist() == [16.0, 160_000.0]


def test_a_change_of_interval_or_schedule_begins_a_run() -> None:
    history = recorded([(1, 0), (1, 0), (2, 0), (1, 0), (1, 1)])
    assert history.runs == [(1, 2, 0), (2, 1, 0), (1, 1, 0), (1, 1, 1)]


def test_time_does_not_drift_over_a_million_small_intervals() -> None:
    """Adding up 0.1 a million times is off by 1e-6; the product is not."""
    history = History.from_state([[0.1, 1_000_000, 0], [0.3, 1, 0]])
    assert history.times()[-1] == pytest.approx(100_000.3, rel=1e-15, abs=0)


def test_an_empty_history_has_no_times() -> None:
    assert len(History()) == 0
    assert History().times().shape == (0,)
    assert History().state() == []
    assert repr(recorded([(1, 0), (1, 0), (3, 0)])) == "History(3 updates in 2 runs)"


def test_a_saved_state_does_not_follow_later_updates() -> None:
    history = recorded([(1, 0)])
    state = history.state()
    loaded = History.from_state(state)
    history.append(1)
    assert state == [[1, 1, 0]]
    assert len(loaded) == 1
    assert loaded != history
    assert loaded != state


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (None, "must be a list of runs"),
        ("runs", "must be a list of runs"),
        ({"runs": []}, "must be a list of runs"),
        ([3], "must be elapsed, count and schedule index"),
        (["abc"], "must be elapsed, count and schedule index"),
        ([[1, 2]], "must be elapsed, count and schedule index"),
        ([[0, 1, 0]], "elapsed must be finite and above 0, got 0"),
        ([[-1, 1, 0]], "elapsed must be finite and above 0, got -1"),
        ([[math.nan, 1, 0]], "elapsed must be finite and above 0, got nan"),
        ([[math.inf, 1, 0]], "elapsed must be finite and above 0, got inf"),
        ([["1", 1, 0]], "elapsed must be finite and above 0, got '1'"),
        ([[1, 0, 0]], "count of a run must be a whole number above 0, got 0"),
        ([[1, 1.5, 0]], "count of a run must be a whole number above 0, got 1.5"),
        ([[1, math.inf, 0]], "count of a run must be a whole number above 0, got inf"),
        ([[1, 1, -1]], "schedule_index must be a whole number from 0 on, got -1"),
        ([[1, 1, None]], "schedule_index must be a whole number from 0 on, got None"),
        ([[1, 1, True]], "schedule_index must be a whole number from 0 on, got True"),
    ],
)
def test_a_bad_state_is_refused(state: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        History.from_state(state)


@pytest.mark.parametrize("elapsed", [0, -1, math.nan, math.inf])
def test_time_that_does_not_move_forward_is_refused_and_not_noted(elapsed: float) -> None:
    history = recorded([(1, 0)])
    with pytest.raises(ArgumentError, match="elapsed must be finite and above 0"):
        history.append(elapsed)
    assert history.runs == [(1, 1, 0)]
