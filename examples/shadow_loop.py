"""Register, update, apply, restore: the loop of a shadow dictionary, and polyak's lines beside it.

    python examples/shadow_loop.py

`polyak.compat.shadow.EMA` is the class that many code bases carry about; the lines marked with
`polyak` do the same, and cannot be forgotten half-way. Both averages see the same steps, and both
evaluations the same weights, bit for bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import polyak
from polyak.compat.shadow import EMA

STEPS, EVERY, DECAY = 600, 100, 0.99


@dataclass(frozen=True)
class Result:
    """Errors at each evaluation, of the live model and of the average in both ways."""

    live: list[float]
    shadow: list[float]
    average: list[float]


def batch(random: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 4, generator=random)
    return x, x.sum(dim=1, keepdim=True) + 0.5 * torch.randn(16, 1, generator=random)


def evaluate(model: nn.Module) -> float:
    """Distance from the truth, on points that are the same each time."""
    x = torch.randn(512, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return float((model(x) - x.sum(dim=1, keepdim=True)).square().mean().sqrt())


def main() -> Result:
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(1)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)

    ema = EMA(model, DECAY)
    ema.register()
    average = polyak.Average(model, polyak.Exponential(decay=DECAY, debias=False))  # polyak
    average.follow(optimizer)  # polyak: this is the update, after each step really taken

    result = Result([], [], [])
    for step in range(1, STEPS + 1):
        x, y = batch(random)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        ema.update()

        if step % EVERY == 0:
            result.live.append(evaluate(model))

            ema.apply_shadow()
            result.shadow.append(evaluate(model))
            ema.restore()

            with average.applied():  # polyak: the trained weights are back after the block
                result.average.append(evaluate(model))

    print(f"from the truth: live {result.live[-1]:.4f}, averaged {result.average[-1]:.4f}")
    return result


if __name__ == "__main__":
    main()
