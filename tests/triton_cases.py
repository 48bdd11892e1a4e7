"""What the Triton kernel promises, on CPU tensors in Triton's interpreter or on a GPU.

`test_triton.py` runs this file in processes of its own, for Triton decides at import which of the
two it is: with TRITON_INTERPRET=1 the interpreter, else the first CUDA device.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import polyak
from polyak import _kernels as kernels
from polyak._kernels._blocks import BlockPlan
from polyak._kernels._foreach import ForeachPlan
from polyak._kernels._rounding import element_indices
from polyak._sharding import Part

_triton: Any = pytest.importorskip("polyak._kernels._triton", reason="Triton is not installed")
TritonPlan: Callable[..., Any] = _triton.TritonPlan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
BLOCK = 256 if INTERPRETED else _triton.BLOCK  # the interpreter is slow for each block

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = list(itertools.product(DTYPES, DTYPES))
WEIGHTS = [0.0, 1e-4, 0.5, 0.9, 1.0]

pairs = pytest.mark.parametrize(("stored", "live"), PAIRS, ids=lambda d: str(d)[6:])
guards = pytest.mark.parametrize("guard", [True, False], ids=["guarded", "unguarded"])
rounding = pytest.mark.parametrize("keyed", [False, True], ids=["nearest", "stochastic"])

a, b, w = torch.full((64,), 1.0 / 3.0), torch.full((64,), 0.7), 0.1
_product = (b - a).double() * float(np.float32(w))
# Whether torch's own lerp on CPU rounds once, as the kernel does: with vector instructions of the
# last ten years. Else the two may differ by one unit in the last place.
FUSED = torch.equal(torch.lerp(a, b, w), (a.double() + _product).float())


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "BLOCK", BLOCK)


@pytest.fixture(autouse=True)
def _as_on_the_chip(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the interpreter cast to bfloat16, fuse and bear infinities as hardware does.

    It cuts bits off where the chip rounds to nearest, rounds a product before adding to it, and
    warns of overflows.
    """
    if not INTERPRETED:
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    tl = pytest.importorskip("triton.language")
    convert, builder = interpreter._convert_float, interpreter.InterpreterBuilder

    def cast(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            narrow = torch.from_numpy(np.array(data, ndmin=1)).bfloat16().view(torch.int16)
            return narrow.numpy().view(np.uint16).reshape(data.shape)
        if (source, target) == (tl.bfloat16, tl.float32):
            return (data.astype(np.uint32) << 16).view(np.float32)
        return convert(data, source, target, mode)

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        wide = np.float64(x.data) * np.float64(y.data) + np.float64(z.data)
        return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(interpreter, "_convert_float", cast)
    monkeypatch.setattr(builder, "create_fma", fma)
    with np.errstate(all="ignore"):
        yield


def random(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), dtype=torch.float64, generator=generator).to(dtype)


def laid_out(stored: torch.dtype, live: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(average, live) of all sizes around a block, and in every way that weights lie in memory."""

    def pair(*shape: int) -> tuple[Tensor, Tensor]:
        seed = len(shape) + sum(shape)
        return random(shape, stored, seed), random(shape, live, seed + 100)

    image, other_image = pair(2, 3, 4, 5)
    square, other = pair(9, 9)
    wide, other_wide = pair(5, 8)
    odd, other_odd = pair(BLOCK + 6)
    return [
        pair(),
        pair(0, 3),
        pair(BLOCK - 1),
        pair(BLOCK),
        pair(2 * BLOCK + 1),
        (odd[1:], other_odd[1:]),  # not at a multiple of 16 bytes
        (square.t(), other.t()),
        (square.clone(), other.t()),
        (
            image.contiguous(memory_format=torch.channels_last),
            other_image.contiguous(memory_format=torch.channels_last),
        ),
        (wide[:, ::2], other_wide[:, ::2]),
        (random((4, 9), stored, 8), random((1, 9), live, 9).expand(4, 9)),
        (random((30,), torch.float64, 10), random((30,), live, 11)),
        (random((30,), torch.complex64, 12), random((30,), torch.complex64, 13)),
    ]


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy with the same strides and offset, in memory of its own."""
    if any(stride == 0 for stride in tensor.stride()):
        return tensor.to(device)
    room = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size() + 1)
    room = room.to(device, tensor.dtype)
    twin = room.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return twin.copy_(tensor)


def run(
    kind: Callable[..., kernels.MixPlan],
    averages: Sequence[Sequence[Tensor]],
    live: Sequence[Tensor],
    weights: Sequence[float],
    *,
    parts: Sequence[Part | None] | None = None,
    **options: Any,
) -> tuple[list[list[Tensor]], dict[int, int]]:
    """Mix copies of the averages [averages][slots]; what they became, and counts by slot."""
    device = torch.device("cpu") if kind is BlockPlan else DEVICE
    rows = [[copied(tensor, device) for tensor in row] for row in averages]
    now = [copied(tensor, device) for tensor in live]
    suspects = {slot for row in rows for slot, t in enumerate(row) if not torch.isfinite(t).all()}
    if options.get("skip") is not None:
        options["skip"] = options["skip"].to(device)
    counts = kind(rows, now, suspects, parts).mix_(weights, **options)
    listed = [] if counts is None else counts.tolist()
    return [[t.cpu() for t in row] for row in rows], {s: n for s, n in enumerate(listed) if n}


def agree(result: Tensor, expected: Tensor) -> bool:
    """Equal in every bit but those of NaN; one unit apart where torch does not fuse."""
    if result.numel() == 0 or FUSED:
        return torch.allclose(result, expected, rtol=0, atol=0, equal_nan=True)
    unit = torch.finfo(expected.dtype).eps
    return torch.allclose(result, expected, rtol=unit, atol=1e-38, equal_nan=True)


def assert_like_plain(
    averages: Sequence[Sequence[Tensor]],
    live: Sequence[Tensor],
    weights: Sequence[float],
    **options: Any,
) -> list[list[Tensor]]:
    """The averages as the kernel leaves them, once both plain plans have left them so, too."""
    rows, counts = run(TritonPlan, averages, live, weights, **options)
    for kind in (BlockPlan, ForeachPlan):
        expected, counted = run(kind, averages, live, weights, **options)
        assert counts == counted
        for k, (row, wanted) in enumerate(zip(rows, expected, strict=True)):
            for slot, (result, value) in enumerate(zip(row, wanted, strict=True)):
                assert agree(result, value), (kind.__name__, k, slot, weights)
    return rows


def keys_for(slots: Sequence[object]) -> list[int]:
    """32 bits with a sign for each slot."""
    return [kernels.stream_key(3, f"layer {slot}", 7) for slot in range(len(slots))]


@guards
@rounding
@pairs
def test_an_update_has_the_bits_of_the_plain_kernels(
    stored: torch.dtype, live: torch.dtype, keyed: bool, guard: bool
) -> None:
    """Any pair of dtypes in any layout, several averages from one read, fallbacks beside them."""
    layouts = laid_out(stored, live)
    now = [x for _, x in layouts]
    averages = [[average * (1.0 + k) for average, _ in layouts] for k in range(len(WEIGHTS))]
    averages[2] = [average for average, _ in layouts]
    keys = keys_for(layouts) if keyed else None

    rows = assert_like_plain(averages, now, WEIGHTS, guard=guard, keys=keys)

    for row, before, weight in zip(rows, averages, WEIGHTS, strict=True):
        whole = [(x, y) for x, y in zip(row, before, strict=True) if x.numel()]
        if weight == 0.0:
            assert all(torch.equal(x, y) for x, y in whole)
        if weight >= 0.5:
            assert not any(torch.equal(x, y) for x, y in whole)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_each_average_has_its_own_weight(count: int) -> None:
    """All of them from one read of the live weights."""
    live = [random((BLOCK + 9,), torch.bfloat16, 1)]
    averages = [[random((BLOCK + 9,), torch.float32, 2 + k)] for k in range(count)]

    assert_like_plain(averages, live, [0.9 ** (k + 1) for k in range(count)], guard=True)


def test_averages_of_one_tensor_may_differ_in_dtype() -> None:
    """One kernel stores one dtype, so these go through torch."""
    averages = [[random((20,), dtype, 1)] for dtype in DTYPES]

    assert_like_plain(averages, [random((20,), torch.float32, 2)], [0.5, 0.3, 0.9], guard=True)


@pytest.mark.parametrize("stored", DTYPES)
def test_an_update_is_the_formula_in_float64(stored: torch.dtype) -> None:
    """average + weight (live - average), to the rounding of the dtype that holds it."""
    average, live = random((500,), stored, 1), random((500,), torch.float32, 2)
    ulp = float(torch.finfo(stored).eps)

    rows, _ = run(TritonPlan, [[average]] * len(WEIGHTS), [live], WEIGHTS, guard=True)

    for [result], weight in zip(rows, WEIGHTS, strict=True):
        exact = average.double() + weight * (live.double() - average.double())
        error = (result.double() - exact).abs()
        assert (error <= 2 * ulp * torch.maximum(average.double().abs(), live.abs())).all()


def spoiled(tensor: Tensor, values: Sequence[float], step: int) -> Tensor:
    """A copy with these values in every `step`-th place, in turn."""
    flat = tensor.clone()
    for place, value in zip(range(0, flat.numel(), step), itertools.cycle(values)):
        flat[place] = value
    return flat


@rounding
@pairs
def test_elements_that_are_not_finite_are_held_back_and_counted(
    stored: torch.dtype, live: torch.dtype, keyed: bool
) -> None:
    """Also where the average is not finite: it heals, or it is no incident if both are equal."""
    sizes = [BLOCK, 2 * BLOCK + 5, 7]
    bad = [math.nan, math.inf, -math.inf]
    averages = [
        [spoiled(random((n,), stored, n + k), bad, 4 + k) for n in sizes]
        for k in range(len(WEIGHTS))
    ]
    now = [spoiled(random((n,), live, n + 7), [*bad, 70_000.0, -3.4e38], 3) for n in sizes]
    keys = keys_for(sizes) if keyed else None

    for weights in (WEIGHTS, WEIGHTS[::-1]):  # the first average is the one that counts
        rows = assert_like_plain(averages, now, weights, guard=True, keys=keys)
        healed = now[1].isfinite() & now[1].to(stored).isfinite()
        assert rows[2][1][healed].isfinite().all()


@rounding
@pytest.mark.parametrize("stored", DTYPES)
def test_without_the_guard_everything_passes(stored: torch.dtype, keyed: bool) -> None:
    """What is not finite, in the average or the live weights, goes where arithmetic takes it."""
    bad = [math.nan, math.inf, -math.inf, 70_000.0, -3.4e38]
    averages = [[spoiled(random((BLOCK + 5,), stored, k), bad, 4 + k)] for k in range(len(WEIGHTS))]
    live = [spoiled(random((BLOCK + 5,), torch.float32, 9), bad, 3)]
    keys = keys_for(live) if keyed else None

    rows = assert_like_plain(averages, live, WEIGHTS, guard=False, keys=keys)

    assert rows[2][0].isnan().any()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_random_bits_carry_nothing_over_the_edge(stored: torch.dtype) -> None:
    """Between the largest number and the limit values are rounded down, with any bits."""
    count, top = 300, torch.finfo(stored).max
    average = torch.full((count,), top, dtype=stored)
    live = torch.full((count,), (top + _triton.LIMITS[stored]) / 2)

    for guard in (True, False):
        rows = assert_like_plain([[average]], [live], [0.75], guard=guard, keys=[99])
        assert rows[0][0].eq(top).all()


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_nothing_beyond_a_tensor_is_written(size: int) -> None:
    """A row of averages one after the other in memory: neighbours are left alone."""
    memory = torch.zeros(size + 8, device=DEVICE)
    live = torch.ones(size + 8, device=DEVICE)

    TritonPlan([[memory[4:-4]]], [live[4:-4]], set()).mix_([0.5], guard=True)

    assert memory.tolist() == [0.0] * 4 + [0.5] * size + [0.0] * 4


def test_a_constant_infinity_is_no_incident() -> None:
    """As attention masks have it; NaN always is one."""
    mask = torch.tensor([-math.inf, 0.0, math.inf, math.nan, 2.0])
    rows, counts = run(TritonPlan, [[mask]], [mask], [0.5], guard=True)

    assert counts == {0: 1}
    assert rows[0][0].tolist()[:3] == [-math.inf, 0.0, math.inf]


@pytest.mark.parametrize("stored", DTYPES)
def test_huge_values_of_opposite_sign_stay_finite(stored: torch.dtype) -> None:
    """Their difference overflows, their mean does not."""
    top = float(torch.finfo(stored).max)
    average = torch.tensor([-top, top, 1.0, -top], dtype=stored)
    live = torch.tensor([top, -top, -1.0, 2.0], dtype=stored)

    weights = [0.125, 0.5, 0.75]
    for keys in (None, [5]):
        rows = assert_like_plain([[average]] * 3, [live], weights, guard=True, keys=keys)
        for [result], weight in zip(rows, weights, strict=True):
            exact = average.double() + weight * (live.double() - average.double())
            torch.testing.assert_close(result.double(), exact, rtol=2**-7, atol=0.01)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_values_are_held_back_from_where_the_storage_ends(stored: torch.dtype) -> None:
    """The limit is the least number that a cast takes to infinity, on either side."""
    limit = torch.tensor(_triton.LIMITS[stored], dtype=torch.float32)
    below = torch.nextafter(limit, torch.zeros(()))
    live = torch.stack([limit, below, -limit, -below])
    assert live.to(stored).isinf().tolist() == [True, False, True, False]

    rows, counts = run(TritonPlan, [[torch.ones(4, dtype=stored)]], [live], [1.0], guard=True)

    assert counts == {0: 2}
    top = torch.finfo(stored).max
    assert rows[0][0].tolist() == [1.0, top, 1.0, -top]


@pairs
def test_rounding_is_that_of_torch_in_all_corners(stored: torch.dtype, live: torch.dtype) -> None:
    """Subnormals, the least and the largest numbers, what the storage holds exactly, both zeros."""
    info, wide = torch.finfo(stored), torch.finfo(torch.float32)
    corners = [0.0, -0.0, info.tiny, info.smallest_normal / 3, info.max, 1.0, -1.0, 1 + info.eps]
    corners += [wide.tiny / 5, -wide.tiny / 7, 1.0 + 2.0**-12, -(1.0 + 2.0**-9), 6e-8, -3e-5]
    each = torch.tensor(corners, dtype=torch.float32)
    average = each.repeat(len(each)).to(stored)
    live_values = each.repeat_interleave(len(each)).to(live)

    averages, weights = [[average]] * 4, [1e-3, 0.3, 0.5, 0.8]
    for keys in (None, [-(2**31)], [2**31 - 1]):
        rows = assert_like_plain(averages, [live_values], weights, guard=True, keys=keys)
        expected, _ = run(BlockPlan, averages, [live_values], weights, guard=True, keys=keys)
        for row, wanted in zip(rows, expected, strict=True):
            assert torch.equal(row[0].signbit(), wanted[0].signbit())


def test_stochastic_rounding_is_unbiased() -> None:
    """A third of the way between two neighbours, one in three goes up."""
    count = 3_000
    average = torch.ones(count, dtype=torch.bfloat16)
    live = torch.full((count,), 1.0 + 2.0**-7 / 3 * 4)

    rows, _ = run(TritonPlan, [[average]], [live], [0.25], guard=True, keys=[12345])

    assert set(rows[0][0].tolist()) == {1.0, 1.0 + 2.0**-7}
    up = float((rows[0][0] > 1.0).double().mean())
    assert abs(up - 1 / 3) < 4 * math.sqrt(2 / 9 / count)


@pytest.mark.parametrize(
    ("shape", "offsets", "sizes"),
    [
        ((50, 7), (0, 0), (50, 7)),
        ((50, 7), (11, 0), (30, 7)),
        ((50, 7), (11, 2), (30, 3)),  # columns: not in one stretch
        ((4, 50, 3), (2, 10, 0), (1, 20, 3)),
        ((4, 50, 3), (0, 10, 0), (4, 20, 3)),  # not in one stretch
        ((2**27, 64), (2**25 - 3, 0), (9, 64)),  # across 2^31
        ((2**28, 64), (2**26 - 3, 0), (9, 64)),  # across 2^32
        ((40,), (0,), (0,)),
    ],
)
@pytest.mark.parametrize("stored", DTYPES)
def test_bits_belong_to_the_element_of_the_whole_tensor(
    stored: torch.dtype,
    shape: tuple[int, ...],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
) -> None:
    """A rank that holds a part of a tensor rounds it as all of it would be rounded."""
    part = Part(torch.Size(shape), offsets, sizes)
    average, live = random(sizes, stored, 1), random(sizes, torch.float32, 2)

    assert_like_plain([[average]], [live], [0.3], guard=True, keys=keys_for([0]), parts=[part])
    if average.numel():
        assert element_indices(average, part).flatten()[0] == _triton._first_index(part) or (
            _triton._first_index(part) is None
        )


@rounding
def test_elements_beyond_two_to_the_31_are_reached(keyed: bool) -> None:
    """Offsets are 64 bits wide. A window at the end of a tensor for which nobody needs memory."""
    size, before = BLOCK + 9, 2**32
    averages = [random((size,), torch.float32, 1)]
    live = [random((size,), torch.bfloat16, 2)]
    row, now = copied(averages[0], DEVICE), copied(live[0], DEVICE)
    plan = TritonPlan([[row]], [now], set())
    # Live weights, elements, first index, first program, average: as if `before` came first.
    plan._table += torch.tensor(
        [[-2 * before, before, 0, -(before // BLOCK), -4 * before]], device=DEVICE
    )
    keys = keys_for([0]) if keyed else None

    plan.mix_([0.25], guard=True, keys=keys)

    part = Part(torch.Size([before + size]), (before,), (size,))
    expected, _ = run(BlockPlan, [averages], live, [0.25], guard=True, keys=keys, parts=[part])
    assert agree(row.cpu(), expected[0][0])


@guards
@rounding
@pytest.mark.parametrize(
    "skip",
    [
        torch.tensor(0.0),
        torch.tensor([1.0]),
        torch.tensor(math.nan),
        torch.tensor(True),
        torch.tensor(2, dtype=torch.int64),
        torch.tensor(0.0, dtype=torch.float64),
    ],
    ids=lambda flag: f"{flag.tolist()} {flag.dtype}",
)
def test_nothing_changes_where_the_device_says_skip(skip: Tensor, keyed: bool, guard: bool) -> None:
    """The flag is read by the kernel, nobody waits for it; what was not finite is still counted."""
    live = [random((9, 9 + slot), dtype, slot) for slot, dtype in enumerate(DTYPES)]
    live.append(random((9, 9), torch.float32, 6).t())
    averages = [[random(x.shape, x.dtype, k).to(x) for x in live] for k in (10, 11)]
    if guard:
        live[0][0, 3] = math.nan
    keys = keys_for(live) if keyed else None

    rows = assert_like_plain(averages, live, [0.5, 1.0], guard=guard, keys=keys, skip=skip)

    for row, before in zip(rows, averages, strict=True):
        kept = all(torch.equal(x, y) for x, y in zip(row, before, strict=True))
        assert kept == bool(skip.reshape(()) != 0)


def test_not_finite_counts_and_writes_nothing() -> None:
    """The same numbers as the plain plans, whichever way a slot is mixed."""
    live = [
        torch.tensor([1.0, math.nan, math.inf]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([math.nan, 1.0], dtype=torch.float64),
        torch.tensor([70_000.0, math.inf, 1.0]),
    ]
    stored = [torch.float32, torch.float32, torch.float64, torch.float16]
    averages = [[torch.ones(t.shape, dtype=d) for t, d in zip(live, stored, strict=True)]] * 2
    averages = [[copied(t, DEVICE) for t in row] for row in averages]
    now = [copied(t, DEVICE) for t in live]

    assert TritonPlan(averages, now, set()).not_finite() == {0: 2, 2: 1, 3: 2}
    assert ForeachPlan(averages, now, set()).not_finite() == {0: 2, 2: 1, 3: 2}
    assert all(torch.equal(t, torch.ones_like(t)) for row in averages for t in row)


def test_a_broken_average_heals_and_a_plan_reads_the_live_values_of_each_call() -> None:
    """It holds addresses, never copies, so that one plan serves a whole run."""
    average = torch.tensor([math.nan, math.inf, 1.0], device=DEVICE)
    live = torch.tensor([3.0, math.nan, 2.0], device=DEVICE)
    plan = TritonPlan([[average]], [live], {0})

    plan.mix_([0.5], guard=True)
    assert average.tolist() == [3.0, math.inf, 1.5]
    live[1] = 5.0
    plan.mix_([0.5], guard=True)
    assert average.tolist() == [3.0, 5.0, 1.75]
    live.zero_()
    plan.mix_([0.5], guard=True)
    assert average.tolist() == [1.5, 2.5, 0.875]


class Counting:
    """The kernel, and how many programs each launch had."""

    def __init__(self) -> None:
        self.kernel, self.grids = _triton.mix, list[int]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid[0])
        return self.kernel[grid]


def test_a_thousand_small_tensors_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a second kind of tensors is one more."""
    count = 40 if INTERPRETED else 1_000
    live = [torch.full((5,), float(slot), device=DEVICE) for slot in range(count)]
    averages = [[torch.zeros_like(t) for t in live] for _ in range(2)]
    counting = Counting()
    monkeypatch.setattr(_triton, "mix", counting)

    TritonPlan(averages, live, set()).mix_([0.5, 1.0], guard=True)
    assert counting.grids == [count]
    for slot in range(count):
        assert averages[0][slot].tolist() == [slot / 2] * 5
        assert averages[1][slot].tolist() == [float(slot)] * 5

    live[7] = live[7].bfloat16()
    TritonPlan(averages, live, set()).mix_([0.5, 1.0], guard=True)
    assert sorted(counting.grids[1:]) == [1, count - 1]


def test_autograd_learns_that_averages_were_written() -> None:
    """A teacher's weights that were saved for a backward pass must not change unseen."""
    averages = [torch.ones(3, device=DEVICE), torch.ones(2, 4, device=DEVICE)]
    seen = [t._version for t in averages]
    views = [t.detach() for t in averages]

    TritonPlan([views], [torch.zeros_like(t) for t in averages], set()).mix_([0.5], guard=True)

    assert all(t._version > version for t, version in zip(averages, seen, strict=True))


def test_the_trial_finds_a_kernel_that_works() -> None:
    """One update of one number, as it is tried before the backend is chosen."""
    assert _triton.works(DEVICE)


@pytest.mark.parametrize("mode", ["nearest", "stochastic"])
def test_a_run_comes_out_alike(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three averages of a model with mixed dtypes over some updates, one of them with a NaN."""

    def averages_of_a_run() -> list[dict[str, Tensor]]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(2, 3, 2), torch.nn.BatchNorm2d(3), torch.nn.Linear(3, 2).bfloat16()
        ).to(DEVICE)
        averages = polyak.Averages(
            model,
            {
                "short": polyak.Exponential(decay=0.5),
                "long": polyak.Exponential(decay=0.9),
                "mean": polyak.Uniform(),
            },
            dtype=torch.float16,
            rounding=mode,
        )
        for step in range(4):
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn(parameter.shape).to(DEVICE, parameter.dtype)
                    parameter.add_(noise, alpha=0.1)
                if step == 2:
                    next(model.parameters())[0, 0, 0, 0] = math.nan
            averages.update()
        assert averages["short"].report().nonfinite == {"0.weight": 2}
        return [averages[name].weights(dtype=torch.float32) for name in averages]

    monkeypatch.setattr(kernels, "_backend", lambda device: ForeachPlan)
    expected = averages_of_a_run()
    monkeypatch.setattr(kernels, "_backend", lambda device: TritonPlan)
    results = averages_of_a_run()

    for result, wanted in zip(results, expected, strict=True):
        assert result.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(
                result[name], value, rtol=0 if FUSED else 1e-2, atol=0, equal_nan=True
            )


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_other_weights_keys_and_sizes_need_no_other_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are data: a schedule that changes them at each step compiles once."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_triton, "BLOCK", BLOCK // 2)  # no other test has compiled this one
    built = []
    for step, size in enumerate([1, 16, 5_000, 4_096, 3]):
        average, live = torch.zeros(size, device=DEVICE), torch.ones(size, device=DEVICE)
        plan = TritonPlan([[average]], [live], set())
        plan.mix_([1.0 / (step + 1)], guard=True)
        plan.mix_([0.3 / (step + 1)], guard=True, keys=[(-2) ** step])
        built.append(len(list(tmp_path.rglob("*.cubin"))))

    assert built == [2] * 5
