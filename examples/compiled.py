"""torch.compile: before or after building the average, it is the same average.

    python examples/compiled.py

Names are those of the plain model, whatever wraps it. `applied()` changes values in place, so the
compiled code computes with the averaged weights at once, without compiling again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import polyak

STEPS = 30


@dataclass(frozen=True)
class Result:
    """The average of a model compiled before and after it was built, and how well it was used."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    eager: dict[str, Tensor]  # never compiled
    apart: float  # output inside `applied()`, from that of a plain model with the averaged weights


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def train(run: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer) -> None:
    random = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(16, 4, generator=random)
        optimizer.zero_grad()
        (run(x) - x.prod(dim=1, keepdim=True)).square().mean().backward()
        optimizer.step()


def average_of(model: Any) -> tuple[polyak.Average, torch.optim.Optimizer]:
    """An average of `model`, compiled or not, that follows a new optimizer."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    average = polyak.Average(model, polyak.Uniform())
    average.follow(optimizer)
    return average, optimizer


def main(backend: str | Callable[..., Any] = "aot_eager") -> Result:
    compiled: Any = torch.compile(build(), backend=backend)
    before, optimizer = average_of(compiled)
    train(compiled, optimizer)

    model = build()
    after, optimizer = average_of(model)
    train(torch.compile(model, backend=backend), optimizer)

    model = build()
    eager, optimizer = average_of(model)
    train(model, optimizer)

    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        compiled(x)  # compiled without gradients here, and not again inside the block
        with before.applied():
            inside = compiled(x)
        plain = build()
        plain.load_state_dict(before.weights())
        apart = float((inside - plain(x)).abs().max())
    print(f"inside applied() the compiled model is {apart:.1e} from the plain one")
    return Result(before.weights(), after.weights(), eager.weights(), apart)


if __name__ == "__main__":
    main()
