"""What the tests of sharded averages run on ranks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spread import AVERAGED, LAYOUTS, Net, mine, same, tensors_of, train, value, whole, wholes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

import polyak
from polyak._sharding import spread_like
from polyak.compat import ema_pytorch, swa_utils, yolov5
from ranks import count_collectives

BATCH = torch.linspace(-1, 1, 24).view(4, 6)

# Every kind of average, and every mode of rounding.
KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "nearest": lambda model: polyak.Average(model, polyak.Power(sigma_rel=0.1)),
    "stochastic float32": lambda model: polyak.Average(
        model, polyak.Exponential(decay=0.9999), rounding="stochastic"
    ),
    "stochastic bfloat16": lambda model: polyak.Average(
        model, dtype=torch.bfloat16, rounding="stochastic", seed=5
    ),
    "several": lambda model: polyak.Averages(
        model, {"short": polyak.Exponential(half_life=3), "long": polyak.Uniform()}
    ),
    "window": lambda model: polyak.Window(model, 3, every=7),
}
ROUNDINGS = ["nearest", "stochastic float32", "stochastic bfloat16"]


def tensors(average: Any) -> dict[str, Tensor]:
    """Averaged tensors by name, of one average or of several."""
    members: Mapping[str, Any] = average if isinstance(average, polyak.Averages) else {"": average}
    return {
        f"{key}/{name}": tensor
        for key, member in members.items()
        for name, tensor in member.tensors.items()
    }


def laid_out(tensor: Tensor) -> tuple[Any, ...]:
    """Over which ranks, and how; () on one."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ()


# ── updates ──────────────────────────────────────────────────────────────────────────────────────


def values_are_spread_as_meant(layout: str) -> list[tuple[int, ...]]:
    """That `train` writes what it says; the shapes of the 5-row weight and of the one element."""
    model = LAYOUTS[layout].net()
    train(tensors_of(model), 1)
    for name, tensor in tensors_of(model).items():
        same(whole(tensor), value(name, 1, tensor), name)
    parameters = dict(model.named_parameters())
    return [tuple(mine(parameters[name]).shape) for name in ("second.weight", "gain")]


def unsharded(steps: int) -> dict[str, dict[str, Tensor]]:
    """Every kind of average of a model on one rank, after so many steps of training."""
    model = Net()
    train(tensors_of(model), 0)
    averages = {kind: make(model) for kind, make in KINDS.items()}
    for number in range(1, steps + 1):
        train(tensors_of(model), number)
        for average in averages.values():
            average.update()
    return {kind: dict(tensors(average)) for kind, average in averages.items()}


def follows(layout: str, steps: int, expected: dict[str, dict[str, Tensor]]) -> int:
    """That averages of a spread model are the expected ones, to the bit.

    Returns:
        How many collectives the updates have issued.
    """
    model, issued = LAYOUTS[layout].net(), 0
    train(tensors_of(model), 0)
    averages = {kind: KINDS[kind](model) for kind in expected}
    for number in range(1, steps + 1):
        train(tensors_of(model), number)
        with count_collectives() as counted:
            for average in averages.values():
                average.update()
        issued += counted.total
    for kind, average in averages.items():
        same(wholes(tensors(average)), expected[kind], kind)
    return issued


def is_spread_like_the_model(layout: str) -> dict[str, tuple[int, ...]]:
    """Mesh, placements, shape, strides, memory; returns the local shapes."""
    model = LAYOUTS[layout].net()
    average = polyak.Average(model)
    average.update()
    live = tensors_of(model)
    assert set(average.tensors) == AVERAGED
    for name, tensor in average.tensors.items():
        assert laid_out(tensor) == laid_out(live[name]), name
        assert (tensor.shape, tensor.stride()) == (live[name].shape, live[name].stride()), name
        assert mine(tensor).shape == mine(live[name]).shape, name
        held = mine(tensor).untyped_storage().nbytes()  # ordinary ones share a row
        assert held == 4 * mine(tensor).numel() or not isinstance(tensor, DTensor), name
    return {name: tuple(mine(tensor).shape) for name, tensor in average.tensors.items()}


def rebuilt_whole(sizes: list[int]) -> list[list[Any]]:
    """H1: tensors of a few rows, and what each rank takes the sizes of their averages to be."""
    return [sizes_of_whole(rows) for rows in sizes]


def sizes_of_whole(rows: int) -> list[Any]:
    model = nn.Linear(3, rows, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(3.0 * rows).view(rows, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    average = polyak.Average(model)
    average.update()
    tensor = average.tensors["weight"]
    state = average.state_dict()["averages"]["average"]["tensors"]["weight"]
    assert isinstance(tensor, DTensor)
    assert tensor.placements == (Shard(0),)
    return [
        tuple(tensor.shape),
        tuple(state.shape),
        tuple(average.weights()["weight"].shape),
        mine(tensor).shape[0],
        whole(tensor).tolist(),
        whole(state).tolist(),
    ]


# ── evaluation and training ──────────────────────────────────────────────────────────────────────


class Stop(Exception):  # noqa: N818 - not an error of anybody's
    """Raised by the tests inside the block."""


def evaluate(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        out: Tensor = model(BATCH)
    return out.clone()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One real step; every rank has the same batch, so means over 2 or 4 ranks are exact."""
    model.train()
    optimizer.zero_grad()
    model(BATCH * (1 + number)).square().mean().backward()
    optimizer.step()


@contextmanager
def interrupted(layer: nn.Module) -> Iterator[None]:
    """A model whose forward pass raises in the middle: some groups are gathered, some not yet."""

    def stop(*_: object) -> None:
        raise Stop

    handle = layer.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def agree(got: Tensor, expected: Tensor, what: str, *, exact: bool) -> None:
    """To the bit, or within what another order of summing makes of float32."""
    if exact:
        same(got, expected, what)
    else:
        torch.testing.assert_close(
            got, expected, rtol=1e-5, atol=1e-6, msg=lambda m: f"{what}: {m}"
        )


def stages(layout: str, story: str, options: dict[str, Any]) -> None:
    """Evaluate live, evaluate applied, train on: each as the unsharded model does it."""
    exact = not layout.startswith("tp")  # tensor parallelism sums in another order
    alone, model = Net(), LAYOUTS[layout].net(**options)
    train(tensors_of(alone), 1)
    train(tensors_of(model), 1)
    shards = tensors_of(model)
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1, 0.9, foreach=False)
        for m in (alone, model)
    ]
    expected, average = polyak.Average(alone), polyak.Average(model)
    for number in range(3):
        for m, optimizer, a in zip((alone, model), optimizers, (expected, average), strict=True):
            step(m, optimizer, number)
            a.update()

    live = evaluate(alone)
    with expected.applied():
        averaged = evaluate(alone)
    assert not torch.allclose(live, averaged, rtol=1e-3)
    agree(evaluate(model), live, "live", exact=exact)

    if story == "forward without backward":
        agree(model(BATCH).detach(), live, "live, with a graph", exact=exact)
    with suppress(Stop), average.applied():
        if story == "error at once":
            raise Stop
        agree(evaluate(model), averaged, "applied", exact=exact)
        if story == "forward without backward":
            agree(model(BATCH).detach(), averaged, "applied, with a graph", exact=exact)
        if story == "error after an evaluation":
            raise Stop
        if story == "error in a forward pass":
            with interrupted(model.get_submodule("second")):
                evaluate(model)
        if story == "error in a training pass":
            with interrupted(model.get_submodule("second")):
                model.train(True)(BATCH)
        agree(evaluate(model), averaged, "applied again", exact=exact)
    if story != "train at once":
        agree(evaluate(model), live, "live again", exact=exact)

    for m, optimizer, a in zip((alone, model), optimizers, (expected, average), strict=True):
        step(m, optimizer, 3)
        a.update()
    agree(evaluate(model), evaluate(alone), "after a step", exact=exact)
    trained, lived = wholes(shards), wholes(tensors_of(alone))
    for name in lived:
        agree(trained[name], lived[name], f"trained {name}", exact=exact)
        if name in AVERAGED:
            agree(
                whole(average.tensors[name]), expected.tensors[name], f"average {name}", exact=exact
            )


def shards_come_back_bit_for_bit(layout: str) -> None:
    """NaN and -0.0 too; what was handed out before shows the average all the while."""
    for dtype in (torch.float32, torch.bfloat16):
        come_back(layout, dtype)


def come_back(layout: str, dtype: torch.dtype) -> None:
    model = LAYOUTS[layout].net(dtype=dtype)
    train(tensors_of(model), 3)  # with a NaN in each tensor
    average = polyak.Average(model, polyak.Uniform())
    for number in (4, 5):
        train(tensors_of(model), number)
        average.update()
    with torch.no_grad():
        for parameter in model.parameters():
            mine(parameter).view(-1)[:1] = -0.0
            mine(parameter).view(-1)[1:2] = float("nan")
    live = tensors_of(model)
    parts = {name: mine(tensor) for name, tensor in live.items()}
    before = {name: part.clone() for name, part in parts.items()}
    for is_held in (False, True):  # exchanged, and copied
        handed_out = average.tensors if is_held else {}
        averaged = {name: mine(tensor).clone() for name, tensor in average.tensors.items()}
        lent = {name: tensor.to(dtype) for name, tensor in averaged.items()}
        with suppress(Stop), average.applied():
            same({name: parts[name] for name in lent}, lent, "lent")
            seen = {name: mine(tensor) for name, tensor in average.tensors.items()}
            same(seen, averaged, "shown meanwhile")
            waiting = average.state_dict()["live"]
            trained = {name: before[name] for name in lent}
            same({name: mine(waiting[name]) for name in lent}, trained, "waiting for the end")
            assert all(laid_out(waiting[name]) == laid_out(live[name]) for name in lent)
            for name, tensor in handed_out.items():
                same(mine(tensor), averaged[name], f"{name} was handed out")
            raise Stop
        same(parts, before, "back")
        same({name: mine(tensor) for name, tensor in average.tensors.items()}, averaged, "average")


def copies(layout: str) -> None:
    """To a second spread model that shows gathered weights, the live one, and one that is whole."""
    alone, model, target = Net(), LAYOUTS[layout].net(), LAYOUTS[layout].net()
    target_alone = Net()
    for m in (alone, model):
        train(tensors_of(m), 1)
    expected, average = (polyak.Average(m, polyak.Uniform()) for m in (alone, model))
    for m, a in ((alone, expected), (model, average)):
        train(tensors_of(m), 4)
        a.update()
        train(tensors_of(m), 5)
        a.update()
    pairs = [
        (target, tensors_of(target), target_alone),
        (model, tensors_of(model), alone),
        (Net(), None, Net()),
    ]
    for share in (1.0, 0.25):
        for there, shards, there_alone in pairs:
            held = shards or tensors_of(there)
            train(held, 6)
            train(tensors_of(there_alone), 6)
            if isinstance(there, FSDPModule):
                there.reshard()  # it may have gathered other values
            before = evaluate(there)  # leaves the root gathered
            average.copy_to(there, share=share)
            expected.copy_to(there_alone, share=share)
            same(wholes(held), wholes(tensors_of(there_alone)), "copied")
            exact = not layout.startswith("tp")
            agree(evaluate(there), evaluate(there_alone), "computed", exact=exact)
            assert not torch.allclose(evaluate(there), before)


def weights_load_strictly(layout: str) -> None:
    """The full set, sharded as the model is, taken while the module shows gathered weights."""
    alone, model, fresh = Net(), LAYOUTS[layout].net(), LAYOUTS[layout].net()
    for m in (alone, model):
        train(tensors_of(m), 1)
    expected, average = polyak.Average(alone), polyak.Average(model)
    for m, a in ((alone, expected), (model, average)):
        train(tensors_of(m), 2)
        a.update()
    shards = tensors_of(model)
    evaluate(model)
    given = average.weights()
    for name, tensor in given.items():
        assert laid_out(tensor) == laid_out(shards[name]), name
    fresh.load_state_dict(given, strict=True)
    same(wholes(tensors_of(fresh)), wholes(expected.weights()), "loaded")
    narrow = average.weights(torch.bfloat16)
    same(wholes(narrow), wholes(expected.weights(torch.bfloat16)), "narrow")


# ── gathered weights on show ─────────────────────────────────────────────────────────────────────


def update_reads_shards(layout: str) -> None:
    """After a forward pass without a backward the module shows weights that nobody trains."""
    for build_late in (False, True):
        read_shards(layout, build_late)


def read_shards(layout: str, build_late: bool) -> None:
    alone, model = Net(), LAYOUTS[layout].net(reshard_after_forward=False)
    train(tensors_of(alone), 1)
    train(tensors_of(model), 1)
    shards = tensors_of(model)
    average = None if build_late else polyak.Average(model)
    expected = polyak.Average(alone)
    evaluate(model)
    shown = dict(model.named_parameters())
    assert shown["first.weight"] is not shards["first.weight"]
    average = average or polyak.Average(model)
    train(shards, 2)
    train(tensors_of(alone), 2)
    with count_collectives() as counted:
        average.update()
    expected.update()
    assert counted.total == 0
    same(wholes(average.tensors), wholes(expected.tensors), "update")
    same(wholes(average.weights()), wholes(expected.weights()), "weights")
    assert isinstance(average.tensors["first.weight"], DTensor)


def update_reads_shards_after_backward() -> None:
    """`set_reshard_after_backward(False)`: the optimizer writes shards that the module hides."""
    alone = Net()
    model: Any = LAYOUTS["fsdp-2"].net()
    model.set_reshard_after_backward(False)
    train(tensors_of(alone), 1)
    train(tensors_of(model), 1)
    shards = tensors_of(model)
    averages = [polyak.Average(alone), polyak.Average(model)]
    for m, a in zip((alone, model), averages, strict=True):
        trained = [p for p in m.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, 0.1)
        a.follow(optimizer)
        step(m, optimizer, 1)
    assert not isinstance(dict(model.named_parameters())["first.weight"], DTensor)
    same(wholes(averages[1].tensors), wholes(averages[0].tensors), "update")
    with averages[0].applied():
        averaged = evaluate(alone)
    with averages[1].applied():
        same(evaluate(model), averaged, "applied")
    same(wholes(shards), wholes(tensors_of(alone)), "back")
    same(evaluate(model), evaluate(alone), "live")


# ── more of FSDP2 ────────────────────────────────────────────────────────────────────────────────


def averaged_net(**options: Any) -> tuple[nn.Module, polyak.Average]:
    """A model and an average that differ."""
    model = LAYOUTS["fsdp-2"].net(**options)
    shards = tensors_of(model)
    train(shards, 1)
    average = polyak.Average(model, polyak.Uniform())
    for number in (2, 4):
        train(shards, number)
        average.update()
    return model, average


def mixed_precision() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model, average = averaged_net(mp_policy=policy)
    other = LAYOUTS["fsdp-2"].net(mp_policy=policy)
    live = evaluate(model)
    other.load_state_dict(average.weights())
    with average.applied():
        same(evaluate(model), evaluate(other), "applied")
    same(evaluate(model), live, "live")
    assert not torch.equal(evaluate(other), live)


def gathered_by_hand() -> None:
    model: Any
    model, average = averaged_net()
    other = LAYOUTS["fsdp-2"].net()
    other.load_state_dict(average.weights())
    live = evaluate(model)
    model.unshard()
    with average.applied():
        model.unshard()
        same(evaluate(model), evaluate(other), "applied")
        model.second.unshard(async_op=True)
    same(evaluate(model), live, "live")


def graph_across_the_block() -> None:
    model, average = averaged_net()
    shards = dict(model.named_parameters())
    alone = Net()
    alone.load_state_dict(wholes(tensors_of(model)))
    alone(BATCH).square().mean().backward()

    loss = model(BATCH).square().mean()
    with average.applied():
        evaluate(model)
    loss.backward()

    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            gradient = shards[name].grad
            assert gradient is not None
            assert parameter.grad is not None
            same(whole(gradient), parameter.grad, name)


def layer_of_a_group() -> None:
    """An average of, and a copy into, a layer whose parameters the whole model gathers."""
    alone = Net()
    model: Any = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    shards = tensors_of(model)
    train(tensors_of(alone), 1)
    train(shards, 1)
    evaluate(model)  # the root shows gathered weights, in `first` too
    expected, average = (polyak.Average(m.first, polyak.Uniform()) for m in (alone, model))
    for number in (2, 4):
        evaluate(model)
        train(tensors_of(alone), number)
        train(shards, number)
        expected.update()
        average.update()
    same(wholes(average.tensors), wholes(expected.tensors), "average")
    with expected.applied():
        averaged = evaluate(alone)
    model.reshard()
    live = evaluate(model)
    with average.applied():
        same(evaluate(model), averaged, "applied")
    same(evaluate(model), live, "live")
    average.copy_to(model.first)
    expected.copy_to(alone.first)
    for _ in range(2):
        same(evaluate(model), evaluate(alone), "copied")
        model.reshard()


# ── refusals, names ──────────────────────────────────────────────────────────────────────────────


def named_shards_cannot_be_lent() -> None:
    """Nobody could tell the module that its gathered weights are old."""
    model = LAYOUTS["fsdp-2"].net()
    average = polyak.Average(dict(model.named_parameters()))
    average.update()
    before = wholes(tensors_of(model))
    with pytest.raises(polyak.OrderError, match="Build it from the model"), average.applied():
        pass
    same(wholes(tensors_of(model)), before, "untouched")


def lending_in_a_forward_pass_is_refused() -> None:
    model = LAYOUTS["fsdp-2"].net()
    train(tensors_of(model), 1)
    average = polyak.Average(model)
    train(tensors_of(model), 2)
    average.update()
    shards = tensors_of(model)
    refused = []

    def lend(*_: object) -> None:
        try:
            with average.applied():
                pass
        except polyak.OrderError as error:
            refused.append(str(error))

    handle = model.get_submodule("second").register_forward_pre_hook(lend)
    first = evaluate(model)
    handle.remove()
    assert len(refused) == 1
    assert "forward or backward pass" in refused[0]
    same(wholes(shards), {name: value(name, 2, t) for name, t in sorted(shards.items())}, "live")
    same(evaluate(model), first, "computed")


def wrapped_names(wrapping: str) -> None:
    """D1, D2: the same names and values whatever is put around the model, and when."""
    alone = Net()
    inner = Net()
    if wrapping == "checkpoint":
        inner.first = checkpoint_wrapper(inner.first)  # type: ignore[assignment]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if wrapping == "compiled layer":
        inner.first.compile(backend="eager")
    for module in (inner.first, inner.second, inner):
        fully_shard(module, mesh=mesh)
    model: Any = torch.compile(inner, backend="eager") if wrapping == "compile" else inner
    shards = {n.replace("_checkpoint_wrapped_module.", ""): t for n, t in tensors_of(inner).items()}
    train(tensors_of(alone), 1)
    train(shards, 1)
    expected, average = polyak.Average(alone), polyak.Average(model)
    train(tensors_of(alone), 2)
    train(shards, 2)
    expected.update()
    average.update()
    same(wholes(average.tensors), wholes(expected.tensors), "average")
    with expected.applied():
        averaged = evaluate(alone)
    with average.applied():
        same(evaluate(model), averaged, "applied")
    same(evaluate(model), evaluate(alone), "live")


class Tied(nn.Module):
    """An embedding whose weight is also the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(x))
        return out


def ties() -> None:
    """D9: one average for a tie, also while FSDP2 shows the gathered weight in both places."""
    tokens = torch.arange(7)
    alone, model = Tied(), Tied()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    shards = dict(model.named_parameters())
    train(dict(alone.named_parameters()), 1)
    train(shards, 1)
    with torch.no_grad():
        same(model(tokens).clone(), alone(tokens), "live")  # leaves it gathered
    expected, average = polyak.Average(alone), polyak.Average(model)
    train(dict(alone.named_parameters()), 2)
    train(shards, 2)
    expected.update()
    average.update()
    assert list(average.tensors) == ["embedding.weight"]
    assert set(average.weights()) == {"embedding.weight", "head.weight"}
    with expected.applied(), average.applied(), torch.no_grad():
        same(model(tokens).clone(), alone(tokens), "applied")
    with torch.no_grad():
        same(model(tokens).clone(), alone(tokens), "live again")


# ── what is silent, and what is refused ──────────────────────────────────────────────────────────


def silent_uses(layout: str) -> list[int]:
    """How many collectives each use of shards issues that the model has likewise."""
    model, second = LAYOUTS[layout].net(), LAYOUTS[layout].net()
    train(tensors_of(model), 1)
    average = polyak.Average(model)
    average.update()
    state, counts = average.state_dict(), []

    def lend() -> None:
        with average.applied():
            pass

    uses: list[Callable[[], object]] = [
        lend,
        average.weights,
        lambda: average.copy_to(second),
        lambda: average.load_state_dict(state),
        average.report,
    ]
    for use in uses:
        with count_collectives() as counted:
            use()
        counts.append(counted.total)
    return counts


def named_while_gathered() -> str:
    """Parameters as a forward pass without a backward leaves them in the root group."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    shards = dict(model.named_parameters())
    with torch.no_grad():
        model(BATCH)
    gathered = {name: getattr(model[int(name[0])], name[2:]) for name in shards}
    assert not any(isinstance(tensor, DTensor) for tensor in gathered.values())
    with pytest.raises(polyak.ArgumentError, match="named tensors must be the shards") as caught:
        polyak.Average(gathered)
    polyak.Average(shards).update()
    return str(caught.value)


def second_modules() -> dict[str, str]:
    """What the drop-in classes that keep a second module say of an FSDP2 model."""
    makers: dict[str, Callable[[nn.Module], object]] = {
        "swa_utils": swa_utils.AveragedModel,
        "ema_pytorch": ema_pytorch.EMA,
        "yolov5": yolov5.ModelEMA,
    }
    messages = {}
    for name, make in makers.items():
        with pytest.raises(polyak.ArgumentError) as caught:
            make(LAYOUTS["fsdp-2"].net())
        messages[name] = str(caught.value)
    return messages


def piece_stays_where_it_is() -> None:
    """Shards may be kept elsewhere than the mesh's device, as `CPUOffloadPolicy` keeps them."""
    mesh = init_device_mesh("cpu", (2,))
    like: Any = DTensor.from_local(torch.zeros(3, 2), mesh, [Shard(0)], run_check=False)
    with FakeTensorMode():  # or no other device need be here
        there = torch.empty(3, 2, dtype=torch.bfloat16, device="cuda")
        spread = spread_like(there, like)
    assert laid_out(spread) == laid_out(like)
    assert (spread.shape, spread.stride()) == (like.shape, like.stride())
    assert mine(spread).device.type == "cuda"
    assert mine(spread).dtype == spread.dtype == torch.bfloat16
    assert not spread.requires_grad


def waits_for_offloaded_shards(offload: bool) -> list[int]:
    """How often a device is waited for at both ends of a block, before anything is written."""
    policy = CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy()
    model, waits = LAYOUTS["fsdp-2"].net(offload_policy=policy), []
    train(tensors_of(model), 1)
    average = polyak.Average(model)
    train(tensors_of(model), 2)
    average.update()
    shards = {name: mine(tensor) for name, tensor in model.named_parameters()}

    def wait() -> None:
        waits.append({name: part.clone() for name, part in shards.items()})

    before = {name: part.clone() for name, part in shards.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        patch.setattr(torch.accelerator, "synchronize", wait)
        with average.applied():
            lent = {name: part.clone() for name, part in shards.items()}
    if offload:
        same(waits[0], before, "waited for on entry")
        same(waits[-1], lent, "waited for on exit")
    return [len(waits)]
