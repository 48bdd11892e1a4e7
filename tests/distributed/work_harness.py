"""What the tests of the harness run on ranks."""

import os
import signal
import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import polyak
from ranks import count_collectives


def sum_of_ranks() -> tuple[int, int, float, int]:
    """Rank, world size, the sum of all ranks, and the process."""
    mine = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(mine)
    return dist.get_rank(), dist.get_world_size(), mine.item(), os.getpid()


def tensor_of(size: int) -> torch.Tensor:
    return torch.full((size,), float(dist.get_rank()))


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise polyak.MatchError(f"'weight' differs on rank {rank}")
    dist.barrier()


class UnwillingError(Exception):
    """Cannot be pickled and read again: its constructor takes two arguments."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def fail_unwillingly() -> None:
    raise UnwillingError(1, 2)


def warn() -> None:
    warnings.warn("stalled", polyak.AveragingWarning, stacklevel=1)


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def hang_on(rank: int) -> int:
    if dist.get_rank() == rank:
        time.sleep(1_000)
    return os.getpid()


def hang(pid_file: str) -> None:
    with open(f"{pid_file}-{dist.get_rank()}", "w") as file:
        file.write(str(os.getpid()))
    os.rename(file.name, f"{file.name}.ready")
    time.sleep(1_000)


def counts() -> dict[str, tuple[dict[str, int], int]]:
    """What `count_collectives` says of things whose collectives are known."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    sharded = distribute_tensor(torch.ones(5, 2), mesh, [Shard(0)])
    calls: dict[str, Callable[[], object]] = {
        "nothing": lambda: sharded.to_local().add_(1.0),
        "all_reduce": lambda: dist.all_reduce(torch.ones(1)),
        "barrier": lambda: dist.barrier(),
        "full_tensor": lambda: sharded.full_tensor(),
        "forward": lambda: model(torch.ones(2, 8)),
        "object": lambda: dist.all_gather_object([None] * dist.get_world_size(), "x"),
    }
    told = {}
    for name, call in calls.items():
        with count_collectives() as counted:
            call()
        told[name] = (dict(counted.ops), counted.issued)
    return told
