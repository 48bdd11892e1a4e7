"""C: building an average."""

import warnings

import torch
from torch import nn

from .._adapter import Factory
from .._case import Answer, Weights, case, one, set_, spread, started, step_response


@case("C1", "older weight norm, built after a forward", expected="works")
def c1(factory: Factory) -> Answer:
    """The weight is no leaf of the graph then, and cannot be deep-copied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of the older form
        model = nn.utils.weight_norm(nn.Linear(3, 2))
    model(torch.ones(1, 3)).sum()
    set_(model, 1.0)
    averager = started(factory, model, 0.9)
    set_(model, 2.0)
    averager.update(model)
    answer = spread(one(averager, "weight_g"), step_response(1.0, 2.0, 0.9, 1), 1e-6)
    return Answer("works" if answer.right else answer.text, answer.right)


@case("C2", "a lazy layer that has no shape yet", expected="works, or an ordinary error")
def c2(factory: Factory) -> Answer:
    """The process must survive a model that cannot be averaged yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that lazy layers may change
        model = nn.LazyLinear(2)
    try:
        averager = factory(model, 0.9)
        model(torch.ones(1, 3))
        averager.update(model)
        moved = tuple(one(averager, "weight").shape) == (2, 3)
    except Exception as error:
        return Answer(f"raises {type(error).__name__}", True)
    return Answer("works" if moved else "silent", moved)


@case("C5", "weights change in place after building, no update", expected="average unchanged")
def c5(factory: Factory) -> Answer:
    """An average that shares memory with the model is the model."""
    model = Weights(1.0)
    averager = started(factory, model, 0.9)
    set_(model, 2.0)
    same = bool((one(averager, "first") == 1.0).all())
    return Answer("unchanged" if same else "follows the model", same)


@case("C-inference", "built under torch.inference_mode, updated outside", expected="works")
def c_inference(factory: Factory) -> Answer:
    """Tensors made in that mode can never be written to outside it."""
    model = Weights(1.0)
    with torch.inference_mode():
        averager = factory(model, 0.9)
    averager.update(model)
    set_(model, 2.0)
    averager.update(model)
    answer = spread(one(averager, "first"), step_response(1.0, 2.0, 0.9, 1), 1e-6)
    return Answer("works" if answer.right else answer.text, answer.right)


CASES = (c1, c2, c5, c_inference)
