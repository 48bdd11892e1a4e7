"""Plain DDP: replicas stay one, an average of them can be shared out, and what differs is named."""

from pathlib import Path

import pytest
import work_replicas as work
from safetensors.torch import load_file
from spread import same

from ranks import run_on


@pytest.mark.parametrize("kind", work.KINDS)
def test_shared_out_average_is_the_whole_one_in_a_quarter_of_the_memory(kind: str) -> None:
    """On 4 ranks each holds at most 26 % of the bytes, and evaluates with all of them."""
    for held, whole in run_on(4, work.shared_out, kind, 20):
        assert whole > 80_000 * 2
        assert held <= 0.26 * whole


@pytest.mark.parametrize("n", [1, 2, 3])
def test_shared_out_average_works_on_any_number_of_ranks(n: int) -> None:
    for held, whole in run_on(n, work.shared_out, "nearest", 5):
        assert held <= (1 / n + 0.01) * whole


def test_error_on_one_rank_only_gives_every_rank_its_weights_back() -> None:
    first, *others = run_on(3, work.error_on_one_rank)

    assert others == [first] * 2


def test_h6_replicas_under_ddp_have_one_average(tmp_path: Path) -> None:
    run_on(2, work.trained_by_ddp, tmp_path)

    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    same(first, second, "files")


@pytest.mark.parametrize("what", work.BREAKS)
@pytest.mark.parametrize("rank", [0, 2])
def test_h6_replica_that_went_its_own_way_is_named_on_every_rank(what: str, rank: int) -> None:
    """H6: which tensor, and which ranks are not as the first; not the tensors that agree."""
    first, *others = run_on(3, work.check_names_the_culprit, what, rank)

    assert others == [first] * 2
    assert "up.weight" in first
    assert ("[1, 2]" if rank == 0 else "[2]") in first
    if what == "average":
        assert "down.weight" not in first


def test_check_of_equal_replicas_is_quiet() -> None:
    run_on(3, work.check_is_quiet_about_what_is_equal)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_buffers_that_differ_by_rank_are_pooled(n: int) -> None:
    """Means 1 … n and variances 1, 2, 4 … of equal counts: those of all samples together.

    By the law of total variance: the mean of the variances, and the variance of 1 … n.
    """
    mean = (n + 1) / 2
    variance = (2**n - 1) / n + (n**2 - 1) / 12

    for answer in run_on(n, work.buffers_differ):
        assert answer["norm.running_mean"] == pytest.approx([mean] * 129, rel=1e-6)
        assert answer["norm.running_var"] == pytest.approx([variance] * 129, rel=1e-6)


def test_h5_placeholders_of_zero3_are_refused_with_the_way_out() -> None:
    [message] = run_on(1, work.placeholders_are_refused)

    assert "0.weight" in message
    assert "ZeRO-3" in message


def test_h5_parameters_that_are_gathered_no_longer_are_refused() -> None:
    [message] = run_on(1, work.gathered_copies_do_not_last)

    assert "weight" in message


def test_fsdp1_is_refused_with_the_way_out() -> None:
    """Also when the module inside the wrapper is passed: its parameters are flat pieces."""
    for messages in run_on(2, work.fsdp1):
        assert all("fully_shard" in message for message in messages)


@pytest.mark.parametrize("value", [2, "world"])
def test_shard_must_be_a_group(value: object) -> None:
    run_on(1, work.no_group, value)


def test_average_is_shared_out_over_the_ranks_of_its_group_only() -> None:
    answers = run_on(4, work.part_of_the_ranks)

    assert all(part <= 0.51 * whole for part, whole in answers)


@pytest.mark.parametrize("n", [1, 3])
def test_buffers_of_a_window_are_pooled_in_every_capture(n: int) -> None:
    """Means 10, 20, 30 + rank, pooled after each update: a later mean is of pooled captures."""
    middle = (n - 1) / 2
    expected = [10 + middle, 15 + middle, 25 + middle]

    assert run_on(n, work.buffers_of_a_window) == [[[level] * 2 for level in expected]] * n


def test_check_looks_at_each_capture_of_a_window() -> None:
    first, second = run_on(2, work.captures_are_compared)

    assert first == second
    assert "(average 1)" in first
    assert "(average)" not in first


def test_refreshed_statistics_and_averaged_buffers_are_both_pooled() -> None:
    """Ranks 0 and 1 saw the constants 0 and 1, and had averaged 0 and 10."""
    for answer in run_on(2, work.statistics_and_buffers):
        assert answer == {"averaged": 5.0, "refreshed": 0.5}


def test_rank_outside_of_the_group_is_refused_and_changes_nothing() -> None:
    inside, other, outside = run_on(3, work.outside_of_the_group)

    assert inside == other == []
    assert len(outside) == 2


def test_ranks_of_a_group_are_named_as_all_ranks_are_counted() -> None:
    answers = run_on(4, work.drift_in_a_group)

    assert answers[2] == answers[3]
    assert "on ranks [3]" in answers[2]


def test_average_that_one_rank_has_lost_is_reported_on_all() -> None:
    answers = run_on(3, work.damaged_on_one_rank)

    assert answers[0] == answers[2]
    assert "on rank 1" in answers[0]


def test_error_on_entry_of_one_rank_is_raised_on_all() -> None:
    """One says what it is, the others that there is one; nobody is left waiting."""
    *others, last = run_on(3, work.overflow_on_one_rank, limit=30.0)

    assert last == ["ArgumentError"] * 3
    assert others == [["OrderError"] * 3] * 2


def test_bias_correction_of_a_shared_out_average() -> None:
    run_on(3, work.corrected)


def test_device_of_a_shared_out_average_is_that_of_the_model() -> None:
    run_on(2, work.device_is_refused)


def test_what_is_gathered_travels_in_the_dtype_it_is_wanted_in(tmp_path: Path) -> None:
    """Half of the bytes for a bfloat16 model; a cast and a gather may change places."""
    assert run_on(2, work.gathered_in_live_dtype, tmp_path) == [{"torch.bfloat16"}] * 2
