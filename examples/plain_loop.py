"""A plain training loop with an average: follow, evaluate, save, stop and go on.

    python examples/plain_loop.py [FOLDER]

Fits a noisy line with a large, constant learning rate, where the live weights keep jumping and
their average does not. Stops half-way, and goes on from the checkpoint.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import polyak

SLOPE, OFFSET = 3.0, -1.0


def batch(random: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 1, generator=random)
    return x, SLOPE * x + OFFSET + 0.5 * torch.randn(16, 1, generator=random)


def error(model: nn.Module) -> float:
    """How far the fitted line is from the true one."""
    x = torch.linspace(-2.0, 2.0, 101)[:, None]
    with torch.no_grad():
        return float((model(x) - (SLOPE * x + OFFSET)).square().mean().sqrt())


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, random: torch.Generator, steps: int
) -> None:
    for _ in range(steps):
        x, y = batch(random)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def build() -> tuple[nn.Module, torch.optim.Optimizer, polyak.Average]:
    """Model, optimizer and average, the same at the start of a run and when it goes on."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    average = polyak.Average(model, polyak.Power(sigma_rel=0.1))
    average.follow(optimizer)
    return model, optimizer, average


def main(folder: Path) -> tuple[float, float]:
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(1)

    model, optimizer, average = build()
    train(model, optimizer, random, steps=500)
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average.state_dict(),
        },
        folder / "last.pt",
    )

    # Another day: build everything as before, then load.
    model, optimizer, average = build()
    saved = torch.load(folder / "last.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    average.load_state_dict(saved["average"])
    train(model, optimizer, random, steps=500)

    live = error(model)
    with average.applied():
        averaged = error(model)
    print(f"distance from the truth: live {live:.4f}, averaged {averaged:.4f}")
    print(average.report())

    polyak.save(average, folder / "averaged.safetensors")
    plain = nn.Linear(1, 1)
    polyak.load_weights(folder / "averaged.safetensors", plain)
    assert error(plain) == averaged
    return live, averaged


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
