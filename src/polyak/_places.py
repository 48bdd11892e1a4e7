"""Where tensors lie: asked before every update, of a thousand of them, for a fifth of its time."""

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

try:  # not documented; without them we ask tensor by tensor
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None  # type: ignore[assignment, misc]


class Places:
    """The memory, shape and strides of some tensors when this was made.

    A cast or a move in place, or another `.data`, swaps the memory behind the same parameter.
    Memory that is freed or moved (`resize_`, `share_memory_`) takes views along, but not the
    addresses that a kernel was given. We keep the tensors: while they hold their memory, nobody
    else gets that address.

    Args:
        tensors: detached, or they would follow the swap.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._guards: TensorGuards | None = None

    def still_hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors lie where those did, in the same shape and order of memory."""
        if list(map(Tensor.data_ptr, tensors)) != self._addresses:
            return False
        # The guards of torch.compile compare dtype, shape and strides of all tensors in one call,
        # in a third of the time of `is_set_to`. They mind modes and `requires_grad` as well: their
        # no is only a hint.
        if self._guards is not None and self._guards.check(*tensors):
            return True
        try:
            same = all(map(Tensor.is_set_to, tensors, self._tensors))
        except NotImplementedError:  # a device for which torch does not say
            same = list(map(_layout, tensors)) == list(map(_layout, self._tensors))
        same = same and list(map(_dtype, tensors)) == list(map(_dtype, self._tensors))
        if same and TensorGuards is not None:
            self._guards = TensorGuards(
                *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
            )
        return same


_dtype = attrgetter("dtype")


def _layout(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    return tensor.shape, tensor.stride()
