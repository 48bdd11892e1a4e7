"""TensorFlow's ExponentialMovingAverage: the values that TensorFlow 2.21 itself gives."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import polyak
from polyak.compat.tensorflow import ExponentialMovingAverage
from zoo import Sequence, Tied, train_step

# S3: a variable starts at [0, 0] and gets [1, 2] added before each apply, decay 0.99.
CONSTANT = [[1, 2], [1.01, 2.02], [1.0299, 2.0598], [1.0596010, 2.1192019], [1.0990049, 2.1980097]]
COUNTED = [
    [1, 2],
    [1.8181818, 3.6363635],
    [2.7045455, 5.4090910],
    [3.6013987, 7.2027974],
    [4.5004997, 9.0009994],
]
FROM_ZERO = [[0.01, 0.02], [0.0299, 0.0598], [0.0596010, 0.1192019]]
NAME = "v/ExponentialMovingAverage"


def variable(kind: str = "parameter") -> Tensor:
    return nn.Parameter(torch.zeros(2)) if kind == "parameter" else torch.zeros(2)


def grow(v: Tensor) -> None:
    with torch.no_grad():
        v.add_(torch.tensor([1.0, 2.0]))


def value(ema: ExponentialMovingAverage, v: Tensor | str) -> list[float]:
    found = ema.average(v)
    assert found is not None
    values: list[float] = found.tolist()
    return values


@pytest.mark.parametrize(
    ("kind", "zero_debias"), [("parameter", False), ("parameter", True), ("tensor", False)]
)
@pytest.mark.parametrize("how", ["by name", "in a list"])
def test_the_values_of_tensorflow(kind: str, how: str, zero_debias: bool) -> None:
    """A variable starts at its value at the first apply; zero_debias changes nothing for it."""
    v = variable(kind)
    ema = ExponentialMovingAverage(0.99, zero_debias=zero_debias)
    for expected in CONSTANT:
        grow(v)
        ema.apply({"v": v} if how == "by name" else [v])
        assert value(ema, v) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("source", ["tensor", "function"])
def test_the_values_of_tensorflow_with_num_updates(source: str) -> None:
    """min(0.99, (1 + n) / (10 + n)) of a count that is read at each apply."""
    v, count = variable(), torch.tensor(0)
    ema = ExponentialMovingAverage(0.99, count if source == "tensor" else lambda: int(count))
    for expected in COUNTED:
        grow(v)
        ema.apply({"v": v})
        assert value(ema, v) == pytest.approx(expected, rel=1e-6)
        count += 1


def test_the_values_of_tensorflow_when_first_applied_at_zero() -> None:
    """The average starts where the variable is at its first apply, not at the first change."""
    v = variable()
    ema = ExponentialMovingAverage(0.99)
    ema.apply({"v": v})
    assert value(ema, v) == [0.0, 0.0]
    for expected in FROM_ZERO:
        grow(v)
        ema.apply({"v": v})
        assert value(ema, v) == pytest.approx(expected, rel=1e-6)


def test_a_computed_tensor_starts_at_zero_and_is_corrected() -> None:
    """Values of TensorFlow 2.21 in graph mode, decay 0.9; Adam's correction gives the same."""
    ema = ExponentialMovingAverage(0.9, zero_debias=True)
    biased = 0.0
    measured = [1.0, 2.0526316165924072, 2.033210039138794, 2.895899772644043]
    for step, (x, expected) in enumerate(zip([1.0, 3.0, 2.0, 5.0], measured, strict=True), 1):
        computed = torch.tensor(x, requires_grad=True) * 1.0  # another object each time
        ema.apply({"loss": computed if step % 2 else computed.detach()})
        biased = 0.9 * biased + 0.1 * x
        assert value(ema, "loss") == pytest.approx(expected, rel=1e-6)
        assert value(ema, "loss") == pytest.approx(biased / (1 - 0.9**step), rel=1e-6)


def net() -> nn.Module:
    return Sequence(one=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), two=nn.Linear(4, 2))


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().double().clone() for n, p in model.named_parameters() if p.requires_grad}


def recurrence(
    moments: list[dict[str, Tensor]], decay: float, counts: list[int] | None = None
) -> dict[str, Tensor]:
    """S3: from the first value on, average -= (1 - d) (average - variable)."""
    average = moments[0]
    for index, live in enumerate(moments):
        d = decay if counts is None else min(decay, (1 + counts[index]) / (10 + counts[index]))
        average = {name: average[name] - (1 - d) * (average[name] - live[name]) for name in average}
    return average


def run(
    model: nn.Module, ema: ExponentialMovingAverage, steps: int, count: Tensor | None = None
) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    moments = []
    for _ in range(steps):
        train_step(model, torch.randn(4, 3).to(dtype), random)
        ema.apply(model)
        moments.append(trainable(model))
        if count is not None:
            count += 1
    return moments


def check(ema: ExponentialMovingAverage, expected: dict[str, Tensor]) -> None:
    for name, wanted in expected.items():
        found = ema.average(name)
        assert found is not None
        error = float((found.detach().double() - wanted).abs().max())
        assert error <= 1e-6 * float(wanted.abs().max()), (name, error)


@pytest.mark.parametrize("counted", [False, True])
def test_500_steps_are_the_recurrence(counted: bool) -> None:
    """The trainable parameters of a module, with and without the warm-up."""
    model, count = net(), torch.tensor(0)
    frozen: Any = model.get_submodule("one")
    frozen.requires_grad_(False)
    ema = ExponentialMovingAverage(0.99, count if counted else None)
    moments = run(model, ema, 500, count)
    check(ema, recurrence(moments, 0.99, list(range(500)) if counted else None))
    assert ema.average("one.weight") is None
    assert ema.average("norm.running_mean") is None
    assert [average.updates for average in ema.averages] == [500]


def test_half_precision_variables_have_a_float32_average() -> None:
    """TensorFlow's has the dtype of its variable, and stands still."""
    model = net().bfloat16()
    ema = ExponentialMovingAverage(0.999)
    moments = run(model, ema, 50)
    check(ema, recurrence(moments, 0.999))
    assert {t.dtype for t in ema.averages[0].tensors.values()} == {torch.float32}


def test_a_tied_weight_is_averaged_once_under_each_name() -> None:
    model = Tied()
    ema = ExponentialMovingAverage(0.9)
    ema.apply(dict(model.named_parameters(remove_duplicate=False)))
    start = model.head.weight.detach().clone()
    with torch.no_grad():
        model.head.weight.add_(1.0)
    ema.apply(dict(model.named_parameters(remove_duplicate=False)))
    for name in ("head.weight", "embedding.weight"):
        torch.testing.assert_close(ema.average(name), start + 0.1)
    assert set(ema.state_dict()) >= {"head.weight/ExponentialMovingAverage"}


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", (tmp_path / "meeting").as_uri(), world_size=1, rank=0)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_wrapped_model_has_the_names_of_the_bare_one() -> None:
    """Also where an attribute is called module."""
    model = Sequence(module=nn.Linear(3, 3))
    ema = ExponentialMovingAverage(0.9)
    ema.apply(DistributedDataParallel(model))
    ema.apply(model)
    assert set(ema.averages[0].tensors) == {"module.weight", "module.bias"}
    assert ema.averages[0].updates == 2


def test_nan_stays_out() -> None:
    v = variable()
    ema = ExponentialMovingAverage(0.9)
    ema.apply({"v": v})
    with torch.no_grad():
        v[0] = math.nan
    ema.apply({"v": v})
    assert value(ema, v) == [0.0, 0.0]


# ── names ────────────────────────────────────────────────────────────────────────────────────────


def test_names_are_those_of_tensorflow() -> None:
    """The variable's, and the ending."""
    v = variable()
    ema = ExponentialMovingAverage(0.99)
    assert ema.name == "ExponentialMovingAverage"
    assert ema.average_name("v") == NAME
    ema.apply({"v": v})
    assert ema.average_name(v) == NAME
    restore = ema.variables_to_restore()
    assert list(restore) == [NAME]
    assert restore[NAME] is v
    assert ExponentialMovingAverage(0.9, name="shadow").average_name("v") == "v/shadow"


def test_tensors_without_a_name_are_numbered() -> None:
    """Told apart as objects; one that is known keeps its name."""
    a, b, c = (nn.Parameter(torch.full((1,), float(i))) for i in range(3))
    ema = ExponentialMovingAverage(0.5)
    ema.apply([a, b, a])
    ema.apply([c])
    with torch.no_grad():
        b.add_(1.0)
    ema.apply([b, a])
    names = [ema.average_name(v) for v in (a, b, c)]
    ending = "/ExponentialMovingAverage"
    assert names == [f"Variable{ending}", f"Variable_1{ending}", f"Variable_2{ending}"]
    assert [value(ema, v) for v in (a, b, c)] == [[0.0], [1.5], [2.0]]
    assert [average.updates for average in ema.averages] == [2, 1]


def test_a_variable_without_an_average_has_none() -> None:
    ema = ExponentialMovingAverage(0.99)
    assert ema.average(variable()) is None
    assert ema.average("v") is None
    with pytest.raises(polyak.ArgumentError, match="Pass its name"):
        ema.average_name(variable())


def test_a_model_is_loaded_with_its_averages() -> None:
    """In a process that only evaluates: the model is all there is."""
    model = net()
    ema = ExponentialMovingAverage(0.9)
    run(model, ema, 10)
    checkpoint = {**model.state_dict(), **ema.state_dict()}

    fresh, reader = net(), ExponentialMovingAverage(0.9)
    restore = reader.variables_to_restore(fresh)
    assert set(restore) == {
        *(f"{name}/ExponentialMovingAverage" for name in trainable(model)),
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    for name, tensor in restore.items():
        tensor.data.copy_(checkpoint[name])
    for name, parameter in fresh.named_parameters():
        average = ema.average(name)
        assert average is not None
        assert torch.equal(parameter, average)
    assert torch.equal(fresh.get_buffer("norm.running_var"), model.get_buffer("norm.running_var"))

    with pytest.raises(polyak.OrderError, match="Pass the model"):
        reader.variables_to_restore()
    v = variable()
    assert reader.variables_to_restore({"v": v}) == {NAME: v}


# ── files ────────────────────────────────────────────────────────────────────────────────────────


def test_arrays_of_a_tensorflow_checkpoint_go_on_with_the_same_numbers() -> None:
    """Read by their names there; what else the checkpoint holds is left alone."""
    v = variable()
    for _ in range(3):
        grow(v)
    ema = ExponentialMovingAverage(0.99)
    ema.apply({"v": v})
    saved = np.array(CONSTANT[2], dtype=np.float32)
    ema.load_state_dict({"v": np.array([3, 6]), NAME: saved, "global_step": 3})
    assert value(ema, v) == pytest.approx(CONSTANT[2], rel=1e-6)
    for expected in CONSTANT[3:]:
        grow(v)
        ema.apply({"v": v})
        assert value(ema, v) == pytest.approx(expected, rel=1e-6)


def test_a_computed_average_goes_on_with_its_count() -> None:
    """TensorFlow keeps the count in `local_step`, and the sum before correction in `biased`."""
    whole, half = (ExponentialMovingAverage(0.9, zero_debias=True) for _ in range(2))
    values = [torch.tensor(x) for x in (1.0, 3.0, 2.0, 5.0)]
    for x in values[:2]:
        whole.apply({"loss": x})
    state = copy.deepcopy(whole.state_dict())
    key = "loss/ExponentialMovingAverage"
    assert set(state) == {key, f"{key}/biased", f"{key}/local_step"}
    assert float(state[f"{key}/local_step"]) == 2.0
    assert float(state[f"{key}/biased"]) == pytest.approx(0.9 * 0.1 * 1.0 + 0.1 * 3.0, rel=1e-6)
    half.apply({"loss": values[0]})
    half.load_state_dict(state)
    for x in values[2:]:
        whole.apply({"loss": x})
        half.apply({"loss": x})
        assert value(half, "loss") == pytest.approx(value(whole, "loss"), rel=1e-6)
    ours, theirs = half.averages[0].report(), whole.averages[0].report()
    assert ours.mean_age == pytest.approx(theirs.mean_age, rel=1e-9)
    assert ours.noise_window == pytest.approx(theirs.noise_window, rel=1e-9)


def test_a_state_that_does_not_fit_is_refused_and_nothing_changes() -> None:
    v = variable()
    ema = ExponentialMovingAverage(0.99)
    with pytest.raises(polyak.OrderError, match="after the first apply"):
        ema.load_state_dict({NAME: torch.zeros(2)})
    ema.apply({"v": v, "w": torch.ones(1)})
    for state in ({NAME: torch.ones(2)}, {NAME: torch.ones(3), f"w{NAME[1:]}": torch.ones(1)}):
        with pytest.raises(polyak.MatchError):
            ema.load_state_dict(state)
    assert value(ema, v) == [0.0, 0.0]


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "variables",
    [None, torch.zeros(2), 3, {"v": torch.zeros(2, dtype=torch.int64)}, [None], {"v": 1.0}, [], {}],
)
def test_what_is_no_variable_is_refused(variables: Any) -> None:
    """TensorFlow takes half, float and double variables."""
    ema = ExponentialMovingAverage(0.99)
    with pytest.raises(polyak.ArgumentError):
        ema.apply(variables)
    assert ema.averages == ()


def test_computed_tensors_must_be_said_to_be_such() -> None:
    """From zero and uncorrected, their average would be too small."""
    x = torch.ones(2, requires_grad=True) * 2
    with pytest.raises(polyak.ArgumentError, match="zero_debias=True"):
        ExponentialMovingAverage(0.9).apply({"x": x})
    with pytest.raises(polyak.ArgumentError, match="by name"):
        ExponentialMovingAverage(0.9, zero_debias=True).apply([x])
    with pytest.raises(polyak.ArgumentError, match="num_updates must be None"):
        ExponentialMovingAverage(0.9, 3, zero_debias=True).apply({"x": x})


def test_a_part_of_what_came_in_together_is_refused() -> None:
    a, b, c = (variable() for _ in range(3))
    ema = ExponentialMovingAverage(0.5)
    ema.apply({"a": a, "b": b})
    grow(a)
    with pytest.raises(polyak.MatchError, match="applied together"):
        ema.apply({"a": a, "c": c})
    assert value(ema, a) == [0.0, 0.0]
    assert ema.average("c") is None
    ema.apply({"a": a, "b": b, "c": c})
    assert value(ema, a) == [0.5, 1.0]


def test_another_variable_under_a_known_name_is_refused() -> None:
    """Another parameter, or another shape; a tensor may be replaced by its next value."""
    ema = ExponentialMovingAverage(0.5)
    ema.apply({"v": variable()})
    with pytest.raises(polyak.MatchError, match="another parameter"):
        ema.apply({"v": variable()})
    with pytest.raises(polyak.MatchError, match="must be the variable it was"):
        ema.apply({"v": torch.zeros(3)})
    ema = ExponentialMovingAverage(0.5)
    ema.apply({"v": torch.zeros(2)})
    ema.apply({"v": torch.ones(2)})
    assert value(ema, "v") == [0.5, 0.5]


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan])
def test_decays_out_of_range_are_refused(decay: float) -> None:
    with pytest.raises(polyak.ArgumentError, match="decay must be between 0 and 1"):
        ExponentialMovingAverage(decay)


@pytest.mark.parametrize("count", [-1, math.nan, "3", True, torch.zeros(2)])
def test_counts_that_count_nothing_are_refused(count: Any) -> None:
    with pytest.raises(polyak.ArgumentError, match="num_updates must be a number"):
        ExponentialMovingAverage(0.9, count)


def test_a_function_is_read_at_each_apply_only() -> None:
    """At construction there may be no count yet; a bad one is refused before anything moves."""
    counts = iter([0, -1, 1])
    v = variable()
    ema = ExponentialMovingAverage(0.99, lambda: next(counts))
    grow(v)
    ema.apply({"v": v})
    grow(v)
    with pytest.raises(polyak.ArgumentError, match="num_updates"):
        ema.apply({"v": v})
    assert value(ema, v) == [1.0, 2.0]
    ema.apply({"v": v})
    assert value(ema, v) == pytest.approx(COUNTED[1], rel=1e-6)


def test_a_variable_has_one_average() -> None:
    """Under a second name it is refused, before anything moves; a list knows its name."""
    v = variable()
    ema = ExponentialMovingAverage(0.5)
    ema.apply([v])
    grow(v)
    with pytest.raises(polyak.MatchError, match="'v' must have the name it had, 'Variable'"):
        ema.apply({"v": v})
    assert len(ema.averages) == 1
    assert ema.averages[0].updates == 1
    named = ExponentialMovingAverage(0.5)
    named.apply({"v": v})
    named.apply([v])
    assert [average.updates for average in named.averages] == [2]
