"""What an average costs on one rank and on two: time, memory, bytes; and what the model says of it.

    make bench

Each rank is a process pinned to a core of its own. One rank holds all of the average, each of two
holds half, once because the model is sharded (FSDP2) and once by `shard=` of a replicated one. All
cases run in every round, each in fresh processes with everything built anew. Beside each update the
same process adds one array to another (12 bytes an element, as an update moves): that is the speed
of memory that the model of `benchmarks/costs.py` is given here, and this is how well it predicts.

The promise: with half of the average on each rank, an update takes half of the time, within 25 %.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from costs import STORED, Machine, Setup
from merge import machine
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import polyak
from polyak._kernels._foreach import ForeachPlan

RESULTS = Path(__file__).parent / "results" / "scale.json"
WIDTH, LAYERS = 2048, 12  # 50M parameters: far more than any cache, in layers that halve evenly
UPDATES = 7  # timed in each process, after two that are not
FARTHEST = 0.25  # from 1/N, as promised
PRELOADED = ["polyak", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo"]
PATIENCE = timedelta(seconds=120)


@dataclass(frozen=True)
class Rank:
    """What one rank found; times are medians, in seconds, bytes are of this rank alone."""

    update: float
    processor: float  # what of it the rank was computing, not waiting for other programs
    fastest: float  # of the updates, the one that others disturbed least
    unguarded: float  # an update with nonfinite="ignore"
    add: float  # of as many elements in a plain addition
    enter: float
    leave: float
    held: int
    grown: int  # resident memory, by building the average
    received: float  # seconds of gathering as many elements as `applied()` must
    checkpoint: int


@dataclass(frozen=True)
class Case:
    """One way on one number of ranks."""

    way: str
    ranks: int


WORDS = {"FSDP2": "FSDP2", "shard=": "`shard=`"}
CLOCKS = {
    "processor": "processor time",
    "fastest": "by the clock, the fastest",
    "update": "by the clock",
}
CASES = [Case(way, ranks) for way in ("FSDP2", "shard=") for ranks in (1, 2)]


# ── in a rank ────────────────────────────────────────────────────────────────────────────────────


def live_in(case: Case, rank: int, core: int, folder: str, pipe: Connection) -> None:
    """The life of one rank."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", meeting, PATIENCE, world_size=case.ranks, rank=rank)
    pipe.send(asdict(measure(case, Path(folder))))
    dist.destroy_process_group()


def measure(case: Case, folder: Path) -> Rank:
    """Build a model and its average, and take everything in turn."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    options: dict[str, Any] = {}
    if case.way == "FSDP2":
        mesh = init_device_mesh("cpu", (case.ranks,))
        for layer in (*model, model):
            fully_shard(layer, mesh=mesh)
    else:
        options["shard"] = dist.group.WORLD
    before = resident()
    average = polyak.Average(model, **options)
    grown = resident() - before
    elements = sum(held_here(tensor).numel() for tensor in average.tensors.values())
    unguarded = polyak.Average(model, nonfinite="ignore", **options)
    times = beside_an_addition(average, unguarded, elements)
    del unguarded
    enters, leaves = [], []
    for _ in range(3):
        block = average.applied()
        enters.append(timed(block.__enter__)[0])
        leaves.append(timed(block.__exit__, None, None, None)[0])
    received = 0.0
    if case.way == "shard=" and case.ranks > 1:
        mine = torch.ones(elements // LAYERS)

        def gather() -> None:
            dist.all_gather([torch.empty_like(mine) for _ in range(case.ranks)], mine)

        gathers = [timed(gather)[0] for _ in range(5)]
        received = LAYERS * statistics.median(gathers)
    dcp.save({"average": average.state_dict()}, checkpoint_id=folder / "checkpoint")
    dist.barrier()
    return Rank(
        **times,
        enter=statistics.median(enters),
        leave=statistics.median(leaves),
        held=STORED * elements,
        grown=grown,
        received=received,
        checkpoint=sum(
            file.stat().st_size
            for file in (folder / "checkpoint").glob(f"__{dist.get_rank()}_*.distcp")
        ),
    )


def held_here(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this rank has."""
    held: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return held


def beside_an_addition(
    average: polyak.Average, unguarded: polyak.Average, elements: int
) -> dict[str, float]:
    """Medians, taken in turn: updates, and an addition of as many elements."""
    a, b = torch.ones(elements), torch.ones(elements)
    actions: dict[str, Callable[[], object]] = {
        "update": average.update,
        "unguarded": unguarded.update,
        "add": lambda: a.add_(b),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
    for _ in range(UPDATES + 2):
        for name, action in actions.items():
            taken[name].append(timed(action))
    by_clock = {name: statistics.median(t for t, _ in ones[2:]) for name, ones in taken.items()}
    updates = taken["update"][2:]
    processor, fastest = statistics.median(t for _, t in updates), min(t for t, _ in updates)
    return {**by_clock, "processor": processor, "fastest": fastest}


def timed(action: Callable[..., object], *args: object) -> tuple[float, float]:
    """Seconds of one call that all ranks begin together, by the clock and of the processor."""
    dist.barrier()
    began, processor = time.perf_counter(), time.thread_time()
    action(*args)
    return time.perf_counter() - began, time.thread_time() - processor


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ── outside ──────────────────────────────────────────────────────────────────────────────────────


def once(case: Case, cores: list[int]) -> list[Rank]:
    """One case in fresh processes, forked from a server that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        pipes, processes = [], []
        for rank in range(case.ranks):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (case, rank, cores[rank], folder, theirs)
            process = context.Process(target=live_in, args=arguments, daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        found = [Rank(**pipe.recv()) for pipe in pipes]
        for process in processes:
            process.join()
    return found


class Traffic(TorchDispatchMode):
    """Adds up the bytes that the operations inside read and write, as their schemas say."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and call."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        # Views move nothing; whether all is equal is asked on the CPU only.
        if not func.is_view and name not in ("equal", "empty_like", "detach"):
            self.operations += 1
            schema = func._schema
            for value, argument in zip(args, schema.arguments, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                read = not (name == "copy_" and written)
                self.bytes += (read + written) * bytes_in(value)
            if all(output.alias_info is None for output in schema.returns):
                self.bytes += bytes_in(result)
        return result


def bytes_in(values: object) -> int:
    """Of all tensors in them."""
    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def path(what: str, *, guard: bool) -> dict[str, Any]:
    """What one update of the multi-tensor kernel does for a tensor, by its operations."""
    n = 1 << 20
    moved = []
    for live in (torch.float32, torch.bfloat16):
        kernel = ForeachPlan([[torch.ones(n)]], [torch.full((n,), 2.0, dtype=live)], set())
        with Traffic() as traffic:
            kernel.mix_([0.5], guard=guard)
        moved.append(round(traffic.bytes / n))
    return {"what": what, "bytes": moved, "operations": traffic.operations}


def seconds_a_tensor(count: int = 1000) -> float:
    """What an update costs whatever the size: Python and calls, by tensors of one element."""
    torch.set_num_threads(1)
    average = polyak.Average(nn.ParameterList(torch.ones(1) for _ in range(count)))
    times = []
    for _ in range(20):
        began = time.thread_time()
        average.update()
        times.append(time.thread_time() - began)
    return statistics.median(times) / count


def compare(case: Case, rounds: list[list[Rank]]) -> list[dict[str, Any]]:
    """Model and measurement side by side: the median over rounds, the mean over ranks."""
    parameters = LAYERS * (WIDTH + 1) * WIDTH

    def of(name: str) -> float:
        means = [statistics.mean([float(getattr(rank, name)) for rank in one]) for one in rounds]
        return statistics.median(means)

    setup = Setup(parameters, case.ranks, case.ranks, whole=case.way == "shard=")
    here = Machine(memory=setup.update_moves / of("add"))
    rows = [
        ("average held", "bytes", setup.held, of("held")),
        ("resident memory grown by it", "bytes", setup.held, of("grown")),
        ("update, without the guard", "seconds", setup.update_takes(here), of("unguarded")),
        ("update", "seconds", setup.update_takes(here), of("update")),
        (
            "`applied()` in and out",
            "seconds",
            of("received") + setup.applied_moves / here.memory,
            of("enter") + of("leave"),
        ),
        ("checkpoint written", "bytes", setup.checkpoint, of("checkpoint")),
    ]
    return [
        {
            "what": f"{WORDS[case.way]}: {what}",
            "ranks": case.ranks,
            "unit": unit,
            "model": model,
            "measured": found,
        }
        for what, unit, model, found in rows
    ]


def judge(found: dict[Case, list[list[Rank]]]) -> dict[str, dict[str, Any]]:
    """An update on a rank of two against that of one, round by round, for each way.

    What counts is the time of the processor. That of the clock is the same where nothing else runs,
    and says little where other programs want the same two cores.
    """
    shares = {}
    for way in ("FSDP2", "shard="):
        for clock, words in CLOCKS.items():
            alone, shared = (
                [statistics.mean(getattr(rank, clock) for rank in one) for one in found[case]]
                for case in (Case(way, 1), Case(way, 2))
            )
            rounds = [two / one for one, two in zip(alone, shared, strict=True)]
            share = statistics.median(rounds)
            shares[f"{WORDS[way]}: {words}"] = {
                "measured": share,
                "rounds": rounds,
                "at least": 0.5 * (1 - FARTHEST),
                "at most": 0.5 * (1 + FARTHEST),
                "kept": 0.5 * (1 - FARTHEST) <= share <= 0.5 * (1 + FARTHEST),
                "counts": clock == "processor",
            }
    return shares


def main() -> None:
    """Measure, print, write the results; exit code 1 when the promise was not kept."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=7, help="of all cases, built anew")
    options.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    asked = options.parse_args()
    # Or blocks that were freed are kept for the next, and resident memory says nothing.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("scale.py must have two cores, one for each rank, got one.")

    found: dict[Case, list[list[Rank]]] = {case: [] for case in CASES}
    for number in range(asked.rounds):
        for case in CASES if number % 2 == 0 else CASES[::-1]:
            found[case].append(once(case, cores))
            times = ", ".join(f"{1e3 * rank.update:.1f} ms" for rank in found[case][-1])
            print(f"round {number + 1} of {asked.rounds}: {case.way} on {case.ranks}: {times}")

    comparisons = [row for case in CASES for row in compare(case, found[case])]
    for row in comparisons:
        print(
            f"{row['what']:40} on {row['ranks']}: model {row['model']:.4g}, "
            f"measured {row['measured']:.4g} {row['unit']}"
        )
    paths = [
        path('multi-tensor, `nonfinite="ignore"`', guard=False),
        path("multi-tensor with the guard, the default", guard=True),
    ]
    for one in paths:
        print(f"{one['what']}: {one['bytes']} bytes a parameter, {one['operations']} operations")
    a_tensor = seconds_a_tensor()
    print(f"beside that, {1e6 * a_tensor:.1f} µs a tensor")
    promises = judge(found)
    for promise, said in promises.items():
        mark = "kept" if said["kept"] else "NOT KEPT"
        least, most = said["at least"], said["at most"]
        print(f"{promise}: {said['measured']:.3f}, {least:.3f} to {most:.3f}: {mark}")

    about = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "command": "make bench",
        "parameters": LAYERS * (WIDTH + 1) * WIDTH,
        "machine": machine(),
        "rounds": asked.rounds,
        "comparisons": comparisons,
        "paths": paths,
        "seconds a tensor": a_tensor,
        "promises": promises,
        "ranks": [
            {"way": case.way, "ranks": case.ranks, "found": [[asdict(r) for r in o] for o in ones]}
            for case, ones in found.items()
        ],
    }
    asked.out.parent.mkdir(exist_ok=True)
    asked.out.write_text(json.dumps(about, indent=2) + "\n")
    print(f"written: {asked.out}")
    if not all(said["kept"] for said in promises.values() if said["counts"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
