"""The examples run, and show what they say they show."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import polyak
from deep import differences

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module, by a name that processes which it starts find as well."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(name)


def test_plain_loop_ends_nearer_the_truth_with_the_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a constant learning rate the average of a noisy fit is nearer than its last weights."""
    live, averaged = load("plain_loop", monkeypatch).main(tmp_path)
    assert averaged < live / 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["averaged.safetensors", "last.pt"]


def test_accumulation_and_skips_count_the_steps_that_were_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither micro-batches nor the two skipped steps are updates."""
    example = load("accumulation_amp", monkeypatch)
    result = example.main(steps=100)
    assert result.backwards == 100 * 4
    assert result.steps_taken == 100 - len(example.BROKEN)
    assert result.updates == result.steps_taken
    assert result.averaged < result.live / 2


def test_ddp_ranks_have_the_average_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit among the ranks; one process adds the same gradients in another order."""
    result = load("ddp", monkeypatch).main(tmp_path)
    first, second = result.ranks
    assert set(first) == set(second) == set(result.single)
    for name, single in result.single.items():
        assert torch.equal(first[name], second[name])
        # 40 steps of float32 on weights of about 1; a rank that saw only its half is 1e-2 away.
        torch.testing.assert_close(first[name], single, rtol=1e-5, atol=1e-5)


def test_compiled_before_or_after_it_is_the_same_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits; near those of eager code; and lending the average compiles nothing again."""
    torch.compiler.reset()  # what other tests compiled must not be counted or found again
    counter = CompileCounterWithBackend("aot_eager")
    result = load("compiled", monkeypatch).main(backend=counter)
    assert set(result.before) == set(result.after) == set(result.eager)
    for name, before in result.before.items():
        assert torch.equal(before, result.after[name])
        torch.testing.assert_close(before, result.eager[name], rtol=1e-4, atol=1e-5)
    assert result.apart < 1e-6
    # One graph with gradients, which both models share, and one without; no third for the block.
    assert counter.frame_count == 2


def test_a_run_in_two_halves_is_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped two steps after a checkpoint, which are made again: the same bits in the end."""
    example = load("resume", monkeypatch)
    halves, whole = tmp_path / "halves", tmp_path / "whole"
    for folder in (halves, whole):
        folder.mkdir()
    example.main(halves, until=102)
    example.main(halves, until=200)
    example.main(whole, until=200)

    two, one = (torch.load(folder / "last.pt", weights_only=True) for folder in (halves, whole))
    assert one["step"] == 200
    assert list(differences(two, one)) == []
    a, b = (polyak.load_weights(folder / "averaged.safetensors") for folder in (halves, whole))
    assert list(differences(a, b)) == []
    assert sorted(p.name for p in halves.iterdir()) == ["averaged.safetensors", "last.pt"]


def test_mean_teacher_short_run_compares_three_arms(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two seeds and few steps: every arm learns, and the table has a row a seed."""
    example = load("mean_teacher", monkeypatch)
    gains = example.main(seeds=(0, 1), steps=60)
    assert [g.over for g in gains] == [
        "supervised",
        "supervised, averaged",
        "own teacher, averaged",
    ]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:5]]
    assert [int(row[0]) for row in rows] == [0, 1]
    scores = torch.tensor([[float(cell) for cell in row[1:]] for row in rows])
    assert scores.shape == (2, 6)
    assert bool((scores > 60.0).all())  # chance is 10; 40 labels alone give about 85
    # The gains are those of the table: the teacher over the first, second and fourth column.
    means = (scores[:, 5:] - scores[:, [0, 1, 3]]).mean(dim=0)
    for found, mean in zip(gains, means.tolist(), strict=True):
        assert found.mean == pytest.approx(mean, abs=0.11)  # the table has one digit
        assert found.low < found.mean < found.high


def test_mean_teacher_interval_is_students(monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences 1, 2, 3: mean 2, deviation 1, and t(0.975, 2) = 4.30265 times 1 / sqrt(3)."""
    found = load("mean_teacher", monkeypatch).gain("it", [11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    assert (found.mean, found.low, found.high) == pytest.approx(
        (2.0, 2.0 - 4.302653 / 3**0.5, 2.0 + 4.302653 / 3**0.5), abs=1e-6
    )


def test_target_networks_find_the_true_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Soft or hard, what is learned is what value iteration says; the example asserts it too."""
    example = load("target_network", monkeypatch)
    true = example.true_values()
    # By hand: beside the goal 1, one step more costs a factor 0.9, into the pit -1.
    best = true[example.FREE].amax(dim=1).reshape(-1)
    expected = [0.81, 0.9, 1.0, 0.729, 0.9, 0.6561, 0.729, 0.81, 0.729]
    assert best.tolist() == pytest.approx(expected)
    assert true.min() == -1.0
    errors = example.main()
    assert set(errors) == {"soft", "hard"}
    assert max(errors.values()) < 0.02


def test_feedback_calms_the_live_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lookahead by what its closed form says; the example asserts that Adam's moments stay."""
    ratios = load("feedback", monkeypatch).main()
    assert ratios["Lookahead"] == pytest.approx(0.44297, rel=0.03)
    assert all(ratio < 1.0 for ratio in ratios.values())


def test_a_length_chosen_afterwards_beats_the_last_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On data that chose nothing; all lengths scored were planned, and the best is inside."""
    result = load("choose_length", monkeypatch).main(tmp_path)
    shortest, longest = result.plan.shortest, result.plan.longest
    widths = [point.target.sigma_rel for point in result.sweep.points]
    assert shortest is not None
    assert longest is not None
    assert shortest * 0.99 <= min(widths) < max(widths) <= longest  # the plan looks more coarsely
    assert result.sweep.best not in (result.sweep.points[0], result.sweep.points[-1])
    assert result.averaged < 0.95 * result.live
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "averaged.safetensors",
        "run",
        "scores.json",
    ]
