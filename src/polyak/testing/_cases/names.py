"""D and I: names, wrappers, structure, coverage."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from .._adapter import Factory
from .._case import (
    Answer,
    Weights,
    case,
    kept,
    offered,
    one,
    refused,
    set_,
    spread,
    started,
    step_response,
    through_a_file,
)


class _Wrapper(nn.Module):
    """What DistributedDataParallel looks like from outside: names gain the prefix `module.`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class _Ordered(nn.Module):
    """Two layers of one shape, declared in the order given."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(2, 2, bias=False))


class _Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x))  # type: ignore[no-any-return]


def _compiled(model: nn.Module) -> nn.Module:
    """Wrap as torch.compile does; nothing is compiled before a call."""
    compiled: Any = torch.compile(model, backend="eager")  # typed as a function
    return cast(nn.Module, compiled)


def _moves(factory: Factory, model: nn.Module, seen: nn.Module) -> Answer:
    """Build on `model`, update with `seen`, which holds the same parameters."""
    averager = factory(model, 0.9)
    averager.update(seen)
    set_(model, 2.0)
    averager.update(seen)
    answer = spread(one(averager, "first"), step_response(1.0, 2.0, 0.9, 1), 1e-6)
    return Answer("moves" if answer.right else f"{answer.text} for 1.1", answer.right)


@case("D1", "built on the plain model, updated with the compiled one", expected="moves")
def d1(factory: Factory) -> Answer:
    """Every name gains a prefix; an average that looks them up misses all of them."""
    model = Weights(1.0)
    return _moves(factory, model, _compiled(model))


@case("D2", "built on the plain model, updated with a wrapped one", expected="moves")
def d2(factory: Factory) -> Answer:
    """The same with the prefix of data parallel training."""
    model = Weights(1.0)
    return _moves(factory, model, _Wrapper(model))


@case("D3", "built on a compiled model, loaded into the bare class", expected="loads, strictly")
def d3(factory: Factory) -> Answer:
    """A file whose names have a prefix fits no model of its class."""
    model = Weights(1.0)
    averager = started(factory, _compiled(model), 0.9)
    bare = Weights(0.0)
    try:
        bare.load_state_dict(kept(averager))
    except RuntimeError:
        return Answer("names do not fit", False)
    right = bool((bare.first == 1.0).all())
    return Answer("loads" if right else "wrong values", right)


@case("D5", "saved, loaded where the layers are declared in another order", expected="by name")
def d5(factory: Factory) -> Answer:
    """Tensors that meet by position change places, and nothing says so."""
    model = _Ordered("first", "second")
    with torch.no_grad():
        model.get_parameter("first.weight").fill_(1.0)
        model.get_parameter("second.weight").fill_(2.0)
    state = through_a_file(offered(started(factory, model, 0.9), "state_dict").state_dict())
    other = factory(_Ordered("second", "first"), 0.9)
    offered(other, "load_state_dict").load_state_dict(state)
    first, second = (float(one(other, f"{name}.weight").mean()) for name in ("first", "second"))
    right = (first, second) == (1.0, 2.0)
    return Answer("by name" if right else "exchanged", right)


@case("D7", "saved, loaded where the head has another size", expected="error")
def d7(factory: Factory) -> Answer:
    """The tensors cannot fit; a load that does not look breaks the next update, or worse."""
    state = offered(started(factory, nn.Linear(3, 4), 0.9), "state_dict").state_dict()
    other = offered(factory(nn.Linear(3, 5), 0.9), "load_state_dict")
    return refused(lambda: other.load_state_dict(through_a_file(state)))


@case("D9", "tied embedding and head, 1 then 2, decay 0.9, one update", expected="1.1")
def d9(factory: Factory) -> Answer:
    """A tensor with two names is averaged once."""
    model = _Tied()
    set_(model, 1.0)
    averager = started(factory, model, 0.9)
    set_(model, 2.0)
    averager.update(model)
    tensors = kept(averager)
    values = torch.stack([tensors[n].mean() for n in tensors if n.endswith("weight")])
    return spread(values, step_response(1.0, 2.0, 0.9, 1), 1e-6)


@case("D10", "a model without a single tensor", expected="error")
def d10(factory: Factory) -> Answer:
    """An average of nothing is a mistake somewhere else."""
    return refused(lambda: started(factory, nn.Sequential(nn.Tanh()), 0.9))


@case("D-replaced", "a layer of the model is replaced by a new one", expected="moves, or error")
def d_replaced(factory: Factory) -> Answer:
    """The average must not go on with the tensors that nobody trains any more."""
    model = Weights(1.0)
    averager = started(factory, model, 0.9)
    model.first = nn.Parameter(torch.full((3,), 2.0))
    try:
        averager.update(model)
    except Exception as error:
        return Answer(f"raises {type(error).__name__}", True)
    answer = spread(one(averager, "first"), step_response(1.0, 2.0, 0.9, 1), 1e-6)
    return Answer("moves" if answer.right else "silent", answer.right)


@case("I4", "the model has more tensors than the average", expected="averaged, or error")
def i4(factory: Factory) -> Answer:
    """What is left out of an average without a word is missed at the end of the run."""
    model = Weights(1.0)
    averager = started(factory, model, 0.9)
    model.third = nn.Parameter(torch.ones(3))
    try:
        averager.update(model)
        covered = "third" in kept(averager)
    except Exception as error:
        return Answer(f"raises {type(error).__name__}", True)
    return Answer("averaged" if covered else "silent", covered)


CASES = (d1, d2, d3, d5, d7, d9, d10, d_replaced, i4)
