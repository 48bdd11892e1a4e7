"""An average is saved and goes on as if it had never stopped; a bad state changes nothing."""

import copy
import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import polyak
from polyak._identities import schedule_from_state
from snags import interrupted_in

SCHEDULES: list[polyak.Schedule] = [
    polyak.Power(sigma_rel=0.05),
    polyak.Power(gamma=3.5),
    polyak.Exponential(decay=0.97),
    polyak.Exponential(half_life=30, debias=False),
    polyak.Uniform(),
    polyak.Polynomial(3),
    polyak.CountRamp(0.9),
    polyak.ExponentialRamp(0.99, tau=20),
    polyak.InverseGamma(2.0, power=0.75),
    polyak.HalfLifeRamp(0.05, half_life=2),
    polyak.Cosine(0.9, total=40),
    polyak.After(25, polyak.Exponential(decay=0.9)),
]


class Net(nn.Module):
    """Two layers and a batch norm, so that there are buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(self.first(x)).relu())
        return out


class Reordered(nn.Module):
    """The same names, assigned in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(4)
        self.first = nn.Linear(3, 4)


def jump(model: nn.Module, seed: int) -> None:
    """Move every parameter and float buffer to new values, by name."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor in sorted(model.state_dict().items()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator))


def through_a_file(state: Mapping[str, Any]) -> dict[str, Any]:
    """Saved and loaded as people do, without pickled code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


TIMES = [1, 2, 3, 5, 9, 10, 30, 31, 32, 45]


@pytest.mark.parametrize("build", [Net, Reordered])
@pytest.mark.parametrize("stop", [0, 1, 4, 7])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_an_average_goes_on_bit_for_bit(
    schedule: polyak.Schedule, stop: int, build: type[nn.Module]
) -> None:
    """Saved in the middle of any warm-up, loaded over another model, in any construction order."""
    model = Net()
    average = polyak.Average(model, schedule)
    for seed, now in enumerate(TIMES[:stop]):
        jump(model, seed)
        average.update(now)
    resumed_model = build()
    resumed_model.load_state_dict(model.state_dict())
    resumed = polyak.Average(resumed_model, schedule)
    resumed.load_state_dict(through_a_file(average.state_dict()))

    assert same_tensors(average.tensors, resumed.tensors)
    for seed, now in enumerate(TIMES[stop:], start=100):
        jump(model, seed)
        jump(resumed_model, seed)
        assert average.update(now) == resumed.update(now)
        assert same_tensors(average.tensors, resumed.tensors)
    left, right = average.report(), resumed.report()
    assert (left.updates, left.now, left.initial_weight, left.mean_age, left.noise_window) == (
        right.updates,
        right.now,
        right.initial_weight,
        right.mean_age,
        right.noise_window,
    )
    assert average.state_dict()["clock"] == resumed.state_dict()["clock"]


@pytest.mark.parametrize("origin", [0, 1_000])
def test_the_clock_of_the_state_counts_not_that_of_the_average(origin: int) -> None:
    """A schedule sees the time since the average that was saved began."""
    asked: list[tuple[float, float]] = []

    def schedule(*, now: float, elapsed: float) -> float:
        asked.append((now, elapsed))
        return 0.5

    average = polyak.Average(Net(), schedule, now=origin)
    average.update(origin + 5)
    resumed = polyak.Average(Net(), schedule, now=77)
    resumed.load_state_dict(through_a_file(average.state_dict()))

    resumed.update(origin + 8)

    assert asked == [(5, 5), (8, 3)]


def test_several_averages_go_on_bit_for_bit() -> None:
    """With their one clock, and the counts of what was held back."""
    names: dict[str, polyak.Schedule] = {f"{n}": s for n, s in enumerate(SCHEDULES)}
    model, again = Net(), Net()
    averages, resumed = polyak.Averages(model, names), polyak.Averages(again, names, now=7)
    for seed, now in enumerate(TIMES[:4]):
        jump(model, seed)
        if now == 3:
            with torch.no_grad():
                model.first.bias[0] = math.nan
        averages.update(now)
    again.load_state_dict(model.state_dict())

    resumed.load_state_dict(through_a_file(averages.state_dict()))

    jump(model, 50)
    jump(again, 50)
    assert averages.update(10) == resumed.update(10)
    for name in names:
        assert same_tensors(averages[name].tensors, resumed[name].tensors)
        assert resumed[name].report().nonfinite == {"first.bias": 1}


@pytest.mark.parametrize("stop", [0, 2, 5])
def test_a_window_goes_on_bit_for_bit(stop: int) -> None:
    """With all that it holds and the phase of its captures."""
    model, again = Net(), Net()
    window, resumed = polyak.Window(model, 3, every=4), polyak.Window(again, 3, every=4)
    for seed, now in enumerate(TIMES[:stop]):
        jump(model, seed)
        window.update(now)
    again.load_state_dict(model.state_dict())

    resumed.load_state_dict(through_a_file(window.state_dict()))

    assert (resumed.filled, resumed.updates, resumed.now) == (
        window.filled,
        window.updates,
        window.now,
    )
    for seed, now in enumerate(TIMES[stop:], start=100):
        jump(model, seed)
        jump(again, seed)
        assert window.update(now) == resumed.update(now)
        assert same_tensors(window.tensors, resumed.tensors)
    assert window.report() == resumed.report()


def test_recomputed_statistics_are_saved_with_the_average() -> None:
    """They belong to it until its next update, in the next process too."""
    model, again = Net(), Net()
    average, resumed = polyak.Average(model), polyak.Average(again)
    polyak.refresh_norms(average, [torch.randn(9, 3)])

    resumed.load_state_dict(through_a_file(average.state_dict()))

    for key in ("norm.running_mean", "norm.running_var"):
        assert torch.equal(resumed.weights()[key], average.weights()[key])
        assert not torch.equal(resumed.weights()[key], again.state_dict()[key])


# ── what a state is ──────────────────────────────────────────────────────────────────────────────


def test_a_state_holds_references_like_that_of_a_module() -> None:
    """No copy is made, so a state taken before an update shows it."""
    model = Net()
    average = polyak.Average(model, polyak.Uniform())
    state = average.state_dict()

    jump(model, 1)
    average.update()

    assert same_tensors(state["averages"]["average"]["tensors"], average.tensors)


def test_loading_copies() -> None:
    """What becomes of the loaded state later does not matter to the average, norms included."""
    model = Net()
    average = polyak.Average(model, polyak.Uniform())
    polyak.refresh_norms(average, [torch.randn(9, 3)])
    state = through_a_file(average.state_dict())
    average.load_state_dict(state)
    before = average.weights()

    for group in ("tensors", "norms"):
        for tensor in state["averages"]["average"][group].values():
            tensor.fill_(77.0)

    assert same_tensors(average.weights(), before)


def test_a_state_says_its_schedule_by_name_and_fields() -> None:
    """Readable without polyak; the field that was given is the one that is kept."""
    average = polyak.Average(Net(), polyak.After(10, polyak.Exponential(half_life=100)))

    assert average.state_dict()["averages"]["average"]["schedule"] == {
        "name": "After",
        "start": 10,
        "schedule": {"name": "Exponential", "half_life": 100, "debias": True},
    }


def test_a_state_loads_in_inference_mode() -> None:
    """And the average can be updated outside afterwards."""
    for make in (
        lambda model: polyak.Average(model, polyak.Uniform()),
        lambda model: polyak.Window(model, 2),
    ):
        model = Net()
        average: Any = make(model)
        average.update()
        polyak.refresh_norms(average, [torch.randn(5, 3)])
        state = through_a_file(average.state_dict())
        with torch.inference_mode():
            average.load_state_dict(state)
        jump(model, 3)
        average.update()
        average.update()
        with average.applied():
            model(torch.randn(4, 3))


# ── taken while the weights are lent ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["exchanged", "copied"])
def test_a_state_taken_inside_applied_carries_the_trained_weights(
    dtype: torch.dtype, restore: bool
) -> None:
    """A checkpoint written during evaluation loses nothing: both sets come back."""
    model = Net().to(dtype)
    average = polyak.Average(model, polyak.Uniform())
    for seed in (1, 2):
        jump(model, seed)
        average.update()
    trained = copy.deepcopy(model.state_dict())
    averaged = {name: tensor.clone() for name, tensor in average.tensors.items()}

    with average.applied():
        state = through_a_file(average.state_dict())
        evaluated = copy.deepcopy(model.state_dict())  # what a checkpoint of the model would hold
    again = Net().to(dtype)
    again.load_state_dict(evaluated)
    resumed = polyak.Average(again, polyak.Uniform())
    resumed.load_state_dict(state, live="restore" if restore else "leave")

    assert same_tensors(resumed.tensors, averaged)
    assert same_tensors(again.state_dict(), trained if restore else evaluated)


def test_a_state_taken_inside_applied_does_not_change_with_the_end_of_the_block() -> None:
    """It holds copies: the memory it came from changes hands."""
    model = Net()
    average = polyak.Average(model, polyak.Uniform())
    jump(model, 1)
    average.update()
    jump(model, 2)
    averaged = {name: tensor.clone() for name, tensor in average.tensors.items()}

    with average.applied():
        state = average.state_dict()
    jump(model, 3)
    average.update()

    assert same_tensors(state["averages"]["average"]["tensors"], averaged)


def test_a_state_of_several_taken_inside_one_is_whole() -> None:
    """Only one of them is lent; all of them are saved."""
    model = Net()
    schedules: dict[str, polyak.Schedule] = {
        "a": polyak.Uniform(),
        "b": polyak.Exponential(decay=0.5),
    }
    averages = polyak.Averages(model, schedules)
    for seed in (1, 2, 3):
        jump(model, seed)
        averages.update()
    trained = copy.deepcopy(model.state_dict())
    with averages["b"].applied():
        state = through_a_file(averages.state_dict())
    again = Net()
    resumed = polyak.Averages(again, schedules)

    resumed.load_state_dict(state)

    for name in schedules:
        assert same_tensors(resumed[name].tensors, averages[name].tensors)
    assert same_tensors(again.state_dict(), trained)


# ── schedules ────────────────────────────────────────────────────────────────────────────────────


def test_another_schedule_is_refused() -> None:
    """Both are named; nothing is changed."""
    saved = polyak.Average(Net(), polyak.Exponential(decay=0.9)).state_dict()
    average = polyak.Average(Net(), polyak.Exponential(decay=0.99))
    before = snapshot(average)

    with pytest.raises(polyak.MatchError, match=r'0\.99.*got.*0\.9.*schedule="replace"'):
        average.load_state_dict(saved)

    assert unchanged(average, before)


def test_a_schedule_can_be_replaced_on_purpose() -> None:
    """Tensors and clock go on; the next decay is that of the new rule."""
    model = Net()
    old = polyak.Average(model, polyak.Uniform())
    for seed, now in enumerate((1, 2, 8)):
        jump(model, seed)
        old.update(now)
    average = polyak.Average(model, polyak.Exponential(decay=0.5, debias=False))

    average.load_state_dict(through_a_file(old.state_dict()), schedule="replace")

    assert same_tensors(average.tensors, old.tensors)
    assert (average.now, average.updates) == (8, 3)
    assert average.update(10) == 0.25
    assert average.state_dict()["averages"]["average"]["schedule"]["name"] == "Exponential"


def test_a_function_is_saved_as_opaque() -> None:
    """Its code is not in the state: the same function is passed again."""
    average = polyak.Average(Net(), lambda *, now, elapsed: 0.5)
    state = through_a_file(average.state_dict())

    assert state["averages"]["average"]["schedule"] == {"name": "opaque"}
    polyak.Average(Net(), lambda *, now, elapsed: 0.5).load_state_dict(state)
    with pytest.raises(polyak.MatchError):
        polyak.Average(Net(), polyak.Uniform()).load_state_dict(state)


# ── bad states ───────────────────────────────────────────────────────────────────────────────────


def make_average() -> polyak.Average:
    model = Net()
    average = polyak.Average(model, polyak.Uniform())
    for seed in (1, 2):
        jump(model, seed)
        average.update(seed)
    polyak.refresh_norms(average, [torch.randn(9, 3)])
    return average


def make_averages() -> polyak.Averages:
    model = Net()
    averages = polyak.Averages(model, {"a": polyak.Uniform(), "b": polyak.Power(gamma=2.0)})
    for seed in (1, 2):
        jump(model, seed)
        averages.update(seed)
    return averages


def make_window() -> polyak.Window:
    model = Net()
    window = polyak.Window(model, 2)
    for seed in (1, 2, 3):
        jump(model, seed)
        window.update(seed)
    return window


MAKERS: list[Callable[[], Any]] = [make_average, make_averages, make_window]


def snapshot(average: Any) -> Any:
    """All that an average will go on from, and its live model."""
    model: Any = (average["a"] if isinstance(average, polyak.Averages) else average)._source
    return copy.deepcopy((average.state_dict(), model.state_dict()))


def equal(a: Any, b: Any) -> bool:
    """Deep equality of states, tensors bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and set(a) == set(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def unchanged(average: Any, before: Any) -> bool:
    return equal(snapshot(average), before)


def paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every key and list item of a state."""
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    else:
        return []
    return [p for key, value in items for p in [(*path, key), *paths(value, (*path, key))]]


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


# What no state holds anywhere: words, nothing, NaN, and tensors of the wrong shape.
WRONG: list[Any] = ["wrong", None, math.nan, -1.5, torch.zeros(1, 1, 9), [], {"wrong": 1}]


@pytest.mark.parametrize("make", MAKERS, ids=["average", "averages", "window"])
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_a_state_with_anything_dropped_is_refused(
    make: Callable[[], Any], data: st.DataObject
) -> None:
    """With an error of ours, and nothing is changed: it checks everything, then writes."""
    average = make()
    state = copy.deepcopy(average.state_dict())
    # An incident nobody counted is no fault, and neither are statistics that were not refreshed.
    droppable = [p for p in paths(state) if "norms" not in p[:-1] and "history" not in p[:-1]]
    path = data.draw(st.sampled_from(droppable))
    del at(state, path[:-1])[path[-1]]
    before = snapshot(average)

    with pytest.raises(polyak.AveragingError):
        average.load_state_dict(state)

    assert unchanged(average, before)


@pytest.mark.parametrize("make", MAKERS, ids=["average", "averages", "window"])
@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_a_state_with_anything_spoiled_is_refused(
    make: Callable[[], Any], data: st.DataObject
) -> None:
    """Whatever stands where something else belongs; nothing is changed."""
    average = make()
    state = copy.deepcopy(average.state_dict())
    path = data.draw(st.sampled_from(paths(state)))
    wrong = data.draw(st.sampled_from(WRONG))
    old = at(state, path)
    if as_good(path, old, wrong):
        return
    at(state, path[:-1])[path[-1]] = wrong
    before = snapshot(average)

    with pytest.raises(polyak.AveragingError):
        average.load_state_dict(state)

    assert unchanged(average, before)


def as_good(path: tuple[Any, ...], old: Any, new: Any) -> bool:
    """Whether `new` may stand there: an empty list for an empty one, a clock that began at -1.5."""
    if isinstance(old, list) and not old:
        return isinstance(new, list)
    return path[-1] == "origin" and isinstance(new, float) and math.isfinite(new)


@pytest.mark.parametrize("state", [None, [], "x", {}, {"format": 1}, {"model": {}}], ids=repr)
def test_what_is_not_a_state_is_refused(state: Any) -> None:
    """A file of something else is the usual mistake."""
    average = make_average()

    with pytest.raises(polyak.ArgumentError, match="state must be what state_dict"):
        average.load_state_dict(state)


@pytest.mark.parametrize("number", [0, 2, "1", 10**9])
def test_an_unknown_format_is_refused(number: Any) -> None:
    """A later polyak may mean other things by the same keys."""
    average = make_average()
    before = snapshot(average)

    with pytest.raises(polyak.ArgumentError, match="format 1"):
        average.load_state_dict({**average.state_dict(), "format": number})

    assert unchanged(average, before)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("other", MAKERS)
def test_the_state_of_another_class_is_refused(
    make: Callable[[], Any], other: Callable[[], Any]
) -> None:
    """Each says what it wants and what it got."""
    if make is other:
        make().load_state_dict(other().state_dict())
        return
    average = make()
    before = snapshot(average)

    with pytest.raises(polyak.MatchError, match="state must be of a polyak"):
        average.load_state_dict(other().state_dict())

    assert unchanged(average, before)


def test_the_state_of_another_model_is_refused_by_name() -> None:
    """Other names, shapes, or storage."""
    average = make_average()
    before = snapshot(average)
    others = {
        r"only in the state .*extra": {"extra": torch.zeros(1)},
        r"'last.weight' must have shape \[2, 4\], got \[3, 4\]": {"last.weight": torch.zeros(3, 4)},
        "'last.bias' must be stored as torch.float32": {"last.bias": torch.zeros(2).double()},
    }
    for message, change in others.items():
        state = copy.deepcopy(average.state_dict())
        state["averages"]["average"]["tensors"].update(change)
        with pytest.raises(polyak.MatchError, match=message):
            average.load_state_dict(state)
        assert unchanged(average, before)


def test_averages_of_other_names_are_refused() -> None:
    """Their names are part of what was saved."""
    averages = make_averages()
    model = Net()
    others = polyak.Averages(model, {"a": polyak.Uniform(), "c": polyak.Power(gamma=2.0)})

    with pytest.raises(polyak.MatchError, match=r"\['a', 'c'\], got \['a', 'b'\]"):
        others.load_state_dict(averages.state_dict())


@pytest.mark.parametrize(("k", "every"), [(3, 1), (2, 5)])
def test_a_window_of_another_size_is_refused(k: int, every: int) -> None:
    """What it holds depends on both."""
    window = polyak.Window(Net(), k, every)

    with pytest.raises(polyak.MatchError, match=f"k={k} and every={every}, got k=2 and every=1"):
        window.load_state_dict(make_window().state_dict())


@pytest.mark.parametrize(
    "words", [{"schedule": "keep"}, {"live": "drop"}], ids=["schedule", "live"]
)
def test_how_to_load_must_be_said_in_known_words(words: dict[str, Any]) -> None:
    """A typo must not load in another way."""
    average = make_average()

    with pytest.raises(polyak.ArgumentError, match=f"{next(iter(words))} must be"):
        average.load_state_dict(average.state_dict(), **words)


def test_live_weights_of_another_shape_are_refused() -> None:
    """They are checked before the averages are written."""
    average = make_average()
    with average.applied():
        state = copy.deepcopy(average.state_dict())
    state["live"]["first.weight"] = torch.zeros(9)
    before = snapshot(average)

    with pytest.raises(polyak.MatchError, match=r"'first.weight' must have shape \[4, 3\]"):
        average.load_state_dict(state)

    assert unchanged(average, before)


def test_a_state_survives_a_file_on_disk(tmp_path: Path) -> None:
    """Beside the model, in one `torch.save`, as in the front door example."""
    model = Net()
    average = polyak.Average(model, polyak.Power(sigma_rel=0.05))
    average.update()
    torch.save({"model": model.state_dict(), "average": average.state_dict()}, tmp_path / "last.pt")

    loaded = torch.load(tmp_path / "last.pt", weights_only=True)
    again = Net()
    again.load_state_dict(loaded["model"])
    resumed = polyak.Average(again, polyak.Power(sigma_rel=0.05))
    resumed.load_state_dict(loaded["average"])

    assert same_tensors(resumed.weights(), average.weights())


def test_history_tells_which_schedule_made_which_update() -> None:
    """After a resume with another schedule the history and the schedules of before tell it all.

    From them alone an oracle, in float64, finds the average that really happened.
    """
    live = {"w": torch.zeros((), dtype=torch.float64)}
    first, second = polyak.Exponential(decay=0.9, debias=False), polyak.Power(gamma=3.0)
    average = polyak.Average(live, first)
    for step in range(1, 6):
        live["w"].fill_(step)
        average.update()
    resumed = polyak.Average(live, second)
    resumed.load_state_dict(average.state_dict(), schedule="replace")
    for step in range(7, 20, 2):
        live["w"].fill_(step)
        resumed.update(now=step)

    state = resumed.state_dict()
    row = state["averages"]["average"]
    assert state["clock"]["history"] == [[1, 5, 0], [2, 7, 1]]
    assert row["past"] == [{"name": "Exponential", "decay": 0.9, "debias": False}]
    rules = [schedule_from_state(saved) for saved in (*row["past"], row["schedule"])]
    expected, now = 0.0, 0.0
    for elapsed, count, index in state["clock"]["history"]:
        for _ in range(count):
            now += elapsed
            decay = rules[index](now=now, elapsed=elapsed)
            expected = decay * expected + (1.0 - decay) * now
    assert resumed.tensors["w"].item() == pytest.approx(expected, rel=1e-14)

    again = polyak.Average(live, second)
    again.load_state_dict(state)
    assert again.state_dict()["averages"]["average"]["past"] == row["past"]


def headed(classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, classes))


@pytest.mark.parametrize("kind", ["average", "averages", "window"])
def test_a_new_head_starts_from_the_live_weights_when_asked(kind: str) -> None:
    """`on_mismatch="reinit"` takes what fits, starts the rest anew and names it (case D7)."""

    def build(model: nn.Module) -> Any:
        if kind == "average":
            return polyak.Average(model, polyak.Uniform())
        if kind == "averages":
            return polyak.Averages(model, {"a": polyak.Uniform(), "b": polyak.Power(gamma=3.0)})
        return polyak.Window(model, k=2)

    def tensors(average: Any) -> Mapping[str, Tensor]:
        chosen: Mapping[str, Tensor] = (average["b"] if kind == "averages" else average).tensors
        return chosen

    old_model, new_model = headed(5), headed(7)
    old, new = build(old_model), build(new_model)
    for _ in range(3):
        for parameter in old_model.parameters():
            parameter.data.add_(1.0)
        old.update()
    state = through_a_file(old.state_dict())
    before = {name: tensor.clone() for name, tensor in tensors(new).items()}
    with pytest.raises(polyak.MatchError, match=r"'2\.(weight|bias)'"):
        new.load_state_dict(state)
    assert all(torch.equal(t, before[n]) for n, t in tensors(new).items())

    with pytest.warns(polyak.AveragingWarning, match=r"2 averages did not fit.*'2\.bias'"):
        new.load_state_dict(state, on_mismatch="reinit")
    live = dict(new_model.named_parameters())
    for name, tensor in tensors(new).items():
        expected = live[name] if name.startswith("2.") else tensors(old)[name]
        assert torch.equal(tensor, expected)
    assert (new.now, new.updates) == (3, 3)
    new.update()

    with pytest.raises(polyak.ArgumentError, match="on_mismatch must be"):
        new.load_state_dict(state, on_mismatch="skip")


def test_a_state_of_which_nothing_fits_is_refused_also_with_reinit() -> None:
    """It is another model's file; its clock must not be taken over."""
    average = polyak.Average(nn.Linear(3, 2))
    foreign = polyak.Average({"other": torch.ones(5)})
    foreign.update(now=1_000)
    with pytest.raises(polyak.MatchError, match="something that fits"):
        average.load_state_dict(foreign.state_dict(), on_mismatch="reinit")
    assert average.now == 0


@pytest.mark.filterwarnings("error")
def test_average_first_and_model_second_is_no_reason_to_warn() -> None:
    """Both orders of loading a checkpoint are usual."""
    old = nn.Linear(3, 2)
    saved = polyak.Average(old)
    saved.update()
    new = nn.Linear(3, 2)
    average = polyak.Average(new)
    average.load_state_dict(through_a_file(saved.state_dict()))
    new.load_state_dict(old.state_dict())
    average.weights()
    assert average.report().notes == ()


def test_an_interrupted_load_is_noticed() -> None:
    """Half of the tensors are the saved ones: refused until a load or a reset goes through."""
    average = polyak.Average({name: torch.ones(3) for name in "abc"})
    state = copy.deepcopy(average.state_dict())
    with pytest.raises(KeyboardInterrupt), interrupted_in("copy_", call=2):
        average.load_state_dict(state)
    with pytest.raises(polyak.OrderError, match="load was interrupted"):
        average.update()
    average.load_state_dict(state)
    average.update()
