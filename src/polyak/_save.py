"""Inference weights in a file, and back."""

import json
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ._average import Uses, check_is_average
from ._errors import ArgumentError
from ._files import read_tensors, write_tensors
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
    about = {"kind": "averaged weights", **average._provenance(), "polyak": _version()}
    kept, dropped = _split_ties(tensors)
    if ties == "copy":
        kept |= {name: tensors[name].clone() for name in dropped}
        dropped = {}
    # Other readers look for {dropped name: kept name} beside our entry, which comes last: a weight
    # may be called "polyak".
    about["ties"] = dropped
    write_tensors(Path(path), kept, {**dropped, "polyak": json.dumps(about)})


def load_weights(path: str | PathLike[str], model: nn.Module | None = None) -> dict[str, Tensor]:
    """Read weights that `save` (or any safetensors writer) wrote.

    Args:
        path: the file.
        model: when given, the weights are written into it, after all names and shapes were checked;
            wrappers (DDP, compile) do not matter.

    Returns:
        Tensors by name, tied ones under each of their names.

    Raises:
        FileNotFoundError: no such file.
        ArgumentError: not a whole safetensors file.
        MatchError: other names or shapes than the model's.
    """
    tensors, metadata = read_tensors(Path(path))
    # safetensors.torch.save_model notes ties as {dropped name: kept name} beside {"format": "pt"}.
    noted = {name: kept for name, kept in metadata.items() if name != "format"}
    for name, kept in {**noted, **_own_ties(metadata)}.items():
        if name not in tensors and kept in tensors:
            tensors[name] = tensors[kept]
    if model is not None:
        load_into(model, tensors, str(path))
    return tensors


def _own_ties(metadata: dict[str, str]) -> dict[str, str]:
    """The ties that `save` noted; nothing where the file is from another writer."""
    try:
        ties = json.loads(metadata.get("polyak", "{}"))["ties"]
        return {name: kept for name, kept in ties.items() if isinstance(kept, str)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _split_ties(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under one name each, and the name kept for each name that was dropped."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    keeper = {name: min(tied) for tied in names.values() for name in tied}
    kept = {name: tensor for name, tensor in tensors.items() if keeper[name] == name}
    return kept, {name: kept for name, kept in keeper.items() if kept != name}


def _version() -> str:
    try:
        return version("polyak")
    except PackageNotFoundError:  # used from a source tree that was never installed
        return "unknown"
