"""Reconstruction: the average that nobody kept, from files, as close as it says."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import polyak
from oracles import average_of, weights_by_basis
from polyak import Tail, _posthoc
from polyak._files import _atomic, open_checkpoint
from polyak._posthoc import open_run
from zoo import ZOO, Animal, train_step

FloatArray = npt.NDArray[np.float64]

PAIR = {"short": polyak.Power(sigma_rel=0.05), "long": polyak.Power(sigma_rel=0.10)}


def slow_half(*, now: float, elapsed: float) -> float:
    """A schedule of the caller's own: a half-life of 90 that begins as a plain mean."""
    return min(math.exp2(-elapsed / 90), 1.0 - elapsed / now)


def noise(count: int, size: int) -> FloatArray:
    return np.random.default_rng(0).standard_normal((count, size))


def run_on(
    folder: Path,
    trajectory: FloatArray,
    times: Sequence[float],
    *,
    every: float,
    averages: Mapping[str, polyak.Schedule] = PAIR,
    dtype: torch.dtype = torch.float64,
    origin: float = 0,
    initial: float = 0.0,
    **options: Any,
) -> polyak.Averages:
    """Snapshots of a run whose weights at `times` are the rows of `trajectory`."""
    live = {"w": torch.full((trajectory.shape[1],), initial, dtype=torch.float64)}
    kept = polyak.Averages(live, averages, now=origin)
    with polyak.Snapshots(kept, folder, every=every, dtype=dtype, **options):
        for row, now in zip(trajectory, times, strict=True):
            live["w"].copy_(torch.from_numpy(row))
            kept.update(now=now)
    return kept


def online(
    schedule: polyak.Schedule, trajectory: FloatArray, times: Sequence[float], initial: float = 0.0
) -> FloatArray:
    """The average that was asked for, had it been kept: the recurrence in float64."""
    return average_of(schedule, np.full(trajectory.shape[1], initial), list(trajectory), times)[-1]


def rebuilt(found: polyak.Reconstruction) -> FloatArray:
    result: FloatArray = found.weights()["w"].numpy()
    return result


def distance(ours: FloatArray, theirs: FloatArray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def listing(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ── the weights of a real run ────────────────────────────────────────────────────────────────────

SIGMAS = (0.02, 0.03, 0.05, 0.07, 0.10, 0.15)
STEPS = 4_096


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """4 096 steps on real digits (SCIENCE, test 4): folders of snapshots, averages kept online."""
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    inputs, answers = torch.tensor(pixels / 16 - 0.3, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(inputs))
    training, held_out = order[719:], order[:719]
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    root = tmp_path_factory.mktemp("digits")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(_atomic, "_sync", lambda path: None)  # 1 024 files, and no crash to fear
    averages = polyak.Averages(net, PAIR, dtype=torch.float64)
    written = [
        polyak.Snapshots(averages, root / f"{dtype}-128", every=STEPS // 128, dtype=dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    ]
    kept = np.zeros((len(SIGMAS), sum(p.numel() for p in net.parameters())))
    halfway = {}
    for step in range(1, STEPS + 1):
        batch = training[torch.randint(0, len(training), (16,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs[batch]), answers[batch]).backward()
        optimizer.step()
        averages.update()
        live = flat(dict(net.named_parameters()))
        decays = [(1.0 - 1.0 / step) ** s.exponent for s in map(power, SIGMAS)]
        kept = np.array(decays)[:, None] * kept + (1.0 - np.array(decays))[:, None] * live
        if step == STEPS // 2:
            halfway = dict(zip(SIGMAS, kept.copy(), strict=True))
    folders = {}
    for snapshots in written:
        snapshots.close()
        few = root / f"{snapshots.dtype}-32"
        few.mkdir()
        for path in snapshots.directory.iterdir():  # as if every fourth had been taken
            if int(path.stem[-12:]) % (STEPS // 32) == 0:
                (few / path.name).hardlink_to(path)
        folders[128, snapshots.dtype], folders[32, snapshots.dtype] = snapshots.directory, few
    monkeypatch.undo()
    return {
        "folders": folders,
        "online": dict(zip(SIGMAS, kept, strict=True)),
        "halfway": halfway,
        "net": net,
        "test": (inputs[held_out], answers[held_out]),
    }


def power(sigma_rel: float) -> polyak.Power:
    return polyak.Power(sigma_rel=sigma_rel)


def flat(tensors: Mapping[str, Tensor]) -> FloatArray:
    order = ("0.weight", "0.bias", "2.weight", "2.bias")
    values = [tensors[name].detach().double().numpy().ravel() for name in order]
    result: FloatArray = np.concatenate(values)
    return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_weights_of_a_real_run_are_rebuilt(digits: dict[str, Any], dtype: torch.dtype) -> None:
    """Relative error 2e-4 from 32 snapshots and 2e-6 from 128, against averages kept online."""
    for count, bound in ((32, 2e-4), (128, 2e-6)):
        run = open_run(digits["folders"][count, dtype])
        for sigma in (0.03, 0.05, 0.07, 0.10, 0.15):
            found = run.reconstruct(power(sigma))
            weights = flat(found.weights(dtype=torch.float64))
            assert distance(weights, digits["online"][sigma]) <= bound, (count, sigma)


def test_weights_at_an_earlier_moment_are_those_of_then(digits: dict[str, Any]) -> None:
    """Half-way, from the 64 snapshots up to there alone."""
    folder = digits["folders"][128, torch.float32]
    for sigma in (0.03, 0.07, 0.15):
        found = polyak.reconstruct(folder, power(sigma), at=STEPS // 2)
        assert max(int(found.files[i].stem[-12:]) for i in found.fit.used) == STEPS // 2
        weights = flat(found.weights(dtype=torch.float64))
        assert distance(weights, digits["halfway"][sigma]) <= 2e-5
        assert found.profile.end == STEPS // 2


def test_the_loss_is_that_of_the_average_kept_online(digits: dict[str, Any]) -> None:
    """Test loss within 1e-4 at 32 snapshots."""
    inputs, answers = digits["test"]
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def loss() -> float:
        with torch.no_grad():
            return nn.functional.cross_entropy(net(inputs), answers).item()

    for sigma in (0.03, 0.07, 0.15):
        found = polyak.reconstruct(digits["folders"][32, torch.float16], power(sigma))
        net.load_state_dict(found.weights(), strict=True)
        ours = loss()
        vector = torch.from_numpy(digits["online"][sigma]).float()
        nn.utils.vector_to_parameters(vector, net.parameters())
        assert abs(ours - loss()) <= 1e-4


def test_half_precision_has_the_floor_of_its_rounding(digits: dict[str, Any]) -> None:
    """About 2e-4 at 0.07, whether 32 or 128 are there; `noise` says so."""
    for count in (32, 128):
        found = polyak.reconstruct(digits["folders"][count, torch.float16], power(0.07))
        weights = flat(found.weights(dtype=torch.float64))
        error = distance(weights, digits["online"][0.07])
        assert 5e-5 <= error <= 4e-4
        assert error == pytest.approx(found.fit.noise, rel=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_ridge_halves_the_error_of_a_short_average(
    digits: dict[str, Any], dtype: torch.dtype
) -> None:
    """sigma_rel 0.02 from 128 snapshots, end to end: files, fit, weights."""
    run = open_run(digits["folders"][128, dtype])
    plain_fit = run.overlaps.fit(power(0.02), ridge=0.0)
    ours = run.reconstruct(power(0.02))
    plain = polyak.Reconstruction(plain_fit, run.files, ours.profile, run.about)
    error, unregularised = (
        distance(flat(r.weights(dtype=torch.float64)), digits["online"][0.02])
        for r in (ours, plain)
    )
    assert error <= 0.5 * unregularised


def test_a_stored_length_is_its_file(digits: dict[str, Any]) -> None:
    """One coefficient of 1, all others 0 to 1e-10, at every storage and moment."""
    for folder in digits["folders"].values():
        run = open_run(folder)
        for at in (None, STEPS // 2, STEPS // 32):
            for name, schedule in PAIR.items():
                found = run.reconstruct(schedule, at=at)
                moment = STEPS if at is None else at
                wanted = [path.name == f"{name}-{moment:012d}.safetensors" for path in found.files]
                assert sum(wanted) == 1
                np.testing.assert_allclose(found.fit.coefficients, wanted, rtol=0, atol=1e-10)
                file = folder / f"{name}-{moment:012d}.safetensors"
                stored = polyak.load_weights(file)
                for key, value in found.weights().items():
                    assert torch.equal(value, stored[key].float())


# ── the interval, the start, the resume ──────────────────────────────────────────────────────────


@pytest.mark.parametrize("delay", ["none", "late", "after"])
@pytest.mark.parametrize("interval", [1, 10, 100])
def test_length_does_not_depend_on_interval_start_or_resume(
    interval: int, delay: str, tmp_path: Path
) -> None:
    """sigma_rel 0.15 within 1e-3, measured by basis vectors: weights that say when they were.

    Updates every 1, 10 and 100 steps; from the start, 5 % later, or by `After`; saved and loaded
    in the middle, with new Snapshots in the same folder.
    """
    steps, start = 8_000, 400
    first = start + interval if delay == "late" else interval
    averages = {n: polyak.After(start, s) if delay == "after" else s for n, s in PAIR.items()}
    # Moments of the weights of the average: of the mean time and the mean square, exact in float64.
    live = {"w": torch.zeros(2, dtype=torch.float64)}
    kept = polyak.Averages(live, averages)
    for begin, end in ((first, 3_900), (3_900 + interval, steps)):
        if begin != first:
            state = kept.state_dict()
            kept = polyak.Averages(live, averages)
            kept.load_state_dict(state)
        with polyak.Snapshots(kept, tmp_path, every=200, dtype=torch.float64):
            for now in range(begin, end + 1, interval):
                # An update speaks for the interval before it: its mean, and its mean square.
                low, high = (now - interval) / steps, now / steps
                mean, square = (low + high) / 2, (low * low + low * high + high * high) / 3
                live["w"].copy_(torch.tensor([mean, square]))
                kept.update(now=now)
    found = polyak.reconstruct(tmp_path, power(0.15))
    mean, square = rebuilt(found)
    assert math.sqrt(square - mean**2) == pytest.approx(0.15, abs=1e-3)
    gamma = power(0.15).exponent - 1.0
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-3)
    age = found.profile.mean_age + interval / 2  # its moments are the ends of their intervals
    assert age == pytest.approx(steps / (gamma + 2), rel=1e-2)


def test_two_debiased_averages_rebuild_a_third_between_them(tmp_path: Path) -> None:
    """The reported profile error is the measured one within 10 %, over 20 000 random walks of 0.

    The trajectory is independent noise, so the squared distance to the average kept online is the
    profile error in the mean, and 20 000 columns are 20 000 trials of it.
    """
    steps = 600
    trajectory, times = noise(steps, 20_000), range(1, steps + 1)
    pair = {"a": polyak.Exponential(half_life=30), "b": polyak.Exponential(half_life=120)}
    run_on(tmp_path, trajectory, times, every=50, averages=pair)
    for half_life in (45, 60, 90):
        target = polyak.Exponential(half_life=half_life)
        found = polyak.reconstruct(tmp_path, target, max_error=1.0)
        wanted = online(target, trajectory, times)
        measured = distance(rebuilt(found), wanted) ** 2
        assert found.fit.error == pytest.approx(measured, rel=0.1)
        assert 1e-9 < found.fit.error < 1e-2


# ── any target ───────────────────────────────────────────────────────────────────────────────────

TARGETS: dict[str, polyak.Schedule] = {
    "power": polyak.Power(sigma_rel=0.07),
    "gamma": polyak.Power(gamma=2.5),
    "debiased": polyak.Exponential(half_life=120),
    "exponential": polyak.Exponential(half_life=100, debias=False),
    "uniform": polyak.Uniform(),
    "half-life ramp": polyak.HalfLifeRamp(0.05),
    "half-life ramp with a cap": polyak.HalfLifeRamp(0.1, half_life=100),
    "count ramp": polyak.CountRamp(0.993),
    "inverse gamma": polyak.InverseGamma(power=0.75),
    "polynomial": polyak.Polynomial(6),
    "exponential ramp": polyak.ExponentialRamp(0.99, tau=200),
    "after": polyak.After(400, polyak.Exponential(half_life=100)),
    "function": slow_half,
}


@pytest.fixture(scope="module")
def iid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FloatArray]:
    """1 280 updates of independent noise in 4 000 weights, a snapshot of three averages each 20."""
    folder, trajectory = tmp_path_factory.mktemp("iid"), noise(1_280, 4_000)
    three: dict[str, polyak.Schedule] = {**PAIR, "mean": polyak.Uniform()}
    run_on(folder, trajectory, range(1, 1_281), every=20, averages=three, initial=1.0)
    return folder, trajectory


@pytest.mark.parametrize("at", [None, 640], ids=["end", "middle"])
@pytest.mark.parametrize("name", TARGETS)
def test_any_schedule_can_be_asked_for(
    name: str, at: int | None, iid: tuple[Path, FloatArray]
) -> None:
    """As far from the average kept online as `fit.error` says, and of the profile that it says."""
    folder, trajectory = iid
    end = at or 1_280
    target, times = TARGETS[name], range(1, end + 1)
    found = polyak.reconstruct(folder, target, at=at, max_error=0.2)
    weights = rebuilt(found)
    wanted = online(target, trajectory[:end], times, initial=1.0)
    initial, goal = weights_by_basis(target, times)
    assert found.fit.at == end
    # What `profile` says is what the files give: an exact sum over all the weights of the run.
    summed = found.profile.weights @ trajectory[: len(found.profile.weights)]
    summed = summed + found.profile.initial
    np.testing.assert_allclose(weights, summed, rtol=0, atol=1e-11)
    assert found.profile.initial + found.profile.weights.sum() == pytest.approx(1.0, abs=1e-12)
    # And its distance from the target is the error: the first moment is the initial weights.
    apart = np.append(found.profile.initial - initial, found.profile.weights - goal)
    square = float(apart @ apart) / (float(goal @ goal) + initial**2)
    assert found.fit.error == pytest.approx(square, rel=1e-6, abs=1e-20)
    noisy = distance(weights - found.profile.initial, wanted - initial) ** 2
    if initial < 1e-6:
        assert noisy == pytest.approx(found.fit.error, rel=0.15, abs=1e-20)


@pytest.mark.parametrize("curve", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("length", [400, 900])
def test_windows_and_decays_can_be_asked_for(
    length: int, curve: Any, iid: tuple[Path, FloatArray]
) -> None:
    """Against the definition: gradient weights that fall like a learning rate over the window."""
    folder, trajectory = iid
    found = polyak.reconstruct(folder, Tail(length, curve=curve), max_error=1.0)
    x = (np.arange(1_281) - (1_280 - length)) / length
    falling = {
        "linear": 1 - x,
        "cosine": 0.5 + 0.5 * np.cos(np.pi * np.clip(x, 0, 1)),
        "1-sqrt": 1 - np.sqrt(np.clip(x, 0, 1)),
    }[curve]
    after = np.clip(np.where(x <= 0, 1.0, falling), 0.0, 1.0)
    goal = after[:-1] - after[1:]  # the weight of updates 1, 2, ..., 1 280
    assert goal.sum() == pytest.approx(1.0)
    wanted = goal @ trajectory
    measured = distance(rebuilt(found) - found.profile.initial, wanted) ** 2
    assert measured == pytest.approx(found.fit.error, rel=0.15)
    assert found.fit.error < 0.35


@pytest.mark.parametrize(
    "pair",
    [
        {"a": polyak.CountRamp(0.999), "b": polyak.InverseGamma(power=0.7)},
        {"a": slow_half, "b": polyak.Power(sigma_rel=0.1)},
        {"a": polyak.After(300, polyak.Uniform()), "b": polyak.Exponential(half_life=60)},
        {"a": polyak.HalfLifeRamp(0.05), "b": polyak.HalfLifeRamp(0.2)},
    ],
    ids=["counted", "function", "late", "ramps"],
)
def test_any_schedules_can_be_stored(pair: dict[str, polyak.Schedule], tmp_path: Path) -> None:
    """The profile that is reported is the one that the files have, by every update of the run."""
    trajectory = noise(800, 50)
    run_on(tmp_path, trajectory, range(1, 801), every=25, averages=pair, initial=3.0)
    opaque = slow_half if slow_half in pair.values() else None
    found = polyak.reconstruct(
        tmp_path, polyak.Exponential(half_life=80), max_error=1.0, opaque=opaque
    )
    summed = found.profile.weights @ trajectory + 3.0 * found.profile.initial
    np.testing.assert_allclose(rebuilt(found), summed, rtol=0, atol=1e-11)


def test_a_function_is_asked_for_when_one_was_stored(tmp_path: Path) -> None:
    """No file can hold it: it is passed again, and its absence is an error that says so."""
    pair: dict[str, polyak.Schedule] = {"a": slow_half, "b": polyak.Power(sigma_rel=0.1)}
    run_on(tmp_path, noise(100, 3), range(1, 101), every=10, averages=pair)
    with pytest.raises(polyak.AveragingError, match="opaque"):
        polyak.reconstruct(tmp_path, power(0.1))
    found = polyak.reconstruct(tmp_path, power(0.1), opaque=slow_half)
    assert found.fit.error < 1e-20


def test_two_functions_are_passed_by_the_name_of_their_average(tmp_path: Path) -> None:
    """One function for both would give a profile that never was."""

    def other(*, now: float, elapsed: float) -> float:
        return math.pow(1.0 - elapsed / now, 5.0)

    trajectory = noise(200, 10)
    run_on(tmp_path, trajectory, range(1, 201), every=10, averages={"a": slow_half, "b": other})
    functions = {"a": slow_half, "b": other}
    found = polyak.reconstruct(tmp_path, power(0.1), opaque=functions, max_error=1.0)
    np.testing.assert_allclose(
        rebuilt(found), found.profile.weights @ trajectory, rtol=0, atol=1e-12
    )
    for wrong in (None, slow_half, {"a": slow_half}):
        with pytest.raises(polyak.ArgumentError, match="opaque"):
            polyak.reconstruct(tmp_path, power(0.1), opaque=wrong, max_error=1.0)


@pytest.mark.parametrize("origin", [0, 700, -3])
@pytest.mark.parametrize("unit", [1, 32, 0.25])
def test_clocks_of_any_unit_and_origin(origin: float, unit: float, tmp_path: Path) -> None:
    """Samples, epochs, a start that is not 0: the same weights in every unit."""
    trajectory = noise(400, 30)
    times = [origin + unit * i for i in range(1, 401)]
    run_on(tmp_path, trajectory, times, every=20 * unit, origin=origin)
    found = polyak.reconstruct(tmp_path, polyak.Exponential(half_life=60 * unit))
    wanted = online(polyak.Exponential(half_life=60), trajectory, range(1, 401))
    assert distance(rebuilt(found), wanted) ** 2 < 2.0 * found.fit.error + 1e-12
    assert found.fit.at == times[-1]
    middle = polyak.reconstruct(tmp_path, power(0.1), at=times[199])
    np.testing.assert_allclose(
        rebuilt(middle), online(power(0.1), trajectory[:200], range(1, 201)), rtol=0, atol=1e-12
    )


def test_a_clock_that_ticks_as_it_likes(tmp_path: Path) -> None:
    """Batches of different sizes: what is rebuilt is what was weighed, update by update."""
    steps = np.random.default_rng(1).integers(1, 60, 500)
    times = np.cumsum(steps).tolist()
    trajectory = noise(500, 200)
    run_on(tmp_path, trajectory, times, every=400)
    found = polyak.reconstruct(tmp_path, power(0.07))
    count = times.index(found.fit.at) + 1
    summed = found.profile.weights @ trajectory[:count]
    np.testing.assert_allclose(rebuilt(found), summed, rtol=0, atol=1e-12)
    wanted = online(power(0.07), trajectory[:count], times[:count])
    assert distance(rebuilt(found), wanted) < 0.05


# ── what is refused ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run_on(tmp_path / "run", noise(320, 6), range(1, 321), every=10)
    return tmp_path / "run"


@pytest.mark.parametrize("at", [5, 9.5, 11, 0, 321, -1, 1e9, math.nan, math.inf, "320", True])
def test_a_moment_without_a_snapshot_is_refused(at: Any, folder: Path) -> None:
    with pytest.raises(polyak.ArgumentError, match="at must be"):
        polyak.reconstruct(folder, power(0.1), at=at)


def test_the_nearest_moment_is_named_in_full(tmp_path: Path) -> None:
    """Ten million steps in: a message that rounds to six digits helps nobody."""
    origin = 10_000_000
    run_on(tmp_path, noise(40, 2), range(origin + 1, origin + 41), every=10, origin=origin)
    with pytest.raises(polyak.ArgumentError, match="10000020"):
        polyak.reconstruct(tmp_path, power(0.1), at=origin + 21)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 0.3, 1.0, math.nan])
def test_a_width_that_no_power_function_has_is_refused(sigma_rel: float, folder: Path) -> None:
    with pytest.raises(polyak.ArgumentError, match="sigma_rel must be"):
        polyak.reconstruct(folder, polyak.Power(sigma_rel=sigma_rel))


@pytest.mark.parametrize(
    "target", [polyak.Power(sigma_rel=0.003), polyak.Exponential(half_life=2), Tail(15)]
)
def test_a_length_that_is_not_resolved_is_refused_unless_told_otherwise(
    target: Any, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(polyak.ArgumentError, match=r"nearest length that they serve is \w+\("):
        polyak.reconstruct(folder, target, out=out)
    assert not out.exists()
    found = polyak.reconstruct(folder, target, max_error=math.inf, out=out)
    assert found.fit.error > 1e-2
    assert out.exists()


@pytest.mark.parametrize("target", ["0.1", None, polyak.Power, 0.1, Tail(10_000)])
def test_what_is_no_schedule_is_refused(target: Any, folder: Path) -> None:
    with pytest.raises(polyak.ArgumentError):
        polyak.reconstruct(folder, target)


def spoil_foreign(folder: Path) -> None:
    save_file({"w": torch.zeros(6)}, folder / "extra-000000000100.safetensors")


def spoil_truncated(folder: Path) -> None:
    path = folder / "long-000000000100.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def spoil_header(folder: Path) -> None:
    path = folder / "long-000000000100.safetensors"
    path.write_bytes(path.read_bytes()[:40])


def spoil_text(folder: Path) -> None:
    (folder / "long-000000000100.safetensors").write_text("nothing")


def spoil_empty(folder: Path) -> None:
    (folder / "long-000000000100.safetensors").write_bytes(b"")


def rewritten(path: Path, change: Callable[[dict[str, Any]], object], **tensors: Tensor) -> None:
    """The same file, with another account of itself."""
    with safe_open(str(path), framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["polyak"])
    change(about)
    save_file({**kept, **tensors}, path, {"polyak": json.dumps(about)})


def spoiler(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        rewritten(folder / "short-000000000320.safetensors", change)

    return spoil


def spoil_mixed(folder: Path) -> None:
    """A file of a run with an update missing."""
    other = folder.parent / "other"
    run_on(other, noise(319, 6), [*range(1, 51), *range(52, 321)], every=10)
    shutil.copy(other / "long-000000000200.safetensors", folder)


def spoil_schedule(folder: Path) -> None:
    other = folder.parent / "other"
    three = {**PAIR, "long": polyak.Power(sigma_rel=0.11)}
    run_on(other, noise(320, 6), range(1, 321), every=10, averages=three)
    shutil.copy(other / "long-000000000200.safetensors", folder)


def spoil_shape(folder: Path) -> None:
    other = folder.parent / "other"
    run_on(other, noise(320, 7), range(1, 321), every=10)
    shutil.copy(other / "long-000000000200.safetensors", folder)


def spoil_origin(folder: Path) -> None:
    other = folder.parent / "other"
    run_on(other, noise(320, 6), [i + 0.5 for i in range(1, 321)], every=10, origin=0.5)
    shutil.copy(other / "long-200.5.safetensors", folder / "long-000000000200.safetensors")


SPOILED: dict[str, Callable[[Path], None]] = {
    "foreign": spoil_foreign,
    "truncated": spoil_truncated,
    "header": spoil_header,
    "text": spoil_text,
    "empty": spoil_empty,
    "other history": spoil_mixed,
    "other schedule": spoil_schedule,
    "other shape": spoil_shape,
    "other origin": spoil_origin,
    "format": spoiler(lambda about: about.update(format=2)),
    "kind": spoiler(lambda about: about.update(kind="averaged weights")),
    "clock": spoiler(lambda about: about.update(now=310)),
    "clock ahead": spoiler(lambda about: about.update(now=325)),
    "updates": spoiler(lambda about: about.update(updates=310)),
    "no history": spoiler(lambda about: about.pop("history")),
    "history": spoiler(lambda about: about.update(history=[[1, 320, 3]])),
    "history of text": spoiler(lambda about: about.update(history="abc")),
    "schedule": spoiler(lambda about: about.update(schedule={"name": "Power"})),
    "schedule of another": spoiler(lambda about: about.update(schedule={"name": "os.system"})),
    "storage": spoiler(lambda about: about.update(storage="float4")),
    "infinite": spoiler(lambda about: about.update(now=math.inf)),
    "live of numbers": spoiler(lambda about: about.update(live=[[]])),
    "dtypes": spoiler(lambda about: about.update(dtypes={"w": 5})),
    "ties": spoiler(lambda about: about.update(ties={"v": ["w"]})),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_folder_with_a_wrong_file_is_refused_by_its_name(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    """One error of ours that names the file; nothing is written."""
    SPOILED[kind](folder)
    before, out = listing(folder), tmp_path / "out.safetensors"
    with pytest.raises(
        polyak.AveragingError, match=r"extra|long-0{9}[12]00|short-0{9}320"
    ) as error:
        polyak.reconstruct(folder, power(0.15), out=out)
    assert "\n" not in str(error.value)
    assert not out.exists()
    assert listing(folder) == before


def test_other_weights_in_the_folder_of_a_run_are_passed_over(folder: Path) -> None:
    """A result that was written beside its snapshots spoils neither another one nor the run."""
    wanted = polyak.reconstruct(folder, power(0.15), out=folder / "averaged.safetensors")
    save_file({"w": torch.zeros(6)}, folder / "step-9000.safetensors")
    (folder / "empty.safetensors").touch()
    (folder / "checkpoint.dcp").mkdir()
    (folder / "link.safetensors").symlink_to("nowhere")
    for name in ("model-v1-1.5", "ckpt-20261122134500"):  # as snapshots are called
        save_file({"w": torch.zeros(6)}, folder / f"{name}.safetensors")
    polyak.save(polyak.Average({"w": torch.zeros(6)}), folder / "last-2.5.safetensors")
    np.testing.assert_array_equal(rebuilt(polyak.reconstruct(folder, power(0.15))), rebuilt(wanted))
    only = folder / "others"
    only.mkdir()
    (folder / "averaged.safetensors").rename(only / "averaged.safetensors")
    with pytest.raises(polyak.ArgumentError, match=r"must hold snapshots.*for polyak\.merge"):
        polyak.reconstruct(only, power(0.15))
    live = {"w": torch.zeros(6)}
    assert polyak.Snapshots(polyak.Average(live), only, every=1).moments == []


def test_what_a_reconstruction_remembers_goes_up_to_its_moment(tmp_path: Path) -> None:
    """Also where the stored average stood still, and an older file with the same bits is used."""
    law = polyak.Cosine(0.9, total=40)
    averages = polyak.Averages({"w": torch.zeros(1)}, {"still": law})
    with polyak.Snapshots(averages, tmp_path, every=10, dtype=torch.float32):
        for _ in range(100):
            averages.update()
    found = polyak.reconstruct(tmp_path, law)
    assert found.fit.at == found.profile.end == 100
    told = averages["still"].report().mean_age
    assert found.profile.mean_age == pytest.approx(told) == pytest.approx(85.558, abs=1e-3)


def test_a_file_of_another_moment_by_name_is_what_its_header_says(folder: Path) -> None:
    """Renamed files are no problem: the time is inside."""
    wanted = rebuilt(polyak.reconstruct(folder, power(0.15)))
    for index, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"{(index * 7) % 64:03d}.safetensors")
    np.testing.assert_allclose(rebuilt(polyak.reconstruct(folder, power(0.15))), wanted, atol=1e-13)


def test_a_file_that_is_there_twice_counts_once(folder: Path) -> None:
    """A copy beside it changes nothing, neither the weights nor the error."""
    wanted = polyak.reconstruct(folder, power(0.15))
    for path in list(folder.glob("*200*")):
        shutil.copy(path, folder / f"copy-of-{path.name}")
    found = polyak.reconstruct(folder, power(0.15))
    np.testing.assert_allclose(rebuilt(found), rebuilt(wanted), atol=1e-9)
    assert found.fit.error == pytest.approx(wanted.fit.error, rel=1e-3)


def test_a_moment_that_is_missing_costs_accuracy_and_says_so(folder: Path) -> None:
    """One of two averages, or both of a moment: what is left is used, the error is the true one."""
    trajectory = noise(320, 6)
    before = polyak.reconstruct(folder, power(0.07)).fit.error
    (folder / "short-000000000300.safetensors").unlink()
    one = polyak.reconstruct(folder, power(0.07))
    for path in folder.glob("*0300.safetensors"):
        path.unlink()
    both = polyak.reconstruct(folder, power(0.07), max_error=1.0)
    assert before < one.fit.error < both.fit.error
    np.testing.assert_allclose(rebuilt(both), both.profile.weights @ trajectory, atol=1e-11)
    with pytest.raises(polyak.ArgumentError, match="at must be"):
        polyak.reconstruct(folder, power(0.07), at=300)


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "only text"])
def test_what_is_no_folder_of_snapshots_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    if kind == "file":
        path.write_text("")
    elif kind != "missing":
        path.mkdir()
        if kind == "only text":
            (path / "log.txt").write_text("")
    with pytest.raises(polyak.ArgumentError, match="directory must"):
        polyak.reconstruct(path, power(0.1))


@pytest.mark.parametrize("harm", ["gone", "truncated", "nan", "other"])
def test_a_file_that_goes_wrong_after_the_fit_is_an_error_and_nothing_is_written(
    harm: str, folder: Path, tmp_path: Path
) -> None:
    """Training in another process thins the folder, a disk fails: the old result stays."""
    found = polyak.reconstruct(folder, power(0.15))
    out = tmp_path / "out.safetensors"
    found.save(out)
    before = out.read_bytes()
    path = found.files[found.fit.used[-1]]
    if harm == "gone":
        path.unlink()
    elif harm == "truncated":
        path.write_bytes(path.read_bytes()[:-4])
    elif harm == "nan":
        rewritten(path, lambda about: None, w=torch.full((6,), math.nan, dtype=torch.float64))
    else:
        rewritten(path, lambda about: None, w=torch.zeros(7, dtype=torch.float64))
    for call in (found.weights, lambda: found.save(out)):
        with pytest.raises((polyak.AveragingError, FileNotFoundError), match=path.name):
            call()
    assert out.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out.safetensors"}


def test_law_and_steps_are_for_lists_only(folder: Path) -> None:
    with pytest.raises(polyak.ArgumentError, match="law and steps must be left out"):
        polyak.reconstruct(folder, power(0.1), law=power(0.1))
    with pytest.raises(polyak.ArgumentError, match="law must be"):
        polyak.reconstruct(sorted(folder.iterdir()), power(0.1))


@pytest.mark.parametrize("max_error", [0, -1, math.nan])
def test_a_bound_that_nothing_can_meet_is_refused(max_error: float, folder: Path) -> None:
    with pytest.raises(polyak.ArgumentError, match="max_error must be"):
        polyak.reconstruct(folder, power(0.1), max_error=max_error)


# ── what comes out ───────────────────────────────────────────────────────────────────────────────


def test_only_headers_are_read_before_the_weights_are_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then only of the files that take part."""
    opened: list[str] = []

    def noted(path: Path, **more: Any) -> Any:
        opened.append(Path(path).name)
        return open_checkpoint(path, **more)

    monkeypatch.setattr(_posthoc, "open_checkpoint", noted)
    found = polyak.reconstruct(folder, PAIR["short"], at=200)
    assert opened == []
    found.weights()
    assert opened == ["short-000000000200.safetensors"]


@pytest.mark.parametrize("animal", ZOO, ids=lambda animal: animal.name)
def test_weights_load_strictly_and_are_the_average(animal: Animal, tmp_path: Path) -> None:
    """A stored target, so its file: names, dtypes, shapes and values of `average.weights()`."""
    model, generator = animal.build(), torch.Generator().manual_seed(0)
    averages = polyak.Averages(model, PAIR)
    with polyak.Snapshots(averages, tmp_path, every=2, dtype=torch.float64):
        for _ in range(8):
            train_step(model, animal.inputs(), generator)
            averages.update()
    found = polyak.reconstruct(tmp_path, PAIR["long"])
    ours, theirs = found.weights(), averages["long"].weights()
    frozen = set(found.frozen)
    extra = {name for name, value in theirs.items() if not isinstance(value, Tensor)}
    assert frozen == animal.live - set(dict(model.named_buffers(remove_duplicate=False)))
    assert set(ours) == set(theirs) - frozen - extra
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert value.shape == theirs[name].shape, name
        kept = theirs[name]
        if kept.dtype == torch.complex128:  # which the format of the files does not have
            kept = kept.to(torch.complex64).to(kept.dtype)
        assert torch.equal(value, kept), name
    if not frozen and not extra and animal.name != "expanded":  # torch cannot copy into that
        animal.build().load_state_dict(ours, strict=True)

    path = tmp_path / "out.safetensors"
    if any(value.dtype == torch.complex128 for value in ours.values()):
        with pytest.raises(polyak.ArgumentError, match="complex128"):  # as polyak.save does
            found.save(path)
        assert not path.exists()
        return
    found.save(path)
    saved = polyak.load_weights(path)
    assert set(saved) == set(ours)
    for name, value in ours.items():
        assert torch.equal(saved[name], value), name
        assert saved[name].dtype == value.dtype, name
    if not frozen and not extra:
        polyak.load_weights(path, animal.build())


def test_what_is_saved_is_what_weights_gives(folder: Path, tmp_path: Path) -> None:
    """Bit for bit in every dtype, in one file or in shards, and it says where it comes from."""
    found = polyak.reconstruct(folder, power(0.15), out=tmp_path / "direct.safetensors")
    for dtype in (None, torch.float32, torch.float16, torch.bfloat16):
        found.save(tmp_path / "out.safetensors", dtype=dtype)
        saved = polyak.load_weights(tmp_path / "out.safetensors")
        weights = found.weights(dtype=dtype)
        assert list(saved) == list(weights) == ["w"]
        assert torch.equal(saved["w"], weights["w"])
        assert saved["w"].dtype == weights["w"].dtype == (dtype or torch.float64)
    found.save(tmp_path / "shards", max_shard_size=1_000)
    assert torch.equal(polyak.load_weights(tmp_path / "shards")["w"], found.weights()["w"])
    direct = polyak.load_weights(tmp_path / "direct.safetensors")
    assert torch.equal(direct["w"], found.weights()["w"])
    with safe_open(str(tmp_path / "direct.safetensors"), framework="pt") as file:
        about = json.loads(file.metadata()["polyak"])
    assert about["rule"] == "Power(sigma_rel=0.15)"
    assert about["now"] == 320
    assert about["profile_error"] == found.fit.error < 1e-2
    assert sum(about["snapshots"].values()) == pytest.approx(1.0)
    assert set(about["snapshots"]) <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, "float16"])
def test_a_dtype_that_is_none_for_weights_is_refused(
    dtype: Any, folder: Path, tmp_path: Path
) -> None:
    found = polyak.reconstruct(folder, power(0.15))
    with pytest.raises(polyak.ArgumentError, match="dtype must be"):
        found.weights(dtype=dtype)
    with pytest.raises(polyak.ArgumentError, match="dtype must be"):
        found.save(tmp_path / "out.safetensors", dtype=dtype)


def test_a_value_that_the_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    run_on(tmp_path / "run", np.full((40, 3), 70_000.0), range(1, 41), every=4)
    found = polyak.reconstruct(tmp_path / "run", power(0.15))
    np.testing.assert_allclose(rebuilt(found), 70_000.0, rtol=1e-12)
    with pytest.raises(polyak.ArgumentError, match="float16"):
        found.weights(dtype=torch.float16)


def test_progress_is_told_and_the_result_is_its_own(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    found = polyak.reconstruct(folder, power(0.15))
    first = found.weights(progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (6, 6)
    first["w"].zero_()
    assert float(found.weights()["w"].abs().max()) > 0.0


def test_frozen_parameters_are_not_in_files_and_are_named(tmp_path: Path) -> None:
    """LoRA: megabytes, not the base model; the result loads into the model that has the rest."""
    model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 2))
    averages = polyak.Averages(model, PAIR)
    with polyak.Snapshots(averages, tmp_path, every=2):
        for _ in range(8):
            with torch.no_grad():
                for parameter in model[1].parameters():
                    parameter.normal_()
            averages.update()
    found = polyak.reconstruct(tmp_path, PAIR["short"])
    assert set(found.frozen) == {"0.weight", "0.bias"}
    assert set(found.weights()) == {"1.weight", "1.bias"}
    missing, unexpected = model.load_state_dict(found.weights(), strict=False)
    assert set(missing) == set(found.frozen)
    assert unexpected == []


def test_running_statistics_of_a_long_reach_are_no_less_than_zero(tmp_path: Path) -> None:
    """Coefficients have both signs, but a variance rebuilt from half precision is one."""
    model = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16))
    averages = polyak.Averages(model, PAIR)
    generator = torch.Generator().manual_seed(0)
    with polyak.Snapshots(averages, tmp_path, every=8):
        for step in range(512):
            scale = 1e-3 if step > 200 else 10.0
            model(scale * torch.randn(16, 3, generator=generator))
            averages.update()
    for sigma in (0.03, 0.07, 0.15, 0.2):
        weights = polyak.reconstruct(tmp_path, power(sigma)).weights()
        assert float(weights["1.running_var"].min()) >= 0.0


# ── averages that others wrote ───────────────────────────────────────────────────────────────────


def foreign(
    folder: Path, law: Callable[[int], float], trajectory: FloatArray, every: int
) -> list[Path]:
    """Files of somebody's average: its recurrence in float64, one step at a time."""
    folder.mkdir()
    average = trajectory[0].copy()  # most copy the weights at construction
    paths = []
    for step, live in enumerate(trajectory[1:], start=1):
        decay = law(step)
        average = decay * average + (1.0 - decay) * live
        if step % every == 0:
            paths.append(folder / f"step_{step}.safetensors")
            save_file({"w": torch.from_numpy(average)}, paths[-1])
    return paths


@pytest.mark.parametrize(
    ("law", "recurrence"),
    [
        # torchtitan: a half-life that is a share of the time so far, decay 0.5 ** (1 / half-life);
        # by the identity of SCIENCE 3.3 a power function with gamma = ln 2 / f - 1.
        (
            polyak.HalfLifeRamp(0.05),
            lambda n: (1.0 - 1.0 / n) ** (math.log(2.0) / 0.05),
        ),
        # TensorFlow, num_updates: min(d, (1 + n) / (10 + n)).
        (polyak.CountRamp(0.99), lambda n: min(0.99, (1 + n) / (10 + n))),
        (polyak.CountRamp(0.9999), lambda n: min(0.9999, (1 + n) / (10 + n))),
        # crowsonkb, ema-pytorch: the first update copies.
        (polyak.InverseGamma(power=0.8, max_decay=0.999), lambda n: min(0.999, 1 - n**-0.8)),
        (polyak.Exponential(decay=0.99, debias=False), lambda n: 0.99),
    ],
    ids=["torchtitan", "tensorflow", "tensorflow uncapped", "inverse gamma", "constant"],
)
def test_averages_of_others_are_rebuilt_by_their_law(
    law: polyak.Schedule, recurrence: Callable[[int], float], tmp_path: Path
) -> None:
    """What is reported as the profile is what the sum of their files weighs, to rounding."""
    trajectory = noise(801, 40)
    paths = foreign(tmp_path / "theirs", recurrence, trajectory, every=20)
    target = polyak.Exponential(half_life=200)
    found = polyak.reconstruct(
        paths[::-1], target, law=law, max_error=math.inf, out=tmp_path / "out.safetensors"
    )
    weights = np.append(found.profile.initial, found.profile.weights)
    np.testing.assert_allclose(rebuilt(found), weights @ trajectory, rtol=0, atol=1e-11)
    steps = [int(path.stem.split("_")[1]) for path in found.files]
    assert steps == sorted(steps)
    stored = polyak.reconstruct(paths, law, law=law, at=400)
    assert [stored.files[i].stem for i in stored.fit.used] == ["step_400"]
    saved = polyak.load_weights(tmp_path / "out.safetensors")
    assert torch.equal(saved["w"], found.weights()["w"])


def test_the_half_life_that_a_trainer_computes_step_by_step_is_the_ramp(tmp_path: Path) -> None:
    """decay = 0.5 ** (1 / (f n)) instead of its integral: the profile is within 1 % of that."""
    trajectory = noise(2_001, 2_000)
    paths = foreign(tmp_path / "theirs", lambda n: 0.5 ** (1 / (0.05 * n)), trajectory, every=50)
    law = polyak.HalfLifeRamp(0.05)
    found = polyak.reconstruct(paths, polyak.Power(sigma_rel=0.08), law=law, max_error=math.inf)
    weights = found.profile.weights @ trajectory[1:]
    assert distance(rebuilt(found), weights) < 0.05


def test_steps_of_others_may_be_given_and_are_checked(tmp_path: Path) -> None:
    trajectory = noise(101, 4)
    law = polyak.CountRamp(0.99)
    paths = foreign(tmp_path / "a", lambda n: min(0.99, (1 + n) / (10 + n)), trajectory, every=10)
    named = [
        path.rename(path.with_name(f"{'abcdefghij'[i]}.safetensors"))
        for i, path in enumerate(paths)
    ]
    steps = list(range(10, 101, 10))
    target = polyak.Uniform()
    found = polyak.reconstruct(named, target, law=law, steps=steps, max_error=math.inf)
    weights = np.append(found.profile.initial, found.profile.weights)
    np.testing.assert_allclose(rebuilt(found), weights @ trajectory, rtol=0, atol=1e-11)
    for wrong in ([1.5, *steps[1:]], steps[1:], [-10, *steps[1:]], [math.nan, *steps[1:]], None):
        with pytest.raises(polyak.AveragingError, match=r"steps?"):
            polyak.reconstruct(named, target, law=law, steps=wrong, max_error=math.inf)
    with pytest.raises(polyak.AveragingError):
        polyak.reconstruct([], target, law=law)
    with pytest.raises((polyak.AveragingError, FileNotFoundError), match="gone"):
        polyak.reconstruct([*named, tmp_path / "gone"], target, law=law, steps=[*steps, 110])


def test_files_of_others_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    law = polyak.CountRamp(0.99)
    save_file({"w": torch.zeros(3)}, tmp_path / "a_10.safetensors")
    save_file({"w": torch.zeros(4)}, tmp_path / "a_20.safetensors")
    save_file({"v": torch.zeros(3)}, tmp_path / "a_30.safetensors")
    for names in (("a_10", "a_20"), ("a_10", "a_30")):
        paths = [tmp_path / f"{name}.safetensors" for name in names]
        with pytest.raises(polyak.AveragingError, match="a_"):
            polyak.reconstruct(paths, polyak.Uniform(), law=law, max_error=math.inf).weights()


def test_integers_of_others_are_those_of_the_newest(tmp_path: Path) -> None:
    law = polyak.CountRamp(0.99)
    for step in (30, 10, 20):
        tensors = {"w": torch.full((3,), float(step)), "seen": torch.tensor(step)}
        save_file(tensors, tmp_path / f"a_{step}.safetensors")
    paths = sorted(tmp_path.iterdir(), reverse=True)
    found = polyak.reconstruct(paths, polyak.Uniform(), law=law, max_error=math.inf, at=20)
    assert found.weights()["seen"].item() == 20


def test_averages_of_others_in_half_precision_are_told_by_their_dtype(tmp_path: Path) -> None:
    """The ridge and `noise` come from what the files hold."""
    law = polyak.CountRamp(0.9999)
    noises = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        for step in range(10, 201, 10):
            save_file({"w": torch.ones(3, dtype=dtype)}, folder / f"{step}.safetensors")
        found = polyak.reconstruct(
            sorted(folder.iterdir()), polyak.Power(gamma=6), law=law, max_error=math.inf
        )
        noises.append(found.fit.noise)
        assert found.weights()["w"].dtype == dtype
    assert noises[0] > 2 * noises[1] > 100 * noises[2] > 0.0
