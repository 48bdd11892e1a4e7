"""Small awkward models: how to build each, how to call it, and what DESIGN expects of it."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Bits = dict[str, bytes]


@dataclass(frozen=True)
class Animal:
    """One model of the zoo.

    Attributes:
        name: as it shows in test ids.
        build: makes the model; the same weights after the same seed.
        inputs: makes a batch for it.
        averaged: canonical names of the tensors that are averaged, tied ones once.
        live: canonical names of all others.
        dtypes: storage of averages where it is not float32.
        units: tensors that must stay of length one.
        spare: names of non-persistent buffers, which are in no state dict.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    averaged: frozenset[str]
    live: frozenset[str] = frozenset()
    dtypes: Mapping[str, torch.dtype] | torch.dtype = torch.float32
    units: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()

    def dtype(self, name: str) -> torch.dtype:
        """Storage dtype that DESIGN gives to the average called `name`."""
        if isinstance(self.dtypes, torch.dtype):
            return self.dtypes
        return self.dtypes.get(name, torch.float32)


# ── what is done to a model, and what is read off it ─────────────────────────────────────────────


def train_step(model: nn.Module, inputs: Tensor, generator: torch.Generator) -> None:
    """Give every trainable parameter new random values, then run a forward in training mode.

    The forward moves what moves by itself: running statistics, counters, spectral vectors.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(
                    parameter.shape,
                    dtype=torch.complex128 if parameter.is_complex() else torch.float64,
                    generator=generator,
                )
                parameter.copy_(noise)
        model.train()
        model(inputs)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names, non-persistent ones too."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    return found


def frozen_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values as they are now."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def bits_of(tensor: Tensor) -> bytes:
    """The exact bits, so that NaN equals itself and -0.0 differs from 0.0."""
    flat = tensor.detach().resolve_conj().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def bits(tensors: Mapping[str, Tensor] | nn.Module) -> Bits:
    """The exact bits of every tensor by name."""
    named = tensors_of(tensors) if isinstance(tensors, nn.Module) else tensors
    return {name: bits_of(tensor) for name, tensor in named.items()}


def weighted_sum(weights: Iterable[float], moments: Iterable[Tensor]) -> Tensor:
    """sum of w(t) x(t) in float64: the definition of an average, one moment at a time.

    An element that never changes is that element, so that a mask of -inf stays one.
    """
    values = [m.to(torch.complex128 if m.is_complex() else torch.float64) for m in moments]
    total = torch.zeros_like(values[0])
    for weight, value in zip(weights, values, strict=True):
        if weight != 0.0:
            total = total + weight * value
    constant = torch.stack([value == values[0] for value in values]).all(0)
    return torch.where(constant, values[0], total)


# ── the animals ──────────────────────────────────────────────────────────────────────────────────


class Sequence(nn.Module):
    """Layers one after the other, with names of their own."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class Tied(nn.Module):
    """An embedding whose weight is the head's too: two names, one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(x)))  # type: ignore[no-any-return]


class Counters(nn.Module):
    """Buffers that no float can hold, and one that a float could: nothing may touch them."""

    big: Tensor
    flag: Tensor
    byte: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("big", torch.tensor(2**53 + 1))
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("byte", torch.tensor([250, 5], dtype=torch.uint8))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.linear(x)  # type: ignore[no-any-return]


class Complex(nn.Module):
    """Complex parameters in both widths."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
        self.wide = nn.Parameter(torch.randn(2, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex64) @ self.narrow * self.wide).abs()


class Odd(nn.Module):
    """A scalar and tensors without elements, as parameters and as buffers."""

    nothing: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.also_empty = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("nothing", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.empty.sum()


class Spare(nn.Module):
    """A floating buffer outside the state dict, one inside, and a mask of -inf."""

    cache: Tensor
    level: Tensor
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("cache", torch.ones(3), persistent=False)
        self.register_buffer("level", torch.zeros(3))
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.cache += 1.0
            self.level += x.mean(0)
        return self.linear(x) + self.cache + self.level  # type: ignore[no-any-return]


class Shared(nn.Module):
    """One submodule under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.between = nn.Tanh()
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))  # type: ignore[no-any-return]


class WithExtra(nn.Module):
    """Extra state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.words = ["one"]

    def get_extra_state(self) -> dict[str, list[str]]:
        return {"words": self.words}

    def set_extra_state(self, state: dict[str, list[str]]) -> None:
        self.words = state["words"]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


class Expanded(nn.Module):
    """Buffers whose elements share memory: they can be read, but not written in place."""

    ones: Tensor
    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("ones", torch.ones(1, 3).expand(4, 3))
        self.register_buffer("positions", torch.arange(3).expand(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.ones[0] + self.positions[0])  # type: ignore[no-any-return]


class Strided(nn.Module):
    """Parameters that are transposed, cut out of a larger memory, or side by side in one."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(12)
        self.transposed = nn.Parameter(torch.randn(3, 4).t())
        self.column = nn.Parameter(torch.randn(4, 3)[:, 1])
        self.left = nn.Parameter(flat[:8].view(4, 2))
        self.right = nn.Parameter(flat[8:])

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.transposed.t() + self.column + self.right) @ self.left


def _quietly(build: Callable[[], nn.Module]) -> nn.Module:
    """Build with what torch warns of (old weight norm, lazy layers) left unsaid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build()


def _mlp() -> nn.Module:
    return Sequence(one=nn.Linear(3, 5), act=nn.Tanh(), two=nn.Linear(5, 2))


def _old_weight_norm() -> nn.Module:
    model = _quietly(lambda: Sequence(layer=nn.utils.weight_norm(nn.Linear(3, 2))))
    model(torch.ones(1, 3)).sum()  # `layer.weight` is no leaf now: deepcopy would fail
    return model


def _new_weight_norm() -> nn.Module:
    return Sequence(layer=nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))


def _old_spectral_norm() -> nn.Module:
    return _quietly(lambda: Sequence(layer=nn.utils.spectral_norm(nn.Linear(3, 4))))


def _new_spectral_norm() -> nn.Module:
    return Sequence(layer=nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)))


def _batch_norm() -> nn.Module:
    return Sequence(one=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), two=nn.Linear(4, 2))


def _frozen() -> nn.Module:
    model = _mlp()
    model.one.requires_grad_(False)
    return model


def all_frozen() -> nn.Module:
    """A model with nothing to average: refused."""
    return _mlp().requires_grad_(False)


def _all_frozen_batch_norm() -> nn.Module:
    return _batch_norm().requires_grad_(False)


def empty() -> nn.Module:
    """A model without a tensor: refused."""
    return Sequence(act=nn.Tanh())


def lazy() -> nn.Module:
    """A model without shapes until its first forward: refused until then."""
    return _quietly(lambda: Sequence(layer=nn.LazyLinear(2)))


def _mixed() -> nn.Module:
    return Sequence(
        narrow=nn.Linear(3, 4).bfloat16(),
        to_half=Cast(torch.float16),
        half=nn.Linear(4, 4).half(),
        to_double=Cast(torch.float64),
        wide=nn.Linear(4, 2).double(),
    )


class Cast(nn.Module):
    """Change of dtype between layers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def _rows(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    def make() -> Tensor:
        return torch.linspace(-1.0, 2.0, torch.Size(shape).numel()).reshape(shape).to(dtype)

    return make


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MLP = _names("one.weight one.bias two.weight two.bias")

ZOO = (
    Animal("mlp", _mlp, _rows(4, 3), _MLP),
    Animal(
        "tied",
        Tied,
        lambda: torch.tensor([[0, 3], [6, 1]]),
        _names("embedding.weight body.weight body.bias"),
    ),
    Animal(
        "batch_norm",
        _batch_norm,
        _rows(4, 3),
        _MLP | _names("norm.weight norm.bias norm.running_mean norm.running_var"),
        _names("norm.num_batches_tracked"),
    ),
    Animal(
        "counters",
        Counters,
        _rows(4, 3),
        _names("linear.weight linear.bias"),
        _names("big flag byte seen"),
    ),
    Animal(
        "old_weight_norm",
        _old_weight_norm,
        _rows(4, 3),
        _names("layer.weight_g layer.weight_v layer.bias"),
    ),
    Animal(
        "new_weight_norm",
        _new_weight_norm,
        _rows(4, 3),
        _names(
            "layer.parametrizations.weight.original0 layer.parametrizations.weight.original1 "
            "layer.bias"
        ),
    ),
    Animal(
        "old_spectral_norm",
        _old_spectral_norm,
        _rows(4, 3),
        _names("layer.weight_orig layer.bias"),
        _names("layer.weight_u layer.weight_v"),
        units=("layer.weight_u", "layer.weight_v"),
    ),
    Animal(
        "new_spectral_norm",
        _new_spectral_norm,
        _rows(4, 3),
        _names("layer.parametrizations.weight.original layer.bias"),
        _names("layer.parametrizations.weight.0._u layer.parametrizations.weight.0._v"),
        units=("layer.parametrizations.weight.0._u", "layer.parametrizations.weight.0._v"),
    ),
    Animal(
        "frozen",
        _frozen,
        _rows(4, 3),
        _names("two.weight two.bias"),
        _names("one.weight one.bias"),
    ),
    # Running statistics are floating buffers, so they are averaged though no weight is.
    Animal(
        "all_frozen_batch_norm",
        _all_frozen_batch_norm,
        _rows(4, 3),
        _names("norm.running_mean norm.running_var"),
        _MLP | _names("norm.weight norm.bias norm.num_batches_tracked"),
    ),
    Animal(
        "complex",
        Complex,
        _rows(4, 3),
        _names("narrow wide"),
        dtypes={"narrow": torch.complex64, "wide": torch.complex128},
    ),
    Animal(
        "channels_last",
        lambda: Sequence(conv=nn.Conv2d(3, 4, 2)).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        lambda: _rows(2, 3, 4, 4)().to(memory_format=torch.channels_last),
        _names("conv.weight conv.bias"),
    ),
    Animal("bf16", lambda: _mlp().bfloat16(), _rows(4, 3, dtype=torch.bfloat16), _MLP),
    Animal("fp16", lambda: _mlp().half(), _rows(4, 3, dtype=torch.float16), _MLP),
    Animal(
        "fp64",
        lambda: _mlp().double(),
        _rows(4, 3, dtype=torch.float64),
        _MLP,
        dtypes=torch.float64,
    ),
    Animal(
        "mixed",
        _mixed,
        _rows(4, 3, dtype=torch.bfloat16),
        _names("narrow.weight narrow.bias half.weight half.bias wide.weight wide.bias"),
        dtypes={"wide.weight": torch.float64, "wide.bias": torch.float64},
    ),
    Animal(
        "spare",
        Spare,
        _rows(4, 3),
        _names("linear.weight linear.bias level mask"),
        _names("cache"),
        spare=("cache",),
    ),
    Animal("odd", Odd, _rows(4, 3), _names("scale empty also_empty nothing")),
    Animal(
        "module",
        lambda: Sequence(module=nn.Linear(3, 3), _orig_mod=nn.Linear(3, 2)),
        _rows(4, 3),
        _names("module.weight module.bias _orig_mod.weight _orig_mod.bias"),
    ),
    Animal("shared", Shared, _rows(4, 3), _names("first.weight first.bias")),
    Animal("extra", WithExtra, _rows(4, 3), _names("linear.weight linear.bias")),
    Animal(
        "expanded",
        Expanded,
        _rows(4, 3),
        _names("linear.weight linear.bias ones"),
        _names("positions"),
    ),
    Animal("strided", Strided, _rows(4, 3), _names("transposed column left right")),
)
