"""Exchange the values of tensors in place, through a small scratch, undoable at any point."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._fingerprint import Bits, differing
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
        and not (live.is_conj() or live.is_neg())  # their bits are not their values
    )


class Exchange:
    """Swap pairs of tensors; `undo` brings every bit back, from wherever the swap stopped.

    The journal is one number and one phase, written between the copies, so that an interrupt (even
    a second one, during `undo`) finds the values of a piece in two of three places:

        phase 0   live and average hold what they should
        phase 1   scratch holds the live values, the average is untouched
        phase 2   scratch holds the live values, live holds the average's

    Each step writes only what the next phase no longer needs, so a step may run twice.

    A piece is in the cache when it has been swapped, and when it is about to be swapped back: then
    its fingerprint costs no read of the memory.

    Args:
        pairs: (live, average) with `can_exchange`; not overlapping each other.

    Attributes:
        written: after `undo`, which pairs had somebody else write the live tensor in between.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._pieces = _pieces(pairs)
        self._journal = (0, 0)  # pieces done, phase of the next one
        self.written: set[int] = set()
        self._lent: dict[int, list[list[Tensor]]] = {}  # sums of the live bits, by piece
        self._is_blind = False  # they cannot be taken any more

    # No names for the views in these frames: a traceback that is kept would keep them too.

    @torch.no_grad()
    def do(self) -> None:
        """Swap all pairs."""
        for k in range(len(self._pieces)):
            torch._foreach_copy_(self._pieces[k].room, self._pieces[k].live)
            self._journal = (k, 1)
            torch._foreach_copy_(self._pieces[k].live, self._pieces[k].averages)
            self._journal = (k, 2)
            torch._foreach_copy_(self._pieces[k].averages, self._pieces[k].room)
            self._journal = (k + 1, 0)
            self._lent[k] = self._pieces[k].sums()

    @torch.no_grad()
    def undo(self) -> None:
        """Swap back what was swapped, last piece first; safe to call again after an interrupt."""
        while self._journal != (0, 0):
            k, phase = self._journal
            if phase == 0:  # the piece before is swapped: its live values sit in the average
                self._look(k - 1)  # before the journal moves on: after an interrupt it is due again
                torch._foreach_copy_(self._pieces[k - 1].room, self._pieces[k - 1].averages)
                self._journal = (k - 1, 2)
            elif phase == 2:
                torch._foreach_copy_(self._pieces[k].averages, self._pieces[k].live)
                self._journal = (k, 1)
            else:
                torch._foreach_copy_(self._pieces[k].live, self._pieces[k].room)
                self._journal = (k, 0)

    def _look(self, k: int) -> None:
        """Note which tensors of a piece that comes back were written by somebody else.

        The first time that this fails is an error like any other. Then the values are what counts:
        they come back unseen, and all of the piece is taken for written.
        """
        owners = self._pieces[k].owners
        found: Sequence[int] = range(len(owners))
        try:
            found = differing(self._lent[k], self._pieces[k].sums()) if k in self._lent else []
        except Exception:
            if not self._is_blind:
                self._is_blind = True
                raise
        self.written |= {owners[index] for index in found}

    def forget(self) -> None:
        """Let go of all views, once everything is back and what was written is known."""
        self.written.clear()
        self._pieces.clear()
        self._lent.clear()


@dataclass
class _Piece:
    """What goes through the scratch at once."""

    live: list[Tensor] = field(default_factory=list)
    averages: list[Tensor] = field(default_factory=list)
    room: list[Tensor] = field(default_factory=list)  # views into the scratch
    bits: list[Bits] = field(default_factory=list)  # of the live tensors
    owners: list[int] = field(default_factory=list)  # which pair each comes from
    used: int = 0  # elements

    def sums(self) -> list[list[Tensor]]:
        """Fingerprints of what is live now."""
        return [bits.sums() for bits in self.bits]


def _pieces(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[_Piece]:
    """Cut large pairs and gather small ones, so that each piece fits the scratch."""
    pieces: list[_Piece] = []
    open_piece: dict[tuple[torch.dtype, torch.device], _Piece] = {}
    for owner, (live, average) in enumerate(pairs):
        flat = flat_views([live, average])
        assert flat is not None, "pairs are checked with can_exchange"
        limit = CACHE_BYTES if live.device.type == "cpu" else SCRATCH_BYTES
        room = min(limit, SCRATCH_BYTES) // live.element_size()
        kind = (live.dtype, live.device)
        if live.numel() == 0:
            continue
        parts = [[view] if view.numel() <= room else view.split(room) for view in flat]
        for part_live, part_average in zip(*parts, strict=True):
            piece = open_piece.get(kind)
            if piece is None or piece.used + part_live.numel() > room:
                pieces.append(piece := _Piece())
                open_piece[kind] = piece
            piece.live.append(part_live)
            piece.averages.append(part_average)
            piece.bits.append(Bits(part_live))
            piece.owners.append(owner)
            piece.used += part_live.numel()
    _make_room(pieces)
    return pieces


def _make_room(pieces: Sequence[_Piece]) -> None:
    """Give all pieces of one kind the same scratch."""
    needed: dict[tuple[torch.dtype, torch.device], int] = {}
    for piece in pieces:
        kind = (piece.live[0].dtype, piece.live[0].device)
        needed[kind] = max(needed.get(kind, 0), piece.used)
    with torch.inference_mode(False):  # the way out may be outside of it
        scratch = {
            (dtype, device): torch.empty(size, dtype=dtype, device=device)
            for (dtype, device), size in needed.items()
        }
    for piece in pieces:
        room = scratch[piece.live[0].dtype, piece.live[0].device]
        sizes = [tensor.numel() for tensor in piece.live]
        piece.room = list(room[: piece.used].split(sizes)) if len(sizes) > 1 else [room[: sizes[0]]]
