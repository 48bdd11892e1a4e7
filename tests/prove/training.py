"""A training process for `test_killed.py`, which kills it: goes on where the last file left off.

    python tests/prove/training.py VARIANT FOLDER [--keep]

Prints each step when it is done, before it saves. With --keep every file is also kept under the
name of its step: what the same file must hold in a run that was killed.
"""

import importlib
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import polyak

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))
example: Any = importlib.import_module("resume")  # the helper that it shows is what is proved

STEPS, SAVE_EVERY, WIDTH = 120, 6, 192
VARIANTS = ["default", "late in bfloat16", "several", "window", "saved while lent"]


class Net(nn.Module):
    """Large enough that a kill can come inside the writing of a file."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.dropout(self.norm(self.first(x)).relu(), 0.2, self.training)
        out: Tensor = self.last(hidden)
        return out


def make_average(variant: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """An average that follows; each variant saves another kind of state."""
    average: Any
    every = 1
    if variant == "default":
        average = polyak.Average(model)
    elif variant == "late in bfloat16":
        late = polyak.After(40, polyak.Exponential(decay=0.99))
        average = polyak.Average(model, late, dtype=torch.bfloat16, rounding="stochastic", seed=7)
    elif variant == "several":
        long, short = polyak.HalfLifeRamp(0.1, half_life=30), polyak.CountRamp(0.9)
        average, every = polyak.Averages(model, {"long": long, "short": short}), 4
    elif variant == "window":
        average = polyak.Window(model, k=3, every=5)
    else:
        slow = polyak.Exponential(half_life=50, debias=False)
        average = polyak.Average(model, slow, rounding="stochastic")
    average.follow(optimizer, every=every)
    return average


def main(variant: str, folder: Path, keep: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    average = make_average(variant, model, optimizer)
    used = average["long"] if variant == "several" else average
    step = 0
    print("loading", flush=True)
    if (folder / "last.pt").exists():
        state = torch.load(folder / "last.pt", weights_only=True)
        step = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
        torch.set_rng_state(state["random"])
    print("from", step, flush=True)

    while step < STEPS:
        x = torch.randn(8, WIDTH)
        optimizer.zero_grad()
        (model(x) - x.roll(1)).square().mean().backward()
        optimizer.step()
        step += 1
        print(step, flush=True)
        if step % SAVE_EVERY == 0:
            with used.applied() if variant == "saved while lent" else nullcontext():
                state = {
                    "step": step,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average.state_dict(),
                    "random": torch.get_rng_state(),
                }
                example.write_whole(state, folder / "last.pt")
                polyak.save(used, folder / "averaged.safetensors")
            if keep:
                shutil.copy(folder / "last.pt", folder / f"{step}.pt")
                shutil.copy(folder / "averaged.safetensors", folder / f"{step}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), keep="--keep" in sys.argv)
