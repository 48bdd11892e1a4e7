"""Folders of torch.distributed.checkpoint written by many ranks, each what it holds.

https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save

from .._sharding import Part
from ._atomic import folder_written_whole
from ._dcp import WORDS
from ._team import Team


@dataclass(frozen=True)
class Piece:
    """What one rank writes of a tensor.

    Args:
        values: on the host.
        part: where they lie in the whole.
    """

    values: Tensor
    part: Part


def write_pieces(
    path: Path,
    tensors: Mapping[str, Tensor],
    parts: Mapping[str, Part | None],
    *,
    words: str,
    team: Team,
) -> None:
    """Write a folder whole or not at all; every rank of the team must call this.

    Each rank writes its pieces to a file of its own, and they talk about names and places only. Of
    pieces that several ranks hold one is written. The first rank makes a temporary folder and gives
    it its name when all are done, so that a kill at any moment leaves no part of it under `path`.

    Args:
        path: the folder; replaced if it is there.
        tensors: what this rank holds, on the host, by name.
        parts: where that lies in the whole; None where it is all, which the first rank writes.
        words: JSON that is kept beside the tensors, the same on every rank.
        team: who writes.

    Raises:
        OSError: on all ranks, when one of them could not write.
        OrderError: a rank is gone.
    """
    pieces = {
        name: Piece(values, parts[name] or _all_of(values))
        for name, values in tensors.items()
        if _is_written(values, parts[name], first=team.leads)
    }
    with ExitStack() as stack:
        temporary = team.first(
            lambda: stack.enter_context(folder_written_whole(path, replace=True))
        )
        with team.agreed():
            if team.leads:
                (temporary / WORDS).write_text(words)
            try:
                save(
                    {},
                    storage_writer=FileSystemWriter(temporary, sync_files=True),
                    planner=_Planner(pieces),
                    process_group=team.group,
                )
            except CheckpointException as error:  # not an Exception; the same on all ranks
                rank, (cause, _) = next(iter(error.failures.items()))
                raise OSError(
                    f"{path.name} must be written by every rank, got {type(cause).__name__} on "
                    f"rank {rank}: {cause}"
                ) from error
        team.first(stack.close)  # synced and renamed


def _is_written(values: Tensor, part: Part | None, *, first: bool) -> bool:
    """Whether it is for this rank: a part that has elements; of what is whole, the first one's."""
    return first if part is None or not part.shape.numel() else values.numel() > 0


def _all_of(values: Tensor) -> Part:
    return Part(values.shape, (0,) * values.dim(), tuple(values.shape))


class _Planner(DefaultSavePlanner):
    """Writes tensors of the host by their places, whatever mesh and device they were taken from."""

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        super().__init__()
        self._pieces = pieces

    def create_local_plan(self) -> SavePlan:
        """What this rank would write."""
        self.plan = SavePlan(
            [_item(name, piece) for name, piece in self._pieces.items()],
            planner_data={name: (name,) for name in self._pieces},
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The elements of a piece that this rank was told to write."""
        return self._pieces[index.fqn].values


def _item(name: str, piece: Piece) -> WriteItem:
    offsets = torch.Size(piece.part.offsets)
    return WriteItem(
        index=MetadataIndex(name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(piece.part.sizes)),
            properties=TensorProperties.create_from_tensor(piece.values),
            size=torch.Size(piece.part.shape),
        ),
    )
