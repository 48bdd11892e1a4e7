"""Averages of models that are spread over ranks are those of the model on one, bit for bit."""

from typing import Any

import pytest
import torch
import work_sharded as work
from spread import LAYOUTS, value
from torch import Tensor

from ranks import run_on

SPREAD = ["fsdp-2", "fsdp-3", "fsdp-4", "grouped-2", "hsdp-2x2", "tp-2", "tp-2 x fsdp-2"]
EVERY_LAYOUT = pytest.mark.parametrize("layout", SPREAD)
WITH_FSDP = ["fsdp-2", "fsdp-4", "grouped-2", "hsdp-2x2", "tp-2 x fsdp-2"]


def test_layouts_have_uneven_and_empty_parts() -> None:
    """5 rows are 2 + 2 + 1 on three ranks and 2 + 2 + 1 + 0 on four; 1 row is on the first only."""
    for n, rows in ((2, [3, 2]), (3, [2, 2, 1]), (4, [2, 2, 1, 0])):
        shapes = run_on(n, work.values_are_spread_as_meant, f"fsdp-{n}")
        assert [five[0] for five, _ in shapes] == rows
        assert [one for _, one in shapes] == [(1,)] + [(0,)] * (n - 1)


@pytest.fixture(scope="module")
def unsharded() -> dict[str, dict[str, Tensor]]:
    """Averages on one rank after 100 steps: finite, and moved."""
    averages = work.unsharded(100)
    for kind, tensors in averages.items():
        for name, tensor in tensors.items():
            start = value(name.split("/")[1], 0, tensor)
            assert tensor.isfinite().all(), (kind, name)
            assert not torch.equal(tensor, start), (kind, name)
    return averages


@pytest.mark.parametrize("layout", [name for name in SPREAD if name != "grouped-2"])
def test_h3_sharded_average_is_the_unsharded_one_and_updates_are_silent(
    layout: str, unsharded: dict[str, dict[str, Tensor]]
) -> None:
    """H2, H3: 100 steps in every mode of rounding; no update sends anything."""
    expected = {kind: unsharded[kind] for kind in work.ROUNDINGS}
    issued = run_on(LAYOUTS[layout].n, work.follows, layout, 100, expected)

    assert issued == [0] * LAYOUTS[layout].n


def test_h3_several_averages_and_a_window_are_the_unsharded_ones(
    unsharded: dict[str, dict[str, Tensor]],
) -> None:
    expected = {kind: unsharded[kind] for kind in work.KINDS if kind not in work.ROUNDINGS}

    assert run_on(3, work.follows, "fsdp-3", 100, expected) == [0] * 3


@EVERY_LAYOUT
def test_h2_average_lies_where_the_parameter_lies(layout: str) -> None:
    """H2: the parameter's own mesh, placements and strides, and memory for the local part only."""
    run_on(LAYOUTS[layout].n, work.is_spread_like_the_model, layout)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_h1_every_rank_knows_the_size_of_the_whole(n: int) -> None:
    """H1: uneven and empty shards: 5 rows are 5 on every rank, not 6 here and 4 there."""
    sizes = [1, 2, 5]

    for rows, answers in zip(
        sizes, zip(*run_on(n, work.rebuilt_whole, sizes), strict=True), strict=True
    ):
        values = [[3.0 * row + column for column in range(3)] for row in range(rows)]
        for *shapes, _, average, state in answers:
            assert shapes == [(rows, 3)] * 3
            assert average == state == values
        assert sum(answer[3] for answer in answers) == rows


@pytest.mark.parametrize(
    "story",
    [
        "no error",
        "train at once",
        "forward without backward",
        "error at once",
        "error after an evaluation",
        "error in a forward pass",
        "error in a training pass",
    ],
)
def test_evaluation_and_training_are_those_of_the_unsharded_model(story: str) -> None:
    """FSDP2 gathers anew on entry and on exit, whatever was gathered and whatever happened."""
    run_on(2, work.stages, "fsdp-2", story, {})


@pytest.mark.parametrize("story", ["forward without backward", "error in a training pass"])
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        *((layout, {}) for layout in [*WITH_FSDP[1:], "tp-2"]),
        ("fsdp-2", {"reshard_after_forward": False}),
        ("hsdp-2x2", {"reshard_after_forward": False}),
        ("fsdp-4", {"reshard_after_forward": 2}),
    ],
    ids=str,
)
def test_stages_are_right_on_every_mesh(layout: str, options: dict[str, Any], story: str) -> None:
    run_on(LAYOUTS[layout].n, work.stages, layout, story, options)


@EVERY_LAYOUT
def test_trained_shards_come_back_bit_for_bit(layout: str) -> None:
    """Also NaN and -0.0, and when the block raises; `tensors` shows the average all the while.

    A float32 average of bfloat16 weights cannot be exchanged with them: it is copied.
    """
    run_on(LAYOUTS[layout].n, work.shards_come_back_bit_for_bit, layout)


@EVERY_LAYOUT
def test_copy_to_writes_shards_and_gathered_weights_follow(layout: str) -> None:
    """Wholly and by a share; to a second spread model, the live one, and one that is whole."""
    run_on(LAYOUTS[layout].n, work.copies, layout)


@EVERY_LAYOUT
def test_weights_load_strictly_into_the_same_sharded_model(layout: str) -> None:
    run_on(LAYOUTS[layout].n, work.weights_load_strictly, layout)


@pytest.mark.parametrize("layout", WITH_FSDP)
def test_update_reads_shards_while_the_module_shows_gathered_weights(layout: str) -> None:
    """Also of an average that was built while the module showed them."""
    run_on(LAYOUTS[layout].n, work.update_reads_shards, layout)


def test_update_reads_shards_when_backward_leaves_the_module_gathered() -> None:
    run_on(2, work.update_reads_shards_after_backward)


def test_mixed_precision_computes_with_the_average_in_its_own_dtype() -> None:
    """FSDP2 gathers float32 shards as bfloat16: inside the block, the averaged ones."""
    run_on(2, work.mixed_precision)


def test_weights_gathered_by_hand_are_gathered_anew() -> None:
    """`unshard()` before the block or inside, also when it is still under way at the end."""
    run_on(2, work.gathered_by_hand)


def test_gradients_of_a_pass_begun_before_the_block_are_those_of_the_trained_weights() -> None:
    run_on(2, work.graph_across_the_block)


def test_layer_of_a_group_that_the_whole_model_gathers() -> None:
    run_on(2, work.layer_of_a_group)


def test_average_of_named_shards_cannot_be_lent() -> None:
    run_on(2, work.named_shards_cannot_be_lent)


def test_lending_in_the_middle_of_a_forward_pass_is_refused() -> None:
    run_on(2, work.lending_in_a_forward_pass_is_refused)


@pytest.mark.parametrize("wrapping", ["checkpoint", "compile", "compiled layer"])
def test_d2_wrappers_around_a_sharded_model_change_no_name(wrapping: str) -> None:
    """D1, D2: activation checkpointing and compilation, inside FSDP2 and around it."""
    run_on(2, work.wrapped_names, wrapping)


@pytest.mark.parametrize("n", [2, 3])
def test_d9_tie_of_a_sharded_model_is_one_average(n: int) -> None:
    run_on(n, work.ties)


@pytest.mark.parametrize("layout", ["fsdp-3", "hsdp-2x2", "tp-2"])
def test_uses_of_shards_that_the_model_has_likewise_are_silent(layout: str) -> None:
    n = LAYOUTS[layout].n

    assert run_on(n, work.silent_uses, layout) == [[0] * 5] * n


def test_named_tensors_that_are_gathered_for_a_while_are_refused() -> None:
    for message in run_on(2, work.named_while_gathered):
        assert "Pass the model" in message


def test_classes_with_a_second_module_name_a_way_out_that_there_is() -> None:
    for messages in run_on(2, work.second_modules):
        for name, message in messages.items():
            assert "polyak.Average(model)" in message, name
            assert "factory" not in message, name


def test_part_keeps_its_device_and_dtype() -> None:
    run_on(2, work.piece_stays_where_it_is)


def test_offloaded_shards_are_not_written_while_a_device_may_read_them() -> None:
    assert run_on(2, work.waits_for_offloaded_shards, True) == [[2]] * 2
    assert run_on(2, work.waits_for_offloaded_shards, False) == [[0]] * 2
