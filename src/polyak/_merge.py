"""Averages of checkpoint files: any formats, any number, in memory that does not grow with them."""

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import _coefficients as shares
from ._coefficients import Curve
from ._combine import Combination, NonFinite, is_averaged
from ._errors import ArgumentError
from ._files import ALONE, Team, check_ending, checkpoint_writer, team_of
from ._files._folder import is_weights_name
from ._inputs import Inputs, Named, PathLikes, known_steps, open_inputs, steps_of
from ._schedules import Schedule
from ._slices import Progress
from ._version import version_of_polyak

if TYPE_CHECKING:  # a build of torch may be without it
    from torch.distributed import ProcessGroup

_WORTH_A_NOTE = 1e-3  # of the weight


@dataclass(frozen=True)
class Ingredient:
    """A checkpoint that was averaged.

    Args:
        path: where it lies.
        label: what the metadata of the result calls it: the end of its path.
        coefficient: how much it counts.
        step: its training time, where that is known.
        kind: its format, in words.
        origin: whose average it is, in words; None for plain weights.
    """

    path: Path
    label: str
    coefficient: float
    step: float | None
    kind: str
    origin: str | None


@dataclass(frozen=True)
class Merge:
    """What was averaged, and what came out; of a dry run, what would be.

    Args:
        out: the result.
        how: where the coefficients come from, in words.
        ingredients: all checkpoints, in the order of training where it matters, else as given.
        tensors: how many the result holds, tied ones once.
        averaged: how many of these are averages; the others are copied.
        elements: numbers in the result.
        bytes_read: from all inputs.
        bytes_written: of tensors.
        peak_bytes: estimate of the memory used on top of an idle process.
        notes: what one should know, in sentences; empty when there is nothing.
        written: False after a dry run.
    """

    out: Path
    how: str
    ingredients: tuple[Ingredient, ...]
    tensors: int
    averaged: int
    elements: int
    bytes_read: int
    bytes_written: int
    peak_bytes: int
    notes: tuple[str, ...]
    written: bool


def merge(
    checkpoints: PathLikes,
    *,
    out: str | PathLike[str],
    coefficients: Sequence[float] | None = None,
    normalize: bool = False,
    schedule: Schedule | None = None,
    curve: Curve | None = None,
    window: float | None = None,
    steps: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    key: str | None = None,
    integers: Named | None = None,
    nonfinite: NonFinite = "raise",
    max_shard_size: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    group: "ProcessGroup | None" = None,
) -> Merge:
    """Average checkpoint files into one, tensor by tensor, in about 30 MB of memory.

    out = sum of c_i checkpoint_i. Four ways to say c, of which one is used:

    - nothing: the plain mean; with `window`, of the checkpoints of that much time up to the last.
    - `coefficients`: your numbers, which sum to 1.
    - `schedule`: the weights it gives with updates at the steps of the checkpoints and nowhere
      else, time counted from step 0. What it leaves on the initial weights goes to the first.
    - `curve`: the mean that imitates a learning rate decaying along it over these checkpoints (or
      over the last `window`), without training again: WSM 2025, arXiv 2507.17634. The run must
      have had a constant rate there.

    The files are read by slices and summed in float64, and rounded once, at the end. All names,
    shapes and kinds are compared before a byte is written, and the result appears whole or not at
    all. Averaging helps checkpoints of one run, or of runs that started from the same weights; of
    others it makes noise: try `line` on two of them.

    Where torch.distributed is initialised all ranks must call this, with the same arguments and on
    a disk that all see: each reads and writes its share of the bytes, and the result is the same.

    Args:
        checkpoints: safetensors files, sharded or not, Hugging Face folders, torch files, folders
            of torch.distributed.checkpoint; also mixed.
        out: a `.safetensors` file, or a folder for shards and the side files (config, tokenizer)
            of the last checkpoint. A file is replaced.
        coefficients: one for each checkpoint; negative ones are allowed.
        normalize: rescale `coefficients` to sum to 1.
        schedule: any schedule.
        curve: "linear", "cosine", "1-sqrt", or a falling function of the share in [0, 1].
        window: time, in the unit of the steps.
        steps: training times, distinct. By default what the files say, else the last whole number
            in each name. Not used with `coefficients` and for a plain mean of all.
        dtype: of the averaged real tensors, instead of the inputs' (the widest, where they differ).
        key: where in a torch file the weights are, like "state_dict_ema".
        integers: the checkpoint (path or index) that gives what cannot be averaged: integers,
            booleans, 8-bit floats. By default they must agree.
        nonfinite: NaN and inf in a checkpoint are refused ("raise") or let into the result
            ("ignore"). An infinity that all share, as in a mask, is kept.
        max_shard_size: bytes; more than that is written as several files.
        force: replace a folder that exists.
        dry_run: check everything and tell, without writing.
        progress: called now and then with elements done and in all, of this rank.
        group: the ranks that share the work; None for all there are.

    Raises:
        ArgumentError: a value out of range; a file that cannot be read; NaN, inf, or an overflow;
            on all ranks, when one of them finds it.
        MatchError: checkpoints of different models; integers that do not agree.
        OrderError: a rank is gone.

    Examples:
        >>> import tempfile
        >>> from safetensors.torch import load_file, save_file
        >>> folder = tempfile.mkdtemp()
        >>> for step in (100, 200):
        ...     save_file({"w": torch.full((2,), float(step))}, f"{folder}/{step}.safetensors")
        >>> files = [f"{folder}/100.safetensors", f"{folder}/200.safetensors"]
        >>> merge(files, out=f"{folder}/mean.safetensors").how
        'plain mean'
        >>> load_file(f"{folder}/mean.safetensors")["w"]
        tensor([150., 150.])
    """
    team, target = team_of(group), Path(out)
    with ExitStack() as stack:
        with team.agreed():
            _check_ways(coefficients, normalize, schedule, curve, window)
            inputs = stack.enter_context(open_inputs(checkpoints, key=key, dtype=dtype))
            check_target(inputs, target, force=force)
            counted = _count(inputs, coefficients, normalize, schedule, curve, window, steps)
        exact = team.first(lambda: inputs.exact(integers))  # it may have to read
        with team.agreed():
            plan, combination = prepare(inputs, counted, target, exact=exact, nonfinite=nonfinite)
            _check_shards(plan, max_shard_size)
        if dry_run:
            return plan
        return write(
            plan,
            inputs,
            combination,
            max_shard_size=max_shard_size,
            force=force,
            progress=progress,
            team=team,
        )


@dataclass(frozen=True)
class Counted:
    """Coefficients, in the order of the inputs, and where they come from.

    Args:
        how: in words.
        coefficients: one for each input.
        steps: one for each input, None where it is not known.
        notes: what one should know, in sentences.
    """

    how: str
    coefficients: list[float]
    steps: list[float | None]
    notes: tuple[str, ...] = ()


def prepare(
    inputs: Inputs, counted: Counted, out: Path, *, exact: int, nonfinite: NonFinite
) -> tuple[Merge, Combination]:
    """Return the plan and the work; `exact` is the input that what is not averaged comes from."""
    written = inputs.written
    combination = Combination(
        checkpoints=inputs.checkpoints,
        labels=inputs.labels,
        coefficients=counted.coefficients,
        tensors=written,
        exact=inputs.checkpoints[exact],
        nonfinite=nonfinite,
    )
    averaged = sum(is_averaged(info.dtype) for info in written.values())
    plan = Merge(
        out=out,
        how=counted.how,
        ingredients=_ingredients(inputs, counted),
        tensors=len(written),
        averaged=averaged,
        elements=sum(info.numel for info in written.values()),
        bytes_read=combination.bytes_read,
        bytes_written=sum(info.nbytes for info in written.values()),
        peak_bytes=combination.peak_bytes,
        notes=(*counted.notes, *_notes(inputs)),
        written=False,
    )
    return plan, combination


def write(
    plan: Merge,
    inputs: Inputs,
    combination: Combination,
    *,
    max_shard_size: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    team: Team = ALONE,
) -> Merge:
    """Carry out a plan, together with the other ranks of the team."""
    last = inputs.paths.index(plan.ingredients[-1].path)
    with checkpoint_writer(
        plan.out,
        inputs.tensors,
        metadata={"polyak": json.dumps(_about(plan) | {"ties": dict(inputs.aliases)})},
        max_shard_size=max_shard_size,
        aliases=inputs.aliases,
        side_files=inputs.checkpoints[last].side_files,
        force=force,
        team=team,
    ) as writer:
        combination.compute(writer.write, progress=progress, team=team)
    return replace(plan, written=True)


def check_target(inputs: Inputs, out: Path, *, force: bool) -> None:
    """Raise, before any work, where `out` cannot be or would replace an input."""
    check_ending(out, "out")
    if not out.absolute().parent.is_dir():
        raise ArgumentError(f"out must lie in a folder that exists, got {str(out)!r}.")
    if out.is_dir() and not force:
        raise ArgumentError(
            f"out must be new, got the folder {str(out)!r}. Pass force=True to replace it."
        )
    target, there = out.resolve(), out.exists()
    for path, checkpoint in zip(inputs.paths, inputs.checkpoints, strict=True):
        files = [path, *checkpoint.files]
        replaced = there and any(out.samefile(file) for file in files)
        holds = any(target in file.resolve().parents for file in files)
        # Read before the weights that were meant, from now on.
        shadows = path.is_dir() and target.parent == path.resolve() and is_weights_name(out.name)
        if replaced or holds or shadows:
            raise ArgumentError(
                f"out must not be one of the checkpoints, got {str(out)!r}, which would replace "
                f"the weights of {str(path)!r}. Choose another place."
            )


def _check_shards(plan: Merge, limit: int | None) -> None:
    """Raise, before any work, unless the result can be written in files of that size."""
    if limit is None:
        return
    if not (isinstance(limit, int) and limit > 0):
        raise ArgumentError(
            f"max_shard_size must be a whole number of bytes above 0, got {limit!r}."
        )
    if plan.out.suffix == ".safetensors" and plan.tensors > 1 and plan.bytes_written > limit:
        raise ArgumentError(
            f"max_shard_size must be at least the {plan.bytes_written} bytes of a single file, got "
            f"{limit}. Pass a folder as out, for several files."
        )


def _check_ways(
    coefficients: Sequence[float] | None,
    normalize: bool,
    schedule: Schedule | None,
    curve: Curve | None,
    window: float | None,
) -> None:
    """Raise unless there is one way to say the coefficients."""
    ways = {"coefficients": coefficients, "schedule": schedule, "curve": curve}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise ArgumentError(
            f"coefficients must come from one place, got {' and '.join(given)}. Pass one of them."
        )
    if window is not None and given and given != ["curve"]:
        raise ArgumentError(
            f"window must go with a plain mean or a curve, got it with {given[0]}. "
            "Leave out the checkpoints that should not count."
        )
    if window is not None and not 0.0 < window < math.inf:
        raise ArgumentError(f"window must be above 0 and finite, got {window!r}.")
    if normalize and coefficients is None:
        raise ArgumentError("normalize must go with coefficients, got none. All others sum to 1.")


def _count(
    inputs: Inputs,
    coefficients: Sequence[float] | None,
    normalize: bool,
    schedule: Schedule | None,
    curve: Curve | None,
    window: float | None,
    steps: Sequence[float] | None,
) -> Counted:
    """The coefficients of all inputs, from whichever way was chosen."""
    count = len(inputs.labels)
    if coefficients is not None:
        values = shares.given(coefficients, count, normalize=normalize)
        return Counted("given coefficients", values, known_steps(inputs, steps))
    if schedule is None and curve is None and window is None:
        return Counted("plain mean", shares.uniform(count), known_steps(inputs, steps))
    times = steps_of(inputs, steps)
    order = sorted(range(count), key=times.__getitem__)
    if window is not None:
        order = [index for index in order if times[order[-1]] - times[index] <= window]
    sorted_times = [times[index] for index in order]
    notes: list[str] = []
    if schedule is not None:
        how = repr(schedule)
        found, initial = shares.of_schedule(schedule, sorted_times)
        if initial >= _WORTH_A_NOTE and sorted_times[0] > 0.0:
            notes.append(
                f"{initial:.3g} of the weight belongs to the weights at step 0, which are not "
                f"here; {inputs.labels[order[0]]} stands in for them."
            )
    elif curve is not None:
        how, found = f"decay along {curve!r}", shares.of_curve(curve, sorted_times)
    else:
        how, found = "plain mean", shares.uniform(len(order))
    if window is not None:
        how += f" of the last {window:g}"
    if len(order) == 1 and count > 1:
        notes.append(f"only {inputs.labels[order[0]]} is within the window: nothing is averaged.")
    values = [0.0] * count
    for index, value in zip(order, found, strict=True):
        values[index] = value
    return Counted(how, values, list(times), tuple(notes))


def _ingredients(inputs: Inputs, counted: Counted) -> tuple[Ingredient, ...]:
    """The inputs by step where all are known, else as given."""
    every = [
        Ingredient(path, label, coefficient, step, checkpoint.kind, checkpoint.origin)
        for path, label, coefficient, step, checkpoint in zip(
            inputs.paths,
            inputs.labels,
            counted.coefficients,
            counted.steps,
            inputs.checkpoints,
            strict=True,
        )
    ]
    if all(one.step is not None for one in every):
        every.sort(key=lambda one: one.step or 0.0)
    return tuple(every)


def _notes(inputs: Inputs) -> list[str]:
    """What the files say that one should know."""
    notes = []
    origins = [checkpoint.origin for checkpoint in inputs.checkpoints]
    for origin in sorted({origin for origin in origins if origin is not None}):
        notes.append(f"{origins.count(origin)} of {len(origins)} are averages already: {origin}.")
    if None in origins and any(origins):
        notes.append("live weights and averages are mixed.")
    mixed = [
        name
        for name, info in inputs.tensors.items()
        if len({checkpoint.tensors[name].dtype for checkpoint in inputs.checkpoints}) > 1
    ]
    if mixed:
        target = str(inputs.tensors[mixed[0]].dtype).removeprefix("torch.")
        notes.append(
            f"{len(mixed)} tensors have different dtypes in the checkpoints; "
            f"{mixed[0]!r} becomes {target}."
        )
    left_out = sorted({name for checkpoint in inputs.checkpoints for name in checkpoint.left_out})
    if left_out:
        notes.append(f"what is no tensor is left out: {', '.join(left_out[:3])}.")
    return notes


def _about(plan: Merge) -> dict[str, Any]:
    """What the result says about itself: names, never the places of the files."""
    steps = [one.step for one in plan.ingredients]
    return {
        "kind": "merged weights",
        "how": plan.how,
        **({"now": steps[-1]} if None not in steps else {}),
        "checkpoints": [
            {"name": one.label, "coefficient": one.coefficient}
            | ({} if one.step is None else {"step": one.step})
            for one in plan.ingredients
        ],
        "polyak": version_of_polyak(),
    }
