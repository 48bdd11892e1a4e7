"""Train once, choose the length of the average afterwards.

    python examples/choose_length.py [FOLDER]

Two averages follow the run and are written to a folder now and then; with them every other length
can be had after training. The length is chosen on validation data and judged on test data.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import polyak

STEPS, SNAPSHOTS = 1_600, 32
ROWS = 512  # of validation and of test


@dataclass(frozen=True)
class Result:
    """What was chosen, and what it gained on data that chose nothing.

    Args:
        sweep: every length that was scored.
        live: test loss of the last weights.
        averaged: test loss of the chosen average.
        plan: what the folder was to hold, as said before the first step.
    """

    sweep: polyak.Sweep
    live: float
    averaged: float
    plan: polyak.SnapshotReport


def rows(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A smooth function of four numbers, with noise on top."""
    x = torch.randn(count, 4, generator=random)
    clean = torch.sin(2.0 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    return x, clean + 0.3 * torch.randn(count, 1, generator=random)


def loss_on(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Mean squared error of the model as it is."""
    with torch.no_grad():
        return float(nn.functional.mse_loss(model(data[0]), data[1]))


def main(folder: Path) -> Result:
    """Train, sweep, rebuild the best; everything goes into `folder`."""
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(1)
    validation, test = rows(ROWS, random), rows(ROWS, random)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)  # constant: it never settles

    averages = polyak.Averages(
        model, {"short": polyak.Power(sigma_rel=0.05), "long": polyak.Power(sigma_rel=0.10)}
    )
    averages.follow(optimizer)
    with polyak.Snapshots(averages, folder / "run", every=STEPS / SNAPSHOTS) as snapshots:
        plan = snapshots.plan(until=STEPS)  # lengths and disk, before a step is made
        print(plan, end="\n\n")
        for _ in range(STEPS):
            x, y = rows(16, random)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()

    sweep = polyak.sweep(
        folder / "run",
        lambda net: loss_on(net, validation),
        model=model,  # takes each average in turn, and has its own weights back afterwards
        higher_is_better=False,
        cache=folder / "scores.json",  # a sweep that was stopped goes on
    )
    print(sweep, end="\n\n")
    live = loss_on(model, test)

    best = polyak.reconstruct(folder / "run", sweep.best.target)
    best.save(folder / "averaged.safetensors")
    model.load_state_dict(polyak.load_weights(folder / "averaged.safetensors"))
    averaged = loss_on(model, test)
    print(f"{sweep.best.target!r}: test loss {averaged:.4f}, live weights {live:.4f}")
    return Result(sweep, live, averaged, plan)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
