"""One-dimensional views of tensors that lie in memory the same way."""

from collections.abc import Sequence

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


def flat_views(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """Each tensor as [elements] in memory order, or None when the orders differ.

    Channels-last and transposed weights are dense too; only their order of dimensions is another.
    """
    first = tensors[0]
    if all(t.is_contiguous() for t in tensors):
        return [t.view(-1) for t in tensors]
    if is_dense(first) and all(t.stride() == first.stride() for t in tensors):
        return [t.as_strided((t.numel(),), (1,)) for t in tensors]
    return None
