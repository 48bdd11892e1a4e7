"""What one update of an average costs, beside six other libraries and the limit of the memory.

    make bench                                          the CPU; a table and docs/speed.md
    python benchmarks/updates.py --device cuda          the same on a GPU
    python benchmarks/updates.py --quick                a smoke test, which promises nothing

All run in one process. A round takes every contestant once, in random order, with the live weights
and the average built anew in fresh memory: where memory lands alone moves identical code by up to
1.6 times. Before each timed update the live weights change, as they do in training. A time is the
median over the rounds, and goes with its quartiles.

The limit on the CPU is one `lerp_` over one flat float32 buffer with as many elements as the
averages have; on a GPU it is the bytes that must be moved (the live weights once, each average in
and out) at the speed of a large copy, measured in the same rounds.

A contestant has the right answer if it is within 1 % of the way of a float64 oracle, for weights
that wander in the live dtype. The fastest right one is whom polyak is compared with.
"""

import argparse
import datetime
import gc
import json
import random
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import speed
import torch
from merge import machine
from meters import quartiles, seconds_of, storages
from models import build, gpt, mlp, resnet, short_gpt, tiny
from peers import CONTESTANTS, Contestant, Running
from promises import judge, shown
from torch import nn
from uses import blocks, files, training

RESULTS = Path(__file__).parent / "results" / "updates.json"
DECAYS = (0.999, 0.9995, 0.9998, 0.9999)  # of the first, second, … average
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP": mlp,
    "1,000 tiny": tiny,
    "ResNet-50-like": resnet,
    "GPT-2-like": gpt,
}
QUICK_MODELS = {"MLP": mlp, "1,000 tiny": tiny, "GPT-2-like": short_gpt}
SLOW = "GPT-2-like"  # with several averages only polyak and the peer that was fastest with one

STEPS, RIGHT = 300, 0.01  # of the oracle: so many updates, within this share of the way
LIMIT = "the limit"
COPIED = 2**28  # bytes that the measured copy reads, and writes
FEWEST, FEWEST_OF_SEVERAL, MOST = 3, 2, 25  # rounds
# Seconds for one average; several get half, or as much as the fewest rounds take.
SECONDS = {"MLP": 5.0, "1,000 tiny": 20.0, "ResNet-50-like": 35.0, "GPT-2-like": 50.0}


@dataclass(frozen=True)
class Case:
    """What is averaged: a model, the dtype of its live weights, and by how many averages."""

    model: str
    live: str
    averages: int


@dataclass(frozen=True)
class Time:
    """One contestant in one case; seconds of one update.

    Attributes:
        seconds, low, high: the median over the rounds, and the quartiles.
        of_limit: the median, as a multiple of the limit's.
        bytes: of all tensors that the average came with, the live weights apart.
        rounds: the time of each.
    """

    model: str
    live: str
    averages: int
    who: str
    seconds: float
    low: float
    high: float
    of_limit: float
    bytes: int
    rounds: list[float]


@dataclass(frozen=True)
class Answer:
    """How near a contestant comes to the oracle, as a share of the way that the average went.

    Attributes:
        right: near enough.
        returns: its block shows the average and brings the trained weights back; None without one.
    """

    who: str
    live: str
    error: float
    right: bool
    returns: bool | None


# ── is it right? ─────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def answer(contestant: Contestant, live: str, device: str) -> Answer:
    """Follow weights that wander to another place, beside the recurrence in float64."""
    model = build(mlp, DTYPES[live], device)
    parameters = list(model.parameters())
    running = contestant.make(model, DECAYS[:1])
    running.update()  # some copy at the first: nothing has moved yet
    start = torch.cat([p.double().flatten() for p in parameters])
    goal = start.roll(1)
    average = start.clone()
    for step in range(1, STEPS + 1):
        place = start.lerp(goal, step / STEPS)
        pieces = place.split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.copy_(piece.view_as(parameter))
        running.update()
        seen = torch.cat([p.double().flatten() for p in parameters])
        average += (1 - running.decay(step + 1)) * (seen - average)
    found = torch.cat([tensor.double().flatten() for tensor in running.tensors()])
    error = float((found - average).norm() / (average - start).norm())
    return Answer(contestant.name, live, error, error <= RIGHT, returns(running))


def returns(running: Running) -> bool | None:
    """Whether the block shows the average in the live model, and afterwards what was there."""
    if running.block is None:
        return None
    parameters = list(running.live.parameters())
    before = [p.clone() for p in parameters]
    averages = [tensor.clone() for tensor in running.tensors()]
    with running.block():
        shown = all(
            torch.equal(p, a.to(p.dtype)) for p, a in zip(parameters, averages, strict=True)
        )
    return shown and all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


# ── how fast? ────────────────────────────────────────────────────────────────────────────────────


def limit(model: nn.Module, averages: int, device: str) -> tuple[Running, float]:
    """What no average can beat, and by how much its time is to be multiplied."""
    elements = sum(p.numel() for p in model.parameters())
    if device == "cuda":
        source, target = (torch.ones(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
        live = nn.ParameterList()
        width = next(model.parameters()).element_size()
        moved = elements * (width + 8 * averages)
        update = partial(target.copy_, source)
        return Running(update, list, lambda n: 0.0, live), moved / (2 * COPIED)
    live = nn.ParameterList([torch.full((elements * averages,), 0.02)])
    flat = torch.full((elements * averages,), 0.01)
    update = partial(flat.lerp_, live[0].detach(), 1 - DECAYS[0])
    return Running(update, lambda: [flat], lambda n: DECAYS[0], live), 1.0


def typical(running: Running, device: str, patience: float) -> float:
    """The median time of an update over some in a row, the first apart."""
    parameters = list(running.live.parameters())
    running.update()  # copies, or builds what is kept
    times: list[float] = []
    end = time.perf_counter() + patience
    while len(times) < 3 or (len(times) < 100 and time.perf_counter() < end):
        with torch.no_grad():
            for parameter in parameters:
                parameter.neg_()  # the live weights move, exactly and without drift
        times.append(seconds_of(running.update, device))
    return statistics.median(times)


def measure(
    case: Case,
    contestants: Sequence[Contestant],
    make: Callable[[], nn.Module],
    device: str,
    *,
    seconds: float,
    most: int,
    order: random.Random,
) -> list[Time]:
    """Rounds of everyone until the time is used up; the limit is the last of the list."""
    times: dict[str, list[float]] = {who: [] for who in [*(c.name for c in contestants), LIMIT]}
    held: dict[str, int] = {}
    makers: list[Contestant | None] = [*contestants, None]
    end = time.perf_counter() + seconds
    rounds = 0
    print(f"\n{case.model}, {case.live}, {case.averages} average(s) ", end="", flush=True)
    fewest = min(FEWEST if case.averages == 1 else FEWEST_OF_SEVERAL, most)
    while rounds < fewest or (rounds < most and time.perf_counter() < end):
        rounds += 1
        for contestant in order.sample(makers, len(makers)):
            model = build(make, DTYPES[case.live], device)
            patience = min(0.25, seconds / 10)
            if contestant is None:
                running, share = limit(model, case.averages, device)
                del model
                times[LIMIT].append(share * typical(running, device, patience))
            else:
                before = storages() if rounds == 1 else {}
                running = contestant.make(model, DECAYS[: case.averages])
                times[contestant.name].append(typical(running, device, patience))
                if rounds == 1:
                    found = storages()
                    held[contestant.name] = sum(found[m] for m in found.keys() - before.keys())
                del model
            del running
            gc.collect()  # classes that refer to themselves would keep their memory
        print(".", end="", flush=True)
    least = statistics.median(times[LIMIT])
    return [_row(case, who, found, least, held.get(who, 0)) for who, found in times.items()]


def _row(case: Case, who: str, found: list[float], least: float, held: int) -> Time:
    low, middle, high = quartiles(found)
    return Time(
        case.model,
        case.live,
        case.averages,
        who,
        seconds=middle,
        low=low,
        high=high,
        of_limit=middle / least,
        bytes=held,
        rounds=[float(f"{one:.4g}") for one in found],
    )


# ── all of it ────────────────────────────────────────────────────────────────────────────────────


def present(device: str) -> tuple[dict[str, list[Contestant]], list[Answer], dict[str, str]]:
    """Who can be asked with each live dtype, what they answer, and why others cannot."""
    there: dict[str, list[Contestant]] = {live: [] for live in DTYPES}
    answers, absent = [], {}
    for contestant in CONTESTANTS:
        for live in DTYPES:
            try:
                answers.append(answer(contestant, live, device))
            except Exception as error:  # whatever a foreign package raises is the reason
                if contestant.ours:
                    raise
                first = (str(error).splitlines() or [""])[0]
                absent[f"{contestant.name}, {live}"] = f"{type(error).__name__}: {first}"
            else:
                there[live].append(contestant)
    return there, answers, absent


def tables(
    models: Mapping[str, Callable[[], nn.Module]],
    contestants: Mapping[str, Sequence[Contestant]],
    right: Collection[tuple[str, str]],
    device: str,
    *,
    quick: bool,
    most: int,
) -> list[Time]:
    """Every model, live dtype and number of averages.

    Args:
        models: how to build each.
        contestants: who can be asked, by live dtype.
        right: who gives the right answer with which live dtype.
        device: where.
        quick: not two averages.
        most: rounds.
    """
    order = random.Random(0)
    found = []
    for model, make in models.items():
        for live in DTYPES:
            asked = list(contestants[live])
            for averages in (1,) + ((4,) if quick else (2, 4)):
                case = Case(model, live, averages)
                share = 0.0 if quick else 1.0 if averages == 1 else 0.5
                rows = measure(
                    case,
                    asked,
                    make,
                    device,
                    seconds=share * SECONDS[model],
                    most=most,
                    order=order,
                )
                _show(rows)
                found += rows
                if model == SLOW and averages == 1:
                    asked = _ours_and_fastest(asked, rows, right)
    return found


def _ours_and_fastest(
    contestants: Sequence[Contestant], rows: Sequence[Time], right: Collection[tuple[str, str]]
) -> list[Contestant]:
    """Polyak, and the peer that took the least time of those with the right answer."""
    ours = [contestant for contestant in contestants if contestant.ours]
    peers = [contestant for contestant in contestants if not contestant.ours]
    times = {row.who: row.seconds for row in rows if (row.who, row.live) in right}
    return ours + sorted((p for p in peers if p.name in times), key=lambda p: times[p.name])[:1]


def _show(rows: Sequence[Time]) -> None:
    print()
    for row in sorted(rows, key=lambda row: row.seconds):
        print(
            f"  {row.who:22} {1e6 * row.seconds:12,.1f} µs  "
            f"({1e6 * row.low:,.1f} to {1e6 * row.high:,.1f})  {row.of_limit:6.2f} of the limit  "
            f"{row.bytes / 1e6:9.3f} MB",
            flush=True,
        )


def about(device: str, models: Mapping[str, Callable[[], nn.Module]]) -> dict[str, Any]:
    """Where, when and with what."""
    versions: dict[str, str | None] = {}
    for package in sorted({contestant.package for contestant in CONTESTANTS} | {"safetensors"}):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # polyak is run from its checkout
            versions[package] = None
    hardware: dict[str, Any] = {**machine(), "threads": torch.get_num_threads()}
    if device == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name()
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", "benchmarks/updates.py", *sys.argv[1:]]),
        "device": device,
        "machine": hardware,
        "versions": versions,
        "models": {
            name: {
                "tensors": len(list(build(make, torch.float32, "meta").parameters())),
                "elements": sum(p.numel() for p in build(make, torch.float32, "meta").parameters()),
            }
            for name, make in models.items()
        },
    }


def main() -> None:
    """Measure, print, write the results; exit code 1 when a promise was not kept."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--quick", action="store_true", help="a smoke test; small, and no promise")
    options.add_argument("--models", nargs="+", choices=list(MODELS), help="by default all")
    options.add_argument("--rounds", type=int, help=f"at most; by default {MOST}, or one if quick")
    options.add_argument("--out", type=Path, help=f"by default {RESULTS}; none if not all is asked")
    asked = options.parse_args()
    began = time.perf_counter()
    known = QUICK_MODELS if asked.quick else MODELS
    models = {name: make for name, make in known.items() if name in (asked.models or known)}

    contestants, answers, absent = present(asked.device)
    for one in answers:
        mark = "right" if one.right else "WRONG"
        print(f"{one.who:22} {one.live:9} off by {one.error:.1e} of the way: {mark}")
    for who, why in absent.items():
        print(f"{who}: not there: {why}")
    gc.collect()
    gc.freeze()  # so that looking for tensors, and collecting, need not go through the libraries

    right = {(one.who, one.live) for one in answers if one.right}
    most = asked.rounds or (1 if asked.quick else MOST)
    times = tables(models, contestants, right, asked.device, quick=asked.quick, most=most)
    uses: list[dict[str, Any]] = []
    if "GPT-2-like" in models:
        make = partial(build, models["GPT-2-like"], torch.float32, asked.device)
        for part in (blocks, files, training):
            uses += part(make, contestants["float32"], asked.device, quick=asked.quick)

    result = {
        **about(asked.device, models),
        "quick": asked.quick,
        "how": {contestant.name: contestant.how for contestant in CONTESTANTS},
        "absent": absent,
        "answers": [asdict(one) for one in answers],
        "updates": [asdict(row) for row in times],
        "uses": uses,
    }
    result["promises"] = {} if asked.quick else judge(result)
    print()
    for promise, said in result["promises"].items():
        mark = "kept" if said["kept"] else "BROKEN"
        print(f"{promise}: {shown(said['measured'])}, at most {shown(said['at most'])}: {mark}")
    print(f"took {time.perf_counter() - began:.0f} s")

    whole = set(models) == set(MODELS)
    out = asked.out or (_default(asked.device) if whole else None)
    if out is not None:
        out.parent.mkdir(exist_ok=True)
        text = json.dumps(result, indent=1)
        out.write_text(re.sub(r"\[[-\d\s.e,]*\]", lambda m: " ".join(m[0].split()), text) + "\n")
        print(f"written: {out}")
        if asked.out is None:
            speed.main()
    if not all(said["kept"] for said in result["promises"].values()):
        raise SystemExit(1)


def _default(device: str) -> Path:
    return RESULTS if device == "cpu" else RESULTS.with_stem(f"updates-{device}")


if __name__ == "__main__":
    main()
