"""`module()`: a second network beside the live one whose weights are the average, come what may."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing._internal.two_tensor import TwoTensor

import polyak
from snags import Snags
from zoo import ZOO, Bits, bits, bits_of, tensors_of, train_step

HALF = polyak.Exponential(decay=0.5, debias=False)  # (old + new) / 2: no step without a change
Use = polyak.Average | polyak.Window

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
both_widths = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Weights, averaged statistics and an integer counter."""
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Weights only."""
    return nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)).to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-1.0, 3.0, 18).reshape(6, 3).to(dtype)


def step(model: nn.Module, average: Use, *, seed: int = 1) -> None:
    """New random weights and statistics, folded into the average."""
    dtype = next(p for p in model.parameters() if p.requires_grad).dtype
    train_step(model, batch(dtype) + seed, torch.Generator().manual_seed(seed))
    average.update()


def behind(module: nn.Module, average: Use) -> list[str]:
    """Names under which the module shows something else than the average in its own dtype."""
    shown, exact = module.state_dict(), average.weights(dtype=torch.float64)
    return [
        name
        for name, value in exact.items()
        if isinstance(value, Tensor)
        and bits_of(shown[name].cpu()) != bits_of(value.to("cpu", shown[name].dtype))
    ]


def averaged(module: nn.Module) -> Bits:
    """The bits of all but the counter, which is the live model's as it was at the last look."""
    return {name: b for name, b in bits(module).items() if "num_batches" not in name}


def shares(module: nn.Module, average: Use, name: str) -> bool:
    """Whether the module reads that parameter from the average's own memory."""
    return module.get_parameter(name).data_ptr() == average.tensors[name].data_ptr()


def bytes_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


# ── what it is ───────────────────────────────────────────────────────────────────────────────────


def test_module_is_of_the_same_class_in_eval_mode_without_gradients() -> None:
    """And the live model keeps its mode, its gradients and its tensors."""
    model = net()
    before, objects = bits(model), {n: id(t) for n, t in tensors_of(model).items()}
    average = polyak.Average(model)

    teacher = average.module()

    assert [type(m) for m in teacher.modules()] == [type(m) for m in model.modules()]
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(type(p) is nn.Parameter for p in teacher.parameters())
    assert list(teacher.state_dict()) == list(model.state_dict())
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert bits(model) == before
    assert {n: id(t) for n, t in tensors_of(model).items()} == objects
    assert not {id(m) for m in teacher.modules()} & {id(m) for m in model.modules()}


@pytest.mark.parametrize(
    "wake",
    [
        lambda parent: parent.train(),
        lambda parent: parent.train(True),
        lambda parent: parent.apply(lambda m: m.train()),
        lambda parent: parent.teacher.train(),
        lambda parent: parent.teacher[1].train(),
        lambda parent: [m.train() for m in parent.modules()],
    ],
    ids=["parent", "mode", "apply", "itself", "part", "modules"],
)
def test_module_stays_in_eval_mode(wake: Callable[[Any], object]) -> None:
    """Whoever calls `train`: statistics do not move, and the average with them."""
    parent = nn.Module()
    parent.student = net()
    average = polyak.Average(parent.student)
    parent.teacher = average.module()
    before = bits(average.tensors)

    wake(parent.eval())
    parent.teacher(batch())

    assert not any(m.training for m in parent.teacher.modules())
    assert bits(average.tensors) == before
    parent.train()
    assert all(m.training for m in parent.student.modules())
    assert parent.teacher.train() is parent.teacher
    assert parent.teacher.eval() is parent.teacher


def test_module_costs_no_memory_where_it_can_share() -> None:
    """Neither when it is made nor at an update: every weight is the average's own."""
    model = mlp()
    average = polyak.Average(model, HALF)
    average.module()  # gives each average memory of its own, once
    step(model, average)  # makes the scratch that is kept
    with Snags() as plain:
        step(model, average)

    with Snags() as made:
        teacher = average.module()
    with Snags() as updated:
        step(model, average)

    assert made.bytes == 0
    assert updated.bytes == plain.bytes
    assert all(shares(teacher, average, name) for name, _ in model.named_parameters())


def test_module_costs_one_copy_where_it_cannot_share() -> None:
    """bf16 weights of a float32 average: two bytes a weight once, and no more at an update."""
    model = mlp(torch.bfloat16)
    average = polyak.Average(model, HALF)
    step(model, average)
    average.module()  # gives each average memory of its own, once
    step(model, average)
    with Snags() as plain:
        step(model, average)

    with Snags() as made:
        teacher = average.module()
    homes = [p.data_ptr() for p in teacher.parameters()]
    with Snags() as updated:
        step(model, average, seed=2)

    assert made.bytes <= 3 * bytes_of(model)  # one passing test of the range, at most
    assert updated.bytes == plain.bytes
    assert [p.data_ptr() for p in teacher.parameters()] == homes
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert behind(teacher, average) == []


def test_module_of_a_narrow_model_shares_in_the_dtype_of_the_average() -> None:
    """`dtype=torch.float32` shows what the average stores, unrounded."""
    model = net(torch.bfloat16)
    average = polyak.Average(model, HALF)

    teacher = average.module(dtype=torch.float32)
    step(model, average)

    assert all(shares(teacher, average, name) for name, _ in model.named_parameters())
    assert {t.dtype for t in tensors_of(teacher).values()} == {torch.float32, torch.int64}
    assert bits(dict(teacher.named_parameters())) == {
        name: bits_of(average.tensors[name]) for name, _ in teacher.named_parameters()
    }
    assert teacher(batch()).dtype == torch.float32


def test_forward_pass_writes_neither_into_the_average_nor_into_the_live_model() -> None:
    """Layers that write their buffers in eval mode too (observers, caches) write their own."""

    class Observed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("peak", torch.zeros(1))
            self.register_buffer("calls", torch.tensor(0))
            self.register_buffer("cache", torch.zeros(3), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.get_buffer("peak").copy_(x.abs().max())
            self.get_buffer("calls").add_(1)
            self.get_buffer("cache").copy_(x[0])
            return self.linear(x)  # type: ignore[no-any-return]

    model = Observed()
    average = polyak.Average(model, HALF)
    teacher = average.module()
    before = bits(model), bits(average.tensors), bits(average.weights())

    teacher(batch() * 100)

    assert (bits(model), bits(average.tensors), bits(average.weights())) == before


def test_frozen_parameters_share_the_live_memory_and_stay_frozen() -> None:
    """A LoRA-like model: the base costs nothing, and the live adapters go on training."""
    model = nn.Sequential(nn.Linear(64, 64).requires_grad_(False), nn.Linear(64, 2))
    base = model[0].get_parameter("weight")
    average = polyak.Average(model, HALF)
    step_without_forward(model, average)
    average.module()  # gives each average memory of its own, once

    with Snags() as made:
        teacher = average.module()
    shown = teacher[0].get_parameter("weight")  # type: ignore[index]

    assert made.bytes == 0
    assert shown is not base
    assert shown.data_ptr() == base.data_ptr()
    assert not shown.requires_grad
    with torch.no_grad():
        base.fill_(3.0)  # a base that is loaded later
    assert torch.equal(shown, base)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


# ── it follows ───────────────────────────────────────────────────────────────────────────────────


@both_widths
def test_module_follows_updates_resets_and_loads(dtype: torch.dtype) -> None:
    """After each it shows the average as it is then."""
    model = net(dtype)
    average = polyak.Average(model, HALF)
    step(model, average)
    saved = copy.deepcopy(average.state_dict())
    early = bits(average.weights())
    teacher = average.module()

    for seed in range(3):
        step(model, average, seed=seed)
        assert behind(teacher, average) == []
    train_step(model, batch(dtype), torch.Generator().manual_seed(9))
    average.reset()
    assert behind(teacher, average) == []
    average.load_state_dict(saved)
    assert behind(teacher, average) == []
    counter = "1.num_batches_tracked"  # live: not in the state of an average
    assert {n: b for n, b in bits(teacher).items() if n != counter} == {
        n: b for n, b in early.items() if n != counter
    }


def test_module_shows_the_midpoint() -> None:
    """Weights go from 2 to 4 with a decay of a half: the module computes with 3."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    average = polyak.Average(model, HALF)
    teacher = average.module()
    nn.init.constant_(model.weight, 4.0)

    average.update()

    assert teacher(torch.ones(1, 1)).item() == 3.0


@both_widths
def test_module_follows_the_optimizer(dtype: torch.dtype) -> None:
    """With `follow` there is no call to forget."""
    model = net(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    average = polyak.Average(model, HALF)
    average.follow(optimizer)
    teacher = average.module()

    for _ in range(3):
        before = bits(teacher)
        optimizer.zero_grad()
        model(batch(dtype)).square().mean().backward()
        optimizer.step()
        assert bits(teacher) != before
        assert behind(teacher, average) == []


@both_widths
def test_step_that_the_device_skips_does_not_show(dtype: torch.dtype) -> None:
    """A fused optimizer whose scaler found inf: values stay, recomputed statistics come back."""
    model = net(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    average = polyak.Average(model, HALF)
    average.follow(optimizer)
    teacher = average.module()
    model(batch(dtype)).square().mean().backward()
    optimizer.step()
    polyak.refresh_norms(average, [batch(dtype)])
    before = bits(dict(teacher.named_parameters())), bits(average.weights())

    model(batch(dtype)).square().mean().backward()
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]

    assert bits(dict(teacher.named_parameters())) == before[0]
    assert average.updates == 1  # asking settles what the device did
    assert behind(teacher, average) == []
    kept = {n: b for n, b in bits(teacher).items() if "running" in n}
    assert kept == {n: b for n, b in before[1].items() if "running" in n}


@both_widths
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_module_follows_refreshed_statistics(dtype: torch.dtype, inside: bool) -> None:
    """Until the next update: then it shows the averaged ones again."""
    model = net(dtype)
    average = polyak.Average(model, HALF)
    step(model, average)
    teacher = average.module()
    averaged = bits(teacher)

    with average.applied() if inside else nullcontext():
        polyak.refresh_norms(average, [batch(dtype), batch(dtype) + 2])
    refreshed = bits(teacher)

    changed = {n for n in averaged if averaged[n] != refreshed[n]}
    assert changed == {"1.running_mean", "1.running_var"}
    assert behind(teacher, average) == []
    step(model, average, seed=2)
    assert behind(teacher, average) == []
    assert bits_of(teacher.get_buffer("1.running_mean")) == bits_of(
        average.tensors["1.running_mean"].to(dtype)
    )


def test_module_follows_statistics_refreshed_in_a_block_that_raises() -> None:
    """They are kept with the average, so the module shows them too."""
    model = net()
    average = polyak.Average(model, HALF)
    step(model, average)
    teacher = average.module()

    def evaluate() -> None:
        with average.applied():
            polyak.refresh_norms(average, [batch()])
            raise ValueError("evaluation")

    with pytest.raises(ValueError, match="evaluation"):
        evaluate()

    assert behind(teacher, average) == []


def test_module_that_shares_nothing_is_not_shown_the_memory_that_is_lent() -> None:
    """Statistics come in the middle of a block, when the average's memory holds the live weights.

    A module in another dtype does not keep that memory from being swapped.
    """
    model = net()
    average = polyak.Average(model, HALF)
    step(model, average)
    teacher = average.module(dtype=torch.float64)
    before = bits(dict(teacher.named_parameters()))
    train_step(model, batch(), torch.Generator().manual_seed(5))

    with average.applied():
        polyak.refresh_norms(average, [batch()])
        assert bits(dict(teacher.named_parameters())) == before

    assert bits(dict(teacher.named_parameters())) == before
    assert behind(teacher, average) == []


def test_modules_of_members_and_of_one_average_show_their_own() -> None:
    """Two of one member, one of another: each follows, whichever of the others is dropped."""
    model = net()
    averages = polyak.Averages(model, {"a": HALF, "b": polyak.Uniform()})
    first, second, other = (averages[name].module() for name in "aab")

    train_step(model, batch(), torch.Generator().manual_seed(1))
    averages.update()
    train_step(model, batch(), torch.Generator().manual_seed(2))
    averages.update()

    assert behind(first, averages["a"]) == behind(second, averages["a"]) == []
    assert behind(other, averages["b"]) == []
    assert bits(first) != bits(other)
    del first
    gc.collect()
    saved = copy.deepcopy(averages.state_dict())
    averages.reset()
    assert behind(second, averages["a"]) == behind(other, averages["b"]) == []
    averages.load_state_dict(saved)
    assert behind(second, averages["a"]) == behind(other, averages["b"]) == []


@both_widths
def test_module_of_a_window_shows_the_mean_of_the_captures(dtype: torch.dtype) -> None:
    """2, 4 and 12 with k=2: the module computes with 2, then 3, then 8; and what is loaded."""
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    window = polyak.Window(model, k=2)
    teacher = window.module()
    shown, saved = [], []
    for value in (2.0, 4.0, 12.0):
        nn.init.constant_(model.weight, value)
        window.update()
        shown.append(teacher(torch.ones(1, 1, dtype=dtype)).item())
        saved.append(copy.deepcopy(window.state_dict()))

    assert shown == [2.0, 3.0, 8.0]
    window.load_state_dict(saved[1])
    assert teacher(torch.ones(1, 1, dtype=dtype)).item() == 3.0
    window.reset()
    assert teacher(torch.ones(1, 1, dtype=dtype)).item() == 12.0


def test_buffers_that_are_replaced_or_grow_are_followed() -> None:
    """Live buffers are looked up at each update, whatever became of them."""

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("cache", torch.ones(2), persistent=False)
            self.register_buffer("table", torch.arange(3))

    model = Cached()
    average = polyak.Average(model, HALF)
    teacher = average.module()

    for size in (5, 2, 7):
        model.cache = torch.rand(size)
        model.table = torch.arange(size) * 2
        step_without_forward(model, average)
        assert torch.equal(teacher.get_buffer("cache"), model.cache)
        assert torch.equal(teacher.get_buffer("table"), model.table)
        assert teacher.get_buffer("cache").data_ptr() != model.cache.data_ptr()


def step_without_forward(model: nn.Module, average: Use) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    average.update()


@pytest.mark.parametrize("action", ["update", "reset", "load_state_dict"])
@pytest.mark.parametrize("change", ["frozen", "spare"])
def test_change_beside_a_module_is_carried_out_or_refused_whole(change: str, action: str) -> None:
    """A live tensor that was replaced or dropped: nothing raises after it was done."""
    model = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 2))
    model.register_buffer("cache", torch.ones(2), persistent=False)
    average = polyak.Average(model, HALF)
    average.update()
    state = copy.deepcopy(average.state_dict())
    step_without_forward(model, average)
    teacher = average.module()
    if change == "frozen":
        model[0].weight = nn.Parameter(torch.zeros(4, 3), requires_grad=False)
    else:
        model.register_buffer("cache", None, persistent=False)
    with torch.no_grad():
        model[1].get_parameter("weight").add_(1.0)
    before = bits(average.tensors), average.now, average.updates

    def act() -> None:
        if action == "load_state_dict":
            average.load_state_dict(state)
        else:
            getattr(average, action)()

    if change == "frozen":
        with pytest.raises(polyak.MatchError, match=r"'0\.weight'.*another parameter object"):
            act()
        assert (bits(average.tensors), average.now, average.updates) == before
    else:
        act()
        assert bits(average.tensors) != before[0]
        with average.applied():
            pass
    assert shares(teacher, average, "1.weight")


# ── beside the lent model ────────────────────────────────────────────────────────────────────────


@both_widths
def test_module_shows_the_average_inside_the_block_and_the_weights_come_back(
    dtype: torch.dtype,
) -> None:
    """Lent or not, the module computes the same; the trained bits return while it lives."""
    model = net(dtype)
    average = polyak.Average(model, HALF)
    step(model, average)
    teacher = average.module()
    train_step(model, batch(dtype), torch.Generator().manual_seed(5))
    live, shown, tensors = bits(model), averaged(teacher), bits(average.tensors)
    output = teacher(batch(dtype))
    assert live != shown

    for _ in range(2):
        with average.applied(), torch.no_grad():
            assert averaged(teacher) == shown
            assert torch.equal(teacher(batch(dtype)), output)
            assert torch.equal(model.eval()(batch(dtype)), output)
            model.train()(batch(dtype))  # moves the lent model's statistics only
            assert averaged(teacher) == shown
        assert (bits(model), averaged(teacher), bits(average.tensors)) == (live, shown, tensors)

    step(model, average, seed=7)
    assert behind(teacher, average) == []


@both_widths
def test_module_shows_its_own_average_inside_the_block_of_another(dtype: torch.dtype) -> None:
    """Another member of the same averages, another average of the same model, a part of it."""
    model = net(dtype)
    averages = polyak.Averages(model, {"a": HALF, "b": polyak.Uniform()})
    other, part = polyak.Average(model, polyak.Uniform()), polyak.Average(model[0])
    for seed in range(2):
        train_step(model, batch(dtype), torch.Generator().manual_seed(seed))
        for each in (averages, other, part):
            each.update()
    teacher = averages["a"].module()
    train_step(model, batch(dtype), torch.Generator().manual_seed(5))
    live, shown = bits(model), averaged(teacher)

    for use in (averages["b"], averages["a"], other, part):
        with use.applied():
            assert averaged(teacher) == shown
            assert bits(averages["a"].weights())["0.weight"] == shown["0.weight"]
        assert (bits(model), averaged(teacher)) == (live, shown)
    with part.applied(), pytest.raises(polyak.OrderError), averages["a"].applied():
        pass
    assert (bits(model), averaged(teacher)) == (live, shown)


def test_module_inside_a_larger_model_shows_the_average_when_the_whole_is_lent() -> None:
    """The teacher is part of the model that another average lends: frozen, so nobody lends it."""
    whole = nn.Module()
    whole.student = net()
    inner = polyak.Average(whole.student, HALF)
    whole.teacher = inner.module()
    outer = polyak.Average(whole, polyak.Uniform())
    step(whole.student, inner)
    outer.update()
    step(whole.student, inner, seed=2)
    live = bits(whole)

    with outer.applied():
        assert bits(whole.teacher)["0.weight"] == live["teacher.0.weight"]
        assert bits(whole.student)["0.weight"] != live["student.0.weight"]

    assert bits(whole) == live
    assert {name for name in outer.tensors if "teacher" in name} <= {
        "teacher.1.running_mean",  # floating buffers are averaged, whoever owns them
        "teacher.1.running_var",
    }


def test_module_is_refused_inside_the_block_and_works_after_it() -> None:
    """The memory that it would share holds the trained weights there."""
    model = net()
    averages = polyak.Averages(model, {"a": HALF, "b": polyak.Uniform()})
    window = polyak.Window(net(), k=2)

    with averages["a"].applied():
        for name in "ab":
            with pytest.raises(polyak.OrderError, match="module must come outside applied"):
                averages[name].module()
    with window.applied(), pytest.raises(polyak.OrderError, match="before the block"):
        window.module()

    assert averages["a"]._engine.views == {}
    assert behind(averages["a"].module(), averages["a"]) == []


def test_module_keeps_its_bits_when_the_lent_average_is_lost() -> None:
    """A parameter trained inside the block is said, and the module still shows the average."""
    model = mlp()
    average = polyak.Average(model, HALF)
    step(model, average)
    teacher = average.module()
    shown = bits(teacher)
    train_step(model, batch(), torch.Generator().manual_seed(4))
    live = bits(model)

    with pytest.raises(polyak.OrderError, match="the average is whole"), average.applied():
        nn.init.zeros_(model[0].get_parameter("weight"))

    assert (bits(model), bits(teacher)) == (live, shown)


def test_block_needs_a_copy_only_while_a_module_is_alive() -> None:
    """Without one live and average swap places; beside one the trained weights wait in a copy."""
    model = mlp()
    average = polyak.Average(model, HALF)
    step(model, average)
    average.module()  # gives each average memory of its own, once
    memory = average._engine.rows[0].tensors[0].data_ptr()

    def averaged_weights_are_elsewhere() -> bool:
        with average.applied():
            assert average._engine.loan is not None
            return average._engine.loan.tensors[0].data_ptr() != memory

    assert averaged_weights_are_elsewhere()
    teacher = average.module()
    assert not averaged_weights_are_elsewhere()
    del teacher
    gc.collect()
    assert averaged_weights_are_elsewhere()


# ── awkward models ───────────────────────────────────────────────────────────────────────────────


def _plain(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def quietly() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the old norms deprecated
            return build()

    return quietly


def _after_a_forward() -> nn.Module:
    model = nn.utils.weight_norm(nn.Linear(3, 4))
    model(torch.ones(2, 3))  # its `weight` is part of a graph now
    return model


def _tied_by_memory() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 4))
    model[2].weight = nn.Parameter(model[0].get_parameter("weight").data)
    return model


def _recurrent() -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]  # type: ignore[no-any-return]

    return Last()


AWKWARD: dict[str, Callable[[], nn.Module]] = {
    "lstm": _recurrent,
    "old_weight_norm": _plain(lambda: nn.utils.weight_norm(nn.Linear(3, 4))),
    "old_weight_norm_after_a_forward": _plain(_after_a_forward),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)),
    "old_spectral_norm": _plain(lambda: nn.utils.spectral_norm(nn.Linear(3, 4))),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)),
    "attention": lambda: nn.TransformerEncoderLayer(3, 1, 8, dropout=0.5, batch_first=True),
    "tied_by_memory": _tied_by_memory,
    "checkpointed": lambda: nn.Sequential(checkpoint_wrapper(nn.Linear(3, 4)), nn.BatchNorm1d(4)),
    "traced_by_fx": lambda: torch.fx.symbolic_trace(net()),
}


@pytest.mark.parametrize("build", AWKWARD.values(), ids=AWKWARD.keys())
@pytest.mark.parametrize("by_factory", [False, True], ids=["copied", "built"])
def test_module_of_an_awkward_model_computes_what_the_plain_class_computes(
    build: Callable[[], nn.Module], by_factory: bool
) -> None:
    """After updates and a block it equals a new model that loaded `weights()`, to the bit."""
    model = build()
    average = polyak.Average(model, HALF)
    teacher = average.module(factory=build) if by_factory else average.module()
    x = batch().unsqueeze(0) if isinstance(model, nn.TransformerEncoderLayer) else batch()
    for seed in range(3):
        train_step(model, x, torch.Generator().manual_seed(seed))
        average.update()
    with average.applied():
        pass

    assert behind(teacher, average) == []
    plain = build()
    plain.load_state_dict(average.weights())
    with torch.no_grad():
        assert torch.equal(teacher(x), plain.eval()(x))


def test_ties_stay_ties() -> None:
    """By object or by memory, tied weights are one tensor of the module, and it costs one."""
    tied = next(animal for animal in ZOO if animal.name == "tied").build()
    for model, one, two in (
        (tied, "embedding.weight", "head.weight"),
        (_tied_by_memory(), "0.weight", "2.weight"),
    ):
        average = polyak.Average(model, HALF)
        teacher = average.module()
        step_without_forward(model, average)
        assert teacher.get_parameter(one) is teacher.get_parameter(two)
        assert shares(teacher, average, one)


def test_parameter_whose_memory_is_a_buffer_too_stays_a_parameter() -> None:
    """Whichever of the two is met first."""

    class Twice(nn.Module):
        def __init__(self, *, buffer_first: bool) -> None:
            super().__init__()
            linear, holder = nn.Linear(2, 2), nn.Module()
            holder.register_buffer("same", linear.weight.data)
            for name in ("holder", "linear") if buffer_first else ("linear", "holder"):
                setattr(self, name, holder if name == "holder" else linear)

    for buffer_first in (False, True):
        teacher = polyak.Average(Twice(buffer_first=buffer_first)).module()
        assert isinstance(teacher.get_parameter("linear.weight"), nn.Parameter)
        assert torch.equal(
            teacher.get_parameter("linear.weight"), teacher.get_buffer("holder.same")
        )


def test_quantised_base_is_used_as_it_is() -> None:
    """A subclass that only its library can make: the module reads the live model's, unchanged."""
    model = mlp()
    codes = TwoTensor(torch.ones(8, 3), torch.full((8, 3), 2.0))
    model[0].weight = nn.Parameter(codes, requires_grad=False)
    average = polyak.Average(model, HALF)

    teacher = average.module()
    step_without_forward(model, average)

    base = teacher.get_parameter("0.weight")
    assert isinstance(base, TwoTensor)
    assert base.a.data_ptr() == codes.a.data_ptr()
    assert shares(teacher, average, "1.weight")
    assert isinstance(model.get_parameter("0.weight"), TwoTensor)


def test_cast_of_the_module_leaves_the_live_model_alone() -> None:
    """Also where a frozen parameter is of a class of its own."""

    class Tagged(nn.Parameter):
        pass

    model = mlp()
    model[0].weight = Tagged(torch.ones(8, 3), requires_grad=False)
    average = polyak.Average(model, HALF)
    before = bits(model), bits(average.tensors)

    average.module().half()

    assert model.get_parameter("0.weight").dtype == torch.float32
    assert (bits(model), bits(average.tensors)) == before


def test_sparse_tensors_that_stay_live_are_shown() -> None:
    """Graph networks keep their adjacency so; `weights()` holds it, and so does the module."""
    model = nn.Linear(2, 2)
    model.register_buffer("adjacency", torch.eye(2).to_sparse())
    average = polyak.Average(model, HALF, exclude="adjacency")

    teacher = average.module()

    for size in (2, 3):
        model.adjacency = torch.ones(size, size).to_sparse()
        average.update()
        assert torch.equal(teacher.get_buffer("adjacency").to_dense(), torch.ones(size, size))


def test_buffers_that_came_later_are_copied() -> None:
    """A non-persistent buffer that the model made for itself is no business of the average."""
    model = nn.Linear(2, 2)
    average = polyak.Average(model, HALF)
    model.register_buffer("late", torch.ones(2), persistent=False)

    teacher = average.module()

    assert torch.equal(teacher.get_buffer("late"), torch.ones(2))
    assert teacher.get_buffer("late").data_ptr() != model.get_buffer("late").data_ptr()


def test_hooks_lambdas_generators_and_extra_state_go_along() -> None:
    """What deepcopy copies or shares is copied or shared, and works."""
    seen: list[float] = []

    class Rich(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.gain: Callable[[Tensor], Tensor] = lambda x: 2.0 * x
            self.generator = torch.Generator().manual_seed(3)
            self.words = ["one"]
            self.register_forward_hook(lambda module, inputs, output: seen.append(output.sum()))

        def get_extra_state(self) -> list[str]:
            return self.words

        def set_extra_state(self, state: list[str]) -> None:
            self.words = state

        def forward(self, x: Tensor) -> Tensor:
            return self.gain(super().forward(x))

    model = Rich()
    model.words = ["trained"]
    average = polyak.Average(model, HALF)
    for teacher in (average.module(), average.module(factory=Rich)):
        step_without_forward(model, average)
        seen.clear()
        expected = 2.0 * nn.functional.linear(
            batch(), average.tensors["weight"], average.tensors["bias"]
        )
        assert torch.equal(teacher(batch()), expected)
        assert len(seen) == 1
        assert teacher.get_extra_state() == ["trained"]
        assert id(teacher.generator) != id(model.generator)


def test_model_that_cannot_be_copied_needs_a_factory() -> None:
    """A lock inside: the way out is said, nothing is left behind, and the factory works."""

    class Locked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.lock = threading.Lock()

    model = Locked()
    average = polyak.Average(model, HALF)
    before = bits(model)

    with pytest.raises(polyak.ArgumentError, match=r"Locked \(cannot pickle.*module\(factory="):
        average.module()

    assert average._engine.views == {}
    assert bits(model) == before
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    teacher = average.module(factory=Locked)
    step_without_forward(model, average)
    assert behind(teacher, average) == []
    assert shares(teacher, average, "weight")


@pytest.mark.parametrize("how", ["itself", "anew"])
def test_layer_with_a_deepcopy_of_its_own_is_refused(how: str) -> None:
    """One that gives itself away, or a new layer that would never follow: the factory is named."""

    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo: Any) -> "Stubborn":
            return self if how == "itself" else Stubborn(3, 8)

    model = nn.Sequential(Stubborn(3, 8), nn.Linear(8, 2))
    average = polyak.Average(model, HALF)

    with pytest.raises(polyak.ArgumentError, match="factory"):
        average.module()

    assert all(m.training for m in model.modules())
    assert "train" not in model[0].__dict__
    assert all(p.requires_grad for p in model.parameters())
    assert average._engine.views == {}


# ── wrappers ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[Any]:
    """A real group of one process."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        yield torch.distributed.group.WORLD
    finally:
        torch.distributed.destroy_process_group()


def test_module_of_a_distributed_model_is_the_plain_class(process_group: Any) -> None:
    """DDP is taken off; layers that hold a process group share it."""
    model = nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4, process_group=process_group))
    model.group = process_group
    wrapped = nn.parallel.DistributedDataParallel(net())
    for source in (model, wrapped):
        average = polyak.Average(source, HALF)
        teacher = average.module()
        step_without_forward(source, average)
        assert type(teacher) is nn.Sequential
        assert behind(teacher, average) == []
    assert polyak.Average(model).module().group is process_group


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, lambda m: torch.compile(m, backend="eager")],
    ids=["parallel", "compiled"],
)
def test_wrappers_are_taken_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """The module is of the class that was wrapped, under the names of its state dict."""
    model = net()
    average = polyak.Average(wrap(model), HALF)
    teacher = average.module()
    step(model, average)

    assert type(teacher) is nn.Sequential
    assert list(teacher.state_dict()) == list(model.state_dict())
    assert behind(teacher, average) == []


def test_compiled_layer_inside_a_model_follows() -> None:
    """The copy of a layer that was compiled in place computes with the average."""
    first: Any = torch.compile(nn.Linear(3, 4), backend="eager")
    model = nn.Sequential(first, nn.Linear(4, 2))
    average = polyak.Average(model, HALF)
    teacher = average.module()
    for _ in range(2):
        step_without_forward(model, average)
        hidden = nn.functional.linear(
            batch(), average.tensors["0.weight"], average.tensors["0.bias"]
        )
        expected = nn.functional.linear(
            hidden, average.tensors["1.weight"], average.tensors["1.bias"]
        )
        assert torch.equal(teacher(batch()), expected)


# ── moved and cast ───────────────────────────────────────────────────────────────────────────────

CASTS: dict[str, Callable[[nn.Module], object]] = {
    "half": lambda m: m.half(),
    "half_and_float": lambda m: m.half().float(),
    "double": lambda m: m.double(),
    "to_bf16": lambda m: m.to(torch.bfloat16),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    "parent": lambda m: nn.ModuleList([m]).half(),
}


@both_widths
@pytest.mark.parametrize("swap", ["data", "overwrite", "swap"])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_module_that_is_cast_goes_on_following(
    cast: Callable[[nn.Module], object], swap: str, dtype: torch.dtype
) -> None:
    """YOLOv5 validates in half precision and goes back: weights, statistics and counters follow.

    Whichever way torch casts a module: by data, by new objects, or by swapped objects.
    """
    model = net(dtype)
    average = polyak.Average(model, HALF)
    step(model, average)
    teacher = average.module()
    before = bits(model), bits(average.tensors)

    torch.__future__.set_overwrite_module_params_on_conversion(swap == "overwrite")
    torch.__future__.set_swap_module_params_on_conversion(swap == "swap")
    try:
        cast(teacher)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch.__future__.set_swap_module_params_on_conversion(False)

    assert (bits(model), bits(average.tensors)) == before
    dtypes = {n: t.dtype for n, t in tensors_of(teacher).items()}
    for seed in (2, 3):
        step(model, average, seed=seed)
        assert behind(teacher, average) == []
        assert {n: t.dtype for n, t in tensors_of(teacher).items()} == dtypes
    with average.applied():
        assert behind(teacher, average) == []


def test_module_cast_and_cast_back_shares_again_and_loses_no_digit() -> None:
    """Between the casts it shows rounded weights; the average never does."""
    model = net()
    average = polyak.Average(model, HALF)
    teacher = average.module()
    teacher.half().float()

    step(model, average)

    assert all(shares(teacher, average, name) for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.double(), lambda m: m.half(), lambda m: m.to(torch.bfloat16).float()],
    ids=["double", "half", "there_and_back"],
)
def test_live_model_may_be_cast_in_place(cast: Callable[[nn.Module], nn.Module]) -> None:
    """The module keeps its dtype, its memory and the average; frozen layers follow too."""
    model = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.BatchNorm1d(4), nn.Linear(4, 2))
    average = polyak.Average(model, HALF)
    step(model, average)
    teacher = average.module()

    cast(model)
    with torch.no_grad():
        model[0].get_parameter("weight").mul_(2.0)
    step(model, average, seed=2)

    assert shares(teacher, average, "2.weight")
    assert behind(teacher, average) == []
    assert {t.dtype for t in tensors_of(teacher).values()} == {torch.float32, torch.int64}
    with average.applied():
        assert behind(teacher, average) == []


@needs_cuda
def test_module_goes_with_the_live_model_to_another_device() -> None:
    """The average moves with the model, and the module with the average; it shares on both."""
    model = net()
    average = polyak.Average(model, HALF)
    teacher = average.module()

    for device in ("cuda", "cpu"):
        model.to(device)
        step_without_forward(model, average)
        assert {t.device.type for t in teacher.parameters()} == {device}
        assert all(shares(teacher, average, name) for name, _ in model.named_parameters())
        assert behind(teacher, average) == []


@needs_cuda
def test_module_on_another_device_than_the_average_is_copied_at_each_update() -> None:
    """An average on the host, a teacher where the model is; and a teacher that was moved away."""
    model = net().cuda()
    away = polyak.Average(model, HALF, device="cpu")
    beside = polyak.Average(model, HALF)
    teacher, moved = away.module(), beside.module().cpu()

    for _ in range(2):
        step_without_forward(model, away)
        beside.update()
        assert {t.device.type for t in tensors_of(teacher).values()} == {"cuda"}
        assert {t.device.type for t in tensors_of(moved).values()} == {"cpu"}
        assert behind(teacher, away) == behind(moved, beside) == []


# ── how long it lives ────────────────────────────────────────────────────────────────────────────


def test_dropped_module_leaves_nothing_behind() -> None:
    """Neither in the average, nor in the list of what is brought up to date, nor in memory."""
    model = net()
    average = polyak.Average(model, HALF)
    teacher = average.module()
    references: list[weakref.ref[Any]] = [weakref.ref(m) for m in teacher.modules()]
    memory: list[weakref.ref[Any]] = [weakref.ref(p) for p in teacher.parameters()]
    assert len(average._engine.views) == 1

    del teacher
    gc.collect()

    assert average._engine.views == {}
    assert not any(reference() for reference in (*references, *memory))
    step(model, average)


def test_dropped_module_is_freed_at_once() -> None:
    """Like any module: its copies do not wait for the garbage collector."""
    average = polyak.Average(net(torch.bfloat16), HALF)
    gc.collect()
    gc.disable()
    try:
        teacher = average.module()
        reference = weakref.ref(teacher)
        del teacher
        assert reference() is None
        assert average._engine.views == {}
    finally:
        gc.enable()


@both_widths
def test_module_outlives_its_average_and_its_model(dtype: torch.dtype) -> None:
    """It keeps its weights and nothing else: the average and the model can be freed."""
    model = net(dtype)
    average = polyak.Average(model, HALF)
    step(model, average)
    teacher = average.module()
    output = teacher(batch(dtype))
    freed: list[weakref.ref[Any]] = [
        weakref.ref(average),
        weakref.ref(average._engine),
        weakref.ref(model),
    ]

    del average, model
    gc.collect()

    assert [reference() for reference in freed] == [None, None, None]
    assert torch.equal(teacher(batch(dtype)), output)


def test_making_and_dropping_many_leaves_updates_as_cheap_as_before() -> None:
    """A teacher an epoch, for many epochs."""
    model = net()
    average = polyak.Average(model, HALF)
    average.module()  # gives each average memory of its own, once
    step(model, average)  # cuts views
    with Snags():
        step(model, average)  # learns how to ask, under this mode, whether they are still good
    with Snags() as before:
        step(model, average)

    for _ in range(20):
        average.module()
    gc.collect()
    with Snags() as after:
        step(model, average)

    assert (after.calls, after.bytes) == (before.calls, before.bytes)


# ── copies, files and other tools ────────────────────────────────────────────────────────────────


@both_widths
def test_deep_copy_stands_still(dtype: torch.dtype) -> None:
    """A copy of the module is an ordinary module with weights of its own."""
    model = net(dtype)
    average = polyak.Average(model, HALF)
    step(model, average)
    teacher = average.module()

    still = copy.deepcopy(teacher)
    before = bits(still)
    step(model, average, seed=2)
    with torch.no_grad():
        for parameter in still.parameters():
            parameter.zero_()

    assert bits(teacher) != before
    assert behind(teacher, average) == []
    assert not any(m.training for m in still.modules())
    assert still.train() is still
    assert all(m.training for m in still.modules())
    assert not any(m.training for m in teacher.modules())
    assert len(average._engine.views) == 1


def test_pickled_module_is_the_plain_class_and_needs_no_polyak(tmp_path: Path) -> None:
    """Loaded where polyak is not installed, it computes the same, and `train` wakes it."""
    model = net()
    average = polyak.Average(model, HALF)
    step(model, average)
    teacher = average.module()
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(teacher))
    torch.save(teacher, tmp_path / "torch.pt")
    program = f"""
import pickle, sys, torch
sys.modules["polyak"] = None
x = torch.linspace(-1.0, 3.0, 18).reshape(6, 3)
with open({str(tmp_path / "pickle.pt")!r}, "rb") as file:
    modules = [pickle.load(file), torch.load({str(tmp_path / "torch.pt")!r}, weights_only=False)]
for m in modules:
    assert type(m) is torch.nn.Sequential and not m.training
    print(m(x).tolist())
    assert m.train() is m and m.training and m[1].training
"""
    loaded = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False
    )

    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.splitlines() == [str(teacher(batch()).tolist())] * 2


def test_state_of_the_module_loads_into_the_plain_class() -> None:
    """Through a file with `weights_only`, with the names and dtypes of the model."""
    model = net()
    average = polyak.Average(model, HALF)
    step(model, average)
    file = io.BytesIO()
    torch.save(average.module().state_dict(), file)
    file.seek(0)

    plain = net()
    plain.load_state_dict(torch.load(file, weights_only=True), strict=True)

    assert bits(plain) == bits(average.weights())


TOOLS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "trace": lambda m: torch.jit.trace(m, batch()),
    "script": lambda m: torch.jit.script(m),
    "fx": torch.fx.symbolic_trace,
    "export": lambda m: torch.export.export(m, (batch(),)).module(),
    "compile": lambda m: torch.compile(m, backend="eager"),
    "functional": lambda m: lambda x: torch.func.functional_call(m, dict(m.state_dict()), x),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS.keys())
def test_tools_take_the_module_like_any_other(
    tool: Callable[[nn.Module], Callable[[Tensor], Tensor]],
) -> None:
    """Traced, scripted, exported, compiled: it computes the same, before and after an update."""
    model = net()
    average = polyak.Average(model, HALF)
    step(model, average)
    teacher = average.module()

    made = tool(teacher)

    with torch.no_grad():
        assert torch.equal(made(batch()), teacher(batch()))
        step(model, average, seed=2)
        assert behind(teacher, average) == []
        if tool is not TOOLS["export"]:  # an exported program may hold copies
            assert torch.allclose(made(batch()), teacher(batch()))


def test_code_compiled_for_the_module_reads_the_average_at_each_call() -> None:
    """Through the whole of torch.compile but the machine code, also beside the lent model."""
    model = net()
    average = polyak.Average(model, HALF)
    teacher = average.module()
    compiled = torch.compile(teacher, backend="aot_eager")
    for seed in range(2):
        step(model, average, seed=seed)
        with torch.no_grad():
            expected = teacher(batch())
            assert torch.equal(compiled(batch()), expected)
            with average.applied():
                assert torch.equal(compiled(batch()), expected)


# ── gradients through it ─────────────────────────────────────────────────────────────────────────


def changes(average: polyak.Average, model: nn.Module) -> dict[str, Callable[[], object]]:
    saved = copy.deepcopy(average.state_dict())
    dtype = next(model.parameters()).dtype
    return {
        "update": lambda: step(model, average, seed=3),
        "reset": average.reset,
        "load": lambda: average.load_state_dict(saved),
        "refresh": lambda: polyak.refresh_norms(average, [batch(dtype)]),
    }


@both_widths
@pytest.mark.parametrize("what", ["update", "reset", "load", "refresh"])
def test_change_between_forward_and_backward_never_gives_wrong_gradients(
    what: str, dtype: torch.dtype
) -> None:
    """torch says that a saved tensor was modified, or the gradient is that of the forward pass."""
    model = net(dtype)
    average = polyak.Average(model, HALF)
    step(model, average)
    teacher = average.module()
    train_step(model, batch(dtype), torch.Generator().manual_seed(8))
    x = batch(dtype).requires_grad_()
    loss = teacher(x).square().sum()
    (right,) = torch.autograd.grad(loss, x, retain_graph=True)

    changes(average, model)[what]()

    said = ""
    try:
        (late,) = torch.autograd.grad(loss, x)
    except RuntimeError as error:
        said = str(error)
    assert "modified by an inplace operation" in said or torch.equal(late, right)


@both_widths
def test_graph_through_the_module_survives_the_block(dtype: torch.dtype) -> None:
    """Lending the average to the live model changes no tensor of the module."""
    model = net(dtype)
    average = polyak.Average(model, HALF)
    step(model, average)
    teacher = average.module()
    x = batch(dtype).requires_grad_()
    loss = teacher(x).square().sum()
    (right,) = torch.autograd.grad(loss, x, retain_graph=True)

    with average.applied():
        (inside,) = torch.autograd.grad(loss, x, retain_graph=True)
    (after,) = torch.autograd.grad(loss, x)

    assert torch.equal(inside, right)
    assert torch.equal(after, right)
    assert all(p.grad is None for p in (*teacher.parameters(), *model.parameters()))


def test_module_made_and_updated_under_inference_mode_can_be_used_outside() -> None:
    """All its tensors are ordinary ones: also attributes, and buffers that grew meanwhile."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.scale = torch.full((2,), 3.0)
            self.register_buffer("cache", torch.ones(1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.scale * self.get_buffer("cache")[0]  # type: ignore[no-any-return]

    model = Scaled()
    average = polyak.Average(model, HALF)
    with torch.inference_mode():
        teachers = average.module(), average.module(factory=Scaled)
    model.cache = torch.full((4,), 2.0)
    with torch.inference_mode():
        step_without_forward(model, average)
    for teacher in teachers:
        assert not any(t.is_inference() for t in tensors_of(teacher).values())
        x = batch().requires_grad_()
        teacher(x).sum().backward()
        assert x.grad is not None
        expected = 6.0 * average.tensors["linear.weight"].sum(0)
        assert torch.allclose(x.grad, expected.expand_as(x), rtol=1e-6)
    step_without_forward(model, average)
    assert behind(teachers[0], average) == []


# ── errors on the way ────────────────────────────────────────────────────────────────────────────


@both_widths
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_update_that_breaks_anywhere_can_be_made_good(
    dtype: torch.dtype, error: type[BaseException]
) -> None:
    """At any operation: the average is whole and the module follows, or `load_state_dict` helps."""
    model = net(dtype)
    average = polyak.Average(model, HALF)
    step(model, average)
    teacher = average.module()
    saved = copy.deepcopy(average.state_dict())
    broken = 0
    for at in range(1, 1_000):
        train_step(model, batch(dtype), torch.Generator().manual_seed(at))
        try:
            with Snags(at, error):
                average.update()
        except error:
            broken += 1
        else:
            break
        try:
            average.weights()
        except polyak.OrderError:
            average.load_state_dict(saved)
        else:
            step(model, average, seed=at)
        assert behind(teacher, average) == [], f"broken at operation {at}"
    assert broken > 5
    assert behind(teacher, average) == []


def test_module_of_a_damaged_average_is_refused() -> None:
    """As every use of it is, until a state is loaded; a module made before shows that state."""
    model = net()
    average = polyak.Average(model, HALF)
    step(model, average)
    saved, expected = copy.deepcopy(average.state_dict()), bits(average.tensors)
    teacher = average.module()
    del teacher
    gc.collect()
    with pytest.raises(polyak.OrderError, match="lost"), average.applied():
        nn.init.zeros_(model[0].get_parameter("weight"))

    with pytest.raises(polyak.OrderError, match="load_state_dict"):
        average.module()

    assert average._engine.views == {}
    average.load_state_dict(saved)
    teacher = average.module()
    assert {n: b for n, b in bits(teacher).items() if n in expected} == expected


def test_refused_update_changes_nothing_in_the_module() -> None:
    """Time that stands still, NaN that is refused: bits as before."""
    model = net()
    average = polyak.Average(model, HALF, nonfinite="raise")
    step(model, average)
    teacher = average.module()
    before = bits(teacher)
    with pytest.raises(polyak.OrderError):
        average.update(now=0)
    nn.init.constant_(model[0].get_parameter("weight"), torch.nan)
    with pytest.raises(polyak.ArgumentError):
        average.update()

    assert bits(teacher) == before


# ── a module of another make ─────────────────────────────────────────────────────────────────────


class Renamed(nn.Module):
    """The tensors of `net`, under other names and in another class."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))  # type: ignore[no-any-return]


def renamed(name: str) -> str:
    place, _, rest = name.partition(".")
    return f"{['first', 'norm', 'last'][int(place)]}.{rest}"


@both_widths
def test_factory_of_another_class_shows_the_average_under_its_names(dtype: torch.dtype) -> None:
    """With `names=` as a function; live dtypes, eval mode and sharing as for a copy."""
    model = net(dtype)
    average = polyak.Average(model, HALF)
    teacher = average.module(factory=Renamed, names=renamed)
    step(model, average)

    weights = {renamed(name): value for name, value in average.weights().items()}
    assert type(teacher) is Renamed
    assert bits(teacher) == bits(weights)
    assert not any(m.training for m in teacher.train().modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    same = (
        teacher.get_parameter("first.weight").data_ptr() == average.tensors["0.weight"].data_ptr()
    )
    assert same == (dtype == torch.float32)
    with torch.no_grad():
        assert torch.equal(teacher(batch(dtype)), average.module()(batch(dtype)))


def test_average_of_named_tensors_has_a_module_by_a_factory() -> None:
    """And says so without one."""
    model = mlp()
    average = polyak.Average(dict(model.named_parameters()), HALF)
    with pytest.raises(polyak.ArgumentError, match=r"named tensors.*module\(factory="):
        average.module()

    teacher = average.module(factory=mlp)
    step_without_forward(model, average)

    assert behind(teacher, average) == []
    assert all(shares(teacher, average, name) for name, _ in model.named_parameters())


def test_partial_module_leaves_the_rest_as_the_factory_made_it() -> None:
    """A teacher with a head of its own: the head keeps its values, in eval mode, frozen."""
    model = net()
    average = polyak.Average(model, HALF)
    made: list[nn.Sequential] = []

    def factory() -> nn.Module:
        made.append(nn.Sequential(*net(), nn.Linear(2, 1)))
        return made[0]

    with pytest.raises(polyak.MatchError, match=r"2 only in the module \['3\.bias', '3\.weight'\]"):
        average.module(factory=factory)
    made.clear()
    teacher = average.module(factory=factory, partial=True)
    head = bits(made[0][3])
    step(model, average)

    assert teacher is made[0]
    assert behind(teacher, average) == []
    assert bits(made[0][3]) == head
    assert not made[0][3].training
    assert not any(p.requires_grad for p in teacher.parameters())


def _on_meta() -> nn.Module:
    with torch.device("meta"):
        return net()


MODEL = net()  # what `_live` must not give away
REFUSED: dict[str, tuple[Callable[[], Any], type[polyak.AveragingError], str]] = {
    "live": (lambda: MODEL, polyak.ArgumentError, "factory must return a new module"),
    "around_live": (
        lambda: nn.Sequential(*MODEL),
        polyak.ArgumentError,
        "factory must return a new module",
    ),
    "one_live_layer": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), MODEL[2]),
        polyak.ArgumentError,
        "factory must return a new module",
    ),
    "no_module": (lambda: 3, polyak.ArgumentError, "factory must return a module, got int"),
    "nothing": (lambda: None, polyak.ArgumentError, "factory must return a module, got NoneType"),
    "class": (lambda: nn.Linear, polyak.ArgumentError, "factory must return a module, got type"),
    "other_names": (Renamed, polyak.MatchError, "must share names.*names="),
    "less": (lambda: net()[:2], polyak.MatchError, r"2 only in the average \['2\.bias'"),
    "shape": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)),
        polyak.MatchError,
        r"'2\.weight' must have one shape and kind, got \[2, 4\].*\[5, 4\]",
    ),
    "kind": (
        lambda: net().to(torch.complex64),
        polyak.MatchError,
        r"'0\.weight' must have one shape and kind, got .*complex64",
    ),
    "empty": (nn.Tanh, polyak.MatchError, "must share names"),
}


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("case", REFUSED)
def test_factory_that_does_not_fit_is_refused(case: str) -> None:
    """By name and reason; the live model, the average and its list of modules are as before."""
    factory, error, message = REFUSED[case]
    average = polyak.Average(MODEL, HALF)
    before = bits(MODEL), bits(average.tensors)

    with pytest.raises(error, match=message):
        average.module(factory=factory)

    assert (bits(MODEL), bits(average.tensors)) == before
    assert all(m.training and "train" not in m.__dict__ for m in MODEL.modules())
    assert all(p.requires_grad for p in MODEL.parameters())
    assert average._engine.views == {}


def test_partial_factory_around_live_layers_is_refused() -> None:
    """Also where the live layers have no partner: they would stop training in silence."""
    model = nn.ModuleDict({"encoder": nn.Linear(3, 4), "head": nn.Linear(4, 2)})
    average = polyak.Average(model, HALF)

    with pytest.raises(polyak.ArgumentError, match="factory must return a new module"):
        average.module(
            factory=lambda: nn.ModuleDict({"old": model["encoder"], "head": nn.Linear(4, 2)}),
            partial=True,
        )

    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_factory_may_build_on_the_meta_device() -> None:
    """Its tensors are all replaced, so none needs data; one without a partner does."""
    model = net()
    average = polyak.Average(model, HALF)

    teacher = average.module(factory=_on_meta)
    step(model, average)

    assert behind(teacher, average) == []
    with pytest.raises(polyak.ArgumentError, match=r"'3\.0\.weight' on the meta device"):
        average.module(
            factory=lambda: nn.Sequential(*_on_meta().children(), _on_meta()), partial=True
        )


def test_tensors_tied_in_the_factory_only_are_refused() -> None:
    """Two averages cannot show in one place."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    average = polyak.Average(model, HALF)

    with pytest.raises(polyak.MatchError, match=r"one partner.*'0\.weight' and '1\.weight'"):
        average.module(factory=lambda: tied)


def test_factory_must_be_a_function() -> None:
    """A module in its place is told where to go."""
    average = polyak.Average(mlp(), HALF)
    wrong: Any
    for wrong in (mlp(), "Net"):
        with pytest.raises(polyak.ArgumentError, match="factory must be a function"):
            average.module(factory=wrong)


def test_error_of_the_factory_comes_through() -> None:
    """It is the caller's, and nothing is left behind."""
    average = polyak.Average(mlp(), HALF)
    with pytest.raises(ZeroDivisionError):
        average.module(factory=lambda: [][1 // 0])
    assert average._engine.views == {}


def test_names_and_partial_need_a_factory() -> None:
    """A copy has the model's own names: asking for others is a mistake that is said."""
    average = polyak.Average(mlp(), HALF)
    with pytest.raises(polyak.ArgumentError, match="factory"):
        average.module(names={"0.weight": "first.weight"})
    with pytest.raises(polyak.ArgumentError, match="factory"):
        average.module(partial=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, "float32"])
def test_dtype_must_be_floating(dtype: Any) -> None:
    average = polyak.Average(mlp(), HALF)
    with pytest.raises(polyak.ArgumentError, match="dtype must be a floating point"):
        average.module(dtype=dtype)


def test_dtype_must_hold_the_average() -> None:
    """70000 does not fit float16: refused with its name."""
    model = mlp()
    nn.init.constant_(model[1].get_parameter("weight"), 70_000.0)
    average = polyak.Average(model, HALF)

    with pytest.raises(polyak.ArgumentError, match=r"'1\.weight' must fit torch\.float16"):
        average.module(dtype=torch.float16)

    assert average._engine.views == {}
    assert behind(average.module(dtype=torch.bfloat16), average) == []
    model[1].requires_grad_(False)  # what is not averaged must fit too
    with pytest.raises(polyak.ArgumentError, match=r"'1\.weight' must fit torch\.float16"):
        polyak.Average(model, HALF).module(dtype=torch.float16)


def test_module_of_an_average_that_never_updated_warns_once() -> None:
    """As every other use does: the module shows the weights at construction."""
    model = mlp()
    average = polyak.Average(model, HALF)
    with torch.no_grad():
        model[0].get_parameter("weight").add_(1.0)
    with pytest.warns(polyak.AveragingWarning, match="module:"):
        average.module()
    average.module()


# ── loading into the module ──────────────────────────────────────────────────────────────────────


@both_widths
def test_what_is_loaded_into_the_module_is_in_the_average(dtype: torch.dtype) -> None:
    """Parameters and statistics, shared or copied, also after a cast there and back."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(dtype)
    average = polyak.Average(model, polyak.Exponential(decay=0.5, debias=False))
    teacher = average.module()
    teacher.half()
    teacher.to(dtype)
    nines = {
        name: torch.full_like(value, 9) if value.is_floating_point() else value
        for name, value in teacher.state_dict().items()
    }

    teacher.load_state_dict(nines)

    assert all(bool((tensor == 9).all()) for tensor in average.tensors.values())
    average.update()
    expected = {name: (9 + value.float()) / 2 for name, value in model.state_dict().items()}
    for name, value in average.tensors.items():
        torch.testing.assert_close(value.float(), expected[name])


def test_loading_into_the_module_leaves_the_trainable_live_model_alone() -> None:
    """A live head that trains is copied into the module, not shared with it."""
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    teacher = polyak.Average(model, include="body.*").module()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    teacher.load_state_dict({name: torch.full_like(v, 9) for name, v in before.items()})

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_live_weights_in_the_averages_memory_are_refused() -> None:
    """`param.data = teacher.param.data` would average itself for ever, without an error."""
    model = nn.Linear(2, 2)
    average = polyak.Average(model)
    teacher = average.module()
    average.update()
    model.weight.data = teacher.get_parameter("weight").data

    with pytest.raises(polyak.MatchError, match="memory of their own"):
        average.update()


def test_a_deepcopy_is_freed_without_the_collector() -> None:
    """No cycle: copies of every epoch would pile up on a GPU, which never calls the collector."""
    teacher = polyak.Average(nn.Linear(2, 2)).module()
    gc.disable()
    try:
        copied = weakref.ref(copy.deepcopy(teacher))
        assert copied() is None
    finally:
        gc.enable()
    woken = copy.deepcopy(teacher)
    assert woken.train().training
    woken.load_state_dict(nn.Linear(2, 2).state_dict())
