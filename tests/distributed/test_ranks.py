"""The harness: answers in order, failures told, nothing left behind, every collective counted."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import work_harness as work

import polyak
from ranks import RankError, outcomes_of, run_on


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_answers_come_back_by_rank(n: int) -> None:
    answers = run_on(n, work.sum_of_ranks)

    assert [answer[:3] for answer in answers] == [(r, n, n * (n - 1) / 2) for r in range(n)]


def test_every_call_has_new_processes_and_leaves_none() -> None:
    first, second = (run_on(2, work.sum_of_ranks) for _ in range(2))

    pids = [answer[3] for answer in first + second]
    assert len(set(pids)) == 4
    assert not [pid for pid in pids if is_alive(pid)]


def test_large_tensors_come_back() -> None:
    """More than a pipe holds, and from memory of a process that has ended."""
    answers = run_on(2, work.tensor_of, 1_000_000)

    assert [answer.unique().tolist() for answer in answers] == [[0.0], [1.0]]


def test_an_error_is_told_with_its_rank_and_traceback() -> None:
    """The rank that raised is named, not the one that it left waiting in a collective."""
    with pytest.raises(RankError, match="rank 1 of 2 raised after") as caught:
        run_on(2, work.fail_on, 1)

    assert isinstance(caught.value.error, polyak.MatchError)
    assert "in fail_on" in str(caught.value)
    assert "'weight' differs on rank 1" in str(caught.value)


def test_an_error_that_cannot_be_pickled_is_told_as_text() -> None:
    with pytest.raises(RankError, match=r"work_harness\.UnwillingError: 1 and 2"):
        run_on(1, work.fail_unwillingly)


def test_a_warning_of_polyak_is_an_error_on_a_rank() -> None:
    with pytest.raises(RankError, match="AveragingWarning: stalled"):
        run_on(1, work.warn)


def test_a_rank_that_dies_is_told() -> None:
    outcomes = outcomes_of(2, work.die_on, 0)

    assert [outcome.end for outcome in outcomes] == ["died", "returned"]
    with pytest.raises(RankError, match="rank 0 of 2 died"):
        run_on(2, work.die_on, 0)


def test_a_rank_that_hangs_is_told_where_and_killed() -> None:
    run_on(1, work.sum_of_ranks)  # so that the limit need not cover the first import
    began = time.monotonic()

    outcomes = outcomes_of(2, work.hang_on, 1, limit=1.0)

    assert time.monotonic() - began < 10.0
    assert [outcome.end for outcome in outcomes] == ["returned", "silent"]
    assert "in hang_on" in outcomes[1].text
    assert not is_alive(outcomes[0].value)
    assert run_on(2, work.sum_of_ranks)  # and the next call is not harmed


@pytest.mark.prove  # another process must import torch twice over
def test_ranks_die_with_the_process_that_started_them(tmp_path: Path) -> None:
    """Killed by SIGKILL, pytest cannot clean up: busy ranks notice by themselves."""
    context = multiprocessing.get_context("spawn")
    parent = context.Process(target=run_on, args=(2, work.hang, str(tmp_path / "pid")))
    parent.start()
    files = [tmp_path / f"pid-{rank}.ready" for rank in range(2)]
    until(lambda: all(file.exists() for file in files))

    parent.kill()
    parent.join()

    until(lambda: not any(is_alive(int(file.read_text())) for file in files))


def test_collectives_are_counted_whoever_calls_them() -> None:
    """Both counts see what c10d, FSDP2 (one all-gather for each group) and DTensor send."""
    first, second = run_on(2, work.counts)

    assert (
        first
        == second
        == {
            "nothing": ({}, 0),
            "all_reduce": ({"allreduce_": 1}, 1),
            "barrier": ({"barrier": 1}, 1),
            "full_tensor": ({"all_gather_into_tensor": 1}, 1),
            "forward": ({"_allgather_base_": 2}, 2),
            "object": ({"allgather_": 2}, 2),  # first the sizes, then the objects
        }
    )


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(holds: Callable[[], bool], patience: float = 30.0) -> None:
    """Wait for what another process does."""
    end = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
