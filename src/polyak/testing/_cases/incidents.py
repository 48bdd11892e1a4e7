"""G: numbers that go wrong, and updates that never come."""

import warnings

import torch

from .._adapter import Factory
from .._case import Answer, Weights, case, kept, one, set_, spread, started


@case("G1", "NaN weights for one step, then 500 clean steps at 1", expected="1")
def g1(factory: Factory) -> Answer:
    """NaN times anything is NaN: an average that lets it in never recovers."""
    return _incident(factory, torch.nan)


@case("G1-inf", "the same with inf", expected="1")
def g1_inf(factory: Factory) -> Answer:
    """Infinity minus infinity is NaN."""
    return _incident(factory, torch.inf)


def _incident(factory: Factory, value: float) -> Answer:
    model = Weights(1.0)
    averager = started(factory, model, 0.9)
    set_(model, value)
    averager.update(model)
    set_(model, 1.0)
    for _ in range(500):
        averager.update(model)
    found = one(averager, "first")
    if not torch.isfinite(found).all():
        return Answer(f"{float(found[0])} for good", False)
    return spread(found, 1.0, 1e-6)


@case("G5", "the model trains, update is never called, the average is used", expected="warning")
def g5(factory: Factory) -> Answer:
    """A forgotten call costs the run, and nothing shows it until the end."""
    model = Weights(1.0)
    averager = factory(model, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.ones(3)).sum().backward()
        optimizer.step()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            kept(averager)
        except Exception as error:
            return Answer(f"raises {type(error).__name__}", True)
    return Answer("warns" if said else "silent", bool(said))


CASES = (g1, g1_inf, g5)
