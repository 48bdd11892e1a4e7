"""The report says whether the average works and what it remembers; warnings come once."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import polyak


class Net(nn.Module):
    """Every role that a tensor can have."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 1)
        self.head.weight.requires_grad_(False)
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.again = self.body


def train(model: nn.Module) -> None:
    """Write the trainable weights as an optimizer does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)


def test_every_tensor_has_its_role_and_the_reason() -> None:
    """Who is averaged, who stays live, and why; ties once, with their other names."""
    report = polyak.Average(Net(), exclude="norm.bias").report()
    roles = {tensor.name: (tensor.role, tensor.why) for tensor in report.tensors}

    assert roles == {
        "body.weight": ("average", "trainable parameter"),
        "body.bias": ("average", "trainable parameter"),
        "norm.weight": ("average", "trainable parameter"),
        "norm.bias": ("live", "in exclude"),
        "norm.running_mean": ("average", "floating buffer"),
        "norm.running_var": ("average", "floating buffer"),
        "norm.num_batches_tracked": ("live", "int64 values cannot be averaged"),
        "head.weight": ("live", "frozen parameter"),
        "head.bias": ("average", "trainable parameter"),
        "cache": ("live", "non-persistent buffer"),
    }
    body = next(tensor for tensor in report.tensors if tensor.name == "body.weight")
    assert (body.shape, body.dtype, body.stored) == ((3, 2), "float32", "float32")
    assert body.aliases == ("again.weight",)
    for why in {why for _, why in roles.values()}:
        assert why in str(report)


def test_it_says_what_is_held() -> None:
    """Bytes of the averages only, in storage dtype: 6 + 3 + 3 + 3 + 3 + 3 + 1 numbers."""
    assert polyak.Average(Net()).report().stored_bytes == 4 * 22
    assert polyak.Average(Net(), dtype=torch.bfloat16).report().stored_bytes == 2 * 22
    assert polyak.Average(Net().bfloat16()).report().stored_bytes == 4 * 22


def test_the_distance_is_that_of_all_weights_together() -> None:
    """Norm of the difference over the norm of the live weights, in float64."""
    live = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0 + 0.0j])}
    average = polyak.Average(live)
    assert average.report().distance == 0.0

    live["a"].fill_(6.0)
    live["b"].fill_(8.0j)

    # ((6 - 3)^2 + |8i - 4|^2) / (36 + 64)
    assert average.report().distance == pytest.approx(math.sqrt((9 + 80) / 100), rel=1e-12)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_no_distance_is_given_where_there_is_none(value: float) -> None:
    """Not a NaN, and not a number that means nothing."""
    live = {"a": torch.ones(2)}
    average = polyak.Average(live)
    live["a"].fill_(value)

    assert average.report().distance is None
    assert "unknown" in str(average.report())


def test_the_distance_inside_applied_is_the_same() -> None:
    """To the trained weights, not to those that are lent."""
    model = Net()
    average = polyak.Average(model, polyak.Exponential(decay=0.9, debias=False))
    train(model)
    average.update()
    outside = average.report()

    with average.applied():
        assert average.report() == outside


def test_the_text_is_a_page_that_a_person_can_read() -> None:
    """The rule, time, memory, incidents and notes, one line each."""
    live = {"w": torch.ones(2_000)}
    average = polyak.Average(live, polyak.Exponential(half_life=100))
    for now in (1_000, 2_500):
        live["w"][0] = math.nan
        average.update(now)
    text = str(average.report())

    assert text.startswith("Exponential(half_life=100)\n")
    assert "2 (now = 2500)" in text
    assert "8,000 bytes" in text
    assert "w: 2 elements" in text
    assert "initial weight 0" in text
    assert max(len(line) for line in text.splitlines()) < 200


# ── notes ────────────────────────────────────────────────────────────────────────────────────────


def test_a_healthy_average_has_no_notes() -> None:
    """So that a note means something."""
    model = Net()
    average = polyak.Average(model)
    assert average.report().notes == ()
    for _ in range(5):
        train(model)
        average.update()

    assert average.report().notes == ()
    assert "note" not in str(average.report())


def test_a_parameter_that_is_unfrozen_later_is_reported() -> None:
    """It stays live: the note names it and says what to do."""
    model = Net()
    average = polyak.Average(model)
    model.head.weight.requires_grad_(True)

    other = Net()
    excluded = polyak.Average(other, exclude="head.*")
    other.head.weight.requires_grad_(True)
    assert excluded.report().notes == ()  # left out on purpose

    (note,) = average.report().notes

    assert "head.weight was frozen" in note
    assert "build a new average" in note
    assert note in str(average.report())
    with pytest.warns(polyak.AveragingWarning, match=r"weights: head\.weight was frozen"):
        average.weights()
    average.weights()  # once is enough


@pytest.mark.parametrize("use", ["applied", "weights", "copy_to", "save"])
def test_live_weights_that_changed_without_an_update_are_warned_of_once(
    use: str, tmp_path: Path
) -> None:
    """Training without `update` evaluates the initial weights: that costs a run."""
    model = Net()
    average = polyak.Average(model)
    train(model)

    def use_it() -> None:
        match use:
            case "applied":
                with average.applied():
                    pass
            case "weights":
                average.weights()
            case "copy_to":
                average.copy_to(Net())
            case _:
                polyak.save(average, tmp_path / "a.safetensors")

    with pytest.warns(polyak.AveragingWarning, match=r"update was never called.*update\(\)"):
        use_it()
    use_it()  # warnings are errors here: a second one would fail
    assert any("update was never called" in note for note in average.report().notes)
    average.update()
    use_it()
    assert average.report().notes == ()


def test_loading_weights_and_a_reset_are_no_reason_to_warn() -> None:
    """The average knows the new weights then."""
    model = Net()
    average = polyak.Average(model)
    train(model)

    average.reset()

    average.weights()
    assert average.report().notes == ()


def test_applied_itself_does_not_look_like_training() -> None:
    """Lending and giving back leaves nothing to warn of."""
    model = Net().train()
    average = polyak.Average(model)
    for _ in range(2):
        with average.applied():
            model.norm(torch.randn(4, 3))

    assert average.report().notes == ()


def test_a_warning_points_to_the_line_of_the_caller() -> None:
    """Not into polyak: the line to look at is the user's."""
    model = Net()
    average = polyak.Average(model)
    train(model)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        average.weights()

    assert [warning.filename for warning in caught] == [__file__]


def test_a_resumed_average_that_is_never_updated_is_warned_of() -> None:
    """Its updates of before do not excuse it."""
    model = Net()
    average = polyak.Average(model)
    average.update()
    average.load_state_dict(average.state_dict())
    train(model)  # one write could be the model's own part of the checkpoint
    train(model)

    with pytest.warns(polyak.AveragingWarning, match="update was never called"):
        average.weights()


@pytest.mark.parametrize("unit", [1, 10])
def test_a_cap_that_is_not_reached_is_reported(unit: int) -> None:
    """0.999 holds from 8990 steps on; before that every larger cap gives the same average."""
    live = {"w": torch.ones(1)}
    average = polyak.Average(live, polyak.CountRamp(0.999, unit=unit))
    average.update(8_989 * unit)
    (note,) = average.report().notes
    assert f"{8_990 * unit:,}" in note

    average.update(8_990 * unit)
    assert average.report().notes == ()


def test_two_unreached_caps_do_give_the_same_average() -> None:
    """What the note says is true: bit for bit."""
    live = {"w": torch.ones(9)}
    averages = polyak.Averages(live, {"a": polyak.CountRamp(0.999), "b": polyak.CountRamp(0.9999)})
    for _ in range(100):
        live["w"].normal_()
        averages.update()

    assert torch.equal(averages["a"].tensors["w"], averages["b"].tensors["w"])


def test_a_stalled_average_is_warned_of_once_and_reported() -> None:
    """bfloat16 swallows updates of less than 2**-8: the mean of a run stops at 256."""
    live = {"w": torch.ones(2)}
    average = polyak.Average(live, polyak.Uniform(), dtype=torch.bfloat16)
    for _ in range(256):
        average.update()
    assert average.report().notes == ()

    with pytest.warns(polyak.AveragingWarning, match="no longer moves.*wider"):
        average.update()
    average.update()  # said once: here a second warning would be an error

    assert any("no longer moves" in note for note in average.report().notes)
    live["w"].fill_(1.1)
    before = average.tensors["w"].clone()
    average.update()
    assert torch.equal(average.tensors["w"], before)


def test_a_teacher_at_decay_one_is_not_stalled() -> None:
    """It stands still on purpose."""
    live = {"w": torch.ones(2)}
    average = polyak.Average(live, polyak.Cosine(0.9, total=3), dtype=torch.bfloat16)
    for _ in range(6):
        average.update()

    assert average.report().notes == ()


def test_a_follower_that_saw_steps_but_no_update_is_reported() -> None:
    """`every` larger than the run: the note says how many steps went by."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = polyak.Average(model)
    average.follow(optimizer, every=100)
    for _ in range(3):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    assert any("3 optimizer steps" in note for note in average.report().notes)
    with pytest.warns(polyak.AveragingWarning):
        average.weights()


def test_an_average_prints_in_one_line() -> None:
    """Its rule, updates and clock."""
    average = polyak.Average({"w": torch.zeros(1)}, polyak.Uniform(), now=5)
    average.update()

    assert repr(average) == "<Average Uniform() updates=1 now=6>"
