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


def test_an_optimizer_of_a_copy_of_the_model_is_warned_of() -> None:
    """A trainer that copies the model: the average would be of weights that nobody trains."""
    model, _ = pair()
    _, another = pair()
    average = polyak.Average(model)
    average.follow(another)
    copied = nn.Linear(3, 1)
    copied.weight, copied.bias = another.param_groups[0]["params"]
    with pytest.warns(polyak.AveragingWarning, match="follow the one that does"):
        step(copied, another)
    step(copied, another)  # once is enough


@pytest.mark.parametrize("way", ["some", "the same memory", "written by another", "added later"])
def test_an_optimizer_of_the_averaged_weights_by_whatever_way_is_not(way: str) -> None:
    """Part of them, views of them, masters of them, or the last of several that share a loop."""
    model, optimizer = pair()
    source = model.state_dict() if way == "the same memory" else model
    average = polyak.Average(source)
    closing = nn.Linear(3, 1)
    last = torch.optim.SGD(closing.parameters(), lr=0.1)
    if way == "some":
        last.add_param_group({"params": [model.bias]})
    average.follow(optimizer if way == "the same memory" else last)
    if way == "added later":
        last.add_param_group({"params": list(model.parameters())})
    if way != "some":
        step(model, optimizer)
    step(closing, last)
    assert average.updates >= 1


def test_an_update_by_hand_where_the_follower_s_clock_stands_still_says_the_time() -> None:
    """Steps were taken; it is the user's clock that did not move."""
    model, optimizer = pair()
    average = polyak.Average(model)
    average.follow(optimizer, every=5, now=lambda: average.now)
    step(model, optimizer)
    with pytest.raises(polyak.OrderError, match="now must be above 0"):
        average.update()


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


class Wrapped:
    """A wrapper in the manner of Accelerate's: it holds the optimizer and passes steps on."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()


def test_a_wrapper_around_the_optimizer_is_looked_into() -> None:
    """Steps of the wrapper, and of a wrapper around it, are those of the optimizer inside."""
    model, optimizer = pair()
    average = polyak.Average(model)
    average.follow(Wrapped(Wrapped(optimizer)))  # type: ignore[arg-type]
    model(torch.ones(2, 3)).sum().backward()
    Wrapped(Wrapped(optimizer)).step()
    assert average.updates == 1


def test_gradient_accumulation_counts_steps_and_not_batches() -> None:
    """Four micro-batches and one step are one update (REGRESSIONS G3)."""
    model, optimizer = pair()
    average = polyak.Average(model)
    average.follow(optimizer)
    for batch in range(12):
        model(torch.ones(2, 3)).sum().backward()
        if batch % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert (average.updates, average.now) == (3, 3)


def test_of_several_optimizers_the_last_one_brings_the_update() -> None:
    """Weights are averaged when every part has stepped, however often the others stepped before."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    first, second = (torch.optim.SGD(part.parameters(), lr=0.1) for part in model)
    weight = model.get_parameter("0.weight")
    average = polyak.Average(model, polyak.Exponential(decay=0.0))
    average.follow(first, second)
    for _ in range(3):
        model(torch.ones(2, 3)).sum().backward()
        for _ in range(4):
            first.step()
            assert average.updates == 0 or not torch.equal(average.tensors["0.weight"], weight)
        second.step()
        assert torch.equal(average.tensors["0.weight"], weight)
    assert (average.updates, average.now) == (3, 3)


def test_following_twice_is_following_once() -> None:
    """The second call replaces the first, with its interval; another optimizer is refused."""
    model, optimizer = pair()
    average = polyak.Average(model)
    old = average.follow(optimizer)
    new = average.follow(optimizer, every=2)
    assert (old.active, new.active) == (False, True)
    for _ in range(4):
        step(model, optimizer)
    assert (average.updates, average.now) == (2, 4)
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(polyak.OrderError, match=r"follow\(a, b\)"):
        average.follow(other)
    new.remove()
    average.follow(other)


def test_a_clock_of_samples_tells_the_time() -> None:
    """With `now=` the average lives on the caller's clock, whatever the batch sizes are."""
    model, optimizer = pair()
    seen = 0
    average = polyak.Average(model, polyak.Exponential(half_life=100))
    average.follow(optimizer, every=2, now=lambda: seen)
    for batch in (3, 5, 7, 9):
        seen += batch
        step(model, optimizer)
    assert (average.updates, average.now) == (2, 24)
    with pytest.raises(polyak.ArgumentError, match="now must be a function"):
        polyak.Average(model).follow(optimizer, now=5)  # type: ignore[arg-type]


def test_update_by_hand_takes_the_steps_since_the_last_update() -> None:
    """Ten real steps are ten units of time, also with an evaluation's update in between."""
    model, optimizer = pair()
    average = polyak.Average(model)
    average.follow(optimizer, every=4)
    for _ in range(6):
        step(model, optimizer)
    average.update()
    assert average.now == 6
    for _ in range(4):
        step(model, optimizer)
    assert average.now == 10
    with pytest.raises(polyak.OrderError, match=r"follow\(\) updates by itself"):
        average.update()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, at import
def test_an_optimizer_that_steps_inside_backward_is_refused() -> None:
    """Its steps come one parameter at a time; the error says to call `update`."""
    from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward

    model = nn.Linear(3, 1)
    _apply_optimizer_in_backward(torch.optim.SGD, list(model.parameters()), {"lr": 0.1})
    inside = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(polyak.ArgumentError, match=r"Call update\(\) after backward"):
        polyak.Average(model).follow(inside)


class Counting(Tensor):
    """A scalar that counts how often the host asks for its value."""

    asked = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("item", "__bool__", "__float__", "tolist", "numpy", "__int__"):
            Counting.asked += 1
        inner = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
        return inner(cls, func, types, args, kwargs or {})


def fused_step(optimizer: torch.optim.Optimizer, found_inf: float) -> Tensor:
    """One step as `GradScaler.step` makes it for a fused optimizer, which learns of the skip."""
    flag = torch.tensor(found_inf)
    optimizer.found_inf = flag.as_subclass(Counting)  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
        del optimizer.grad_scale  # type: ignore[attr-defined]
    return flag


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skip_on_the_device_moves_nothing_and_the_clock_is_right_after_the_next_step(
    rounding: polyak._engine.Rounding, dtype: torch.dtype
) -> None:
    """A fused AdamW and a scaler that skips: no value changes, the host never asks for the flag.

    The skipped steps leave no trace: values, clock, memory, history and state equal a run without
    them, bit for bit.
    """
    skips = [0.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    rule = polyak.Exponential(decay=0.9, debias=False)
    results = []
    for with_skips in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        average = polyak.Average(model, rule, dtype=dtype, rounding=rounding)
        average.follow(optimizer)
        for skip in skips:
            optimizer.zero_grad()
            model(torch.ones(2, 3)).square().sum().backward()
            before = {n: t.clone() for n, t in average.tensors.items()}
            if skip and not with_skips:
                continue
            Counting.asked = 0
            fused_step(optimizer, skip)
            assert Counting.asked == 0
            assert len(average._engine._doubts) == 1  # this step's flag is not looked at yet
            moved = [not torch.equal(t, before[n]) for n, t in average.tensors.items()]
            assert not any(moved) if skip else any(moved)
        results.append((average.state_dict(), average.report(), average.now))
    (skipped, report, now), (clean, clean_report, clean_now) = results
    assert (now, report.mean_age) == (clean_now, clean_report.mean_age) == (3, report.mean_age)
    for name, tensor in clean["averages"]["average"]["tensors"].items():
        assert torch.equal(skipped["averages"]["average"]["tensors"][name], tensor)
    for key in ("clock", "nonfinite"):
        assert skipped[key] == clean[key]
    assert skipped["averages"]["average"]["memory"] == clean["averages"]["average"]["memory"]


def test_skips_on_the_device_do_not_count_towards_an_interval() -> None:
    """With `every=3` the third step that was taken brings the update, at time 3; windows too."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    average = polyak.Average(model)
    window = polyak.Window(model, k=4)
    average.follow(optimizer, every=3)
    window.follow(optimizer)
    for skip in (0.0, 1.0, 0.0, 1.0, 0.0, 0.0):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        fused_step(optimizer, skip)
    assert (average.updates, average.now) == (1, 3)
    assert (window.filled, window.now) == (4, 4)


@pytest.mark.filterwarnings("error")
def test_a_follower_that_never_leads_to_an_update_is_said_once() -> None:
    """At the first use: the interval is longer than the run, or it is another model's optimizer."""
    model, optimizer = pair()
    average = polyak.Average(model)
    average.follow(optimizer, every=100)
    step(model, optimizer)
    with pytest.warns(polyak.AveragingWarning, match="saw 1 optimizer steps but no update"):
        average.weights()
    average.weights()

    other, foreign = pair()
    lost = polyak.Average(other)
    lost.follow(optimizer)
    step(other, foreign)
    with pytest.warns(polyak.AveragingWarning, match="follow the one that trains this model"):
        lost.weights()


def test_a_skip_of_one_of_several_optimizers_does_not_shift_the_phase() -> None:
    """The last one named closes a step, so a scaler may skip the other without consequence."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    first, second = (torch.optim.SGD(part.parameters(), lr=0.1) for part in model)
    average = polyak.Average(model, polyak.Exponential(decay=0.0))
    average.follow(first, second)
    for skipped in (None, first, None, second, None):
        model(torch.ones(2, 3)).sum().backward()
        for optimizer in (first, second):
            if optimizer is not skipped:
                optimizer.step()
        if skipped is not second:
            for name, tensor in average.tensors.items():
                assert torch.equal(tensor, model.get_parameter(name))
    assert (average.updates, average.now) == (4, 4)


def test_an_optimizer_around_another_is_followed_itself() -> None:
    """Lookahead writes the weights after the inner step; the average sees what it has written."""

    class Lookahead(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            super().__init__(optimizer.param_groups, {})
            self.optimizer = optimizer

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.optimizer.step()
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.mul_(0.5)

    model, optimizer = pair()
    outer = Lookahead(optimizer)
    average = polyak.Average(model, polyak.Exponential(decay=0.0))
    average.follow(outer)
    model(torch.ones(2, 3)).sum().backward()
    outer.step()
    assert average.updates == 1
    assert torch.equal(average.tensors["weight"], model.weight)


def test_steps_seen_before_a_follower_was_removed_count() -> None:
    """The next update by hand carries their time."""
    model, optimizer = pair()
    average = polyak.Average(model)
    follower = average.follow(optimizer, every=40)
    for _ in range(3):
        step(model, optimizer)
    follower.remove()
    average.update()
    assert average.now == 3


def test_a_skip_on_the_device_keeps_refreshed_statistics() -> None:
    """Nothing has changed, so what was recomputed for the averaged weights is still right."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    average = polyak.Average(model)
    average.follow(optimizer)
    model(torch.randn(8, 3)).sum().backward()
    fused_step(optimizer, 0.0)
    polyak.refresh_norms(average, [torch.randn(8, 3)])
    before = average.weights()
    fused_step(optimizer, 1.0)
    assert average.now == 1
    assert all(torch.equal(t, before[n]) for n, t in average.weights().items())
