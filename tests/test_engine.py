"""One average: its weights are the law of its schedule, its clock is the caller's."""

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import oracles
import polyak

FloatArray = npt.NDArray[np.float64]
UPDATES = 500


# ── the weight law ───────────────────────────────────────────────────────────────────────────────


def every_step() -> list[float]:
    return list(range(1, UPDATES + 1))


def every_seventh() -> list[float]:
    return list(range(7, 7 * UPDATES + 1, 7))


def at_random_steps() -> list[float]:
    gaps = np.random.default_rng(1).integers(1, 12, UPDATES)
    return [int(time) for time in np.cumsum(gaps)]


INTERVALS = [every_step, every_seventh, at_random_steps]


def kept_by_steps(of_step: Callable[[int], float]) -> Callable[[float, float], float]:
    """What survives from one time to a later one, step by step."""

    def kept(begin: float, end: float) -> float:
        return math.prod(of_step(n) for n in range(int(begin) + 1, int(end) + 1))

    return kept


def kept_by_mass(mass: Callable[[float], float]) -> Callable[[float, float], float]:
    """What survives, for a law in continuous time with `mass` of weight before each time."""
    return lambda begin, end: mass(begin) / mass(end)


def half_life_ramp_mass(time: float) -> float:
    # half-life 0.05 t up to 20 at t = 400; weight before t grows as t ** (ln 2 / 0.05), then as
    # 2 ** (t / 20).
    ramped = min(time, 400.0) / 400.0
    return float(ramped ** (math.log(2.0) / 0.05) * 2.0 ** (max(0.0, time - 400.0) / 20.0))


# The largest root of the cubic of SCIENCE section 4, for sigma_rel = 0.10: 6.93720.
GAMMA = float(np.roots([1.0, 7.0, 16.0 - 100.0, 12.0 - 100.0]).real.max())

# Each schedule beside its rule as SCIENCE and the sources write it, in a second hand.
LAWS: list[tuple[str, polyak.Schedule, Callable[[float, float], float]]] = [
    ("power", polyak.Power(gamma=6.94), kept_by_mass(lambda t: t**7.94)),
    ("power by width", polyak.Power(sigma_rel=0.10), kept_by_mass(lambda t: t ** (GAMMA + 1.0))),
    (
        "plain exponential",
        polyak.Exponential(decay=0.99, debias=False),
        lambda begin, end: 0.99 ** (end - begin),
    ),
    (
        "debiased exponential",
        polyak.Exponential(half_life=69.0),
        kept_by_mass(lambda t: 2.0 ** (t / 69.0) - 1.0),
    ),
    ("uniform", polyak.Uniform(), kept_by_mass(lambda t: t)),
    ("polynomial", polyak.Polynomial(3.0), kept_by_mass(lambda t: t * (t + 1) * (t + 2) * (t + 3))),
    (
        "count ramp",
        polyak.CountRamp(0.99),
        kept_by_steps(lambda n: oracles.count_ramp(n, 0.99)),
    ),
    (
        "exponential ramp",
        polyak.ExponentialRamp(0.999, tau=150),
        kept_by_steps(lambda n: oracles.exponential_ramp(n, 0.999, 150)),
    ),
    (
        "inverse gamma",
        polyak.InverseGamma(2.0, power=0.75, max_decay=0.98),
        kept_by_steps(lambda n: oracles.inverse_gamma(n, 2.0, 0.75, 0.0, 0.98)),
    ),
    ("half-life ramp", polyak.HalfLifeRamp(0.05, half_life=20), kept_by_mass(half_life_ramp_mass)),
    (
        "cosine",
        polyak.Cosine(0.9, total=450),
        kept_by_steps(lambda n: oracles.cosine(n, 0.9, 450)),
    ),
    (
        "after",
        polyak.After(100, polyak.Uniform()),
        lambda begin, end: 0.0 if end <= 100 else max(0.0, begin - 100) / (end - 100),
    ),
    ("function", lambda *, now, elapsed: 0.97**elapsed, lambda begin, end: 0.97 ** (end - begin)),
]
law = pytest.mark.parametrize(("schedule", "kept"), [c[1:] for c in LAWS], ids=[c[0] for c in LAWS])
intervals = pytest.mark.parametrize("times", INTERVALS, ids=lambda make: make.__name__)


def weights_by_law(
    kept: Callable[[float, float], float], times: Sequence[float]
) -> tuple[float, FloatArray]:
    """The weight of the initial weights and of each update, in extended precision."""
    befores = [0.0, *times[:-1]]
    decays = np.array([kept(a, b) for a, b in zip(befores, times, strict=True)], np.longdouble)
    left = np.concatenate((np.cumprod(decays[::-1])[::-1], [np.longdouble(1.0)]))
    return float(left[0]), ((1.0 - decays) * left[1:]).astype(np.float64)


def weights_read_off(
    schedule: polyak.Schedule, times: Sequence[float]
) -> tuple[float, FloatArray, polyak.Average]:
    """Feed an average one basis vector an update: what it then holds are its weights."""
    basis = torch.eye(len(times) + 1, dtype=torch.float64)
    live = {"w": basis[0].clone()}
    average = polyak.Average(live, schedule)
    for row, now in zip(basis[1:], times, strict=True):
        live["w"].copy_(row)
        average.update(now)
    held = average.tensors["w"].numpy()
    return float(held[0]), held[1:], average


@intervals
@law
def test_weights_of_every_schedule_are_its_law(
    schedule: polyak.Schedule,
    kept: Callable[[float, float], float],
    times: Callable[[], list[float]],
) -> None:
    """Fed with basis vectors, an average holds the closed form of its schedule."""
    initial, weights, _ = weights_read_off(schedule, times())
    initial_by_law, weights_by_hand = weights_by_law(kept, times())

    np.testing.assert_allclose(weights, weights_by_hand, rtol=0, atol=1e-12)
    assert initial == pytest.approx(initial_by_law, abs=1e-12)


@intervals
@law
def test_weights_are_those_of_the_profile_and_sum_to_one(
    schedule: polyak.Schedule,
    kept: Callable[[float, float], float],
    times: Callable[[], list[float]],
) -> None:
    """What `profile` says of a schedule is what an average of it does, plain functions too."""
    initial, weights, _ = weights_read_off(schedule, times())
    profile = polyak.profile(schedule, times())

    np.testing.assert_allclose(weights, profile.weights, rtol=0, atol=1e-12)
    assert initial == pytest.approx(profile.initial, abs=1e-12)
    assert initial + weights.sum() == pytest.approx(1.0, abs=1e-12)


@intervals
@law
def test_memory_in_the_report_is_that_of_the_profile(
    schedule: polyak.Schedule,
    kept: Callable[[float, float], float],
    times: Callable[[], list[float]],
) -> None:
    """Three running numbers say what the whole profile says."""
    report = weights_read_off(schedule, times())[2].report()
    profile = polyak.profile(schedule, times())

    assert report.initial_weight == pytest.approx(profile.initial, abs=1e-12)
    assert report.mean_age == pytest.approx(profile.mean_age, rel=1e-10)
    assert report.noise_window == pytest.approx(profile.noise_window, rel=1e-10)


@intervals
@pytest.mark.parametrize(
    "schedule",
    [
        polyak.Uniform(),
        polyak.Power(sigma_rel=0.05),
        polyak.Power(gamma=-0.5),
        polyak.Polynomial(3.0),
        polyak.Exponential(decay=0.999),
        polyak.Exponential(half_life=1e6),
        polyak.HalfLifeRamp(0.05),
    ],
    ids=repr,
)
def test_nothing_is_left_of_the_initial_weights(
    schedule: polyak.Schedule, times: Callable[[], list[float]]
) -> None:
    """Exactly nothing, from the first update on, whenever that comes."""
    live = {"w": torch.tensor([1e30], dtype=torch.float64)}
    average = polyak.Average(live, schedule)
    live["w"].zero_()

    for now in times()[:20]:
        average.update(now)
        assert average.tensors["w"].item() == 0.0
    assert average.report().initial_weight == 0.0


@pytest.mark.parametrize("every", [1, 10, 40])
def test_average_does_not_depend_on_update_interval(every: int) -> None:
    """The average of the ramp w(t) = t is the profile's mean time, however often we look."""
    gamma, last = 6.94, 4_000
    live = {"w": torch.zeros((), dtype=torch.float64)}
    average = polyak.Average(live, polyak.Power(gamma=gamma))

    for step in range(every, last + 1, every):
        live["w"].fill_(step)
        average.update(now=step)

    mean_time = average.weights()["w"].item() / last
    assert mean_time == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-2)
    # What is left is that an update stands for the interval before it: half of one, on average.
    assert mean_time - every / last / 2 == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-4)


@law
def test_a_coarser_interval_is_the_same_average_of_what_was_seen(
    schedule: polyak.Schedule, kept: Callable[[float, float], float]
) -> None:
    """On a path that moves every 6 steps, looking every step or every 6 makes no difference."""
    path = torch.randn(80, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    live = {"w": torch.zeros((), dtype=torch.float64)}
    fine, coarse = (polyak.Average(live, schedule) for _ in range(2))

    for step in range(1, 481):
        live["w"].copy_(path[(step - 1) // 6])
        fine.update(step)
        if step % 6 == 0:
            coarse.update(step)
            if isinstance(schedule, polyak.After) and 96 < step <= 102:
                continue  # its start, 100, lies inside this one interval
            assert coarse.tensors["w"].item() == pytest.approx(
                fine.tensors["w"].item(), abs=1e-12
            ), step


# ── the clock ────────────────────────────────────────────────────────────────────────────────────


class Recorder:
    """A schedule that notes what it is asked."""

    def __init__(self, decay: float = 0.5) -> None:
        self.decay, self.asked = decay, list[tuple[float, float]]()

    def __call__(self, *, now: float, elapsed: float) -> float:
        self.asked.append((now, elapsed))
        return self.decay


def test_schedule_sees_time_since_construction_and_since_the_last_update() -> None:
    """`now=` at construction only shifts the clock."""
    schedule = Recorder()
    average = polyak.Average({"w": torch.zeros(2)}, schedule, now=1_000)

    average.update()
    average.update(1_010)
    average.update(now=1_010.5)
    average.update()

    assert schedule.asked == [(1, 1), (10, 9), (10.5, 0.5), (11.5, 1)]
    assert (average.now, average.updates) == (1_011.5, 4)


def test_whole_times_stay_exact_beyond_the_floats() -> None:
    """Tokens are counted in trillions; 2**53 + 1 is not 2**53."""
    schedule = Recorder()
    average = polyak.Average({"w": torch.zeros(2)}, schedule, now=2**53)

    average.update(2**53 + 1)
    average.update()

    assert average.now == 2**53 + 2
    assert schedule.asked == [(1, 1), (2, 1)]


@pytest.mark.parametrize("now", [5, 4.999, 0, -1])
def test_time_must_move_forward(now: float) -> None:
    """A refused update leaves average, clock and counters as they were."""
    live = {"w": torch.zeros(2)}
    average = polyak.Average(live, polyak.Uniform())
    average.update(5)
    live["w"].fill_(1.0)

    with pytest.raises(polyak.OrderError, match=r"now must be above 5 .*once per optimizer step"):
        average.update(now)

    assert (average.now, average.updates) == (5, 1)
    assert torch.equal(average.tensors["w"], torch.zeros(2))


@pytest.mark.parametrize("now", [math.nan, math.inf, -math.inf])
def test_time_must_be_finite(now: float) -> None:
    """In an update, at construction and in a reset."""
    live = {"w": torch.zeros(2)}
    average = polyak.Average(live)

    with pytest.raises(polyak.ArgumentError, match="now must be a finite number"):
        average.update(now)
    with pytest.raises(polyak.ArgumentError, match="now must be a finite number"):
        average.reset(now=now)
    with pytest.raises(polyak.ArgumentError, match="now must be a finite number"):
        polyak.Average(live, now=now)
    assert (average.now, average.updates) == (0, 0)


@pytest.mark.parametrize("decay", [-1e-9, 1.0 + 1e-9, math.nan, math.inf])
def test_decay_of_a_function_must_be_a_share(decay: float) -> None:
    """Refused before anything is touched, NaN too."""
    live = {"w": torch.zeros(2)}
    average = polyak.Average(live, Recorder(decay))
    live["w"].fill_(1.0)

    with pytest.raises(polyak.ArgumentError, match=r"decay must be in \[0, 1\]"):
        average.update()

    assert (average.now, average.updates) == (0, 0)
    assert torch.equal(average.tensors["w"], torch.zeros(2))


def test_an_error_of_one_schedule_touches_no_average() -> None:
    """Several averages move together or not at all."""
    live = {"w": torch.zeros(2)}
    averages = polyak.Averages(live, {"good": polyak.Uniform(), "bad": Recorder(2.0)})
    live["w"].fill_(1.0)

    with pytest.raises(polyak.ArgumentError):
        averages.update()

    assert (averages.now, averages.updates) == (0, 0)
    assert torch.equal(averages["good"].tensors["w"], torch.zeros(2))


def test_update_returns_the_decay_that_was_used() -> None:
    """By hand: 1 - 1/n for the mean, half for a half-life of one."""
    averages = polyak.Averages(
        {"w": torch.zeros(2)},
        {"mean": polyak.Uniform(), "half": polyak.Exponential(half_life=1, debias=False)},
    )

    assert averages.update() == {"mean": 0.0, "half": 0.5}
    assert averages.update(now=4) == {"mean": 0.25, "half": 0.125}


def test_reset_starts_again_from_the_live_weights() -> None:
    """What follows is bit for bit a new average built at that moment."""
    live = {"w": torch.randn(7, generator=torch.Generator().manual_seed(3))}
    average = polyak.Average(live, polyak.CountRamp(0.99))
    for _ in range(5):
        live["w"].mul_(1.5)
        average.update()

    average.reset(now=2)
    fresh = polyak.Average(live, polyak.CountRamp(0.99), now=2)
    for step in (3, 5, 6):
        live["w"].mul_(-0.7)
        assert average.update(step) == fresh.update(step)
        assert torch.equal(average.tensors["w"], fresh.tensors["w"])
    assert (average.now, average.updates) == (fresh.now, fresh.updates) == (6, 3)
    assert average.report() == fresh.report()


def test_reset_without_a_time_keeps_the_clock() -> None:
    """Time goes on where it stands; the schedule starts at zero again."""
    schedule = Recorder()
    average = polyak.Average({"w": torch.zeros(2)}, schedule)
    average.update(10)

    average.reset()
    average.update()

    assert schedule.asked == [(10, 10), (1, 1)]
    assert (average.now, average.updates) == (11, 1)


def test_up_to_its_start_an_after_is_a_copy_of_the_live_weights() -> None:
    """Bit for bit; then the inner mean forgets everything before its start."""
    live = {"w": torch.zeros(3)}
    average = polyak.Average(live, polyak.After(10, polyak.Uniform()))
    generator = torch.Generator().manual_seed(4)
    tail = []

    for step in (2, 5, 10, 11, 12, 13):
        live["w"].copy_(torch.randn(3, generator=generator))
        average.update(step)
        if step <= 10:
            assert torch.equal(average.tensors["w"], live["w"])
        else:
            tail.append(live["w"].double())
            exact = torch.stack(tail).mean(0)
            torch.testing.assert_close(average.tensors["w"].double(), exact, rtol=0, atol=1e-6)


def test_the_start_of_an_after_may_fall_between_two_updates() -> None:
    """From 8 to 12 with the start at 10, the inner schedule has seen two units, not four."""
    schedule = Recorder()
    average = polyak.Average({"w": torch.zeros(1)}, polyak.After(10, schedule))

    for now in (8, 12, 15):
        average.update(now)

    assert schedule.asked == [(2, 2), (5, 3)]


# ── what an average holds ────────────────────────────────────────────────────────────────────────


def test_a_narrow_weight_is_averaged_in_float32() -> None:
    """Held at 2 from 1 for 2000 updates of 0.999: 2 - 0.999**2000 = 1.8648, not stuck at 1."""
    live = {"w": torch.ones(1, dtype=torch.bfloat16)}
    average = polyak.Average(live, polyak.Exponential(decay=0.999, debias=False))
    live["w"].fill_(2.0)

    for _ in range(2_000):
        average.update()

    assert average.tensors["w"].dtype == torch.float32
    assert average.tensors["w"].item() == pytest.approx(2.0 - 0.999**2_000, abs=1e-3)
    assert average.tensors["w"].item() == pytest.approx(1.8648, abs=1e-3)


@pytest.mark.parametrize(
    ("live", "stored"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.complex64),
        (torch.complex128, torch.complex128),
    ],
)
def test_storage_is_float32_for_anything_narrower(live: torch.dtype, stored: torch.dtype) -> None:
    """Else the tensor's own; weights come back in the live dtype."""
    average = polyak.Average({"w": torch.zeros(3).to(live)})

    assert average.tensors["w"].dtype == stored
    assert average.weights()["w"].dtype == live


@pytest.mark.parametrize(
    "schedule",
    [
        polyak.Power(sigma_rel=0.05),
        polyak.Uniform(),
        polyak.Polynomial(3),
        polyak.Exponential(decay=0.9),
        polyak.InverseGamma(),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
)
def test_the_first_update_copies_every_bit(schedule: polyak.Schedule, dtype: torch.dtype) -> None:
    """Decay 0 is a copy, not an addition of a difference."""
    live = {"w": torch.full((50,), 6e4).to(dtype)}
    average = polyak.Average(live, schedule)
    live["w"].copy_(torch.randn(50, generator=torch.Generator().manual_seed(5)))

    assert average.update() == 0.0

    assert torch.equal(average.weights()["w"], live["w"])


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_decay_one_leaves_every_bit(stored: torch.dtype) -> None:
    """The average stands still; only the clock moves."""
    live = {"w": torch.randn(50, generator=torch.Generator().manual_seed(6))}
    average = polyak.Average(live, Recorder(1.0), dtype=stored)
    before = average.tensors["w"].clone()
    live["w"].fill_(1e30)

    average.update()

    assert torch.equal(average.tensors["w"], before)
    assert (average.now, average.updates) == (1, 1)


def test_several_averages_from_one_read_equal_single_ones_bit_for_bit() -> None:
    """In every storage that the groups of an engine can hold, with a NaN on the way."""
    generator = torch.Generator().manual_seed(7)
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.complex64]
    live = {str(d): torch.randn(33, generator=generator).to(d) for d in dtypes}
    schedules: dict[str, polyak.Schedule] = {
        "mean": polyak.Uniform(),
        "short": polyak.Exponential(decay=0.9),
        "long": polyak.Exponential(decay=0.999, debias=False),
        "still": Recorder(1.0),
        "copy": Recorder(0.0),
    }
    together = polyak.Averages(live, schedules)
    alone = {name: polyak.Average(live, schedule) for name, schedule in schedules.items()}

    for now in (1, 2, 5, 6, 20):
        for tensor in live.values():
            tensor.copy_(torch.randn(33, generator=generator))
        if now == 5:
            live["torch.float32"][3] = math.nan
        decays = together.update(now)
        assert decays == {name: average.update(now) for name, average in alone.items()}

    for name, average in alone.items():
        for key, tensor in average.tensors.items():
            assert torch.equal(together[name].tensors[key], tensor), (name, key)
        assert together[name].report() == average.report()


def test_storage_dtype_can_be_chosen() -> None:
    """Narrow storage is mixed in float32 and rounded once: half of 1 + 2**-7 is not lost."""
    live = {"w": torch.ones(1)}
    average = polyak.Average(live, Recorder(0.5), dtype=torch.bfloat16)
    live["w"].fill_(1.0 + 2.0**-6)

    average.update()

    assert average.tensors["w"].dtype == torch.bfloat16
    assert average.tensors["w"].item() == 1.0 + 2.0**-7


def test_an_average_built_in_inference_mode_can_be_updated_outside() -> None:
    """And one updated inside can go on outside: its tensors are ordinary ones."""
    model = nn.Linear(2, 2)
    with torch.inference_mode():
        average = polyak.Average(model, polyak.Uniform())
        average.update()
    with torch.no_grad():
        model.weight.add_(2.0)

    average.update()

    torch.testing.assert_close(average.tensors["weight"], model.weight.detach() - 1.0)


# ── the live model moves ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_in_place_is_followed(dtype: torch.dtype) -> None:
    """`model.to(dtype)` swaps the memory behind the same parameters; averages read the new one."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = polyak.Average(model, polyak.Uniform())
    average.update()
    first = {name: tensor.clone() for name, tensor in average.tensors.items()}

    model.to(dtype)
    with torch.no_grad():
        for tensor in [*model.parameters(), model[1].running_mean, model[1].running_var]:
            assert isinstance(tensor, torch.Tensor)
            tensor.fill_(3.0)
    average.update()

    for name, tensor in average.tensors.items():
        expected = (first[name] + 3.0) / 2.0
        torch.testing.assert_close(tensor.to(torch.float32), expected.to(torch.float32))
    assert average.weights()["0.weight"].dtype == dtype
    model.load_state_dict(average.weights(), strict=True)


def test_swapped_data_is_followed() -> None:
    """Values come from the memory that the parameter has now, not from where it was."""
    model = nn.Linear(2, 2, bias=False)
    average = polyak.Average(model, Recorder(0.0))
    average.update()

    model.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    average.update()

    assert torch.equal(average.tensors["weight"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


def test_data_swapped_for_a_transposed_view_is_followed() -> None:
    """Same address, same shape, other strides: still another matrix."""
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    average = polyak.Average(model, Recorder(0.0))
    average.update()

    model.weight.data = model.weight.data.t()
    average.update()

    assert torch.equal(average.tensors["weight"], torch.tensor([[1.0, 3.0], [2.0, 4.0]]))


def test_a_buffer_is_looked_up_by_name_at_every_update() -> None:
    """Assigning a new tensor to a buffer is everyday code."""
    model = nn.BatchNorm1d(2)
    average = polyak.Average(model, Recorder(0.0))
    average.update()

    model.running_mean = torch.tensor([5.0, 6.0])
    average.update()

    assert torch.equal(average.tensors["running_mean"], torch.tensor([5.0, 6.0]))


def test_a_named_tensor_is_looked_up_in_the_mapping_that_was_given() -> None:
    """What the owner puts under the name later is what is averaged."""
    live = {"w": torch.zeros(2)}
    average = polyak.Average(live, Recorder(0.0))

    live["w"] = torch.ones(2)
    average.update()

    assert torch.equal(average.tensors["w"], torch.ones(2))


@pytest.mark.parametrize("new", [torch.zeros(3), torch.zeros(2, dtype=torch.int64)], ids=str)
def test_another_shape_or_kind_is_refused(new: torch.Tensor) -> None:
    """Before anything is touched, with the name."""
    live = {"a": torch.zeros(2), "w": torch.zeros(2)}
    average = polyak.Average(live, Recorder(0.0))
    live["a"].fill_(1.0)
    live["w"] = new

    with pytest.raises(polyak.MatchError, match="'w' must"):
        average.update()

    assert (average.now, average.updates) == (0, 0)
    assert torch.equal(average.tensors["a"], torch.zeros(2))


def test_conjugate_views_are_averaged_like_any_tensor() -> None:
    """A lazy conjugate is a flag on the tensor; the values are what counts."""
    z = torch.tensor([1.0 + 2.0j, 3.0 - 1.0j])
    average = polyak.Average({"z": z.conj()}, Recorder(0.5))

    z.mul_(3.0)
    average.update()

    assert torch.equal(average.tensors["z"], torch.tensor([2.0 - 4.0j, 6.0 + 2.0j]))


def test_a_warning_that_raises_leaves_a_finished_update() -> None:
    """Where warnings are errors, the clock and the weights still agree after one."""
    live = {"w": torch.ones(2)}
    averages = polyak.Averages(
        live, {"a": polyak.Uniform(), "b": polyak.Uniform()}, dtype=torch.bfloat16
    )
    for _ in range(256):
        averages.update()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(polyak.AveragingWarning, match="no longer moves"):
            averages.update()

    assert (averages.now, averages.updates) == (257, 257)
    for average in averages.values():
        assert average.report().noise_window == pytest.approx(257, rel=1e-9)
