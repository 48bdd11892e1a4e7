"""What averaging does to noise, to a sinusoid, and to the numbers of other libraries."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

import polyak

REPLICAS = 20_000  # the sampling error of a variance is then sqrt(2 / 20 000) = 1 %


class Noise:
    """Stationary replicas of x <- a x + noise, with variance one: SGD on a noisy quadratic.

    a = 1 - learning rate * curvature; a = 0 is white noise.
    """

    def __init__(self, a: float | Tensor, shape: tuple[int, ...], seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.a = torch.as_tensor(a, dtype=torch.float64)
        self.kick = (1 - self.a**2).sqrt()
        self.live = {"x": self.draw(shape)}

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)

    def step(self) -> None:
        x = self.live["x"]
        x.mul_(self.a).add_(self.kick * self.draw(tuple(x.shape)))


# SCIENCE 3.5, test 2: learning rate * curvature = 0.1. The textbook (1 - decay) / (1 + decay) is
# the white-noise case and is 10 to 19 times off here.
AR1 = {0.9: 0.50139, 0.99: 0.08718, 0.998: 0.018665}
WHITE = {0.9: 0.05263, 0.99: 0.005025}


def variance_ratio(decay: float, a: float) -> float:
    """Var(average) / Var(live) = (1 - d) / (1 + d) * (1 + a d) / (1 - a d)."""
    return (1 - decay) / (1 + decay) * (1 + a * decay) / (1 - a * decay)


@pytest.mark.parametrize(
    ("a", "expected", "replicas", "steps", "tolerance"),
    [(0.9, AR1, REPLICAS, 3_000, 0.04), (0.0, WHITE, 4_000, 1_000, 0.06)],
    ids=["noisy quadratic", "white noise"],
)
def test_variance_of_an_exponential_average_is_the_law(
    a: float, expected: dict[float, float], replicas: int, steps: int, tolerance: float
) -> None:
    """From a noisy start, after more than six time constants."""
    noise = Noise(a, (replicas,), seed=1)
    averages = polyak.Averages(
        noise.live, {str(decay): polyak.Exponential(decay=decay) for decay in expected}
    )
    for _ in range(steps):
        noise.step()
        averages.update()

    for decay, ratio in expected.items():
        assert variance_ratio(decay, a) == pytest.approx(ratio, rel=1e-3)
        assert averages[str(decay)].tensors["x"].var().item() == pytest.approx(ratio, rel=tolerance)


def test_variance_of_a_window_is_the_law() -> None:
    """(1/N) [(1 + a)/(1 - a) - 2 a (1 - a^N) / (N (1 - a)^2)] = 0.3084 for N = 50, a = 0.9."""
    n, a = 50, 0.9
    law = ((1 + a) / (1 - a) - 2 * a * (1 - a**n) / (n * (1 - a) ** 2)) / n
    assert law == pytest.approx(0.3084, abs=5e-5)
    noise = Noise(a, (40_000,), seed=2)
    window = polyak.Window(noise.live, n)

    for _ in range(n + 5):
        noise.step()
        window.update()

    assert window.tensors["x"].var().item() == pytest.approx(law, rel=0.03)


def test_the_full_mean_is_as_good_for_every_learning_rate() -> None:
    """T Var(mean) -> s^2 / curvature^2, whatever the step size (Polyak and Juditsky)."""
    rates, steps = torch.tensor([0.05, 0.1, 0.2, 0.5], dtype=torch.float64), 4_000
    noise = Noise((1 - rates)[:, None], (4, 4_000), seed=3)
    average = polyak.Average(noise.live, polyak.Uniform())
    for _ in range(steps):
        noise.step()
        average.update()

    # Replicas have variance one; SGD with s = curvature = 1 has rate^2 / (1 - a^2) instead.
    variance = average.tensors["x"].var(dim=1) * rates**2 / (1 - (1 - rates) ** 2)
    torch.testing.assert_close(
        steps * variance, torch.ones(4, dtype=torch.float64), rtol=0.08, atol=0
    )


def power_of_a_sinusoid(schedule: polyak.Schedule, frequency: float, steps: int) -> float:
    """What an average leaves of the power of exp(i frequency t), t = 0 ... steps."""
    live = {"wave": torch.tensor([1.0, 0.0], dtype=torch.float64)}
    average = polyak.Average(live, schedule)
    for t in range(1, steps + 1):
        live["wave"][0], live["wave"][1] = math.cos(frequency * t), math.sin(frequency * t)
        average.update()
    return float(average.tensors["wave"].square().sum())


@pytest.mark.parametrize(
    "schedule",
    [
        polyak.Exponential(decay=0.9),
        polyak.Exponential(decay=0.99, debias=False),
        polyak.Power(sigma_rel=0.05),
        polyak.Power(sigma_rel=0.15),
        polyak.Uniform(),
        polyak.Polynomial(8),
        polyak.CountRamp(0.99),
        polyak.InverseGamma(),
        polyak.HalfLifeRamp(0.05, half_life=30),
    ],
    ids=repr,
)
def test_a_sinusoid_at_the_cutoff_is_damped_to_half_its_power(schedule: polyak.Schedule) -> None:
    """An average is a low-pass filter, and `profile` says where it cuts; slower ones pass."""
    steps = 1_500
    cutoff = polyak.profile(schedule, range(1, steps + 1)).cutoff
    assert cutoff is not None

    assert power_of_a_sinusoid(schedule, cutoff, steps) == pytest.approx(0.5, rel=0.01)
    assert power_of_a_sinusoid(schedule, cutoff / 4, steps) > 0.9
    assert power_of_a_sinusoid(schedule, 4 * cutoff, steps) < 0.25


@pytest.mark.parametrize("decay", [0.9, 0.99])
def test_the_cutoff_of_an_exponential_is_its_closed_form(decay: float) -> None:
    """arccos(1 - (1 - decay)^2 / (2 decay)): there a sinusoid has half its power left."""
    cutoff = math.acos(1 - (1 - decay) ** 2 / (2 * decay))

    assert power_of_a_sinusoid(
        polyak.Exponential(decay=decay, debias=False), cutoff, 2_500
    ) == pytest.approx(0.5, rel=0.01)


# ── the numbers of other libraries ───────────────────────────────────────────────────────────────


def tensorflow_run(
    schedule: polyak.Schedule, *, first_at: list[float], updates: int
) -> npt.NDArray[np.float64]:
    """A variable that grows by [1, 2] before each apply; the average starts at its first apply."""
    live = {"v": torch.tensor(first_at, dtype=torch.float64)}
    average = polyak.Average(live, schedule)  # TensorFlow's first apply: it creates a copy
    seen = [average.tensors["v"].clone()]
    for _ in range(updates):
        live["v"].add_(torch.tensor([1.0, 2.0], dtype=torch.float64))
        average.update()
        seen.append(average.tensors["v"].clone())
    return torch.stack(seen).numpy()


def test_exponential_is_that_of_tensorflow() -> None:
    """TensorFlow 2.21, decay 0.99; its first `apply` is polyak's construction.

    The first apply copies the variable, as building an `Average` does; each further one is an
    update. Hence `debias=False`: the copy is a starting value that is meant to count.
    """
    expected = [[1.0, 2.0], [1.01, 2.02], [1.0299, 2.0598], [1.0596010, 2.1192019]]
    expected.append([1.0990049, 2.1980097])

    found = tensorflow_run(
        polyak.Exponential(decay=0.99, debias=False), first_at=[1.0, 2.0], updates=4
    )

    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_exponential_is_that_of_tensorflow_from_zero() -> None:
    """First applied while still at [0, 0]: built there, then updated."""
    expected = [[0.0, 0.0], [0.01, 0.02], [0.0299, 0.0598], [0.0596010, 0.1192019]]

    found = tensorflow_run(
        polyak.Exponential(decay=0.99, debias=False), first_at=[0.0, 0.0], updates=3
    )

    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_count_ramp_is_that_of_tensorflow() -> None:
    """With num_updates 0, 1, 2, 3, 4: polyak's `now` is TensorFlow's `num_updates`.

    The apply with num_updates=0 creates the average and has no decay. It is the construction, at
    now = 0; so the update at now = 1 has the decay of num_updates=1, (1 + 1) / (10 + 1), and the
    two clocks are the same from there on.
    """
    expected = [[1.0, 2.0], [1.8181818, 3.6363635], [2.7045455, 5.4090910], [3.6013987, 7.2027974]]
    expected.append([4.5004997, 9.0009994])

    found = tensorflow_run(polyak.CountRamp(0.99), first_at=[1.0, 2.0], updates=4)

    np.testing.assert_allclose(found, expected, rtol=1e-6)


def wrapper_run(
    path: npt.NDArray[np.float64],
    *,
    beta: float,
    update_after_step: int,
    update_every: int,
    inv_gamma: float,
    power: float,
    min_value: float,
) -> list[float]:
    """The wrapper of SYSTEMS S4 on one weight, as it is described there, call by call."""
    average, seen = 0.0, []
    for step, weight in enumerate(path.tolist(), start=1):
        if step % update_every == 0:
            if step <= update_after_step:
                average = weight
            else:
                e = max(0, step - update_after_step - 1)
                decay = 1 - (1 + e / inv_gamma) ** -power if e > 0 else 0.0
                decay = min(max(decay, min_value), beta) if e > 0 else 0.0
                average = decay * average + (1 - decay) * weight
        seen.append(average)
    return seen


@pytest.mark.parametrize(
    ("beta", "inv_gamma", "power", "start"),
    [(0.9999, 1.0, 2 / 3, 100), (0.9, 1.0, 0.75, 20), (0.98, 5.0, 1.0, 0), (1.0, 1.0, 1.0, 30)],
)
def test_the_wrapper_with_warm_up_is_an_inverse_gamma_after_its_start(
    beta: float, inv_gamma: float, power: float, start: int
) -> None:
    """S4 with `update_every=1`: both copy up to and including update start + 1."""
    path = np.random.default_rng(4).standard_normal(400)
    live = {"w": torch.zeros((), dtype=torch.float64)}
    inner = polyak.InverseGamma(inv_gamma, power=power, max_decay=beta)
    average = polyak.Average(live, polyak.After(start, inner) if start else inner)

    found = []
    for weight in path.tolist():
        live["w"].fill_(weight)
        average.update()
        found.append(average.tensors["w"].item())

    expected = wrapper_run(
        path,
        beta=beta,
        update_after_step=start,
        update_every=1,
        inv_gamma=inv_gamma,
        power=power,
        min_value=0.0,
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_the_wrapper_with_an_interval_is_a_function() -> None:
    """S4 with `update_every=10` applies the decay of one step for ten: its own law, not ours.

    A polyak schedule would take ten steps' worth at once; the wrapper's rule is a plain function.
    """
    path = np.random.default_rng(5).standard_normal(600)

    def rule(*, now: float, elapsed: float) -> float:
        e = max(0.0, now - 100 - 1)
        return min(1 - (1 + e) ** (-2 / 3), 0.9999) if now > 100 else 0.0

    live = {"w": torch.zeros((), dtype=torch.float64)}
    average = polyak.Average(live, rule)
    found = []
    for step, weight in enumerate(path.tolist(), start=1):
        live["w"].fill_(weight)
        if step % 10 == 0:
            average.update(step)
        found.append(average.tensors["w"].item())

    expected = wrapper_run(
        path,
        beta=0.9999,
        update_after_step=100,
        update_every=10,
        inv_gamma=1.0,
        power=2 / 3,
        min_value=0.0,
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("power", "decay", "steps"),
    [
        (2 / 3, 0.999, 31_622),
        (2 / 3, 0.9999, 999_999),
        (0.75, 0.999, 9_999),
        (0.75, 0.9999, 215_443),
    ],
)
def test_the_warm_up_reaches_its_decays_when_the_wrapper_says(
    power: float, decay: float, steps: int
) -> None:
    """S4: 31.6 k and 1 M steps with power 2/3, 10 k and 215.4 k with 3/4."""
    schedule = polyak.InverseGamma(power=power, max_decay=1.0)

    assert schedule(now=steps + 2, elapsed=1) >= decay - 1e-12
    assert schedule(now=steps - 2, elapsed=1) < decay


# ── what averaging cannot do ─────────────────────────────────────────────────────────────────────


def test_flat_directions_are_delayed_not_calmed() -> None:
    """Noise falls only where learning rate * curvature is above 1 - decay (SCIENCE 3.5)."""
    curvatures = torch.tensor([0.2, 1e-4], dtype=torch.float64)
    decay, steps = 0.99, 600
    laws = [variance_ratio(decay, 1 - float(c)) for c in curvatures]
    noise = Noise((1 - curvatures)[:, None], (2, REPLICAS), seed=6)
    average = polyak.Average(noise.live, polyak.Exponential(decay=decay))
    for _ in range(steps):
        noise.step()
        average.update()

    variances = average.tensors["x"].var(dim=1).tolist()
    assert laws[0] < 0.06
    assert laws[1] > 0.98
    assert variances == pytest.approx(laws, rel=0.05)


@pytest.mark.parametrize(
    ("schedule", "lag"),
    [
        (polyak.Exponential(decay=0.99, debias=False), lambda t: 99.0),
        (polyak.Uniform(), lambda t: (t - 1) / 2),
        (polyak.Polynomial(8), lambda t: (t - 1) / 10),
    ],
    ids=["exponential", "mean", "polynomial"],
)
def test_an_average_lags_behind_by_its_mean_age(
    schedule: polyak.Schedule, lag: Callable[[int], float]
) -> None:
    """On a ramp the lag is the mean age: decay / (1 - decay), (T - 1) / 2, (T - 1) / (eta + 2)."""
    live = {"w": torch.zeros((), dtype=torch.float64)}
    average = polyak.Average(live, schedule)
    for step in range(1, 3_001):
        live["w"].fill_(step)
        average.update()

    assert 3_000 - average.tensors["w"].item() == pytest.approx(lag(3_000), rel=1e-9)
    assert average.report().mean_age == pytest.approx(lag(3_000), rel=1e-9)
