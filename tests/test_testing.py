"""polyak.testing: the checks find what they are for, and polyak passes them."""

import copy
import inspect
import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak
import polyak.testing
from polyak.testing import (
    CASES,
    Answer,
    Case,
    Conformance,
    PolyakAdapter,
    ResumeError,
    check_resume,
    conformance,
)


def case(key: str) -> Case:
    return next(found for found in CASES if found.key == key)


def answers(found: Conformance) -> dict[str, Answer]:
    return {asked.key: answer for asked, answer in found.answers}


# ── conformance ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("asked", CASES, ids=lambda asked: asked.key)
def test_polyak_answers_right(asked: Case) -> None:
    """polyak has none of the failures of the field."""
    found = conformance(PolyakAdapter, cases=[asked])
    assert found.right == (asked.key,), str(found)


class Tutorial:
    """The average of many a tutorial: a dict of clones, everything averaged, by hand.

    Its failures are known from its source: bfloat16 stays bfloat16, integers pass through float32,
    names keep their prefix, nothing is checked, nothing is said.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: value.clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, value in model.state_dict().items():
            if name in self.shadow:
                mean = self.decay * self.shadow[name] + (1.0 - self.decay) * value
                self.shadow[name].copy_(mean)

    def averaged(self) -> Mapping[str, Tensor]:
        return self.shadow

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        backup = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.shadow)
        yield
        model.load_state_dict(backup)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": list(self.shadow.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        values = state.get("shadow", list(self.shadow.values()))
        self.shadow = dict(zip(self.shadow, values, strict=False))


def test_an_average_by_hand_fails_where_its_source_says() -> None:
    """Each failure of a hand-written average is found, and what it does right is called right."""
    found = conformance(Tutorial)
    assert set(found.wrong) == {
        *("A1", "A1-fp16", "A2", "B1", "B2", "B3", "B3-old"),  # its arithmetic
        *("C-inference", "D1", "D2", "D3", "D5", "D7", "D10", "I4"),  # its names, and no checks
        *("E1", "E1-interrupt", "E4"),  # no `finally`, no checks
        *("F5", "F9", "G1", "G1-inf", "G5"),
    }
    assert found.not_offered == ("A8",)
    given = answers(found)
    assert given["A1"].text == "1.0000"  # 0.999 + 0.002 is 1 in bfloat16, 2,000 times
    assert given["B2"].text == f"big is {2**53}"  # float32 has no 2^53 + 1
    assert given["D5"].text == "exchanged"
    assert given["E1"].text == "averaged weights"


class Shares(Tutorial):
    """Keeps references instead of clones."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay)
        self.shadow = dict(model.state_dict())


class Inverted(Tutorial):
    """Takes decay for 1 - decay."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, 1.0 - decay)


class Corrected(Tutorial):
    """Divides by 1 - decay^n as if it had started from zero."""

    updates = 0

    def update(self, model: nn.Module) -> None:
        super().update(model)
        self.updates += 1

    def averaged(self) -> Mapping[str, Tensor]:
        left = 1.0 - self.decay ** max(self.updates, 1)
        return {name: value / left for name, value in self.shadow.items()}


class ForgetsItsCount(Tutorial):
    """Copies on its first update, and does not save that it had one."""

    updates = 0

    def update(self, model: nn.Module) -> None:
        decay, self.decay = self.decay, self.decay if self.updates else 0.0
        super().update(model)
        self.updates, self.decay = self.updates + 1, decay


class Deaf(Tutorial):
    """Ignores the interval it is told."""

    def every(self, interval: int) -> None:
        self.interval, self.step = interval, 0

    def update(self, model: nn.Module) -> None:
        self.step = getattr(self, "step", 0) + 1
        if self.step % getattr(self, "interval", 1) == 0:
            super().update(model)


class ParametersOnce(Tutorial):
    """Holds on to the parameters it saw first, and to buffers as they were then."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay)
        self.live = dict(model.named_parameters())

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, value in self.live.items():
            self.shadow[name].copy_(self.decay * self.shadow[name] + (1.0 - self.decay) * value)


class Casts(Tutorial):
    """Makes a float of everything, and refuses another dtype."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay)
        self.shadow = {name: value.float() for name, value in self.shadow.items()}
        self.dtypes = {name: value.dtype for name, value in model.state_dict().items()}

    def update(self, model: nn.Module) -> None:
        if any(self.dtypes.get(n, v.dtype) != v.dtype for n, v in model.state_dict().items()):
            raise TypeError("another dtype")
        super().update(model)


class NoBackup(Tutorial):
    """Backs up by reference: what comes back is the average."""

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        backup = model.state_dict()
        model.load_state_dict(self.shadow)
        yield
        model.load_state_dict(backup)


class OneBackup(Tutorial):
    """Has room for one backup, which a second block overwrites, and shows the model meanwhile."""

    backup: Mapping[str, Tensor] = MappingProxyType({})

    def averaged(self) -> Mapping[str, Tensor]:
        return self.backup or self.shadow

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": list(self.averaged().values())}

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        self.backup = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.shadow)
        yield
        model.load_state_dict(self.backup)


class TakesTheModelAlong(Tutorial):
    """Saves and loads the live model too."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay)
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "model": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.model.load_state_dict(state["model"])


class Exits(Tutorial):
    """Ends the process when it cannot copy a model."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
            raise SystemExit(1)
        if any(not t.is_leaf for t in vars(model).values() if isinstance(t, Tensor)):
            raise SystemExit(1)
        super().__init__(model, decay)


class Copied(Tutorial):
    """Copies the module, in which tied weights are one tensor, and updates by name."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay)
        self.shadow = copy.deepcopy(model).state_dict()


class Exchanges(Tutorial):
    """Swaps values in place: what is done to the model in the block is done to the average."""

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        self._swap(model)
        yield
        self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        for name, value in model.state_dict().items():
            other = self.shadow[name].clone()
            self.shadow[name].copy_(value)
            value.copy_(other)


BROKEN = [
    (Shares, {"A7", "C5"}),
    (Inverted, {"A7"}),
    (Corrected, {"A10"}),
    (ForgetsItsCount, {"F1", "F2"}),
    (Deaf, {"A8"}),
    (ParametersOnce, {"D-replaced", "B5"}),
    (Casts, {"A2", "B2-bool"}),
    (NoBackup, {"E3", "E6"}),
    (OneBackup, {"E-nested", "E5"}),
    (TakesTheModelAlong, {"F6"}),
    (Exits, {"C1", "C2"}),
    (Copied, {"D9"}),
    (Exchanges, {"E5", "E11"}),
]


@pytest.mark.parametrize(("broken", "keys"), BROKEN, ids=lambda item: getattr(item, "__name__", ""))
def test_every_failure_is_found(broken: type[Tutorial], keys: set[str]) -> None:
    """A class with one more failure answers the cases about it wrong."""
    found = conformance(broken, cases=[case(key) for key in sorted(keys)])
    assert set(found.wrong) == keys, str(found)


def test_every_case_can_be_failed() -> None:
    """No case is right whatever one does: the classes above fail all of them together."""
    failed = set(conformance(Tutorial).wrong).union(*(keys for _, keys in BROKEN))
    assert failed == {found.key for found in CASES}


def test_a_tied_weight_averaged_twice_shows_its_number() -> None:
    """Two updates at decay 0.9 in place of one: 2 - 0.9^2."""
    assert answers(conformance(Copied, cases=[case("D9")]))["D9"] == Answer("1.1900", False)


def test_an_exit_is_an_answer() -> None:
    """A class that ends the process is reported, and the process goes on."""
    given = answers(conformance(Exits, cases=[case("C2")]))
    assert given["C2"] == Answer("ends the process", False)


def test_what_a_class_lacks_is_not_held_against_it() -> None:
    """Without swap, state or interval these cases are not asked, not wrong."""

    class Two:
        def __init__(self, model: nn.Module, decay: float) -> None:
            self.inner = PolyakAdapter(model, decay)

        def update(self, model: nn.Module) -> None:
            self.inner.update(model)

        def averaged(self) -> Mapping[str, Tensor]:
            return self.inner.averaged()

    found = conformance(Two)
    assert found.wrong == ()
    assert set(found.not_offered) == {
        *("A8", "D5", "D7"),
        *(key for key in answers(found) if key.startswith(("E", "F"))),
    }


def test_a_module_is_an_answer_too() -> None:
    """`averaged` may return a module, as torch's class keeps one."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    class Torch:
        def __init__(self, model: nn.Module, decay: float) -> None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

        def update(self, model: nn.Module) -> None:
            self.average.update_parameters(model)

        def averaged(self) -> nn.Module:
            return self.average.module

    found = conformance(Torch, cases=[case("A7"), case("G1")])
    assert (found.right, found.wrong) == (("A7",), ("G1",))


def test_the_table_is_plain_in_a_file_and_coloured_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Green is right, red is wrong; a file gets no codes."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    found = conformance(Tutorial, cases=[case("A1"), case("A7")], name="by hand")
    terminal, file = Terminal(), io.StringIO()
    found.show(terminal)
    found.show(file)
    assert "\033[31m✗ 1.0000\033[0m" in terminal.getvalue()
    assert "\033[32m✓ 0.4095\033[0m" in terminal.getvalue()
    assert file.getvalue() == f"{found}\n"
    assert "\033" not in file.getvalue()
    assert file.getvalue().startswith("by hand: 1 right, 1 wrong, 0 not offered\n")


def test_random_numbers_are_given_back() -> None:
    """A round of cases in the middle of a program leaves its random numbers as they were."""
    expected = torch.Generator().manual_seed(5)
    torch.manual_seed(5)
    conformance(Tutorial, cases=[case("B3")])
    assert torch.equal(torch.randn(3), torch.randn(3, generator=expected))


def test_an_interrupt_ends_the_round() -> None:
    """Ctrl-C is no answer of a class."""

    def ask(factory: object) -> Answer:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conformance(PolyakAdapter, cases=[Case("X1", "interrupted", "-", ask)])


def test_cases_must_have_keys_of_their_own() -> None:
    """Two cases with one key would answer for each other."""
    with pytest.raises(polyak.ArgumentError, match=r"keys of their own, got \['A7'\]"):
        conformance(PolyakAdapter, cases=[case("A7"), case("A7")])


# ── check_resume ─────────────────────────────────────────────────────────────────────────────────


class Loop:
    """A small run whose random state and average are saved with it."""

    saved: tuple[str, ...] = ("model", "optimizer", "average", "random")

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.average = polyak.Average(self.model, polyak.Exponential(half_life=3))
        self.average.follow(self.optimizer, every=2)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(torch.randn(4, 2)).square().sum().backward()
            self.optimizer.step()

    def outcome(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "average": self.average.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        everything = {
            **self.outcome(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        return {name: everything[name] for name in self.saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("model", "optimizer", "average"):
            if name in state:
                getattr(self, name).load_state_dict(state[name])
        if "random" in state:
            torch.set_rng_state(state["random"])


def test_the_message_of_the_docs_is_what_is_said() -> None:
    """docs/regressions.md quotes what a loop without its optimizer in the checkpoint gets."""
    page = Path(__file__).parent.parent / "docs" / "regressions.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {"__name__": "__docs__", "torch": torch}
    exec(blocks[1], names)

    def state_dict(self: Any) -> dict[str, Any]:
        fresh = torch.optim.AdamW(self.model.parameters()).state_dict()
        return {**self.outcome(), "optimizer": fresh}

    forgetful = type("Forgetful", (names["Loop"],), {"state_dict": state_dict})
    with pytest.raises(ResumeError) as error:
        check_resume(forgetful)
    assert f"*{error.value}*" in page.read_text()


def test_a_loop_that_saves_everything_passes() -> None:
    """Model, optimizer, average with the phase of its interval, and random numbers."""
    check_resume(Loop, steps=8, stops=range(9))


def without(name: str) -> Callable[[], Loop]:
    """A loop that forgets to save one thing."""

    class Forgetful(Loop):
        saved = tuple(part for part in Loop.saved if part != name)

    return Forgetful


@pytest.mark.parametrize(
    ("forgotten", "message"),
    [
        ("model", r"stopped after step 3 .* got another model/0\.weight right after loading"),
        ("average", r"stopped after step 3 .* got another average/\S+ right after loading"),
        ("optimizer", r"stopped after step 3 .* got another model/\S+ after step 4\."),
        ("random", r"stopped after step 3 .* got another model/\S+ after step 4\."),
    ],
)
def test_what_is_not_saved_is_named_with_its_step(forgotten: str, message: str) -> None:
    """The message names the first tensor or number that differs, and when."""
    with pytest.raises(ResumeError, match=message) as error:
        check_resume(without(forgotten), steps=6, stops=[3])
    assert isinstance(error.value, AssertionError)
    assert isinstance(error.value, polyak.AveragingError)


def test_one_bit_is_a_difference() -> None:
    """The last bit of one element, lost in a checkpoint, is found."""

    class Rounds(Loop):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            super().load_state_dict(state)
            with torch.no_grad():
                bias = self.model.get_parameter("2.bias")
                bias.copy_(torch.nextafter(bias, torch.full_like(bias, torch.inf)))

    with pytest.raises(ResumeError, match=r"another model/2\.bias right after loading"):
        check_resume(Rounds, steps=2, stops=[1])


def test_nan_and_negative_zero_are_bits_like_others() -> None:
    """A run that ends in NaN resumes as NaN; -0.0 is another number than 0.0."""

    class Fixed:
        def __init__(self, after: float = 0.0) -> None:
            self.values = torch.tensor([torch.nan, -0.0])
            self.after = after

        def train(self, steps: int) -> None: ...

        def outcome(self) -> dict[str, Tensor]:
            return {"values": self.values}

        def state_dict(self) -> dict[str, Tensor]:
            return self.outcome()

        def load_state_dict(self, state: dict[str, Tensor]) -> None:
            self.values = state["values"] + self.after

    check_resume(lambda: Fixed(after=-0.0), steps=1)  # x + -0.0 is x, to the bit
    with pytest.raises(ResumeError, match="another values"):
        check_resume(lambda: Fixed(after=0.0), steps=1)  # -0.0 + 0.0 is 0.0


def test_a_run_that_is_never_the_same_is_refused() -> None:
    """Without a seed nothing can be compared: that is said, and not taken for a bad resume."""

    class Unseeded(Loop):
        def __init__(self) -> None:
            super().__init__()
            torch.seed()

    with pytest.raises(polyak.ArgumentError, match="Seed all random numbers inside make_run"):
        check_resume(Unseeded, steps=3, stops=[2])


def test_a_checkpoint_that_needs_code_is_refused() -> None:
    """A pickled class in the checkpoint cannot be read with weights_only=True."""

    class Pickles(Loop):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "module": self.model}

    with pytest.raises(ResumeError, match=r"must be readable by torch\.load"):
        check_resume(Pickles, steps=2, stops=[1])


@pytest.mark.parametrize(("steps", "stops"), [(0, None), (4, [5]), (4, [-1])])
def test_a_stop_outside_the_run_is_refused(steps: int, stops: list[int] | None) -> None:
    """Stops lie within the run, and the run has a step."""
    with pytest.raises(polyak.ArgumentError, match="got"):
        check_resume(Loop, steps=steps, stops=stops)


def test_random_numbers_of_the_caller_survive() -> None:
    """A check in the middle of a program leaves its random numbers as they were."""
    expected = torch.Generator().manual_seed(5)
    torch.manual_seed(5)
    check_resume(Loop, steps=2, stops=[1])
    assert torch.equal(torch.randn(3), torch.randn(3, generator=expected))


def test_every_name_of_the_room_is_documented() -> None:
    """The reference lists exactly what polyak.testing exports, and all of it says what it is."""
    page = Path(__file__).parent.parent / "docs" / "reference.md"
    listed = re.findall(r"^::: polyak\.testing\.(\w+)$", page.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(polyak.testing.__all__)
    things = [getattr(polyak.testing, name) for name in polyak.testing.__all__]
    for thing in things:
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert (thing.__doc__ or "").strip(), f"{thing} has no docstring"


def test_the_published_table_has_every_case_and_polyak_right() -> None:
    """docs/regressions.md was made with the cases that there are now."""
    page = Path(__file__).parent.parent / "docs" / "regressions.md"
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    table = {row[0].removeprefix("| "): row for row in rows}
    for asked in CASES:
        assert table[asked.key][1:3] == [asked.question, asked.expected]
        assert table[asked.key][3].startswith("✅")
