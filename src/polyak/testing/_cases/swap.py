"""E: evaluating with the average in the model."""

import torch
from torch import nn

from .._adapter import Averager, Factory
from .._case import (
    Answer,
    Weights,
    case,
    copies,
    kept,
    lent,
    offered,
    one,
    same_bits,
    set_,
    started,
    through_a_file,
)


def _apart(factory: Factory) -> tuple[Weights, Averager]:
    """A model at 2 whose average is 1.1."""
    model = Weights(1.0)
    averager = started(factory, model, 0.9)
    set_(model, 2.0)
    averager.update(model)
    return model, averager


def _came_back(model: nn.Module, trained: dict[str, torch.Tensor]) -> Answer:
    right = same_bits(copies(model), trained)
    return Answer("trained weights" if right else "averaged weights", right)


def _broken(factory: Factory, error: BaseException) -> Answer:
    model, averager = _apart(factory)
    trained = copies(model)
    try:
        with lent(averager, model):
            raise error
    except type(error) as caught:
        if caught is not error:  # the class under test failed by itself
            raise
    return _came_back(model, trained)


@case("E1", "evaluation raises inside the block: the model after it", expected="trained weights")
def e1(factory: Factory) -> Answer:
    """Training would go on from averaged weights."""
    return _broken(factory, RuntimeError("evaluation failed"))


@case("E1-interrupt", "Ctrl-C inside the block", expected="trained weights")
def e1_interrupt(factory: Factory) -> Answer:
    """An interrupt is no `Exception`."""
    return _broken(factory, KeyboardInterrupt())


@case("E3", "in the block the average, after it the trained weights", expected="both, to the bit")
def e3(factory: Factory) -> Answer:
    """A backup that is a reference restores the average."""
    model, averager = _apart(factory)
    trained = copies(model)
    with lent(averager, model):
        inside = float(model.first[0].detach())
    if not abs(inside - 1.1) < 1e-6:
        return Answer(f"{inside:.4f} inside", False)
    return _came_back(model, trained)


@case("E-nested", "two blocks, one inside the other: after both", expected="trained weights")
def e_nested(factory: Factory) -> Answer:
    """The second backup is of averaged weights."""
    model, averager = _apart(factory)
    trained = copies(model)
    try:
        with lent(averager, model), lent(averager, model):
            pass
    except Exception as error:
        back = _came_back(model, trained)
        return Answer(f"raises {type(error).__name__}, {back.text}", back.right)
    return _came_back(model, trained)


@case("E4", "update inside the block", expected="error")
def e4(factory: Factory) -> Answer:
    """The average would be averaged with itself."""
    model, averager = _apart(factory)
    block = lent(averager, model)
    try:
        with block:
            averager.update(model)
    except Exception as error:
        return Answer(f"raises {type(error).__name__}", True)
    return Answer("silent", False)


@case("E5", "state saved inside the block, loaded elsewhere: the average", expected="1.1")
def e5(factory: Factory) -> Answer:
    """While the model holds the average, the average may hold the model."""
    model, averager = _apart(factory)
    both = offered(averager, "state_dict", "load_state_dict")
    with lent(averager, model):
        state = through_a_file(both.state_dict())
    other = offered(factory(Weights(0.0), 0.9), "load_state_dict")
    other.load_state_dict(state)
    value = float(one(other, "first")[0])
    return Answer(f"{value:.4f}", abs(value - 1.1) < 1e-6)


def _trained(factory: Factory, *, evaluate: bool) -> dict[str, torch.Tensor]:
    """Ten steps, with or without an evaluation after each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters())
    averager = factory(model, 0.9)
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(4, 2)).square().sum().backward()
        optimizer.step()
        averager.update(model)
        if evaluate:
            block = lent(averager, model)
            model.eval()
            with block, torch.no_grad():
                model(torch.ones(4, 2))
            model.train()
    return copies(model)


@case("E6", "ten steps with an evaluation after each, and without", expected="equal to the bit")
def e6(factory: Factory) -> Answer:
    """Whether one evaluates must not change the run."""
    right = same_bits(_trained(factory, evaluate=True), _trained(factory, evaluate=False))
    return Answer("equal" if right else "different", right)


@case("E11", "an optimizer step inside the block", expected="trained weights, or error")
def e11(factory: Factory) -> Answer:
    """The step works on weights that are taken back afterwards."""
    model, averager = _apart(factory)
    trained, average = copies(model), kept(averager)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    block = lent(averager, model)
    try:
        with block:
            model(torch.ones(3)).sum().backward()
            optimizer.step()
    except Exception as error:
        back = _came_back(model, trained)
        return Answer(f"raises {type(error).__name__}, {back.text}", back.right)
    back = _came_back(model, trained)
    if back.right and not same_bits(kept(averager), average):
        return Answer("average changed, silently", False)
    return back


CASES = (e1, e1_interrupt, e3, e_nested, e4, e5, e6, e11)
