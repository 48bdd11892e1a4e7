"""Failures that people really met, each with the outcome that is right.

Tests are named after letter and number of the collection of field reports that they come from:
A arithmetic, B buffers, C construction, D names, E use in evaluation, F resume, G incidents,
I adapters and targets. Left out, since they need a GPU: E7, E8, F11.
"""

import copy
import io
import itertools
import math
import multiprocessing
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import polyak
from snags import Snags
from zoo import (
    ZOO,
    Animal,
    Counters,
    Sequence,
    Spare,
    Tied,
    all_frozen,
    bits,
    empty,
    frozen_copy,
    lazy,
    tensors_of,
    train_step,
    weighted_sum,
)

Schedules = list[polyak.Schedule]

# Remembers half of everything, the weights at construction too: nothing to be forgiven.
HALF = polyak.Exponential(decay=0.5, debias=False)


def animal(name: str) -> Animal:
    """The zoo's animal of that name."""
    return next(a for a in ZOO if a.name == name)


def scalar(value: float, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """One live weight."""
    return {"w": torch.tensor(value, dtype=dtype)}


def through_a_file(state: Mapping[str, Any]) -> dict[str, Any]:
    """Saved and loaded as people do, without pickled code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def shift(model: nn.Module, by: float = 1.0) -> None:
    """Move every trainable weight, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps on data that depends on the number of the step only."""
    for step in steps:
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()


# ── A: arithmetic and precision ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a1_average_of_a_narrow_weight_moves(dtype: torch.dtype) -> None:
    """From 1 to 2 held, decay 0.999, 2000 updates: 2 - 0.999^2000 = 1.8648; not 1.0 or 1.5."""
    live = scalar(1.0, dtype)
    average = polyak.Average(live, polyak.Exponential(decay=0.999, debias=False))
    live["w"].fill_(2.0)
    for _ in range(2000):
        average.update()

    assert average.tensors["w"].dtype == torch.float32
    assert average.tensors["w"].item() == pytest.approx(2 - 0.999**2000, abs=1e-3)
    assert average.weights()["w"].dtype == dtype


def test_a1_bf16_average_moves_when_it_is_stored_in_two_bytes() -> None:
    """Stored as bf16 it is refused with nearest rounding, and unbiased with stochastic rounding."""
    rule = polyak.Exponential(decay=0.999, debias=False)
    live = {"w": torch.ones(4096, dtype=torch.bfloat16)}
    stuck = polyak.Average(live, rule, dtype=torch.bfloat16)
    with pytest.raises(polyak.ArgumentError, match="would never move"):
        stuck.update()
    assert stuck.updates == 0
    assert torch.equal(stuck.tensors["w"], torch.ones(4096, dtype=torch.bfloat16))

    average = polyak.Average(live, rule, dtype=torch.bfloat16, rounding="stochastic")
    live["w"].fill_(2.0)
    for _ in range(2000):
        average.update()

    assert average.tensors["w"].dtype == torch.bfloat16
    # One element scatters by about 0.035 (the variance of 2000 roundings to steps of 2^-7, each
    # forgotten at 0.999), so the mean of 4096 by 5e-4.
    mean = average.tensors["w"].double().mean().item()
    assert mean == pytest.approx(2 - 0.999**2000, abs=3e-3)


def test_a2_model_cast_to_bf16_after_building_is_accepted() -> None:
    """The average stays float32 and is computed in float32, whatever the live dtype is now."""
    model = animal("mlp").build()
    average = polyak.Average(model, HALF)
    before = frozen_copy(average.tensors)
    model.to(torch.bfloat16)
    shift(model)
    average.update()

    for name, live in model.state_dict().items():
        assert live.dtype == torch.bfloat16
        value = average.tensors[name]
        assert value.dtype == torch.float32
        exact = 0.5 * before[name].double() + 0.5 * live.double()
        # Two roundings to float32 of numbers below 2; one to bf16 would be off by 2^-8.
        assert torch.allclose(value.double(), exact, rtol=0, atol=2 * 2**-23)


def test_a4_export_beyond_the_range_of_fp16_never_damages_the_average(tmp_path: Path) -> None:
    """70000 does not fit fp16: refused with the tensor's name, and all stays as it was."""
    model = animal("mlp").build()
    with torch.no_grad():
        model.get_parameter("two.weight")[0, 0] = 70_000.0
    average = polyak.Average(model)
    average.update()
    trained, averaged = bits(model), bits(average.tensors)
    path = tmp_path / "half.safetensors"

    with pytest.raises(polyak.ArgumentError, match=r"'two\.weight' must fit torch\.float16"):
        polyak.save(average, path, dtype=torch.float16)
    with pytest.raises(polyak.ArgumentError, match=r"'two\.weight' must fit torch\.float16"):
        average.weights(torch.float16)

    assert not path.exists()
    assert (bits(model), bits(average.tensors)) == (trained, averaged)
    assert average.report().nonfinite == {}
    average.update()
    polyak.save(average, path, dtype=torch.bfloat16)  # the way out that the error names
    assert polyak.load_weights(path)["two.weight"].isfinite().all()


A5_SCHEDULES: Schedules = [
    polyak.Power(sigma_rel=0.05),
    polyak.Exponential(half_life=100),
    polyak.CountRamp(0.9),
    polyak.ExponentialRamp(0.9, tau=200),
    polyak.InverseGamma(max_decay=0.9),
    polyak.HalfLifeRamp(0.05, half_life=6),
    polyak.Cosine(0.9, total=5_000),
    polyak.After(10, polyak.Exponential(decay=0.9)),
]


@pytest.mark.parametrize("schedule", A5_SCHEDULES, ids=repr)
def test_a5_schedule_does_not_change_when_it_is_asked(schedule: polyak.Schedule) -> None:
    """10000 questions forwards, then backwards: the same answers, and the same settings."""
    as_built, described = copy.deepcopy(schedule), repr(schedule)
    forwards = [schedule(now=now, elapsed=1) for now in range(1, 10_001)]
    backwards = [schedule(now=now, elapsed=1) for now in range(10_000, 0, -1)]

    assert forwards == backwards[::-1]
    assert schedule == as_built
    assert repr(schedule) == described
    with pytest.raises(AttributeError):
        schedule.max_decay = 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "schedule",
    [polyak.CountRamp(0.9), polyak.InverseGamma(max_decay=0.9), polyak.ExponentialRamp(0.9)],
    ids=repr,
)
def test_a5_cap_of_a_ramp_holds(schedule: polyak.Schedule) -> None:
    """A ramp towards 0.9 never falls and ends at 0.9; elsewhere it walked back to 0.5."""
    decays = [schedule(now=now, elapsed=1) for now in range(1, 100_001)]

    assert all(a <= b for a, b in itertools.pairwise(decays))
    assert decays[-1] == pytest.approx(0.9, rel=1e-15)


def test_a7_decay_is_the_share_of_the_old_average() -> None:
    """On a step from 0 to 1: 1 - 0.9^n; decay 0 is the live weight, decay 1 the first one."""
    live = scalar(0.0)
    rules = {decay: polyak.Exponential(decay=decay, debias=False) for decay in (0.0, 0.9, 1.0)}
    averages = polyak.Averages(live, {str(decay): rule for decay, rule in rules.items()})
    live["w"].fill_(1.0)
    for n in range(1, 101):
        assert averages.update() == {"0.0": 0.0, "0.9": 0.9, "1.0": 1.0}
        assert averages["0.9"].tensors["w"].item() == pytest.approx(1 - 0.9**n, rel=1e-12)
        assert averages["0.0"].tensors["w"].item() == 1.0
        assert averages["1.0"].tensors["w"].item() == 0.0


def test_a7_roles_of_decay_are_those_of_torch() -> None:
    """With the same decay torch's `AveragedModel` holds the same weights, to float32 rounding."""
    model = animal("mlp").build()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(model)  # its first update copies, as ours starts
    ours = polyak.Average(model, polyak.Exponential(decay=0.9, debias=False))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        train_step(model, animal("mlp").inputs(), generator)
        theirs.update_parameters(model)
        ours.update()

    for name, value in theirs.module.state_dict().items():
        assert torch.allclose(ours.tensors[name], value, rtol=1e-6, atol=1e-6)


def test_a8_update_interval_does_not_change_the_lag() -> None:
    """On a ramp, half-life 100: the same lag within one interval, every step or every tenth.

    The lag behind a ramp of k steps an update is k d / (1 - d), with d the decay of k steps.
    """
    lags = []
    for every in (1, 10):
        weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        average = polyak.Average({"w": weight}, polyak.Exponential(half_life=100, debias=False))
        average.follow(optimizer, every=every)
        for _ in range(5_000):
            weight.grad = torch.tensor(-1.0, dtype=torch.float64)
            optimizer.step()
        lag = (weight - average.tensors["w"]).item()
        decay = 0.5 ** (every / 100)
        assert lag == pytest.approx(every * decay / (1 - decay), rel=1e-9)
        lags.append(lag)

    assert abs(lags[0] - lags[1]) <= 10


def test_a9_updates_are_counted_exactly_when_nothing_divides_evenly() -> None:
    """104 steps, every 10, start after 25: ten updates, and what each weighs is algebra.

    At 30 five steps since the start have passed, at each later update ten more: on the ramp w(t) =
    t the mean is (5 * 30 + 10 * (40 + ... + 100)) / 75. One more at the end takes the last four.
    """
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    average = polyak.Average({"w": weight}, polyak.After(25, polyak.Uniform()))
    average.follow(optimizer, every=10)
    for _ in range(104):
        weight.grad = torch.tensor(-1.0, dtype=torch.float64)
        optimizer.step()

    assert (average.updates, average.now) == (10, 100)
    total = 5 * 30 + 10 * sum(range(40, 101, 10))
    assert average.tensors["w"].item() == pytest.approx(total / 75, rel=1e-12)

    average.update()

    assert (average.updates, average.now) == (11, 104)
    assert average.tensors["w"].item() == pytest.approx((total + 4 * 104) / 79, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "first"),
    [
        (polyak.Exponential(decay=0.9, debias=False), 0.9),
        (polyak.Exponential(decay=0.9), 0.0),
        (polyak.Power(sigma_rel=0.05), 0.0),
        (polyak.Uniform(), 0.0),
        (polyak.CountRamp(0.999), 2 / 11),
        (polyak.After(100, polyak.Uniform()), 0.0),
    ],
    ids=repr,
)
def test_a10_first_update_after_a_warm_start_is_the_documented_mean(
    schedule: polyak.Schedule, first: float
) -> None:
    """It holds `first` of the pretrained weight and the rest of the live one: neither jumps."""
    live = scalar(10.0)
    average = polyak.Average(live, schedule)
    assert average.tensors["w"].item() == 10.0
    live["w"].fill_(20.0)

    assert average.update() == pytest.approx(first, abs=1e-15)

    assert average.tensors["w"].item() == pytest.approx(10 * first + 20 * (1 - first), rel=1e-12)
    assert average.report().initial_weight == pytest.approx(first, abs=1e-15)


def test_a10_bias_correction_weighs_what_was_seen() -> None:
    """The debiased average of 20 and 30 is (0.9 * 20 + 30) / 1.9, without the pretrained 10."""
    live = scalar(10.0)
    average = polyak.Average(live, polyak.Exponential(decay=0.9))
    for value in (20.0, 30.0):
        live["w"].fill_(value)
        average.update()

    assert average.tensors["w"].item() == pytest.approx((0.9 * 20 + 30) / 1.9, rel=1e-12)


# ── B: buffers ───────────────────────────────────────────────────────────────────────────────────


def test_b1_batch_counter_of_the_average_is_that_of_the_model(tmp_path: Path) -> None:
    """After 50 training steps it says 50 wherever the average is used."""
    kind = animal("batch_norm")
    model = kind.build()
    average = polyak.Average(model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        train_step(model, kind.inputs(), generator)
        average.update()
    teacher = kind.build()
    average.copy_to(teacher)
    polyak.save(average, tmp_path / "a.safetensors")

    name = "norm.num_batches_tracked"
    assert average.weights()[name].item() == 50
    assert teacher.state_dict()[name].item() == 50
    assert polyak.load_weights(tmp_path / "a.safetensors")[name].item() == 50
    with average.applied():
        assert model.state_dict()[name].item() == 50


@pytest.mark.parametrize("schedule", [HALF, polyak.Uniform()], ids=repr)
def test_b2_integers_and_booleans_are_those_of_the_model(schedule: polyak.Schedule) -> None:
    """2^53 + 1, True and 250 come through bit for bit, in EMA and in plain SWA."""
    model = Counters()
    average = polyak.Average(model, schedule)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        train_step(model, torch.ones(2, 3), generator)
        average.update()
    other = Counters()
    average.copy_to(other)

    for got in (average.weights(), dict(other.state_dict())):
        assert got["big"].dtype == torch.int64
        assert got["big"].item() == 2**53 + 1
        assert got["flag"].tolist() == [True, False]
        assert got["byte"].tolist() == [250, 5]
        assert got["seen"].item() == 5


@pytest.mark.parametrize("name", ["old_spectral_norm", "new_spectral_norm"])
def test_b3_spectral_vectors_stay_of_length_one(name: str) -> None:
    """After 60 random weights they are those of the model, bit for bit."""
    kind = animal(name)
    model = kind.build()
    average = polyak.Average(model, polyak.Exponential(decay=0.9))
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        train_step(model, kind.inputs(), generator)
        average.update()

    weights = average.weights()
    for unit in kind.units:
        assert weights[unit].norm().item() == pytest.approx(1.0, abs=1e-6)
        assert torch.equal(weights[unit], model.state_dict()[unit])


@pytest.mark.parametrize("name", ["old_spectral_norm", "new_spectral_norm"])
def test_b3_spectral_norm_of_the_average_keeps_the_scale_of_its_outputs(name: str) -> None:
    """60 random multiples of one matrix, of both signs: the output is that of the live layer.

    M / sigma(M) does not depend on the factor, and the singular vectors change at most their sign:
    the average of the multiples is again one, with the live vectors the outputs agree. Averaged
    vectors would be short, since signs cancel, and the outputs too large.
    """
    kind = animal(name)
    model = kind.build()
    weight = next(n for n in kind.averaged if "orig" in n)
    matrix = tensors_of(model)[weight].detach().clone()
    average = polyak.Average(model, polyak.Uniform())
    generator = torch.Generator().manual_seed(3)
    model.train()
    for step in range(60 + 200):  # the power iteration settles in the first 200
        factor = 1.0 if step < 200 else torch.randn((), generator=generator).item()
        with torch.no_grad():
            tensors_of(model)[weight].copy_(factor * matrix)
            model(kind.inputs())
        if step >= 200:
            average.update()
    model.eval()
    with torch.no_grad():
        live = model(kind.inputs())
        with average.applied():
            lent = model(kind.inputs())

    bias = tensors_of(model)[next(n for n in kind.averaged if n.endswith("bias"))].detach()
    # The sign of the mean factor may differ from that of the last one; the scale may not.
    ratio = ((lent - bias).norm() / (live - bias).norm()).item()
    assert ratio == pytest.approx(1.0, abs=0.01)


class Far(nn.Module):
    """A small classifier whose inputs lie far from what batch norm expects at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(2, 16)
        self.norm = nn.BatchNorm1d(16)
        self.two = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.norm(self.one(x)).relu())
        return out


def far_data(seed: int) -> tuple[Tensor, Tensor]:
    """Two clouds around (50, 50), two apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (128,), generator=generator)
    noise = 0.3 * torch.randn(128, 2, generator=generator)
    return 50.0 + noise + (2.0 * labels - 1.0)[:, None], labels


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Of a model in evaluation mode, on data it has not seen."""
    model.eval()
    inputs, labels = far_data(10_000)
    right = int((model(inputs).argmax(1) == labels).sum())
    model.train()
    return right / len(labels)


@pytest.mark.parametrize("policy", ["averaged", "live", "refreshed"])
def test_b5_statistics_of_the_average_fit_its_weights(policy: str) -> None:
    """Far from initialisation the average classifies, with each policy for the statistics."""
    model = Far()
    fresh = frozen_copy(model.state_dict())
    roles: dict[str, Any] = {"norm.running_*": "live"} if policy == "live" else {}
    average = polyak.Average(model, polyak.Exponential(half_life=5), roles=roles)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    average.follow(optimizer)
    for step in range(150):
        inputs, labels = far_data(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    if policy == "refreshed":
        polyak.refresh_norms(average, [far_data(step)[0] for step in range(5)])

    with average.applied():
        assert accuracy(model) >= 0.95
    if policy == "live":
        running = {n: t for n, t in model.state_dict().items() if "running" in n}
        assert bits({n: average.weights()[n] for n in running}) == bits(running)
    stale = Far()  # what others evaluate: averaged parameters, statistics of initialisation
    stale.load_state_dict(
        average.weights() | {n: t for n, t in fresh.items() if n.startswith("norm.running")}
    )
    assert accuracy(stale) <= 0.75


@pytest.mark.parametrize("policy", ["average", "live"])
def test_b6_teacher_in_evaluation_gets_its_statistics_from_the_student(policy: str) -> None:
    """After each update they are what was asked for: the mean of the student's, or the student's.

    The teacher never sees data itself, and stays in evaluation mode.
    """
    kind = animal("batch_norm")
    student, teacher = kind.build(), kind.build().eval()
    roles: dict[str, Any] = {"*.running_*": policy}
    average = polyak.Average(student, HALF, roles=roles)
    names = ["norm.running_mean", "norm.running_var"]
    expected = {name: student.state_dict()[name].double() for name in names}
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        train_step(student, kind.inputs(), generator)
        average.update()
        average.copy_to(teacher)

        for name in names:
            live, copied = student.state_dict()[name], teacher.state_dict()[name]
            expected[name] = 0.5 * expected[name] + 0.5 * live.double()
            if policy == "live":
                assert torch.equal(copied, live)
            else:
                assert torch.allclose(copied.double(), expected[name], rtol=1e-6)
                assert not torch.equal(copied, live)
        assert not any(module.training for module in teacher.modules())


def _norm_modes(model: nn.Module) -> list[object]:
    """Modes and momenta: what a recalibration changes for a while."""
    return [(m.training, getattr(m, "momentum", None)) for m in model.modules()]


def breaking_loader() -> Iterator[Tensor]:
    """Two batches, then an error."""
    yield torch.randn(4, 3)
    yield torch.randn(4, 3)
    raise OSError("the disk is gone")


@pytest.mark.parametrize("what", ["average", "model"])
@pytest.mark.parametrize("training", [True, False])
def test_b7_recalibration_that_breaks_leaves_no_trace(what: str, training: bool) -> None:
    """The loader raises half-way: modes, momenta and statistics are as before."""
    model = animal("batch_norm").build().train(training)
    average = polyak.Average(model)
    average.update()
    before, modes, averaged = bits(model), _norm_modes(model), bits(average.weights())

    with pytest.raises(OSError, match="the disk is gone"):
        polyak.refresh_norms(average if what == "average" else model, breaking_loader())

    assert (bits(model), _norm_modes(model)) == (before, modes)
    assert bits(average.weights()) == averaged


@pytest.mark.parametrize("what", ["average", "model"])
def test_b8_recalibration_without_data_is_refused(what: str) -> None:
    """An empty loader is an error, and the statistics are not wiped."""
    model = animal("batch_norm").build()
    average = polyak.Average(model)
    average.update()
    before, modes, averaged = bits(model), _norm_modes(model), bits(average.weights())

    with pytest.raises(polyak.ArgumentError, match="at least one batch, got none"):
        polyak.refresh_norms(average if what == "average" else model, [])

    assert (bits(model), _norm_modes(model)) == (before, modes)
    assert bits(average.weights()) == averaged


class Keywords(nn.Module):
    """A model that is called with keywords only."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, *, pixels: Tensor, scale: float) -> Tensor:
        out: Tensor = self.norm(scale * pixels)
        return out


def test_b9_recalibration_takes_any_batch_through_a_function() -> None:
    """Dict batches and keyword models work with `forward=`; without it the error names it."""
    model = Keywords()
    batches = [{"pixels": torch.randn(8, 3), "scale": 2.0} for _ in range(4)]
    before = bits(model)
    with pytest.raises(polyak.ArgumentError, match="Pass forward="):
        polyak.refresh_norms(model, batches)
    assert bits(model) == before

    used = polyak.refresh_norms(model, batches, forward=lambda model, batch: model(**batch))

    seen = torch.cat([2.0 * cast(Tensor, batch["pixels"]) for batch in batches]).double()
    assert used == 4
    assert torch.allclose(model.state_dict()["norm.running_mean"].double(), seen.mean(0), atol=1e-6)
    assert torch.allclose(model.state_dict()["norm.running_var"].double(), seen.var(0), rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
def test_b11_recalibrated_mean_is_that_of_the_data(momentum: float | None) -> None:
    """Exactly the mean and variance of all rows, also of uneven batches; the momentum is back."""
    model = Sequence(norm=nn.BatchNorm1d(3, momentum=momentum))
    rows = 5.0 + 3.0 * torch.randn(50, 3)
    polyak.refresh_norms(model, list(rows.split([7, 20, 20, 3])))

    state = model.state_dict()
    assert torch.allclose(state["norm.running_mean"].double(), rows.double().mean(0), rtol=1e-6)
    assert torch.allclose(state["norm.running_var"].double(), rows.double().var(0), rtol=1e-5)
    assert model.get_submodule("norm").momentum == momentum


# ── C: construction ──────────────────────────────────────────────────────────────────────────────


def test_c1_old_weight_norm_after_a_forward_is_averaged() -> None:
    """The computed `weight`, no leaf of its graph, is neither copied nor averaged; its parts are.

    Whoever copies the module dies here: the copy is tried, and fails.
    """
    kind = animal("old_weight_norm")
    model = kind.build()
    model(torch.ones(1, 3)).sum()
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model)

    average = polyak.Average(model, HALF)
    start = frozen_copy(average.tensors)
    shift(model)
    average.update()

    assert set(average.tensors) == kind.averaged
    for name, value in average.tensors.items():
        assert torch.allclose(value, start[name] + 0.5, atol=1e-6)
    kind.build().load_state_dict(average.weights(), strict=True)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_c2_uninitialised_lazy_layer_is_refused_until_its_first_forward() -> None:
    """The error names the tensor and says what to do; after that it works."""
    model = lazy()
    with pytest.raises(polyak.OrderError, match=r"'layer\.weight' .* Run one forward pass"):
        polyak.Average(model)
    model(torch.ones(1, 3))

    average = polyak.Average(model)
    average.update()

    assert set(average.tensors) == {"layer.weight", "layer.bias"}


def _raise_keyerror(name: str, tensor: Tensor) -> Any:
    raise KeyError(name)


BROKEN: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
    "empty": (lambda: polyak.Average(empty()), polyak.ArgumentError),
    "frozen": (lambda: polyak.Average(all_frozen()), polyak.ArgumentError),
    "lazy": (lambda: polyak.Average(lazy()), polyak.OrderError),
    "meta": (lambda: polyak.Average(nn.Linear(2, 2, device="meta")), polyak.OrderError),
    "number": (lambda: polyak.Average(cast(Any, 3)), polyak.ArgumentError),
    "schedule": (lambda: polyak.Average(nn.Linear(2, 2), cast(Any, 0.9)), polyak.ArgumentError),
    "dtype": (lambda: polyak.Average(nn.Linear(2, 2), dtype=torch.int32), polyak.ArgumentError),
    "device": (lambda: polyak.Average(nn.Linear(2, 2), device="nosuch"), polyak.ArgumentError),
    "function": (lambda: polyak.Average(nn.Linear(2, 2), roles=_raise_keyerror), KeyError),
    "sparse": (
        lambda: polyak.Average({"w": torch.eye(2).to_sparse()}),
        polyak.ArgumentError,
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_c4_failure_inside_construction_is_an_ordinary_exception(case: str) -> None:
    """Whatever fails, the interpreter lives and the error can be caught and read."""
    build, kind = BROKEN[case]
    with pytest.raises(kind) as caught:
        build()

    assert isinstance(caught.value, Exception)  # SystemExit, which a caller cannot see, is none
    assert str(caught.value)


def test_c4_model_that_cannot_be_copied_is_averaged() -> None:
    """Locks and process groups inside a module are no concern of ours."""
    model = animal("mlp").build()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(TypeError, match="pickle"):
        copy.deepcopy(model)

    average = polyak.Average(model)
    average.update()

    assert bits(average.tensors) == bits(model)


@pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.name)
def test_c5_average_shares_no_memory_with_the_model(kind: Animal) -> None:
    """Live weights and buffers written in place after building leave the average as it was."""
    model = kind.build()
    average = polyak.Average(model)
    before = bits(average.tensors)
    with torch.no_grad():
        for tensor in tensors_of(model).values():
            if tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size():
                tensor.fill_(1)

    assert bits(average.tensors) == before
    ours = {t.untyped_storage().data_ptr() for t in average.tensors.values() if t.numel()}
    theirs = {t.untyped_storage().data_ptr() for t in tensors_of(model).values() if t.numel()}
    assert not ours & theirs


def test_c6_what_is_not_averaged_takes_no_memory() -> None:
    """Frozen layers cost nothing, neither kept nor in passing; a refused average neither.

    An average that is switched off is one that is not built: a schedule of None is refused before
    anything is allocated.
    """
    model = Sequence(base=nn.Linear(300, 300), head=nn.Linear(300, 2)).bfloat16()
    model.get_submodule("base").requires_grad_(False)
    with Snags() as refused, pytest.raises(polyak.ArgumentError, match="schedule must be"):
        polyak.Average(model, cast(Any, None))
    with Snags() as built:
        average = polyak.Average(model)

    assert refused.bytes == 0
    assert average.report().stored_bytes == (300 * 2 + 2) * 4
    assert built.bytes < 300 * 300  # not even a mask of the base was made


def test_c7_average_of_a_model_without_data_is_refused() -> None:
    """On the meta device there is nothing to average yet; once loaded there is."""
    model = nn.Linear(3, 2, device="meta")
    with pytest.raises(polyak.OrderError, match="load its weights, then build the average"):
        polyak.Average(model)
    model.to_empty(device="cpu")
    loaded = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    model.load_state_dict(loaded)

    assert bits(polyak.Average(model).weights()) == bits(loaded)


def test_c7_weights_loaded_after_building_are_taken_by_reset() -> None:
    """Use without it is warned of once; with it the average starts from the loaded weights."""
    torch.manual_seed(1)
    model = animal("mlp").build()
    average = polyak.Average(model, HALF)
    torch.manual_seed(2)
    pretrained = frozen_copy(animal("mlp").build().state_dict())
    model.load_state_dict(pretrained)
    with pytest.warns(polyak.AveragingWarning, match=r"reset\(\) after loading weights"):
        average.weights()

    average.reset()

    assert bits(average.weights()) == bits(pretrained)
    assert average.update() == 0.5
    assert bits(average.weights()) == bits(pretrained)


# ── D: names, wrappers, structure ────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process, which is what the wrappers of `torch.distributed` want to see."""
    store: Path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    """Compiled with a backend that needs no compiler."""
    return cast(nn.Module, torch.compile(model, backend="eager"))


def fsdp_nested_twice(model: nn.Module) -> nn.Module:
    """Both the layer `one` and the model in FSDP, with the original parameters."""

    def wrap(inner: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            inner,
            use_orig_params=True,
            device_id=torch.device("cpu"),
            sharding_strategy=ShardingStrategy.FULL_SHARD,
        )

    model.one = wrap(model.get_submodule("one"))
    return wrap(model)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": compiled,
    "ddp": DistributedDataParallel,
    "data_parallel": DataParallel,
    "compile_of_ddp": lambda model: compiled(DistributedDataParallel(model)),
    "ddp_of_compile": lambda model: DistributedDataParallel(compiled(model)),
    "fsdp_nested_twice": fsdp_nested_twice,
}


def averages_of_a_wrapped_run(
    wrap: Callable[[nn.Module], nn.Module], *, first: str
) -> tuple[polyak.Average, dict[str, list[Tensor]]]:
    """Train five steps through a wrapper put on before or after building; also what was live."""
    torch.manual_seed(0)
    model = animal("mlp").build()
    parameters = dict(model.named_parameters())
    source = wrap(model) if first == "wrapper" else model
    average = polyak.Average(source, HALF)
    wrapped = source if first == "wrapper" else wrap(model)
    seen = {name: [p.detach().clone()] for name, p in parameters.items()}
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step in range(5):
        train(wrapped, optimizer, range(step, step + 1))
        average.update()
        for name, parameter in parameters.items():
            seen[name].append(parameter.detach().clone())
    return average, seen


def check_mean(average: polyak.Average, seen: Mapping[str, list[Tensor]]) -> None:
    """The average must be the weighted sum of what was live, under the plain names."""
    assert set(average.tensors) == set(seen)
    for name, moments in seen.items():
        n = len(moments) - 1
        weights = [0.5**n] + [0.5 ** (n - k + 1) for k in range(1, n + 1)]
        exact = weighted_sum(weights, moments)
        assert torch.allclose(average.tensors[name].double(), exact, rtol=1e-6, atol=1e-7)
        assert not torch.equal(average.tensors[name], moments[0])


def test_d1_model_compiled_after_building_is_averaged() -> None:
    """The steps of the compiled model reach the average that was built on the plain one."""
    average, seen = averages_of_a_wrapped_run(compiled, first="average")
    check_mean(average, seen)
    other = animal("mlp").build()
    average.copy_to(compiled(other))  # and the way back finds the names too
    assert bits(other) == bits(average.tensors)


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("first", ["average", "wrapper"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_d2_wrapping_before_or_after_building_changes_nothing(wrapper: str, first: str) -> None:
    """DDP, compile, both in either order, FSDP in FSDP: averaged, under the names of the class."""
    check_mean(*averages_of_a_wrapped_run(WRAPPERS[wrapper], first=first))


@pytest.mark.usefixtures("process_group")
def test_d3_export_of_a_wrapped_model_loads_into_the_bare_class(tmp_path: Path) -> None:
    """No prefix, no counter: the names of the class, in the file and in `weights()`."""
    model = animal("batch_norm").build()
    bare = list(model.state_dict())
    wrapped = compiled(DistributedDataParallel(model))
    average = polyak.Average(wrapped)
    average.update()
    path = tmp_path / "averaged.safetensors"
    polyak.save(average, path)

    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(bare)
    fresh = animal("batch_norm").build()
    fresh.load_state_dict(polyak.load_weights(path), strict=True)
    assert bits(fresh) == bits(model)
    assert list(average.weights()) == bare


class Twins(nn.Module):
    """Two layers of one shape, declared in the order that is asked for."""

    def __init__(self, *order: str) -> None:
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(4, 4))


def test_d5_names_decide_not_order(tmp_path: Path) -> None:
    """Into the same class with attributes declared in another order each tensor finds its name."""
    model = Twins("left", "right")
    average = polyak.Average(model, HALF)
    shift(model)
    average.update()
    path = tmp_path / "a.safetensors"
    polyak.save(average, path)
    other = Twins("right", "left")
    resumed = polyak.Average(other, HALF)
    resumed.load_state_dict(through_a_file(average.state_dict()))

    assert bits(resumed.tensors) == bits(average.tensors)
    average.copy_to(other)
    assert bits(other) == bits(average.tensors)
    another = Twins("right", "left")
    polyak.load_weights(path, another)
    assert bits(another) == bits(average.tensors)


def classes(count: int) -> nn.Module:
    """A body, and a head for so many classes."""
    return Sequence(body=nn.Linear(3, 4), head=nn.Linear(4, count))


def test_d7_another_head_is_an_error_unless_it_may_start_anew() -> None:
    """The error names the tensor and writes nothing; "reinit" keeps the rest and says what is new.

    The new head starts from the live weights, the body and the clock go on.
    """
    old = classes(10)
    average = polyak.Average(old, HALF)
    shift(old)
    average.update()
    state = through_a_file(average.state_dict())
    model = classes(7)
    resumed = polyak.Average(model, HALF)
    before = (bits(model), bits(resumed.tensors), resumed.updates, resumed.now)

    with pytest.raises(polyak.MatchError, match=r"'head\.weight' must have shape \[7, 4\]"):
        resumed.load_state_dict(state)
    assert (bits(model), bits(resumed.tensors), resumed.updates, resumed.now) == before

    with pytest.warns(polyak.AveragingWarning, match=r"head\.bias.*head\.weight"):
        resumed.load_state_dict(state, on_mismatch="reinit")

    assert (resumed.updates, resumed.now) == (1, 1)
    for name, value in resumed.tensors.items():
        expected = average.tensors[name] if name.startswith("body") else model.state_dict()[name]
        assert torch.equal(value, expected)
    assert bits(model) == before[0]


def test_d8_old_file_with_a_buffer_that_is_no_longer_saved_is_read(tmp_path: Path) -> None:
    """The buffer is left out, the reader is told its name, and the rest is loaded."""
    old = Spare()
    old.register_buffer("cache", torch.full((3,), 7.0), persistent=True)  # as it once was
    average = polyak.Average(old, HALF)
    shift(old)
    average.update()
    path = tmp_path / "old.safetensors"
    polyak.save(average, path)
    assert "cache" in polyak.load_weights(path)
    model = Spare()

    with pytest.warns(polyak.AveragingWarning, match="cache"):
        polyak.load_weights(path, model)

    assert bits(model.state_dict()) == bits(
        {n: t for n, t in average.weights().items() if n != "cache"}
    )
    assert torch.equal(model.cache, torch.ones(3))  # what the model makes itself


def test_d8_old_state_with_a_buffer_that_is_no_longer_averaged_goes_on() -> None:
    """Refused by name first; with "reinit" it is left out, said, and the rest goes on."""
    old = Spare()
    old.register_buffer("cache", torch.full((3,), 7.0), persistent=True)
    average = polyak.Average(old, HALF)
    shift(old)
    average.update()
    state = through_a_file(average.state_dict())
    model = Spare()
    resumed = polyak.Average(model, HALF)
    with pytest.raises(polyak.MatchError, match=r"1 only in the state \['cache'\]"):
        resumed.load_state_dict(state)
    assert resumed.updates == 0

    with pytest.warns(polyak.AveragingWarning, match="cache"):
        resumed.load_state_dict(state, on_mismatch="reinit")

    assert resumed.updates == 1
    left = {n: t for n, t in average.tensors.items() if n != "cache"}
    assert bits(resumed.tensors) == bits(left)


class Wide(nn.Module):
    """An embedding tied to the head, large enough that a second copy shows in a file's size."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1_000, 8)
        self.head = nn.Linear(8, 1_000, bias=False)
        self.head.weight = self.embedding.weight


def test_d9_tied_weights_are_one_tensor_everywhere(tmp_path: Path) -> None:
    """Averaged once, written once, and tied after each way of loading."""
    model = Wide()
    average = polyak.Average(model, HALF)
    start = model.embedding.weight.detach().clone()
    shift(model)
    average.update()
    path = tmp_path / "tied.safetensors"
    polyak.save(average, path)

    assert list(average.tensors) == ["embedding.weight"]
    assert torch.allclose(average.tensors["embedding.weight"], start + 0.5, atol=1e-6)  # once
    assert average.report().stored_bytes == 1_000 * 8 * 4
    assert path.stat().st_size < 1_000 * 8 * 4 + 2_000  # the header beside one copy
    fresh = Wide()
    polyak.load_weights(path, fresh)
    assert fresh.head.weight is fresh.embedding.weight
    assert torch.equal(fresh.head.weight, average.tensors["embedding.weight"])
    resumed = polyak.Average(fresh, HALF)
    resumed.load_state_dict(through_a_file(average.state_dict()))
    assert bits(resumed.tensors) == bits(average.tensors)
    with average.applied():
        assert model.head.weight is model.embedding.weight
        assert torch.equal(model.head.weight, fresh.head.weight)
    small = Tied()
    small.load_state_dict(polyak.Average(small).weights(), strict=True)
    assert small.head.weight is small.embedding.weight


def test_d10_nothing_that_matches_is_an_error() -> None:
    """A pattern, a state or a model that has nothing in common with the average is refused."""
    model = animal("mlp").build()
    with pytest.raises(polyak.ArgumentError, match="include must match a tensor of the model"):
        polyak.Average(model, include="encoder.*")
    average = polyak.Average(model, HALF)
    before = (bits(average.tensors), average.updates, average.now)
    foreign = polyak.Average({"other": torch.zeros(2)}, HALF).state_dict()
    with pytest.raises(polyak.MatchError, match=r"4 only in the average .* 1 only in the state"):
        average.load_state_dict(foreign)
    for name in ("one", "two"):  # new layers: no parameter is the one that was averaged
        setattr(model, name, copy.deepcopy(model.get_submodule(name)))

    with pytest.raises(polyak.MatchError, match=r"'one\.weight' must be the tensor it was"):
        average.update()

    assert (bits(average.tensors), average.updates, average.now) == before


# ── E: the average in evaluation ─────────────────────────────────────────────────────────────────


def moved_average(name: str = "batch_norm") -> tuple[nn.Module, polyak.Average]:
    """A model and an average of it that differ."""
    model = animal(name).build()
    average = polyak.Average(model, HALF)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        train_step(model, animal(name).inputs(), generator)
        average.update()
    return model, average


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("name", ["batch_norm", "bf16", "tied", "new_spectral_norm"])
def test_e1_trained_weights_come_back_when_validation_raises(
    name: str, error: type[BaseException]
) -> None:
    """Bit for bit, and the average keeps its own."""
    model, average = moved_average(name)
    trained, averaged = bits(model), bits(average.tensors)

    def validate() -> None:
        assert bits(model) != trained
        raise error("validation")

    with pytest.raises(error, match="validation"), average.applied():
        validate()

    assert (bits(model), bits(average.tensors)) == (trained, averaged)
    average.update()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["batch_norm", "bf16"])
def test_e1_trained_weights_come_back_when_the_copy_breaks(
    name: str, error: type[BaseException]
) -> None:
    """Whichever operation of the way in or out it is: bit for bit, and the error is passed on."""
    model, average = moved_average(name)
    trained, averaged = bits(model), bits(average.tensors)
    with Snags() as whole, average.applied():
        pass
    assert whole.calls > 4

    for at in range(1, whole.calls + 1):
        with Snags(at, error), pytest.raises(error, match="a snag"), average.applied():
            pass
        assert (bits(model), bits(average.tensors)) == (trained, averaged), at
    average.update()


def test_e3_references_taken_before_the_block_show_trained_weights_after_it() -> None:
    """A state dict is references: those to the model are raw again, those to the average are not.

    Inside the block references to the average do not show the live weights either.
    """
    model, average = moved_average()
    backup, held = model.state_dict(), average.tensors
    trained, averaged = bits(backup), bits(held)
    with average.applied():
        assert bits(held) == averaged

    assert bits(backup) == trained == bits(model.state_dict())
    assert bits(held) == averaged == bits(average.tensors)
    assert trained["one.weight"] != averaged["one.weight"]


def test_e4_update_inside_the_block_is_refused() -> None:
    """It would average the average; by hand, by another average of the model, and by reset."""
    model, average = moved_average()
    second = polyak.Average(model, HALF)
    before = (bits(average.tensors), bits(second.tensors), average.updates, average.now)
    trained = bits(model)

    with average.applied():
        for refused in (average.update, second.update, average.reset):
            with pytest.raises(polyak.OrderError, match=r"must come outside applied\(\)"):
                refused()

    assert (bits(average.tensors), bits(second.tensors), average.updates, average.now) == before
    assert (bits(model), second.updates) == (trained, 0)


def test_e5_files_have_the_right_roles_whenever_they_are_written(tmp_path: Path) -> None:
    """Written inside the block or outside, the average's file says the same, and so its state."""
    model, average = moved_average()
    trained, averaged = bits(model), bits(average.weights())
    polyak.save(average, tmp_path / "outside.safetensors")
    outside = through_a_file(average.state_dict())
    with average.applied():
        polyak.save(average, tmp_path / "inside.safetensors")
        inside = through_a_file(average.state_dict())
        assert bits(average.weights()) == averaged

    about = []
    for moment in ("inside", "outside"):
        assert bits(polyak.load_weights(tmp_path / f"{moment}.safetensors")) == averaged
        with safe_open(tmp_path / f"{moment}.safetensors", "pt") as file:
            about.append(file.metadata())
    assert about[0] == about[1]
    for state in (inside, outside):
        other = animal("batch_norm").build()
        other.load_state_dict(average.weights())
        resumed = polyak.Average(other, HALF)
        resumed.load_state_dict(state)
        assert bits(resumed.tensors) == bits(average.tensors)
        if state is inside:  # it carries the trained weights too
            assert {n: b for n, b in bits(other).items() if n in average.tensors} == {
                n: b for n, b in trained.items() if n in average.tensors
            }


def test_e6_saving_does_not_change_the_run(tmp_path: Path) -> None:
    """Saved and evaluated every other step or never: live weights and momenta are the same bits."""
    ends = []
    for saving in (False, True):
        torch.manual_seed(0)
        model = animal("batch_norm").build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        average = polyak.Average(model)
        average.follow(optimizer)
        for step in range(10):
            train(model, optimizer, range(step, step + 1))
            if saving and step % 2:
                polyak.save(average, tmp_path / "a.safetensors")
                torch.save(average.state_dict(), tmp_path / "a.pt")
                with average.applied():
                    model(torch.randn(4, 3, generator=torch.Generator().manual_seed(step)))
        momenta = [
            bits({"": s["momentum_buffer"]}) for s in optimizer.state_dict()["state"].values()
        ]
        ends.append((bits(model), momenta, bits(average.tensors)))

    assert ends[0] == ends[1]


def test_e11_optimizer_step_inside_the_block_is_refused() -> None:
    """Followed: before anything moves. Not followed: the end of the block raises, weights back."""
    model = animal("mlp").build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = polyak.Average(model, HALF)
    follower = average.follow(optimizer)
    train(model, optimizer, range(2))
    trained, averaged = bits(model), bits(average.tensors)
    with average.applied():
        lent = bits(model)
        with pytest.raises(polyak.OrderError, match="an optimizer step must come outside"):
            train(model, optimizer, range(1))
        assert bits(model) == lent
    assert (bits(model), bits(average.tensors), average.updates) == (trained, averaged, 2)

    follower.remove()
    with pytest.raises(polyak.OrderError, match="must not change inside"), average.applied():
        train(model, optimizer, range(1))

    assert bits(model) == trained
    if any("lost" in note for note in average.report().notes):
        with pytest.raises(polyak.OrderError, match="the average must be whole"):
            average.weights()
        average.reset()
    assert all(t.isfinite().all() for t in average.tensors.values())


# ── F: resume and checkpoints ────────────────────────────────────────────────────────────────────

START = 10
Outcome = tuple[dict[str, bytes], dict[str, bytes], int, float, float, float]


class Run:
    """A training run with an average that starts late, as a loop would set it up."""

    def __init__(self, *, moved: str = "never", wrapped: str = "never") -> None:
        torch.manual_seed(0)
        self.model = animal("batch_norm").build()
        self.moved, self.wrapped = moved, wrapped
        self._prepare("before")
        rule = polyak.After(START, polyak.Exponential(decay=0.9))
        self.average = polyak.Average(self.model, rule)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.average.follow(self.optimizer)

    def _prepare(self, when: str) -> None:
        if self.moved == when:  # what a move to another device does to a parameter
            for parameter in self.model.parameters():
                parameter.data = parameter.data.clone()
        if self.wrapped == when:
            self.model = DataParallel(self.model)

    def bare(self) -> nn.Module:
        return self.model.module if isinstance(self.model, DataParallel) else self.model

    def checkpoint(self) -> dict[str, Any]:
        return {
            "model": self.bare().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
        }

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        self.bare().load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.average.load_state_dict(checkpoint["average"])
        self._prepare("after")

    def outcome(self) -> Outcome:
        """Live weights, average, counter, clock, memory, and the decay that comes next."""
        values = bits(self.average.tensors)
        age = self.average.report().mean_age
        updates, now = self.average.updates, self.average.now
        return bits(self.bare()), values, updates, now, age, self.average.update(now + 1)


F1_STOPS = (START - 7, START, START + 3)
F1_VARIANTS = [
    (stop, moved, wrapped)
    for stop in F1_STOPS
    for moved in ("never", "before", "after")
    for wrapped in ("never", "before", "after")
]


def finish_runs(folder: str) -> list[Outcome]:
    """In another process: go on from each checkpoint, in each way, to step 20."""
    torch.set_num_threads(1)
    outcomes = []
    for stop, moved, wrapped in F1_VARIANTS:
        run = Run(moved=moved, wrapped=wrapped)
        run.load(torch.load(f"{folder}/{stop}.pt", weights_only=True))
        train(run.model, run.optimizer, range(stop, 20))
        outcomes.append(run.outcome())
    return outcomes


def test_f1_run_that_is_resumed_in_a_new_process_ends_bit_for_bit(tmp_path: Path) -> None:
    """Stopped before the start of the average, at it and after; moved or wrapped before or after.

    Live weights, average, counter, clock, memory and next decay are those of the whole run.
    """
    for stop in F1_STOPS:
        first = Run()
        train(first.model, first.optimizer, range(stop))
        torch.save(first.checkpoint(), tmp_path / f"{stop}.pt")
    whole = Run()
    train(whole.model, whole.optimizer, range(20))
    expected = whole.outcome()

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        outcomes = pool.apply_async(finish_runs, [str(tmp_path)]).get(timeout=120)

    assert expected[2:4] == (20, 20)
    for variant, outcome in zip(F1_VARIANTS, outcomes, strict=True):
        assert outcome == expected, variant


def test_f2_counter_goes_on_after_a_resume() -> None:
    """After 1000 updates of a ramp the next decay is that of update 1001, not of the first."""
    live = scalar(0.0)
    average = polyak.Average(live, polyak.CountRamp(0.9999))
    for _ in range(1_000):
        average.update()
    resumed = polyak.Average(live, polyak.CountRamp(0.9999))
    resumed.load_state_dict(through_a_file(average.state_dict()))
    live["w"].fill_(1.0)

    assert resumed.update() == pytest.approx(1_002 / 1_011, rel=1e-15)

    assert (resumed.updates, resumed.now) == (1_001, 1_001)
    assert resumed.tensors["w"].item() == pytest.approx(9 / 1_011, rel=1e-12)


def test_f3_average_that_starts_late_is_restored_after_its_start() -> None:
    """Saved at 15 with start 10, loaded into a fresh one: the mean of 11..15, then of 11..16."""
    live = scalar(0.0)
    rule = polyak.After(10, polyak.Uniform())
    average = polyak.Average(live, rule)
    for step in range(1, 16):
        live["w"].fill_(step)
        average.update()
    fresh = scalar(-1.0)
    resumed = polyak.Average(fresh, rule)
    resumed.load_state_dict(through_a_file(average.state_dict()))
    assert resumed.tensors["w"].item() == pytest.approx(13.0, rel=1e-12)
    fresh["w"].fill_(16)
    resumed.update()

    assert resumed.tensors["w"].item() == pytest.approx(13.5, rel=1e-12)


def test_f4_average_built_after_a_restore_overwrites_nothing() -> None:
    """A second one is another object: the restored average goes on, the idle one is reported."""
    model, average = moved_average()
    state = through_a_file(average.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    restored = polyak.Average(model, HALF)
    restored.load_state_dict(state)
    restored.follow(optimizer)
    live = bits(model)
    fresh = polyak.Average(model, HALF)  # as a framework does on its way up

    assert bits(model) == live
    assert bits(restored.tensors) == bits(average.tensors)
    assert (restored.updates, fresh.updates) == (2, 0)
    train(model, optimizer, range(1))
    assert restored.updates == 3
    assert fresh.report().initial_weight == 1.0
    with (
        pytest.warns(polyak.AveragingWarning, match="update was never called"),
        fresh.applied(),
    ):
        pass
    assert restored.report().notes == ()


def test_f5_checkpoint_taken_in_the_middle_of_validation_resumes_from_trained_weights() -> None:
    """The model's own state holds averaged weights there; the average's state holds the trained.

    Loaded as always, both models are what they would be had nothing stopped.
    """
    first, whole = Run(), Run()
    for run in (first, whole):
        train(run.model, run.optimizer, range(START + 3))
    with first.average.applied():
        checkpoint = through_a_file(first.checkpoint())
    assert bits(checkpoint["model"]) != bits(first.bare())
    resumed = Run()
    resumed.load(checkpoint)

    assert bits(resumed.bare()) == bits(first.bare())
    for run in (resumed, whole):
        train(run.model, run.optimizer, range(START + 3, 20))
    assert resumed.outcome() == whole.outcome()


def test_f6_loading_the_average_leaves_the_live_model_alone() -> None:
    """Also when the state carries trained weights and "leave" is asked for."""
    _, average = moved_average()
    outside = through_a_file(average.state_dict())
    with average.applied():
        inside = through_a_file(average.state_dict())
    torch.manual_seed(7)
    model = animal("batch_norm").build()
    resumed = polyak.Average(model, HALF)
    live = bits(model)

    resumed.load_state_dict(outside)
    assert bits(model) == live
    resumed.load_state_dict(inside, live="leave")
    assert bits(model) == live

    assert bits(resumed.tensors) == bits(average.tensors)


def test_f7_best_score_is_kept_beside_the_average() -> None:
    """Which average was best is the loop's to keep: one number and one file beside the state.

    A validation before the first update (a sanity check) does not count, and `updates` tells so; a
    worse score after the resume does not replace the best.
    """

    def validate(average: polyak.Average, best: dict[str, Any], score: float) -> dict[str, Any]:
        if average.updates == 0 or score >= best["score"]:
            return best
        return {"score": score, "weights": average.weights()}

    model = animal("mlp").build()
    average = polyak.Average(model, HALF)
    best: dict[str, Any] = {"score": math.inf, "weights": {}}
    best = validate(average, best, score=0.0)
    assert best["score"] == math.inf
    for score in (0.5, 0.2, 0.3):
        shift(model)
        average.update()
        best = validate(average, best, score)
        if score == 0.2:
            at_best = bits(average.tensors)
    checkpoint = through_a_file({"average": average.state_dict(), "best": best})

    resumed = polyak.Average(animal("mlp").build(), HALF)
    resumed.load_state_dict(checkpoint["average"])
    after = validate(resumed, checkpoint["best"], score=0.4)

    assert resumed.updates == 3
    assert after["score"] == 0.2
    assert bits(after["weights"]) == at_best
    assert validate(resumed, after, score=0.1)["score"] == 0.1


def test_f9_resuming_a_run_that_had_no_average_is_announced() -> None:
    """What is no state is refused with what is expected; built after loading, it starts there."""
    old = animal("mlp").build()
    checkpoint = through_a_file({"model": old.state_dict()})
    model = animal("mlp").build()
    average = polyak.Average(model, HALF)
    before = (bits(average.tensors), average.updates)
    states: list[Any] = [checkpoint.get("average"), {}, checkpoint["model"]]
    for state in states:
        with pytest.raises(polyak.ArgumentError, match=r"must be what state_dict\(\) of a polyak"):
            average.load_state_dict(state)
    assert (bits(average.tensors), average.updates) == before

    model.load_state_dict(checkpoint["model"])
    average.reset()

    assert bits(average.tensors) == bits(old)


def test_f9_dropping_the_average_on_resume_starts_from_trained_weights() -> None:
    """They are the model's entry of a checkpoint, or wait under "live" in the average's.

    The second in a checkpoint that was taken inside the block, where the model holds averages.
    """
    model, average = moved_average()
    trained = bits(model)
    outside = through_a_file({"model": model.state_dict(), "average": average.state_dict()})
    with average.applied():
        inside = through_a_file({"model": model.state_dict(), "average": average.state_dict()})

    for checkpoint in (outside, inside):
        plain = animal("batch_norm").build()
        plain.load_state_dict(checkpoint["model"])
        plain.load_state_dict(checkpoint["average"].get("live", {}), strict=False)
        assert bits(plain) == trained


def test_f10_two_averaged_modules_are_both_restored() -> None:
    """Two experts of different shapes: each from its own key; from the other's it is refused."""

    def build() -> tuple[nn.ModuleDict, dict[str, polyak.Average]]:
        experts = nn.ModuleDict({"high": nn.Linear(3, 4), "low": nn.Linear(3, 5)})
        return experts, {name: polyak.Average(expert, HALF) for name, expert in experts.items()}

    experts, averages = build()
    for times, name in enumerate(averages, start=1):
        for _ in range(times):
            shift(experts[name])
            averages[name].update()
    state = through_a_file({name: average.state_dict() for name, average in averages.items()})
    _, resumed = build()
    before = bits(resumed["low"].tensors)
    with pytest.raises(polyak.MatchError, match="'weight' must have shape"):
        resumed["low"].load_state_dict(state["high"])
    assert bits(resumed["low"].tensors) == before
    for name, average in resumed.items():
        average.load_state_dict(state[name])

    for name, updates in (("high", 1), ("low", 2)):
        assert bits(resumed[name].tensors) == bits(averages[name].tensors)
        assert resumed[name].updates == updates


def test_f10_one_average_over_two_modules_restores_both() -> None:
    """The simpler way: the names of both are in one state, and none can be forgotten."""

    def build() -> nn.ModuleDict:
        return nn.ModuleDict({"high": nn.Linear(3, 4), "low": nn.Linear(3, 4)})

    experts = build()
    average = polyak.Average(experts, HALF)
    shift(experts["high"])
    average.update()
    resumed = polyak.Average(build(), HALF)
    resumed.load_state_dict(through_a_file(average.state_dict()))

    assert set(resumed.tensors) == {f"{e}.{t}" for e in ("high", "low") for t in ("weight", "bias")}
    assert bits(resumed.tensors) == bits(average.tensors)


def renamed(value: Any, old: str, new: str) -> Any:
    """A migration: the layer `old` is called `new`, wherever in a checkpoint it has a name."""
    if not isinstance(value, Mapping):
        return value
    return {
        key.replace(old, new) if isinstance(key, str) else key: renamed(item, old, new)
        for key, item in value.items()
    }


def test_f12_migrated_checkpoint_is_migrated_for_the_average_too() -> None:
    """The average goes by the model's names, so one migration serves both.

    A migration of the model alone is refused with both names, before anything is written.
    """
    old = Sequence(stem=nn.Linear(3, 4), head=nn.Linear(4, 2))
    average = polyak.Average(old, HALF)
    shift(old)
    average.update()
    checkpoint = through_a_file({"model": old.state_dict(), "average": average.state_dict()})

    model = Sequence(encoder=nn.Linear(3, 4), head=nn.Linear(4, 2))
    resumed = polyak.Average(model, HALF)
    before = (bits(resumed.tensors), resumed.updates)
    with pytest.raises(polyak.MatchError, match=r"encoder\.weight.*stem\.weight"):
        resumed.load_state_dict(checkpoint["average"])
    assert (bits(resumed.tensors), resumed.updates) == before

    whole = renamed(checkpoint, "stem", "encoder")
    model.load_state_dict(whole["model"])
    resumed.load_state_dict(whole["average"])

    assert bits(resumed.tensors) == bits(renamed(average.tensors, "stem", "encoder"))
    assert bits(model) == bits(renamed(old.state_dict(), "stem", "encoder"))
    assert resumed.updates == 1


# ── G: incidents, and what counts as a step ──────────────────────────────────────────────────────


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["element", "everything"])
def test_g1_average_survives_a_step_that_was_not_finite(bad: float, where: str) -> None:
    """One bad step, then 500 clean: finite, counted by name, and clean elements saw nothing."""
    averages = []
    for incident in (False, True):
        live = {"w": torch.zeros(4)}
        average = polyak.Average(live, polyak.Exponential(decay=0.99))
        generator = torch.Generator().manual_seed(0)
        for step in range(511):
            live["w"].normal_(generator=generator)
            if incident and step == 10:
                live["w"][0 if where == "element" else slice(None)] = bad
            average.update()
        averages.append(average)
    clean, hit = averages

    assert hit.tensors["w"].isfinite().all()
    assert hit.report().nonfinite == {"w": 1 if where == "element" else 4}
    assert clean.report().nonfinite == {}
    assert (hit.updates, hit.now) == (511, 511)
    if where == "element":
        assert torch.equal(hit.tensors["w"][1:], clean.tensors["w"][1:])
    # What the bad moment displaced weighs 0.99^500 by now, and all values lie within 10.
    assert torch.allclose(hit.tensors["w"], clean.tensors["w"], atol=10 * 0.99**500)


def test_g2_one_bad_tensor_does_not_keep_the_others_from_being_saved(tmp_path: Path) -> None:
    """It is named and keeps its last good value; once the live one is clean it moves again."""
    model = animal("mlp").build()
    average = polyak.Average(model, HALF)
    start = frozen_copy(model.state_dict())
    shift(model)
    average.update()
    bias = model.get_parameter("one.bias")
    with torch.no_grad():
        bias.fill_(torch.nan)
    for _ in range(3):
        average.update()
    path = tmp_path / "a.safetensors"
    polyak.save(average, path)

    saved = polyak.load_weights(path)
    assert average.report().nonfinite == {"one.bias": 3 * bias.numel()}
    for name, value in saved.items():
        share = 0.5 if name == "one.bias" else 1 - 0.5**4
        assert torch.allclose(value, start[name] + share, atol=1e-6)

    with torch.no_grad():
        bias.copy_(start["one.bias"] + 1.0)
    average.update()

    assert torch.allclose(average.tensors["one.bias"], start["one.bias"] + 0.75, atol=1e-6)


def test_g3_accumulated_batches_are_one_step() -> None:
    """12 micro-batches in groups of four: three optimizer steps, three updates."""
    model = animal("mlp").build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    average = polyak.Average(model)
    average.follow(optimizer)
    for micro in range(12):
        model(torch.randn(4, 3)).square().sum().backward()
        if micro % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()

    assert (average.updates, average.now) == (3, 3)


@pytest.mark.parametrize("fused", [False, True], ids=["skips_in_python", "skips_on_the_device"])
def test_g4_step_that_the_scaler_skips_does_not_count(fused: bool) -> None:
    """The scaler of torch finds an overflow: neither the counter nor the schedule moves on.

    The average, its clock and its next decay are those of a run without the bad batches.
    """
    ends = []
    for batches in ((0.0, 1.0, 0.0, 1.0, 1.0, 0.0), (0.0, 0.0, 0.0)):
        torch.manual_seed(0)
        model = animal("mlp").build()
        optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
            if fused
            else torch.optim.SGD(model.parameters(), lr=0.01)
        )
        average = polyak.Average(model, polyak.CountRamp(0.999))
        average.follow(optimizer)
        # A scale that stays, so that both runs see the same gradients.
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, backoff_factor=1.0 - 2**-53)
        for bad in batches:
            optimizer.zero_grad()
            loss = model(torch.ones(2, 3)).square().sum() * (torch.inf if bad else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        end = (bits(model), bits(average.tensors), average.updates, average.now)
        ends.append((*end, average.update(average.now + 1)))

    assert ends[0] == ends[1]
    assert ends[0][2:] == (3, 3, (1 + 4) / (10 + 4))


@pytest.mark.parametrize("fused", [False, True])
def test_g5_average_that_was_never_updated_is_said_at_the_first_save(
    fused: bool, tmp_path: Path
) -> None:
    """Once, as a warning, with the reason: not updated, another optimizer, too long an interval.

    A sanity check before training does not use the warning up, nor does a look at the report.
    """
    path = tmp_path / "a.safetensors"
    model, other = animal("mlp").build(), animal("mlp").build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    elsewhere = torch.optim.AdamW(other.parameters(), lr=0.01, fused=fused)
    forgotten, astray, rare = (polyak.Average(model) for _ in range(3))
    astray.follow(elsewhere)
    rare.follow(optimizer, every=1_000)
    for average in (forgotten, astray, rare):
        with average.applied():  # a sanity check before training: nothing to be said yet
            assert bits(model) == bits(average.tensors)
    train(model, optimizer, range(10))  # fused steps leave no trace in the tensors' versions

    cases = [
        (forgotten, "update was never called"),
        (astray, "follow the one that trains this model"),
        (rare, "saw 10 optimizer steps but no update"),
    ]
    for average, reason in cases:
        assert average.updates == 0
        assert any(reason in note for note in average.report().notes)
        with pytest.warns(polyak.AveragingWarning, match=reason):
            polyak.save(average, path)
        polyak.save(average, path)  # once is enough: a second warning would be an error here


# ── I: adapters, teachers, targets ───────────────────────────────────────────────────────────────


class Adapter(nn.Module):
    """Two low-rank matrices of one shape each, declared in the order that is asked for."""

    def __init__(self, order: str = "ab") -> None:
        super().__init__()
        for letter in order:
            setattr(self, f"lora_{letter}", nn.Parameter(torch.randn(4, 4).bfloat16()))


class Adapted(nn.Module):
    """A frozen base, a quantised one, and an adapter that is trained."""

    codes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(64, 64).requires_grad_(False)
        self.register_buffer("codes", torch.arange(64, dtype=torch.int8))
        self.register_buffer("scales", torch.rand(64))
        self.adapter = Adapter()

    def load_adapter(self, tensors: Mapping[str, Tensor]) -> None:
        """As adapter libraries do: exactly the adapter's names, nothing else."""
        self.adapter.load_state_dict(
            {name.removeprefix("adapter."): tensor for name, tensor in tensors.items()}
        )


def test_i1_adapters_alone_are_averaged_and_exported(tmp_path: Path) -> None:
    """Four bytes for each element of the adapters, none for the base; the file is an adapter's."""
    model = Adapted()
    average = polyak.Average(model, HALF, include="*lora*")
    by_name = polyak.Average(
        {n: p for n, p in model.named_parameters() if "lora" in n}, HALF
    )  # the same tensors, and `save` writes them alone
    base = {n: b for n, b in bits(model).items() if "lora" not in n}
    start = frozen_copy(average.tensors)
    shift(model)
    average.update()
    by_name.update()
    path = tmp_path / "adapter.safetensors"
    polyak.save(by_name, path)

    assert set(average.tensors) == {"adapter.lora_a", "adapter.lora_b"}
    assert average.report().stored_bytes == 2 * 4 * 4 * 4
    for name, value in average.tensors.items():
        assert torch.allclose(value, 0.5 * (start[name] + model.state_dict()[name].float()))
    other = Adapted()
    for exported in (
        {name: average.weights()[name] for name in average.tensors},
        polyak.load_weights(path),
    ):
        other.load_adapter(exported)
        for name, value in average.tensors.items():
            assert torch.equal(other.state_dict()[name], value.bfloat16())
    assert {n: b for n, b in bits(model).items() if "lora" not in n} == base
    whole = Adapted()
    whole.load_state_dict(average.weights(), strict=True)
    assert {n: b for n, b in bits(whole).items() if "lora" not in n} == base


class TwoAdapters(nn.Module):
    """A policy and its reference inside one model; the reference declares b before a."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.policy = Adapter("ab")
        self.reference = Adapter("ba").requires_grad_(False)


def test_i2_reference_adapter_is_paired_by_name_and_stays_frozen() -> None:
    """Pairs by position would exchange a and b, which have one shape."""
    model = TwoAdapters()
    average = polyak.Average(model.policy, polyak.Exponential(decay=0.9, debias=False))
    shift(model.policy)
    average.update()
    untouched = {n: b for n, b in bits(model).items() if not n.startswith("reference")}

    average.copy_to(model.reference)

    for name in ("lora_a", "lora_b"):
        assert torch.equal(
            model.reference.get_parameter(name), average.tensors[name].to(torch.bfloat16)
        )
    assert not torch.equal(average.tensors["lora_a"], average.tensors["lora_b"])
    assert {n: b for n, b in bits(model).items() if not n.startswith("reference")} == untouched
    assert not any(p.requires_grad for p in model.reference.parameters())
    assert [p.grad for p in model.reference.parameters()] == [None, None]
    whole = polyak.Average(model)  # a frozen reference is neither averaged nor kept
    assert set(whole.tensors) == {"policy.lora_a", "policy.lora_b"}


class Agent(nn.Module):
    """An encoder and two critics."""

    def __init__(self, *, encoder: bool = True) -> None:
        super().__init__()
        if encoder:
            self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.critics = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])


@pytest.mark.parametrize("share", [1.0, 0.005])
def test_i4_target_is_covered_wholly_or_refused(share: float) -> None:
    """A target that has more or less than the average is an error that says what is missing."""
    online, target = Agent(), Agent()
    average = polyak.Average(online)
    shift(online)
    average.update()
    critics = {n: p for n, p in online.named_parameters() if n.startswith("critics")}
    part, small = polyak.Average(critics), Agent(encoder=False)
    before = (bits(target), bits(small))
    with pytest.raises(polyak.MatchError, match=r"7 only in the average \['encoder\.0\.bias'"):
        average.copy_to(small, share=share)
    with pytest.raises(polyak.MatchError, match=r"7 only in the module \['encoder\.0\.bias'"):
        part.copy_to(target, share=share)
    assert (bits(target), bits(small)) == before

    start = frozen_copy(tensors_of(target))
    average.copy_to(target, share=share)

    covered = {tensor.name for tensor in average.report().tensors}
    assert covered == set(tensors_of(target))
    for name, value in target.state_dict().items():
        if value.is_floating_point():
            exact = start[name] + share * (average.tensors[name] - start[name])
            assert torch.allclose(value, exact, atol=1e-6)
