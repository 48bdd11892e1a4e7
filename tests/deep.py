"""Where two saved states differ, bit for bit."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def differences(a: Any, b: Any, at: str = "") -> Iterator[str]:
    """Paths at which two trees of tensors, mappings, lists and plain values are not the same.

    Tensors by dtype, shape and bits, so NaN equals itself and 0.0 is not -0.0; mappings by key, in
    any order; numbers by type and `repr`, which tells any two floats apart.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(bits(a), bits(b)):
            yield at
    elif isinstance(a, Mapping) and isinstance(b, Mapping):
        yield from (f"{at}/{key} (in one only)" for key in sorted(set(a) ^ set(b), key=str))
        for key in a.keys() & b.keys():
            yield from differences(a[key], b[key], f"{at}/{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            yield f"{at} (lengths {len(a)} and {len(b)})"
        for index, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from differences(x, y, f"{at}/{index}")
    elif type(a) is not type(b) or repr(a) != repr(b):
        yield f"{at} ({a!r} and {b!r})"


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, in the order of its elements."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
