"""What is done for speed is not seen: small averages share memory, and nothing else is shared."""

import copy
import io
import math
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import polyak
from polyak import _kernels as kernels
from polyak import _places
from polyak._kernels import _blocks, _rows
from polyak._kernels._blocks import BlockPlan
from polyak._kernels._elements import lerp_finite_
from polyak._kernels._foreach import ForeachPlan

HALF = polyak.Exponential(decay=0.5, debias=False)


def small(count: int = 6, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Named tensors of odd sizes and several layouts, each far below the size of a row."""
    generator = torch.Generator().manual_seed(count)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    shapes = [(5,), (3, 7), (), (2, 3, 4, 5), (9, 4), (1,)]
    tensors = {f"w{i}": random(*shapes[i % len(shapes)]) for i in range(count)}
    tensors["w4"] = tensors["w4"].t()
    tensors["w3"] = tensors["w3"].contiguous(memory_format=torch.channels_last)
    return tensors


def storages(tensors: dict[str, Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}


def alone(average: polyak.Average) -> polyak.Average:
    """The same average with each tensor in memory of its own."""
    row = average._engine.rows[0]
    row.tensors = [tensor.clone(memory_format=torch.preserve_format) for tensor in row.tensors]
    average._engine.drop_plans()
    return average


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────


def test_rows_hold_the_same_values_shapes_and_strides() -> None:
    """Large, empty and single ones stay as they are; a row ends where it is full."""
    tensors = [
        *small(40).values(),
        torch.ones(_rows.SMALL + 1),
        torch.ones(0),
        torch.ones(2).half(),
    ]

    placed = kernels.side_by_side(tensors, [tensor.dtype for tensor in tensors])

    for before, after in zip(tensors, placed, strict=True):
        assert torch.equal(before, after)
        assert (before.shape, before.stride()) == (after.shape, after.stride())
    assert all(before is after for before, after in zip(tensors[-3:], placed[-3:], strict=True))
    assert len(storages(dict(enumerate(placed[:-3])))) == 1  # type: ignore[arg-type]


def test_a_row_is_never_longer_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what a view that somebody keeps, or saves, can cost."""
    monkeypatch.setattr(_rows, "ROW", 100)
    placed = kernels.side_by_side([torch.ones(30) for _ in range(10)], [torch.float32] * 10)
    assert [len({t.untyped_storage().nbytes() for t in placed}), len(placed)] == [2, 10]
    assert max(tensor.untyped_storage().nbytes() for tensor in placed) <= 4 * 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("stored", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_side_by_side_or_alone_the_bits_are_the_same(
    dtype: torch.dtype, stored: torch.dtype | None, rounding: polyak._engine.Rounding
) -> None:
    """Also with NaN and inf in some, which send their row to the exact path, and count there."""
    live = small(dtype=dtype)
    together = polyak.Average(live, HALF, dtype=stored, rounding=rounding)
    apart = alone(polyak.Average(live, HALF, dtype=stored, rounding=rounding))

    for step in range(4):
        for tensor in live.values():
            tensor.mul_(1.25).add_(step)
        kept = {name: tensor.clone() for name, tensor in live.items()}
        if step == 2:
            live["w0"][0] = math.inf
            live["w1"][1, 2:4] = math.nan
            live["w5"][0] = -math.inf
        together.update()
        apart.update()
        for name, tensor in live.items():
            tensor.copy_(kept[name])

    for name, tensor in together.tensors.items():
        assert torch.equal(tensor, apart.tensors[name]), name
    counts = {"w0": 1, "w1": 2, "w5": 1}
    assert together.report().nonfinite == apart.report().nonfinite == counts


@pytest.mark.parametrize("live_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skipped", [None, 0.0, 1.0])
def test_a_row_with_nan_is_mixed_as_one(
    dtype: torch.dtype, live_dtype: torch.dtype, skipped: float | None
) -> None:
    """For several averages, some of which copy or stand still: the bits of those kept apart."""
    live = [tensor.to(live_dtype) for tensor in small(20).values()]
    for slot in (0, 7, 19):
        live[slot].view(-1)[-1] = math.nan
    rows = [[torch.full_like(x, value, dtype=dtype) for x in live] for value in (1.0, 2.0, -3e38)]
    rows[2][7].view(-1)[-1] = math.inf
    live[9].view(-1)[0] = rows[2][9].view(-1)[0] = math.inf  # no incident for the last of them
    apart = [[tensor.clone() for tensor in row] for row in rows]
    placed = [kernels.side_by_side(row, [live_dtype] * len(row)) for row in rows]
    skip = None if skipped is None else torch.tensor(skipped)
    plan = BlockPlan(placed, live, set())
    assert next(stretch.is_row for stretch in plan._stretches(guard=True))

    counts = plan.mix_([0.0, 1.0, 0.25], guard=True, skip=skip)
    expected = BlockPlan(apart, live, set()).mix_([0.0, 1.0, 0.25], guard=True, skip=skip)

    assert counts is not None
    assert expected is not None
    found = [int(slot in (0, 7, 9, 19)) for slot in range(20)]
    assert counts.tolist() == expected.tolist() == found
    for row, others in zip(placed, apart, strict=True):
        assert all(map(torch.equal, row, others))


def test_a_row_with_nan_costs_no_call_for_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand of them would wait for every one that is not even touched."""
    live = small(30)
    average = polyak.Average(live, HALF)
    average.update()
    live["w7"][0] = math.nan
    calls: list[int] = []

    def counted(average: Tensor, live: Tensor, weight: float) -> Tensor:
        calls.append(live.numel())
        return lerp_finite_(average, live, weight)

    monkeypatch.setattr(_blocks, "lerp_finite_", counted)
    average.update()

    assert len(calls) == 1
    assert average.report().nonfinite == {"w7": 7}


def test_a_small_model_is_one_read_one_check_and_one_mix() -> None:
    """As long as nothing is wrong with it; a mask of infinities is left out of that."""
    live = {**small(5), "mask": torch.tensor([0.0, -math.inf])}
    average = polyak.Average(live, HALF)
    average.update()

    assert average._engine._cached is not None
    [group] = average._engine._cached.groups
    plan = group.plan

    assert isinstance(plan, BlockPlan)
    assert [len(stretch.blocks) for stretch in plan._joined[True]] == [5]
    assert [block.slot for block in plan._loose] == [5]
    assert average.tensors["mask"].tolist() == [0.0, -math.inf]


def test_a_healed_average_joins_its_row() -> None:
    """A model built with NaN takes the exact path for one update, not for the run."""
    live = {"a": torch.ones(3), "b": torch.tensor([math.nan, 1.0]), "c": torch.ones(2)}
    average = polyak.Average(live, HALF)
    live["b"].fill_(4.0)

    for _ in range(2):
        average.update()
    plan = average._engine._plans(average._engine.rows)[0].plan

    assert isinstance(plan, BlockPlan)
    assert [[block.slot for block in stretch.blocks] for stretch in plan._joined[True]] == [
        [0, 1, 2]
    ]
    assert average.tensors["b"].tolist() == [4.0, 3.25]


# ── what is noticed at every update ──────────────────────────────────────────────────────────────


def set_data(model: nn.Linear, data: Tensor) -> None:
    model.weight.data = data


@pytest.mark.parametrize(
    ("swap", "expected"),
    [
        (lambda m: set_data(m, torch.full((3, 3), 8.0)), torch.full((3, 3), 4.0)),
        (lambda m: set_data(m, m.weight.data.t()), torch.arange(9.0).view(3, 3).t() / 2),
        (lambda m: set_data(m, m.weight.data.double()), torch.arange(9.0).view(3, 3) / 2),
    ],
    ids=["other memory", "the same memory, transposed", "cast"],
)
def test_data_that_was_swapped_is_what_is_averaged(
    swap: Callable[[nn.Linear], None], expected: Tensor
) -> None:
    """In a row of small tensors, after plans were made, at the very next update."""
    model = nn.Linear(3, 3)
    nn.init.zeros_(model.weight)
    average = polyak.Average(model, HALF)
    average.update()
    with torch.no_grad():
        model.weight.copy_(torch.arange(9.0).view(3, 3))
    swap(model)

    average.update()

    assert torch.equal(average.tensors["weight"], expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: set_data(m, m.weight.data[:2]),
        lambda m: set_data(m, m.weight.data.view(9, 1)),
        lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach())),
        lambda m: m.register_parameter("weight", None),
        lambda m: m.add_module("more", nn.Linear(1, 1)),
        lambda m: m.register_buffer("more", torch.zeros(1)),
    ],
    ids=["cut", "reshaped", "replaced", "removed", "grown", "one more buffer"],
)
def test_what_no_longer_fits_is_refused_before_anything_moves(
    change: Callable[[nn.Linear], None],
) -> None:
    """A tensor that begins at the same address as before is no exception."""
    model = nn.Linear(3, 3)
    average = polyak.Average(model, HALF)
    average.update()
    before = average._engine.rows[0].tensors[0].clone()
    model.weight.data.add_(1.0)
    change(model)

    with pytest.raises(polyak.MatchError):
        average.update()

    assert torch.equal(average._engine.rows[0].tensors[0], before)
    assert average.updates == 1


# ── who holds a view ─────────────────────────────────────────────────────────────────────────────


def test_one_view_of_a_row_keeps_all_of_it_from_being_exchanged() -> None:
    """It shows the average inside `applied()`, and so do views of its neighbours."""
    live = small()
    average = polyak.Average(live, HALF)
    for tensor in live.values():
        tensor.add_(2.0)
    average.update()
    held = average.tensors["w3"]
    expected = {name: tensor.clone() for name, tensor in average.tensors.items()}
    trained = {name: tensor.clone() for name, tensor in live.items()}

    with average.applied():
        assert all(torch.equal(tensor, expected[name]) for name, tensor in live.items())
        assert torch.equal(held, expected["w3"])

    assert all(torch.equal(tensor, trained[name]) for name, tensor in live.items())
    assert all(torch.equal(t, expected[name]) for name, t in average.tensors.items())


def test_rows_that_nobody_looks_at_are_exchanged() -> None:
    """After each update again: what the kernels keep does not count as somebody looking."""
    average = polyak.Average(small(), HALF)
    for _ in range(2):
        average.update()
        address = average._engine.rows[0].tensors[0].data_ptr()
        with average.applied():
            assert average._engine.loan is not None
            lent = average._engine.loan.tensors
            assert all(tensor.data_ptr() != address for tensor in lent)


def test_a_saved_state_is_no_larger_for_the_rows() -> None:
    """Views of one row are written once; one of them alone brings at most its row."""

    def size(saved: object) -> int:
        file = io.BytesIO()
        torch.save(saved, file)
        return file.tell()

    live = {f"w{i}": torch.ones(2_000) for i in range(20)}
    average = polyak.Average(live, HALF)
    state = average.state_dict()
    tensors = state["averages"]["average"]["tensors"]

    assert size(tensors) <= size({name: tensor.clone() for name, tensor in tensors.items()})
    assert size(tensors["w3"]) <= 4 * _rows.ROW + 2_000


# ── nothing is allocated ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("live_dtype", [torch.float32, torch.bfloat16])
def test_scratch_is_made_once(live_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is read goes through memory that is kept from update to update."""
    monkeypatch.setattr(_blocks, "BLOCK", 1 << 14)
    live = {**small(dtype=live_dtype), "large": torch.ones(40_000, dtype=live_dtype)}
    average = polyak.Average(live, HALF)
    average.update()
    plan = average._engine._plans(average._engine.rows)[0].plan
    assert isinstance(plan, BlockPlan)

    read = [stretch.read() for stretch in plan._joined[True]]

    owned = {t.untyped_storage().data_ptr() for t in live.values()}
    scratch = {t.untyped_storage().data_ptr() for t in read} - owned
    assert len(scratch) == 1
    assert max(tensor.untyped_storage().nbytes() for tensor in read) <= 4 * 40_000


# ── what shared memory must not change ───────────────────────────────────────────────────────────


def test_view_of_a_copied_average_goes_on_showing_it_inside_a_block() -> None:
    """Who holds memory is counted in a copy as in the first: a viewer is noticed, no viewer too."""
    live = {"a": torch.ones(3), "b": torch.ones(3)}
    first = polyak.Average(live, HALF)
    first.update()
    average, model = copy.deepcopy((first, live))
    for tensor in model.values():
        tensor.fill_(3.0)
    average.update()
    with average.applied():
        exchanged = torch.equal(average._engine.rows[0].tensors[0], torch.full((3,), 3.0))
    view = average.tensors["a"]
    expected = view.clone()

    with average.applied():
        assert torch.equal(view, expected)

    assert exchanged
    assert not torch.equal(expected, model["a"])


def test_layer_replaced_after_its_parent_was_given_another_dict_is_noticed() -> None:
    """`del model[2:]` gives a Sequential a new dict of children, whatever it deletes."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    average = polyak.Average(model)
    average.update()
    del model[2:]
    model[0] = nn.Linear(2, 2)

    with pytest.raises(polyak.MatchError, match=r"0\.weight"):
        average.update()


def test_parameters_of_a_module_given_another_state_are_noticed() -> None:
    """`__setstate__` exchanges the dict that the parameters hang in."""
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    average = polyak.Average(model)
    average.update()
    model.__setstate__(dict(other.__dict__))

    with pytest.raises(polyak.MatchError, match="weight"):
        average.update()


def test_averaged_module_can_be_written_by_others(tmp_path: Path) -> None:
    """Writers that take one memory for one tensor find each tensor in its own; ties stay."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    average = polyak.Average(model)
    shown = average.module()
    state = shown.state_dict()
    places = {name: tensor.untyped_storage().data_ptr() for name, tensor in state.items()}

    save_model(shown, str(tmp_path / "shown.safetensors"))

    assert places["0.weight"] == places["1.weight"]
    assert len(set(places.values())) == len(state) - 1
    for name, tensor in load_file(tmp_path / "shown.safetensors").items():
        assert torch.equal(tensor, average.weights()[name])


def test_live_memory_that_moves_under_its_storage_is_seen() -> None:
    """Another address, though the storage is the same object: new views are cut."""
    live = {"a": torch.ones(4), "b": torch.ones(4)}
    average = polyak.Average(live, polyak.Exponential(decay=0.5, debias=False))
    average.update()
    before = average._engine._cached
    live["a"].share_memory_()
    live["a"].fill_(3.0)

    average.update()

    assert average._engine._cached is not before
    assert average.tensors["a"].tolist() == [2.0] * 4


def test_live_memory_that_was_freed_is_refused() -> None:
    """Not read: the average is as it was, and goes on when the values are back."""
    live = {"a": torch.ones(4), "b": torch.ones(4)}
    average = polyak.Average(live)
    average.update()
    live["a"].untyped_storage().resize_(0)

    with pytest.raises(polyak.MatchError, match="freed"):
        average.update()

    live["a"].untyped_storage().resize_(16)
    live["a"].fill_(2.0)
    average.update()
    assert average.updates == 2


def test_default_device_of_the_caller_does_not_matter() -> None:
    """Scratch is where the tensors are."""
    live = {"a": torch.ones(4), "b": torch.ones(4)}
    average = polyak.Average(live)

    with torch.device("meta"):
        average.update()

    assert average.tensors["a"].tolist() == [1.0] * 4


def test_weights_of_two_dtypes_are_read_in_two_stretches() -> None:
    """bfloat16 weights with float32 norms between them: each kind adjoins its own."""
    live = {
        str(i): torch.ones(8, dtype=torch.bfloat16 if i % 2 else torch.float32) for i in range(20)
    }
    average = polyak.Average(live)
    average.update()

    plan = average._engine._plans(average._engine.rows)[0].plan
    assert isinstance(plan, BlockPlan)
    assert len(plan._joined[True]) == 2


# ── where the live weights are ───────────────────────────────────────────────────────────────────


def _not_said(*_: object) -> bool:
    raise NotImplementedError


@pytest.fixture(params=["guards", "other guards", "no guards", "nothing"])
def way_of_asking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the guards of torch.compile, and as on a torch or a device that has none."""
    if request.param == "other guards":
        monkeypatch.setattr(_places, "TensorGuards", lambda: None)
    elif request.param != "guards":
        monkeypatch.setattr(_places, "TensorGuards", None)
    if request.param == "nothing":
        monkeypatch.setattr(Tensor, "is_set_to", _not_said)


@pytest.mark.usefixtures("way_of_asking")
def test_other_strides_of_the_same_memory_are_seen() -> None:
    """Same object, address, shape and size: only the order of the elements is another."""
    model = nn.Linear(2, 2, bias=False)
    average = polyak.Average(model, HALF)
    nn.init.zeros_(model.weight)
    for _ in range(60):
        average.update()
    model.weight.data.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    model.weight.data = model.weight.data.t()

    average.update()

    assert torch.allclose(average.tensors["weight"], torch.tensor([[0.5, 1.5], [1.0, 2.0]]))


@pytest.mark.usefixtures("way_of_asking")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.view(2, 8), "keep its shape"),
        (lambda t: t.view(torch.int32), "stay floating point"),
        (lambda t: t[:2], "keep its shape"),
    ],
    ids=["shape", "dtype", "length"],
)
def test_other_meanings_of_the_same_memory_are_refused(
    change: Callable[[Tensor], Tensor], words: str
) -> None:
    """The address is the same, and what lies there is not what was averaged."""
    parameter = nn.Parameter(torch.ones(4, 4))
    average = polyak.Average({"w": parameter})
    average.update()
    average.update()
    parameter.requires_grad_(False).data = change(parameter.data)

    with pytest.raises(polyak.MatchError, match=words):
        average.update()
    assert average.updates == 2


@pytest.mark.usefixtures("way_of_asking")
@pytest.mark.parametrize("leave", ["freed", "moved"])
def test_an_address_that_another_tensor_gets_is_no_proof(leave: str) -> None:
    """Memory freed or moved under our views, and new values at the very place where it was."""
    parameter = nn.Parameter(torch.zeros(1_000))
    average = polyak.Average({"w": parameter}, HALF)
    average.update()
    average.update()
    address = parameter.data_ptr()
    if leave == "freed":
        parameter.data.untyped_storage().resize_(0)
    else:
        parameter.data.share_memory_()
    kept = []
    for _ in range(200):
        kept.append(torch.empty(1_000))
        if kept[-1].data_ptr() == address:
            break
    parameter.data = kept[-1].fill_(8.0)

    average.update()

    assert average.tensors["w"].unique().tolist() == [4.0]


def test_a_mode_that_refuses_all_operations_costs_nothing() -> None:
    """It refuses before anything is marked as half done: the next update is as ever."""
    model = nn.Linear(2, 2)
    average = polyak.Average(model, HALF)
    for _ in range(3):
        average.update()

    with pytest.raises(Exception, match=r"[Ff]ake"), FakeTensorMode():
        average.update()

    average.update()
    assert average.updates == 4


def test_guards_that_always_say_no_are_not_made_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for one tensor under two names; the slow answer is right, too."""
    made = []

    class Never:
        def __init__(self, *_: object, **__: object) -> None:
            made.append(self)

        def check(self, *_: object) -> bool:
            return False

    monkeypatch.setattr(_places, "TensorGuards", Never)
    average = polyak.Average({"w": torch.ones(3)}, HALF)
    for _ in range(10):
        average.update()
    assert len(made) == 4


@pytest.mark.usefixtures("way_of_asking")
def test_frozen_weights_are_where_they_were() -> None:
    """`requires_grad` and the mode of autograd say nothing about memory: no view is cut anew."""
    model = nn.Linear(3, 2)
    average = polyak.Average(model, HALF)
    average.update()
    before = average._engine._cached
    assert before is not None

    model.requires_grad_(False)
    average.update()
    with torch.no_grad():
        average.update()
    with torch.inference_mode():
        average.update()

    assert average._engine._cached is before


def _replaced(model: nn.Sequential) -> None:
    del model[1:]
    model[0] = nn.Linear(2, 2)


def _given_another_state(model: nn.Sequential) -> None:
    model[0].__setstate__(dict(nn.Linear(2, 2).__dict__))


def _given_other_children(model: nn.Sequential) -> None:
    model._modules = dict(nn.Sequential(nn.Linear(2, 2), nn.Tanh())._modules)


def _given_one_more(model: nn.Sequential) -> None:
    model[0].register_parameter("more", nn.Parameter(torch.ones(1)))


def _given_a_buffer(model: nn.Sequential) -> None:
    model[0].register_buffer("more", torch.ones(1))


@pytest.mark.parametrize("copied", ["not", "deepcopy", "pickle"])
@pytest.mark.parametrize(
    "change",
    [_replaced, _given_another_state, _given_other_children, _given_one_more, _given_a_buffer],
)
def test_other_tensors_in_the_modules_are_noticed_in_copies_too(
    change: Callable[[nn.Sequential], None], copied: str
) -> None:
    """At the next update, and not only in the original."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    average = polyak.Average(model, HALF)
    for _ in range(3):
        average.update()
    if copied == "deepcopy":
        model, average = copy.deepcopy((model, average))
    elif copied == "pickle":
        model, average = pickle.loads(pickle.dumps((model, average)))
    for _ in range(2):
        average.update()
    change(model)

    with pytest.raises(polyak.MatchError):
        average.update()


def test_a_copied_average_looks_at_its_own_weights() -> None:
    """Views and addresses of the original do not come along."""
    model = nn.Linear(2, 2)
    average = polyak.Average(model, HALF)
    average.update()
    average.update()
    twin, twin_average = copy.deepcopy((model, average))
    before = average.tensors["weight"].clone()
    nn.init.zeros_(twin.weight)

    twin_average.update()

    assert torch.equal(twin_average.tensors["weight"], before / 2)
    assert torch.equal(average.tensors["weight"], before)


# ── large tensors ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ],
)
def test_without_the_guard_large_tensors_stay_whole(
    dtype: torch.dtype, stored: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless they are converted on the way; the bits are those of blocks."""
    monkeypatch.setattr(_blocks, "BLOCK", 10_000)
    monkeypatch.setattr(_blocks, "CONVERTED", 9_000)
    generator = torch.Generator().manual_seed(0)
    live = {
        name: torch.randn(size, generator=generator).to(dtype)
        for name, size in (("a", 27_000), ("b", 7), ("c", 8_500), ("d", 3))
    }
    guarded = polyak.Average(live, HALF, dtype=stored)
    bare = polyak.Average(live, HALF, dtype=stored, nonfinite="ignore")
    for tensor in live.values():
        tensor.mul_(-3.0)

    guarded.update()
    bare.update()

    for name, tensor in bare.tensors.items():
        assert torch.equal(tensor, guarded.tensors[name]), name
    plan = bare._engine._plans(bare._engine.rows)[0].plan
    assert isinstance(plan, BlockPlan)
    sizes = [[block.live.numel() for block in stretch.blocks] for stretch in plan._joined[False]]
    large = [[27_000]] if dtype == torch.float32 and stored is None else [[9_000]] * 3
    assert sizes == [*large, [8_500], [7, 3]]
    assert list(plan._joined) == [False], "nothing was prepared for the guard"


def test_several_averages_share_what_is_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block: whole tensors would be read from memory once for each average."""
    monkeypatch.setattr(_blocks, "BLOCK", 10_000)
    live = {"a": torch.zeros(25_000)}
    rules = {"short": HALF, "long": polyak.Exponential(decay=0.75, debias=False)}
    averages = polyak.Averages(live, rules, nonfinite="ignore")
    live["a"].fill_(1.0)

    averages.update()

    engine = averages["short"]._engine
    plan = engine._plans(engine.rows)[0].plan
    assert isinstance(plan, BlockPlan)
    assert [stretch.blocks[0].live.numel() for stretch in plan._joined[False]] == [
        10_000,
        10_000,
        5_000,
    ]
    assert averages["short"].tensors["a"].unique().tolist() == [0.5]
    assert averages["long"].tensors["a"].unique().tolist() == [0.25]


# ── what is replaced again and again ────────────────────────────────────────────────────────────


class Restless(nn.Module):
    """Weights, and buffers of which some are replaced at every step, as many modules do."""

    mean: Tensor | None
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 2) for _ in range(4))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("fixed", torch.ones(2, dtype=torch.float64))
        self.number = 0

    @torch.no_grad()
    def step(self, *, replace: bool) -> None:
        self.number += 1
        for parameter in self.parameters():
            parameter.add_(self.number)
        assert self.mean is not None
        if replace:
            self.mean, self.scale = self.mean + self.number, self.scale * 2.0
        else:
            self.mean += self.number
            self.scale *= 2.0


@pytest.mark.parametrize("moves", ["replaced", "data"])
@pytest.mark.parametrize("size", [1, 20_000])
def test_what_is_replaced_again_and_again_leaves_the_other_views(moves: str, size: int) -> None:
    """From the second time on only its own views are cut, and the averages are as ever."""
    live = {f"w{i}": torch.full((3,), float(i)) for i in range(6)}
    live["restless"] = torch.zeros(size)
    average = polyak.Average(live, HALF)
    expected = {name: tensor.double() for name, tensor in live.items()}
    kept: list[object] = []

    for step in range(1, 9):
        for tensor in live.values():
            tensor.add_(step)
        if moves == "replaced":
            live["restless"] = live["restless"] * 2.0
        else:
            live["restless"].data = live["restless"] * 2.0
        average.update()
        plans = average._engine._cached
        assert plans is not None
        kept.append(plans.groups[0].plan)
        for name, tensor in live.items():
            expected[name] = (expected[name] + tensor) / 2

    assert len({id(plan) for plan in kept[:3]}) == 3, "nobody knows yet"
    assert len({id(plan) for plan in kept[3:]}) == 1
    for name, tensor in average.tensors.items():
        assert torch.allclose(tensor.double(), expected[name], rtol=1e-6), name


def test_replaced_or_written_in_place_the_bits_are_the_same() -> None:
    """Also where a block, a report or a saved state looks in between."""
    one, other = Restless(), Restless()
    other.load_state_dict(one.state_dict())
    replaced, written = polyak.Average(one, HALF), polyak.Average(other, HALF)

    for number in range(10):
        for model, average in ((one, replaced), (other, written)):
            model.step(replace=model is one)
            average.update()
            if number == 6:
                trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                with average.applied():
                    shown = model.state_dict()
                    for name, tensor in average.tensors.items():
                        assert torch.equal(shown[name], tensor), name
                for name, tensor in model.state_dict().items():
                    assert torch.equal(tensor, trained[name]), name
        assert written.report().updates == replaced.report().updates == number + 1

    for name, tensor in written.tensors.items():
        assert torch.equal(tensor, replaced.tensors[name]), name


def test_a_view_keeps_its_average_from_being_exchanged_beside_restless_buffers() -> None:
    """Views that were cut anew are not taken for somebody who looks, and who looks is seen."""
    model = Restless()
    average = polyak.Average(model, HALF)
    for _ in range(6):
        model.step(replace=True)
        average.update()
    slot = average._engine.slots["layers.0.weight"]
    address = average._engine.rows[0].tensors[slot].data_ptr()

    def values_are_elsewhere() -> bool:
        with average.applied():
            assert average._engine.loan is not None
            return average._engine.loan.tensors[slot].data_ptr() != address

    assert values_are_elsewhere()
    model.step(replace=True)
    average.update()
    held = average.tensors
    assert not values_are_elsewhere()
    assert held["mean"].shape == (3,)


@pytest.mark.parametrize("views", range(1, 12))
def test_views_are_seen_when_the_kernels_need_fewer_for_what_has_healed(views: int) -> None:
    """As many as were counted, some of them somebody else's: a number alone proves nothing."""
    live = {name: torch.ones(3) for name in ("a", "b", "c", "d")}
    for name in ("b", "c"):
        live[name][0] = math.nan
    average = polyak.Average(live, HALF)
    for tensor in live.values():
        tensor.fill_(3.0)
    average.update()
    held = [average.tensors["a"] for _ in range(views)]
    before = held[0].clone()
    with average.applied():
        assert all(torch.equal(tensor, before) for tensor in held)


@pytest.mark.parametrize("views", range(1, 8))
def test_views_are_seen_however_many_the_kernels_give_up(views: int) -> None:
    """In another order of memory they need fewer than were counted, and others hold as many."""
    live = {"a": torch.ones(3), "restless": torch.ones(30, 40)}
    average = polyak.Average(live, HALF)
    for step in range(6):
        live["restless"] = live["restless"] + 1.0
        live["a"] += 1.0
        if step == 5:
            live["restless"] = live["restless"].t().contiguous().t()
        average.update()
    held = [average.tensors["a"] for _ in range(views)]
    before = held[0].clone()
    with average.applied():
        assert all(torch.equal(tensor, before) for tensor in held)


def test_a_restless_buffer_that_no_longer_fits_is_refused_before_anything_moves() -> None:
    """Another shape, another kind, none at all, or the memory of the average itself."""
    model = Restless()
    average = polyak.Average(model, HALF)
    for _ in range(5):
        model.step(replace=True)
        average.update()
    before = {name: tensor.clone() for name, tensor in average.tensors.items()}
    good = model.mean
    assert good is not None
    misfits: tuple[Tensor | None, ...]
    misfits = (torch.zeros(4), torch.zeros(3, dtype=torch.int64), None, average.tensors["mean"])
    for misfit in misfits:
        model.mean = misfit
        with pytest.raises(polyak.MatchError):
            average.update()
        assert average.updates == 5
    del misfits, misfit
    model.mean = good
    for name, tensor in average.tensors.items():
        assert torch.equal(tensor, before[name]), name
    average.update()
    model.double()
    average.update()
    assert average.updates == 7
    assert torch.equal(average.tensors["mean"], before["mean"] / 4 + good.float() * 0.75)


def test_what_was_replaced_is_let_go() -> None:
    """Only the newest of them is alive, or a run would keep one model too many."""
    live = {"a": torch.ones(3), "restless": torch.ones(4)}
    average = polyak.Average(live, HALF)
    generations: list[weakref.ref[Tensor]] = []
    for _ in range(8):
        live["restless"] = live["restless"] + 1.0
        generations.append(weakref.ref(live["restless"]))
        average.update()
    assert [one() is not None for one in generations] == [False] * 7 + [True]


def test_the_memory_of_an_average_that_was_moved_is_still_its_own() -> None:
    """Whoever holds a view may move what lies under it; to average it into itself is refused."""
    live = {"a": torch.ones(3), "restless": torch.ones(20_000)}
    average = polyak.Average(live, HALF)
    for _ in range(5):
        live["restless"] = live["restless"] + 1.0
        average.update()
    view = average.tensors["restless"]
    view.share_memory_()
    live["restless"] = view
    with pytest.raises(polyak.MatchError, match="memory of their own"):
        average.update()


@pytest.mark.parametrize("part", ["all", "layer"])
def test_a_cast_there_and_back_makes_nothing_restless(part: str) -> None:
    """Moves at every update do; so the views of a model that was cast once stay afterwards."""
    model = Restless()
    average = polyak.Average(model, HALF)
    cast = model if part == "all" else model.layers[0]
    average.update()
    for dtype in (torch.bfloat16, torch.float32):
        cast.to(dtype)
        average.update()
        if part == "layer":
            average.update()  # what moves at two updates running, beside others that stay, is
    assert average._engine._restless == set()


@pytest.mark.parametrize("restless", [False, True])
def test_what_has_healed_is_not_suspected_again(restless: bool) -> None:
    """Of two dtypes, beside others and replaced at each step: blocks keep the views then."""
    live = {"a": torch.ones(3, dtype=torch.float64), "b": torch.ones(2), "c": torch.ones(4)}
    live["a"][0], live["c"][1] = math.nan, math.nan
    average = polyak.Average(live, HALF)
    for step in range(6):
        if restless:
            live["c"] = torch.full((4,), float(step))
        else:
            live["c"].fill_(step)
        live["a"].fill_(step)
        average.update()
        if step > 2 and not restless:
            assert all(average._engine.alone(0))
            assert average._engine._cached is not None, "counted, not dropped"
        elif step == 2:
            average._engine.drop_plans()
    assert average._engine._suspects == set()
    # The first update heals with 0; elsewhere the 1 of the beginning has been halved six times.
    expected = sum(step / 2 ** (6 - step) for step in range(1, 6))
    assert average.tensors["a"].tolist() == [expected, *[1 / 64 + expected] * 2]
    assert average.tensors["c"].tolist() == [1 / 64 + expected, expected, *[1 / 64 + expected] * 2]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("views", range(1, 6))
def test_views_of_a_copy_are_seen(how: str, views: int) -> None:
    """However many there are: as many as the neighbours of a small average would hold, too."""
    live = {f"w{i}": torch.full((3,), float(i)) for i in range(4)}
    average = polyak.Average(live, HALF)
    live["w0"] += 1.0
    average.update()
    copied = copy.deepcopy(average) if how == "deepcopy" else pickle.loads(pickle.dumps(average))
    held = [copied.tensors["w0"] for _ in range(views)]
    with copied.applied():
        assert all(torch.equal(view, average.tensors["w0"]) for view in held)


def test_a_pickle_is_as_large_as_its_values() -> None:
    """Not as large as all rows once for each tensor that lies in them."""
    live = {f"w{i}": torch.ones(30) for i in range(200)}
    alone = {"w": torch.ones(6_000)}
    sizes = [len(pickle.dumps(polyak.Average(source, HALF))) for source in (live, alone)]
    assert sizes[0] < 2 * sizes[1] + 200 * 2_500  # names, and what a tensor costs beside its values


# ── what was held back ───────────────────────────────────────────────────────────────────────────


def test_counts_add_up_over_updates_and_new_plans() -> None:
    """Also for slots of two storage dtypes, and when someone reads them in between."""
    live = {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.float64), "c": torch.ones(4)}
    live["d"] = torch.ones(5, dtype=torch.float64)
    average = polyak.Average(live, HALF)

    def spoiled() -> None:
        for name, tensor in live.items():
            if name != "d":
                tensor[: 1 if name == "a" else 2] = math.nan
        average.update()

    with torch.inference_mode():
        spoiled()
    spoiled()
    assert average.report().nonfinite == {"a": 2, "b": 4, "c": 4}
    average._engine.drop_plans()
    spoiled()
    live["a"].data = torch.full((3,), math.inf)
    average.update()
    assert average.report().nonfinite == {"a": 6, "b": 8, "c": 8}
    assert average.state_dict()["nonfinite"] == {"a": 6, "b": 8, "c": 8}
    spoiled()
    average.reset()
    assert average.report().nonfinite == {}, "what nobody had read is forgotten, too"


@pytest.mark.parametrize("kind", [BlockPlan, ForeachPlan])
def test_an_infinity_that_the_average_holds_too_is_no_incident(
    kind: type[BlockPlan] | type[ForeachPlan],
) -> None:
    """Beside numbers that move, and NaN that is one: a mask with weights in one tensor."""
    live = [torch.tensor([-math.inf, 1.0, math.nan, math.inf])]
    average = torch.tensor([-math.inf, 0.0, 2.0, -math.inf])
    for weights in ([0.5], [0.0]):
        counts = kind([[average]], live, {0}).mix_(weights, guard=True)
        assert counts is not None
        assert counts.tolist() == [2]
        assert average.tolist() == [-math.inf, 0.5, 2.0, -math.inf]


def test_several_averages_have_one_count() -> None:
    """An element is held back once, however many averages it would have gone into."""
    live = [torch.tensor([1.0, math.nan]), torch.tensor([math.inf, math.nan, 1.0])]
    rows = [[torch.zeros(2), torch.zeros(3)] for _ in range(3)]
    for kind in (BlockPlan, ForeachPlan):
        counts = kind(rows, live, set()).mix_([0.5] * 3, guard=True)
        assert counts is not None
        assert counts.tolist() == [1, 2]
        assert kind(rows, live, set()).mix_([0.5] * 3, guard=False) is None
    assert BlockPlan([[torch.zeros(2)]], [torch.ones(2)], {0}).mix_([0.5], guard=True) is None


# ── the plan survives a block ────────────────────────────────────────────────────────────────────


def test_a_block_leaves_the_views_for_the_next_update() -> None:
    """To cut them for a thousand tensors takes as long as fifty updates."""
    first = nn.Linear(3, 2)
    model = nn.Sequential(first, nn.Linear(100, 100))
    average = polyak.Average(model, HALF)
    average.update()
    before = average._engine._cached
    for _ in range(2):
        with average.applied():
            pass
        nn.init.ones_(first.weight)
        average.update()

    assert before is not None
    assert average._engine._cached is before


@pytest.mark.parametrize("taken", ["before", "after"])
@pytest.mark.parametrize("size", [4, 20_000])
def test_a_view_is_noticed_whether_taken_before_the_plan_or_after(taken: str, size: int) -> None:
    """The plan's own views do not count, everybody else's do: the memory is not lent."""
    live = {"a": torch.zeros(size), "b": torch.zeros(size)}
    average = polyak.Average(live, HALF)
    views = [average.tensors["a"].view(-1)] if taken == "before" else []
    live["a"].fill_(1.0)
    average.update()
    views += [] if taken == "before" else [average.tensors["a"].view(-1)]
    (view,) = views

    with average.applied():
        assert view.unique().tolist() == [0.5]
        assert live["a"].unique().tolist() == [0.5]
    del view
    views.clear()
    average._engine.drop_plans()
    assert average._engine.alone(0) == [True, True]
