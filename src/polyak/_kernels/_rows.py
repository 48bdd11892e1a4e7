"""Small averages side by side in one stretch of memory, where a thousand are mixed like one."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._flat import flat_views

# Elements. To gather a tensor costs the time of copying it, and saves that of the calls for it:
# measured on 2 cores, the two are equal at 8k without the guard and at 16k with it.
SMALL = 1 << 13

# Elements. What is gathered stays in the cache until it is mixed; and a view keeps its whole row in
# memory, and in a file: this is what it can cost. From 32k elements on torch's `cat` shares each
# single tensor out over its threads, which takes six times as long for a thousand small ones.
ROW = (1 << 15) - 1


def side_by_side(tensors: Sequence[Tensor], read_as: Sequence[torch.dtype]) -> list[Tensor]:
    """The same values in the same shapes and strides; small ones share rows of memory, in order.

    Only on the CPU, where the calls for each tensor are what costs: kernels for accelerators take
    tensors wherever they are. Tensors that are alone in their row stay as they are.

    Args:
        tensors: averages.
        read_as: the dtypes of what flows into them: a row is read together, so it has one.
    """
    placed = list(tensors)
    for row in _rows(tensors, read_as):
        flat = [views[0] for slot in row if (views := flat_views([tensors[slot]]))]
        pieces = torch.cat(flat).split([piece.numel() for piece in flat])
        for slot, piece in zip(row, pieces, strict=True):
            shape, stride = tensors[slot].shape, tensors[slot].stride()
            view = piece.as_strided(shape, stride, piece.storage_offset())
            # Without the base that a view keeps: a copy of the average has none either, and who
            # holds its memory is counted in both.
            placed[slot] = view.detach()
    return placed


def _rows(tensors: Sequence[Tensor], read_as: Sequence[torch.dtype]) -> Iterator[list[int]]:
    """Indices of small dense tensors of one pair of dtypes, as many as fit a row, at least two."""
    open_rows: dict[tuple[torch.dtype, torch.dtype], tuple[list[int], int]] = {}
    for index, (tensor, live) in enumerate(zip(tensors, read_as, strict=True)):
        if not 0 < tensor.numel() <= SMALL or tensor.device.type != "cpu":
            continue
        if flat_views([tensor]) is None:
            continue
        row, used = open_rows.get((tensor.dtype, live), ([], 0))
        if used + tensor.numel() > ROW:
            yield row
            row, used = [], 0
        row.append(index)
        open_rows[tensor.dtype, live] = (row, used + tensor.numel())
    yield from (row for row, _ in open_rows.values() if len(row) > 1)


def follows(tensor: Tensor, before: Tensor) -> bool:
    """Whether one flat view begins where another one ends, in the same memory."""
    return (
        tensor.data_ptr() == before.data_ptr() + before.numel() * before.element_size()
        and tensor.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()
    )
