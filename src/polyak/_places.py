"""Where tensors lie: asked before every update, of a thousand of them, for a third of its time."""

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

try:  # not documented; without them we ask tensor by tensor
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None  # type: ignore[assignment, misc]

_MODES = 4  # so many times guards are made: of autograd and inference, on and off


class Places:
    """The memory, shape and strides of some tensors when this was made.

    A cast or a move in place, or another `.data`, swaps the memory behind the same parameter.
    Memory that is freed or moved (`resize_`, `share_memory_`) takes views along, but not the
    addresses that a kernel was given; and then its address may be anybody's.

    Args:
        tensors: detached, or they would follow the swap.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._guards: TensorGuards | None = None
        self._left = 0 if TensorGuards is None else _MODES

    def still_hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors lie where those did, in the same shape and order of memory."""
        if (
            list(map(Tensor.data_ptr, tensors)) != self._addresses
            or list(map(Tensor.data_ptr, self._tensors)) != self._addresses
        ):
            return False
        # The guards of torch.compile compare dtype, shape and strides of all tensors in one call,
        # in a third of the time of `is_set_to`. They mind modes and `requires_grad` as well: their
        # no is only a hint. One is asked all the same: a mode that forbids all operations must
        # forbid it now, when nothing is written.
        if self._guards is not None and self._guards.check(*tensors):
            return _same_layout(tensors[:1], self._tensors[:1])
        if not _same_layout(tensors, self._tensors):
            return False
        if self._left:
            self._left -= 1
            self._guards = _guards_of(tensors)
        return True

    def left_by(self, tensors: Sequence[Tensor]) -> list[int]:
        """Which of these tensors have another address than those had, whatever their layout."""
        pairs = enumerate(zip(tensors, self._addresses, strict=True))
        return [index for index, (tensor, address) in pairs if tensor.data_ptr() != address]


def _same_layout(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether tensors at the same addresses are the same in memory, dtype, shape and strides."""
    try:
        same = all(map(Tensor.is_set_to, ones, others))
    except NotImplementedError:  # a device for which torch does not say
        same = list(map(_layout, ones)) == list(map(_layout, others))
    return same and list(map(_dtype, ones)) == list(map(_dtype, others))


def _guards_of(tensors: Sequence[Tensor]) -> "TensorGuards | None":
    try:
        return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except TypeError:  # they are made in another way in this torch
        return None


_dtype = attrgetter("dtype")


def _layout(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    return tensor.shape, tensor.stride()
