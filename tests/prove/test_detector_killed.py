"""The detector of the examples, killed at random moments: it ends as if it never had been."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import polyak
from deep import differences

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
KILLS, PATIENCE = 20, 120


def start(folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / "detector.py"), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: "subprocess.Popen[str]") -> float:
    """Wait for the end of a run; return how long it took from its first line."""
    assert process.stdout is not None
    process.stdout.readline()
    begun = time.monotonic()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    return time.monotonic() - begun


def read(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


@pytest.mark.prove
def test_killed_at_random_moments_it_ends_with_the_bits_of_the_whole_run(tmp_path: Path) -> None:
    """SIGKILL after a random part of what the whole run takes, 20 times; every file is whole."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    folder.mkdir()
    duration = finish(start(whole))
    pick, begun_at = random.Random(0), []
    for _ in range(KILLS):
        process = start(folder)
        assert process.stdout is not None
        begun_at.append(int(process.stdout.readline().split()[-1]))
        time.sleep(pick.uniform(0.0, 0.08 * duration))  # no wait for anything: the moment is random
        process.kill()
        process.communicate(timeout=PATIENCE)
        for path in folder.glob("*.pt"):
            assert "exact" in read(path)
    finish(start(folder))
    print(f"{KILLS} kills; the runs began at the epochs {begun_at}")
    assert len(set(begun_at)) > 5  # most kills fell into training, not into what comes after it
    for name in ("last.pt", "best.pt"):
        assert list(differences(read(folder / name), read(whole / name))) == []
    ours, theirs = (polyak.load_weights(f / "averaged.safetensors") for f in (folder, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
