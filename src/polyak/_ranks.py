"""What several ranks with one average must agree on: replicas, buffers, how a common job ended."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _kernels as kernels
from ._average import Averages, Uses
from ._engine import Engine, check_undamaged
from ._errors import ArgumentError, MatchError, OrderError
from ._files import ALONE, Team, team_of
from ._sharding import is_sharded, part_of, plain

if TYPE_CHECKING:  # a build of torch may be without it
    from torch.distributed import ProcessGroup


def mesh_of(engine: Engine) -> Any:
    """The `DeviceMesh` over which an average is spread, of several the largest; None if it is not.

    Replicas of a mesh (tensor parallelism with data parallelism around it) know nothing of each
    other here.
    """
    spread = [tensor for tensor in engine.rows[0].tensors if is_sharded(tensor)]
    meshes = [tensor.device_mesh for tensor in spread]  # type: ignore[attr-defined]
    return max(meshes, key=lambda mesh: mesh.size(), default=None)


def team_of_average(engine: Engine) -> Team:
    """The ranks over which an average is spread, or this process alone."""
    mesh = mesh_of(engine)
    if mesh is None:
        return ALONE
    if mesh.size() == dist.get_world_size():
        return team_of()
    return team_of((mesh if mesh.ndim == 1 else mesh._flatten()).get_group())


def check_ranks(average: Uses | Averages, *, group: "ProcessGroup | None" = None) -> None:
    """Raise where ranks that must hold the same values do not; all ranks of `group` call it.

    Under plain data parallelism every rank computes its own average from its own replica, without a
    word to the others: they stay equal bit for bit as long as the replicas do. This looks: it
    compares the clocks, and checksums of live and averaged parameters between all ranks that hold
    the same elements of them (of a sharded model, the replicas of a shard). Only checksums travel.
    Buffers are left out: see `reduce_buffers`.

    Args:
        average: the same on each rank.
        group: the ranks to compare; None for all.

    Raises:
        MatchError: on every rank, with the tensors and ranks that differ from the first rank that
            holds them.
        OrderError: torch.distributed is not initialised; inside `applied()`.
    """
    engine = _engine_of(average)
    _check_initialised("check_ranks")
    engine.settle()
    engine.check_not_lent("check_ranks")
    mine = (engine.now, engine.updates), _checksums(engine)
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    clocks = [clock for clock, _ in everyone]
    if len(set(clocks)) > 1:
        raise MatchError(
            f"ranks must have the same clock, got (now, updates) = {sorted(set(clocks))}. "
            "Call update on every rank after every step."
        )
    found = _differences([sums for _, sums in everyone])
    if found:
        some = "; ".join(f"{what} on ranks {ranks}" for what, ranks in list(found.items())[:3])
        raise MatchError(
            f"ranks must hold the same values, got {len(found)} tensors that differ: {some}. "
            "Build the average after the replicas are equal (after DDP is wrapped around the "
            "model), and load checkpoints on every rank."
        )


def _checksums(engine: Engine) -> dict[tuple[str, str, tuple[int, ...]], bytes]:
    """A short hash of what this rank holds, by kind, name and place."""
    found = {}
    rows = {f"average {i}": engine.values(i) for i in range(len(engine.rows))}
    live = [entry.live() for entry in engine.entries]
    for kind, tensors in {"live": live, **rows}.items():
        for entry, tensor in zip(engine.entries, tensors, strict=True):
            held = plain(tensor)
            if entry.kind == "buffer" or held.numel() == 0:
                continue
            part = part_of(tensor)
            words = kernels.fingerprints([held.contiguous()])[0].cpu().numpy().tobytes()
            place = () if part is None else part.offsets
            found[kind, entry.name, place] = hashlib.blake2b(words, digest_size=16).digest()
    return found


def _differences(
    everyone: Sequence[Mapping[tuple[str, str, tuple[int, ...]], bytes]],
) -> dict[str, list[int]]:
    """The ranks whose values are not those of the first rank that has them, by tensor."""
    first: dict[tuple[str, str, tuple[int, ...]], bytes] = {}
    found: dict[str, list[int]] = {}
    for rank, sums in enumerate(everyone):
        for key, digest in sums.items():
            if first.setdefault(key, digest) != digest:
                kind, name, _ = key
                found.setdefault(f"{name!r} ({kind.removesuffix(' 0')})", []).append(rank)
    return found


@torch.no_grad()
def reduce_buffers(average: Uses | Averages, *, group: "ProcessGroup | None" = None) -> list[str]:
    """Replace averaged buffers that differ by rank by those of all ranks together.

    A buffer that no one synchronises (batch norm without `SyncBatchNorm`) is averaged by each rank
    as it sees it, and a checkpoint keeps one rank's. Call this before saving or evaluating, on all
    ranks of `group`: each buffer becomes its mean over the ranks; the variances of batch norms
    become those of all ranks' data, mean(var + mean^2) - (mean of means)^2. Statistics kept by
    `refresh_norms` are pooled likewise. The live model is as before.

    Args:
        average: the same on each rank.
        group: the ranks that see different data; None for all.

    Returns:
        The names of the buffers that were reduced.

    Raises:
        OrderError: torch.distributed is not initialised; inside `applied()`; a lost average.
    """
    engine = _engine_of(average)
    _check_initialised("reduce_buffers")
    engine.check_not_lent("reduce_buffers")
    rows = range(len(engine.rows)) if isinstance(average, Averages) else [average._row]
    names: list[str] = []
    for index in rows:
        row = engine.rows[index]
        check_undamaged(row)
        buffers = {
            entry.name: plain(tensor)
            for entry, tensor in zip(engine.entries, row.tensors, strict=True)
            if entry.kind == "buffer" and not is_sharded(tensor)
        }
        _pool({**buffers, **row.norms}, group)
        names = list(buffers)
    engine.show()
    return names


def _pool(buffers: Mapping[str, Tensor], group: "ProcessGroup | None") -> None:
    """Set floating buffers to those of all ranks; means before variances."""
    count = dist.get_world_size(group)
    spreads: dict[str, Tensor] = {}  # by how much the ranks' means differ from each other, squared
    for name, tensor in sorted(buffers.items()):  # running_mean comes before running_var
        if not tensor.is_floating_point():
            continue
        owner, _, kind = name.rpartition(".")
        wide = tensor.double()
        mean = _mean(wide, count, group)
        if kind == "running_mean":
            spreads[owner] = _mean((wide - mean).square(), count, group)
        elif kind == "running_var" and owner in spreads:
            mean += spreads[owner]
        tensor.copy_(mean)


def _mean(tensor: Tensor, count: int, group: "ProcessGroup | None") -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total, group=group)
    return total / count


def _engine_of(average: object) -> Engine:
    if not isinstance(average, Uses | Averages):
        raise ArgumentError(f"average must be one of polyak's, got {type(average).__name__}.")
    return average._engine


def _check_initialised(action: str) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise OrderError(
            f"{action} must come after torch.distributed.init_process_group, got no process group. "
            "On one process there is nothing to compare."
        )
