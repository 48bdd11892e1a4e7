"""An open checkpoint: tensors by name, whatever the format."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from .._errors import ArgumentError
from ._bytes import File
from ._stored import Source, TensorInfo


class Files:
    """The files of one checkpoint, closed together."""

    def __init__(self) -> None:
        self._files: dict[Path, File] = {}

    def open(self, path: Path) -> File:
        """The file, opened once however often it is asked for."""
        if path not in self._files:
            self._files[path] = File(path)
        return self._files[path]

    @property
    def paths(self) -> tuple[Path, ...]:
        """Where they lie."""
        return tuple(self._files)

    def close(self) -> None:
        """Close them all."""
        for file in self._files.values():
            file.close()


@dataclass(frozen=True)
class Contents:
    """What a format's reader found in its files, before anyone asked whose weights they are.

    Args:
        kind: the format in plain words.
        tree: names to tensors, to further such mappings, or to anything else.
        metadata: what a safetensors file says about itself.
        ties: names that the files hold only under another name.
        side_files: files beside the weights that belong to them.
        hints: settings beside the weights, by which an average may be recognised.
    """

    kind: str
    tree: Mapping[str, object]
    metadata: Mapping[str, str] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    side_files: tuple[Path, ...] = ()
    hints: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Unreadable:
    """Something in a checkpoint that is not read.

    Args:
        what: it, in a few words.
        remedy: a sentence that says what to do.
    """

    what: str
    remedy: str


@dataclass(frozen=True)
class Later:
    """A small value that costs a read: looked up only when somebody asks."""

    value: Callable[[], object]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Tensors of a checkpoint by name, read by stretches; nothing is loaded before.

    Made by `open_checkpoint`. Use it in a `with` block, or `close` it. Reading is safe from several
    threads at once.

    Args:
        path: what was opened.
        kind: the format in plain words.
        origin: whose average it was recognised as; None for plain weights.
        metadata: what a safetensors file says about itself; empty elsewhere.
        step: training time, where the file says it.
        tensors: dtype and shape by name in the order of the file, tied ones under each name.
        aliases: names that share the bytes of another name, with that name.
        side_files: files beside the weights that belong to them, such as a config.
        left_out: names among the weights whose values are no tensors.
        prefix: a wrapper's prefix common to all names, which was stripped.
    """

    path: Path
    kind: str
    origin: str | None
    metadata: Mapping[str, str]
    step: float | None
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    side_files: tuple[Path, ...]
    left_out: tuple[str, ...]
    prefix: str
    _sources: Mapping[str, Source] = field(repr=False)
    _files: Files = field(repr=False)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it is read from: weights, index, config."""
        return self._files.paths

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of the flattened tensor, row by row: 1-D, in fresh memory.

        Args:
            name: one of `tensors`.
            start: the first element.
            stop: the element after the last; None for the end.

        Raises:
            ArgumentError: no such tensor or elements; a file that changed since it was opened.
            OrderError: the checkpoint is closed.
        """
        if name not in self.tensors:
            raise ArgumentError(f"name must be a tensor of {self.path.name}, got {name!r}.")
        numel = self.tensors[name].numel
        stop = numel if stop is None else stop
        if not 0 <= start <= stop <= numel:
            raise ArgumentError(
                f"start and stop must be elements of {name!r}, which has {numel}, "
                f"got {start} and {stop}."
            )
        return self._sources[name].read(start, stop)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
