"""Which tensors are averaged, which stay live, why, and what they are called."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel

import polyak
from zoo import ZOO, Counters, Spare, Tied, bits, tensors_of, train_step


def roles_of(average: polyak.Average) -> dict[str, str]:
    """Role by canonical name."""
    return {t.name: t.role for t in average.report().tensors}


def reasons_of(average: polyak.Average) -> dict[str, str]:
    """Reason by canonical name."""
    return {t.name: t.why for t in average.report().tensors}


def averaged(average: polyak.Average | polyak.Window) -> set[str]:
    """Names of what is averaged."""
    return set(average.tensors)


# ── the two roles ────────────────────────────────────────────────────────────────────────────────


def test_report_gives_each_tensor_its_role_and_a_reason_that_names_it() -> None:
    """A reader of the report sees why a tensor is not averaged."""
    model = nn.Sequential(
        nn.Linear(2, 2),
        nn.BatchNorm1d(2),
        Spare(),
        Counters(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)),
    )
    model[0].requires_grad_(False)

    why = reasons_of(polyak.Average(model))

    assert "frozen" in why["0.weight"]
    assert "trainable" in why["1.weight"]
    assert "buffer" in why["1.running_mean"]
    assert "int64" in why["1.num_batches_tracked"]
    assert "non-persistent" in why["2.cache"]
    assert "bool" in why["3.flag"]
    assert "uint8" in why["3.byte"]
    assert "spectral norm" in why["4.parametrizations.weight.0._u"]


def test_report_prints_every_role() -> None:
    """`print(average.report())` shows both roles, each with its reason and names."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    text = str(polyak.Average(model).report())

    assert "average        trainable parameter: 0.weight, 0.bias, 1.weight, … (4)" in text
    assert "1.num_batches_tracked" in text


def test_named_tensors_are_averaged_when_they_are_floating_or_complex() -> None:
    """Of tensors by name, whether they need gradients or not, only whole numbers stay live."""
    named = {
        "plain": torch.ones(2),
        "trained": torch.ones(2, requires_grad=True),
        "complex": torch.ones(2, dtype=torch.complex64),
        "count": torch.tensor(3),
        "flag": torch.tensor(True),
    }

    average = polyak.Average(named)

    assert averaged(average) == {"plain", "trained", "complex"}
    assert set(average.weights()) == set(named)


@pytest.mark.parametrize("form", ["mapping", "items", "iterator"])
def test_named_tensors_come_as_a_mapping_or_as_pairs(form: str) -> None:
    """`named_parameters()` and a state dict are averaged like the module they came from."""
    model = nn.Linear(2, 2)
    pairs = dict(model.named_parameters())
    source: Any = {
        "mapping": pairs,
        "items": list(pairs.items()),
        "iterator": model.named_parameters(),
    }[form]
    average = polyak.Average(source, polyak.Uniform())

    for step in range(1, 4):
        with torch.no_grad():
            model.weight.fill_(float(step))
        average.update()

    assert torch.equal(average.weights()["weight"], torch.full((2, 2), 2.0))


def test_state_dict_is_averaged_with_its_ties() -> None:
    """Two names of one memory are one average, also where parameters were detached."""
    average = polyak.Average(Tied().state_dict())

    assert averaged(average) == {"embedding.weight", "body.weight", "body.bias"}
    assert {"embedding.weight", "head.weight"} <= set(average.weights())


def test_views_of_one_memory_that_differ_are_no_tie() -> None:
    """Parameters that lie side by side in one buffer are averaged each for itself."""
    flat = torch.zeros(8)
    average = polyak.Average({"left": flat[:4], "right": flat[4:], "all": flat})

    assert averaged(average) == {"left", "right", "all"}


def test_replaced_values_of_a_mapping_are_followed() -> None:
    """Tensors are looked up by name at every update: their owner may put new ones there."""
    live = {"w": torch.zeros(2)}
    average = polyak.Average(live, polyak.Uniform())

    for step in (1.0, 2.0):
        live["w"] = torch.full((2,), step)
        average.update()

    assert torch.equal(average.weights()["w"], torch.full((2,), 1.5))


def test_reassigned_buffer_is_followed() -> None:
    """`self.level = …` in a forward makes a new buffer object: the average sees it."""
    model = Spare()
    average = polyak.Average(model, polyak.Uniform())

    for step in (1.0, 3.0):
        model.level = torch.full((3,), step)
        average.update()

    assert torch.equal(average.weights()["level"], torch.full((3,), 2.0))


# ── include, exclude, roles ──────────────────────────────────────────────────────────────────────


def body() -> nn.Module:
    """Names enough to choose among."""
    model = nn.Sequential()
    model.add_module("body", nn.Linear(2, 2))
    model.add_module("norm", nn.BatchNorm1d(2))
    model.add_module("head", nn.Linear(2, 2))
    model.add_module("ice", nn.Linear(2, 2).requires_grad_(False))
    return model


USUAL = {
    "body.weight",
    "body.bias",
    "norm.weight",
    "norm.bias",
    "norm.running_mean",
    "norm.running_var",
    "head.weight",
    "head.bias",
}


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({}, USUAL),
        ({"include": "body.*"}, {"body.weight", "body.bias"}),
        ({"include": ["body.*", "head.bias"]}, {"body.weight", "body.bias", "head.bias"}),
        ({"include": lambda name, tensor: tensor.dim() == 2}, {"body.weight", "head.weight"}),
        ({"exclude": "*.bias"}, {n for n in USUAL if not n.endswith(".bias")}),
        ({"exclude": ("norm.*", "head.*")}, {"body.weight", "body.bias"}),
        ({"exclude": lambda name, tensor: name.startswith("norm")}, USUAL - {
            "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}),
        ({"include": "*.weight", "exclude": "norm.*"}, {"body.weight", "head.weight"}),
        ({"include": "*"}, USUAL),  # include narrows; it does not thaw
        ({"roles": {"ice.*": "average"}}, USUAL | {"ice.weight", "ice.bias"}),
        ({"roles": {"norm.running_*": "live"}}, USUAL - {"norm.running_mean", "norm.running_var"}),
        ({"roles": {"ice.bias": "average", "ice.*": "live"}}, USUAL | {"ice.bias"}),
        ({"roles": lambda name, tensor: "average" if name == "ice.bias" else None},
         USUAL | {"ice.bias"}),
        ({"include": "body.*", "roles": {"head.bias": "average"}},
         {"body.weight", "body.bias", "head.bias"}),
        ({"exclude": "*", "roles": {"head.bias": "average"}}, {"head.bias"}),
    ],
)  # fmt: skip
def test_include_exclude_and_roles_choose_by_pattern_or_function(
    wishes: dict[str, Any], expected: set[str]
) -> None:
    """Include narrows, exclude takes away, roles has the last word."""
    for build in (
        polyak.Average,
        lambda model, **k: polyak.Averages(model, {"a": polyak.Uniform()}, **k)["a"],
        lambda model, **k: polyak.Window(model, k=2, **k),
    ):
        assert averaged(build(body(), **wishes)) == expected


def test_chosen_roles_are_said_in_the_report() -> None:
    """The reason names the argument that decided."""
    average = polyak.Average(
        body(), include=["body.*", "head.*"], exclude="head.bias", roles={"ice.bias": "average"}
    )

    why = reasons_of(average)

    assert why["norm.weight"] == "not in include"
    assert why["head.bias"] == "in exclude"
    assert why["ice.bias"] == "in roles"


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_wish_for_one_name_of_a_tied_tensor_holds_for_the_tensor(name: str) -> None:
    """Whichever of its names is excluded, a tied tensor stays live under both."""
    model = Tied()
    average = polyak.Average(model, exclude=name)

    weights = average.weights()

    assert averaged(average) == {"body.weight", "body.bias"}
    assert torch.equal(weights["embedding.weight"], model.embedding.weight)
    assert torch.equal(weights["head.weight"], model.embedding.weight)


@pytest.mark.parametrize("argument", ["include", "exclude", "roles"])
def test_pattern_without_a_match_is_refused(argument: str) -> None:
    """A typing error in a pattern is not a silent choice."""
    wish: Any = {"boddy.*": "live"} if argument == "roles" else ["body.*", "boddy.*"]

    with pytest.raises(polyak.ArgumentError, match=rf"{argument} must match.*'boddy\.\*'"):
        polyak.Average(body(), **{argument: wish})


def test_role_that_does_not_exist_is_refused() -> None:
    """The message names the word and the tensor."""
    with pytest.raises(polyak.ArgumentError, match=r"'averaged'.*'head.bias'"):
        polyak.Average(body(), roles={"head.bias": cast(Any, "averaged")})


@pytest.mark.parametrize("name", ["big", "flag", "byte"])
def test_whole_numbers_cannot_be_given_the_role_average(name: str) -> None:
    """A mean of counters or flags means nothing, so it is refused by name."""
    with pytest.raises(polyak.ArgumentError, match=rf"'{name}'"):
        polyak.Average(Counters(), roles={name: "average"})


def test_non_persistent_buffer_may_be_averaged_and_stays_out_of_the_state_dict() -> None:
    """What `roles` asks for is lent; `weights()` still loads strictly."""
    model = Spare()
    average = polyak.Average(model, polyak.Uniform(), roles={"cache": "average"})
    for step in (1.0, 3.0):
        model.cache.fill_(step)
        average.update()

    with average.applied():
        assert torch.equal(model.cache, torch.full((3,), 2.0))

    assert torch.equal(model.cache, torch.full((3,), 3.0))
    Spare().load_state_dict(average.weights(), strict=True)


# ── names through wrappers ───────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process, which is what `DistributedDataParallel` wants to see."""
    store: Path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def _compile(model: nn.Module) -> nn.Module:
    return cast(nn.Module, torch.compile(model, backend="eager"))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "ddp": _ddp,
    "compile": _compile,
    "data_parallel": DataParallel,
    "checkpoint": checkpoint_wrapper,
    "compile_of_ddp": lambda model: _compile(_ddp(model)),
    "ddp_of_compile": lambda model: _ddp(_compile(model)),
    "ddp_of_checkpoint": lambda model: _ddp(checkpoint_wrapper(model)),
}

every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
ANIMALS = [a for a in ZOO if a.name in ("batch_norm", "tied", "module", "new_spectral_norm")]
some_animals = pytest.mark.parametrize("animal", ANIMALS, ids=lambda animal: animal.name)


def _values(model: nn.Module, seed: int) -> None:
    """New values in every floating tensor, without a forward (it would compile)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors_of(model).values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator))


@every_wrapper
@some_animals
@pytest.mark.usefixtures("process_group")
def test_wrapping_before_or_after_building_changes_nothing(
    wrap: Callable[[nn.Module], nn.Module], animal: Any
) -> None:
    """The average of a wrapped model has the names and bits of that of the plain one."""
    runs = []
    for when in ("never", "before", "after"):
        torch.manual_seed(0)
        model = animal.build()
        source = wrap(model) if when == "before" else model
        average = polyak.Average(source, polyak.Exponential(decay=0.5, debias=False))
        wrapped = wrap(model) if when == "after" else source
        for seed in range(3):
            _values(model, seed)
            average.update()
        runs.append((bits(average.tensors), bits(average.weights()), roles_of(average)))
        with average.applied():
            assert bits(model.state_dict()) == runs[-1][1]
        other = animal.build()
        other.load_state_dict(average.weights(), strict=True)
        average.copy_to(wrapped)
        assert bits(model.state_dict()) == runs[-1][1]

    assert runs[0] == runs[1] == runs[2]
    assert set(runs[0][0]) == animal.averaged


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", ["ddp", "compile", "checkpoint", "data_parallel"])
def test_wrapped_model_computes_with_the_average_inside_the_block(name: str) -> None:
    """The forward of the wrapper, traced before the block, reads the lent values."""
    model = nn.Linear(3, 2)
    wrapped = WRAPPERS[name](model)
    inputs = torch.ones(2, 3)
    average = polyak.Average(wrapped)
    average.update()
    trained = model.bias.detach().clone()
    with torch.no_grad():
        before = wrapped(inputs).clone()
        model.bias.add_(1.0)
    with torch.no_grad(), average.applied():
        assert torch.allclose(wrapped(inputs), before, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(wrapped(inputs), before + 1.0, atol=1e-6)
    assert torch.equal(model.bias, trained + 1.0)


def _checkpoint_inside(model: nn.Module) -> None:
    model.one = checkpoint_wrapper(cast(nn.Module, model.one))


def _compile_inside(model: nn.Module) -> None:
    model.one = _compile(cast(nn.Module, model.one))


def _sync_batch_norm(model: nn.Module) -> None:
    nn.SyncBatchNorm.convert_sync_batchnorm(model)


@pytest.mark.parametrize("rewrap", [_checkpoint_inside, _compile_inside, _sync_batch_norm])
@pytest.mark.parametrize("when", ["before", "after"])
def test_wrapping_a_layer_inside_changes_nothing(
    rewrap: Callable[[nn.Module], None], when: str
) -> None:
    """A layer that is wrapped, or whose module is exchanged around its parameters, is followed."""
    animal = next(a for a in ZOO if a.name == "batch_norm")
    runs = []
    for touched in (False, True):
        torch.manual_seed(0)
        model = animal.build()
        if touched and when == "before":
            rewrap(model)
        average = polyak.Average(model, polyak.Exponential(decay=0.5, debias=False))
        _values(model, 0)
        average.update()
        if touched and when == "after":
            rewrap(model)
        _values(model, 1)
        average.update()
        with average.applied():
            lent = [bits({"": t})[""] for t in tensors_of(model).values()]
        runs.append((bits(average.weights()), lent))

    assert runs[0] == runs[1]


def test_attribute_called_module_keeps_its_name() -> None:
    """Wrappers are known by their type: a class of one's own is not one, whatever it holds."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    model = nn.Sequential(Holder())

    assert averaged(polyak.Average(model)) == {"0.module.weight", "0.module.bias"}
    assert averaged(polyak.Average(Holder())) == {"module.weight", "module.bias"}


def test_tied_tensor_is_called_by_its_first_name_and_the_report_has_the_others() -> None:
    """As in a state dict: the first place on the walk gives the name."""
    average = polyak.Average(Tied())

    aliases = {t.name: t.aliases for t in average.report().tensors}

    assert aliases["embedding.weight"] == ("head.weight",)


# ── tensors that are more than memory ────────────────────────────────────────────────────────────


class Boxed(Tensor):
    """A tensor that holds its values somewhere else, as quantised ones do."""

    content: Tensor

    @staticmethod
    def __new__(cls, content: Tensor) -> "Boxed":
        return Tensor._make_wrapper_subclass(cls, content.shape, dtype=content.dtype)

    def __init__(self, content: Tensor) -> None:
        self.content = content

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Boxed({self.content!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = torch.utils._pytree.tree_map_only(
            Boxed, lambda box: box.content, (args, kwargs or {})
        )
        return torch.utils._pytree.tree_map_only(Tensor, Boxed, func(*args, **kwargs))


class Tagged(nn.Parameter):
    """A parameter with a note on it: ordinary memory."""


class TaggedTensor(Tensor):
    """A tensor with a note on it: ordinary memory too."""


def with_boxes(*, trained: bool) -> nn.Module:
    """A layer beside two boxes of one shape."""
    model = nn.Linear(2, 2)
    for name, value in (("first", 1.0), ("second", 2.0)):
        box = nn.Parameter(Boxed(torch.full((3,), value)), requires_grad=trained)
        model.register_parameter(name, box)
    return model


def test_tensor_subclass_is_refused_by_name() -> None:
    """What a subclass keeps elsewhere cannot be averaged: its name, its class, and a way out."""
    model = with_boxes(trained=True)

    with pytest.raises(polyak.ArgumentError, match=r"'first'.*Boxed.*exclude"):
        polyak.Average(model)

    assert averaged(polyak.Average(model, exclude=["first", "second"])) == {"weight", "bias"}


def test_frozen_tensor_subclass_stays_live() -> None:
    """A quantised base under a trained adapter: only what is averaged must be ordinary."""
    model = with_boxes(trained=False)
    average = polyak.Average(model)

    weights = average.weights()

    assert averaged(average) == {"weight", "bias"}
    for name, value in (("first", 1.0), ("second", 2.0)):
        box = weights[name]
        assert isinstance(box, Boxed)
        assert torch.equal(box.content, torch.full((3,), value))


@pytest.mark.parametrize("kind", [Tagged, TaggedTensor])
def test_tagged_parameter_is_averaged_like_any_other(kind: type) -> None:
    """A subclass that adds no behaviour is averaged, and keeps its class and object in a block."""
    model = nn.Linear(2, 2)
    values = torch.ones(2, 2)
    model.weight = Tagged(values) if kind is Tagged else nn.Parameter(values.as_subclass(kind))
    tagged = model.weight
    plain = nn.Linear(2, 2)
    averages = [polyak.Average(m, polyak.Uniform()) for m in (model, plain)]
    for step in (1.0, 3.0):
        for m, average in zip((model, plain), averages, strict=True):
            with torch.no_grad():
                m.weight.fill_(step)
            average.update()

    with averages[0].applied():
        assert torch.equal(model.weight.detach(), torch.full((2, 2), 2.0))

    assert model.weight is tagged
    assert isinstance(model.weight, kind)
    assert type(averages[0].tensors["weight"]) is Tensor
    assert bits(averages[0].tensors)["weight"] == bits(averages[1].tensors)["weight"]


def test_no_module_is_copied() -> None:
    """Building needs no deepcopy: a module that refuses to be copied is averaged."""

    class Unique(nn.Linear):
        def __deepcopy__(self, memo: object) -> "Unique":
            raise AssertionError("a module was copied")

        __copy__ = __reduce_ex__ = cast(Any, __deepcopy__)

    model = Unique(2, 2)
    average = polyak.Average(model)
    train_step(model, torch.ones(1, 2), torch.Generator().manual_seed(0))
    average.update()

    with warnings.catch_warnings(), average.applied():
        average.report()

    assert set(average.weights()) == {"weight", "bias"}
