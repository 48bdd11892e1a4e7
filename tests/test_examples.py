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
