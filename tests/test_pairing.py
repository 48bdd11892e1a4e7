"""Pairing by name: `copy_to` and `module(factory=)` write all that belongs together, or nothing."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak
from zoo import Bits, Tied, bits, frozen_copy, tensors_of

HALF = polyak.Exponential(decay=0.5, debias=False)


class Agent(nn.Module):
    """An encoder with statistics, and a head."""

    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, hidden), nn.BatchNorm1d(hidden))
        self.head = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))  # type: ignore[no-any-return]


class Cached(nn.Module):
    """A table that no checkpoint holds, of a length that grows with use."""

    def __init__(self, length: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("table", torch.arange(float(length)), persistent=False)


def shift(model: nn.Module, by: float = 1.0) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)


def averaged(model: nn.Module) -> polyak.Average:
    """An average that differs from its model in every parameter."""
    average = polyak.Average(model, HALF)
    shift(model)
    average.update()
    shift(model)
    return average


def refused(
    average: polyak.Average,
    module: nn.Module,
    error: type[polyak.AveragingError],
    match: str,
    **options: Any,
) -> None:
    """Both uses of pairing refuse it with these words, and nothing has changed."""
    modes = [m.training for m in module.modules()]
    grads = [p.requires_grad for p in module.parameters()]
    before: tuple[Bits, Bits] = bits(module), bits(average.tensors)
    with pytest.raises(error, match=match):
        average.copy_to(module, **options)
    with pytest.raises(error, match=match):
        average.module(factory=lambda: module, **options)
    assert (bits(module), bits(average.tensors)) == before
    assert [m.training for m in module.modules()] == modes
    assert [p.requires_grad for p in module.parameters()] == grads
    assert average._engine.views == {}


# ── what belongs together ────────────────────────────────────────────────────────────────────────


def test_every_tensor_of_one_class_is_paired() -> None:
    """Parameters, statistics and counters; the report names each, and its text counts them."""
    online, target = Agent(), Agent()
    average = averaged(online)

    coverage = average.copy_to(target)

    assert coverage.complete
    assert sorted(coverage.pairs) == [(name, name) for name in sorted(tensors_of(online))]
    assert str(coverage) == f"{len(tensors_of(online))} tensors paired by name"
    assert bits(target) == bits(average.weights())


def test_pairs_are_by_name_and_not_by_position() -> None:
    """A class that declares the same layers in another order gets each its own."""

    class One(nn.Module):
        def __init__(self, order: str) -> None:
            super().__init__()
            for name in order:
                setattr(self, name, nn.Linear(2, 2))

    online, target = One("abc"), One("cab")
    average = averaged(online)

    average.copy_to(target)
    teacher = average.module(factory=lambda: One("bca"))

    assert bits(target) == bits(teacher) == bits(average.weights())
    assert len(set(bits(target).values())) == 6


def test_wrappers_add_nothing_to_a_name() -> None:
    """A compiled target, an average of a wrapped model: the names are those of the class."""
    online = Agent()
    average = averaged(nn.DataParallel(online))
    target = Agent()

    coverage = average.copy_to(torch.compile(target, backend="eager"))  # type: ignore[arg-type]

    assert coverage.complete
    assert bits(target) == bits(average.weights())


@pytest.mark.parametrize("as_function", [False, True], ids=["mapping", "function"])
def test_names_say_how_the_others_are_called(as_function: bool) -> None:
    """A mapping, which leaves unlisted names alone, or a function of every name."""

    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
            self.head = nn.Linear(4, 2)

    def rename(name: str) -> str:
        return name.replace("encoder.", "backbone.")

    average, target = averaged(Agent()), Teacher()
    table = {n: rename(n) for n in tensors_of(Agent()) if n.startswith("encoder")}
    names: Any = rename if as_function else table

    coverage = average.copy_to(target, names=names)
    teacher = average.module(factory=Teacher, names=names)

    expected = {rename(name): value for name, value in average.weights().items()}
    assert coverage.complete
    assert ("encoder.0.weight", "backbone.0.weight") in coverage.pairs
    assert bits(target) == bits(teacher) == bits(expected)


@pytest.mark.parametrize("as_function", [False, True], ids=["mapping", "function"])
def test_none_leaves_a_tensor_out(as_function: bool) -> None:
    """A target without a head is complete when the head is left out on purpose."""
    average = averaged(Agent())
    target = nn.Module()
    target.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    table = {"head.weight": None, "head.bias": None}
    names: Any = (lambda name: table.get(name, name)) if as_function else table

    coverage = average.copy_to(target, names=names)

    assert coverage.complete
    assert "head" not in str(coverage)
    expected = {n: v for n, v in average.weights().items() if n.startswith("encoder")}
    assert bits(target) == bits(expected)
    refused(
        average,
        Agent(),
        polyak.MatchError,
        r"got 0 only in the average \[\] and 2 only in the module \['head\.bias', 'head\.weight'\]",
        names=names,
    )


def test_exchanged_names_exchange_the_tensors() -> None:
    """A mapping may send a to b and b to a: two critics that take turns."""
    pair, target = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), nn.ModuleDict()
    target.update({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    average = averaged(pair)
    crossed = {f"{x}.{key}": f"{y}.{key}" for x, y in ("ab", "ba") for key in ("weight", "bias")}

    average.copy_to(target, names=crossed)

    assert bits(target["a"]) == bits({k: average.tensors[f"b.{k}"] for k in ("weight", "bias")})
    assert bits(target["b"]) == bits({k: average.tensors[f"a.{k}"] for k in ("weight", "bias")})


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_partial_leaves_the_rest_as_it_is_and_says_what(share: float) -> None:
    """On either side: names without a partner are listed, and no bit of them moves."""
    average = averaged(Agent())
    target = nn.Module()
    target.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    target.projector = nn.Linear(4, 7)
    start, projector = frozen_copy(tensors_of(target)), bits(target.projector)

    coverage = average.copy_to(target, share=share, partial=True)

    assert not coverage.complete
    assert coverage.only_in_average == ("head.bias", "head.weight")
    assert coverage.only_in_module == ("projector.bias", "projector.weight")
    assert str(coverage).splitlines() == [
        "7 tensors paired by name",
        "only in the average: head.bias",
        "only in the average: head.weight",
        "only in the module: projector.bias",
        "only in the module: projector.weight",
    ]
    assert bits(target.projector) == projector
    for name in ("encoder.0.weight", "encoder.0.bias"):
        exact = start[name] + share * (average.tensors[name] - start[name])
        torch.testing.assert_close(tensors_of(target)[name], exact)


# ── ties ─────────────────────────────────────────────────────────────────────────────────────────


def test_tie_that_one_side_names_once_is_no_gap() -> None:
    """`named_parameters` lists a tied weight once; in the target it is written under both names."""
    online, target = Tied(), Tied()
    average = polyak.Average(dict(online.named_parameters()), HALF)
    shift(online)
    average.update()

    coverage = average.copy_to(target)
    teacher = average.module(factory=Tied)

    assert coverage.complete
    assert "head.weight" not in average.tensors
    for module in (target, teacher):
        head = module.get_parameter("head.weight")
        assert torch.equal(head, average.tensors["embedding.weight"])
        assert head is module.get_parameter("embedding.weight")


def test_tied_average_fills_an_untied_module() -> None:
    """Both of its tensors get the one average; a built module shows it in both, as one."""
    average = averaged(Tied())

    def untied() -> Tied:
        model = Tied()
        model.head.weight = nn.Parameter(torch.zeros(7, 4))
        return model

    target = untied()
    average.copy_to(target)
    teacher = average.module(factory=untied)

    assert bits(target) == bits(teacher) == bits(average.weights())
    assert target.head.weight is not target.embedding.weight


def test_two_tensors_for_one_are_refused() -> None:
    """Which of the two averages should a tied target show?"""
    model = Tied()
    model.head.weight = nn.Parameter(torch.zeros(7, 4))
    refused(
        averaged(model),
        Tied(),
        polyak.MatchError,
        "'head.weight' must have one partner in the average, got 'embedding.weight' and "
        r"'head\.weight'\. Tie the tensors of the average too, or untie those of the module\.",
    )
    refused(
        averaged(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})),
        nn.ModuleDict({"c": nn.Linear(2, 2)}),
        polyak.MatchError,
        r"'c\.weight' must have one partner in the average, got 'a\.weight' and 'b\.weight'",
        names=lambda name: "c" + name[1:],
    )


# ── what no checkpoint holds ─────────────────────────────────────────────────────────────────────


def test_tables_that_no_checkpoint_holds_need_no_partner() -> None:
    """One that has grown, is missing or was dropped blocks nothing, and is left as it is."""
    model = Cached()
    average = averaged(model)
    by_state = polyak.Average(dict(model.state_dict()), HALF)

    for length in (2, 5):
        for use in (average, by_state):
            target = Cached(length)
            coverage = use.copy_to(target)
            assert coverage.complete
            assert torch.equal(target.get_buffer("table"), torch.arange(float(length)))
            assert bits(target.linear) == bits(
                {k: use.tensors[f"linear.{k}"] for k in ("weight", "bias")}
            )
            teacher = use.module(factory=partial(Cached, length))
            assert bits(teacher)["linear.weight"] == bits(use.tensors)["linear.weight"]
    assert average.copy_to(nn.ModuleDict({"linear": nn.Linear(2, 2)})).complete
    dropped = Cached()
    dropped.register_buffer("table", None, persistent=False)
    assert average.copy_to(dropped).complete


def test_table_of_the_same_shape_is_written() -> None:
    """A position table that the live model has changed goes along where it fits."""
    model = Cached()
    average = averaged(model)
    model.get_buffer("table").fill_(7.0)
    target = Cached()

    average.copy_to(target)

    assert torch.equal(target.get_buffer("table"), torch.full((2,), 7.0))


# ── what is refused ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (
            lambda: nn.ModuleDict({"encoder": Agent().encoder}),
            r"the average and the module must hold the same tensors, got 2 only in the average "
            r"\['head\.bias', 'head\.weight'\] and 0 only in the module \[\]\. Pass a module of "
            "the same class, or partial=True to leave these as they are",
        ),
        (
            lambda: nn.ModuleDict({**dict(Agent().named_children()), "more": nn.Linear(2, 2)}),
            r"got 0 only in the average \[\] and 2 only in the module \['more\.bias', 'more\.weig",
        ),
        (
            lambda: nn.Linear(3, 4),
            r"must share names, got 9 only in the average .* and 2 only in the module \['bias', "
            r"'weight'\]\. Say with names= how those of the module are called",
        ),
        (nn.Tanh, r"must share names, got 9 only in the average .* and 0 only in the module \[\]"),
        (
            lambda: Agent(hidden=5),
            r"'encoder\.0\.weight' must have one shape and kind, got \[4, 3\] torch\.float32 in "
            r"the average and \[5, 3\] torch\.float32 in the module",
        ),
    ],
    ids=["less", "more", "others", "nothing", "shape"],
)
def test_what_does_not_belong_together_is_refused(
    build: Callable[[], nn.Module], match: str
) -> None:
    """By name, before anything is written."""
    refused(averaged(Agent()), build(), polyak.MatchError, match)


def test_partial_is_no_leave_for_other_shapes_or_for_nothing_at_all() -> None:
    """Names that agree with other shapes are a mistake, and so is an empty pairing."""
    average = averaged(Agent())
    refused(average, Agent(hidden=5), polyak.MatchError, "one shape and kind", partial=True)
    refused(average, nn.Linear(3, 4), polyak.MatchError, "must share names", partial=True)
    refused(average, Agent(), polyak.MatchError, "must share names", names=lambda name: None)


def test_kinds_must_agree() -> None:
    """A float that would be cut to an integer, or a complex to its real part, is refused."""
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    model.register_buffer("level", torch.zeros(2))
    other.register_buffer("level", torch.zeros(2, dtype=torch.int64))
    refused(averaged(model), other, polyak.MatchError, "'level' must have one shape and kind")
    refused(averaged(other), model, polyak.MatchError, "'level' must have one shape and kind")
    complex_model = nn.ParameterDict({"w": torch.zeros(2, dtype=torch.complex64)})
    real_model = nn.ParameterDict({"w": torch.zeros(2)})
    refused(averaged(complex_model), real_model, polyak.MatchError, "complex64 in the average")
    refused(averaged(real_model), complex_model, polyak.MatchError, "complex64 in the module")


def test_names_that_rename_nothing_are_refused() -> None:
    """A slip in a name would leave a tensor where it was, unnoticed with partial=True."""
    average = averaged(Agent())
    for some in (False, True):
        refused(
            average,
            Agent(),
            polyak.ArgumentError,
            r"names must rename tensors of the average, got \['encodr\.0\.weight'\]",
            names={"encodr.0.weight": "encoder.0.weight"},
            partial=some,
        )


@pytest.mark.parametrize("names", ["encoder.", 3, ["a", "b"]])
def test_names_must_be_a_mapping_or_a_function(names: Any) -> None:
    refused(
        averaged(Agent()),
        Agent(),
        polyak.ArgumentError,
        "names must be a mapping or a function from name to name, got",
        names=names,
    )


def test_names_must_lead_to_names() -> None:
    """A function that forgets its argument is said, not taken for a tensor without a partner."""
    wrong: Any
    for wrong in (lambda name: 3, {"head.weight": 3}):
        refused(
            averaged(Agent()),
            Agent(),
            polyak.ArgumentError,
            r"names must .*, got 3",
            names=wrong,
            partial=True,
        )


def test_error_of_a_names_function_comes_through() -> None:
    """It is the caller's, and nothing was written."""
    average, target = averaged(Agent()), Agent()
    before = bits(target)
    known: dict[str, str] = {}
    with pytest.raises(KeyError):
        average.copy_to(target, names=known.__getitem__)
    assert bits(target) == before


def test_all_is_checked_before_anything_is_written() -> None:
    """The last tensor is the wrong one: the first has not moved."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "z": nn.Linear(2, 2)})
    average = averaged(model)
    target = nn.ModuleDict({"a": nn.Linear(2, 2), "z": nn.Linear(2, 3)})
    refused(average, target, polyak.MatchError, r"'z\.weight'")
    nn.init.constant_(model["z"].get_parameter("bias"), 1e6)
    average.reset()
    narrow = nn.ModuleDict({"a": nn.Linear(2, 2), "z": nn.Linear(2, 2)}).half()
    before = bits(narrow)
    with pytest.raises(polyak.ArgumentError, match=r"'z\.bias' must fit torch\.float16"):
        average.copy_to(narrow)
    assert bits(narrow) == before
