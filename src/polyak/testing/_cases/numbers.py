"""A: arithmetic and precision."""

import torch

from .._adapter import Factory
from .._case import (
    Answer,
    Weights,
    case,
    number,
    offered,
    one,
    set_,
    spread,
    started,
    step_response,
)

_DECAY, _UPDATES = 0.999, 2_000


def _held(factory: Factory, dtype: torch.dtype) -> Answer:
    """Hold a weight at 2 that was 1: in two bytes most updates are below the last bit."""
    model = Weights(1.0, size=64, dtype=dtype)
    averager = started(factory, model, _DECAY)
    set_(model, 2.0)
    for _ in range(_UPDATES):
        averager.update(model)
    expected = step_response(1.0, 2.0, _DECAY, _UPDATES)
    # What is read may be in the live dtype, so half its last bit (2^-8 below 2 in bfloat16, less
    # in float16) is allowed beside the error of the average itself.
    read = one(averager, "first")
    last_bit = torch.finfo(read.dtype).eps / 2
    return spread(read, expected, 1e-3 + last_bit)


@case("A1", "bf16 weights 1, then held at 2: decay 0.999, 2,000 updates", expected="1.8648")
def a1(factory: Factory) -> Answer:
    """Most averages of bfloat16 weights never move."""
    return _held(factory, torch.bfloat16)


@case("A1-fp16", "the same in fp16", expected="1.8648")
def a1_half(factory: Factory) -> Answer:
    """Some move, and stop where the update falls below the last bit."""
    return _held(factory, torch.float16)


@case("A2", "model cast to bf16 after the average was built, 10 updates", expected="1.6513")
def a2(factory: Factory) -> Answer:
    """A float32 average meets bfloat16 weights."""
    model = Weights(1.0)
    averager = started(factory, model, 0.9)
    model.to(torch.bfloat16)
    set_(model, 2.0)
    for _ in range(10):
        averager.update(model)
    read = one(averager, "first")
    tolerance = 1e-5 + torch.finfo(read.dtype).eps / 2  # may be read in the live dtype
    return spread(read, step_response(1.0, 2.0, 0.9, 10), tolerance)


@case("A7", "decay 0.9, weights jump from 0 to 1, 5 updates", expected="0.4095")
def a7(factory: Factory) -> Answer:
    """Decay and 1 - decay are easily exchanged."""
    model = Weights(0.0)
    averager = started(factory, model, 0.9)
    set_(model, 1.0)
    for _ in range(5):
        averager.update(model)
    return spread(one(averager, "first"), step_response(0.0, 1.0, 0.9, 5), 1e-6)


@case("A8", "weights grow by 1 a step, decay 0.98 a step, update every 10: lag", expected="49 ± 10")
def a8(factory: Factory) -> Answer:
    """An interval that is not made up for makes the average ten times as long."""
    model = Weights(0.0)
    averager = factory(model, 0.98)
    offered(averager, "every").every(10)
    for step in range(1, 2_001):
        set_(model, float(step))
        averager.update(model)
    lag = 2_000.0 - float(one(averager, "first")[0])
    steady = 0.98 / (1.0 - 0.98)  # mean age of the weights decay^k (1 - decay)
    return Answer(f"{lag:.0f}", abs(lag - steady) <= 10.0)


@case("A10", "weights 5, then 6: the first update stays between them", expected="5 to 6")
def a10(factory: Factory) -> Answer:
    """A bias correction applied to loaded weights makes them jump."""
    model = Weights(5.0)
    averager = factory(model, 0.9)
    set_(model, 6.0)
    averager.update(model)
    value = float(one(averager, "first")[0])
    return number(value, 5.5, 0.5 + 1e-5)


CASES = (a1, a1_half, a2, a7, a8, a10)
