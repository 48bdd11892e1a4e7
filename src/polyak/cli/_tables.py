"""What the commands on checkpoints print."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polyak import Merge, Soup
from polyak._diff import Diff
from polyak._files import Checkpoint, TensorInfo

_WIDTH_OF_A_PIPE = 180
_SHOWN = 40  # rows of tensors, unless all are asked for
_LONG = 400  # letters of one word of metadata, unless all are asked for


def as_json(value: object) -> str:
    """Any of our results as JSON; what is not finite becomes null."""
    return json.dumps(_plain(value), indent=2)


def show_merge(done: Merge) -> None:
    """Print what was averaged, or would be."""
    console = _console()
    _show_ingredients(console, done)
    console.print(
        Text(
            f"{done.how}: {done.averaged} tensors averaged"
            + (f", {done.tensors - done.averaged} copied" if done.averaged < done.tensors else "")
            + f", {_count(done.elements)} elements; {_bytes(done.bytes_read)} to read, "
            f"{_bytes(done.bytes_written)} to write, {_bytes(done.peak_bytes)} of memory"
        )
    )
    _show_notes(console, done.notes)
    if done.written:
        print(f"written: {done.out}")  # unwrapped, for copying
    else:
        print(f"nothing was written (--dry-run); it would be {done.out}")


def show_soup(done: Soup) -> None:
    """Print what everything scored, and what was kept."""
    console = _console()
    table = Table(title="Scores", title_justify="left")
    table.add_column("score", justify="right")
    table.add_column("mean of")
    for tried in done.tried:
        style = "bold" if tried.kept else None
        table.add_row(f"{tried.score:.6g}", Text(" + ".join(tried.labels)), style=style)
    console.print(table)
    console.print(
        Text(
            f"{done.merge.how}: {done.score:.6g} with {len(done.kept)} of "
            f"{len(done.merge.ingredients)} checkpoints, the best alone {done.best:.6g}"
        )
    )
    _show_notes(console, done.notes)
    print(f"written: {done.merge.out}")


def show_checkpoint(checkpoint: Checkpoint, *, as_data: bool, every: bool) -> None:
    """Print what a checkpoint says of itself, and its tensors."""
    if as_data:
        typer.echo(as_json(_described(checkpoint)))
        return
    console = _console()
    own = {name: i for name, i in checkpoint.tensors.items() if name not in checkpoint.aliases}
    console.print(Text(f"{checkpoint.path}: {checkpoint.kind}", style="bold"))
    console.print(Text(f"weights: {checkpoint.origin or 'plain, no known average'}"))
    if checkpoint.step is not None:
        console.print(Text(f"step: {checkpoint.step:g}"))
    console.print(Text(f"{len(own)} tensors: {_by_dtype(own)}"))
    for name, target in checkpoint.aliases.items():
        console.print(Text(f"tied: {name} = {target}"))
    _show_metadata(console, checkpoint.metadata, every=every)
    for path in checkpoint.side_files:
        console.print(Text(f"beside: {path.name}"))
    if checkpoint.left_out:
        console.print(Text(f"no tensors: {', '.join(checkpoint.left_out)}"))
    table = Table()
    table.add_column("tensor")
    for column in ("shape", "dtype", "size"):
        table.add_column(column, justify="right")
    rows = list(own.items())
    for name, info in rows if every else rows[:_SHOWN]:
        shape = "x".join(map(str, info.shape)) or "scalar"
        table.add_row(Text(name), shape, _word(info.dtype), _bytes(info.nbytes))
    console.print(table)
    _show_rest(console, len(rows), every=every)


def _show_metadata(console: Console, metadata: Mapping[str, str], *, every: bool) -> None:
    """What a merge of ours wrote down, line by line; the start of other words that are long."""
    for name, value in metadata.items():
        lines = _recipe(value) if name == "polyak" else None
        shown = value if every or len(value) <= _LONG else f"{value[:_LONG]}…"
        for line in lines or [f"metadata: {name} = {shown}"]:
            console.print(Text(line))


def _recipe(value: str) -> list[str] | None:
    """The lines of a merge; None for anything else, whoever wrote it."""
    try:
        about = json.loads(value)
        lines = [f"made by: {about['how']}, polyak {about['polyak']}"]
        for one in about["checkpoints"]:
            step = f", step {one['step']:g}" if "step" in one else ""
            lines.append(f"  {one['coefficient']:.6g}  {one['name']}{step}")
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return lines


def show_diff(found: Diff, *, every: bool) -> None:
    """Print what two checkpoints do not share, and the distances of what they do."""
    console = _console()
    for where, names in (("first", found.only_first), ("second", found.only_second)):
        for name in names:
            console.print(Text(f"only in the {where}: {name}"))
    for name, (one, other) in found.reshaped.items():
        console.print(Text(f"shapes: {name} {list(one)} and {list(other)}"))
    changed = sorted(
        (distance for distance in found.distances if distance.changed),
        key=lambda distance: -distance.relative,
    )
    if changed:
        table = Table()
        table.add_column("tensor")
        for column in ("relative distance", "largest", "elements changed", "dtypes"):
            table.add_column(column, justify="right")
        for distance in changed if every else changed[:_SHOWN]:
            table.add_row(
                Text(distance.name),
                f"{distance.relative:.3g}",
                f"{distance.largest:.3g}",
                f"{distance.changed} of {math.prod(distance.shape)}",
                ", ".join(dict.fromkeys(map(_word, distance.dtypes))),
            )
        console.print(table)
        _show_rest(console, len(changed), every=every)
    equal = len(found.distances) - len(changed)
    console.print(
        Text(
            "the same values everywhere"
            if found.same
            else f"{equal} tensors equal, {len(changed)} changed; "
            f"relative distance of all: {found.relative:.3g}"
        )
    )
    recast = sum(len(set(distance.dtypes)) > 1 for distance in found.distances)
    if recast:
        console.print(Text(f"{recast} tensors have another dtype"))


def _show_ingredients(console: Console, done: Merge) -> None:
    table = Table(title="Checkpoints", title_justify="left")
    table.add_column("checkpoint")
    for column in ("step", "coefficient"):
        table.add_column(column, justify="right")
    table.add_column("format")
    table.add_column("weights")
    for one in done.ingredients:
        table.add_row(
            Text(one.label),
            "" if one.step is None else f"{one.step:g}",
            f"{one.coefficient:.6g}",
            Text(one.kind),
            Text(one.origin or "plain"),
        )
    console.print(table)


def _show_notes(console: Console, notes: tuple[str, ...]) -> None:
    for note in notes:
        console.print(Text(f"- {note}"))


def _show_rest(console: Console, count: int, *, every: bool) -> None:
    if count > _SHOWN and not every:
        console.print(Text(f"and {count - _SHOWN} more: --all shows every one"))


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH_OF_A_PIPE)


def _described(checkpoint: Checkpoint) -> dict[str, object]:
    return {
        "path": checkpoint.path,
        "kind": checkpoint.kind,
        "origin": checkpoint.origin,
        "step": checkpoint.step,
        "metadata": checkpoint.metadata,
        "aliases": checkpoint.aliases,
        "side_files": [path.name for path in checkpoint.side_files],
        "left_out": checkpoint.left_out,
        "tensors": checkpoint.tensors,
    }


def _plain(value: Any) -> Any:
    """Made of what JSON knows."""
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, torch.dtype):
        return _word(value)
    return str(value) if isinstance(value, Path) else value


def _by_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    elements: Counter[torch.dtype] = Counter()
    sizes: Counter[torch.dtype] = Counter()
    for info in tensors.values():
        elements[info.dtype] += info.numel
        sizes[info.dtype] += info.nbytes
    parts = [f"{_count(elements[d])} {_word(d)} in {_bytes(sizes[d])}" for d in elements]
    return ", ".join(parts)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(number: int) -> str:
    return _scaled(number, ("", "K", "M", "B", "T"))


def _bytes(number: int) -> str:
    return _scaled(number, (" B", " kB", " MB", " GB", " TB"))


def _scaled(number: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}{units[-1]}"
