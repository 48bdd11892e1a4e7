"""`polyak.compat.ema_pytorch.EMA` is ema-pytorch's class, and says where it is not."""

import copy
import inspect
import io
import math
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import polyak
import zoo
from polyak.compat.ema_pytorch import EMA

Settings = dict[str, Any]


@pytest.fixture(scope="module")
def original() -> Any:
    """The class of ema-pytorch 0.8.3."""
    package = pytest.importorskip("ema_pytorch", reason="ema-pytorch 0.8.3 is not installed")
    return package.EMA


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """One process that is a group."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Net(nn.Module):
    """Running statistics, a counter, a floating buffer, a frozen layer, a method beside forward."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.two = nn.Linear(4, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("mask", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.two(self.norm(self.one(x)))) * self.mask  # type: ignore[no-any-return]

    def encode(self, x: Tensor) -> Tensor:
        """The first layer alone."""
        return self.one(x)  # type: ignore[no-any-return]


def step(live: nn.Module, generator: torch.Generator) -> None:
    """Pull all weights to zero and shake them; move buffers and statistics."""
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.mul_(0.99).add_(0.1 * noise.to(parameter.dtype))
    if isinstance(live, Net):
        live.mask.add_(0.01)
        live.train()
        live(torch.randn(8, 3, generator=generator).to(live.mask.dtype))


def floats(module: nn.Module) -> dict[str, Tensor]:
    return {n: v.double() for n, v in module.state_dict().items() if v.is_floating_point()}


def assert_close(mine: nn.Module, other: nn.Module, tolerance: float = 1e-6) -> None:
    """All floating entries agree within `tolerance` of the largest value of their tensor."""
    left, right = floats(mine), floats(other)
    assert list(left) == list(right)
    for name, value in left.items():
        limit = tolerance * float(right[name].abs().max())
        torch.testing.assert_close(value, right[name], rtol=tolerance, atol=limit, msg=name)


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────


def some_settings(seed: int) -> Settings:
    """A setting of every argument that the original has, but for the two that are modules."""
    draw = random.Random(seed)
    beta = draw.choice([0.5, 0.9, 0.99, 0.999, 0.9999, 1.0])
    return {
        "beta": beta,
        "update_after_step": draw.choice([-1, 0, 1, 7, 10, 50, 100]),
        "update_every": draw.choice([1, 1, 2, 3, 10]),
        "inv_gamma": draw.choice([0.5, 1.0, 10.0]),
        "power": draw.choice([2 / 3, 0.75, 1.0, 3.0]),
        "min_value": draw.choice([0.0, 0.0, 0.3, beta, 1.0]),
        "param_or_buffer_names_no_ema": draw.choice([set(), {"mask"}, ["one.bias", "mask"]]),
        "ignore_names": draw.choice([set(), {"two.weight"}, {"one.bias", "norm.running_var"}]),
        "ignore_startswith_names": draw.choice([set(), {"norm."}, {"tw", "mask"}]),
        "include_online_model": draw.random() < 0.5,
        "allow_different_devices": draw.random() < 0.5,
        "use_foreach": draw.random() < 0.5,
        "update_model_with_ema_every": draw.choice([None, None, 7, 20, 50]),
        "update_model_with_ema_beta": draw.choice([0.0, 0.3, 0.9, 1.0]),
        "forward_method_names": draw.choice([(), ("encode",)]),
        "move_ema_to_online_device": draw.random() < 0.5,
        "coerce_dtype": draw.random() < 0.5,
        "lazy_init_ema": draw.random() < 0.3,
    }


def test_arguments_are_those_of_the_original(original: Any) -> None:
    """Same names, order and defaults; and the settings drawn below leave none of them out."""
    mine = dict(inspect.signature(EMA.__init__).parameters)
    other = dict(inspect.signature(original.__init__).parameters)

    assert list(mine) == list(other)
    for name, parameter in other.items():
        default = mine[name].default
        both = {type(default), type(parameter.default)} <= {set, frozenset}
        assert default == parameter.default or both, name
    assert set(some_settings(0)) | {"self", "model", "ema_model"} == set(other)


@pytest.mark.parametrize("seed", range(30))
def test_numbers_are_those_of_the_original(original: Any, seed: int) -> None:
    """200 calls agree within 1e-6 under random settings, average and (pulled back) live model."""
    settings = some_settings(seed)
    live = Net().double()
    twin = copy.deepcopy(live)
    given = None if settings["lazy_init_ema"] or seed % 3 else Net().double()
    start = copy.deepcopy(given)
    mine, other = EMA(live, given, **settings), original(twin, start, **settings)
    generators = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)

    for _ in range(200):
        step(live, generators[0])
        step(twin, generators[1])
        mine.update()
        other.update()
        if mine.step % 37 == 0:
            assert_close(mine.ema_model, other.ema_model)

    assert_close(mine.ema_model, other.ema_model)
    assert_close(live, twin)
    assert list(mine.state_dict()) == list(other.state_dict())
    assert (int(mine.step), bool(mine.initted)) == (int(other.step), bool(other.initted))
    assert mine.get_current_decay() == pytest.approx(other.get_current_decay(), abs=1e-7)
    assert hasattr(mine, "encode") == hasattr(other, "encode")


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_what_goes_back_into_the_live_model(original: Any, share: float) -> None:
    """At calls on which the average stands, so that copied and ignored names are of the past."""
    settings: Settings = {
        "update_after_step": 3,
        "update_every": 5,
        "param_or_buffer_names_no_ema": {"mask"},
        "ignore_names": {"one.bias"},
        "update_model_with_ema_every": 7,
        "update_model_with_ema_beta": share,
    }
    live = Net().double()
    twin = copy.deepcopy(live)
    mine, other = EMA(live, **settings), original(twin, **settings)
    generators = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    for _ in range(40):
        step(live, generators[0])
        step(twin, generators[1])
        mine.update()
        other.update()
        assert_close(live, twin)
        assert_close(mine.ema_model, other.ema_model)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.999, "update_after_step": 100, "update_every": 1},  # of the experiment, S6
        {"beta": 0.99, "min_value": 0.99, "update_after_step": 0, "update_every": 4},
    ],
)
def test_numbers_are_those_of_a_recurrence(settings: Settings) -> None:
    """500 calls agree within 1e-6 with the formula of the original, written down in float64."""
    live, generator = nn.Linear(3, 2), torch.Generator().manual_seed(0)
    ema = EMA(live, **settings)
    after, every = settings.get("update_after_step", 100), settings.get("update_every", 10)
    low, high = settings.get("min_value", 0.0), settings.get("beta", 0.9999)
    right = live.weight.detach().double()

    for call in range(500):  # the original counts from 0 here
        step(live, generator)
        ema.update()
        e = call - after
        if call == 0 or (call % every == 0 and e <= 0):
            right = live.weight.detach().double()
        elif call % every == 0:
            decay = min(max(1.0 - (1.0 + e) ** (-2.0 / 3.0), low), high)
            right = decay * right + (1.0 - decay) * live.weight.detach().double()

    assert ema.get_current_decay() == pytest.approx(1 - (500 - after) ** (-2 / 3), abs=0.02)
    shown = ema.ema_model.get_parameter("weight").detach().double()
    torch.testing.assert_close(shown, right, rtol=1e-6, atol=1e-6 * float(right.abs().max()))


def test_the_schedule_of_the_docstring_is_the_same() -> None:
    """`After(s, InverseGamma(...))`, once a step, ends in the same average."""
    live, generator = nn.Linear(3, 2), torch.Generator().manual_seed(0)
    ema = EMA(live, beta=0.999, update_after_step=50, update_every=1)
    rule = polyak.InverseGamma(1.0, power=2 / 3, max_decay=0.999)
    average = polyak.Average(live, polyak.After(50, rule))
    for _ in range(300):
        step(live, generator)
        ema.update()
        average.update()

    torch.testing.assert_close(
        ema.average.tensors["weight"], average.tensors["weight"], rtol=1e-5, atol=1e-6
    )
    report, other = ema.average.report(), average.report()
    assert (report.updates, report.now) == (other.updates, other.now) == (300, 300)


def test_the_average_can_be_changed_while_it_runs(original: Any) -> None:
    """beta, update_every and the names are read at every call, as in the original."""
    live = Net().double()
    twin = copy.deepcopy(live)
    mine = EMA(live, update_after_step=3, update_every=1)
    other = original(twin, update_after_step=3, update_every=1)
    generators = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for call in range(60):
        for ema in (mine, other):
            if call == 20:
                ema.beta = 0.5
            if call == 30:
                ema.update_every, ema.ignore_names = 3, {"one.weight"}
            if call == 40:
                ema.initted.fill_(False)  # start again
            if call == 50:
                ema.copy_params_from_model_to_ema()
                ema.step.fill_(2)
            if call == 55:
                ema.update_model_with_ema(0.25)
        step(live, generators[0])
        step(twin, generators[1])
        mine.update()
        other.update()
        assert_close(mine.ema_model, other.ema_model)
        assert_close(live, twin)


# ── files ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("calls", [0, 1, 9, 30])
def test_files_go_on_with_the_same_numbers(
    original: Any, include: bool, every: int, calls: int
) -> None:
    """Theirs in ours and ours in theirs, through a file, at any call: 20 more calls agree."""
    settings: Settings = {
        "update_after_step": 5,
        "update_every": every,
        "include_online_model": include,
    }
    live, generator = Net().double(), torch.Generator().manual_seed(calls)
    mine, other = EMA(live, **settings), original(live, **settings)
    for _ in range(calls):
        step(live, generator)
        mine.update()
        other.update()
    straight = mine.average.state_dict()["clock"]
    resumed, theirs = EMA(live, **settings), original(live, **settings)

    for source, target in ((other, resumed), (mine, theirs)):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))

    assert resumed.average.state_dict()["clock"]["now"] == straight["now"]
    assert resumed.average.updates == mine.average.updates
    for _ in range(20):
        step(live, generator)
        for ema in (mine, other, resumed, theirs):
            ema.update()
    for ema in (mine, resumed, theirs):
        assert_close(ema.ema_model, other.ema_model)
    memories = [e.average._engine.rows[0].memory for e in (mine, resumed)]
    assert memories[0].age == pytest.approx(memories[1].age)
    assert memories[0].noise_window == pytest.approx(memories[1].noise_window)


def test_the_report_after_a_long_load_is_true() -> None:
    """What is said to be remembered of 20,000 calls is what folding them in one by one gives."""
    live = nn.Linear(2, 1)
    ema = EMA(live, update_every=2, update_after_step=10, beta=0.999)
    file = ema.state_dict() | {"initted": torch.tensor(True), "step": torch.tensor(20_000)}
    ema.load_state_dict(file)
    rule, right, last = ema.average.schedule, polyak._engine.Memory(), 0
    for call in range(1, 20_001, 2):
        right.fold(rule(now=call, elapsed=call - last), call - last)
        last = call

    memory = ema.average._engine.rows[0].memory
    assert (ema.average.updates, ema.average.now) == (10_000, 19_999)
    assert memory.initial == right.initial == 0.0
    assert memory.age == pytest.approx(right.age, rel=1e-4)
    assert memory.noise_window == pytest.approx(right.noise_window, rel=1e-4)
    assert memory.share == pytest.approx(right.share, rel=1e-6)


def test_old_and_wrapped_files_load(original: Any) -> None:
    """Counters with one element, as old versions wrote them, and names of a wrapped copy."""
    live, generator = Net(), torch.Generator().manual_seed(0)
    other = original(live, update_every=1, include_online_model=False)
    for _ in range(3):
        step(live, generator)
        other.update()
    file = {n.replace("ema_model.", "ema_model.module."): v for n, v in other.state_dict().items()}
    file |= {"initted": torch.tensor([1.0]), "step": torch.tensor([3])}

    ema = EMA(live, update_every=1, include_online_model=False, lazy_init_ema=True)
    ema.load_state_dict(file)

    assert_close(ema.ema_model, other.ema_model, tolerance=0.0)
    assert (int(ema.step), bool(ema.initted)) == (3, True)


def test_a_resumed_bf16_run_is_the_uninterrupted_one_bit_for_bit(original: Any) -> None:
    """Files hold the float32 average of a bf16 model; the original reads them all the same."""
    live, generator = Net().bfloat16(), torch.Generator().manual_seed(0)
    settings: Settings = {"beta": 0.999, "update_after_step": 2, "update_every": 1}
    ema, again = EMA(live, **settings), EMA(live, **settings)
    parent = nn.ModuleDict({"ema": ema})  # nested, as in a trainer
    for _ in range(30):
        step(live, generator)
        ema.update()
    nn.ModuleDict({"ema": again}).load_state_dict(parent.state_dict())
    original(live, **settings).load_state_dict(ema.state_dict())
    for _ in range(5):
        step(live, generator)
        ema.update()
        again.update()

    for name, value in ema.average.tensors.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, again.average.tensors[name])
        assert ema.state_dict()[f"ema_model.{name}"].dtype == torch.float32
    assert ema(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_load_that_does_not_fit_changes_nothing() -> None:
    """Missing, unknown and misshapen tensors, assign=True, and a load inside applied()."""
    live = Net()
    ema = EMA(live)
    ema.update()
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    file = {name: value + 1 for name, value in before.items() if name != "initted"}
    file["initted"] = torch.tensor(True)

    with pytest.raises(polyak.MatchError, match=r"1 missing \['ema_model.mask'\]"):
        ema.load_state_dict({n: v for n, v in file.items() if n != "ema_model.mask"})
    with pytest.raises(polyak.MatchError, match=r"'ema_model.mask' must have shape \[2\]"):
        ema.load_state_dict(file | {"ema_model.mask": torch.ones(7)})
    with pytest.raises(polyak.MatchError, match=r"'ema_model.mask' must have .* kind"):
        ema.load_state_dict(file | {"ema_model.mask": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(polyak.ArgumentError, match="assign"):
        ema.load_state_dict(file, assign=True)
    with pytest.raises(polyak.ArgumentError, match="assign"):
        nn.ModuleDict({"e": ema}).load_state_dict(
            {f"e.{n}": v for n, v in file.items()}, assign=True
        )
    with ema.average.applied(), pytest.raises(polyak.OrderError, match="applied"):
        ema.load_state_dict(file)

    after = ema.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    ema.load_state_dict(file)
    assert int(ema.step) == 2


# ── what is better ───────────────────────────────────────────────────────────────────────────────


def test_integers_follow_and_nothing_else_is_lost() -> None:
    """Counters are the live ones; tied weights are one; an attribute may be called `module`."""
    live = zoo.Counters()
    ema = EMA(live, update_every=1)
    live(torch.ones(1, 3))
    ema.update()
    shown = ema.ema_model.state_dict()
    assert (int(shown["seen"]), int(shown["big"])) == (1, 2**53 + 1)

    tied = EMA(zoo.Tied()).ema_model.state_dict(keep_vars=True)
    assert len({t.data_ptr() for t in tied.values()}) < len(tied)
    names = EMA(zoo.Sequence(module=nn.Linear(3, 3), _orig_mod=nn.Linear(3, 2))).state_dict()
    assert "ema_model.module.weight" in names
    assert "ema_model._orig_mod.weight" in names


def test_ddp_around_the_model_does_not_matter(process_group: None) -> None:
    """The averaged model is the bare class; names may be given as the wrapper has them."""
    live = Net()
    wrapped = nn.parallel.DistributedDataParallel(live)
    ema = EMA(
        wrapped,
        update_after_step=0,
        update_every=1,
        ignore_names={"module.mask"},
        ignore_startswith_names={"module.one."},
    )
    start = ema.average.weights()
    generator = torch.Generator().manual_seed(0)
    ema.update()
    first = ema.average.weights()
    for _ in range(5):
        step(live, generator)
        ema.update()

    assert type(ema.ema_model) is Net
    for name, value in ema.average.weights().items():
        moved = not torch.equal(value, first[name])
        assert moved == (name not in {"mask", "one.weight", "one.bias"} and "frozen" not in name)
    assert start.keys() == first.keys()


def test_a_layer_that_is_unfrozen_late_is_averaged(original: Any) -> None:
    """Frozen parameters are averaged from the start, so nothing is missed."""
    live = Net().double()
    twin = copy.deepcopy(live)
    mine, other = EMA(live, update_every=1), original(twin, update_every=1)
    generators = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    for call in range(150):
        if call == 110:
            live.frozen.requires_grad_(True)
            twin.frozen.requires_grad_(True)
        step(live, generators[0])
        step(twin, generators[1])
        mine.update()
        other.update()

    assert_close(mine.ema_model, other.ema_model)


def test_nan_stays_out_of_averages() -> None:
    """What goes wrong in the live model does not stay in the average."""
    live = nn.Linear(2, 1)
    ema = EMA(live, update_after_step=0, update_every=1)
    ema.update()
    with torch.no_grad():
        live.weight[0, 0] = torch.nan
    ema.update()

    assert bool(ema.ema_model.get_parameter("weight").isfinite().all())
    assert "weight" in str(ema.average.report())


def test_a_misspelt_name_is_a_warning() -> None:
    """The original ignores it in silence, and averages what was to be left alone."""
    for settings in (
        {"ignore_names": {"on.weight"}},
        {"ignore_startswith_names": {"on."}},
        {"param_or_buffer_names_no_ema": {"masc"}},
    ):
        with pytest.warns(polyak.AveragingWarning, match="no tensors called"):
            EMA(Net(), **settings)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EMA(Net(), ignore_names={"norm.num_batches_tracked"})


# ── it is a module ───────────────────────────────────────────────────────────────────────────────


def test_modes_and_calls() -> None:
    """The averaged model evaluates; a parent's train() leaves it; its own train() works."""
    live = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    ema = EMA(live, forward_method_names=("state_dict",), update_every=1)
    x = torch.ones(2, 3)
    ema.update()

    nn.ModuleList([ema]).train()
    assert live.training
    assert ema.ema_model.get_submodule("1").training is False
    assert torch.equal(ema(x), live[0](x))
    ema.ema_model.train()
    assert ema.ema_model.get_submodule("1").training
    assert torch.equal(ema.forward_eval(x), live[0](x))
    assert not ema.forward_eval(x).requires_grad
    assert all(part.training for part in ema.ema_model.modules())
    assert ema.eval() is ema.ema_model
    assert not any(part.training for part in ema.ema_model.modules())
    assert not any(p.requires_grad for p in ema.ema_model.parameters())
    assert EMA(live, include_online_model=False).online_model is not live
    assert EMA(live, include_online_model=False).model is live


def test_it_counts_the_steps_of_an_optimizer() -> None:
    """`add_to_optimizer_post_step_hook` calls update after each step, until it is removed."""
    live = nn.Linear(2, 1)
    ema, optimizer = EMA(live), torch.optim.SGD(live.parameters(), lr=0.1)
    handle = ema.add_to_optimizer_post_step_hook(optimizer)
    for _ in range(3):
        live(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    handle.remove()
    optimizer.step()

    assert int(ema.step) == 3


def test_moves_and_copies() -> None:
    """A cast of everything and a deep copy go on with the same average."""
    live = Net()
    ema, generator = (
        EMA(live, update_after_step=2, update_every=1),
        torch.Generator().manual_seed(0),
    )
    for _ in range(5):
        step(live, generator)
        ema.update()
    twin = copy.deepcopy(ema)
    ema.double()
    assert live.mask.dtype == torch.float64
    twin.double()
    generators = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for _ in range(3):
        step(live, generators[0])
        step(twin.model, generators[1])
        ema.update()
        twin.update()

    assert twin.model is not live
    assert floats(ema.ema_model)["mask"].mean().item() > 1.01
    assert_close(ema.ema_model, twin.ema_model)
    for name, value in ema.average.weights().items():
        assert torch.equal(value, ema.ema_model.state_dict()[name])
    ema.restore_ema_model_device()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_of_ones_own_shows_the_average(dtype: torch.dtype) -> None:
    """`ema_model` keeps its identity, its dtype and, until the first update, its weights."""
    live, own = Net().bfloat16(), Net().to(dtype)
    first = floats(own)
    ema = EMA(live, lambda: own, update_after_step=0, update_every=1)

    assert ema.ema_model is own
    assert not any(part.training for part in own.modules())
    assert all(torch.equal(first[name], value) for name, value in floats(own).items())
    ema.update()
    assert_close(own, live, tolerance=0.0)
    assert own.mask.dtype == dtype
    assert own(torch.ones(2, 3, dtype=dtype)).dtype == dtype


# ── what is refused ──────────────────────────────────────────────────────────────────────────────


class Locked(nn.Linear):
    """A layer that cannot be copied."""

    def __deepcopy__(self, memo: Any) -> nn.Module:
        raise TypeError("no copies")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 1.5}, "beta must be between 0 and 1"),
        ({"beta": math.nan}, "beta must be between 0 and 1"),
        ({"min_value": -0.1}, "min_value must be between"),
        ({"power": -1.0}, "power must be"),
        ({"inv_gamma": -1.0}, "inv_gamma must be"),
        ({"update_after_step": math.inf}, "update_after_step must be"),
        ({"update_every": 0}, "update_every must be at least 1"),
        ({"update_model_with_ema_every": 0}, "update_model_with_ema_every must be"),
        ({"update_model_with_ema_beta": 2.0}, "update_model_with_ema_beta must be"),
        ({"param_or_buffer_names_no_ema": ("mask",)}, "must be a set or a list"),
        ({"ignore_names": "mask"}, "ignore_names must be a collection"),
        ({"ignore_startswith_names": "mask"}, "ignore_startswith_names must be a collection"),
        ({"ema_model": Net, "lazy_init_ema": True}, "ema_model must be None"),
        ({"ema_model": lambda: None}, "ema_model must be a module"),
    ],
)
def test_settings_out_of_range_are_refused(settings: Settings, message: str) -> None:
    with pytest.raises(polyak.ArgumentError, match=message):
        EMA(Net(), **settings)


def test_calls_at_the_wrong_moment_are_refused() -> None:
    """No module, no copy, no average yet, an update inside applied(): the count does not move."""
    with pytest.raises(polyak.ArgumentError, match=r"polyak\.Average\(tensors\)"):
        EMA({"w": torch.ones(2)})  # type: ignore[arg-type]
    with pytest.raises(polyak.ArgumentError, match="deepcopy") as caught:
        EMA(nn.Sequential(Locked(2, 2)))
    assert "ema_model" in caught.value.__notes__[0]
    EMA(nn.Sequential(Locked(2, 2)), lambda: nn.Sequential(nn.Linear(2, 2)))
    lazy = EMA(Net(), lazy_init_ema=True)
    for call in (lambda: lazy(torch.ones(2, 3)), lazy.eval, lazy.restore_ema_model_device):
        with pytest.raises(polyak.OrderError, match="Call update"):
            call()
    ema = EMA(Net(), update_every=1)
    ema.update()
    with pytest.raises(polyak.OrderError, match="once"):
        ema.init_ema()
    with pytest.raises(polyak.ArgumentError, match="decay must be"):
        ema.update_model_with_ema(1.1)
    with pytest.raises(polyak.ArgumentError, match="must be a torch"):
        ema.add_to_optimizer_post_step_hook(ema)  # type: ignore[arg-type]
    with ema.average.applied(), pytest.raises(polyak.OrderError, match="applied"):
        ema.update()
    assert int(ema.step) == 1
    methods: list[Callable[..., Any]] = [ema.update, ema.copy_params_from_ema_to_model]
    for method in methods:
        method()
    assert int(ema.step) == 2
