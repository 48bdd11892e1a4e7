"""How well an average keeps up in few bits, against the exact moving average.

The setting of SCIENCE test 6: weights that start at random, a target moved by 10 %, the error of
the average relative to that move after eight time constants. What is exact is a closed form.
"""

import math

import pytest
import torch
from torch import Tensor

import polyak
from polyak._kernels._rounding import (
    element_indices,
    hashed_bits,
    round_stochastically,
    stream_key,
)

# Relative gaps at which rounding to nearest swallows an update: u / (1 - decay).
U = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def errors(
    decay: float,
    dtype: torch.dtype,
    rounding: polyak._engine.Rounding,
    *,
    weights: int = 500,
    noise: float = 0.0,
    constants: float = 8.0,
    function: bool = False,
    on_grid: bool = False,
) -> tuple[float, float]:
    """Error of the average relative to the move: its typical size, and its mean."""
    random = torch.Generator().manual_seed(1)
    start = torch.randn(weights, generator=random).to(torch.bfloat16).float()
    target = 1.1 * start
    if on_grid:  # live weights in bfloat16 can only be what bfloat16 holds
        target = target.to(torch.bfloat16).float()
    live = {"w": start.clone()}
    exponential = polyak.Exponential(decay=decay, debias=False)
    rule: polyak.Schedule = exponential
    if function:  # a plain function is taken at its word, where the named schedule is refused
        rule = lambda *, now, elapsed: exponential(now=now, elapsed=elapsed)  # noqa: E731
    average = polyak.Average(live, rule, dtype=dtype, rounding=rounding)
    exact = start.double()
    for _ in range(round(constants / (1.0 - decay))):
        live["w"].copy_(target)
        if noise:
            live["w"].mul_(1.0 + noise * torch.randn(weights, generator=random))
        average.update()
        exact.lerp_(live["w"].double(), 1.0 - decay)
    error = average.tensors["w"].double() - exact
    move = (target - start).double()
    return float(error.norm() / move.norm()), float(
        (error * move.sign()).mean() / move.abs().mean()
    )


@pytest.mark.filterwarnings("ignore::polyak.AveragingWarning")
@pytest.mark.parametrize("decay", [0.99, 0.996, 0.999])
def test_bfloat16_rounded_to_nearest_never_moves(decay: float) -> None:
    """Not one weight moves at a decay of 0.99 or more: why float32 is the default."""
    size, mean = errors(decay, torch.bfloat16, "nearest", function=True)
    assert size == pytest.approx(1.0, abs=2e-3)  # the exact average has all but e^-8 of the move
    assert mean == pytest.approx(-1.0, abs=2e-3)


@pytest.mark.parametrize("decay", [0.9, 0.99])
def test_bfloat16_rounded_stochastically_arrives(decay: float) -> None:
    """Within 1e-2 of the move where the target is a bfloat16 itself, as bfloat16 weights are."""
    size, _ = errors(decay, torch.bfloat16, "stochastic", weights=4_000, on_grid=True)
    assert size <= 1e-2


@pytest.mark.prove
@pytest.mark.parametrize("decay", [0.9, 0.99, 0.996, 0.999])
def test_bfloat16_rounded_stochastically_arrives_at_every_decay(decay: float) -> None:
    """Within 1e-2 of the move, and on average within 1e-4 of it: SCIENCE test 6, 20,000 weights."""
    size, mean = errors(decay, torch.bfloat16, "stochastic", weights=20_000, on_grid=True)
    assert size <= 1e-2
    assert abs(mean) <= 1e-4


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.996, 0.999])
def test_bfloat16_rounded_stochastically_is_unbiased(decay: float) -> None:
    """Each weight ends within 0.4 units in the last place (typically), their mean where it should.

    Near the target an update of size a g, a = 1 - decay, moves a whole unit u with probability
    a g / u: its variance a g u is balanced by the pull 2 a V, so V = E[g] u / 2, and with
    E[g] = 0.8 sqrt(V) the spread is 0.4 u. A unit is 2^-8 to 2^-7 of a bfloat16: 5.5e-3 of a
    weight in the quadratic mean of a normal one, 5.5e-2 of a 10 % move.
    """
    size, mean = errors(decay, torch.bfloat16, "stochastic", weights=4_000)
    assert size == pytest.approx(0.4 * 5.5e-2, rel=0.3)
    assert abs(mean) <= 5.0 * size / math.sqrt(4_000)  # five standard errors of a mean of zero


def test_float32_rounded_to_nearest_keeps_up_at_0_999() -> None:
    """Within 5e-4 of the move."""
    assert errors(0.999, torch.float32, "nearest")[0] <= 5e-4


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_float32_rounded_stochastically_keeps_up(noise: float) -> None:
    """Within 1e-4 of the move at 0.997, on held and on noisy live weights; 0.9999 is proved."""
    assert errors(0.997, torch.float32, "stochastic", noise=noise)[0] <= 1e-4


@pytest.mark.prove
@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("decay", [0.997, 0.999, 0.9995, 0.9999])
def test_float32_rounded_stochastically_keeps_up_at_every_decay(decay: float, noise: float) -> None:
    """Within 1e-4 of the move for 0.997 to 0.9999, on held and on noisy live weights."""
    assert errors(decay, torch.float32, "stochastic", weights=2_000, noise=noise)[0] <= 1e-4


@pytest.mark.prove
def test_float32_rounded_to_nearest_stalls_at_0_9999() -> None:
    """It ends short by the predicted gap, u / (1 - decay) of the weight: 4.6e-3 of a 10 % move."""
    size, mean = errors(0.9999, torch.float32, "nearest", weights=2_000)
    assert 3e-3 <= size <= 7e-3
    assert mean < 0.0


@pytest.mark.parametrize(
    ("dtype", "decay"),
    [
        (torch.bfloat16, 0.9),
        (torch.bfloat16, 0.99),
        (torch.float32, 0.999),  # the gap itself must be resolved to 1 % in float32
        (torch.float32, 0.9999),
    ],
)
def test_rounding_to_nearest_stalls_at_the_gap_that_the_report_gives(
    dtype: torch.dtype, decay: float
) -> None:
    """An average of 1 moves for a gap above u / (1 - decay), not for one below, within 1 %."""
    gap = U[dtype] / (1.0 - decay)
    for factor, moves in ((0.99, False), (1.01, True)):
        live = {"w": torch.ones(1, dtype=torch.float64)}
        rule = polyak.Exponential(decay=decay, debias=False)
        average = polyak.Average(live, rule, dtype=dtype)
        live["w"] += factor * gap
        average.update()
        assert (average.tensors["w"].item() != 1.0) == moves
        assert average.report().stall_gap == pytest.approx(gap, rel=1e-9)


def neighbours(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest number of `dtype` at or below each value, and the smallest at or above."""
    nearest = values.to(dtype)
    up, down = (
        torch.nextafter(nearest.float(), torch.tensor(end)) for end in (math.inf, -math.inf)
    )
    if dtype != torch.float32:  # numbers lie `step` apart
        step = torch.finfo(dtype).eps * 2.0 ** torch.floor(
            torch.log2(values.abs().clamp_min(torch.finfo(dtype).tiny))
        )
        up, down = ((values / step).floor() + 1) * step, ((values / step).ceil() - 1) * step
    exact = nearest.double()
    below = torch.where(exact <= values, exact, down.double())
    above = torch.where(exact >= values, exact, up.double())
    return below, above


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stochastic_rounding_takes_one_of_the_two_neighbours_and_is_unbiased(
    dtype: torch.dtype,
) -> None:
    """From subnormal to large, of both signs: never beyond a neighbour, on average the value."""
    random = torch.Generator().manual_seed(2)
    size = torch.logspace(-9, 3, 400, dtype=torch.float64)
    values = size * torch.randn(400, dtype=torch.float64, generator=random)
    index, draws = element_indices(values), 3_000
    total, least, most = torch.zeros(400).double(), values + math.inf, values - math.inf
    for draw in range(draws):
        bits = hashed_bits(stream_key(0, "w", draw), index)
        rounded = round_stochastically(values, dtype, bits).double()
        total += rounded
        least, most = torch.minimum(least, rounded), torch.maximum(most, rounded)
    below, above = neighbours(values, dtype)
    assert torch.all((least >= below) & (most <= above))
    standard_error = (above - below) / (2.0 * math.sqrt(draws))
    assert torch.all((total / draws - values).abs() <= 5.0 * standard_error + 1e-12 * size)


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz],
)
def test_float8_rounds_to_a_neighbour_of_the_same_sign(dtype: torch.dtype) -> None:
    """Also below its smallest number, and where the pattern of minus zero is NaN (fnuz)."""
    tiny = float(torch.finfo(dtype).smallest_normal) / 2.0 ** (2 if "e5m2" in str(dtype) else 3)
    values = torch.tensor([-0.7 * tiny, 0.7 * tiny, -1.3, 1.3], dtype=torch.float32).repeat(4_000)
    bits = hashed_bits(stream_key(0, "w", 1), torch.arange(len(values)))
    rounded = round_stochastically(values, dtype, bits).to(torch.float32).view(-1, 4)
    assert torch.isfinite(rounded).all()
    assert (rounded.abs() * values.view(-1, 4).sign() == rounded).all()
    assert all(len(column.unique()) == 2 for column in rounded.T)
    error = rounded.mean(0) - values[:4]
    spread = (rounded.max(0).values - rounded.min(0).values) / (2 * math.sqrt(4_000))
    assert (error.abs() <= 5 * spread).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stochastic_rounding_leaves_alone_what_fits(dtype: torch.dtype) -> None:
    """Values of the dtype, both zeros, infinities and NaN come out as they are."""
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.5, -(2.0**-10)]
    values = torch.tensor(special, dtype=torch.float64)
    bits = torch.randint(-(2**31), 2**31 - 1, (len(special),), dtype=torch.int32)
    rounded = round_stochastically(values, dtype, bits)
    assert rounded.dtype == dtype
    assert str(rounded.double().tolist()) == str(values.tolist())


def test_hashed_bits_are_fair_and_belong_to_element_name_update_and_seed() -> None:
    """Each bit is set half of the time, and another element, name, update or seed has others."""
    index = torch.arange(1 << 18)
    bits = {
        case: hashed_bits(stream_key(*case), index)
        for case in [(0, "w", 1), (0, "w", 2), (0, "v", 1), (1, "w", 1)]
    }
    for one in bits.values():
        for bit in range(32):
            share = ((one >> bit) & 1).double().mean().item()
            assert abs(share - 0.5) < 5.0 * 0.5 / math.sqrt(len(index))
    first, *others = bits.values()
    for other in others:
        assert (first == other).sum() <= 3
    assert torch.equal(hashed_bits(stream_key(0, "w", 1), index[777:999]), first[777:999])
    beyond = torch.tensor([5, 5 + 2**32])
    assert len(set(hashed_bits(7, beyond).tolist())) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_does_not_depend_on_blocks_or_memory_order(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any block size and channels-last give the same bits: elements are counted logically."""
    random = torch.Generator().manual_seed(3)
    start, move = (torch.randn(4, 3, 5, 5, generator=random) for _ in range(2))
    found: list[Tensor] = []
    for block, order in [
        (1 << 20, torch.contiguous_format),
        (7, torch.contiguous_format),
        (1 << 20, torch.channels_last),
        (11, torch.channels_last),
    ]:
        monkeypatch.setattr("polyak._kernels._blocks.BLOCK", block)
        live = {"w": start.clone(memory_format=order)}
        average = polyak.Average(
            live, polyak.Exponential(decay=0.99), dtype=dtype, rounding="stochastic"
        )
        for _ in range(5):
            live["w"] += move
            average.update()
        found.append(average.tensors["w"].contiguous())
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_not_finite_elements_do_not_change_the_rounding_of_others() -> None:
    """The guarded path rounds with the same bits as the plain one."""
    results = []
    for bad in (False, True):
        live = {"w": torch.linspace(-1.0, 1.0, 50)}
        average = polyak.Average(
            live, polyak.Exponential(decay=0.9), dtype=torch.bfloat16, rounding="stochastic"
        )
        for step in range(10):
            live["w"].add_(0.1)
            kept = live["w"][3].clone()
            if bad and step == 5:
                live["w"][3] = math.nan
            average.update()
            live["w"][3] = kept
        results.append(average.tensors["w"].clone())
    same = results[0] == results[1]
    assert same[:3].all()
    assert same[4:].all()
    assert torch.isfinite(results[1]).all()


def test_seed_and_rounding_of_a_state_must_be_those_of_the_average() -> None:
    """A resume with other rounding would not be bit-identical, so it is refused."""
    live = {"w": torch.ones(3)}
    average = polyak.Average(live, dtype=torch.bfloat16, rounding="stochastic", seed=1)
    state = average.state_dict()
    for other in (
        polyak.Average(live, dtype=torch.bfloat16),
        polyak.Average(live, dtype=torch.bfloat16, rounding="stochastic", seed=2),
    ):
        with pytest.raises(polyak.MatchError, match=r"rounding='(stochastic|nearest)'"):
            other.load_state_dict(state)
    polyak.Average(live, dtype=torch.bfloat16, rounding="stochastic", seed=1).load_state_dict(state)
