"""YOLOv5's ModelEMA: the numbers of S1 of the systems, its files, and what it must not do."""

import copy
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import polyak
from polyak.compat.yolov5 import ModelEMA
from zoo import Complex, Counters, Sequence, Tied, all_frozen, train_step

DECAY, TAU = 0.9999, 2000


class Detector(nn.Module):
    """Convolutions, batch norm, plain attributes, and one layer that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        self.names = ["cat", "dog"]
        self.stride = torch.tensor([8.0, 16.0])
        self._secret = 1

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.backbone(x)).mean((2, 3)))  # type: ignore[no-any-return]


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6)


def floating(model: nn.Module) -> dict[str, Tensor]:
    """Every floating entry of the state dict, in float64."""
    return {
        name: tensor.detach().double().clone()
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }


def recurrence(
    start: dict[str, Tensor], moments: Iterator[dict[str, Tensor]], updates: int = 0
) -> dict[str, Tensor]:
    """S1, one line: updates += 1; d = decay (1 - exp(-updates / tau)); v = d v + (1 - d) live."""
    value = start
    for live in moments:
        updates += 1
        d = DECAY * (1 - math.exp(-updates / TAU))
        value = {name: d * value[name] + (1 - d) * live[name] for name in value}
    return value


def check(ema: ModelEMA, expected: dict[str, Tensor], rel: float = 1e-6) -> None:
    """The averaged module holds the expected values, relative to the largest of each tensor."""
    found = ema.ema.state_dict()
    for name, value in expected.items():
        error = float((found[name].double() - value).abs().max())
        assert error <= rel * float(value.abs().max()), (name, error)


def train(model: nn.Module, ema: ModelEMA, steps: int) -> Iterator[dict[str, Tensor]]:
    """Random steps, an update after each; yields the live weights that were folded in."""
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        train_step(model, images(), random)
        ema.update(model)
        yield floating(model)


def test_500_steps_are_the_recurrence() -> None:
    """Parameters, frozen ones and running statistics, against float64."""
    model = Detector()
    model.backbone.requires_grad_(False)
    start = floating(model)
    ema = ModelEMA(model)
    check(ema, recurrence(start, train(model, ema, 500)))
    assert ema.updates == 500
    assert not ema.ema.training
    assert not any(parameter.requires_grad for parameter in ema.ema.parameters())


def test_integer_buffers_follow_the_live_model() -> None:
    """The original keeps the counter that it was copied with."""
    model = Detector()
    ema = ModelEMA(model)
    for _ in train(model, ema, 7):
        pass
    assert int(ema.ema.get_buffer("norm.num_batches_tracked")) == 7
    counters = Counters()
    ema = ModelEMA(counters)
    train_step(counters, torch.ones(1, 3), torch.Generator())
    ema.update(counters)
    for name in ("big", "flag", "byte", "seen"):
        assert torch.equal(ema.ema.get_buffer(name), counters.get_buffer(name))


def test_tied_weights_are_averaged_once() -> None:
    """Mixed once a name, a tied tensor would move twice an update."""
    model = Tied()
    start = floating(model)
    ema = ModelEMA(model, 0.9, tau=1)
    with torch.no_grad():
        model.embedding.weight.add_(1.0)
    ema.update(model)
    d = 0.9 * (1 - math.exp(-1))
    torch.testing.assert_close(
        ema.ema.state_dict()["head.weight"].double(),
        start["head.weight"] + (1 - d),
        rtol=1e-6,
        atol=1e-7,
    )
    tied: Any = ema.ema
    assert tied.head.weight is tied.embedding.weight


def test_what_is_unfrozen_later_is_averaged_from_then_on() -> None:
    """A backbone that is frozen for the first epochs is in the average, as in the original."""
    model = Detector()
    model.backbone.requires_grad_(False)
    start = floating(model)
    ema = ModelEMA(model)
    moments = list(train(model, ema, 5))
    model.backbone.requires_grad_(True)
    moments += list(train(model, ema, 5))
    assert not torch.equal(moments[-1]["backbone.weight"], start["backbone.weight"])
    check(ema, recurrence(start, iter(moments)))


def test_a_model_with_every_layer_frozen_is_kept() -> None:
    """Nothing to learn is nothing to refuse."""
    model = all_frozen()
    ema = ModelEMA(model)
    ema.update(model)
    for name, value in model.state_dict().items():
        assert torch.equal(ema.ema.state_dict()[name], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_have_a_float32_average(dtype: torch.dtype) -> None:
    """In bfloat16 itself the average would not move at all at these decays."""
    model = Detector().to(dtype)
    ema = ModelEMA(model)
    start, moments = floating(model), []
    random = torch.Generator().manual_seed(1)
    for _ in range(50):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.norm.buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape, generator=random))
        ema.update(model)
        moments.append(floating(model))
    check(ema, recurrence(start, iter(moments)))
    assert {t.dtype for t in ema.ema.parameters()} == {torch.float32}
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype=dtype):
            assert ema.ema(images()).dtype == dtype


def test_a_load_reaches_the_average_of_a_half_precision_model() -> None:
    """Also where a float64 buffer stands beside bfloat16 weights."""
    model = Detector().bfloat16()
    model.register_buffer("clock", torch.zeros(2, dtype=torch.float64))
    ema = ModelEMA(model, updates=3)
    ema.ema.load_state_dict({k: torch.full_like(v, 2) for k, v in ema.ema.state_dict().items()})
    assert {float(t.min()) for t in ema.average.tensors.values()} == {2.0}


def test_nan_stays_out() -> None:
    """One broken step does not spoil the average for ever."""
    model = Detector()
    ema = ModelEMA(model)
    for _ in train(model, ema, 3):
        pass
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    ema.update(model)
    assert all(tensor.isfinite().all() for tensor in ema.ema.state_dict().values())
    assert ema.average.report().nonfinite == {"head.weight": 1}


# ── wrappers ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", (tmp_path / "meeting").as_uri(), world_size=1, rank=0)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("built_from", ["bare", "wrapped"])
def test_a_wrapped_model_is_the_model(built_from: str) -> None:
    """Built before or after DDP wraps it, updated with either."""
    model = Detector()
    wrapped = DistributedDataParallel(model)
    start = floating(model)
    ema = ModelEMA(model if built_from == "bare" else wrapped)
    assert type(ema.ema) is Detector
    assert set(ema.ema.state_dict()) == set(model.state_dict())
    moments = []
    compiled: Any = torch.compile(model, backend="eager")
    for handed in (model, wrapped, compiled):
        train_step(model, images(), torch.Generator().manual_seed(1))
        ema.update(handed)
        moments.append(floating(model))
    check(ema, recurrence(start, iter(moments)))


def test_an_attribute_called_module_keeps_its_name() -> None:
    """Names are those of the model, whatever they look like."""
    model = Sequence(module=nn.Linear(3, 3), _orig_mod=nn.Linear(3, 2))
    ema = ModelEMA(model)
    ema.update(model)
    assert set(ema.average.tensors) == set(model.state_dict())


def test_batch_norms_may_be_converted_after_it_was_built() -> None:
    """YOLOv5 builds the average first, then converts to SyncBatchNorm."""
    model = Detector()
    ema = ModelEMA(model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ema.update(converted)
    assert ema.updates == 1


def test_another_model_is_refused() -> None:
    """It would be averaged by name without a word, or not at all."""
    model = Detector()
    ema = ModelEMA(model)
    for act in (ema.update, ema.update_attr):
        with pytest.raises(polyak.MatchError, match="model must be the one"):
            act(copy.deepcopy(model))
    assert ema.updates == 0


# ── attributes ───────────────────────────────────────────────────────────────────────────────────


def test_plain_attributes_are_copied() -> None:
    """Those of the model, but neither private nor excluded ones, nor the mode."""
    model = Detector()
    ema = ModelEMA(model)
    averaged: Any = ema.ema
    model.names = ["cat", "dog", "owl"]
    model.hyp = {"lr": 0.1}  # type: ignore[assignment]  # a plain attribute
    model.reducer = "of a process"  # type: ignore[assignment]
    model._secret = 2
    model.forward = lambda x: x  # type: ignore[method-assign]  # as some launchers do
    ema.update_attr(model)
    assert averaged.names == ["cat", "dog", "owl"]
    assert averaged.hyp == {"lr": 0.1}
    assert averaged.stride is model.stride
    assert averaged._secret == 1
    assert not hasattr(averaged, "reducer")
    assert not averaged.training
    assert averaged(images()).shape == (2, 2)  # its own forward


def test_include_and_exclude_choose_the_attributes() -> None:
    """With `include` only those, and never the mode."""
    model = Detector()
    ema = ModelEMA(model)
    averaged: Any = ema.ema
    model.names, model.stride = ["x"], torch.tensor([4.0])
    ema.update_attr(model, include=("names", "training", "nothing"))
    assert averaged.names == ["x"]
    assert averaged.stride.tolist() == [8.0, 16.0]
    assert not averaged.training
    model.names = ["y"]
    ema.update_attr(model, exclude=("names",))
    assert averaged.names == ["x"]
    assert averaged.stride.tolist() == [4.0]


def test_attributes_put_on_a_wrapper_are_found_by_name() -> None:
    """YOLOv5 attaches the names of the classes after wrapping; the strides sit inside."""
    model = Detector()
    wrapped: Any = DataParallel(model)
    wrapped.names = ["on the wrapper"]
    model.stride = torch.tensor([4.0])
    ema = ModelEMA(model)
    averaged: Any = ema.ema
    ema.update_attr(wrapped, include=("names", "stride"))
    assert averaged.names == ["on the wrapper"]
    assert averaged.stride.tolist() == [4.0]
    ema.update_attr(wrapped)
    assert not hasattr(averaged, "device_ids")


# ── files ────────────────────────────────────────────────────────────────────────────────────────


def original_file(model: nn.Module, average: nn.Module, updates: int) -> dict[str, Any]:
    """What YOLOv5 writes: whole modules in half precision, and the counter."""
    file = io.BytesIO()
    checkpoint = {
        "epoch": 3,
        "best_fitness": 0.5,
        "model": copy.deepcopy(model).half(),
        "ema": copy.deepcopy(average).half(),
        "updates": updates,
    }
    torch.save(checkpoint, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=False)
    return loaded


def test_a_file_of_the_original_goes_on_with_the_same_numbers() -> None:
    """YOLOv5's own lines: load in float32, restore the counter, train on."""
    model, average = Detector(), Detector().eval()  # `average` as the original would have kept it
    checkpoint = original_file(model, average, updates=1234)

    ema = ModelEMA(model)
    ema.ema.load_state_dict(checkpoint["ema"].float().state_dict())
    ema.updates = checkpoint["updates"]
    model.load_state_dict(checkpoint["model"].float().state_dict())
    start = floating(average.half())
    check(ema, start, rel=1e-12)
    check(ema, recurrence(start, train(model, ema, 200), updates=1234))
    assert ema.updates == 1434


def test_its_own_modules_can_be_written_and_read_like_the_original_s() -> None:
    """`deepcopy(ema.ema).half()` is a module that stands still; the average keeps float32."""
    model = Detector()
    ema = ModelEMA(model)
    for _ in train(model, ema, 5):
        pass
    checkpoint = original_file(model, ema.ema, ema.updates)
    saved = checkpoint["ema"]
    assert type(saved) is Detector
    for name, value in ema.ema.state_dict().items():
        expected = value.half() if value.is_floating_point() else value
        assert torch.equal(saved.state_dict()[name], expected)
    assert {t.dtype for t in ema.average.tensors.values()} == {torch.float32}
    plain = Detector()
    plain.load_state_dict(saved.float().state_dict(), strict=True)


def test_validation_in_half_precision_leaves_the_average_alone() -> None:
    """YOLOv5 validates with `model.half()` and turns it back with `.float()`."""
    model = Detector()
    start = floating(model)
    ema = ModelEMA(model)
    moments = list(train(model, ema, 3))
    before = {name: tensor.clone() for name, tensor in ema.average.tensors.items()}
    ema.ema.half()
    ema.ema.float()
    for name, tensor in ema.average.tensors.items():
        assert torch.equal(tensor, before[name])
    moments += list(train(model, ema, 3))
    check(ema, recurrence(start, iter(moments)))


def test_resume_by_the_state_of_the_average_is_exact() -> None:
    """What half-precision files cannot do."""
    whole, halves = Detector(), Detector()
    halves.load_state_dict(whole.state_dict())
    ema = ModelEMA(whole)
    for _ in train(whole, ema, 9):
        pass
    one = ModelEMA(halves)
    random = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    for step in range(9):
        if step == 4:
            state = copy.deepcopy(one.average.state_dict())
            one = ModelEMA(halves)
            one.average.load_state_dict(state)
            assert one.updates == 4
        train_step(halves, images(), random)
        one.update(halves)
    assert one.updates == ema.updates == 9
    for name in ("head.weight", "backbone.weight"):
        assert torch.equal(one.ema.state_dict()[name], ema.ema.state_dict()[name])


def test_the_report_tells_what_the_updates_before_have_made() -> None:
    """Memory after `updates = n` is that of n updates which were really made."""
    model = Detector()
    real, told = ModelEMA(model, 0.99, tau=20), ModelEMA(model, 0.99, tau=20)
    for _ in range(300):
        real.update(model)
    told.updates = 300
    ours, theirs = told.average.report(), real.average.report()
    assert ours.mean_age == pytest.approx(theirs.mean_age, rel=1e-9)
    assert ours.noise_window == pytest.approx(theirs.noise_window, rel=1e-9)
    assert ours.initial_weight == pytest.approx(theirs.initial_weight, rel=1e-9)
    assert ours.stall_gap == pytest.approx(theirs.stall_gap, rel=1e-9)
    assert ours.updates == theirs.updates == 300
    assert ModelEMA(model, 0.99, tau=20, updates=300).average.report() == ours


# ── the rest of the surface ──────────────────────────────────────────────────────────────────────


def test_decay_is_the_function_of_the_original() -> None:
    """0 at the start, decay (1 - exp(-updates / tau)) after."""
    ema = ModelEMA(Detector())
    assert ema.decay(0) == 0.0
    for updates in (1, 2000, 100_000):
        assert ema.decay(updates) == pytest.approx(DECAY * (1 - math.exp(-updates / TAU)))


@pytest.mark.parametrize("updates", [-1, 1.5, True, "3"])
def test_a_counter_that_counts_nothing_is_refused(updates: Any) -> None:
    """At construction and by assignment, with nothing changed."""
    model = Detector()
    with pytest.raises(polyak.ArgumentError, match="updates must be a whole number"):
        ModelEMA(model, updates=updates)
    ema = ModelEMA(model, updates=5)
    with pytest.raises(polyak.ArgumentError, match="updates must be a whole number"):
        ema.updates = updates
    assert ema.updates == 5


@pytest.mark.parametrize("setting", [{"decay": 1.5}, {"decay": math.nan}, {"tau": 0}, {"tau": -1}])
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(polyak.ArgumentError):
        ModelEMA(Detector(), **setting)  # type: ignore[arg-type]


def test_what_is_no_module_is_refused() -> None:
    tensors: Any = {"w": torch.ones(2)}
    with pytest.raises(polyak.ArgumentError, match="model must be a torch"):
        ModelEMA(tensors)


def test_the_average_cannot_be_exchanged_for_another_module() -> None:
    """It would look right and never be averaged."""
    ema = ModelEMA(Detector())
    with pytest.raises(polyak.OrderError, match="Load into it"):
        ema.ema = Detector()


def test_it_stays_in_evaluation_mode_inside_a_model_that_trains() -> None:
    """A parent that calls `train()` does not wake it."""
    parent = nn.ModuleDict({"teacher": ModelEMA(Detector()).ema})
    parent.train()
    assert not parent["teacher"].training


def test_a_model_after_a_weight_normed_forward_can_be_averaged() -> None:
    """copy.deepcopy refuses it."""
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(3, 2))
    layer(torch.ones(1, 3)).sum()
    ema = ModelEMA(layer)
    ema.update(layer)
    torch.testing.assert_close(ema.ema(torch.ones(1, 3)), layer(torch.ones(1, 3)))


def test_complex_parameters_are_averaged_too() -> None:
    """They are weights; the original leaves them as they were at the start."""
    model = Complex()
    start = model.narrow.detach().clone()
    ema = ModelEMA(model, 0.5, tau=1e-3)
    with torch.no_grad():
        model.narrow.add_(2j)
    ema.update(model)
    torch.testing.assert_close(ema.ema.state_dict()["narrow"], start + 1j)


def test_update_inside_applied_is_refused() -> None:
    """The live model holds the average there."""
    model = Detector()
    ema = ModelEMA(model)
    ema.update(model)
    with ema.average.applied(), pytest.raises(polyak.OrderError):
        ema.update(model)
    assert ema.updates == 1
