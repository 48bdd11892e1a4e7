"""One model spread over ranks in every way, and values that any part of it can be given."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from deep import differences

Values = dict[str, Tensor]


class Net(nn.Module):
    """What a mesh must cope with: 5 rows, a tensor smaller than the world, buffers, a frozen one.

    Args:
        hidden: width; even, so that tensor parallelism can cut it, not divisible by 3 or 4.
    """

    level: Tensor
    seen: Tensor

    def __init__(self, hidden: int = 10) -> None:
        super().__init__()
        self.first = nn.Linear(6, hidden)
        self.second = nn.Linear(hidden, 5)
        self.gain = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(5), requires_grad=False)
        self.register_buffer("level", torch.zeros(3))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).tanh()) * self.gain + self.shift + self.level.sum()
        return out


AVERAGED = {"first.weight", "first.bias", "second.weight", "second.bias", "gain", "level"}


# ── ways to spread it ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Layout:
    """A number of ranks, and how `Net` is laid out over them."""

    n: int
    spread: Callable[..., nn.Module]  # (model, **options of fully_shard)

    def net(
        self, hidden: int = 10, dtype: torch.dtype = torch.float32, **options: Any
    ) -> nn.Module:
        """A `Net` spread this way. Its values are those of a fresh one: give it others."""
        return self.spread(Net(hidden).to(dtype), **options)


def fully_sharded(model: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    """Three FSDP2 groups: the layers, and the root with what is left."""
    assert isinstance(model, Net)
    mesh = mesh or init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in (model.first, model.second, model):
        fully_shard(module, mesh=mesh, **options)
    return model


def grouped(model: nn.Module, **options: Any) -> nn.Module:
    """One group for two layers, one for the root, and a parameter that every rank has whole."""
    assert isinstance(model, Net)
    mesh = init_device_mesh("cpu", (2,))
    whole: Any = {model.gain}
    fully_shard([model.first, model.second], mesh=mesh, **options)
    fully_shard(model, mesh=mesh, ignored_params=whole, **options)
    return model


def hybrid(model: nn.Module, **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return fully_sharded(model, mesh, **options)


def tensor_parallel(model: nn.Module, mesh: Any = None) -> nn.Module:
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    return parallelize_module(model, mesh or init_device_mesh("cpu", (2,)), plan)


def both(model: nn.Module, **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return fully_sharded(tensor_parallel(model, mesh["tensor"]), mesh["data"], **options)


def as_it_is(model: nn.Module) -> nn.Module:
    """Whole on every rank, as DDP has it."""
    return model


LAYOUTS = {
    "alone": Layout(1, as_it_is),
    "replicas-2": Layout(2, as_it_is),
    "replicas-3": Layout(3, as_it_is),
    "fsdp-1": Layout(1, fully_sharded),
    "fsdp-2": Layout(2, fully_sharded),
    "fsdp-3": Layout(3, fully_sharded),
    "fsdp-4": Layout(4, fully_sharded),
    "grouped-2": Layout(2, grouped),
    "hsdp-2x2": Layout(4, hybrid),
    "tp-2": Layout(2, tensor_parallel),
    "tp-2 x fsdp-2": Layout(4, both),
}


# ── values ───────────────────────────────────────────────────────────────────────────────────────


def value(name: str, step: int, like: Tensor) -> Tensor:
    """What the tensor called `name` holds at `step`, all of it: the same on every rank."""
    if not like.is_floating_point():
        return torch.full(like.shape, step, dtype=like.dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    whole = torch.randn(like.shape, generator=generator)
    if step % 10 == 3:  # an element that must not get into the average
        whole.view(-1)[-1] = float("nan")
    return whole.to(like.dtype)


@torch.no_grad()
def train(tensors: Mapping[str, Tensor], step: int) -> None:
    """A step of "training" that needs no network: the values of that step, part by part."""
    for name, tensor in tensors.items():
        mine(tensor).copy_(piece(value(name, step, tensor), tensor))


def tensors_of(model: nn.Module) -> Values:
    """Parameters and buffers as they are now. FSDP2 shows others after a forward pass."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def mine(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def piece(whole: Tensor, like: Tensor) -> Tensor:
    """The elements of `whole` that this rank holds of `like`."""
    if not isinstance(like, DTensor):
        return whole
    if mine(like).numel() == 0:
        return whole.new_empty(mine(like).shape)
    [chunk] = like.__create_chunk_list__()  # what torch.distributed.checkpoint goes by
    for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
        whole = whole.narrow(dim, offset, size)
    return whole


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every rank; they must all ask."""
    full: Tensor = tensor.detach()
    return full.full_tensor() if isinstance(full, DTensor) else full


def wholes(tensors: Mapping[str, Tensor]) -> Values:
    """`whole` of each, in the order of names: ranks must ask in one order."""
    return {name: whole(tensors[name]) for name in sorted(tensors)}


def same(got: Any, expected: Any, what: str) -> None:
    """Fail unless the two are equal bit for bit, naming what differs."""
    if found := list(differences(got, expected)):
        raise AssertionError(f"{what}: {found[:6]}")
