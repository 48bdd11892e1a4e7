"""Never silently wrong: a misuse raises the named error, says what to do, and changes nothing."""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import polyak
from snags import interrupted_in
from zoo import Bits, all_frozen, bits, empty, lazy, tensors_of, train_step

Use = polyak.Average | polyak.Averages | polyak.Window


def model_of() -> nn.Module:
    """Parameters, buffers and a counter."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def single(model: nn.Module, **settings: Any) -> polyak.Average:
    """The plain average."""
    return polyak.Average(model, polyak.Exponential(decay=0.5, debias=False), **settings)


def several(model: nn.Module, **settings: Any) -> polyak.Averages:
    """Two averages at once."""
    return polyak.Averages(model, {"a": polyak.Uniform(), "b": polyak.Power(gamma=3.0)}, **settings)


def window(model: nn.Module, **settings: Any) -> polyak.Window:
    """A moving average."""
    return polyak.Window(model, k=2, **settings)


BUILDS: list[Callable[..., Use]] = [single, several, window]
every_build = pytest.mark.parametrize("build", BUILDS)


def train(model: nn.Module, seed: int) -> None:
    """New weights and statistics."""
    train_step(model, torch.randn(6, 3), torch.Generator().manual_seed(seed))


def trained(build: Callable[..., Use], **settings: Any) -> tuple[nn.Module, Use]:
    """A model and its average after three updates, with live weights ahead of it."""
    model = model_of()
    average = build(model, **settings)
    for seed in range(3):
        train(model, seed)
        average.update()
    train(model, 9)
    return model, average


@dataclass(frozen=True)
class Snapshot:
    """Everything that a refused call must leave alone."""

    live: Bits
    modes: list[bool]
    state: dict[str, Any]
    clock: tuple[float, int]


def snapshot(model: nn.Module, average: Use) -> Snapshot:
    """Take down every bit of the live model and of the average's state."""
    return Snapshot(
        bits(model),
        [module.training for module in model.modules()],
        plain(average.state_dict()),
        (average.now, average.updates),
    )


def plain(value: Any) -> Any:
    """A state with bytes in place of tensors, so that == compares all of it."""
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(value.shape), bits({"": value})[""])
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def copied(state: Any) -> Any:
    """A state of its own, as it comes from a file."""
    return copy.deepcopy(state)


# ── nothing to average, nothing to average yet ───────────────────────────────────────────────────


@every_build
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (empty, r"no tensors"),
        (all_frozen, r"frozen parameter.*Unfreeze"),
        (lambda: nn.Sequential(nn.Linear(2, 2)).requires_grad_(False), r"frozen"),
        (dict, r"no tensors"),
        (lambda: {"count": torch.tensor(1), "flag": torch.tensor(True)}, r"int64.*"),
    ],
)
def test_nothing_to_average_is_refused(
    build: Callable[..., Use], make: Callable[[], Any], words: str
) -> None:
    """A model without anything to average is an error at once, with the reasons."""
    with pytest.raises(polyak.ArgumentError, match=rf"(?s)something to average.*{words}"):
        build(make())


@every_build
def test_wishes_that_leave_nothing_are_refused(build: Callable[..., Use]) -> None:
    """An exclude that takes everything is an error too, and says so."""
    with pytest.raises(polyak.ArgumentError, match=r"something to average.*in exclude"):
        build(model_of(), exclude="*")


@every_build
def test_uninitialised_lazy_parameter_is_refused_until_a_forward(build: Callable[..., Use]) -> None:
    """The message names the parameter and asks for a forward; after one it works."""
    model = lazy()

    with pytest.raises(polyak.OrderError, match=r"'layer\.weight'.*forward"):
        build(model)

    model(torch.ones(1, 3))
    average = build(model)
    average.update()


@every_build
def test_lazy_buffer_is_refused_too(build: Callable[..., Use]) -> None:
    """Lazy batch normalisation has no statistics to average before a forward."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyBatchNorm1d(affine=False))

    with pytest.raises(polyak.OrderError, match=r"'1\.running_mean'.*forward"):
        build(model)


@every_build
def test_tensor_without_data_is_refused(build: Callable[..., Use]) -> None:
    """On the meta device there is nothing to average: build after the weights are there."""
    with torch.device("meta"):
        model = nn.Linear(2, 2)

    with pytest.raises(polyak.OrderError, match=r"'weight'.*meta.*then build"):
        build(model)


# ── settings ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int32])
def test_times_of_numpy_are_times(kind: Any) -> None:
    """Also the narrow ones, which cannot hold the bound that they are compared with."""
    average = polyak.Average({"w": torch.ones(2)})
    average.update(kind(5))
    assert (average.now, type(average.now)) == (5, int if kind is np.int32 else float)


@every_build
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"now": math.nan}, r"now must be a finite number, got nan"),
        ({"now": 10**400}, r"now must be a finite number, got 1000\d*\.\.\.\d*0\. Times go up to"),
        ({"now": math.inf}, r"now must be a finite number, got inf\. Times go up to 1e300\.$"),
        ({"now": "soon"}, r"now must be a finite number, got 'soon'\.$"),
        ({"nonfinite": "sikp"}, r"nonfinite must be.*'sikp'"),
        ({"dtype": torch.int64}, r"dtype must be a floating.*int64"),
        ({"dtype": torch.complex64}, r"dtype must be a floating.*complex64"),
    ],
)
def test_setting_out_of_range_is_refused(
    build: Callable[..., Use], settings: dict[str, Any], words: str
) -> None:
    """Each setting says which values it takes, and which one it was given."""
    with pytest.raises(polyak.ArgumentError, match=words):
        build(model_of(), **settings)


@pytest.mark.parametrize("schedule", [0.999, None, "ema"])
def test_number_in_place_of_a_schedule_is_refused(schedule: Any) -> None:
    """The most likely first try, `Average(model, 0.999)`, is told what to write."""
    with pytest.raises(polyak.ArgumentError, match=rf"schedule must be.*{schedule!r}"):
        polyak.Average(model_of(), schedule)
    with pytest.raises(polyak.ArgumentError, match=rf"schedule must be.*{schedule!r}"):
        polyak.Averages(model_of(), {"a": polyak.Uniform(), "b": schedule})


def test_averages_of_no_schedule_are_refused() -> None:
    """At least one."""
    with pytest.raises(polyak.ArgumentError, match="at least one"):
        polyak.Averages(model_of(), {})


@pytest.mark.parametrize(
    ("k", "every", "words"),
    [
        (0, 1, "k must be.*got 0"),
        (2.5, 1, "k must be.*got 2.5"),
        (math.nan, 1, "k must be.*got nan"),
        (2, 0, "every must be above 0, got 0"),
        (2, -1, "every must be above 0, got -1"),
        (2, math.nan, "every must be above 0, got nan"),
        (2, math.inf, "every must be above 0, got inf"),
    ],
)
def test_window_without_a_length_is_refused(k: Any, every: Any, words: str) -> None:
    """A window holds at least one capture, and time passes between two."""
    with pytest.raises(polyak.ArgumentError, match=words):
        polyak.Window(model_of(), k, every)


@pytest.mark.parametrize("source", [[1, 2], [("w", 1.0)], {"w": [1.0]}, {3: torch.ones(1)}, 7])
def test_something_that_is_no_model_is_refused(source: Any) -> None:
    """The first argument is a module or tensors by name."""
    with pytest.raises(polyak.ArgumentError, match="first argument must be a module or tensors"):
        polyak.Average(source)


def test_two_tensors_of_one_name_are_refused() -> None:
    """Tensors meet by name: a second one under the same name would be lost in silence."""
    with pytest.raises(polyak.ArgumentError, match="'w'"):
        polyak.Average([("w", torch.ones(1)), ("w", torch.zeros(1))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("debias", [True, False])
def test_decay_that_the_storage_can_never_express_is_refused(
    dtype: torch.dtype, debias: bool
) -> None:
    """In 8 or 11 bits, 1 - 0.9999 of a difference always rounds away: refused, with ways out."""
    model = model_of()
    schedule = polyak.Exponential(decay=0.9999, debias=debias)
    live = bits(model)

    average = polyak.Average(model, schedule, dtype=dtype)
    with pytest.raises(polyak.ArgumentError, match=r"0\.weight.*wider dtype"):
        average.update()

    assert bits(model) == live


# ── time ─────────────────────────────────────────────────────────────────────────────────────────


@every_build
@pytest.mark.parametrize("now", [3, 2, 0, -1, 2.999])
def test_time_that_does_not_move_forward_is_refused(build: Callable[..., Use], now: float) -> None:
    """The message has the last time and the one that was given."""
    model, average = trained(build)
    before = snapshot(model, average)

    with pytest.raises(polyak.OrderError, match=rf"above 3 .*got {re.escape(str(now))}"):
        average.update(now=now)

    assert snapshot(model, average) == before


@every_build
@pytest.mark.parametrize("now", [math.nan, math.inf, -math.inf])
def test_time_that_is_no_time_is_refused(build: Callable[..., Use], now: float) -> None:
    """NaN and infinity never get into the clock, by update or reset."""
    model, average = trained(build)
    before = snapshot(model, average)

    for move in (average.update, average.reset):
        with pytest.raises(polyak.AveragingError, match=rf"now must be.*got {now}"):
            move(now=now)

    assert snapshot(model, average) == before


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan, math.inf])
def test_decay_outside_zero_and_one_is_refused(decay: float) -> None:
    """A schedule of one's own that answers nonsense is found out before a tensor is touched."""
    answers = {"decay": 0.5}

    def schedule(*, now: float, elapsed: float) -> float:
        return answers["decay"]

    model = model_of()
    alone = polyak.Average(model, schedule)
    both = polyak.Averages(model, {"good": polyak.Uniform(), "bad": schedule})
    uses: list[Use] = [alone, both]
    for use in uses:
        answers["decay"] = 0.5
        train(model, 1)
        use.update()
        before = snapshot(model, use)
        answers["decay"] = decay

        with pytest.raises(polyak.ArgumentError, match=r"decay must be in \[0, 1\], got"):
            use.update()

        assert snapshot(model, use) == before


def test_schedule_that_raises_changes_nothing() -> None:
    """All decays are asked for before anything is mixed, also with several schedules."""
    broken = {"now": False}

    def schedule(*, now: float, elapsed: float) -> float:
        if broken["now"]:
            raise ZeroDivisionError("theirs")
        return 0.5

    model = model_of()
    averages = polyak.Averages(model, {"good": polyak.Uniform(), "bad": schedule})
    averages.update()
    train(model, 1)
    before = snapshot(model, averages)
    broken["now"] = True

    with pytest.raises(ZeroDivisionError, match="theirs"):
        averages.update()

    assert snapshot(model, averages) == before


def test_time_off_the_grid_of_a_step_counted_ramp_is_refused() -> None:
    """A ramp that counts steps of 10 samples cannot tell what half a step is."""
    model = model_of()
    average = polyak.Average(model, polyak.CountRamp(0.99, unit=10))
    average.update(now=10)
    train(model, 1)
    before = snapshot(model, average)

    with pytest.raises(polyak.ArgumentError, match="unit"):
        average.update(now=25)

    assert snapshot(model, average) == before


# ── a model that is no longer the one it was ─────────────────────────────────────────────────────


def _replace_parameter(model: Any) -> str:
    model[0].weight = nn.Parameter(torch.zeros(4, 3))
    return "0.weight"


def _replace_parameter_by_another_shape(model: Any) -> str:
    model[2].weight = nn.Parameter(torch.zeros(10, 4))
    return "2.weight"


def _replace_layer(model: Any) -> str:
    model[2] = nn.Linear(4, 2)
    return "2.weight"


def _replace_layer_by_another_shape(model: Any) -> str:
    model[2] = nn.Linear(4, 10)
    return "2.weight"


def _replace_layer_by_another_kind(model: Any) -> str:
    model[2] = nn.Tanh()
    return "2.weight"


def _remove_layer(model: Any) -> str:
    del model[2]
    return "2.weight"


def _remove_parameter(model: Any) -> str:
    del model[0].bias
    return "0.bias"


def _none_parameter(model: Any) -> str:
    model[0].bias = None
    return "0.bias"


def _remove_buffer(model: Any) -> str:
    del model[1].running_mean
    return "1.running_mean"


def _resize_parameter(model: Any) -> str:
    model[0].weight.data = torch.zeros(8, 3)
    return "0.weight"


def _resize_buffer(model: Any) -> str:
    model[1].running_mean = torch.zeros(9)
    return "1.running_mean"


def _transpose_parameter(model: Any) -> str:
    model[0].weight.data = model[0].weight.data.t()
    return "0.weight"


def _whole_numbers(model: Any) -> str:
    model[1].running_mean = torch.zeros(4, dtype=torch.int64)
    return "1.running_mean"


def _assign(model: Any) -> str:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    return "0.weight"


DRIFTS = [
    _replace_parameter,
    _replace_parameter_by_another_shape,
    _replace_layer,
    _replace_layer_by_another_shape,
    _replace_layer_by_another_kind,
    _remove_layer,
    _remove_parameter,
    _none_parameter,
    _remove_buffer,
    _resize_parameter,
    _resize_buffer,
    _transpose_parameter,
    _whole_numbers,
    _assign,
]


@every_build
@pytest.mark.parametrize("drift", DRIFTS)
def test_tensor_that_was_replaced_resized_or_removed_is_refused_by_name(
    build: Callable[..., Use], drift: Callable[[Any], str]
) -> None:
    """The update after it names the tensor, says what to do, and changes nothing."""
    model, average = trained(build)
    clock = average.now, average.updates
    state = plain(average.state_dict())
    name = drift(model)
    live = bits(model)

    with pytest.raises(polyak.MatchError, match=rf"'{re.escape(name)}'.*(?i:build|reset)"):
        average.update()

    assert bits(model) == live
    assert (average.now, average.updates) == clock
    assert plain(average.state_dict()) == state


@every_build
@pytest.mark.parametrize(
    "drift",
    [_replace_parameter, _replace_layer, _remove_layer, _resize_parameter, _remove_parameter],
)
def test_block_over_a_model_that_changed_is_refused(
    build: Callable[..., Any], drift: Callable[[Any], str]
) -> None:
    """Lending to tensors that the model no longer uses would evaluate something else."""
    model, average = trained(build)
    member = average["a"] if isinstance(average, polyak.Averages) else average
    name = drift(model)
    live = bits(model)

    with pytest.raises(polyak.MatchError, match=rf"'{re.escape(name)}'"), member.applied():
        pytest.fail("lent")

    assert bits(model) == live


@every_build
@pytest.mark.parametrize("use", ["applied", "weights", "copy_to", "save"])
def test_layer_that_was_added_later_is_refused(
    build: Callable[..., Any], use: str, tmp_path: Any
) -> None:
    """A model with more tensors than the average is not what was averaged: named, and refused."""
    model, average = trained(build)
    member = average["a"] if isinstance(average, polyak.Averages) else average
    model.add_module("late", nn.Linear(2, 2))
    before = snapshot(model, average)

    uses: dict[str, Callable[[], object]] = {
        "applied": lambda: member.applied().__enter__(),
        "weights": member.weights,
        "copy_to": lambda: member.copy_to(model),
        "save": lambda: polyak.save(member, tmp_path / "weights.safetensors"),
    }

    with pytest.raises(polyak.MatchError, match=r"late\.weight"):
        uses[use]()

    assert snapshot(model, average) == before
    assert not list(tmp_path.iterdir())


@every_build
def test_not_finite_weights_are_refused_when_asked_for(build: Callable[..., Use]) -> None:
    """With nonfinite="raise" the update names the tensor and how many elements, and is undone."""
    model, average = trained(build, nonfinite="raise")
    with torch.no_grad():
        tensors_of(model)["2.weight"][0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    before = snapshot(model, average)

    with pytest.raises(polyak.ArgumentError, match=r"'2\.weight' \(3\)"):
        average.update()

    assert snapshot(model, average) == before


# ── the wrong place ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("call", ["update", "reset", "load_state_dict", "follow"])
def test_member_is_moved_only_with_its_family(call: str) -> None:
    """Members share one clock and one read: moving one alone is an error that says whom to ask."""
    model, averages = trained(several)
    assert isinstance(averages, polyak.Averages)
    member = averages["a"]
    arguments: dict[str, list[Any]] = {
        "load_state_dict": [member.state_dict()],
        "follow": [torch.optim.SGD(model.parameters(), lr=0.1)],
    }
    before = snapshot(model, averages)

    with pytest.raises(polyak.OrderError, match="Averages"):
        getattr(member, call)(*arguments.get(call, []))

    assert snapshot(model, averages) == before


@every_build
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"every": 0}, "every must be.*got 0"),
        ({"every": -1}, "every must be.*got -1"),
        ({"every": 1.5}, "every must be.*got 1.5"),
        ({"every": math.nan}, "every must be.*got nan"),
    ],
)
def test_follower_without_an_interval_is_refused(
    build: Callable[..., Use], settings: dict[str, Any], words: str
) -> None:
    """And no hook is left on the optimizer."""
    model, average = trained(build)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = snapshot(model, average)

    with pytest.raises(polyak.ArgumentError, match=words):
        average.follow(optimizer, **settings)
    optimizer.step()

    assert snapshot(model, average) == before


@every_build
def test_follower_of_something_else_is_refused(build: Callable[..., Use]) -> None:
    """A model in place of its optimizer is told what to pass."""
    model, average = trained(build)
    optimizer: Any = model

    with pytest.raises(polyak.ArgumentError, match=r"optimizer must be.*Sequential"):
        average.follow(optimizer)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, math.nan])
def test_share_outside_zero_and_one_is_refused(share: float) -> None:
    """`copy_to` moves towards the average, at most onto it."""
    model, average = trained(single)
    assert isinstance(average, polyak.Average)
    before = snapshot(model, average)

    with pytest.raises(polyak.ArgumentError, match=rf"share must be.*got {share}"):
        average.copy_to(model, share=share)

    assert snapshot(model, average) == before


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 4)), r"'1\.running_mean'|'2\.weight'|'1\.bias'"),
        (
            lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 9)),
            r"'2\.weight'.*\[2, 4\].*\[9, 4\]",
        ),
        (lambda: nn.Linear(3, 4), r"only in the module \['bias', 'weight'\]"),
    ],
)
def test_copy_to_a_module_that_does_not_match_is_refused(
    other: Callable[[], nn.Module], words: str
) -> None:
    """Names and shapes are compared before the first tensor is written."""
    model, average = trained(single)
    assert isinstance(average, polyak.Average)
    module = other()
    before, target = snapshot(model, average), bits(module)

    with pytest.raises(polyak.MatchError, match=words):
        average.copy_to(module)

    assert bits(module) == target
    assert snapshot(model, average) == before


# ── on load ──────────────────────────────────────────────────────────────────────────────────────


def _another_format(state: dict[str, Any]) -> None:
    state["format"] = 99


def _another_kind(state: dict[str, Any]) -> None:
    state["kind"] = "Average" if state["kind"] != "Average" else "Window"


def _no_polyak_state(state: dict[str, Any]) -> None:
    state.clear()
    state["weight"] = torch.ones(1)


def _tensors_of_state(state: dict[str, Any]) -> dict[str, Tensor]:
    first: dict[str, Tensor] = next(iter(state["averages"].values()))["tensors"]
    return first


def _missing_name(state: dict[str, Any]) -> None:
    del _tensors_of_state(state)["2.weight"]


def _extra_name(state: dict[str, Any]) -> None:
    _tensors_of_state(state)["late.weight"] = torch.ones(1)


def _another_name(state: dict[str, Any]) -> None:
    tensors = _tensors_of_state(state)
    tensors["tail.weight"] = tensors.pop("2.weight")


def _another_shape(state: dict[str, Any]) -> None:
    _tensors_of_state(state)["2.weight"] = torch.ones(9, 4)


def _another_dtype(state: dict[str, Any]) -> None:
    tensors = _tensors_of_state(state)
    tensors["2.weight"] = tensors["2.weight"].to(torch.float64)


def _another_set(state: dict[str, Any]) -> None:
    state["averages"]["other"] = state["averages"].pop(next(iter(state["averages"])))


SPOILED = [
    (_another_format, r"format 1, got 99"),
    (_another_kind, r"state must be of a polyak\."),
    (_no_polyak_state, r"state must be what state_dict\(\).*'weight'"),
    (_missing_name, r"only in the average \['2\.weight'\]"),
    (_extra_name, r"only in the state \['late\.weight'\]"),
    (_another_name, r"\['2\.weight'\].*\['tail\.weight'\]"),
    (_another_shape, r"'2\.weight'.*\[2, 4\].*\[9, 4\]"),
    (_another_dtype, r"'2\.weight'.*float32.*float64"),
    (_another_set, r"must hold the averages"),
]


@every_build
@pytest.mark.parametrize(("spoil", "words"), SPOILED)
def test_state_that_does_not_match_is_refused(
    build: Callable[..., Use], spoil: Callable[[dict[str, Any]], None], words: str
) -> None:
    """Format, kind, names, shapes and dtypes are checked before anything is written."""
    _, source = trained(build)
    state = copied(source.state_dict())
    model, average = trained(build)
    train(model, 20)
    average.update()
    before = snapshot(model, average)
    spoil(state)

    with pytest.raises((polyak.ArgumentError, polyak.MatchError), match=words):
        average.load_state_dict(state)

    assert snapshot(model, average) == before


@pytest.mark.parametrize("build", [single, several])
def test_state_of_another_schedule_is_refused_unless_replaced(build: Callable[..., Use]) -> None:
    """Both schedules are named, with the two ways out; `schedule="replace"` is one of them."""
    model, average = trained(build)
    before = snapshot(model, average)
    if build is single:
        other: Any = polyak.Average(model_of(), polyak.Exponential(decay=0.25, debias=False))
    else:
        other = polyak.Averages(
            model_of(), {"a": polyak.Uniform(), "b": polyak.Exponential(decay=0.25)}
        )
    other.update()
    state = copied(other.state_dict())

    with pytest.raises(polyak.MatchError, match=r"schedule must be.*0\.25.*replace"):
        average.load_state_dict(state)

    assert snapshot(model, average) == before
    assert isinstance(average, polyak.Average | polyak.Averages)
    average.load_state_dict(state, schedule="replace")
    assert average.updates == 1


@every_build
@pytest.mark.parametrize("state", [None, 3, [], "state", torch.ones(1)])
def test_something_that_is_no_state_is_refused(build: Callable[..., Use], state: Any) -> None:
    """Whatever comes out of a file, the message says what was expected."""
    model, average = trained(build)
    before = snapshot(model, average)

    with pytest.raises(polyak.ArgumentError, match=r"state must be what state_dict\(\)"):
        average.load_state_dict(state)

    assert snapshot(model, average) == before


@pytest.mark.parametrize("build", [single, several])
@pytest.mark.parametrize("wrong", [{"schedule": "any"}, {"live": "yes"}])
def test_way_of_loading_that_does_not_exist_is_refused(
    build: Callable[..., Any], wrong: dict[str, Any]
) -> None:
    """The two words of each choice are in the message."""
    model, average = trained(build)
    state = copied(average.state_dict())
    before = snapshot(model, average)

    with pytest.raises(polyak.ArgumentError, match=rf"{next(iter(wrong))} must be '"):
        average.load_state_dict(state, **wrong)

    assert snapshot(model, average) == before


# ── said once, where it costs a run ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("use", ["applied", "save"])
def test_use_before_the_first_update_warns_once_after_training_began(
    use: str, tmp_path: Any
) -> None:
    """An average that nobody updates is the initial weights: said once, and in the report."""
    model = model_of()
    average = single(model)

    def act() -> None:
        if use == "applied":
            with average.applied():
                pass
        else:
            polyak.save(average, tmp_path / "weights.safetensors")

    act()  # before training there is nothing to warn of
    train(model, 1)

    with pytest.warns(polyak.AveragingWarning, match=r"never called.*update\(\)"):
        act()
    act()  # warnings are errors here: a second one would fail
    assert any("never called" in note for note in average.report().notes)


# ── the tree of errors ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (polyak.ArgumentError, ValueError),
        (polyak.MatchError, ValueError),
        (polyak.OrderError, RuntimeError),
    ],
)
def test_errors_are_ours_and_those_a_stranger_would_catch(
    error: type[Exception], builtin: type[Exception]
) -> None:
    """One tree, and each class also a builtin."""
    assert issubclass(error, polyak.AveragingError)
    assert issubclass(error, builtin)
    assert issubclass(polyak.AveragingWarning, UserWarning)


def test_the_likeliest_first_mistakes_are_refused_in_words(tmp_path: Path) -> None:
    """Several averages where one is wanted, a class for a schedule, a function of one argument."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    several = polyak.Averages(model, {"short": polyak.Uniform()})
    wrong: Any = polyak
    mistakes: list[tuple[Callable[[], object], str]] = [
        (lambda: wrong.Average(model, polyak.Uniform), "schedule must be a schedule such as"),
        (lambda: wrong.Average(model, lambda step: 0.9), "must take the keywords now and elapsed"),
        (lambda: wrong.Averages(model, polyak.Uniform()), "schedule by name"),
        (lambda: wrong.Average(model, dtype="float32"), "floating point torch.dtype"),
        (lambda: wrong.Average(model, device="gpu"), "device must be a torch device"),
        (lambda: wrong.Average(model, include=3), "include must be a pattern"),
        (lambda: wrong.Window(model, 2, every="a"), "every must be above 0"),
        (lambda: wrong.save(several, tmp_path / "a"), r"averages\['short'\]"),
        (lambda: wrong.save(model, tmp_path / "a"), "must be a polyak.Average or Window"),
        (lambda: wrong.refresh_norms(several, []), r"averages\['short'\]"),
        (lambda: wrong.refresh_norms(model, [], limit=1.5), "limit must be at least 1 batch"),
        (lambda: wrong.Average(model).copy_to(model, share="a"), "share must be above 0"),
        (lambda: wrong.Average(model).update("5"), "now must be a finite number"),
        (lambda: wrong.Average(model).update(True), "now must be a finite number"),
    ]
    for call, says in mistakes:
        with pytest.raises(polyak.ArgumentError, match=says):
            call()
    assert not list(tmp_path.iterdir())


def test_an_interrupted_update_is_noticed() -> None:
    """Some tensors have moved and some have not: the average is refused until it is made anew."""
    live = {name: torch.ones(10_000) for name in "abc"}  # small ones are mixed in one call
    average = polyak.Average(live, polyak.Exponential(decay=0.5, debias=False))
    state = average.state_dict()
    saved = {n: t.clone() for n, t in state["averages"]["average"]["tensors"].items()}
    state["averages"]["average"]["tensors"] = saved
    with pytest.raises(KeyboardInterrupt), interrupted_in("lerp_", call=2):
        average.update()
    assert "interrupted half-way" in str(average.report())
    for use in (average.update, average.weights, average.state_dict):
        with pytest.raises(polyak.OrderError, match="interrupted half-way"):
            use()
    average.load_state_dict(state)
    assert average.update() == 0.5


def test_an_interrupted_reset_is_noticed() -> None:
    """Part of it is what the live weights were, part what the average was."""
    live = {name: torch.ones(3) for name in "abc"}
    average = polyak.Average(live, polyak.Exponential(decay=0.5))
    average.update()
    with pytest.raises(KeyboardInterrupt), interrupted_in("copy_", call=2):
        average.reset()
    for use in (average.update, average.weights, average.state_dict):
        with pytest.raises(polyak.OrderError, match="reset was interrupted half-way"):
            use()
    average.reset()
    average.update()


def test_what_is_easily_mixed_up_is_told(tmp_path: Path) -> None:
    """One sentence without numbers from tensors, and what to write instead."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mistakes: list[tuple[Callable[[], object], str]] = [
        (lambda: polyak.Average(model.parameters()), "got a bare Parameter in generator"),  # type: ignore[arg-type]
        (lambda: polyak.Average(optimizer), "got a bare SGD. Pass the model"),  # type: ignore[arg-type]
        (lambda: polyak.load_weights(model, "x"), r"got Linear. Call load_weights\(path, model\)"),  # type: ignore[arg-type]
        (
            lambda: polyak.refresh_norms(nn.BatchNorm1d(2), torch.ones(3, 2)),
            r"got one Tensor. Pass a loader, or \[tensor\]",
        ),
        (
            lambda: polyak.save(polyak.Average(model), tmp_path / "x.pt"),
            "another format .* Pass x.safetensors",
        ),
    ]
    for call, says in mistakes:
        with pytest.raises(polyak.ArgumentError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_half_life_beyond_the_decays_that_floats_can_tell_from_1() -> None:
    """On a clock of nanoseconds: 2**(-elapsed / half_life) all the same."""
    live = {"w": torch.zeros(1)}
    average = polyak.Average(live, polyak.Exponential(half_life=1e17, debias=False))
    live["w"].fill_(1.0)
    assert average.update(now=10**17) == 0.5
    assert average.weights()["w"].item() == 0.5
    average.report()


def test_a_layer_added_after_building_is_refused_at_the_next_update() -> None:
    """Not at the end of the run, when the weights are asked for."""
    model = nn.Sequential(nn.Linear(2, 2))
    average = polyak.Average(model)
    average.update()
    model.append(nn.Linear(2, 2))
    with pytest.raises(polyak.MatchError, match=r"2 more: \['1.weight', '1.bias'\]"):
        average.update()
    assert average.updates == 1
