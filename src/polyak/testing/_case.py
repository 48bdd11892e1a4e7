"""A question to an averaging class, its answer, and the small steps that all questions share."""

import io
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import MatchError
from ._adapter import Averager, Factory


@dataclass(frozen=True)
class Answer:
    """What a class did.

    Attributes:
        text: in a few words, or the number it gave.
        right: None where the class does not offer what was asked for.
    """

    text: str
    right: bool | None


@dataclass(frozen=True)
class Case:
    """One failure that people really met, as a question with a known answer.

    Attributes:
        key: a letter and number, unique: the letter says which kind of failure.
        question: what is done.
        expected: the right answer, in words.
        ask: does it; whatever it raises is an answer too (see `conformance`).
    """

    key: str
    question: str
    expected: str
    ask: Callable[[Factory], Answer]


class NotOfferedError(BaseException):
    """The class under test has no such method, or keeps no such tensor.

    No `Exception`: a case whose right answer is an error must not take it for one.
    """


class Weights(nn.Module):
    """Two vectors of equal values: two, so that kernels for lists of tensors are reached."""

    def __init__(self, value: float = 1.0, *, size: int = 3, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.first = nn.Parameter(torch.full((size,), value, dtype=dtype))
        self.second = nn.Parameter(torch.full((size,), value, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Anything that depends on both."""
        return x * self.first + self.second


def case(
    key: str, question: str, *, expected: str
) -> Callable[[Callable[[Factory], Answer]], Case]:
    """Make a `Case` of the function that asks."""
    return lambda ask: Case(key, question, expected, ask)


@torch.no_grad()
def set_(model: nn.Module, value: float) -> None:
    """Give every parameter one value, as an optimizer step would: in place."""
    for parameter in model.parameters():
        parameter.fill_(value)


def started(factory: Factory, model: nn.Module, decay: float) -> Averager:
    """An average after its first update, which some classes use to copy the weights."""
    averager = factory(model, decay)
    averager.update(model)
    return averager


def step_response(start: float, end: float, decay: float, updates: int) -> float:
    """Return the average of a weight that jumps from start to end: end - (end-start) decay^n."""
    return end - (end - start) * decay**updates


def kept(averager: Averager) -> dict[str, Tensor]:
    """Copies of the averaged tensors by name."""
    found = averager.averaged()
    tensors = found.state_dict() if isinstance(found, nn.Module) else found
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def one(averager: Averager, name: str) -> Tensor:
    """One averaged tensor; not offered where the class keeps none of that name."""
    tensors = kept(averager)
    if name not in tensors:
        raise NotOfferedError(f"keeps no {name!r}")
    return tensors[name]


def offered(averager: Averager, *names: str) -> Any:
    """The averager, if it has these optional methods.

    Returns Any, as they are in no type.
    """
    for name in names:
        if getattr(averager, name, None) is None:
            raise NotOfferedError(f"no {name}")
    return averager


def lent(averager: Averager, model: nn.Module) -> AbstractContextManager[object]:
    """The block in which the model holds the average."""
    block: AbstractContextManager[object] = offered(averager, "applied").applied(model)
    return block


def through_a_file(state: object) -> Any:
    """What is left of a state after torch.save and torch.load(weights_only=True)."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copies(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers as they are now."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors agree in names and in every bit."""
    if set(one) != set(other):
        raise MatchError(f"names must agree, got {sorted(set(one) ^ set(other))} in one set only.")
    return all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def number(value: float, expected: float, tolerance: float) -> Answer:
    """An answer that is a number."""
    return Answer(f"{value:.4f}", abs(value - expected) <= tolerance)  # NaN is not near anything


def spread(values: Tensor, expected: float, tolerance: float) -> Answer:
    """Equal numbers, all of which must be right; shows how far apart they are, if they are."""
    wide = values.double()
    apart = float((wide - wide.mean()).abs().max())
    text = f"{float(wide.mean()):.4f}" + (f" ± {apart:.2g}" if apart > tolerance else "")
    return Answer(text, bool(((wide - expected).abs() <= tolerance).all()))


def refused(act: Callable[[], object], otherwise: str = "silent") -> Answer:
    """An answer that should be an error; `SystemExit` is none, and goes on to the caller."""
    try:
        act()
    except Exception as error:
        return Answer(f"raises {type(error).__name__}", True)
    return Answer(otherwise, False)
