"""A rank dies in the middle of a save, and a model is exported that no rank has room for."""

import random
from pathlib import Path

import pytest
import torch
import work_killed as work
from safetensors import safe_open

from ranks import outcomes_of, run_on

pytestmark = pytest.mark.prove

# Only the first rank writes the metadata, last of all.
DEATHS = [(moment, victim) for moment in work.MOMENTS for victim in range(3)][:-2]


@pytest.mark.parametrize(("moment", "victim"), DEATHS)
def test_rank_killed_in_a_save_stops_the_others_and_harms_no_older_checkpoint(
    moment: str, victim: int, tmp_path: Path
) -> None:
    """Errors within seconds, not a hang; the last checkpoint loads, the broken one is refused."""
    assert work.MOMENTS[-1] == "finishing"
    outcomes = outcomes_of(3, work.killed_while_saving, tmp_path, moment, victim, grace=20.0)

    assert outcomes[victim].end == "died"
    for outcome in outcomes[:victim] + outcomes[victim + 1 :]:
        assert outcome.end == "returned", outcome.text
        assert outcome.value, "a save without one of the ranks must not look like success"
        assert "onnection" in outcome.value or f"rank {victim}" in outcome.value.lower()
    assert (tmp_path / "good" / ".metadata").exists()
    assert not (tmp_path / "doomed" / ".metadata").exists()
    for message in run_on(2, work.goes_on, tmp_path, work.expected()):
        assert "doomed" in message


@pytest.mark.parametrize("way", ["fsdp", "replicas"])
def test_h9_export_streams(way: str, tmp_path: Path) -> None:
    """H9: below twice the largest tensor and 300 MB on every rank, for a model of 1.25 GiB."""
    path = tmp_path / "averaged.safetensors"

    peaks = run_on(2, work.export, path, way, limit=300.0)

    largest = 4 * work.SIDE**2
    assert max(peaks) < 2 * largest + 300e6
    assert 2 * largest + 300e6 < 0.35 * largest * work.LAYERS, "the model must not fit the bound"
    with safe_open(path, "pt") as file:
        names = [f"layer{number}.weight" for number in range(work.LAYERS)]
        assert sorted(file.keys()) == sorted(names)
        for name in random.Random(0).sample(names, 4):
            number = float(names.index(name) + 1)
            assert torch.equal(file.get_tensor(name), torch.full((work.SIDE, work.SIDE), number))
