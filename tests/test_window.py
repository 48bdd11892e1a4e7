"""The mean of the last k captures: exact, and used like any other average."""

import math
from collections import deque
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import polyak


def exact_mean(captures: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The mean of exact fractions, element by element, rounded once."""
    parts = [torch.view_as_real(c) if c.is_complex() else c for c in captures]
    flat = [part.double().reshape(-1).tolist() for part in parts]
    means = [float(sum(map(Fraction, values)) / len(values)) for values in zip(*flat, strict=True)]
    real = torch.tensor(means, dtype=torch.float64).reshape(parts[0].shape)
    return (torch.view_as_complex(real) if dtype.is_complex else real).to(dtype)


@pytest.mark.parametrize("k", [1, 2, 5, 50])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64],
    ids=lambda d: str(d)[6:],
)
def test_a_window_is_the_mean_of_a_deque(dtype: torch.dtype, k: int) -> None:
    """At every step, also before it is full: exact, and rounded once to storage dtype."""
    generator = torch.Generator().manual_seed(k)
    live = {"w": torch.zeros(40, dtype=dtype)}
    window, captures = polyak.Window(live, k), deque[Tensor](maxlen=k)

    for step in range(1, 61):
        scale = 10.0 ** float(torch.randint(-3, 4, (), generator=generator))
        live["w"].copy_(torch.randn(40, dtype=torch.float64, generator=generator) * scale)
        captures.append(live["w"].clone())
        assert window.update() is True
        assert window.filled == min(step, k) == len(captures)
        stored = window.tensors["w"]
        exact = exact_mean(list(captures), stored.dtype)
        # The sum is one of float64: what is stored in less has the bits of the exact mean.
        slack = 1e-15 * max(float(c.abs().max()) for c in captures)
        torch.testing.assert_close(
            stored, exact, rtol=0, atol=slack if dtype == torch.float64 else 0.0
        )
        assert torch.equal(window.weights()["w"], stored.to(dtype))


@pytest.mark.parametrize(
    ("every", "times", "captured"),
    [
        (1, [1, 2, 3], [1, 2, 3]),
        (4, [1, 2, 3, 4, 5, 7, 8, 9, 12], [4, 8, 12]),
        (4, [3, 6, 7, 9, 17, 18, 19, 20], [6, 9, 17, 20]),
        (10, [9.5, 10.5, 19.0, 40.0, 49.0, 50.0], [10.5, 40.0, 50.0]),
        (0.5, [0.25, 0.5, 0.75, 1.25], [0.5, 1.25]),
        (100, [1, 2, 3], []),
    ],
)
@pytest.mark.parametrize("origin", [0, 3])
def test_captures_come_at_the_first_update_at_or_after_each_multiple(
    every: float, times: list[float], captured: list[float], origin: int
) -> None:
    """Of the time since construction; several multiples at once give one capture."""
    live = {"w": torch.zeros(1, dtype=torch.float64)}
    window = polyak.Window(live, 100, every, now=origin)

    found = []
    for time in times:
        live["w"].fill_(time)
        if window.update(origin + time):
            found.append(time)

    assert found == captured
    assert window.filled == len(captured)
    mean = sum(captured) / len(captured) if captured else 0.0
    assert window.weights()["w"].item() == pytest.approx(mean, abs=1e-12)
    assert (window.now, window.updates) == (origin + times[-1], len(times))


def test_until_the_first_capture_it_is_the_weights_at_construction() -> None:
    """There is nothing else yet; afterwards they do not count."""
    live = {"w": torch.full((2,), 7.0)}
    window = polyak.Window(live, 3, every=2)
    live["w"].fill_(1.0)

    window.update()
    assert window.weights()["w"].tolist() == [7.0, 7.0]
    assert window.report().initial_weight == 1.0
    window.update()
    assert window.weights()["w"].tolist() == [1.0, 1.0]
    assert window.report().initial_weight == 0.0


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_value_of_the_capture_before_stands_in_for_one_that_is_not_finite(
    k: int, bad: float
) -> None:
    """By element; the report counts it."""
    live = {"w": torch.zeros(2)}
    window = polyak.Window(live, k)
    held: list[list[float]] = []
    for step, bad_step in enumerate([False, False, True, True, False], start=1):
        live["w"].copy_(torch.tensor([10.0 * step, bad if bad_step else float(step)]))
        held.append([10.0 * step, held[-1][1] if bad_step else float(step)])
        window.update()
        expected = torch.tensor(held[-k:], dtype=torch.float64).mean(0).float()
        assert torch.equal(window.weights()["w"], expected)

    assert window.report().nonfinite == {"w": 2}


def test_a_bad_first_capture_stands_on_the_weights_at_construction() -> None:
    """No capture came before it."""
    live = {"w": torch.tensor([3.0, 4.0])}
    window = polyak.Window(live, 2)
    live["w"].copy_(torch.tensor([math.nan, 5.0]))

    window.update()

    assert window.weights()["w"].tolist() == [3.0, 5.0]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_refused_capture_changes_nothing(k: int) -> None:
    """With nonfinite="raise": ring, mean, times and clock are as before, and it can go on."""
    live = {"w": torch.zeros(1)}
    window = polyak.Window(live, k, nonfinite="raise")
    for step in (1.0, 2.0, 3.0):
        live["w"].fill_(step)
        window.update()
    before = (window.weights()["w"].item(), window.filled, window.now, window.updates)
    ring = [t.clone() for c in window.state_dict()["window"]["ring"] for t in c.values()]
    live["w"].fill_(math.nan)

    with pytest.raises(polyak.ArgumentError, match="must be finite"):
        window.update()

    assert (window.weights()["w"].item(), window.filled, window.now, window.updates) == before
    after = [t for c in window.state_dict()["window"]["ring"] for t in c.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, ring, strict=True))
    live["w"].fill_(4.0)
    window.update()
    assert window.weights()["w"].item() == sum([1.0, 2.0, 3.0, 4.0][-k:]) / k


def test_a_refused_time_changes_nothing() -> None:
    """As for every average."""
    live = {"w": torch.ones(1)}
    window = polyak.Window(live, 2)
    window.update(5)
    live["w"].fill_(9.0)

    for now in (5, 4, 0):
        with pytest.raises(polyak.OrderError, match="now must be above 5"):
            window.update(now)

    assert (window.now, window.updates, window.filled) == (5, 1, 1)
    assert window.weights()["w"].item() == 1.0


@pytest.mark.parametrize("k", [0, -1, 2.0, "3", None])
def test_k_must_be_a_whole_number_of_captures(k: int) -> None:
    """Refused at construction."""
    with pytest.raises(polyak.ArgumentError, match="k must be a whole number"):
        polyak.Window({"w": torch.zeros(1)}, k)


@pytest.mark.parametrize("every", [0, -1, math.nan, math.inf])
def test_every_must_be_above_zero(every: float) -> None:
    """Refused at construction."""
    with pytest.raises(polyak.ArgumentError, match="every must be"):
        polyak.Window({"w": torch.zeros(1)}, 3, every)


def test_memory_is_that_of_the_captures() -> None:
    """Mean age and noise window of the k equal weights, by hand."""
    window = polyak.Window({"w": torch.zeros(1)}, 3, every=10, now=100)
    for now in (105, 110, 120, 130, 140, 143):
        window.update(now)

    report = window.report()

    assert report.mean_age == 143 - (120 + 130 + 140) / 3
    assert report.noise_window == pytest.approx(3.0, rel=1e-12)
    assert report.initial_weight == 0.0
    assert "Window(k=3, every=10)" in report.rule


def test_it_says_how_many_bytes_it_holds() -> None:
    """k captures and their mean: k + 1 models when full, no more however long it runs."""
    window = polyak.Window({"w": torch.zeros(1_000)}, 4)
    sizes = []
    for _ in range(10):
        window.update()
        sizes.append(window.report().stored_bytes)

    assert sizes[3:] == [5 * 4_000] * 7
    assert sizes == sorted(sizes)


def test_it_is_lent_like_an_average() -> None:
    """applied, weights, copy_to and tensors agree; trained weights come back bit for bit."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    window = polyak.Window(model, 2)
    captures = []
    for _ in range(3):
        with torch.no_grad():
            model[0].weight.normal_()  # type: ignore[operator]
        model(torch.randn(5, 3))
        window.update()
        captures.append({n: t.clone() for n, t in model.state_dict().items()})
    trained, x = captures[-1], torch.randn(6, 3)
    mean = {
        name: torch.stack([c[name].double() for c in captures[-2:]]).mean(0).float()
        for name in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var")
    }

    with window.applied():
        for name, tensor in mean.items():
            assert torch.equal(model.state_dict()[name], tensor)
        lent = model.eval()(x)
        with pytest.raises(polyak.OrderError, match="update must come outside applied"):
            window.update()
        with pytest.raises(polyak.OrderError, match="reset must come outside applied"):
            window.reset()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[name])
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    window.copy_to(other)
    assert torch.equal(other.eval()(x), lent)
    fresh = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    fresh.load_state_dict(window.weights(), strict=True)
    assert torch.equal(fresh.eval()(x), lent)
    assert torch.equal(window.weights()["1.num_batches_tracked"], torch.tensor(3))


def test_captures_are_copies() -> None:
    """What happens to the live weights after a capture does not change it."""
    live = {"w": torch.ones(2)}
    window = polyak.Window(live, 2)
    window.update()

    live["w"].fill_(100.0)

    assert window.weights()["w"].tolist() == [1.0, 1.0]


def test_reset_forgets_all_captures() -> None:
    """It starts again from the live weights, with the phase of its captures."""
    live = {"w": torch.ones(1)}
    window = polyak.Window(live, 2, every=3)
    for _ in range(7):
        window.update()
    live["w"].fill_(5.0)

    window.reset(now=100)

    assert (window.filled, window.now, window.updates) == (0, 100, 0)
    assert window.weights()["w"].item() == 5.0
    assert [window.update() for _ in range(6)] == [False, False, True, False, False, True]


def test_an_exponential_with_the_same_noise_has_the_same_age() -> None:
    """decay = (k - 1) / (k + 1): what the docstring offers for the memory of one model."""
    window = polyak.Window({"w": torch.zeros(1)}, 21)
    average = polyak.Average({"w": torch.zeros(1)}, polyak.Exponential(decay=20 / 22))
    for _ in range(1_000):
        window.update()
        average.update()

    assert window.report().mean_age == pytest.approx(average.report().mean_age, rel=1e-9)
    assert window.report().noise_window == pytest.approx(average.report().noise_window, rel=1e-9)
