"""Wrappers whose average, counter or child somebody moves by hand: nothing is lost in silence."""

import copy
import pickle
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import polyak
from polyak._engine import Memory
from polyak.compat._memory import memory_after
from polyak.compat.ema_pytorch import EMA
from polyak.compat.swa_utils import AveragedModel, get_ema_multi_avg_fn
from polyak.compat.yolov5 import ModelEMA


class Net(nn.Module):
    """A weight and an averaged buffer, both of them what they are set to."""

    moving: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("moving", torch.zeros(2))

    def at(self, value: float) -> "Net":
        with torch.no_grad():
            self.weight.fill_(value)
            self.moving.fill_(value)
        return self


def swa(live: nn.Module) -> AveragedModel:
    return AveragedModel(live, use_buffers=True)


def halves(live: nn.Module) -> AveragedModel:
    return AveragedModel(live, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)


def ema(live: nn.Module) -> EMA:
    return EMA(live, beta=0.5, min_value=0.5, update_after_step=-1, update_every=1)


def state_at(value: float) -> dict[str, Tensor]:
    return Net().at(value).state_dict()


# ── the average by itself ────────────────────────────────────────────────────────────────────────


def test_an_average_that_was_loaded_by_itself_goes_on() -> None:
    """The mean of 1, 2, 3 and then 6 is 3: as n_averaged takes the count of what was loaded."""
    live = Net()
    old = swa(live)
    for value in (1.0, 2.0, 3.0):
        old.update_parameters(live.at(value))

    new = swa(live)
    new.average.load_state_dict(old.average.state_dict())
    assert int(new.state_dict()["n_averaged"]) == 3
    new.update_parameters(live.at(6.0))
    assert new.module.get_parameter("weight").tolist() == [3.0, 3.0]
    assert int(new.n_averaged) == new.average.updates == 4


def test_an_average_that_was_updated_and_reset_by_itself_goes_on() -> None:
    """An update and a step that is followed count; after a reset the mean starts anew."""
    live = Net()
    averaged = swa(live)
    averaged.update_parameters(live.at(1.0))
    averaged.average.update()
    optimizer = torch.optim.SGD([live.weight], lr=1.0)
    averaged.average.follow(optimizer)
    live.at(4.0).weight.grad = torch.zeros(2)
    optimizer.step()
    averaged.update_parameters(live.at(6.0))
    assert averaged.module.get_parameter("weight").tolist() == [3.0, 3.0]  # of 1, 1, 4, 6
    assert int(averaged.n_averaged) == 4

    averaged.average.reset()
    averaged.update_parameters(live.at(8.0))
    averaged.update_parameters(live.at(10.0))
    assert averaged.module.get_parameter("weight").tolist() == [9.0, 9.0]
    assert int(averaged.n_averaged) == 2


def test_a_counter_that_was_set_by_hand_sets_the_clock() -> None:
    live = Net()
    averaged = swa(live)
    averaged.update_parameters(live.at(1.0))
    averaged.n_averaged.fill_(3)
    averaged.update_parameters(live.at(5.0))
    assert averaged.module.get_parameter("weight").tolist() == [2.0, 2.0]  # (3 * 1 + 5) / 4
    assert averaged.average.now == 4


def test_both_set_by_hand_must_agree() -> None:
    live = Net()
    old, new = swa(live), swa(live)
    for value in (1.0, 3.0):
        old.update_parameters(live.at(value))
    new.average.load_state_dict(old.average.state_dict())
    new.n_averaged.fill_(7)
    for refused in (lambda: new.update_parameters(live), new.state_dict):
        with pytest.raises(polyak.OrderError, match="n_averaged must be 2"):
            refused()
        assert new.module.get_parameter("weight").tolist() == [2.0, 2.0]
    new.n_averaged.fill_(2)
    new.update_parameters(live.at(5.0))
    assert new.module.get_parameter("weight").tolist() == [3.0, 3.0]


@pytest.mark.parametrize("move", ["load", "update", "reset", "both"])
def test_an_ema_refuses_an_average_that_was_moved_by_itself(move: str) -> None:
    """Its call number cannot be told from the average; its own load mends it."""
    live = Net()
    old = ema(live)
    for value in (1.0, 2.0, 3.0):
        live.at(value)
        old.update()
    good = copy.deepcopy(old.state_dict())
    new = old if move in ("update", "reset") else ema(live)
    if move == "update":
        new.average.update()
    elif move == "reset":
        new.average.reset()
    else:
        new.average.load_state_dict(old.average.state_dict())
    if move == "both":
        new.step.fill_(3)
    before = new.average.tensors["weight"].tolist()
    for refused in (new.update, new.state_dict):
        with pytest.raises(polyak.OrderError, match="by its EMA only"):
            refused()
    assert new.average.tensors["weight"].tolist() == before

    new.load_state_dict(good)
    live.at(8.0)
    new.update()
    # 1, then halfway to 2, to 3 and to 8
    assert new.ema_model.get_parameter("weight").tolist() == [5.125, 5.125]


@pytest.mark.parametrize(("make", "counter"), [(swa, "n_averaged"), (ema, "step")])
def test_a_count_below_zero_is_refused(make: Callable[[nn.Module], Any], counter: str) -> None:
    """Set by hand or in a file: nothing is written."""
    live = Net().at(1.0)
    wrapper = make(live)
    state = {name: value.clone() for name, value in wrapper.state_dict().items()}
    state[counter].fill_(-2)
    state[f"{wrapper._child}.weight"].fill_(7.0)
    with pytest.raises(polyak.ArgumentError, match=f"{counter} must be a count"):
        wrapper.load_state_dict(state)
    assert int(getattr(wrapper, counter)) == 0
    assert wrapper.average.tensors["weight"].tolist() == [1.0, 1.0]
    getattr(wrapper, counter).fill_(-2)
    update = wrapper.update if make is ema else lambda: wrapper.update_parameters(live)
    with pytest.raises(polyak.ArgumentError, match=f"{counter} must be a count"):
        update()


def test_a_counter_may_be_one_element_in_a_list() -> None:
    averaged = swa(Net())
    state = averaged.state_dict() | {"n_averaged": torch.tensor([5])}
    averaged.load_state_dict(state)
    assert averaged.n_averaged.shape == ()
    assert averaged.average.updates == 5


# ── the child by itself ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [halves, ema])
def test_a_load_into_the_child_is_a_load_of_the_average(
    make: Callable[[nn.Module], Any], dtype: torch.dtype
) -> None:
    """Weights and averaged buffers alike: 4, then halfway to 8 is 6."""
    live = Net().to(dtype)
    wrapper = make(live)
    update = wrapper.update if make is ema else lambda: wrapper.update_parameters(live)
    update()
    child = getattr(wrapper, wrapper._child)
    child.load_state_dict(state_at(4.0))
    assert wrapper.average.tensors["weight"].tolist() == [4.0, 4.0]
    live.at(8.0)
    update()
    for name, value in child.state_dict().items():
        assert value.tolist() == [6.0, 6.0], name
        assert wrapper.state_dict()[f"{wrapper._child}.{name}"].tolist() == [6.0, 6.0]


def test_a_load_of_what_the_child_shows_keeps_all_digits() -> None:
    """A third is no number of bfloat16; the child is given its rounding back."""
    live = Net().to(torch.bfloat16)
    averaged = swa(live)
    for value in (0.0, 0.0, 1.0):
        averaged.update_parameters(live.at(value))
    exact = averaged.average.tensors["weight"].clone()
    assert exact.tolist() == pytest.approx([1 / 3, 1 / 3], rel=1e-6)
    averaged.module.load_state_dict(averaged.module.state_dict())
    assert torch.equal(averaged.average.tensors["weight"], exact)
    averaged.load_state_dict(copy.deepcopy(averaged.state_dict()))
    assert torch.equal(averaged.average.tensors["weight"], exact)


def test_statistics_loaded_into_the_child_last_until_the_next_update() -> None:
    """Buffers that are not averaged are those of the live model again after it."""
    live = nn.BatchNorm1d(2)
    averaged = AveragedModel(live)
    state = {name: value.clone() for name, value in live.state_dict().items()}
    state["running_mean"].fill_(5.0)
    averaged.module.load_state_dict(state)
    assert averaged.module.get_buffer("running_mean").tolist() == [5.0, 5.0]
    assert averaged.average.weights()["running_mean"].tolist() == [5.0, 5.0]
    averaged.update_parameters(live)
    assert averaged.module.get_buffer("running_mean").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("make", [swa, ema])
def test_copies_hear_of_loads_into_their_own_child_only(
    make: Callable[[nn.Module], Any],
) -> None:
    """A copy or pickle of the whole takes over a load; one of the child moves nothing."""
    wrapper = make(Net().to(torch.bfloat16))
    child = wrapper._child
    for copied in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        getattr(copied, child).load_state_dict(state_at(4.0))
        assert copied.average.tensors["weight"].tolist() == [4.0, 4.0]
        assert wrapper.average.tensors["weight"].tolist() == [0.0, 0.0]
    alone = getattr(wrapper, child)
    for copied in (copy.deepcopy(alone), pickle.loads(pickle.dumps(alone))):
        copied.load_state_dict(state_at(4.0))
        assert copied.weight.tolist() == [4.0, 4.0]
        assert wrapper.average.tensors["weight"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("make", [swa, ema])
def test_another_child_is_refused(make: Callable[[nn.Module], Any]) -> None:
    wrapper = make(Net())
    child = getattr(wrapper, wrapper._child)
    with pytest.raises(polyak.OrderError, match=f"{wrapper._child} must stay"):
        setattr(wrapper, wrapper._child, Net())
    assert getattr(wrapper, wrapper._child) is child
    setattr(wrapper, wrapper._child, child.eval())  # itself


def test_another_child_is_refused_before_there_is_one() -> None:
    lazy = EMA(Net(), lazy_init_ema=True)
    with pytest.raises(polyak.OrderError, match="ema_model must stay"):
        lazy.ema_model = Net()


def test_a_yolov5_child_that_was_cast_is_loaded_into_the_average() -> None:
    """Validation casts it to half precision and back; then somebody resumes."""
    live = Net()
    wrapper = ModelEMA(live)
    wrapper.ema.half().float()
    wrapper.ema.load_state_dict(state_at(4.0))
    for value in wrapper.average.tensors.values():
        assert value.tolist() == [4.0, 4.0]


def test_a_yolov5_child_that_was_cast_is_written_into_the_average() -> None:
    wrapper = ModelEMA(Net())
    wrapper.ema.half().float()
    wrapper.ema.get_parameter("weight").fill_(4.0)
    wrapper.ema.get_buffer("moving").fill_(4.0)
    for value in wrapper.average.tensors.values():
        assert value.tolist() == [4.0, 4.0]


def test_a_yolov5_decay_cannot_be_assigned() -> None:
    wrapper = ModelEMA(Net(), 0.9, 10)
    with pytest.raises(polyak.OrderError, match="decay must stay"):
        wrapper.decay = 0.5
    assert 0.0 < wrapper.decay(3) < 0.9


# ── the memory of many updates ───────────────────────────────────────────────────────────────────


def folded(schedule: polyak.Schedule, updates: int, every: int) -> Memory:
    """The same one by one."""
    memory, now = Memory(), 0
    for index in range(updates):
        elapsed = every if index else 1
        now += elapsed
        memory.fold(schedule(now=now, elapsed=elapsed), elapsed)
    return memory


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("updates", [1, 2, 7, 1_000, 65_537, 200_000])
@pytest.mark.parametrize(
    "schedule",
    [
        polyak.Uniform(),
        polyak.Power(gamma=6.94),
        polyak.Exponential(decay=0.9999, debias=False),
        polyak.ExponentialRamp(0.9999, tau=2_000),
        polyak.After(100, polyak.InverseGamma(1.0, power=2 / 3)),
    ],
    ids=lambda s: type(s).__name__,
)
def test_memory_is_that_of_the_updates_one_by_one(
    schedule: polyak.Schedule, updates: int, every: int
) -> None:
    found, wanted = memory_after(schedule, updates, every=every), folded(schedule, updates, every)
    for name, value in vars(wanted).items():
        assert getattr(found, name) == pytest.approx(value, rel=2e-3, abs=1e-9), name


def test_memory_of_any_number_of_updates_takes_no_time() -> None:
    """A file may say 10**15: of the plain mean the mean age is half of that, the rest exact."""
    updates, started = 10**15, time.perf_counter()
    memory = memory_after(polyak.Uniform(), updates)
    assert time.perf_counter() - started < 5.0
    assert memory.age == pytest.approx((updates - 1) / 2, rel=1e-3)
    long = memory_after(polyak.Exponential(decay=0.999, debias=False), updates)
    assert long.age == pytest.approx(999.0, rel=1e-6)  # d / (1 - d)
    assert np.isfinite(list(vars(memory).values())).all()
    with pytest.raises(polyak.ArgumentError, match="updates must be at least 0"):
        memory_after(polyak.Uniform(), -1)
