"""A whole life of an average, in any order of events, beside a slow float64 twin."""

import io
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import polyak

SCHEDULES = [
    polyak.Power(sigma_rel=0.1),
    polyak.Exponential(decay=0.9),
    polyak.Exponential(half_life=20, debias=False),
    polyak.Uniform(),
    polyak.After(5, polyak.CountRamp(0.95)),
    polyak.InverseGamma(max_decay=0.99),
]


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


class Life(RuleBasedStateMachine):
    """Training, updates, evaluation, errors, NaN, resume: the twin must agree at every moment."""

    @initialize(schedule=st.sampled_from(SCHEDULES), seed=st.integers(0, 2**20))
    def begin(self, schedule: polyak.Schedule, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.model = make_model()
        self.schedule = schedule
        self.average = polyak.Average(self.model, schedule)
        self.origin = self.now = 0
        self.twin = self.live()
        self.trained = self.snapshot()

    def live(self) -> dict[str, Tensor]:
        """The averaged tensors of the live model in float64."""
        return {n: t.double().clone() for n, t in self.tensors() if t.is_floating_point()}

    def tensors(self) -> list[tuple[str, Tensor]]:
        return [(n, t.detach()) for n, t in self.model.state_dict().items()]

    def snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.tensors()}

    @rule(scale=st.floats(0.01, 10.0))
    def train(self, scale: float) -> None:
        """Every live tensor moves, as an optimizer and a forward pass would move it."""
        for _, tensor in self.tensors():
            if tensor.is_floating_point():
                tensor.add_(scale * torch.randn(tensor.shape, generator=self.random))
            else:
                tensor.add_(1)
        self.trained = self.snapshot()

    @rule(name=st.sampled_from(["0.weight", "1.running_var", "2.bias"]), bad=st.booleans())
    def go_wrong(self, name: str, bad: bool) -> None:
        """One element of the live weights is NaN or infinite from now on, until overwritten."""
        tensor = dict(self.tensors())[name]
        tensor.view(-1)[0] = float("nan") if bad else float("inf")
        self.trained = self.snapshot()

    @rule()
    def recover(self) -> None:
        for _, tensor in self.tensors():
            if tensor.is_floating_point():
                tensor.nan_to_num_(nan=0.5, posinf=0.5, neginf=0.5)
        self.trained = self.snapshot()

    @rule(elapsed=st.integers(1, 7))
    def update(self, elapsed: int) -> None:
        self.now += elapsed
        decay = self.schedule(now=self.now - self.origin, elapsed=elapsed)
        assert self.average.update(now=self.now) == decay
        for name, live in self.live().items():
            finite = torch.isfinite(live)
            mixed = decay * self.twin[name] + (1.0 - decay) * live
            self.twin[name] = torch.where(finite, mixed, self.twin[name])

    @rule(error=st.sampled_from([None, ValueError, KeyboardInterrupt]))
    def evaluate(self, error: type[BaseException] | None) -> None:
        """Evaluation, in training mode to make it harder, which may break off."""
        expected = self.average.weights()
        try:
            with self.average.applied():
                for name, tensor in self.tensors():
                    assert torch.equal(tensor, expected[name])
                self.model(torch.randn(4, 3, generator=self.random))
                if error is not None:
                    raise error
        except (ValueError, KeyboardInterrupt) as caught:
            assert type(caught) is error  # noqa: PT017 - both kinds are expected here

    @rule(inside=st.booleans())
    def resume(self, inside: bool) -> None:
        """A checkpoint, taken in or out of a block, goes on in a new model and a new average."""
        file = io.BytesIO()
        if inside:
            with self.average.applied():
                torch.save((self.model.state_dict(), self.average.state_dict()), file)
        else:
            torch.save((self.model.state_dict(), self.average.state_dict()), file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        before: dict[str, Any] = {n: t.clone() for n, t in self.average.tensors.items()}
        self.model = make_model()
        self.model.load_state_dict(weights)
        self.average = polyak.Average(self.model, self.schedule)
        self.average.load_state_dict(state)
        assert all(torch.equal(t, before[n]) for n, t in self.average.tensors.items())

    @rule()
    def begin_again(self) -> None:
        if all(torch.isfinite(live).all() for live in self.live().values()):
            self.average.reset()
            self.origin, self.twin = self.now, self.live()

    @invariant()
    def the_twin_agrees(self) -> None:
        if not hasattr(self, "average"):
            return
        for name, tensor in self.average.tensors.items():
            assert torch.isfinite(tensor).all()
            torch.testing.assert_close(tensor.double(), self.twin[name], rtol=1e-4, atol=1e-4)

    @invariant()
    def the_trained_weights_are_there(self) -> None:
        if not hasattr(self, "trained"):
            return
        for name, tensor in self.tensors():
            assert torch.equal(tensor.nan_to_num(7.0), self.trained[name].nan_to_num(7.0)), name


def live_through(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


@pytest.mark.filterwarnings("ignore::polyak.AveragingWarning")
def test_any_order_of_events_leaves_the_average_and_the_trained_weights_right() -> None:
    """Two dozen short lives."""
    live_through(examples=24, steps=25)


@pytest.mark.prove
@pytest.mark.filterwarnings("ignore::polyak.AveragingWarning")
def test_thousands_of_events_in_any_order() -> None:
    """Some 20,000 events in 250 long lives."""
    live_through(examples=250, steps=80)
