"""The average fed back into training: Switch EMA, Lookahead, hare and tortoise, a steady pull."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import polyak
from deep import differences

RATE = 0.1
A = 1.0 - RATE  # what a step leaves of the distance, at curvature 1
REPLICAS = 20_000  # the sampling error of a variance is then sqrt(2 / 20 000) = 1 %
SGD_VARIANCE = RATE**2 / (1.0 - A**2)  # of the live weights, with noise of variance 1


class Point(nn.Module):
    """Weights and nothing else."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(start)

    @torch.no_grad()
    def step(self, noise: float | Tensor = 0.0) -> None:
        """One step of gradient descent on x^2 / 2."""
        self.x.sub_(RATE * (self.x + noise))


def noisy_run(average: polyak.Average, model: Point, *, look: int, every: int, steps: int) -> float:
    """Variance over replicas of the live weights, just after the last feedback."""
    random = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        model.step(torch.randn(REPLICAS, generator=random))
        if step % look == 0:
            average.update(now=step)
        if step % every == 0:
            average.copy_to(model)
    return float(model.x.detach().double().var())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    random = torch.Generator().manual_seed(step)
    x = torch.randn(16, 4, generator=random, dtype=torch.float64)
    optimizer.zero_grad()
    (model(x) - x.sin().sum(dim=1, keepdim=True)).square().mean().backward()
    optimizer.step()


# ── closed forms ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_switch_ema_at_every_step_is_sgd_with_a_smaller_rate(decay: float) -> None:
    """x <- y = d y + (1 - d)(y - rate g(y)) = y - (1 - d) rate g(y), on any loss."""
    switched, plain = network(), network()
    fast = torch.optim.SGD(switched.parameters(), lr=RATE)
    slow = torch.optim.SGD(plain.parameters(), lr=(1.0 - decay) * RATE)
    average = polyak.Average(switched, polyak.Exponential(decay=decay, debias=False))
    average.follow(fast)
    for step in range(200):
        descend(switched, fast, step)
        average.copy_to(switched)
        descend(plain, slow, step)
    for ours, theirs in zip(switched.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("decay", "every"), [(0.9, 1), (0.9, 20), (0.98, 50)])
def test_switch_ema_has_the_variance_of_its_recursion(decay: float, every: int) -> None:
    """From one switch to the next z <- c z + sum of w_i noise_i, so Var = sum w^2 / (1 - c^2).

    The weights of the average at the end of a cycle are (1 - d) d^(k - j) on step j and d^k on the
    start; step j holds A^j of the start and A^(j - i) RATE of the noise of step i.
    """
    age = [(1.0 - decay) * decay ** (every - j) for j in range(1, every + 1)]
    kept = decay**every + sum(age[j - 1] * A**j for j in range(1, every + 1))
    noise = [
        RATE * sum(age[j - 1] * A ** (j - i) for j in range(i, every + 1))
        for i in range(1, every + 1)
    ]
    expected = sum(w**2 for w in noise) / (1.0 - kept**2)

    model = Point(torch.zeros(REPLICAS))
    average = polyak.Average(model, polyak.Exponential(decay=decay, debias=False))
    cycles = math.ceil(math.log(1e-4) / math.log(kept))
    variance = noisy_run(average, model, look=1, every=every, steps=cycles * every)
    assert variance == pytest.approx(expected, rel=0.03)


def test_lookahead_has_the_variance_of_the_paper() -> None:
    """Zhang et al. 2019, alpha = 0.5 and k = 5 at 1 - rate * curvature = 0.9: 0.44297 of SGD's.

    alpha^2 (1 - a^2k) / (alpha^2 (1 - a^2k) + 2 alpha (1 - alpha)(1 - a^k)). As an average: a
    half-life of k steps, looked at every k-th step, and fed back there.
    """
    own, between = 0.25 * (1.0 - A**10), 0.5 * (1.0 - A**5)
    assert own / (own + between) == pytest.approx(0.44297, abs=5e-6)

    model = Point(torch.zeros(REPLICAS))
    slow = polyak.Average(model, polyak.Exponential(half_life=5, debias=False))
    variance = noisy_run(slow, model, look=5, every=5, steps=300)
    assert variance / SGD_VARIANCE == pytest.approx(0.44297, rel=0.03)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_lookahead_as_a_slow_average_and_as_a_pull_to_an_anchor(alpha: float) -> None:
    """Without noise n rounds leave (1 - alpha + alpha a^k)^n of the start, by either reading.

    The slow weights as an average that keeps 1 - alpha at each round; or an average without memory
    that holds the last slow weights, to which the fast ones go back by 1 - alpha.
    """
    start = torch.tensor([1.0, -3.0], dtype=torch.float64)
    slow_model, anchored_model = Point(start.clone()), Point(start.clone())
    slow = polyak.Average(slow_model, polyak.Exponential(decay=1.0 - alpha, debias=False))
    anchor = polyak.Average(anchored_model, polyak.Exponential(decay=0.0))
    anchor.update()
    for _ in range(40):
        for _ in range(5):
            slow_model.step()
            anchored_model.step()
        slow.update()
        slow.copy_to(slow_model)
        anchor.copy_to(anchored_model, share=1.0 - alpha)
        anchor.update()
    expected = start * (1.0 - alpha + alpha * A**5) ** 40
    torch.testing.assert_close(slow_model.x.detach(), expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(anchored_model.x.detach(), expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_a_pull_by_a_share_is_the_linear_recursion_of_both(share: float, every: int) -> None:
    """Live and average are one vector: each step, update and pull is a 2 x 2 matrix on it."""
    decay = 0.95
    step = np.array([[A, 0.0], [0.0, 1.0]])
    update = np.array([[1.0, 0.0], [1.0 - decay, decay]])
    pull = np.array([[1.0 - share, share], [0.0, 1.0]])
    expected = np.array([2.0, 2.0])
    model = Point(torch.tensor([2.0], dtype=torch.float64))
    average = polyak.Average(model, polyak.Exponential(decay=decay, debias=False))
    for n in range(1, 101):
        model.step()
        average.update()
        expected = update @ step @ expected
        if n % every == 0:
            average.copy_to(model, share=share)
            expected = pull @ expected
        assert model.x.item() == pytest.approx(expected[0], rel=1e-12)
        assert average.tensors["x"].item() == pytest.approx(expected[1], rel=1e-12)


# ── what a feedback leaves alone ─────────────────────────────────────────────────────────────────


def mixed(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Batch norm with its counter, and a frozen layer."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 1))
    model[2].requires_grad_(False)
    return model.to(dtype)


Parts = tuple[nn.Sequential, torch.optim.Optimizer, polyak.Average]


def trained(
    dtype: torch.dtype = torch.float32,
) -> Parts:
    """A few steps of Adam, after which live weights and average differ."""
    torch.manual_seed(0)
    model = mixed(dtype)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.05)
    average = polyak.Average(model, polyak.Exponential(decay=0.9))
    average.follow(optimizer)
    train(model, optimizer, 10)
    return model, optimizer, average


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4, dtype=dtype)).float().square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_after_a_switch_the_live_weights_are_the_average(dtype: torch.dtype) -> None:
    """Bit for bit, rounded once where the live dtype is narrower; objects and memory stay."""
    model, _, average = trained(dtype)
    before = [(p, p.data_ptr()) for p in model.parameters()]
    counter = model.get_buffer("1.num_batches_tracked").clone()
    assert not torch.equal(model.get_parameter("0.weight"), average.tensors["0.weight"].to(dtype))
    average.copy_to(model)
    for name, tensor in average.tensors.items():
        assert torch.equal(model.state_dict()[name], tensor.to(dtype))
    assert torch.equal(model.get_buffer("1.num_batches_tracked"), counter)
    for parameter, (same, address) in zip(model.parameters(), before, strict=True):
        assert parameter is same
        assert parameter.data_ptr() == address


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_clock_average_and_optimizer_stay_as_they_are(share: float) -> None:
    """Nothing moves but the weights: not the optimizer's moments, not the average or its clock."""
    model, optimizer, average = trained()
    state = copy.deepcopy((optimizer.state_dict(), average.state_dict()))
    frozen = model.get_parameter("2.weight").clone()
    average.copy_to(model, share=share)
    assert list(differences((optimizer.state_dict(), average.state_dict()), state)) == []
    assert (average.now, average.updates) == (10, 10)
    assert torch.equal(model.get_parameter("2.weight"), frozen)

    train(model, optimizer, 1)  # and the next step counts as one
    assert (average.now, average.updates) == (11, 11)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_weights_that_were_fed_back_are_not_unseen_training(share: float) -> None:
    """Neither before the first update nor after a load is there anything to warn of."""
    model = mixed()
    average = polyak.Average(model, polyak.Exponential(decay=0.9))
    for _ in range(3):
        average.copy_to(model, share=share)  # a warning would be an error here
    average.weights()
    assert not any("changed" in note for note in average.report().notes)

    trained_model, _, before = trained()
    model.load_state_dict(trained_model.state_dict())
    average.load_state_dict(before.state_dict())
    for _ in range(3):
        average.copy_to(model, share=share)
    average.weights()
    assert not any("changed" in note for note in average.report().notes)


def test_training_after_a_feedback_is_still_noticed() -> None:
    """The average's own writing does not hide somebody else's."""
    model = mixed()
    average = polyak.Average(model)
    average.copy_to(model)
    with torch.no_grad():
        model.get_parameter("0.weight").add_(1.0)
    with pytest.warns(polyak.AveragingWarning, match="live weights have changed"):
        average.weights()


@pytest.mark.parametrize("into", ["live", "other"])
def test_training_before_a_feedback_is_not_forgotten(into: str) -> None:
    """What no update saw is said at the feedback, and stays in the report after it."""
    model = mixed()
    average = polyak.Average(model)
    with torch.no_grad():
        model.get_parameter("0.weight").add_(1.0)
    with pytest.warns(polyak.AveragingWarning, match="live weights have changed"):
        average.copy_to(model if into == "live" else mixed(), share=0.5)
    assert any("live weights have changed" in note for note in average.report().notes)


def test_a_run_with_feedback_goes_on_bit_for_bit() -> None:
    """Stopped between two switches and resumed it is the whole run."""

    def build() -> Parts:
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        average = polyak.Average(model, polyak.Exponential(decay=0.9))
        average.follow(optimizer)
        return model, optimizer, average

    def go(parts: Parts, first: int, last: int) -> None:
        model, optimizer, average = parts
        for step in range(first, last):
            descend(model, optimizer, step)
            if average.updates % 7 == 0:  # the average's counter is saved: the phase goes on
                average.copy_to(model)

    def state(parts: Parts) -> list[dict[str, Any]]:
        return [part.state_dict() for part in parts]

    whole, first, second = build(), build(), build()
    go(whole, 0, 30)
    go(first, 0, 17)
    loads = [part.load_state_dict for part in second]
    for load, saved in zip(loads, copy.deepcopy(state(first)), strict=True):
        load(saved)
    go(second, 17, 30)
    assert list(differences(state(whole), state(second))) == []
