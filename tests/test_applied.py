"""`applied()`: lends the average, and gives the trained weights back whatever happens."""

import copy
import gc
import io
import pickle
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import polyak
from polyak import _applied
from polyak._kernels import _exchange, fingerprint
from polyak._kernels._fingerprint import Bits as _Bits
from polyak._kernels._fingerprint import differing
from zoo import ZOO, Animal, Bits, bits, bits_of, tensors_of, train_step


class Interrupted(BaseException):
    """Like KeyboardInterrupt or the SystemExit of a signal handler, but nobody's but ours."""


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Parameters and buffers, some smaller and some larger than the scratch of `tiny_scratch`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).to(dtype)


def moved(model: nn.Module, *, seed: int = 1) -> None:
    """New random weights, and statistics that belong to them."""
    dtype = next(model.parameters()).dtype
    train_step(model, torch.randn(6, 3).to(dtype), torch.Generator().manual_seed(seed))


def prepared(
    dtype: torch.dtype = torch.float32, *, schedule: polyak.Schedule | None = None
) -> tuple[nn.Module, polyak.Average]:
    """A model and an average of it that differ in every tensor."""
    model = small(dtype)
    average = polyak.Average(model, schedule or polyak.Exponential(decay=0.5, debias=False))
    moved(model)
    average.update()
    moved(model, seed=2)
    return model, average


def state_of(model: nn.Module, average: polyak.Average | polyak.Window) -> tuple[Bits, Bits]:
    """Every bit of both; no view of the average outlives the call."""
    return bits(model), bits(average.tensors)


def followed(animal: Animal) -> tuple[nn.Module, polyak.Average]:
    """One of the zoo after two steps of training, and an average that followed it."""
    model = animal.build()
    average = polyak.Average(model, polyak.Exponential(decay=0.5, debias=False))
    for seed in range(2):
        train_step(model, animal.inputs(), torch.Generator().manual_seed(seed))
        average.update()
    return model, average


@pytest.fixture
def tiny_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch for eight float32 numbers: every tensor of `small` is cut or shares a piece."""
    monkeypatch.setattr(_exchange, "SCRATCH_BYTES", 32)


# ── the loan ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("tiny_scratch")
@pytest.mark.parametrize("animal", ZOO, ids=lambda animal: animal.name)
def test_tensors_larger_than_the_scratch_are_lent_whole(animal: Animal) -> None:
    """However small the scratch, the block shows `weights()` and the trained bits come back."""
    model, average = followed(animal)
    before = state_of(model, average)
    weights = {k: v for k, v in average.weights().items() if isinstance(v, Tensor)}

    with average.applied():
        lent = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
        assert bits(lent) == bits(weights)

    assert state_of(model, average) == before


@pytest.mark.usefixtures("tiny_scratch")
@pytest.mark.parametrize("animal", ZOO, ids=lambda animal: animal.name)
def test_trained_values_can_be_read_inside_the_block(animal: Animal) -> None:
    """However many places they wait in: a checkpoint has them, the report compares with them."""
    _, average = followed(animal)
    entries = {entry.name: entry for entry in average._engine.entries}
    trained = bits({name: entry.live().detach() for name, entry in entries.items()})
    distance = average.report().distance

    with average.applied():
        saved = average.state_dict()["live"]
        assert average.report().distance == distance
        loan = average._engine.loan
        assert loan is not None
        assert "nobody" not in loan.live

    assert len(saved) >= len(entries)
    assert bits({name: saved[name] for name in entries}) == trained


@pytest.mark.usefixtures("tiny_scratch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_made_inside_the_block_is_whole(how: str, dtype: torch.dtype) -> None:
    """It has the average for itself, over a model that shows it, and goes on from there."""
    model, average = prepared(dtype)
    shown = bits(average.tensors)
    file = io.BytesIO()
    with average.applied():
        both = (model, average)
        if how == "deepcopy":
            copied, one = copy.deepcopy(both)
        elif how == "pickle":
            copied, one = pickle.loads(pickle.dumps(both))
        else:
            torch.save(both, file)
            file.seek(0)
            copied, one = torch.load(file, weights_only=False)
        assert bits(copied) == bits(model)
        assert bits(one.tensors) == bits(average.tensors) == shown
    assert bits(one.tensors) == shown
    moved(copied, seed=7)
    one.update()
    with one.applied():
        assert bits(one.tensors) != shown
    assert bits(average.tensors) == shown


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_state_and_gradients_are_left_alone(dtype: torch.dtype) -> None:
    """Training goes on after a block to the same bits as without it."""

    def train(*, lend: bool) -> tuple[Bits, list[Bits]]:
        model = small(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        average = polyak.Average(model, polyak.Exponential(decay=0.5, debias=False))
        generator = torch.Generator().manual_seed(3)
        for _ in range(4):
            inputs = torch.randn(6, 3, generator=generator).to(dtype)
            model(inputs).square().mean().backward()
            if lend:
                with average.applied(), torch.no_grad():
                    model(inputs)
            optimizer.step()
            optimizer.zero_grad()
            average.update()
        return bits(model), [bits(state) for state in optimizer.state.values()]

    assert train(lend=True) == train(lend=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_and_negative_zero_come_back_as_they_were(dtype: torch.dtype) -> None:
    """Bits, not values: also those that no comparison can tell apart."""
    model = nn.Linear(2, 2).to(dtype)
    average = polyak.Average(model)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[torch.nan, -0.0], [torch.inf, -torch.nan]]))
        model.bias.view(torch.int16 if dtype == torch.float16 else torch.int32).fill_(0x7E01)
    before = state_of(model, average)

    with pytest.warns(polyak.AveragingWarning), average.applied():
        assert torch.isfinite(model.weight).all()

    assert state_of(model, average) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_built_before_the_block_gives_the_same_gradients_after_it(
    dtype: torch.dtype,
) -> None:
    """A backward pass through a forward from before the block sees the trained weights."""
    gradients = []
    for lend in (True, False):
        model, average = prepared(dtype)
        inputs = torch.linspace(-1, 1, 18).reshape(6, 3).to(dtype).requires_grad_()
        loss = model(inputs).square().mean()

        if lend:
            with average.applied(), torch.no_grad():
                model.eval()(inputs)
        loss.backward()

        assert inputs.grad is not None
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append(bits({**grads, "inputs": inputs.grad}))
        assert len(grads) == 6
    assert gradients[0] == gradients[1]


def test_training_mode_and_gradients_inside_the_block_leave_no_trace_in_values() -> None:
    """A forward and backward inside moves buffers and gradients of the block only."""
    model, average = prepared()
    before = state_of(model, average)

    with average.applied():
        for _ in range(3):
            model.train()(torch.randn(6, 3)).sum().backward()
        assert bits(model) != before[0]

    assert state_of(model, average) == before


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outside", [True, False])
def test_block_and_gradient_modes_nest_in_any_order(
    guard: Callable[[], Any], dtype: torch.dtype, outside: bool
) -> None:
    """`inference_mode` and `no_grad` around the block or inside it make no difference."""
    model, average = prepared(dtype)
    before, weights = state_of(model, average), bits(average.weights())
    first, second = (guard, average.applied) if outside else (average.applied, guard)

    with first(), second():
        assert bits(model.state_dict()) == weights
        model.train()(torch.ones(2, 3, dtype=dtype))

    assert state_of(model, average) == before
    moved(model, seed=3)
    average.update()
    assert state_of(model, average) != before
    assert not any(t.is_inference() for t in average.tensors.values())


def test_addresses_stay() -> None:
    """Compiled code and CUDA graphs that kept an address read the average, then the live values."""
    for dtype in (torch.float32, torch.bfloat16):
        model, average = prepared(dtype)
        objects = {name: id(t) for name, t in tensors_of(model).items()}
        kept = {name: (t, t.data_ptr()) for name, t in frozen_homes(model).items()}
        weights = average.weights()

        with average.applied():
            for name, (alias, address) in kept.items():
                assert tensors_of(model)[name].data_ptr() == address
                assert torch.equal(alias, weights[name])
            assert {name: id(t) for name, t in tensors_of(model).items()} == objects

        for name, (alias, address) in kept.items():
            assert tensors_of(model)[name].data_ptr() == address
            assert torch.equal(alias, tensors_of(model)[name])
        assert {name: id(t) for name, t in tensors_of(model).items()} == objects


def frozen_homes(model: nn.Module) -> dict[str, Tensor]:
    """Aliases of every tensor, as compiled code would keep them."""
    return {name: t.detach() for name, t in tensors_of(model).items()}


# ── who looks on meanwhile ───────────────────────────────────────────────────────────────────────


def _by_tensors(average: polyak.Average) -> dict[str, Callable[[], bytes]]:
    return {n: lambda t=t: bits_of(t) for n, t in average.tensors.items()}  # type: ignore[misc]


def _by_numpy(average: polyak.Average) -> dict[str, Callable[[], bytes]]:
    arrays = {n: t.numpy() for n, t in average.tensors.items()}
    return {n: lambda a=a: a.tobytes() for n, a in arrays.items()}  # type: ignore[misc]


def _by_state(average: polyak.Average) -> dict[str, Callable[[], bytes]]:
    held = average.state_dict()["averages"]["average"]["tensors"]
    return {n: lambda t=t: bits_of(t) for n, t in held.items()}  # type: ignore[misc]


def _by_row(average: polyak.Average) -> dict[str, Callable[[], bytes]]:
    held = {n: (t, t.reshape(-1)[:1]) for n, t in average.tensors.items()}
    kept = {n: part for n, (_, part) in held.items()}
    del held
    return {n: lambda t=t: bits_of(t) for n, t in kept.items()}  # type: ignore[misc]


def _by_storage(average: polyak.Average) -> dict[str, Callable[[], bytes]]:
    held = {n: t.untyped_storage() for n, t in average.tensors.items()}
    return {n: lambda s=s: bytes(s.tolist()) for n, s in held.items()}  # type: ignore[misc]


def _by_dlpack(average: polyak.Average) -> dict[str, Callable[[], bytes]]:
    tensors = {n: torch.utils.dlpack.from_dlpack(t) for n, t in average.tensors.items()}
    return {n: lambda t=t: bits_of(t) for n, t in tensors.items()}  # type: ignore[misc]


@pytest.mark.parametrize(
    "look", [_by_tensors, _by_numpy, _by_state, _by_row, _by_storage, _by_dlpack]
)
@pytest.mark.parametrize("updates_between", [0, 2])
def test_what_was_handed_out_never_shows_live_weights(
    look: Callable[[polyak.Average], dict[str, Callable[[], bytes]]], updates_between: int
) -> None:
    """A view, an array or a state taken before the block shows the average inside it too."""
    model, average = prepared()
    views = look(average)
    for seed in range(updates_between):
        moved(model, seed=seed + 5)
        average.update()
    moved(model, seed=9)
    before = {name: read() for name, read in views.items()}
    weights = bits(average.weights())

    with average.applied():
        assert bits(model.state_dict()) == weights
        assert {name: read() for name, read in views.items()} == before

    assert {name: read() for name, read in views.items()} == before


def test_views_taken_inside_the_block_show_the_average_after_it() -> None:
    """`tensors`, `weights()` and `state_dict()` taken inside hold the average, then and later."""
    model, average = prepared()
    expected = bits(average.tensors)
    full = bits(average.weights())

    with average.applied():
        tensors, weights = dict(average.tensors), average.weights()
        saved = average.state_dict()["averages"]["average"]["tensors"]
        assert bits(tensors) == expected
    moved(model, seed=4)

    assert bits(tensors) == expected
    assert bits(saved) == expected
    assert bits(weights) == full


def test_report_inside_the_block_speaks_of_the_average_and_of_the_trained_weights() -> None:
    """Distance and roles are the same inside as outside."""
    _, average = prepared()
    outside = average.report()

    with average.applied():
        inside = average.report()

    assert inside.distance == pytest.approx(outside.distance, rel=1e-12)
    assert inside.tensors == outside.tensors


def test_members_lend_their_own_values_and_the_others_stay_readable() -> None:
    """Inside the block of one member, `weights()` and `tensors` of another are its own."""
    model = small()
    averages = polyak.Averages(
        model,
        {"a": polyak.Uniform(), "b": polyak.Exponential(decay=0.9, debias=False)},
    )
    for seed in range(3):
        moved(model, seed=seed)
        averages.update()
    expected = {name: bits(member.weights()) for name, member in averages.items()}
    before = bits(model)
    assert expected["a"] != expected["b"]

    for name, member in averages.items():
        with member.applied():
            assert bits(model.state_dict()) == expected[name]
            assert {n: bits(m.weights()) for n, m in averages.items()} == expected
            assert {n: bits(m.tensors)["0.weight"] for n, m in averages.items()} == {
                n: values["0.weight"] for n, values in expected.items()
            }
        assert bits(model) == before


@pytest.mark.parametrize("between", ["update", "reset"])
def test_block_made_early_lends_the_average_as_it_is_on_entry(between: str) -> None:
    """`applied()` may be called ahead of the `with`: what counts is the moment of entry."""
    for build in (polyak.Average, lambda model: polyak.Window(model, k=2)):
        model = small()
        average = build(model)
        moved(model)
        average.update()
        block = average.applied()
        for seed in (3, 4):
            moved(model, seed=seed)
            average.update()
        if between == "reset":
            average.reset()
        weights = bits(average.weights())

        with block:
            assert bits(model.state_dict()) == weights


# ── whatever happens ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_trained_weights_come_back_when_the_block_raises(
    dtype: torch.dtype, error: type[BaseException]
) -> None:
    """An exception or an interrupt inside goes through, and every bit is back."""
    model, average = prepared(dtype)
    before = state_of(model, average)

    def evaluate() -> None:
        with average.applied():
            assert bits(model) != before[0]
            raise error

    with pytest.raises(error):
        evaluate()

    assert state_of(model, average) == before
    with average.applied():
        assert bits(model) != before[0]
    assert state_of(model, average) == before


def test_trained_weights_come_back_when_a_generator_with_the_block_is_dropped() -> None:
    """Leaving a loop over a generator that evaluates inside the block ends the loan."""
    model, average = prepared()
    before = state_of(model, average)

    def evaluations() -> Iterator[int]:
        with average.applied():
            yield 1
            yield 2

    for _ in evaluations():
        break

    assert state_of(model, average) == before


class Breaker:
    """Raises at the chosen copies that anybody makes, before, after or in the middle of them."""

    def __init__(self, patch: pytest.MonkeyPatch, how: str, error: type[BaseException]) -> None:
        self.how, self.error = how, error
        self.at: tuple[int, ...] = ()
        self.calls = 0
        self._foreach, self._copy = torch._foreach_copy_, Tensor.copy_
        self._clone = Tensor.clone
        patch.setattr(torch, "_foreach_copy_", self._many)
        patch.setattr(Tensor, "copy_", lambda *a, **k: self._one(*a, **k))
        patch.setattr(Tensor, "clone", lambda *a, **k: self._fresh(*a, **k))

    def arm(self, *at: int) -> None:
        """Raise at these calls, counted from now."""
        self.at, self.calls = at, 0

    def _due(self) -> bool:
        self.calls += 1
        return self.calls in self.at

    def _many(self, targets: list[Tensor], sources: list[Tensor], *args: Any) -> None:
        if not self._due():
            self._foreach(targets, sources, *args)
            return
        if self.how == "after":
            self._foreach(targets, sources, *args)
        elif self.how == "half":
            for target, source in list(zip(targets, sources, strict=True))[::2]:
                self._copy(target[: len(target) // 2 + 1], source[: len(source) // 2 + 1])
                del target, source
        del targets, sources  # a frame of torch itself would keep no tensors alive either
        raise self.error

    def _one(self, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._due():
            return self._copy(target, *args, **kwargs)
        if self.how == "after":
            self._copy(target, *args, **kwargs)
        elif self.how == "half":
            source = args[0].expand_as(target)
            half = (slice(0, target.shape[0] // 2),) if target.dim() else ()
            self._copy(target[half], source[half])
        raise self.error

    def _fresh(self, source: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._due():
            raise self.error
        return self._clone(source, *args, **kwargs)


def breaks(average: polyak.Average, error: type[BaseException]) -> bool:
    """Whether a block raises `error`; nobody keeps its traceback."""
    try:
        with average.applied():
            pass
    except error:
        return True
    return False


HOWS = pytest.mark.parametrize("how", ["before", "half", "after"])
ERRORS = pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupted, RuntimeError])


@pytest.mark.usefixtures("tiny_scratch")
@HOWS
@ERRORS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_trained_weights_come_back_when_any_copy_breaks(
    dtype: torch.dtype, error: type[BaseException], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error at any copy, on the way in or on the way back, costs neither side a bit."""
    model, average = prepared(dtype)
    before = state_of(model, average)
    breaker = Breaker(monkeypatch, how, error)
    breaker.arm()
    with average.applied():
        entered = breaker.calls
    points = breaker.calls
    # float32 and float64: two or three copies a piece each way and one clone, two copies a buffer;
    # bfloat16: a clone and two copies for each of 6 parameters and 2 buffers, and a clone and one
    # copy for the counter, which is not lent.
    assert points >= (26 if dtype == torch.bfloat16 else 30)
    assert 0 < entered < points

    for at in range(1, points + 1):
        breaker.arm(at)
        assert breaks(average, error)
        breaker.arm()
        assert state_of(model, average) == before, f"broken at copy {at} of {points}"
        assert not average.report().notes
    moved(model, seed=4)
    average.update()


@pytest.mark.usefixtures("tiny_scratch")
@HOWS
@pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_weights_come_back_when_the_way_back_is_interrupted_too(
    dtype: torch.dtype, error: type[BaseException], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tired user presses Ctrl-C twice: at any copy, and at any later one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(dtype)
    average = polyak.Average(model, polyak.Exponential(decay=0.5, debias=False))
    moved(model)
    average.update()
    moved(model, seed=2)
    before = state_of(model, average)
    breaker = Breaker(monkeypatch, how, error)
    breaker.arm()
    with average.applied():
        pass
    points = breaker.calls

    for first in range(1, points + 1):
        for second in range(first + 1, first + points + 1):
            breaker.arm(first, second)
            assert breaks(average, error)
            reached = breaker.calls >= second
            breaker.arm()
            assert state_of(model, average) == before, f"broken at copies {first} and {second}"
            if not reached:
                break


@pytest.mark.usefixtures("tiny_scratch")
@HOWS
@pytest.mark.parametrize("sizes", [[20], [3, 24, 5, 8, 17, 0], [8, 8, 8], [1, 2, 3]])
def test_an_exchange_knows_at_any_copy_where_the_live_values_are(
    sizes: list[int], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads them when a way in or back was broken off gets all of them, and no other."""
    numbers = torch.arange(2.0 * sum(sizes))
    live, averages = (list(half.split(sizes)) for half in numbers.clone().chunk(2))
    expected = [tensor.tolist() for tensor in live]
    breaker = Breaker(monkeypatch, how, Interrupted)
    exchange = _exchange.Exchange(list(zip(live, averages, strict=True)))

    def found() -> list[list[float]]:
        parts = [exchange.waiting(pair) for pair in range(len(sizes))]
        return [[x for part in some for x in part.tolist()] for some in parts]

    for step in (exchange.do, exchange.undo):
        at = 0
        while True:
            at += 1
            breaker.arm(at)
            try:
                step()
            except Interrupted:
                assert found() == expected, at
                if step == exchange.do:
                    breaker.arm()
                    exchange.undo()
                    assert torch.equal(torch.cat([*live, *averages]), numbers)
            else:
                break
        assert found() == expected
    assert torch.equal(torch.cat([*live, *averages]), numbers)


def test_large_pieces_take_two_copies_each_way_and_small_ones_three(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 20 numbers two pieces fill the scratch of eight; the other four go with the next three."""
    monkeypatch.setattr(_exchange, "SCRATCH_BYTES", 32)
    live, averages = [[torch.ones(20), torch.ones(3)] for _ in range(2)]
    exchange = _exchange.Exchange(list(zip(live, averages, strict=True)))
    breaker = Breaker(monkeypatch, "before", Interrupted)
    for way in (exchange.do, exchange.undo):
        breaker.arm()
        way()
        assert breaker.calls == 2 * 2 + 3 + 4, "and four tensors too short for sums are cloned"


def test_a_block_that_nobody_enters_is_warned_of() -> None:
    """It lends nothing: without the word `with` the trained weights would be evaluated."""
    _, average = prepared()
    with pytest.warns(polyak.AveragingWarning, match=r"Write: with average\.applied\(\)") as caught:
        average.applied()
    assert caught[0].filename == __file__

    @average.applied()
    def evaluate() -> None:
        assert average._engine.loan is not None

    evaluate()
    evaluate()
    with ExitStack() as stack:
        stack.enter_context(average.applied())
    assert average._engine.loan is None


def test_one_element_of_complex_numbers_with_gaps_is_lent() -> None:
    """torch calls it contiguous, whatever its stride."""
    live = {"w": torch.zeros(3, dtype=torch.complex128)[1::2]}
    average = polyak.Average(live, polyak.Exponential(decay=0.5, debias=False))
    live["w"].fill_(2j)
    average.update()
    with average.applied():
        assert live["w"].item() == 1j
    assert live["w"].item() == 2j


@contextmanager
def interrupted_at(call: int) -> Iterator[list[str]]:
    """Raise KeyboardInterrupt at the n-th entry into a function of polyak, as a signal would."""
    entered: list[str] = []

    def trace(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and "polyak" in frame.f_globals.get("__name__", ""):
            entered.append(frame.f_code.co_name)
            if len(entered) == call:
                raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield entered
    finally:
        sys.settrace(before)


@pytest.mark.usefixtures("tiny_scratch")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # never entered
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_weights_come_back_from_an_interrupt_at_any_call_of_ours(
    dtype: torch.dtype,
) -> None:
    """Python delivers signals when a function is entered: none of these moments is unguarded."""
    model, average = prepared(dtype)
    before = state_of(model, average)
    points = 0

    while True:
        points += 1
        try:
            with interrupted_at(points) as entered, average.applied():
                pass
        except KeyboardInterrupt:
            assert state_of(model, average) == before, f"interrupted in {entered[-1]}"
        else:
            break

    assert points > 50
    assert "take_back" in entered


@contextmanager
def interrupted_at_line(line: int, names: set[str]) -> Iterator[list[str]]:
    """Raise KeyboardInterrupt before the n-th line that is run in functions of these names."""
    passed: list[str] = []

    def in_lines(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            passed.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            if len(passed) == line:
                raise KeyboardInterrupt
        return in_lines

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        ours = "polyak" in frame.f_globals.get("__name__", "")
        return in_lines if ours and frame.f_code.co_name in names else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield passed
    finally:
        sys.settrace(before)


WAY_BACK = {
    "_restore",
    "undo",
    "_look",
    "sums",
    "end_loan",
    "_look_for_changes",
    "written",
    "differing",
    "forget",
}


@pytest.mark.usefixtures("tiny_scratch")
def test_an_unseen_write_is_found_through_an_interrupt_at_any_line_of_the_way_back() -> None:
    """The trained weights are back, the interrupt is not lost, and the average is not trusted."""
    points = 0
    while True:
        points += 1
        model, average = prepared()
        before = bits(model)
        block = average.applied()
        block.__enter__()
        _first(model).weight.data[0, 0] += 1.0
        try:
            with interrupted_at_line(points, WAY_BACK) as passed:
                block.__exit__(None, None, None)
        except KeyboardInterrupt:
            where = passed[points - 1]
        except polyak.OrderError:
            break
        assert bits(model) == before, where
        with pytest.raises(polyak.OrderError, match="was changed inside"):
            average.update()
    assert points > 100


@pytest.mark.parametrize("fails", ["sums", "differing"])
def test_a_fingerprint_that_cannot_be_taken_costs_no_trained_weight(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory in the evaluation and again on the way back: the average is lost, no more."""
    model, average = prepared()
    before = bits(model)

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("none left")

    def evaluate() -> None:
        with average.applied():
            target = _exchange._Piece if fails == "sums" else _exchange
            monkeypatch.setattr(target, fails, no_memory)

    with pytest.raises((polyak.OrderError, torch.OutOfMemoryError)):
        evaluate()

    assert bits(model) == before
    with pytest.raises(polyak.OrderError, match="was changed inside"):
        average.update()


def test_a_block_may_end_outside_of_the_inference_mode_that_it_began_in() -> None:
    """Hooks that enter before an evaluation and leave after it are under modes of their own."""
    model, average = prepared()
    before = bits(model)
    block = average.applied()
    with torch.inference_mode():
        block.__enter__()
    block.__exit__(None, None, None)
    assert bits(model) == before
    average.update()


# ── what must not happen inside ──────────────────────────────────────────────────────────────────


def _update(average: polyak.Average, model: nn.Module) -> None:
    average.update()


def _reset(average: polyak.Average, model: nn.Module) -> None:
    average.reset()


def _load(average: polyak.Average, model: nn.Module) -> None:
    average.load_state_dict(average.state_dict())


def _copy_to_live(average: polyak.Average, model: nn.Module) -> None:
    average.copy_to(model)


def _apply(average: polyak.Average, model: nn.Module) -> None:
    with average.applied():
        pytest.fail("entered twice")


FORBIDDEN = pytest.mark.parametrize("action", [_update, _reset, _load, _copy_to_live, _apply])


@FORBIDDEN
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whose", ["same", "other", "members", "window", "named"])
def test_order_is_kept_inside_the_block(
    action: Callable[[polyak.Average, nn.Module], None], dtype: torch.dtype, whose: str
) -> None:
    """While weights are lent nobody averages, resets, loads or lends them, through any average."""
    model, average = prepared(dtype)
    builds: dict[str, Callable[[], Any]] = {
        "same": lambda: average,
        "other": lambda: polyak.Average(model),
        "members": lambda: polyak.Averages(model, {"a": polyak.Uniform()}),
        "window": lambda: polyak.Window(model, k=2),
        "named": lambda: polyak.Average(dict(model.named_parameters())),
    }
    other = builds[whose]()
    if whose == "members" and action in (_copy_to_live, _apply):
        other = other["a"]
    if action is _copy_to_live and whose == "named":
        pytest.skip("named parameters do not make a module's full set")
    now, updates = other.now, other.updates
    before = state_of(model, average)
    inside = bits(average.weights())

    with average.applied():
        with pytest.raises(polyak.OrderError, match=r"outside applied|Leave the block"):
            action(other, model)
        assert bits(model.state_dict()) == inside

    assert state_of(model, average) == before
    assert (other.now, other.updates) == (now, updates)


def test_another_model_may_be_lent_inside_the_block() -> None:
    """Blocks over different models nest: a generator and a discriminator are evaluated together."""
    (one, average), (two, other) = prepared(), prepared()
    before = state_of(one, average), state_of(two, other)

    with average.applied():
        lent = bits(one)
        with other.applied():
            pass
        moved(two, seed=5)
        other.update()
        assert bits(one) == lent

    assert state_of(one, average) == before[0]
    assert state_of(two, other) != before[1]


def test_optimizer_step_inside_the_block_is_refused_when_following() -> None:
    """A step inside would train the averaged weights: it raises before it writes anything."""
    model, average = prepared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    follower = average.follow(optimizer)
    model(torch.randn(6, 3)).sum().backward()
    before, updates = state_of(model, average), average.updates

    with pytest.raises(polyak.OrderError, match="optimizer step"), average.applied():
        optimizer.step()

    assert state_of(model, average) == before
    assert average.updates == updates
    optimizer.step()
    assert average.updates == updates + 1
    follower.remove()


def test_optimizer_step_is_refused_inside_the_block_of_another_average_of_the_model() -> None:
    """The follower of one average guards the model while another has lent to it."""
    model, average = prepared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    polyak.Average(model).follow(optimizer)
    model(torch.randn(6, 3)).sum().backward()
    before = state_of(model, average)

    with pytest.raises(polyak.OrderError, match="optimizer step"), average.applied():
        optimizer.step()

    assert state_of(model, average) == before


# ── parameters that change inside ────────────────────────────────────────────────────────────────


def _first(model: nn.Module) -> nn.Linear:
    return next(m for m in model.modules() if isinstance(m, nn.Linear))


def _write(model: nn.Module) -> None:
    with torch.no_grad():
        _first(model).weight.mul_(100.0)


def _write_in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        _first(model).weight.mul_(100.0)


def _write_a_view(model: nn.Module) -> None:
    _first(model).weight.detach()[0].zero_()


def _load_weights(model: nn.Module) -> None:
    model.load_state_dict(model.state_dict())


def _step(model: nn.Module) -> None:
    loss: Tensor = model(torch.randn(6, 3).to(_first(model).weight.dtype)).sum()
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def _scale_data(model: nn.Module) -> None:
    _first(model).weight.data.mul_(100.0)  # no version counter sees this


def _flip_data(model: nn.Module) -> None:
    weight = _first(model).weight.data
    weight.copy_(weight.flip(0))


def _write_numpy(model: nn.Module) -> None:
    _first(model).bias.detach().numpy()[2] += 1.0


def _swap_data(model: nn.Module) -> None:
    _first(model).weight.data = torch.full((5, 3), 7.0, dtype=_first(model).weight.dtype)


def _replace(model: nn.Module) -> None:
    _first(model).weight = nn.Parameter(torch.full((5, 3), 7.0, dtype=_first(model).weight.dtype))


def _assign(model: nn.Module) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def _remove(model: nn.Module) -> None:
    del _first(model).weight


def _cast(model: nn.Module) -> None:
    model.double()


def _swap_and_write(model: nn.Module) -> None:
    _swap_data(model)
    _write(model)


WRITES = [_write, _write_in_inference_mode, _write_a_view, _load_weights, _step]
UNCOUNTED = [_scale_data, _flip_data, _write_numpy]
MOVES = [_swap_data, _replace, _assign, _remove, _cast]


@pytest.mark.parametrize("change", [*WRITES, *MOVES, _swap_and_write])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("raising", [False, True])
def test_trained_weights_come_back_when_a_parameter_is_changed_inside(
    change: Callable[[nn.Module], None], dtype: torch.dtype, raising: bool
) -> None:
    """Written, moved, cast, replaced or removed: the trained bits and objects are back."""
    model, average = prepared(dtype)
    before = bits(model)
    objects = {name: id(t) for name, t in tensors_of(model).items()}
    homes = {name: t.data_ptr() for name, t in tensors_of(model).items()}

    def evaluate() -> None:
        with average.applied():
            change(model)
            if raising:
                raise ValueError("theirs")

    with pytest.raises(ValueError if raising else polyak.OrderError) as caught:
        evaluate()

    said = caught.value.__notes__ if raising else [str(caught.value)]
    assert any("must not change inside applied" in words for words in said)

    assert bits(model) == before
    assert {name: id(t) for name, t in tensors_of(model).items()} == objects
    assert {name: t.data_ptr() for name, t in tensors_of(model).items()} == homes


@pytest.mark.parametrize("change", [*WRITES, *UNCOUNTED])
def test_average_written_inside_the_block_is_lost_and_refused(
    change: Callable[[nn.Module], None],
) -> None:
    """In shared memory the average was overwritten: each use says so until it is whole again."""
    model, average = prepared()
    saved = copy.deepcopy(average.state_dict())
    whole = bits(average.tensors)
    with pytest.raises(polyak.OrderError, match="lost"), average.applied():
        change(model)

    uses: list[Callable[[], object]] = [
        average.update,
        average.weights,
        lambda: average.tensors,
        average.state_dict,
        lambda: average.copy_to(small()),
        lambda: average.applied().__enter__(),
    ]
    for use in uses:
        with pytest.raises(polyak.OrderError, match=r"reset"):
            use()
    assert any("lost" in note for note in average.report().notes)

    average.load_state_dict(saved)
    assert bits(average.tensors) == whole
    with average.applied():
        pass
    assert not average.report().notes


@pytest.mark.parametrize("size", [3, 300, 8_000])
@pytest.mark.parametrize("place", [0, 1_023, 1_024, 4_111, 4_112, 8_999])
def test_one_number_written_unseen_is_found_wherever_it_lies(
    place: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any piece of a tensor that is exchanged by pieces; its neighbours are not blamed."""
    monkeypatch.setattr(_exchange, "CACHE_BYTES", 4 * 4_112)
    live = {"before": torch.ones(size), "it": torch.randn(9_000), "after": torch.ones(size)}
    average = polyak.Average(live, polyak.Exponential(decay=0.5, debias=False))
    before = {name: tensor.clone() for name, tensor in live.items()}

    def write() -> None:
        with average.applied():
            live["it"].data[place] += 1.0

    with pytest.raises(polyak.OrderError, match=r"1 changed: \['it'\]"):
        write()
    for name, tensor in live.items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("size", [1, 7, 495, 500, 4_000, 4_017, 30_001])
def test_each_bit_shows_in_the_fingerprint(dtype: torch.dtype, offset: int, size: int) -> None:
    """A changed bit, and two values that change places, at whatever address they begin."""
    generator = torch.Generator().manual_seed(size)
    bits = torch.randint(0, 127, (size + offset, dtype.itemsize), generator=generator)
    tensor = bits.to(torch.uint8).view(dtype).view(-1)[offset:]
    before = fingerprint(tensor)
    assert torch.equal(fingerprint(tensor), before)
    data = tensor.view(torch.uint8)
    for place in {0, data.numel() // 2, data.numel() - 1}:
        data[place] ^= 1
        assert not torch.equal(fingerprint(tensor), before)
        data[place] ^= 1
    if data.numel() > 9:
        data[0], data[9] = 200, 201
        before = fingerprint(tensor)
        data[0], data[9] = 201, 200
        assert not torch.equal(fingerprint(tensor), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("offset", range(4))
@pytest.mark.parametrize("size", [1, 3, 4_017, 30_001])
def test_each_bit_shows_in_the_sums_wherever_the_memory_begins(
    dtype: torch.dtype, offset: int, size: int
) -> None:
    """Also in front of the first address that is a multiple of eight, and behind the last."""
    tensor = torch.zeros((size + offset) * dtype.itemsize, dtype=torch.uint8).view(dtype)[offset:]
    bits, data = _Bits(tensor), tensor.view(torch.uint8)
    before = bits.sums()
    for place in {*range(min(9, data.numel())), *range(max(0, data.numel() - 9), data.numel())}:
        data[place] ^= 1
        assert differing([before], [bits.sums()]) == [0], place
        data[place] ^= 1
    assert differing([before], [bits.sums()]) == []


@pytest.mark.parametrize("width", [31, 251, 256, 257, 514, 768, 1_024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_that_change_places_and_signs_show_in_the_fingerprint(
    dtype: torch.dtype, width: int
) -> None:
    """At widths that layers have: spectra of 512, powers of two, and those of our own columns."""
    tensor = torch.randn(24, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = fingerprint(tensor)
    assert not torch.equal(fingerprint(-tensor), before)
    for other in range(1, 24):
        far = tensor[[other, *range(1, other), 0, *range(other + 1, 24)]]
        if other * width * dtype.itemsize % (8 * 251) and other * width * dtype.itemsize % (8 * 31):
            assert not torch.equal(fingerprint(far), before), other


def test_the_same_values_have_the_same_fingerprint_wherever_they_begin() -> None:
    """Ranks compare theirs, and may hold their weights at other offsets."""
    memory = torch.randn(5_001)
    moved_on = torch.cat([memory[:1], memory])
    assert torch.equal(fingerprint(moved_on[1:]), fingerprint(memory))
    assert torch.equal(fingerprint(moved_on[1:][2:]), fingerprint(memory[2:]))


def test_one_kind_that_differs_is_enough() -> None:
    """Sums are compared by device and dtype; the first that agree do not speak for the rest."""
    one, other = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    groups = [[one], [other], [one, other]]
    assert differing(groups, [[t.clone() for t in group] for group in groups]) == []
    assert differing(groups, [[one], [other + 1], [one, other]]) == [1]
    assert differing(groups, [[one + 1], [other], [one, other + 1]]) == [0, 2]
    assert differing(groups, [[one], [], [one, other]]) == [1]


@pytest.mark.parametrize("change", UNCOUNTED)
def test_uncounted_write_costs_nothing_where_no_memory_is_shared(
    change: Callable[[nn.Module], None],
) -> None:
    """What no counter sees is undone with the rest when live and average lie apart."""
    model, average = prepared()
    view = average.tensors
    before = bits(model), bits(view)

    with average.applied():
        change(model)

    assert (bits(model), bits(view)) == before


def test_reset_makes_a_lost_average_whole() -> None:
    """`reset()` starts again from the trained weights, and the average can be used."""
    model, average = prepared()
    with pytest.raises(polyak.OrderError, match="lost"), average.applied():
        _write(model)

    average.reset()

    assert bits(average.weights()) == bits(model.state_dict())
    moved(model, seed=5)
    average.update()
    with average.applied():
        pass


@pytest.mark.parametrize("change", [*WRITES, *MOVES])
def test_average_in_memory_of_its_own_is_whole_whatever_was_written(
    change: Callable[[nn.Module], None],
) -> None:
    """Where live and average share no memory (bfloat16 live), a write inside costs nothing."""
    model, average = prepared(torch.bfloat16)
    before = bits(average.tensors)

    with pytest.raises(polyak.OrderError, match="the average is whole"), average.applied():
        change(model)

    assert bits(average.tensors) == before
    average.update()


@pytest.mark.parametrize("change", MOVES)
def test_moved_parameters_do_not_cost_the_average(change: Callable[[nn.Module], None]) -> None:
    """Nothing was written where the average lay, so nothing is lost."""
    model, average = prepared()
    before = bits(average.tensors)

    with pytest.raises(polyak.OrderError, match="the average is whole"), average.applied():
        change(model)

    assert bits(average.tensors) == before
    average.update()


def test_average_that_somebody_holds_survives_a_write_inside_the_block() -> None:
    """A view that was handed out keeps the average in its own memory, so it cannot be lost."""
    model, average = prepared()
    view = average.tensors
    before = bits(view)

    with pytest.raises(polyak.OrderError, match="the average is whole"), average.applied():
        _write(model)

    assert bits(view) == before
    average.update()


def test_write_inside_the_block_of_one_member_leaves_the_others_whole() -> None:
    """Only the average that was lent can be lost."""
    model = small()
    averages = polyak.Averages(model, {"a": polyak.Uniform(), "b": polyak.Power(gamma=3.0)})
    moved(model)
    averages.update()
    other = bits(averages["b"].weights())

    with pytest.raises(polyak.OrderError, match="lost"), averages["a"].applied():
        _write(model)

    assert bits(averages["b"].weights()) == other
    with averages["b"].applied():
        pass
    with pytest.raises(polyak.OrderError, match="reset"):
        averages.update()
    averages.reset()
    moved(model, seed=4)
    averages.update()


@pytest.mark.parametrize("change", ["assign", "grow", "none"])
def test_buffers_may_change_inside_the_block(change: str) -> None:
    """Buffers are copied: written, replaced, resized or dropped inside, they come back."""
    model, average = prepared()
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm1d))
    before = state_of(model, average)
    home = norm.running_mean

    with average.applied():
        norm.running_mean = {
            "assign": torch.zeros(5),
            "grow": torch.zeros(50),
            "none": None,
        }[change]

    assert norm.running_mean is home
    assert state_of(model, average) == before


# ── what it costs ────────────────────────────────────────────────────────────────────────────────


class Allocations(TorchDispatchMode):
    """Adds up the memory that operations make, wherever it is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.seen: set[int] = set()
        self.kept: list[Any] = []  # so that no address comes twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            t.untyped_storage()._cdata
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given | self.seen:
                    self.seen.add(storage._cdata)
                    self.kept.append(storage)
                    self.bytes += storage.nbytes()
        return result


def _forty_megabytes(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], int]:
    live = {f"w{i}": torch.zeros(1_250_000, dtype=torch.float32).to(dtype) for i in range(8)}
    return live, sum(t.numel() * t.element_size() for t in live.values())


def test_block_costs_a_bounded_scratch() -> None:
    """Lending 40 MB of float32 takes 1 MiB of scratch, not a copy of the model."""
    live, size = _forty_megabytes()
    average = polyak.Average(live)
    average.update()
    assert size == 40_000_000

    with Allocations() as made, average.applied():
        pass

    assert 0 < made.bytes <= 2**20 + size // 40  # scratch, and fingerprints


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("each", [1_000, 10_000, 1_000_000])
def test_fingerprints_are_a_small_part_of_what_is_lent(each: int, first: int) -> None:
    """Whatever the size of the tensors, and the address at which they begin."""
    live = {f"w{i}": torch.zeros(each + 1)[first:] for i in range(4_000_000 // each)}
    average = polyak.Average(live)
    average.update()

    with Allocations() as made, average.applied():
        held = made.bytes

    assert held <= 2**20 + 16e6 / 3


def test_block_over_other_dtypes_costs_one_copy_of_the_live_weights() -> None:
    """bfloat16 weights of 20 MB wait in 20 MB, and no scratch is made for them."""
    live, size = _forty_megabytes(torch.bfloat16)
    average = polyak.Average(live)
    average.update()

    with Allocations() as made, average.applied():
        pass

    assert size <= made.bytes <= size + 1_000


@pytest.mark.parametrize("where", ["entry", "block", "exit"])
def test_kept_traceback_does_not_make_later_blocks_dearer(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever keeps the exception of one block (a notebook) still gets cheap blocks."""
    live, _ = _forty_megabytes()
    average = polyak.Average(live)
    average.update()

    def evaluate() -> None:
        with average.applied():
            if where == "block":
                raise ValueError("theirs")
            if where == "exit":
                live["w0"].data = torch.zeros(1_250_000)

    with monkeypatch.context() as patch:
        if where == "entry":
            Breaker(patch, "half", ValueError).arm(2)
        with pytest.raises((ValueError, polyak.OrderError)) as kept:
            evaluate()
    with Allocations() as made, average.applied():
        pass

    assert made.bytes <= 16 * 2**20
    assert kept.tb is not None


def test_kept_traceback_keeps_no_copy_of_the_weights() -> None:
    """A copy in which trained weights waited goes with the block, whoever looks at its frames."""
    live = {"w": torch.ones(12_345, dtype=torch.bfloat16)}
    average = polyak.Average(live)

    def evaluate() -> None:
        with average.applied():
            live["w"].mul_(2)

    with pytest.raises(polyak.OrderError, match="must not change") as kept:
        evaluate()

    gc.collect()
    found = [o for o in gc.get_objects() if type(o) is Tensor and o.shape == (12_345,)]
    assert {t.untyped_storage().data_ptr() for t in found if t.dtype == torch.bfloat16} == {
        live["w"].untyped_storage().data_ptr()
    }
    assert kept.tb is not None


@pytest.mark.parametrize("ends", ["well", "raises", "interrupted", "entry fails"])
def test_nothing_of_a_block_waits_for_the_garbage_collector(
    ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Views of averages that go on living would make later blocks copy what they can exchange."""
    _, average = prepared()
    blocks: list[weakref.ref[object]] = []
    build = _applied._Lender

    def built(*args: Any) -> object:
        lender = build(*args)
        blocks.append(weakref.ref(lender))
        return lender

    @contextmanager
    def another_rank_fails(*_: Any) -> Iterator[None]:
        yield
        raise ValueError("theirs")

    monkeypatch.setattr(_applied, "_Lender", built)
    if ends == "entry fails":
        monkeypatch.setattr(_applied, "agreed", another_rank_fails)
    error = {"raises": ValueError, "interrupted": KeyboardInterrupt}.get(ends)
    gc.collect()
    gc.disable()
    try:
        with suppress(ValueError, KeyboardInterrupt), average.applied():
            average.state_dict()
            if error is not None:
                raise error
        assert [block() for block in blocks] == [None]
        assert all(average._engine.alone(0))
    finally:
        gc.enable()


def test_scratch_is_given_back_after_the_block() -> None:
    """The average holds nothing after the block but its own tensors."""
    live = {"w": torch.zeros(1000)}
    average = polyak.Average(live)
    average.update()
    with Allocations() as made, average.applied():
        pass
    storages = made.kept
    assert storages

    held = [torch._C._storage_Use_Count(s._cdata) for s in storages]

    assert held == [1] * len(storages)


def test_another_module_may_take_the_average_inside_the_block() -> None:
    """Inside a block only the lent weights are out of bounds; a second module is not."""
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    average = polyak.Average(model, polyak.Exponential(decay=0.5, debias=False))
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update()
    expected = average.weights()
    with average.applied():
        average.copy_to(other)
        with pytest.raises(polyak.OrderError, match="outside applied"):
            average.copy_to(model)
    assert all(torch.equal(t, expected[n]) for n, t in other.state_dict().items())


@pytest.mark.parametrize("use", ["applied", "weights", "copy_to"])
def test_a_value_that_the_live_dtype_cannot_hold_is_refused_by_name(use: str) -> None:
    """An average of 70000 does not become infinity in a float16 model; it stays what it is."""
    live = nn.Linear(2, 2).half()
    average = polyak.Average(live, polyak.Exponential(decay=0.5, debias=False))
    state = average.state_dict()
    state["averages"]["average"]["tensors"]["bias"].fill_(70_000.0)
    average.load_state_dict(state)
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}

    def lend() -> None:
        with average.applied():
            pytest.fail("lent")

    uses: dict[str, Callable[[], object]] = {
        "applied": lend,
        "weights": average.weights,
        "copy_to": lambda: average.copy_to(nn.Linear(2, 2).half()),
    }
    with pytest.raises(polyak.ArgumentError, match=r"'bias' must fit torch.float16.*7e\+04"):
        uses[use]()
    assert average.weights(torch.bfloat16)["bias"].isfinite().all()
    assert all(torch.equal(t, before[n]) for n, t in live.state_dict().items())
    assert average.tensors["bias"].tolist() == [70_000.0, 70_000.0]
