"""NaN and infinities of the live weights never enter the average, and are counted by name."""

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import polyak

BAD = [math.nan, math.inf, -math.inf]
SHAPES = {"a": (4, 5), "b": (7,), "c": (2, 3)}
INCIDENT, CLEAN = 6, 500


def one_element(live: dict[str, Tensor], bad: float) -> dict[str, Tensor]:
    hit = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    hit["a"][1, 2] = True
    return hit


def one_tensor(live: dict[str, Tensor], bad: float) -> dict[str, Tensor]:
    return {n: torch.full(shape, n == "b", dtype=torch.bool) for n, shape in SHAPES.items()}


def all_weights(live: dict[str, Tensor], bad: float) -> dict[str, Tensor]:
    return {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}


Incident = Callable[[dict[str, Tensor], float], dict[str, Tensor]]


def trained(
    schedule: polyak.Schedule,
    *,
    stored: torch.dtype | None,
    live_dtype: torch.dtype,
    incident: Incident | None,
    bad: float,
    steps: int = INCIDENT + CLEAN,
) -> polyak.Average:
    """A run of random weights, with one bad step in it or without, then good ones."""
    generator = torch.Generator().manual_seed(1)
    live = {name: torch.zeros(shape, dtype=live_dtype) for name, shape in SHAPES.items()}
    average = polyak.Average(live, schedule, dtype=stored)
    for step in range(1, steps + 1):
        for tensor in live.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        if step == INCIDENT and incident is not None:
            for name, hit in incident(live, bad).items():
                live[name][hit] = bad
        average.update()
    return average


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("incident", [one_element, one_tensor, all_weights])
def test_one_bad_step_leaves_no_trace_elsewhere(incident: Incident, bad: float) -> None:
    """500 steps later all is finite, and elements never hit have the bits of a run without it."""
    schedule = polyak.Exponential(decay=0.99, debias=False)
    hurt, clean = (
        trained(schedule, stored=None, live_dtype=torch.float32, incident=which, bad=bad)
        for which in (incident, None)
    )

    for name, hit in incident({}, bad).items():
        assert torch.isfinite(hurt.tensors[name]).all()
        assert torch.equal(hurt.tensors[name][~hit], clean.tensors[name][~hit])
        # Where it hit, the average kept its value for one step: 0.01 * 0.99**500 of a few units.
        torch.testing.assert_close(hurt.tensors[name], clean.tensors[name], rtol=0, atol=1e-3)
    counts = {name: int(hit.sum()) for name, hit in incident({}, bad).items() if hit.any()}
    assert hurt.report().nonfinite == counts
    assert clean.report().nonfinite == {}
    assert (hurt.now, hurt.updates) == (clean.now, clean.updates)
    for name, count in counts.items():
        assert f"{name}: {count:,} elements" in str(hurt.report())


@pytest.mark.parametrize(
    ("stored", "live_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float64, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float64),
        (torch.float8_e5m2, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
        (None, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("bad", BAD)
def test_every_storage_is_guarded(
    stored: torch.dtype | None, live_dtype: torch.dtype, bad: float
) -> None:
    """The guard sees what the storage would hold, whatever it is cast from."""
    hurt, clean = (
        trained(
            polyak.Exponential(decay=0.6),
            stored=stored,
            live_dtype=live_dtype,
            incident=which,
            bad=bad,
            steps=20,
        )
        for which in (one_element, None)
    )

    assert hurt.report().nonfinite == {"a": 1}
    for name, hit in one_element({}, bad).items():
        a, b = hurt.tensors[name].float(), clean.tensors[name].float()
        assert torch.isfinite(a).all()
        assert torch.equal(a[~hit], b[~hit])


@pytest.mark.parametrize(
    "schedule",
    [polyak.Uniform(), polyak.Power(sigma_rel=0.05), polyak.After(100, polyak.Uniform())],
    ids=repr,
)
def test_a_bad_first_update_does_not_copy(schedule: polyak.Schedule) -> None:
    """Also where the decay is 0 and the update is a copy."""
    live = {"w": torch.tensor([1.0, 2.0])}
    average = polyak.Average(live, schedule)
    live["w"].copy_(torch.tensor([math.nan, 5.0]))

    average.update()

    assert average.tensors["w"].tolist() == [1.0, 5.0]


@pytest.mark.parametrize("bad", BAD)
def test_complex_weights_are_guarded(bad: float) -> None:
    """A complex element is bad when either of its parts is."""
    live = {"z": torch.ones(3, dtype=torch.complex64)}
    average = polyak.Average(live, lambda *, now, elapsed: 0.5)
    live["z"].copy_(torch.tensor([3.0, complex(3.0, bad), complex(bad, 3.0)]))

    average.update()

    assert average.tensors["z"].tolist() == [2.0, 1.0, 1.0]
    assert average.report().nonfinite == {"z": 2}


@pytest.mark.parametrize("bad", BAD)
def test_raise_refuses_before_anything_is_touched(bad: float) -> None:
    """With the name and the count; the next good step goes on as if nothing had been."""
    live = {"a": torch.zeros(2), "b": torch.zeros(5)}
    average = polyak.Average(live, lambda *, now, elapsed: 0.5, nonfinite="raise")
    live["a"].fill_(1.0)
    live["b"][1:3] = bad

    with pytest.raises(polyak.ArgumentError, match=r"live weights must be finite .*'b' \(2\)"):
        average.update()

    assert (average.now, average.updates) == (0, 0)
    assert torch.equal(average.tensors["a"], torch.zeros(2))
    assert torch.equal(average.tensors["b"], torch.zeros(5))
    live["b"].fill_(2.0)
    average.update()
    assert average.tensors["b"].tolist() == [1.0] * 5


def test_raise_judges_what_the_storage_would_hold() -> None:
    """A finite value beyond the storage would become inf there."""
    live = {"w": torch.ones(2)}
    average = polyak.Average(live, polyak.Uniform(), dtype=torch.float16, nonfinite="raise")
    live["w"][0] = 70_000.0

    with pytest.raises(polyak.ArgumentError, match=r"'w' \(1\)"):
        average.update()

    assert average.tensors["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bad", BAD)
def test_ignore_lets_everything_through(bad: float) -> None:
    """As the bare formula does: for those who want to see it."""
    live = {"w": torch.ones(2)}
    average = polyak.Average(live, lambda *, now, elapsed: 0.5, nonfinite="ignore")
    live["w"].copy_(torch.tensor([bad, 3.0]))

    average.update()

    assert not torch.isfinite(average.tensors["w"][0])
    assert average.tensors["w"][1] == 2.0
    assert average.report().nonfinite == {}


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_mask_of_minus_infinity_is_no_incident(nonfinite: Literal["skip", "raise"]) -> None:
    """An attention mask in a buffer stays what it is; the rest of it is averaged."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2))
    model.register_buffer("mask", torch.tensor([0.0, -math.inf, 2.0]))
    average = polyak.Average(
        model, polyak.Exponential(decay=0.5, debias=False), nonfinite=nonfinite
    )
    assert isinstance(model.mask, Tensor)
    model.mask[2] = 4.0

    average.update()
    average.update()

    mask = average.tensors["mask"]
    assert mask.tolist() == [0.0, -math.inf, 3.5]
    assert average.report().nonfinite == {}
    assert average.weights()["mask"].tolist() == [0.0, -math.inf, 3.5]


def test_infinity_of_the_other_sign_is_an_incident() -> None:
    """The mask keeps its value, and the report says that something came."""
    live = {"mask": torch.tensor([0.0, -math.inf])}
    average = polyak.Average(live, polyak.Exponential(decay=0.5))
    live["mask"][1] = math.inf

    average.update()

    assert average.tensors["mask"].tolist() == [0.0, -math.inf]
    assert average.report().nonfinite == {"mask": 1}


def test_a_model_built_with_nan_heals() -> None:
    """The first finite value replaces it; from there the element is averaged as usual."""
    live = {"w": torch.tensor([math.nan, math.inf, 0.0])}
    average = polyak.Average(live, lambda *, now, elapsed: 0.5)

    average.update()
    assert not torch.isfinite(average.tensors["w"][:2]).any()
    live["w"].copy_(torch.tensor([4.0, math.nan, 4.0]))
    average.update()
    assert average.tensors["w"][0] == 4.0
    assert average.tensors["w"][2] == 2.0
    live["w"].copy_(torch.tensor([2.0, 8.0, 2.0]))
    average.update()
    average.update()
    assert average.tensors["w"].tolist() == [2.5, 8.0, 2.0]


def test_huge_finite_values_are_no_incident() -> None:
    """Averages of opposite extremes stay finite and are not counted."""
    top = float(torch.finfo(torch.float32).max)
    live = {"w": torch.tensor([top, -top, 1.0])}
    average = polyak.Average(live, lambda *, now, elapsed: 0.5)
    live["w"].copy_(torch.tensor([-top, top, 3.0]))

    average.update()

    assert average.tensors["w"].tolist() == [0.0, 0.0, 2.0]
    assert average.report().nonfinite == {}


@pytest.mark.parametrize("where", [0, 1_048_575, 1_048_576, 1_500_000])
def test_a_large_tensor_is_guarded_in_every_block(where: int) -> None:
    """One NaN at the start, at the seam of two blocks, or at the end."""
    live = {"w": torch.zeros(1_500_001)}
    average = polyak.Average(live, lambda *, now, elapsed: 0.5)
    live["w"].fill_(2.0)
    live["w"][where] = math.nan

    average.update()

    expected = torch.ones(1_500_001)
    expected[where] = 0.0
    assert torch.equal(average.tensors["w"], expected)
    assert average.report().nonfinite == {"w": 1}


def test_incidents_are_added_up_over_steps_and_averages() -> None:
    """Counted once a step, however many averages read the weights; forgotten by reset."""
    live = {"w": torch.zeros(4)}
    averages = polyak.Averages(live, {"a": polyak.Uniform(), "b": polyak.Power(sigma_rel=0.1)})
    for bad in (1, 2, 3):
        live["w"].fill_(float(bad))
        live["w"][:bad] = math.nan
        averages.update()

    assert averages["a"].report().nonfinite == averages["b"].report().nonfinite == {"w": 6}
    live["w"].zero_()
    averages.reset()
    assert averages["a"].report().nonfinite == {}


def test_nonfinite_must_be_one_of_three_words() -> None:
    """Anything else is refused at construction."""
    with pytest.raises(polyak.ArgumentError, match=r"nonfinite must be .*got 'warn'"):
        polyak.Average({"w": torch.zeros(1)}, nonfinite="warn")  # type: ignore[arg-type]
