"""Inference weights in a file, and back."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ._average import Uses, check_is_average
from ._errors import ArgumentError
from ._files import open_checkpoint, write_tensors
from ._roles import take_inventory
from ._version import version_of_polyak
from ._weights import load_into

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

    Args:
        average: any average.
        path: the file, in a folder that exists.
        dtype: for the real floating tensors, instead of the live dtype.
        ties: tied weights once, noted in the metadata as `safetensors.torch.save_model` does
            ("drop"), or under each name, for a bare `load_state_dict` ("copy").

    Raises:
        ArgumentError: no such folder; a dtype that safetensors or the values do not fit.

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
    tensors = average.weights(dtype)
    foreign = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if foreign:
        raise ArgumentError(
            f"safetensors must be given tensors only, got extra state {foreign[:3]}. "
            "Use torch.save(average.weights(), path) instead."
        )
    average._warn_of_unreached_cap()
    about = {"kind": "averaged weights", **average._provenance(), "polyak": version_of_polyak()}
    kept, dropped = _split_ties(tensors)
    if ties == "copy":
        kept |= {name: tensors[name].clone() for name in dropped}
        dropped = {}
    # Other readers look for {dropped name: kept name} beside our entry, which comes last: a weight
    # may be called "polyak".
    about["ties"] = dropped
    write_tensors(Path(path), kept, {**dropped, "polyak": json.dumps(about)})


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


def _split_ties(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under one name each, and the name kept for each name that was dropped."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    keeper = {name: min(tied) for tied in names.values() for name in tied}
    kept = {name: tensor for name, tensor in tensors.items() if keeper[name] == name}
    return kept, {name: kept for name, kept in keeper.items() if kept != name}
