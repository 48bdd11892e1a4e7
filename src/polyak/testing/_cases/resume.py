"""F: stopping and going on."""

import warnings

import torch

from .._adapter import Averager, Factory
from .._case import (
    Answer,
    Weights,
    case,
    copies,
    kept,
    lent,
    number,
    offered,
    one,
    same_bits,
    set_,
    started,
    through_a_file,
)


def _train(model: Weights, averager: Averager, first: int, last: int) -> None:
    for step in range(first, last):
        set_(model, torch.sin(torch.tensor(float(step))).item())
        averager.update(model)


@case("F1", "20 steps, and 10 + save + load + 10", expected="equal to the bit")
def f1(factory: Factory) -> Answer:
    """A run that was stopped is the run that was not."""
    model = Weights(1.0)
    whole = factory(model, 0.9)
    _train(model, whole, 0, 20)

    model = Weights(1.0)
    half = offered(factory(model, 0.9), "state_dict", "load_state_dict")
    _train(model, half, 0, 10)
    saved, state = copies(model), through_a_file(half.state_dict())
    model = Weights(0.0)
    model.load_state_dict(saved)
    rest = factory(model, 0.9)
    offered(rest, "load_state_dict").load_state_dict(state)
    _train(model, rest, 10, 20)
    right = same_bits(kept(whole), kept(rest))
    return Answer("equal" if right else "different", right)


@case("F2", "average 1, loaded; weights 2, one update at decay 0.99", expected="1.01")
def f2(factory: Factory) -> Answer:
    """A counter that is not saved makes the first update overwrite the average."""
    model = Weights(1.0)
    averager = started(factory, model, 0.99)
    for _ in range(10):
        averager.update(model)
    state = through_a_file(offered(averager, "state_dict").state_dict())
    model = Weights(1.0)
    resumed = factory(model, 0.99)
    offered(resumed, "load_state_dict").load_state_dict(state)
    set_(model, 2.0)
    resumed.update(model)
    return number(float(one(resumed, "first")[0]), 1.01, 1e-6)


@case("F5", "checkpoint taken inside the block: training goes on from", expected="trained weights")
def f5(factory: Factory) -> Answer:
    """A run stopped during evaluation saves a model that holds the average."""
    model = Weights(1.0)
    averager = started(factory, model, 0.9)
    set_(model, 2.0)
    averager.update(model)
    both = offered(averager, "state_dict", "load_state_dict")
    with lent(averager, model):
        saved, state = copies(model), through_a_file(both.state_dict())
    model = Weights(0.0)
    resumed = factory(model, 0.9)
    model.load_state_dict(saved)
    offered(resumed, "load_state_dict").load_state_dict(state)
    right = bool((model.first == 2.0).all())
    return Answer("trained weights" if right else "averaged weights", right)


@case("F6", "loading the average's state: the live model", expected="left alone")
def f6(factory: Factory) -> Answer:
    """The model has its own checkpoint, perhaps a newer one."""
    model = Weights(1.0)
    state = offered(started(factory, model, 0.9), "state_dict").state_dict()
    state = through_a_file(state)
    other = Weights(5.0)
    averager = factory(other, 0.9)
    offered(averager, "load_state_dict").load_state_dict(state)
    right = bool((other.first == 5.0).all())
    return Answer("left alone" if right else "overwritten", right)


@case("F9", "loading from a checkpoint that has no average in it", expected="error, or warning")
def f9(factory: Factory) -> Answer:
    """An average that starts anew without a word."""
    averager = offered(factory(Weights(1.0), 0.9), "load_state_dict")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            averager.load_state_dict({})
        except Exception as error:
            return Answer(f"raises {type(error).__name__}", True)
    return Answer("warns" if said else "silent", bool(said))


CASES = (f1, f2, f5, f6, f9)
