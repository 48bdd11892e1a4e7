"""Safetensors written as tensors become ready: the header first, then elements in any order."""

import json
import os
import re
import shutil
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from .._errors import ArgumentError, OrderError
from ._atomic import folder_written_whole, written_whole
from ._folder import _OF_TRAINING, _SIDE_FILES
from ._safetensors import check_known, element_bytes, encoded_header
from ._stored import TensorInfo
from ._team import ALONE, Team

# Where each tensor begins, by name, in each file.
Offsets: TypeAlias = Mapping[Path, Mapping[str, int]]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


class _Place:
    """Where a tensor goes, and which of its elements are there."""

    def __init__(self, descriptor: int, offset: int, info: TensorInfo) -> None:
        self.descriptor, self.offset, self.info = descriptor, offset, info
        self._edges: list[int] = []  # starts and ends of what is written, in turn

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """The elements that are there: from, to."""
        return list(zip(self._edges[::2], self._edges[1::2], strict=True))

    def note(self, start: int, stop: int) -> None:
        """Elements [start, stop) are written; those that meet become one stretch."""
        first = bisect_left(self._edges, start)
        last = bisect_left(self._edges, stop + 1)
        self._edges[first:last] = [start] * (first % 2 == 0) + [stop] * (last % 2 == 0)

    @property
    def missing(self) -> int:
        """How many elements are not written."""
        return self.info.numel - sum(stop - start for start, stop in self.stretches)


class Writer:
    """Takes the elements of the tensors that were announced; made by `checkpoint_writer`."""

    def __init__(self, places: Mapping[str, _Place]) -> None:
        self._places = places
        self._lock = threading.Lock()
        self._done = False

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Put elements of a flattened tensor in their place, from any thread, in any order.

        Args:
            name: as announced.
            start: the first of these elements.
            values: 1-D, in the dtype announced.

        Raises:
            ArgumentError: another name or dtype, or elements that the tensor does not have.
            OrderError: the checkpoint is finished.
        """
        if self._done:
            raise OrderError("write must be called before the checkpoint is finished.")
        if name not in self._places:
            raise ArgumentError(f"name must be a tensor that is written, got {name!r}.")
        place = self._places[name]
        if values.dtype != place.info.dtype or values.dim() != 1:
            raise ArgumentError(
                f"values of {name!r} must be 1-D and {place.info.dtype}, got {values.dim()}-D and "
                f"{values.dtype}."
            )
        stop = start + values.numel()
        if not 0 <= start <= stop <= place.info.numel:
            raise ArgumentError(
                f"start must leave room for the values of {name!r}, which has "
                f"{place.info.numel} elements, got {start} for {values.numel()}."
            )
        left, at = element_bytes(values), place.offset + start * values.dtype.itemsize
        while left:  # the system writes at most 2 GiB at once
            count = os.pwrite(place.descriptor, left, at)
            left, at = left[count:], at + count
        if start < stop:
            with self._lock:
                place.note(start, stop)

    def _finish(self, team: Team) -> None:
        """Raise, on all ranks, unless they have written every element together."""
        ours = {name: place.stretches for name, place in self._places.items() if place.stretches}
        for theirs in team.gathered(ours):
            for name, stretches in theirs.items():
                for start, stop in stretches:
                    self._places[name].note(start, stop)
        missing = [name for name, place in self._places.items() if place.missing]
        if missing:
            raise ArgumentError(
                f"every element must be written, got {len(missing)} tensors with some missing "
                f"{missing[:3]}. Nothing was saved."
            )


@contextmanager
def checkpoint_writer(
    path: str | os.PathLike[str],
    tensors: Mapping[str, TensorInfo],
    *,
    metadata: Mapping[str, str],
    max_shard_size: int | None = None,
    aliases: Mapping[str, str] | None = None,
    side_files: Sequence[Path] = (),
    force: bool = False,
    team: Team = ALONE,
) -> Iterator[Writer]:
    """Write a checkpoint whole or not at all, while its tensors are being computed.

    A path that ends in `.safetensors` becomes one file, which replaces an older one in one step.
    Any other becomes a folder as Hugging Face lays it out: `model.safetensors`, or shards with an
    index, and the side files. When the block ends, every element must have been written; then the
    files are synced and take their names. When it raises, nothing is left. Memory: the header.

    Args:
        path: a file in, or a new folder in, a folder that exists.
        tensors: what will be written: dtype and shape by name.
        metadata: words about it, for the header.
        max_shard_size: bytes of tensors in one file of a folder; a single tensor may have more.
        aliases: names of tied tensors with the name that is written for them; noted, not written.
        side_files: copied into a folder.
        force: replace a folder that is there, if it holds weights and what belongs to them only.
        team: who writes: every rank calls this alike, and writes some of the elements in place. An
            error in the block of one is raised on all.

    Raises:
        ArgumentError: a place that cannot be used, or tensors that the format cannot hold; when
            the block ends, elements that were not written.
        OrderError: a rank is gone.
    """
    path = Path(path)
    aliases = dict(aliases or {})
    written = {name: info for name, info in tensors.items() if name not in aliases}

    def announced() -> AbstractContextManager[Offsets]:
        check_ending(path, "path")
        words = _words(written, metadata, aliases)
        check_known(written, "Choose another dtype.")
        if max_shard_size is not None and not max_shard_size > 0:
            raise ArgumentError(f"max_shard_size must be above 0 bytes, got {max_shard_size!r}.")
        shards = _shards(written, max_shard_size)
        if path.suffix != ".safetensors":
            return _folder_announced(path, shards, words, side_files, force)
        if len(shards) > 1:
            raise ArgumentError(
                f"path must be a folder when one file would exceed max_shard_size="
                f"{max_shard_size}, got {str(path)!r}. Pass a path without .safetensors."
            )
        return _file_announced(path, written, words)

    with _naming(path), _written(announced, written, team) as writer:
        yield writer


@contextmanager
def file_writer(
    path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> Iterator[Writer]:
    """`checkpoint_writer` for one file, whatever its name ends in but that of another format."""
    check_ending(path, "path")
    check_known(tensors, "Use torch.save(average.weights(), path) instead.")
    words = {**metadata, "format": "pt"}

    def announced() -> AbstractContextManager[Offsets]:
        return _file_announced(path, tensors, words)

    with _naming(path), _written(announced, tensors, ALONE) as writer:
        yield writer


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say what was being written, where the system says no more than that a disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def check_ending(path: Path, argument: str) -> None:
    """Refuse names by which files of another format are known: nobody calls a folder so."""
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise ArgumentError(
            f"{argument} must not say another format than what is written, safetensors, got "
            f"{str(path)!r}. Pass {path.stem}.safetensors."
        )


@contextmanager
def _written(
    announced: Callable[[], AbstractContextManager[Offsets]],
    tensors: Mapping[str, TensorInfo],
    team: Team,
) -> Iterator[Writer]:
    """The first rank makes the files, all write into them, the first one gives them their names."""
    with ExitStack() as stack:
        files = team.first(lambda: stack.enter_context(announced()))
        with team.agreed():
            opened = {path: stack.enter_context(path.open("r+b")) for path in files}
            writer = Writer(
                {
                    name: _Place(opened[path].fileno(), offset, tensors[name])
                    for path, offsets in files.items()
                    for name, offset in offsets.items()
                }
            )
        try:
            with team.agreed():
                yield writer
                if not team.leads:  # another host keeps what it wrote to itself until it syncs
                    for file in opened.values():
                        os.fsync(file.fileno())
        finally:
            writer._done = True
        writer._finish(team)
        team.first(stack.close)


@contextmanager
def _file_announced(
    path: Path, tensors: Mapping[str, TensorInfo], words: Mapping[str, str]
) -> Iterator[Offsets]:
    """One file of full size under a temporary name, which becomes `path` at the end."""
    with written_whole(path) as temporary:
        yield {temporary: _announce(temporary, tensors, words)}


@contextmanager
def _folder_announced(
    path: Path,
    shards: Sequence[Mapping[str, TensorInfo]],
    words: Mapping[str, str],
    side_files: Sequence[Path],
    force: bool,
) -> Iterator[Offsets]:
    """The same for a folder of files of full size, with all that lies beside them."""
    _check_replaceable(path, force)
    _check_side_files(side_files)
    with folder_written_whole(path, replace=force) as folder:
        named = _named(shards)
        for side in side_files:
            shutil.copyfile(side, folder / side.name)
        if len(named) > 1:
            (folder / _INDEX).write_text(_index(named))
        yield {folder / name: _announce(folder / name, t, words) for name, t in named.items()}


def _announce(
    path: Path, tensors: Mapping[str, TensorInfo], words: Mapping[str, str]
) -> dict[str, int]:
    """Make a file of full size that has its header; return where each tensor begins."""
    header, offsets = encoded_header(tensors, words)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(info.nbytes for info in tensors.values()))
    return offsets


def _words(
    written: Mapping[str, TensorInfo], metadata: Mapping[str, str], aliases: Mapping[str, str]
) -> dict[str, str]:
    """The metadata of a file: the caller's words, ties as save_model notes them, and the format."""
    if not all(isinstance(v, str) and isinstance(n, str) for n, v in metadata.items()):
        raise ArgumentError(f"metadata must be words by name, got {dict(metadata)!r:.80}.")
    for name, kept in aliases.items():
        if kept not in written or name in metadata or name == "format":
            raise ArgumentError(
                f"aliases must be other names of tensors that are written, got {name!r} of "
                f"{kept!r}."
            )
    return {**aliases, **metadata, "format": "pt"}


def _shards(tensors: Mapping[str, TensorInfo], limit: int | None) -> list[dict[str, TensorInfo]]:
    """Tensors in their order, as many in each shard as fit."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors.items():
        if limit is not None and shards[-1] and size + info.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.nbytes
    return shards


def _named(shards: Sequence[Mapping[str, TensorInfo]]) -> dict[str, Mapping[str, TensorInfo]]:
    if len(shards) == 1:
        return {_SINGLE: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": infos
        for number, infos in enumerate(shards, 1)
    }


def _index(shards: Mapping[str, Mapping[str, TensorInfo]]) -> str:
    total = sum(info.nbytes for infos in shards.values() for info in infos.values())
    listed = {name: shard for shard, infos in shards.items() for name in infos}
    about = {"metadata": {"total_size": total}, "weight_map": listed}
    return json.dumps(about, indent=2, ensure_ascii=False) + "\n"


def _check_replaceable(path: Path, force: bool) -> None:
    """Refuse what is there, unless it is a folder of weights that may be replaced."""
    if not os.path.lexists(path):
        return
    if not path.is_dir() or path.is_symlink():
        raise ArgumentError(
            f"path must be a new folder, or end in .safetensors for a file, got {str(path)!r}."
        )
    entries = list(path.iterdir())
    if entries and not force:
        raise ArgumentError(
            f"path must be a new folder, got {str(path)!r} which is there. Pass force=True to "
            "replace it."
        )
    foreign = sorted(entry.name for entry in entries if not _is_replaceable(entry))
    if foreign or (entries and not any(entry.suffix == ".safetensors" for entry in entries)):
        raise ArgumentError(
            f"path must be a folder of weights and nothing else to be replaced, got {str(path)!r} "
            f"with {(foreign or sorted(entry.name for entry in entries))[:3]}. Move what you want "
            "to keep, or choose a new folder."
        )


def _is_replaceable(entry: Path) -> bool:
    """Whether it is what this module writes into a folder: weights, an index, a side file."""
    name = entry.name
    side = (
        entry.suffix in _SIDE_FILES
        and name not in _OF_TRAINING
        and not name.startswith(".")
        and not name.endswith(".index.json")
    )
    weights = name in (_SINGLE, _INDEX) or _SHARD.fullmatch(name) is not None
    return entry.is_file() and (side or weights)


def _check_side_files(side_files: Sequence[Path]) -> None:
    names = [side.name for side in side_files]
    ours = [name for name in names if name.endswith((".safetensors", _INDEX))]
    if len(set(names)) < len(names) or ours:
        raise ArgumentError(f"side_files must have names of their own, got {sorted(names)[:8]}.")
    for side in side_files:
        if not side.is_file():
            raise ArgumentError(f"side_files must be files that exist, got {str(side)!r}.")
