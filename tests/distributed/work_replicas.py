"""What the tests of replicated models (DDP) run on ranks."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spread import Values, mine, same, tensors_of, train, wholes
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import polyak
from ranks import count_collectives

KINDS: dict[str, dict[str, Any]] = {
    "nearest": {"schedule": polyak.Power(sigma_rel=0.1)},
    "stochastic float32": {"schedule": polyak.Exponential(decay=0.9999), "rounding": "stochastic"},
    "stochastic bfloat16": {"dtype": torch.bfloat16, "rounding": "stochastic", "seed": 5},
}


class Language(nn.Module):
    """A small language model of awkward sizes: nothing but 64 can be cut in four."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1001, 64)
        self.up = nn.Linear(64, 129)
        self.norm = nn.BatchNorm1d(129)
        self.down = nn.Linear(129, 63)
        self.head = nn.Linear(63, 5)
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, tokens: Tensor) -> Tensor:
        inner = self.norm(self.up(self.embedding(tokens))).relu()
        out: Tensor = self.head(self.down(inner)) * self.temperature
        return out


TOKENS = torch.arange(0, 1001, 77)


def evaluate(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(TOKENS).clone()  # type: ignore[no-any-return]


def floats(model: nn.Module) -> Values:
    """What is trained: parameters and running statistics."""
    return {n: t for n, t in tensors_of(model).items() if t.is_floating_point()}


def stay_positive(model: nn.Module) -> None:
    """Variances that a batch norm can work with."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.abs_()


def learn(model: nn.Module, step: int) -> None:
    train(floats(model), step)
    stay_positive(model)


# ── an average shared out over replicas ──────────────────────────────────────────────────────────


def shared_out(kind: str, steps: int) -> tuple[int, int]:
    """Against an average that each rank holds whole: values, evaluation, what comes back.

    Returns:
        The bytes of memory that this rank's part takes, and those of the whole average.
    """
    model, options = Language(), KINDS[kind]
    learn(model, 0)
    alone = polyak.Average(model, **options)
    average = polyak.Average(model, shard=dist.group.WORLD, **options)
    for step in range(1, steps + 1):
        learn(model, step)
        alone.update()
        with count_collectives() as counted:
            average.update()
        assert counted.total == 0, counted
    same(wholes(average.tensors), dict(sorted(alone.tensors.items())), kind)
    same(average.weights(), alone.weights(), "weights")

    live, lived = tensors_of(model), {n: t.clone() for n, t in tensors_of(model).items()}
    before = evaluate(model)
    with alone.applied():
        averaged = evaluate(model)
    assert not torch.equal(averaged, before)
    for error in (False, True):
        with suppress(KeyboardInterrupt), average.applied():
            same(evaluate(model), averaged, "applied")
            same(wholes(average.tensors), dict(sorted(alone.tensors.items())), "shown meanwhile")
            if error:
                raise KeyboardInterrupt
        same(live, lived, "back")
        same(evaluate(model), before, "live")

    learn(model, steps + 1)
    alone.update()
    average.update()
    same(wholes(average.tensors), dict(sorted(alone.tensors.items())), "after the block")
    other = Language()
    average.copy_to(other)
    same(other.state_dict(), alone.weights(), "copied")
    held = {mine(t).untyped_storage().data_ptr(): mine(t) for t in average.tensors.values()}
    return (
        sum(tensor.untyped_storage().nbytes() for tensor in held.values()),
        sum(tensor.untyped_storage().nbytes() for tensor in alone.tensors.values()),
    )


def error_on_one_rank() -> str:
    """An exception inside the block on one rank only: each gets its own weights back."""
    model = Language()
    learn(model, 1)
    average = polyak.Average(model, shard=dist.group.WORLD)
    learn(model, 2)
    average.update()
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    with suppress(ValueError), average.applied():
        if dist.get_rank() == 1:
            raise ValueError
    same(tensors_of(model), before, "back")
    learn(model, 3)
    average.update()
    return str(wholes(average.tensors)["head.bias"].tolist())


def trained_by_ddp(folder: Path) -> list[str]:
    """Real steps under DDP, other data on each rank: averages are one, whole or shared out."""
    model = Language()
    learn(model, 0)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
    whole, shared = polyak.Average(wrapped), polyak.Average(wrapped, shard=dist.group.WORLD)
    whole.follow(optimizer)
    shared.follow(optimizer)
    torch.manual_seed(dist.get_rank())
    for _ in range(5):
        optimizer.zero_grad()
        wrapped(torch.randint(1001, (8,))).square().mean().backward()
        optimizer.step()
    parameters = dict(model.named_parameters())
    got = wholes({n: t for n, t in shared.tensors.items() if n in parameters})
    same(got, {n: whole.tensors[n] for n in sorted(parameters)}, "shared out")
    polyak.reduce_buffers(whole)
    polyak.check_ranks(whole)
    polyak.save(whole, folder / f"rank{dist.get_rank()}.safetensors")
    return sorted(got)


# ── replicas that are not the same ───────────────────────────────────────────────────────────────


def broken_average(average: polyak.Average, model: nn.Module) -> None:
    """A bit of the average itself."""
    average.tensors["up.weight"][3, 5] += 1e-3


def broken_live(average: polyak.Average, model: nn.Module) -> None:
    """H6: one rank writes the average back into its replica, the others do not."""
    average.copy_to(model)


BREAKS: dict[str, Callable[[polyak.Average, nn.Module], None]] = {
    "average": broken_average,
    "live": broken_live,
}


def check_names_the_culprit(what: str, rank: int) -> str:
    """Replicas that are equal pass; after one has changed, every rank raises the same."""
    model = Language()
    learn(model, 1)
    average = polyak.Average(model)
    for step in (2, 3):  # the first update copies the live weights
        learn(model, step)
        average.update()
    polyak.check_ranks(average)
    if dist.get_rank() == rank:
        BREAKS[what](average, model)
    with pytest.raises(polyak.MatchError) as caught:
        polyak.check_ranks(average)
    return str(caught.value)


def check_is_quiet_about_what_is_equal() -> None:
    """NaN, -0.0 and integers are compared by their bits; sharded averages have no replicas."""
    model = Language()
    learn(model, 3)
    for average in (
        polyak.Average(model, nonfinite="ignore"),
        polyak.Average(model, shard=dist.group.WORLD),
    ):
        average.update()
        polyak.check_ranks(average)


def buffers_differ() -> dict[str, list[float]]:
    """BatchNorm without synchronisation: what each rank has seen differs, and is then pooled."""
    model = Language()
    learn(model, 1)
    average = polyak.Average(model, polyak.Uniform())
    with torch.no_grad():
        model.norm.running_mean.fill_(1.0 + dist.get_rank())  # type: ignore[union-attr]
        model.norm.running_var.fill_(2.0 ** dist.get_rank())  # type: ignore[union-attr]
    average.update()
    parameters = {
        name: tensor.clone() for name, tensor in average.tensors.items() if "norm.run" not in name
    }
    live = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    polyak.check_ranks(average)  # of parameters: what a buffer has seen may differ
    names = polyak.reduce_buffers(average)
    assert set(names) == {"norm.running_mean", "norm.running_var"}
    after = average.tensors
    same({name: after[name] for name in parameters}, parameters, "parameters")
    same(tensors_of(model), live, "live")
    return {name: after[name].tolist() for name in ("norm.running_mean", "norm.running_var")}


# ── other ways to share a model out ──────────────────────────────────────────────────────────────


def placeholders_are_refused() -> str:
    """H5: what ZeRO-3 leaves in place of a parameter: nothing, and a note of its true shape."""
    model: Any = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape = number, parameter.shape
        parameter.data = torch.empty(0)
    with pytest.raises(polyak.AveragingError) as caught:
        polyak.Average(model)
    return str(caught.value)


def gathered_copies_do_not_last() -> str:
    """H5: built while parameters are gathered; later they are empty: an update is refused."""
    model = nn.Linear(4, 3)
    average = polyak.Average(model)
    average.update()
    before = {name: tensor.clone() for name, tensor in average.tensors.items()}
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    with pytest.raises(polyak.AveragingError) as caught:
        average.update()
    same(average.tensors, before, "average")
    return str(caught.value)


def fsdp1() -> list[str]:
    """What is said of FSDP1 with the original parameters, and of the module in its wrapper."""
    model = nn.Linear(6, 5)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    messages = []
    for module in (wrapped, model):
        with pytest.raises(polyak.AveragingError) as caught:
            polyak.Average(module)
        messages.append(str(caught.value))
    return messages


def no_group(value: Any) -> str:
    with pytest.raises(polyak.ArgumentError, match="shard must be") as caught:
        polyak.Average(nn.Linear(2, 1), shard=value)
    return str(caught.value)


def part_of_the_ranks() -> list[int]:
    """Two groups of two: each shares its own average out."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine_of = groups[dist.get_rank() // 2]
    model = Language()
    learn(model, 1 + dist.get_rank() // 2)
    average, alone = polyak.Average(model, shard=mine_of), polyak.Average(model)
    learn(model, 5 + dist.get_rank() // 2)
    average.update()
    alone.update()
    for name in dict(model.named_parameters()):
        assert isinstance(average.tensors[name], DTensor), name
    same(wholes(average.tensors), dict(sorted(alone.tensors.items())), "group")
    with alone.applied():
        averaged = evaluate(model)
    with average.applied():
        same(evaluate(model), averaged, "applied")
    tensor = average.tensors["embedding.weight"]
    return [mine(tensor).numel(), tensor.numel()]


# ── groups, and errors that one rank alone has ───────────────────────────────────────────────────


def buffers_of_a_window() -> list[list[float]]:
    """BatchNorm in a window of two captures: means 10 + rank, then 20 + rank, then 30 + rank."""
    model = Language()
    window, seen = polyak.Window(model, 2), []
    for level in (10.0, 20.0, 30.0):
        with torch.no_grad():
            model.norm.running_mean.fill_(level + dist.get_rank())  # type: ignore[union-attr]
        window.update()
        polyak.reduce_buffers(window)
        seen.append([float(window.weights()["norm.running_mean"][0])])
        seen[-1].append(float(window.tensors["norm.running_mean"][0]))
    return seen


def captures_are_compared() -> str:
    """The same two captures in another order: their mean is one, what the next one drops is not."""
    model = Language()
    window = polyak.Window(model, 2)
    for step in (1, 2) if dist.get_rank() == 0 else (2, 1):
        learn(model, step)
        window.update()
    learn(model, 5)
    with pytest.raises(polyak.MatchError) as caught:
        polyak.check_ranks(window)
    return str(caught.value)


def statistics_and_buffers() -> dict[str, float]:
    """After `refresh_norms` both what it found and what was averaged are pooled, by their names."""
    linear = nn.Linear(4, 4)
    model = nn.Sequential(linear, nn.BatchNorm1d(4))
    model.register_buffer("spin", torch.zeros(2, dtype=torch.complex64))
    with torch.no_grad():
        linear.weight.fill_(0.0)
        linear.bias.fill_(dist.get_rank())  # all that the batch norm sees
        dict(model.named_buffers())["1.running_mean"].fill_(10.0 * dist.get_rank())
    average = polyak.Average(model)
    average.update()
    polyak.refresh_norms(average, [torch.ones(8, 4)])
    names = polyak.reduce_buffers(average)
    assert set(names) == {"1.running_mean", "1.running_var"}, names
    return {
        "averaged": float(average.tensors["1.running_mean"][0]),
        "refreshed": float(average.weights()["1.running_mean"][0]),
    }


def outside_of_the_group() -> list[str]:
    """Torch's collectives do nothing on a rank outside of the group they are given."""
    group = dist.new_group([0, 1])
    model = Language()
    learn(model, 1)
    average = polyak.Average(model)
    before = {name: tensor.clone() for name, tensor in average.tensors.items()}
    messages = []
    for call in (polyak.reduce_buffers, polyak.check_ranks):
        if dist.get_rank() < 2:
            call(average, group=group)
        else:
            with pytest.raises(polyak.ArgumentError, match="group must be") as caught:
                call(average, group=group)
            messages.append(str(caught.value))
    if dist.get_rank() >= 2:
        same(average.tensors, before, "outside")
    return messages


def drift_in_a_group() -> str:
    """Rank 3 is the second of its group."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = Language()
    learn(model, 1 + (dist.get_rank() == 3))
    average = polyak.Average(model)
    if dist.get_rank() < 2:
        polyak.check_ranks(average, group=groups[0])
        return ""
    with pytest.raises(polyak.MatchError) as caught:
        polyak.check_ranks(average, group=groups[1])
    return str(caught.value)


def damaged_on_one_rank() -> str:
    """An average that one rank has lost: `check_ranks` says so on all, and all go on together."""
    model = Language()
    average = polyak.Average(model)
    learn(model, 1)
    average.update()
    with suppress(polyak.OrderError), average.applied():
        if dist.get_rank() == 1:
            learn(model, 2)
    with pytest.raises(polyak.AveragingError) as caught:
        polyak.check_ranks(average)
    average.reset()
    polyak.check_ranks(average)
    return str(caught.value)


def overflow_on_one_rank() -> list[str]:
    """A value beyond float16 in the last rank's share: each use fails on all, and writes nothing.

    Returns:
        The type of the error of each use.
    """
    model = Language().half()
    average = polyak.Average(model, polyak.Uniform(), shard=dist.group.WORLD)
    average.update()
    if dist.get_rank() == dist.get_world_size() - 1:
        mine(average.tensors["up.weight"]).fill_(1e6)
    before, other = {n: t.clone() for n, t in tensors_of(model).items()}, Language().half()
    there = {name: tensor.clone() for name, tensor in tensors_of(other).items()}
    seen = []
    for use in (
        lambda: average.applied().__enter__(),
        average.weights,
        lambda: average.copy_to(other),
    ):
        with pytest.raises(polyak.AveragingError) as caught:
            use()
        seen.append(caught.typename)
    same(tensors_of(model), before, "live")
    same(tensors_of(other), there, "the other module")
    total = torch.ones(1)
    dist.all_reduce(total)  # the ranks are still in step
    assert total.item() == dist.get_world_size()
    return seen


def corrected() -> None:
    """`bias_corrected` of a shared-out average is that of a whole one, also while it is lent."""
    model = Language()
    learn(model, 1)
    alone = polyak.Average(model, polyak.Uniform())
    shared = polyak.Average(model, polyak.Uniform(), shard=dist.group.WORLD)
    start = shared.weights()
    for step in (2, 4):
        learn(model, step)
        for average in (alone, shared):
            average.update()
    expected = polyak.bias_corrected(alone, start)
    same(polyak.bias_corrected(shared, start), expected, "outside")
    with shared.applied():
        same(polyak.bias_corrected(shared, start), expected, "inside")


def device_is_refused() -> None:
    with pytest.raises(polyak.ArgumentError, match="device must be"):
        polyak.Average(Language(), device="meta", shard=dist.group.WORLD)


def gathered_in_live_dtype(folder: Path) -> set[str]:
    """What travels when a bfloat16 model is lent, copied, or saved from a float32 average."""
    model = Language().bfloat16()
    learn(model, 1)
    average = polyak.Average(model, shard=dist.group.WORLD)
    learn(model, 2)
    average.update()
    with Sent() as sent:
        with average.applied():
            pass
        average.weights()
        polyak.save(average, folder / "averaged.safetensors")
    return {str(dtype) for dtype in sent.dtypes}


class Sent(TorchDispatchMode):
    """The dtypes of tensors that are gathered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "all_gather_into_tensor" in str(func) and "_c10d_functional" in func.namespace:
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))
