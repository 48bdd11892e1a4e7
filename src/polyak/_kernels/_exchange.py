"""Exchange the values of tensors in place, through a small scratch, undoable at any point."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._flat import flat_views, is_dense

SCRATCH_BYTES = 16 * 2**20  # for each dtype and device, at most

# On the CPU a piece that stays in the cache on its way is read from memory once. Measured: 16 MiB
# take 1.25 times as long, 256 KiB too.
CACHE_BYTES = 2**20


def can_exchange(live: Tensor, average: Tensor) -> bool:
    """Whether two tensors may swap values bit for bit, piece by piece."""
    return (
        live.dtype == average.dtype
        and live.device == average.device
        and live.stride() == average.stride()
        and is_dense(live)
    )


class Exchange:
    """Swap pairs of tensors; `undo` brings every bit back, from wherever the swap stopped.

    The journal is one number and one phase, written between the copies, so that an interrupt (even
    a second one, during `undo`) finds the values of a piece in two of three places:

        phase 0   live and average hold what they should
        phase 1   scratch holds the live values, the average is untouched
        phase 2   scratch holds the live values, live holds the average's

    Each step writes only what the next phase no longer needs, so a step may run twice.

    Args:
        pairs: (live, average) with `can_exchange`; not overlapping each other.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        pieces = _pieces(pairs)
        self._live = [live for live, _ in pieces]
        self._averages = [averages for _, averages in pieces]
        self._scratch = _scratch(self._live)
        self._journal = (0, 0)  # pieces done, phase of the next one

    # No names for the views in these frames: a traceback that is kept would keep them too.

    @torch.no_grad()
    def do(self) -> None:
        """Swap all pairs."""
        for k in range(len(self._live)):
            torch._foreach_copy_(self._room(k), self._live[k])
            self._journal = (k, 1)
            torch._foreach_copy_(self._live[k], self._averages[k])
            self._journal = (k, 2)
            torch._foreach_copy_(self._averages[k], self._room(k))
            self._journal = (k + 1, 0)

    @torch.no_grad()
    def undo(self) -> None:
        """Swap back what was swapped, last piece first; safe to call again after an interrupt."""
        while self._journal != (0, 0):
            k, phase = self._journal
            if phase == 0:  # the piece before is swapped: its live values sit in the average
                torch._foreach_copy_(self._room(k - 1), self._averages[k - 1])
                self._journal = (k - 1, 2)
            elif phase == 2:
                torch._foreach_copy_(self._averages[k], self._live[k])
                self._journal = (k, 1)
            else:
                torch._foreach_copy_(self._live[k], self._room(k))
                self._journal = (k, 0)

    def forget(self) -> None:
        """Let go of all views, once everything is back."""
        self._live.clear()
        self._averages.clear()
        self._scratch.clear()

    def _room(self, k: int) -> list[Tensor]:
        """Views into the scratch, one for each tensor of piece k."""
        live = self._live[k]
        scratch = self._scratch[live[0].dtype, live[0].device]
        return list(scratch[: sum(t.numel() for t in live)].split([t.numel() for t in live]))


_Piece = tuple[list[Tensor], list[Tensor]]


def _pieces(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[_Piece]:
    """Cut large pairs and gather small ones, so that each piece fits the scratch."""
    pieces: list[_Piece] = []
    open_piece: dict[tuple[torch.dtype, torch.device], tuple[_Piece, int]] = {}
    for live, average in pairs:
        flat = flat_views([live, average])
        assert flat is not None, "pairs are checked with can_exchange"
        limit = CACHE_BYTES if live.device.type == "cpu" else SCRATCH_BYTES
        room = min(limit, SCRATCH_BYTES) // live.element_size()
        kind = (live.dtype, live.device)
        for start in range(0, live.numel(), room):
            part_live, part_average = (view[start : start + room] for view in flat)
            piece, used = open_piece.get(kind, (None, room))
            if piece is None or used + part_live.numel() > room:
                piece, used = ([], []), 0
                pieces.append(piece)
            piece[0].append(part_live)
            piece[1].append(part_average)
            open_piece[kind] = (piece, used + part_live.numel())
    return pieces


def _scratch(
    pieces: Sequence[Sequence[Tensor]],
) -> dict[tuple[torch.dtype, torch.device], Tensor]:
    needed: dict[tuple[torch.dtype, torch.device], int] = {}
    for live in pieces:
        kind = (live[0].dtype, live[0].device)
        needed[kind] = max(needed.get(kind, 0), sum(t.numel() for t in live))
    return {
        (dtype, device): torch.empty(size, dtype=dtype, device=device)
        for (dtype, device), size in needed.items()
    }
