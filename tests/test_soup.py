"""Soups: greedy and uniform, ties, budgets, barriers; and the line between two checkpoints."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import polyak
from polyak import ArgumentError


def points(folder: Path, values: Mapping[str, Sequence[float]]) -> list[Path]:
    """Checkpoints that are points; their mean is easily told."""
    paths = []
    for name, value in values.items():
        paths.append(folder / f"{name}.safetensors")
        save_file({"w": torch.tensor(value, dtype=torch.float64)}, paths[-1])
    return paths


def names(labels: Sequence[str]) -> str:
    return "".join(label.removesuffix(".safetensors") for label in labels)


def closeness(weights: dict[str, Tensor]) -> float:
    """How near a point is to the origin."""
    return -float(weights["w"].norm())


FOUR = {"a": [1.0, 0.0], "b": [-1.0, 1.0], "c": [8.0, 8.0], "d": [1.0, -2.0]}


def test_greedy_keeps_what_helps_and_no_more(tmp_path: Path) -> None:
    """Worked out by hand: a is the best alone, b and d bring the mean nearer, c takes it away."""
    found = polyak.soup(points(tmp_path, FOUR), closeness, out=tmp_path / "soup.safetensors")
    # Alone: a 1, b sqrt 2, d sqrt 5, c 8 sqrt 2. Means: ab (0, 1/2), abd (1/3, -1/3), abdc worse.
    assert [names(tried.labels) for tried in found.tried] == [
        "a",
        "b",
        "c",
        "d",
        "ab",
        "abd",
        "abcd",
    ]
    assert [tried.kept for tried in found.tried] == [False] * 4 + [True, True, False]
    assert names(found.kept) == "abd"
    assert found.best == -1.0
    assert found.score == pytest.approx(-math.sqrt(2) / 3)
    expected = torch.tensor([1 / 3, -1 / 3], dtype=torch.float64)
    assert torch.allclose(load_file(found.merge.out)["w"], expected)
    assert [one.coefficient for one in found.merge.ingredients] == [1 / 3, 1 / 3, 0.0, 1 / 3]


def greedy_oracle(values: Mapping[str, Sequence[float]]) -> str:
    """The algorithm of Wortsman et al., on means of lists."""

    def score(kept: str) -> float:
        axes = zip(*(values[name] for name in kept), strict=True)
        return -math.hypot(*(math.fsum(axis) / len(kept) for axis in axes))

    order = sorted(values, key=lambda name: -score(name))
    kept = order[0]
    for name in order[1:]:
        if score(kept + name) >= score(kept):
            kept += name
    return "".join(sorted(kept))


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_the_algorithm_of_the_paper(seed: int, tmp_path: Path) -> None:
    """Random points, and a result that never scores below the best of them."""
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(3, generator=generator).tolist() for name in "abcdef"}
    found = polyak.soup(points(tmp_path, values), closeness, out=tmp_path / "soup.safetensors")
    assert names(found.kept) == greedy_oracle(values)
    assert found.score >= found.best
    assert closeness(load_file(found.merge.out)) == found.score


def test_a_tie_is_kept(tmp_path: Path) -> None:
    """Wortsman et al. keep a model that does not lower the score."""
    found = polyak.soup(
        points(tmp_path, {"a": [1.0], "b": [3.0], "c": [2.0]}),
        lambda weights: 0.5,
        out=tmp_path / "soup.safetensors",
    )
    assert names(found.kept) == "abc"


def test_a_loss_is_better_when_lower(tmp_path: Path) -> None:
    """The same soup as from its negative."""
    files, out = points(tmp_path, FOUR), tmp_path / "soup.safetensors"
    found = polyak.soup(files, lambda w: -closeness(w), out=out, higher_is_better=False)
    assert (names(found.kept), found.best) == ("abd", 1.0)


def test_uniform_is_the_mean_of_all_in_any_order(tmp_path: Path) -> None:
    """Order-invariant, and one score more than there are checkpoints."""
    files, out = points(tmp_path, FOUR), tmp_path / "soup.safetensors"
    results = []
    for order in (files, files[::-1]):
        found = polyak.soup(order, closeness, out=out, method="uniform", tolerance=10.0)
        assert len(found.tried) == 5
        results.append(load_file(out)["w"])
    assert torch.equal(results[0], results[1])
    assert results[0].tolist() == [2.25, 1.75]


def test_what_is_scored_is_what_is_written(tmp_path: Path) -> None:
    """In the dtype of the result, bit for bit; also by way of files."""
    files, seen = points(tmp_path, FOUR), []

    def look(weights: dict[str, Tensor]) -> float:
        seen.append(weights["w"].clone())
        return closeness({"w": weights["w"].double()})

    out = tmp_path / "soup.safetensors"
    found = polyak.soup(files, look, out=out, dtype=torch.bfloat16)
    kept = next(index for index, tried in enumerate(found.tried) if tried.labels == found.kept)
    assert seen[kept].dtype == torch.bfloat16
    assert torch.equal(seen[kept], load_file(out)["w"])

    def look_at_file(path: str) -> float:
        return look(load_file(path))

    seen.clear()
    again = polyak.soup(files, look_at_file, out=out, dtype=torch.bfloat16, score_of="file")
    assert again.tried == found.tried
    assert torch.equal(seen[kept], load_file(out)["w"])
    assert {path.name for path in tmp_path.iterdir()} == {
        "soup.safetensors",
        *(p.name for p in files),
    }


def test_tied_weights_are_scored_tied(tmp_path: Path) -> None:
    """The score gets the names that a strict load wants."""
    for index in range(2):
        weight = torch.full((2,), float(index))
        torch.save({"embed": weight, "head": weight}, tmp_path / f"{index}.pt")

    def score(weights: dict[str, Tensor]) -> float:
        assert sorted(weights) == ["embed", "head"]
        assert weights["embed"] is weights["head"]
        return weights["head"].sum().item()

    found = polyak.soup(
        [tmp_path / "0.pt", tmp_path / "1.pt"], score, out=tmp_path / "soup.safetensors"
    )
    assert (found.score, found.kept) == (2.0, ("1.pt",))


def test_a_budget_ends_the_search(tmp_path: Path) -> None:
    """So many calls and no more; the soup is what was found by then, and says so."""
    calls = []

    def score(weights: dict[str, Tensor]) -> float:
        calls.append(1)
        return closeness(weights)

    files, out = points(tmp_path, FOUR), tmp_path / "soup.safetensors"
    found = polyak.soup(files, score, out=out, budget=5)
    assert len(calls) == 5
    assert names(found.kept) == "ab"
    assert found.notes[0].startswith("the budget of 5 scores was spent before d.safetensors, c.")
    with pytest.raises(ArgumentError, match="budget must be at least 4 calls"):
        polyak.soup(files, score, out=out, budget=3)
    with pytest.raises(ArgumentError, match="budget must be at least 5 calls"):
        polyak.soup(files, score, out=out, method="uniform", budget=4)
    assert len(calls) == 5


def test_every_call_is_told(tmp_path: Path) -> None:
    """For a display, in the order of the calls."""
    told: list[polyak.Tried] = []
    files = points(tmp_path, FOUR)
    found = polyak.soup(files, closeness, out=tmp_path / "soup.safetensors", tell=told.append)
    assert tuple(told) == found.tried


def test_a_nan_score_is_the_worst(tmp_path: Path) -> None:
    """A mean that breaks the model is not kept; where nothing has a score there is no soup."""

    def broken_beyond(weights: dict[str, Tensor]) -> float:
        value = weights["w"].item()
        return value if value < 2.5 else math.nan

    files = points(tmp_path, {"a": [2.0], "b": [1.0], "c": [9.0]})
    out = tmp_path / "soup.safetensors"
    found = polyak.soup(files, broken_beyond, out=out)
    assert names(found.kept) == "a"
    out.unlink()
    with pytest.raises(ArgumentError, match="score must be a number for some checkpoint"):
        polyak.soup(files, lambda weights: math.nan, out=out)
    assert not out.exists()


def test_an_error_of_the_score_leaves_nothing(tmp_path: Path) -> None:
    """It arrives as it is; no file and no folder of candidates stays behind."""
    files = points(tmp_path, FOUR)
    before = sorted(tmp_path.iterdir())

    def fails(path: str) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        polyak.soup(files, fails, out=tmp_path / "soup.safetensors", score_of="file")
    with pytest.raises(ArgumentError, match="score must return a number, got 'good'"):
        polyak.soup(files, lambda weights: "good", out=tmp_path / "soup.safetensors")  # type: ignore[arg-type, return-value]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"method": "best"}, "method must be 'greedy' or 'uniform', got 'best'"),
        ({"score_of": "model"}, "score_of must be 'weights' or 'file', got 'model'"),
        ({"tolerance": math.nan}, "tolerance must be a share of 0 or more, got nan"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    how: dict[str, object], message: str, tmp_path: Path
) -> None:
    """Before any score is asked for."""

    def asked(weights: dict[str, Tensor]) -> float:
        raise AssertionError("the score was called")

    files, out = points(tmp_path, FOUR), tmp_path / "soup.safetensors"
    with pytest.raises(ArgumentError, match=message):
        polyak.soup(files, asked, out=out, **how)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="at least two for a soup, got 1"):
        polyak.soup(files[:1], asked, out=out)
    with pytest.raises(ArgumentError, match="out must lie in a folder that exists"):
        polyak.soup(files, asked, out=tmp_path / "nowhere" / "soup.safetensors")


# ── barriers ─────────────────────────────────────────────────────────────────────────────────────


def outside(weights: dict[str, Tensor]) -> float:
    """A score that is 1 on a ring and 0 in its middle: two points of the ring are apart."""
    return min(1.0, float(weights["w"].norm()))


def test_greedy_reports_what_is_behind_a_barrier(tmp_path: Path) -> None:
    """J10: the mean of opposite points scores below both, and is not kept."""
    files = points(tmp_path, {"a": [1.0, 0.0], "b": [-1.0, 0.0]})
    found = polyak.soup(files, outside, out=tmp_path / "soup.safetensors")
    assert names(found.kept) == "a"
    assert "b.safetensors is behind a barrier: with it the mean scores 0" in found.notes[0]
    assert "not trained from one start" in found.notes[0]


def test_a_mean_that_is_worse_than_the_best_alone_is_no_barrier(tmp_path: Path) -> None:
    """Only worse than each of its parts is."""
    files = points(tmp_path, {"a": [1.0, 0.0], "b": [0.5, 0.0]})
    found = polyak.soup(files, outside, out=tmp_path / "soup.safetensors", method="uniform")
    assert (found.score, found.notes) == (0.75, ())


def test_line_is_exact_at_its_ends_and_straight_between(tmp_path: Path) -> None:
    """WiSE-FT's endpoints, bit for bit; the shares are those of the second."""
    files = points(tmp_path, {"a": [0.1, 1 / 3], "b": [7.0, -2 / 3]})
    seen: list[list[float]] = []

    def look(weights: dict[str, Tensor]) -> float:
        seen.append(weights["w"].tolist())
        return seen[-1][0]

    found = polyak.line(files, look, points=5)
    assert seen[0] == [0.1, 1 / 3]
    assert seen[-1] == [7.0, -2 / 3]
    assert found.shares == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert found.scores == pytest.approx([0.1 + 6.9 * share for share in found.shares])
    assert found.barrier == pytest.approx(0.0, abs=1e-12)
    assert found.connected
    assert found.verdict.startswith("No barrier")


def test_line_says_in_words_when_two_were_not_trained_from_one_start(tmp_path: Path) -> None:
    """And how high the barrier is, against the straight line between the scores of the ends."""
    files = points(tmp_path, {"a": [1.0, 0.0], "b": [-0.8, 0.0]})
    found = polyak.line(files, outside, points=3)
    assert found.scores == pytest.approx((1.0, 0.1, 0.8))
    assert found.barrier == pytest.approx(0.8)
    assert not found.connected
    assert found.verdict == (
        "A barrier: at 50% of b.safetensors the score is 0.1, at the ends 1 (a.safetensors) and "
        "0.8 (b.safetensors). They were not trained from one start, or went too far apart: their "
        "average is worth little."
    )
    loss = polyak.line(files, lambda w: 1.0 - outside(w), points=3, higher_is_better=False)
    assert not loss.connected
    assert loss.barrier == pytest.approx(found.barrier)


def test_line_tolerates_what_it_is_told_to(tmp_path: Path) -> None:
    """A dip of 4 % of the worse end's score."""
    files = points(tmp_path, {"a": [1.0, 0.28], "b": [1.0, -0.28]})

    def score(weights: dict[str, Tensor]) -> float:
        return float(weights["w"].norm())

    assert not polyak.line(files, score).connected
    assert polyak.line(files, score, tolerance=0.05).connected


def test_line_needs_two_ends_and_a_point_between(tmp_path: Path) -> None:
    """Two ends say nothing about what lies between them."""
    files = points(tmp_path, {"a": [1.0], "b": [2.0]})
    with pytest.raises(ArgumentError, match="points must be a whole number, at least 3, got 2"):
        polyak.line(files, outside, points=2)
    with pytest.raises(ArgumentError, match="checkpoints must be two for a line, got 1"):
        polyak.line(files[:1], outside)


def test_unrelated_networks_have_a_barrier_and_related_ones_have_not(tmp_path: Path) -> None:
    """A network and itself with its hidden units in another order: the same function, far apart."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    inputs = torch.randn(200, 2)
    targets = net(inputs).detach()

    def loss(weights: dict[str, Tensor]) -> float:
        made = torch.nn.functional.linear(inputs, weights["0.weight"], weights["0.bias"]).tanh()
        made = torch.nn.functional.linear(made, weights["2.weight"], weights["2.bias"])
        return float((made - targets).square().mean() / targets.var())

    state = net.state_dict()
    order = torch.roll(torch.arange(8), 1)
    shuffled = {
        "0.weight": state["0.weight"][order],
        "0.bias": state["0.bias"][order],
        "2.weight": state["2.weight"][:, order],
        "2.bias": state["2.bias"],
    }
    near = {name: value + 0.01 * torch.randn_like(value) for name, value in state.items()}
    files = []
    for name, one in (("net", state), ("shuffled", shuffled), ("near", near)):
        files.append(tmp_path / f"{name}.safetensors")
        save_file({key: value.contiguous() for key, value in one.items()}, files[-1])
    apart = polyak.line(files[:2], loss, higher_is_better=False)
    assert apart.scores[0] == pytest.approx(apart.scores[-1], abs=1e-6) == 0.0
    assert not apart.connected
    assert apart.barrier > 0.05
    assert polyak.line([files[0], files[2]], loss, higher_is_better=False).connected


def test_pairs_of_four_points_are_connected_as_geometry_says(tmp_path: Path) -> None:
    """Neighbours on the ring are, opposite ones are not."""
    files = points(tmp_path, {"a": [1, 0], "b": [0, 1], "c": [-1, 0], "d": [0, -1]})
    joined = {
        names([one.name, other.name])
        for one, other in combinations(files, 2)
        if polyak.line([one, other], outside, points=3, tolerance=0.3).connected
    }
    assert joined == {"ab", "bc", "cd", "ad"}
