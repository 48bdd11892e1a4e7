"""B: buffers."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._adapter import Factory
from .._case import Answer, NotOfferedError, case, kept, one, set_, started


class _Counters(nn.Module):
    """Buffers that survive no float arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("big", torch.tensor(2**53 + 1))
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("byte", torch.tensor([250, 5], dtype=torch.uint8))


class _Normed(nn.Module):
    """A layer and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))  # type: ignore[no-any-return]


class _Spectral(nn.Module):
    """A layer under spectral norm, in one of its two forms."""

    def __init__(self, wrap: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces the end of the older form
            self.layer = wrap(nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


@case("B1", "batch norm, 50 training steps: num_batches_tracked", expected="50")
def b1(factory: Factory) -> Answer:
    """A counter that is averaged or forgotten."""
    model = _Normed()
    averager = factory(model, 0.9)
    for _ in range(50):
        model(torch.randn(4, 2))
        averager.update(model)
    count = int(one(averager, "norm.num_batches_tracked"))
    return Answer(str(count), count == 50)


def _unchanged(factory: Factory, names: tuple[str, ...]) -> Answer:
    model = _Counters()
    averager = started(factory, model, 0.9)
    for step in range(3):
        set_(model, float(step))
        averager.update(model)
    live = model.state_dict()
    for name in names:
        found = one(averager, name)
        if found.dtype != live[name].dtype or not torch.equal(found, live[name]):
            return Answer(f"{name} is {found.tolist()}", False)
    return Answer("equal", True)


@case("B2", "an int64 buffer of 2^53 + 1", expected="equal to the bit")
def b2(factory: Factory) -> Answer:
    """No float64 holds this number."""
    return _unchanged(factory, ("big",))


@case("B2-bool", "a boolean and a uint8 buffer", expected="equal to the bit")
def b2_bool(factory: Factory) -> Answer:
    """Masks and bytes are no numbers to average."""
    return _unchanged(factory, ("flag", "byte"))


def _lengths(factory: Factory, wrap: Callable[[nn.Linear], nn.Module], names: str) -> Answer:
    """Sixty random weights, each with a forward that moves the vectors."""
    model = _Spectral(wrap)
    averager = factory(model, 0.99)
    for _ in range(60):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape))
        model(torch.randn(4, 12))
        averager.update(model)
    tensors = kept(averager)
    found = [float(tensors[name].norm()) for name in names.split() if name in tensors]
    if not found:
        raise NotOfferedError("keeps no buffers")
    return Answer(
        " and ".join(f"{length:.2f}" for length in found),
        all(abs(length - 1.0) < 1e-3 for length in found),
    )


@case("B3", "spectral norm: length of its two vectors, 60 random weights", expected="1 and 1")
def b3(factory: Factory) -> Answer:
    """The mean of unit vectors is no unit vector, and the scale of the layer depends on it."""
    names = "layer.parametrizations.weight.0._u layer.parametrizations.weight.0._v"
    return _lengths(factory, nn.utils.parametrizations.spectral_norm, names)


@case("B3-old", "the same, older form of spectral norm", expected="1 and 1")
def b3_old(factory: Factory) -> Answer:
    """The hook-based form keeps its vectors beside the weight."""
    return _lengths(factory, nn.utils.spectral_norm, "layer.weight_u layer.weight_v")


@case("B5", "batch norm's running mean after training far from its start", expected="within 1 %")
def b5(factory: Factory) -> Answer:
    """Statistics left at their initial values make the averaged network useless."""
    model = _Normed()
    averager = factory(model, 0.5)
    with torch.no_grad():
        model.linear.bias.fill_(50.0)
    for _ in range(100):
        model(torch.randn(8, 2))
        averager.update(model)
    # The live mean is within 50 * 0.9^100 of where it will stay, the average a step or two behind.
    found, live = one(averager, "norm.running_mean"), model.norm.running_mean
    assert live is not None
    away = float((found - live).abs().max() / live.abs().max())
    return Answer(f"{away:.2%} off", away < 0.01)


CASES = (b1, b2, b2_bool, b3, b3_old, b5)
