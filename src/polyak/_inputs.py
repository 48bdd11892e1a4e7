"""Do these checkpoints belong together? Opened, named and compared, with their times."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from ._combine import is_averaged
from ._errors import ArgumentError, MatchError
from ._files import Checkpoint, TensorInfo, open_checkpoint
from ._slices import slices

PathLikes: TypeAlias = Sequence[str | PathLike[str]]
Named: TypeAlias = str | PathLike[str] | int

_SHOWN = 5  # tensors named in an error


@dataclass(frozen=True)
class Inputs:
    """Open checkpoints of one model.

    Args:
        paths: as the caller gave them.
        labels: the shortest tails of the paths that tell them apart: for errors and metadata.
        checkpoints: open.
        tensors: what an average of them holds, in the order of the first.
        aliases: names of tied tensors and the names that they share memory with, in all of them.
    """

    paths: tuple[Path, ...]
    labels: tuple[str, ...]
    checkpoints: tuple[Checkpoint, ...]
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]

    @property
    def written(self) -> dict[str, TensorInfo]:
        """The tensors without those that are another one's under a second name."""
        return {name: info for name, info in self.tensors.items() if name not in self.aliases}

    def exact(self, source: Named | None) -> int:
        """The index of the checkpoint that gives what is not averaged, and must have one value.

        Args:
            source: its path or index; None demands that all agree.

        Raises:
            MatchError: None, and two of them differ.
            ArgumentError: not one of the checkpoints.
        """
        if source is None:
            self._check_exact_agree()
            return 0
        if isinstance(source, int) and -len(self.paths) <= source < len(self.paths):
            return source % len(self.paths)
        if not isinstance(source, int):
            wanted = Path(source)
            for index, (path, label) in enumerate(zip(self.paths, self.labels, strict=True)):
                if _same(path, wanted) or label == str(source):
                    return index
        raise ArgumentError(
            "integers must be the path or the index of one of the checkpoints, "
            f"got {str(source)!r} with {_first(self.labels)}."
        )

    def _check_exact_agree(self) -> None:
        """Read what is not averaged from all checkpoints, and compare."""
        exact = {name: i for name, i in self.written.items() if not is_averaged(i.dtype)}
        differing: dict[str, str] = {}
        for piece in slices(exact):
            if piece.name in differing:
                continue
            first = self.checkpoints[0].read(*piece)
            for label, checkpoint in zip(self.labels[1:], self.checkpoints[1:], strict=True):
                if not _equal_bits(checkpoint.read(*piece), first):
                    differing[piece.name] = label
                    break
        if differing:
            name, label = next(iter(differing.items()))
            raise MatchError(
                f"what cannot be averaged must agree, got {len(differing)} tensors that do not: "
                f"{_first(list(differing))}; {label} has another {name!r} "
                f"({_word(exact[name].dtype)}) than {self.labels[0]}. Name the checkpoint to take "
                "them from with integers=; quantized weights have no average: dequantize first."
            )


@contextmanager
def open_inputs(
    paths: PathLikes, *, key: str | None = None, dtype: torch.dtype | None = None
) -> Iterator[Inputs]:
    """Open checkpoints for the length of a `with` block, after a look at all of their headers.

    Args:
        paths: any formats, mixed.
        key: where in a nested torch file the weights are.
        dtype: of the averaged real tensors of the result, instead of the inputs'.

    Raises:
        ArgumentError: none, one twice, one that cannot be read.
        MatchError: other names, shapes or kinds; the tensors are named.
    """
    if isinstance(paths, str | PathLike):
        raise ArgumentError(f"checkpoints must be a list of paths, got {str(paths)!r}.")
    if dtype is not None and not (is_averaged(dtype) and not dtype.is_complex):
        raise ArgumentError(
            f"dtype must be a floating point dtype of 16 bits or more, got {dtype}."
        )
    found = tuple(Path(path) for path in paths)
    if not found:
        raise ArgumentError("checkpoints must be at least one path, got none.")
    twice = [path for index, path in enumerate(found) if any(_same(path, p) for p in found[:index])]
    if twice:
        raise ArgumentError(
            f"checkpoints must be different files, got {str(twice[0])!r} twice. "
            "Give it a larger coefficient instead."
        )
    with ExitStack() as stack:
        opened = tuple(stack.enter_context(open_checkpoint(path, key=key)) for path in found)
        labels = _labels(found)
        _check_alike(labels, opened)
        yield Inputs(found, labels, opened, _result(opened, dtype), _shared_aliases(opened))


def steps_of(inputs: Inputs, given: Sequence[float] | None) -> list[float]:
    """The training time of every checkpoint: as given, as the files say, or as their names say.

    All from one source, so that they have one unit. In a name it is the last whole number; where
    all files have one name, that of the folders above.

    Raises:
        ArgumentError: a checkpoint without a step; two with the same one.
    """
    if given is not None:
        steps = [float(step) for step in given]
        if len(steps) != len(inputs.labels):
            raise ArgumentError(
                f"steps must be one for each of the {len(inputs.labels)} checkpoints, "
                f"got {len(steps)}."
            )
    else:
        steps = _steps_of_files(inputs.checkpoints) or _steps_of_names(inputs.paths)
    if not all(map(math.isfinite, steps)):
        raise ArgumentError(f"steps must be finite, got {steps}.")
    by_step: dict[float, str] = {}
    for step, label in zip(steps, inputs.labels, strict=True):
        if step in by_step:
            raise ArgumentError(
                f"steps must be distinct, got {step:g} for {by_step[step]} and {label}. "
                "Pass steps=, one for each checkpoint."
            )
        by_step[step] = label
    return steps


def known_steps(inputs: Inputs, given: Sequence[float] | None) -> list[float | None]:
    """The steps that were given or that files tell, for the record: a name may count seeds."""
    if given is not None:
        return list(steps_of(inputs, given))
    return [checkpoint.step for checkpoint in inputs.checkpoints]


def _steps_of_files(checkpoints: Sequence[Checkpoint]) -> list[float]:
    steps = [checkpoint.step for checkpoint in checkpoints if checkpoint.step is not None]
    return steps if len(steps) == len(checkpoints) else []


def _steps_of_names(paths: Sequence[Path]) -> list[float]:
    names = stems = [path.stem for path in paths]
    for parents in zip(*(path.absolute().parents for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        names = [parent.name for parent in parents]  # checkpoint-100/model.pt, checkpoint-200/…
    if len(set(names)) == 1:  # one file, or model-1.pt and model-1.safetensors
        names = stems
    numbers = [re.findall(r"\d+", name) for name in names]
    for path, found in zip(paths, numbers, strict=True):
        if not found:
            raise ArgumentError(
                "steps must be in the files or in their names, or be given, "
                f"got none for {str(path)!r}. Pass steps=, one for each checkpoint."
            )
    return [float(found[-1]) for found in numbers]


def _labels(paths: Sequence[Path]) -> tuple[str, ...]:
    """The shortest tails of paths that tell them apart."""
    absolute = [path.absolute() for path in paths]
    for length in range(1, max(len(path.parts) for path in absolute) + 1):
        tails = ["/".join(path.parts[-length:]) for path in absolute]
        if len(set(tails)) == len(tails):
            break
    return tuple(tails)


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _check_alike(labels: Sequence[str], checkpoints: Sequence[Checkpoint]) -> None:
    """Raise unless all have the tensors of the first, of one shape and kind."""
    first = checkpoints[0].tensors
    if not first:
        raise ArgumentError(f"{labels[0]} must hold tensors, got none.")
    for label, checkpoint in zip(labels[1:], checkpoints[1:], strict=True):
        tensors = checkpoint.tensors
        missing = [name for name in first if name not in tensors]
        extra = [name for name in tensors if name not in first]
        if missing or extra:
            raise MatchError(
                f"{label} and {labels[0]} must hold the same tensors, got {len(missing)} only in "
                f"the latter {_first(missing)} and {len(extra)} only in the former "
                f"{_first(extra)}. Average checkpoints of one model."
            )
        shapes = [name for name in first if tensors[name].shape != first[name].shape]
        if shapes:
            raise MatchError(
                f"{label} has {_pairs(shapes, tensors)}, {labels[0]} has "
                f"{_pairs(shapes, first)}. Average checkpoints of one model."
            )
        kinds = [name for name in first if not _mix(tensors[name].dtype, first[name].dtype)]
        if kinds:
            raise MatchError(
                f"{kinds[0]!r} must be of one kind, got {_word(tensors[kinds[0]].dtype)} in "
                f"{label} and {_word(first[kinds[0]].dtype)} in {labels[0]} "
                f"({len(kinds)} such tensors {_first(kinds)})."
            )


def _equal_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _mix(one: torch.dtype, other: torch.dtype) -> bool:
    """Whether elements of these dtypes can be averaged, or compared, with each other."""
    averaged = is_averaged(one) and is_averaged(other)
    return one == other or (averaged and one.is_complex == other.is_complex)


def _result(checkpoints: Sequence[Checkpoint], dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    """The tensors of an average: each in the dtype asked for, or the widest there is."""
    result: dict[str, TensorInfo] = {}
    for name, info in checkpoints[0].tensors.items():
        target = info.dtype
        for checkpoint in checkpoints[1:]:
            target = torch.promote_types(target, checkpoint.tensors[name].dtype)
        if dtype is not None and is_averaged(target) and not target.is_complex:
            target = dtype
        result[name] = TensorInfo(target, tuple(info.shape))
    return result


def _shared_aliases(checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
    """Ties that all inputs have; a tie that only some have is two tensors in the result."""
    return {
        name: target
        for name, target in checkpoints[0].aliases.items()
        if all(checkpoint.aliases.get(name) == target for checkpoint in checkpoints)
    }


def _pairs(names: Sequence[str], tensors: Mapping[str, TensorInfo]) -> str:
    shown = ", ".join(f"{name!r} {list(tensors[name].shape)}" for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{list(names[:_SHOWN])}{more}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
