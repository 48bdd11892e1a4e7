"""Inference weights in a file, and back."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ._average import Uses, check_is_average
from ._engine import Engine
from ._errors import ArgumentError
from ._files import TensorInfo, Writer, file_writer, open_checkpoint
from ._ranks import leads_in, mesh_of_average
from ._roles import take_inventory
from ._sharding import agreed
from ._version import version_of_polyak
from ._weights import check_all_fit, dtype_in, gathered_set, load_into

Ties = Literal["drop", "copy"]


def save(
    average: Uses,
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    ties: Ties = "drop",
) -> None:
    """Write the averaged weights to a safetensors file, for inference with the plain class.

    The file is written whole or not at all, synced and renamed. Its metadata says what it is: the
    rule, time, updates and the version of polyak. To resume training save `state_dict()` instead.

    An average that is spread over ranks is gathered and written one tensor at a time: all of them
    must call this with the same path, the first one writes, and it returns when the file is
    there. Of several groups of ranks that hold the same average, such as data-parallel replicas of
    a tensor-parallel model, one is enough.

    Args:
        average: any average.
        path: the file, in a folder that exists.
        dtype: for the real floating tensors, instead of the live dtype.
        ties: tied weights once, noted in the metadata as `safetensors.torch.save_model` does
            ("drop"), or under each name, for a bare `load_state_dict` ("copy").

    Raises:
        ArgumentError: no such folder; a name that says another format, like `.pt`; a dtype that
            safetensors or the values do not fit.
        OrderError: another rank has an error.

    Examples:
        >>> import polyak, tempfile
        >>> average = polyak.Average(torch.nn.Linear(2, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     polyak.save(average, f"{folder}/averaged.safetensors")
        ...     sorted(polyak.load_weights(f"{folder}/averaged.safetensors"))
        ['bias', 'weight']
    """
    if ties not in ("drop", "copy"):
        raise ArgumentError(f"ties must be 'drop' or 'copy', got {ties!r}.")
    check_is_average(average)
    average._ready("save")

    average._warn_of_unreached_cap()
    engine, row = average._engine, average._row
    infos, kept = _announced(engine, dtype, ties)
    about = {"kind": "averaged weights", **average._provenance(), "polyak": version_of_polyak()}
    dropped = {} if ties == "copy" else {n: name for n, name in kept.items() if n != name}
    about["ties"] = dropped
    # Other readers look for {dropped name: kept name} beside our entry, which comes last: a weight
    # may be called "polyak".
    words = {**dropped, "polyak": json.dumps(about)}
    spread = engine.rows[row].tensors
    leads = leads_in(mesh_of_average(engine))
    with ExitStack() as stack:
        writer: Writer | None = None
        with agreed(spread, "save"):
            check_all_fit(engine, row, dtype)
            if leads:
                writer = stack.enter_context(file_writer(Path(path), infos, words))
        error: Exception | None = None
        for names, value in gathered_set(engine, row, dtype):
            if writer is not None and error is None:
                try:  # the others count on this rank for every tensor that is still to come
                    for name in names if ties == "copy" else [kept[names[0]]]:
                        writer.write(name, 0, value.reshape(-1))
                except Exception as raised:
                    error = raised
        with agreed(spread, "save"):
            if error is not None:
                raise error
            stack.close()  # synced and renamed


def _announced(
    engine: Engine, dtype: torch.dtype | None, ties: Ties
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """What will be in the file, and for every name the one under which its tensor is kept."""
    if dtype is not None and not dtype.is_floating_point:
        raise ArgumentError(f"dtype must be a floating point dtype, got {dtype}.")
    if engine.inventory.extras:
        raise ArgumentError(
            f"safetensors must be given tensors only, got extra state "
            f"{[name for name, _ in engine.inventory.extras][:3]}. "
            "Use torch.save(average.weights(), path) instead."
        )
    names: dict[int, list[str]] = {}
    for name, index in engine.inventory.order:
        names.setdefault(index, []).append(name)
    kept = {name: min(tied) for tied in names.values() for name in tied}
    infos = {}
    for name, index in engine.inventory.order:
        live = engine.inventory.entries[index].live()
        if ties == "copy" or kept[name] == name:
            infos[name] = TensorInfo(dtype_in(live, dtype), tuple(live.shape))
    return infos, kept


def load_weights(
    path: str | PathLike[str], model: nn.Module | None = None, *, key: str | None = None
) -> dict[str, Tensor]:
    """Read the weights of a checkpoint, the averaged ones where it has them.

    Whatever `polyak.save` or any other writer of safetensors wrote, in one file, in shards or in a
    Hugging Face folder; files of `torch.save`, without running what they pickle; folders of
    torch.distributed.checkpoint. Averages of ema-pytorch, timm, torch's AveragedModel, diffusers,
    Lightning and polyak are found in them, and those under names such as `model_ema`.

    Args:
        path: the file or folder.
        model: when given, the weights are written into it, after all names and shapes were checked;
            wrappers (DDP, compile) do not matter. Parameters that were frozen are not in snapshots
            and reconstructions of them: those stay as they are in the model.
        key: the way to other weights in the file, such as "model".

    Returns:
        Tensors by name, tied ones under each of their names.

    Raises:
        FileNotFoundError: no such file.
        ArgumentError: not a whole checkpoint, or several weights in it that could be meant.
        MatchError: other names or shapes than the model's.
    """
    if not isinstance(path, str | PathLike):
        raise ArgumentError(
            f"path must be the path of a checkpoint, got {type(path).__name__}. "
            "Call load_weights(path, model)."
        )
    with open_checkpoint(path, key=key) as checkpoint:
        tensors = {
            name: checkpoint.read(name).view(info.shape)
            for name, info in checkpoint.tensors.items()
            if name not in checkpoint.aliases
        }
        tensors = {name: tensors[checkpoint.aliases.get(name, name)] for name in checkpoint.tensors}
    if model is not None:
        frozen = _frozen(checkpoint.metadata)
        load_into(
            model, _as_named_by(model, tensors, checkpoint.prefix), str(path), may_lack=frozen
        )
    return tensors


def _frozen(metadata: Mapping[str, str]) -> list[str]:
    """Parameters that a snapshot, or what was made of some, leaves to the model that has them."""
    try:
        names = json.loads(metadata["polyak"])["frozen"]
        return [name for name in names if isinstance(name, str)]
    except (KeyError, ValueError, TypeError):  # a file of somebody else
        return []


def _as_named_by(model: nn.Module, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Names with what was stripped, where `module` is no wrapper but a part of the model."""
    names = take_inventory(model).index
    if all(prefix + name in names for name in tensors):
        return {prefix + name: tensor for name, tensor in tensors.items()}
    return tensors
