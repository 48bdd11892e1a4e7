"""The promises that all averages keep, for every rule of averaging and every awkward model."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracles
import polyak
from zoo import ZOO, Animal, bits, frozen_copy, tensors_of, train_step, weighted_sum

STEPS = 12

# What rounding may do: each of 12 updates rounds to half a unit in the last place of values below
# 8. (The oracle sums in float64 and rounds never.)
TOLERANCE = {torch.float32: 1e-5, torch.complex64: 1e-5, torch.float64: 1e-13}
TOLERANCE[torch.complex128] = TOLERANCE[torch.float64]

Use = polyak.Average | polyak.Window
Update = Callable[[], object]


@dataclass(frozen=True)
class Rule:
    """A way to average.

    Attributes:
        name: as it shows in test ids.
        build: makes the average of a model, and what updates it.
        weights: weight of each moment, the initial one first, after `STEPS` updates one apart.
    """

    name: str
    build: Callable[[nn.Module], tuple[Use, Update]]
    weights: Sequence[float]


def _single(name: str, schedule: polyak.Schedule, weights: Sequence[float]) -> Rule:
    def build(model: nn.Module) -> tuple[Use, Update]:
        average = polyak.Average(model, schedule)
        return average, average.update

    return Rule(name, build, weights)


def _member(model: nn.Module) -> tuple[Use, Update]:
    averages = polyak.Averages(
        model, {"long": polyak.Uniform(), "short": polyak.Exponential(decay=0.8, debias=False)}
    )
    return averages["short"], averages.update


def _window(model: nn.Module) -> tuple[Use, Update]:
    window = polyak.Window(model, k=5)
    return window, window.update


def _each(rule: Callable[[int], float]) -> list[float]:
    """Weights of a law that is defined by its decay at each step n = 1, 2, …."""
    weights = [1.0]
    for n in range(1, STEPS + 1):
        weights = [*(weight * rule(n) for weight in weights), 1.0 - rule(n)]
    return weights


def _shares(share: Callable[[int], float]) -> list[float]:
    """Weights of a law that is defined by its profile, with nothing left on the initial weights."""
    shares = [share(s) for s in range(1, STEPS + 1)]
    return [0.0, *(s / math.fsum(shares) for s in shares)]


def _power(gamma: float) -> list[float]:
    return _shares(lambda s: s ** (gamma + 1.0) - (s - 1.0) ** (gamma + 1.0))


def _gamma(sigma_rel: float) -> float:
    """The root of sigma^2 = (g + 1) / ((g + 2)^2 (g + 3)) by bisection (SCIENCE 4)."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2.0
        wide = (middle + 1.0) / ((middle + 2.0) ** 2 * (middle + 3.0)) > sigma_rel**2
        low, high = (middle, high) if wide else (low, middle)
    return low


def _plain_exponential(decay: float) -> list[float]:
    later = [(1.0 - decay) * decay ** (STEPS - s) for s in range(1, STEPS + 1)]
    return [decay**STEPS, *later]


# SCIENCE 3.1 to 3.3: closed forms where there are any, else the definition, step by step.
RULES = (
    _single("default", polyak.Power(sigma_rel=0.05), _power(_gamma(0.05))),
    _single("power", polyak.Power(gamma=1.0), _shares(lambda s: 2.0 * s - 1.0)),
    _single("exponential", polyak.Exponential(decay=0.8), _shares(lambda s: 0.8 ** (STEPS - s))),
    _single(
        "half_life", polyak.Exponential(half_life=3.0), _shares(lambda s: 2.0 ** ((s - STEPS) / 3))
    ),
    _single(
        "plain_exponential", polyak.Exponential(decay=0.9, debias=False), _plain_exponential(0.9)
    ),
    _single("uniform", polyak.Uniform(), _shares(lambda s: 1.0)),
    _single(
        "polynomial",
        polyak.Polynomial(3.0),
        _shares(lambda s: math.gamma(s + 3.0) / math.gamma(s)),
    ),
    _single("count_ramp", polyak.CountRamp(0.4), _each(lambda n: oracles.count_ramp(n, 0.4))),
    _single(
        "exponential_ramp",
        polyak.ExponentialRamp(0.9, tau=5.0),
        _each(lambda n: oracles.exponential_ramp(n, 0.9, 5.0)),
    ),
    _single(
        "inverse_gamma",
        polyak.InverseGamma(power=0.75, max_decay=0.8),
        _each(lambda n: oracles.inverse_gamma(n, 1.0, 0.75, 0.0, 0.8)),
    ),
    _single("half_life_ramp", polyak.HalfLifeRamp(0.2), _power(math.log(2.0) / 0.2 - 1.0)),
    _single(
        "cosine",
        polyak.Cosine(0.5, total=20),
        _each(lambda n: oracles.cosine(n, 0.5, 20)),
    ),
    _single("after", polyak.After(4, polyak.Uniform()), _shares(lambda s: float(s > 4))),
    _single("function", lambda *, now, elapsed: 0.7**elapsed, _plain_exponential(0.7)),
    Rule("member", _member, _plain_exponential(0.8)),
    Rule("window", _window, _shares(lambda s: float(s > STEPS - 5))),
)
KINDS = tuple(rule for rule in RULES if rule.name in ("default", "member", "window"))

every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
every_kind = pytest.mark.parametrize("rule", KINDS, ids=lambda rule: rule.name)
every_animal = pytest.mark.parametrize("animal", ZOO, ids=lambda animal: animal.name)


@dataclass(frozen=True)
class Trained:
    """A model after `STEPS` steps of training, its average, and what it went through."""

    model: nn.Module
    average: Use
    moments: list[dict[str, Tensor]]  # the initial one first

    def oracle(self, rule: Rule, name: str) -> Tensor:
        """The average that the weights of `rule` define."""
        return weighted_sum(rule.weights, [moment[name] for moment in self.moments])


def trained(rule: Rule, animal: Animal) -> Trained:
    """Average a run of random weights, the same for every rule."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model, inputs = animal.build(), animal.inputs()
    average, update = rule.build(model)
    moments = [frozen_copy(tensors_of(model))]
    for _ in range(STEPS):
        train_step(model, inputs, generator)
        update()
        moments.append(frozen_copy(tensors_of(model)))
    return Trained(model, average, moments)


def fresh(animal: Animal) -> nn.Module:
    """A model of the same class with other values in it."""
    torch.manual_seed(7)
    return animal.build()


@every_rule
@every_animal
def test_average_is_the_weighted_sum_of_all_moments(animal: Animal, rule: Rule) -> None:
    """Every averaged tensor is the sum over all moments, each with the weight of the rule."""
    run = trained(rule, animal)

    tensors = run.average.tensors

    assert set(tensors) == animal.averaged
    assert math.fsum(rule.weights) == pytest.approx(1.0, abs=1e-14)
    for name, average in tensors.items():
        oracle = run.oracle(rule, name)
        assert average.dtype == animal.dtype(name)
        tolerance = TOLERANCE[average.dtype]
        torch.testing.assert_close(
            average.to(oracle.dtype), oracle, rtol=tolerance, atol=tolerance, msg=name
        )
    assert run.average.updates == STEPS
    assert run.average.now == STEPS


@every_rule
@every_animal
def test_trained_weights_are_only_read(animal: Animal, rule: Rule) -> None:
    """The live model goes through the same values, to the bit, as without an average."""
    run = trained(rule, animal)
    run.average.weights()
    run.average.report()

    torch.manual_seed(0)
    alone, generator = animal.build(), torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        train_step(alone, animal.inputs(), generator)

    assert bits(run.model) == bits(alone)


@every_kind
@every_animal
def test_roles_are_those_of_the_design(animal: Animal, rule: Rule) -> None:
    """Trainable floating parameters and floating buffers are averaged; all else stays live."""
    average, _ = rule.build(animal.build())

    tensors = average.report().tensors

    assert {t.name for t in tensors if t.role == "average"} == animal.averaged
    assert {t.name for t in tensors if t.role == "live"} == animal.live
    assert all(t.why for t in tensors)
    assert {t.name: t.stored for t in tensors if t.role == "average"} == {
        name: str(animal.dtype(name)).removeprefix("torch.") for name in animal.averaged
    }


@every_kind
@every_animal
def test_live_tensors_come_from_the_model_bit_for_bit(animal: Animal, rule: Rule) -> None:
    """Integers, booleans, frozen weights and unit vectors are those of the model as it is now."""
    run = trained(rule, animal)

    weights = run.average.weights()

    now = bits(run.model)
    for name in animal.live - set(animal.spare):
        assert bits({"": weights[name]})[""] == now[name]
        assert weights[name].dtype == tensors_of(run.model)[name].dtype


@every_kind
@every_animal
def test_weights_load_strictly_into_a_fresh_model(animal: Animal, rule: Rule) -> None:
    """`weights()` has the names, shapes and dtypes of the model's own state dict."""
    run, other = trained(rule, animal), fresh(animal)
    if animal.name == "expanded":  # torch itself cannot load into shared elements
        other.ones, other.positions = other.ones.clone(), other.positions.clone()  # type: ignore

    weights = run.average.weights()
    other.load_state_dict(weights, strict=True)

    assert set(weights) == set(run.model.state_dict())
    loaded, live = tensors_of(other), tensors_of(run.model)
    for name in animal.averaged:
        assert loaded[name].dtype == live[name].dtype
        expected = run.average.tensors[name].to(live[name].dtype)
        assert bits({name: loaded[name]}) == bits({name: expected})


@every_kind
@every_animal
def test_weights_are_fresh_copies(animal: Animal, rule: Rule) -> None:
    """Writing into what `weights()` returned changes neither the model nor the average."""
    run = trained(rule, animal)
    before = bits(run.model), bits(run.average.tensors)

    for value in run.average.weights().values():
        if isinstance(value, Tensor):
            assert not value.requires_grad
            value.zero_()

    assert (bits(run.model), bits(run.average.tensors)) == before


@every_kind
@every_animal
def test_applied_lends_exactly_the_weights_and_gives_back_every_bit(
    animal: Animal, rule: Rule
) -> None:
    """Inside, the model's state is `weights()`; afterwards it is what it was, in the same place."""
    run = trained(rule, animal)
    weights = {k: v for k, v in run.average.weights().items() if isinstance(v, Tensor)}
    live, average = bits(run.model), bits(run.average.tensors)
    # Elements that share memory cannot take values of their own: those buffers must move.
    homes = {n: t.data_ptr() for n, t in tensors_of(run.model).items()}
    writable = {n for n, t in tensors_of(run.model).items() if 0 not in t.stride() or not t.dim()}

    with run.average.applied():
        state = {k: v for k, v in run.model.state_dict().items() if isinstance(v, Tensor)}
        assert bits(state) == bits(weights)
        for name in writable:
            assert tensors_of(run.model)[name].data_ptr() == homes[name]

    assert bits(run.model) == live
    assert bits(run.average.tensors) == average
    assert {n: t.data_ptr() for n, t in tensors_of(run.model).items()} == homes


@every_kind
@every_animal
def test_lent_model_computes_what_the_plain_class_computes(animal: Animal, rule: Rule) -> None:
    """Evaluation inside the block equals that of a fresh model with `weights()` loaded."""
    run, other = trained(rule, animal), fresh(animal)
    if animal.name == "expanded":
        pytest.skip("torch itself cannot load into elements that share memory")
    for name in animal.spare:  # what no state dict carries is the owner's to carry over
        setattr(other, name, tensors_of(run.model)[name].clone())
    other.load_state_dict(run.average.weights(), strict=True)
    inputs = animal.inputs()

    with run.average.applied(), torch.no_grad():
        lent = run.model.eval()(inputs)

    with torch.no_grad():
        assert torch.equal(lent, other.eval()(inputs))


@every_kind
@every_animal
def test_training_mode_inside_the_block_changes_nothing_outside(animal: Animal, rule: Rule) -> None:
    """A forward pass in training mode moves statistics and counters only for the block."""
    run = trained(rule, animal)
    live, average = bits(run.model), bits(run.average.tensors)

    with run.average.applied(), torch.no_grad():
        run.model.train()(animal.inputs())

    assert bits(run.model) == live
    assert bits(run.average.tensors) == average


@every_kind
@every_animal
def test_averaging_goes_on_after_the_block_as_if_it_had_not_been(
    animal: Animal, rule: Rule
) -> None:
    """A run that is evaluated after every step averages the same bits as one that never is."""
    plain = trained(rule, animal)

    torch.manual_seed(0)
    generator, model = torch.Generator().manual_seed(1), animal.build()
    average, update = rule.build(model)

    for _ in range(STEPS):
        train_step(model, animal.inputs(), generator)
        update()
        with average.applied(), torch.no_grad():
            model(animal.inputs())

    assert bits(average.tensors) == bits(plain.average.tensors)
    assert bits(model) == bits(plain.model)


@every_kind
@pytest.mark.parametrize("animal", [a for a in ZOO if a.units], ids=lambda animal: animal.name)
def test_unit_vectors_stay_unit(animal: Animal, rule: Rule) -> None:
    """The singular vectors of spectral norm have length one in `weights()` and in the block."""
    run = trained(rule, animal)

    weights = run.average.weights()

    for name in animal.units:
        assert weights[name].norm().item() == pytest.approx(1.0, abs=1e-6)
    with run.average.applied():
        for name in animal.units:
            assert tensors_of(run.model)[name].norm().item() == pytest.approx(1.0, abs=1e-6)


@every_kind
@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        ("tied", "embedding.weight", "head.weight"),
        ("shared", "first.weight", "second.weight"),
    ],
)
def test_ties_stay_ties(name: str, one: str, two: str, rule: Rule) -> None:
    """A tensor with two names is averaged once, shows under both, and is one after loading."""
    animal = next(a for a in ZOO if a.name == name)
    run, other = trained(rule, animal), fresh(animal)

    weights = run.average.weights()
    other.load_state_dict(weights)

    assert {one, two} & set(run.average.tensors) == {one}
    assert torch.equal(weights[one], weights[two])
    assert tensors_of(other)[one].data_ptr() == tensors_of(other)[two].data_ptr()
    assert torch.equal(tensors_of(other)[two], run.average.tensors[one])


@every_kind
@every_animal
def test_live_tensors_cost_no_memory(animal: Animal, rule: Rule) -> None:
    """The average holds one tensor in storage dtype for each averaged one, and nothing else."""
    run = trained(rule, animal)

    live = tensors_of(run.model)
    expected = sum(live[name].numel() * animal.dtype(name).itemsize for name in animal.averaged)

    stored = sum(t.numel() * t.element_size() for t in run.average.tensors.values())
    assert stored == expected
    if rule.name != "window":
        assert run.average.report().stored_bytes == expected


@every_kind
@every_animal
def test_copy_to_makes_another_model_the_average(animal: Animal, rule: Rule) -> None:
    """`copy_to` writes what `weights()` holds into a module of the same class."""
    run, other = trained(rule, animal), fresh(animal)
    if animal.name == "expanded":
        other.ones, other.positions = other.ones.clone(), other.positions.clone()  # type: ignore
    before = bits(run.model), bits(run.average.tensors)

    run.average.copy_to(other)

    weights = {k: v for k, v in run.average.weights().items() if isinstance(v, Tensor)}
    state = {k: v for k, v in other.state_dict().items() if isinstance(v, Tensor)}
    assert bits(state) == bits(weights)
    assert (bits(run.model), bits(run.average.tensors)) == before


@every_kind
@every_animal
def test_average_does_not_alias_the_model(animal: Animal, rule: Rule) -> None:
    """What is written into the live model shows in the average only through an update."""
    run = trained(rule, animal)
    before = bits(run.average.tensors)

    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1.0)

    assert bits(run.average.tensors) == before


@every_kind
def test_average_built_under_inference_mode_goes_on_outside(rule: Rule) -> None:
    """The tensors of an average are ordinary ones, wherever it was built."""
    animal = ZOO[0]
    model = animal.build()
    with torch.inference_mode():
        average, update = rule.build(model)

    train_step(model, animal.inputs(), torch.Generator().manual_seed(1))
    update()
    with average.applied():
        pass

    assert not any(t.is_inference() for t in average.tensors.values())


# ── the module ───────────────────────────────────────────────────────────────────────────────────


def shown(module: nn.Module) -> dict[str, bytes]:
    """The bits of what a checkpoint of the module would hold."""
    return bits({k: v for k, v in module.state_dict().items() if isinstance(v, Tensor)})


def full(average: Use) -> dict[str, bytes]:
    """The bits of `weights()`."""
    return bits({k: v for k, v in average.weights().items() if isinstance(v, Tensor)})


@every_kind
@every_animal
def test_module_is_the_average_after_every_update(animal: Animal, rule: Rule) -> None:
    """Same class, same names, same bits as `weights()`; what no state dict holds is the live one's.

    And after `reset` and `load_state_dict`, which are those of the owner for one of several.
    """
    torch.manual_seed(0)
    generator, model, inputs = torch.Generator().manual_seed(1), animal.build(), animal.inputs()
    average, update = rule.build(model)
    owner: Any = update.__self__  # type: ignore[attr-defined]
    module = average.module()
    saved = copy.deepcopy(owner.state_dict())
    assert type(module) is type(model)
    assert list(module.state_dict()) == list(model.state_dict())
    assert shown(module) == full(average)

    for index in range(STEPS):
        train_step(model, inputs, generator)
        update()
        assert shown(module) == full(average)
        for name in animal.spare:
            assert torch.equal(tensors_of(module)[name], tensors_of(model)[name])
        if index == STEPS // 2:
            saved = copy.deepcopy(owner.state_dict())
    before = shown(module)

    train_step(model, inputs, generator)
    owner.reset()
    assert shown(module) == full(average)
    owner.load_state_dict(saved)
    assert shown(module) == full(average) != before
    assert not any(part.training for part in module.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())


@every_kind
@every_animal
def test_module_computes_what_the_plain_class_computes(animal: Animal, rule: Rule) -> None:
    """Also inside the block, where the live model computes the same; no bit moves on any side."""
    run, other = trained(rule, animal), fresh(animal)
    if animal.name == "expanded":
        pytest.skip("torch itself cannot load into elements that share memory")
    module, inputs = run.average.module(), animal.inputs()
    for name in animal.spare:
        setattr(other, name, tensors_of(run.model)[name].clone())
    other.load_state_dict(run.average.weights(), strict=True)
    before = bits(run.model), bits(run.average.tensors)

    with torch.no_grad():
        expected = other.eval()(inputs)
        assert torch.equal(module(inputs), expected)
        with run.average.applied():
            assert torch.equal(module(inputs), expected)
            assert torch.equal(run.model.eval()(inputs), expected)
        assert torch.equal(module(inputs), expected)

    assert (bits(run.model), bits(run.average.tensors)) == before


@every_kind
@pytest.mark.parametrize(
    "animal", [a for a in ZOO if "batch_norm" in a.name], ids=lambda animal: animal.name
)
def test_module_shows_recomputed_statistics_until_the_next_update(
    animal: Animal, rule: Rule
) -> None:
    """As `weights()` does."""
    run = trained(rule, animal)
    module = run.average.module()
    before = shown(module)

    polyak.refresh_norms(run.average, [animal.inputs()])

    assert shown(module) == full(run.average) != before


@every_kind
@every_animal
def test_module_shares_what_it_can(animal: Animal, rule: Rule) -> None:
    """Parameters are the average's memory where dtypes agree, frozen ones the live model's."""
    run = trained(rule, animal)

    module = run.average.module()

    live, tensors = tensors_of(run.model), run.average.tensors
    for name, parameter in module.named_parameters():
        if name in tensors:
            assert (parameter.data_ptr() == tensors[name].data_ptr()) == (
                tensors[name].dtype == live[name].dtype
            )
        else:
            assert parameter.data_ptr() == live[name].data_ptr()
    owned = {t.data_ptr() for t in (*live.values(), *tensors.values()) if t.numel()}
    assert not {b.data_ptr() for b in module.buffers() if b.numel()} & owned
