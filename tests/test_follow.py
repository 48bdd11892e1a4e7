"""One update after every step that the optimizer really takes."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step of training on whatever comes."""
    optimizer.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()


def pair() -> tuple[nn.Linear, torch.optim.SGD]:
    model = nn.Linear(3, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


class Skipping:
    """A gradient scaler: it looks at the gradients, and steps only where they are finite."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"]]
        if all(gradient.isfinite().all() for gradient in gradients):
            optimizer.step()


def test_a_followed_average_is_updated_after_every_step() -> None:
    """It sees the weights that the step has made, as an `update()` after it would."""
    model, optimizer = pair()
    by_hand = polyak.Average(model, polyak.Exponential(decay=0.9))
    followed = polyak.Average(model, polyak.Exponential(decay=0.9))
    followed.follow(optimizer)

    for _ in range(10):
        step(model, optimizer)
        by_hand.update()

    assert (followed.updates, followed.now) == (10, 10)
    for name, tensor in by_hand.tensors.items():
        assert torch.equal(followed.tensors[name], tensor)


def test_a_step_that_is_skipped_does_not_count() -> None:
    """A scaler that meets an infinity never calls the optimizer: time stands still."""
    model, optimizer = pair()
    average = polyak.Average(model, polyak.Uniform())
    average.follow(optimizer)
    scaler = Skipping()

    for bad in (False, True, False, True, True):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        if bad:
            assert model.weight.grad is not None
            model.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)

    assert (average.updates, average.now) == (2, 2)


def test_the_scaler_of_torch_is_followed() -> None:
    """`GradScaler.step` skips where a gradient overflowed."""
    model, optimizer = pair()
    average = polyak.Average(model, polyak.Uniform())
    average.follow(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    for bad in (False, True, False):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 3)).sum() * (torch.inf if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()

    assert (average.updates, average.now) == (2, 2)


@pytest.mark.parametrize("every", [1, 3, 10])
def test_every_k_steps_comes_an_update_with_the_time_of_k_steps(every: int) -> None:
    """A coarser sampling: `now` counts steps, whatever `every` is."""
    model, optimizer = pair()
    asked: list[tuple[float, float]] = []

    def schedule(*, now: float, elapsed: float) -> float:
        asked.append((now, elapsed))
        return 0.5

    average = polyak.Average(model, schedule, now=100)
    average.follow(optimizer, every=every)
    for _ in range(20):
        step(model, optimizer)

    updates = 20 // every
    assert asked == [(every * (i + 1), every) for i in range(updates)]
    assert (average.updates, average.now) == (updates, 100 + every * updates)


def test_the_phase_of_every_survives_a_resume() -> None:
    """Saved after 5 of steps by threes, the next update comes one step later, at time 6."""
    model, optimizer = pair()
    average = polyak.Average(model, polyak.Uniform())
    average.follow(optimizer, every=3)
    for _ in range(5):
        step(model, optimizer)
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)

    again, other = pair()
    resumed = polyak.Average(again, polyak.Uniform())
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.follow(other, every=3)
    times = []
    for _ in range(5):
        step(again, other)
        times.append(resumed.now)

    assert times == [6, 6, 6, 9, 9]


def test_removing_a_follower_ends_it() -> None:
    """Harmless when done again; the hooks are off the optimizer."""
    model, optimizer = pair()
    average = polyak.Average(model, polyak.Uniform())
    follower = average.follow(optimizer)
    step(model, optimizer)

    follower.remove()
    follower.remove()
    step(model, optimizer)
    with average.applied():
        optimizer.zero_grad()  # nobody watches any longer

    assert average.updates == 1
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_an_optimizer_that_calls_the_model_again_takes_one_step() -> None:
    """L-BFGS evaluates its closure many times within one step."""
    model, _ = pair()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    average = polyak.Average(model, polyak.Uniform())
    average.follow(optimizer)
    calls = 0

    def closure() -> float:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss: Tensor = (model(torch.ones(2, 3)) - 1).square().mean()
        loss.backward()
        return float(loss.detach())

    for _ in range(3):
        optimizer.step(closure)

    assert calls > 3
    assert (average.updates, average.now) == (3, 3)


def test_several_averages_and_a_window_follow_too() -> None:
    """Each by its own hook, from the same steps."""
    model, optimizer = pair()
    averages = polyak.Averages(model, {"a": polyak.Uniform(), "b": polyak.Power(gamma=1.0)})
    window = polyak.Window(model, 2, every=2)
    averages.follow(optimizer)
    window.follow(optimizer)
    seen = []

    for _ in range(4):
        step(model, optimizer)
        seen.append(model.weight.detach().double())

    assert (averages.updates, window.updates, window.filled) == (4, 4, 2)
    torch.testing.assert_close(
        averages["a"].tensors["weight"], torch.stack(seen).mean(0).float(), rtol=1e-6, atol=1e-7
    )
    assert torch.equal(window.tensors["weight"], ((seen[1] + seen[3]) / 2).float())


def test_a_member_of_several_cannot_follow_alone() -> None:
    """They share one clock: the family follows."""
    model, optimizer = pair()
    averages = polyak.Averages(model, {"a": polyak.Uniform()})

    with pytest.raises(polyak.OrderError, match="follow must be called on the Averages"):
        averages["a"].follow(optimizer)

    step(model, optimizer)
    assert averages.updates == 0


def test_a_step_inside_applied_is_refused_before_it_is_taken() -> None:
    """It would train the averaged weights; nothing moves."""
    model, optimizer = pair()
    average = polyak.Average(model, polyak.Uniform())
    average.follow(optimizer)
    step(model, optimizer)
    trained, before = model.weight.detach().clone(), average.tensors["weight"].clone()

    with average.applied():
        model(torch.ones(2, 3)).sum().backward()
        with pytest.raises(polyak.OrderError, match="an optimizer step must come outside applied"):
            optimizer.step()

    assert torch.equal(model.weight, trained)
    assert torch.equal(average.tensors["weight"], before)
    assert average.updates == 1


def test_a_refused_update_does_not_lose_the_step() -> None:
    """With nonfinite="raise" the error reaches the loop; time goes on with the next update."""
    model, optimizer = pair()
    average = polyak.Average(model, polyak.Uniform(), nonfinite="raise")
    average.follow(optimizer)
    step(model, optimizer)
    with torch.no_grad():
        model.bias.fill_(torch.nan)

    with pytest.raises(polyak.ArgumentError, match="'bias'"):
        step(model, optimizer)
    with torch.no_grad():
        model.bias.fill_(0.0)
    step(model, optimizer)

    assert (average.updates, average.now) == (2, 3)


def test_update_by_hand_between_steps_goes_together_with_a_follower() -> None:
    """Both move the one clock forward."""
    model, optimizer = pair()
    average = polyak.Average(model, polyak.Uniform())
    average.follow(optimizer, every=2)

    step(model, optimizer)
    average.update(now=1)
    step(model, optimizer)
    step(model, optimizer)

    assert (average.updates, average.now) == (2, 3)


@pytest.mark.parametrize("optimizer", [None, "adam", nn.Linear(1, 1), torch.optim.SGD], ids=str)
def test_only_an_optimizer_can_be_followed(optimizer: Any) -> None:
    """The error offers update()."""
    average = polyak.Average(nn.Linear(3, 1))

    with pytest.raises(polyak.ArgumentError, match=r"optimizer must be .*call update\(\)"):
        average.follow(optimizer)


@pytest.mark.parametrize("every", [0, -1, 2.5, "2"])
def test_every_must_be_a_whole_number_of_steps(every: Any) -> None:
    """And nothing is hooked on."""
    model, optimizer = pair()
    average = polyak.Average(model)

    with pytest.raises(polyak.ArgumentError, match="every must be a whole number of steps"):
        average.follow(optimizer, every=every)

    step(model, optimizer)
    assert average.updates == 0
