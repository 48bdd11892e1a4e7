"""Plain DDP: replicas stay one, an average of them can be shared out, and what differs is named."""

from pathlib import Path

import pytest
import work_replicas as work
from safetensors.torch import load_file
from spread import same

from ranks import run_on

pytestmark = pytest.mark.xdist_group("ranks")


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
