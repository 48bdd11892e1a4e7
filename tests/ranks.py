"""Code on several ranks: fresh processes joined by gloo, whose answers come back in order.

    from work_sharding import rows_of            # a function of a module, not of the test

    assert run_on(3, rows_of, 5) == [2, 2, 1]

Each call starts its processes, joins them into one process group, runs the function on every rank
and ends them, so no group, mesh or cache of one test can reach the next. That is cheap, for they
are forked from one server process (`multiprocessing`, "forkserver") which has imported torch once:
3 s for the first call of a session, some 0.1 s for each after it.
"""

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal, TypeVar, TypeVarTuple

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

LIMIT = 60.0  # seconds that a rank may take to answer
GRACE = 3.0  # seconds that the others may take after the first failure

# What takes long to import, once for all ranks of a session. Some of it torch itself imports late:
# the first optimizer, for one, brings dynamo.
PRELOADED = [
    "polyak",
    "pytest",
    "sklearn.datasets",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
]


@dataclass(frozen=True)
class Outcome:
    """How one rank ended: it returned `value`, or "raised", "died" or was "silent" and says why."""

    rank: int
    end: Literal["returned", "raised", "died", "silent"]
    value: Any = None
    text: str = ""
    error: BaseException | None = None
    seconds: float = 0.0  # from the call to the answer


class RankError(AssertionError):
    """A rank did not return; `outcomes` has all of them, `error` what the first one raised."""

    def __init__(self, message: str, outcomes: list[Outcome], error: BaseException | None) -> None:
        super().__init__(message)
        self.outcomes, self.error = outcomes, error


def run_on(n: int, function: Callable[[*Ts], T], *args: *Ts, limit: float = LIMIT) -> list[T]:
    """Call `function` on `n` ranks; what each returned, by rank.

    The function must be one of a module (tests/distributed/work_*.py); what it takes and returns
    must be picklable. Inside, a warning of polyak's is an error.

    Raises:
        RankError: a rank raised, died, or did not answer within `limit` seconds. The message has
            the rank that failed first, with its traceback; no process outlives the call.
    """
    outcomes = outcomes_of(n, function, *args, limit=limit)
    failed = [outcome for outcome in outcomes if outcome.end != "returned"]
    if failed:
        # One that hangs was mostly left waiting, so those that failed are asked first.
        first = min(failed, key=lambda outcome: (outcome.end == "silent", outcome.seconds))
        others = ", ".join(f"rank {o.rank} {o.end}" for o in outcomes if o is not first)
        raise RankError(
            f"rank {first.rank} of {n} {first.end} after {first.seconds:.1f} s "
            f"({others or 'the only one'}):\n{first.text}",
            outcomes,
            first.error,
        )
    return [outcome.value for outcome in outcomes]


def outcomes_of(
    n: int,
    function: Callable[[*Ts], Any],
    *args: *Ts,
    limit: float = LIMIT,
    grace: float = GRACE,
) -> list[Outcome]:
    """How each of `n` ranks ended: as `run_on`, for ranks that are meant to fail.

    Args:
        n: how many ranks.
        function: see `run_on`.
        args: what it is called with on every rank.
        limit: seconds from this call until the last answer.
        grace: seconds that the others get once one has raised or died.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ranks-") as name, ExitStack() as undo:
        pipes = []
        for rank in range(n):
            ours, theirs = context.Pipe()
            rank_of = Rank(rank, n, Path(name), limit)
            process = context.Process(target=_live, args=(rank_of, theirs, function, args))
            process.daemon = True  # ended with pytest, if it comes to that
            process.start()
            theirs.close()  # so that the pipe ends when the process does
            undo.callback(_end, process)
            pipes.append(undo.enter_context(ours))
        found = _answers(pipes, began, limit, grace)
        return [
            found.get(rank) or Outcome(rank, "silent", text=_stack(Path(name), rank, limit))
            for rank in range(n)
        ]


def _end(process: ForkServerProcess) -> None:
    """See a process out: one that hangs is killed."""
    process.join(timeout=1.0)
    process.kill()
    process.join()


def _answers(
    pipes: list[Connection], began: float, limit: float, grace: float
) -> dict[int, Outcome]:
    """What the ranks sent, until all have answered or the time is over."""
    found: dict[int, Outcome] = {}
    end = began + limit + 0.5  # the stacks of those that hang are written at `limit`
    while len(found) < len(pipes) and (left := end - time.monotonic()) > 0:
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in found}
        for pipe in wait(list(waiting), timeout=left):
            assert isinstance(pipe, Connection)
            rank, seconds = waiting[pipe], time.monotonic() - began
            try:
                answer: dict[str, Any] = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionError):
                answer = {"end": "died", "text": "the process ended without an answer"}
            found[rank] = Outcome(rank, **answer, seconds=seconds)
            if answer["end"] != "returned":  # the others may be waiting for this one for ever
                end = min(end, time.monotonic() + grace)
    return found


def _stack(folder: Path, rank: int, limit: float) -> str:
    """Where a rank that did not answer stood, if it was given the time to say so."""
    path = folder / f"stack-{rank}"
    stack = path.read_text() if path.exists() else ""
    return f"no answer within {limit:g} s; it stood at\n{stack}" if stack else "no answer"


# ── inside a rank ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Rank:
    """Who a process is among the `n` of one call, and where they meet."""

    rank: int
    n: int
    folder: Path
    limit: float


def _live(me: Rank, pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The life of one rank: join the group, call, answer, and stay until all have answered."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with (me.folder / f"stack-{me.rank}").open("w") as stack:
        faulthandler.dump_traceback_later(me.limit, file=stack)
        try:
            _join_group(me)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", category=_polyak_warning())
                value = function(*args)
            _check_nothing_stays_lent()
            answer, returned = pickle.dumps({"end": "returned", "value": value}), True
        except BaseException as error:
            answer, returned = _told(error), False
        faulthandler.cancel_dump_traceback_later()
    with pipe, suppress(EOFError, OSError):
        pipe.send_bytes(answer)
        if returned:  # others may still need what this one has sent; an error ends their waiting
            pipe.recv_bytes()  # until the caller closes its end
    if dist.is_initialized():
        dist.destroy_process_group()


def _join_group(me: Rank) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no look-up of the host's name
    os.environ.update(RANK=str(me.rank), WORLD_SIZE=str(me.n), LOCAL_RANK=str(me.rank))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{me.folder / 'meet'}",
        rank=me.rank,
        world_size=me.n,
        timeout=timedelta(seconds=60),
    )


def _polyak_warning() -> type[Warning]:
    import polyak  # here, so that the harness can be tested beside a broken library

    return polyak.AveragingWarning


def _check_nothing_stays_lent() -> None:
    """As the fixture in conftest.py does for tests on one rank."""
    from polyak import _engine

    assert not _engine._lent_memory


def _told(error: BaseException) -> bytes:
    """An error as bytes: its traceback as text, and itself where it can be pickled."""
    text = "".join(traceback.format_exception(error))
    try:
        answer = pickle.dumps({"end": "raised", "text": text, "error": error})
        pickle.loads(answer)  # some can be written and not read
    except Exception:
        answer = pickle.dumps({"end": "raised", "text": text})
    return answer


def _die_with_parent() -> None:
    """Leave no process behind, also when pytest is killed while this rank is busy."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# ── counting ─────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Collectives:
    """What this rank asked of the network, counted in two ways that know nothing of each other.

    `ops` are the operations that passed torch's dispatcher, by name. `issued` is by how much the
    sequence numbers of the gloo backends have grown, in all groups that this rank is in, whoever
    called them from whichever thread: filled in when the block ends.
    """

    ops: Counter[str] = field(default_factory=Counter)
    issued: int = 0

    @property
    def total(self) -> int:
        """The larger of the two counts: 0 only where both saw none."""
        return max(self.ops.total(), self.issued)


@contextmanager
def count_collectives() -> Iterator[Collectives]:
    """Count what is sent inside the block, by functional collectives, c10d, FSDP or DTensor."""
    counted, before = Collectives(), _sequence_numbers()
    with _Watch(counted.ops):
        yield counted
    after = _sequence_numbers()
    counted.issued = sum(after[group] - before.get(group, 0) for group in after)


class _Watch(TorchDispatchMode):
    """Sees `c10d` (what FSDP and torch.distributed call) and `_c10d_functional` (DTensor)."""

    def __init__(self, ops: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops = ops

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func.overloadpacket.__name__)
        # The last two send nothing: they wait for, or pass on, what another operation has sent.
        if "c10d" in func.namespace and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            self.ops[name] += 1
        return func(*args, **(kwargs or {}))


def _sequence_numbers() -> dict[str, int]:
    """How many collectives each group of this rank has begun."""
    numbers: dict[str, int] = {}
    for group in distributed_c10d._world.pg_map:
        backend: Any = group._get_backend(torch.device("cpu"))
        numbers[str(group.group_name)] = int(backend._get_sequence_number_for_group())
    return numbers
