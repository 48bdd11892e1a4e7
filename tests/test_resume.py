"""200 runs are stopped somewhere, saved, built anew and loaded: not a bit may differ in the end."""

import io
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import polyak
from deep import differences

STEPS = 18  # of each run
START = 8  # of `After`, in units of time
BAD_STEP = 5  # a buffer is NaN at this step, so that there is an incident to count
SKIPPED = (4, 9, 10)  # steps that a scaler skips
CASES = 200

SCHEDULES: dict[str, polyak.Schedule] = {
    "power": polyak.Power(sigma_rel=0.1),
    "debiased": polyak.Exponential(decay=0.9),
    "plain": polyak.Exponential(half_life=12, debias=False),
    "uniform": polyak.Uniform(),
    "polynomial": polyak.Polynomial(3),
    "count": polyak.CountRamp(0.9),
    "ramp": polyak.ExponentialRamp(0.95, tau=20),
    "gamma": polyak.InverseGamma(2.0, power=0.75, max_decay=0.98),
    "half-life": polyak.HalfLifeRamp(0.2, half_life=6),
    "cosine": polyak.Cosine(0.9, total=10_000),
    "after power": polyak.After(START, polyak.Power(gamma=3.0)),
    "after plain": polyak.After(START, polyak.Exponential(decay=0.8, debias=False)),
}


class Net(nn.Module):
    """All that an average meets: a batch norm, a tie, a frozen bias, buffers of both kinds."""

    level: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 3)
        self.register_buffer("level", torch.zeros(2))
        self.finish()

    def finish(self) -> None:
        self.again = nn.Linear(3, 4)
        self.again.weight = self.first.weight
        self.again.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.first(x)).tanh()
        out: Tensor = self.last(inner + self.again(x))
        return out


class Reordered(Net):
    """The same names, assigned in another order."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.register_buffer("level", torch.zeros(2))
        self.last = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.first = nn.Linear(3, 4)
        self.finish()


@dataclass(frozen=True)
class Case:
    """How a run averages, where it stops, and what is different when it goes on."""

    seed: int
    kind: str  # "average", "averages", "window"
    schedule: str
    live: torch.dtype
    storage: torch.dtype | None
    rounding: str
    every: int
    clock: str  # "steps" or "samples"
    optimizer: str  # "momentum", "adam", or "scaled": fused, with steps skipped on the device
    stop: int
    inside: bool  # the checkpoint is taken inside applied()
    build: type[Net]  # of the process that goes on
    wrapper: str  # of the process that goes on: "none", "ddp", "compile"
    wrapped: str  # "before" the average is built, or "after" everything is loaded
    order: tuple[str, ...]  # of loading
    follow: str  # "before" loading, or "after" it


def draw(seed: int) -> Case:
    """The case of this number."""
    pick = random.Random(seed)
    late = pick.random() < 0.3
    schedule = pick.choice([name for name in SCHEDULES if name.startswith("after") == late])
    live = pick.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64])
    optimizers = ["momentum", "adam", "scaled"] if live == torch.float32 else ["momentum", "adam"]
    stop = pick.randint(0, STEPS - 4)
    if late and pick.random() < 0.4:
        stop = START
    # The model comes first where its checkpoint holds lent weights, which the average replaces.
    order = pick.sample(["model", "optimizer", "average"], 3)
    inside = pick.random() < 0.3
    if inside:
        order.sort(key="average".__eq__)
    return Case(
        seed=seed,
        kind=pick.choice(["average", "average", "averages", "window"]),
        schedule=schedule,
        live=live,
        storage=pick.choice([None, torch.bfloat16, torch.float16, torch.float32, torch.float64]),
        rounding=pick.choice(["nearest", "stochastic"]),
        every=pick.choice([1, 1, 2, 3, 5]),
        clock=pick.choice(["steps", "steps", "samples"]),
        optimizer=pick.choice(optimizers),
        stop=stop,
        inside=inside,
        build=pick.choice([Net, Reordered]),
        wrapper=pick.choice(["none", "ddp", "compile"]),
        wrapped=pick.choice(["before", "after"]),
        order=tuple(order),
        follow=pick.choice(["before", "after"]),
    )


class Run:
    """A training process: everything in it is built anew."""

    def __init__(self, case: Case, build: type[Net], wrapper: str = "none") -> None:
        self.case, self.step, self.samples = case, 0, 0
        self.model = build().to(case.live)
        self.called: nn.Module = wrap(self.model, wrapper)
        # By name: the state of an optimizer goes by position, which is not what is tested here.
        parameters = [p for _, p in sorted(self.model.named_parameters()) if p.requires_grad]
        self.optimizer: torch.optim.Optimizer
        if case.optimizer == "momentum":
            self.optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        else:
            scaled = case.optimizer == "scaled"
            self.optimizer = torch.optim.AdamW(parameters, lr=0.01, fused=scaled)
        self.scaler = torch.amp.GradScaler("cpu", enabled=case.optimizer == "scaled")
        self.average = self.make_average()

    def make_average(self) -> Any:
        case = self.case
        storage, schedule = case.storage, SCHEDULES[case.schedule]
        if case.kind == "window":
            return polyak.Window(self.called, k=3, every=2, dtype=storage)
        settings: Any = {"dtype": storage, "rounding": case.rounding, "seed": case.seed}
        if case.kind == "average":
            return polyak.Average(self.called, schedule, **settings)
        several = {"drawn": schedule, "mean": polyak.Uniform(), "short": SCHEDULES["plain"]}
        return polyak.Averages(self.called, several, **settings)

    def follow(self) -> None:
        clock = (lambda: self.samples) if self.case.clock == "samples" else None
        self.average.follow(self.optimizer, every=self.case.every, now=clock)

    def train(self, until: int) -> None:
        while self.step < until:
            self.step += 1
            data = torch.Generator().manual_seed(1_000 * self.case.seed + self.step)
            x = torch.randn(8, 3, generator=data).to(self.case.live)
            self.optimizer.zero_grad()
            loss = (self.called(x) - x).square().mean()
            if self.case.optimizer == "scaled" and self.step in SKIPPED:
                loss = loss * float("inf")
            self.scaler.scale(loss).backward()
            self.model.level.fill_(self.step)
            if self.step == BAD_STEP:
                self.model.level[0] = float("nan")
            self.samples += 1 + self.step % 3
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def members(self) -> list[Any]:
        several = self.case.kind == "averages"
        return list(self.average.values()) if several else [self.average]

    def checkpoint(self) -> bytes:
        """The bytes of a file, as people write it."""
        if not self.case.inside:
            return self.saved()
        with warnings.catch_warnings():
            if self.average.updates == 0:  # lent before the first update: rightly warned of
                warnings.simplefilter("ignore", polyak.AveragingWarning)
            with self.members()[-1].applied():
                return self.saved()

    def saved(self) -> bytes:
        state = {
            "counts": [self.step, self.samples],
            "scaler": self.scaler.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
        }
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    def load(self, file: bytes) -> None:
        state = torch.load(io.BytesIO(file), weights_only=True)
        self.step, self.samples = state["counts"]
        self.scaler.load_state_dict(state["scaler"])
        for part in self.case.order:
            getattr(self, part).load_state_dict(state[part])

    def everything(self) -> dict[str, Any]:
        """All there is to compare: what was averaged, what is remembered and said of it."""
        reports = [asdict(member.report()) for member in self.members()]
        for report in reports:  # in the order of the model, which is not always the same
            report["tensors"] = sorted(report["tensors"], key=lambda tensor: str(tensor["name"]))
        return {
            "state": self.average.state_dict(),
            "weights": [member.weights() for member in self.members()],
            "reports": reports,
            "trained": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def next_decay(self) -> Any:
        """What one more update answers, whatever the clock counts."""
        return self.average.update(now=self.average.now + 1)


def wrap(model: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    if wrapper == "compile":
        compiled: Any = torch.compile(model, backend="eager")
        module: nn.Module = compiled
        return module
    return model


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one, so that the wrapper is the real DDP."""
    meeting = (tmp_path_factory.mktemp("ranks") / "meeting").as_uri()
    dist.init_process_group("gloo", meeting, rank=0, world_size=1)
    # The wrapper is what matters; compiling 200 times would take minutes.
    with torch.compiler.set_stance("force_eager"):
        yield
    dist.destroy_process_group()


@pytest.mark.parametrize("seed", range(CASES))
def test_a_stopped_run_ends_with_the_bits_of_the_run_that_was_not(seed: int) -> None:
    """Tensors, clock, phase, history, report and the next decay, through a file of plain data."""
    case = draw(seed)
    torch.manual_seed(seed)
    begun = Run(case, Net)
    begun.follow()
    begin = {name: tensor.clone() for name, tensor in begun.model.state_dict().items()}
    begun.train(case.stop)
    file = begun.checkpoint()

    torch.manual_seed(seed + 1)  # another process: other initial weights, a clock at 0
    before = case.wrapper if case.wrapped == "before" else "none"
    resumed = Run(case, case.build, before)
    if case.follow == "before":
        resumed.follow()
    resumed.load(file)
    if case.follow == "after":
        resumed.follow()
    if case.wrapped == "after":
        resumed.called = wrap(resumed.model, case.wrapper)
    moment = torch.load(io.BytesIO(file), weights_only=True)["average"]
    moment.pop("live", None)  # lent to the average when it was saved, and in the model by now
    assert list(differences(resumed.average.state_dict(), moment)) == []
    resumed.train(STEPS)

    # The run that was never stopped, nor saved, nor lent.
    torch.manual_seed(seed)
    whole = Run(case, Net)
    assert list(differences(whole.model.state_dict(), begin)) == []
    whole.follow()
    whole.train(STEPS)

    assert whole.average.updates > 0
    assert list(differences(resumed.everything(), whole.everything())) == []
    assert resumed.next_decay() == whole.next_decay()
    assert list(differences(resumed.everything(), whole.everything())) == []


def test_the_stop_points_cover_every_kind_of_stop() -> None:
    """Chance must not leave out what the promise names."""
    cases = [draw(seed) for seed in range(CASES)]
    seen = Counter[str]()
    for case in cases:
        values = {name: getattr(case, name) for name in case.__annotations__}
        seen.update(f"{name}={value}" for name, value in values.items() if name != "seed")
        if case.schedule.startswith("after") and case.kind != "window" and case.clock == "steps":
            side = (case.stop > START) - (case.stop < START)
            seen[f"start {['at', 'after', 'before'][side]}"] += 1
        if case.optimizer == "scaled" and case.stop in SKIPPED:
            seen["right after a skip"] += 1
        if case.stop % case.every:
            seen["between two updates"] += 1
    wanted = {
        "schedule": SCHEDULES,
        "kind": ["average", "averages", "window"],
        "live": [torch.float32, torch.bfloat16, torch.float64],
        "storage": [None, torch.bfloat16, torch.float16, torch.float32, torch.float64],
        "rounding": ["nearest", "stochastic"],
        "every": [1, 2, 3, 5],
        "clock": ["steps", "samples"],
        "optimizer": ["momentum", "adam", "scaled"],
        "inside": [True, False],
        "build": [Net, Reordered],
        "wrapper": ["none", "ddp", "compile"],
        "wrapped": ["before", "after"],
        "follow": ["before", "after"],
    }
    kinds = [f"{name}={value}" for name, values in wanted.items() for value in values]
    kinds += ["start before", "start at", "start after", "right after a skip"]
    kinds += ["between two updates", "stop=0"]
    assert {kind: seen[kind] for kind in kinds if seen[kind] < 3} == {}
