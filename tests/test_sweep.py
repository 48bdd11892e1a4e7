"""Sweep: a score for each length, from one run; what was scored stays, what was lent comes back."""

import json
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak
from polyak._fit import plan
from polyak._posthoc import Run, open_run
from polyak._sweep import servable
from polyak.cli import main
from zoo import bits

PAIR = {"short": polyak.Power(sigma_rel=0.05), "long": polyak.Power(sigma_rel=0.10)}
SIGMAS = (0.03, 0.05, 0.08, 0.10, 0.14, 0.2)
LENGTHS = [polyak.Power(sigma_rel=s) for s in SIGMAS]


def ramp(
    folder: Path,
    *,
    steps: int = 640,
    origin: int = 0,
    averages: Mapping[str, polyak.Schedule] = PAIR,
) -> Path:
    """w(t) = t - origin, so an average is its mean time: steps minus its mean age."""
    live = {"w": torch.zeros(1, dtype=torch.float64)}
    kept = polyak.Averages(live, averages, now=origin)
    with polyak.Snapshots(kept, folder, every=20, dtype=torch.float64):
        for step in range(1, steps + 1):
            live["w"].fill_(step)
            kept.update()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return ramp(tmp_path / "run")


class Score:
    """Squared distance of the mean time from the best one, and how often it was asked."""

    def __init__(self, best: float, sign: float = 1.0) -> None:
        self.best, self.sign, self.calls = best, sign, 0

    def __call__(self, weights: dict[str, Tensor]) -> float:
        self.calls += 1
        return self.sign * (weights["w"].item() - self.best) ** 2


# ── the curve ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_the_best_length_is_the_one_with_the_best_score(
    folder: Path, higher_is_better: bool
) -> None:
    """Mean times are known: that of gamma is T - T / (gamma + 2), near enough to half a step."""
    ages = [640 / (length.exponent + 1) for length in LENGTHS]
    score = Score(640 - ages[3], -1.0 if higher_is_better else 1.0)
    found = polyak.sweep(folder, score, higher_is_better=higher_is_better, lengths=LENGTHS)
    assert score.calls == len(LENGTHS)
    assert found.best.target == LENGTHS[3]
    assert found.at == 640
    assert [point.target for point in found.points] == LENGTHS  # from short to long
    for point, age in zip(found.points, ages, strict=True):
        # The mean of the ramp is 640 less the mean age, each held for a step: half a step apart.
        assert point.mean_age == pytest.approx(age - 0.5, abs=0.6)
        assert point.share == pytest.approx(point.mean_age / 640)
        mean = 640 - point.mean_age
        assert point.score == pytest.approx(score.sign * (mean - score.best) ** 2, abs=1e-6)


def test_points_are_from_short_to_long_whatever_the_order_asked_for(folder: Path) -> None:
    asked: list[polyak.Schedule] = [
        LENGTHS[4],
        polyak.Exponential(half_life=60),
        LENGTHS[0],
        polyak.Uniform(),
    ]
    found = polyak.sweep(
        folder, Score(0), higher_is_better=False, lengths=asked, max_error=math.inf
    )
    ages = [point.mean_age for point in found.points]
    assert ages == sorted(ages)
    assert {repr(point.target) for point in found.points} == {repr(target) for target in asked}


def test_the_shorter_one_of_equals_is_the_best(folder: Path) -> None:
    for higher_is_better in (False, True):
        found = polyak.sweep(
            folder, lambda weights: 1.0, higher_is_better=higher_is_better, lengths=LENGTHS
        )
        assert found.best == found.points[0]
        assert found.plateau == (found.points[0], found.points[-1])


@pytest.mark.parametrize("higher_is_better", [False, True])
@pytest.mark.parametrize(
    ("scores", "first", "last"),
    [
        ([10, 10, 1e6, 0, 0.5, 10], 3, 4),  # the median is 10, 5 % of that 0.5
        ([10, 10, 1e6, 0, 0.51, 10], 3, 3),
        ([10, 0.1, 10, 0, 10, 0.1], 3, 3),  # a plateau has no gap
        ([0, 0.3, 10, 10, 10, 1e9], 0, 1),  # one absurd length does not matter
        ([1e9, 10, 10, 10, 0.3, 0], 4, 5),
        ([10, 0, 10, 0, 10, 10], 1, 1),
    ],
)
def test_the_plateau_is_what_is_nearly_as_good_around_the_best(
    scores: list[float], first: int, last: int, higher_is_better: bool, folder: Path
) -> None:
    given = iter(scores)
    sign = -1.0 if higher_is_better else 1.0
    found = polyak.sweep(
        folder,
        lambda weights: sign * next(given),
        higher_is_better=higher_is_better,
        lengths=LENGTHS,
    )
    assert found.plateau == (found.points[first], found.points[last])
    table = str(found).splitlines()[1:]
    marks = "".join(line[0] for line in table)
    wanted = ["-" if first <= i <= last else " " for i in range(6)]
    wanted[min(range(6), key=scores.__getitem__)] = "*"
    assert marks == "".join(wanted)


def test_lengths_come_by_themselves(folder: Path) -> None:
    """A dozen from the shortest that is resolved on, each of them within the bound."""
    found = polyak.sweep(folder, Score(600), higher_is_better=False)
    assert len(found.points) == 12
    assert all(point.error <= 1e-2 for point in found.points)
    report = open_run(folder).report()
    widths = [point.target.sigma_rel for point in found.points]  # type: ignore[union-attr]
    assert widths[0] == pytest.approx(report.shortest, rel=1e-2)
    assert widths[-1] == pytest.approx(report.longest, rel=1e-2)


def test_what_is_proposed_is_never_refused() -> None:
    """Whatever the number of snapshots: rounded widths stay on the side that is resolved."""
    refused = []
    for count in range(8, 100, 7):
        overlaps = plan(
            list(PAIR.values()), times=[64 * i for i in range(1, count + 1)], interval=16
        )
        run = Run(tuple(Path(str(i)) for i in range(2 * count)), overlaps, PAIR, {"frozen": []})
        for target in servable(run):
            try:
                run.reconstruct(target)
            except polyak.ArgumentError as error:
                refused.append((count, target, str(error)))
    assert not refused


def test_an_earlier_moment_can_be_swept(folder: Path) -> None:
    found = polyak.sweep(folder, Score(0), higher_is_better=False, lengths=LENGTHS, at=320)
    assert found.at == 320
    for point in found.points:
        assert point.score == pytest.approx((320 - point.mean_age) ** 2, rel=1e-6)
        assert point.share == pytest.approx(point.mean_age / 320)


def test_shares_count_from_the_start_of_the_run(tmp_path: Path) -> None:
    folder = ramp(tmp_path / "run", origin=100_000)
    found = polyak.sweep(folder, Score(0), higher_is_better=False, lengths=LENGTHS)
    assert found.at == 100_640
    for point in found.points:
        assert point.share == pytest.approx(point.mean_age / 640)


# ── the cache ────────────────────────────────────────────────────────────────────────────────────


def test_a_sweep_that_was_stopped_goes_on(folder: Path, tmp_path: Path) -> None:
    """Scores that are there are not asked for again, and the curve is the same."""
    cache = tmp_path / "scores.json"
    whole = polyak.sweep(folder, Score(600), higher_is_better=False, lengths=LENGTHS)

    class Stopped(Score):
        def __call__(self, weights: dict[str, Tensor]) -> float:
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().__call__(weights)

    with pytest.raises(KeyboardInterrupt):
        polyak.sweep(folder, Stopped(600), higher_is_better=False, lengths=LENGTHS, cache=cache)
    score = Score(600)
    found = polyak.sweep(folder, score, higher_is_better=False, lengths=LENGTHS, cache=cache)
    assert score.calls == 4
    assert found == whole
    score = Score(600)
    more = [*LENGTHS, polyak.Power(sigma_rel=0.12)]
    found = polyak.sweep(folder, score, higher_is_better=False, lengths=more, cache=cache)
    assert score.calls == 1
    assert len(found.points) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "scores.json"]


def scored_again(folder: Path, cache: Path, **changed: Any) -> int:
    score = Score(600)
    options = {"lengths": LENGTHS, "higher_is_better": False, "max_error": math.inf, **changed}
    polyak.sweep(folder, score, cache=cache, **options)
    return score.calls


def test_another_folder_or_moment_is_scored_anew(folder: Path, tmp_path: Path) -> None:
    """One cache for two runs mixes nothing, nor does a folder that has grown."""
    cache = tmp_path / "scores.json"
    assert scored_again(folder, cache) == 6
    assert scored_again(folder, cache, at=320) == 6
    other = ramp(tmp_path / "other", steps=660)
    assert scored_again(other, cache) == 6
    assert scored_again(folder, cache) == 0
    shutil.copy(folder / "short-000000000640.safetensors", folder / "again.safetensors")
    assert scored_again(folder, cache) == 6


def test_moments_ten_million_steps_in_have_scores_of_their_own(tmp_path: Path) -> None:
    """A key that shows six digits of the time would hand out the scores of another moment."""
    folder = ramp(tmp_path / "run", origin=10_000_000, steps=320)
    cache = tmp_path / "scores.json"
    assert scored_again(folder, cache, at=10_000_300) == 6
    assert scored_again(folder, cache, at=10_000_320) == 6


def test_functions_that_look_the_same_have_scores_of_their_own(
    folder: Path, tmp_path: Path
) -> None:
    """A function is printed with an address, which another one may have tomorrow."""

    class Function:
        def __init__(self, exponent: float) -> None:
            self.exponent = exponent

        def __call__(self, *, now: float, elapsed: float) -> float:
            return math.pow(1.0 - elapsed / now, self.exponent)

        def __repr__(self) -> str:
            return "<function <lambda> at 0x7f0000000000>"

    cache = tmp_path / "scores.json"
    assert scored_again(folder, cache, lengths=[Function(8.0)]) == 1
    assert scored_again(folder, cache, lengths=[Function(12.0)]) == 1


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", '{"a": "b"}', '{"a": null}', "7", '{"a": {}}', b"\xff\xfe"]
)
def test_a_cache_that_is_none_is_refused_and_stays(
    text: str | bytes, folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "scores.json"
    content = text if isinstance(text, bytes) else text.encode()
    cache.write_bytes(content)
    score = Score(0)
    with pytest.raises(polyak.ArgumentError, match="cache must be"):
        polyak.sweep(folder, score, higher_is_better=False, lengths=LENGTHS, cache=cache)
    assert score.calls == 0
    assert cache.read_bytes() == content


def test_a_cached_score_that_is_no_number_is_not_believed(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "scores.json"
    assert scored_again(folder, cache) == 6
    scores = json.loads(cache.read_text())
    cache.write_text(json.dumps(dict.fromkeys(scores, math.nan)))
    with pytest.raises(polyak.ArgumentError, match="cache must be"):
        scored_again(folder, cache)


@pytest.mark.parametrize("kind", ["folder", "no folder"])
def test_a_cache_that_cannot_be_written_is_refused_before_anything_is_scored(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    """A score may cost an hour: it must not be lost for a typing error."""
    cache = tmp_path if kind == "folder" else tmp_path / "nowhere" / "scores.json"
    score = Score(0)
    with pytest.raises(polyak.ArgumentError):
        polyak.sweep(folder, score, higher_is_better=False, lengths=LENGTHS, cache=cache)
    assert score.calls == 0


# ── the model ────────────────────────────────────────────────────────────────────────────────────


def trained(folder: Path) -> nn.Module:
    """A small network with statistics, a frozen layer and modes of its own; snapshots of it."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 1))
    model[2].requires_grad_(False)
    averages = polyak.Averages(model, PAIR)
    with polyak.Snapshots(averages, folder, every=4, dtype=torch.float32):
        for _ in range(128):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.normal_()
            model(torch.randn(16, 3))
            averages.update()
    model.train()
    model[1].eval()
    return model


def state_of(model: nn.Module) -> tuple[dict[str, bytes], list[bool], list[int]]:
    places = [p.data_ptr() for p in model.parameters()]
    return bits(model), [part.training for part in model.modules()], places


def test_the_model_holds_each_average_in_turn_and_comes_back(tmp_path: Path) -> None:
    """Weights, buffers and modes of the model bit for bit; frozen ones as they are."""
    model = trained(tmp_path / "run")
    before = state_of(model)
    run = open_run(tmp_path / "run")
    seen: list[dict[str, Tensor]] = []

    def score(lent: nn.Module) -> float:
        assert lent is model
        assert not any(part.training for part in lent.modules())
        seen.append({name: value.clone() for name, value in lent.state_dict().items()})
        lent.train()  # an evaluation may do what it likes
        lent(torch.randn(4, 3))
        with torch.no_grad():
            for parameter in lent.parameters():
                parameter.zero_()
        return float(len(seen))

    polyak.sweep(tmp_path / "run", score, higher_is_better=False, model=model, lengths=LENGTHS)
    assert state_of(model) == before
    for length, found in zip(LENGTHS, seen, strict=True):
        wanted = run.reconstruct(length).weights()
        for name, value in wanted.items():
            assert torch.equal(found[name], value), name
        assert torch.equal(found["2.weight"], model.state_dict()["2.weight"])


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_the_model_comes_back_when_the_score_raises(
    error: type[BaseException], tmp_path: Path
) -> None:
    model = trained(tmp_path / "run")
    before = state_of(model)

    def score(lent: nn.Module) -> float:
        lent.requires_grad_(False)
        raise error

    grads = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error):
        polyak.sweep(tmp_path / "run", score, higher_is_better=True, model=model, lengths=LENGTHS)
    assert state_of(model) == before
    for parameter, wanted in zip(model.parameters(), grads, strict=True):
        parameter.requires_grad_(wanted)


def test_another_model_is_refused_and_untouched(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    for other in (nn.Linear(3, 1), nn.Sequential(nn.Linear(3, 5))):
        before = state_of(other)
        with pytest.raises(polyak.MatchError):
            polyak.sweep(
                tmp_path / "run", lambda m: 0.0, higher_is_better=True, model=other, lengths=LENGTHS
            )
        assert state_of(other) == before


def test_a_model_whose_weights_are_lent_is_refused(tmp_path: Path) -> None:
    model = trained(tmp_path / "run")
    average = polyak.Average(model)
    with average.applied():
        lent = state_of(model)
        with pytest.raises(polyak.OrderError):
            polyak.sweep(
                tmp_path / "run", lambda m: 0.0, higher_is_better=True, model=model, lengths=LENGTHS
            )
        assert state_of(model) == lent


# ── what is refused, and what is told ────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, None, "good", torch.tensor([1.0, 2.0]), [], 1j]
)
def test_a_score_that_is_no_finite_number_is_refused(
    value: Any, folder: Path, tmp_path: Path
) -> None:
    """By the length that gave it; the scores before it are kept, this one is not."""
    cache = tmp_path / "scores.json"
    given = iter([1.0, value])
    with pytest.raises(polyak.ArgumentError, match=r"score must return.*sigma_rel=0\.05"):
        polyak.sweep(
            folder, lambda w: next(given), higher_is_better=True, lengths=LENGTHS, cache=cache
        )
    assert list(json.loads(cache.read_text()).values()) == [1.0]


@pytest.mark.parametrize("value", [3, True, torch.tensor(2.5), torch.tensor([4.0])])
def test_numbers_of_any_kind_are_scores(value: Any, folder: Path) -> None:
    found = polyak.sweep(folder, lambda w: value, higher_is_better=True, lengths=LENGTHS[:2])
    assert [point.score for point in found.points] == [float(value)] * 2
    assert all(type(point.score) is float for point in found.points)


def test_every_length_is_checked_before_the_first_is_scored(folder: Path) -> None:
    score = Score(0)
    for lengths in ([], [LENGTHS[0], polyak.Power(sigma_rel=0.002)], [LENGTHS[0], "0.1"]):
        with pytest.raises(polyak.ArgumentError):
            polyak.sweep(folder, score, higher_is_better=False, lengths=lengths)  # type: ignore[arg-type]
    with pytest.raises(polyak.ArgumentError, match="at must be"):
        polyak.sweep(folder, score, higher_is_better=False, at=321)
    assert score.calls == 0


def test_a_folder_that_serves_nothing_says_so(tmp_path: Path) -> None:
    # The plain mean of all is 17 % of its square away from the width 0.25, and more from others.
    folder = ramp(tmp_path / "run", steps=20, averages={"mean": polyak.Uniform()})
    with pytest.raises(polyak.ArgumentError, match="1 moment"):
        polyak.sweep(folder, Score(0), higher_is_better=False)


def test_progress_is_told_before_and_after_each(folder: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    cache = tmp_path / "scores.json"

    def sweep() -> list[tuple[int, int]]:
        told.clear()
        polyak.sweep(
            folder,
            Score(0),
            higher_is_better=False,
            lengths=LENGTHS,
            cache=cache,
            progress=lambda done, total: told.append((done, total)),
        )
        return told

    assert sweep() == [(done, 6) for done in range(7)]
    assert sweep() == [(done, 6) for done in range(7)]


# ── the picture ──────────────────────────────────────────────────────────────────────────────────

MAGIC = {".png": b"\x89PNG\r\n", ".svg": b"<?xml", ".pdf": b"%PDF-"}


@pytest.fixture
def found(folder: Path) -> polyak.Sweep:
    return polyak.sweep(folder, Score(590), higher_is_better=False)


@pytest.mark.parametrize("kind", MAGIC)
def test_a_picture_is_written_in_the_format_of_its_name(
    kind: str, found: polyak.Sweep, tmp_path: Path
) -> None:
    found.plot(tmp_path / f"curve{kind}", name="validation loss")
    content = (tmp_path / f"curve{kind}").read_bytes()
    assert content.startswith(MAGIC[kind])
    assert len(content) > 2_000
    assert not list(tmp_path.glob(".*"))


def test_the_picture_says_what_it_shows(
    found: polyak.Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text of an svg can be read: the name of the score, which way is better, the best."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        found.plot(tmp_path / "curve.svg", name="validation loss")
    text = (tmp_path / "curve.svg").read_text()
    assert "validation loss (lower is better)" in text
    assert (
        f"best {found.best.score:.5g} at {found.best.share:.2%}; {found.nearly_as_good()}" in text
    )
    assert "640" in text


@pytest.mark.parametrize("name", ["curve.xyz", "nowhere/curve.png"])
def test_a_picture_that_cannot_be_written_is_refused(
    name: str, found: polyak.Sweep, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(polyak.ArgumentError, match="path must"):
        found.plot(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_matplotlib_it_says_how_to_get_it(
    found: polyak.Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install \"polyak\[study\]\""):
        found.plot(tmp_path / "curve.png")


def test_one_point_is_a_curve(folder: Path, tmp_path: Path) -> None:
    found = polyak.sweep(folder, Score(0), higher_is_better=False, lengths=LENGTHS[:1])
    assert found.best == found.points[0] == found.plateau[0] == found.plateau[1]
    found.plot(tmp_path / "curve.png")
    assert "*" in str(found)


# ── the command ──────────────────────────────────────────────────────────────────────────────────


def test_the_command_scores_each_length_once_and_anew_when_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the score command reads may change behind the same words: then --fresh."""
    log, value = tmp_path / "asked", tmp_path / "value"
    script = tmp_path / "score.py"
    script.write_text(
        "import pathlib, sys\n"
        f"with open({str(log)!r}, 'a') as log: log.write(sys.argv[1] + '\\n')\n"
        f"print('loss', pathlib.Path({str(value)!r}).read_text())\n"
    )
    words = ["sweep", str(folder), "--score", f"{sys.executable} {script} {{}}", "--sigma-rel"]
    words += ["0.1,0.15", "--lower-is-better", "--json", "--quiet"]

    def scores(*more: str) -> tuple[list[float], int]:
        log.write_text("")
        assert main([*words, *more]) == 0
        points = json.loads(capsys.readouterr().out)["points"]
        return [point["score"] for point in points], len(log.read_text().splitlines())

    value.write_text("0.5")
    assert scores() == ([0.5, 0.5], 2)
    value.write_text("0.25")
    assert scores() == ([0.5, 0.5], 0)
    assert main([*words, "--fresh", "--at", "7"]) != 0, "no moment of a snapshot"
    capsys.readouterr()
    assert scores() == ([0.5, 0.5], 0), "what is refused costs no score"
    assert scores("--fresh") == ([0.25, 0.25], 2)
    assert scores() == ([0.25, 0.25], 0)
