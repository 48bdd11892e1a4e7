"""`polyak.compat.swa_utils` is torch's module, number for number, and says where it is not."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import swa_utils as theirs

import polyak
import zoo
from polyak.compat import swa_utils as ours

Functions = dict[str, Any]


def model() -> nn.Module:
    """A network with running statistics and a counter."""
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def step(live: nn.Module, generator: torch.Generator) -> None:
    """Move all weights a little, and run a forward that moves the statistics."""
    with torch.no_grad():
        for parameter in live.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise.to(parameter.dtype))
    live.train()
    live(torch.randn(8, 3, generator=generator).to(next(live.parameters()).dtype))


def assert_close(mine: nn.Module, other: nn.Module, tolerance: float = 1e-6) -> None:
    """All floating entries agree within `tolerance` of the largest value of their tensor."""
    left, right = mine.state_dict(), other.state_dict()
    assert list(left) == list(right)
    for name, value in left.items():
        if value.is_floating_point():
            scale = float(right[name].abs().max())
            torch.testing.assert_close(
                value.double(), right[name].double(), rtol=tolerance, atol=tolerance * scale
            )


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """One process that is a group."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ema_of_my_own(averaged: Tensor, live: Tensor, n: Tensor | int) -> Tensor:
    """A warm-up that somebody wrote."""
    decay = min(0.99, (1.0 + float(n)) / (10.0 + float(n)))
    return averaged * decay + live * (1.0 - decay)


def ema_of_my_own_in_place(averaged: list[Tensor], live: list[Tensor], n: Tensor | int) -> None:
    """The same in place on lists."""
    for a, w in zip(averaged, live, strict=True):
        a.copy_(ema_of_my_own(a, w, n))


FUNCTIONS: dict[str, Functions] = {
    "swa": {},
    "swa avg_fn": {"avg_fn": theirs.get_swa_avg_fn()},
    "swa multi": {"multi_avg_fn": theirs.get_swa_multi_avg_fn()},
    "ema avg_fn": {"avg_fn": theirs.get_ema_avg_fn(0.99)},
    "ema multi": {"multi_avg_fn": theirs.get_ema_multi_avg_fn(0.9)},
    "own avg_fn": {"avg_fn": ema_of_my_own},
    "own multi": {"multi_avg_fn": ema_of_my_own_in_place},
}


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
def test_numbers_are_those_of_torch(functions: Functions, use_buffers: bool) -> None:
    """500 updates agree within 1e-6 with torch's class: means, EMAs, buffers averaged or not."""
    live, generator = model().double(), torch.Generator().manual_seed(1)
    if use_buffers and functions is FUNCTIONS["swa multi"]:  # torch's divides counters: it raises
        live.get_submodule("1").num_batches_tracked = None  # type: ignore[assignment]
    mine = ours.AveragedModel(live, use_buffers=use_buffers, **functions)
    other = theirs.AveragedModel(live, use_buffers=use_buffers, **functions)

    for _ in range(500):
        step(live, generator)
        mine.update_parameters(live)
        other.update_parameters(live)

    assert_close(mine, other)
    assert int(mine.n_averaged) == int(other.n_averaged) == 500
    assert mine.average.updates == mine.average.now == 500


@pytest.mark.parametrize(("functions", "decay"), [({}, None), (FUNCTIONS["ema multi"], 0.9)])
def test_numbers_are_those_of_a_recurrence(functions: Functions, decay: float | None) -> None:
    """500 updates agree within 1e-6 with the sum written down in float64."""
    live, generator = model(), torch.Generator().manual_seed(2)
    mine = ours.AveragedModel(live, **functions)
    sums: dict[str, Tensor] = {}

    for n in range(500):
        step(live, generator)
        mine.update_parameters(live)
        for name, parameter in live.named_parameters():
            value = parameter.detach().double()
            kept = 0.0 if n == 0 else n / (n + 1) if decay is None else decay
            sums[name] = kept * sums.get(name, 0.0 * value) + (1.0 - kept) * value

    for name, value in mine.module.named_parameters():
        scale = float(sums[name].abs().max())
        torch.testing.assert_close(value.double(), sums[name], rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_a_file_of_torch_goes_on_with_the_same_numbers(use_buffers: bool) -> None:
    """A state that torch's class saved loads, and 20 more updates agree."""
    live, generator = model().double(), torch.Generator().manual_seed(3)
    functions = FUNCTIONS["ema avg_fn"]
    other = theirs.AveragedModel(live, use_buffers=use_buffers, **functions)
    for _ in range(30):
        step(live, generator)
        other.update_parameters(live)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)

    mine = ours.AveragedModel(live, use_buffers=use_buffers, **functions)
    mine.load_state_dict(torch.load(file, weights_only=True))
    assert_close(mine, other, tolerance=0.0)
    assert mine.average.report().updates == 30
    for _ in range(20):
        step(live, generator)
        mine.update_parameters(live)
        other.update_parameters(live)

    assert_close(mine, other)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_a_file_of_ours_goes_on_in_torch(use_buffers: bool) -> None:
    """torch's class reads what ours saved, and 20 more updates agree."""
    live, generator = model().double(), torch.Generator().manual_seed(4)
    mine = ours.AveragedModel(live, use_buffers=use_buffers)
    for _ in range(30):
        step(live, generator)
        mine.update_parameters(live)

    other = theirs.AveragedModel(live, use_buffers=use_buffers)
    other.load_state_dict(mine.state_dict())
    for _ in range(20):
        step(live, generator)
        mine.update_parameters(live)
        other.update_parameters(live)

    assert_close(mine, other)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit() -> None:
    """Save and load of a bf16 model's average lose nothing: files hold its float32."""
    live, generator = model().bfloat16(), torch.Generator().manual_seed(5)
    mine = ours.AveragedModel(live, multi_avg_fn=ours.get_ema_multi_avg_fn(0.999), use_buffers=True)
    for _ in range(30):
        step(live, generator)
        mine.update_parameters(live)
    resumed = ours.AveragedModel(
        live, multi_avg_fn=ours.get_ema_multi_avg_fn(0.999), use_buffers=True
    )
    resumed.load_state_dict(mine.state_dict())

    for _ in range(5):
        step(live, generator)
        mine.update_parameters(live)
        resumed.update_parameters(live)

    for name, value in mine.average.tensors.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, resumed.average.tensors[name])
    memory = mine.average._engine.rows[0].memory, resumed.average._engine.rows[0].memory
    assert memory[0].age == pytest.approx(memory[1].age)
    assert memory[0].noise_window == pytest.approx(memory[1].noise_window)
    assert mine.average._engine.history == resumed.average._engine.history


def test_integer_buffers_follow_the_live_model() -> None:
    """Counters and flags are the live ones after each update, where torch's stand still."""
    live = zoo.Counters()
    mine = ours.AveragedModel(live, use_buffers=True)
    for _ in range(3):
        live(torch.ones(1, 3))
        mine.update_parameters(live)

    shown = mine.module.state_dict()
    assert int(shown["seen"]) == 3
    assert int(shown["big"]) == 2**53 + 1
    assert shown["flag"].tolist() == [True, False]


def test_a_bf16_model_is_averaged_in_float32() -> None:
    """The mean of 1 and 300 steps of 1 + 1/128 needs more digits than bf16 has; torch's stalls."""
    live = nn.Linear(1, 1, bias=False).bfloat16()
    mine = ours.AveragedModel(live)
    values = [1.0] + [1.0 + 2.0**-7] * 300
    for value in values:
        nn.init.constant_(live.weight, value)
        mine.update_parameters(live)

    assert mine.average.tensors["weight"].item() == pytest.approx(sum(values) / 301, rel=1e-6)
    assert mine.module.weight.dtype == torch.bfloat16
    assert mine(torch.ones(1, 1, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_tied_and_frozen_weights_and_names_like_wrappers() -> None:
    """Tied weights stay one, frozen ones are there, and an attribute may be called `module`."""
    tied = ours.AveragedModel(zoo.Tied())
    assert len({t.data_ptr() for t in tied.module.state_dict(keep_vars=True).values()}) < len(
        tied.module.state_dict()
    )

    live = zoo.Sequence(module=nn.Linear(3, 3), _orig_mod=nn.Linear(3, 2))
    live.module.requires_grad_(False)
    mine, other = ours.AveragedModel(live), theirs.AveragedModel(live)
    for value in (1.0, 2.0):
        for parameter in live.parameters():
            nn.init.constant_(parameter, value)
        mine.update_parameters(live)
        other.update_parameters(live)
    live.module.requires_grad_(True)  # a layer that is unfrozen late
    for averaged in (mine, other):
        nn.init.constant_(live.get_parameter("module.weight"), 6.0)
        averaged.update_parameters(live)

    assert_close(mine, other)
    assert mine.module.get_parameter("module.weight")[0, 0].item() == pytest.approx(3.0)
    mine.load_state_dict(other.state_dict())


def test_ddp_around_the_model_does_not_matter(process_group: None) -> None:
    """Built bare and updated wrapped, and the other way round; torch's file of a wrapped copy."""
    live = model()
    wrapped = nn.parallel.DistributedDataParallel(live)
    for built, passed in ((live, wrapped), (wrapped, live)):
        mine = ours.AveragedModel(built)
        average = mine.average
        nn.init.constant_(live.get_parameter("0.weight"), 3.0)
        mine.update_parameters(passed)
        assert mine.average is average  # nothing had to be built again
        assert type(mine.module) is nn.Sequential
        assert bool((mine.module.get_parameter("0.weight") == 3.0).all())
    file = {
        name.replace("module.", "module.module.", 1): value
        for name, value in mine.state_dict().items()
    }
    file["module.module.0.weight"] = torch.full((4, 3), 5.0)

    mine.load_state_dict(file)

    assert bool((mine.average.tensors["0.weight"] == 5.0).all())


def test_another_model_of_the_same_names_may_be_passed() -> None:
    """Checkpoints that are loaded into fresh models, one after the other, make one mean."""
    fresh = [model() for _ in range(4)]
    mine, other = ours.AveragedModel(fresh[0]), theirs.AveragedModel(fresh[0])
    shown = mine.module

    for live in fresh:
        mine.update_parameters(live)
        other.update_parameters(live)

    assert_close(mine, other)
    assert mine.module is shown
    assert mine.average.updates == 4
    with pytest.raises(polyak.MatchError, match="the same tensors"):
        mine.update_parameters(nn.Linear(3, 4))
    assert_close(mine, other)


def test_counts_that_are_set_by_hand_are_believed() -> None:
    """Setting n_averaged to 0 starts anew with a copy, as with torch's class."""
    live, generator = model().double(), torch.Generator().manual_seed(6)
    mine, other = ours.AveragedModel(live), theirs.AveragedModel(live)
    for n in range(20):
        if n == 10:
            mine.n_averaged.zero_()
            other.n_averaged.zero_()
        step(live, generator)
        mine.update_parameters(live)
        other.update_parameters(live)

    assert_close(mine, other)
    assert mine.average.updates == 10


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("update_bn", [ours.update_bn, theirs.update_bn])
def test_update_bn_gives_the_statistics_of_torch(
    update_bn: Callable[..., None], use_buffers: bool
) -> None:
    """Ours and torch's own function, on our class, compute what torch computes on its own."""
    live, generator = model().double(), torch.Generator().manual_seed(7)
    mine = ours.AveragedModel(live, use_buffers=use_buffers)
    other = theirs.AveragedModel(live, use_buffers=use_buffers)
    for _ in range(5):
        step(live, generator)
        mine.update_parameters(live)
        other.update_parameters(live)
    batches = [torch.randn(8, 3, generator=generator).double() + 3.0 for _ in range(4)]

    update_bn(batches, mine)
    theirs.update_bn(batches, other)

    assert_close(mine.module, other.module)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_what_update_bn_computed_belongs_to_the_average(use_buffers: bool) -> None:
    """`applied` and `weights` use it, a file brings it back, and torch's next update agrees."""
    live, generator = model().double(), torch.Generator().manual_seed(8)
    mine = ours.AveragedModel(live, use_buffers=use_buffers)
    other = theirs.AveragedModel(live, use_buffers=use_buffers)
    for _ in range(5):
        step(live, generator)
        mine.update_parameters(live)
        other.update_parameters(live)
    batches = [torch.randn(8, 3, generator=generator).double() + 3.0 for _ in range(4)]
    ours.update_bn(batches, mine)
    theirs.update_bn(batches, other)
    right = other.module.state_dict()["1.running_mean"].clone()

    with mine.average.applied():
        torch.testing.assert_close(live.state_dict()["1.running_mean"], right)
    resumed = ours.AveragedModel(live, use_buffers=use_buffers)
    resumed.load_state_dict(mine.state_dict())
    with resumed.average.applied():
        pass
    for averaged in (mine, resumed):
        torch.testing.assert_close(averaged.module.state_dict()["1.running_mean"], right)
        torch.testing.assert_close(averaged.average.weights()["1.running_mean"], right)
    step(live, generator)
    mine.update_parameters(live)
    resumed.update_parameters(live)
    other.update_parameters(live)
    assert_close(mine, other)
    assert_close(resumed, other)


def test_it_is_a_module() -> None:
    """Modes, moves to another dtype, parameters, copies and a parent's state dict work."""
    live = model()
    parent = nn.ModuleDict({"averaged": ours.AveragedModel(live), "live": live})
    mine = parent["averaged"]
    assert isinstance(mine, ours.AveragedModel)
    assert mine.module.training  # as the model was
    parent.eval()
    assert not any(part.training for part in mine.modules())
    assert len(list(mine.parameters())) == len(list(live.parameters()))
    assert not any(p.requires_grad for p in mine.parameters())
    generator = torch.Generator().manual_seed(9)
    step(live, generator)
    mine.update_parameters(live)
    restored = nn.ModuleDict({"averaged": ours.AveragedModel(live), "live": live})
    restored.load_state_dict(parent.state_dict())
    again, twin = restored["averaged"], copy.deepcopy(mine)
    assert isinstance(again, ours.AveragedModel)

    parent.double()
    restored.double()
    for _ in range(2):
        step(live, generator)
        for averaged in (mine, again, twin):
            averaged.update_parameters(live)

    x = torch.randn(4, 3, dtype=torch.float64)
    live.eval()
    with mine.average.applied():
        expected = live(x)
    for averaged in (mine, again):
        assert averaged.average.updates == 3
        torch.testing.assert_close(averaged.eval()(x), expected)
    assert twin.module.state_dict()["0.weight"].dtype == torch.float32
    torch.testing.assert_close(twin.double().eval()(x), expected)


def test_nan_does_not_get_in() -> None:
    """A step that went wrong leaves the elements it hit as they were."""
    live = nn.Linear(2, 1)
    mine = ours.AveragedModel(live)
    mine.update_parameters(live)
    nn.init.constant_(live.weight, torch.nan)
    mine.update_parameters(live)

    assert bool(mine.module.get_parameter("weight").isfinite().all())
    assert "weight" in str(mine.average.report())


def bias_is_left_alone(averaged: Tensor, live: Tensor, n: Tensor | int) -> Tensor:
    return averaged if averaged.ndim == 1 else 0.9 * averaged + 0.1 * live


def largest_step_is_one(averaged: Tensor, live: Tensor, n: Tensor | int) -> Tensor:
    return averaged + (live - averaged).clamp(-1.0, 1.0)


@pytest.mark.parametrize(
    "function",
    [
        bias_is_left_alone,
        largest_step_is_one,
        lambda a, w, n: 0.9 * a + 0.2 * w,
        lambda a, w, n: a + 1.0,
        lambda a, w, n: None,
        lambda a, w, n: -0.5 * a + 1.5 * w,
    ],
)
def test_a_function_that_is_no_mix_is_refused(function: Callable[..., Any]) -> None:
    """It would give other numbers than torch's class, so it is an error before anything is made."""
    with pytest.raises(polyak.ArgumentError, match="must"):
        ours.AveragedModel(model(), avg_fn=function)


def test_what_is_refused_says_why_and_changes_nothing() -> None:
    """Both functions, settings changed later, loads that do not fit, updates inside applied()."""
    live = model()
    functions = ours.get_ema_avg_fn(), ours.get_ema_multi_avg_fn()
    with pytest.raises(polyak.ArgumentError, match="not both"):
        ours.AveragedModel(live, None, *functions)
    with pytest.raises(polyak.ArgumentError, match="must be a module"):
        ours.AveragedModel(dict(live.named_parameters()))  # type: ignore[arg-type]
    with pytest.raises(polyak.ArgumentError, match="must be functions"):
        ours.AveragedModel(live, avg_fn=0.9)  # type: ignore[arg-type]
    mine = ours.AveragedModel(live)
    mine.update_parameters(live)
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    file = {name: value + 1 for name, value in before.items()}

    with pytest.raises(polyak.ArgumentError, match="assign"):
        mine.load_state_dict(file, assign=True)
    with pytest.raises(polyak.MatchError, match=r"1 missing \['module.0.bias'\]"):
        mine.load_state_dict({n: v for n, v in file.items() if n != "module.0.bias"})
    with pytest.raises(polyak.MatchError, match=r"'module\.2\.bias' must have shape \[2\]"):
        mine.load_state_dict(file | {"module.2.bias": torch.zeros(7)})
    with mine.average.applied():
        with pytest.raises(polyak.OrderError, match="applied"):
            mine.update_parameters(live)
        with pytest.raises(polyak.OrderError, match="applied"):
            mine.load_state_dict(file)
    mine.use_buffers = True
    with pytest.raises(polyak.OrderError, match="must stay"):
        mine.update_parameters(live)

    after = mine.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine.load_state_dict({"n_averaged": torch.tensor(7)}, strict=False)
    assert int(mine.n_averaged) == mine.average.now == 7
