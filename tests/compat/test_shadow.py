"""The shadow dictionary: the numbers of S2 of the systems, and no way to lose the weights."""

import gc
import io
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import polyak
from polyak.compat.shadow import EMA
from zoo import Sequence, Tied, all_frozen, bits, train_step

DECAY = 0.99


def net() -> nn.Module:
    return Sequence(one=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), two=nn.Linear(4, 2))


def batch() -> Tensor:
    return torch.randn(4, 3)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Every trainable parameter, in float64."""
    return {
        name: parameter.detach().double().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def recurrence(
    start: dict[str, Tensor], moments: list[dict[str, Tensor]], decay: float = DECAY
) -> dict[str, Tensor]:
    """S2, one line: new = (1 - decay) live + decay shadow."""
    shadow = start
    for live in moments:
        shadow = {name: (1 - decay) * live[name] + decay * shadow[name] for name in shadow}
    return shadow


def check(found: Any, expected: dict[str, Tensor]) -> None:
    """The same names, and values within 1e-6 of the largest of each tensor."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        error = float((found[name].detach().double() - value).abs().max())
        assert error <= 1e-6 * float(value.abs().max()), (name, error)


def train(model: nn.Module, ema: EMA, steps: int) -> list[dict[str, Tensor]]:
    """Random steps, an update after each; the live parameters that were folded in."""
    random = torch.Generator().manual_seed(1)
    moments = []
    for _ in range(steps):
        train_step(model, batch().to(next(model.parameters()).dtype), random)
        ema.update()
        moments.append(trainable(model))
    return moments


def test_500_steps_are_the_recurrence_through_the_whole_loop() -> None:
    """Register once, update after each step, apply before and restore after each evaluation."""
    model = net()
    ema = EMA(model, DECAY)
    assert ema.shadow == {}
    start = trainable(model)
    ema.register()
    check(ema.shadow, start)
    moments: list[dict[str, Tensor]] = []
    for _ in range(5):
        moments += train(model, ema, 100)
        trained = bits(model)
        ema.apply_shadow()
        check(dict(model.named_parameters()), recurrence(start, moments))
        check(ema.shadow, recurrence(start, moments))
        check(ema.backup, moments[-1])
        model(batch())  # batch norm in training mode moves its statistics
        ema.restore()
        assert bits(model) == trained
        assert ema.backup == {}


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_two_ends_of_the_decay(decay: float) -> None:
    """0 equals the live weights, 1 stands still."""
    model = net()
    ema = EMA(model, decay)
    ema.register()
    start = trainable(model)
    moments = train(model, ema, 3)
    for name, value in (moments[-1] if decay == 0.0 else start).items():
        assert torch.equal(ema.shadow[name].double(), value)


def test_only_trainable_parameters_are_in_the_shadow() -> None:
    """Neither buffers nor frozen parameters, and a tied weight once."""
    model = net()
    one: Any = model.get_submodule("one")
    one.requires_grad_(False)
    ema = EMA(model, DECAY)
    ema.register()
    assert set(ema.shadow) == {"norm.weight", "norm.bias", "two.weight", "two.bias"}

    tied = Tied()
    ema = EMA(tied, 0.9)
    ema.register()
    start = trainable(tied)
    with torch.no_grad():
        tied.embedding.weight.add_(1.0)
    ema.update()
    assert set(ema.shadow) == set(start)
    check(ema.shadow, recurrence(start, [trainable(tied)], 0.9))


def test_a_half_precision_model_has_a_float32_shadow() -> None:
    """In bfloat16 itself it would stand still; the model gets its own dtype back."""
    model = net().bfloat16()
    start = trainable(model)
    ema = EMA(model, DECAY)
    ema.register()
    moments = train(model, ema, 50)
    check(ema.shadow, recurrence(start, moments))
    trained = bits(model)
    ema.apply_shadow()
    expected = recurrence(start, moments)["two.weight"]
    torch.testing.assert_close(
        model.get_parameter("two.weight").double(), expected, rtol=2**-8, atol=0
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ema.restore()
    assert bits(model) == trained


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", (tmp_path / "meeting").as_uri(), world_size=1, rank=0)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_wrapped_model_has_the_names_of_the_bare_one() -> None:
    """And the parameters that are swapped are the same."""
    model = net()
    start = trainable(model)
    ema = EMA(DistributedDataParallel(model), DECAY)
    ema.register()
    moments = train(model, ema, 5)
    check(ema.shadow, recurrence(start, moments))
    ema.apply_shadow()
    check(dict(model.named_parameters()), recurrence(start, moments))
    ema.restore()


def test_an_attribute_called_module_keeps_its_name() -> None:
    model = Sequence(module=nn.Linear(3, 3))
    ema = EMA(model, DECAY)
    ema.register()
    assert set(ema.shadow) == {"module.weight", "module.bias"}


def test_nan_stays_out() -> None:
    model = net()
    ema = EMA(model, DECAY)
    ema.register()
    with torch.no_grad():
        model.get_parameter("two.weight").fill_(math.nan)
    ema.update()
    assert all(tensor.isfinite().all() for tensor in ema.shadow.values())


# ── files ────────────────────────────────────────────────────────────────────────────────────────


def saved(shadow: Any) -> Any:
    """Through a file, as `weights_only` reads it."""
    file = io.BytesIO()
    torch.save(shadow, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("registered", [False, True])
def test_a_shadow_of_the_original_goes_on_with_the_same_numbers(
    prefix: str, registered: bool
) -> None:
    """A plain dictionary of the parameters, also of a model that was wrapped."""
    model = net()
    start = {name: torch.randn(value.shape) for name, value in trainable(model).items()}
    ema = EMA(model, DECAY)
    if registered:
        ema.register()
        train(model, ema, 3)
    ema.shadow = saved({prefix + name: value for name, value in start.items()})
    check(ema.shadow, {name: value.double() for name, value in start.items()})
    assert ema.average.updates == 0
    assert ema.average.report().initial_weight == 1.0
    moments = train(model, ema, 200)
    check(ema.shadow, recurrence({n: v.double() for n, v in start.items()}, moments))


def test_its_own_shadow_is_saved_as_a_plain_dictionary() -> None:
    """The class it replaces, and one that knows nothing of polyak, can read it."""
    model = net()
    ema = EMA(model, DECAY)
    ema.register()
    train(model, ema, 5)
    loaded = saved(ema.shadow)
    assert isinstance(loaded, dict)
    assert {name: type(value) for name, value in loaded.items()} == dict.fromkeys(
        ema.shadow, Tensor
    )
    for name, value in ema.shadow.items():
        assert torch.equal(loaded[name], value)


def test_what_is_assigned_to_a_name_is_in_the_average() -> None:
    """`for name in shadow: shadow[name] = ...` is how people move and load it."""
    model = net()
    ema = EMA(model, DECAY)
    ema.register()
    for name in ema.shadow:
        ema.shadow[name] = torch.full_like(ema.shadow[name], 3.0)
    ema.shadow["two.bias"].mul_(2.0)
    tensors = ema.average.tensors
    assert float(tensors["one.weight"].min()) == 3.0
    assert float(tensors["two.bias"].min()) == 6.0


def test_a_shadow_that_does_not_fit_is_refused_and_nothing_changes() -> None:
    """Names, shapes, kinds: checked before a tensor is written."""
    model = net()
    ema = EMA(model, DECAY)
    ema.register()
    train(model, ema, 3)
    before = bits(ema.shadow)
    wrong: list[Any] = [
        {},
        {"two.weight": torch.zeros(2, 4)},
        {**ema.shadow, "more": torch.zeros(1)},
        {**ema.shadow, "two.bias": torch.zeros(3)},
        {**ema.shadow, "two.bias": [0.0, 0.0]},
    ]
    for shadow in wrong:
        with pytest.raises(polyak.AveragingError):
            ema.shadow = shadow
    with pytest.raises(polyak.MatchError, match="names and shapes"):
        ema.shadow["two.bias"] = torch.zeros(3)
    with pytest.raises(polyak.MatchError, match="names and shapes"):
        ema.shadow["new"] = torch.zeros(3)
    with pytest.raises(polyak.MatchError, match="to delete"):
        del ema.shadow["two.bias"]
    assert bits(ema.shadow) == before
    assert ema.average.updates == 3
    unregistered = EMA(model, DECAY)
    with pytest.raises(polyak.MatchError):
        unregistered.shadow = {"two.weight": torch.zeros(2, 4)}
    assert unregistered.shadow == {}


# ── calls at the wrong moment ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("act", ["update", "apply_shadow", "average"])
def test_what_needs_a_shadow_says_that_register_comes_first(act: str) -> None:
    ema = EMA(net(), DECAY)
    with pytest.raises(polyak.OrderError, match=r"register\(\) must come first"):
        getattr(ema, act)()


def test_applying_twice_does_not_lose_the_trained_weights() -> None:
    """The original keeps the averages as its backup then."""
    model = net()
    ema = EMA(model, DECAY)
    ema.register()
    train(model, ema, 3)
    trained = bits(model)
    ema.apply_shadow()
    with pytest.raises(polyak.OrderError, match="twice in a row"):
        ema.apply_shadow()
    ema.restore()
    assert bits(model) == trained


def test_restoring_without_applying_is_refused() -> None:
    model = net()
    ema = EMA(model, DECAY)
    ema.register()
    with pytest.raises(polyak.OrderError, match="restore must come after apply_shadow"):
        ema.restore()


def test_nothing_else_happens_while_it_is_applied() -> None:
    """No update of the average by itself, no start, no load."""
    model = net()
    ema = EMA(model, DECAY)
    ema.register()
    train(model, ema, 3)
    trained, shadow = bits(model), bits(ema.shadow)
    ema.apply_shadow()
    for act in (ema.update, ema.register):
        with pytest.raises(polyak.OrderError, match="inside"):
            act()
    with pytest.raises(polyak.OrderError):
        ema.shadow = dict(ema.shadow)
    with pytest.raises(polyak.OrderError):
        ema.shadow["two.bias"] = torch.zeros(2)
    ema.restore()
    assert bits(model) == trained
    assert bits(ema.shadow) == shadow
    ema.update()


def test_training_while_it_is_applied_is_reported_and_the_weights_are_back() -> None:
    """An optimizer that steps between the two calls trains the averages."""
    model = net()
    ema = EMA(model, DECAY)
    ema.register()
    train(model, ema, 3)
    trained = bits(model)
    ema.apply_shadow()
    with torch.no_grad():
        model.get_parameter("two.weight").add_(1.0)
    with pytest.raises(polyak.OrderError, match="must not change"):
        ema.restore()
    assert bits(model) == trained
    assert ema.backup == {}


def test_an_ema_that_is_dropped_while_applied_gives_the_weights_back() -> None:
    """An exception between the two calls takes the object with it."""
    model = net()
    ema = EMA(model, DECAY)
    ema.register()
    train(model, ema, 3)
    trained = bits(model)
    ema.apply_shadow()
    assert bits(model) != trained
    del ema
    gc.collect()
    assert bits(model) == trained


def test_a_process_may_end_while_it_is_applied() -> None:
    """A script that evaluates and never restores; torch must not be half gone when we do."""
    code = (
        "import torch\n"
        "from polyak.compat.shadow import EMA\n"
        "model = torch.nn.Linear(2, 1)\n"
        "ema = EMA(model, 0.9)\n"
        "ema.register()\n"
        "model.weight.data.add_(1.0)\n"
        "ema.update()\n"
        "ema.apply_shadow()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_parameters_stay_the_same_memory() -> None:
    """Compiled code and captured graphs look at addresses."""
    model = net()
    ema = EMA(model, DECAY)
    ema.register()
    train(model, ema, 3)
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    ema.apply_shadow()
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    ema.restore()
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places


def test_registering_again_starts_again() -> None:
    model = net()
    ema = EMA(model, DECAY)
    ema.register()
    train(model, ema, 10)
    ema.register()
    check(ema.shadow, trainable(model))
    assert ema.average.updates == 0


def test_a_parameter_that_was_unfrozen_is_refused() -> None:
    """It has no shadow, and the model would be a mixture."""
    model = net()
    one: Any = model.get_submodule("one")
    one.requires_grad_(False)
    ema = EMA(model, DECAY)
    ema.register()
    one.requires_grad_(True)
    for act in (ema.update, ema.register):
        with pytest.raises(polyak.MatchError, match="must stay frozen"):
            act()
    assert ema.average.updates == 0


def test_the_decay_is_fixed() -> None:
    """Assigning it has a clear answer, not a silent one."""
    ema = EMA(net(), DECAY)
    assert ema.decay == DECAY
    with pytest.raises(polyak.OrderError, match="CountRamp"):
        ema.decay = 0.5
    assert ema.decay == DECAY


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan])
def test_decays_out_of_range_are_refused(decay: float) -> None:
    with pytest.raises(polyak.ArgumentError, match="decay must be between 0 and 1"):
        EMA(net(), decay)


def test_what_has_nothing_to_average_is_refused() -> None:
    tensors: Any = {"w": torch.ones(2)}
    with pytest.raises(polyak.ArgumentError, match="model must be a torch"):
        EMA(tensors, DECAY)
    ema = EMA(all_frozen(), DECAY)
    with pytest.raises(polyak.ArgumentError, match="something to average"):
        ema.register()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_shadow_of_a_wrapped_or_compiled_model_loads(prefix: str) -> None:
    model = net()
    ema = EMA(model, DECAY)
    ema.shadow = {prefix + name: value + 1.0 for name, value in trainable(model).items()}
    check(ema.shadow, {name: value + 1.0 for name, value in trainable(model).items()})


def test_a_shadow_holds_tensors_only() -> None:
    """A list is refused by name, and nothing is written."""
    ema = EMA(net(), DECAY)
    ema.register()
    before = ema.shadow["two.bias"].clone()
    with pytest.raises(polyak.ArgumentError, match=r"list for 'two\.bias'"):
        ema.shadow["two.bias"] = [1.0, 2.0]  # type: ignore[assignment]
    assert torch.equal(ema.shadow["two.bias"], before)
