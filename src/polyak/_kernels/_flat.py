"""One-dimensional views of tensors that lie in memory the same way."""

from collections.abc import Sequence

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in any order of dimensions, once each."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether several elements share one memory cell (`expand`): it cannot be written in place."""
    return any(st == 0 and n > 1 for st, n in zip(tensor.stride(), tensor.shape, strict=True))


@torch.no_grad()
def write_(target: Tensor, value: Tensor) -> None:
    """Give `target` the values of `value`, in place wherever its memory can hold them.

    An expanded tensor is written once a cell; only values that differ where it has but one cell
    give it memory of its own.
    """
    if not overlaps_itself(target):
        target.copy_(value)
        return
    one_each = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in target.stride())
    if torch.equal(value[one_each].expand_as(value), value):
        target[one_each].copy_(value[one_each])
    else:
        target.data = value.to(target.device, target.dtype, copy=True)


def flat_views(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """Each tensor as [elements] in memory order, or None when the orders differ.

    Channels-last and transposed weights are dense too; only their order of dimensions is another.
    """
    first = tensors[0]
    alike = is_dense(first) and all(t.stride() == first.stride() for t in tensors)
    if not alike and not all(t.is_contiguous() for t in tensors):
        return None
    # No `view(-1)`: of a single element it would keep whatever stride that has.
    return [t.as_strided((t.numel(),), (1,)) for t in tensors]
