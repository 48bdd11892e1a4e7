"""Exchange the values of tensors in place, through a small scratch, undoable at any point."""

from bisect import insort
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ._fingerprint import Bits, differing
from ._flat import flat_views, is_dense

SCRATCH_BYTES = 16 * 2**20  # for each dtype and device, at most

# On the CPU a piece that stays in the cache on its way is read from memory once. Measured:
# pieces of 2 MiB take 1.1 times as long, those of 512 KiB too.
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
    """Exchange the values of pairs of tensors; `undo` brings every bit back, from wherever it was.

    A piece that fills the scratch is moved up: its live values go to the hole (for the first one
    the scratch), and the average's to the live tensor, which makes the memory of that average the
    next hole. Two copies, where a swap through the scratch takes three. Smaller pieces come first,
    and are swapped.

    The journal is one number and one phase, written between the copies, so that an interrupt (even
    a second one, during `undo`) finds the values of a piece in two of three places: live tensor,
    average and hole.

        phase 0   the piece is as it was
        phase 1   the hole holds the live values, the average is untouched
        phase 2   the hole holds the live values, live holds the average's

    Each step writes only what the next phase no longer needs, so a step may run twice.

    A piece is in the cache when it has been exchanged, and when it is about to be changed back:
    then its fingerprint costs no read of the memory.

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
        """Exchange all pairs."""
        for k in range(len(self._pieces)):
            torch._foreach_copy_(self._pieces[k].hole, self._pieces[k].live)
            self._journal = (k, 1)
            torch._foreach_copy_(self._pieces[k].live, self._pieces[k].averages)
            self._journal = (k, 2)
            if not self._pieces[k].stays:
                torch._foreach_copy_(self._pieces[k].averages, self._pieces[k].hole)
            self._journal = (k + 1, 0)
            self._lent[k] = self._pieces[k].sums()

    @torch.no_grad()
    def undo(self) -> None:
        """Bring all back, last piece first; safe to call again after an interrupt."""
        while self._journal != (0, 0):
            k, phase = self._journal
            if phase == 0:  # the piece before is exchanged
                self._look(k - 1)  # before the journal moves on: after an interrupt it is due again
                if not self._pieces[k - 1].stays:
                    torch._foreach_copy_(self._pieces[k - 1].hole, self._pieces[k - 1].averages)
                self._journal = (k - 1, 2)
            elif phase == 2:
                torch._foreach_copy_(self._pieces[k].averages, self._pieces[k].live)
                self._journal = (k, 1)
            else:
                torch._foreach_copy_(self._pieces[k].live, self._pieces[k].hole)
                self._journal = (k, 0)

    def waiting(self, pair: int) -> list[Tensor]:
        """Where the values that belong into a live tensor are now: flat parts, in their order."""
        return [self._wait_in(k)[index] for _, k, index in self._parts[pair]]

    def _wait_in(self, k: int) -> list[Tensor]:
        done, phase = self._journal
        piece = self._pieces[k]
        if k > done or (k == done and phase == 0):
            return piece.live
        return piece.hole if piece.stays or k == done else piece.averages

    @cached_property
    def _parts(self) -> Mapping[int, list[tuple[int, int, int]]]:
        """Of each pair: where a part of it starts, in which piece it is, and as which one there."""
        parts: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for k, piece in enumerate(self._pieces):
            for index, (owner, start) in enumerate(zip(piece.owners, piece.starts, strict=True)):
                insort(parts[owner], (start, k, index))
        return parts

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
    """What is exchanged at once."""

    live: list[Tensor] = field(default_factory=list)
    averages: list[Tensor] = field(default_factory=list)
    hole: list[Tensor] = field(default_factory=list)  # where the live values go first
    stays: bool = False  # whether they wait there, or in the averages
    bits: list[Bits] = field(default_factory=list)  # of the live tensors
    owners: list[int] = field(default_factory=list)  # which pair each comes from
    starts: list[int] = field(default_factory=list)  # elements of that pair before it
    used: int = 0  # elements

    def add(self, owner: int, start: int, live: Tensor, average: Tensor) -> None:
        """One more part of a pair."""
        self.live.append(live)
        self.averages.append(average)
        self.bits.append(Bits(live))
        self.owners.append(owner)
        self.starts.append(start)
        self.used += live.numel()

    def sums(self) -> list[list[Tensor]]:
        """Fingerprints of what is live now."""
        return [bits.sums() for bits in self.bits]


_Kind = tuple[torch.dtype, torch.device]


def _pieces(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[_Piece]:
    """Cut large pairs and gather small ones, so that each piece fits the scratch."""
    full: dict[_Kind, list[_Piece]] = {}
    small: dict[_Kind, list[_Piece]] = {}
    for owner, (live, average) in enumerate(pairs):
        if live.numel() == 0:
            continue
        flat = flat_views([live, average])
        assert flat is not None, "pairs are checked with can_exchange"
        kind = (live.dtype, live.device)
        room = _room(kind)
        fulls, smalls = full.setdefault(kind, []), small.setdefault(kind, [])
        parts = [[view] if view.numel() <= room else view.split(room) for view in flat]
        for index, (part_live, part_average) in enumerate(zip(*parts, strict=True)):
            size = part_live.numel()
            if size == room:
                fulls.append(piece := _Piece(stays=True))
            elif smalls and smalls[-1].used + size <= room:
                piece = smalls[-1]
            else:
                smalls.append(piece := _Piece())
            piece.add(owner, index * room, part_live, part_average)
    return [piece for kind in full for piece in _in_order(kind, small[kind], full[kind])]


def _room(kind: _Kind) -> int:
    """How many elements go through the scratch at once."""
    dtype, device = kind
    limit = CACHE_BYTES if device.type == "cpu" else SCRATCH_BYTES
    return min(limit, SCRATCH_BYTES) // dtype.itemsize


def _in_order(kind: _Kind, small: list[_Piece], full: list[_Piece]) -> list[_Piece]:
    """The pieces of one kind, each with the hole that its live values go to."""
    dtype, device = kind
    needed = max(piece.used for piece in (*small, *full[:1]))
    with torch.inference_mode(False):  # the way out may be outside of it
        scratch = torch.empty(needed, dtype=dtype, device=device)
    for piece in small:
        sizes = [tensor.numel() for tensor in piece.live]
        piece.hole = list(scratch[: piece.used].split(sizes))
    hole = [scratch]
    for piece in full:
        piece.hole, hole = hole, piece.averages
    return [*small, *full]
