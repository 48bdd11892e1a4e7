"""Statistics of normalisation layers, recomputed on data: exact, and kept with the average."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak

SIZES = [7, 32, 3, 20]  # batches of a loader that does not divide the data


def data(channels: int = 3, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1.0, channels + 1)
    return [torch.randn(n, channels, generator=generator) * scale + 5 * scale for n in SIZES]


def norm_net() -> nn.Sequential:
    """The norm comes first: it sees the data itself, so the answer is that of the data."""
    return nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9), nn.Linear(3, 2), nn.BatchNorm1d(2))


def pooled(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel, all values at once, in float64."""
    values = torch.cat([b.double().transpose(0, 1).reshape(b.shape[1], -1) for b in batches], dim=1)
    return values.mean(dim=1), values.var(dim=1, unbiased=True)


def everything(model: nn.Module) -> dict[str, Any]:
    """Tensors, modes and momenta: what a refresh must not leave changed."""
    state: dict[str, Any] = {n: t.clone() for n, t in model.state_dict().items()}
    for name, module in model.named_modules():
        state[f"{name} mode"] = module.training
        state[f"{name} momentum"] = getattr(module, "momentum", None)
        state[f"{name} hooks"] = len(module._forward_hooks)
    return state


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return set(a) == set(b) and all(
        torch.equal(a[n], b[n]) if isinstance(a[n], Tensor) else a[n] == b[n] for n in a
    )


@pytest.mark.parametrize("before", [0.0, 1e10, math.nan, math.inf])
@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
def test_statistics_are_those_of_all_values_pooled(momentum: float | None, before: float) -> None:
    """With unequal batches, whatever the buffers and the momentum were."""
    model = norm_net()
    norm = model[0]
    assert isinstance(norm, nn.BatchNorm1d)
    norm.momentum = momentum  # None is the cumulative mean
    norm.running_mean.fill_(before)  # type: ignore[union-attr]
    norm.running_var.fill_(before)  # type: ignore[union-attr]
    average = polyak.Average(model)

    assert polyak.refresh_norms(average, data()) == len(SIZES)

    mean, variance = pooled(data())
    weights = average.weights()
    torch.testing.assert_close(weights["0.running_mean"].double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(weights["0.running_var"].double(), variance, rtol=1e-6, atol=0)


def test_statistics_do_not_depend_on_what_was_there_before() -> None:
    """Two models that differ in their buffers only end with the same bits."""
    results = []
    for filler in (0.0, -3.0):
        model = norm_net()
        for key, tensor in model.state_dict().items():
            tensor.fill_(filler if "running" in key else 0.5 if tensor.is_floating_point() else 7)
        average = polyak.Average(model)
        polyak.refresh_norms(average, data())
        results.append({n: t for n, t in average.weights().items() if "running" in n})

    assert len(results[0]) == 4
    assert same(results[0], results[1])


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_images_are_pooled_over_all_their_pixels(offset: float) -> None:
    """A value is one pixel of one channel; a large mean does not drown the variance."""
    model = nn.Sequential(nn.BatchNorm2d(2)).double()
    batches = [
        torch.randn(n, 2, h, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        + offset
        for n, h in ((2, 3), (1, 5), (4, 1))
    ]
    average = polyak.Average(model)
    polyak.refresh_norms(average, batches)

    mean, variance = pooled(batches)
    torch.testing.assert_close(average.weights()["0.running_mean"], mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(average.weights()["0.running_var"], variance, rtol=1e-9, atol=0)


def test_a_narrow_model_gets_statistics_to_its_own_rounding() -> None:
    """A thousand batches in bfloat16 are summed in float64: one rounding, not a thousand."""
    model = nn.Sequential(nn.BatchNorm1d(1)).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(16, 1, generator=generator).bfloat16() + 1 for _ in range(1_000)]
    average = polyak.Average(model)
    polyak.refresh_norms(average, batches)

    mean, variance = pooled(batches)
    weights = average.weights()
    torch.testing.assert_close(weights["0.running_mean"].double(), mean, rtol=2**-8, atol=0)
    torch.testing.assert_close(weights["0.running_var"].double(), variance, rtol=2**-7, atol=0)


def test_a_shared_layer_pools_all_its_calls() -> None:
    """A norm that is met twice on the way sees twice the values."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.again = self.norm

        def forward(self, x: Tensor) -> Tensor:
            self.norm(x)
            out: Tensor = self.again(10 * x)
            return out

    average = polyak.Average(Twice())
    polyak.refresh_norms(average, data())

    mean, variance = pooled([b for batch in data() for b in (batch, 10 * batch)])
    for name in ("norm", "again"):
        weights = average.weights()
        torch.testing.assert_close(
            weights[f"{name}.running_mean"].double(), mean, rtol=1e-6, atol=0
        )
        torch.testing.assert_close(
            weights[f"{name}.running_var"].double(), variance, rtol=1e-6, atol=0
        )


def test_a_layer_may_be_called_by_keyword() -> None:
    """`norm(input=x)` is a call like any other."""

    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.norm(input=x)
            return out

    average = polyak.Average(ByKeyword())
    polyak.refresh_norms(average, data())

    mean, _ = pooled(data())
    torch.testing.assert_close(
        average.weights()["norm.running_mean"].double(), mean, rtol=1e-6, atol=0
    )


def test_statistics_are_those_of_the_averaged_weights() -> None:
    """The second norm sees what the averaged layer makes of the data, not the live one."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2))
    linear = model[0]
    assert isinstance(linear, nn.Linear)
    average = polyak.Average(model, polyak.Uniform())
    weights = [torch.randn(2, 3) for _ in range(4)]
    for weight in weights:
        with torch.no_grad():
            linear.weight.copy_(weight)
        average.update()

    polyak.refresh_norms(average, data())

    mean, variance = pooled([b @ torch.stack(weights).mean(0).t() for b in data()])
    found = average.weights()
    torch.testing.assert_close(found["1.running_mean"].double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["1.running_var"].double(), variance, rtol=1e-4, atol=0)


# ── what stays as it was ─────────────────────────────────────────────────────────────────────────


def test_the_live_model_is_untouched() -> None:
    """Weights, statistics, counters, modes, momenta and hooks; training mode or not."""
    for training in (True, False):
        model = norm_net().train(training)
        average = polyak.Average(model)
        before = everything(model)

        polyak.refresh_norms(average, data())

        assert same(everything(model), before)


class Broken:
    """A loader that fails after two batches."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __iter__(self) -> Iterator[Tensor]:
        yield from data()[:2]
        raise self.error


@pytest.mark.parametrize("error", [ValueError("bad file"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("of_model", [True, False], ids=["model", "average"])
def test_a_loader_that_fails_changes_nothing(error: BaseException, of_model: bool) -> None:
    """Its error comes through; statistics of an earlier refresh are still there."""
    model = norm_net()
    average = polyak.Average(model)
    polyak.refresh_norms(average, data(seed=9))
    before, kept = everything(model), average.weights()

    with pytest.raises(type(error)):
        polyak.refresh_norms(model if of_model else average, Broken(error))

    assert same(everything(model), before)
    assert same(average.weights(), kept)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches must yield at least one batch"),
        ([{"x": torch.zeros(2, 3)}], "batches must yield tensors.*got dict.*forward="),
        ([["text"]], "batches must yield tensors.*got list.*forward="),
    ],
    ids=["none", "dict", "text"],
)
def test_batches_that_cannot_be_used_are_refused(batches: list[Any], message: str) -> None:
    """And nothing is changed."""
    model = norm_net()
    average = polyak.Average(model)
    before, kept = everything(model), average.weights()

    with pytest.raises(polyak.ArgumentError, match=message):
        polyak.refresh_norms(average, batches)

    assert same(everything(model), before)
    assert same(average.weights(), kept)


def test_any_batch_goes_with_a_forward() -> None:
    """The function is given the model and the batch."""
    model = norm_net()
    average = polyak.Average(model)
    seen = []

    def forward(given: nn.Module, batch: dict[str, Tensor]) -> None:
        seen.append(given)
        given(batch["x"])

    assert polyak.refresh_norms(average, [{"x": b} for b in data()], forward=forward) == 4

    assert seen == [model] * 4
    torch.testing.assert_close(
        average.weights()["0.running_mean"].double(), pooled(data())[0], rtol=1e-6, atol=0
    )


def test_pairs_of_input_and_target_are_used_by_their_first() -> None:
    """As a `TensorDataset` yields them."""
    average = polyak.Average(norm_net())

    polyak.refresh_norms(average, [(b, torch.zeros(len(b))) for b in data()])

    torch.testing.assert_close(
        average.weights()["0.running_mean"].double(), pooled(data())[0], rtol=1e-6, atol=0
    )


def test_a_limit_stops_the_loader() -> None:
    """No batch beyond it is asked for."""
    average = polyak.Average(norm_net())

    assert polyak.refresh_norms(average, Broken(AssertionError("asked for more")), limit=2) == 2

    torch.testing.assert_close(
        average.weights()["0.running_mean"].double(), pooled(data()[:2])[0], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_must_allow_a_batch(limit: int) -> None:
    """Zero batches give no statistics."""
    with pytest.raises(polyak.ArgumentError, match="limit must be at least 1"):
        polyak.refresh_norms(polyak.Average(norm_net()), data(), limit=limit)


def test_a_model_without_norms_is_refused() -> None:
    """There is nothing to refresh, and saying so is better than a useless pass over the data."""
    with pytest.raises(polyak.ArgumentError, match="must have batch normalisation"):
        polyak.refresh_norms(polyak.Average(nn.Linear(3, 2)), data())


def test_named_tensors_are_refused() -> None:
    """There is no module to run."""
    with pytest.raises(polyak.ArgumentError, match="average of a module"):
        polyak.refresh_norms(polyak.Average({"w": torch.zeros(2)}), data())


def test_one_value_a_channel_is_refused_with_a_way_out() -> None:
    """The last batch of a loader without drop_last has one row now and then."""
    model = norm_net()
    average = polyak.Average(model)
    before, kept = everything(model), average.weights()

    with pytest.raises(polyak.ArgumentError, match="drop_last"):
        polyak.refresh_norms(average, [*data(), torch.zeros(1, 3)])

    assert same(everything(model), before)
    assert same(average.weights(), kept)


@pytest.mark.parametrize("every_norm", [True, False])
def test_frozen_norms_are_untouched(every_norm: bool) -> None:
    """A layer in evaluation mode in a model that trains is frozen on purpose."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].eval()
    if every_norm:
        model[2].eval()
    average = polyak.Average(model)
    before = average.weights()

    if every_norm:
        with pytest.raises(polyak.ArgumentError, match="nothing to refresh"):
            polyak.refresh_norms(average, data())
    else:
        polyak.refresh_norms(average, data())
        assert not torch.equal(average.weights()["2.running_mean"], before["2.running_mean"])

    for key in ("0.running_mean", "0.running_var"):
        assert torch.equal(average.weights()[key], before[key])
    assert not model[0].training


def test_all_norms_of_a_model_in_evaluation_are_refreshed() -> None:
    """There the mode says nothing: people call `eval()` before they evaluate."""
    average = polyak.Average(norm_net().eval())

    polyak.refresh_norms(average, data())

    torch.testing.assert_close(
        average.weights()["0.running_mean"].double(), pooled(data())[0], rtol=1e-6, atol=0
    )


# ── how long they are kept ───────────────────────────────────────────────────────────────────────


def test_statistics_are_used_by_everything_until_the_next_update() -> None:
    """applied, weights, copy_to; afterwards the averaged buffers count again."""
    model = norm_net()
    average = polyak.Average(model, polyak.Uniform())
    average.update()
    averaged = average.weights()["0.running_mean"]
    polyak.refresh_norms(average, data())
    refreshed = average.weights()["0.running_mean"]
    assert not torch.equal(refreshed, averaged)

    with average.applied():
        assert torch.equal(model.state_dict()["0.running_mean"], refreshed)
    assert torch.equal(model.state_dict()["0.running_mean"], averaged)
    other = norm_net()
    average.copy_to(other)
    assert torch.equal(other.state_dict()["0.running_mean"], refreshed)
    assert torch.equal(average.tensors["0.running_mean"], averaged)

    average.update()
    assert torch.equal(average.weights()["0.running_mean"], averaged)
    with average.applied():
        assert torch.equal(model.state_dict()["0.running_mean"], averaged)


def test_reset_forgets_them_too() -> None:
    """They belonged to weights that are gone."""
    model = norm_net()
    average = polyak.Average(model)
    polyak.refresh_norms(average, data())

    average.reset()

    assert torch.equal(average.weights()["0.running_mean"], torch.zeros(3))


def test_a_refresh_inside_applied_is_the_same() -> None:
    """People refresh where they evaluate; the block then computes with the new statistics."""
    model = norm_net()
    average = polyak.Average(model)
    polyak.refresh_norms(average, data())
    outside = average.weights()
    average.reset()
    before = everything(model)

    with average.applied():
        polyak.refresh_norms(average, data())
        assert torch.equal(model.state_dict()["0.running_mean"], outside["0.running_mean"])

    assert same(average.weights(), outside)
    assert same(everything(model), before)


def test_each_average_has_its_own() -> None:
    """Of several from one read, the one that was given."""
    averages = polyak.Averages(
        norm_net(), {"a": polyak.Uniform(), "b": polyak.Exponential(decay=0.9)}
    )

    polyak.refresh_norms(averages["b"], data())

    assert torch.equal(averages["a"].weights()["0.running_mean"], torch.zeros(3))
    assert not torch.equal(averages["b"].weights()["0.running_mean"], torch.zeros(3))


def test_a_window_keeps_them_until_its_next_update() -> None:
    """A window is used like an average."""
    model = norm_net()
    window = polyak.Window(model, 2)
    window.update()
    polyak.refresh_norms(window, data())
    torch.testing.assert_close(
        window.weights()["0.running_mean"].double(), pooled(data())[0], rtol=1e-6, atol=0
    )

    window.update()

    assert torch.equal(window.weights()["0.running_mean"], torch.zeros(3))


def test_a_model_is_refreshed_in_place() -> None:
    """Its statistics become those of the data; weights, counters and modes stay."""
    model = norm_net()
    before = everything(model)

    assert polyak.refresh_norms(model, data()) == 4

    after = everything(model)
    mean, variance = pooled(data())
    torch.testing.assert_close(after["0.running_mean"].double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(after["0.running_var"].double(), variance, rtol=1e-6, atol=0)
    assert same(
        {n: v for n, v in after.items() if "running" not in n},
        {n: v for n, v in before.items() if "running" not in n},
    )
