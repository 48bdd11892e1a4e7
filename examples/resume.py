"""A run that may be killed at any moment: whole checkpoints, and an average that goes on exactly.

    python examples/resume.py [FOLDER]

Kill it and start it again with the same folder as often as you like: it ends with the same bits as
the run that was never stopped. Three things make that so: a checkpoint is written under another
name, synced and renamed, so there is always a whole one; it holds everything that the next step
depends on; and the average is saved with its clock, not as weights alone.
"""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import polyak

STEPS, EVERY = 400, 25


def write_whole(state: Mapping[str, Any], path: Path) -> None:
    """Save `state` so that `path` is the old file or the new one, never half of one.

    The data must be on disk before the name points to it, and the name before we count on it:
    hence a sync of the file, then the rename, then a sync of the folder.
    """
    temporary = path.with_name(f".{path.name}.partial")  # what a kill leaves is overwritten next
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Run:
    """Everything that the next step depends on, built anew in every process."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.step = 0
        self.data = torch.Generator().manual_seed(1)
        self.model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.average = polyak.Average(self.model, polyak.Power(sigma_rel=0.1))
        self.average.follow(self.optimizer)

    def train(self, until: int, folder: Path) -> None:
        """Go on to step `until`, with a checkpoint now and then."""
        while self.step < until:
            x = torch.randn(16, 4, generator=self.data)
            self.optimizer.zero_grad()
            (self.model(x) - x.sum(dim=1, keepdim=True)).square().mean().backward()
            self.optimizer.step()
            self.step += 1
            if self.step % EVERY == 0:
                self.save(folder)

    def save(self, folder: Path) -> None:
        """Write what is needed to go on, and what is needed to use the result."""
        state = {
            "step": self.step,
            "data": self.data.get_state(),
            "random": torch.get_rng_state(),  # dropout draws from it
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
        }
        write_whole(state, folder / "last.pt")
        polyak.save(self.average, folder / "averaged.safetensors")  # whole or not at all, too

    def resume(self, folder: Path) -> None:
        """Take up the last checkpoint, if there is one."""
        if not (folder / "last.pt").exists():
            return
        state = torch.load(folder / "last.pt", weights_only=True)
        self.step = state["step"]
        self.data.set_state(state["data"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        torch.set_rng_state(state["random"])  # last: building the model drew from it as well


def main(folder: Path, until: int = STEPS) -> dict[str, Tensor]:
    run = Run()
    run.resume(folder)
    print(f"starting at step {run.step}")
    run.train(until, folder)
    print(run.average.report())
    return run.average.weights()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary), until=STEPS // 2 + 3)  # three steps too far, and killed
            main(Path(temporary))
