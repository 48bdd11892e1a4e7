"""What several ranks with one average must agree on: replicas, buffers, how a common job ended."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _kernels as kernels
from ._average import Averages, Uses
from ._engine import Engine, Row, check_undamaged
from ._errors import ArgumentError, AveragingError, MatchError, OrderError
from ._sharding import is_sharded, part_of, plain
from ._window import Window

if TYPE_CHECKING:  # a build of torch may be without it
    from torch.distributed import ProcessGroup


def mesh_of_average(engine: Engine) -> Any:
    """The `DeviceMesh` over which an average is spread, of several the largest; None if it is not.

    Replicas of a mesh (tensor parallelism with data parallelism around it) know nothing of each
    other here.
    """
    spread = [tensor for tensor in engine.rows[0].tensors if is_sharded(tensor)]
    meshes = [tensor.device_mesh for tensor in spread]  # type: ignore[attr-defined]
    return max(meshes, key=lambda mesh: mesh.size(), default=None)


def leads_in(mesh: Any) -> bool:
    """Whether this rank is the one of a mesh that does what only one may do."""
    place = None if mesh is None else mesh.get_coordinate()
    return mesh is None or (place is not None and not any(place))


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
    ranks = _ranks_in(group, "check_ranks")
    mine: Any = None
    try:
        engine, rows = _rows_of(average, "check_ranks")
        mine = (engine.now, engine.updates), _checksums(engine, rows)
    except AveragingError as error:  # the others must hear of it, not wait
        mine = error
    everyone: list[Any] = [None] * len(ranks)
    dist.all_gather_object(everyone, mine, group=group)
    if isinstance(mine, AveragingError):
        raise mine
    for rank, theirs in zip(ranks, everyone, strict=True):
        if isinstance(theirs, AveragingError):
            raise MatchError(f"ranks must hold the same values, got on rank {rank}: {theirs}")
    clocks = [clock for clock, _ in everyone]
    if len(set(clocks)) > 1:
        raise MatchError(
            f"ranks must have the same clock, got (now, updates) = {sorted(set(clocks))}. "
            "Call update on every rank after every step."
        )
    found = _differences(ranks, [sums for _, sums in everyone])
    if found:
        some = "; ".join(f"{what} on ranks {where}" for what, where in list(found.items())[:3])
        raise MatchError(
            f"ranks must hold the same values, got {len(found)} tensors that differ: {some}. "
            "Build the average after the replicas are equal (after DDP is wrapped around the "
            "model), and load checkpoints on every rank."
        )


def _checksums(
    engine: Engine, rows: Sequence[Row]
) -> dict[tuple[str, str, tuple[int, ...]], bytes]:
    """A short hash of what this rank holds, by kind, name and place."""
    found = {}
    held_by = {"live": [entry.live() for entry in engine.entries]}
    held_by |= {f"average {index}": row.tensors for index, row in enumerate(rows)}
    for kind, tensors in held_by.items():
        for entry, tensor in zip(engine.entries, tensors, strict=True):
            held = plain(tensor)
            if entry.kind == "buffer" or held.numel() == 0:
                continue
            part = part_of(tensor)
            words = kernels.fingerprint(held.contiguous()).cpu().numpy().tobytes()
            place = () if part is None else part.offsets
            found[kind, entry.name, place] = hashlib.blake2b(words, digest_size=16).digest()
    return found


def _differences(
    ranks: Sequence[int],
    everyone: Sequence[Mapping[tuple[str, str, tuple[int, ...]], bytes]],
) -> dict[str, list[int]]:
    """The ranks whose values are not those of the first rank that has them, by tensor."""
    first: dict[tuple[str, str, tuple[int, ...]], bytes] = {}
    found: dict[str, list[int]] = {}
    for rank, sums in zip(ranks, everyone, strict=True):
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
    _ranks_in(group, "reduce_buffers")
    engine, rows = _rows_of(average, "reduce_buffers")
    names: set[str] = set()
    for row in rows:
        buffers = {
            entry.name: plain(tensor)
            for entry, tensor in zip(engine.entries, row.tensors, strict=True)
            if entry.kind == "buffer" and not is_sharded(tensor)
        }
        for kept in (buffers, row.norms):
            names |= _pool(kept, group)
    if isinstance(average, Window):
        average._stale = True  # the mean of what was just pooled
    engine.show()
    return sorted(names)


def _pool(buffers: Mapping[str, Tensor], group: "ProcessGroup | None") -> set[str]:
    """Set floating buffers to those of all ranks; return their names."""
    count = dist.get_world_size(group)
    done: set[str] = set()
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
        done.add(name)
    return done


def _mean(tensor: Tensor, count: int, group: "ProcessGroup | None") -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total, group=group)
    return total / count


def _rows_of(average: object, action: str) -> tuple[Engine, list[Row]]:
    """An engine and all that it keeps for an average, up to date and not in use."""
    if not isinstance(average, Uses | Averages):
        raise ArgumentError(f"average must be one of polyak's, got {type(average).__name__}.")
    engine = average._engine
    engine.settle()
    engine.check_not_lent(action)
    if isinstance(average, Averages):
        rows = engine.rows
    else:
        average._refresh()
        captured = average._ring if isinstance(average, Window) else []
        rows = [engine.rows[average._row], *captured]
    for row in rows:
        check_undamaged(row)
    return engine, rows


def _ranks_in(group: "ProcessGroup | None", action: str) -> list[int]:
    """The ranks of a group that this one is in, as all ranks are counted."""
    if not (dist.is_available() and dist.is_initialized()):
        raise OrderError(
            f"{action} must come after torch.distributed.init_process_group, got no process group. "
            "On one process there is nothing to compare."
        )
    if dist.get_rank(group) < 0:
        raise ArgumentError(
            f"group must be one that this rank is in, got rank {dist.get_rank()} outside of it. "
            f"Call {action} on the ranks of the group only."
        )
    return list(dist.get_process_group_ranks(group))
