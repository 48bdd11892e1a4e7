"""The bias-corrected average: an average moved on by a share of the way from the start."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak
from zoo import ZOO, Animal, bits, train_step


@pytest.mark.parametrize("unit", [1, 32])
@pytest.mark.parametrize("last", [1, 3, 10, 50])
def test_on_a_noiseless_quadratic_it_is_the_optimum(last: int, unit: int) -> None:
    """mean(x_0 .. x_(T-1)) + (x_T - x_0) / (eta lam T) = optimum, for every T (SCIENCE 5.1).

    With power 1 the share is 1 / (offset + T), which is 1 / (eta lam T) for
    offset = (eta lam - 1) T. Above 0 that needs eta lam > 1: steps that overshoot, up to 2.
    """
    rate, optimum, start = 1.7, 3.0, 12.0
    live = {"w": torch.full((), start, dtype=torch.float64)}
    average = polyak.Average(live, polyak.Uniform())
    first = average.weights()
    position = start
    for step in range(1, last + 1):
        # The mean is of x_0 .. x_(T-1): the weights before each step, so update before it.
        average.update(now=step * unit)
        position -= rate * (position - optimum)
        live["w"].fill_(position)
    share = 1.0 / (rate * last)
    found = polyak.bias_corrected(average, first, power=1.0, offset=1.0 / share - last, unit=unit)
    assert found["w"].item() == pytest.approx(optimum, rel=1e-12)
    assert abs(average.weights()["w"].item() - optimum) > 0.1  # the plain mean is not


@pytest.mark.parametrize("power", [0.2, 0.5, 2.0])
@pytest.mark.parametrize("offset", [0.5, 10.0])
@pytest.mark.parametrize("origin", [0, 1_000])
@pytest.mark.parametrize("unit", [1, 64])
def test_the_formula_holds_for_any_average(
    power: float, offset: float, origin: int, unit: int
) -> None:
    """average + (offset + steps since the start) ** -power * (live - start), in float64."""
    live = {"w": torch.zeros(5, dtype=torch.float64)}
    live["w"].normal_()
    average = polyak.Average(live, polyak.Exponential(half_life=7 * unit), now=origin)
    start = average.weights()
    before = live["w"].clone()
    for step in range(1, 31):
        live["w"].normal_()
        average.update(now=origin + unit * step)
    found = polyak.bias_corrected(average, start, power=power, offset=offset, unit=unit)
    wanted = average.weights()["w"] + (offset + 30) ** -power * (live["w"] - before)
    torch.testing.assert_close(found["w"], wanted, rtol=1e-14, atol=1e-14)


def test_a_share_of_nothing_is_the_average() -> None:
    """As `power` grows the correction fades: bit for bit the average when it is below rounding."""
    model = nn.Linear(3, 2)
    average = polyak.Average(model)
    start = average.weights()
    for _ in range(20):
        nn.init.normal_(model.weight)
        average.update()
    found = polyak.bias_corrected(average, start, power=100.0)
    assert bits(found) == bits(average.weights())


def test_the_share_for_weights_that_did_not_move_is_nothing() -> None:
    """Whatever its size: live == start."""
    live = {"w": torch.randn(4)}
    average = polyak.Average(live, polyak.Uniform())
    start = average.weights()
    before = live["w"].clone()
    for _ in range(5):
        live["w"].normal_()
        average.update()
    live["w"].copy_(before)
    found = polyak.bias_corrected(average, start, power=0.2)
    assert torch.equal(found["w"], average.weights()["w"])


def test_steps_count_from_a_reset_not_from_zero() -> None:
    """Burn-in, reset, start anew: the same as a run that begins there (a trap of SCIENCE 5.1)."""
    results = []
    for burn_in in (0, 500):
        torch.manual_seed(1)
        live = {"w": torch.zeros(3, dtype=torch.float64)}
        average = polyak.Average(live, polyak.Uniform())
        for _ in range(burn_in):
            average.update()
        average.reset()
        start = average.weights()
        for _ in range(8):
            live["w"].normal_()
            average.update()
        results.append(polyak.bias_corrected(average, start)["w"])
    assert torch.equal(*results)


def test_a_step_that_the_device_skipped_does_not_count() -> None:
    """The clock is asked for after what the device did is known."""
    results = []
    for skips in ([0.0, 0.0, 1.0], [0.0, 0.0]):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        average = polyak.Average(model, polyak.Uniform())
        average.follow(optimizer)
        start = average.weights()
        for skip in skips:
            optimizer.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            optimizer.found_inf = torch.tensor(skip)  # type: ignore[attr-defined]
            optimizer.grad_scale = None  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
        results.append(polyak.bias_corrected(average, start, power=0.5))
    assert bits(results[0]) == bits(results[1])


@pytest.mark.parametrize("animal", ZOO, ids=lambda animal: animal.name)
def test_every_tensor_is_the_full_set_and_only_trained_ones_are_moved(animal: Animal) -> None:
    """Tied, frozen, complex and narrow: by name, with buffers those of the average."""
    model, generator = animal.build(), torch.Generator().manual_seed(0)
    average = polyak.Average(model, polyak.Uniform())
    start = average.weights()
    for _ in range(6):
        train_step(model, animal.inputs(), generator)
        average.update()
    plain = average.weights()
    found: dict[str, Any] = polyak.bias_corrected(  # extra state is no tensor
        average, start, power=0.5, offset=3.0
    )
    trained = {
        name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    assert set(found) == set(plain)
    state = model.state_dict()
    share = 9.0**-0.5
    for name, value in found.items():
        if not isinstance(value, Tensor):
            continue
        assert value.dtype == plain[name].dtype
        if name not in trained:
            assert torch.equal(value, plain[name]), name
            continue
        wide = torch.complex128 if value.is_complex() else torch.float64
        slots = average.tensors
        stored = slots[name] if name in slots else plain[name]
        wanted = stored.to(wide) + share * (state[name].to(wide) - start[name].to(wide))
        torch.testing.assert_close(value, wanted.to(value.dtype))
    assert bits({n: v for n, v in average.weights().items() if isinstance(v, Tensor)}) == bits(
        {n: v for n, v in plain.items() if isinstance(v, Tensor)}
    )


def test_inside_applied_it_is_what_it_is_outside() -> None:
    """The trained weights are what counts, though the model holds averaged ones."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = polyak.Average(model, polyak.Uniform())
    start = average.weights()
    for _ in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        model(torch.randn(8, 3))
        average.update()
    outside = polyak.bias_corrected(average, start)
    before = bits(model)
    with average.applied():
        lent = bits(model)
        inside = polyak.bias_corrected(average, start)
        assert bits(model) == lent
    assert bits(inside) == bits(outside)
    assert bits(model) == before


def test_it_works_for_a_window_and_for_a_member() -> None:
    live = {"w": torch.zeros(2, dtype=torch.float64)}
    window = polyak.Window(live, 3)
    averages = polyak.Averages(live, {"a": polyak.Uniform(), "b": polyak.Power(gamma=2)})
    start = window.weights()
    for step in range(1, 7):
        live["w"].fill_(step)
        window.update()
        averages.update()
    for average, plain in ((window, 5.0), (averages["a"], 3.5)):
        found = polyak.bias_corrected(average, start, power=0.5)["w"]
        torch.testing.assert_close(found, torch.full((2,), plain + 6.0 / 4.0).double())


def running() -> tuple[polyak.Average, dict[str, Tensor]]:
    live = {"w": torch.zeros(3), "v": torch.zeros(2)}
    average = polyak.Average(live, polyak.Uniform())
    start = average.weights()
    live["w"].fill_(1.0)
    average.update()
    return average, start


@pytest.mark.parametrize("name", ["power", "offset", "unit"])
@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, math.inf, "1", None])
def test_values_out_of_range_are_refused(name: str, value: Any) -> None:
    """power=0 would add the whole way, not nothing, so it is an error (a trap of SCIENCE 5.1)."""
    average, start = running()
    with pytest.raises(polyak.ArgumentError, match=f"{name} must be"):
        polyak.bias_corrected(average, start, **{name: value})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda start: start.pop("v"), "'v'"),
        (lambda start: start.update(v=torch.zeros(3)), "'v'"),
        (lambda start: start.update(v=torch.zeros(2, dtype=torch.complex64)), "'v'"),
        (lambda start: start.update(v=[0.0, 0.0]), "'v'"),
        (lambda start: start.update(v=torch.full((2,), math.nan)), "'v'"),
        (dict.clear, "'v'"),
    ],
    ids=["missing", "shape", "complex", "list", "nan", "empty"],
)
def test_a_start_of_another_model_is_refused(spoil: Callable[[Any], object], says: str) -> None:
    average, start = running()
    spoil(start)
    with pytest.raises(polyak.AveragingError, match=says):
        polyak.bias_corrected(average, start)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_live_weights_that_are_not_finite_do_not_get_in(value: float) -> None:
    """The average holds back what is not finite; so must what is made of it."""
    live = {"w": torch.zeros(3)}
    average = polyak.Average(live, polyak.Uniform())
    start = average.weights()
    live["w"].copy_(torch.tensor([1.0, value, 1.0]))
    average.update()
    assert average.weights()["w"].isfinite().all()
    with pytest.raises(polyak.ArgumentError, match="'w'"):
        polyak.bias_corrected(average, start)


@pytest.mark.parametrize("average", [nn.Linear(2, 1), None, {"w": torch.zeros(3)}])
def test_what_is_no_average_is_refused(average: Any) -> None:
    with pytest.raises(polyak.ArgumentError, match="average must be"):
        polyak.bias_corrected(average, {})


def test_several_averages_are_refused_with_the_way_to_one() -> None:
    averages = polyak.Averages({"w": torch.zeros(3)}, {"a": polyak.Uniform()})
    with pytest.raises(polyak.ArgumentError, match=r"averages\['a'\]"):
        polyak.bias_corrected(averages, {})  # type: ignore[arg-type]


def test_what_the_live_dtype_cannot_hold_is_refused() -> None:
    """float16 ends at 65504: an average of 60 000 moved on by a share of 60 000 is beyond."""
    live = {"w": torch.zeros(2, dtype=torch.float16)}
    average = polyak.Average(live, polyak.Uniform())
    start = average.weights()
    live["w"].fill_(60_000.0)
    average.update()
    with pytest.raises(polyak.ArgumentError, match=r"float16.*beyond its range"):
        polyak.bias_corrected(average, start, power=0.2, offset=1.0)
    assert average.weights()["w"].tolist() == [60_000.0, 60_000.0]
