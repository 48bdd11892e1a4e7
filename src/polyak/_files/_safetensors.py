"""Safetensors files: tensors by name and a few words about them, no code."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._errors import ArgumentError
from ._atomic import written_whole

_NOT_IN_THE_FORMAT = {torch.complex128, torch.complex32}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file whole or not at all."""
    foreign = [name for name, tensor in tensors.items() if tensor.dtype in _NOT_IN_THE_FORMAT]
    if foreign:
        raise ArgumentError(
            f"safetensors must be given dtypes that it knows, got {tensors[foreign[0]].dtype} for "
            f"{foreign[:3]}. Use torch.save(average.weights(), path) instead."
        )
    ready = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as temporary:
        save_file(ready, str(temporary), metadata={**metadata, "format": "pt"})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file and its metadata."""
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file, got {str(path)!r} which is not there.")
    try:
        with safe_open(str(path), framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ArgumentError(
            f"path must be a whole safetensors file, got {str(path)!r} ({error})."
        ) from error
