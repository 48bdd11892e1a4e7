"""Gradient accumulation and mixed precision: one update after each step really taken.

    python examples/accumulation_amp.py

Four micro-batches make a step, the forward pass runs under bfloat16 autocast, and a `GradScaler`
skips the steps whose gradients are not finite. The loop knows nothing of the average but one line:
`follow` counts what the optimizer did, not what the loop asked for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import polyak

MICRO_BATCHES = 4
BROKEN = (7, 30)  # steps at which a micro-batch is damaged


@dataclass(frozen=True)
class Result:
    """What the run did, and how far the live and the averaged fit are from the truth."""

    backwards: int
    steps_asked: int
    steps_taken: int
    updates: int
    live: float
    averaged: float


def batch(random: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 4, generator=random)
    return x, x.sum(dim=1, keepdim=True) + 0.5 * torch.randn(16, 1, generator=random)


def error(model: nn.Module, random: torch.Generator) -> float:
    x = torch.randn(512, 4, generator=random)
    with torch.no_grad():
        return float((model(x) - x.sum(dim=1, keepdim=True)).square().mean().sqrt())


def main(steps: int = 300) -> Result:
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(1)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    average = polyak.Average(model, polyak.Power(sigma_rel=0.1))
    average.follow(optimizer)

    backwards = steps_taken = 0
    for step in range(steps):
        for micro in range(MICRO_BATCHES):
            x, y = batch(random)
            if step in BROKEN and micro == 2:
                y[0] = float("inf")
            with torch.autocast("cpu", dtype=torch.bfloat16):
                prediction = model(x)
            loss = (prediction.float() - y).square().mean() / MICRO_BATCHES
            scaler.scale(loss).backward()
            backwards += 1
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        steps_taken += scaler.get_scale() >= scale  # the scaler backs off after a skip, only then

    truth = torch.Generator().manual_seed(2)
    live = error(model, truth)
    with average.applied():
        averaged = error(model, truth)
    print(f"{backwards} backward passes, {steps} steps asked for, {steps_taken} taken")
    print(f"{average.updates} updates; from the truth: live {live:.4f}, averaged {averaged:.4f}")
    return Result(backwards, steps, steps_taken, average.updates, live, averaged)


if __name__ == "__main__":
    main()
