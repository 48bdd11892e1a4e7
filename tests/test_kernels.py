"""The arithmetic of one update: the same bits on every backend, blocking and memory layout."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from polyak import _kernels as kernels
from polyak._kernels import _blocks
from polyak._kernels._blocks import BlockPlan
from polyak._kernels._foreach import ForeachPlan

REAL = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
COMPLEX = [torch.complex128, torch.complex64]
LIVE = [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn]
PAIRS = [*itertools.product(REAL, LIVE), *itertools.product(COMPLEX, COMPLEX)]
WEIGHTS = [0.0, 1e-4, 0.5, 0.9, 1.0]

pairs = pytest.mark.parametrize(("stored", "live"), PAIRS, ids=lambda d: str(d)[6:])
guards = pytest.mark.parametrize("guard", [True, False], ids=["guarded", "unguarded"])


def random(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(tuple(shape), dtype=wide, generator=generator).to(dtype)


def laid_out(stored: torch.dtype, live: torch.dtype) -> list[tuple[str, Tensor, Tensor]]:
    """(layout, average, live) in every way that weights lie in memory."""

    def pair(*shape: int) -> tuple[Tensor, Tensor]:
        seed = len(shape) + sum(shape)
        return random(shape, stored, seed), random(shape, live, seed + 100)

    square, other = pair(6, 6)
    image, other_image = pair(2, 3, 4, 5)
    wide, other_wide = pair(5, 8)
    _, other_row = pair(1, 9)
    return [
        ("scalar", *pair()),
        ("empty", *pair(0, 3)),
        ("vector", *pair(70)),
        ("transposed both", square.t(), other.t()),
        ("transposed live", square.clone(), other.t()),
        ("transposed average", square.clone().t(), other.clone()),
        (
            "channels last",
            image.contiguous(memory_format=torch.channels_last),
            other_image.contiguous(memory_format=torch.channels_last),
        ),
        ("channels last live", image, other_image.contiguous(memory_format=torch.channels_last)),
        ("every second", wide[:, ::2], other_wide[:, ::2]),
        ("column", wide.clone()[:, 3], other_wide[:, 3]),
        ("expanded live", random((4, 9), stored, 8), other_row.expand(4, 9)),
    ]


def mixed_by_torch(average: Tensor, live: Tensor, weight: float) -> Tensor:
    """One update of contiguous copies: widen, `torch.lerp`, round once."""
    if average.dtype in (torch.float64, torch.complex128):
        wide = average.dtype
    else:
        wide = torch.complex64 if average.is_complex() else torch.float32
    a, x = average.to(wide).contiguous(), live.to(wide).contiguous()
    if weight == 0.0:
        return average.clone()
    if weight == 1.0:
        return x.to(average.dtype)
    if a.is_complex():
        a, x = torch.view_as_real(a), torch.view_as_real(x)
        return torch.view_as_complex(torch.lerp(a, x, weight))
    return torch.lerp(a, x, weight).to(average.dtype)


def comparable(tensor: Tensor) -> Tensor:
    """Float8 cannot be compared; every value of it is one of float32."""
    return tensor.to(torch.float32) if tensor.dtype.itemsize == 1 else tensor


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every element, NaN where the other has NaN."""
    a, b = comparable(a), comparable(b)
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def copied(tensor: Tensor) -> Tensor:
    """A copy with the same strides, in memory of its own."""
    room = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size() + 1)
    twin = room.to(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return twin.copy_(tensor)


def run(
    kind: type[BlockPlan] | type[ForeachPlan],
    averages: Sequence[Sequence[Tensor]],
    live: Sequence[Tensor],
    weights: Sequence[float],
    *,
    guard: bool,
) -> tuple[list[list[Tensor]], dict[int, int]]:
    """Mix copies of the averages [averages][slots]; what they became, and counts by slot."""
    rows = [[copied(tensor) for tensor in row] for row in averages]
    suspects = {
        slot
        for row in rows
        for slot, tensor in enumerate(row)
        if not torch.isfinite(comparable(tensor)).all()
    }
    counts = kind(rows, live, suspects).mix_(weights, guard=guard)
    listed = [] if counts is None else counts.tolist()
    return rows, {slot: count for slot, count in enumerate(listed) if count}


@guards
@pairs
def test_backends_blockings_and_layouts_give_the_same_bits(
    stored: torch.dtype, live: torch.dtype, guard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one `torch.lerp` on contiguous copies in float32 or wider, rounded once."""
    layouts = laid_out(stored, live)
    names = [layout[0] for layout in layouts]
    now = [layout[2] for layout in layouts]
    averages = [[layout[1] for layout in layouts], [copied(layout[1]) for layout in layouts]]

    for weight in WEIGHTS:
        weights = [weight, 0.25]
        expected = [
            [mixed_by_torch(average, x, w) for average, x in zip(row, now, strict=True)]
            for row, w in zip(averages, weights, strict=True)
        ]
        results = [run(ForeachPlan, averages, now, weights, guard=guard)]
        for block in (9, 64, 1 << 20):
            monkeypatch.setattr(_blocks, "BLOCK", block)
            results.append(run(BlockPlan, averages, now, weights, guard=guard))
        for rows, counts in results:
            assert counts == {}
            for row, wanted in zip(rows, expected, strict=True):
                for name, result, value in zip(names, row, wanted, strict=True):
                    assert same_bits(result, value), (name, weight)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_update_is_the_formula_in_float64(stored: torch.dtype) -> None:
    """average + weight (live - average), to the rounding of the dtype that holds it."""
    average, live = random((500,), stored, 1), random((500,), torch.float32, 2)
    ulp = float(torch.finfo(stored).eps)

    for weight in WEIGHTS:
        rows, _ = run(BlockPlan, [[average]], [live], [weight], guard=True)
        exact = average.double() + weight * (live.double() - average.double())
        error = (rows[0][0].double() - exact).abs()
        assert (error <= 2 * ulp * torch.maximum(average.double().abs(), live.abs())).all()


def spoiled(tensor: Tensor) -> Tensor:
    """The same tensor with NaN and both infinities spread over it, where its dtype has them."""
    flat = copied(tensor)
    bad = [value for value in (math.nan, math.inf, -math.inf) if has(flat.dtype, value)]
    places = list(itertools.product(*map(range, flat.shape)))[::3]
    for place, value in zip(places, itertools.cycle(bad), strict=False):
        flat[place] = value
    return flat


def has(dtype: torch.dtype, value: float) -> bool:
    """Float8_e4m3fn has no infinity: casting one gives NaN."""
    if dtype.is_complex:
        return True
    cast = torch.tensor(value).to(dtype).to(torch.float32).item()
    return math.isnan(value) or cast == value


@pairs
def test_elements_that_are_not_finite_are_held_back_everywhere_alike(
    stored: torch.dtype, live: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Detected by block, acted on by element: each keeps its average, all others are mixed."""
    layouts = [layout for layout in laid_out(stored, live) if not layout[0].startswith("expanded")]
    averages = [[layout[1] for layout in layouts]]
    now = [spoiled(layout[2]) for layout in layouts]

    for weight in WEIGHTS:
        expected, counts_by_hand = [], {}
        for slot, (average, x) in enumerate(zip(averages[0], now, strict=True)):
            usable = torch.isfinite(comparable(x)) & torch.isfinite(comparable(x.to(stored)))
            clean = torch.where(usable, comparable(x), 0).to(x.dtype)
            mixed = mixed_by_torch(average, clean, weight)
            kept = torch.where(usable, comparable(mixed), comparable(average))
            expected.append(kept.to(stored))
            if bad := int((~usable).sum()):
                counts_by_hand[slot] = bad
        results = [run(ForeachPlan, averages, now, [weight], guard=True)]
        for block in (9, 1 << 20):
            monkeypatch.setattr(_blocks, "BLOCK", block)
            results.append(run(BlockPlan, averages, now, [weight], guard=True))
        for rows, counts in results:
            assert counts == counts_by_hand
            for (name, *_), result, value in zip(layouts, rows[0], expected, strict=True):
                assert same_bits(result, value), (name, weight)


@pytest.mark.parametrize("kind", [BlockPlan, ForeachPlan])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_huge_finite_values_of_opposite_sign_stay_finite(
    kind: type[BlockPlan] | type[ForeachPlan], stored: torch.dtype
) -> None:
    """Their difference overflows, their mean does not."""
    top = float(torch.finfo(stored).max)
    average = torch.tensor([-top, top, 1.0, -top], dtype=stored)
    live = torch.tensor([top, -top, -1.0, 2.0], dtype=stored)
    ends = list(zip(average.tolist(), live.tolist(), strict=True))

    for weight in (0.125, 0.5, 0.75):
        rows, counts = run(kind, [[average]], [live], [weight], guard=True)
        exact = [(1 - weight) * a + weight * x for a, x in ends]
        assert counts == {}
        torch.testing.assert_close(
            rows[0][0], torch.tensor(exact, dtype=torch.float64).to(stored), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("kind", [BlockPlan, ForeachPlan])
def test_values_beyond_the_storage_are_held_back(
    kind: type[BlockPlan] | type[ForeachPlan],
) -> None:
    """70000 is finite, but not in float16: the average keeps its value, it does not become inf."""
    average = torch.tensor([1.0, 2.0], dtype=torch.float16)
    live = torch.tensor([70_000.0, 4.0])

    rows, counts = run(kind, [[average]], [live], [0.5], guard=True)

    assert rows[0][0].tolist() == [1.0, 3.0]
    assert counts == {0: 1}


@pytest.mark.parametrize("kind", [BlockPlan, ForeachPlan])
def test_a_broken_average_heals_at_the_first_finite_value(
    kind: type[BlockPlan] | type[ForeachPlan],
) -> None:
    """And from then on it is an average like the others."""
    average = torch.tensor([math.nan, math.inf, 1.0])
    live = torch.tensor([3.0, math.nan, 2.0])
    plan = kind([[average]], [live], {0})

    plan.mix_([0.5], guard=True)
    assert average[0] == 3.0
    assert not average[1].isfinite()
    live[1] = 5.0
    plan.mix_([0.5], guard=True)
    assert average.tolist() == [3.0, 5.0, 1.75]
    live.zero_()
    plan.mix_([0.5], guard=True)
    assert average.tolist() == [1.5, 2.5, 0.875]


@pytest.mark.parametrize("kind", [BlockPlan, ForeachPlan])
def test_a_plan_reads_the_live_values_of_each_call(
    kind: type[BlockPlan] | type[ForeachPlan],
) -> None:
    """It holds views, never copies, so that one plan serves a whole run."""
    average, live = torch.zeros(4), torch.ones(4)
    plan = kind([[average]], [live], set())

    plan.mix_([0.5], guard=True)
    live.fill_(2.5)
    plan.mix_([0.5], guard=True)

    assert average.tolist() == [1.5] * 4


def test_the_mean_of_a_window_is_rounded_once() -> None:
    """Summed in float64: a million and a millionth survive each other."""
    terms = [torch.tensor([1e8]), torch.tensor([1.0]), torch.tensor([-1e8]), torch.tensor([2.0])]
    target = torch.zeros(1)

    kernels.mean_(target, terms)

    assert target.item() == 0.75
