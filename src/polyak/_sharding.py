"""Tensors spread over the ranks of a training run: the part that is ours, and where it lies."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._errors import ArgumentError, OrderError


@dataclass(frozen=True)
class Part:
    """Which elements of a whole tensor one rank holds: a box.

    Args:
        shape: of the whole tensor.
        offsets: the first index of the box in each dimension.
        sizes: of the box.
    """

    shape: torch.Size
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def of(self, whole: Tensor) -> Tensor:
        """A view of these elements in a tensor that holds all of them."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            if size != whole.shape[dim]:
                whole = whole.narrow(dim, offset, size)
        return whole

    @property
    def high(self) -> tuple[int, ...]:
        """The indices that the box stays below."""
        return tuple(low + size for low, size in zip(self.offsets, self.sizes, strict=True))


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a `DTensor`; nobody has one before its module is loaded."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: the same object where that is all of it."""
    if is_sharded(tensor):
        held: Tensor = tensor._local_tensor  # type: ignore[attr-defined] # to_local() is for autograd
        return held
    return tensor


def plain(tensor: Tensor) -> Tensor:
    """What this rank holds, in the same memory: no gradient, no subclass that only tags it."""
    return local(tensor).detach().as_subclass(Tensor)


def part_of(tensor: Tensor) -> Part | None:
    """Where the elements of this rank lie in a sharded tensor; None for an ordinary one."""
    if not is_sharded(tensor):
        return None
    shape, sizes = tensor.shape, tuple(local(tensor).shape)
    if 0 in sizes:  # a rank that is left without, or is not among those that share
        sizes = sizes if len(sizes) == len(shape) else (0,) * len(shape)
        return Part(shape, (0,) * len(shape), sizes)
    [chunk] = tensor.__create_chunk_list__()  # type: ignore[attr-defined] # how DCP asks
    return Part(shape, tuple(chunk.offsets), tuple(chunk.sizes))


def spread_like(piece: Tensor, like: Tensor) -> Tensor:
    """`piece` as this rank's part of a tensor that is spread as `like` is."""
    if not is_sharded(like):
        return piece
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    # As FSDP2 makes its own: `from_local` would move shards that are kept on the host to the mesh's
    # device, and guess the shape of the whole from a part of it.
    meta = TensorMeta(like.shape, like.stride(), piece.dtype)
    spec = DTensorSpec(like.device_mesh, like.placements, tensor_meta=meta)  # type: ignore[attr-defined]
    return DTensor(piece.detach(), spec, requires_grad=False)


def is_spread_like(a: Tensor, b: Tensor) -> bool:
    """Whether each rank holds the same elements of both."""
    return spread_of(a) == spread_of(b)


def spread_of(tensor: Tensor) -> tuple[Any, ...]:
    """Over which ranks a sharded tensor is spread, and how; () for an ordinary one."""
    if not is_sharded(tensor):
        return ()
    return tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]


def mesh_of(group: Any, device: torch.device) -> Any:
    """The ranks of a process group in a row, as `DTensor` knows them."""
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise ArgumentError(
            f"shard must be a torch.distributed.ProcessGroup that this rank is in, got {group!r}. "
            "Pass torch.distributed.group.WORLD for all ranks."
        )
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(group, device.type)


def spread_over(tensor: Tensor, dtype: torch.dtype, mesh: Any) -> Tensor:
    """An empty tensor of the shape of `tensor`, cut among the ranks of `mesh`.

    Along the first dimension that is cut nearly evenly (within 2 %), else along the one that is cut
    most evenly. A tensor without dimensions is on every rank.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    world, shape = mesh.size(), tensor.shape

    def excess(dim: int) -> float:
        """By how much the largest piece is larger than an even one."""
        return float(-(-shape[dim] // world) * world / shape[dim])

    dims = [dim for dim in range(tensor.dim()) if shape[dim]]
    dim = min(dims, key=lambda dim: max(excess(dim), 1.02), default=None)
    placement = Replicate() if dim is None else Shard(dim)
    pieces = [tensor] if dim is None else tensor.chunk(world, dim)
    rank = mesh.get_local_rank()
    if dim is None or len(pieces) > rank:
        piece = pieces[0 if dim is None else rank]
    else:
        piece = tensor.narrow(dim, 0, 0)  # smaller than the world
    return DTensor.from_local(
        torch.empty_like(piece, dtype=dtype, memory_format=torch.contiguous_format),
        mesh,
        [placement],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def piece_for(value: Tensor, target: Tensor, send_as: torch.dtype | None = None) -> Tensor:
    """The elements of `value` that `target` holds on this rank, as an ordinary tensor.

    Ranks talk to each other only where this one lacks some of them: `value` is sharded and `target`
    is not, or otherwise.

    Args:
        value: all of a tensor, or this rank's part of it.
        target: likewise.
        send_as: the dtype in which elements travel, if they do.
    """
    if is_sharded(value) and not is_spread_like(value, target):
        value = whole(value, send_as)
    part = None if is_sharded(value) else part_of(target)
    return plain(value) if part is None else part.of(plain(value))


def whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """All elements of a tensor, on every rank that has some; a collective where it is sharded."""
    if not is_sharded(tensor):
        return tensor if dtype is None else tensor.to(dtype)
    # The links are those of the mesh's device, also for shards that are kept on the host.
    device = tensor.device_mesh.device_type  # type: ignore[attr-defined]
    held = plain(tensor)
    here = held.to(device if held.device.type != device else held.device, dtype or held.dtype)
    return plain(spread_like(here, tensor).full_tensor())  # type: ignore[attr-defined]


def place_in_mesh(tensor: Tensor) -> tuple[int, ...]:
    """Which of the parts of a sharded tensor this one is, also after it was pickled elsewhere."""
    coordinate = tensor.device_mesh.get_coordinate() if is_sharded(tensor) else None  # type: ignore[attr-defined]
    return tuple(coordinate or ())


def place_of_this_rank(tensor: Tensor) -> tuple[int, ...]:
    """Which of the parts of a sharded tensor is for this rank; () where none is."""
    if not (is_sharded(tensor) and dist.is_initialized()):
        return ()
    ranks = tensor.device_mesh.mesh  # type: ignore[attr-defined]
    return tuple(next(iter((ranks == dist.get_rank()).nonzero().tolist()), ()))


@contextmanager
def agreed(tensors: Iterable[Tensor], action: str) -> Iterator[None]:
    """A part of a common job in which any rank may fail: then all of them raise at its end.

    Costs one small collective for each mesh over which `tensors` are spread, else nothing. All
    ranks must come by.

    Raises:
        OrderError: another rank has an error.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    failed = error is not None
    meshes: list[Any] = []
    for tensor in tensors:
        mesh = tensor.device_mesh if is_sharded(tensor) else None  # type: ignore[attr-defined]
        if mesh is not None and mesh not in meshes:
            meshes.append(mesh)
    for mesh in meshes * len(meshes):  # so often that the word gets round from one to another
        failed = _any_of(mesh, failed)
    if error is not None:
        raise error
    if failed:
        raise OrderError(
            f"{action} must succeed on every rank, got an error on another one. Read its message; "
            "here nothing was written."
        )


def _any_of(mesh: Any, flag: bool) -> bool:
    """Whether any rank of a mesh has raised its flag; a rank outside of it keeps its own."""
    if mesh.get_coordinate() is None:
        return flag
    from torch.distributed.tensor import DTensor, Partial

    mine = torch.tensor(int(flag), device=mesh.device_type)
    spread = DTensor.from_local(mine, mesh, [Partial("max")] * mesh.ndim, run_check=False)
    return bool(plain(spread.full_tensor()))


def check_can_be_cut(tensor: Tensor, name: str) -> None:
    """Refuse partial sums: their parts are no elements of anything."""
    if is_sharded(tensor) and any(p.is_partial() for p in tensor.placements):  # type: ignore[attr-defined]
        raise ArgumentError(
            f"{name!r} must hold its values, got a DTensor of partial sums "
            f"{tensor.placements}. Redistribute it first."  # type: ignore[attr-defined]
        )


# ── FSDP2: a module shows its shards, or for a while whole parameters in their place ──────────────


def _all_states(otherwise: Iterable[nn.Module] = ()) -> list[Any]:
    """FSDP2's records of every module in the process; of `otherwise` where torch keeps no list."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrapped = getattr(fsdp, "FSDPModule", None)
    if wrapped is None:
        return []
    composed = sys.modules.get("torch.distributed._composable_state")
    owners = list(getattr(composed, "_module_state_mapping", otherwise))
    states = [owner._get_fsdp_state() for owner in owners if isinstance(owner, wrapped)]
    return list({id(state): state for state in states}.values())


def _fsdp_states(model: nn.Module) -> list[Any]:
    """FSDP2's records of the modules whose groups hold parameters of `model`, in a fixed order.

    `fully_shard` may have been called on a module around it: then nothing in `model` tells.
    """
    states = _all_states(model.modules())
    inside = {id(module) for module in model.modules()} if states else set()
    return [
        state
        for state in states
        if any(place[0] in inside for record in _records(state) for place in _places(record))
    ]


def is_gathered_somewhere(tensor: Tensor) -> bool:
    """Whether FSDP2 shows this tensor in the place of a shard, in any module of the process."""
    return any(is_gathered(record, tensor) for state in _all_states() for record in _records(state))


def _groups(state: Any) -> list[Any]:
    """Parameters that FSDP2 gathers together."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch before it had several a module
        groups = [state._fsdp_param_group] if state._fsdp_param_group else []
    return list(groups)


def _records(state: Any) -> list[Any]:
    return [record for group in _groups(state) for record in group.fsdp_params]


def fsdp_parameters(model: nn.Module) -> dict[tuple[int, str], Any]:
    """FSDP2's record of each parameter, by (id of the module that shows it, name in it)."""
    return {
        place: record
        for state in _fsdp_states(model)
        for record in _records(state)
        for place in _places(record)
    }


def _places(record: Any) -> Iterator[tuple[int, str]]:
    """Where one parameter hangs: its own place, and those of layers that share it."""
    info = record._module_info
    yield id(info.module), info.param_name
    for module, name in zip(info.shared_modules, info.shared_param_names, strict=True):
        yield id(module), name


def is_gathered(record: Any, shown: Tensor | None) -> bool:
    """Whether `shown` is what FSDP2 has put in the place of a shard for the time being."""
    return record is not None and any(
        shown is getattr(record, attribute, None)
        for attribute in ("_unsharded_param", "_sharded_post_forward_param")
    )


def reshard(model: nn.Module | None, *, after_error: bool = False) -> None:
    """Make every FSDP2 group show its shards, so that the next forward pass gathers them anew.

    A forward pass without a backward leaves the root group whole, and what was gathered ahead
    waits: both hold the values of before.

    Args:
        model: the model, or None where there is only a set of named tensors.
        after_error: end a forward pass that was interrupted, too.

    Raises:
        OrderError: in the middle of a forward or backward pass.
    """
    states = [] if model is None else _fsdp_states(model)
    groups = [group for state in states for group in _groups(state)]
    at_work = [group for group in groups if _is_at_work(group)]
    if at_work and not after_error:
        raise OrderError(
            "the model must not be inside a forward or backward pass, got an FSDP2 group at work "
            f"({at_work[0]._training_state}). Come between passes; after an exception in one, call "
            "reset_iter_state() of the outermost FSDP2 module first."
        )
    for group in groups:
        group.wait_for_unshard()  # nothing may stay under way
    offloaded = any(
        getattr(record, "offload_to_cpu", False) for s in states for record in _records(s)
    )
    if offloaded and torch.accelerator.is_available():
        torch.accelerator.synchronize()  # it may still be reading the shards on the host
    for state in states if at_work else ():
        _forget_pass(state)
    for group in groups:
        group.reshard()


def _is_at_work(group: Any) -> bool:
    return group._training_state is not type(group._training_state).IDLE


def _forget_pass(state: Any) -> None:
    """Take modules out of the pass that an exception has ended."""
    if not hasattr(state, "_reset_iter_state"):  # torch before it had one
        for owner in (state, *_groups(state)):
            owner._training_state = type(owner._training_state).IDLE
        state._state_ctx.iter_forward_root = None
    elif state._is_root:
        state._reset_iter_state()
